"""The documentation tells the truth: its programs print what it says, its commands and links exist.

All ``python`` blocks of a page are one program, and all its ``output`` blocks together are what that program prints;
or, where they define tests, one module of tests.
"""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from programs import BACKENDS, ROOT, run_program

from parallel_agents import events
from parallel_agents.engines.worktree import WorktreeEngine
from parallel_agents.plan import load_plan
from parallel_agents.testing.stepping import installed_backends

DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts),
]


DIRECTIVES = ["eval-rst", "include", "literalinclude", "ratios", "run-picture", "toctree"]
RUN_AS = ["console", "python", *(f"{{{name}}}" for name in DIRECTIVES)]
"""What blocks are written in that a test here or of the examples runs, or the build of the site resolves."""

PAGES_WITH_PLANS = ["docs/howto/plans.md", "docs/howto/worktrees.md"]
"""Pages with blocks of TOML; each has its test below."""

PAGES_WITH_TEXT = [
    "benchmarks/README.md",
    "docs/design.md",
    "docs/howto/many-machines.md",
    "docs/howto/ray.md",
    "docs/howto/temporal.md",
    "docs/howto/testing.md",
]
"""Pages with blocks of plain text: figures, a drawing, and what a test says, which has its test below."""


PAGES_FOR_A_CLUSTER = ["docs/howto/ray.md", "docs/howto/temporal.md", "docs/howto/temporal.md"]
"""Pages whose programs are run where their cluster is."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def names_of_tests(page: Path) -> list[str]:
    return [name for block in blocks(page, "python") for name in re.findall(r"def (test_\w+)", block)]


def commands(page: Path) -> list[str]:
    return "".join(blocks(page, "console")).splitlines()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_block_of_a_page_escapes_the_tests(page: Path) -> None:
    text = page.read_text("utf-8")
    openings = re.findall(r"^([ >]*)(```+|~~~+)(.*)$", text, flags=re.MULTILINE)
    assert {(indent, fence) for indent, fence, _ in openings} <= {("", "```")}
    assert {what for _, _, what in openings[1::2]} <= {""}
    written_in = {what.split(" ")[0] for _, _, what in openings[::2]}
    allowed = {*RUN_AS, *(["output"] if "python" in written_in else [])}
    allowed |= {"toml"} if name_of(page) in PAGES_WITH_PLANS else set()
    allowed |= {"text"} if name_of(page) in PAGES_WITH_TEXT else set()
    allowed |= {"py"} if name_of(page) in PAGES_FOR_A_CLUSTER else set()
    allowed |= {"sql"} if name_of(page) == "docs/howto/many-machines.md" else set()  # run by test_postgres_journal.py
    assert written_in - allowed == set()


def test_pages_that_are_included_are_tested_themselves() -> None:
    included = re.findall(r"^```\{include\} (.+)$", "\n".join(p.read_text("utf-8") for p in PAGES), flags=re.MULTILINE)
    assert {(DOCS / name).resolve() for name in included} <= {page.resolve() for page in PAGES}


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_the_command_line_understands_the_commands_of_a_page(page: Path) -> None:
    pytest.importorskip("cyclopts")
    from parallel_agents._commands import app  # noqa: PLC0415 - of an extra

    for line in commands(page):
        words = shlex.split(line, comments=True)
        if words[:1] == ["parallel-agents"]:
            app.parse_args(words[1:], print_error=False, exit_on_error=False)
        elif words[:2] == ["nox", "-s"]:
            assert f"def {words[2]}(" in (ROOT / "noxfile.py").read_text("utf-8")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python") and not names_of_tests(page)], ids=name_of
)
def test_the_program_of_a_page_prints_what_the_page_says(page: Path, backend: str, tmp_path: Path) -> None:
    program = tmp_path / f"{page.stem}.py"
    program.write_text("\n".join(blocks(page, "python")), "utf-8")
    assert run_program(program, backend, cwd=tmp_path) == "".join(blocks(page, "output"))


@pytest.mark.parametrize("page", [page for page in PAGES if names_of_tests(page)], ids=name_of)
def test_the_tests_of_a_page_pass(page: Path, pytester: pytest.Pytester) -> None:
    pytester.makepyfile("\n".join(blocks(page, "python")))
    on_what_there_is = () if "trio" in installed_backends() else ("-k", "not trio")
    run = pytester.runpytest_subprocess("-q", "-W", "error", *on_what_there_is)
    assert run.ret == 0, run.stdout.str()
    passed = run.parseoutcomes()["passed"]
    assert passed > len(names_of_tests(page))  # those of a contract are not in the page


def test_the_plan_of_the_page_about_plans_can_be_run(tmp_path: Path) -> None:
    (plan,) = blocks(DOCS / "howto" / "plans.md", "toml")
    (tmp_path / "plan.toml").write_text(plan, "utf-8")
    (tmp_path / "src").mkdir()
    for name in ("first", "second"):
        (tmp_path / "src" / f"{name}.py").touch()
    assignments = load_plan(tmp_path / "plan.toml").group.assignments
    assert [a.task_id for a in assignments] == ["first", "check-first-1", "check-second-2"]


def test_a_test_of_the_page_about_testing_fails_as_it_says(pytester: pytest.Pytester) -> None:
    page = DOCS / "howto" / "testing.md"
    wrong = "\n".join(blocks(page, "python")).replace('"b": "failed"', '"b": "succeeded"')
    pytester.makepyfile(wrong)
    run = pytester.runpytest_subprocess("-q", "-k", "others_go_on and asyncio")
    assert run.parseoutcomes()["failed"] == 1
    (said,) = blocks(page, "text")
    assert all(line in run.stdout.str() for line in said.splitlines())


def test_the_part_of_a_plan_on_the_page_about_worktrees_fits_into_one(tmp_path: Path) -> None:
    (part,) = blocks(DOCS / "howto" / "worktrees.md", "toml")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    engine = '[engine]\nkind = "process"\ncommand = ["true"]\n'
    assignment = '[[assignments]]\nagent = "a"\ntask = { id = "t" }\n'
    (tmp_path / "plan.toml").write_text(f'group_id = "g"\n{engine}{assignment}{part}', "utf-8")
    assert isinstance(load_plan(tmp_path / "plan.toml").engine, WorktreeEngine)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_lead_to_files_of_the_repository(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    missing = [link for link in links if not link.startswith("https://") and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", sorted(DOCS.glob("howto/*.md")), ids=name_of)
def test_a_how_to_page_says_first_when_to_use_it_and_when_not(page: Path) -> None:
    paragraphs = page.read_text("utf-8").split("\n\n")
    assert paragraphs[0].startswith("# ")
    assert "when" in paragraphs[1].lower()
    assert re.search(r"\bnot\b", paragraphs[1])


def test_the_reference_lists_every_event() -> None:
    page = (DOCS / "reference.md").read_text("utf-8")
    listed = re.findall(r"^\| `([A-Z_]+)` \| `([\w.]+)` \|", page, flags=re.MULTILINE)
    constants = [(name, value) for name, value in vars(events).items() if name.isupper() and not name.startswith("_")]
    assert listed == constants


def test_continuous_integration_runs_the_second_command_of_the_readme() -> None:
    second = commands(ROOT / "README.md")[1]
    assert second.endswith("/nox")
    assert (ROOT / ".ci" / "run").read_text("utf-8").splitlines()[-1] == second


def test_the_first_command_of_the_readme_runs_a_plan_that_exists() -> None:
    words = commands(ROOT / "README.md")[0].split()
    plan = ROOT / words[words.index("run") + 1]
    assert len(tomllib.loads(plan.read_text("utf-8"))["assignments"]) > 0


def test_nox_tests_every_python_that_the_project_says_it_runs_on() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    versions = [c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r"Python :: 3\.\d+$", c)]
    assert versions == ["3.11", "3.12", "3.13"]
    assert all(version in (ROOT / "README.md").read_text("utf-8") for version in versions)


def test_the_licence_is_the_mit_licence() -> None:
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert text.startswith("MIT License\n")
    assert "The parallel_agents maintainers" in text
