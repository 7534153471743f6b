"""The lock in memory: who may hold what, who waits, and that nothing is left behind."""

import random
from collections.abc import Sequence

import anyio
import anyio.lowlevel
import pytest
from anyio import wait_all_tasks_blocked
from hypothesis import given
from hypothesis import strategies as st

from parallel_agents import (
    ClaimLock,
    ClaimMode,
    InMemoryResourceLock,
    ResourceClaim,
    ResourceConflictError,
    ResourceLock,
)
from parallel_agents._claim_queue import find_overlap

SHARED = ClaimMode.SHARED


def claims(*names: str, mode: ClaimMode = ClaimMode.EXCLUSIVE) -> tuple[ResourceClaim, ...]:
    return tuple(ResourceClaim(resource=name, mode=mode) for name in names)


def test_it_is_both_kinds_of_lock() -> None:
    lock = InMemoryResourceLock()
    assert isinstance(lock, ResourceLock)
    assert isinstance(lock, ClaimLock)
    assert repr(lock) == "InMemoryResourceLock(holders=0, waiting=0)"


@pytest.mark.proves("X16")
def test_one_made_outside_a_loop_works_on_one_backend_after_the_other() -> None:
    pytest.importorskip("trio")
    lock = InMemoryResourceLock()

    async def wait_for_each_other() -> None:
        async def hold_for_a_moment(holder: str) -> None:
            lease = await lock.acquire_claims(claims("r"), holder)
            await anyio.lowlevel.checkpoint()
            lease.release()

        with anyio.fail_after(5):
            async with anyio.create_task_group() as tasks:
                for n in range(3):
                    tasks.start_soon(hold_for_a_moment, str(n))

    for backend in ("asyncio", "trio", "asyncio"):
        anyio.run(wait_for_each_other, backend=backend)
    assert lock.statistics().held == ()


@pytest.mark.anyio
async def test_the_five_methods() -> None:
    lock = InMemoryResourceLock()
    assert await lock.acquire("r", "one")
    assert await lock.acquire("r", "one")
    assert not await lock.acquire("r", "two")
    assert (lock.is_locked("r"), lock.holder_of("r")) == (True, "one")
    await lock.release("r", "two")
    assert lock.holder_of("r") == "one"
    await lock.release("r", "one")
    await lock.release("r", "one")
    assert (lock.is_locked("r"), lock.holder_of("r")) == (False, None)
    assert await lock.acquire("a", "one")
    assert await lock.acquire("b", "one")
    assert await lock.acquire("c", "two")
    assert await lock.release_all("one") == 2
    assert await lock.release_all("one") == 0
    assert lock.holder_of("c") == "two"


@pytest.mark.anyio
async def test_a_folder_is_held_with_everything_below_it() -> None:
    lock = InMemoryResourceLock()
    assert await lock.acquire("path:/a/b", "one")
    assert not await lock.acquire("path:/a", "two")
    assert not await lock.acquire("path:/a/b/c", "two")
    assert lock.holder_of("path:/a/b/c") == "one"
    assert await lock.acquire("path:/a/bc", "two")


@pytest.mark.anyio
@pytest.mark.parametrize("blank", ["", " \n"])
async def test_blank_names_are_refused(blank: str) -> None:
    lock = InMemoryResourceLock()
    for call in (lock.acquire, lock.release):
        with pytest.raises(ValueError, match="blank"):
            await call(blank, "holder")
        with pytest.raises(ValueError, match="blank"):
            await call("r", blank)
    with pytest.raises(ValueError, match="blank"):
        await lock.release_all(blank)
    with pytest.raises(ValueError, match="blank"):
        lock.is_locked(blank)
    with pytest.raises(ValueError, match="blank"):
        await lock.acquire_claims(claims("r"), blank)


@pytest.mark.anyio
async def test_claims_are_taken_together_or_not_at_all() -> None:
    lock = InMemoryResourceLock()
    lease = await lock.acquire_claims(claims("b"), "one")
    with pytest.raises(ResourceConflictError) as caught:
        await lock.acquire_claims(claims("a", "b", "c"), "two", timeout_seconds=0)
    assert (caught.value.resource, caught.value.holder, caught.value.claimant) == ("b", "one", "two")
    assert [held.resource for held in lock.statistics().held] == ["b"]
    lease.release()
    assert (lease.holder, lease.claims, lease.lost.is_set()) == ("one", claims("b"), False)
    with pytest.raises(ValueError, match="each resource once"):
        await lock.acquire_claims(claims("a", "a"), "one")


