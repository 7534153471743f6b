"""Every public operation that waits, as something to cancel: see ``OPERATIONS``."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import anyio
import anyio.lowlevel
from groups import assignment
from scenarios import (
    Scenario,
    check,
    check_events,
    cleans_up_slowly,
    fails_after_one_second,
    quick,
    scenarios,
    sleeps_one_second,
)

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    AgentOutcome,
    ClaimMode,
    CooperativeTimeout,
    FunctionEngine,
    InMemoryResourceLock,
    OutcomeStatus,
    ParallelExecutionGroup,
    ParallelExecutionResult,
    ParallelExecutor,
    ResourceClaim,
    ResourceConflictError,
    ShutdownManager,
    Task,
    Tool,
    ToolCall,
    ToolInvoker,
    ToolRegistry,
    Usage,
)
from parallel_agents._run import GroupRun
from parallel_agents._stream import StreamRun
from parallel_agents.engines import AgentEngine
from parallel_agents.engines.fallback import FallbackEngine
from parallel_agents.engines.journal import JournaledEngine
from parallel_agents.engines.rate_limit import RateLimit, RateLimitedEngine
from parallel_agents.engines.retry import RetryEngine, RetryPolicy
from parallel_agents.events import ParallelEvent
from parallel_agents.journals import Ending, Entry, Step
from proof.injection import Operation


class RunsAGroup(Operation):
    """``execute_group()`` and ``open_group()``, which it is made of."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.lock = InMemoryResourceLock()
        self.runs: list[GroupRun[Any]] = []

    async def prepare(self) -> None:
        self.executor = self.scenario.executor(self.lock)
        if self.scenario.waits:
            assert await self.lock.acquire("outside", "outsider")

    async def run(self) -> None:
        async with self.executor.open_group(self.scenario.group()) as run:
            self.runs.append(run)

    def after(self) -> None:
        self.scenario.is_over = True

    def check(self) -> None:
        assert {held.holder for held in self.lock.statistics().held} <= {"outsider"}
        assert not self.lock.statistics().waiting
        if self.runs:
            check(self.scenario, self.runs[0].result)

    async def use_again(self) -> None:
        self.scenario.is_over = False
        self.scenario.behaviours = (quick,) * len(self.scenario.behaviours)
        self.scenario.options.pop("stop_after_successes", None)
        await self.lock.release_all("outsider")
        result = await self.executor.execute_group(self.scenario.group())
        assert result.all_succeeded


class WatchesAGroup(RunsAGroup):
    """Iteration and ``cancel_task()``."""

    def __init__(self) -> None:
        super().__init__(Scenario((quick, sleeps_one_second) * 3, {"max_concurrency": 3}, claims=True))
        self.taken: list[AgentOutcome[Any]] = []

    async def run(self) -> None:
        async with self.executor.open_group(self.scenario.group()) as run:
            self.runs.append(run)
            async for outcome in run:
                self.taken.append(outcome)
                run.cancel_task("5")

    def check(self) -> None:
        super().check()
        of_result = self.runs[0].result.outcomes
        assert all(any(outcome is known for known in of_result) for outcome in self.taken)
        assert len({outcome.task_id for outcome in self.taken}) == len(self.taken)


class Source:
    """Assignments that are waited for, from something that takes its time to be closed."""

    def __init__(self, assignments: Iterable[AgentAssignment]) -> None:
        self._left = list(assignments)
        self.is_open = False

    def __aiter__(self) -> "Source":
        self.is_open = True
        return self

    async def __anext__(self) -> AgentAssignment:
        await anyio.lowlevel.checkpoint()
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop(0)

    async def aclose(self) -> None:
        await anyio.sleep(0.25)
        self.is_open = False


