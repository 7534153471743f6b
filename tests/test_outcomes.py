import pickle
from typing import Any

import attrs
import pytest
from hypothesis import given
from value_strategies import STRATEGIES

from parallel_agents import _errors
from parallel_agents._errors import (
    AgentFailedError,
    EngineUnavailableError,
    InvalidPlanError,
    NeedsHuman,
    ParallelAgentsError,
    ParallelExecutionError,
    ResourceConflictError,
    ShutdownInProgressError,
)
from parallel_agents._models import NO_USAGE, ChatMessage, Usage
from parallel_agents._outcomes import (
    AgentOutcome,
    AgentRunResult,
    OutcomeStatus,
    ParallelExecutionResult,
    ParallelProgress,
    TerminationReason,
    outcome_of_result,
    progress_of_run,
)

Result = AgentRunResult[Any]
Outcome = AgentOutcome[Any]


def a_result(reason: TerminationReason = TerminationReason.COMPLETED, **fields: Any) -> Result:
    if reason is TerminationReason.ERROR:
        fields.setdefault("error_message", "it broke")
    return AgentRunResult(**{"task_id": "t", "agent_id": "a", "termination_reason": reason, **fields})


def an_outcome(reason: TerminationReason = TerminationReason.COMPLETED, **fields: Any) -> Outcome:
    return AgentOutcome(task_id="t", agent_id="a", result=a_result(reason), **fields)


def a_failure(status: OutcomeStatus = OutcomeStatus.FAILED, **fields: Any) -> Outcome:
    return AgentOutcome(**{"task_id": "t", "agent_id": "a", "error": "E: x", "status": status, **fields})


def an_execution(*outcomes: Outcome) -> ParallelExecutionResult[Any]:
    return ParallelExecutionResult(group_id="g", outcomes=outcomes, total_duration_seconds=1.0)


A_PROGRESS = ParallelProgress(group_id="g", total=5, completed=3, in_progress=1, succeeded=1, failed=1, parked=1)

VALID: dict[str, Any] = {
    "result": a_result(),
    "outcome": an_outcome(started_after_seconds=0.0),
    "failure": a_failure(),
    "execution": an_execution(an_outcome()),
    "progress": A_PROGRESS,
}


