"""What came of it: frozen values for results, outcomes and progress.

Knows the models that went in; knows nothing of how agents are run.
"""

import math
from collections.abc import Iterable
from enum import StrEnum, auto
from functools import reduce
from operator import add
from typing import Any, Generic, TypeVar

from attrs import Factory, field, fields, frozen
from attrs.validators import optional

from ._checks import RULE, as_tuple, check_rules, each_is_a, integer, is_a, not_blank, number
from ._drafts import draft_class
from ._errors import AgentFailedError
from ._models import NO_USAGE, ChatMessage, Usage

T = TypeVar("T")


class TerminationReason(StrEnum):
    """Why an agent stopped, as its engine tells it."""

    COMPLETED = auto()
    """It did what it was asked."""
    MAX_TURNS = auto()
    """It used up its turns."""
    BUDGET_EXHAUSTED = auto()
    """What may be spent was spent."""
    SHUTDOWN = auto()
    """It was asked to stop and did."""
    ERROR = auto()
    """It could not go on; ``error_message`` says why."""
    STAGNATION = auto()
    """It went round in circles."""
    PARKED = auto()
    """It waits for a person, and is neither success nor failure."""


NO_MESSAGES: tuple[ChatMessage, ...] = ()
"""Compared by identity: CPython has one empty tuple."""

_COMPLETED = TerminationReason.COMPLETED  # on Python 3.11, looking a member up takes as long as a call


class OutcomeStatus(StrEnum):
    """How an assignment ended, as the executor tells it. Code decides by status, never by text."""

    SUCCEEDED = auto()
    """The engine returned a result that is a success."""
    FAILED = auto()
    """The engine raised, or returned a result that is a failure."""
    TIMED_OUT = auto()
    """It took longer than its assignment allows."""
    CANCELLED = auto()
    """It was stopped by fail-fast, by the caller, by ``cancel_task()``, or by itself."""
    REJECTED = auto()
    """It was not let in, because the program is shutting down."""
    SKIPPED = auto()
    """It was not needed any more, or what it needs is missing."""
    PARKED = auto()
    """It waits for a person."""


@frozen(kw_only=True, init=False)
class AgentRunResult(Generic[T]):
    """What an engine returns for one assignment.

    Attributes:
        task_id: The assignment's task.
        agent_id: The assignment's agent.
        termination_reason: Why the agent stopped.
        output: What it produced.
        error_message: Required if the reason is ERROR, and only then.
        usage: What it spent.
        turns: How many turns it took.
        duration_seconds: How long it worked, as the engine measured it.
        messages: The conversation.
    """

    task_id: str = field(metadata={RULE: not_blank})
    agent_id: str = field(metadata={RULE: not_blank})
    termination_reason: TerminationReason = field(metadata={RULE: is_a(TerminationReason)})
    output: T | None = None
    error_message: str | None = field(default=None, metadata={RULE: optional(not_blank)})
    usage: Usage = field(default=NO_USAGE, metadata={RULE: is_a(Usage)})
    turns: int = field(default=0, metadata={RULE: integer(at_least=0)})
    duration_seconds: float = field(default=0.0, metadata={RULE: number(at_least=0)})
    messages: tuple[ChatMessage, ...] = field(default=(), converter=as_tuple, metadata={RULE: each_is_a(ChatMessage)})

    def __init__(
        self,
        *,
        task_id: str,
        agent_id: str,
        termination_reason: TerminationReason,
        output: T | None = None,
        error_message: str | None = None,
        usage: Usage = NO_USAGE,
        turns: int = 0,
        duration_seconds: float = 0.0,
        messages: Iterable[ChatMessage] = NO_MESSAGES,
    ) -> None:
        draft: Any = self
        # engines make one for each agent: what is as plain as it nearly always is gets its fields by plain assignment
        if (
            type(self) is AgentRunResult
            and type(task_id) is str
            and type(agent_id) is str
            and task_id.strip()
            and agent_id.strip()
            and termination_reason is _COMPLETED
            and error_message is None
            and (usage is NO_USAGE or type(usage) is Usage)
            and type(turns) is int
            and turns >= 0
            and type(duration_seconds) is float
            and 0.0 <= duration_seconds < math.inf
            and messages is NO_MESSAGES
        ):
            _set_class(draft, _ResultDraft)
            draft.task_id = task_id
            draft.agent_id = agent_id
            draft.termination_reason = termination_reason
            draft.output = output
            draft.error_message = None
            draft.usage = usage
            draft.turns = turns
            draft.duration_seconds = duration_seconds
            draft.messages = NO_MESSAGES
            draft.__class__ = AgentRunResult
        else:
            draft.__attrs_init__(
                task_id=task_id,
                agent_id=agent_id,
                termination_reason=termination_reason,
                output=output,
                error_message=error_message,
                usage=usage,
                turns=turns,
                duration_seconds=duration_seconds,
                messages=messages,
            )

    def __attrs_post_init__(self) -> None:
        check_rules(self)
        failed = self.termination_reason is TerminationReason.ERROR
        if failed and self.error_message is None:
            raise ValueError("error_message is required when termination_reason is ERROR")
        if not failed and self.error_message is not None:
            raise ValueError(f"error_message goes with ERROR only, not with {self.termination_reason.name}")

    @property
    def is_success(self) -> bool:
        """Whether the agent did what it was asked."""
        return self.termination_reason is TerminationReason.COMPLETED

    @property
    def is_failure(self) -> bool:
        """Whether it is neither a success nor parked."""
        return not self.is_success and self.termination_reason is not TerminationReason.PARKED

    @property
    def total_cost(self) -> float:
        """What it cost, in the user's currency."""
        return self.usage.cost

    @property
    def completion_summary(self) -> str | None:
        """The last assistant message with text in it, if there is one."""
        said = (m.content for m in reversed(self.messages) if m.role == "assistant" and m.content.strip())
        return next(said, None)


