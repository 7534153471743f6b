"""Connections to the database: opened when they are wanted, kept when they are given back. Synchronous.

How many there are at once is decided by how many threads ask, so nobody waits for one here.
"""

import threading
from collections.abc import Callable
from typing import Any, Final, TypeAlias, TypeVar

from .._errors import ParallelAgentsError

try:
    import psycopg
    from psycopg import conninfo, errors
except ModuleNotFoundError as error:
    message = "Locks and journals in PostgreSQL need psycopg: pip install 'parallel-agents[postgres]'"
    raise ModuleNotFoundError(message, name=error.name) from error

T = TypeVar("T")
Connection: TypeAlias = psycopg.Connection[Any]
Work: TypeAlias = Callable[[Connection], T]

CONNECT_SECONDS: Final = 5
STATEMENT_SECONDS: Final = 10
"""How long a server may take to answer; each statement takes milliseconds, and waits for others that do."""

_KEPT: Final = {
    "search_path": "parallel_agents",
    "statement_timeout": f"{STATEMENT_SECONDS}s",
    "default_transaction_isolation": r"read\ committed",
}

_PASSES = (
    errors.AdminShutdown,
    errors.CrashShutdown,
    errors.CannotConnectNow,
    errors.TooManyConnections,
    errors.DeadlockDetected,
    errors.QueryCanceled,
    errors.ReadOnlySqlTransaction,  # a server that is no longer, or not yet, the primary one
)


FORBIDDEN: Final = errors.InsufficientPrivilege


class PostgresError(ParallelAgentsError):
    """A database cannot be used, or not now.

    Attributes:
        database: Which one, without a password.
        problem: Why, and the way out.
    """

    def __init__(self, database: str, problem: str) -> None:
        super().__init__(database, problem)
        self.database = database
        self.problem = problem

    def __str__(self) -> str:
        return f"Database {self.database!r} {self.problem}"


class OutageError(PostgresError):
    """A server is away, which may pass."""


class SessionLostError(PostgresError):
    """The session of this worker was taken over; another one may do what this one could not."""


class Connections:
    """Gives connections to threads.

    Args:
        url: As libpq understands it: ``postgresql://user@host:port/database``.
    """

    def __init__(self, url: str) -> None:
        try:
            given = conninfo.conninfo_to_dict(url)
        except psycopg.Error:
            given = {}
        if not given:  # outside the handler: what libpq says about it can hold a part of the password
            raise ValueError("url must be an address of PostgreSQL, such as postgresql://user@host:5432/database")
        if "@" in f"{given.get('host')}{given.get('dbname')}":  # a part of a password, which would be shown
            raise ValueError("url must be like postgresql://user@host:5432/database, with @ in a password as %40")
        self.database = _shown(given)
        options = " ".join(f"-c {name}={value}" for name, value in _KEPT.items())
        self._conninfo = conninfo.make_conninfo(
            url,
            options=f"{given.get('options') or ''} {options}".strip(),
            connect_timeout=given.get("connect_timeout") or CONNECT_SECONDS,
            tcp_user_timeout=given.get("tcp_user_timeout") or STATEMENT_SECONDS * 1000,
            application_name=given.get("application_name") or "parallel_agents",
        )
        self._guard = threading.Lock()
        self._idle: list[Connection] = []

    def run(self, work: Work[T]) -> T:
        """Do something with a connection.

        Raises:
            OutageError: If the server is away; what was asked for may have been done, or not.
            SessionLostError: If it was to be done for a session that is not there any more.
            PostgresError: If the server refuses it.
        """
        with self._guard:
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            connection = self.connect()
        try:
            done = work(connection)
        except psycopg.Error as error:
            if connection.closed:
                self.close()  # the others have gone with the server, too
            else:
                self._give_back(connection)
            raise self.translated(error) from error
        except BaseException:
            connection.close()
            raise
        self._give_back(connection)
        return done

    def connect(self) -> Connection:
        """Open a connection that is the caller's own.

        Raises:
            OutageError: If the server cannot be reached or lets nobody in.
        """
        try:
            return psycopg.connect(self._conninfo, autocommit=True)
        except psycopg.Error as error:
            raise OutageError(self.database, f"cannot be reached: {_reason(error)}") from error

    def translated(self, error: psycopg.Error) -> PostgresError:
        """Return what an error means."""
        is_lost = isinstance(error, psycopg.OperationalError | psycopg.InterfaceError) and error.sqlstate is None
        if is_lost or isinstance(error, _PASSES):
            return OutageError(self.database, f"does not answer: {_reason(error)}")
        if isinstance(error, errors.ForeignKeyViolation):
            return SessionLostError(
                self.database, "has given to others what this worker held: it was not renewed in time"
            )
        if isinstance(error, errors.InsufficientPrivilege):
            return PostgresError(self.database, f"forbids it: {_reason(error)}; grant the user what the docs list")
        return PostgresError(self.database, f"refuses it: {_reason(error)}")

    def close(self) -> None:
        """Close those that nobody uses; may be repeated, and used again."""
        with self._guard:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _give_back(self, connection: Connection) -> None:
        with self._guard:
            self._idle.append(connection)


def _shown(given: dict[str, Any]) -> str:
    """Return the address without what is secret or does not matter."""
    if given.get("service"):
        return f"service={given['service']}"
    user = f"{given['user']}@" if given.get("user") else ""
    port = f":{given['port']}" if given.get("port") else ""
    return f"postgresql://{user}{given.get('host') or ''}{port}/{given.get('dbname') or ''}"


def _reason(error: psycopg.Error) -> str:
    return " ".join((error.diag.message_primary or str(error) or type(error).__name__).split())


def text(value: str) -> str:
    """Return text that the database can hold: no lone surrogates, no NUL."""
    return value.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
