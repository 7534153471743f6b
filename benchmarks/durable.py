"""What a journal costs in real time, and how fast a run is resumed: ``python benchmarks/durable.py``.

The file lies in the folder for temporary files, or where ``--folder`` says: what a commit costs depends on the disk.
The peer is what one writes at first: two commits for each agent, each in a thread, one after another.
"""

import argparse
import platform
import sqlite3
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from parallel_agents import (
    AgentAssignment,
    AgentEngine,
    AgentIdentity,
    FunctionEngine,
    ParallelExecutionGroup,
    ParallelExecutor,
    Task,
    Usage,
    current_run,
)
from parallel_agents.engines.journal import JournaledEngine
from parallel_agents.journals.sqlite import SqliteJournal

AT_ONCE = 100
BACKENDS = ("asyncio", "trio")


async def instant(_: AgentAssignment) -> str:
    current_run().record_usage(Usage(requests=1))
    await anyio.lowlevel.checkpoint()
    return "done"


async def slow(_: AgentAssignment) -> str:
    current_run().record_usage(Usage(requests=1))
    await anyio.sleep(1)
    return "done"


class TwoCommits:
    """An agent whose start and end are committed by themselves."""

    def __init__(self, path: Path) -> None:
        self.limiter = anyio.CapacityLimiter(1)
        self.database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        for statement in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", "CREATE TABLE done (id, what)"):
            self.database.execute(statement)

    def keep(self, task_id: str, what: str) -> None:
        self.database.execute("INSERT INTO done VALUES (?, ?)", (task_id, what))

    async def __call__(self, assignment: AgentAssignment) -> str:
        await anyio.to_thread.run_sync(self.keep, assignment.task_id, "started", limiter=self.limiter)
        result = await instant(assignment)
        await anyio.to_thread.run_sync(self.keep, assignment.task_id, result, limiter=self.limiter)
        return result


def seconds(engine: AgentEngine, count: int, backend: str) -> float:
    tasks = [Task(id=f"t{number}") for number in range(count)]
    group = ParallelExecutionGroup.map("g", AgentIdentity(id="a"), tasks, max_concurrency=AT_ONCE)

    async def program() -> float:
        before = time.perf_counter()
        assert (await ParallelExecutor(engine=engine).execute_group(group)).all_succeeded
        return time.perf_counter() - before

    return anyio.run(program, backend=backend)


def journaled_seconds(
    agent: Callable[[AgentAssignment], Awaitable[Any]], path: Path, count: int, backend: str
) -> float:
    with SqliteJournal(path) as journal:
        return seconds(JournaledEngine(FunctionEngine(agent), journal), count, backend)


def commit_milliseconds(folder: Path) -> float:
    peer = TwoCommits(folder / "commits")
    before = time.perf_counter()
    for _ in range(50):
        peer.keep("t", "x")
    peer.database.close()
    return (time.perf_counter() - before) / 50 * 1e3


def verdict(text: str, value: float, aim: float, unit: str) -> None:
    print(f"  {'met   ' if value <= aim else 'MISSED'}  {text}: {value:.3g} {unit}, aim {aim:g}")


def measure(folder: Path, backend: str, count: int, rounds: int) -> None:
    plain = min(seconds(FunctionEngine(instant), count, backend) for _ in range(rounds))
    first = min(journaled_seconds(instant, folder / f"{backend}-{n}", count, backend) for n in range(rounds))
    again = min(journaled_seconds(instant, folder / f"{backend}-{n}", count, backend) for n in range(rounds))
    few = count // 10
    peer = TwoCommits(folder / f"{backend}-peer")
    naive = seconds(FunctionEngine(peer), few, backend) / few - plain / count
    peer.database.close()
    cost = (first - plain) / count
    print(f"  {backend:8} per agent: {plain / count * 1e6:.1f} us, with a journal {first / count * 1e6:.1f} us")
    ratio = naive / cost
    print(
        f"  {backend:8} two commits for each agent cost {naive * 1e6:.0f} us, {ratio:.1f} times as much as the journal"
    )
    verdict(f"{backend}: journal per agent, {AT_ONCE} at once", cost * 1e6, 150, "us")
    verdict(f"{backend}: resume of {count:,} finished assignments", again, 1, "s")
    bare = min(seconds(FunctionEngine(slow), 5 * AT_ONCE, backend) for _ in range(rounds))
    recorded = min(journaled_seconds(slow, folder / f"{backend}-slow-{n}", 5 * AT_ONCE, backend) for n in range(rounds))
    verdict(f"{backend}: journal of agents of one second, {AT_ONCE} at once", (recorded / bare - 1) * 100, 1, "%")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to be measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        print(f"CPython {platform.python_version()}, SQLite {sqlite3.sqlite_version}; ", end="")
        print(f"a commit takes {commit_milliseconds(folder):.2f} ms here")
        for backend in BACKENDS:
            measure(folder, backend, options.count, options.rounds)


if __name__ == "__main__":
    main()
