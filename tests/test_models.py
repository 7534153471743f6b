import copy
import pickle
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from value_strategies import STRATEGIES

from parallel_agents._checks import FrozenDict, FrozenList, frozen_json, shown
from parallel_agents._claims import ClaimMode, ResourceClaim
from parallel_agents._models import (
    NO_USAGE,
    AgentAssignment,
    AgentIdentity,
    ChatMessage,
    CompletionConfig,
    ParallelExecutionGroup,
    Task,
    ToolCall,
    Usage,
)

NAN = float("nan")
INFINITY = float("inf")


class Nameless:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def an_assignment(task_id: str = "t", agent_id: str = "a", **fields: Any) -> AgentAssignment:
    return AgentAssignment(identity=AgentIdentity(id=agent_id), task=Task(id=task_id), **fields)


def a_group(*assignments: AgentAssignment, **fields: Any) -> ParallelExecutionGroup:
    return ParallelExecutionGroup(group_id="g", assignments=assignments or (an_assignment(),), **fields)


VALID: dict[type, Any] = {
    Usage: NO_USAGE,
    ToolCall: ToolCall(id="c", name="look"),
    ChatMessage: ChatMessage(role="user"),
    CompletionConfig: CompletionConfig(),
    AgentIdentity: AgentIdentity(id="a"),
    Task: Task(id="t"),
    ResourceClaim: ResourceClaim(resource="r"),
    AgentAssignment: an_assignment(),
    ParallelExecutionGroup: a_group(),
}


# Rules of single fields. Each is tried with evolve(), which makes a new value as the constructor does.


