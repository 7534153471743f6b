"""Groups of agents that behave in every way there is, and everything that must hold of them afterwards.

Scenarios have equal delays everywhere, so that much happens in the same instant.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from itertools import pairwise
from typing import Any

import anyio
import anyio.lowlevel
from attrs import define, field

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    AgentOutcome,
    ClaimPolicy,
    FunctionEngine,
    InMemoryResourceLock,
    OutcomeStatus,
    ParallelExecutionGroup,
    ParallelExecutionResult,
    ParallelExecutor,
    ParallelProgress,
    Task,
)
from parallel_agents.engines import AgentEngine
from parallel_agents.events import ParallelEvent

Behaviour = Callable[[AgentAssignment], Awaitable[object]]


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
    """A group, and all that was seen while it ran.

    Attributes:
        behaviours: What the agents do, one for each assignment.
        options: Of the group.
        timeout_seconds: Of each assignment.
        claims: Whether each assignment claims something for itself.
        waits: Whether assignments claim the same, and one what an outsider holds.
        limit: The size of the executor's limiter.
        depends_on: The tasks that others depend on, by their numbers.
        wrap: Puts engines around that of the scenario.
        starts_again: Whether an agent may run more than once.
        is_watched: Whether there are a callback and an observer.
    """

    behaviours: tuple[Behaviour, ...]
    options: dict[str, Any] = field(factory=dict)
    timeout_seconds: float | None = None
    claims: bool = False
    waits: bool = False
    limit: int | None = None
    depends_on: dict[int, tuple[int, ...]] = field(factory=dict)
    wrap: Callable[[AgentEngine], AgentEngine] | None = None
    starts_again: bool = False
    is_watched: bool = True
    started: list[str] = field(factory=list)
    closed: list[str] = field(factory=list)
    returned: dict[str, object] = field(factory=dict)
    failed_at: list[int] = field(factory=list)
    peak: int = 0
    snapshots: list[ParallelProgress] = field(factory=list)
    events: list[ParallelEvent] = field(factory=list)
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

    def on_event(self, event: ParallelEvent, /) -> None:
        self.events.append(event)

    def executor(self, lock: InMemoryResourceLock, **options: Any) -> ParallelExecutor:
        engine: AgentEngine = FunctionEngine(self.engine)
        limiter = None if self.limit is None else anyio.CapacityLimiter(self.limit)
        watching: dict[str, Any] = {}
        if self.is_watched:
            watching = {"progress_callback": self.snapshots.append, "observers": [self]}
        return ParallelExecutor(
            engine=engine if self.wrap is None else self.wrap(engine),
            limiter=limiter,
            resource_lock=lock,
            **watching,
            **options,
        )

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
                    task=Task(id=str(n), depends_on=[str(other) for other in self.depends_on.get(n, ())]),
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
        "bare": lambda: Scenario((quick, sleeps_one_second) * 3, {"max_concurrency": 2}, is_watched=False),
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
        "dependencies": lambda: Scenario(
            (quick, sleeps_one_second, fails_after_one_second, sleeps_one_second, quick, quick),
            {"max_concurrency": 2, "deadline_seconds": 5, "stop_after_successes": 5},
            depends_on={3: (0,), 4: (1, 3), 5: (2,)},
        ),
    }


def check(scenario: Scenario, result: ParallelExecutionResult[Any]) -> None:
    """Everything that must hold after a run, however it ended."""
    outcomes = result.outcomes
    assert [o.task_id for o in outcomes] == [str(n) for n in range(len(scenario.behaviours))]
    assert [o.agent_id for o in outcomes] == [f"agent-{n}" for n in range(len(scenario.behaviours))]
    assert scenario.starts_again or len(scenario.started) == len(set(scenario.started))
    assert sorted(scenario.started) == sorted(scenario.closed)
    assert not scenario.touched_after_the_end
    limits = [n for n in (scenario.limit, scenario.options.get("max_concurrency")) if n is not None]
    assert scenario.peak <= min(limits)
    for outcome in outcomes:
        check_truth(scenario, outcome)
    if scenario.options.get("fail_fast") and scenario.failed_at:
        assert len(scenario.started) == scenario.failed_at[0], "an agent started after the first failure"
    if scenario.is_watched:
        check_progress(scenario.snapshots)
        check_events(scenario.events)


def check_truth(scenario: Scenario, outcome: AgentOutcome[Any]) -> None:
    is_success = outcome.status is OutcomeStatus.SUCCEEDED
    assert is_success == (outcome.task_id in scenario.returned) or scenario.wrap is not None
    if is_success:
        assert outcome.output == scenario.returned.get(outcome.task_id, outcome.task_id)
    was_called = outcome.started_after_seconds is not None
    assert was_called == (outcome.task_id in scenario.started) or (was_called and scenario.wrap is not None)
    if outcome.status is OutcomeStatus.TIMED_OUT:
        deadline = scenario.options.get("deadline_seconds", 0)
        assert outcome.duration_seconds >= (scenario.timeout_seconds or 0)
        assert deadline or scenario.timeout_seconds


def check_progress(snapshots: list[ParallelProgress]) -> None:
    assert snapshots[0].pending == snapshots[0].total
    assert snapshots[-1].completed == snapshots[-1].total
    assert snapshots[-1].in_progress == 0
    for before, after in pairwise(snapshots):
        for counter in ("completed", "succeeded", "failed", "parked"):
            assert getattr(before, counter) <= getattr(after, counter)


GROUP_START, GROUP_END = "execution.parallel.group_start", "execution.parallel.group_complete"
AGENT_START = "execution.parallel.agent_start"
AGENT_ENDS = {f"execution.parallel.agent_{how}" for how in ("complete", "error", "cancelled")}


def check_events(events: Iterable[ParallelEvent]) -> None:
    """Starts and ends are paired, of each group and of each agent, and nothing comes after a group's end."""
    starts: Counter[tuple[str, str | None]] = Counter()
    ends: Counter[tuple[str, str | None]] = Counter()
    for event in events:
        agent = (event.group_id, event.task_id)
        assert not ends[event.group_id, None], f"{event.name} after the end of its group"
        if event.name in (GROUP_START, AGENT_START):
            starts[agent] += 1
        elif event.name == GROUP_END or event.name in AGENT_ENDS:
            ends[agent] += 1
            assert starts[agent] == ends[agent], f"{event.name} without a start"
    assert starts == ends
    assert set(starts.values()) <= {1}
