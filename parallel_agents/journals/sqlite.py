"""SqliteJournal: what agents did, in one file of this machine.

All changes are made by one thread, which puts what has gathered meanwhile into one transaction: a commit takes
milliseconds, and a hundred agents share it. What stands in the file is the business of the store.
"""

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.to_thread
from attrs import define

from .._models import Usage
from . import _sqlite_store as store
from ._protocol import Ending, Entry, JournalError, Step
from ._reading import RecordedAttempt, RecordedExecution, read_journal

__all__ = ["RecordedAttempt", "RecordedExecution", "SqliteJournal", "read_journal"]

END_SECONDS = 30.0
"""How long a disk may take to keep an ending."""


@define(eq=False)
class _Change:
    """One change that waits for its transaction."""

    write: store.Write
    result: Any = None
    is_done: bool = False
    is_durable: bool = False


class SqliteJournal:
    """Keeps what agents did in an SQLite file, through crashes and losses of power.

    The file is made for this user alone. One process at a time may have it open; a lock on a file beside it, with
    ``.lock`` after its name, sees to that. If it cannot be written any more, each later call says so: nothing starts
    that could not be recorded. Serves one event loop at a time.

    Args:
        path: The file; made if it is missing, in a folder that exists.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._opened: _Opened | None = None

    def __repr__(self) -> str:
        return f"SqliteJournal({str(self.path)!r})"

    def open(self) -> None:
        """Open the file; takes some milliseconds.

        Raises:
            JournalError: If it is in use, no journal, of a newer version, damaged, or cannot be written.
        """
        if self._opened is not None:
            raise RuntimeError("the journal is open already")
        self._opened = _Opened(self.path)

    def close(self) -> None:
        """Write what waits, and close the file; may be repeated."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def start(self, step: Step, /) -> Entry:
        """Record durably that a step starts, unless it is done; see ``Journal``."""
        entry: Entry = await self._file.change(partial(store.start, step=step))
        return entry

    def spend(self, attempt: int, usage: Usage, /) -> None:
        """Record soon what was spent; see ``Journal``."""
        self._file.change_soon(partial(store.spend, attempt=attempt, usage=usage))

    async def end(self, attempt: int, ending: Ending, /) -> None:
        """Record durably how a start ended; see ``Journal``."""
        with anyio.move_on_after(END_SECONDS, shield=True):
            await self._file.change(partial(store.end, attempt=attempt, ending=ending))
            return
        raise JournalError(str(self.path), f"has not been written for {END_SECONDS:g} s")

    def unfinished(self, group_id: str) -> str | None:
        """Return the name of a group's latest execution if something of it is left to do. Blocks for a moment.

        Raises:
            JournalError: If the file cannot be read.
        """
        name: str | None = self._file.change_now(partial(store.unfinished, group_id=group_id))
        return name

    def finish(self, execution: str) -> None:
        """Record that nothing of an execution is left to do. Blocks for a moment.

        Raises:
            JournalError: If that cannot be recorded.
        """
        self._file.change_now(partial(store.finish, execution=execution))

    @property
    def _file(self) -> "_Opened":
        if self._opened is None:
            raise RuntimeError("the journal is not open: use it in a with statement, or call open()")
        return self._opened


class _Opened:
    """An open file with its thread, and the changes that wait for it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._lock = store.RunLock(path)
        except OSError as error:
            raise JournalError(str(path), f"cannot be opened: {store.reason(error)}") from error
        try:
            self._database = store.open_for_writing(path)
        except BaseException:
            self._lock.release()
            raise
        self._inode = path.stat().st_ino
        self._problem: str | None = None
        self._pending: deque[_Change] = deque()
        self._thread = ThreadPoolExecutor(1, "parallel-agents-journal")
        self._turn: Future[None] | None = None
        self._has_turn_ahead = False
        self._somebody_waits: anyio.Event | None = None
        self._waiting = anyio.CapacityLimiter(1)

    def close(self) -> None:
        self._thread.shutdown()
        try:
            self._database.close()
        finally:
            self._lock.release()

    def change_soon(self, write: store.Write) -> _Change:
        """Have a change made in the next transaction."""
        change = _Change(write)
        self._pending.append(change)
        if not self._has_turn_ahead:
            self._has_turn_ahead = True
            self._turn = self._thread.submit(self._take_turn)
        return change

    def change_now(self, write: store.Write) -> Any:
        """Have a change made, and block until it is."""
        change = self.change_soon(write)
        assert self._turn is not None
        self._turn.result()
        return self._result_of(change)

    async def change(self, write: store.Write) -> Any:
        """Have a change made, and wait until it is durable."""
        change = self.change_soon(write)
        while not change.is_done:
            if self._somebody_waits is not None:
                await self._somebody_waits.wait()
                continue
            # One waits for the thread, in a thread, and tells the others.
            self._somebody_waits = anyio.Event()
            assert self._turn is not None
            try:
                await anyio.to_thread.run_sync(self._turn.result, limiter=self._waiting, abandon_on_cancel=True)
            finally:
                self._somebody_waits.set()
                self._somebody_waits = None
        return self._result_of(change)

    def _result_of(self, change: _Change) -> Any:
        if not change.is_durable:
            raise JournalError(str(self._path), self._problem or "")
        return change.result

    def _take_turn(self) -> None:
        """Make all changes that wait, in one transaction. Runs in the thread."""
        self._has_turn_ahead = False
        changes: list[_Change] = []
        while self._pending:
            changes.append(self._pending.popleft())
        try:
            self._refuse_if_unusable()
            results = store.transact(self._database, [change.write for change in changes])
            for change, result in zip(changes, results, strict=True):
                change.result, change.is_durable = result, True
        except Exception as error:  # noqa: BLE001 - told to everybody who waits, now and later
            self._problem = self._problem or f"cannot be written: {store.reason(error)}; nothing more starts with it"
        finally:
            for change in changes:
                change.is_done = True

    def _refuse_if_unusable(self) -> None:
        if self._problem is not None:
            raise JournalError(str(self._path), self._problem)
        try:
            is_there = self._path.stat().st_ino == self._inode
        except FileNotFoundError:
            is_there = False
        if not is_there:  # SQLite would go on to write to a file that nobody can open any more
            raise OSError("somebody removed or replaced the file")
