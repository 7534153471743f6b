"""The live display: what it draws of real groups on a console that records, and the screen of a real terminal."""

import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

pytest.importorskip("rich")
pytest.importorskip("cyclopts")
pytest.importorskip("pyte")

import pyte
from rich.cells import cell_len
from rich.console import Console
from test_display import HOSTILE, steers_a_terminal

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    ClaimPolicy,
    ParallelExecutionGroup,
    ParallelExecutor,
    Task,
    Usage,
    current_run,
)
from parallel_agents._display import make_console
from parallel_agents._live import LINGER_SECONDS, ROWS, LiveDisplay
from parallel_agents._words import harmless
from parallel_agents.events import CHAT_REQUEST_RETRY, TOOL_INVOKE_START, TOOL_INVOKE_SUCCESS
from parallel_agents.testing import Act, ScriptedEngine


def assignment(name: str, **fields: Any) -> AgentAssignment:
    return AgentAssignment(identity=AgentIdentity(id=f"agent-{name}"), task=Task(id=f"task-{name}"), **fields)


def group_of(*assignments: AgentAssignment, **options: Any) -> ParallelExecutionGroup:
    return ParallelExecutionGroup(group_id="group", assignments=assignments, **options)


class Drawing:
    """A live display on a console that records, with a clock that is set by hand."""

    def __init__(self, width: int = 120, height: int = 25) -> None:
        self.now = 0.0
        self.console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
        self.display = LiveDisplay(self.console, lambda: self.now)

    def lines(self) -> list[str]:
        with self.console.capture() as capture:
            self.console.print(self.display.render())
        return [line.rstrip() for line in capture.get().splitlines()]

    def rows(self) -> list[str]:
        """Return what stands below the sums and the names of the columns, blanks folded."""
        return [" ".join(line.split()) for line in self.lines()[4:]]

    async def run(self, engine: Any, group: ParallelExecutionGroup) -> None:
        async with ParallelExecutor(engine=engine, observers=[self.display]).open_group(group) as run:
            async for outcome in run:
                self.display.on_outcome(outcome)


@pytest.mark.anyio
async def test_it_shows_who_runs_who_ended_and_the_sums() -> None:
    drawing = Drawing()
    gate = anyio.Event()
    engine = ScriptedEngine(
        {
            "task-a": Act(wait_for=gate, usage=Usage(input_tokens=100, output_tokens=20, requests=2, cost=0.25)),
            "task-b": Act(error=ValueError("two\nlines")),
            "task-c": Act(usage=Usage(input_tokens=5, cost=0.5)),
        }
    )
    assert drawing.lines() == [""]
    async with anyio.create_task_group() as tasks:
        group = group_of(*[assignment(name) for name in "abcd"], max_concurrency=2)
        tasks.start_soon(drawing.run, engine, group)
        await engine.until(lambda engine: engine.in_flight == ("task-a",) and len(engine.calls) == 4)
        await anyio.wait_all_tasks_blocked()
        drawing.now = 60.0
        head, states, pace, names, *_ = drawing.lines()
        assert head.startswith("group ")
        assert head.endswith(" 3/4")
        assert states == "2 succeeded, 1 failed, 1 running, 0 waiting"
        assert pace == "60.0 s, 3 a minute, about 20.0 s left, 125 tokens, cost 0.75"
        assert names.split() == ["state", "agent", "task", "time", "turns", "tokens", "cost"]
        assert drawing.rows() == [
            "failed agent-b task-b 0.0 s ValueError: two lines",
            "succeeded agent-c task-c 0.0 s 5 0.5",
            "succeeded agent-d task-d 0.0 s",
            "running agent-a task-a 60.0 s 2 120 0.25",
        ]
        gate.set()