@pytest.mark.anyio
async def test_a_lease_that_is_released_again_frees_nothing_of_a_later_one() -> None:
    lock = InMemoryResourceLock()
    first = await lock.acquire_claims(claims("r"), "one")
    first.release()
    second = await lock.acquire_claims(claims("r"), "one")
    first.release()
    assert lock.holder_of("r") == "one"
    assert second.fencing_token > first.fencing_token
    third = await lock.acquire_claims(claims("r"), "one")
    second.release()
    assert lock.holder_of("r") == "one"
    await lock.release("r", "one")
    assert not lock.is_locked("r")
    third.release()


@pytest.mark.anyio
async def test_a_part_of_a_lease_can_be_released_by_its_name() -> None:
    lock = InMemoryResourceLock()
    lease = await lock.acquire_claims(claims("a", "b"), "one")
    await lock.release("a", "one")
    assert (lock.holder_of("a"), lock.holder_of("b")) == (None, "one")
    assert [held.resource for held in lock.statistics().held] == ["b"]
    lease.release()
    assert lock.statistics().held == ()


@pytest.mark.anyio
async def test_one_holder_may_have_several_leases_and_give_each_back() -> None:
    lock = InMemoryResourceLock()
    first, second, third = [await lock.acquire_claims(claims(name), "one", timeout_seconds=0) for name in "abc"]
    assert repr(lock) == "InMemoryResourceLock(holders=1, waiting=0)"
    second.release()
    assert [lock.holder_of(name) for name in "abc"] == ["one", None, "one"]
    first.release()
    third.release()
    assert repr(lock) == "InMemoryResourceLock(holders=0, waiting=0)"
    assert await lock.acquire("b", "two")


@pytest.mark.anyio
async def test_shared_holders_go_together_and_do_not_starve_an_exclusive_one() -> None:
    lock = InMemoryResourceLock()
    order: list[str] = []

    async def hold(name: str, mode: ClaimMode) -> None:
        lease = await lock.acquire_claims(claims("r", mode=mode), name)
        order.append(name)
        lease.release()

    with anyio.fail_after(5):
        first = await lock.acquire_claims(claims("r", mode=SHARED), "first")
        second = await lock.acquire_claims(claims("r", mode=SHARED), "second")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hold, "writer", ClaimMode.EXCLUSIVE)
            await wait_all_tasks_blocked()
            tasks.start_soon(hold, "reader", SHARED)
            await wait_all_tasks_blocked()
            assert [w.holder for w in lock.statistics().waiting] == ["writer", "reader"]
            unrelated = await lock.acquire_claims(claims("other"), "unrelated")
            unrelated.release()
            first.release()
            await wait_all_tasks_blocked()
            assert order == []
            second.release()
    assert order == ["writer", "reader"]


@pytest.mark.anyio
async def test_one_that_is_cancelled_while_it_waits_holds_nothing_and_holds_up_nobody() -> None:
    lock = InMemoryResourceLock()
    got = anyio.Event()

    async def behind() -> None:
        lease = await lock.acquire_claims(claims("b"), "behind")
        got.set()
        lease.release()

    with anyio.fail_after(5):
        held = await lock.acquire_claims(claims("a"), "holder")
        async with anyio.create_task_group() as tasks:
            scope = anyio.CancelScope()

            async def cancelled() -> None:
                with scope:
                    await lock.acquire_claims(claims("a", "b"), "cancelled")

            tasks.start_soon(cancelled)
            await wait_all_tasks_blocked()
            tasks.start_soon(behind)
            await wait_all_tasks_blocked()
            assert not got.is_set()
            scope.cancel()
            await got.wait()
        held.release()
    assert (lock.statistics().held, lock.statistics().waiting) == ((), ())


@pytest.mark.anyio
async def test_one_that_is_granted_and_cancelled_in_the_same_instant_gives_it_back() -> None:
    lock = InMemoryResourceLock()
    held = await lock.acquire_claims(claims("r"), "holder")
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lock.acquire_claims, claims("r"), "waiter")
            await wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
            held.release()
    assert lock.statistics().held == ()


