import enum
import importlib.util
import inspect
import json
import math
import pickle
import platform
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import attrs
import cattrs
import jsonschema
import pytest
from hypothesis import given, settings
from value_strategies import STRATEGIES, execution_results

from parallel_agents import _claims, _models, _outcomes
from parallel_agents._claims import ResourceClaim
from parallel_agents._models import (
    AgentAssignment,
    AgentIdentity,
    ParallelExecutionGroup,
    Task,
    Usage,
)
from parallel_agents._outcomes import (
    AgentOutcome,
    AgentRunResult,
    OutcomeStatus,
    ParallelExecutionResult,
    TerminationReason,
)
from parallel_agents.events import ParallelEvent
from parallel_agents.serialization import (
    EnvironmentFacts,
    InvalidDataError,
    PlanFacts,
    ReportMeta,
    from_json,
    parse_json,
    read_report,
    report,
    structure,
    to_json,
    unstructure,
)

DOCS = Path(__file__).parent.parent / "docs"


def values_of(module: ModuleType) -> list[type]:
    found = [c for _, c in inspect.getmembers(module, inspect.isclass) if attrs.has(c)]
    return [c for c in found if c.__module__ == module.__name__ and not c.__name__.startswith("_")]


def an_outcome(output: object = None, **other: Any) -> AgentOutcome[Any]:
    done = AgentRunResult(
        task_id="t", agent_id="a", termination_reason=TerminationReason.COMPLETED, output=output, **other
    )
    return AgentOutcome(task_id="t", agent_id="a", result=done)


def a_result(*given: AgentOutcome[Any]) -> ParallelExecutionResult[Any]:
    lost: AgentOutcome[Any] = AgentOutcome(
        task_id="t2", agent_id="b", error="Timed out after 3 s", status=OutcomeStatus.TIMED_OUT, usage=Usage(cost=2.5)
    )
    return ParallelExecutionResult(group_id="g", outcomes=given or (an_outcome("x"), lost), total_duration_seconds=1.5)


def problems_of(type_: Any, data: object) -> tuple[str, ...]:
    with pytest.raises(InvalidDataError) as caught:
        structure(type_, data)
    return caught.value.problems


# Round trips


def test_every_class_of_values_is_tested_here() -> None:
    assert set(STRATEGIES) == {c for module in (_models, _outcomes, _claims) for c in values_of(module)}


@pytest.mark.parametrize("type_", STRATEGIES)
def test_what_was_written_reads_back_as_the_same_value(type_: Any) -> None:
    @given(STRATEGIES[type_])
    def check(value: object) -> None:
        text = to_json(value)
        assert from_json(type_, text) == value
        assert from_json(type_, text.encode()) == value
        assert structure(type_, unstructure(value)) == value
        assert text.isascii()
        assert text.isprintable()

    check()


@pytest.mark.parametrize("type_", STRATEGIES)
def test_every_derived_value_is_written_and_ignored_on_reading(type_: Any) -> None:
    derived = {name for name, member in vars(type_).items() if isinstance(member, property)}

    @settings(max_examples=20)
    @given(STRATEGIES[type_])
    def check(value: object) -> None:
        table = unstructure(value)
        assert derived <= table.keys()
        assert structure(type_, {**table, **dict.fromkeys(derived, "wrong")}) == value
        assert structure(type_, {key: item for key, item in table.items() if key not in derived}) == value

    check()


@pytest.mark.parametrize("type_", STRATEGIES)
def test_every_class_refuses_a_field_that_it_does_not_know(type_: Any) -> None:
    @settings(max_examples=5)
    @given(STRATEGIES[type_])
    def check(value: object) -> None:
        assert problems_of(type_, {**unstructure(value), "colour": 1}) == ("colour: unknown key 'colour'",)

    check()


