"""A program that is killed again and again while it writes a journal; run as ``python crashing.py FOLDER``.

It forks one process per run, so that four hundred of them take seconds. Prints what it tried as JSON; exits with 1 and
the reason when a promise was broken.
"""

import json
import os
import signal
import sqlite3
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    FunctionEngine,
    ParallelExecutionGroup,
    ParallelExecutor,
    Task,
    Usage,
    current_run,
)
from parallel_agents.engines.journal import JournaledEngine
from parallel_agents.engines.retry import RetryEngine, RetryPolicy
from parallel_agents.journals.sqlite import RecordedAttempt, SqliteJournal, read_journal

AGENTS = 40
CONCURRENCY = 4
TRIES_AT_MOST = 2
BACKENDS = [backend for backend in ("asyncio", "trio") if find_spec(backend) is not None]


def expected_status(task_id: str) -> str:
    """Every fifth agent fails for good, every fifth at its first try only."""
    return "failed" if int(task_id[1:]) % 5 == 0 else "succeeded"


class Diary:
    """What really happened, in a file that a kill does not touch; a line for each event."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def note(self, *words: object) -> None:
        os.write(self._file, (" ".join(map(str, words)) + "\n").encode())

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.path.read_text().splitlines()]


async def run_group(journal_path: Path, diary: Diary) -> dict[str, tuple[str, float]]:
    """Run the group with its journal; return each task's status and cost."""

    async def agent(assignment: AgentAssignment) -> str:
        run, task_id = current_run(), assignment.task_id
        diary.note("ran", task_id)
        for _ in range(2):
            diary.note("spent", task_id)
            run.record_usage(Usage(cost=1.0))
            await anyio.lowlevel.checkpoint()
        number = int(task_id[1:])
        if number % 5 == 0:
            raise ValueError("always")
        if number % 5 == 1 and run.attempt == 1:
            raise OSError("the first time")
        return f"output of {task_id}"

    policy = RetryPolicy(retry_on=OSError, attempts=TRIES_AT_MOST, initial_wait_seconds=0, jitter_seconds=0)
    group = ParallelExecutionGroup.map(
        "g", AgentIdentity(id="a"), [Task(id=f"t{n}") for n in range(AGENTS)], max_concurrency=CONCURRENCY
    )
    with SqliteJournal(journal_path) as journal:
        engine = JournaledEngine(RetryEngine(FunctionEngine(agent), policy), journal)
        async with ParallelExecutor(engine=engine).open_group(group) as run:
            async for outcome in run:
                diary.note("told", outcome.task_id, outcome.status.value, outcome.usage.cost)
    for outcome in run.result.outcomes:
        assert outcome.output in (None, f"output of {outcome.task_id}")
    return {outcome.task_id: (outcome.status.value, outcome.usage.cost) for outcome in run.result.outcomes}


def kill_at(number: int) -> None:
    """Let this process be killed before its *number*-th statement to SQLite, or right after its commit."""
    seen = count(1)

    def die_if_it_is_time() -> None:
        if next(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            die_if_it_is_time()
            cursor = super().execute(sql, *parameters)
            if sql == "COMMIT":
                die_if_it_is_time()
            return cursor

    connect = sqlite3.connect
    sqlite3.connect = lambda *args, **options: connect(*args, factory=Connection, **options)  # type: ignore[assignment]


def in_a_child(function: Callable[[], object]) -> int:
    """Run *function* in a process of its own; return its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check(journal_path: Path, diary: Diary, recorded: dict[str, float], result: dict[str, tuple[str, float]]) -> int:
    """Hold what came of a killed and a second run against the promises; return how many agents ran twice."""
    lines = diary.lines()
    restart = lines.index(["restarted"])
    first, second = lines[:restart], lines[restart:]
    assert {task_id: status for task_id, (status, _) in result.items()} == {
        f"t{n}": expected_status(f"t{n}") for n in range(AGENTS)
    }
    told = {line[1]: float(line[3]) for line in first if line[0] == "told" and line[2] == "succeeded"}
    assert set(told) <= set(recorded), "a success was told before it was recorded"
    ran_again = {line[1] for line in second if line[0] == "ran"}
    assert not ran_again & set(recorded), "a recorded success ran again"
    for task_id, cost in recorded.items():
        assert result[task_id][1] == cost, "what a success had cost was forgotten"

    attempts = read_journal(journal_path)[0].attempts
    costs = costs_of(attempts)
    assert {task_id: cost for task_id, (_, cost) in result.items()} == costs, "the usage does not add up"
    spent = Counter(line[1] for line in lines if line[0] == "spent")
    assert all(costs[task_id] <= spent[task_id] for task_id in costs), "more was recorded than spent"
    successes = Counter(attempt.task_id for attempt in attempts if attempt.status == "succeeded")
    assert set(successes.values()) == {1}, "a task has two successes"
    database = sqlite3.connect(journal_path)
    assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    database.close()
    return len(ran_again & {line[1] for line in first if line[0] == "ran"})


def costs_of(attempts: Iterable[RecordedAttempt]) -> dict[str, float]:
    costs: defaultdict[str, float] = defaultdict(float)
    for attempt in attempts:
        costs[attempt.task_id] += attempt.usage.cost
    return costs


def successes_in(journal_path: Path) -> dict[str, float]:
    """Return what each recorded success has cost, all its starts together."""
    executions = read_journal(journal_path) if journal_path.exists() else ()
    attempts = executions[0].attempts if executions else ()
    costs = costs_of(attempts)
    return {attempt.task_id: costs[attempt.task_id] for attempt in attempts if attempt.status == "succeeded"}


def kill_and_resume(folder: Path, number: int) -> int | None:
    """Kill a run at one point, and run it again; return how many agents ran twice, or None if it was not killed."""
    journal_path, answer = folder / "journal", folder / "answer.json"
    diary = Diary(folder / "diary")
    backend = BACKENDS[number % len(BACKENDS)]

    def first() -> None:
        kill_at(number)
        anyio.run(run_group, journal_path, diary, backend=backend)

    def second() -> None:
        diary.note("restarted")
        answer.write_text(json.dumps(anyio.run(run_group, journal_path, diary, backend=backend)))

    code = in_a_child(first)
    if code == 0:
        return None
    assert code == -signal.SIGKILL, f"ended with {code}"
    read = folder / "recorded.json"
    assert in_a_child(lambda: read.write_text(json.dumps(successes_in(journal_path)))) == 0
    recorded: dict[str, float] = json.loads(read.read_text())
    assert in_a_child(second) == 0
    result = {task_id: (status, cost) for task_id, (status, cost) in json.loads(answer.read_text()).items()}
    return check(journal_path, diary, recorded, result)


def main() -> None:
    base = Path(sys.argv[1])
    ran_twice = 0
    for number in count(1):
        folder = base / str(number)
        folder.mkdir()
        try:
            again = kill_and_resume(folder, number)
        except AssertionError as error:
            sys.exit(f"kill point {number}: {error}")
        if again is None:
            break
        assert again <= AGENTS // 5 + CONCURRENCY, f"kill point {number}: {again} agents ran twice"
        ran_twice += again
    sys.stdout.write(json.dumps({"kill_points": number - 1, "ran_twice": ran_twice}))


if __name__ == "__main__":
    main()
