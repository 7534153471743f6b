"""The command line, as a real process on real plans where signals, terminals and pipes matter, in-process elsewhere."""

import contextlib
import json
import os
import pty
import re
import signal
import stat
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cyclopts")
pytest.importorskip("rich")

from loguru import logger

from parallel_agents.cli import main
from parallel_agents.serialization import read_report

EXAMPLES = Path(__file__).parent.parent / "examples"

NEEDS_TRIO = pytest.mark.skipif(find_spec("trio") is None, reason="trio is not installed")
BACKENDS = ["asyncio", pytest.param("trio", marks=NEEDS_TRIO)]

ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "PYTHONUNBUFFERED")
}
"""Of the processes: colours and buffering as they are for most people."""

HOSTILE = [
    "line\nfeed\r\n[2/2] succeeded: forged",
    "{braces} {0} {",
    "[/] [bold]markup[/bold]",
    "\x1b]0;owned\x07\x1b[2J\x9b5m",
    "bidi \u202egnp.exe",
    "<red>{extra}</red>",
    "x" * 10_000,
]

AGENTS = """
import sys
from parallel_agents import FunctionEngine

async def fine(assignment):
    print("an agent prints this")
    return assignment.task.description

async def by_name(assignment):
    for kind in (ValueError, MemoryError, SystemExit, KeyboardInterrupt):
        if assignment.task_id == kind.__name__:
            raise kind("on purpose")

class Picky(FunctionEngine):
    async def run(self, assignment):
        return await super().run(assignment)

    def check(self, assignment):
        if assignment.task_id == "unwanted":
            raise ValueError("unwanted is not wanted")

picky = Picky(fine)
"""


def assignment(name: str, **fields: Any) -> dict[str, Any]:
    return {"agent": f"agent-{name}", "task": {"id": name}, **fields}


class Workplace:
    """A folder with plans, and ways to run them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.report = folder / "report.json"
        self._module = f"agents_{uuid.uuid4().hex}"

    def plan(self, *assignments: dict[str, Any], engine: str | dict[str, Any] = "fine", **options: Any) -> str:
        """Write a plan; an engine that is text is a name in AGENTS."""
        (self.folder / f"{self._module}.py").write_text(AGENTS)
        table = {
            "group_id": "group",
            "engine": f"{self._module}:{engine}" if isinstance(engine, str) else engine,
            "assignments": assignments,
            **options,
        }
        path = self.folder / "plan.json"
        path.write_text(json.dumps(table))
        return str(path)

    def program_plan(self, *assignments: dict[str, Any], **options: Any) -> str:
        """Write a plan whose agents are programs: the task's description is their Python code."""
        engine = {
            "kind": "process",
            "command": [sys.executable, "-c", "{task.description}"],
            "terminate_grace_seconds": 1,
        }
        return self.plan(*assignments, engine=engine, **options)

    def start(self, *argv: str, **options: Any) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "parallel_agents", *argv]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
        pipes |= options
        return subprocess.Popen(command, cwd=self.folder, start_new_session=True, **pipes)

    def statuses(self) -> dict[str, str]:
        """Return the status of each task in the report."""
        return {outcome.task_id: outcome.status.value for outcome in read_report(self.report).result.outcomes}

    def leftovers(self) -> list[str]:
        return [path.name for path in self.folder.iterdir() if path.name.endswith(".tmp")]


