"""What comes first and when to stop: dependencies, deadlines, enough successes, budgets."""

from itertools import pairwise
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio import wait_all_tasks_blocked
from clocks import virtual_time
from groups import assignment, group_of
from hypothesis import given
from hypothesis import strategies as st

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    AgentRunResult,
    Budget,
    ClaimPolicy,
    OutcomeStatus,
    ParallelEvent,
    ParallelExecutionGroup,
    ParallelExecutor,
    RunContext,
    Task,
    TerminationReason,
    Usage,
    current_run,
)
from parallel_agents._admission import Admission
from parallel_agents.events import PARALLEL_GROUP_COMPLETE

pytestmark = pytest.mark.anyio

SUCCEEDED, FAILED, SKIPPED = OutcomeStatus.SUCCEEDED, OutcomeStatus.FAILED, OutcomeStatus.SKIPPED
CANCELLED, TIMED_OUT = OutcomeStatus.CANCELLED, OutcomeStatus.TIMED_OUT


def graph(dependencies: dict[str, str], **options: Any) -> ParallelExecutionGroup:
    """Return a group of tasks with names of one letter, and for each the letters that it depends on."""
    return ParallelExecutionGroup(
        group_id="g",
        assignments=[
            AgentAssignment(identity=AgentIdentity(id=f"agent {name}"), task=Task(id=name, depends_on=tuple(others)))
            for name, others in dependencies.items()
        ],
        **options,
    )


async def run(group: ParallelExecutionGroup, engine: Any, **options: Any) -> Any:
    with anyio.fail_after(3_600):
        return await ParallelExecutor(engine=engine, **options).execute_group(group)


def statuses(result: Any) -> list[OutcomeStatus]:
    return [outcome.status for outcome in result.outcomes]


@pytest.mark.proves("X15")
@virtual_time
async def test_a_task_starts_as_soon_as_what_it_depends_on_has_succeeded_without_levels() -> None:
    seconds = {"a": 1, "b": 10, "c": 2, "d": 1, "e": 1}
    result = await run(
        graph({"e": "bd", "d": "c", "c": "a", "b": "", "a": ""}), lambda task: anyio.sleep(seconds[task.task_id])
    )
    assert result.all_succeeded
    started = {o.task_id: o.started_after_seconds for o in result.outcomes}
    assert started == {name: pytest.approx(at) for name, at in {"a": 0, "b": 0, "c": 1, "d": 3, "e": 10}.items()}


@pytest.mark.proves("X15")
async def test_an_agent_reads_the_outcomes_of_what_it_depends_on() -> None:
    async def agent(task: AgentAssignment) -> str:
        upstream = current_run().upstream
        assert tuple(upstream) == task.task.depends_on
        return task.task_id + "".join(str(outcome.output) for outcome in upstream.values())

    result = await run(graph({"a": "", "b": "a", "c": "ab"}), agent)
    assert [outcome.output for outcome in result.outcomes] == ["a", "ba", "caba"]


@pytest.mark.proves("X15")
@pytest.mark.parametrize("way", ["fails", "is parked", "is cancelled", "times out"])
async def test_all_that_depends_on_one_that_did_not_succeed_is_skipped_and_names_it(way: str) -> None:
    started: list[str] = []

    async def agent(task: AgentAssignment) -> Any:
        started.append(task.task_id)
        if task.task_id != "a":
            return None
        if way == "fails":
            raise ValueError
        if way == "is parked":
            return AgentRunResult(task_id="a", agent_id=task.agent_id, termination_reason=TerminationReason.PARKED)
        return await anyio.sleep_forever()

    group = graph({"a": "", "b": "a", "c": "b", "d": "ab", "x": "", "y": "x"})
    if way == "times out":
        first = AgentAssignment(identity=AgentIdentity(id="agent a"), task=Task(id="a"), timeout_seconds=0.001)
        group = ParallelExecutionGroup(group_id="g", assignments=[first, *group.assignments[1:]])
    with anyio.fail_after(5):
        async with ParallelExecutor(engine=agent).open_group(group) as open_run:
            if way == "is cancelled":
                await wait_all_tasks_blocked()
                open_run.cancel_task("a")
    result = open_run.result
    assert statuses(result)[1:] == [SKIPPED, SKIPPED, SKIPPED, SUCCEEDED, SUCCEEDED]
    status = result.outcomes[0].status.value.replace("_", " ")
    assert {o.error for o in result.outcomes[1:4]} == {f"Skipped: it depends on task 'a', which is {status}"}
    assert set(started) == {"a", "x", "y"}
    assert open_run.progress.completed == 6