_set_class = vars(object)["__class__"].__set__
_ResultDraft = draft_class(AgentRunResult)


def completed_result(task_id: str, agent_id: str, output: T) -> AgentRunResult[T]:
    """Return the result of an agent that did what it was asked; the ids are those of its assignment, thus valid."""
    result: Any = _ResultDraft()
    result.task_id = task_id
    result.agent_id = agent_id
    result.termination_reason = _COMPLETED
    result.output = output
    result.error_message = None
    result.usage = NO_USAGE
    result.turns = 0
    result.duration_seconds = 0.0
    result.messages = NO_MESSAGES
    result.__class__ = AgentRunResult
    made: AgentRunResult[T] = result
    return made


_SUCCEEDED = OutcomeStatus.SUCCEEDED  # as above
_STATUS_OF_REASON = dict.fromkeys(TerminationReason, OutcomeStatus.FAILED) | {
    TerminationReason.COMPLETED: OutcomeStatus.SUCCEEDED,
    TerminationReason.PARKED: OutcomeStatus.PARKED,
}


def _status_of_its_result(outcome: "AgentOutcome[Any]") -> OutcomeStatus:
    result = outcome.result  # of any type: the rules are checked when all fields have their values
    return _STATUS_OF_REASON[result.termination_reason] if isinstance(result, AgentRunResult) else OutcomeStatus.FAILED


def _usage_of_its_result(outcome: "AgentOutcome[Any]") -> Usage:
    return outcome.result.usage if isinstance(outcome.result, AgentRunResult) else NO_USAGE


