"""PostgresResourceLock: claims held across machines, in a PostgreSQL database.

The database decides who is next, in one function for each step; a notification tells those whose turn it is. Knows
tasks and threads through the store.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, LiteralString, Self

import anyio
from attrs import define, evolve, field, frozen

from .._claim_queue import AT_SHARED, ClaimQueue, Ticket, notes
from .._claims import ClaimMode, ResourceClaim
from .._errors import ResourceConflictError
from .._postgres.connections import Connection, PostgresError, text
from .._postgres.keeper import Session
from .._postgres.line import Place, TakenOver
from ..events import PARALLEL_LOCK_ACQUIRED, PARALLEL_LOCK_CONFLICT, PARALLEL_LOCK_RELEASED, write_log
from ..postgres import PostgresStore
from .memory import HeldResource, LockStatistics, WaitingHolder

__all__ = ["PostgresLease", "PostgresResourceLock", "PostgresStore"]

RELEASE_SECONDS = 2.0
"""How long giving back waits for its turn and for the server; after that it is done as soon as it can be."""


@define(eq=False)
class PostgresLease:
    """Claims held in a database; see ``Lease``.

    Attributes:
        database: Tells which one, to a journal that may be in the same.
        ticket: Stands for it there.
    """

    claims: tuple[ResourceClaim, ...]
    holder: str
    fencing_token: int
    database: str = field(repr=False)
    ticket: int = field(repr=False)
    _name: str = field(repr=False)
    _session: Session = field(repr=False)
    _store: PostgresStore = field(repr=False)
    lost: TakenOver = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.lost = TakenOver(self._store, self._session, self._name)

    async def release(self) -> None:
        """Give everything back; may be repeated. If that takes long, or the server is away, it is done later."""
        self.lost.forget()
        await self._store.run_or_soon(lambda c: _leave(c, self._name), patience_seconds=RELEASE_SECONDS)
        for claim in self.claims:
            write_log(PARALLEL_LOCK_RELEASED, resource=claim.resource, holder=self.holder)


@frozen
class _Answer:
    """What the database says to somebody who enters: a token, or what is in the way, and whose it is."""

    session: Session
    ticket: int
    token: int | None
    claim: int | None
    before: str | None


class PostgresResourceLock:
    """Both a ``ResourceLock`` and a ``ClaimLock`` for all machines that use the same database.

    What a worker holds is free when it gives it back, and when its session was not renewed for the length of a lease:
    the process was killed, its machine is gone, or it stood still. If it lives, its agents are cancelled, some time
    *before* others can have what it held; a ``PostgresJournal`` in the same database refuses what they finish; and a
    store that is given ``current_run().lease.fencing_token`` can refuse what they write.

    Taking claims costs two transactions that only those wait for who want the same, however much is held.

    Args:
        store: A database, or its address.
    """

    def __init__(self, store: PostgresStore | str) -> None:
        self._store = PostgresStore(store) if isinstance(store, str) else store
        self._one_by_one = _OneByOne()

    def __repr__(self) -> str:
        return f"PostgresResourceLock({self._store.name!r})"

    def open(self) -> None:
        """Open the database, which the first use does otherwise; see ``PostgresStore.open()``."""
        self._store.open()

    def close(self) -> None:
        """Close the database, also for others that share it; see ``PostgresStore.close()``."""
        self._store.close()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def acquire(self, resource: str, holder: str) -> bool:
        """Take a resource alone; a checkpoint. See ``ResourceLock.acquire()``."""
        claims = _checked((ResourceClaim(resource=resource),), holder)
        if await self._store.run(lambda c, _: _value(c, "SELECT holds(%s, %s)", text(resource), text(holder))):
            return True
        try:
            lease = await self.acquire_claims(claims, holder, timeout_seconds=0)
        except ResourceConflictError:
            return False
        lease.lost.forget()
        return True

    async def release(self, resource: str, holder: str) -> None:
        """Give a resource back; a checkpoint. See ``ResourceLock.release()``."""
        (claim,) = _checked((ResourceClaim(resource=resource),), holder)
        if await self._store.run(lambda c, _: _value(c, "CALL release(%s, %s, NULL)", text(resource), text(holder))):
            write_log(PARALLEL_LOCK_RELEASED, resource=resource, holder=holder)
            return
        current = await self._store.run(lambda c, _: _holder_of(c, claim))
        if current is not None:
            write_log(PARALLEL_LOCK_CONFLICT, level="WARNING", resource=resource, holder=holder, current_holder=current)

    async def release_all(self, holder: str) -> int:
        """Give back all that *holder* has, on whatever machine it is; a checkpoint."""
        _checked((), holder)
        count: int = await self._store.run(lambda c, _: _value(c, "CALL release_all(%s, NULL)", text(holder)))
        return count

    def is_locked(self, resource: str) -> bool:
        """Whether anybody has it, or a folder above it, or something below it. Blocks for one call to the server."""
        return self.holder_of(resource) is not None

    def holder_of(self, resource: str) -> str | None:
        """Return who has it; one of them, if several share it. Blocks for one call to the server."""
        claim = ResourceClaim(resource=resource)
        return self._store.run_now(lambda c, _: _holder_of(c, claim))

    async def acquire_claims(
        self, claims: Sequence[ResourceClaim], holder: str, *, timeout_seconds: float | None = None
    ) -> PostgresLease:
        """Take all claims or none; a checkpoint. See ``ClaimLock.acquire_claims()``.

        First come, first served, whatever machine it comes from. One that waits while the session of its worker is lost
        goes to the end of the line.

        Raises:
            ResourceConflictError: If they are not to be had in time.
            PostgresError: If the database cannot be used.
        """
        claims = _checked(tuple(claims), holder)
        lease: PostgresLease | None = None
        before: _Answer | None = None
        waits = timeout_seconds is None or timeout_seconds > 0
        await self._store.open_in_thread()
        with anyio.move_on_after(timeout_seconds if waits else None):
            while lease is None:
                entry = _Entry(self._store, claims, holder, waits=waits)
                async with entry.standing():
                    async with self._one_by_one.turn(claims):
                        answer = await entry.enter()
                    if answer.token is None:
                        before = answer
                        if not waits:
                            break
                        answer = evolve(answer, token=int(token) if (token := await entry.turn()) else None)
                    if answer.token is not None:
                        lease = entry.lease(answer)
        if lease is None:
            raise self._refused(claims, holder, before)
        for claim in claims:
            write_log(PARALLEL_LOCK_ACQUIRED, resource=claim.resource, holder=holder)
        return lease

    def _refused(
        self, claims: tuple[ResourceClaim, ...], holder: str, answer: _Answer | None
    ) -> ResourceConflictError | PostgresError:
        if answer is None:
            return PostgresError(self._store.name, "has not answered in the time that there was for the claims")
        resource = claims[answer.claim or 0].resource
        write_log(PARALLEL_LOCK_CONFLICT, resource=resource, holder=holder, current_holder=answer.before)
        return ResourceConflictError(resource, answer.before or "somebody who has left since", holder)

    def statistics(self) -> LockStatistics:
        """Return what all workers hold and who waits, now; times as ``time.time()`` tells them. Blocks shortly."""
        rows = self._store.run_now(
            lambda c, _: c.execute(
                "SELECT holder, token IS NOT NULL, extract(epoch FROM since)::float8,"
                " array_agg(resource ORDER BY claim), array_agg(how ORDER BY claim)"
                " FROM tickets JOIN notes ON ticket = number AND how < 2 GROUP BY number ORDER BY number"
            ).fetchall()
        )
        return LockStatistics(
            held=tuple(
                HeldResource(
                    resource=resource,
                    mode=ClaimMode.SHARED if how == AT_SHARED else ClaimMode.EXCLUSIVE,
                    holder=holder,
                    since=since,
                )
                for holder, is_held, since, resources, hows in rows
                if is_held
                for resource, how in zip(resources, hows, strict=True)
            ),
            waiting=tuple(
                WaitingHolder(holder=holder, resources=tuple(resources), since=since)
                for holder, is_held, since, resources, _ in rows
                if not is_held
            ),
        )


class _OneByOne:
    """Lets those that are in each other's way ask in the order in which they came; threads may overtake each other."""

    def __init__(self) -> None:
        self._queue: ClaimQueue[object] = ClaimQueue()
        self._waiting: dict[Ticket[object], anyio.Event] = {}

    @asynccontextmanager
    async def turn(self, claims: tuple[ResourceClaim, ...]) -> AsyncIterator[None]:
        ticket = self._queue.enter(object(), claims)
        try:
            if ticket.waits_for is not None:
                event = self._waiting[ticket] = anyio.Event()
                await event.wait()
            yield
        finally:
            self._waiting.pop(ticket, None)
            for cleared in self._queue.leave(ticket):
                self._waiting[cleared].set()


