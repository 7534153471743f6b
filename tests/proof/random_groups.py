"""Random groups: what the agents do, what the group is told, and what happens to it meanwhile; all by a seed.

Times are multiples of half a second of virtual time, so that much happens in the same instant.
"""

import asyncio
import math
from enum import Enum, auto
from random import Random
from typing import Any

import anyio
import anyio.lowlevel
from attrs import Factory, define, field, frozen

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    AgentRunResult,
    Budget,
    ClaimMode,
    ClaimPolicy,
    CooperativeTimeout,
    ImmediateCancel,
    InMemoryResourceLock,
    ParallelExecutionGroup,
    ParallelExecutionResult,
    ParallelExecutor,
    ParallelProgress,
    ResourceClaim,
    ResourceConflictError,
    ShutdownManager,
    Task,
    TerminationReason,
    Usage,
    current_run,
)
from parallel_agents._run import GroupRun
from parallel_agents.events import ParallelEvent

HALF = 0.5


class Kind(Enum):
    """What an agent does."""

    SUCCEEDS = auto()
    FAILS = auto()
    SAYS_THAT_IT_FAILED = auto()
    PARKS = auto()
    HANGS = auto()
    SWALLOWS_CANCELLATION = auto()
    CLEANS_UP = auto()
    BLOCKS = auto()
    SPAWNS = auto()
    CANCELS_ITSELF = auto()
    NESTS = auto()


WEIGHTS = {Kind.SUCCEEDS: 8, Kind.FAILS: 2, Kind.HANGS: 1, Kind.SPAWNS: 2, Kind.NESTS: 2}


class Disturbance(Enum):
    """What happens to a group in the middle."""

    NONE = auto()
    CALLER_CANCELLED = auto()
    RUN_CANCELLED = auto()
    TASK_CANCELLED = auto()
    SHUTDOWN = auto()


@frozen
class AgentPlan:
    """One agent."""

    kind: Kind
    seconds: float
    cost: float
    claims: tuple[ResourceClaim, ...]
    depends_on: tuple[int, ...]
    timeout_seconds: float | None


@frozen
class GroupPlan:
    """One group."""

    agents: tuple[AgentPlan, ...]
    options: dict[str, Any]
    limit: int | None
    disturbance: Disturbance
    disturbed_at: float
    disturbed_task: int
    grace_seconds: float | None
    is_watched: bool

    @property
    def has_end(self) -> bool:
        """Whether it ends although an agent hangs."""
        for agent in self.agents:
            if agent.kind is Kind.HANGS and agent.timeout_seconds is None:
                return self.options["deadline_seconds"] is not None
        return True


def _seconds(random: Random, most: int) -> float:
    return random.randint(0, most) * HALF


def _claims(random: Random) -> tuple[ResourceClaim, ...]:
    resources = random.sample(["path:/a", "path:/a/b", "path:/a/b/c", "path:/d", "key"], random.randint(1, 2))
    return tuple(ResourceClaim(resource=r, mode=random.choice(list(ClaimMode))) for r in resources)


def _agent(random: Random, number: int, claim_share: float, dependency_share: float) -> AgentPlan:
    kind = random.choices(list(Kind), [WEIGHTS.get(kind, 1) for kind in Kind])[0]
    has_dependencies = number > 0 and random.random() < dependency_share
    return AgentPlan(
        kind=kind,
        seconds=_seconds(random, 6),
        cost=random.choice([0.0, 0.0, 1.0]),
        claims=_claims(random) if random.random() < claim_share else (),
        depends_on=tuple(random.sample(range(number), min(number, random.randint(1, 2)))) if has_dependencies else (),
        timeout_seconds=random.choice([None, None, HALF, 2 * HALF, 4 * HALF]),
    )