@pytest.mark.parametrize(
    ("valid", "field", "value", "message"),
    [
        ("result", "task_id", " ", "task_id must not be blank, got ' '"),
        ("result", "task_id", 5, "task_id must be a string, got 5 (int)"),
        ("result", "agent_id", "", "agent_id must not be blank, got ''"),
        ("result", "agent_id", None, "agent_id must be a string, got None (NoneType)"),
        (
            "result",
            "termination_reason",
            "completed",
            "termination_reason must be of type TerminationReason, got 'comp",
        ),
        ("result", "usage", None, "usage must be of type Usage, got None (NoneType)"),
        ("result", "turns", -1, "turns must be >= 0, got -1"),
        ("result", "turns", True, "turns must be an integer, got True (bool)"),
        ("result", "duration_seconds", -1.0, "duration_seconds must be >= 0, got -1.0"),
        ("result", "duration_seconds", float("nan"), "duration_seconds must be finite, got nan"),
        ("result", "duration_seconds", float("inf"), "duration_seconds must be finite, got inf"),
        ("result", "duration_seconds", "1", "duration_seconds must be a number, got '1' (str)"),
        ("result", "messages", "ab", "expected a sequence of items, got 'ab' (str)"),
        ("result", "messages", ["hi"], "messages[0] must be of type ChatMessage, got 'hi' (str)"),
        ("result", "error_message", "x", "error_message goes with ERROR only, not with COMPLETED"),
        ("result", "error_message", " ", "error_message must not be blank, got ' '"),
        ("result", "error_message", 5, "error_message must be a string, got 5 (int)"),
        ("result", "termination_reason", TerminationReason.ERROR, "error_message is required when termination_reason"),
        ("outcome", "task_id", "", "task_id must not be blank, got ''"),
        ("outcome", "agent_id", 5, "agent_id must be a string, got 5 (int)"),
        ("outcome", "result", "x", "result must be of type AgentRunResult, got 'x' (str)"),
        ("outcome", "result", None, "Exactly one of result or error must be given for task 't'"),
        ("outcome", "error", "x", "Exactly one of result or error must be given for task 't'"),
        ("outcome", "status", "succeeded", "status must be of type OutcomeStatus, got 'succeeded' (str)"),
        ("outcome", "status", OutcomeStatus.FAILED, "status failed contradicts a result that ended with completed"),
        ("outcome", "usage", 5, "usage must be of type Usage, got 5 (int)"),
        ("outcome", "attempts", -1, "attempts must be >= 0, got -1"),
        ("outcome", "attempts", True, "attempts must be an integer, got True (bool)"),
        ("outcome", "started_after_seconds", -1.0, "started_after_seconds must be >= 0, got -1.0"),
        ("outcome", "started_after_seconds", float("nan"), "started_after_seconds must be finite, got nan"),
        ("outcome", "duration_seconds", None, "duration_seconds must be a number, got None (NoneType)"),
        ("outcome", "duration_seconds", float("inf"), "duration_seconds must be finite, got inf"),
        ("outcome", "exception", "x", "exception must be of type BaseException, got 'x' (str)"),
        ("failure", "error", " ", "error must not be blank, got ' '"),
        ("failure", "error", None, "Exactly one of result or error must be given for task 't'"),
        ("failure", "status", OutcomeStatus.SUCCEEDED, "status succeeded needs a result, but task 't' has an error"),
        ("failure", "status", OutcomeStatus.PARKED, "status parked needs a result, but task 't' has an error"),
        ("execution", "group_id", " ", "group_id must not be blank, got ' '"),
        ("execution", "outcomes", {}, "expected a sequence of items, got {} (dict)"),
        ("execution", "outcomes", [5], "outcomes[0] must be of type AgentOutcome, got 5 (int)"),
        ("execution", "total_duration_seconds", -1, "total_duration_seconds must be >= 0, got -1"),
        ("execution", "total_duration_seconds", None, "total_duration_seconds must be a number, got None (NoneType)"),
        ("progress", "group_id", "", "group_id must not be blank, got ''"),
        ("progress", "total", -1, "total must be >= 0, got -1"),
        ("progress", "completed", 1.0, "completed must be an integer, got 1.0 (float)"),
        ("progress", "in_progress", True, "in_progress must be an integer, got True (bool)"),
        ("progress", "succeeded", -1, "succeeded must be >= 0, got -1"),
        ("progress", "failed", "1", "failed must be an integer, got '1' (str)"),
        ("progress", "parked", None, "parked must be an integer, got None (NoneType)"),
        ("progress", "in_progress", 3, "completed + in_progress must not exceed total: 3 + 3 > 5"),
        ("progress", "total", 3, "completed + in_progress must not exceed total: 3 + 1 > 3"),
        ("progress", "parked", 2, "succeeded + failed + parked must not exceed completed: 1 + 1 + 2 > 3"),
    ],
)
def test_a_wrong_value_is_refused_by_name(valid: str, field: str, value: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        attrs.evolve(VALID[valid], **{field: value})
    assert str(caught.value).startswith(message)


def test_an_outcome_must_be_about_the_task_and_the_agent_of_its_result() -> None:
    for task_id, agent_id in (("t2", "a"), ("t", "a2"), ("t2", "a2")):
        with pytest.raises(ValueError) as caught:
            AgentOutcome(task_id=task_id, agent_id=agent_id, result=a_result())
        assert str(caught.value) == (
            f"The result is for task 't' and agent 'a', but the outcome is for task {task_id!r} and agent {agent_id!r}"
        )


@pytest.mark.parametrize("value", VALID.values(), ids=VALID)
def test_values_are_frozen_and_valid_after_evolve(value: Any) -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        value.group_id = "x"
    assert attrs.evolve(value) == value


@pytest.mark.parametrize("reason", TerminationReason)
def test_an_outcome_that_the_executor_makes_is_one_like_any_other(reason: TerminationReason) -> None:
    fields: dict[str, Any] = {"attempts": 2, "started_after_seconds": 0.5, "duration_seconds": 1.5}
    usage = Usage(requests=1)
    made = outcome_of_result(a_result(reason), usage=usage, **fields)
    assert type(made) is AgentOutcome
    assert made == an_outcome(reason, usage=usage, **fields)
    assert hash(made) == hash(an_outcome(reason, usage=usage, **fields))
    assert pickle.loads(pickle.dumps(made)) == made
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        made.error = "x"  # type: ignore[misc]
    with pytest.raises(ValueError, match="attempts"):
        attrs.evolve(made, attempts=-1)


def test_a_snapshot_that_the_executor_makes_is_one_like_any_other() -> None:
    made = progress_of_run("g", total=5, in_progress=1, succeeded=1, failed=1, parked=1)
    assert type(made) is ParallelProgress
    assert made == A_PROGRESS
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        made.total = 4  # type: ignore[misc]


def test_a_class_that_extends_a_result_keeps_its_rules_and_its_type() -> None:
    class Extended(AgentRunResult[int]):
        pass

    made = Extended(task_id="t", agent_id="a", termination_reason=TerminationReason.COMPLETED, output=1)
    assert type(made) is Extended
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        made.output = 2  # type: ignore[misc]
    with pytest.raises(ValueError, match="turns must be >= 0"):
        attrs.evolve(made, turns=-1)


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (TerminationReason.COMPLETED, OutcomeStatus.SUCCEEDED),
        (TerminationReason.PARKED, OutcomeStatus.PARKED),
        (TerminationReason.MAX_TURNS, OutcomeStatus.FAILED),
        (TerminationReason.BUDGET_EXHAUSTED, OutcomeStatus.FAILED),
        (TerminationReason.SHUTDOWN, OutcomeStatus.FAILED),
        (TerminationReason.ERROR, OutcomeStatus.FAILED),
        (TerminationReason.STAGNATION, OutcomeStatus.FAILED),
    ],
)
def test_the_status_of_an_outcome_follows_from_its_result(reason: TerminationReason, status: OutcomeStatus) -> None:
    outcome = an_outcome(reason)
    assert outcome.status is status
    assert outcome.result is not None
    assert outcome.is_success is outcome.result.is_success is (status is OutcomeStatus.SUCCEEDED)
    assert outcome.is_failure is outcome.result.is_failure is (status is OutcomeStatus.FAILED)


