"""Every promise of docs/promises.md is named by a test, and tests name no promise that is not made."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROMISES = ROOT / "docs" / "promises.md"


def promised(page: str) -> list[str]:
    return re.findall(r"^- \*\*([A-Z]+\d+)\*\* ", page, flags=re.MULTILINE)


def proved(source: str) -> Iterator[str]:
    """Yield the ids in all calls of a mark named ``proves``; anything but plain texts in one is an error."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "proves":
            if node.keywords or not node.args:
                raise ValueError(f"line {node.lineno}: proves() takes ids, as texts, and at least one")
            for argument in node.args:
                if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
                    raise ValueError(f"line {node.lineno}: proves() takes ids, as texts")
                yield argument.value


@cache
def proved_by_file() -> dict[str, set[str]]:
    files = sorted((ROOT / "tests").glob("**/test_*.py"))
    return {str(f.relative_to(ROOT)): set(proved(f.read_text("utf-8"))) for f in files if f != Path(__file__)}


@pytest.mark.parametrize("promise", promised(PROMISES.read_text("utf-8")))
def test_a_promise_is_proved_by_a_test(promise: str) -> None:
    assert any(promise in ids for ids in proved_by_file().values()), f"no test is marked proves({promise!r})"


def test_tests_prove_only_what_is_promised() -> None:
    known = set(promised(PROMISES.read_text("utf-8")))
    unknown = {file: ids - known for file, ids in proved_by_file().items() if ids - known}
    assert unknown == {}


def test_no_promise_stands_on_the_page_twice() -> None:
    ids = promised(PROMISES.read_text("utf-8"))
    assert len(ids) == len(set(ids))
    assert len(ids) > 0


def test_marks_are_found_on_functions_classes_modules_and_parameters() -> None:
    source = """
import pytest
pytestmark = [pytest.mark.anyio, pytest.mark.proves("X1")]
@pytest.mark.proves("X2", "X3")
async def test(): ...
@pytest.mark.proves("X4")
class Test:
    @pytest.mark.parametrize("a", [pytest.param(1, marks=pytest.mark.proves("X5"))])
    def test(self, a): ...
"""
    assert set(proved(source)) == {"X1", "X2", "X3", "X4", "X5"}


@pytest.mark.parametrize("arguments", ["", "X1", "'X1', *more", "id='X1'"])
def test_marks_that_cannot_be_read_are_refused(arguments: str) -> None:
    with pytest.raises(ValueError, match="proves"):
        list(proved(f"@pytest.mark.proves({arguments})\ndef test(): ..."))
