"""The caller is cancelled at each step of the scheduler in turn; afterwards nothing may be left undone.

Found this way, and by nothing else: a lock noted after an await, a swallowed cancellation, a worker that starts one
agent too many. Scenarios have equal delays everywhere, so that much happens in the same instant.
"""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from attrs import define, field

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    AgentOutcome,
    ClaimPolicy,
    InMemoryResourceLock,
    OutcomeStatus,
    ParallelExecutionGroup,
    ParallelExecutor,
    ParallelProgress,
    Task,
)
from parallel_agents._run import GroupRun
from parallel_agents.testing.stepping import Backend, installed_backends, run_in_virtual_time

Behaviour = Callable[[AgentAssignment], Awaitable[object]]

KINDS = [("asyncio", "native"), *((backend, "scope") for backend in installed_backends())]
"""Where the caller is cancelled, and how: its task natively, or a scope around it."""


async def quick(assignment: AgentAssignment) -> object:
    await anyio.lowlevel.checkpoint()
    return assignment.task_id


async def sleeps_one_second(assignment: AgentAssignment) -> object:
    await anyio.sleep(1)
    return assignment.task_id


async def fails_after_one_second(assignment: AgentAssignment) -> object:
    await anyio.sleep(1)
    raise ValueError("on purpose")


async def cleans_up_slowly(assignment: AgentAssignment) -> object:
    try:
        await anyio.sleep(2)
    finally:
        with anyio.CancelScope(shield=True, deadline=anyio.current_time() + 1):
            await anyio.sleep(0.5)
    return assignment.task_id


async def swallows_its_cancellation(assignment: AgentAssignment) -> object:
    try:
        await anyio.sleep(5)
    except anyio.get_cancelled_exc_class():
        return "swallowed"
    return assignment.task_id


async def raises_the_cancelled_exception_itself(assignment: AgentAssignment) -> object:
    await anyio.lowlevel.checkpoint()
    if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
        raise asyncio.CancelledError
    return await quick(assignment)


@define(eq=False)
class Scenario:
    """A group, and all that was seen while it ran."""

    behaviours: tuple[Behaviour, ...]
    options: dict[str, Any] = field(factory=dict)
    timeout_seconds: float | None = None
    claims: bool = False
    waits: bool = False
    limit: int | None = None
    started: list[str] = field(factory=list)
    closed: list[str] = field(factory=list)
    returned: dict[str, object] = field(factory=dict)
    failed_at: list[int] = field(factory=list)
    peak: int = 0
    snapshots: list[ParallelProgress] = field(factory=list)
    is_over: bool = False
    touched_after_the_end: bool = False

    async def engine(self, assignment: AgentAssignment) -> object:
        task_id = assignment.task_id
        self.started.append(task_id)
        self.peak = max(self.peak, len(self.started) - len(self.closed))
        try:
            value = await self.behaviours[int(task_id)](assignment)
        except ValueError:
            self.failed_at.append(len(self.started))
            raise
        else:
            self.returned[task_id] = value
            return value
        finally:
            self.closed.append(task_id)
            self.touched_after_the_end |= self.is_over

    def claims_of(self, number: int) -> tuple[str, ...]:
        if self.waits:
            return ("outside",) if number == 1 else (f"r{number % 2}", f"s{number % 3}")
        return (f"r{number}", f"s{number}") if self.claims else ()

    def group(self) -> ParallelExecutionGroup:
        return ParallelExecutionGroup(
            group_id="g",
            assignments=[
                AgentAssignment(
                    identity=AgentIdentity(id=f"agent-{n}"),
                    task=Task(id=str(n)),
                    timeout_seconds=self.timeout_seconds,
                    resource_claims=self.claims_of(n),
                )
                for n in range(len(self.behaviours))
            ],
            **self.options,
        )


