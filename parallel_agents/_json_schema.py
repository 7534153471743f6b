"""JSON Schema: what a typed function takes, and whether a value is what a schema wants.

Schemas of functions are pydantic's, their descriptions come from docstrings, and values are checked by jsonschema.
References to other documents are not followed: a schema may come from a server, and reading it must fetch nothing.
"""

import inspect
from collections.abc import Callable
from typing import Any

from ._checks import shown

try:
    import docstring_parser
    import jsonschema
    import pydantic
    import pydantic_core
    import referencing.exceptions
    from jsonschema.validators import validator_for
except ModuleNotFoundError as error:
    message = "Tools and JSON Schema need jsonschema and pydantic: pip install 'parallel-agents[tools]'"
    raise ModuleNotFoundError(message, name=error.name) from error

_PROBLEMS = 5
"""Problems of one value that are told."""

_NO_OTHER_DOCUMENTS: referencing.Registry[Any] = referencing.Registry()


class SchemaCheck:
    """Tells what is wrong with values.

    Args:
        schema: A JSON Schema, of the draft that it names, or else of 2020-12.

    Raises:
        ValueError: If it is no JSON Schema.
    """

    def __init__(self, schema: dict[str, Any]) -> None:
        kind = validator_for(schema, default=jsonschema.Draft202012Validator)
        try:
            kind.check_schema(schema)
        except jsonschema.SchemaError as error:
            raise ValueError(f"no JSON Schema: {error.message} at {error.json_path}") from None
        self._validator = kind(schema, registry=_NO_OTHER_DOCUMENTS)

    def problems(self, value: Any) -> list[str]:
        """Return what is wrong with *value*, each problem with its place, the first few only; empty if it is fine."""
        found: list[str] = []
        try:
            for problem in self._validator.iter_errors(value):
                found.append(f"{problem.json_path}: {_short(problem.message)}")
                if len(found) == _PROBLEMS:
                    break
        except RecursionError:
            return ["the schema refers to itself without an end"]
        except referencing.exceptions.Unresolvable as error:
            return [f"the schema refers to {shown(error.ref)}, which is not in it"]
        return found


def _short(message: str) -> str:
    return message if len(message) <= 500 else f"{message[:500]}..."


def schema_of(function: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """Return what a function does and the JSON Schema of its arguments, by its signature and docstring.

    Raises:
        TypeError: If it cannot be called with named arguments that are JSON.
    """
    name = getattr(function, "__name__", repr(function))
    refused = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in refused:
            raise TypeError(f"{name}: the parameter {parameter} cannot be given by its name")
    try:
        as_type: Any = function  # pydantic takes functions for types of what they are called with
        schema = pydantic.TypeAdapter(as_type).json_schema()
    except (pydantic.errors.PydanticUserError, NameError) as error:
        raise TypeError(f"{name}: no JSON Schema for its parameters: {str(error).splitlines()[0]}") from error
    docs = docstring_parser.parse(inspect.getdoc(function) or "")
    described = {parameter.arg_name: parameter.description for parameter in docs.params if parameter.description}
    for parameter_name, of_parameter in schema["properties"].items():
        if parameter_name in described:
            of_parameter.setdefault("description", described[parameter_name])
    return (docs.description or "").strip(), schema


def validated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return *function* with its JSON arguments turned into the types of its parameters."""
    return pydantic.validate_call(function)


def as_json(value: object, fallback: Callable[[Any], Any]) -> Any:
    """Return a value as JSON, also if it holds dataclasses, dates or pydantic models; *fallback* knows the rest."""
    return pydantic_core.to_jsonable_python(value, fallback=fallback)
