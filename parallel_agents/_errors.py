"""The error hierarchy. Errors carry their facts as attributes, survive pickling, and say the way out.

Errors of a value's constructor are plain ``ValueError`` and ``TypeError`` and do not stand here.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._outcomes import AgentOutcome, ParallelExecutionResult
    from ._tools import ToolResult


class ParallelAgentsError(Exception):
    """Base of every error that this library raises on purpose."""


class ParallelExecutionError(ParallelAgentsError):
    """A group could not end as it should: an agent met a fatal error, or locks could not be given back.

    Attributes:
        result: Complete all the same, with an outcome for each assignment.
    """

    def __init__(self, message: str, result: "ParallelExecutionResult[Any]") -> None:
        super().__init__(message, result)
        self.message = message
        self.result = result

    def __str__(self) -> str:
        return f"{self.message}. The outcomes of all agents are in .result"


class ResourceConflictError(ParallelAgentsError):
    """Two assignments claim the same resource, or somebody outside the group holds it; nothing was run.

    Attributes:
        resource: What both want.
        holder: Who has it: an agent of the group, or the name of a holder outside.
        claimant: The agent that wants it too.
    """

    def __init__(self, resource: str, holder: str, claimant: str) -> None:
        super().__init__(resource, holder, claimant)
        self.resource = resource
        self.holder = holder
        self.claimant = claimant

    def __str__(self) -> str:
        return (
            f"Resource {self.resource!r} is claimed by {self.claimant!r} but held by {self.holder!r}. "
            "Let them claim different resources, or run one after the other"
        )


class AgentFailedError(ParallelAgentsError):
    """An agent failed; raised by ``raise_for_failures()``.

    Attributes:
        outcome: All that is known about it.
    """

    def __init__(self, outcome: "AgentOutcome[Any]") -> None:
        super().__init__(outcome)
        self.outcome = outcome

    def __str__(self) -> str:
        outcome = self.outcome
        if outcome.result is None:
            reason = outcome.error
        else:
            reason = outcome.result.error_message or outcome.result.termination_reason.value
        return f"Agent {outcome.agent_id!r} on task {outcome.task_id!r} {outcome.status.value}: {reason}"


class ShutdownInProgressError(ParallelAgentsError):
    """Something was asked for that cannot start any more, because the program is shutting down."""

    def __str__(self) -> str:
        return "Shutdown in progress. Make a new ShutdownManager to run more"


class InvalidPlanError(ParallelAgentsError):
    """A plan cannot be run as it is written; nothing was run.

    Attributes:
        problems: Every one of them, as ``path: what is wrong``.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(tuple(problems))
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)


class NeedsHuman(ParallelAgentsError):  # noqa: N818 - nothing went wrong
    """A tool raises it where a person has to decide; the agent is parked.

    Attributes:
        question: What the person is asked.
        results: What the tools of the same turn returned, in the order of the calls; set by ``invoke_all()``.
    """

    def __init__(self, question: str) -> None:
        super().__init__(question)
        self.question = question
        self.results: tuple[ToolResult, ...] = ()


class EngineUnavailableError(ParallelAgentsError):
    """An engine cannot work here; the message says what is missing and what to install."""
