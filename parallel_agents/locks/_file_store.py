"""The file behind ``FileResourceLock``: tickets of all processes in one SQLite database, and who of them is alive.

A process is alive as long as it holds the lock of its session's file, which the operating system takes from it however
it ends. What a dead one left is removed by whoever looks next. Synchronous; knows no event loop.
"""

import contextlib
import os
import secrets
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from attrs import frozen

from .._claim_queue import ClaimQueue, Ticket
from .._claims import ClaimMode, ResourceClaim
from .._errors import EngineUnavailableError

if sys.platform != "win32":
    import fcntl

BUSY_SECONDS = 30.0
"""How long one change waits for those of other processes; each takes milliseconds."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, pid INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS tickets (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    session TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    holder TEXT NOT NULL,
    token INTEGER,
    since REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS claims (
    ticket INTEGER NOT NULL REFERENCES tickets (number) ON DELETE CASCADE,
    resource TEXT NOT NULL,
    mode TEXT NOT NULL,
    within TEXT
);
CREATE INDEX IF NOT EXISTS claims_by_ticket ON claims (ticket);
CREATE TABLE IF NOT EXISTS tokens (last INTEGER NOT NULL);
INSERT INTO tokens SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM tokens);
"""


@frozen
class StoredTicket:
    """A ticket as it stands in the file; its token is None until it is granted."""

    number: int
    name: str
    holder: str
    token: int | None
    since: float
    claims: tuple[ResourceClaim, ...]


@frozen
class Refusal:
    """What is not to be had now, and who is before."""

    resource: str
    holder: str