def test_results_are_written_with_their_derived_values_and_lower_case_names() -> None:
    table = unstructure(a_result())
    assert table["all_succeeded"] is False
    assert (table["agents_succeeded"], table["agents_failed"], table["agents_parked"]) == (1, 1, 0)
    assert table["total_cost"] == 2.5
    assert table["total_usage"] == {"input_tokens": 0, "output_tokens": 0, "requests": 0, "cost": 2.5}
    first, second = table["outcomes"]
    assert (first["status"], first["output"], first["is_success"]) == ("succeeded", "x", True)
    assert (first["result"]["termination_reason"], first["result"]["completion_summary"]) == ("completed", None)
    assert (second["status"], second["is_failure"], second["output"]) == ("timed_out", True, None)
    assert type(first["status"]) is str


def test_an_event_is_written_with_its_fields() -> None:
    event = ParallelEvent(name="n", group_id="g", at_seconds=1.0, fields=MappingProxyType({"agent_count": 2}))
    assert unstructure(event) == {
        "name": "n",
        "group_id": "g",
        "task_id": None,
        "agent_id": None,
        "at_seconds": 1.0,
        "fields": {"agent_count": 2},
    }


def test_a_claim_of_a_file_with_several_names_keeps_its_folder(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    claim = ResourceClaim.path(tmp_path / "a")
    again = from_json(ResourceClaim, to_json(claim))
    assert claim.within is not None
    assert (again, again.within) == (claim, claim.within)


def test_what_is_written_is_not_shared_with_the_value() -> None:
    task = Task(id="t", inputs={"a": [1]})
    table = unstructure(task)
    table["inputs"]["a"].append(2)
    assert task.inputs == {"a": [1]}


def test_the_live_exception_of_an_outcome_is_neither_written_nor_read() -> None:
    failed: AgentOutcome[Any] = AgentOutcome(task_id="t", agent_id="a", error="E: x", exception=ValueError("secret"))
    assert "secret" not in to_json(failed)
    assert from_json(AgentOutcome, to_json(failed)) == failed
    assert problems_of(AgentOutcome, {**unstructure(failed), "exception": "x"}) == (
        "exception: unknown key 'exception'",
    )


def test_only_values_are_written() -> None:
    with pytest.raises(TypeError, match="must be a value of parallel_agents, got \\[\\]"):
        to_json([])


def test_the_global_converter_stays_as_it_was() -> None:
    to_json(a_result())
    assert "total_cost" not in cattrs.unstructure(Usage())
    assert cattrs.structure({"cost": "7"}, Usage).cost == 7


# Outputs that are not JSON


class Colour(enum.IntEnum):
    RED = 1


class Word(enum.StrEnum):
    HELLO = "hello"


class Silent:
    def __repr__(self) -> str:
        raise RuntimeError("no")


class Opaque:
    def __repr__(self) -> str:
        return "<opaque>"


ENDLESS: list[object] = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    ("output", "written"),
    [
        ((1, (2,)), [1, [2]]),
        ({"a": (True, None)}, {"a": [True, None]}),
        (MappingProxyType({"a": 1}), {"a": 1}),
        (Colour.RED, 1),
        (Word.HELLO, "hello"),
        ({Word.HELLO: 1}, {"hello": 1}),
        (b"x", {"$repr": "b'x'", "$type": "bytes"}),
        ({"a": [Opaque()]}, {"a": [{"$repr": "<opaque>", "$type": "Opaque"}]}),
        ({1: "a"}, {"$repr": "{1: 'a'}", "$type": "dict"}),
        ({1}, {"$repr": "{1}", "$type": "set"}),
        (math.nan, {"$repr": "nan", "$type": "float"}),
        ([-math.inf], [{"$repr": "-inf", "$type": "float"}]),
        (Silent(), {"$repr": "<no repr: RuntimeError>", "$type": "Silent"}),
        pytest.param(10**5000, {"$repr": "<no repr: ValueError>", "$type": "int"}, id="long"),
        (b"x" * 20_000, {"$repr": "b'" + "x" * 9_998 + "...", "$type": "bytes"}),
    ],
)
def test_what_is_not_json_in_an_output_is_written_as_its_repr(output: object, written: object) -> None:
    outcome = from_json(AgentOutcome, to_json(an_outcome(output)))
    assert outcome.output == written
    assert type(outcome.output) is type(written)
    assert from_json(AgentOutcome, to_json(outcome)) == outcome