@pytest.mark.anyio
async def test_it_tells_what_agents_wait_for_and_do() -> None:
    drawing = Drawing()
    seen: dict[str, str] = {}

    async def agent(task: AgentAssignment) -> None:
        run = current_run()

        async def look(what: str) -> None:
            await anyio.lowlevel.checkpoint()
            await anyio.wait_all_tasks_blocked()
            seen[what] = "\n".join(drawing.rows())

        if task.task_id == "task-b":
            return
        await look("claim")
        with run.not_charged():
            await look("limit")
        run.emit(TOOL_INVOKE_START, tool="search\x1b[2J", tool_call_id="1")
        await look("tool")
        run.emit(TOOL_INVOKE_SUCCESS, tool="search", tool_call_id="1", duration_seconds=1.0)
        run.emit(CHAT_REQUEST_RETRY, attempt=1, wait_seconds=3.0, error="503\nbusy")
        await look("retry")

    claims = {"resource_claims": ("the file",)}
    await drawing.run(
        agent, group_of(assignment("a", **claims), assignment("b", **claims), claim_policy=ClaimPolicy.WAIT)
    )
    assert seen["claim"].splitlines() == [
        "running agent-a task-a 0.0 s",
        "waiting agent-b task-b 0.0 s for agent-a: the file",
    ]
    assert "waiting agent-a task-a 0.0 s for a limit that it shares with others" in seen["limit"]
    assert r"running agent-a task-a 0.0 s calls search\x1b[2J" in seen["tool"]
    assert "running agent-a task-a 0.0 s tries again in 3.0 s: 503 busy" in seen["retry"]
    assert [row.split()[:2] for row in drawing.rows()] == [["succeeded", "agent-a"], ["succeeded", "agent-b"]]


@pytest.mark.anyio
async def test_an_agent_that_gave_up_waiting_has_ended() -> None:
    drawing = Drawing()
    gate = anyio.Event()
    engine = ScriptedEngine({"task-a": Act(wait_for=gate)})
    claims = {"resource_claims": ("r",)}
    group = group_of(assignment("a", **claims), assignment("b", **claims), claim_policy=ClaimPolicy.WAIT)
    async with ParallelExecutor(engine=engine, observers=[drawing.display]).open_group(group) as run:
        await engine.until(lambda engine: bool(engine.in_flight))
        await anyio.wait_all_tasks_blocked()
        assert drawing.rows()[1] == "waiting agent-b task-b 0.0 s for agent-a: r"
        run.cancel_task("task-b")
        async for outcome in run:
            drawing.display.on_outcome(outcome)
            break
        told = "Cancelled before it started: cancel_task() was called"
        assert drawing.rows()[1] == f"cancelled agent-b task-b 0.0 s {told}"
        gate.set()


@pytest.mark.anyio
async def test_rows_keep_their_place_and_those_that_ended_linger() -> None:
    drawing = Drawing(height=10)  # with room for five
    gates = [anyio.Event() for _ in range(1000)]
    engine = ScriptedEngine({f"task-{n}": Act(wait_for=gates[n]) for n in range(1000)})
    group = group_of(*[assignment(str(n)) for n in range(1000)])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(drawing.run, engine, group)
        await engine.until(lambda engine: len(engine.in_flight) == 1000)
        first = drawing.rows()
        assert [row.split()[1] for row in first[:-1]] == [call.agent_id for call in engine.calls[:5]]
        assert first[-1] == "... and 995 more running or waiting"
        assert len(drawing.lines()) <= 10
        shown = [row.split()[1] for row in first[:-1]]
        ended = engine.calls[1].agent_id
        gates[int(ended.partition("-")[2])].set()
        await engine.until(lambda engine: len(engine.in_flight) == 999)
        await anyio.wait_all_tasks_blocked()
        later = drawing.rows()
        assert [row.split()[1] for row in later[:-1]] == shown
        assert later[1].startswith(f"succeeded {ended}")
        drawing.now += LINGER_SECONDS
        after = [row.split()[1] for row in drawing.rows()[:-1]]
        assert after == [shown[0], engine.calls[5].agent_id, *shown[2:]]
        for gate in gates:
            gate.set()
    assert len(drawing.rows()) == 5