class FileStore:
    """Tickets in a folder that all processes use. Each method is one transaction; may be called from any thread.

    Args:
        folder: Made if it is missing, for this user alone.
    """

    def __init__(self, folder: Path) -> None:
        if sys.platform == "win32":
            raise EngineUnavailableError("FileResourceLock needs the file locks of a POSIX system")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._guard = threading.Lock()
        self._abandoned: set[str] = set()
        self._database = sqlite3.connect(
            folder / "locks.sqlite3", timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        self.session = secrets.token_hex(8)
        # The file is locked before anybody can know of it, and stays open as long as this object.
        self._session_file = os.open(self._path_of(self.session), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        fcntl.flock(self._session_file, fcntl.LOCK_EX)
        with _alone(folder / "opening"):  # SQLite does not wait for others where a file gets its journal mode
            # Locks need not outlive a power failure, since no holder does; only the file must stay whole.
            for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON"):
                self._database.execute(f"PRAGMA {pragma}")
            with self._changing() as database:
                for statement in _SCHEMA.split(";"):
                    database.execute(statement)
                database.execute("INSERT INTO sessions VALUES (?, ?)", (self.session, os.getpid()))

    def close(self) -> None:
        """Give back all that was taken through this object, and leave no file of its own behind."""
        with self._changing() as database:
            database.execute("DELETE FROM sessions WHERE id = ?", (self.session,))
        self._database.close()
        self._path_of(self.session).unlink()
        os.close(self._session_file)

    def enter(self, name: str, holder: str, claims: Sequence[ResourceClaim], *, waits: bool) -> StoredTicket | Refusal:
        """Put a ticket in line; grant it if it may be, and take it back if it may not and does not wait."""
        with self._changing() as database:
            if name in self._abandoned:
                self._abandoned.remove(name)
                return Refusal(claims[0].resource, holder)
            number = database.execute(
                "INSERT INTO tickets (name, session, holder, since) VALUES (?, ?, ?, ?)",
                (name, self.session, holder, time.time()),
            ).lastrowid
            rows = [(number, claim.resource, claim.mode.value, claim.within) for claim in claims]
            database.executemany("INSERT INTO claims VALUES (?, ?, ?, ?)", rows)
            found = self._granted(database, name)
            if isinstance(found, Refusal) and not waits:
                database.execute("DELETE FROM tickets WHERE name = ?", (name,))
            return found

    def look(self, name: str) -> StoredTicket | Refusal:
        """Grant a ticket that is in line, if it may be by now."""
        with self._changing() as database:
            return self._granted(database, name)

    def leave(self, name: str, *, is_entering: bool = False) -> None:
        """Take a ticket back, also one whose ``enter()`` has not got through yet in its thread; may be repeated."""
        with self._changing() as database:
            gone = database.execute("DELETE FROM tickets WHERE name = ?", (name,)).rowcount
            if is_entering and not gone:
                self._abandoned.add(name)

    def has(self, name: str) -> bool:
        """Whether a ticket is still there: nobody took it away."""
        with self._guard:
            return bool(self._database.execute("SELECT 1 FROM tickets WHERE name = ?", (name,)).fetchone())

    def release(self, resource: str, holder: str) -> str | None:
        """Take one resource from a holder; return who has it instead, if another has."""
        with self._changing() as database:
            held = "SELECT number FROM tickets WHERE holder = ? AND token IS NOT NULL"
            gone = database.execute(
                f"DELETE FROM claims WHERE resource = ? AND ticket IN ({held})",  # noqa: S608 - constant text
                (resource, holder),
            ).rowcount
            database.execute("DELETE FROM tickets WHERE number NOT IN (SELECT ticket FROM claims)")
            return None if gone else self._holder_of(database, resource)

    def release_all(self, holder: str) -> int:
        """Take all from a holder, whatever process it is in; return how many resources that were."""
        with self._changing() as database:
            count: int = database.execute(
                "SELECT COUNT(DISTINCT resource) FROM claims JOIN tickets ON number = ticket "
                "WHERE holder = ? AND token IS NOT NULL",
                (holder,),
            ).fetchone()[0]
            database.execute("DELETE FROM tickets WHERE holder = ? AND token IS NOT NULL", (holder,))
            return count

    def holder_of(self, resource: str) -> str | None:
        """Return who has a resource, or a folder above it, or something below it."""
        with self._changing() as database:
            return self._holder_of(database, resource)

    def holds(self, resource: str, holder: str) -> bool:
        """Whether this very holder has this very resource."""
        with self._guard:
            query = (
                "SELECT 1 FROM claims JOIN tickets ON number = ticket WHERE resource = ? AND holder = ? AND token > 0"
            )
            return bool(self._database.execute(query, (resource, holder)).fetchone())

    def tickets(self) -> list[StoredTicket]:
        """Return all tickets of living processes, in order of arrival."""
        with self._changing() as database:
            return _tickets(database)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """Give the database for one transaction, without what the dead have left; alone among threads and processes."""
        with self._guard:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                self._bury_the_dead()
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def _bury_the_dead(self) -> None:
        if not self._database.execute("SELECT 1 FROM sqlite_master WHERE name = 'tokens'").fetchone():
            return
        others = self._database.execute("SELECT id FROM sessions WHERE id != ?", (self.session,)).fetchall()
        for (session,) in others:
            if not self._is_alive(session):
                self._database.execute("DELETE FROM sessions WHERE id = ?", (session,))
                self._path_of(session).unlink(missing_ok=True)

    def _is_alive(self, session: str) -> bool:
        try:
            file = os.open(self._path_of(session), os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
        return False

    def _path_of(self, session: str) -> Path:
        return self._folder / f"session-{session}"

    def _granted(self, database: sqlite3.Connection, name: str) -> StoredTicket | Refusal:
        """Grant a ticket if none before it is in its way; otherwise say what is."""
        queue: ClaimQueue[str] = ClaimQueue()
        for stored in _tickets(database):
            ticket = queue.enter(stored.holder, stored.claims)
            if stored.name == name:
                return self._granted_or_refused(database, queue, ticket, stored)
        raise KeyError(name)

    def _granted_or_refused(
        self, database: sqlite3.Connection, queue: ClaimQueue[str], ticket: Ticket[str], stored: StoredTicket
    ) -> StoredTicket | Refusal:
        if (found := queue.in_the_way_of(ticket)) is not None:
            return Refusal(found[1], found[0].owner)
        # Above the clock, so that it grows even if the last ones were lost with the power.
        last: int = database.execute("SELECT last FROM tokens").fetchone()[0]
        token = max(last + 1, time.time_ns() // 1000)
        database.execute("UPDATE tokens SET last = ?", (token,))
        database.execute("UPDATE tickets SET token = ?, since = ? WHERE name = ?", (token, time.time(), stored.name))
        return StoredTicket(stored.number, stored.name, stored.holder, token, stored.since, stored.claims)

    def _holder_of(self, database: sqlite3.Connection, resource: str) -> str | None:
        queue: ClaimQueue[str] = ClaimQueue()
        for stored in _tickets(database):
            if stored.token is not None:
                queue.enter(stored.holder, stored.claims)
        return queue.owner_of(ResourceClaim(resource=resource))


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep all other processes and threads out of such a block for its length."""
    file = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _tickets(database: sqlite3.Connection) -> list[StoredTicket]:
    claims: dict[int, list[ResourceClaim]] = {}
    for number, resource, mode, within in database.execute("SELECT * FROM claims ORDER BY rowid"):
        claims.setdefault(number, []).append(ResourceClaim(resource=resource, mode=ClaimMode(mode), within=within))
    rows = database.execute("SELECT number, name, holder, token, since FROM tickets ORDER BY number")
    return [
        StoredTicket(number, name, holder, token, since, tuple(claims.get(number, ())))
        for number, name, holder, token, since in rows
    ]
