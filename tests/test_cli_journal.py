"""``run --journal``, ``history`` and ``show``: a plan that was interrupted goes on where it was."""

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cyclopts")
pytest.importorskip("rich")

from parallel_agents.cli import main
from parallel_agents.journals.sqlite import SqliteJournal, read_journal
from parallel_agents.serialization import read_report

PROGRAM = """
import os, signal, sys, time
task_id, folder = sys.argv[1:3]
with open(folder + "/ran", "a") as file:
    file.write(task_id + "\\n")
print('{"type": "usage", "cost": 1.5}', flush=True)
if task_id == "waits" and os.path.exists(folder + "/fifo"):
    open(folder + "/fifo").read()
if task_id == "fails" or os.path.exists(folder + "/bad"):
    sys.exit(3)
if task_id == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


class Workplace:
    """A folder with a plan and a journal, and what its agents did."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan_path = folder / "plan.toml"
        self.journal = folder / "run.journal"
        self.report = folder / "report.json"
        (folder / "program.py").write_text(PROGRAM)

    def plan(self, *tasks: str, extra: str = "", argument: str = "") -> None:
        command = [sys.executable, str(self.folder / "program.py"), "{task_id}", str(self.folder), argument]
        lines = [
            'group_id = "work"',
            "max_concurrency = 1",
            extra,
            "[engine]",
            'kind = "process"',
            'protocol = "jsonl"',
        ]
        lines.append(f"command = {command!r}")
        for task in tasks:
            lines += ["[[assignments]]", f'agent = "agent-{task}"', f'task = {{ id = "{task}" }}']
        self.plan_path.write_text("\n".join(lines))

    def run(self, *arguments: str) -> int:
        return main(["run", str(self.plan_path), "--journal", str(self.journal), *arguments])

    def start(self) -> "subprocess.Popen[str]":
        """Run the plan in a process of its own, up to where the agent ``waits``."""
        os.mkfifo(self.folder / "fifo")
        command = [sys.executable, "-m", "parallel_agents", "run", str(self.plan_path), "--journal", str(self.journal)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        with (self.folder / "fifo").open("w"):  # opens when the agent opens it; closing lets it go on
            self.interrupt(process)
        process.communicate()
        (self.folder / "fifo").unlink()
        return process

    def interrupt(self, process: "subprocess.Popen[str]") -> None:
        raise NotImplementedError

    def ran(self) -> list[str]:
        return (self.folder / "ran").read_text().split()


def interrupt(process: "subprocess.Popen[str]") -> None:
    assert process.stderr is not None
    process.send_signal(signal.SIGINT)
    while "Interrupted" not in process.stderr.readline():
        pass


@pytest.fixture
def work(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def test_a_killed_run_goes_on_and_runs_no_success_again(work: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    def kill(process: "subprocess.Popen[str]") -> None:
        while read_journal(work.journal)[0].usage.cost < 3:  # until what the second one printed has arrived
            pass
        process.kill()

    work.plan("a", "waits", "b")
    work.interrupt = kill  # type: ignore[method-assign]
    process = work.start()
    assert process.returncode == -signal.SIGKILL
    assert work.ran() == ["a", "waits"]
    assert main(["history", str(work.journal)]) == 0
    assert re.search(r"work-\d+T\d+-\w+ .* unfinished +1 succeeded, 1 not ended +cost 3", capsys.readouterr().out)
    assert main(["show", str(work.journal)]) == 1
    assert "not ended" in capsys.readouterr().out
    assert work.run("--report", str(work.report)) == 0
    told = capsys.readouterr().err
    assert "Going on with work-" in told
    assert "succeeded: agent-a on a, from the journal\n" in told
    assert re.search(r"succeeded: agent-waits on waits, \d+\.\d s\n", told)
    assert work.ran() == ["a", "waits", "waits", "b"]
    result = read_report(work.report).result
    assert [outcome.usage.cost for outcome in result.outcomes] == [1.5, 3.0, 1.5]
    assert main(["history", str(work.journal)]) == 0
    assert re.search(r"finished +3 succeeded +cost 6\n", capsys.readouterr().out)
    assert main(["show", str(work.journal)]) == 0
    assert re.search(r"agent-waits +waits +succeeded +2 ", capsys.readouterr().out)


def test_an_interrupted_run_goes_on(work: Workplace) -> None:
    work.plan("waits", "b")
    work.interrupt = interrupt  # type: ignore[method-assign]
    process = work.start()
    assert process.returncode == 128 + signal.SIGINT
    assert work.ran() == ["waits"]
    assert work.run() == 0
    assert work.ran() == ["waits", "b"]


def test_an_interrupted_run_goes_on_also_if_all_its_agents_came_to_an_end(work: Workplace) -> None:
    def interrupt_and_fail(process: "subprocess.Popen[str]") -> None:
        interrupt(process)
        (work.folder / "bad").touch()

    work.plan("waits")
    work.interrupt = interrupt_and_fail  # type: ignore[method-assign]
    process = work.start()
    assert process.returncode == 128 + signal.SIGINT
    (work.folder / "bad").unlink()
    assert work.run() == 0
    assert [attempt.status for attempt in read_journal(work.journal)[0].attempts] == ["failed", "succeeded"]


def test_a_run_that_ended_is_followed_by_a_new_one_also_when_agents_failed(work: Workplace) -> None:
    work.plan("a", "fails", "killed")
    assert work.run() == 1
    assert work.run("--backend", "asyncio") == 1
    assert work.ran() == ["a", "fails", "killed"] * 2
    first, second = read_journal(work.journal)
    assert first.name != second.name
    for execution in (first, second):
        assert execution.finished is not None
        assert [attempt.status for attempt in execution.attempts] == ["succeeded", "failed", "failed"]
        assert execution.attempts[1].content == "exit code 3"
        assert "SIGKILL" in str(execution.attempts[2].content)
        assert execution.usage.cost == 4.5


def test_a_group_that_was_stopped_by_a_failure_goes_on(work: Workplace) -> None:
    work.plan("a")
    assert work.run() == 0
    work.plan("a", "fails", "b", extra="fail_fast = true")
    assert work.run() == 1
    assert work.run() == 1
    assert work.ran() == ["a", "a", "fails", "fails"]
    work.plan("a", "b", extra="fail_fast = true")
    assert work.run() == 0
    assert work.ran() == ["a", "a", "fails", "fails", "b"]
    assert len(read_journal(work.journal)) == 2


def test_a_race_that_was_won_is_over(work: Workplace) -> None:
    work.plan("a", "b", extra="stop_after_successes = 1")
    assert work.run() == 0
    assert work.run() == 0
    assert work.ran() == ["a", "a"]


def test_fresh_runs_all_again(work: Workplace) -> None:
    work.plan("a", "fails", "b", extra="fail_fast = true")
    assert work.run() == 1
    assert work.run("--fresh") == 1
    assert work.ran() == ["a", "fails", "a", "fails"]


def test_a_part_of_a_plan_does_not_finish_it_and_is_not_run_again(work: Workplace) -> None:
    work.plan("a", "b")
    assert work.run("--only", "b") == 0
    assert work.run() == 0
    assert work.ran() == ["b", "a"]
    assert work.run() == 0
    assert work.ran() == ["b", "a", "a", "b"]


def test_another_engine_in_the_plan_is_other_work(work: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    work.plan("a", "fails", "b", extra="fail_fast = true")
    assert work.run() == 1
    work.plan("a", extra="fail_fast = true", argument="--better")
    assert work.run("--log-level", "info") == 0
    assert work.ran() == ["a", "fails", "a"]
    assert "execution.parallel.agent_resumed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fresh"], "--fresh goes with --journal"),
        (["--journal", "{folder}/missing/run.journal"], "No such file or directory; nothing was run"),
        (["--journal", "{folder}/plan.toml"], "file is not a database; nothing was run"),
        (["--journal", "{folder}"], "Is a directory; nothing was run"),
    ],
)
def test_a_journal_that_cannot_be_used_is_said_before_anything_runs(
    work: Workplace, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    work.plan("a")
    filled = [argument.format(folder=work.folder) for argument in arguments]
    assert main(["run", str(work.plan_path), *filled]) == 2
    assert said in capsys.readouterr().err
    assert not (work.folder / "ran").exists()


def test_a_second_run_on_a_journal_is_refused(work: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    work.plan("a")
    with SqliteJournal(work.journal):
        assert work.run() == 2
    assert f"is in use by another run (process {os.getpid()}); nothing was run" in capsys.readouterr().err
    assert not (work.folder / "ran").exists()


def test_a_journal_that_breaks_is_said_and_its_run_is_not_finished(
    work: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    work.plan("a", "b")
    program = work.folder / "program.py"
    program.write_text(f"{PROGRAM}\nos.rename(folder + '/run.journal', folder + '/moved')\n")
    assert work.run("--report", str(work.report)) == 1
    assert "somebody removed or replaced the file" in capsys.readouterr().err
    assert work.ran() == ["a"]
    errors: list[Any] = [outcome.error for outcome in read_report(work.report).result.outcomes]
    assert all("JournalError" in error for error in errors)


def test_what_is_no_journal_has_no_history(work: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    work.plan("a")
    assert main(["history", str(work.plan_path)]) == 2
    assert main(["history", str(work.journal)]) == 2
    assert main(["show", str(work.journal)]) == 2
    assert main(["show", str(work.plan_path), "--execution", "x"]) == 2
    assert "--execution goes with a journal" in capsys.readouterr().err
    with SqliteJournal(work.journal):
        assert main(["history", str(work.journal)]) == 0
        assert main(["show", str(work.journal)]) == 2
        assert "the journal has no runs" in capsys.readouterr().err
    assert work.run() == 0
    assert main(["show", str(work.journal), "--execution", "x"]) == 2
    assert "has no run 'x'" in capsys.readouterr().err
    (execution,) = read_journal(work.journal)
    assert main(["show", str(work.journal), "--execution", execution.name]) == 0


def test_a_run_that_goes_on_is_shown_as_running(work: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    def look(process: "subprocess.Popen[str]") -> None:
        assert main(["history", str(work.journal)]) == 0
        assert re.search(r"running +1 not ended", capsys.readouterr().out)

    work.plan("waits")
    work.interrupt = look  # type: ignore[method-assign]
    process = work.start()
    assert process.returncode == 0


def test_a_journal_that_somebody_changed_does_nothing_to_the_terminal(
    work: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    work.plan("a")
    assert work.run() == 0
    with contextlib.closing(sqlite3.connect(work.journal)) as database, database:
        database.execute("UPDATE attempts SET status = ?, task_id = ?, agent_id = ?", ["\x1b[2J", "[/]\x1b", "\x9b5m"])
        database.execute("UPDATE executions SET name = ?, started = 1e30", ["\x1b[31m"])
    assert main(["history", str(work.journal)]) == 0
    assert main(["show", str(work.journal)]) == 1
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\x9b" not in shown
