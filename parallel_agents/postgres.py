"""PostgresStore: one PostgreSQL database for the locks and the journals of many machines.

Opens it, and carries calls into threads, because psycopg's asynchronous side does not run on trio. Knows no locks and
no journals; what stands in the database is in ``_postgres``.
"""

import math
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Final, Self, TypeAlias, TypeVar

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar

from ._postgres import schema
from ._postgres.bell import Bell
from ._postgres.connections import FORBIDDEN, Connection, Connections, OutageError, PostgresError, SessionLostError
from ._postgres.keeper import Keeper, Session

__all__ = ["PostgresError", "PostgresStore"]

T = TypeVar("T")
Call: TypeAlias = Callable[[Connection, Session], T]
"""One call to the server, for the session that this worker has."""

FIRST_PAUSE_SECONDS: Final = 0.05
LONGEST_PAUSE_SECONDS: Final = 1.0
"""How long to wait before asking a server again that is away; twice as long each time, from one to the other."""

PATIENT_CALLS: Final = 100
"""So many tasks at once wait for what could be done later as well; more would wait for too long."""


class PostgresStore:
    """A database for ``PostgresResourceLock`` and ``PostgresJournal``, which may share one of these.

    While it is open it is one worker for all others: a session that a thread renews, also while the event loop is busy.
    If that fails until the lease is over, others take over all that was held through it. Each call to a server that is
    away is repeated for the length of a lease.

    The first that opens it makes the tables, in a schema called ``parallel_agents``. Serves one event loop at a time;
    may be made anywhere, and used on one after the other.

    Args:
        url: As libpq understands it, ``postgresql://user@host:5432/database``. A password had better be in the
            environment (``PGPASSWORD``) or in a file (``~/.pgpass``).
        lease_seconds: How long a worker that has stopped without a word keeps what it has. Should be much longer than
            the event loop, a pause of the machine, or a failover of the server may ever take.
        connections: How many calls run at once; two more connections come and go.

    Raises:
        ValueError: If the address cannot be understood, or a number is out of range.
    """

    def __init__(self, url: str, *, lease_seconds: float = 30.0, connections: int = 8) -> None:
        if not (math.isfinite(lease_seconds) and lease_seconds > 0):
            raise ValueError(f"lease_seconds must be above 0, got {lease_seconds!r}")
        if connections < 1:
            raise ValueError(f"connections must be at least 1, got {connections!r}")
        self._connections = Connections(url)
        self._lease_seconds = lease_seconds
        self._limit = connections
        self._limiter: RunVar[anyio.CapacityLimiter] = RunVar("parallel_agents_postgres")
        self._guard = threading.RLock()
        self._opened: Opened | None = None
        self._patient_calls = 0

    def __repr__(self) -> str:
        return f"PostgresStore({self.name!r})"

    @property
    def name(self) -> str:
        """The address, without a password."""
        return self._connections.database

    @property
    def lease_seconds(self) -> float:
        """How long a worker that has stopped without a word keeps what it has."""
        return self._lease_seconds

    def open(self) -> None:
        """Open the database, and make the tables if they are missing or old. Blocks for some milliseconds.

        Raises:
            PostgresError: If the server cannot be reached or lets nobody in; if the tables are of a newer version, or
                cannot be made by this user.
        """
        with self._guard:
            if self._opened is not None:
                return
            try:
                self._opened = self._connections.run(self._prepared)
                self._opened.keeper.session()
            except BaseException:
                self.close()
                raise

    async def open_in_thread(self) -> None:
        """Open it, unless it is open already."""
        if self._opened is None:
            await anyio.to_thread.run_sync(self.open, limiter=self._threads())

    def close(self) -> None:
        """Give back all that was taken through this object; it may be opened again. Blocks for some milliseconds."""
        with self._guard:
            opened, self._opened = self._opened, None
            if opened is not None:
                opened.keeper.close()
                opened.bell.close()
            self._connections.close()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _prepared(self, connection: Connection) -> "Opened":
        version = schema.version_of(connection)
        if version > schema.VERSION:
            raise PostgresError(
                self.name,
                f"has tables of version {version}, this library knows up to {schema.VERSION}: use a newer one",
            )
        if version < schema.VERSION:
            try:
                schema.migrate(connection)
            except FORBIDDEN as error:
                raise PostgresError(
                    self.name,
                    "has no tables for this version, and this user may not make them: "
                    "let the owner of the database open it once",
                ) from error
        row = connection.execute("SELECT database FROM meta").fetchone()
        assert row is not None
        return Opened(row[0], self._connections, self._lease_seconds)

    def run_now(self, call: Call[T]) -> T:
        """Make a call; blocks, and does not try again."""
        session = self.opened.keeper.session()
        try:
            return self._connections.run(lambda connection: call(connection, session))
        except SessionLostError:
            session.give_up()
            raise

    async def run(self, call: Call[T], *, patience_seconds: float | None = None) -> T:
        """Make a call in a thread; again if the server is away, or with another session if the last one was lost.

        It must bear that. Cancelled, it waits for the call that is under way.

        Args:
            call: What to do.
            patience_seconds: How long to try; a lease unless given.

        Raises:
            PostgresError: If the server does not come back in time, or refuses it.
        """
        await self.open_in_thread()  # what is wrong from the start does not pass
        patience = self._lease_seconds if patience_seconds is None else patience_seconds
        gives_up, pause = anyio.current_time() + patience, FIRST_PAUSE_SECONDS
        while True:
            try:
                return await anyio.to_thread.run_sync(self.run_now, call, limiter=self._threads())
            except (OutageError, SessionLostError):
                if anyio.current_time() + pause > gives_up:
                    raise
            await anyio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def run_or_soon(self, work: Callable[[Connection], object], *, patience_seconds: float) -> None:
        """Have something done in a thread; if that takes longer, as soon as it can be, without waiting for it.

        It must bear being done twice. Shielded from cancellation.
        """
        is_done = False
        self._patient_calls += 1
        try:
            if self._patient_calls <= PATIENT_CALLS:
                with anyio.move_on_after(patience_seconds, shield=True), suppress(PostgresError):
                    await self.run(lambda connection, _: work(connection), patience_seconds=patience_seconds)
                    is_done = True
        finally:
            self._patient_calls -= 1
            if not is_done:
                self.soon(work)

    def soon(self, work: Callable[[Connection], object]) -> None:
        """Have something done when the server is there, if this is open; never waits, and never fails."""
        if self._opened is not None:
            self._opened.keeper.soon(work)

    def _threads(self) -> anyio.CapacityLimiter:
        try:
            return self._limiter.get()
        except LookupError:
            limiter = anyio.CapacityLimiter(self._limit)
            self._limiter.set(limiter)
            return limiter

    @property
    def opened(self) -> "Opened":
        """What is there while it is open."""
        self.open()
        assert self._opened is not None
        return self._opened


class Opened:
    """What an open store has.

    Attributes:
        database: The same for all that have opened the same database.
        bell: Wakes tasks.
        keeper: Keeps the session.
    """

    def __init__(self, database: str, connections: Connections, lease_seconds: float) -> None:
        self.database = database
        self.bell = Bell()
        self.keeper = Keeper(connections, self.bell, lease_seconds)
