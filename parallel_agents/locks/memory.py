"""InMemoryResourceLock: a registry of who holds what, for the agents of one process.

Each change of state is one synchronous step, which nothing can interrupt half-way: no lock is needed around it, none
is left behind by a cancellation, and giving back never waits. The only thing waited for is an event per waiter, made
in the running loop, so that a lock may be made anywhere and used on one backend after the other. For use by the tasks
of one event loop at a time; knows nothing of other processes.
"""

import time
from collections.abc import Sequence

import anyio
from attrs import define, field, frozen

from .._claim_queue import ClaimQueue, Ticket
from .._claims import ClaimMode, ResourceClaim
from .._errors import ResourceConflictError
from ..events import PARALLEL_LOCK_ACQUIRED, PARALLEL_LOCK_CONFLICT, PARALLEL_LOCK_RELEASED, write_log
from ._protocol import NEVER_LOST, Lost


@frozen(kw_only=True)
class HeldResource:
    """A resource that is held.

    Attributes:
        resource: What.
        mode: How.
        holder: By whom.
        since: From when on, as ``time.monotonic()`` tells it.
    """

    resource: str
    mode: ClaimMode
    holder: str
    since: float


@frozen(kw_only=True)
class WaitingHolder:
    """Somebody who waits for claims.

    Attributes:
        holder: Who.
        resources: For what.
        since: From when on, as ``time.monotonic()`` tells it.
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


@define(eq=False)
class MemoryLease:
    """Claims held in memory; see ``Lease``."""

    claims: tuple[ResourceClaim, ...]
    holder: str
    fencing_token: int
    _lock: "InMemoryResourceLock" = field(repr=False)
    _left: tuple[ResourceClaim, ...] = field(repr=False)
    _ticket: Ticket[str] = field(repr=False)
    _since: float = field(repr=False)
    _is_told: bool = field(repr=False)
    lost: Lost = field(default=NEVER_LOST, init=False, repr=False)

    def release(self) -> None:
        """Give everything back, at once; may be repeated."""
        if self._left:
            self._lock._give_back(self, self._left)


@define(eq=False)
class _Waiter:
    ticket: Ticket[str]
    since: float = field(factory=time.monotonic)
    granted: anyio.Event = field(factory=anyio.Event)
    lease: MemoryLease | None = None


class InMemoryResourceLock:
    """Both a ``ResourceLock`` and a ``ClaimLock``, in memory; a folder's claim covers everything below it."""

    def __init__(self) -> None:
        self._queue: ClaimQueue[str] = ClaimQueue()
        # a holder's one lease, as nearly all have, or several
        self._leases: dict[str, MemoryLease | dict[MemoryLease, None]] = {}
        self._waiting: dict[Ticket[str], _Waiter] = {}
        self._last_token = 0

    def __repr__(self) -> str:
        return f"InMemoryResourceLock(holders={len(self._leases)}, waiting={len(self._waiting)})"

    async def acquire(self, resource: str, holder: str) -> bool:
        """Take a resource alone; not a checkpoint. See ``ResourceLock.acquire()``."""
        claims = (ResourceClaim(resource=resource),)
        _refuse_blank(holder)
        if any(_left_of(lease, resource) for lease in self._leases_of(holder)):
            return True
        ticket = self._queue.enter(holder, claims)
        if ticket.waits_for is not None:
            self._refuse(ticket)
            return False
        self._grant(ticket, is_told=True)
        return True

    async def release(self, resource: str, holder: str) -> None:
        """Give a resource back; not a checkpoint. See ``ResourceLock.release()``."""
        claim = ResourceClaim(resource=resource)
        _refuse_blank(holder)
        found = [(lease, left) for lease in self._leases_of(holder) if (left := _left_of(lease, resource))]
        for lease, left in found:
            self._give_back(lease, left)
        if not found and (current := self._queue.owner_of(claim)) is not None:
            write_log(PARALLEL_LOCK_CONFLICT, level="WARNING", resource=resource, holder=holder, current_holder=current)

    async def release_all(self, holder: str) -> int:
        """Give back all that *holder* has; not a checkpoint. See ``ResourceLock.release_all()``.

        Also what an exception left that struck this lock in the middle of a change, such as a Ctrl-C without a handler.
        """
        _refuse_blank(holder)
        resources = set()
        for lease in self._leases_of(holder):
            resources |= {claim.resource for claim in lease._left}
            if lease._is_told:
                for claim in lease._left:
                    write_log(PARALLEL_LOCK_RELEASED, resource=claim.resource, holder=holder)
            lease._left = ()
        self._leases.pop(holder, None)
        self._queue.forget(holder, except_for=self._waiting)
        for ticket in tuple(self._waiting):
            if self._queue.look_again(ticket):
                self._let_go_on(ticket)
        return len(resources)

    def is_locked(self, resource: str) -> bool:
        """Whether anybody has it, or a folder above it, or something below it."""
        return self.holder_of(resource) is not None

    def holder_of(self, resource: str) -> str | None:
        """Return who has it, or a folder above it, or something below it; one of them, if several share it."""
        return self._queue.owner_of(ResourceClaim(resource=resource))

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
        if timeout_seconds is not None and timeout_seconds <= 0:
            return self.take_at_once(claims, holder, is_told=True)
        ticket = self._queue.enter(holder, claims)
        if ticket.waits_for is None:
            return self._grant(ticket, is_told=True)
        lease = await self._wait(ticket, timeout_seconds)
        if lease is None:
            raise self._conflict(ticket)
        return lease

    def take_at_once(self, claims: tuple[ResourceClaim, ...], holder: str, is_told: bool) -> MemoryLease:
        """Do what ``acquire_claims()`` does with a timeout of 0, each resource being there once.

        Args:
            claims: What to take.
            holder: For whom.
            is_told: Whether the log is told that they are taken, and that they are given back.
        """
        ticket = self._queue.enter(holder, claims)
        if ticket.waits_for is not None:
            raise self._conflict(ticket)
        return self._grant(ticket, is_told)

    async def _wait(self, ticket: Ticket[str], timeout_seconds: float | None) -> MemoryLease | None:
        waiter = _Waiter(ticket)
        try:
            self._waiting[ticket] = waiter
            with anyio.move_on_after(timeout_seconds):
                await waiter.granted.wait()
        except BaseException:
            if waiter.lease is None:
                self._leave(ticket)
            else:  # granted and cancelled in the same instant: nobody would give it back
                waiter.lease.release()
            raise
        finally:
            self._waiting.pop(ticket, None)
        return waiter.lease

    def statistics(self) -> LockStatistics:
        """Return what is held and who waits, now."""
        held = (
            HeldResource(resource=claim.resource, mode=claim.mode, holder=holder, since=lease._since)
            for holder in self._leases
            for lease in self._leases_of(holder)
            for claim in lease._left
        )
        waiting = (
            WaitingHolder(
                holder=waiter.ticket.owner,
                resources=tuple(claim.resource for claim in waiter.ticket.claims),
                since=waiter.since,
            )
            for waiter in self._waiting.values()
        )
        return LockStatistics(held=tuple(held), waiting=tuple(waiting))

    def _refuse(self, ticket: Ticket[str]) -> tuple[str, str]:
        """Take a ticket back that waits no longer; return the resource that was not to be had, and who is before."""
        found = self._queue.in_the_way_of(ticket)
        assert found is not None, "it would have been granted"
        other, resource = found
        write_log(PARALLEL_LOCK_CONFLICT, resource=resource, holder=ticket.owner, current_holder=other.owner)
        self._leave(ticket)
        return resource, other.owner

    def _conflict(self, ticket: Ticket[str]) -> ResourceConflictError:
        resource, current = self._refuse(ticket)
        return ResourceConflictError(resource, current, ticket.owner)

    def _grant(self, ticket: Ticket[str], is_told: bool) -> MemoryLease:
        self._last_token += 1
        holder, claims = ticket.owner, tuple(ticket.claims)
        lease = MemoryLease(claims, holder, self._last_token, self, claims, ticket, time.monotonic(), is_told)
        others = self._leases.setdefault(holder, lease)
        if others is not lease:
            if isinstance(others, MemoryLease):
                others = self._leases[holder] = {others: None}
            others[lease] = None
        if is_told:
            for claim in claims:
                write_log(PARALLEL_LOCK_ACQUIRED, resource=claim.resource, holder=holder)
        return lease

    def _leases_of(self, holder: str) -> tuple[MemoryLease, ...]:
        leases = self._leases.get(holder, ())
        return (leases,) if isinstance(leases, MemoryLease) else tuple(leases)

    def _give_back(self, lease: MemoryLease, claims: tuple[ResourceClaim, ...]) -> None:
        """Give back some claims of a lease, and let those go on who waited for them."""
        if lease._is_told:
            for claim in claims:
                write_log(PARALLEL_LOCK_RELEASED, resource=claim.resource, holder=lease.holder)
        lease._left = () if claims is lease._left else tuple(c for c in lease._left if c not in claims)
        if not lease._left:
            leases = self._leases[lease.holder]
            if isinstance(leases, dict):
                del leases[lease]
            if leases is lease or not leases:
                del self._leases[lease.holder]
        for cleared in self._queue.leave(lease._ticket, claims):
            self._let_go_on(cleared)

    def _leave(self, ticket: Ticket[str]) -> None:
        for cleared in self._queue.leave(ticket):
            self._let_go_on(cleared)

    def _let_go_on(self, cleared: Ticket[str]) -> None:
        waiter = self._waiting.pop(cleared)
        waiter.lease = self._grant(cleared, is_told=True)
        waiter.granted.set()


def _refuse_blank(holder: str) -> None:
    if not holder.strip():
        raise ValueError(f"holder must not be blank, got {holder!r}")


def _left_of(lease: MemoryLease, resource: str) -> tuple[ResourceClaim, ...]:
    """Return what a lease holds of one resource."""
    return tuple(claim for claim in lease._left if claim.resource == resource)