def test_an_output_without_an_end_is_written_to_a_depth() -> None:
    output: Any = from_json(AgentOutcome, to_json(an_outcome(ENDLESS))).output
    for _ in range(100):
        (output,) = output
    assert output == {"$repr": "[[...]]", "$type": "list"}


@pytest.mark.parametrize("text", ["\x1b[31m", "\x9b31m", "\x7f", "\u202e", "a\nb", "\ud800"])
def test_text_from_outside_is_harmless_in_the_json_and_comes_back_as_it_was(text: str) -> None:
    written = to_json(an_outcome(text))
    assert written.isascii()
    assert written.isprintable()
    assert from_json(AgentOutcome, written).output == text


# Strict reading

OK: dict[str, Any] = {"task_id": "t", "agent_id": "a", "termination_reason": "completed"}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"turns": True}, "turns: must be an integer, got True (bool)"),
        ({"turns": "7"}, "turns: must be an integer, got '7' (str)"),
        ({"turns": 7.0}, "turns: must be an integer, got 7.0 (float)"),
        ({"turns": None}, "turns: must be an integer, got None (NoneType)"),
        ({"turns": -1}, "turns: must be >= 0, got -1"),
        ({"duration_seconds": "1"}, "duration_seconds: must be a number, got '1' (str)"),
        ({"duration_seconds": False}, "duration_seconds: must be a number, got False (bool)"),
        ({"duration_seconds": math.nan}, "duration_seconds: must be finite, got nan"),
        ({"task_id": 5}, "task_id: must be a string, got 5 (int)"),
        ({"task_id": " "}, "task_id: must not be blank, got ' '"),
        ({"termination_reason": "COMPLETED"}, "termination_reason: must be one of completed, max_turns, "),
        ({"termination_reason": []}, "termination_reason: must be one of completed, max_turns, "),
        ({"messages": "ab"}, "messages: must be a list, got 'ab' (str)"),
        ({"messages": {}}, "messages: must be a list, got {} (dict)"),
        ({"messages": [{"role": "user"}, 7]}, "messages[1]: must be a table, got 7 (int)"),
        (
            {"messages": [{"role": "boss"}]},
            "messages[0].role: must be one of system, user, assistant, tool, got 'boss'",
        ),
        ({"messages": [{"content": "x"}]}, "messages[0].role: missing"),
        ({"usage": None}, "usage: must be a table, got None (NoneType)"),
        ({"usage": {"cost": {}}}, "usage.cost: must be a number, got {} (dict)"),
        ({"error_message": "x"}, "error_message goes with ERROR only, not with COMPLETED"),
        ({"turn": 1}, "turn: unknown key 'turn', did you mean 'turns'?"),
        ({"\n": 1}, "'\\n': unknown key '\\n'"),
    ],
)
def test_reading_is_strict_and_says_where(fields: dict[str, Any], problem: str) -> None:
    (line,) = problems_of(AgentRunResult, {**OK, **fields})
    assert line.startswith(problem)


def test_flags_are_true_or_false_only() -> None:
    group = unstructure(ParallelExecutionGroup(group_id="g", assignments=[_an_assignment()]))
    assert problems_of(ParallelExecutionGroup, {**group, "fail_fast": 1}) == (
        "fail_fast: must be true or false, got 1 (int)",
    )


def _an_assignment() -> AgentAssignment:
    return AgentAssignment(identity=AgentIdentity(id="a"), task=Task(id="t"))