@pytest.mark.proves("X15", "X5")
async def test_tasks_that_are_held_back_take_no_place() -> None:
    order: list[str] = []

    async def agent(task: AgentAssignment) -> None:
        order.append(task.task_id)
        await anyio.lowlevel.checkpoint()

    result = await run(graph({"z": "y", "y": "x", "x": "", "a": "", "b": ""}, max_concurrency=1), agent)
    assert result.all_succeeded
    assert order == ["x", "y", "z", "a", "b"]


@pytest.mark.proves("X15", "L3")
async def test_claims_are_waited_for_only_when_the_time_to_start_has_come() -> None:
    """The first claims what the second has, and depends on it: it must not stand in line before it."""
    first = AgentAssignment(
        identity=AgentIdentity(id="a"), task=Task(id="a", depends_on=("b",)), resource_claims=("r",)
    )
    second = AgentAssignment(identity=AgentIdentity(id="b"), task=Task(id="b"), resource_claims=("r",))
    group = ParallelExecutionGroup(group_id="g", assignments=[first, second], claim_policy=ClaimPolicy.WAIT)

    async def agent(task: AgentAssignment) -> None:
        await anyio.lowlevel.checkpoint()

    assert (await run(group, agent)).all_succeeded


@pytest.mark.proves("X15", "L3")
@virtual_time
async def test_one_that_may_start_but_cannot_have_its_claims_yet_waits_for_them_like_others() -> None:
    def item(name: str, *needs: str) -> AgentAssignment:
        claims = () if name == "a" else ("r",)
        return AgentAssignment(
            identity=AgentIdentity(id=name), task=Task(id=name, depends_on=needs), resource_claims=claims
        )

    seconds = {"a": 1, "b": 5, "c": 1, "d": 1}
    group = ParallelExecutionGroup(
        group_id="g",
        assignments=[item("a"), item("b"), item("c", "a"), item("d", "c")],
        claim_policy=ClaimPolicy.WAIT,
        claim_timeout_seconds=4.5,
    )
    result = await run(group, lambda task: anyio.sleep(seconds[task.task_id]))
    assert result.all_succeeded
    assert [o.started_after_seconds for o in result.outcomes] == [0, 0, pytest.approx(5), pytest.approx(6)]
    seconds["b"] = 10
    result = await run(group, lambda task: anyio.sleep(seconds[task.task_id]))
    assert statuses(result) == [SUCCEEDED, SUCCEEDED, OutcomeStatus.REJECTED, SKIPPED]
    assert result.outcomes[2].error == "Claim not to be had within 4.5 s: 'r' is held by 'b'"


@pytest.mark.proves("X15", "X1")
@pytest.mark.parametrize("limit", [None, 1])
async def test_one_that_is_cancelled_before_it_may_start_does_not_start_later(limit: int | None) -> None:
    """Held back, not looked at yet, and lined up without room."""
    started: list[str] = []
    go_on = {name: anyio.Event() for name in "abcd"}

    async def agent(task: AgentAssignment) -> None:
        started.append(task.task_id)
        await go_on[task.task_id].wait()

    with anyio.fail_after(5):
        group = graph({"a": "", "b": "a", "c": "", "d": ""}, max_concurrency=limit)
        async with ParallelExecutor(engine=agent).open_group(group) as open_run:
            await wait_all_tasks_blocked()
            assert open_run.cancel_task("b")
            for event in go_on.values():
                event.set()
    assert [o.status for o in open_run.result.outcomes] == [SUCCEEDED, CANCELLED, SUCCEEDED, SUCCEEDED]
    assert sorted(started) == ["a", "c", "d"]