def plan_of(seed: int) -> GroupPlan:
    random = Random(seed)
    count = random.randint(1, 10)
    waits = random.random() < 0.6
    claim_share, dependency_share = random.choice([0, 0, 0.5]), random.choice([0, 0, 0.4])

    def sometimes(share: float, value: Any) -> Any:
        return value if random.random() < share else None

    options = {
        "max_concurrency": sometimes(0.7, random.randint(1, 4)),
        "fail_fast": random.random() < 0.25,
        "claim_policy": ClaimPolicy.WAIT if waits else ClaimPolicy.REJECT,
        "claim_timeout_seconds": sometimes(0.4, _seconds(random, 6) + HALF) if waits else None,
        "deadline_seconds": sometimes(0.25, _seconds(random, 10) + HALF),
        "stop_after_successes": sometimes(0.2, random.randint(1, count)),
        "budget": sometimes(0.2, Budget(max_cost=float(random.randint(1, 4)))),
    }
    return GroupPlan(
        agents=tuple(_agent(random, n, claim_share, dependency_share) for n in range(count)),
        options=options,
        limit=sometimes(0.4, random.randint(1, 4)),
        disturbance=random.choice([*Disturbance, Disturbance.NONE, Disturbance.NONE]),
        disturbed_at=_seconds(random, 8),
        disturbed_task=random.randrange(count),
        grace_seconds=sometimes(0.7, _seconds(random, 3)),
        is_watched=random.random() < 0.7,
    )


def block_the_loop(seconds: float) -> None:
    """Let time go by while nothing else can run."""
    native: Any = anyio.lowlevel.current_token().native_token
    if hasattr(native, "now"):
        native.now += seconds
    else:
        import trio  # noqa: PLC0415 - one session of the checks runs without it

        clock: Any = trio.lowlevel.current_clock()
        clock.jump(seconds)


@define
class Call:
    """What an agent saw of its own call; the marks tell what came before what."""

    started_at: float
    started_mark: int
    ended_at: float = math.inf
    ended_mark: int = -1
    ending: str = ""
    value: AgentRunResult[Any] | None = None
    error: BaseException | None = None


