import json
import os
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import attrs
import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parallel_agents import plan as plan_module
from parallel_agents._claims import ClaimMode, ResourceClaim
from parallel_agents._errors import InvalidPlanError
from parallel_agents._executor import ParallelExecutor
from parallel_agents._models import AgentAssignment, AgentIdentity, ChatMessage, ClaimPolicy, CompletionConfig, Task
from parallel_agents.engines import FunctionEngine
from parallel_agents.engines.chat import ChatEngine, Price
from parallel_agents.engines.process import ProcessEngine
from parallel_agents.engines.worktree import WorktreeEngine
from parallel_agents.plan import Plan, load_plan
from parallel_agents.serialization import PlanFacts

ROOT = Path(__file__).parent.parent
SCHEMA = json.loads((ROOT / "docs" / "schema" / "plan.schema.json").read_text())

SMALL: dict[str, Any] = {
    "group_id": "g",
    "engine": {"kind": "process", "command": ["true"]},
    "assignments": [{"agent": "a", "task": {"id": "t"}}],
}
"""A plan with nothing but what it must have."""

REVIEW = """
group_id = "review"
max_concurrency = 4
fail_fast = true

[engine]
kind = "process"
command = ["cat", "{task.inputs[path]}"]

[defaults]
timeout_seconds = 60

[[assignments]]
agent = "reviewer-1"
task = { id = "api", description = "Review {the} API", inputs = { path = "src/api.py" } }
claims = ["db:users", { path = "src/api.py" }, { path = "docs", mode = "shared" }]

[[assignments]]
for_each = "src/**/*.py"
agent = "checker-{index}"
task = { id = "check-{stem}-{index}", inputs = { path = "{path}" } }
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plan's folder with some files."""
    for name in ("src/api.py", "src/util.py", "src/deep/x.py", "docs/a.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


Load = Callable[..., Plan]


@pytest.fixture
def load(folder: Path) -> Load:
    """Load a plan that is given as its changes of the smallest one, or as text."""

    def load_text(text: str | bytes | None = None, *, suffix: str = ".json", **changes: Any) -> Plan:
        content = json.dumps({**SMALL, **changes}) if text is None else text
        path = folder / f"plan{suffix}"
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return load_plan(path)

    return load_text


@pytest.fixture
def problems(load: Load) -> Callable[..., list[str]]:
    """Load a plan that is wrong, and return its problems without the path of the file."""

    def problems_of(*args: Any, **changes: Any) -> list[str]:
        with pytest.raises(InvalidPlanError) as caught:
            load(*args, **changes)
        found = [problem.split("plan.", 1) for problem in caught.value.problems]
        return [rest[0] if len(rest) == 1 else f"plan.{rest[1]}" for rest in found]

    return problems_of


Problems = Callable[..., list[str]]


@pytest.fixture
def module(folder: Path) -> Iterator[Callable[[str, str], None]]:
    """Write a module beside the plan; forget it afterwards."""
    written = []

    def write(name: str, source: str) -> None:
        (folder / f"{name}.py").write_text(textwrap.dedent(source))
        written.append(name)

    yield write
    for name in written:
        sys.modules.pop(name, None)


def an_entry(**fields: Any) -> dict[str, Any]:
    return {"agent": "a", "task": {"id": "t"}, **fields}


# What a plan says


def test_a_plan_becomes_a_group_and_an_engine(load: Load, folder: Path) -> None:
    plan = load(REVIEW, suffix=".toml")
    group = plan.group
    assert (group.group_id, group.max_concurrency, group.fail_fast) == ("review", 4, True)
    assert isinstance(plan.engine, ProcessEngine)
    assert [a.task_id for a in group.assignments] == ["api", "check-api-1", "check-x-2", "check-util-3"]
    assert [a.agent_id for a in group.assignments] == ["reviewer-1", "checker-1", "checker-2", "checker-3"]
    assert [a.task.inputs["path"] for a in group.assignments[1:]] == ["src/api.py", "src/deep/x.py", "src/util.py"]
    assert {a.timeout_seconds for a in group.assignments} == {60}
    first = group.assignments[0]
    assert first.task.description == "Review {the} API"
    assert first.resource_claims == (
        ResourceClaim(resource="db:users"),
        ResourceClaim.path(folder / "src/api.py"),
        ResourceClaim.path(folder / "docs", mode=ClaimMode.SHARED),
    )


def test_the_same_plan_reads_the_same_in_every_format(load: Load) -> None:
    table = tomllib.loads(REVIEW)
    toml = load(REVIEW, suffix=".toml").group
    assert load(json.dumps(table), suffix=".JSON").group == toml
    assert load(yaml.safe_dump(table), suffix=".yaml").group == toml
    assert load(yaml.safe_dump(table), suffix=".yml").group == toml
    assert load(b"\xef\xbb\xbf" + REVIEW.encode(), suffix=".toml").group == toml


def test_every_field_of_an_assignment_can_be_given(load: Load) -> None:
    entry: dict[str, Any] = {
        "agent": {"id": "a", "name": "A", "role": "r", "instructions": "i", "model": "m", "base_url": "b"},
        "task": {"id": "t", "title": "T", "description": "d", "inputs": {"x": [1, None]}, "depends_on": ["first"]},
        "claims": [{"resource": "r", "mode": "shared"}],
        "completion_config": {"temperature": 0.5, "stop": ["."], "extra": {"k": 1}},
        "max_turns": 3,
        "timeout_seconds": 1.5,
        "memory_messages": [{"role": "user", "content": "hi"}],
    }
    first = {"agent": "first", "task": {"id": "first"}}
    _, read = load(assignments=[first, entry]).group.assignments
    assert attrs.asdict(read.identity) == entry["agent"]
    assert attrs.asdict(read.task) == {**entry["task"], "depends_on": ("first",)}
    assert read.resource_claims == (ResourceClaim(resource="r", mode=ClaimMode.SHARED),)
    assert read.completion_config == CompletionConfig(temperature=0.5, stop=["."], extra={"k": 1})
    assert (read.max_turns, read.timeout_seconds) == (3, 1.5)
    assert read.memory_messages == (ChatMessage(role="user", content="hi"),)
    assert {"identity", "task", "resource_claims", *entry} - {"agent", "claims"} == {
        a.name for a in attrs.fields(AgentAssignment)
    }


def test_defaults_are_merged_key_by_key_and_the_assignment_has_the_last_word(load: Load) -> None:
    plan = load(
        defaults={
            "agent": {"id": "default", "role": "reviewer"},
            "task": {"inputs": {"lang": "py", "deep": {"a": 1, "b": 2}}, "title": "T"},
            "claims": ["db"],
            "max_turns": 5,
        },
        assignments=[
            {"agent": "one", "task": {"id": "t1", "inputs": {"deep": {"b": 3}}}},
            {"agent": {"id": "two", "role": ""}, "task": {"id": "t2"}, "claims": [], "max_turns": 6},
            {"task": {"id": "t3"}},
        ],
    )
    one, two, three = plan.group.assignments
    assert (one.agent_id, one.identity.role) == ("one", "reviewer")
    assert one.task.inputs == {"lang": "py", "deep": {"a": 1, "b": 3}}
    assert (one.task.title, one.max_turns, one.resource_claims) == ("T", 5, (ResourceClaim(resource="db"),))
    assert (two.identity.role, two.max_turns, two.resource_claims) == ("", 6, ())
    assert three.agent_id == "default"


def test_a_plan_tells_its_facts_as_it_is_run(load: Load, folder: Path) -> None:
    plan = load(max_concurrency=3)
    assert plan.facts == PlanFacts(path=str(folder / "plan.json"), max_concurrency=3, fail_fast=False)
    changed = attrs.evolve(plan, group=attrs.evolve(plan.group, max_concurrency=None, fail_fast=True))
    assert changed.facts == PlanFacts(path=str(folder / "plan.json"), max_concurrency=None, fail_fast=True)


def test_only_keeps_the_chosen_tasks_in_the_order_of_the_plan(load: Load) -> None:
    plan = load(assignments=[{"agent": f"a{n}", "task": {"id": f"task-{n}"}} for n in range(4)])
    chosen = plan.only(["task-3", "task-1", "task-3"])
    assert [a.task_id for a in chosen.group.assignments] == ["task-1", "task-3"]
    assert chosen.engine is plan.engine
    with pytest.raises(InvalidPlanError) as caught:
        plan.only(["tusk-1", "qqqq", "task-2"])
    assert caught.value.problems == (
        "the plan has no task 'qqqq'",
        "the plan has no task 'tusk-1', did you mean 'task-1'?",
    )
    with pytest.raises(InvalidPlanError, match="nothing to run"):
        plan.only([])


# Files


def test_texts_of_a_for_each_are_filled_everywhere_and_braces_can_be_written(load: Load) -> None:
    plan = load(
        defaults={"agent": {"role": "{stem}"}, "claims": ["file:{path}"]},
        assignments=[
            {
                "for_each": "src/*.py",
                "agent": {"id": "a{index}"},
                "task": {"id": "{path}", "inputs": {"{path}": ["{{path}} is {path}", 1]}},
            }
        ],
    )
    first, second = plan.group.assignments
    assert (first.agent_id, first.identity.role, first.task_id) == ("a1", "api", "src/api.py")
    assert first.task.inputs == {"{path}": ["{path} is src/api.py", 1]}
    assert first.resource_claims == (ResourceClaim(resource="file:src/api.py"),)
    assert (second.agent_id, second.task_id) == ("a2", "src/util.py")


def test_a_file_name_with_braces_is_not_filled_again(load: Load, folder: Path) -> None:
    (folder / "src" / "{index}.txt").touch()
    plan = load(assignments=[{"for_each": "src/*.txt", "agent": "a", "task": {"id": "{path}"}}])
    assert plan.group.assignments[0].task_id == "src/{index}.txt"


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("*.rs", "no file matches '*.rs'"),
        ("src", "no file matches 'src'"),
        ("../*.py", "must stay inside the plan's folder, got '../*.py'"),
        ("src/../../*", "must stay inside the plan's folder, got 'src/../../*'"),
        ("..\\x", "must stay inside the plan's folder, got '..\\\\x'"),
        ("/etc/*", "must stay inside the plan's folder, got '/etc/*'"),
        ("a\0", "is no pattern: 'a\\x00' has a NUL character in it"),
        (" ", "no file matches ' '"),
        (5, "must be a string, got 5 (int)"),
        ("link/*", "'link/secret.py' leads out of the plan's folder"),
        ("*.lnk", "'file.lnk' leads out of the plan's folder"),
    ],
)
def test_a_pattern_that_matches_nothing_or_leads_outside_is_a_problem(
    problems: Problems, folder: Path, tmp_path_factory: pytest.TempPathFactory, pattern: object, problem: str
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret.py").touch()
    (folder / "link").symlink_to(outside)
    (folder / "file.lnk").symlink_to(outside / "secret.py")
    assert problems(assignments=[an_entry(for_each=pattern)]) == [f"assignments[0].for_each: {problem}"]


def test_an_empty_pattern_and_one_that_cannot_be_read_are_problems(problems: Problems) -> None:
    (problem,) = problems(assignments=[an_entry(for_each="")])
    assert problem.startswith("assignments[0].for_each: is no pattern: ")


def test_links_that_stay_inside_are_followed(load: Load, folder: Path) -> None:
    (folder / "inner.py").symlink_to(folder / "src" / "api.py")
    plan = load(assignments=[{"for_each": "*.py", "agent": "a", "task": {"id": "{path}"}}])
    assert [a.task_id for a in plan.group.assignments] == ["inner.py"]


def test_a_problem_of_all_files_is_told_once(problems: Problems) -> None:
    entry = {"for_each": "src/*.py", "agent": "a", "task": {"id": "{stm}", "title": "{", "description": "{}"}}
    known = "there are {path}, {stem}, {index}; {{ and }} are braces"
    assert problems(assignments=[entry]) == [
        f"assignments[0].task.id: unknown placeholder '{{stm}}'; {known}",
        f"assignments[0].task.title: unknown placeholder '{{'; {known}",
        f"assignments[0].task.description: unknown placeholder '{{}}'; {known}",
    ]


def test_ids_that_are_the_same_for_all_files_are_a_problem(problems: Problems) -> None:
    assert problems(assignments=[an_entry(for_each="src/**/*.py")]) == [
        "assignments[0].task.id: 't' is the id of several files; write {index} into it",
        "assignments[0].agent.id: 'a' is the id of several files; write {index} into it",
    ]


# Engines


@pytest.mark.anyio
@pytest.mark.parametrize(("options", "expected"), [({}, "."), ({"cwd": "src"}, "src"), ({"cwd": "/"}, "/")])
async def test_processes_run_in_the_plans_folder_unless_it_says_otherwise(
    load: Load, folder: Path, options: dict[str, str], expected: str
) -> None:
    plan = load(engine={"kind": "process", "command": ["pwd", "-P"], **options})
    with anyio.fail_after(30):
        result = await ParallelExecutor(engine=plan.engine).execute_group(plan.group)
    assert result.outcomes[0].output == f"{(folder / expected).resolve()}\n"


def test_all_problems_of_a_process_are_told_at_once(problems: Problems) -> None:
    engine = {"kind": "process", "comand": ["x"], "cwd": 5, "protocol": "xml", "idle_timeout_seconds": -1}
    found = problems(engine=engine)
    assert found[:2] == [
        "engine.comand: unknown key 'comand', did you mean 'command'?",
        "engine.command: missing",
    ]
    assert sorted(line.split(":")[0] for line in found[2:]) == [
        "engine.cwd",
        "engine.idle_timeout_seconds",
        "engine.protocol",
    ]


def test_a_command_that_cannot_be_filled_is_told_for_each_assignment(problems: Problems) -> None:
    found = problems(
        engine={"kind": "process", "command": ["cat", "{task.inputs[path]}"]},
        assignments=[
            {"agent": "a", "task": {"id": "t1"}},
            {"agent": "b", "task": {"id": "t2", "inputs": {"path": "x"}}},
            {"agent": "c", "task": {"id": "t3"}},
        ],
    )
    assert [line.split(":")[0] for line in found] == ["assignments[0]", "assignments[2]"]
    assert "{task.inputs[path]}" in found[0]


def test_a_placeholder_that_no_process_knows_is_told_with_its_place(problems: Problems) -> None:
    (problem,) = problems(engine={"kind": "process", "command": ["cat", "{task.input}"]})
    assert problem.startswith("engine.command[1]: unknown placeholder {task.input}")


AGENTS = """
    class Engine:
        async def run(self, assignment):
            return None

    class tools:
        engine = Engine()

    async def review(assignment):
        return None

    def plain(assignment):
        return None
"""


def test_an_engine_or_a_function_beside_the_plan_can_be_named(load: Load, module: Any) -> None:
    module("agents_beside_a_plan", AGENTS)
    before = list(sys.path)
    assert isinstance(load(engine="agents_beside_a_plan:review").engine, FunctionEngine)
    assert type(load(engine={"kind": "agents_beside_a_plan:tools.engine"}).engine).__name__ == "Engine"
    assert sys.path == before


@pytest.mark.parametrize(
    ("engine", "problem"),
    [
        ("agents_of_a_test:Engine", "must be an engine or an async function, got <class 'agents_of_a_test.Engine'>"),
        ("agents_of_a_test:plain", "must be an engine or an async function, got <function plain"),
        ("agents_of_a_test:reviw", "cannot be imported: AttributeError: module 'agents_of_a_test' has no attribute"),
        ("agents_that_are_not:x", "cannot be imported: ModuleNotFoundError: No module named 'agents_that_are_not'"),
        ("leaving:x", "cannot be imported: SystemExit: 3"),
        ("raising:x", "cannot be imported: RuntimeError: two lines"),
    ],
)
def test_what_cannot_be_imported_as_an_engine_is_a_problem(
    problems: Problems, module: Any, engine: str, problem: str
) -> None:
    module("agents_of_a_test", AGENTS)
    module("leaving", "raise SystemExit(3)")
    module("raising", "raise RuntimeError('two\\nlines')")
    before = list(sys.path)
    (line,) = problems(engine=engine)
    assert line.startswith(f"engine: {engine} {problem}")
    assert sys.path == before


def test_a_module_beside_the_plan_hides_no_installed_one(load: Load, module: Any) -> None:
    module("colorsys", "async def rgb_to_hsv(assignment): ...")
    sys.modules.pop("colorsys", None)
    with pytest.raises(InvalidPlanError, match="must be an engine or an async function"):
        load(engine="colorsys:rgb_to_hsv")


def test_a_folder_that_is_importable_already_stays_so(
    load: Load, module: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module("agents_found_anyway", AGENTS)
    monkeypatch.syspath_prepend(folder)
    load(engine="agents_found_anyway:review")
    assert sys.path[0] == str(folder)


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        (5, ["engine: must be a table or 'module:attribute', got 5"]),
        ("agents", ["engine: must be 'module:attribute' or a table of kind 'process' or 'chat', got 'agents'"]),
        ("a b:c", ["engine: must be 'module:attribute' or a table of kind 'process' or 'chat', got 'a b:c'"]),
        ({}, ["engine.kind: missing"]),
        ({"kind": "ray"}, ["engine.kind: must be 'module:attribute', 'process' or 'chat', got 'ray'"]),
        ({"kind": ["process"]}, ["engine.kind: must be 'module:attribute', 'process' or 'chat', got ['process']"]),
        (
            {"command": ["x"]},
            [
                "engine.command: unknown key 'command' for an engine that is imported",
                "engine.kind: missing",
            ],
        ),
    ],
)
def test_an_engine_that_is_none_is_a_problem(problems: Problems, engine: object, expected: list[str]) -> None:
    assert problems(engine=engine) == expected


