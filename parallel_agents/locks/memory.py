"""InMemoryResourceLock: a registry of who holds what, for the agents of one process.

Each change of state is one synchronous step, which nothing can interrupt half-way: no lock is needed around it, none
is left behind by a cancellation, and giving back never waits. The only thing waited for is an event per waiter, made
in the running loop, so that a lock may be made anywhere and used on one backend after the other. For use by the tasks
of one event loop at a time; knows nothing of other processes.
"""

from collections.abc import Sequence
from itertools import count

import anyio
from attrs import define, field, frozen

from .._claims import ClaimIndex, ClaimMode, ResourceClaim
from .._errors import ResourceConflictError
from ..events import PARALLEL_LOCK_ACQUIRED, PARALLEL_LOCK_CONFLICT, PARALLEL_LOCK_RELEASED, write_log


@frozen(kw_only=True)
class HeldResource:
    """A resource that is held.

    Attributes:
        resource: What.
        mode: How.
        holder: By whom.
    """

    resource: str
    mode: ClaimMode
    holder: str


@frozen(kw_only=True)
class WaitingHolder:
    """Somebody who waits for claims.

    Attributes:
        holder: Who.
        resources: For what.
        since: From when on, in the event loop's time.
    """

    holder: str
    resources: tuple[str, ...]
    since: float


@frozen(kw_only=True)
class LockStatistics:
    """What a lock holds at one moment.

    Attributes:
        held: In the order in which it was taken.
        waiting: In the order in which they came.
    """

    held: tuple[HeldResource, ...]
    waiting: tuple[WaitingHolder, ...]


class _NeverLost:
    def is_set(self) -> bool:
        return False

    async def wait(self) -> None:
        await anyio.sleep_forever()


_NEVER_LOST = _NeverLost()


@define(eq=False)
class MemoryLease:
    """Claims held in memory; see ``Lease``."""

    claims: tuple[ResourceClaim, ...]
    holder: str
    fencing_token: int
    _lock: "InMemoryResourceLock" = field(repr=False)
    _left: dict[str, ResourceClaim] = field(repr=False)
    lost: _NeverLost = field(default=_NEVER_LOST, init=False, repr=False)

    def release(self) -> None:
        """Give everything back, at once; may be repeated."""
        self._lock._end(self, tuple(self._left))


@define(eq=False)
class _Waiter:
    claims: tuple[ResourceClaim, ...]
    holder: str
    key: str
    since: float
    granted: anyio.Event = field(factory=anyio.Event)
    lease: MemoryLease | None = None