@define(eq=False)
class History:
    """A group that ran, and everything that could be seen."""

    plan: GroupPlan
    calls: dict[int, Call] = field(factory=dict)
    calls_again: int = 0
    mark: int = 0
    spent: float = 0.0
    working: int = 0
    peak_working: int = 0
    is_over: bool = False
    touched_after_the_end: bool = False
    disturbed_mark: int | None = None
    disturbed_at: float = math.inf
    refused: ResourceConflictError | None = None
    handle: GroupRun[Any] | None = None
    inner: list[ParallelExecutionResult[Any]] = field(factory=list)
    snapshots: list[ParallelProgress] = field(factory=list)
    events: list[ParallelEvent] = field(factory=list)
    lock: InMemoryResourceLock = field(factory=InMemoryResourceLock)
    started_at: float = 0.0
    tasks_left: int = 0
    tokens_left: int = 0
    _limiter: anyio.CapacityLimiter | None = None
    _manager: ShutdownManager = Factory(
        lambda self: ShutdownManager(
            ImmediateCancel()
            if self.plan.grace_seconds is None
            else CooperativeTimeout(grace_seconds=self.plan.grace_seconds)
        ),
        takes_self=True,
    )
    _executor: ParallelExecutor = field(init=False)

    @property
    def was_blocked(self) -> bool:
        """Whether an agent held up the event loop, so that what was due meanwhile came late and all at once."""
        return any(self.plan.agents[number].kind is Kind.BLOCKS for number in self.calls)

    @property
    def result(self) -> ParallelExecutionResult[Any]:
        assert self.handle is not None
        return self.handle.result

    def group(self) -> ParallelExecutionGroup:
        return ParallelExecutionGroup(
            group_id="g",
            assignments=[
                AgentAssignment(
                    identity=AgentIdentity(id=f"a{n}"),
                    task=Task(id=str(n), depends_on=[str(other) for other in agent.depends_on]),
                    timeout_seconds=agent.timeout_seconds,
                    resource_claims=agent.claims,
                )
                for n, agent in enumerate(self.plan.agents)
            ],
            **self.plan.options,
        )

    # The agents

    def _next_mark(self) -> int:
        self.mark += 1
        return self.mark

    async def run(self, assignment: AgentAssignment, /) -> AgentRunResult[Any]:
        if assignment.task_id.startswith("inner"):
            return await self._work(assignment, HALF)
        number = int(assignment.task_id)
        self.calls_again += number in self.calls
        call = self.calls[number] = Call(anyio.current_time(), self._next_mark())
        try:
            call.value = await self._behave(self.plan.agents[number], assignment)
        except BaseException as error:
            call.ending, call.error = "raised", error
            raise
        else:
            call.ending = "returned"
            return call.value
        finally:
            call.ended_at, call.ended_mark = anyio.current_time(), self._next_mark()
            self.touched_after_the_end |= self.is_over

    async def _work(self, assignment: AgentAssignment, seconds: float) -> AgentRunResult[Any]:
        self.working += 1
        self.peak_working = max(self.peak_working, self.working)
        try:
            await anyio.sleep(seconds)
        finally:
            self.working -= 1
        return _result(assignment)

    async def _behave(self, plan: AgentPlan, assignment: AgentAssignment) -> AgentRunResult[Any]:
        if plan.cost:
            self.spent += plan.cost
            current_run().record_usage(Usage(cost=plan.cost))
        match plan.kind:
            case Kind.FAILS:
                await self._work(assignment, plan.seconds)
                raise ValueError("on purpose")
            case Kind.SAYS_THAT_IT_FAILED:
                await self._work(assignment, plan.seconds)
                return _result(assignment, TerminationReason.ERROR)
            case Kind.PARKS:
                await self._work(assignment, plan.seconds)
                return _result(assignment, TerminationReason.PARKED)
            case Kind.HANGS:
                return await self._work(assignment, math.inf)
            case Kind.SWALLOWS_CANCELLATION:
                try:
                    return await self._work(assignment, plan.seconds)
                except anyio.get_cancelled_exc_class():
                    return _result(assignment)
            case Kind.CLEANS_UP:
                try:
                    return await self._work(assignment, plan.seconds)
                finally:
                    with anyio.CancelScope(shield=True):
                        await anyio.sleep(HALF)
            case Kind.BLOCKS:
                await anyio.lowlevel.checkpoint()
                block_the_loop(plan.seconds)
            case Kind.SPAWNS:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(anyio.sleep, plan.seconds / 2)
                    tasks.start_soon(anyio.sleep, plan.seconds)
            case Kind.CANCELS_ITSELF:
                await self._work(assignment, plan.seconds)
                if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
                    raise asyncio.CancelledError
            case Kind.NESTS:
                tasks_of_inner = [Task(id=f"inner{n}") for n in range(2)]
                inner = ParallelExecutionGroup.map(f"g.{assignment.task_id}", AgentIdentity(id="i"), tasks_of_inner)
                self.inner.append(await self._executor.execute_group(inner))
            case _:
                return await self._work(assignment, plan.seconds)
        return _result(assignment)

    # The run

    def on_event(self, event: ParallelEvent, /) -> None:
        self.events.append(event)

    async def happen(self) -> None:
        """Run the group, once."""
        plan = self.plan
        self._limiter = None if plan.limit is None else anyio.CapacityLimiter(plan.limit)
        watching: dict[str, Any] = {}
        if plan.is_watched:
            watching = {"progress_callback": self.snapshots.append, "observers": [self]}
        self._executor = ParallelExecutor(
            engine=self,
            limiter=self._limiter,
            resource_lock=self.lock,
            shutdown_manager=self._manager,
            **watching,
        )
        before = {task.id for task in anyio.get_running_tasks()}
        self.started_at = anyio.current_time()
        with anyio.fail_after(1_000), anyio.CancelScope() as caller:
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._disturb, caller)
                    await self._run_group()
                    tasks.cancel_scope.cancel()
            finally:
                self.is_over = True
        await anyio.sleep(20)
        self.tasks_left = len([task for task in anyio.get_running_tasks() if task.id not in before])
        self.tokens_left = 0 if self._limiter is None else self._limiter.borrowed_tokens

    async def _run_group(self) -> None:
        try:
            async with self._executor.open_group(self.group()) as self.handle:
                pass
        except ResourceConflictError as error:
            self.refused = error

    async def _disturb(self, caller: anyio.CancelScope) -> None:
        if self.plan.disturbance is Disturbance.NONE:
            return
        await anyio.sleep(self.plan.disturbed_at)
        self.disturbed_mark, self.disturbed_at = self._next_mark(), anyio.current_time()
        if self.plan.disturbance is Disturbance.CALLER_CANCELLED:
            caller.cancel()
        elif self.plan.disturbance is Disturbance.SHUTDOWN:
            self._manager.request_shutdown()
        elif self.handle is not None:
            if self.plan.disturbance is Disturbance.RUN_CANCELLED:
                self.handle.cancel()
            else:
                self.handle.cancel_task(str(self.plan.disturbed_task))


def _result(
    assignment: AgentAssignment, reason: TerminationReason = TerminationReason.COMPLETED
) -> AgentRunResult[Any]:
    return AgentRunResult(
        task_id=assignment.task_id,
        agent_id=assignment.agent_id,
        termination_reason=reason,
        output=f"output of {assignment.task_id}",
        error_message="it says so" if reason is TerminationReason.ERROR else None,
    )
