"""What a journal promises to ``JournaledEngine``. Knows no file and no engine."""

from typing import Any, Protocol, runtime_checkable

from attrs import field, frozen

from .._checks import is_a, not_blank
from .._errors import ParallelAgentsError
from .._models import NO_USAGE, Usage
from .._outcomes import AgentRunResult
from ..locks._protocol import Lease


class JournalError(ParallelAgentsError):
    """A journal cannot be read or written; what it was to keep has not been reported either.

    Attributes:
        journal: Which one.
        problem: Why, and the way out.
        result: What the agent returned when it could not be recorded: it was paid for.
    """

    def __init__(self, journal: str, problem: str) -> None:
        super().__init__(journal, problem)
        self.journal = journal
        self.problem = problem
        self.result: AgentRunResult[Any] | None = None

    def __str__(self) -> str:
        return f"Journal {self.journal!r} {self.problem}"


@frozen(kw_only=True)
class Step:
    """What is to be done once, however often it is started.

    Attributes:
        execution: All runs of one name continue each other.
        group_id: The group.
        task_id: The task.
        agent_id: The agent.
        fingerprint: Of all that decides what the agent does; another fingerprint is other work.
        lease: The claims that the agent holds: a journal that knows their lock refuses its ending when they are lost.
    """

    execution: str = field(validator=not_blank)
    group_id: str = field(validator=not_blank)
    task_id: str = field(validator=not_blank)
    agent_id: str = field(validator=not_blank)
    fingerprint: str = field(validator=not_blank)
    lease: Lease | None = field(default=None, eq=False, repr=False)


@frozen(kw_only=True)
class Entry:
    """What a journal knows of a step when it is started.

    Attributes:
        attempt: Names this start towards the journal; ``None`` if there is nothing left to do.
        content: What was recorded of its success, if there was one.
        spent: What all earlier starts of the task spent, whatever became of them.
        reason: Why it is not just started: it is ``recorded``; or it has been started before, and was ``interrupted``,
            has ``failed``, or the work has ``changed``. ``None``: this is the first start.
    """

    attempt: int | None
    content: str | None = None
    spent: Usage = NO_USAGE
    reason: str | None = None


@frozen(kw_only=True)
class Ending:
    """How a start ended.

    Attributes:
        status: ``succeeded`` or ``parked``, and then the step is done and must not be done again; or ``failed``.
        content: The result as JSON, or text about the failure.
        usage: What this start spent, all in all.
    """

    status: str = field(validator=not_blank)
    content: str = field(validator=is_a(str))
    usage: Usage = field(validator=is_a(Usage))


@runtime_checkable
class Journal(Protocol):
    """Keeps what agents did.

    What it was told must be there after the process was killed and after the power was lost, as soon as the call that
    told it has returned.
    """

    async def start(self, step: Step, /) -> Entry:
        """Record that a step starts, unless it is done; return what is known of it.

        Waits until that is durable. Cancelled, it may have been recorded: that is a start that spent nothing.

        Raises:
            JournalError: If it cannot be recorded: the step must not start.
        """
        ...

    def spend(self, attempt: int, usage: Usage, /) -> None:
        """Record soon what was spent since the last call. Never waits, and never fails."""
        ...

    async def end(self, attempt: int, ending: Ending, /) -> None:
        """Record how a start ended.

        Waits until that is durable; not to be cancelled half-way, but it does not wait for long.

        Raises:
            JournalError: If it cannot be recorded.
        """
        ...


@runtime_checkable
class LetsGo(Protocol):
    """A journal that wants to know when a start was left without an ending, by a cancellation for example."""

    def let_go(self, attempt: int, /) -> None:
        """Record soon that nobody is at it any more. Never waits, and never fails."""
        ...
