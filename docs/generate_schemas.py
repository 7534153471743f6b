"""Writes the JSON Schemas of plans and reports, docs/schema/*.json, from the attrs classes that read and write them.

Run ``python docs/generate_schemas.py`` after a change of those classes; a test fails when the files are not current.
"""

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import attrs

from parallel_agents import serialization
from parallel_agents._checks import RULE, not_blank
from parallel_agents._models import AgentIdentity, Task
from parallel_agents._outcomes import ParallelExecutionResult
from parallel_agents._plan_chat import ChatTable
from parallel_agents.engines.chat import Price
from parallel_agents.engines.process import ProcessEngine
from parallel_agents.plan import ASSIGNMENTS_LIMIT, AssignmentTable, ClaimTable, PlanTable

FOLDER = Path(__file__).parent / "schema"
DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]

_PRIMITIVES: dict[Any, Schema] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    NoneType: {"type": "null"},
    Any: {},
}


class SchemaMaker:
    """Makes schemas of types; those of attrs classes are collected in ``definitions``."""

    def __init__(self) -> None:
        self.definitions: dict[str, Schema] = {}

    def of(self, hint: Any) -> Schema:
        """Return the schema of a type as it stands in a class."""
        kind = get_origin(hint) or hint
        if kind in _PRIMITIVES:
            return dict(_PRIMITIVES[kind])
        if isinstance(hint, TypeVar):
            return {}
        if kind is Literal:
            return {"enum": list(get_args(hint))}
        if kind in (Union, UnionType):
            return _any_of([self.of(option) for option in get_args(hint)])
        if issubclass(kind, StrEnum):
            return {"enum": [member.value for member in kind]}
        if kind is PathLike:
            return {"type": "string"}
        if issubclass(kind, Mapping):
            return {"type": "object", **self._items("additionalProperties", get_args(hint)[1:])}
        if issubclass(kind, Sequence):
            return {"type": "array", **self._items("items", get_args(hint)[:1])}
        return self._reference(kind)

    def _items(self, keyword: str, hints: Sequence[Any]) -> Schema:
        return {keyword: self.of(hints[0])} if hints and hints[0] is not Any else {}

    def _reference(self, model: type) -> Schema:
        if model.__name__ not in self.definitions:
            self.definitions[model.__name__] = {}  # holds its place, and its name in the order of use
            self.definitions[model.__name__] = self.model(model)
        return {"$ref": f"#/$defs/{model.__name__}"}

    def model(self, model: type) -> Schema:
        """Return the schema of a class: its fields, and its properties as read-only."""
        explained = _explanations(model)
        attributes = {a.name: a for a in attrs.fields(model)}
        written = serialization.model_hints(model)
        properties = {
            name: {**_ruled(self.of(hint), attributes[name]), "description": explained[name]}
            for name, hint in written.items()
        }
        for name, hint in serialization.derived_hints(model).items():
            text = _first_paragraph(getattr(model, name))
            properties[name] = {**self.of(hint), "description": text, "readOnly": True}
        return {
            "type": "object",
            "description": _first_paragraph(model),
            "properties": properties,
            "required": [name for name in written if attributes[name].default is attrs.NOTHING],
            "additionalProperties": False,
        }


def _any_of(options: list[Schema]) -> Schema:
    if {} in options:
        return {}
    distinct = [option for position, option in enumerate(options) if option not in options[:position]]
    if all(option.keys() == {"type"} for option in distinct):
        types = [option["type"] for option in distinct]
        return {"type": types if len(types) > 1 else types[0]}
    return {"anyOf": distinct}


def _ruled(schema: Schema, attribute: "attrs.Attribute[Any]") -> Schema:
    """Add what the field's rules say, and its default, where the schema is of one simple type."""
    if "$ref" in schema or "anyOf" in schema:
        return schema
    default = attribute.default
    shown = {"default": default} if isinstance(default, bool | int | float | str) and default != "" else {}
    rules = {keyword: limit for rule in _rules(_check_of(attribute)) for keyword, limit in rule.items()}
    return {**schema, **rules, **shown}


def _check_of(attribute: "attrs.Attribute[Any]") -> Any:
    return attribute.validator or attribute.metadata.get(RULE)


def _rules(validator: Any) -> Iterator[Schema]:
    if validator is not_blank:
        yield {"pattern": r"\S"}
    elif hasattr(validator, "validator"):  # attrs' optional()
        yield from _rules(validator.validator)
    elif inspect.isfunction(validator):
        given = inspect.getclosurevars(validator).nonlocals
        keywords = {"at_least": "minimum", "above": "exclusiveMinimum", "values": "enum"}
        yield {keyword: given[name] for name, keyword in keywords.items() if given.get(name) is not None}


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("``", "`").replace("`None`", "`null`")