# The engine of kind chat

CHAT = {
    "kind": "chat",
    "base_url": "http://127.0.0.1:8080/v1",
    "model": "m",
    "api_key_env": {"http://127.0.0.1:8080/v1": "KEY"},
    "max_concurrent_tools": 2,
    "prompt": "{task.description}!",
    "attach": ["path"],
    "output_schema": {"type": "string"},
    "prices": {"gpt-4.1": {"input_per_million": 2, "output_per_million": 8.5}},
    "stream": True,
    "max_retries": 1,
    "answer_seconds": 30,
    "reply_limit_bytes": 1000,
}


def test_a_chat_engine_has_what_the_plan_says(
    load: Load, module: Callable[[str, str], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY", "k")
    module(
        "tools_of_a_plan",
        """
        from parallel_agents import ToolRegistry

        def look(path: str) -> str:
            return path

        async def listen() -> None: ...

        several = ToolRegistry([listen])
        """,
    )
    entry = an_entry(task={"id": "t", "inputs": {"path": "x"}})
    tools = ["tools_of_a_plan:look", "tools_of_a_plan:several"]
    engine = load(engine={**CHAT, "tools": tools}, assignments=[entry]).engine
    assert isinstance(engine, ChatEngine)
    assert [tool.name for tool in engine.tools] == ["look", "listen"]
    assert engine.folder == folder
    assert engine.prices == {"gpt-4.1": Price(input_per_million=2, output_per_million=8.5)}
    plain = ("base_url", "model", "api_key_env", "max_concurrent_tools", "stream", "max_retries", "answer_seconds")
    assert {name: getattr(engine, name) for name in plain} == {name: CHAT[name] for name in plain}
    assert engine.reply_limit_bytes == CHAT["reply_limit_bytes"]
    assert engine.output_schema == CHAT["output_schema"]
    assert engine.attach == ("path",)
    assert engine.prompt is not None
    assert engine.prompt.fill(AgentAssignment(**ONE_ASSIGNMENT)) == "d!"


ONE_ASSIGNMENT: dict[str, Any] = {"identity": AgentIdentity(id="a"), "task": Task(id="t", description="d")}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"modle": "m"}, ["engine.modle: unknown key 'modle', did you mean 'model'?"]),
        (
            {"stream": "yes", "max_retries": "2"},
            ["engine.stream: must be tr", "engine.max_retries: must be an integer"],
        ),
        ({"base_url": "nowhere"}, ["engine.base_url: must be an address such as"]),
        ({"output_schema": 1}, ["engine.output_schema: must be a mapping"]),
        ({"output_schema": {"type": "x"}}, ["engine.output_schema: no JSON Schema"]),
        ({"prompt": "{x}"}, ["engine.prompt: unknown placeholder {x}"]),
        ({"tools": 1}, ["engine.tools: must be a list, got 1"]),
        ({"prices": 1}, ["engine.prices: must be a table, got 1"]),
        ({"strem": True, "tools": ["x"]}, ["engine.strem: unknown key 'strem'", "engine.tools[0]: must be"]),
        ({"tools": ["x"]}, ["engine.tools[0]: must be 'module:attribute', got 'x'"]),
        ({"tools": ["os.path:sep"]}, ["engine: each of tools must be a Tool or a function, got '/'"]),
        ({"tools": ["not_there:x"]}, ["engine.tools[0]: not_there:x cannot be imported"]),
        ({"prices": {"m": {"input_per_million": -1}}}, ["engine.prices[m].input_per_million: must be >= 0", "engine."]),
        ({"attach": ["path"]}, ["assignments[0]: attach: the inputs of task 't' have no path called 'path'"]),
        ({"model": None}, ["assignments[0]: agent 'a' has no model"]),
        ({"api_key_env": "NOT_SET"}, ["assignments[0]: the environment variable NOT_SET with the key"]),
    ],
)
def test_a_chat_engine_that_is_wrong_is_a_problem(
    problems: Problems, changes: dict[str, Any], expected: list[str]
) -> None:
    engine = {"kind": "chat", "base_url": "http://127.0.0.1:8080/v1", "model": "m", **changes}
    found = problems(engine=engine)
    assert [text[: len(start)] for text, start in zip(found, expected, strict=True)] == expected