@pytest.mark.proves("X15", "X1")
async def test_one_that_is_cancelled_when_it_has_all_but_room_does_not_start_later() -> None:
    started: list[str] = []
    go_on = {name: anyio.Event() for name in "abcd"}

    async def agent(task: AgentAssignment) -> None:
        started.append(task.task_id)
        await go_on[task.task_id].wait()

    with anyio.fail_after(5):
        group = graph({"b": "a", "d": "a", "a": "", "c": ""}, max_concurrency=2)
        async with ParallelExecutor(engine=agent).open_group(group) as open_run:
            await wait_all_tasks_blocked()
            go_on["a"].set()
            await wait_all_tasks_blocked()
            assert started == ["a", "c", "b"]
            assert open_run.cancel_task("d")
            for event in go_on.values():
                event.set()
    assert open_run.result.outcome_of("d").status is CANCELLED
    assert started == ["a", "c", "b"]


@pytest.mark.proves("X4", "X15")
async def test_with_fail_fast_what_depends_on_the_failed_one_is_cancelled_like_all_others() -> None:
    async def agent(task: AgentAssignment) -> None:
        raise ValueError

    result = await run(graph({"b": "a", "a": "", "c": ""}, fail_fast=True, max_concurrency=1), agent)
    assert statuses(result) == [CANCELLED, FAILED, CANCELLED]
    assert {o.error for o in result.outcomes if o.status is CANCELLED} == {
        "Cancelled before it started: agent 'agent a' failed"
    }


