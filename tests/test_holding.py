"""Claims in a run: who holds what, when it is given back, and locks that cannot be trusted."""

from collections.abc import Awaitable, Sequence
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from attrs import define, field
from clocks import virtual_time
from groups import assignment, group_of

from parallel_agents import (
    NEVER_LOST,
    AgentAssignment,
    ClaimMode,
    InMemoryResourceLock,
    Lost,
    ParallelExecutionError,
    ParallelExecutionGroup,
    ParallelExecutor,
    ResourceClaim,
    ResourceConflictError,
)
from parallel_agents.locks.memory import MemoryLease

pytestmark = pytest.mark.anyio


def claiming(*claims: tuple[str | ResourceClaim, ...], **options: Any) -> ParallelExecutionGroup:
    """Return a group with one assignment for each tuple of claims."""
    assignments = [assignment(n, resource_claims=own) for n, own in enumerate(claims)]
    return ParallelExecutionGroup(group_id="g", assignments=assignments, **options)


@define(eq=False)
class PlainLock:
    """A lock with the five methods and nothing else; ``fault`` says what its release does."""

    fault: str = ""
    fails_for: str = ""
    holders: dict[str, str] = field(factory=dict)
    calls: list[str] = field(factory=list)

    async def acquire(self, resource: str, holder: str) -> bool:
        self.calls.append(f"acquire {resource}")
        await anyio.lowlevel.checkpoint()
        return self.holders.setdefault(resource, holder) == holder

    async def release(self, resource: str, holder: str) -> None:
        self.calls.append(f"release {resource}")
        if resource == self.fails_for and self.fault == "raises":
            raise OSError("the server is gone")
        if resource == self.fails_for and self.fault == "hangs":
            await anyio.sleep_forever()
        await anyio.lowlevel.checkpoint()
        if self.holders.get(resource) == holder:
            del self.holders[resource]

    async def release_all(self, holder: str) -> int:
        raise NotImplementedError

    def is_locked(self, resource: str) -> bool:
        return resource in self.holders

    def holder_of(self, resource: str) -> str | None:
        return self.holders.get(resource)


