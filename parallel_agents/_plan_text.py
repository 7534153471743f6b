"""From a plan file to plain tables, lists, text and numbers, whoever wrote the file.

Size and nesting are capped before a parser sees the text: forty kilobytes of dotted keys cost a TOML parser gigabytes,
and nested YAML crashes a C parser. Knows the three formats; knows nothing of what a plan means.
"""

import re
import stat
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ._checks import frozen_json, shown
from ._errors import InvalidPlanError
from .serialization import InvalidDataError, below, line, parse_json

DEPTH_LIMIT = 32
"""Levels of tables and lists in a plan."""

SIZE_LIMIT_BYTES = 1024 * 1024
"""The largest TOML or JSON plan."""

YAML_SIZE_LIMIT_BYTES = 64 * 1024
"""The largest YAML plan: the parser in pure Python needs seconds for a megabyte."""

_TOML_TOKENS = re.compile(
    r'''
      """ (?: [^"\\]++ | \\. | "{1,2}+ (?!") )*+ (?: "{3,5}+ | \Z)    # an unfinished string reaches to the end
    | \'\'\' (?: [^']++ | '{1,2}+ (?!') )*+ (?: '{3,5}+ | \Z)
    | " (?: [^"\\\n]++ | \\[^\n] )*+ "?
    | ' [^'\n]*+ '?
    | \#[^\n]*+
    | (?P<opening>[\[{])
    | (?P<closing>[\]}])
    | (?P<dot>\.)
    | (?P<between>[=,\n])
    | (?P<endless>\w{1000})
    ''',
    re.VERBOSE | re.DOTALL,
)
_JSON_TOKENS = re.compile(
    r'" (?: [^"\\]++ | \\. )*+ "? | (?P<opening>[\[{]) | (?P<closing>[\]}])', re.VERBOSE | re.DOTALL
)


def read_table(path: Path) -> dict[str, Any]:
    """Return the content of a plan file, by its suffix: ``.toml``, ``.json``, ``.yaml`` or ``.yml``.

    Raises:
        InvalidPlanError: If it cannot be read, is too large or too deep, or holds no table.
    """
    try:
        return _table(path)
    except InvalidDataError as error:
        problems = error.problems
    except OSError as error:
        problems = (f"cannot be read: {error.strerror}",)
    except UnicodeDecodeError as error:
        problems = (f"not UTF-8: byte {error.start} cannot be read",)
    except ValueError as error:
        problems = (str(error),)
    raise InvalidPlanError([line(str(path), problem) for problem in problems])


def toml_value(text: str) -> Any:
    """Return the value that *text* stands for in TOML, or *text* itself if it is no TOML value or a date."""
    try:
        table = _load_toml(f"value = {text}")
        return frozen_json(table["value"], "value") if len(table) == 1 else text
    except (ValueError, TypeError):
        return text


def refuse_unfit(table: dict[str, Any]) -> None:
    """Refuse what may be nested too deeply or cannot be printed; everything else is for the plan's own rules.

    Raises:
        InvalidPlanError: With the place of each.
    """
    problems = [line(*problem) for problem in _unfit(table)]
    if problems:
        raise InvalidPlanError(problems)


def _unfit(value: object, place: str = "", levels: int = DEPTH_LIMIT) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        if not _is_unicode(value):
            yield place, "holds half a surrogate pair, which is no text"
    elif isinstance(value, dict | list):
        if not levels:
            yield place, _too_deep()
            return
        for step, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _unfit(step, place)
            yield from _unfit(item, below(place, step), levels - 1)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _too_deep() -> str:
    return f"nested deeper than {DEPTH_LIMIT} levels"


def _table(path: Path) -> dict[str, Any]:
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise ValueError(f"a plan's name ends with {', '.join(_FORMATS)}")
    limit, load = _FORMATS[suffix]
    value = load(_text(path, limit))
    if not isinstance(value, dict):
        raise ValueError(f"must be a table of keys and values, got {shown(value)}")  # noqa: TRY004 - no caller's mistake
    return value


def _text(path: Path, limit: int) -> str:
    if "\0" in str(path):
        raise ValueError("no file has a NUL character in its name")
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise ValueError("is a folder, not a plan")
    if not stat.S_ISREG(mode):
        raise ValueError("is no regular file")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"is larger than {limit // 1024} KiB")
    text = content.decode("utf-8-sig")
    if not text.strip():
        raise ValueError("is empty")
    return text


def _load_toml(text: str) -> dict[str, Any]:
    _refuse_nesting(text, _TOML_TOKENS)
    return tomllib.loads(text)


def _load_json(text: str) -> Any:
    _refuse_nesting(text, _JSON_TOKENS)
    return parse_json(text)


def _load_yaml(text: str) -> Any:
    try:
        from ._plan_yaml import load_yaml  # noqa: PLC0415 - PyYAML is an extra
    except ModuleNotFoundError as error:
        raise ValueError("reading YAML needs PyYAML: pip install 'parallel-agents[cli]'") from error
    return load_yaml(text, DEPTH_LIMIT)


_FORMATS: dict[str, tuple[int, Callable[[str], Any]]] = {
    ".toml": (SIZE_LIMIT_BYTES, _load_toml),
    ".json": (SIZE_LIMIT_BYTES, _load_json),
    ".yaml": (YAML_SIZE_LIMIT_BYTES, _load_yaml),
    ".yml": (YAML_SIZE_LIMIT_BYTES, _load_yaml),
}


def _refuse_nesting(text: str, tokens: re.Pattern[str]) -> None:
    """Count open brackets and the dots of a key, outside of strings and comments."""
    brackets = dots = 0
    for token in tokens.finditer(text):
        kind = token.lastgroup
        if kind == "opening":
            brackets += 1
        elif kind == "closing":
            brackets -= 1
        elif kind == "dot":
            dots += 1
        if kind in ("opening", "closing", "between"):
            dots = 0
        if max(brackets, dots) > DEPTH_LIMIT:
            raise ValueError(_too_deep())
        if kind == "endless":
            raise ValueError("holds a number or a bare key of more than 1000 characters")
