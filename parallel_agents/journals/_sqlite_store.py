"""The file behind ``SqliteJournal``: what stands in it, and how it is opened. Synchronous; knows no event loop.

WAL with ``synchronous=FULL``: a commit that has returned survives a loss of power; with ``NORMAL`` it would not
(https://www.sqlite.org/pragma.html#pragma_synchronous).
"""

import functools
import os
import sqlite3
import stat
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from operator import add
from pathlib import Path
from typing import Any, Final

from .._models import NO_USAGE, Usage
from ._protocol import Ending, Entry, JournalError, Step

if sys.platform != "win32":
    import fcntl

VERSION: Final = 1
"""Of the tables below."""

APPLICATION_ID: Final = 0x50416A6C
"""Marks an SQLite file as a journal: ``PAjl``."""

_SCHEMA = """
CREATE TABLE executions (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    group_id TEXT NOT NULL,
    started REAL NOT NULL,
    finished REAL
);
CREATE TABLE attempts (
    id INTEGER PRIMARY KEY,
    execution INTEGER NOT NULL REFERENCES executions (id),
    group_id TEXT NOT NULL,
    task_id TEXT NOT NULL,
    agent_id TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    started REAL NOT NULL,
    ended REAL,
    status TEXT NOT NULL DEFAULT 'started',
    content TEXT,
    input_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0,
    requests INTEGER NOT NULL DEFAULT 0,
    cost REAL NOT NULL DEFAULT 0.0
);
CREATE INDEX attempts_by_task ON attempts (execution, group_id, task_id);
"""

Database = sqlite3.Connection
Write = Callable[[Database], Any]


LOCK_TRIES: Final = 5
LOCK_PAUSE_SECONDS: Final = 0.02
"""A journal that is locked for longer is in use."""


def lock_path(path: Path) -> Path:
    """Return where the lock of a journal is."""
    return path.with_name(path.name + ".lock")


def lock_now(file: int, *, shared: bool) -> bool:
    """Lock an open file until it is closed; return whether that was possible at once."""
    if sys.platform != "win32":
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


class RunLock:
    """Lets one process at a time write to a journal: a lock on a file beside it, which is never removed.

    The operating system takes it from a process however that ends.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(lock_path(path), os.O_CREAT | os.O_RDWR | _NO_LINK, 0o600)
        try:
            if not self._is_locked_in_time():
                owner = os.pread(self._file, 32, 0).decode("ascii", "replace").strip()
                raise JournalError(str(path), f"is in use by another run (process {owner})")
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)
        except BaseException:
            os.close(self._file)
            raise

    def _is_locked_in_time(self) -> bool:
        """Lock the file; who only looks whether it is locked holds it for a moment too."""
        for _ in range(LOCK_TRIES):
            if lock_now(self._file, shared=False):
                return True
            time.sleep(LOCK_PAUSE_SECONDS)
        return False

    def release(self) -> None:
        os.close(self._file)


_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def open_for_writing(path: Path) -> Database:
    """Open a journal, and make it if it is missing.

    Raises:
        JournalError: If it cannot be used.
    """
    try:
        file = os.open(path, os.O_CREAT | os.O_RDWR | _NO_LINK, 0o600)  # SQLite would let everybody read it
        facts = os.fstat(file)
        os.close(file)
        if not stat.S_ISREG(facts.st_mode):
            raise JournalError(str(path), "is no regular file")
        if hasattr(os, "geteuid") and facts.st_uid != os.geteuid():
            raise JournalError(str(path), "belongs to another user")
        database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.Error) as error:
        raise JournalError(str(path), f"cannot be opened: {reason(error)}") from error
    try:
        _prepare(database, path, is_new=facts.st_size == 0)
    except BaseException:
        database.close()
        raise
    return database


def _prepare(database: Database, path: Path, *, is_new: bool) -> None:
    try:
        if not is_new:
            _refuse_what_is_no_journal(database, path)
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            database.execute(f"PRAGMA {pragma}").fetchall()
        if not version_of(database):
            transact(database, [_create])
    except JournalError:
        raise
    except Exception as error:
        raise JournalError(str(path), f"cannot be used: {reason(error)}") from error


def _create(database: Database) -> None:
    for statement in _SCHEMA.split(";"):
        if statement.strip():
            database.execute(statement)
    database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    database.execute(f"PRAGMA user_version = {VERSION}")


def version_of(database: Database) -> int:
    """Return the version of a journal's tables; 0 if it has none yet."""
    return int(database.execute("PRAGMA user_version").fetchall()[0][0])


def _refuse_what_is_no_journal(database: Database, path: Path) -> None:
    version = version_of(database)
    application = database.execute("PRAGMA application_id").fetchall()[0][0]
    tables = database.execute("SELECT count(*) FROM sqlite_schema").fetchall()[0][0]
    if application != APPLICATION_ID and (
        tables or version
    ):  # an empty one was left by a crash before the first commit
        raise JournalError(str(path), "is no journal of agents but another database")
    if version > VERSION:
        raise JournalError(str(path), f"has version {version}, this library knows up to {VERSION}: use a newer one")
    problems = [row[0] for row in database.execute("PRAGMA quick_check(1)").fetchall()]
    if problems != ["ok"]:
        raise JournalError(str(path), f"is damaged: {problems[0]}")