class TakesAStream(Operation):
    """``open_stream()``, and that its source is closed."""

    def __init__(self) -> None:
        self.scenario = Scenario((quick, sleeps_one_second) * 3, claims=True)
        self.lock = InMemoryResourceLock()
        self.taken: list[str] = []
        self.source = Source(self.scenario.group().assignments)
        self.streams: list[StreamRun[Any]] = []

    async def prepare(self) -> None:
        self.executor = self.scenario.executor(self.lock)

    async def run(self) -> None:
        async with self.executor.open_stream(self.source, group_id="s", max_concurrency=2) as outcomes:
            self.streams.append(outcomes)
            async for outcome in outcomes:
                self.taken.append(outcome.task_id)

    def after(self) -> None:
        self.scenario.is_over = True
        assert not self.source.is_open

    def check(self) -> None:
        assert not self.lock.statistics().held
        assert not self.lock.statistics().waiting
        assert sorted(self.scenario.started) == sorted(self.scenario.closed)
        assert not self.scenario.touched_after_the_end
        assert self.scenario.peak <= 2
        assert len(set(self.taken)) == len(self.taken)
        assert not any(stream._claims._claimed for stream in self.streams), "what ended is remembered"
        check_events(self.scenario.events)

    async def use_again(self) -> None:
        self.scenario.is_over = False
        self.taken.clear()
        self.source = Source(self.scenario.group().assignments)
        await self.run()
        assert len(self.taken) == 6


