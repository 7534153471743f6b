"""An exception at every source line of the executor, the claims and the locks, with what follows from it.

It stands for a Ctrl-C without a handler, and for memory that runs out: no lock may be left held, no task alive, no
place of a limiter taken, and a run that was opened has an outcome for each assignment.
"""

import gc
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import anyio
import pytest
from scenarios import Scenario, scenarios

from parallel_agents import InMemoryResourceLock, ParallelExecutionError
from parallel_agents._run import GroupRun
from parallel_agents.testing.stepping import Backend, installed_backends, run_in_virtual_time
from proof.lines import Line, Recorder, Tripwire
from proof.tally import Proof

SCENARIOS: dict[str, Callable[[], Scenario]] = {
    "claims": scenarios()["plain"],
    "limiter and waiting": scenarios()["waiting"],
    "timeouts": scenarios()["timeouts"],
}

CANNOT_HOLD = {
    "admission.Admission.take": "between taking the last one and noting so; an IndexError is told beside the exception",
    "drive.drive": "an agent that is struck between two of its steps is closed only when its outcome is let go",
    "memory.InMemoryResourceLock._wait": "a wait that was just over may stay in the lock's statistics",
}
"""Functions with lines at which something may be left undone, and why."""

LINES_AT_MOST = 8
"""So many such lines there are. If this grows, find out why."""


class Struck:
    """One run with an exception at one line, or with none."""

    def __init__(self, scenario: Scenario, lines: Recorder) -> None:
        self.scenario = scenario
        self.lines = lines
        self.lock = InMemoryResourceLock()
        self.runs: list[GroupRun[Any]] = []
        self.left_tasks: list[str] = []
        self.borrowed = 0

    async def program(self) -> None:
        if self.scenario.waits:
            assert await self.lock.acquire("outside", "outsider")
        executor = self.scenario.executor(self.lock)
        before = {task.id for task in anyio.get_running_tasks()}
        try:
            with anyio.fail_after(500), self.lines.armed():
                async with executor.open_group(self.scenario.group()) as run:
                    self.runs.append(run)
        finally:
            self.scenario.is_over = True
            self.left_tasks = [str(task.name) for task in anyio.get_running_tasks() if task.id not in before]
            limiter = executor._settings.limiter
            self.borrowed = 0 if limiter is None else limiter.borrowed_tokens

    def problems(self, backend: Backend, exception: type[BaseException]) -> list[str]:
        """Run, and return what is wrong afterwards."""
        try:
            run_in_virtual_time(self.program, backend)
        except BaseException as error:
            kinds = {type(leaf).__name__ for leaf in causes(error)} - {exception.__name__, "ParallelExecutionError"}
            found = [f"raised {', '.join(kinds)}"] if kinds else []
        else:
            found = ["the exception was swallowed"] if self._is_swallowed(exception) else []
        return found + list(self._left())

    def _is_swallowed(self, exception: type[BaseException]) -> bool:
        """Whether it is neither raised nor told in an outcome."""
        outcomes = self.runs[0].result.outcomes
        return isinstance(self.lines, Tripwire) and not any(isinstance(o.exception, exception) for o in outcomes)

    def _left(self) -> Iterator[str]:
        statistics = self.lock.statistics()
        if {held.holder for held in statistics.held} - {"outsider"}:
            yield "a lock is held"
        if statistics.waiting or len(self.lock._queue._noted) > self.scenario.waits:
            yield "somebody waits for a lock"
        if self.left_tasks or self.scenario.touched_after_the_end:
            yield "a task is alive"
        if self.borrowed:
            yield "a place of the limiter is taken"
        if sorted(self.scenario.started) != sorted(self.scenario.closed):
            yield "an agent was not closed"
        for run in self.runs:
            if run.progress.in_progress:
                yield "an agent counts as running"
            with suppress(RuntimeError):
                outcomes = run.result.outcomes
                if [outcome.task_id for outcome in outcomes] == [str(n) for n in range(len(self.scenario.behaviours))]:
                    continue
            yield "outcomes are missing"


def causes(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from causes(inner)
    else:
        yield error
        if isinstance(error, ParallelExecutionError) and error.__cause__ is not None:
            yield from causes(error.__cause__)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.proves("X1", "X7", "X11", "L4")
@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("exception", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("backend", installed_backends())
def test_an_exception_at_any_line_leaves_nothing_undone(
    backend: Backend, exception: type[BaseException], name: str, proof: Proof
) -> None:
    tally = proof.tally("an exception at every line of the executor, the claims and the locks")
    recorder = Recorder()
    assert Struck(SCENARIOS[name](), recorder).problems(backend, exception) == []
    stride = proof.size(few=12, short=3, long=1)
    first = (len(name) + len(exception.__name__) + len(backend)) % stride  # so that others take the lines between
    turns = proof.size(few=1, short=1, long=40)
    found: defaultdict[Line, set[str]] = defaultdict(set)
    for line, times in tuple(recorder.passed.items())[first::stride]:
        for turn in range(1, min(times, turns) + 1):
            tally.runs += 1
            wire = Tripwire(line=line, turn=turn, exception=exception)
            for problem in Struck(SCENARIOS[name](), wire).problems(backend, exception):
                found[line].add(problem)
    gc.collect()  # agents that were not closed are closed now, and what they say to it is not told to the next test
    unexpected = {str(line): problems for line, problems in found.items() if line.function not in CANNOT_HOLD}
    tally.violations += len(unexpected)
    assert unexpected == {}
    assert len(found) <= LINES_AT_MOST