def scenarios() -> dict[str, Callable[[], Scenario]]:
    fail_fast = {"max_concurrency": 3, "fail_fast": True}
    return {
        "plain": lambda: Scenario((quick, sleeps_one_second) * 3, {"max_concurrency": 2}, claims=True),
        "limiter": lambda: Scenario((quick, sleeps_one_second) * 3, {"max_concurrency": 3}, limit=2),
        "fail fast": lambda: Scenario((cleans_up_slowly, fails_after_one_second, sleeps_one_second) * 2, fail_fast),
        "timeouts": lambda: Scenario(
            (cleans_up_slowly, sleeps_one_second, quick) * 2, {"max_concurrency": 2}, timeout_seconds=1, claims=True
        ),
        "waiting": lambda: Scenario(
            (quick, sleeps_one_second) * 3,
            {"max_concurrency": 2, "claim_policy": ClaimPolicy.WAIT, "claim_timeout_seconds": 2.5},
            waits=True,
            limit=2,
        ),
        "hostile": lambda: Scenario(
            (swallows_its_cancellation, raises_the_cancelled_exception_itself, quick) * 2,
            {"max_concurrency": 2},
            timeout_seconds=3,
            limit=2,
        ),
    }


class Injection:
    """Acts once, at a given step, while the group runs."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.steps = 0
        self.act: Callable[[], object] | None = None
        self.happened = False

    def on_step(self, step: int) -> None:
        if self.act is None:
            return
        self.steps += 1
        if self.steps == self.at:
            self.happened = True
            self.act()


def run_scenario(backend: Backend, scenario: Scenario, injection: Injection, kind: str, seed: int | None) -> None:
    lock = InMemoryResourceLock()
    runs: list[GroupRun[Any]] = []
    swallowed = False

    async def program() -> None:
        nonlocal swallowed
        limiter = None if scenario.limit is None else anyio.CapacityLimiter(scenario.limit)
        executor = ParallelExecutor(
            engine=scenario.engine, limiter=limiter, resource_lock=lock, progress_callback=scenario.snapshots.append
        )
        with anyio.CancelScope() as outer, anyio.fail_after(500):
            if scenario.waits:
                assert await lock.acquire("outside", "outsider")
            injection.act = outer.cancel if kind == "scope" else asyncio.current_task().cancel  # type: ignore[union-attr]
            async with executor.open_group(scenario.group()) as run:
                runs.append(run)
            injection.act = None
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
            swallowed = injection.happened
        injection.act = None
        await anyio.sleep(20)
        assert limiter is None or limiter.borrowed_tokens == 0

    async def observed() -> None:
        try:
            await program()
        except asyncio.CancelledError:
            if kind != "native":
                raise
        finally:
            scenario.is_over = True
            injection.act = None

    run_in_virtual_time(observed, backend, seed=seed, on_step=injection.on_step)
    assert not swallowed, "the caller's cancellation was swallowed"
    assert {held.holder for held in lock.statistics().held} <= {"outsider"}
    assert not lock.statistics().waiting
    if runs:
        check(scenario, runs[0])


def check(scenario: Scenario, run: GroupRun[Any]) -> None:
    """Everything that must hold after a run, however it ended."""
    outcomes = run.result.outcomes
    assert [o.task_id for o in outcomes] == [str(n) for n in range(len(scenario.behaviours))]
    assert [o.agent_id for o in outcomes] == [f"agent-{n}" for n in range(len(scenario.behaviours))]
    assert len(scenario.started) == len(set(scenario.started))
    assert sorted(scenario.started) == sorted(scenario.closed)
    assert not scenario.touched_after_the_end
    limits = [n for n in (scenario.limit, scenario.options.get("max_concurrency")) if n is not None]
    assert scenario.peak <= min(limits)
    for outcome in outcomes:
        check_truth(scenario, outcome)
    if scenario.options.get("fail_fast") and scenario.failed_at:
        assert len(scenario.started) == scenario.failed_at[0], "an agent started after the first failure"
    check_progress(scenario.snapshots)


def check_truth(scenario: Scenario, outcome: AgentOutcome[Any]) -> None:
    if outcome.task_id in scenario.returned:
        assert outcome.status is OutcomeStatus.SUCCEEDED
        assert outcome.output == scenario.returned[outcome.task_id]
    else:
        assert outcome.status is not OutcomeStatus.SUCCEEDED
    assert (outcome.started_after_seconds is not None) == (outcome.task_id in scenario.started)
    if outcome.status is OutcomeStatus.TIMED_OUT:
        assert outcome.duration_seconds >= (scenario.timeout_seconds or 0)


def check_progress(snapshots: list[ParallelProgress]) -> None:
    assert snapshots[0].pending == snapshots[0].total
    assert snapshots[-1].completed == snapshots[-1].total
    for before, after in pairwise(snapshots):
        for counter in ("completed", "succeeded", "failed", "parked"):
            assert getattr(before, counter) <= getattr(after, counter)


@pytest.mark.proves("X1", "X4", "X5", "X8", "X9", "X10", "X11", "L4", "P1", "P2")
@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("name", list(scenarios()))
@pytest.mark.parametrize(("backend", "kind"), KINDS)
def test_nothing_is_left_undone_when_the_caller_is_cancelled_at_any_step(
    backend: Backend, kind: str, name: str, seed: int | None
) -> None:
    make = scenarios()[name]
    undisturbed = Injection(None)
    run_scenario(backend, make(), undisturbed, kind, seed)
    assert undisturbed.steps > 5
    for step in range(1, undisturbed.steps + 1):
        injection = Injection(step)
        try:
            run_scenario(backend, make(), injection, kind, seed)
        except BaseException as error:
            error.add_note(f"cancelled at step {step} of {undisturbed.steps}")
            raise
        assert injection.happened


def run_stream(backend: Backend, scenario: Scenario, injection: Injection, kind: str, seed: int | None) -> int:
    """Run the assignments of a scenario as a stream; return how many outcomes were taken."""
    lock = InMemoryResourceLock()
    taken = 0
    swallowed = False

    async def program() -> None:
        nonlocal swallowed, taken
        executor = ParallelExecutor(engine=scenario.engine, resource_lock=lock)
        with anyio.CancelScope() as outer, anyio.fail_after(500):
            injection.act = outer.cancel if kind == "scope" else asyncio.current_task().cancel  # type: ignore[union-attr]
            source = iter(scenario.group().assignments)
            async with executor.open_stream(source, group_id="s", max_concurrency=2) as outcomes:
                async for _ in outcomes:
                    taken += 1
            injection.act = None
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
            swallowed = injection.happened
        injection.act = None

    async def observed() -> None:
        try:
            await program()
        except asyncio.CancelledError:
            if kind != "native":
                raise
        finally:
            scenario.is_over = True
            injection.act = None

    run_in_virtual_time(observed, backend, seed=seed, on_step=injection.on_step)
    assert not swallowed, "the caller's cancellation was swallowed"
    assert not lock.statistics().held
    assert sorted(scenario.started) == sorted(scenario.closed)
    assert not scenario.touched_after_the_end
    assert scenario.peak <= 2
    return taken


@pytest.mark.proves("X5", "X8", "X11", "L4")
@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize(("backend", "kind"), KINDS)
def test_nothing_of_a_stream_is_left_undone_when_its_caller_is_cancelled_at_any_step(
    backend: Backend, kind: str, seed: int | None
) -> None:
    def make() -> Scenario:
        return Scenario((quick, sleeps_one_second) * 3, claims=True)

    undisturbed = Injection(None)
    assert run_stream(backend, make(), undisturbed, kind, seed) == 6
    for step in range(1, undisturbed.steps + 1):
        injection = Injection(step)
        try:
            run_stream(backend, make(), injection, kind, seed)
        except BaseException as error:
            error.add_note(f"cancelled at step {step} of {undisturbed.steps}")
            raise
        assert injection.happened


@pytest.mark.proves("X4")
@pytest.mark.parametrize("backend", installed_backends())
def test_no_agent_starts_after_the_first_failure_in_any_order_of_events(backend: Backend) -> None:
    for seed in range(100):
        scenario = Scenario((sleeps_one_second, fails_after_one_second) * 4, {"max_concurrency": 2, "fail_fast": True})
        run_scenario(backend, scenario, Injection(None), "scope", seed)
        assert len(scenario.started) == scenario.failed_at[0]


@pytest.mark.parametrize("backend", installed_backends())
def test_one_seed_gives_one_order(backend: Backend) -> None:
    def order(seed: int) -> list[str]:
        scenario = scenarios()["plain"]()
        run_scenario(backend, scenario, Injection(None), "scope", seed)
        return scenario.closed

    assert order(3) == order(3)