def test_a_chat_engine_needs_its_extra(problems: Problems, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("parallel_agents") and "chat" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "httpx2", None)
    expected = "engine.kind: ChatEngine needs httpx2 and jsonschema: pip install 'parallel-agents[chat]'"
    assert problems(engine=CHAT) == [expected]


# Problems


def test_all_problems_are_told_at_once_with_their_places(problems: Problems) -> None:
    bad = """
        group_id = " "
        max_concurency = 4
        fail_fast = 1

        [engine]
        kind = "process"
        command = "cat"

        [defaults]
        timeout_seconds = 0
        for_each = "*"
        max_turn = 3

        [[assignments]]
        agent = ""
        task = { id = "api", inputs = { day = 2024-01-01 } }

        [[assignments]]
        agent = { id = "a", rol = "x" }
        task = { id = "b", depend_on = ["a"] }
        claims = [{ path = "x", resource = "y" }, { resource = "z", mode = "sharde" }, 5, {}]
        max_turns = true
        timeout_seconds = -1

        [[assignments]]
        agent = "c"

        [[assignments]]
        agent = "d"
        task = { id = "d" }
        timeout_secs = 1
        claims = ["x", "x"]

        [[assignments]]
        agent = "f"
        task = { id = "f" }
        timeout_seconds = nan
    """
    found = problems(textwrap.dedent(bad), suffix=".toml")
    wanted = "JSON (text, number, true, false, null, list, table)"
    command = next(line for line in found if line.startswith("engine.command: "))
    assert found == [
        "group_id: must not be blank, got ' '",
        "fail_fast: must be true or false, got 1 (int)",
        "max_concurency: unknown key 'max_concurency', did you mean 'max_concurrency'?",
        "defaults.for_each: belongs into an assignment",
        "defaults.timeout_seconds: must be > 0, got 0",
        "defaults.max_turn: unknown key 'max_turn', did you mean 'max_turns'?",
        command,
        "assignments[0].agent.id: must not be blank, got ''",
        f"assignments[0].task.inputs[day]: must be {wanted}, got datetime.date(2024, 1, 1) (date)",
        "assignments[1].agent.rol: unknown key 'rol', did you mean 'role'?",
        "assignments[1].task.depend_on: unknown key 'depend_on', did you mean 'depends_on'?",
        "assignments[1].claims[0]: give either 'resource' or 'path'",
        "assignments[1].claims[1].mode: must be one of exclusive, shared, got 'sharde'",
        "assignments[1].claims[2]: must be text or a table, got 5",
        "assignments[1].claims[3]: give either 'resource' or 'path'",
        "assignments[1].max_turns: must be an integer, got True (bool)",
        "assignments[1].timeout_seconds: must be > 0, got -1",
        "assignments[2].task: missing",
        "assignments[3].timeout_secs: unknown key 'timeout_secs', did you mean 'timeout_seconds'?",
        "assignments[4].timeout_seconds: must be finite, got nan",
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"group_id": None}, ["group_id: must be a string, got None (NoneType)"]),
        ({"max_concurrency": 0}, ["max_concurrency: must be >= 1, got 0"]),
        ({"max_concurrency": True}, ["max_concurrency: must be an integer, got True (bool)"]),
        ({"max_concurrency": 2.0}, ["max_concurrency: must be an integer, got 2.0 (float)"]),
        ({"claim_policy": "queue"}, ["claim_policy: must be one of reject, wait, got 'queue'"]),
        ({"defaults": []}, ["defaults: must be a table, got []"]),
        ({"assignments": {}}, ["assignments: must be a list of tables, got {}"]),
        ({"assignments": []}, ["assignments: must hold at least one assignment"]),
        ({"assignments": [5]}, ["assignments[0]: must be a table, got 5"]),
        ({"assignments": [{}] * 10_001}, ["assignments: must hold at most 10000 assignments, got 10001"]),
        ({"assignments": [an_entry(agent=5)]}, ["assignments[0].agent: must be text or a table, got 5"]),
        ({"assignments": [an_entry(task="t")]}, ["assignments[0].task: must be a table, got 't' (str)"]),
        (
            {"assignments": [an_entry(timeout_seconds=10**400)]},
            ["assignments[0].timeout_seconds: must be finite, got "],
        ),
        (
            {"assignments": [an_entry(claims=["x", {"resource": "x"}])]},
            ["assignments[0].claims: Duplicate resource claims: x. Claim each resource once."],
        ),
        (
            {"assignments": [an_entry(claims=[{"path": "src"}, {"path": "./src"}])]},
            ["assignments[0].claims: Duplicate resource claims: "],
        ),
        (
            {"assignments": [an_entry(), an_entry(), an_entry(agent="b")]},
            [
                "assignments[1].task.id: 't' is the id of assignments[0] already",
                "assignments[2].task.id: 't' is the id of assignments[0] already",
                "assignments[1].agent.id: 'a' is the id of assignments[0] already",
            ],
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_place(problems: Problems, changes: dict[str, Any], expected: list[str]) -> None:
    found = problems(**changes)
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found


def test_what_a_plan_must_have_is_missed(problems: Problems) -> None:
    assert problems("{}") == ["group_id: missing", "engine: missing", "assignments: missing"]


def test_a_wrong_default_is_told_once_and_not_for_each_assignment(problems: Problems) -> None:
    entries = [{"agent": f"a{n}", "task": {"id": f"t{n}"}} for n in range(3)]
    assert problems(defaults={"max_turns": 0, "agent": {"rol": 1}, "claims": [1]}, assignments=entries) == [
        "defaults.agent.rol: unknown key 'rol', did you mean 'role'?",
        "defaults.claims[0]: must be text or a table, got 1",
        "defaults.max_turns: must be >= 1, got 0",
    ]


def test_after_a_hundred_problems_no_more_are_looked_for(problems: Problems) -> None:
    found = problems(assignments=[{"agent": "", "task": {"id": ""}}] * 1000)
    assert 100 <= len(found) <= 103
    assert found[-1] == "assignments[50]: not looked at any more, after 100 problems"


def test_repeated_ids_beyond_a_hundred_are_left_out(problems: Problems) -> None:
    assert len(problems(assignments=[an_entry()] * 1000)) == 100


def test_the_number_of_assignments_is_limited_after_for_each(
    problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "ASSIGNMENTS_LIMIT", 2)
    entry = {"for_each": "src/**/*.py", "agent": "a{index}", "task": {"id": "{path}"}}
    assert problems(assignments=[entry]) == ["assignments[0]: makes more than 2 assignments of the plan"]


# Files that are no plans


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("plan.toml", b"", "is empty"),
        ("plan.yaml", b" \n\t\n", "is empty"),
        ("plan.txt", b"x", "a plan's name ends with .toml, .json, .yaml, .yml"),
        ("plan.toml", b"a = '\xff'", "not UTF-8: byte 5 cannot be read"),
        ("plan.toml", b"a = 1\na = 2", "Cannot overwrite a value (at "),
        ("plan.toml", b"a = 1\nb", "Expected '=' after a key in a key/value pair (at "),
        ("plan.json", b"[]", "must be a table of keys and values, got []"),
        ("plan.json", b'{"a": 1, "a": 2}', "key 'a' is given twice"),
        ("plan.json", b'{"a": NaN}', "NaN is no JSON number"),
        ("plan.json", b'{"a": Infinity}', "Infinity is no JSON number"),
        ("plan.json", b'{"a": 1e999}', "'1e999' is too large for a number"),
        ("plan.json", b'{\n"a" 1}', "line 2, column 5: Expecting ':' delimiter"),
        ("plan.yaml", b"text", "must be a table of keys and values, got 'text'"),
        ("plan.yaml", b"a: &x [1]\nb: *x", "line 2, column 4: aliases (*name) are not allowed in a plan"),
        ("plan.yaml", b"a: 1\na: 2", "line 2, column 1: key 'a' is given twice"),
        ("plan.yaml", b"a: {b: 1, b: 2}", "line 1, column 11: key 'b' is given twice"),
        ("plan.yaml", b"on: 1", "line 1, column 1: a key must be text; write it in quotes"),
        ("plan.yaml", b"a: {<<: {b: 1}}", "line 1, column 5: a key must be text; write it in quotes"),
        ("plan.yaml", b"? [a]\n: 1", "line 1, column 3: a key must be text; write it in quotes"),
        ("plan.yaml", b"a: !!python/object/apply:os.system [true]", "line 1, column 4: could not determine a constr"),
        ("plan.yaml", b"a: 1\n---\nb: 1", "line 2, column 1: expected a single document in the stream, but found ano"),
        ("plan.yaml", b"a: 2024-13-45", "month must be in 1..12"),
        ("plan.yaml", b"a: \x00", "unacceptable character #x0000: special characters are not allowed in"),
        ("plan.yaml", b"a: [1", "line 1, column 6: while parsing a flow sequence, expected ',' or ']', but got"),
        ("plan.yaml", b"a: " + b"9" * 5000, "Exceeds the limit"),
        ("plan.yaml", b"a: " + b"[" * 33, "line 1, column 36: nested deeper than 32 levels"),
        ("plan.toml", b"a." * 33 + b"a = 1", "nested deeper than 32 levels"),
        ("plan.toml", b"a = " + b"9" * 1001, "holds a number or a bare key of more than 1000 characters"),
        ("plan.toml", b"#" * (1024 * 1024 + 1), "is larger than 1024 KiB"),
        ("plan.yaml", b"#" * (64 * 1024 + 1), "is larger than 64 KiB"),
    ],
)
def test_a_file_that_is_no_plan_is_one_clear_problem(folder: Path, name: str, content: bytes, problem: str) -> None:
    path = folder / name
    path.write_bytes(content)
    with pytest.raises(InvalidPlanError) as caught:
        load_plan(path)
    (line,) = caught.value.problems
    assert line.startswith(f"{path}: {problem}")
    assert "\n" not in line


