"""The documentation tells the truth: its programs print what it says, its commands and links exist.

All ``python`` blocks of a page are one program, and all its ``output`` blocks together are what that program prints;
or, where they define tests, one module of tests.
"""

import re
import tomllib
from pathlib import Path

import pytest
from programs import BACKENDS, ROOT, run_program

from parallel_agents import events
from parallel_agents.plan import load_plan
from parallel_agents.testing.stepping import installed_backends

DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts),
]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def tests(page: Path) -> list[str]:
    return [name for block in blocks(page, "python") for name in re.findall(r"def (test_\w+)", block)]


def commands(page: Path) -> list[str]:
    return "".join(blocks(page, "console")).splitlines()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and not tests(page)], ids=name_of)
def test_the_program_of_a_page_prints_what_the_page_says(page: Path, backend: str, tmp_path: Path) -> None:
    program = tmp_path / f"{page.stem}.py"
    program.write_text("\n".join(blocks(page, "python")), "utf-8")
    assert run_program(program, backend, cwd=tmp_path) == "".join(blocks(page, "output"))


@pytest.mark.parametrize("page", [page for page in PAGES if tests(page)], ids=name_of)
def test_the_tests_of_a_page_pass(page: Path, pytester: pytest.Pytester) -> None:
    pytester.makepyfile("\n".join(blocks(page, "python")))
    on_what_there_is = () if "trio" in installed_backends() else ("-k", "not trio")
    run = pytester.runpytest_subprocess("-q", "-W", "error", *on_what_there_is)
    assert run.ret == 0, run.stdout.str()
    passed = run.parseoutcomes()["passed"]
    assert passed > len(tests(page))  # those of a contract are not in the page


def test_the_plan_of_the_page_about_plans_can_be_run(tmp_path: Path) -> None:
    (plan,) = blocks(DOCS / "howto" / "plans.md", "toml")
    (tmp_path / "plan.toml").write_text(plan, "utf-8")
    (tmp_path / "src").mkdir()
    for name in ("first", "second"):
        (tmp_path / "src" / f"{name}.py").touch()
    assignments = load_plan(tmp_path / "plan.toml").group.assignments
    assert [a.task_id for a in assignments] == ["first", "check-first-1", "check-second-2"]


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