def open_for_reading(path: Path) -> Database:
    """Open a journal that may be written at the same time.

    Raises:
        JournalError: If there is none, or it cannot be read.
    """
    try:
        # What a crash left half done must be undone before it can be read, so that "ro" would not do.
        database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None)
        try:
            _refuse_what_is_no_journal(database, path)
        except BaseException:
            database.close()
            raise
    except sqlite3.Error as error:
        raise JournalError(str(path), f"cannot be read: {reason(error)}") from error
    return database


def reason(error: Exception) -> str:
    """Return what an error of the operating system or of SQLite says."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def transact(database: Database, writes: "list[Write]") -> list[Any]:
    """Make several changes in one transaction, durably; return what each of them returned."""
    database.execute("BEGIN IMMEDIATE")
    try:
        results = [write(database) for write in writes]
        database.execute("COMMIT")
    except BaseException:
        with suppress(Exception):  # SQLite may have done so itself
            database.execute("ROLLBACK")
        raise
    return results


def execution_id(database: Database, name: str, group_id: str) -> int:
    """Return the number of an execution, and begin it if it is new."""
    known = database.execute("SELECT id FROM executions WHERE name = ?", (name,)).fetchall()
    if known:
        return int(known[0][0])
    added = database.execute(
        "INSERT INTO executions (name, group_id, started) VALUES (?, ?, ?) RETURNING id", (name, group_id, time.time())
    )
    return int(added.fetchall()[0][0])


def start(database: Database, step: Step) -> Entry:
    """Return what is known of a step, and record that it starts unless it is done."""
    execution = execution_id(database, step.execution, step.group_id)
    rows = database.execute(
        "SELECT fingerprint, status, content, input_tokens, output_tokens, requests, cost FROM attempts"
        " WHERE execution = ? AND group_id = ? AND task_id = ? ORDER BY id",
        (execution, step.group_id, step.task_id),
    ).fetchall()
    spent = total(usage_of(row[3:]) for row in rows)
    same = [row for row in rows if row[0] == step.fingerprint]
    done = [row[2] for row in same if row[1] not in ("started", "failed")]
    if done:
        return Entry(attempt=None, content=done[-1], spent=spent, reason="recorded")
    added = database.execute(
        "INSERT INTO attempts (execution, group_id, task_id, agent_id, fingerprint, started) VALUES (?, ?, ?, ?, ?, ?)"
        " RETURNING id",
        (execution, step.group_id, step.task_id, step.agent_id, step.fingerprint, time.time()),
    )
    reason = None if not rows else "changed" if not same else "failed" if same[-1][1] == "failed" else "interrupted"
    return Entry(attempt=added.fetchall()[0][0], spent=spent, reason=reason)


def usage_of(columns: Sequence[Any]) -> Usage:
    """Return usage from its four columns."""
    input_tokens, output_tokens, requests, cost = columns
    return Usage(input_tokens=input_tokens, output_tokens=output_tokens, requests=requests, cost=cost)


def total(usages: Iterable[Usage]) -> Usage:
    """Return the sum."""
    return functools.reduce(add, usages, NO_USAGE)


def _columns(usage: Usage) -> tuple[int, int, int, float]:
    return usage.input_tokens, usage.output_tokens, usage.requests, usage.cost


def spend(database: Database, attempt: int, usage: Usage) -> None:
    """Add to what a start spent."""
    database.execute(
        "UPDATE attempts SET input_tokens = input_tokens + ?, output_tokens = output_tokens + ?,"
        " requests = requests + ?, cost = cost + ? WHERE id = ?",
        (*_columns(usage), attempt),
    )


def end(database: Database, attempt: int, ending: Ending) -> None:
    """Record how a start ended, and all that it spent."""
    database.execute(
        "UPDATE attempts SET ended = ?, status = ?, content = ?, input_tokens = ?, output_tokens = ?, requests = ?,"
        " cost = ? WHERE id = ?",
        (time.time(), ending.status, ending.content, *_columns(ending.usage), attempt),
    )


def finish(database: Database, execution: str) -> None:
    """Record that nothing of an execution is left to do."""
    database.execute("UPDATE executions SET finished = ? WHERE name = ?", (time.time(), execution))


def unfinished(database: Database, group_id: str) -> str | None:
    """Return the name of the latest execution of a group, if something of it is left to do."""
    rows = database.execute(
        "SELECT name, finished FROM executions WHERE group_id = ? ORDER BY id DESC LIMIT 1", (group_id,)
    ).fetchall()
    return rows[0][0] if rows and rows[0][1] is None else None