@pytest.mark.anyio
async def test_a_large_terminal_shows_no_more_than_a_dozen() -> None:
    drawing = Drawing(height=100)
    await drawing.run(ScriptedEngine(), group_of(*[assignment(str(n)) for n in range(50)]))
    assert len(drawing.rows()) == ROWS


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("width", "names"),
    [
        (200, ["state", "agent", "task", "time", "turns", "tokens", "cost"]),
        (80, ["state", "agent", "task", "time", "tokens"]),
        (60, ["state", "agent", "task", "time"]),
        (40, ["state", "agent", "time"]),
        (20, ["state", "agent"]),
    ],
)
async def test_a_narrow_terminal_has_fewer_columns_and_no_line_is_broken(width: int, names: list[str]) -> None:
    drawing = Drawing(width=width)
    engine = ScriptedEngine({"task-a": Act(usage=Usage(input_tokens=1, requests=1, cost=1))})
    await drawing.run(engine, group_of(assignment("a"), assignment("b" * 100), assignment("字" * 100)))
    lines = drawing.lines()
    assert len(lines) == 4 + 3
    assert all(cell_len(line) <= width for line in lines)
    assert lines[3].split() == names
    assert lines[4].startswith("succeeded")


@pytest.mark.anyio
async def test_the_longest_texts_give_way_and_say_so() -> None:
    drawing = Drawing(width=60)

    async def fails(_: AgentAssignment) -> None:
        raise ValueError("no " * 100)

    await drawing.run(fails, ParallelExecutionGroup(group_id="g" * 100, assignments=[assignment("x" * 100)]))
    head, _, _, names, row = drawing.lines()
    assert head.split() == ["g" * 19 + "…", "━" * 15, "1/1"]
    assert names.split() == ["state", "agent", "task", "time"]
    state, agent, task, *_ = row.split()
    assert state == "failed"
    assert agent == "agent-" + "x" * (len(agent) - 7) + "…"
    assert task == "task-" + "x" * (len(task) - 6) + "…"
    assert abs(len(agent) - len(task)) <= 1
    assert len(row) == 60


@pytest.mark.anyio
@pytest.mark.proves("V2")
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
async def test_hostile_ids_and_errors_are_harmless(text: str) -> None:
    drawing = Drawing(width=200)
    shown: list[str] = []

    async def agent(task: AgentAssignment) -> None:
        current_run().emit(TOOL_INVOKE_START, tool=text, tool_call_id=text)
        shown.extend(drawing.lines())
        raise ValueError(text)

    identity, task = AgentIdentity(id=text), Task(id=text)
    group = ParallelExecutionGroup(group_id=text, assignments=[AgentAssignment(identity=identity, task=task)])
    await drawing.run(agent, group)
    shown += drawing.lines()
    assert not any(steers_a_terminal(line) for line in shown)
    assert len(shown) == 10
    assert harmless(text, 20)[:19] in shown[4]
    assert harmless(text, 20)[:19] in shown[-1]


class Terminal(io.StringIO):
    is_gone = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        if self.is_gone:
            raise OSError(5, "Input/output error")
        return super().write(text)


def test_a_terminal_that_went_away_does_not_disturb_the_run() -> None:
    terminal = Terminal()
    with LiveDisplay(make_console(terminal)) as display:
        terminal.is_gone = True
        display.say("something")
    with LiveDisplay(make_console(terminal)):
        pass


@pytest.mark.anyio
async def test_it_leaves_nothing_behind_but_what_was_said() -> None:
    drawing = Drawing()
    with drawing.display:
        await drawing.run(ScriptedEngine(), group_of(assignment("a")))
        drawing.display.say("Interrupted [/] {}")
    assert isinstance(drawing.console.file, io.StringIO)
    written = drawing.console.file.getvalue()
    assert "Interrupted [/] {}" in written
    assert "\x1b[?25h" in written  # the cursor is there again


