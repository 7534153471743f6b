"""Shows below each promise of docs/promises.md the tests that name it, as they are when the documentation is built."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from html import escape
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

TESTS = Path(__file__).parent.parent.parent / "tests"


def proofs(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Return for each id the tests that are marked with it, as file and name, in the order of the files and lines.

    A mark on a class, a parameter or a module counts for all the tests that it holds for.
    """
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for file in sorted(folder.glob("**/test_*.py")):
        module = ast.parse(file.read_text("utf-8"))
        of_all = [node for node in module.body if isinstance(node, ast.Assign) and _assigns(node, "pytestmark")]
        for name, ids in _tests(module, [one for node in of_all for one in _ids(node)]):
            for one in dict.fromkeys(ids):
                found[one].append((file.relative_to(folder.parent).as_posix(), name))
    return dict(found)


def _assigns(node: ast.Assign, name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)


def _tests(within: ast.Module | ast.ClassDef, ids: list[str]) -> Iterator[tuple[str, list[str]]]:
    for node in within.body:
        if isinstance(node, ast.ClassDef):
            yield from _tests(node, [*ids, *(one for mark in node.decorator_list for one in _ids(mark))])
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
            yield node.name, [*ids, *(one for mark in node.decorator_list for one in _ids(mark))]


def _ids(marks: ast.AST) -> Iterator[str]:
    """Yield the texts in all calls of ``proves``."""
    for node in ast.walk(marks):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "proves":
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def sentence(name: str) -> str:
    """Return a test's name as what it says."""
    return name.removeprefix("test_").replace("_", " ")


def _show(app: Sphinx, document: nodes.document) -> None:
    if app.env.docname != "promises":
        return
    found = proofs(TESTS)
    for item in document.findall(nodes.list_item):
        strong = next(iter(item.findall(nodes.strong)), None)
        if strong is None or strong.astext() not in found:
            continue
        promise = strong.astext()
        item["ids"].append(promise.lower())
        tests = found[promise]
        lines = "".join(
            f"<li>{escape(sentence(name))} <code>{escape(file.removeprefix('tests/'))}</code></li>"
            for file, name in tests
        )
        count = "1 test" if len(tests) == 1 else f"{len(tests)} tests"
        html = f'<details class="proofs"><summary>Proved by {count}</summary><ul>{lines}</ul></details>'
        item.append(nodes.raw("", html, format="html"))


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("doctree-read", _show)
    app.connect("env-before-read-docs", lambda _app, env, docnames: _read_anew(env, docnames))
    return {"parallel_read_safe": True}


def _read_anew(env: object, docnames: list[str]) -> None:
    """Have the page read in each build: what it depends on are the tests."""
    del env
    if "promises" not in docnames:
        docnames.append("promises")
