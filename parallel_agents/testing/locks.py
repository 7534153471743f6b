"""What every lock must do, as test classes: subclass one for your lock, and give it a fixture ``lock``.

Each test runs on the backends that the fixture ``anyio_backend`` of your tests names. Nothing here sleeps; where a lock
has to show that somebody waits, it is asked for something else meanwhile, several times.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations

import anyio
import anyio.lowlevel
import pytest

from .._claims import ClaimMode, ResourceClaim
from .._errors import ResourceConflictError
from ..locks import ClaimLock, Lease, ResourceLock

SECONDS = 30.0
"""How long a test may take; a lock that has not answered by then hangs."""

FOLDER = ResourceClaim(resource="path:/contract/folder")
FILE_IN_FOLDER = ResourceClaim(resource="path:/contract/folder/below/file")
FILE_BESIDE = ResourceClaim(resource="path:/contract/folder-beside/file")


def exclusive(*names: str) -> tuple[ResourceClaim, ...]:
    """Return exclusive claims of these names."""
    return tuple(ResourceClaim(resource=name) for name in names)


def shared(*names: str) -> tuple[ResourceClaim, ...]:
    """Return shared claims of these names."""
    return tuple(ResourceClaim(resource=name, mode=ClaimMode.SHARED) for name in names)


async def give_back(lease: Lease) -> None:
    """Release a lease of any lock."""
    pending = lease.release()
    if pending is not None:
        await pending


@pytest.mark.anyio
class ResourceLockContract:
    """The five methods. A subclass has a fixture ``lock`` that gives a fresh lock for each test."""

    @pytest.fixture
    def lock(self) -> ResourceLock:
        """Return a lock that nobody holds anything of."""
        raise NotImplementedError("give your subclass a fixture 'lock'")

    def test_it_has_the_methods_of_the_protocol(self, lock: ResourceLock) -> None:
        """It is what ``ParallelExecutor`` takes."""
        assert isinstance(lock, ResourceLock)

    async def test_one_holder_at_a_time(self, lock: ResourceLock) -> None:
        """A second holder is refused at once, the same one is not."""
        with anyio.fail_after(SECONDS):
            assert await lock.acquire("r", "one")
            assert await lock.acquire("r", "one")
            assert not await lock.acquire("r", "two")
            assert await lock.acquire("s", "two")
            assert (lock.is_locked("r"), lock.holder_of("r"), lock.holder_of("s")) == (True, "one", "two")
            assert (lock.is_locked("t"), lock.holder_of("t")) == (False, None)

    async def test_what_is_released_is_free(self, lock: ResourceLock) -> None:
        """Releasing twice does nothing, and neither does a holder that has it not."""
        with anyio.fail_after(SECONDS):
            assert await lock.acquire("r", "one")
            await lock.release("r", "two")
            assert lock.holder_of("r") == "one"
            await lock.release("r", "one")
            await lock.release("r", "one")
            assert not lock.is_locked("r")
            assert await lock.acquire("r", "two")

    async def test_all_of_one_holder_can_be_released(self, lock: ResourceLock) -> None:
        """Those of others stay; the number of resources is returned."""
        with anyio.fail_after(SECONDS):
            for resource, holder in [("a", "one"), ("b", "one"), ("c", "two")]:
                assert await lock.acquire(resource, holder)
            assert await lock.release_all("one") == 2
            assert await lock.release_all("one") == 0
            assert [lock.holder_of(resource) for resource in "abc"] == [None, None, "two"]

    async def test_blank_names_are_refused(self, lock: ResourceLock) -> None:
        """Such a name is a mistake, and two of them would share a lock."""
        with anyio.fail_after(SECONDS):
            for resource, holder in [(" ", "one"), ("r", ""), ("r", "\n")]:
                with pytest.raises(ValueError, match="blank"):
                    await lock.acquire(resource, holder)
                with pytest.raises(ValueError, match="blank"):
                    await lock.release(resource, holder)
            with pytest.raises(ValueError, match="blank"):
                await lock.release_all("")

    async def test_of_many_that_ask_at_once_one_gets_it(self, lock: ResourceLock) -> None:
        """Between asking and taking nobody else comes in."""
        got: list[str] = []

        async def ask(holder: str) -> None:
            if await lock.acquire("r", holder):
                got.append(holder)

        with anyio.fail_after(SECONDS):
            async with anyio.create_task_group() as tasks:
                for number in range(20):
                    tasks.start_soon(ask, f"holder {number}")
        assert len(got) == 1
        assert lock.holder_of("r") == got[0]


class ClaimLockContract(ResourceLockContract):
    """Whole claims: all or none, shared ones, folders, waiting in line. A fixture ``lock`` gives a fresh lock."""

    @pytest.fixture
    def lock(self) -> ClaimLock:
        """Return a lock that nobody holds anything of."""
        raise NotImplementedError("give your subclass a fixture 'lock'")

    def test_it_has_the_method_that_takes_whole_claims(self, lock: ClaimLock) -> None:
        """So that the executor asks for all claims of an assignment at once."""
        assert isinstance(lock, ClaimLock)

    async def test_all_claims_are_taken_or_none(self, lock: ClaimLock) -> None:
        """And the error names what was in the way, and whose it is."""
        with anyio.fail_after(SECONDS):
            lease = await lock.acquire_claims(exclusive("b"), "one")
            with pytest.raises(ResourceConflictError) as caught:
                await lock.acquire_claims(exclusive("a", "b", "c"), "two", timeout_seconds=0)
            assert (caught.value.resource, caught.value.holder, caught.value.claimant) == ("b", "one", "two")
            assert [lock.holder_of(resource) for resource in "abc"] == [None, "one", None]
            assert (lease.holder, tuple(lease.claims), lease.lost.is_set()) == ("one", exclusive("b"), False)
            await give_back(lease)
            assert not lock.is_locked("b")

    async def test_what_names_a_resource_twice_is_refused(self, lock: ClaimLock) -> None:
        """Nobody could say in which mode it is held."""
        with anyio.fail_after(SECONDS), pytest.raises(ValueError, match="once"):
            await lock.acquire_claims((*exclusive("a"), *shared("a")), "one")

    async def test_shared_claims_go_together_and_exclusive_ones_do_not(self, lock: ClaimLock) -> None:
        """In either order."""
        with anyio.fail_after(SECONDS):
            leases = [await lock.acquire_claims(shared("r"), holder) for holder in ("one", "two")]
            with pytest.raises(ResourceConflictError):
                await lock.acquire_claims(exclusive("r"), "three", timeout_seconds=0)
            assert not await lock.acquire("r", "three")
            for lease in leases:
                await give_back(lease)
            lease = await lock.acquire_claims(exclusive("r"), "three", timeout_seconds=0)
            with pytest.raises(ResourceConflictError):
                await lock.acquire_claims(shared("r"), "one", timeout_seconds=0)
            await give_back(lease)

    async def test_a_folder_is_claimed_with_all_below_it(self, lock: ClaimLock) -> None:
        """But not with what only has a name that starts the same."""
        with anyio.fail_after(SECONDS):
            for first, second in [(FOLDER, FILE_IN_FOLDER), (FILE_IN_FOLDER, FOLDER)]:
                lease = await lock.acquire_claims((first,), "one")
                with pytest.raises(ResourceConflictError):
                    await lock.acquire_claims((second,), "two", timeout_seconds=0)
                await give_back(await lock.acquire_claims((FILE_BESIDE,), "two", timeout_seconds=0))
                await give_back(lease)

    async def test_a_lease_may_be_released_again_and_then_frees_nothing_of_a_later_one(self, lock: ClaimLock) -> None:
        """Also where the holder is the same."""
        with anyio.fail_after(SECONDS):
            first = await lock.acquire_claims(exclusive("r"), "one")
            await give_back(first)
            second = await lock.acquire_claims(exclusive("r"), "one")
            await give_back(first)
            assert lock.holder_of("r") == "one"
            await give_back(second)
            assert not lock.is_locked("r")

    async def test_fencing_tokens_grow(self, lock: ClaimLock) -> None:
        """So that a store can refuse what comes with an older one."""
        tokens = []
        with anyio.fail_after(SECONDS):
            for holder in ("one", "two", "three"):
                lease = await lock.acquire_claims(exclusive("r"), holder)
                tokens.append(lease.fencing_token)
                await give_back(lease)
        assert tokens == sorted(set(tokens))

    async def test_those_that_wait_are_served_in_the_order_in_which_they_came(self, lock: ClaimLock) -> None:
        """A shared claim does not overtake an exclusive one that waits; one that does not overlap passes."""
        with anyio.fail_after(SECONDS):
            with _order_of(lock) as order:
                first = await lock.acquire_claims(shared("r"), "first")
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(order.hold, "writer", exclusive("r", "s"))
                    await self._until_somebody_waits(lock, "s")
                    for holder, claims in (("reader", shared("r")), ("last", exclusive("s"))):
                        tasks.start_soon(order.hold, holder, claims)
                        await self._meanwhile(lock)
                    assert order.served == []
                    await give_back(first)
            assert order.served[0] == "writer"
            assert sorted(order.served) == ["last", "reader", "writer"]

    async def test_waiting_ends_after_its_time(self, lock: ClaimLock) -> None:
        """With an error that names who has it; nothing is held, and nobody is kept."""
        with anyio.fail_after(SECONDS):
            lease = await lock.acquire_claims(exclusive("r"), "one")
            with pytest.raises(ResourceConflictError) as caught:
                await lock.acquire_claims(exclusive("q", "r"), "two", timeout_seconds=0.01)
            assert (caught.value.resource, caught.value.holder) == ("r", "one")
            await give_back(await lock.acquire_claims(exclusive("q"), "three", timeout_seconds=0))
            await give_back(lease)
            assert not lock.is_locked("r")

    async def test_one_that_is_cancelled_while_it_waits_holds_nothing_and_keeps_nobody(self, lock: ClaimLock) -> None:
        """Those that waited behind it go on."""
        with anyio.fail_after(SECONDS):
            lease = await lock.acquire_claims(exclusive("a"), "holder")
            with _order_of(lock) as order:
                async with anyio.create_task_group() as tasks:
                    scope = anyio.CancelScope()

                    async def cancelled() -> None:
                        with scope:
                            await order.hold("cancelled", exclusive("a", "b"))

                    tasks.start_soon(cancelled)
                    await self._until_somebody_waits(lock, "b")
                    tasks.start_soon(order.hold, "behind", exclusive("b"))
                    await self._meanwhile(lock)
                    assert order.served == []
                    scope.cancel()
            assert order.served == ["behind"]
            await give_back(lease)
            assert not any(lock.is_locked(resource) for resource in "ab")

    async def test_no_order_of_claims_is_a_deadlock(self, lock: ClaimLock) -> None:
        """Each wants the same three, in its own order."""
        with anyio.fail_after(SECONDS), _order_of(lock) as order:
            async with anyio.create_task_group() as tasks:
                for number, names in enumerate(permutations("abc")):
                    tasks.start_soon(order.hold, f"holder {number}", exclusive(*names))
            assert len(order.served) == 6
            assert not any(lock.is_locked(resource) for resource in "abc")

    async def _until_somebody_waits(self, lock: ClaimLock, resource: str) -> None:
        """Wait until somebody is in line for a resource that nobody holds: who comes later is refused then."""
        while True:
            try:
                lease = await lock.acquire_claims(exclusive(resource), "later", timeout_seconds=0)
            except ResourceConflictError:
                return
            await give_back(lease)
            await anyio.lowlevel.checkpoint()

    async def _meanwhile(self, lock: ClaimLock) -> None:
        """Give others the time in which the lock answers several times."""
        for _ in range(3):
            await give_back(await lock.acquire_claims(exclusive("meanwhile"), "meanwhile"))
            await anyio.lowlevel.checkpoint()


class _Order:
    """Who was served, in order; and that nobody was served beside somebody that it overlaps."""

    def __init__(self, lock: ClaimLock) -> None:
        self._lock = lock
        self._inside: dict[str, Sequence[ResourceClaim]] = {}
        self.served: list[str] = []

    async def hold(self, holder: str, claims: Sequence[ResourceClaim]) -> None:
        lease = await self._lock.acquire_claims(claims, holder)
        try:
            for other, others in self._inside.items():
                both = {c.resource for c in claims if c.mode is ClaimMode.EXCLUSIVE} & {c.resource for c in others}
                assert not both, f"{holder!r} got {both} while {other!r} had it"
            self._inside[holder] = claims
            self.served.append(holder)
            await anyio.lowlevel.checkpoint()
            del self._inside[holder]
        finally:
            with anyio.move_on_after(SECONDS, shield=True):
                await give_back(lease)


@contextmanager
def _order_of(lock: ClaimLock) -> Iterator[_Order]:
    order = _Order(lock)
    yield order
    assert not order._inside