# On a real terminal

AGENTS = """
from pathlib import Path
import anyio
from parallel_agents import Usage, current_run

async def waits(assignment):
    current_run().record_usage(Usage(input_tokens=700, output_tokens=77, requests=3, cost=0.125))
    while not Path("go").exists():
        await anyio.sleep(0.01)
    if assignment.task_id == "fails":
        raise ValueError("\\x1b[2Jevil")
"""

PLAN = """
group_id = "nightly"
engine = "agents_of_test_live:waits"
max_concurrency = 3
claim_policy = "wait"

[[assignments]]
agent = "ann"
task = { id = "fails" }

[[assignments]]
agent = "bob"
task = { id = "works" }
claims = ["the-file"]

[[assignments]]
agent = "cat"
task = { id = "works-later" }
claims = ["the-file"]
"""


class Screen:
    """A terminal emulator with the command line in it."""

    def __init__(self, folder: Path, columns: int, lines: int, *arguments: str) -> None:
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self._terminal, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR", "CI")}
        env = kept | {"TERM": "xterm-256color", "PYTHONPATH": str(folder)}
        command = [sys.executable, "-m", "parallel_agents", *arguments]
        self.process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end, env=env, cwd=folder)
        os.close(end)

    def until(self, condition: Callable[[str], object]) -> str:
        """Read what is written until the screen is as wanted, and return it."""
        last = time.monotonic() + 30
        while not condition(text := self.text()):
            assert time.monotonic() < last, text
            if select.select([self._terminal], [], [], 0.1)[0]:
                try:
                    data = os.read(self._terminal, 65536)
                except OSError:  # how a terminal says that the other end is closed
                    data = b""
                assert data or condition(text), text
                self._stream.feed(data)
        return text

    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)


@contextmanager
def on_a_screen(folder: Path, columns: int, lines: int) -> Iterator[Screen]:
    (folder / "agents_of_test_live.py").write_text(AGENTS)
    (folder / "plan.toml").write_text(PLAN)
    screen = Screen(folder, columns, lines, "run", "plan.toml")
    try:
        yield screen
    finally:
        screen.close()


def test_the_screen_of_a_terminal_while_agents_run_and_after_they_ended(tmp_path: Path) -> None:
    with on_a_screen(tmp_path, 110, 30) as screen:
        text = screen.until(lambda text: "works-later" in text and "777" in text)
        assert re.search(r"^nightly .* 0/3$", text, re.MULTILINE)
        assert "2 running, 1 waiting" in text
        assert re.search(r"^state +agent +task +time +turns +tokens +cost$", text, re.MULTILINE)
        assert re.search(r"^running +ann +fails +\d\.\d s +3 +777 +0\.125$", text, re.MULTILINE)
        assert re.search(r"^waiting +cat +works-later +\d\.\d s .*for bob: the-file$", text, re.MULTILINE)
        (tmp_path / "go").touch()
        text = screen.until(lambda text: "3 agents in" in text)
        assert screen.process.wait(10) == 1
        assert "running" not in text  # the live part is gone, the table has taken its place
        assert re.search(r"^ann +fails +failed +\d\.\d s +ValueError: \\x1b\[2Jevil$", text, re.MULTILINE)
        assert "2331 tokens, cost 0.375" in text
        assert not screen.screen.cursor.hidden


def test_the_screen_of_a_narrow_terminal(tmp_path: Path) -> None:
    with on_a_screen(tmp_path, 44, 12) as screen:
        text = screen.until(lambda text: "cat" in text)
        assert re.search(r"^state +agent +time$", text, re.MULTILINE)
        assert re.search(r"^running +ann +\d\.\d s$", text, re.MULTILINE)
        assert re.search(r"^waiting +cat +\d\.\d s$", text, re.MULTILINE)
        assert len(text.splitlines()) == 7  # no line was broken
        (tmp_path / "go").touch()
        screen.until(lambda text: "3 agents in" in text)
