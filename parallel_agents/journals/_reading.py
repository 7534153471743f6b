"""What stands in a journal, as values. Writes nothing."""

import os
import sqlite3
from pathlib import Path

from attrs import field, frozen
from attrs.validators import optional

from .._checks import is_a, number
from .._models import Usage
from . import _sqlite_store as store
from ._protocol import JournalError


@frozen
class RecordedAttempt:
    """One start of an agent.

    Attributes:
        task_id: The task.
        agent_id: The agent.
        started: In seconds since 1970.
        ended: In seconds since 1970; ``None`` if it did not end by itself, or not yet.
        status: ``started``, ``succeeded``, ``parked`` or ``failed``.
        content: The result as JSON, or text about the failure.
        usage: What it spent.
    """

    task_id: str = field(validator=is_a(str))
    agent_id: str = field(validator=is_a(str))
    started: float = field(validator=number(at_least=0))
    ended: float | None = field(validator=optional(number(at_least=0)))
    status: str = field(validator=is_a(str))
    content: str | None = field(validator=optional(is_a(str)))
    usage: Usage


@frozen
class RecordedExecution:
    """All runs of one name.

    Attributes:
        name: Its name.
        group_id: The group.
        started: When it was begun, in seconds since 1970.
        finished: When nothing was left to do; ``None`` before.
        attempts: In the order of their starts.
    """

    name: str = field(validator=is_a(str))
    group_id: str = field(validator=is_a(str))
    started: float = field(validator=number(at_least=0))
    finished: float | None = field(validator=optional(number(at_least=0)))
    attempts: tuple[RecordedAttempt, ...]

    @property
    def last_attempts(self) -> tuple[RecordedAttempt, ...]:
        """Of each task, the one that tells how it is."""
        return tuple({attempt.task_id: attempt for attempt in self.attempts}.values())

    @property
    def usage(self) -> Usage:
        """What all attempts spent."""
        return store.total(attempt.usage for attempt in self.attempts)


def read_journal(path: str | os.PathLike[str]) -> tuple[RecordedExecution, ...]:
    """Read what stands in a journal, also while a run writes to it; executions and attempts in their order. Blocks.

    Raises:
        JournalError: If there is none, or it cannot be read.
    """
    path = Path(path)
    database = store.open_for_reading(path)
    try:
        if not store.version_of(database):  # a crash came before the first commit
            return ()
        attempts: dict[int, list[RecordedAttempt]] = {}
        for row in database.execute(
            "SELECT execution, task_id, agent_id, started, ended, status, content,"
            " input_tokens, output_tokens, requests, cost FROM attempts ORDER BY id"
        ):
            execution, task_id, agent_id, started, ended, status, content, *spent = row
            attempt = RecordedAttempt(task_id, agent_id, started, ended, status, content, store.usage_of(spent))
            attempts.setdefault(execution, []).append(attempt)
        executions = database.execute("SELECT id, name, group_id, started, finished FROM executions ORDER BY id")
        return tuple(
            RecordedExecution(name, group_id, started, finished, tuple(attempts.get(number, ())))
            for number, name, group_id, started, finished in executions
        )
    except (sqlite3.Error, ValueError, TypeError) as error:
        raise JournalError(str(path), f"cannot be read: {error}") from error
    finally:
        database.close()


def is_in_use(path: Path) -> bool:
    """Whether a run has a journal open."""
    try:
        file = os.open(store.lock_path(path), os.O_RDONLY)
    except OSError:
        return False
    try:
        return not store.lock_now(file, shared=True)
    finally:
        os.close(file)


def is_journal(path: Path) -> bool:
    """Whether a file looks like a database, as journals are."""
    try:
        with path.open("rb") as file:
            return file.read(16) == b"SQLite format 3\0"
    except OSError:
        return False