def _first_paragraph(documented: Any) -> str:
    return _plain((inspect.getdoc(documented) or "").partition("\n\n")[0])


def _explanations(model: type) -> dict[str, str]:
    """Return what the docstring says of each attribute."""
    section = (inspect.getdoc(model) or "").partition("Attributes:\n")[2]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: _plain(text) for name, text in found}


def report_schema() -> Schema:
    """Return the schema of a report."""
    maker = SchemaMaker()
    schema = maker.model(ParallelExecutionResult)
    schema["description"] = "The report of an execution, as `parallel-agents run --report` writes it."
    schema["properties"] = {
        "schema_version": {"const": serialization.SCHEMA_VERSION, "description": "The version of this shape."},
        **schema["properties"],
        "meta": {**maker.of(serialization.ReportMeta), "description": "The facts around the result."},
    }
    schema["required"] = ["schema_version", *schema["required"]]
    return _document("Report", schema, maker)


def plan_schema() -> Schema:
    """Return the schema of a plan.

    It cannot see which fields come from ``defaults``, so no field of an assignment is required here.
    """
    maker = SchemaMaker()
    schema = maker.model(PlanTable)
    entry = maker.of(AssignmentTable)
    definitions = maker.definitions
    for model in (AssignmentTable, AgentIdentity, Task):
        definitions[model.__name__]["required"] = []
    fields = definitions[AssignmentTable.__name__]["properties"]
    for_each = fields.pop("for_each")
    definitions["Defaults"] = {**definitions[AssignmentTable.__name__], "properties": dict(fields)}
    definitions["Defaults"]["description"] = schema["properties"]["defaults"]["description"]
    fields["for_each"] = for_each
    definitions[ClaimTable.__name__]["oneOf"] = [{"required": ["resource"]}, {"required": ["path"]}]
    definitions["ProcessEngine"] = _process_schema(maker)
    definitions["ChatEngine"] = _chat_schema(maker)
    text = {"type": "string"}
    for table in (definitions[AssignmentTable.__name__], definitions["Defaults"]):
        table["properties"]["agent"] = _either(text, table["properties"]["agent"])
        claims = table["properties"]["claims"]
        table["properties"]["claims"] = {**claims, "items": _either(text, claims["items"])}
    imported = {"type": "string", "pattern": r"^[\w.]+:[\w.]+$"}
    table_of_kind = {"type": "object", "properties": {"kind": imported}, "required": ["kind"]}
    kinds = [{"$ref": "#/$defs/ProcessEngine"}, {"$ref": "#/$defs/ChatEngine"}]
    engines = [imported, *kinds, {**table_of_kind, "additionalProperties": False}]
    explained = {name: {"description": shown["description"]} for name, shown in schema["properties"].items()}
    schema["properties"] |= {
        "engine": {"anyOf": engines, **explained["engine"]},
        "defaults": {"$ref": "#/$defs/Defaults"},
        "assignments": {
            "type": "array",
            "items": entry,
            "minItems": 1,
            "maxItems": ASSIGNMENTS_LIMIT,
            **explained["assignments"],
        },
    }
    return _document("Plan", schema, maker)


def _either(text: Schema, table: Schema) -> Schema:
    rest = {key: value for key, value in table.items() if key != "$ref"}
    return {"anyOf": [text, {"$ref": table["$ref"]}], **rest}


def _process_schema(maker: SchemaMaker) -> Schema:
    hints = get_type_hints(ProcessEngine.__init__)
    parameters = inspect.signature(ProcessEngine).parameters.values()
    return {
        "type": "object",
        "description": _first_paragraph(ProcessEngine),
        "properties": {
            "kind": {"const": "process"},
            **{parameter.name: maker.of(hints[parameter.name]) for parameter in parameters},
        },
        "required": ["kind", *(p.name for p in parameters if p.default is p.empty)],
        "additionalProperties": False,
    }


def _chat_schema(maker: SchemaMaker) -> Schema:
    schema = maker.model(ChatTable)
    prices, tools = (schema["properties"][name] for name in ("prices", "tools"))
    prices["additionalProperties"] = maker.of(Price)
    tools["items"]["pattern"] = r"^[\w.]+:[\w.]+$"
    return {
        **schema,
        "properties": {"kind": {"const": "chat", "description": "Chooses this engine."}, **schema["properties"]},
        "required": ["kind", *schema["required"]],
    }


def _document(title: str, schema: Schema, maker: SchemaMaker) -> Schema:
    return {"$schema": DIALECT, "title": title, **schema, "$defs": maker.definitions}


SCHEMAS = {"plan.schema.json": plan_schema, "report.schema.json": report_schema}


def text_of(schema: Schema) -> str:
    """Return a schema as it stands in its file."""
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, make in SCHEMAS.items():
        (FOLDER / name).write_text(text_of(make()))
