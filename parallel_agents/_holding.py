"""The claims that a group holds: taken for all assignments before any starts, given back one assignment at a time.

Knows locks as protocols. What goes wrong on giving back is collected, because it must not hide an agent's outcome.
"""

import secrets
from collections.abc import Awaitable, Sequence

import anyio

from ._claim_queue import find_overlap
from ._claims import ResourceClaim
from ._errors import ResourceConflictError
from ._models import AgentAssignment
from .events import PARALLEL_LOCK_RELEASE_ERROR, GroupEvents, error_text
from .locks._protocol import ClaimLock, Lease, ResourceLock

RELEASE_SECONDS = 5.0
"""How long giving back the locks of one assignment may take; then it counts as failed."""


def refuse_overlaps(assignments: Sequence[AgentAssignment], enclosing: Sequence[AgentAssignment]) -> None:
    """Refuse claims that overlap inside a group, or with what an enclosing assignment holds.

    Raises:
        ResourceConflictError: Naming the resource and both agents.
    """
    claims = [(a.agent_id, a.resource_claims) for a in (*enclosing, *assignments) if a.resource_claims]
    overlap = find_overlap(claims)
    if overlap is not None:
        resource, holder, claimant = overlap
        raise ResourceConflictError(resource, holder, claimant)


class HeldClaims:
    """What one execution holds.

    Args:
        lock: Where claims are taken.
        group_id: Names the group in the holders.
        assignments: In the order of their positions.
        events: Where failures to give back are told.
    """

    def __init__(
        self, lock: ResourceLock, group_id: str, assignments: Sequence[AgentAssignment], events: GroupEvents
    ) -> None:
        self._lock = lock
        self._claim_lock = lock if isinstance(lock, ClaimLock) else None
        self._events = events
        self._claimed = {p: a for p, a in enumerate(assignments) if a.resource_claims}
        execution = secrets.token_hex(8)
        self._holders = {p: f"{group_id}:{a.task_id}#{execution}" for p, a in self._claimed.items()}
        self.leases: dict[int, Lease | _PlainLease] = {}
        self.errors: list[Exception] = []

    async def take_all(self) -> None:
        """Take every claim, or none.

        Raises:
            ResourceConflictError: If somebody outside the group holds one; what was taken is given back.
        """
        try:
            for position, assignment in self._claimed.items():
                await self._take(position, assignment)
        except BaseException:
            await self.give_back_all()  # noqa: ASYNC102 - it is shielded and bounded itself
            raise

    async def _take(self, position: int, assignment: AgentAssignment) -> None:
        holder = self._holders[position]
        try:
            if self._claim_lock is not None:
                claims = assignment.resource_claims
                self.leases[position] = await self._claim_lock.acquire_claims(claims, holder, timeout_seconds=0)
            else:
                self.leases[position] = lease = _PlainLease(self._lock, assignment.resource_claims, holder)
                await lease.take()
        except ResourceConflictError as error:
            other = next((p for p, h in self._holders.items() if h == error.holder), None)
            current = error.holder if other is None else self._claimed[other].agent_id
            raise ResourceConflictError(error.resource, current, assignment.agent_id) from error

    def give_back(self, position: int) -> Awaitable[None] | None:
        """Give back what one assignment holds; return what is left to wait for, with ``finish()``, if anything."""
        lease = self.leases.pop(position, None)
        if lease is None:
            return None
        try:
            return lease.release()
        except Exception as error:  # noqa: BLE001 - whatever a user's lock raises
            self._note(error)
            return None

    async def finish(self, pending: Awaitable[None]) -> None:
        """Wait until the locks are given back, for ``RELEASE_SECONDS`` at most. Shielded from cancellation."""
        try:
            with anyio.fail_after(RELEASE_SECONDS, shield=True):
                await pending
        except Exception as error:  # noqa: BLE001 - the agent's outcome stands all the same
            self._note(error)

    async def give_back_all(self) -> None:
        """Give back whatever is still held. Shielded from cancellation, bounded like ``finish()``."""
        for position in tuple(self.leases):
            pending = self.give_back(position)
            if pending is not None:
                await self.finish(pending)

    def _note(self, error: Exception) -> None:
        self.errors.append(error)
        self._events.emit(PARALLEL_LOCK_RELEASE_ERROR, error=error_text(error))


class _PlainLease:
    """The claims of one holder on a lock that knows single resources only; shared claims are taken as exclusive."""

    def __init__(self, lock: ResourceLock, claims: Sequence[ResourceClaim], holder: str) -> None:
        self._lock = lock
        self._resources = sorted(claim.resource for claim in claims)
        self._holder = holder
        self._attempted: list[str] = []

    async def take(self) -> None:
        for resource in self._resources:
            self._attempted.append(resource)  # before the await: it may be held although the call did not return
            if not await self._lock.acquire(resource, self._holder):
                self._attempted.pop()
                current = self._lock.holder_of(resource)
                raise ResourceConflictError(resource, current or "another holder", self._holder)

    async def release(self) -> None:
        errors: list[Exception] = []
        for resource in self._attempted:
            try:
                # each has its share of the time, so that one that hangs does not keep the others
                with anyio.fail_after(RELEASE_SECONDS / len(self._attempted)):
                    await self._lock.release(resource, self._holder)
            except Exception as error:  # noqa: BLE001 - told later; the other locks must be tried too
                error.add_note(f"while giving back {resource!r}")
                errors.append(error)
        if errors:
            raise ExceptionGroup("locks could not be given back", errors)
