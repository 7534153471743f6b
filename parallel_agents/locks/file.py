"""FileResourceLock: claims held across the processes of one machine, with no server.

Waiting is polling: each process looks into the file again after a while. Knows tasks and threads; what is in the file,
and who is alive, is the business of the store.
"""

import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread
from attrs import define, field

from .._claims import ResourceClaim
from .._errors import ResourceConflictError
from ..events import PARALLEL_LOCK_ACQUIRED, PARALLEL_LOCK_CONFLICT, PARALLEL_LOCK_RELEASED, write_log
from ._file_store import FileStore, Refusal, StoredTicket
from .memory import HeldResource, LockStatistics, WaitingHolder

T = TypeVar("T")

FIRST_PAUSE_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 0.25
"""How long to wait before looking again; twice as long each time, from one to the other."""

LOST_CHECK_SECONDS = 1.0
"""How often a lease is checked for having been taken away."""

GIVE_UP_SECONDS = 5.0
"""How long a cancelled wait may take to leave the line."""


@define(eq=False)
class FileLease:
    """Claims held in a file; see ``Lease``."""

    claims: tuple[ResourceClaim, ...]
    holder: str
    fencing_token: int
    _name: str = field(repr=False)
    _lock: "FileResourceLock" = field(repr=False)
    lost: "TakenAway" = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.lost = TakenAway(self._lock, self._name)

    async def release(self) -> None:
        """Give everything back; may be repeated. Not to be cancelled half-way: it is one short transaction."""
        self.lost.is_released = True
        await self._lock._call(self._lock._store().leave, self._name)
        for claim in self.claims:
            write_log(PARALLEL_LOCK_RELEASED, resource=claim.resource, holder=self.holder)


@define(eq=False)
class TakenAway:
    """Tells that somebody took a lease away, by ``release_all()`` with its holder's name; see ``Lost``."""

    _lock: "FileResourceLock" = field(repr=False)
    _name: str
    is_released: bool = field(default=False, init=False)
    _is_set: bool = field(default=False, init=False)

    def is_set(self) -> bool:
        """Whether it was, as far as is known: the file is looked at by ``wait()``."""
        return self._is_set

    async def wait(self) -> None:
        """Look every ``LOST_CHECK_SECONDS``, until it is."""
        while not self._is_set:
            is_there = await self._lock._call(self._lock._store().has, self._name)
            self._is_set = not is_there and not self.is_released
            if not self._is_set:
                await anyio.sleep(LOST_CHECK_SECONDS)


