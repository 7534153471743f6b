"""Values to JSON and back, and the report of an execution.

One function makes the converter that holds the rules; cattrs' global one is never touched. The rules:

- Enum values are lower-case names, durations are seconds, tuples are lists.
- Derived values (``is_success``, ``total_cost``, ``pending``, every property) are written, and ignored on reading.
- Reading is strict: unknown keys, ``true`` for a number, ``"7"`` for 7, NaN, infinity and a key given twice are
  refused. All problems are told at once, each with its place.
- An agent's output stays as it is if it is JSON (tuples are written as lists). Whatever in it is not, such as bytes,
  a set, NaN or an object, is written as ``{"$repr": "b'x'", "$type": "bytes"}``, and read back as that table.
- ``AgentOutcome.exception`` is a live object and is not written.
- The text is ASCII, so that text from outside cannot send escape sequences to a terminal.

Knows the values; knows nothing of how agents are run, and nothing of plans but their facts for a report.
"""

import functools
import json
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import attrs
from attrs import field, frozen
from attrs.validators import optional
from cattrs import BaseConverter
from cattrs.errors import (
    AttributeValidationNote,
    BaseValidationError,
    ForbiddenExtraKeysError,
    IterableValidationNote,
)
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override
from cattrs.preconf.json import JsonConverter
from cattrs.preconf.json import make_converter as make_cattrs_converter

from ._checks import JSON_DEPTH, RULE, integer, is_flag, not_blank, shown, wrong_type
from ._errors import ParallelAgentsError
from ._outcomes import ParallelExecutionResult

SCHEMA_VERSION = 1
"""The version of the report's shape; grows when a reader has to change."""

_REPR_CHARACTERS = 10_000
"""Characters that are kept of the repr of an output that is not JSON."""

_INTEGER_BITS = 2_000
"""Larger integers are no JSON: Python itself refuses to read back very long ones."""

_LINE_CHARACTERS = 1000
"""Characters of a problem that are told."""

_STEP_CHARACTERS = 80
"""Longer keys are cut where a place is named."""

_NAMED_KEYS = 10
"""Unknown keys of one table that are named; looking for what each was meant to be takes time."""

MISSING = "missing"
"""What is wrong with a key that must be there and is not."""

_NOT_WRITTEN = frozenset({"exception"})
"""Attributes that hold live objects."""

_V = TypeVar("_V")