@pytest.mark.parametrize(
    "status", [s for s in OutcomeStatus if s not in {OutcomeStatus.SUCCEEDED, OutcomeStatus.PARKED}]
)
def test_every_other_status_is_a_failure(status: OutcomeStatus) -> None:
    outcome = a_failure(status)
    assert outcome.is_failure
    assert not outcome.is_success
    assert outcome.output is None


def test_names_of_reasons_and_statuses_are_their_values_in_lower_case() -> None:
    for member in [*TerminationReason, *OutcomeStatus]:
        assert member.value == member.name.lower()
    assert [reason.name for reason in TerminationReason] == [
        "COMPLETED", "MAX_TURNS", "BUDGET_EXHAUSTED", "SHUTDOWN", "ERROR", "STAGNATION", "PARKED",
    ]  # fmt: skip
    assert [status.name for status in OutcomeStatus] == [
        "SUCCEEDED", "FAILED", "TIMED_OUT", "CANCELLED", "REJECTED", "SKIPPED", "PARKED",
    ]  # fmt: skip


def test_an_error_is_a_failure_unless_it_is_said_otherwise() -> None:
    assert AgentOutcome(task_id="t", agent_id="a", error="x").status is OutcomeStatus.FAILED
    assert a_failure(OutcomeStatus.TIMED_OUT).status is OutcomeStatus.TIMED_OUT


def test_the_usage_of_an_outcome_is_that_of_its_result_unless_more_was_metered() -> None:
    spent, metered = Usage(cost=2), Usage(cost=3)
    result = a_result(usage=spent)
    assert AgentOutcome(task_id="t", agent_id="a", result=result).usage == spent
    assert AgentOutcome(task_id="t", agent_id="a", result=result, usage=metered).usage == metered
    assert a_failure().usage == NO_USAGE
    assert a_failure(usage=metered).usage == metered


def test_the_result_of_an_agent_knows_its_cost_and_its_last_words() -> None:
    def said(*contents: str, role: str = "assistant") -> list[ChatMessage]:
        return [ChatMessage(role=role, content=content) for content in contents]

    assert a_result(usage=Usage(cost=1.5)).total_cost == 1.5
    assert a_result().completion_summary is None
    assert a_result(messages=said("one", "two", " ", "")).completion_summary == "two"
    assert a_result(messages=said("one") + said("two", role="user")).completion_summary == "one"
    assert a_result(messages=said("one", role="tool")).completion_summary is None


def test_the_output_of_an_outcome_is_that_of_its_result() -> None:
    assert AgentOutcome(task_id="t", agent_id="a", result=a_result(output=[1])).output == [1]


def test_the_exception_of_an_outcome_is_not_compared_shown_or_pickled() -> None:
    outcome = a_failure(exception=ValueError("secret"))
    assert outcome == a_failure()
    assert "secret" not in repr(outcome)
    again = pickle.loads(pickle.dumps(outcome))
    assert again == outcome
    assert again.exception is None
    assert isinstance(outcome.exception, ValueError)


def test_an_execution_counts_and_adds_up() -> None:
    outcomes = [
        an_outcome(usage=Usage(cost=1, requests=2)),
        a_failure(OutcomeStatus.CANCELLED, usage=Usage(cost=0.5)),
        an_outcome(TerminationReason.PARKED),
        an_outcome(TerminationReason.MAX_TURNS, usage=Usage(cost=0.25)),
    ]
    execution = an_execution(*outcomes)
    assert execution.outcomes == tuple(outcomes)
    assert (execution.agents_succeeded, execution.agents_failed, execution.agents_parked) == (1, 2, 1)
    assert execution.total_cost == 1.75
    assert execution.total_usage == Usage(cost=1.75, requests=2)
    assert not execution.all_succeeded
    assert an_execution(outcomes[0]).all_succeeded
    assert not an_execution(outcomes[2]).all_succeeded