class RemoteLock(InMemoryResourceLock):
    """Stands for a lock whose leases need a round trip to be given back; *fault* says what that does."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault

    async def acquire_claims(self, claims: Sequence[ResourceClaim], holder: str, **options: Any) -> Any:
        return RemoteLease(await super().acquire_claims(claims, holder, **options), self.fault)


@define(eq=False)
class RemoteLease:
    inner: MemoryLease
    fault: str
    lost: Lost = NEVER_LOST

    def release(self) -> Awaitable[None]:
        if self.fault == "raises at once":
            raise OSError("no connection")
        return self._round_trip()

    async def _round_trip(self) -> None:
        if self.fault == "raises":
            raise OSError("no answer")
        if self.fault == "hangs":
            await anyio.sleep_forever()
        await anyio.lowlevel.checkpoint()
        self.inner.release()


async def run(group: ParallelExecutionGroup, engine: Any = None, **options: Any) -> Any:
    async def fine(task: AgentAssignment) -> str:
        await anyio.lowlevel.checkpoint()
        return task.task_id

    with anyio.fail_after(3600):
        return await ParallelExecutor(engine=engine or fine, **options).execute_group(group)


@pytest.mark.proves("L1")
async def test_each_execution_of_a_group_has_holders_of_its_own() -> None:
    lock = InMemoryResourceLock()
    holders: list[str | None] = []

    async def agent(task: AgentAssignment) -> None:
        holders.append(lock.holder_of(f"r{task.task_id}"))

    group = claiming(("rt0",), ("rt1",), max_concurrency=1)
    for _ in range(2):
        assert (await run(group, agent, resource_lock=lock)).all_succeeded
    assert len(set(holders)) == 4
    executions = [str(holder).partition("#") for holder in holders]
    assert [name for name, _, _ in executions] == ["g:t0", "g:t1"] * 2
    first, also_first, second, _ = (fresh for _, _, fresh in executions)
    assert first == also_first != second


@pytest.mark.proves("L1", "L2")
async def test_the_same_group_run_twice_at_once_conflicts_instead_of_sharing() -> None:
    lock = InMemoryResourceLock()
    group = claiming(("r",))

    async def agent(task: AgentAssignment) -> None:
        with pytest.raises(ResourceConflictError):
            await run(group, resource_lock=lock)
        assert lock.is_locked("r")

    async def fresh_context() -> None:
        with pytest.raises(ResourceConflictError, match="'g:t0#"):
            await run(group, resource_lock=lock)

    async with ParallelExecutor(engine=agent, resource_lock=lock).open_group(group) as open_run:
        await fresh_context()
        assert lock.is_locked("r")
    open_run.result.raise_for_failures()


@pytest.mark.proves("L2")
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("r", "r"),
        (ResourceClaim(resource="r", mode=ClaimMode.SHARED), "r"),
        (ResourceClaim(resource="path:/a"), ResourceClaim(resource="path:/a/b")),
    ],
)
async def test_overlapping_claims_inside_a_group_are_refused_before_any_agent_runs(first: Any, second: Any) -> None:
    started: list[str] = []

    async def agent(task: AgentAssignment) -> None:
        started.append(task.task_id)

    with pytest.raises(ResourceConflictError) as caught:
        await run(claiming((), (first,), (second,)), agent)
    assert started == []
    assert (caught.value.holder, caught.value.claimant) == ("a1", "a2")
    assert caught.value.resource in str(caught.value)


@pytest.mark.proves("L2")
async def test_shared_claims_inside_a_group_go_together() -> None:
    shared = ResourceClaim(resource="r", mode=ClaimMode.SHARED)
    assert (await run(claiming((shared,), (shared,)))).all_succeeded


@pytest.mark.proves("L2")
@pytest.mark.parametrize("plain", [False, True])
async def test_what_somebody_outside_holds_is_refused_and_what_was_taken_is_given_back(*, plain: bool) -> None:
    lock: Any = PlainLock() if plain else InMemoryResourceLock()
    assert await lock.acquire("s", "outsider")
    with pytest.raises(ResourceConflictError) as caught:
        await run(claiming(("q",), ("r", "s", "t")), resource_lock=lock)
    error = caught.value
    assert (error.resource, error.holder, error.claimant) == ("s", "outsider", "a1")
    assert lock.holder_of("s") == "outsider"
    assert not any(lock.is_locked(resource) for resource in "qrt")


@pytest.mark.proves("L2")
async def test_a_plain_lock_takes_shared_claims_as_exclusive_ones() -> None:
    shared = ResourceClaim(resource="r", mode=ClaimMode.SHARED)
    lock = PlainLock()
    with pytest.raises(ResourceConflictError) as caught:
        await run(claiming((shared,), (shared,)), resource_lock=lock)
    assert (caught.value.holder, caught.value.claimant) == ("a0", "a1")
    assert lock.holders == {}


@pytest.mark.proves("L4")
@pytest.mark.parametrize("make", [InMemoryResourceLock, PlainLock, RemoteLock])
async def test_an_assignments_locks_are_free_as_soon_as_it_has_ended(make: Any) -> None:
    lock = make()
    failed = anyio.Event()

    async def agent(task: AgentAssignment) -> None:
        if task.task_id == "t0":
            raise ValueError
        await failed.wait()
        assert not lock.is_locked("r")
        assert lock.is_locked("s")

    group = claiming(("r",), ("s",))
    with anyio.fail_after(5):
        async with ParallelExecutor(engine=agent, resource_lock=lock).open_group(group) as open_run:
            async for outcome in open_run:
                assert not lock.is_locked("r")
                if outcome.task_id == "t0":
                    failed.set()
    assert not lock.is_locked("s")
    assert open_run.result.outcome_of("t1").is_success


@pytest.mark.proves("L4")
@pytest.mark.parametrize("make", [InMemoryResourceLock, PlainLock, RemoteLock])
@pytest.mark.parametrize("way", ["cancelled", "interrupted", "fail fast"])
async def test_no_lock_is_left_on_any_path(make: Any, way: str) -> None:
    lock = make()
    started = anyio.Event()

    async def agent(task: AgentAssignment) -> None:
        if task.task_id == "t1":
            started.set()
            if way == "interrupted":
                raise KeyboardInterrupt
            if way == "fail fast":
                raise ValueError
        await anyio.sleep_forever()

    group = claiming(("a", "b"), ("c",), ("d",), max_concurrency=2, fail_fast=True)
    with anyio.fail_after(5), anyio.CancelScope() as scope:
        try:
            async with ParallelExecutor(engine=agent, resource_lock=lock).open_group(group):
                await started.wait()
                if way == "cancelled":
                    scope.cancel()
        except KeyboardInterrupt:
            assert way == "interrupted"
    assert not any(lock.is_locked(resource) for resource in "abcd")


@pytest.mark.proves("L4")
@virtual_time
@pytest.mark.parametrize("fault", ["raises", "hangs"])
async def test_every_lock_is_tried_although_one_cannot_be_given_back_and_the_error_has_the_result(fault: str) -> None:
    lock = PlainLock(fault=fault, fails_for="b")
    with pytest.raises(ParallelExecutionError, match="could not give back its locks") as caught:
        await run(claiming(("a", "b", "c"), ("d",)), resource_lock=lock)
    assert caught.value.result.all_succeeded
    assert set(lock.holders) == {"b"}


@pytest.mark.proves("L4")
@virtual_time
@pytest.mark.parametrize("fault", ["raises at once", "raises", "hangs"])
async def test_leases_that_cannot_be_given_back_are_told_all_together(fault: str) -> None:
    started = anyio.current_time()
    with pytest.raises(ParallelExecutionError) as caught:
        await run(claiming(("a",), ("b",)), resource_lock=RemoteLock(fault))
    assert caught.value.result.all_succeeded
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert len(caught.value.__cause__.exceptions) == 2
    assert anyio.current_time() - started <= 10


@pytest.mark.proves("L4")
async def test_a_lock_that_cannot_be_given_back_is_a_note_on_an_error_that_was_there_before() -> None:
    async def fatal(task: AgentAssignment) -> None:
        raise MemoryError

    with pytest.raises(ParallelExecutionError, match="Fatal") as caught:
        await run(claiming(("a",)), fatal, resource_lock=PlainLock("raises", "a"))
    assert any("could not be given back: " in note for note in caught.value.__notes__)

    with pytest.raises(LookupError) as block:
        executor = ParallelExecutor(engine=fatal, resource_lock=PlainLock("raises", "a"))
        async with executor.open_group(claiming(("a",))):
            raise LookupError
    assert any("could not be given back: " in note for note in block.value.__notes__)


@pytest.mark.proves("L4", "X8")
async def test_a_lock_whose_acquire_is_cancelled_is_given_back_although_nobody_knows_if_it_is_held() -> None:
    class Slow(PlainLock):
        async def acquire(self, resource: str, holder: str) -> bool:
            self.holders[resource] = holder
            await anyio.sleep_forever()
            return True

    lock = Slow()
    with anyio.move_on_after(0.001) as scope:
        await run(claiming(("a",)), resource_lock=lock)
    assert scope.cancelled_caught
    assert lock.holders == {}


@pytest.mark.proves("L5")
async def test_no_claims_mean_no_lock_calls() -> None:
    lock = PlainLock()
    assert (await run(group_of(3), resource_lock=lock)).all_succeeded
    assert lock.calls == []
    assert (await run(claiming((), ("r",), max_concurrency=1), resource_lock=lock)).all_succeeded
    assert lock.calls == ["acquire r", "release r"]


@pytest.mark.proves("L4", "X10")
@virtual_time
async def test_time_that_a_lock_takes_to_be_given_back_does_not_count_against_the_next_agent() -> None:
    class Slow(PlainLock):
        async def release(self, resource: str, holder: str) -> None:
            await anyio.sleep(2)
            await super().release(resource, holder)

    assignments = [
        assignment(0, resource_claims=("r",)),
        assignment(1, timeout_seconds=1.5),
    ]
    group = ParallelExecutionGroup(group_id="g", assignments=assignments, max_concurrency=1)
    result = await run(group, lambda task: anyio.sleep(1), resource_lock=Slow())
    assert result.all_succeeded
    assert result.outcomes[1].started_after_seconds == 3