class InvalidDataError(ParallelAgentsError, ValueError):
    """JSON that is not what it should be.

    Attributes:
        problems: Every one of them, as ``path: what is wrong``.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(tuple(problems))
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)


@frozen(kw_only=True)
class PlanFacts:
    """What a report says about its plan.

    Attributes:
        path: The plan file, as it was given.
        max_concurrency: As it was run, so after overrides; ``None`` is no limit.
        fail_fast: As it was run.
    """

    path: str = field(validator=not_blank)
    max_concurrency: int | None = field(default=None, validator=optional(integer(at_least=1)))
    fail_fast: bool = field(default=False, validator=is_flag)


@frozen(kw_only=True)
class EnvironmentFacts:
    """What a report says about where it was made. Holds no host name, user name or environment variable.

    Attributes:
        python: Implementation and version, such as ``CPython 3.11.9``.
        platform: System and machine, such as ``linux x86_64``.
        library: The version of parallel_agents.
        backend: ``asyncio`` or ``trio``; ``None`` if it was not told.
    """

    python: str = field(validator=not_blank)
    platform: str = field(validator=not_blank)
    library: str = field(validator=not_blank)
    backend: str | None = field(default=None, validator=optional(not_blank))

    @classmethod
    def current(cls, backend: str | None = None) -> "EnvironmentFacts":
        """Return the facts of the running interpreter."""
        return cls(
            python=f"{platform.python_implementation()} {platform.python_version()}",
            platform=f"{sys.platform} {platform.machine()}".strip(),
            library=version("parallel-agents"),
            backend=backend,
        )


@frozen(kw_only=True)
class ReportMeta:
    """The facts around a result.

    Attributes:
        plan: The plan that was run; ``None`` if the group was built in Python.
        environment: Where it was run.
    """

    plan: PlanFacts | None = None
    environment: EnvironmentFacts | None = None


@frozen(kw_only=True)
class Report:
    """A report that was read back.

    Attributes:
        result: What came of the group.
        meta: The facts around it.
    """

    result: ParallelExecutionResult[Any]
    meta: ReportMeta


def to_json(value: object, *, indent: int | None = None) -> str:
    """Return *value*, one of the library's values, as JSON text in ASCII.

    Raises:
        TypeError: If it is no value of an attrs class.
    """
    return json.dumps(unstructure(value), indent=indent, allow_nan=False)


def from_json(type_: type[_V], text: str | bytes) -> _V:
    """Read a value of *type_* from what ``to_json()`` wrote.

    Raises:
        InvalidDataError: With all that is wrong.
    """
    return structure(type_, parse_json(text))


def unstructure(value: object) -> dict[str, Any]:
    """Return *value*, one of the library's values, as tables, lists, text and numbers that ``json.dumps`` takes.

    Raises:
        TypeError: If it is no value of an attrs class.
    """
    if not attrs.has(type(value)):
        raise wrong_type("value", "a value of parallel_agents", value)
    table: dict[str, Any] = _shared_converter().unstructure(value)
    return table


def structure(type_: type[_V], data: object) -> _V:
    """Build a value of *type_* from what ``unstructure()`` returned.

    Raises:
        InvalidDataError: With all that is wrong.
    """
    return _structured(type_, data, "")


def _structured(type_: type[_V], data: object, place: str) -> _V:
    try:
        return _shared_converter().structure(data, type_)
    except (BaseValidationError, ValueError, TypeError) as error:
        raise InvalidDataError([line(*problem) for problem in problems_of(error, place)]) from error


def report(
    result: ParallelExecutionResult[Any],
    *,
    plan: PlanFacts | None = None,
    environment: EnvironmentFacts | None = None,
) -> dict[str, Any]:
    """Return the report: the result with its derived values, ``schema_version``, and the facts under ``meta``.

    Args:
        result: What came of the group.
        plan: The plan's facts, where there is a plan.
        environment: Where it was run; by default the facts of this interpreter, without a backend.
    """
    meta = ReportMeta(plan=plan, environment=environment or EnvironmentFacts.current())
    return {"schema_version": SCHEMA_VERSION, **unstructure(result), "meta": unstructure(meta)}


def read_report(source: "str | bytes | os.PathLike[str]") -> Report:
    """Read a report.

    Args:
        source: Its text, or the path of its file.

    Raises:
        InvalidDataError: With all that is wrong; also if the file cannot be read.
    """
    text = source if isinstance(source, str | bytes) else _content(Path(source))
    table = parse_json(text)
    if not isinstance(table, dict):
        raise InvalidDataError([f"a report must be a table, got {shown(table)}"])
    found = table.pop("schema_version", None)
    if type(found) is not int or found != SCHEMA_VERSION:
        raise InvalidDataError([f"schema_version: must be {SCHEMA_VERSION}, got {shown(found)}"])
    meta = _structured(ReportMeta, table.pop("meta", {}), "meta")
    return Report(result=structure(ParallelExecutionResult, table), meta=meta)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidDataError([f"{path}: cannot be read: {error.strerror}"]) from error


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text says; stricter than ``json.loads``.

    Raises:
        InvalidDataError: If it is no UTF-8 or no JSON, holds NaN, an infinity or a key twice, or is nested too deeply.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8-sig")
        return json.loads(
            decoded, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_without_repetition
        )
    except UnicodeDecodeError as error:
        raise InvalidDataError([f"not UTF-8: byte {error.start} cannot be read"]) from error
    except json.JSONDecodeError as error:
        problem = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise InvalidDataError([problem]) from error
    except RecursionError:
        raise InvalidDataError(["nested too deeply"]) from None
    except ValueError as error:
        raise InvalidDataError([str(error)]) from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is too large for a number")
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"key {shown(key)} is given twice")
        table[key] = value
    return table


def plain_json(value: object, depth: int = JSON_DEPTH) -> Any:
    """Return *value* as plain JSON; what is none becomes a table of its ``$repr`` and ``$type``.

    Args:
        value: Anything.
        depth: How many levels of tables and lists may follow; what lies deeper is written as its repr.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int) and value.bit_length() <= _INTEGER_BITS:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if depth and isinstance(value, list | tuple):
        return [plain_json(item, depth - 1) for item in value]
    if depth and isinstance(value, dict | MappingProxyType) and all(isinstance(key, str) for key in value):
        return {str.__str__(key): plain_json(item, depth - 1) for key, item in value.items()}
    return {"$repr": _readable(value), "$type": type(value).__qualname__}