def test_a_plan_that_is_missing_a_folder_or_no_file_is_one_clear_problem(folder: Path) -> None:
    (folder / "plan.toml").mkdir()
    os.mkfifo(folder / "pipe.toml")
    for name, problem in [
        ("plan.toml", "is a folder, not a plan"),
        ("pipe.toml", "is no regular file"),
        ("nothing.toml", "cannot be read: No such file or directory"),
        ("nu\0l.toml", "no file has a NUL character in its name"),
    ]:
        with pytest.raises(InvalidPlanError) as caught:
            load_plan(folder / name)
        assert caught.value.problems == (f"{folder / name}: {problem}",)


def test_text_that_is_half_a_character_is_told_with_its_place(problems: Problems) -> None:
    half = "holds half a surrogate pair, which is no text"
    assert problems('{"group_id": "\\ud800", "defaults": {"\\udfff": 1}}') == [
        f"group_id: {half}",
        f"defaults: {half}",
    ]


def test_yaml_without_pyyaml_says_what_to_install(problems: Problems, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    monkeypatch.delitem(sys.modules, "parallel_agents._plan_yaml", raising=False)
    (problem,) = problems("a: 1", suffix=".yaml")
    assert problem.endswith("reading YAML needs PyYAML: pip install 'parallel-agents[cli]'")


def filled(unit: str, size: int, start: str = "", end: str = "") -> str:
    return start + unit * ((size - len(start) - len(end)) // len(unit)) + end


MIB = 1024 * 1024 - 8
KIB64 = 64 * 1024 - 8
HOSTILE: dict[str, tuple[str, str]] = {
    # name: (content, what is wrong; nothing if it is only hard to read)
    "large.json": ("a" * 50_000_000, "is larger than 1024 KiB"),
    "large.yaml": (filled("- a\n", 2 * KIB64), "is larger than 64 KiB"),
    "lists.json": ("[" * 100_000, "nested deeper than 32 levels"),
    "tables.json": ('{"a":' * 100_000, "nested deeper than 32 levels"),
    "lists.toml": ("a = " + "[" * 100_000, "nested deeper than 32 levels"),
    "tables.toml": ("a = " + "{a = " * 100_000, "nested deeper than 32 levels"),
    "dotted.toml": ("a." * 20_000 + "a = 1", "nested deeper than 32 levels"),
    "header.toml": ("[" + "a." * 20_000 + "a]", "nested deeper than 32 levels"),
    "quoted.toml": ('a . \'b.\' . "c\\"." . ' * 5000 + "a = 1", "nested deeper than 32 levels"),
    "mixed.toml": (("a." * 32 + "a = {") * 31 + "b = 1" + "}" * 31, "nested deeper than 32 levels"),
    "after-quotes.toml": ('a = ["""a"""", ' + "[" * 100_000, "nested deeper than 32 levels"),
    "after-apostrophes.toml": ("a = ['''a'''', " + "[" * 100_000, "nested deeper than 32 levels"),
    "after-comment.toml": ("# '''\na = " + "[" * 100_000, "nested deeper than 32 levels"),
    "after-escape.toml": ('a = ["\\"", ' + "[" * 100_000, "nested deeper than 32 levels"),
    "escapes.toml": (filled("\\n", MIB, 'a = "', '"'), ""),
    "unfinished.toml": (filled('\\"""', MIB, 'a = """'), "Unterminated string"),
    "quotes.toml": (filled('"', MIB, "a = "), "Expected newline"),
    "numbers.toml": (filled("1,", MIB, "a = [", "]"), ""),
    "headers.toml": ("\n".join(f"[a{n}]" for n in range(90_000)), ""),
    "arrays.toml": (filled("[[a]]\n", MIB), ""),
    "number.toml": ("a = " + "9" * 900_000, "holds a number or a bare key of more than 1000 characters"),
    "hex.toml": ("a = 0x" + "f" * 900_000, "holds a number or a bare key of more than 1000 characters"),
    "number.json": ('{"a": ' + "9" * 900_000 + "}", "Exceeds the limit"),
    "keys.json": (
        "{" + ",".join(f'"k{n}": 1' for n in range(70_000)) + ', "k69999": 1}',
        "key 'k69999' is given twice",
    ),
    "unknown.json": ("{" + ",".join(f'"assignment{n}": 1' for n in range(45_000)) + "}", "assignment0: unknown key"),
    "long-key.json": ('{"' + "k" * 1_000_000 + '": 1}', "unknown key"),
    "entries.json": (filled("{},", MIB, '{"assignments": [', "{}]}"), "assignments: must hold at most 10000"),
    "lists.yaml": ("[" * 60_000, "nested deeper than 32 levels"),
    "dashes.yaml": ("- " * 30_000, "nested deeper than 32 levels"),
    "questions.yaml": ("? " * 30_000, "nested deeper than 32 levels"),
    "tables.yaml": ("{a: " * 15_000, "nested deeper than 32 levels"),
    "indented.yaml": ("\n".join(" " * n + "a:" for n in range(350)), "nested deeper than 32 levels"),
    "laughs.yaml": (
        "a: &a [x,x]\n"
        + "\n".join(f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)},*{chr(97 + n)}]" for n in range(24)),
        "aliases (*name) are not allowed",
    ),
    "anchors.yaml": ("\n".join(f"a{n}: &a{n} b" for n in range(4000)), ""),
    "items.yaml": (filled("a,", KIB64, "a: [", "a]"), ""),
    "documents.yaml": (filled("---\n", KIB64), "expected a single document"),
    "time.yaml": (filled("1:", KIB64, "a: ", "1"), ""),
    "tags.yaml": ("!" * 60_000, "could not determine a constructor"),
}


