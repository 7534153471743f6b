"""The claims that a group holds: taken before it starts or one assignment at a time, given back one at a time.

Knows locks as protocols. What goes wrong on giving back is collected, because it must not hide an agent's outcome.
"""

import math
import random
import secrets
from collections.abc import Awaitable, Sequence

import anyio

from ._claim_queue import ClaimQueue, find_overlap
from ._claims import ResourceClaim
from ._endings import fatal_in, order_to_end
from ._errors import ParallelAgentsError, ResourceConflictError
from ._models import AgentAssignment, ClaimPolicy, GroupOptions
from .events import PARALLEL_LOCK_RELEASE_ERROR, GroupEvents, error_text
from .locks._protocol import NEVER_LOST, ClaimLock, Lease, Lost, ResourceLock
from .locks.memory import InMemoryResourceLock

RELEASE_SECONDS = 5.0
"""How long giving back the locks of one assignment may take; then it counts as failed."""

FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0
"""How long to wait before asking a lock of single resources again; twice as long each time, from one to the other."""


def refuse_overlaps(
    group: GroupOptions, assignments: Sequence[AgentAssignment], enclosing: Sequence[AgentAssignment]
) -> None:
    """Refuse claims that overlap what an enclosing assignment holds, or, under ``REJECT``, each other.

    Raises:
        ResourceConflictError: Naming the resource and both agents.
        ParallelAgentsError: If the group could wait without end for what others hold, who wait for what encloses it.
    """
    claiming = [a for a in assignments if a.resource_claims]
    if group.claim_policy is ClaimPolicy.REJECT:
        overlap = find_overlap([(a.task.id, a.resource_claims) for a in claiming])
        if overlap is not None:
            resource, *tasks = overlap
            agents = {a.task_id: a.agent_id for a in claiming}
            raise ResourceConflictError(resource, *(agents[task_id] for task_id in tasks))
    holding = [a for a in enclosing if a.resource_claims]
    if not claiming or not holding:
        return
    queue: ClaimQueue[str] = ClaimQueue()
    for a in holding:
        queue.enter("enclosing", a.resource_claims)
    for a in claiming:
        ticket = queue.enter(a.task_id, a.resource_claims)
        if (found := queue.in_the_way_of(ticket)) is not None:
            holder = next(h for h in holding if h.resource_claims is found[0].claims)
            raise ResourceConflictError(found[1], holder.agent_id, a.agent_id)
        queue.leave(ticket)
    if group.claim_policy is ClaimPolicy.WAIT and group.claim_timeout_seconds is None:
        raise ParallelAgentsError(
            f"Group {group.group_id!r} waits for claims inside agent {holding[0].agent_id!r}, which holds some: two "
            "such agents could wait for each other without end. Set claim_timeout_seconds, or claim all of it outside"
        )