@pytest.mark.parametrize(
    ("model", "field", "value", "message"),
    [
        (Usage, "input_tokens", -1, "input_tokens must be >= 0, got -1"),
        (Usage, "input_tokens", True, "input_tokens must be an integer, got True (bool)"),
        (Usage, "output_tokens", 1.0, "output_tokens must be an integer, got 1.0 (float)"),
        (Usage, "requests", "7", "requests must be an integer, got '7' (str)"),
        (Usage, "requests", None, "requests must be an integer, got None (NoneType)"),
        (Usage, "cost", -0.01, "cost must be >= 0, got -0.01"),
        (Usage, "cost", NAN, "cost must be finite, got nan"),
        (Usage, "cost", INFINITY, "cost must be finite, got inf"),
        (Usage, "cost", False, "cost must be a number, got False (bool)"),
        (Usage, "cost", "1", "cost must be a number, got '1' (str)"),
        (ChatMessage, "role", "boss", "role must be one of system, user, assistant, tool, got 'boss'"),
        (ChatMessage, "role", [], "role must be one of system, user, assistant, tool, got []"),
        (ChatMessage, "content", None, "content must be a string, got None (NoneType)"),
        (CompletionConfig, "model", " ", "model must not be blank, got ' '"),
        (CompletionConfig, "temperature", -1, "temperature must be >= 0, got -1"),
        (CompletionConfig, "temperature", True, "temperature must be a number, got True (bool)"),
        (CompletionConfig, "max_tokens", 0, "max_tokens must be >= 1, got 0"),
        (CompletionConfig, "seed", 1.5, "seed must be an integer, got 1.5 (float)"),
        (CompletionConfig, "stop", "end", "expected a sequence of items, got 'end' (str)"),
        (CompletionConfig, "stop", [1], "stop[0] must be of type str, got 1 (int)"),
        (CompletionConfig, "response_format", [], "response_format must be a mapping, got [] (list)"),
        (CompletionConfig, "extra", None, "extra must be a mapping, got None (NoneType)"),
        (CompletionConfig, "extra", {"a": {1}}, "extra[a] must be JSON (text, number, true, false, null, list, table)"),
        (AgentIdentity, "id", "", "id must not be blank, got ''"),
        (AgentIdentity, "id", " \n", "id must not be blank, got ' \\n'"),
        (AgentIdentity, "name", "", "name must not be blank, got ''"),
        (AgentIdentity, "name", 5, "name must be a string, got 5 (int)"),
        (AgentIdentity, "role", None, "role must be a string, got None (NoneType)"),
        (AgentIdentity, "instructions", b"x", "instructions must be a string, got b'x' (bytes)"),
        (AgentIdentity, "model", "", "model must not be blank, got ''"),
        (Task, "id", "\t", "id must not be blank, got '\\t'"),
        (Task, "id", 5, "id must be a string, got 5 (int)"),
        (Task, "title", 5, "title must be a string, got 5 (int)"),
        (Task, "description", None, "description must be a string, got None (NoneType)"),
        (Task, "inputs", [], "inputs must be a mapping, got [] (list)"),
        (Task, "inputs", {"a": [NAN]}, "inputs[a][0] must be finite, got nan"),
        (Task, "inputs", {"a": {2: 3}}, "a key of inputs[a] must be a string, got 2 (int)"),
        (ResourceClaim, "resource", " ", "resource must not be blank, got ' '"),
        (ResourceClaim, "mode", "shared", "mode must be of type ClaimMode, got 'shared' (str)"),
        (AgentAssignment, "identity", "a", "identity must be of type AgentIdentity, got 'a' (str)"),
        (AgentAssignment, "task", None, "task must be of type Task, got None (NoneType)"),
        (AgentAssignment, "completion_config", {}, "completion_config must be of type CompletionConfig, got {} (dict)"),
        (AgentAssignment, "max_turns", 0, "max_turns must be >= 1, got 0"),
        (AgentAssignment, "max_turns", None, "max_turns must be an integer, got None (NoneType)"),
        (AgentAssignment, "timeout_seconds", 0, "timeout_seconds must be > 0, got 0"),
        (AgentAssignment, "timeout_seconds", -1.5, "timeout_seconds must be > 0, got -1.5"),
        (AgentAssignment, "timeout_seconds", INFINITY, "timeout_seconds must be finite, got inf"),
        (AgentAssignment, "timeout_seconds", 10**400, "timeout_seconds must be finite, got 1000"),
        (AgentAssignment, "memory_messages", ["hi"], "memory_messages[0] must be of type ChatMessage, got 'hi' (str)"),
        (AgentAssignment, "memory_messages", {}, "expected a sequence of items, got {} (dict)"),
        (AgentAssignment, "resource_claims", "db", "expected a sequence of items, got 'db' (str)"),
        (AgentAssignment, "resource_claims", [5], "resource_claims[0] must be of type ResourceClaim, got 5 (int)"),
        (AgentAssignment, "resource_claims", [" "], "resource must not be blank, got ' '"),
        (ParallelExecutionGroup, "group_id", "", "group_id must not be blank, got ''"),
        (ParallelExecutionGroup, "assignments", [], "assignments must hold at least one assignment"),
        (ParallelExecutionGroup, "assignments", b"x", "expected a sequence of items, got b'x' (bytes)"),
        (ParallelExecutionGroup, "assignments", ["t"], "assignments[0] must be of type AgentAssignment, got 't' (str)"),
        (ParallelExecutionGroup, "max_concurrency", 0, "max_concurrency must be >= 1, got 0"),
        (ParallelExecutionGroup, "max_concurrency", True, "max_concurrency must be an integer, got True (bool)"),
        (ParallelExecutionGroup, "fail_fast", 1, "fail_fast must be True or False, got 1 (int)"),
        (ParallelExecutionGroup, "fail_fast", None, "fail_fast must be True or False, got None (NoneType)"),
    ],
)
def test_a_wrong_value_is_refused_by_name(model: type, field: str, value: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        attrs.evolve(VALID[model], **{field: value})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("value", ["x" * 10_000, " " * 10_000, ["x"] * 10_000, Nameless(), -(10**5000)], ids=type)
def test_the_message_about_a_wrong_value_is_short_whatever_the_value_is(value: object) -> None:
    for model, field in ((Usage, "requests"), (Usage, "cost"), (Task, "id"), (CompletionConfig, "max_tokens")):
        if field == "id" and value == "x" * 10_000:
            continue
        with pytest.raises((TypeError, ValueError)) as caught:
            attrs.evolve(VALID[model], **{field: value})
        assert len(str(caught.value)) < 200
        assert str(caught.value).startswith(f"{field} must ")


def test_a_value_without_a_repr_is_shown_by_its_type() -> None:
    assert shown(Nameless()) == "<Nameless without a repr>"


@pytest.mark.parametrize(("model", "valid"), VALID.items())
def test_values_are_frozen_and_take_keywords_only(model: type, valid: Any) -> None:
    for attribute in attrs.fields(model):
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            setattr(valid, attribute.name, None)
    with pytest.raises(TypeError, match="positional"):
        model("x")


@pytest.mark.parametrize("model", STRATEGIES)
def test_every_value_survives_pickling_copying_and_evolving(model: type) -> None:
    @settings(max_examples=20)
    @given(STRATEGIES[model])
    def check(value: Any) -> None:
        assert pickle.loads(pickle.dumps(value)) == value
        assert copy.deepcopy(value) == value
        assert copy.copy(value) == value
        assert attrs.evolve(value) == value
        assert eval_like(value) == value

    check()


def eval_like(value: Any) -> Any:
    """Build the value again from its own fields, as ``repr()`` shows them."""
    return type(value)(**{a.name: getattr(value, a.name) for a in attrs.fields(type(value))})


# Values


def test_usage_adds_up() -> None:
    one = Usage(input_tokens=1, output_tokens=2, requests=3, cost=0.5)
    two = Usage(input_tokens=10, cost=1)
    assert one + two == Usage(input_tokens=11, output_tokens=2, requests=3, cost=1.5)
    assert sum([one, two], NO_USAGE) == one + two
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = one + 1


def test_an_identity_takes_anything_with_a_name_as_its_id() -> None:
    assert AgentIdentity(id=7).id == "7"
    assert AgentIdentity(id=ClaimMode.SHARED).id == "shared"
    assert AgentIdentity(id="a").name == "a"
    assert AgentIdentity(id="a", name="Ada").name == "Ada"


@pytest.mark.parametrize("id_", ["a\nb", "{x}", "[/]", "\x1b[31m", "<b>", "x" * 10_000, "\ud800"])
def test_ids_may_hold_anything_but_nothing(id_: str) -> None:
    assert an_assignment(id_, id_).task_id == id_


def test_an_assignment_knows_its_ids_and_takes_any_iterable() -> None:
    def said() -> Iterator[ChatMessage]:
        yield ChatMessage(role="user", content="hi")

    assignment = an_assignment("t1", "a1", memory_messages=said(), resource_claims={"db"})
    assert (assignment.task_id, assignment.agent_id) == ("t1", "a1")
    assert assignment.memory_messages == (ChatMessage(role="user", content="hi"),)
    assert assignment.resource_claims == (ResourceClaim(resource="db"),)
    assert (assignment.max_turns, assignment.timeout_seconds) == (20, None)


def test_a_plain_string_is_an_exclusive_claim() -> None:
    shared = ResourceClaim(resource="docs", mode=ClaimMode.SHARED)
    assert an_assignment(resource_claims=["db", shared]).resource_claims == (
        ResourceClaim(resource="db", mode=ClaimMode.EXCLUSIVE),
        shared,
    )


def test_claiming_a_resource_twice_is_refused_with_the_names_sorted() -> None:
    shared = ResourceClaim(resource="b", mode=ClaimMode.SHARED)
    with pytest.raises(ValueError, match=r"^Duplicate resource claims: a, b\. "):
        an_assignment(resource_claims=["b", "a", "c", shared, "a"])


def test_a_group_refuses_repeated_task_ids_before_repeated_agent_ids() -> None:
    with pytest.raises(ValueError, match=r"^Duplicate task IDs: t1, t2\. "):
        a_group(*(an_assignment(task_id, "a") for task_id in ("t2", "t1", "t3", "t1", "t2")))
    with pytest.raises(ValueError, match=r"^Duplicate agent IDs: a, b\. "):
        a_group(*(an_assignment(f"t{n}", agent_id) for n, agent_id in enumerate("bacab")))


def test_a_group_keeps_the_order_of_any_iterable() -> None:
    group = ParallelExecutionGroup(group_id="g", assignments=(an_assignment(f"t{n}", f"a{n}") for n in range(3)))
    assert [a.task_id for a in group.assignments] == ["t0", "t1", "t2"]
    assert (group.max_concurrency, group.fail_fast) == (None, False)


def test_map_gives_each_task_its_own_numbered_replica() -> None:
    identity = AgentIdentity(id="reader", name="Reader", role="r", instructions="i", model="m")
    group = ParallelExecutionGroup.map(
        "g", identity, (Task(id=f"t{n}") for n in range(2)), fail_fast=True, timeout_seconds=5, resource_claims=["db"]
    )
    assert [a.identity for a in group.assignments] == [
        AgentIdentity(id="reader-1", name="Reader-1", role="r", instructions="i", model="m"),
        AgentIdentity(id="reader-2", name="Reader-2", role="r", instructions="i", model="m"),
    ]
    assert [a.task_id for a in group.assignments] == ["t0", "t1"]
    assert group.fail_fast
    assert {a.timeout_seconds for a in group.assignments} == {5}
    assert {a.resource_claims for a in group.assignments} == {(ResourceClaim(resource="db"),)}
    with pytest.raises(ValueError, match="at least one"):
        ParallelExecutionGroup.map("g", identity, [])
    with pytest.raises(TypeError, match="colour"):
        ParallelExecutionGroup.map("g", identity, [Task(id="t")], colour="red")


# JSON inside values


def test_tables_of_json_are_deep_read_only_copies() -> None:
    given_table: dict[str, Any] = {"a": [1, {"b": (True, None, 1.5, "x")}]}
    inputs = Task(id="t", inputs=MappingProxyType(given_table)).inputs
    given_table["a"][1]["b"] = None
    assert inputs == {"a": [1, {"b": [True, None, 1.5, "x"]}]}
    assert CompletionConfig(response_format={"type": "json"}).response_format == {"type": "json"}
    assert CompletionConfig().response_format is None


def test_a_read_only_table_or_list_cannot_be_changed() -> None:
    table, items = FrozenDict(a=1), FrozenList([2, 1])
    changes: list[Callable[[], object]] = [
        lambda: table.__setitem__("a", 2),
        lambda: table.__delitem__("a"),
        lambda: table.__ior__({"b": 1}),
        lambda: table.clear(),
        lambda: table.pop("a"),
        lambda: table.popitem(),
        lambda: table.setdefault("b", 1),
        lambda: table.update(b=1),
        lambda: items.__setitem__(0, 3),
        lambda: items.__delitem__(0),
        lambda: items.__iadd__([3]),
        lambda: items.__imul__(2),
        lambda: items.append(3),
        lambda: items.clear(),
        lambda: items.extend([3]),
        lambda: items.insert(0, 3),
        lambda: items.pop(),
        lambda: items.remove(1),
        lambda: items.reverse(),
        lambda: items.sort(),
    ]
    for change in changes:
        with pytest.raises(TypeError, match="this value is read-only; "):
            change()
    assert (table, items) == ({"a": 1}, [2, 1])


def test_read_only_tables_and_lists_survive_pickling_and_deep_copying() -> None:
    value = frozen_json({"a": [1, {"b": []}]}, "x")
    for again in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value)):
        assert again == value
        assert (type(again), type(again["a"]), type(again["a"][1])) == (FrozenDict, FrozenList, FrozenDict)


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels - 1):
        value = {"a": value}
    return value


def test_json_may_be_a_hundred_levels_deep_and_no_deeper() -> None:
    assert frozen_json(nested(100), "x") == nested(100)
    endless: list[Any] = []
    endless.append(endless)
    for value in (nested(101), nested(100_000), endless):
        with pytest.raises(ValueError, match="must not be nested deeper than 100 levels"):
            frozen_json(value, "x")
