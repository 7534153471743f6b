"""The lock in a file: what processes do to each other, also when they are killed or stand still."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from anyio import wait_all_tasks_blocked
from groups import assignment

from parallel_agents import (
    AgentAssignment,
    ClaimPolicy,
    OutcomeStatus,
    ParallelExecutionGroup,
    ParallelExecutor,
    ResourceClaim,
    ResourceConflictError,
)
from parallel_agents.locks import file as file_module
from parallel_agents.locks.file import FileResourceLock

CLAIMS = (ResourceClaim(resource="r"),)

HOLDER = """
import sys, anyio
from parallel_agents import ResourceClaim
from parallel_agents.locks.file import FileResourceLock

async def main():
    lock = FileResourceLock(sys.argv[1])
    lease = await lock.acquire_claims([ResourceClaim(resource="r")], sys.argv[2])
    print(lease.fencing_token, flush=True)
    sys.stdin.readline()
    await lease.release()
    print("released", lease.lost.is_set(), flush=True)

anyio.run(main)
"""

WRITER = """
import sys, anyio
from parallel_agents import ResourceClaim
from parallel_agents.locks.file import FileResourceLock

async def main():
    lock = FileResourceLock(sys.argv[1])
    lease = await lock.acquire_claims([ResourceClaim(resource="r")], sys.argv[2])
    print(lease.fencing_token, flush=True)
    for line in sys.stdin:  # asked to write: with its token, as a store wants it
        print(lease.fencing_token, line.strip(), flush=True)

anyio.run(main)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "locks"


@pytest.fixture
def lock(folder: Path) -> Iterator[FileResourceLock]:
    lock = FileResourceLock(folder)
    yield lock
    lock.close()


def start(program: str, folder: Path, holder: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder), holder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


@pytest.mark.anyio
async def test_nothing_stays_locked_when_holders_are_killed(lock: FileResourceLock, folder: Path) -> None:
    for number in range(50):
        process = start(HOLDER, folder, f"holder {number}")
        try:
            assert line_of(process).isdigit()
            assert lock.holder_of("r") == f"holder {number}"
        finally:
            end(process)
        with anyio.fail_after(10):
            lease = await lock.acquire_claims(CLAIMS, "next", timeout_seconds=0)
        await lease.release()
    assert lock.statistics().held == ()
    assert len(list(folder.glob("session-*"))) == 1


@pytest.mark.anyio
async def test_one_process_waits_for_another_in_the_order_of_arrival(lock: FileResourceLock, folder: Path) -> None:
    process = start(HOLDER, folder, "other")
    try:
        line_of(process)
        with pytest.raises(ResourceConflictError, match="'other'"):
            await lock.acquire_claims(CLAIMS, "here", timeout_seconds=0.01)
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lock.acquire_claims, CLAIMS, "here")
                while not lock.statistics().waiting:
                    await anyio.to_thread.run_sync(lock.statistics)
                assert lock.statistics().waiting[0].holder == "here"
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
        assert line_of(process) == "released False"
        assert lock.holder_of("r") == "here"
    finally:
        end(process)


class CheckedStore:
    """A resource that refuses what comes with an older token than it has seen."""

    def __init__(self) -> None:
        self.highest = 0
        self.written: list[str] = []

    def write(self, token: int, text: str) -> bool:
        if token < self.highest:
            return False
        self.highest = token
        self.written.append(text)
        return True


@pytest.mark.anyio
async def test_a_holder_that_stood_still_comes_back_with_a_token_that_is_refused(
    lock: FileResourceLock, folder: Path
) -> None:
    store = CheckedStore()
    process = start(WRITER, folder, "paused")
    try:
        assert store.write(int(line_of(process)), "before the pause")
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(ResourceConflictError):  # it is alive, so nothing is taken from it by itself
            await lock.acquire_claims(CLAIMS, "here", timeout_seconds=0)
        assert await lock.release_all("paused") == 1
        with anyio.fail_after(10):
            lease = await lock.acquire_claims(CLAIMS, "here")
        assert store.write(lease.fencing_token, "by the next")
        process.send_signal(signal.SIGCONT)
        assert process.stdin is not None
        process.stdin.write("late\n")
        process.stdin.flush()
        token, text = line_of(process).split()
        assert not store.write(int(token), text)
    finally:
        process.send_signal(signal.SIGCONT)
        end(process)
    assert store.written == ["before the pause", "by the next"]


