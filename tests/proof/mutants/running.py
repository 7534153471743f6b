"""Runs a part of the suite against a copy of the package with a bug in it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import parallel_agents
from proof.mutants.planted import SUITES, Mutant

PACKAGE = Path(parallel_agents.__file__).parent
TESTS = Path(__file__).parents[2]

HANGS_AFTER = 900.0
"""Seconds; a suite that hangs has found the bug, too."""

PASSED_ON = ("PATH", "HOME", "LANG", "TMPDIR")
"""Variables that the suite sees; above all none of coverage's, which would count the lines of the copy."""

GREEN, RED = 0, 1
"""Exit codes of pytest; all others mean that the tests were not run."""


def text_of(file: str) -> str:
    return PACKAGE.joinpath(file).read_text("utf-8")


def plant(mutant: Mutant | None, folder: Path) -> None:
    """Put a copy of the package, with the bug in it, into *folder*."""
    copy = folder / "parallel_agents"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is not None:
        source = text_of(mutant.file)
        assert source.count(mutant.old) == 1, f"{mutant}: {mutant.old!r} stands there {source.count(mutant.old)} times"
        copy.joinpath(mutant.file).write_text(source.replace(mutant.old, mutant.new), "utf-8")


def python(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    env |= {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=TESTS.parent,
        env=env,
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def is_found(mutant: Mutant, folder: Path) -> bool:
    """Return whether the tests of its file fail because of a bug."""
    plant(mutant, folder)
    where = python(folder, "-c", "import parallel_agents; print(parallel_agents.__file__)").stdout
    assert where.startswith(str(folder)), f"the tests would run against {where}"
    return run_tests(SUITES[mutant.file], folder) != GREEN


def run_tests(modules: Sequence[str], folder: Path) -> int:
    """Run tests against the package in *folder*; return pytest's exit code, or RED if they hang."""
    paths = [str(TESTS / module) for module in modules]
    try:
        run = python(folder, "-m", "pytest", "-x", "-q", "--proof=few", *paths)
    except subprocess.TimeoutExpired:
        return RED
    assert run.returncode in (GREEN, RED), run.stdout[-2_000:] + run.stderr[-2_000:]
    return run.returncode
