"""Runs the programs that the documentation shows, as a reader would, on the backend that is asked for."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SECONDS = 60.0

_NO_TRIO = pytest.mark.skipif(importlib.util.find_spec("trio") is None, reason="trio is not installed")
BACKENDS = ["asyncio", pytest.param("trio", marks=_NO_TRIO)]

PRELUDE = """
import functools, runpy, sys
import anyio
_, backend, path = sys.argv
anyio.run = functools.partial(anyio.run, backend=backend)
sys.argv = [path]
runpy.run_path(path, run_name="__main__")
"""


def run_program(path: Path, backend: str, *, cwd: Path) -> str:
    """Run a file as a program whose ``anyio.run()`` uses *backend*; return what it printed.

    Raises:
        AssertionError: If it failed, with what it wrote to stderr.
    """
    command = [sys.executable, "-W", "error", "-c", PRELUDE, backend, str(path)]
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, timeout=SECONDS, stdin=subprocess.DEVNULL, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return run.stdout
