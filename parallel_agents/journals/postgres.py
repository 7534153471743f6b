"""PostgresJournal: what agents did, in a database that many machines share.

Whether a step may start and an attempt may end is decided in the database, each in one function. Knows tasks and
threads through the store.
"""

import secrets
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import anyio
from attrs import frozen

from .._models import NO_USAGE, Usage
from .._postgres.connections import Connection, PostgresError, text
from .._postgres.keeper import Session
from .._postgres.spending import Spending, columns_of
from ..locks.postgres import PostgresLease
from ..postgres import PostgresStore
from ._protocol import Ending, Entry, JournalError, Step
from ._reading import RecordedAttempt, RecordedExecution

__all__ = ["PostgresJournal", "PostgresStore"]

T = TypeVar("T")

SPEND: Final = "SELECT spend(%s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::float8[])"

FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0
"""How long to wait before asking again whether another worker still runs a step; twice as long each time."""

SENT_BY_THE_LOST = 2
"""How many ends of its lease may be seen of a lost worker: what it sent last can arrive after the first look."""


@frozen
class _Busy:
    """Who is at a step, and until when at least."""

    worker: str
    until: float


class PostgresJournal:
    """Keeps what agents did in a database, for all machines that use the same.

    A step that a worker has started does not start on another one, unless that worker is lost: who asks then waits for
    the end of its lease, or is told that it lives. *An agent's execution is at least once; its commit is at most once*:
    what a worker ends that has lost its session, or the claims of the agent if they were taken with a
    ``PostgresResourceLock`` in the same database, is refused in the transaction that would have recorded it.

    Args:
        store: A database, or its address.
    """

    def __init__(self, store: PostgresStore | str) -> None:
        self._store = PostgresStore(store) if isinstance(store, str) else store
        self._spending: Spending[int] = Spending(SPEND, self._store.soon)

    def __repr__(self) -> str:
        return f"PostgresJournal({self._store.name!r})"

    def open(self) -> None:
        """Open the database, which the first use does otherwise; see ``PostgresStore.open()``.

        Raises:
            JournalError: If it cannot be used.
        """
        self._or_journal_error(self._store.open)

    def close(self) -> None:
        """Write what waits, and close the database, also for others that share it; may be repeated."""
        self._store.close()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def start(self, step: Step, /) -> Entry:
        """Record durably that a step starts, unless it is done; see ``Journal``.

        Waits, for a lease at most, for another worker that runs it, or did when it was lost.

        Raises:
            JournalError: If another worker runs it, or it cannot be recorded.
        """
        name = secrets.token_hex(8)
        pause, leases = FIRST_PAUSE_SECONDS, set[float]()
        while True:
            try:
                entry = await self._store.run(lambda c, session: self._start(c, session, name, step))
            except PostgresError as error:
                raise self._error(error) from error
            if isinstance(entry, Entry):
                return entry
            leases.add(entry.until)
            if len(leases) > SENT_BY_THE_LOST:
                raise JournalError(
                    self._store.name,
                    f"says that task {step.task_id!r} of {step.execution!r} is being run by {entry.worker}: "
                    "let it finish, or stop it and wait until its lease is over",
                )
            await anyio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def spend(self, attempt: int, usage: Usage, /) -> None:
        """Record soon what was spent; see ``Journal``."""
        self._spending.add(attempt, usage)

    async def end(self, attempt: int, ending: Ending, /) -> None:
        """Record durably how a start ended; see ``Journal``.

        Raises:
            JournalError: If it cannot be recorded, or this worker has lost the right to it. What was spent is recorded
                in the second case.
        """
        seconds = self._store.lease_seconds
        with anyio.move_on_after(2 * seconds, shield=True):
            try:
                refusal = await self._store.run(lambda c, _: self._end(c, attempt, ending), patience_seconds=seconds)
            except PostgresError as error:
                raise self._error(error) from error
            if refusal is not None:
                raise JournalError(self._store.name, f"refuses what the agent did: {refusal}")
            return
        raise JournalError(self._store.name, f"has not answered for {2 * seconds:g} s")

    def let_go(self, attempt: int, /) -> None:
        """Record soon that a start was left without an ending, so that another worker need not wait for it."""
        self._store.soon(
            lambda c: c.execute("UPDATE attempts SET session = NULL WHERE id = %s AND ended IS NULL", (attempt,))
        )

    def unfinished(self, group_id: str) -> str | None:
        """Return the name of a group's latest execution if something of it is left to do. Blocks for a moment.

        Raises:
            JournalError: If the database cannot be read.
        """

        def find(connection: Connection, _: Session) -> str | None:
            row = connection.execute(
                "SELECT name, finished FROM executions WHERE group_id = %s ORDER BY id DESC LIMIT 1", (text(group_id),)
            ).fetchone()
            return None if row is None or row[1] is not None else row[0]

        return self._or_journal_error(lambda: self._store.run_now(find))

    def finish(self, execution: str) -> None:
        """Record that nothing of an execution is left to do. Blocks for a moment.

        Raises:
            JournalError: If that cannot be recorded.
        """

        def finish(connection: Connection, _: Session) -> None:
            connection.execute(
                "UPDATE executions SET finished = clock_timestamp() WHERE md5(name) = md5(%s)", (text(execution),)
            )

        self._or_journal_error(lambda: self._store.run_now(finish))

    def read(self) -> tuple[RecordedExecution, ...]:
        """Read what stands in it, also while others write to it; executions and attempts in their order. Blocks.

        Raises:
            JournalError: If the database cannot be read.
        """
        return self._or_journal_error(lambda: self._store.run_now(lambda c, _: _read(c)))

    def is_in_use(self) -> bool:
        """Whether a worker that is alive runs something of the latest execution. Blocks for a moment.

        Raises:
            JournalError: If the database cannot be read.
        """

        def look(connection: Connection, _: Session) -> bool:
            row = connection.execute(
                "SELECT EXISTS (SELECT FROM attempts JOIN sessions ON sessions.id = session"
                " WHERE ended IS NULL AND expires > clock_timestamp()"
                " AND execution = (SELECT max(id) FROM executions))"
            ).fetchone()
            return row is not None and bool(row[0])

        return self._or_journal_error(lambda: self._store.run_now(look))

    def _start(self, connection: Connection, session: Session, name: str, step: Step) -> Entry | _Busy:
        self._spending.write(connection)
        ids = step.group_id, step.task_id, step.agent_id
        row = connection.execute(
            "SELECT attempt, content, reason, input_tokens, output_tokens, requests, cost, busy_worker, busy_until"
            " FROM start(%s, %s, %s, %s, %s, %s, %s, %s)",
            (name, session.id, self._ticket(step), *map(text, (step.execution, *ids, step.fingerprint))),
        ).fetchone()
        assert row is not None
        attempt, content, reason, *spent, busy_worker, busy_until = row
        if busy_until is not None:
            return _Busy(busy_worker, busy_until)
        return Entry(attempt=attempt, content=content, reason=reason, spent=_usage(spent))

    def _ticket(self, step: Step) -> int | None:
        """Return what stands for the agent's claims, if they are held in this very database."""
        lease = step.lease
        if isinstance(lease, PostgresLease) and lease.database == self._store.opened.database:
            return lease.ticket
        return None

    def _end(self, connection: Connection, attempt: int, ending: Ending) -> str | None:
        row = connection.execute(
            "SELECT finish_attempt(%s, %s, %s, %s, %s, %s, %s)",
            (attempt, text(ending.status), text(ending.content), *columns_of(ending.usage)),
        ).fetchone()
        assert row is not None
        refusal: str | None = row[0]
        return refusal

    def _or_journal_error(self, function: Callable[[], T]) -> T:
        try:
            return function()
        except PostgresError as error:
            raise self._error(error) from error

    def _error(self, error: PostgresError) -> JournalError:
        return JournalError(error.database, error.problem)


def _usage(columns: Sequence[Any]) -> Usage:
    input_tokens, output_tokens, requests, cost = columns
    usage = Usage(input_tokens=input_tokens, output_tokens=output_tokens, requests=requests, cost=cost)
    return NO_USAGE if usage == NO_USAGE else usage


def _read(connection: Connection) -> tuple[RecordedExecution, ...]:
    attempts: dict[int, list[RecordedAttempt]] = {}
    for execution, task_id, agent_id, started, ended, status, content, *spent in connection.execute(
        "SELECT execution, task_id, agent_id, extract(epoch FROM started)::float8, extract(epoch FROM ended)::float8,"
        " status, content, input_tokens, output_tokens, requests, cost FROM attempts ORDER BY id"
    ):
        attempt = RecordedAttempt(task_id, agent_id, started, ended, status, content, _usage(spent))
        attempts.setdefault(execution, []).append(attempt)
    executions = connection.execute(
        "SELECT id, name, group_id, extract(epoch FROM started)::float8, extract(epoch FROM finished)::float8"
        " FROM executions ORDER BY id"
    )
    return tuple(
        RecordedExecution(name, group_id, started, finished, tuple(attempts.get(number, ())))
        for number, name, group_id, started, finished in executions
    )
