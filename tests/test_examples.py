"""Every example runs, on both backends, and prints what it should."""

import re
from pathlib import Path

import pytest
from programs import BACKENDS, ROOT, run_program

EXAMPLES = ROOT / "examples"

# Which of the two that change hello.txt comes first is not known.
WORKTREES = re.compile(
    r"3 merged\nnot merged: MergeConflictError: conflicts with 'main' in hello\.txt\. "
    r"The work is on branch 'agents/\.\.\.': merge it by hand\nbye\.txt hello\.txt new\.txt\n"
)

PRINTED: dict[str, str | re.Pattern[str]] = {
    "graceful_shutdown.py": (
        "cleaning up\n"
        "0 succeeded - stopped early, after some steps\n"
        "1 succeeded - stopped early, after some steps\n"
        "2 rejected - Shutdown in progress\n"
        "3 rejected - Shutdown in progress\n"
        "4 rejected - Shutdown in progress\n"
        "5 rejected - Shutdown in progress\n"
    ),
    "own_engine.py": (
        "one succeeded A WORD\n"
        "two succeeded ANOTHER WORD\n"
        "three failed ValueError: there is nothing to translate\n"
        "timed: one, three, two\n"
        "tokens read: 18\n"
    ),
    "run_programs.py": (
        "said: hello, Ada\n"
        "Agent 'greeter of bad' on task 'bad' failed: exit code 1: no such customer\n"
        "Agent 'greeter of slow' on task 'slow' timed_out: Timed out after 0.5 s\n"
    ),
    "shared_limit.py": "most at once: 3\n",
    "worktrees.py": WORKTREES,
    "watch.py": "0 -> 0\n1 -> 1\n2 -> 4\n3 -> 9\nstopped in time: True\n100 outcomes\n",
}


def test_no_example_is_left_out() -> None:
    assert {file.name for file in EXAMPLES.glob("*.py")} == set(PRINTED)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PRINTED)
def test_an_example_prints_what_it_should(name: str, backend: str, tmp_path: Path) -> None:
    expected, printed = PRINTED[name], run_program(EXAMPLES / name, backend, cwd=tmp_path)
    assert printed == expected if isinstance(expected, str) else expected.fullmatch(printed), printed


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_says_what_it_shows(name: str) -> None:
    assert re.match(r'"""[A-Z].+', (EXAMPLES / name).read_text("utf-8"))