class CallsTools(Operation):
    """``ToolInvoker.invoke_all()``."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.closed: list[str] = []
        self.peak = 0
        self.is_over = self.touched_after_the_end = False
        tools = [
            self._tool("quick", quick),
            self._tool("slow", sleeps_one_second),
            self._tool("failing", fails_after_one_second),
            self._tool("late", cleans_up_slowly, timeout_seconds=1),
        ]
        self.invoker = ToolInvoker(ToolRegistry(tools))

    def _tool(self, name: str, behaviour: Callable[[AgentAssignment], Any], **options: Any) -> Tool:
        async def function(_arguments: dict[str, Any]) -> str:
            self.started.append(name)
            self.peak = max(self.peak, len(self.started) - len(self.closed))
            try:
                await behaviour(assignment(0))
            finally:
                self.closed.append(name)
                self.touched_after_the_end |= self.is_over
            return name

        return Tool(name=name, function=function, **options)

    async def run(self) -> None:
        names = ["slow", "quick", "failing", "late", "unknown", "slow"]
        calls = [ToolCall(id=str(n), name=name, arguments={}) for n, name in enumerate(names)]
        results = await self.invoker.invoke_all(calls, max_concurrency=3)
        assert [result.tool_call_id for result in results] == [call.id for call in calls]
        assert [result.is_error for result in results] == [False, False, True, True, True, False]

    def after(self) -> None:
        self.is_over = True

    def check(self) -> None:
        assert sorted(self.started) == sorted(self.closed)
        assert not self.touched_after_the_end
        assert self.peak <= 3

    async def use_again(self) -> None:
        self.is_over = False
        await self.run()


class TakesClaims(Operation):
    """``acquire_claims()`` by several at once, of keys, folders and files, alone and shared."""

    WANTED: ClassVar[tuple[tuple[tuple[str, ClaimMode], ...], ...]] = (
        (("path:/a", ClaimMode.EXCLUSIVE),),
        (("path:/a/b", ClaimMode.SHARED), ("key", ClaimMode.EXCLUSIVE)),
        (("path:/a/b/c", ClaimMode.SHARED),),
        (("key", ClaimMode.SHARED), ("path:/d", ClaimMode.EXCLUSIVE)),
        (("path:/a/b", ClaimMode.EXCLUSIVE),),
        (("path:/d/e", ClaimMode.SHARED),),
    )

    def __init__(self) -> None:
        self.lock = InMemoryResourceLock()
        self.tokens: list[int] = []
        self.had: set[str] = set()

    async def _hold(self, holder: str, wanted: tuple[tuple[str, ClaimMode], ...]) -> None:
        claims = [ResourceClaim(resource=resource, mode=mode) for resource, mode in wanted]
        try:
            lease = await self.lock.acquire_claims(claims, holder, timeout_seconds=2.5)
        except ResourceConflictError:
            return
        try:
            self.had.add(holder)
            self.tokens.append(lease.fencing_token)
            self._check_held()
            await anyio.sleep(1)
        finally:
            lease.release()

    def _check_held(self) -> None:
        held = self.lock.statistics().held
        for one in held:
            for other in held:
                overlap = one.resource == other.resource or other.resource.startswith(f"{one.resource}/")
                is_shared = one.mode is other.mode is ClaimMode.SHARED
                assert one.holder == other.holder or not overlap or is_shared

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            for number, wanted in enumerate(self.WANTED):
                tasks.start_soon(self._hold, f"holder {number}", wanted)

    def check(self) -> None:
        assert not self.lock.statistics().held
        assert not self.lock.statistics().waiting
        assert not self.lock._queue
        assert len(set(self.tokens)) == len(self.tokens)

    async def use_again(self) -> None:
        for wanted in self.WANTED:
            await self.lock.acquire_claims(
                [ResourceClaim(resource=resource, mode=mode) for resource, mode in wanted], "again", timeout_seconds=0
            )
        assert await self.lock.release_all("again") > 0


class ShutsDown(RunsAGroup):
    """``initiate_shutdown()`` while a group runs beside it."""

    def __init__(self) -> None:
        super().__init__(Scenario((sleeps_one_second, cleans_up_slowly) * 2, {"max_concurrency": 2}, claims=True))
        self.manager = ShutdownManager(CooperativeTimeout(grace_seconds=0.25, cleanup_seconds=1))
        self.cleanups: list[str] = []
        self.manager.register_cleanup(self._clean_up)

    async def _clean_up(self) -> None:
        assert sorted(self.scenario.started) == sorted(self.scenario.closed), "an agent runs while others clean up"
        self.cleanups.append("began")
        await anyio.sleep(0.5)
        self.cleanups.append("ended")

    async def prepare(self) -> None:
        self.executor = self.scenario.executor(self.lock, shutdown_manager=self.manager)

    async def run(self) -> None:
        async with self.executor.open_group(self.scenario.group()) as run:
            self.runs.append(run)
            await anyio.sleep(0.5)
            result = await self.manager.initiate_shutdown()
            assert result.cleanup_finished
            assert len(result.interrupted) == 2

    def check(self) -> None:
        super().check()
        assert self.cleanups in ([], ["began", "ended"]) or self.is_cancelled_natively, "cleaning up was interrupted"
        assert "runs=0" in repr(self.manager)

    async def use_again(self) -> None:
        self.manager.request_shutdown()
        result = await self.executor.execute_group(self.scenario.group())
        assert {outcome.status for outcome in result.outcomes} == {OutcomeStatus.REJECTED}


class NestsGroups(Operation):
    """Agents that open groups, which share their limiter."""

    def __init__(self) -> None:
        self.working = self.peak = 0
        self.is_over = self.touched_after_the_end = False
        self.events: list[ParallelEvent] = []

    def on_event(self, event: ParallelEvent, /) -> None:
        self.events.append(event)

    def group(self, group_id: str, depth: int) -> ParallelExecutionGroup:
        tasks = [Task(id=f"{group_id}.{n}", inputs={"depth": depth}) for n in range(2)]
        return ParallelExecutionGroup.map(group_id, AgentIdentity(id="agent"), tasks)

    async def agent(self, of: AgentAssignment) -> int:
        depth = of.task.inputs["depth"]
        try:
            if depth:
                return succeeded(await self.executor.execute_group(self.group(of.task_id, depth - 1)))
            self.working += 1
            self.peak = max(self.peak, self.working)
            try:
                await anyio.sleep(1)
            finally:
                self.working -= 1
            return 1
        finally:
            self.touched_after_the_end |= self.is_over

    async def prepare(self) -> None:
        self.limiter = anyio.CapacityLimiter(2)
        self.executor = ParallelExecutor(engine=self.agent, limiter=self.limiter, observers=[self])

    async def run(self) -> None:
        assert succeeded(await self.executor.execute_group(self.group("g", 2))) == 8

    def after(self) -> None:
        self.is_over = True

    def check(self) -> None:
        assert self.limiter.borrowed_tokens == 0
        assert self.limiter.statistics().tasks_waiting == 0
        assert self.working == 0
        assert self.peak <= 2
        assert not self.touched_after_the_end
        check_events(self.events)

    async def use_again(self) -> None:
        self.is_over = False
        await self.run()


def succeeded(result: ParallelExecutionResult[int]) -> int:
    return sum(outcome.output or 0 for outcome in result.outcomes)


class MemoryJournal:
    """A journal that waits before and after it writes, as one on a disk does."""

    def __init__(self) -> None:
        self.started: dict[int, str] = {}
        self.ended: dict[int, Ending] = {}
        self.spent: defaultdict[str, Usage] = defaultdict(Usage)

    async def start(self, step: Step, /) -> Entry:
        await anyio.lowlevel.checkpoint()
        attempt = len(self.started)
        for number, task_id in self.started.items():
            ending = self.ended.get(number)
            if task_id == step.task_id and ending is not None and ending.status == "succeeded":
                return Entry(attempt=None, content=ending.content, spent=self.spent[task_id], reason="recorded")
        self.started[attempt] = step.task_id
        await anyio.lowlevel.checkpoint()
        return Entry(attempt=attempt, spent=self.spent[step.task_id])

    def spend(self, attempt: int, usage: Usage, /) -> None:
        self.spent[self.started[attempt]] += usage

    async def end(self, attempt: int, ending: Ending, /) -> None:
        assert attempt not in self.ended
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.25)
            self.ended[attempt] = ending

    def succeeded(self) -> set[str]:
        return {self.started[attempt] for attempt, ending in self.ended.items() if ending.status == "succeeded"}


class Wraps(RunsAGroup):
    """Engines around engines: their waits, and what they note."""

    def __init__(self, wrap: Callable[[AgentEngine], AgentEngine], *, starts_again: bool = False) -> None:
        behaviours = (quick, sleeps_one_second, fails_after_one_second)
        options = {"max_concurrency": 2}
        super().__init__(Scenario(behaviours, options, claims=True, wrap=wrap, starts_again=starts_again))


class Journals(Wraps):
    def __init__(self) -> None:
        self.journal = MemoryJournal()
        super().__init__(lambda inner: JournaledEngine(inner, self.journal))

    def check(self) -> None:
        super().check()
        for outcome in self.runs[0].result.outcomes if self.runs else ():
            assert outcome.is_success == (outcome.task_id in self.journal.succeeded())

    async def use_again(self) -> None:
        recorded = self.journal.succeeded()
        self.scenario.started.clear()
        await super().use_again()
        assert not recorded & set(self.scenario.started), "a recorded success ran again"


def retries(inner: AgentEngine) -> AgentEngine:
    return RetryEngine(inner, RetryPolicy(retry_on=ValueError, attempts=3, initial_wait_seconds=0.5, jitter_seconds=0))


def limits_the_rate(inner: AgentEngine) -> AgentEngine:
    return RateLimitedEngine(inner, RateLimit(2, per_seconds=1), RateLimit(3, per_seconds=2))


def falls_back(inner: AgentEngine) -> AgentEngine:
    return FallbackEngine(inner, FunctionEngine(sleeps_one_second))


def _group(name: str) -> Callable[[], Operation]:
    return lambda: RunsAGroup(scenarios()[name]())


OPERATIONS: Mapping[str, Callable[[], Operation]] = {
    **{f"execute_group, {name}": _group(name) for name in scenarios()},
    "open_group, watched": WatchesAGroup,
    "open_stream": TakesAStream,
    "invoke_all": CallsTools,
    "acquire_claims": TakesClaims,
    "initiate_shutdown": ShutsDown,
    "nested groups": NestsGroups,
    "RetryEngine": lambda: Wraps(retries, starts_again=True),
    "RateLimitedEngine": lambda: Wraps(limits_the_rate),
    "FallbackEngine": lambda: Wraps(falls_back, starts_again=True),
    "JournaledEngine": Journals,
}