def _readable(value: object) -> str:
    try:
        text = repr(value)
    except Exception as error:  # noqa: BLE001 - somebody's own __repr__; the rest of the report is worth having
        return f"<no repr: {type(error).__name__}>"
    return text if len(text) <= _REPR_CHARACTERS else f"{text[:_REPR_CHARACTERS]}..."


def make_converter() -> JsonConverter:
    """Return a new converter that holds the rules of this module, for classes of attrs and their fields."""
    converter = make_cattrs_converter(forbid_extra_keys=True)
    for kind, wanted in ((str, "a string"), (int, "an integer"), (float, "a number"), (bool, "true or false")):
        converter.register_structure_hook(kind, _exactly(kind, wanted))
    converter.register_structure_hook(StrEnum, _member)
    converter.register_unstructure_hook(StrEnum, lambda member: member.value)
    converter.register_structure_hook_factory(_is_open, lambda _: lambda value, _: value)
    converter.register_unstructure_hook_factory(_is_open, lambda _: plain_json)
    converter.register_structure_hook_factory(_is_tuple, _tuple_reader)
    converter.register_structure_hook_factory(_is_optional, _optional_reader)
    converter.register_unstructure_hook_factory(_is_optional, _optional_writer)
    converter.register_structure_hook_factory(_is_model, _model_reader)
    converter.register_unstructure_hook_factory(_is_model, _model_writer)
    return converter


_shared_converter = functools.cache(make_converter)

_Reader = Callable[[Any, Any], Any]
_Writer = Callable[[Any], Any]


def _not(wanted: str, value: object) -> TypeError:
    return TypeError(f"must be {wanted}, got {shown(value)} ({type(value).__name__})")


def _exactly(kind: type, wanted: str) -> _Reader:
    accepted = (int, float) if kind is float else (kind,)

    def read(value: object, _type: object) -> object:
        if type(value) not in accepted:
            raise _not(wanted, value)
        return value

    return read


def _member(value: object, kind: Any) -> object:
    if value not in list(kind):
        raise ValueError(f"must be one of {', '.join(kind)}, got {shown(value)}")
    return kind(value)


def _is_open(hint: Any) -> bool:
    """Whether the hint leaves the value to the user: an output, or a table of JSON, which its owner checks itself."""
    kind = get_origin(hint) or hint
    return isinstance(hint, TypeVar) or kind is Any or (isinstance(kind, type) and issubclass(kind, Mapping))


def _is_tuple(hint: Any) -> bool:
    return get_origin(hint) is tuple


def _tuple_reader(hint: Any, converter: BaseConverter) -> _Reader:
    read_items = converter.get_structure_hook(list[get_args(hint)[0]])  # type: ignore[misc]

    def read(value: object, _type: object) -> object:
        if not isinstance(value, list | tuple):
            raise _not("a list", value)
        return tuple(read_items(value, hint))

    return read


def _is_optional(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType) and len(get_args(hint)) == 2 and NoneType in get_args(hint)


def _given(hint: Any) -> Any:
    return next(kind for kind in get_args(hint) if kind is not NoneType)


def _optional_reader(hint: Any, converter: BaseConverter) -> _Reader:
    kind = _given(hint)
    read = converter.get_structure_hook(kind)
    return lambda value, _: None if value is None else read(value, kind)


def _optional_writer(hint: Any, converter: BaseConverter) -> _Writer:
    write = converter.get_unstructure_hook(_given(hint))
    return lambda value: None if value is None else write(value)


def _is_model(hint: Any) -> bool:
    return attrs.has(get_origin(hint) or hint)


def model_hints(model: type) -> dict[str, Any]:
    """Return the type of each attribute that is written, in order."""
    hints = get_type_hints(model)
    return {a.name: hints[a.name] for a in attrs.fields(model) if a.name not in _NOT_WRITTEN}


def derived_hints(model: type) -> dict[str, Any]:
    """Return the type of each property: derived values are written, and ignored on reading."""
    properties = {name: member for name, member in vars(model).items() if isinstance(member, property)}
    return {name: get_type_hints(member.fget)["return"] for name, member in properties.items()}


def _concrete(model: Any) -> Any:
    return model[Any] if getattr(model, "__parameters__", ()) else model


