"""IdleTimeoutEngine: an end to agents that show no progress."""

from typing import Any

import anyio
from attrs import field, frozen

from .._checks import is_a, number
from .._context import current_run
from .._models import AgentAssignment, Usage
from .._outcomes import AgentRunResult
from ._protocol import AgentEngine, check_with


@frozen
class IdleTimeoutEngine:
    """Ends an agent that has not called ``record_usage()`` for some time, however long it may run otherwise.

    An agent that works without spending anything shows that it does with ``record_usage(Usage())``.

    Args:
        inner: What runs agents.
        idle_seconds: How long, from the start and from each report on. Time that is not charged to the agent's timeout
            counts all the same: put this engine inside the one that makes it wait.
    """

    inner: AgentEngine = field(validator=is_a(AgentEngine))
    idle_seconds: float = field(validator=number(above=0))

    def check(self, assignment: AgentAssignment, /) -> None:
        """Refuse what the inner engine refuses."""
        check_with(self.inner, assignment)

    async def run(self, assignment: AgentAssignment, /) -> AgentRunResult[Any]:
        """Run the inner engine for as long as it reports.

        Raises:
            TimeoutError: If it did not; it was cancelled first.
            LookupError: Outside an engine call of an executor.
        """
        with anyio.move_on_after(self.idle_seconds) as scope:

            def start_over(_usage: Usage) -> None:
                scope.deadline = anyio.current_time() + self.idle_seconds

            with current_run().watching_usage(start_over):
                return await self.inner.run(assignment)
        raise TimeoutError(f"reported nothing for {self.idle_seconds:g} s")
