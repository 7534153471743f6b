"""The session of a worker, and the thread that keeps it: renews it, listens, and writes what can wait.

One session stands for all that a worker holds. It is good until 0.8 of its lease is over, counted from before its last
renewal was sent, by the clock of this machine: whoever takes over later goes by the clock of the server, which started
counting later. Knows no event loop.
"""

import math
import os
import platform
import secrets
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import psycopg
from psycopg import sql

from .bell import Bell
from .connections import Connection, Connections, OutageError, text

GOOD_SHARE: Final = 0.8
RENEWALS: Final = 5
"""In each lease."""

LONGEST_WAIT_SECONDS: Final = 1.0
"""How often the thread looks whether somebody's turn has come of whom no notification told, if somebody waits; and how
long it waits before it asks for a server again that was away."""


class Session:
    """A row in the database, and until when it is good.

    Attributes:
        id: Of the row.
        channel: On which notifications for it come.
        good_until: As ``time.monotonic()`` tells it.
    """

    def __init__(self, connection: Connection, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self._tickets: dict[str, bool] = {}
        self._was_taken_over = False
        self.channel = f"parallel_agents_{secrets.token_hex(8)}"
        self.good_until = time.monotonic() + GOOD_SHARE * lease_seconds
        worker = text(f"process {os.getpid()} on {platform.node() or 'an unnamed host'}")
        row = connection.execute(
            "INSERT INTO sessions (worker, channel, expires)"
            " VALUES (%s, %s, clock_timestamp() + make_interval(secs => %s)) RETURNING id",
            (worker, self.channel, lease_seconds),
        ).fetchone()
        assert row is not None
        self.id: int = row[0]

    @property
    def is_lost(self) -> bool:
        """Whether it may have been taken over; it never comes back."""
        if not self._was_taken_over and time.monotonic() >= self.good_until:
            self._was_taken_over = True
        return self._was_taken_over

    def renew(self, connection: Connection) -> None:
        """Let it be good for longer, unless it is lost: then it must not keep others out."""
        sent = time.monotonic()
        if self.is_lost:
            return
        row = connection.execute(
            "UPDATE sessions SET expires = clock_timestamp() + make_interval(secs => %s) WHERE id = %s RETURNING true",
            (self._lease_seconds, self.id),
        ).fetchone()
        if row is None:
            self.give_up()
        elif not self.is_lost:
            self.good_until = sent + GOOD_SHARE * self._lease_seconds

    def give_up(self) -> None:
        """Know that it was taken over."""
        self._was_taken_over = True

    def keep(self, name: str) -> None:
        """Take note of a ticket that was granted."""
        self._tickets[name] = True

    def take(self, name: str) -> None:
        """Know that a ticket was taken away, if it is one that was noted."""
        if name in self._tickets:
            self._tickets[name] = False

    def has(self, name: str) -> bool:
        """Whether a ticket that was noted is still good."""
        return not self.is_lost and self._tickets.get(name, False)

    def forget(self, name: str) -> None:
        """Know nothing of a ticket any more; may be repeated."""
        self._tickets.pop(name, None)


def lost(name: str) -> str:
    """Return for what the bell is rung when a ticket was taken away."""
    return f"lost {name}"


class Keeper:
    """A thread with a connection of its own.

    Args:
        connections: Where that comes from.
        bell: Where notifications are told.
        lease_seconds: How long a session lives without being renewed.
    """

    def __init__(self, connections: Connections, bell: Bell, lease_seconds: float) -> None:
        self._connections = connections
        self._bell = bell
        self._lease_seconds = lease_seconds
        self._guard = threading.Lock()
        self._session: Session | None = None
        self._listens_on: str | None = None
        self._waiting: set[str] = set()
        self._work: deque[Callable[[Connection], Any]] = deque()
        self._wakes, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def session(self) -> Session:
        """Return the session, a new one if the last one was lost. Blocks shortly."""
        with self._guard:
            if self._session is None or self._session.is_lost:
                self._session = self._connections.run(lambda c: Session(c, self._lease_seconds))
                self._wake()
            if self._thread is None:
                self._thread = threading.Thread(target=self._keep, name="parallel-agents-postgres", daemon=True)
                self._thread.start()
            return self._session

    def soon(self, work: Callable[[Connection], Any]) -> None:
        """Have something done when the database is there; never waits. What the database refuses is dropped."""
        self._work.append(work)
        self._wake()

    def wait_for(self, name: str) -> None:
        """Look after a ticket, or a place at a limit, that waits."""
        self._waiting.add(name)
        self._wake()

    def forget(self, name: str) -> None:
        """Do not look after it any more; may be repeated."""
        self._waiting.discard(name)

    def close(self) -> None:
        """Do what is to be done, give back all that the session has, and end; waits for that."""
        self._is_closing = True
        self._wake()
        if self._thread is not None:
            self._thread.join()
        self._wakes.close()
        self._waker.close()

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # it is awake already
            self._waker.send(b"!")

    def _keep(self) -> None:
        """Keep sessions until the end; runs in the thread."""
        connection: Connection | None = None
        while not self._is_closing:
            try:
                if connection is None:
                    connection = self._connections.connect()
                    self._listens_on = None
                self._take_turn(connection)
            except (psycopg.Error, OutageError):
                if connection is not None:
                    connection.close()
                    connection = None
                self._wait(None, LONGEST_WAIT_SECONDS)
        if connection is not None:
            with suppress(psycopg.Error):  # the session ends by itself, later
                self._finish(connection)
            connection.close()

    def _take_turn(self, connection: Connection) -> None:
        """Renew the session, do what is to be done, and wait for the next time, or until there is something to do."""
        session = self._session
        assert session is not None
        if self._listens_on != session.channel:
            connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(session.channel)))
            self._listens_on = session.channel
        session.renew(connection)
        due = time.monotonic() + self._lease_seconds / RENEWALS
        self._look_after(connection)
        while session is self._session and not self._is_closing and time.monotonic() < due:
            self._do_work(connection, due)
            waits = bool(self._waiting)
            pause = due - time.monotonic()
            self._wait(connection, min(pause, LONGEST_WAIT_SECONDS) if waits else pause)
            told = list(connection.notifies(timeout=0))
            for notification in told:
                self._tell(session, notification.payload)
            if waits and not told:
                connection.execute("CALL tend()")
                self._look_after(connection)

    def _tell(self, session: Session, payload: str) -> None:
        name, _, answer = payload.partition(" ")
        if answer:
            self._waiting.discard(name)
            self._bell.ring(name, answer)
        else:
            session.take(name)
            self._bell.ring(lost(name), "")

    def _look_after(self, connection: Connection) -> None:
        """Find out what became of those that wait, in case that a notification was lost."""
        if not self._waiting:
            return
        names = list(self._waiting)
        rows = connection.execute(
            "SELECT name, token::text FROM tickets WHERE name = ANY (%(names)s)"
            " UNION ALL SELECT name, answer FROM places WHERE name = ANY (%(names)s)",
            {"names": names},
        ).fetchall()
        found: dict[str, str | None] = dict(rows)
        for name in names:
            if (answer := found.get(name, "")) is not None:
                self._waiting.discard(name)
                self._bell.ring(name, answer)

    def _do_work(self, connection: Connection, due: float) -> None:
        """Do what is to be done, until the session is to be renewed."""
        if not self._work:
            return
        connection.execute("SET synchronous_commit = off")  # what waits here may as well wait for the disk
        while self._work and time.monotonic() < due:
            try:
                self._work[0](connection)
            except psycopg.Error as error:
                if isinstance(self._connections.translated(error), OutageError):
                    raise
            self._work.popleft()
        connection.execute("RESET synchronous_commit")

    def _finish(self, connection: Connection) -> None:
        self._do_work(connection, math.inf)
        if self._session is not None:
            connection.execute("UPDATE sessions SET expires = '-infinity' WHERE id = %s", (self._session.id,))
            connection.execute("CALL tend()")

    def _wait(self, connection: Connection | None, seconds: float) -> None:
        """Wait until somebody wants something, a notification comes, or the time is over."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._wakes, selectors.EVENT_READ)
            if connection is not None:
                selector.register(connection, selectors.EVENT_READ)
            for key, _ in selector.select(max(0.0, seconds)):
                if key.fileobj is self._wakes:
                    self._wakes.recv(4096)