@pytest.mark.proves("X15")
@pytest.mark.parametrize(
    ("dependencies", "said"),
    [
        ({"a": "b", "b": "c", "c": "a"}, "in a circle: "),
        ({"a": "a"}, "in a circle: a -> a"),
        ({"a": "xy", "b": "x"}, "Unknown task IDs in depends_on: x, y. Name tasks of the same group."),
        ({"a": "", "b": "aa"}, "depends_on names tasks twice: a"),
    ],
)
def test_circles_and_unknown_ids_are_refused(dependencies: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", "\\(")) as caught:
        graph(dependencies)
    if "circle: " in said and len(dependencies) == 3:
        names = str(caught.value).partition("circle: ")[2].split(" -> ")
        assert names[0] == names[-1]
        assert all(dependencies[one] == other for one, other in pairwise(names))


@pytest.mark.proves("X15")
@given(
    links=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20),
    fails=st.sets(st.integers(0, 9)),
    limit=st.none() | st.integers(1, 3),
    order=st.permutations(range(10)),
)
async def test_whatever_the_graph_everything_runs_after_what_it_depends_on_or_is_skipped(
    links: list[tuple[int, int]], fails: set[int], limit: int | None, order: list[int]
) -> None:
    needs: dict[int, set[int]] = {
        n: {min(link) for link in links if max(link) == n and min(link) < n} for n in range(10)
    }
    done: set[int] = set()

    async def agent(task: AgentAssignment) -> None:
        number = int(task.task_id)
        assert needs[number] <= done
        await anyio.lowlevel.checkpoint()
        if number in fails:
            raise ValueError
        done.add(number)

    group = ParallelExecutionGroup(
        group_id="g",
        assignments=[
            AgentAssignment(
                identity=AgentIdentity(id=str(n)), task=Task(id=str(n), depends_on=tuple(map(str, sorted(needs[n]))))
            )
            for n in order
        ],
        max_concurrency=limit,
    )
    result = await run(group, agent)
    expected: dict[int, OutcomeStatus] = {}
    for n in range(10):
        skipped = any(expected[m] is not SUCCEEDED for m in needs[n])
        expected[n] = SKIPPED if skipped else FAILED if n in fails else SUCCEEDED
    assert {int(o.task_id): o.status for o in result.outcomes} == expected


def test_dependents_are_found_at_any_distance_each_once() -> None:
    admission = Admission(5, None, None, {1: [0], 2: [0, 1], 3: [2], 4: []})
    assert admission.dependents_of(0) == [1, 2, 3]
    assert admission.dependents_of(3) == []


async def test_a_chain_of_thousands_runs_and_is_skipped_without_recursion() -> None:
    tasks = [Task(id="0"), *(Task(id=str(n), depends_on=(str(n - 1),)) for n in range(1, 3_000))]
    assignments = [AgentAssignment(identity=AgentIdentity(id=task.id), task=task) for task in tasks]
    group = ParallelExecutionGroup(group_id="g", assignments=assignments)

    async def agent(task: AgentAssignment) -> None:
        if task.task_id in failing:
            raise ValueError

    failing: set[str] = set()
    assert (await run(group, agent)).all_succeeded
    failing.add("1")
    assert (await run(group, agent)).agents_succeeded == 1


@pytest.mark.proves("X14")
@virtual_time
async def test_at_the_deadline_what_runs_times_out_and_what_is_queued_is_skipped() -> None:
    events: list[ParallelEvent] = []

    class Watcher:
        def on_event(self, event: ParallelEvent) -> None:
            events.append(event)

    async def agent(task: AgentAssignment) -> str:
        try:
            await anyio.sleep(int(task.task_id[1:]) * 2)
        except anyio.get_cancelled_exc_class():
            if task.task_id == "t3":
                raise ValueError("in its cleanup") from None
            if task.task_id == "t4":
                return "after all"
            raise
        return "in time"

    group = ParallelExecutionGroup(
        group_id="g", assignments=[assignment(n) for n in (1, 2, 3, 4, 5, 1_000)], max_concurrency=4, deadline_seconds=5
    )
    result = await run(group, agent, observers=[Watcher()])
    assert statuses(result) == [SUCCEEDED, SUCCEEDED, TIMED_OUT, SUCCEEDED, TIMED_OUT, TIMED_OUT]
    assert result.outcomes[5].error == "Timed out: the deadline of the group, 5 s, is over"
    assert (
        result.outcomes[2].error
        == "Timed out: the deadline of the group, 5 s, is over, then raised ValueError: in its cleanup"
    )
    assert result.total_duration_seconds == pytest.approx(5)
    assert [e.fields["status"] for e in events if e.name == PARALLEL_GROUP_COMPLETE] == ["deadline"]
    result = await run(group_of(4, max_concurrency=1, deadline_seconds=3), lambda task: anyio.sleep(2))
    assert statuses(result) == [SUCCEEDED, TIMED_OUT, SKIPPED, SKIPPED]
    assert result.outcomes[2].error == "Skipped: the deadline of the group, 3 s, is over"
    quick = await run(group_of(4, deadline_seconds=3_000), lambda task: anyio.sleep(2))
    assert quick.total_duration_seconds == pytest.approx(2)


@pytest.mark.proves("X14")
async def test_after_enough_successes_the_rest_is_cancelled_or_skipped() -> None:
    async def agent(task: AgentAssignment) -> str:
        if task.task_id == "t0":
            raise ValueError
        if task.task_id != "t2":
            await anyio.sleep_forever()
        await wait_all_tasks_blocked()
        return "first"

    with anyio.fail_after(5):
        result = await run(group_of(5, max_concurrency=3, stop_after_successes=1), agent)
    assert statuses(result) == [FAILED, CANCELLED, SUCCEEDED, CANCELLED, SKIPPED]
    assert result.outcomes[1].error == "Cancelled: enough agents succeeded"
    assert result.outcomes[4].error == "Skipped: enough agents succeeded"


@pytest.mark.proves("X1", "P1")
async def test_what_was_skipped_at_the_end_of_a_group_cannot_be_cancelled_any_more() -> None:
    async def agent(of: AgentAssignment) -> None:
        await wait_all_tasks_blocked()

    with anyio.fail_after(5):
        group = graph({"a": "", "b": "a"}, stop_after_successes=1)
        async with ParallelExecutor(engine=agent).open_group(group) as run:
            ended = [outcome.task_id async for outcome in run]
            assert not run.cancel_task("b")
            assert run.progress.completed == 2
    assert ended == ["a", "b"]
    assert statuses(run.result) == [SUCCEEDED, SKIPPED]


@pytest.mark.proves("X14")
async def test_enough_successes_cancel_what_runs_although_the_budget_is_spent() -> None:
    async def agent(of: AgentAssignment) -> None:
        if of.task_id == "t0":
            await anyio.sleep_forever()
        current_run().record_usage(Usage(cost=1))

    result = await run(group_of(3, max_concurrency=2, stop_after_successes=1, budget=Budget(max_cost=1)), agent)
    assert statuses(result) == [CANCELLED, SUCCEEDED, SKIPPED]
    assert result.outcomes[0].error == "Cancelled: enough agents succeeded"


@pytest.mark.proves("X14")
@pytest.mark.parametrize(
    ("budget", "usage"),
    [(Budget(max_cost=2.0), Usage(cost=1.0)), (Budget(max_tokens=20), Usage(input_tokens=4, output_tokens=6))],
)
@pytest.mark.parametrize("metered", [True, False])
async def test_when_the_budget_is_spent_nothing_new_starts_and_what_runs_is_told(
    budget: Budget, usage: Usage, *, metered: bool
) -> None:
    told: list[tuple[str, bool]] = []
    spent = anyio.Event()

    async def agent(task: AgentAssignment) -> AgentRunResult[None]:
        if task.task_id == "t0":
            assert not current_run().budget_exhausted
            await spent.wait()
            told.append((task.task_id, current_run().budget_exhausted))
        elif metered:
            current_run().record_usage(usage)
        if task.task_id == "t3":
            spent.set()
        return AgentRunResult(
            task_id=task.task_id,
            agent_id=task.agent_id,
            termination_reason=TerminationReason.COMPLETED,
            usage=usage if task.task_id != "t0" else Usage(),
        )

    async def watch(group: ParallelExecutionGroup) -> Any:
        async with ParallelExecutor(engine=agent).open_group(group) as open_run:
            async for outcome in open_run:
                if outcome.status is SKIPPED or open_run._is_budget_spent:
                    spent.set()
        return open_run.result

    with anyio.fail_after(5):
        result = await watch(group_of(6, max_concurrency=2, budget=budget))
    assert statuses(result) == [SUCCEEDED] * 3 + [SKIPPED] * 3
    assert told == [("t0", True)]
    assert result.outcomes[5].error == "Skipped: the budget is spent"
    assert result.total_usage == usage + usage


def test_a_budget_bounds_something() -> None:
    with pytest.raises(ValueError, match="a Budget needs max_cost, max_tokens, or both"):
        Budget()
    assert Budget(max_cost=1, max_tokens=1).is_spent_by(Usage(output_tokens=1))
    assert not Budget(max_cost=1).is_spent_by(Usage(output_tokens=1_000))


def test_a_context_of_its_own_meters_and_knows_no_budget() -> None:
    context = RunContext("g", assignment(0), lambda: False)
    context.record_usage(Usage(cost=1))
    context.record_usage(Usage(cost=2))
    assert (context.usage.cost, context.budget_exhausted, context.shutdown_requested) == (3, False, False)
    assert dict(context.upstream) == {}
