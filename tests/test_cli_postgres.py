"""``run --journal`` and ``--locks``, ``history`` and ``show`` with the address of a database."""

import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

pytest.importorskip("cyclopts")
pytest.importorskip("rich")

from postgres_server import PASSWORD, PostgresServer

from parallel_agents import ResourceClaim
from parallel_agents.cli import main
from parallel_agents.locks.postgres import PostgresResourceLock

PLAN = """
group_id = "work"
claim_policy = "wait"
[engine]
kind = "process"
command = ["{python}", "-c", "import sys, pathlib; sys.exit({{task_id}} == 1 and not pathlib.Path('{mark}').exists())"]
[[assignments]]
agent = "a0"
task = {{ id = "0" }}
claims = ["r"]
[[assignments]]
agent = "a1"
task = {{ id = "1" }}
claims = ["r"]
"""


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    return postgres.empty()


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.format(python=sys.executable, mark=tmp_path / "mark"))
    return path


def test_a_run_keeps_its_journal_and_its_locks_in_a_database(
    url: str, plan: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--journal", url, "--locks", url, "--log-level", "debug", "--report", str(tmp_path / "report.json")]
    assert main(["run", str(plan), *options]) == 1
    assert main(["history", url]) == 0
    assert main(["show", url]) == 1
    assert main(["run", str(plan), *options]) == 1
    (tmp_path / "mark").touch()
    assert main(["run", str(plan), *options]) == 0
    assert main(["show", url]) == 0
    told = "".join(capfd.readouterr()) + (tmp_path / "report.json").read_text()
    assert "1 failed, 1 succeeded" in told or "1 succeeded, 1 failed" in told
    assert "lock_acquired" in told
    assert PASSWORD not in told
    assert quote(PASSWORD, safe="") not in told


def test_a_claim_of_another_machine_is_waited_for(url: str, plan: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import anyio  # noqa: PLC0415

    with PostgresResourceLock(url) as lock:
        anyio.run(lock.acquire_claims, [ResourceClaim(resource="r")], "elsewhere")
        assert main(["run", str(plan), "--locks", url, "--claim-timeout", "0.2"]) == 1
    assert "held by 'elsewhere'" in capfd.readouterr().out.replace("\n", " ").replace("  ", " ")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--locks", "postgresql://owner@127.0.0.1:1/x"], "cannot be reached"),
        (["--journal", "postgresql://owner@127.0.0.1:1/x"], "cannot be reached"),
        (["--locks", "locks.sqlite"], "an address starts with postgresql://"),
        (["--locks", "postgresql://h/d", "--lock-dir", "."], "do not go together"),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_runs(
    options: list[str], text: str, plan: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(plan), *options]) == 2
    told = capfd.readouterr().err
    assert text in told
    assert "nothing was run" in told


def test_history_of_a_database_that_is_away(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["history", "postgresql://owner:geheim@127.0.0.1:1/x"]) == 2
    told = capfd.readouterr().err
    assert "cannot be reached" in told
    assert "geheim" not in told


def test_without_psycopg_the_command_line_says_what_to_install(plan: Path) -> None:
    program = (
        "import sys; sys.modules['psycopg'] = None\n"
        "from parallel_agents.cli import main\n"
        "sys.exit(main(['run', sys.argv[1], '--locks', 'postgresql://h/d']))"
    )
    run = subprocess.run([sys.executable, "-c", program, str(plan)], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "pip install 'parallel-agents[postgres]'" in run.stderr
