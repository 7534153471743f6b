"""Rules that fields of values share: types are exact, identifiers are not blank, numbers are finite.

Every check raises at once and names the field and what it got. Knows no model.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeAlias

JSON: TypeAlias = "str | int | float | bool | Mapping[str, JSON] | list[JSON] | tuple[JSON, ...] | None"
"""What can be written as JSON without loss; numbers are finite and keys are strings."""

Check: TypeAlias = "Callable[[Any, Any, Any], None]"
"""The signature of an attrs validator: instance, attribute, value."""

JSON_DEPTH = 100
"""Levels of tables and lists that a JSON value may have; deeper ones would end in a RecursionError somewhere."""

_SHOWN_CHARACTERS = 80
"""Characters of a refused value that an error message shows."""


def shown(value: object) -> str:
    """Return *value* for an error message, short whatever its size, and whatever its own ``__repr__`` does."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - a message about a bad value must not fail because of it
        return f"<{type(value).__name__} without a repr>"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def wrong_type(name: str, wanted: str, value: object) -> TypeError:
    """Return the error for a value of the wrong type."""
    return TypeError(f"{name} must be {wanted}, got {shown(value)} ({type(value).__name__})")


def is_text(_instance: object, attribute: Any, value: Any) -> None:
    """Accept a string."""
    if not isinstance(value, str):
        raise wrong_type(attribute.name, "a string", value)


def not_blank(instance: object, attribute: Any, value: str) -> None:
    """Accept a string with something in it besides white space."""
    is_text(instance, attribute, value)
    if not value.strip():
        raise ValueError(f"{attribute.name} must not be blank, got {shown(value)}")


def is_flag(_instance: object, attribute: Any, value: object) -> None:
    """Accept True and False only."""
    if not isinstance(value, bool):
        raise wrong_type(attribute.name, "True or False", value)


def one_of(*values: str) -> Check:
    """Accept one of some strings."""

    def check(_instance: object, attribute: Any, value: object) -> None:
        if value not in values:
            raise ValueError(f"{attribute.name} must be one of {', '.join(values)}, got {shown(value)}")

    return check


def is_a(kind: type, wanted: str | None = None) -> Check:
    """Accept instances of *kind*."""

    def check(_instance: object, attribute: Any, value: object) -> None:
        if not isinstance(value, kind):
            raise wrong_type(attribute.name, wanted or f"of type {kind.__name__}", value)

    return check


def each_is_a(kind: type) -> Check:
    """Accept iterables all of whose items are instances of *kind*."""

    def check(_instance: object, attribute: Any, value: Iterable[object]) -> None:
        for position, item in enumerate(value):
            if not isinstance(item, kind):
                raise wrong_type(f"{attribute.name}[{position}]", f"of type {kind.__name__}", item)

    return check


def integer(*, at_least: int | None = None) -> Check:
    """Accept an int that is no bool, at or above a bound."""

    def check(_instance: object, attribute: Any, value: object) -> None:
        if type(value) is not int:
            raise wrong_type(attribute.name, "an integer", value)
        if at_least is not None and value < at_least:
            raise ValueError(f"{attribute.name} must be >= {at_least}, got {shown(value)}")

    return check


def number(*, at_least: float | None = None, above: float | None = None) -> Check:
    """Accept a finite int or float that is no bool, within its bounds."""

    def check(_instance: object, attribute: Any, value: object) -> None:
        if type(value) is not float and type(value) is not int:
            raise wrong_type(attribute.name, "a number", value)
        if not _is_finite(value):
            raise ValueError(f"{attribute.name} must be finite, got {shown(value)}")
        if at_least is not None and value < at_least:
            raise ValueError(f"{attribute.name} must be >= {at_least}, got {shown(value)}")
        if above is not None and value <= above:
            raise ValueError(f"{attribute.name} must be > {above}, got {shown(value)}")

    return check


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the floats: it could not be added to a clock's time
        return False


RULE = "rule"
"""The key of a field's metadata under which its check stands when ``check_rules()`` applies it."""


def check_rules(instance: Any) -> None:
    """Apply the checks that stand in the fields' metadata, in the order of the fields.

    For values that are made by the hundred thousand: attrs calls a validator for each field of each instance, while
    these look first, in one expression, whether everything is as plain as it nearly always is.
    """
    for attribute in instance.__attrs_attrs__:
        if RULE in attribute.metadata:
            attribute.metadata[RULE](instance, attribute, getattr(instance, attribute.name))


def as_tuple(value: Iterable[Any]) -> tuple[Any, ...]:
    """Turn any iterable but a string into a tuple: ``"ab"`` for ``("ab",)`` is a slip, not a wish."""
    if type(value) is tuple:
        return value
    if isinstance(value, str | bytes | Mapping):
        raise TypeError(f"expected a sequence of items, got {shown(value)} ({type(value).__name__})")
    return tuple(value)


def _refuse(*_args: object, **_kwargs: object) -> NoReturn:
    raise TypeError("this value is read-only; use attrs.evolve() on its owner to change it")


class FrozenDict(dict[str, Any]):
    """A dict that cannot be changed: it compares, pickles and serialises as the dict it is."""

    __slots__ = ()
    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type["FrozenDict"], tuple[dict[str, Any]]]:
        return FrozenDict, (dict(self),)


class FrozenList(list[Any]):
    """A list that cannot be changed: it compares, pickles and serialises as the list it is."""

    __slots__ = ()
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse
    append = clear = extend = insert = pop = remove = reverse = sort = _refuse

    def __reduce__(self) -> tuple[type["FrozenList"], tuple[list[Any]]]:
        return FrozenList, (list(self),)


def frozen_json(value: object, path: str, depth: int = JSON_DEPTH) -> Any:
    """Return a read-only deep copy of *value*, which must be JSON; errors name the place below *path*.

    Tables and lists may be nested *depth* levels deep, which also ends those that contain themselves.
    """
    if value is None or type(value) in (str, bool, int):
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise ValueError(f"{path} must be finite, got {value}")
        return value
    if isinstance(value, Mapping | list | tuple) and not depth:
        raise ValueError(f"{path[:_SHOWN_CHARACTERS]}... must not be nested deeper than {JSON_DEPTH} levels")
    if isinstance(value, Mapping):
        for key in value:
            if type(key) is not str:
                raise wrong_type(f"a key of {path}", "a string", key)
        return FrozenDict({key: frozen_json(item, f"{path}[{key}]", depth - 1) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return FrozenList([frozen_json(item, f"{path}[{position}]", depth - 1) for position, item in enumerate(value)])
    raise wrong_type(path, "JSON (text, number, true, false, null, list, table)", value)


def json_table(value: object, name: str) -> FrozenDict:
    """Return a read-only copy of a mapping whose values are JSON; *name* is the field that an error is about."""
    if not isinstance(value, Mapping):
        raise wrong_type(name, "a mapping", value)
    table: FrozenDict = frozen_json(value, name)
    return table


def thawed(value: Any) -> Any:
    """Return a deep copy of a JSON value that may be changed."""
    if isinstance(value, Mapping):
        return {key: thawed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [thawed(item) for item in value]
    return value