def test_a_problem_inside_a_table_of_json_names_its_place() -> None:
    assert problems_of(Task, {"id": "t", "inputs": {"a": [{"b": math.inf}]}}) == (
        "inputs[a][0][b]: must be finite, got inf",
    )
    assert problems_of(Task, {"id": "t", "inputs": 3}) == ("inputs: must be a mapping, got 3 (int)",)


def test_all_problems_are_told_at_once() -> None:
    table = unstructure(a_result())
    table["outcomes"][0]["duration_second"] = 1
    table["outcomes"][0]["result"]["usage"]["cost"] = -1
    table["outcomes"][1]["attempts"] = "1"
    table["outcomes"][1]["status"] = "lost"
    del table["outcomes"][1]["task_id"]
    del table["group_id"]
    text = json.dumps(table)
    with pytest.raises(InvalidDataError) as caught:
        from_json(ParallelExecutionResult, text)
    assert sorted(str(caught.value).splitlines()) == sorted(
        [
            "group_id: missing",
            "outcomes[0].result.usage.cost: must be >= 0, got -1",
            "outcomes[0].duration_second: unknown key 'duration_second', did you mean 'duration_seconds'?",
            "outcomes[1].task_id: missing",
            f"outcomes[1].status: must be one of {', '.join(OutcomeStatus)}, got 'lost'",
            "outcomes[1].attempts: must be an integer, got '1' (str)",
        ]
    )


def test_many_unknown_keys_are_counted() -> None:
    problems = problems_of(Usage, {f"k{n}": n for n in range(100)})
    assert len(problems) == 11
    assert problems[-1] == "90 more unknown keys"


def test_long_keys_are_cut() -> None:
    (problem,) = problems_of(Usage, {"k" * 10_000: 1})
    assert len(problem) < 300


def test_a_rule_across_fields_is_told_at_the_table() -> None:
    table = unstructure(a_result())
    table["outcomes"][0]["error"] = "x"
    assert problems_of(ParallelExecutionResult, table) == (
        "outcomes[0]: Exactly one of result or error must be given for task 't'",
    )


def test_a_value_that_is_no_table_has_no_place() -> None:
    assert problems_of(ParallelExecutionResult, 5) == ("must be a table, got 5 (int)",)
    assert problems_of(OutcomeStatus, "x")[0].startswith("must be one of succeeded, failed, ")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "line 1, column 1: Expecting value"),
        ('{"a": 1,\n  b}', "line 2, column 3: "),
        ("[NaN]", "NaN is no JSON number"),
        ("[-Infinity]", "-Infinity is no JSON number"),
        ("[1e999]", "'1e999' is too large for a number"),
        ("[" + "1" * 10_000 + "]", "Exceeds the limit"),
        ('{"a": {"b": 1, "c": 2, "b": 3}}', "key 'b' is given twice"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        (b'"\xff"', "not UTF-8: byte 1 cannot be read"),
    ],
)
def test_json_that_is_not_plain_json_is_refused(text: str | bytes, problem: str) -> None:
    with pytest.raises(InvalidDataError) as caught:
        parse_json(text)
    assert str(caught.value).startswith(problem)


def test_a_byte_order_mark_is_no_problem() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


def test_the_error_is_a_value_error_that_survives_pickling() -> None:
    error = InvalidDataError(["a: b", "c: d"])
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, InvalidDataError)
    assert issubclass(InvalidDataError, ValueError)
    assert again.problems == ("a: b", "c: d")
    assert str(again) == "a: b\nc: d"


# Reports

PLAN = PlanFacts(path="plans/review.toml", max_concurrency=4, fail_fast=True)