class InMemoryResourceLock:
    """Both a ``ResourceLock`` and a ``ClaimLock``, in memory; a folder's claim covers everything below it."""

    def __init__(self) -> None:
        self._index = ClaimIndex()
        self._leases: dict[str, dict[MemoryLease, None]] = {}
        self._waiting: dict[_Waiter, None] = {}
        self._wanted = ClaimIndex()
        self._tokens = count(1)

    def __repr__(self) -> str:
        return f"InMemoryResourceLock(holders={len(self._leases)}, waiting={len(self._waiting)})"

    async def acquire(self, resource: str, holder: str) -> bool:
        """Take a resource alone; not a checkpoint. See ``ResourceLock.acquire()``."""
        claim = ResourceClaim(resource=resource)
        _refuse_blank(holder)
        if any(resource in lease._left for lease in self._leases.get(holder, ())):
            return True
        if self._in_the_way_of((claim,), holder, self._index) is not None:
            return False
        self._grant((claim,), holder)
        return True

    async def release(self, resource: str, holder: str) -> None:
        """Give a resource back; not a checkpoint. See ``ResourceLock.release()``."""
        claim = ResourceClaim(resource=resource)
        _refuse_blank(holder)
        leases = [lease for lease in self._leases.get(holder, ()) if resource in lease._left]
        for lease in leases:
            self._end(lease, (resource,))
        if not leases and (current := self._index.in_the_way_of(claim, holder)) is not None:
            write_log(PARALLEL_LOCK_CONFLICT, level="WARNING", resource=resource, holder=holder, current_holder=current)

    async def release_all(self, holder: str) -> int:
        """Give back all that *holder* has; not a checkpoint. See ``ResourceLock.release_all()``."""
        _refuse_blank(holder)
        leases = tuple(self._leases.get(holder, ()))
        resources = {resource for lease in leases for resource in lease._left}
        for lease in leases:
            lease.release()
        return len(resources)

    def is_locked(self, resource: str) -> bool:
        """Whether anybody has it, or a folder above it, or something below it."""
        return self.holder_of(resource) is not None

    def holder_of(self, resource: str) -> str | None:
        """Return who has it, or a folder above it, or something below it; one of them, if several share it."""
        return self._index.in_the_way_of(ResourceClaim(resource=resource), "")

    async def acquire_claims(
        self, claims: Sequence[ResourceClaim], holder: str, *, timeout_seconds: float | None = None
    ) -> MemoryLease:
        """Take all claims or none; a checkpoint only if it has to wait. See ``ClaimLock.acquire_claims()``.

        Nobody is overtaken by a later claim that overlaps theirs, and nobody waits for one that does not.
        """
        claims = tuple(claims)
        _refuse_blank(holder)
        if len({claim.resource for claim in claims}) < len(claims):
            raise ValueError(f"claims must name each resource once, got {claims!r}")
        current = self._in_the_way_of(claims, holder, self._index) or self._in_the_way_of(claims, holder, self._wanted)
        if current is None:
            return self._grant(claims, holder)
        resource, owner = current
        if timeout_seconds is None or timeout_seconds > 0:
            waiter = _Waiter(claims, holder, f"{next(self._tokens)} {holder}", anyio.current_time())
            with anyio.move_on_after(timeout_seconds):
                return await self._wait_as(waiter)
        raise ResourceConflictError(resource, owner, holder)

    async def _wait_as(self, waiter: _Waiter) -> MemoryLease:
        self._enqueue(waiter)
        try:
            await waiter.granted.wait()
        except BaseException:
            if waiter.lease is None:
                self._dequeue(waiter)
                self._grant_waiting()
            else:  # granted and cancelled in the same instant: nobody would give it back
                waiter.lease.release()
            raise
        assert waiter.lease is not None
        return waiter.lease

    def statistics(self) -> LockStatistics:
        """Return what is held and who waits, now."""
        held = (
            HeldResource(resource=claim.resource, mode=claim.mode, holder=holder)
            for holder, leases in self._leases.items()
            for lease in leases
            for claim in lease._left.values()
        )
        waiting = (
            WaitingHolder(holder=w.holder, resources=tuple(c.resource for c in w.claims), since=w.since)
            for w in self._waiting
        )
        return LockStatistics(held=tuple(held), waiting=tuple(waiting))

    def _in_the_way_of(
        self, claims: tuple[ResourceClaim, ...], owner: str, index: ClaimIndex
    ) -> tuple[str, str] | None:
        """Return a resource that is not to be had now, and who has it or waits for it first."""
        for claim in claims:
            if (other := index.in_the_way_of(claim, owner)) is not None:
                current = other if index is self._index else other.partition(" ")[2]
                resource = claim.resource
                write_log(PARALLEL_LOCK_CONFLICT, resource=resource, holder=owner, current_holder=current)
                return resource, current
        return None

    def _grant(self, claims: tuple[ResourceClaim, ...], holder: str) -> MemoryLease:
        lease = MemoryLease(claims, holder, next(self._tokens), self, {claim.resource: claim for claim in claims})
        self._leases.setdefault(holder, {})[lease] = None
        for claim in claims:
            self._index.add(claim, holder)
            write_log(PARALLEL_LOCK_ACQUIRED, resource=claim.resource, holder=holder)
        return lease

    def _end(self, lease: MemoryLease, resources: tuple[str, ...]) -> None:
        """Give back some resources of a lease, and let those go on who waited for them."""
        for resource in resources:
            self._index.remove(lease._left.pop(resource), lease.holder)
            write_log(PARALLEL_LOCK_RELEASED, resource=resource, holder=lease.holder)
        if not lease._left and lease in (leases := self._leases.get(lease.holder, {})):
            del leases[lease]
            if not leases:
                del self._leases[lease.holder]
        if resources and self._waiting:
            self._grant_waiting()

    def _enqueue(self, waiter: _Waiter) -> None:
        self._waiting[waiter] = None
        for claim in waiter.claims:
            self._wanted.add(claim, waiter.key)

    def _dequeue(self, waiter: _Waiter) -> None:
        del self._waiting[waiter]
        for claim in waiter.claims:
            self._wanted.remove(claim, waiter.key)

    def _grant_waiting(self) -> None:
        """Grant what can be granted, in the order of arrival; a claim waits for earlier ones that overlap it."""
        earlier = ClaimIndex()
        for waiter in tuple(self._waiting):
            is_free = not any(
                self._index.in_the_way_of(claim, waiter.holder) or earlier.in_the_way_of(claim, waiter.key)
                for claim in waiter.claims
            )
            if is_free:
                self._dequeue(waiter)
                waiter.lease = self._grant(waiter.claims, waiter.holder)
                waiter.granted.set()
            else:
                for claim in waiter.claims:
                    earlier.add(claim, waiter.key)


def _refuse_blank(holder: str) -> None:
    if not holder.strip():
        raise ValueError(f"holder must not be blank, got {holder!r}")