class HeldClaims:
    """What one execution holds.

    Args:
        lock: Where claims are taken.
        group_id: Names the group in the holders.
        events: Where failures to give back are told.
    """

    def __init__(self, lock: ResourceLock, group_id: str, events: GroupEvents) -> None:
        self._lock = lock
        self._claim_lock = lock if isinstance(lock, ClaimLock) else None
        # not a subclass: it may do more in acquire_claims()
        self._quick_lock = lock if type(lock) is InMemoryResourceLock else None
        self._events = events
        self._group_id = group_id
        self._execution = secrets.token_hex(8)
        self._claimed: dict[int, AgentAssignment] = {}
        self._unfinished: list[Awaitable[None]] = []
        self._struck: list[str] = []  # holders of locks that an exception may have left half given back
        self.may_be_lacking = False
        """Whether any assignment may lack what it claims; ``lack()`` tells which."""
        self.leases: dict[int, HeldLease] = {}
        self.errors: list[Exception] = []

    def add(self, position: int, assignment: AgentAssignment) -> None:
        """Note what an assignment claims; nothing is taken yet."""
        if assignment.resource_claims:
            self.may_be_lacking = True
            self._claimed[position] = assignment

    def forget(self, position: int) -> None:
        """Keep nothing of an assignment that has its outcome."""
        self._claimed.pop(position, None)

    def lack(self, position: int) -> bool:
        """Whether an assignment does not hold what it claims: not yet, or not any more."""
        lease = self.leases.get(position)
        if lease is None:
            return position in self._claimed
        return lease.lost is not NEVER_LOST and lease.lost.is_set()

    async def take_all(self) -> None:
        """Take every claim of the group now, or none.

        Raises:
            ResourceConflictError: If somebody outside the group holds one; what was taken is given back.
        """
        try:
            if self._quick_lock is not None:
                self._take_all_at_once(self._quick_lock)
                self.may_be_lacking = False  # such leases are never lost
            else:
                for position in self._claimed:
                    await self.take(position, 0)
        except BaseException:
            await self.give_back_all()  # noqa: ASYNC102 - it is shielded and bounded itself
            raise

    def _take_all_at_once(self, lock: InMemoryResourceLock) -> None:
        leases, is_told = self.leases, self._events.are_heard
        for position, assignment in self._claimed.items():
            holder = self._holder_of(assignment)
            try:
                leases[position] = lock.take_at_once(assignment.resource_claims, holder, is_told)
            except ResourceConflictError as error:
                raise self._told_by_agents(error, assignment) from error
            except BaseException:  # it may have come between what the lock took and what it handed over
                self._struck.append(holder)
                raise

    async def take(self, position: int, timeout_seconds: float | None) -> None:
        """Take the claims of one assignment, or none of them.

        Raises:
            ResourceConflictError: If they are not to be had in time.
        """
        assignment = self._claimed[position]
        claims, holder = assignment.resource_claims, self._holder_of(assignment)
        try:
            if self._claim_lock is not None:
                lease = await self._claim_lock.acquire_claims(claims, holder, timeout_seconds=timeout_seconds)
                self.leases[position] = lease
            else:
                self.leases[position] = plain_lease = PlainLease(self._lock, claims, holder)
                await plain_lease.take(timeout_seconds)
        except ResourceConflictError as error:
            await self._give_back_now(position)  # noqa: ASYNC120 - it is shielded
            raise self._told_by_agents(error, assignment) from error
        except BaseException as error:
            await self._give_back_now(position)  # noqa: ASYNC102 - it is shielded and bounded itself
            if fatal_in(error) or order_to_end(error, anyio.get_cancelled_exc_class()):
                # it may have come between what the lock took and what it handed over
                await self.finish(self._lock.release_all(holder))  # noqa: ASYNC102 - the same
            raise

    def _holder_of(self, assignment: AgentAssignment) -> str:
        return f"{self._group_id}:{assignment.task.id}#{self._execution}"

    def _told_by_agents(self, error: ResourceConflictError, assignment: AgentAssignment) -> ResourceConflictError:
        """Return a conflict of an assignment that names agents instead of holders, where they are of this group."""
        others = (a.agent_id for a in self._claimed.values() if self._holder_of(a) == error.holder)
        is_ours = error.holder.endswith(f"#{self._execution}")
        current = next(others, error.holder) if is_ours else error.holder
        return ResourceConflictError(error.resource, current, assignment.agent_id)

    async def _give_back_now(self, position: int) -> None:
        pending = self.give_back(position)
        if pending is not None:
            await self.finish(pending)

    def give_back(self, position: int) -> Awaitable[None] | None:
        """Give back what one assignment holds; return what is left to wait for, with ``finish()``, if anything."""
        lease = self.leases.get(position)
        if lease is None:
            return None
        try:
            pending = lease.release()
        except Exception as error:  # noqa: BLE001 - whatever a user's lock raises
            if fatal_in(error) is not None:
                self._struck.append(lease.holder)
            self._note(error)
            pending = None
        except BaseException:
            self._struck.append(lease.holder)
            raise
        self.leases.pop(position, None)  # only now: until then give_back_all() finds it
        return pending

    @property
    def are_owed(self) -> bool:
        """Whether ``give_back_all()`` has something to wait for."""
        return bool(self._unfinished or self._struck)

    def give_back_later(self, position: int) -> None:
        """Give back what one assignment holds; what there is to wait for is left to ``give_back_all()``."""
        pending = self.give_back(position)
        if pending is not None:
            self._unfinished.append(pending)

    async def finish(self, pending: Awaitable[object]) -> None:
        """Wait until the locks are given back, for ``RELEASE_SECONDS`` at most. Shielded from cancellation."""
        try:
            with anyio.fail_after(RELEASE_SECONDS, shield=True):
                await pending
        except Exception as error:  # noqa: BLE001 - the agent's outcome stands all the same
            self._note(error)

    async def give_back_all(self) -> None:
        """Give back whatever is still held. Shielded from cancellation, bounded like ``finish()``."""
        while self._struck:
            holder = self._struck.pop()
            self.leases = {position: lease for position, lease in self.leases.items() if lease.holder != holder}
            await self.finish(self._lock.release_all(holder))
        for position in tuple(self.leases):
            self.give_back_later(position)
        while self._unfinished:
            await self.finish(self._unfinished.pop(0))

    def _note(self, error: Exception) -> None:
        self.errors.append(error)
        self._events.emit(PARALLEL_LOCK_RELEASE_ERROR, {"error": error_text(error)})


class PlainLease:
    """The claims of one holder on a lock that knows single resources only; shared claims are taken as exclusive."""

    lost: Lost = NEVER_LOST

    def __init__(self, lock: ResourceLock, claims: Sequence[ResourceClaim], holder: str) -> None:
        self._lock = lock
        self.claims = tuple(claims)
        self._resources = sorted(claim.resource for claim in claims)
        self.holder = holder
        self._attempted: list[str] = []

    async def take(self, timeout_seconds: float | None) -> None:
        """Take all or none; ask again after a while, and then after a longer one, until the time is over."""
        deadline = math.inf if timeout_seconds is None else anyio.current_time() + timeout_seconds
        pause = FIRST_PAUSE_SECONDS
        while (refused := await self._take_now()) is not None:
            current = self._lock.holder_of(refused)
            await self.release()
            now = anyio.current_time()
            if now >= deadline:
                raise ResourceConflictError(refused, current or "another holder", self.holder)
            pause_ends = now + pause * random.uniform(0.5, 1)  # noqa: S311 - so that two who met do not meet again
            await anyio.sleep_until(min(pause_ends, deadline))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _take_now(self) -> str | None:
        """Take what can be taken, in sorted order, so that two who want the same meet at the first of it."""
        for resource in self._resources:
            self._attempted.append(resource)  # before the await: it may be held although the call did not return
            if not await self._lock.acquire(resource, self.holder):
                self._attempted.pop()
                return resource
        return None

    async def release(self) -> None:
        attempted = tuple(self._attempted)
        errors: list[Exception] = []
        for resource in attempted:
            try:
                # each has its share of the time, so that one that hangs does not keep the others
                with anyio.fail_after(RELEASE_SECONDS / len(attempted)):
                    await self._lock.release(resource, self.holder)
            except Exception as error:  # noqa: BLE001 - told later; the other locks must be tried too
                error.add_note(f"while giving back {resource!r}")
                errors.append(error)
            self._attempted.remove(resource)
        if errors:
            raise ExceptionGroup("locks could not be given back", errors)


HeldLease = Lease | PlainLease
