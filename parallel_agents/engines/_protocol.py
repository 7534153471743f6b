"""What an engine is."""

from typing import Any, Protocol, runtime_checkable

from .._checks import shown
from .._models import AgentAssignment
from .._outcomes import AgentRunResult


@runtime_checkable
class AgentEngine(Protocol):
    """Runs one agent on one assignment; the executor calls it once for each."""

    async def run(self, assignment: AgentAssignment, /) -> AgentRunResult[Any]:
        """Do the work and return what came of it.

        Whatever is raised becomes that agent's outcome. A cancelled call cleans up and re-raises.
        Usage that is told to ``current_run().record_usage()`` is kept also when the call fails.
        """
        ...


@runtime_checkable
class ChecksAssignments(Protocol):
    """An engine that can tell, before anything starts, that it cannot run an assignment."""

    def check(self, assignment: AgentAssignment, /) -> None:
        """Refuse an assignment that cannot be run; called once for each, before any runs.

        Raises:
            ValueError: Saying what is wrong with it.
        """
        ...


def require_engine(name: str, value: object) -> None:
    """Refuse what is no engine where one is wanted that this one wraps.

    Raises:
        TypeError: Naming the argument, and saying what it was given.
    """
    if not isinstance(value, AgentEngine):
        raise TypeError(f"{name} must be an engine, such as FunctionEngine(function), got {shown(value)}")


def check_with(engine: AgentEngine, assignment: AgentAssignment) -> None:
    """Let an engine refuse an assignment, if it is one that can."""
    if isinstance(engine, ChecksAssignments):
        engine.check(assignment)