@frozen(kw_only=True)
class AgentOutcome(Generic[T]):
    """What came of one assignment, whatever happened to it.

    Attributes:
        task_id: The assignment's task.
        agent_id: The assignment's agent.
        result: What the engine returned.
        error: What happened instead; exactly one of ``result`` and ``error`` is given.
        status: How it ended; follows from a result, and is FAILED for an error unless said otherwise.
        usage: What was spent, also by an agent that failed or was stopped.
        attempts: How often the agent was started.
        started_after_seconds: From the start of the group to the start of the engine call; ``None``: never started.
        duration_seconds: How long the engine call took.
        exception: The live exception behind ``error``; neither compared, pickled nor serialised.
    """

    task_id: str = field(metadata={RULE: not_blank})
    agent_id: str = field(metadata={RULE: not_blank})
    result: AgentRunResult[T] | None = field(default=None, metadata={RULE: optional(is_a(AgentRunResult))})
    error: str | None = field(default=None, metadata={RULE: optional(not_blank)})
    status: OutcomeStatus = field(
        default=Factory(_status_of_its_result, takes_self=True), metadata={RULE: is_a(OutcomeStatus)}
    )
    usage: Usage = field(default=Factory(_usage_of_its_result, takes_self=True), metadata={RULE: is_a(Usage)})
    attempts: int = field(default=1, metadata={RULE: integer(at_least=0)})
    started_after_seconds: float | None = field(default=None, metadata={RULE: optional(number(at_least=0))})
    duration_seconds: float = field(default=0.0, metadata={RULE: number(at_least=0)})
    exception: BaseException | None = field(
        default=None, eq=False, repr=False, metadata={RULE: optional(is_a(BaseException))}
    )

    def __attrs_post_init__(self) -> None:
        result, started, duration = self.result, self.started_after_seconds, self.duration_seconds
        is_plain = (
            type(result) is AgentRunResult
            and self.task_id == result.task_id
            and self.agent_id == result.agent_id
            and self.status is OutcomeStatus.SUCCEEDED
            and result.termination_reason is TerminationReason.COMPLETED
            and self.error is None
            and self.exception is None
            and type(self.usage) is Usage
            and type(self.attempts) is int
            and self.attempts >= 0
            and type(started) is float
            and type(duration) is float
            and 0.0 <= started < math.inf
            and 0.0 <= duration < math.inf
        )
        if is_plain:
            return
        check_rules(self)
        if (result is None) == (self.error is None):
            raise ValueError(f"Exactly one of result or error must be given for task {self.task_id!r}")
        if result is None:
            if self.status in (OutcomeStatus.SUCCEEDED, OutcomeStatus.PARKED):
                raise ValueError(f"status {self.status} needs a result, but task {self.task_id!r} has an error")
            return
        if self.status is not _STATUS_OF_REASON[result.termination_reason]:
            raise ValueError(f"status {self.status} contradicts a result that ended with {result.termination_reason}")
        if (result.task_id, result.agent_id) != (self.task_id, self.agent_id):
            raise ValueError(
                f"The result is for task {result.task_id!r} and agent {result.agent_id!r}, "
                f"but the outcome is for task {self.task_id!r} and agent {self.agent_id!r}"
            )

    def __getstate__(self) -> dict[str, Any]:
        state = {a.name: getattr(self, a.name) for a in fields(type(self))}
        state["exception"] = None  # a live object: its frames and locals must not travel
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)

    @property
    def is_success(self) -> bool:
        """Whether the agent did what it was asked."""
        return self.status is OutcomeStatus.SUCCEEDED

    @property
    def is_failure(self) -> bool:
        """Whether it is neither a success nor parked."""
        return self.status is not OutcomeStatus.SUCCEEDED and self.status is not OutcomeStatus.PARKED

    @property
    def output(self) -> T | None:
        """The result's output, if there is a result."""
        return None if self.result is None else self.result.output


_OutcomeDraft = draft_class(AgentOutcome)


def outcome_of_result(
    result: AgentRunResult[T], usage: Usage, attempts: int, started_after_seconds: float, duration_seconds: float
) -> AgentOutcome[T]:
    """Return the outcome of an engine call that returned a result; the executor knows that its parts are valid."""
    outcome: Any = _OutcomeDraft()
    outcome.task_id = result.task_id
    outcome.agent_id = result.agent_id
    outcome.result = result
    outcome.error = None
    outcome.status = (
        _SUCCEEDED if result.termination_reason is _COMPLETED else _STATUS_OF_REASON[result.termination_reason]
    )
    outcome.usage = usage
    outcome.attempts = attempts
    outcome.started_after_seconds = started_after_seconds
    outcome.duration_seconds = duration_seconds
    outcome.exception = None
    outcome.__class__ = AgentOutcome
    made: AgentOutcome[T] = outcome
    return made