def _model_reader(hint: Any, converter: BaseConverter) -> _Reader:
    model = get_origin(hint) or hint
    derived = derived_hints(model)
    overrides: dict[str, Any] = {name: override(omit=True) for name in _NOT_WRITTEN}
    overrides |= {
        name: override(struct_hook=_field_reader(getattr(attrs.fields(model), name), kind, converter))
        for name, kind in model_hints(model).items()
    }
    read_table = make_dict_structure_fn(_concrete(model), converter, **overrides)

    def read(value: object, _type: object) -> Any:
        if not isinstance(value, Mapping):
            raise _not("a table", value)
        return read_table({key: item for key, item in value.items() if key not in derived}, model)

    return read


def _field_reader(attribute: "attrs.Attribute[Any]", hint: Any, converter: BaseConverter) -> _Reader:
    """Return a reader that also runs the field's own rules, so that the problems of all fields are told at once."""
    read = converter.get_structure_hook(hint)
    convert: Any = attribute.converter

    def checked(value: object, _type: object) -> Any:
        item = read(value, hint)
        kept = item if convert is None else convert(item)
        rule: Any = attribute.validator or attribute.metadata.get(RULE)
        if rule is not None:
            rule(None, attribute, kept)
        return item

    return checked


def _model_writer(hint: Any, converter: BaseConverter) -> _Writer:
    model = get_origin(hint) or hint
    overrides: dict[str, Any] = {name: override(omit=True) for name in _NOT_WRITTEN}
    overrides |= {
        name: override(unstruct_hook=converter.get_unstructure_hook(kind)) for name, kind in model_hints(model).items()
    }
    write_fields = make_dict_unstructure_fn(_concrete(model), converter, **overrides)
    derived = {name: converter.get_unstructure_hook(kind) for name, kind in derived_hints(model).items()}

    def write(value: Any) -> dict[str, Any]:
        table = write_fields(value)
        for name, hook in derived.items():
            table[name] = hook(getattr(value, name))
        return table

    return write


def problems_of(error: BaseException, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield what a converter found wrong as place and message.

    Stands for ``cattrs.transform_error``, whose lines have the place at the end and all unknown keys in one line.
    """
    if isinstance(error, BaseValidationError):
        for inner in error.exceptions:
            yield from problems_of(inner, below(place, _step(inner)))
    elif isinstance(error, ForbiddenExtraKeysError):
        known = list(model_hints(get_origin(error.cl) or error.cl))
        unknown = sorted(map(str, error.extra_fields))
        for key in unknown[:_NAMED_KEYS]:
            yield below(place, key), unknown_key(key, known)
        if len(unknown) > _NAMED_KEYS:
            yield place, f"{len(unknown) - _NAMED_KEYS} more unknown keys"
    elif isinstance(error, KeyError):
        yield place, MISSING
    else:
        yield _placed(place, str(error))


_PLACE_NOTES = (AttributeValidationNote, IterableValidationNote)


def _step(error: BaseException) -> str | int | None:
    """Return the name or the index that cattrs noted on an error, if it did."""
    notes = [note for note in getattr(error, "__notes__", ()) if isinstance(note, _PLACE_NOTES)]
    if not notes:
        return None
    return notes[0].index if isinstance(notes[0], IterableValidationNote) else notes[0].name


def below(place: str, step: str | int | None) -> str:
    """Return the place of a field or an item, such as ``assignments[3].timeout_seconds``; one short, printable line."""
    if isinstance(step, int):
        return f"{place}[{step}]"
    if not step:
        return place
    name = step if step.isprintable() and len(step) < _STEP_CHARACTERS else shown(step)
    return f"{place}.{name}" if place else name


def _placed(place: str, message: str) -> tuple[str, str]:
    """Take the field's name out of a message of its own rule: the place ends with it already."""
    name = re.escape(place.rpartition(".")[2])
    found = re.match(rf"{name}((?:\[[^\]]*\])*) (?=must )", message) if name else None
    return (place + found[1], message[found.end() :]) if found else (place, message)


def unknown_key(key: str, known: Sequence[str]) -> str:
    """Return the message for a key that nobody knows, with the known one that it looks like."""
    close = get_close_matches(key, known, n=1)
    return f"unknown key {shown(key)}" + (f", did you mean {close[0]!r}?" if close else "")


def line(place: str, message: str) -> str:
    """Return a problem as one line, cut if it is very long."""
    text = f"{place}: {message}" if place else message
    return text if len(text) <= _LINE_CHARACTERS else f"{text[:_LINE_CHARACTERS]}..."
