"""Assertions about what came of a group, which say what is different and why."""

from collections.abc import Mapping
from typing import Any

from .._outcomes import AgentOutcome, OutcomeStatus, ParallelExecutionResult
from .._words import error_line


def assert_outcomes(result: ParallelExecutionResult[Any], expected: Mapping[str, OutcomeStatus | str], /) -> None:
    """Assert that each agent ended as expected, and that there are no others.

    A failure shows every task that is not as expected, with its error::

        2 of 3 outcomes of group 'review' not as expected:
          - api   expected succeeded
          + api   failed: ConnectionError: no route
          - docs  expected skipped
          + docs  not in the group

    Args:
        result: What came of the group.
        expected: Statuses by task ids; a status, or its value such as ``"timed_out"``.

    Raises:
        AssertionError: If something is different.
        ValueError: If *expected* names a status that does not exist.
    """
    wanted = {task_id: OutcomeStatus(status) for task_id, status in expected.items()}
    found = {outcome.task_id: outcome for outcome in result.outcomes}
    tasks = [*wanted, *(task_id for task_id in found if task_id not in wanted)]
    wrong = [t for t in tasks if t not in wanted or t not in found or found[t].status is not wanted[t]]
    if not wrong:
        return
    width = max(map(len, wrong))
    lines = [f"{len(wrong)} of {len(tasks)} outcomes of group {result.group_id!r} not as expected:"]
    for task_id in wrong:
        lines.append(f"  - {task_id:<{width}}  {_wanted(wanted.get(task_id))}")
        lines.append(f"  + {task_id:<{width}}  {_found(found.get(task_id))}")
    raise AssertionError("\n".join(lines))


def assert_all_succeeded(result: ParallelExecutionResult[Any], /) -> None:
    """Assert that every agent succeeded; a failure shows those that did not, with their errors.

    Args:
        result: What came of the group.

    Raises:
        AssertionError: If one did not.
    """
    assert_outcomes(result, dict.fromkeys((outcome.task_id for outcome in result.outcomes), OutcomeStatus.SUCCEEDED))


def _wanted(status: OutcomeStatus | None) -> str:
    return "not expected" if status is None else f"expected {status.value}"


def _found(outcome: AgentOutcome[Any] | None) -> str:
    if outcome is None:
        return "not in the group"
    told = error_line(outcome)
    return f"{outcome.status.value}: {told}" if told else outcome.status.value