class _Entry(Place[_Answer]):
    """A place in the line for claims."""

    def __init__(self, store: PostgresStore, claims: tuple[ResourceClaim, ...], holder: str, *, waits: bool) -> None:
        super().__init__(store)
        self._claims = claims
        self._holder = holder
        self._waits = waits

    def ask(self, connection: Connection, session: Session) -> _Answer:
        answer, some_expired = self._enter(connection, session)
        if some_expired:  # perhaps what is in the way, and then no notification comes until somebody looks
            connection.execute("CALL tend()")
            if not self._waits:
                answer, _ = self._enter(connection, session)
        return answer

    def _enter(self, connection: Connection, session: Session) -> tuple[_Answer, bool | None]:
        noted = [(at, text(name), how) for at, claim in enumerate(self._claims) for name, how in notes(claim)]
        at, names, hows = ([note[column] for note in noted] for column in range(3))
        row = connection.execute(
            "SELECT ticket, granted, claim, before, some_expired"
            " FROM enter(%s, %s, %s, %s, %s::integer[], %s::text[], %s::smallint[])",
            (self.name, session.id, text(self._holder), self._waits, at, names, hows),
        ).fetchone()
        assert row is not None
        *answer, some_expired = row
        return _Answer(session, *answer), some_expired

    def leave(self, connection: Connection) -> None:
        _leave(connection, self.name)

    def lease(self, answer: _Answer) -> PostgresLease:
        """Return what was granted."""
        assert answer.token is not None
        return PostgresLease(
            self._claims,
            self._holder,
            answer.token,
            self._opened.database,
            answer.ticket,
            self.name,
            answer.session,
            self._store,
        )


def _leave(connection: Connection, name: str) -> None:
    connection.execute("CALL leave(%s)", (name,))


def _value(connection: Connection, query: LiteralString, *arguments: object) -> Any:
    row = connection.execute(query, arguments).fetchone()
    assert row is not None
    return row[0]


def _holder_of(connection: Connection, claim: ResourceClaim) -> str | None:
    noted = [(text(resource), how) for resource, how in notes(claim)]
    resources, hows = (list(column) for column in zip(*noted, strict=True))
    row = connection.execute("SELECT holder_of(%s::text[], %s::smallint[])", (resources, hows)).fetchone()
    return None if row is None else row[0]


def _checked(claims: tuple[ResourceClaim, ...], holder: str) -> tuple[ResourceClaim, ...]:
    if not holder.strip():
        raise ValueError(f"holder must not be blank, got {holder!r}")
    if len({claim.resource for claim in claims}) < len(claims):
        raise ValueError(f"claims must name each resource once, got {claims!r}")
    return claims