@pytest.mark.anyio
async def test_waiting_ends_after_its_time_with_the_name_of_the_holder() -> None:
    lock = InMemoryResourceLock()
    lease = await lock.acquire_claims(claims("r"), "one")
    with pytest.raises(ResourceConflictError, match="'one'"):
        await lock.acquire_claims(claims("r"), "two", timeout_seconds=0.001)
    assert lock.statistics().waiting == ()
    lease.release()


@pytest.mark.anyio
async def test_a_lease_in_memory_is_never_lost() -> None:
    lease = await InMemoryResourceLock().acquire_claims(claims("r"), "one")
    with anyio.move_on_after(0) as scope:
        await lease.lost.wait()
    assert scope.cancelled_caught


names = st.lists(st.sampled_from(["x", "y", "path:/a", "path:/a/b", "path:/a/c"]), min_size=1, max_size=3, unique=True)
wishes = st.lists(st.tuples(names, st.sampled_from(ClaimMode), st.integers(0, 3), st.booleans()), max_size=8)


@pytest.mark.anyio
@given(wishes=wishes)
async def test_whatever_is_asked_no_two_hold_what_overlaps_and_nothing_is_left(
    wishes: Sequence[tuple[list[str], ClaimMode, int, bool]],
) -> None:
    lock = InMemoryResourceLock()
    holding: dict[str, tuple[ResourceClaim, ...]] = {}
    served: list[str] = []

    async def hold(holder: str, wanted: tuple[ResourceClaim, ...], steps: int) -> None:
        lease = await lock.acquire_claims(wanted, holder)
        holding[holder] = wanted
        served.append(holder)
        try:
            assert find_overlap(holding.items()) is None
            for _ in range(steps):
                await anyio.lowlevel.checkpoint()
        finally:
            del holding[holder]
            lease.release()

    async def maybe_cancelled(holder: str, wanted: tuple[ResourceClaim, ...], steps: int, cancel: bool) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hold, holder, wanted, steps)
            await anyio.lowlevel.checkpoint()
            if cancel:
                tasks.cancel_scope.cancel()

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            for number, (wanted, mode, steps, cancel) in enumerate(wishes):
                tasks.start_soon(maybe_cancelled, str(number), claims(*wanted, mode=mode), steps, cancel)
    assert {str(n) for n, wish in enumerate(wishes) if not wish[3]} <= set(served)
    assert (lock.statistics().held, lock.statistics().waiting) == ((), ())
    assert not lock._queue
    assert not lock._leases


@pytest.mark.proves("L3")
@pytest.mark.anyio
async def test_ten_thousand_random_schedules_end_with_everybody_served_and_nothing_left() -> None:
    randomness = random.Random(7)
    for _ in range(10_000):
        await run_a_random_schedule(randomness)


async def run_a_random_schedule(randomness: random.Random) -> None:
    """Four holders that come, wait and hold for random numbers of steps; one of them may be cancelled at some time."""
    lock = InMemoryResourceLock()
    holding: dict[str, tuple[ResourceClaim, ...]] = {}
    served: set[str] = set()
    scopes = [anyio.CancelScope() for _ in range(4)]
    cancelled: set[str] = set()

    async def hold(number: int, wanted: tuple[ResourceClaim, ...], before: int, inside: int) -> None:
        holder = str(number)
        with scopes[number]:
            for _ in range(before):
                await anyio.lowlevel.checkpoint()
            lease = await lock.acquire_claims(wanted, holder)
            holding[holder] = wanted
            served.add(holder)
            try:
                assert find_overlap(holding.items()) is None
                for _ in range(inside):
                    await anyio.lowlevel.checkpoint()
            finally:
                del holding[holder]
                lease.release()

    async with anyio.create_task_group() as tasks:
        for number in range(4):
            some = randomness.sample(["x", "y", "path:/a", "path:/a/b", "path:/a/c"], randomness.randint(1, 2))
            mode = randomness.choice(list(ClaimMode))
            steps = randomness.randint(0, 3), randomness.randint(0, 3)
            tasks.start_soon(hold, number, claims(*some, mode=mode), *steps)
        for _ in range(randomness.randint(0, 4)):
            await anyio.lowlevel.checkpoint()
        if randomness.random() < 0.5:
            victim = randomness.randrange(4)
            cancelled.add(str(victim))
            scopes[victim].cancel()
    assert served | cancelled == {"0", "1", "2", "3"}
    assert not lock._queue
    assert not lock._leases