def test_hostile_plans_are_refused_fast_and_in_little_memory(tmp_path: Path) -> None:
    """All of them, one after the other, within one budget of processor time and memory."""
    for name, (content, _) in HOSTILE.items():
        (tmp_path / name).write_text(content)
    with (tmp_path / "huge.toml").open("wb") as huge:
        huge.truncate(2**31)  # more than the memory that there is
    program = """
        import json, pathlib, resource, sys
        import parallel_agents._plan_yaml
        from parallel_agents._errors import InvalidPlanError
        from parallel_agents.plan import load_plan

        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        resource.setrlimit(resource.RLIMIT_AS, (512 * 2**20, 512 * 2**20))
        problems = {}
        for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
            try:
                load_plan(path)
            except InvalidPlanError as error:
                problems[path.name] = error.problems
        json.dump(problems, sys.stdout)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], capture_output=True, check=False, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("huge.toml") == [f"{tmp_path / 'huge.toml'}: is larger than 1024 KiB"]
    assert {name: any(part in line for line in found[name]) for name, (_, part) in HOSTILE.items()} == dict.fromkeys(
        HOSTILE, True
    )
    assert max(len(line) for lines in found.values() for line in lines) < 1100


# Overrides


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"max_concurrency": "2"}, lambda group: group.max_concurrency == 2),
        ({"fail_fast": "true"}, lambda group: group.fail_fast is True),
        ({"group_id": "other"}, lambda group: group.group_id == "other"),
        ({"group_id": "'7'"}, lambda group: group.group_id == "7"),
        ({"group_id": "2024-01-01"}, lambda group: group.group_id == "2024-01-01"),
        ({"group_id": "nan"}, lambda group: group.group_id == "nan"),
        ({"group_id": "a\nb = 1"}, lambda group: group.group_id == "a\nb = 1"),
        ({"group_id": "1\nb = 1"}, lambda group: group.group_id == "1\nb = 1"),
        ({"group_id": "[" * 50}, lambda group: group.group_id == "[" * 50),
        ({"defaults.timeout_seconds": "5"}, lambda group: group.assignments[0].timeout_seconds == 5),
        ({"defaults.task.inputs.x": "[1, 'a']"}, lambda group: group.assignments[0].task.inputs == {"x": [1, "a"]}),
        ({"engine.command": "['{agent_id}']"}, lambda group: group.group_id == "g"),
    ],
)
def test_overrides_stand_above_the_file(
    folder: Path, overrides: dict[str, str], expected: Callable[[Any], bool]
) -> None:
    (folder / "plan.json").write_text(json.dumps(SMALL))
    assert expected(load_plan(folder / "plan.json", overrides=overrides).group)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"max_concurency": "2"}, "max_concurency: unknown key 'max_concurency', did you mean 'max_concurrency'?"),
        ({"max_concurrency": "two"}, "max_concurrency: must be an integer, got 'two' (str)"),
        ({"defaults.timeout": "5"}, "defaults.timeout: unknown key 'timeout', did you mean 'timeout_seconds'?"),
        ({"group_id.x": "5"}, "group_id.x: 'group_id' is no table of the plan, so no key of it can be set"),
        (
            {"assignments.0.max_turns": "5"},
            "assignments.0.max_turns: 'assignments' is no table of the plan, so no key of it can be set",
        ),
        ({"": "5"}, "unknown key ''"),
        ({"defaults.task." + "x." * 40 + "x": "5"}, "defaults.task." + "x." * 29 + "x: nested deeper than 32 levels"),
    ],
)
def test_an_override_of_a_key_that_is_not_there_is_a_problem(
    folder: Path, overrides: dict[str, str], problem: str
) -> None:
    (folder / "plan.json").write_text(json.dumps(SMALL))
    with pytest.raises(InvalidPlanError) as caught:
        load_plan(folder / "plan.json", overrides=overrides)
    assert caught.value.problems == (problem,)


# Whatever is written


texts = st.text(max_size=5)
ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(str.strip)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
FIELDS = ["agent", "task", "claims", "timeout_seconds", "max_turns", "completion_config", "memory_messages", "for_each"]
tables = st.dictionaries(st.sampled_from(FIELDS) | texts, values, max_size=4)
plans = st.fixed_dictionaries(
    {"group_id": values, "assignments": st.lists(tables | values, max_size=3) | values},
    optional={"engine": st.just(SMALL["engine"]) | values, "defaults": tables | values, "fail_fast": values},
)
one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@one_folder
@given(plan=plans)
def test_any_table_is_a_plan_or_an_invalid_plan(folder: Path, plan: Any) -> None:
    for name, content in (("plan.json", json.dumps(plan)), ("plan.yaml", yaml.safe_dump(plan, allow_unicode=True))):
        (folder / name).write_text(content, encoding="utf-8", errors="surrogatepass")
        _load_or_refuse(folder / name)


def _load_or_refuse(path: Path) -> None:
    try:
        load_plan(path)
    except InvalidPlanError as error:
        assert error.problems
        assert all(error.problems)


@one_folder
@given(
    content=st.binary() | st.text("a.=[]{}'\"\\#\n -:&*!1,").map(str.encode),
    suffix=st.sampled_from([".toml", ".json", ".yaml"]),
)
def test_any_bytes_are_a_plan_or_an_invalid_plan(folder: Path, content: bytes, suffix: str) -> None:
    path = folder / f"plan{suffix}"
    path.write_bytes(content)
    _load_or_refuse(path)


@one_folder
@given(
    agents=st.lists(ids, min_size=1, max_size=4, unique=True),
    timeout=st.none() | st.floats(0.001, 1e6),
    description=st.text(st.characters(exclude_categories=["Cs"])),
)
def test_a_plan_says_what_was_written_and_matches_the_schema(
    folder: Path, agents: list[str], timeout: float | None, description: str
) -> None:
    entries = [
        {"agent": {"id": agent}, "task": {"id": agent, "description": description}, "timeout_seconds": timeout}
        for agent in agents
    ]
    table = {**SMALL, "assignments": entries}
    (folder / "plan.json").write_text(json.dumps(table))
    read = load_plan(folder / "plan.json").group.assignments
    assert [(a.agent_id, a.task_id, a.task.description, a.timeout_seconds) for a in read] == [
        (agent, agent, description, timeout) for agent in agents
    ]
    jsonschema.validate(table, SCHEMA, jsonschema.Draft202012Validator)


def test_the_examples_match_the_schema() -> None:
    jsonschema.validate(tomllib.loads(REVIEW), SCHEMA, jsonschema.Draft202012Validator)
    for path in (ROOT / "examples").glob("*.toml"):
        jsonschema.validate(tomllib.loads(path.read_text()), SCHEMA, jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    "change",
    [
        {"colour": 1},
        {"max_concurrency": 0},
        {"engine": {"kind": "process"}},
        {"engine": "agents"},
        {"assignments": []},
        {"assignments": [an_entry(timeout_seconds=0)]},
        {"assignments": [an_entry(claims=[{"path": "x", "resource": "y"}])]},
        {"assignments": [an_entry(agent={"rol": "x", "id": "a"})]},
        {"defaults": {"for_each": "*"}},
    ],
)
def test_the_schema_refuses_what_loading_refuses(problems: Problems, change: dict[str, Any]) -> None:
    assert problems(**change)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**SMALL, **change}, SCHEMA, jsonschema.Draft202012Validator)


def test_a_plan_says_what_is_done_about_claims_and_shared_agents(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    assignments = "".join(f'[[assignments]]\nagent = "a"\ntask = {{ id = "t{n}" }}\nclaims = ["r"]\n' for n in range(2))
    options = 'claim_policy = "wait"\nclaim_timeout_seconds = 2.5\nallow_shared_agents = true\n'
    rest = f'engine = {{ kind = "process", command = ["true"] }}\n{assignments}'
    path.write_text(f'group_id = "g"\n{options}{rest}')
    group = load_plan(path).group
    assert (group.claim_policy, group.claim_timeout_seconds, group.allow_shared_agents) == (ClaimPolicy.WAIT, 2.5, True)
    path.write_text(f'group_id = "g"\nclaim_policy = "queue"\n{rest}')
    with pytest.raises(InvalidPlanError) as caught:
        load_plan(path)
    assert caught.value.problems[0].startswith("claim_policy: ")
    path.write_text(f'group_id = "g"\nclaim_timeout_seconds = 2.5\n{rest}')
    with pytest.raises(InvalidPlanError) as caught:
        load_plan(path)
    assert "claim_timeout_seconds needs the claim_policy 'wait'" in caught.value.problems[0]
    path.write_text(f'group_id = "g"\n{rest}')
    with pytest.raises(InvalidPlanError) as caught:
        load_plan(path)
    assert caught.value.problems == ("assignments[1].agent.id: 'a' is the id of assignments[0] already",)


def test_a_plan_can_give_each_agent_a_worktree(tmp_path: Path) -> None:
    for command in (
        ["init", "-q"],
        ["-c", "user.name=x", "-c", "user.email=x@y.z", "commit", "-q", "--allow-empty", "-m", "first"],
    ):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    path = tmp_path / "plan.toml"
    entry = '[[assignments]]\nagent = "a"\ntask = { id = "t" }\n'
    engine = '[engine]\nkind = "process"\ncommand = ["sh", "-c", "echo new > new.txt"]\n'
    path.write_text(f'group_id = "g"\n{engine}[workspace]\nkind = "worktree"\nmax_worktrees = 2\n{entry}')
    plan = load_plan(path)
    assert isinstance(plan.engine, WorktreeEngine)
    result = anyio.run(ParallelExecutor(engine=plan.engine).execute_group, plan.group)
    result.raise_for_failures()
    kept = plan.engine.kept["t"]
    shown = subprocess.run(["git", "-C", tmp_path, "show", f"{kept.branch}:new.txt"], capture_output=True, check=True)
    assert shown.stdout == b"new\n"
    assert not (tmp_path / "new.txt").exists()
    path.write_text(f'group_id = "g"\n{engine}[workspace]\nkind = "container"\nmax_worktrees = 0\nrepos = "x"\n{entry}')
    with pytest.raises(InvalidPlanError) as caught:
        load_plan(path)
    assert sorted(problem.partition(":")[0] for problem in caught.value.problems) == [
        "workspace.kind",
        "workspace.max_worktrees",
        "workspace.repos",
    ]