@pytest.mark.anyio
async def test_an_agent_whose_claims_somebody_took_away_is_cancelled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_module, "LOST_CHECK_SECONDS", 0.001)
    mine, others = FileResourceLock(folder), FileResourceLock(folder)
    group = ParallelExecutionGroup(
        group_id="g",
        assignments=[assignment(0, resource_claims=("r",)), assignment(1, resource_claims=("s",))],
        claim_policy=ClaimPolicy.WAIT,
    )
    ended = anyio.Event()

    async def agent(task: AgentAssignment) -> None:
        if task.task_id == "t1":
            await ended.wait()
            return
        holder = others.holder_of("r")
        assert holder is not None
        assert await others.release_all(holder) == 1
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    with anyio.fail_after(20):
        result = await ParallelExecutor(engine=agent, resource_lock=mine).execute_group(group)
    assert [o.status for o in result.outcomes] == [OutcomeStatus.FAILED, OutcomeStatus.SUCCEEDED]
    assert "'r'" in str(result.outcomes[0].error)
    mine.close()
    others.close()


@pytest.mark.anyio
async def test_one_that_is_cancelled_at_any_moment_leaves_nothing_in_line(lock: FileResourceLock) -> None:
    held = await lock.acquire_claims(CLAIMS, "holder")
    for checkpoints in range(8):
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lock.acquire_claims, CLAIMS, f"cancelled {checkpoints}")
                for _ in range(checkpoints):
                    await anyio.lowlevel.checkpoint()
                if checkpoints == 7:
                    await wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
        assert lock.statistics().waiting == ()
    await held.release()
    assert lock.statistics().held == ()


@pytest.mark.anyio
async def test_two_groups_of_two_locks_keep_out_of_each_others_claims(folder: Path) -> None:
    inside: set[str] = set()

    async def agent(task: AgentAssignment) -> None:
        wanted = {claim.resource for claim in task.resource_claims}
        assert not wanted & inside
        inside.update(wanted)
        await anyio.to_thread.run_sync(lambda: None)
        inside.difference_update(wanted)

    locks = [FileResourceLock(folder) for _ in range(2)]
    group = ParallelExecutionGroup(
        group_id="g",
        assignments=[assignment(n, resource_claims=(f"r{n % 3}", f"r{(n + 1) % 3}")) for n in range(6)],
        claim_policy=ClaimPolicy.WAIT,
    )
    results = []

    async def run(lock: FileResourceLock) -> None:
        results.append(await ParallelExecutor(engine=agent, resource_lock=lock).execute_group(group))

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            for lock in locks:
                tasks.start_soon(run, lock)
    assert [result.all_succeeded for result in results] == [True, True]
    for lock in locks:
        lock.close()


def test_a_folder_is_opened_by_one_process_after_another(folder: Path) -> None:
    """SQLite does not wait for others where a file gets its journal mode, but fails."""
    folder.mkdir()
    with (folder / "opening").open("w") as opening, ThreadPoolExecutor(1) as threads:
        fcntl.flock(opening, fcntl.LOCK_EX)
        lock = FileResourceLock(folder)
        opened = threads.submit(lock.open)
        with pytest.raises(TimeoutError):
            opened.result(timeout=0.2)
        fcntl.flock(opening, fcntl.LOCK_UN)
        opened.result(timeout=20)
    assert lock.statistics().held == ()
    lock.close()


def test_the_files_are_private_and_a_lock_can_be_opened_again(folder: Path) -> None:
    lock = FileResourceLock(folder)
    lock.open()
    lock.open()
    assert repr(lock) == f"FileResourceLock({str(folder)!r})"
    assert folder.stat().st_mode & 0o777 == 0o700
    lock.close()
    lock.close()
    assert not lock.is_locked("r")
    lock.close()


def test_a_folder_that_cannot_be_used_is_an_error(folder: Path) -> None:
    folder.parent.joinpath("locks").write_text("a file")
    with pytest.raises(FileExistsError):
        FileResourceLock(folder).open()