@pytest.fixture
def work(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """Undo what the command line does to its process."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    logger.remove()
    logger.add(sys.stderr)
    logger.disable("parallel_agents")


@contextlib.contextmanager
def ended_after(process: "subprocess.Popen[str]", seconds: float = 30) -> Iterator[None]:
    """Kill the process, and with it every wait for what it prints, if it takes longer."""
    watchdog = threading.Timer(seconds, process.kill)
    watchdog.start()
    try:
        with process:
            yield
            process.wait()
    finally:
        watchdog.cancel()
        process.kill()


def wait_for_line(process: "subprocess.Popen[str]", part: str) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if part in line:
            return line
    raise AssertionError(f"the program ended without saying {part!r}")


# Exit codes, and what is said


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_in_which_all_succeed_ends_with_0(
    work: Workplace, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", work.plan(assignment("a"), assignment("b")), "--backend", backend, "--report", "-"]) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert report["meta"]["environment"]["backend"] == backend
    assert report["agents_succeeded"] == 2
    assert "an agent prints this" in shown.err
    assert "group: 2 agents in" in shown.err


def test_a_run_in_which_one_fails_ends_with_1_and_shows_why(
    work: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", work.plan(assignment("ValueError"), assignment("b"), engine="by_name")]) == 1
    shown = capsys.readouterr()
    assert "ValueError: on purpose" in shown.out
    assert shown.out.splitlines()[-1].endswith("1 succeeded, 1 failed")
    assert "failed: agent-ValueError on ValueError" in shown.err


def test_a_wrong_plan_ends_with_2_and_all_its_problems(work: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    plan = work.plan(assignment("a", timeout_seconds=-1), assignment("b", max_turns=0), typo=1)
    for command in ("run", "check"):
        assert main([command, plan]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert "assignments[0].timeout_seconds: must be > 0, got -1" in shown.err
        assert "assignments[1].max_turns: must be >= 1, got 0" in shown.err
        assert "typo" in shown.err
        assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    "argv",
    [
        ["run"],
        ["run", "PLAN", "--bogus"],
        ["run", "PLAN", "--backend", "curio"],
        ["run", "PLAN", "--max-concurrency", "0"],
        ["run", "PLAN", "--max-concurrency", "many"],
        ["run", "PLAN", "--set", "novalue"],
        ["run", "PLAN", "--set", "=1"],
        ["run", "PLAN", "--only", "nobody"],
        ["run", "PLAN", "--report", "--quiet"],
        ["run", "PLAN", "--report", ""],
        ["run", "PLAN", "--report", "nul\0"],
        ["run", "PLAN", "--log-level", "loud"],
        ["run", "no/such/plan.toml"],
        ["check", "no/such/plan.toml"],
        ["show", "no/such/report.json"],
        ["show", "PLAN"],
        ["fly"],
    ],
    ids=" ".join,
)
def test_a_wrong_call_ends_with_2_and_a_line_about_it(
    work: Workplace, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = work.plan(assignment("a"))
    assert main([plan if argument == "PLAN" else argument for argument in argv]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("parallel-agents: ")
    assert "Traceback" not in shown.err


def test_no_command_shows_the_help_and_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Usage: parallel-agents COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"]], ids=" ".join)
def test_the_help_tells_the_exit_codes(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    shown = capsys.readouterr().out
    for code in ("0: all agents succeeded", "1: some did not", "2: the plan", "130: interrupted"):
        assert code in shown


def test_the_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip().count(".") == 2


def test_completion_can_be_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/bin/bash")
    assert main(["--install-completion", "--shell", "bash"]) == 0
    assert any("parallel-agents" in path.name for path in tmp_path.rglob("*"))


def test_without_its_libraries_the_command_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cyclopts", None)
    monkeypatch.delitem(sys.modules, "parallel_agents._commands", raising=False)
    assert main(["--version"]) == 2
    assert capsys.readouterr().err == "parallel-agents: cyclopts is missing: pip install 'parallel-agents[cli]'\n"


def test_a_worker_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["worker", "--engine", "module:agent"]) == 2
    assert "a worker needs to know of which cluster: --ray" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("_ray_worker", "engines.ray"):
        monkeypatch.delitem(sys.modules, f"parallel_agents.{name}", raising=False)
    assert main(["worker", "--engine", "module:agent", "--ray"]) == 2
    assert "pip install 'parallel-agents[ray]'" in capsys.readouterr().err


def test_a_module_of_ours_that_is_missing_is_no_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "parallel_agents._commands", None)
    with pytest.raises(ModuleNotFoundError):
        main(["--version"])


def test_a_backend_that_is_not_installed_is_said(
    work: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("parallel_agents._commands.find_spec", lambda name: None)
    assert main(["run", work.plan(assignment("a")), "--backend", "trio"]) == 2
    assert "trio is not installed: pip install 'parallel-agents[trio]'" in capsys.readouterr().err


def test_overlapping_claims_end_with_2_before_anything_runs(
    work: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = work.plan(assignment("a", claims=["db"]), assignment("b", claims=["db"]))
    for command in ("run", "check"):
        assert main([command, plan]) == 2
        shown = capsys.readouterr()
        assert "'db' is claimed by 'agent-b' but held by 'agent-a'" in shown.err
        assert shown.out == ""


def test_an_engine_that_changes_its_mind_ends_with_2(
    work: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = work.plan(assignment("unwanted"), engine="picky")
    monkeypatch.setattr("parallel_agents.plan._PlanReader._check", lambda *_: None)
    assert main(["run", plan, "--report", str(work.report)]) == 2
    assert "unwanted is not wanted" in capsys.readouterr().err
    assert not work.report.exists()


# Agents that end the program


@pytest.mark.parametrize(("task", "code"), [("SystemExit", 1), ("KeyboardInterrupt", 130)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_agent_that_ends_the_program_leaves_a_complete_report(
    work: Workplace, backend: str, task: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = work.plan(assignment(task), assignment("b"), engine="by_name", max_concurrency=1)
    assert main(["run", plan, "--backend", backend, "--report", str(work.report)]) == code
    assert f"an agent stopped the program with {task}" in capsys.readouterr().err
    assert work.statuses() == {task: "failed", "b": "cancelled"}


def test_an_agent_with_a_fatal_error_leaves_a_complete_report(
    work: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = work.plan(assignment("MemoryError"), assignment("b"), engine="by_name")
    assert main(["run", plan, "--report", str(work.report)]) == 1
    assert "Fatal error" in capsys.readouterr().err
    assert work.statuses() == {"MemoryError": "failed", "b": "succeeded"}


# Options


def test_only_runs_the_chosen_tasks_in_the_plans_order(work: Workplace) -> None:
    plan = work.plan(*map(assignment, "abcd"))
    assert main(["run", plan, "--only", "d", "--only", "b", "--report", str(work.report)]) == 0
    assert list(work.statuses()) == ["b", "d"]


def test_set_stands_above_the_plan(work: Workplace) -> None:
    plan = work.plan(assignment("a"), max_concurrency=1)
    argv = ["run", plan, "--set", "max_concurrency=7", "--set", "group_id=a=b", "--report", str(work.report)]
    assert main(argv) == 0
    report = read_report(work.report)
    assert report.result.group_id == "a=b"
    assert report.meta.plan is not None
    assert report.meta.plan.max_concurrency == 7


def test_max_concurrency_and_fail_fast_stand_above_the_plan(work: Workplace) -> None:
    plan = work.plan(assignment("ValueError"), assignment("b"), engine="by_name", max_concurrency=2)
    argv = ["run", plan, "--max-concurrency", "1", "--report", str(work.report)]
    assert main([*argv, "--fail-fast"]) == 1
    assert work.statuses() == {"ValueError": "failed", "b": "cancelled"}
    report = read_report(work.report)
    assert report.meta.plan is not None
    assert report.meta.plan.max_concurrency == 1
    assert report.meta.plan.fail_fast
    assert main([*argv, "--no-fail-fast", "--set", "fail_fast=true"]) == 1
    assert work.statuses() == {"ValueError": "failed", "b": "succeeded"}


def test_quiet_shows_nothing(work: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", work.plan(assignment("a")), "--quiet"]) == 0
    assert capsys.readouterr() == ("an agent prints this\n", "")


def test_json_events_are_all_that_stands_on_stderr(work: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    plan = work.plan(*[{"agent": text, "task": {"id": text}} for text in HOSTILE], engine="by_name")
    assert main(["run", plan, "--json-events", "--report", "-"]) == 0
    shown = capsys.readouterr()
    events = [json.loads(line) for line in shown.err.splitlines()]
    assert events[0]["name"] == "execution.parallel.group_start"
    assert events[-1]["name"] == "execution.parallel.group_complete"
    started = [event["task_id"] for event in events if event["name"] == "execution.parallel.agent_start"]
    assert started == HOSTILE
    assert json.loads(shown.out)["agents_succeeded"] == len(HOSTILE)


@pytest.mark.proves("V2")
def test_the_log_has_one_harmless_line_for_each_record(work: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    plan = work.plan(*[{"agent": text, "task": {"id": text}} for text in HOSTILE], engine="by_name")
    assert main(["run", plan, "--quiet", "--log-level", "info"]) == 0
    lines = capsys.readouterr().err.split("\n")
    assert len(lines) == 2 + 2 * len(HOSTILE) + 1
    assert all(line.isprintable() for line in lines)
    assert " INFO    execution.parallel.group_start group_id=group agent_count=" in lines[0]
    assert "task_id='{braces} {0} {'" in "".join(lines)
    assert r"task_id='\x1b]0;owned\x07" in "".join(lines)


def test_the_log_shows_neither_variables_nor_tracebacks_of_others_records(
    work: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", work.plan(assignment("a")), "--quiet", "--log-level", "error"]) == 0
    password = "swordfish" + str(len(HOSTILE))
    try:
        raise ValueError("wrong " + "[/]\n")
    except ValueError:
        logger.exception("not {formatted}")
    shown = capsys.readouterr().err
    assert shown.endswith("ERROR   not {formatted} exception=ValueError('wrong [/]\\n')\n")
    assert password not in shown


# Reports


def test_a_report_that_cannot_be_written_is_said_before_anything_runs(
    work: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = work.folder / "ran"
    code = f"open({str(marker)!r}, 'w')"
    plan = work.program_plan({"agent": "a", "task": {"id": "a", "description": code}})
    for path in (str(work.folder / "missing" / "report.json"), str(work.folder), f"{plan}/report.json"):
        assert main(["run", plan, "--report", path]) == 2
        assert "the report cannot be written to" in capsys.readouterr().err
    assert not marker.exists()
    assert main(["run", plan]) == 0
    assert marker.exists()


def test_a_report_replaces_the_old_one_and_keeps_its_mode_and_the_link_to_it(work: Workplace) -> None:
    old = work.folder / "old.json"
    old.write_text("old")
    old.chmod(0o640)
    work.report.symlink_to(old)
    assert main(["run", work.plan(assignment("a")), "--report", str(work.report)]) == 0
    assert work.report.is_symlink()
    assert read_report(old).result.all_succeeded
    assert stat.S_IMODE(old.stat().st_mode) == 0o640
    assert work.leftovers() == []


def test_a_report_can_go_into_a_pipe_with_a_name(work: Workplace) -> None:
    os.mkfifo(work.report)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(work.report.read_text()), daemon=True)
    reader.start()
    assert main(["run", work.plan(assignment("a")), "--report", str(work.report)]) == 0
    reader.join(30)
    assert json.loads(received[0])["agents_succeeded"] == 1
    assert stat.S_ISFIFO(work.report.stat().st_mode)


def test_a_report_that_fails_at_the_end_is_a_failure_and_leaves_the_old_one(
    work: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def disk_is_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    work.report.write_text("old")
    monkeypatch.setattr("os.fsync", disk_is_full)
    assert main(["run", work.plan(assignment("a")), "--report", str(work.report)]) == 1
    assert "the report could not be written: No space left on device" in capsys.readouterr().err
    assert work.report.read_text() == "old"
    assert work.leftovers() == []


# check and show


def test_check_says_what_would_run_and_runs_nothing(work: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    marker = work.folder / "ran"
    plan = work.program_plan(
        {"agent": "a", "task": {"id": "one", "description": f"open({str(marker)!r}, 'w')"}, "timeout_seconds": 5},
        {"agent": "b", "task": {"id": "two"}, "claims": ["db", {"resource": "api", "mode": "shared"}]},
    )
    assert main(["check", plan, "--max-concurrency", "2"]) == 0
    shown = capsys.readouterr().out
    assert "group: 2 agents, at most 2 at a time" in shown
    assert "db (exclusive), api (shared)" in shown
    assert "5 s" in shown
    assert not marker.exists()
    assert main(["check", plan, "--only", "two", "--set", "group_id=other"]) == 0
    assert "other: 1 agent, all at the same time" in capsys.readouterr().out


def test_show_shows_a_saved_report_with_the_exit_code_of_its_run(
    work: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = work.plan(assignment("ValueError"), assignment("b"), engine="by_name")
    codes = [main(["run", plan, "--report", str(work.report), *more]) for more in ([], ["--only", "b"])]
    assert codes == [1, 0]
    shown = capsys.readouterr().out
    assert main(["show", str(work.report)]) == 0
    assert shown.endswith(capsys.readouterr().out)


# Signals


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.proves("S1")
def test_ctrl_c_lets_the_running_finish_and_the_report_is_complete(work: Workplace, backend: str) -> None:
    go = work.folder / "go"
    code = f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)"
    waiting = {"agent": "a", "task": {"id": "waiting", "description": code}}
    plan = work.program_plan(waiting, assignment("queued"), max_concurrency=1)
    process = work.start("run", plan, "--backend", backend, "--report", str(work.report))
    with ended_after(process):
        wait_for_line(process, "started: a on waiting")
        process.send_signal(signal.SIGINT)
        wait_for_line(process, "Interrupt again to cancel them now")
        go.touch()
        stdout, stderr = process.communicate()
    assert process.returncode == 130
    assert work.statuses() == {"waiting": "succeeded", "queued": "rejected"}
    assert "1 succeeded, 1 rejected" in stdout
    assert "Traceback" not in stderr


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.proves("S2")
def test_a_second_signal_cancels_at_once_and_the_report_is_complete(
    work: Workplace, backend: str, signum: signal.Signals, code: int
) -> None:
    sleeping = {"agent": "a", "task": {"id": "sleeping", "description": "import time; time.sleep(1000)"}}
    plan = work.program_plan(sleeping, assignment("queued"), max_concurrency=1)
    process = work.start("run", plan, "--backend", backend, "--report", str(work.report))
    with ended_after(process):
        wait_for_line(process, "started: a on sleeping")
        process.send_signal(signum)
        wait_for_line(process, "Interrupt again to cancel them now")
        while process.poll() is None:  # a second one, and any number of late ones
            process.send_signal(signum)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.001)
        stdout, stderr = process.communicate()
    assert process.returncode == code
    assert work.statuses() == {"sleeping": "cancelled", "queued": "rejected"}
    assert "cancelling what still runs" in stderr
    assert "1 cancelled, 1 rejected" in stdout
    assert "Traceback" not in stderr


def test_ctrl_c_outside_a_run_ends_with_130(monkeypatch: pytest.MonkeyPatch, work: Workplace) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("parallel_agents.serialization.read_report", interrupted)
    assert main(["show", str(work.report)]) == 130


# Pipes and terminals


@pytest.mark.parametrize("more", [[], ["--report", "-"], ["--quiet"]], ids=["table", "report", "agent"])
def test_a_reader_that_goes_away_changes_no_exit_code(work: Workplace, more: list[str]) -> None:
    plan = work.plan(assignment("a"))  # an agent that prints
    reader, writer = os.pipe()
    os.close(reader)
    process = work.start("run", plan, *more, stdout=writer)
    os.close(writer)
    with ended_after(process):
        _, stderr = process.communicate()
    assert process.returncode == 0
    assert "BrokenPipeError" not in stderr
    assert "Traceback" not in stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    "command", [["run", "PLAN"], ["run", "PLAN", "--report", "-"], ["check", "PLAN"]], ids=" ".join
)
def test_a_full_disk_behind_standard_output_ends_with_1(work: Workplace, command: list[str]) -> None:
    plan = work.plan(assignment("a"), engine="by_name")
    with Path("/dev/full").open("w") as full:
        process = work.start(*[plan if argument == "PLAN" else argument for argument in command], stdout=full)
        with ended_after(process):
            _, stderr = process.communicate()
    assert process.returncode == 1
    assert "No space left on device" in stderr
    assert "Traceback" not in stderr


def test_a_reader_of_stderr_that_goes_away_does_not_stop_the_run(work: Workplace) -> None:
    plan = work.plan(assignment("a"), assignment("ValueError"), engine="by_name")
    reader, writer = os.pipe()
    os.close(reader)
    process = work.start("run", plan, "--report", str(work.report), stderr=writer)
    os.close(writer)
    with ended_after(process):
        process.communicate()
    assert process.returncode == 1
    assert work.statuses() == {"a": "succeeded", "ValueError": "failed"}


def test_a_terminal_that_knows_ascii_only_gets_escapes(work: Workplace) -> None:
    plan = work.plan({"agent": "Grüße", "task": {"id": "世界"}}, engine="by_name")
    process = work.start("run", plan, env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii"})
    with ended_after(process):
        stdout, stderr = process.communicate()
    assert process.returncode == 0
    assert stdout.isascii()
    assert stderr.isascii()


def on_a_terminal(work: Workplace, *argv: str, **environment: str) -> tuple[int, str]:
    """Run the command line on a terminal; return its exit code and what the terminal received."""
    terminal, end = pty.openpty()
    env = ENVIRONMENT | {"TERM": "xterm-256color", "COLUMNS": "160", "LINES": "30"} | environment
    process = work.start(*argv, stdin=end, stdout=end, stderr=end, env=env)
    os.close(end)
    received = b""
    with ended_after(process), contextlib.suppress(OSError):  # how a terminal says that the other end is closed
        while data := os.read(terminal, 65536):
            received += data
    os.close(terminal)
    return process.returncode, received.decode(errors="surrogateescape")


@pytest.mark.proves("V2")
@pytest.mark.parametrize("live", [True, False], ids=["live", "dumb"])
def test_hostile_ids_do_nothing_to_a_terminal(work: Workplace, live: bool) -> None:
    plan = work.program_plan(
        *[
            {
                "agent": text,
                "task": {"id": text, "description": "import sys; sys.exit(sys.argv[0] + '\\x1b]0;err\\x07')"},
            }
            for text in HOSTILE
        ]
    )
    code, shown = on_a_terminal(work, "run", plan, TERM="xterm-256color" if live else "dumb")
    assert code == 1
    assert ("\x1b[?25l" in shown) == live  # the cursor is hidden while the display is live
    for evil in ("\x1b]0;", "\x07", "\x1b[2J", "\x9b", "\u202e", "\n[2/2] succeeded: forged", "Traceback"):
        assert evil not in shown
    for visible in (r"\x1b]0;owned\x07", r"\u202e", "[/] [bold]markup", "{braces} {0} {", r"line\nfeed\r\n"):
        assert visible in shown
    assert f"{len(HOSTILE)} failed" in shown


def test_no_color_leaves_a_terminal_without_colours(work: Workplace) -> None:
    plan = work.plan(assignment("ValueError"), engine="by_name")
    _, coloured = on_a_terminal(work, "run", plan)
    _, plain = on_a_terminal(work, "run", plan, NO_COLOR="1")
    assert "\x1b[31m" in coloured
    assert "\x1b[31m" not in plain


def test_ctrl_c_on_a_terminal_is_announced_above_the_live_display(work: Workplace) -> None:
    plan = work.program_plan(
        {
            "agent": "a",
            "task": {
                "id": "t",
                "description": "import os, signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(0.5)",
            },
        }
    )
    code, shown = on_a_terminal(work, "run", plan)
    assert code == 130
    assert "Interrupt again to cancel them now" in shown
    assert "1 succeeded" in shown


# The examples


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_quickstart_ends_as_the_readme_says(work: Workplace, backend: str) -> None:
    process = work.start("run", str(EXAMPLES / "quickstart.toml"), "--backend", backend, "--report", str(work.report))
    with ended_after(process):
        stdout, _ = process.communicate()
    assert process.returncode == 1
    result = read_report(work.report).result
    statuses = work.statuses()
    assert statuses.pop("wait") == "timed_out"
    assert statuses.pop("count-nothing") == "failed"
    assert set(statuses.values()) == {"succeeded"}
    assert len(statuses) == 8
    functions = result.outcome_of("functions")
    assert functions.output is not None
    assert functions.output["functions"] > 100
    assert functions.usage.requests > 10
    assert "10 agents in" in stdout


def test_the_plan_with_one_agent_per_file_runs(work: Workplace) -> None:
    pytest.importorskip("yaml")
    assert main(["run", str(EXAMPLES / "each_file.yaml"), "--quiet", "--report", str(work.report)]) == 0
    outcomes = read_report(work.report).result.outcomes
    assert len(outcomes) == len(list((EXAMPLES / "agents").glob("*.py")))


WAITING_PLAN = """
group_id = "waiting"
claim_policy = "wait"

[engine]
kind = "process"
command = ["sh", "-c", "test ! -e inside && touch inside && sleep 0.1 && rm inside"]
cwd = "."

[defaults]
claims = [{ path = "inside" }]
"""


def test_agents_that_claim_the_same_run_one_after_another_in_all_runs_with_one_lock_folder(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    entries = "".join(
        f'[[assignments]]\nagent = "a{n}"\ntask = {{ id = "t{n}" }}\nclaims = [{{ path = "inside" }}]\n'
        for n in range(3)
    )
    plan.write_text(WAITING_PLAN.replace('cwd = "."', f'cwd = "{tmp_path}"') + entries)
    command = [sys.executable, "-m", "parallel_agents", "run", str(plan), "--lock-dir", str(tmp_path / "locks")]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [(*run.communicate(timeout=60), run.returncode) for run in runs]
    assert [code for _, _, code in ends] == [0, 0], ends
    assert all("3 succeeded" in table for table, _, _ in ends)
    assert all("waiting: a1 on t1, for a0: path:" in lines for _, lines, _ in ends)
    assert [path for path in (tmp_path / "locks").iterdir() if path.name.startswith("session-")] == []


def test_the_policy_and_the_lock_folder_can_be_chosen_in_the_call(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    entries = "".join(f'[[assignments]]\nagent = "a{n}"\ntask = {{ id = "t{n}" }}\nclaims = ["r"]\n' for n in range(2))
    plan.write_text(f'group_id = "g"\nengine = {{ kind = "process", command = ["sleep", "0.2"] }}\n{entries}')
    program = [sys.executable, "-m", "parallel_agents"]

    def call(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([*program, *arguments], capture_output=True, text=True, timeout=60, check=False)

    assert call("check", str(plan)).returncode == 2
    assert call("check", str(plan), "--claim-policy", "wait").returncode == 0
    assert call("run", str(plan)).returncode == 2
    assert call("run", str(plan), "--claim-policy", "wait").returncode == 0
    late = call("run", str(plan), "--claim-policy", "wait", "--claim-timeout", "0.05")
    assert late.returncode == 1
    assert "Claim not to be had within 0.05 s: 'r' is held by 'a0'" in late.stdout
    wrong = call("run", str(plan), "--claim-timeout", "1")
    assert (wrong.returncode, "needs the claim_policy 'wait'" in wrong.stderr) == (2, True)
    (tmp_path / "file").touch()
    wrong = call("run", str(plan), "--claim-policy", "wait", "--lock-dir", str(tmp_path / "file"))
    assert (wrong.returncode, "no locks can be kept in" in wrong.stderr) == (2, True)
    assert "nothing was run" in wrong.stderr


FLOW = """
group_id = "flow"
[engine]
kind = "process"
command = ["sh", "-c", "test $1 != fails", "agent", "{task.id}"]
"""


def flow_plan(folder: Path, dependencies: dict[str, list[str]], options: str = "") -> Path:
    plan = folder / "flow.toml"
    tasks = "".join(
        f"[[assignments]]\nagent = {json.dumps(f'agent of {name}')}\n"
        f"task = {{ id = {json.dumps(name)}, depends_on = {json.dumps(others)} }}\n"
        for name, others in dependencies.items()
    )
    plan.write_text(FLOW.replace("[engine]", f"{options}\n[engine]") + tasks)
    return plan


def command_line(*arguments: object) -> "subprocess.CompletedProcess[str]":
    program = [sys.executable, "-m", "parallel_agents", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.proves("X15")
def test_dependents_of_a_task_that_failed_are_skipped_and_only_takes_what_a_task_needs(tmp_path: Path) -> None:
    plan = flow_plan(tmp_path, {"last": ["fails", "fine"], "fails": [], "fine": [], "after": ["fine"]})
    done = command_line("run", plan)
    assert done.returncode == 1
    assert "2 succeeded, 1 failed, 1 skipped" in done.stdout
    assert "Skipped: it depends on task 'fails', which is failed" in done.stdout
    done = command_line("run", plan, "--only", "after")
    assert (done.returncode, "2 succeeded" in done.stdout) == (0, True)


def test_a_plan_with_wrong_dependencies_is_refused_with_their_places(tmp_path: Path) -> None:
    done = command_line("check", flow_plan(tmp_path, {"first": ["fisrt"], "second": ["first"]}))
    assert done.returncode == 2
    assert "assignments[0].task.depends_on: the plan has no task 'fisrt', did you mean 'first'?" in done.stderr
    done = command_line("check", flow_plan(tmp_path, {"first": ["second"], "second": ["first"]}))
    assert (done.returncode, "in a circle: " in done.stderr) == (2, True)


def test_the_graph_of_a_plan_can_be_seen(tmp_path: Path) -> None:
    plan = flow_plan(tmp_path, {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"], '\x1b"e': [], "f": ["d"]})
    assert command_line("graph", plan).stdout.splitlines() == [
        "a",
        "├── b",
        "│   └── d",
        "│       └── f",
        "└── c",
        "    └── d (see above)",
        '\\x1b"e',
    ]
    assert command_line("graph", plan, "--style", "mermaid", "--only", "b").stdout.splitlines() == [
        "flowchart TD",
        '    t0["a"]',
        '    t1["b"]',
        "    t0 --> t1",
    ]
    drawn = command_line("graph", plan, "--style", "dot").stdout
    assert '    "b" -> "d";' in drawn
    assert '    " \\"e";' in drawn
    assert command_line("graph", tmp_path / "none.toml").returncode == 2


@pytest.mark.proves("X14")
def test_the_call_says_when_to_stop(tmp_path: Path) -> None:
    plan = flow_plan(tmp_path, {str(n): [] for n in range(3)}, "max_concurrency = 1\nbudget = { max_tokens = 5 }")
    (tmp_path / "spend.sh").write_text("""echo '{"type": "usage", "cost": 2, "input_tokens": 1}'\n""")
    spending = 'protocol = "jsonl"\ncommand = ["sh", "spend.sh"]'
    plan.write_text(re.sub("^command = .*$", spending, plan.read_text(), flags=re.MULTILINE))
    done = command_line("run", plan, "--max-cost", "3")
    assert (done.returncode, "2 succeeded, 1 skipped" in done.stdout) == (1, True), done.stdout + done.stderr
    done = command_line("run", plan, "--max-tokens", "1")
    assert (done.returncode, "1 succeeded, 2 skipped" in done.stdout) == (1, True)
    done = command_line("run", plan, "--stop-after", "1")
    assert (done.returncode, "1 succeeded, 2 skipped" in done.stdout) == (0, True)
    plan = flow_plan(tmp_path, {str(n): [] for n in range(3)}, "max_concurrency = 1")
    plan.write_text(plan.read_text().replace("test $1 != fails", "sleep 60"))
    done = command_line("run", plan, "--deadline", "0.3")
    assert (done.returncode, "1 timed out, 2 skipped" in done.stdout) == (1, True)
    done = command_line("run", plan, "--max-cost", "0")
    assert (done.returncode, "max_cost must be > 0" in done.stderr) == (2, True)
