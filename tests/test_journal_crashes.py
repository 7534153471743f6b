"""A journal through kill -9 at each of its writes, losses of power, and disks that are full or broken.

SQLite's own traps are known from https://www.sqlite.org/testing.html (sections 3.3 and 3.4): fail at the n-th operation
with n rising, and rebuild what a disk may hold when the power goes.
"""

import json
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import anyio
import apsw
import crashing
import pytest
from crashing import BACKENDS, expected_status, run_group

from parallel_agents.journals import JournalError
from parallel_agents.journals import _sqlite_store as store
from parallel_agents.journals.sqlite import read_journal

pytestmark = [pytest.mark.anyio, pytest.mark.integration]

IMAGES = 1_000
SUCCESSES = 32


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: only what these tests kill and cut has to last."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else tmp_path))
    yield folder
    shutil.rmtree(folder)


def test_no_kill_at_any_write_loses_or_repeats_a_recorded_success(fast_folder: Path) -> None:
    program = Path(__file__).with_name("crashing.py")
    done = subprocess.run([sys.executable, program, fast_folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kill_points"] >= 300
    assert told["ran_twice"] > 0


Change = tuple[str, str, int, bytes]
"""What was done to a file: ``write`` at an offset, ``truncate`` to a size, ``sync``, or ``told``: a task's name."""


class Disk(apsw.VFS):
    """A file system that remembers each change to each file, and can fail at one of them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.log: list[Change] = []
        self.fail_at: int | None = None
        self.fails_for_ever = False
        self.error: type[Exception] = apsw.FullError
        self._changes = count(1)
        super().__init__(name, "")

    def xOpen(self, name: Any, flags: list[int]) -> "File":  # noqa: N802 - SQLite's name
        return File(self, name, flags)

    def note(self, what: str, file: str, number: int = 0, data: bytes = b"") -> None:
        change = next(self._changes)
        if self.fail_at is not None and (change == self.fail_at or (self.fails_for_ever and change > self.fail_at)):
            raise self.error
        self.log.append((what, file, number, data))


class File(apsw.VFSFile):
    def __init__(self, disk: Disk, name: Any, flags: list[int]) -> None:
        self._disk = disk
        self._name = Path(name.filename() if isinstance(name, apsw.URIFilename) else name or "").name
        super().__init__("", name, flags)

    def xWrite(self, data: Any, offset: int) -> None:  # noqa: N802
        self._disk.note("write", self._name, offset, bytes(data))
        super().xWrite(data, offset)

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        self._disk.note("truncate", self._name, newsize)
        super().xTruncate(newsize)

    def xSync(self, flags: int) -> None:  # noqa: N802
        self._disk.note("sync", self._name)
        super().xSync(flags)


class Connection:
    """A connection of apsw with the few methods of the standard library's that the journal uses."""

    def __init__(self, path: Path, disk: Disk, pragmas: Mapping[str, str]) -> None:
        self._connection = apsw.Connection(str(path), vfs=disk.name)
        self._pragmas = pragmas

    def execute(self, sql: str, parameters: tuple[Any, ...] = ()) -> Any:
        return self._connection.execute(self._pragmas.get(sql, sql), parameters)

    def close(self) -> None:
        with suppress(apsw.Error):  # the standard library's says nothing of a checkpoint that fails
            self._connection.close()


class DiskDiary:
    """Tells the disk which outcomes were reported, so that they stand in its log."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.told: set[str] = set()

    def note(self, *words: object) -> None:
        if words[0] == "told" and words[2] == "succeeded":
            self.told.add(str(words[1]))
            self._disk.log.append(("told", str(words[1]), 0, b""))


@pytest.fixture
def use_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Disk]]:
    disks: list[Disk] = []

    def use(pragmas: Mapping[str, str] | None = None) -> Disk:
        disk = Disk(f"disk-{len(disks)}")
        disks.append(disk)
        monkeypatch.setattr(sqlite3, "connect", lambda path, **_: Connection(path, disk, pragmas or {}))
        return disk

    yield use
    for disk in disks:
        disk.unregister()


def image_after_power_loss(log: list[Change], dice: random.Random) -> dict[str, bytearray]:
    """Return what the files may hold: what was synced, and of the rest any part in any order, also torn."""
    files: dict[str, bytearray] = {}
    last_sync = {file: at for at, (what, file, _, _) in enumerate(log) if what == "sync"}
    for at, (what, file, number, data) in enumerate(log):
        content = files.setdefault(file, bytearray())
        if at > last_sync.get(file, -1) and what in ("write", "truncate"):
            luck = dice.random()
            if luck < 0.4:
                continue
            if luck < 0.6:
                data = data[: 512 * dice.randrange(len(data) // 512 + 1)]
        if what == "write":
            content.extend(bytes(max(0, number - len(content))))
            content[number : number + len(data)] = data
        elif what == "truncate":
            del content[number:]
    return files


def lost_after_power_losses(disk: Disk, folder: Path, images: int) -> int:
    """Cut the power at random moments; return how often a reported outcome was not in the journal afterwards."""
    dice = random.Random(0)
    lost = 0
    for number in range(images):
        log = disk.log[: dice.randrange(1, len(disk.log) + 1)]
        image = folder / str(number)
        image.mkdir()
        for name, content in image_after_power_loss(log, dice).items():
            if name == "journal" or name == "journal-wal":
                (image / name).write_bytes(content)
        told = {file for what, file, _, _ in log if what == "told"}
        kept = set()
        if (image / "journal").exists():
            store.open_for_writing(image / "journal").close()  # recovers it, and refuses a damaged one
            executions = read_journal(image / "journal")
            attempts = executions[0].attempts if executions else ()
            kept = {attempt.task_id for attempt in attempts if attempt.status == "succeeded"}
            assert all(json.loads(a.content or "")["output"] for a in attempts if a.status == "succeeded")
        lost += not told <= kept
        shutil.rmtree(image)
    return lost


@pytest.mark.parametrize(("synchronous", "is_lossy"), [("FULL", False), ("NORMAL", True)])
def test_no_loss_of_power_loses_an_outcome_that_was_reported(
    fast_folder: Path, use_disk: Callable[..., Disk], synchronous: str, is_lossy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = use_disk({"PRAGMA synchronous = FULL": f"PRAGMA synchronous = {synchronous}"})
    diary: Any = DiskDiary(disk)
    anyio.run(run_group, fast_folder / "journal", diary)
    assert len(diary.told) == SUCCESSES
    monkeypatch.undo()
    lost = lost_after_power_losses(disk, fast_folder, IMAGES)
    assert (lost > 0) is is_lossy  # the weaker mode shows that the images can show a loss


@pytest.mark.parametrize("error", [apsw.FullError, apsw.IOError])
@pytest.mark.parametrize("fails_for_ever", [True, False])
def test_a_disk_that_fails_at_any_write_loses_nothing_that_was_reported(
    fast_folder: Path,
    use_disk: Callable[..., Disk],
    error: type[Exception],
    fails_for_ever: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = 0
    for number in count(1):
        disk = use_disk()
        disk.fail_at, disk.fails_for_ever, disk.error = number, fails_for_ever, error
        diary: Any = DiskDiary(disk)
        path = fast_folder / str(number) / "journal"
        path.parent.mkdir()
        outcomes: dict[str, tuple[str, float]] = {}
        try:
            with suppress(JournalError):
                outcomes = anyio.run(run_group, path, diary, backend=BACKENDS[number % len(BACKENDS)])
        finally:
            monkeypatch.undo()
        refused += len(diary.told) < SUCCESSES
        assert diary.told == {task_id for task_id, (status, _) in outcomes.items() if status == "succeeded"}
        executions = read_journal(path)
        attempts = executions[0].attempts if executions else ()
        assert diary.told <= {attempt.task_id for attempt in attempts if attempt.status == "succeeded"}
        again = anyio.run(run_group, path, diary)
        assert {task_id: status for task_id, (status, _) in again.items()} == {
            task_id: expected_status(task_id) for task_id in again
        }
        shutil.rmtree(path.parent)
        if next(disk._changes) <= number:
            break
    assert refused > 0
    assert number > 50


@pytest.mark.parametrize(("limit", "starts_at_all"), [(100_000, True), (6_000, False)])
def test_a_full_disk_stops_the_run_with_a_clear_error_and_nothing_recorded_is_lost(
    fast_folder: Path, limit: int, starts_at_all: bool
) -> None:
    path, diary_path = fast_folder / "journal", fast_folder / "diary"
    program = f"""
import resource, sys
from pathlib import Path
sys.path[:0] = {[str(Path(__file__).parent), *filter(None, sys.path)]!r}
import anyio
from crashing import Diary, run_group
diary = Diary(Path({str(diary_path)!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
anyio.run(run_group, Path({str(path)!r}), diary)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    diary = crashing.Diary(diary_path)
    told = [line for line in diary.lines() if line[0] == "told"]
    assert any(line[0] == "ran" for line in diary.lines()) is starts_at_all
    assert (done.returncode == 0) is starts_at_all
    if starts_at_all:
        assert {line[2] for line in told} == {"succeeded", "failed"}
        succeeded = {line[1] for line in told if line[2] == "succeeded"}
        assert 0 < len(succeeded) < SUCCESSES
        assert succeeded <= {a.task_id for a in read_journal(path)[0].attempts if a.status == "succeeded"}
    else:
        assert "JournalError: Journal" in done.stderr
        assert "cannot be used: disk I/O error" in done.stderr
    again = anyio.run(run_group, path, diary)
    assert Counter(status for status, _ in again.values()) == {"succeeded": SUCCESSES, "failed": 8}