class FileResourceLock:
    """Both a ``ResourceLock`` and a ``ClaimLock`` for all processes that are given the same folder.

    What a process held is free as soon as it has ended, however it did. A process that merely stands still keeps what
    it has. ``release_all()`` takes it away by the name of its holder, from any process; the holder finds that out
    within a second of going on, and a store that checks fencing tokens refuses what it writes until then.

    Taking claims costs a transaction and the number of all claims held; for hundreds of agents, not for thousands.
    The folder must be on a local disk. May be made anywhere, and used on one event loop after the other.

    Args:
        folder: Made if it is missing; nothing else should be in it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder).absolute()
        self._opened: FileStore | None = None

    def __repr__(self) -> str:
        return f"FileResourceLock({str(self._folder)!r})"

    async def acquire(self, resource: str, holder: str) -> bool:
        """Take a resource alone; a checkpoint. See ``ResourceLock.acquire()``."""
        claims = _checked((ResourceClaim(resource=resource),), holder)
        if await self._call(self._store().holds, resource, holder):
            return True
        try:
            await self.acquire_claims(claims, holder, timeout_seconds=0)
        except ResourceConflictError:
            return False
        return True

    async def release(self, resource: str, holder: str) -> None:
        """Give a resource back; a checkpoint. See ``ResourceLock.release()``."""
        _checked((ResourceClaim(resource=resource),), holder)
        current = await self._call(self._store().release, resource, holder)
        if current is None:
            write_log(PARALLEL_LOCK_RELEASED, resource=resource, holder=holder)
        else:
            write_log(PARALLEL_LOCK_CONFLICT, level="WARNING", resource=resource, holder=holder, current_holder=current)

    async def release_all(self, holder: str) -> int:
        """Give back all that *holder* has, in whatever process it is; a checkpoint."""
        _checked((), holder)
        return await self._call(self._store().release_all, holder)

    def is_locked(self, resource: str) -> bool:
        """Whether anybody has it, or a folder above it, or something below it. Blocks for one short transaction."""
        return self.holder_of(resource) is not None

    def holder_of(self, resource: str) -> str | None:
        """Return who has it; one of them, if several share it. Blocks for one short transaction."""
        return self._store().holder_of(ResourceClaim(resource=resource).resource)

    async def acquire_claims(
        self, claims: Sequence[ResourceClaim], holder: str, *, timeout_seconds: float | None = None
    ) -> FileLease:
        """Take all claims or none; a checkpoint. See ``ClaimLock.acquire_claims()``.

        First come, first served, whatever process it comes from.
        """
        claims = _checked(tuple(claims), holder)
        waits = timeout_seconds is None or timeout_seconds > 0
        name = f"{self._store().session}:{secrets.token_hex(8)}"
        try:
            found = await self._call(lambda: self._store().enter(name, holder, claims, waits=waits))
            if isinstance(found, Refusal) and waits:
                found = await self._wait(name, found, timeout_seconds)
        except BaseException:
            with anyio.move_on_after(GIVE_UP_SECONDS, shield=True):
                await self._call(lambda: self._store().leave(name, is_entering=True))
            raise
        if isinstance(found, Refusal):
            write_log(PARALLEL_LOCK_CONFLICT, resource=found.resource, holder=holder, current_holder=found.holder)
            raise ResourceConflictError(found.resource, found.holder, holder)
        for claim in claims:
            write_log(PARALLEL_LOCK_ACQUIRED, resource=claim.resource, holder=holder)
        assert found.token is not None
        return FileLease(claims, holder, found.token, name, self)

    async def _wait(self, name: str, found: Refusal, timeout_seconds: float | None) -> StoredTicket | Refusal:
        """Look again and again until a ticket is granted; take it back when its time is over."""
        pause = FIRST_PAUSE_SECONDS
        looked: StoredTicket | Refusal = found
        with anyio.move_on_after(timeout_seconds):
            while isinstance(looked, Refusal):
                await anyio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                looked = await self._call(self._store().look, name)
        if isinstance(looked, Refusal):
            with anyio.CancelScope(shield=True):  # one short transaction
                await self._call(self._store().leave, name)
        return looked

    def statistics(self) -> LockStatistics:
        """Return what all processes hold and who waits, now; times as ``time.time()`` tells them. Blocks shortly."""
        tickets = self._store().tickets()
        return LockStatistics(
            held=tuple(
                HeldResource(resource=claim.resource, mode=claim.mode, holder=ticket.holder, since=ticket.since)
                for ticket in tickets
                if ticket.token is not None
                for claim in ticket.claims
            ),
            waiting=tuple(
                WaitingHolder(
                    holder=ticket.holder, resources=tuple(c.resource for c in ticket.claims), since=ticket.since
                )
                for ticket in tickets
                if ticket.token is None
            ),
        )

    def open(self) -> None:
        """Make the folder and the file in it, which the first use does otherwise; may be repeated. Blocks shortly.

        Raises:
            OSError: If the folder cannot be made or written to.
            sqlite3.Error: If the file in it is no database, or cannot be written.
        """
        self._store()

    def close(self) -> None:
        """Give back all that was taken through this object; it opens itself again when it is used again."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _store(self) -> FileStore:
        if self._opened is None:
            self._opened = FileStore(self._folder)
        return self._opened

    async def _call(self, function: Callable[..., T], *arguments: object) -> T:
        """Run one transaction in a thread, to its end: a cancellation is seen before or after it."""
        return await anyio.to_thread.run_sync(function, *arguments)


def _checked(claims: tuple[ResourceClaim, ...], holder: str) -> tuple[ResourceClaim, ...]:
    if not holder.strip():
        raise ValueError(f"holder must not be blank, got {holder!r}")
    if len({claim.resource for claim in claims}) < len(claims):
        raise ValueError(f"claims must name each resource once, got {claims!r}")
    return claims