def test_a_report_is_the_result_with_a_version_and_the_facts() -> None:
    result = a_result()
    written = report(result, plan=PLAN, environment=EnvironmentFacts.current(backend="trio"))
    meta = written.pop("meta")
    assert written.pop("schema_version") == 1
    assert written == unstructure(result)
    assert meta["plan"] == {"path": "plans/review.toml", "max_concurrency": 4, "fail_fast": True}
    assert meta["environment"].keys() == {"python", "platform", "library", "backend"}
    assert meta["environment"]["backend"] == "trio"
    assert platform.python_version() in meta["environment"]["python"]


def test_a_report_tells_neither_the_host_nor_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_TEST", "canary-6021")
    monkeypatch.setattr(platform, "node", lambda: "canary-host")
    assert "canary" not in json.dumps(report(a_result(), plan=PLAN))


def test_a_report_reads_back_from_text_bytes_and_a_file(tmp_path: Path) -> None:
    result = a_result()
    text = json.dumps(report(result, plan=PLAN))
    path = tmp_path / "report.json"
    path.write_text(text)
    for source in (text, text.encode(), path):
        read = read_report(source)
        assert read.result == result
        assert read.meta == ReportMeta(plan=PLAN, environment=EnvironmentFacts.current())


def test_a_report_without_facts_can_be_read() -> None:
    written = report(a_result())
    assert written["meta"]["plan"] is None
    del written["meta"]
    assert read_report(json.dumps(written)).meta == ReportMeta()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"schema_version": 2}, "schema_version: must be 1, got 2"),
        ({"schema_version": True}, "schema_version: must be 1, got True"),
        ({"schema_version": None}, "schema_version: must be 1, got None"),
        ({"meta": []}, "meta: must be a table, got [] (list)"),
        ({"meta": {"plans": 1}}, "meta.plans: unknown key 'plans', did you mean 'plan'?"),
        ({"group": "g"}, "group: unknown key 'group', did you mean 'group_id'?"),
    ],
)
def test_a_report_of_another_shape_is_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidDataError) as caught:
        read_report(json.dumps({**report(a_result()), **change}))
    assert caught.value.problems == (problem,)


def test_a_report_that_is_no_table_or_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match="a report must be a table, got \\[\\]"):
        read_report("[]")
    with pytest.raises(InvalidDataError, match="cannot be read: No such file"):
        read_report(tmp_path / "nothing.json")
    with pytest.raises(InvalidDataError, match="cannot be read: Is a directory"):
        read_report(tmp_path)


# Schemas


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate_schemas", DOCS / "generate_schemas.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def schema_of(name: str) -> Any:
    return json.loads((DOCS / "schema" / name).read_text())


def test_the_schemas_in_the_documentation_are_current() -> None:
    module = generator()
    for name, make in module.SCHEMAS.items():
        assert (DOCS / "schema" / name).read_text() == module.text_of(make()), "run docs/generate_schemas.py"


@pytest.mark.parametrize("name", ["plan.schema.json", "report.schema.json"])
def test_the_schemas_are_schemas_and_explain_every_field(name: str) -> None:
    schema = schema_of(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    for model, table in schema["$defs"].items():
        for key, described in table["properties"].items():
            assert model == "ProcessEngine" or described["description"], f"{model}.{key}"


@settings(max_examples=20)
@given(execution_results)
def test_every_report_matches_the_schema(result: ParallelExecutionResult[Any]) -> None:
    written = json.loads(json.dumps(report(result, plan=PLAN)))
    jsonschema.validate(written, schema_of("report.schema.json"), jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    "change",
    [
        {"colour": 1},
        {"schema_version": 2},
        {"total_duration_seconds": -1},
        {"total_duration_seconds": "1"},
        {"group_id": " "},
        {"outcomes": [{"task_id": "t"}]},
    ],
)
def test_the_schema_refuses_what_reading_refuses(change: dict[str, Any]) -> None:
    written = {**report(a_result()), **change}
    with pytest.raises(InvalidDataError):
        read_report(json.dumps(written))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(written, schema_of("report.schema.json"), jsonschema.Draft202012Validator)