@given(STRATEGIES[ParallelExecutionResult])
def test_every_outcome_of_an_execution_is_counted_once(execution: ParallelExecutionResult[Any]) -> None:
    counted = execution.agents_succeeded + execution.agents_failed + execution.agents_parked
    assert counted == len(execution.outcomes)
    assert execution.all_succeeded is (execution.agents_succeeded == len(execution.outcomes))
    failures = [outcome for outcome in execution.outcomes if outcome.is_failure]
    try:
        execution.raise_for_failures()
    except ExceptionGroup as group:
        assert [error.outcome for error in group.exceptions if isinstance(error, AgentFailedError)] == failures
    else:
        assert not failures


def test_an_outcome_is_found_by_its_task() -> None:
    second = a_failure(task_id="t2")
    execution = an_execution(an_outcome(), second)
    assert execution.outcome_of("t2") is second
    with pytest.raises(KeyError, match="group 'g' has no task 't3'"):
        execution.outcome_of("t3")


def test_failures_are_raised_in_assignment_order() -> None:
    error = an_outcome(TerminationReason.ERROR)
    turns = an_outcome(TerminationReason.MAX_TURNS)
    late = a_failure(OutcomeStatus.TIMED_OUT, error="Timed out after 3 s")
    an_execution(an_outcome(), an_outcome(TerminationReason.PARKED)).raise_for_failures()
    with pytest.raises(ExceptionGroup) as caught:
        an_execution(late, an_outcome(), error, turns).raise_for_failures()
    assert caught.value.message == "3 of 4 agents failed in 'g'"
    assert [str(failure) for failure in caught.value.exceptions] == [
        "Agent 'a' on task 't' timed_out: Timed out after 3 s",
        "Agent 'a' on task 't' failed: it broke",
        "Agent 'a' on task 't' failed: max_turns",
    ]


def test_a_raised_failure_has_the_agents_own_exception_as_its_cause() -> None:
    cause = LookupError("gone")
    with pytest.raises(ExceptionGroup) as caught:
        an_execution(a_failure(exception=cause), a_failure()).raise_for_failures()
    assert [failure.__cause__ for failure in caught.value.exceptions] == [cause, None]


def test_progress_knows_what_has_not_started() -> None:
    assert A_PROGRESS.pending == 1
    assert ParallelProgress(group_id="g", total=2, completed=0, in_progress=0, succeeded=0, failed=0).pending == 2
    full = ParallelProgress(group_id="g", total=2, completed=2, in_progress=0, succeeded=1, failed=1)
    assert (full.pending, full.parked) == (0, 0)


# Errors

WAY_OUT = "Let them claim different resources, or run one after the other"
ERRORS: list[tuple[ParallelAgentsError, dict[str, Any], str]] = [
    (
        ParallelExecutionError("Out of memory", VALID["execution"]),
        {"message": "Out of memory", "result": VALID["execution"]},
        "Out of memory. The outcomes of all agents are in .result",
    ),
    (
        ResourceConflictError("db", "a1", "a2"),
        {"resource": "db", "holder": "a1", "claimant": "a2"},
        "Resource 'db' is claimed by 'a2' but held by 'a1'. " + WAY_OUT,
    ),
    (AgentFailedError(a_failure()), {"outcome": a_failure()}, "Agent 'a' on task 't' failed: E: x"),
    (ShutdownInProgressError(), {}, "Shutdown in progress. Make a new ShutdownManager to run more"),
    (InvalidPlanError(["a: b", "c: d"]), {"problems": ("a: b", "c: d")}, "a: b\nc: d"),
    (EngineUnavailableError("install x"), {}, "install x"),
    (NeedsHuman("May I?"), {"question": "May I?", "results": ()}, "May I?"),
]


def test_every_error_is_tested_here() -> None:
    defined = {error for error in vars(_errors).values() if isinstance(error, type) and issubclass(error, Exception)}
    assert {type(error) for error, _, _ in ERRORS} == defined - {ParallelAgentsError}


@pytest.mark.parametrize(("error", "facts", "text"), ERRORS, ids=lambda value: type(value).__name__)
def test_errors_carry_their_facts_say_the_way_out_and_survive_pickling(
    error: ParallelAgentsError, facts: dict[str, Any], text: str
) -> None:
    for kept in (error, pickle.loads(pickle.dumps(error))):
        assert type(kept) is type(error)
        assert isinstance(kept, ParallelAgentsError)
        assert str(kept) == text
        assert {name: getattr(kept, name) for name in facts} == facts