@frozen(kw_only=True)
class ParallelExecutionResult(Generic[T]):
    """What came of a group: one outcome per assignment, in assignment order.

    Attributes:
        group_id: The group.
        outcomes: In the order of the group's assignments.
        total_duration_seconds: From the start of the group to its end.
    """

    group_id: str = field(validator=not_blank)
    outcomes: tuple[AgentOutcome[T], ...] = field(converter=as_tuple, validator=each_is_a(AgentOutcome))
    total_duration_seconds: float = field(validator=number(at_least=0))

    @property
    def agents_succeeded(self) -> int:
        """How many succeeded."""
        return sum(outcome.is_success for outcome in self.outcomes)

    @property
    def agents_failed(self) -> int:
        """How many are failures, of whatever kind."""
        return sum(outcome.is_failure for outcome in self.outcomes)

    @property
    def agents_parked(self) -> int:
        """How many wait for a person."""
        return len(self.outcomes) - self.agents_succeeded - self.agents_failed

    @property
    def all_succeeded(self) -> bool:
        """Whether every agent did what it was asked."""
        return all(outcome.is_success for outcome in self.outcomes)

    @property
    def total_usage(self) -> Usage:
        """What all agents spent together."""
        return reduce(add, (outcome.usage for outcome in self.outcomes), NO_USAGE)

    @property
    def total_cost(self) -> float:
        """What all agents cost together, in the user's currency."""
        return self.total_usage.cost

    def outcome_of(self, task_id: str) -> AgentOutcome[T]:
        """Return the outcome of one task.

        Raises:
            KeyError: If the group has no such task.
        """
        for outcome in self.outcomes:
            if outcome.task_id == task_id:
                return outcome
        raise KeyError(f"group {self.group_id!r} has no task {task_id!r}")

    def raise_for_failures(self) -> None:
        """Raise if any agent failed.

        Raises:
            ExceptionGroup: Of AgentFailedError, one per failure, in assignment order; each has the agent's own
                exception as its cause, where there is one.
        """
        failures = [AgentFailedError(outcome) for outcome in self.outcomes if outcome.is_failure]
        for failure in failures:
            failure.__cause__ = failure.outcome.exception
        if failures:
            count = f"{len(failures)} of {len(self.outcomes)} agents failed"
            raise ExceptionGroup(f"{count} in {self.group_id!r}", failures)


@frozen(kw_only=True)
class ParallelProgress:
    """How far a group is, at one moment.

    Attributes:
        group_id: The group.
        total: Its assignments.
        completed: Those that have an outcome.
        in_progress: Those whose engine call runs.
        succeeded: Of the completed ones, those that succeeded.
        failed: Of the completed ones, those that are failures.
        parked: Of the completed ones, those that wait for a person.
    """

    group_id: str = field(metadata={RULE: not_blank})
    total: int = field(metadata={RULE: integer(at_least=0)})
    completed: int = field(metadata={RULE: integer(at_least=0)})
    in_progress: int = field(metadata={RULE: integer(at_least=0)})
    succeeded: int = field(metadata={RULE: integer(at_least=0)})
    failed: int = field(metadata={RULE: integer(at_least=0)})
    parked: int = field(default=0, metadata={RULE: integer(at_least=0)})

    def __attrs_post_init__(self) -> None:
        counters = (self.total, self.completed, self.in_progress, self.succeeded, self.failed, self.parked)
        is_plain = type(self.group_id) is str and self.group_id.strip() and {*map(type, counters)} == {int}
        if not is_plain or min(counters) < 0:
            check_rules(self)
        if self.completed + self.in_progress > self.total:
            raise ValueError(
                f"completed + in_progress must not exceed total: {self.completed} + {self.in_progress} > {self.total}"
            )
        if self.succeeded + self.failed + self.parked > self.completed:
            raise ValueError(
                "succeeded + failed + parked must not exceed completed: "
                f"{self.succeeded} + {self.failed} + {self.parked} > {self.completed}"
            )

    @property
    def pending(self) -> int:
        """Those that have not started."""
        return self.total - self.completed - self.in_progress


_ProgressDraft = draft_class(ParallelProgress)


def progress_of_run(  # noqa: PLR0917 - keywords would make it a third slower
    group_id: str, total: int, in_progress: int, succeeded: int, failed: int, parked: int
) -> ParallelProgress:
    """Return the progress of a run, whose counters are right by themselves."""
    progress: Any = _ProgressDraft()
    progress.group_id = group_id
    progress.total = total
    progress.completed = succeeded + failed + parked
    progress.in_progress = in_progress
    progress.succeeded = succeeded
    progress.failed = failed
    progress.parked = parked
    progress.__class__ = ParallelProgress
    made: ParallelProgress = progress
    return made
