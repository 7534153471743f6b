"""Tools: made from functions, and called side by side with one result each."""

import asyncio
import enum
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
from attrs import frozen
from clocks import virtual_time
from groups import group_of
from hypothesis import given
from hypothesis import strategies as st

from parallel_agents import (
    AgentAssignment,
    Budget,
    FunctionEngine,
    NeedsHuman,
    Observer,
    ParallelEvent,
    ParallelExecutor,
    RunContext,
    Tool,
    ToolCall,
    ToolInvoker,
    ToolRegistry,
    ToolResult,
    Usage,
    _tools,
    current_run,
)
from parallel_agents._context import RunInAnotherThread
from parallel_agents.events import (
    PARALLEL_AGENT_RETRY,
    TOOL_INVOKE_ALL_COMPLETE,
    TOOL_INVOKE_ALL_START,
    TOOL_INVOKE_ERROR,
    TOOL_INVOKE_START,
    TOOL_INVOKE_SUCCESS,
)
from parallel_agents.testing import cancel_at_every_checkpoint

pytestmark = pytest.mark.anyio


def raw(function: Callable[..., Any], name: str = "tool", **fields: Any) -> Tool:
    return Tool(name=name, function=function, **fields)


def call(name: str = "tool", /, **arguments: Any) -> ToolCall:
    return ToolCall(id=f"call-{name}", name=name, arguments=arguments)


async def invoke(*tools: Any, calls: list[ToolCall] | None = None, **options: Any) -> tuple[ToolResult, ...]:
    registry = ToolRegistry(tools)
    with anyio.fail_after(60):
        return await ToolInvoker(registry).invoke_all(calls or [call(t.name) for t in registry], **options)


async def echo(text: str) -> str:
    await anyio.lowlevel.checkpoint()
    return text


# Made from functions


class Color(enum.Enum):
    RED = "red"


@dataclass
class Point:
    x: int
    y: int = 0


async def paint(
    color: Color, where: Point, *, day: date, style: Literal["oil", "ink"] = "oil", tags: list[str] | None = None
) -> dict[str, Any]:
    """Paint a point.

    Slowly.

    Args:
        color: Of the paint.
        where: On the canvas.
        style: How.
    """
    return {"color": color, "where": where, "day": day, "style": style, "tags": tags}


def test_a_function_says_what_its_tool_is_for_and_takes() -> None:
    tool = Tool.from_function(paint)
    assert tool.name == "paint"
    assert tool.description == "Paint a point.\n\nSlowly."
    assert tool.parameters["required"] == ["color", "where", "day"]
    assert tool.parameters["additionalProperties"] is False
    properties = tool.parameters["properties"]
    assert properties["style"]["enum"] == ["oil", "ink"]
    assert [properties[name].get("description") for name in ("color", "where", "style", "tags")] == [
        "Of the paint.",
        "On the canvas.",
        "How.",
        None,
    ]


def test_what_is_said_of_a_tool_stands_above_what_its_function_says() -> None:
    tool = Tool.from_function(paint, name="draw", description="Draw.", timeout_seconds=2)
    assert (tool.name, tool.description, tool.timeout_seconds) == ("draw", "Draw.", 2)


def test_methods_can_be_tools() -> None:
    class Shelf:
        def look(self, title: str) -> str:
            return title

    assert list(Tool.from_function(Shelf().look).parameters["properties"]) == ["title"]


def test_functions_whose_parameters_are_no_json_are_refused() -> None:
    def by_place(one: int, /) -> None: ...

    def any_number(*many: int) -> None: ...

    def unknown(lock: threading.Event) -> None: ...

    class Nameless:
        def __call__(self) -> None: ...

    def misspelt(text: "strr") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    for function, problem in (
        (by_place, "by_place: the parameter one: int cannot be given by its name"),
        (any_number, "any_number: the parameter \\*many: int cannot be given by its name"),
        (unknown, "unknown: no JSON Schema for its parameters"),
        (Nameless(), "Nameless object at .*: no JSON Schema for its parameters"),
        (misspelt, "misspelt: no JSON Schema for its parameters"),
    ):
        with pytest.raises(TypeError, match=problem):
            Tool.from_function(function)


async def test_arguments_arrive_as_the_types_of_the_parameters_and_values_go_back_as_json() -> None:
    arguments = {"color": "red", "where": {"x": 1}, "day": "2026-01-31"}
    (result,) = await invoke(paint, calls=[call("paint", **arguments)])
    assert result == ToolResult(
        tool_call_id="call-paint",
        content='{"color": "red", "where": {"x": 1, "y": 0}, "day": "2026-01-31", "style": "oil", "tags": null}',
    )


async def test_whatever_is_json_can_be_returned() -> None:
    @frozen
    class Found:
        title: str

    async def attrs_value() -> Found:
        return Found("ü")

    async def nothing() -> None:
        return None

    async def text() -> str:
        return '"as it is"'

    async def no_json() -> object:
        return threading.Event()

    results = await invoke(attrs_value, nothing, text, no_json)
    assert [result.content for result in results[:3]] == ['{"title": "ü"}', "", '"as it is"']
    assert results[3].is_error
    assert results[3].content == "TypeError: no_json returned Event, which cannot be written as JSON"


async def test_a_plain_function_runs_in_a_thread_and_an_async_one_does_not() -> None:
    threads: dict[str, int] = {}

    def plain(number: int) -> int:
        threads["plain"] = threading.get_ident()
        return number + 1

    async def is_async(number: int) -> int:
        threads["async"] = threading.get_ident()
        return number + 2

    results = await invoke(plain, is_async, calls=[call("plain", number=1), call("is_async", number=1)])
    assert [result.content for result in results] == ["2", "3"]
    assert threads["async"] == threading.get_ident()
    assert threads["plain"] != threading.get_ident()


async def test_so_many_plain_functions_run_at_once_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tools, "THREADS", 2)
    go = threading.Event()

    def wait() -> None:
        go.wait()

    async def turn() -> None:
        await ToolInvoker(ToolRegistry([wait])).invoke_all([call("wait")] * 2)

    async with anyio.create_task_group() as tasks:  # the bound is one for all turns of an event loop
        tasks.start_soon(turn)
        tasks.start_soon(turn)
        await anyio.wait_all_tasks_blocked()
        statistics = _tools._thread_limiter().statistics()
        go.set()
    assert (statistics.borrowed_tokens, statistics.tasks_waiting) == (2, 2)


async def test_a_cancelled_call_waits_for_its_thread_which_is_told() -> None:
    has_begun, ended = threading.Event(), threading.Event()

    def works() -> None:
        has_begun.set()
        try:
            while True:
                anyio.from_thread.check_cancelled()
        finally:
            ended.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ToolInvoker(ToolRegistry([works])).invoke_all, [call("works")])
        await anyio.to_thread.run_sync(has_begun.wait)
        tasks.cancel_scope.cancel()
    assert ended.is_set()


async def test_a_thread_is_left_to_itself_where_that_is_allowed() -> None:
    has_begun, go, ended = threading.Event(), threading.Event(), threading.Event()

    def works() -> None:
        has_begun.set()
        go.wait()
        ended.set()

    tool = Tool.from_function(works, abandon_on_cancel=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ToolInvoker(ToolRegistry([tool])).invoke_all, [call("works")])
        await anyio.to_thread.run_sync(has_begun.wait)
        tasks.cancel_scope.cancel()
    assert not ended.is_set()
    go.set()
    assert await anyio.to_thread.run_sync(ended.wait)


@pytest.mark.proves("X14")
async def test_a_plain_function_can_tell_what_it_spent_from_its_thread() -> None:
    threads: list[int] = []

    class Listens(Observer):
        def on_event(self, event: ParallelEvent) -> None:
            threads.append(threading.get_ident())

    def spends() -> str:
        run = current_run()
        with run.not_charged():
            run.record_usage(Usage(cost=2.0))
        run.emit(PARALLEL_AGENT_RETRY, attempt=1, wait_seconds=0.0, error="")
        return f"{run.assignment.task_id}: {run.usage.cost} {run.budget_exhausted}"

    async def agent(assignment: AgentAssignment) -> str:
        (result,) = await ToolInvoker(ToolRegistry([spends])).invoke_all([call("spends")])
        return result.content

    executor = ParallelExecutor(engine=FunctionEngine(agent), observers=[Listens()])
    result = await executor.execute_group(group_of(2, max_concurrency=1, budget=Budget(max_cost=1.0)))
    assert [outcome.output for outcome in result.outcomes] == ["t0: 2.0 True", None]
    assert result.total_usage == Usage(cost=2.0)
    assert set(threads) == {threading.get_ident()}


# Called side by side


async def test_results_come_in_the_order_of_the_calls() -> None:
    later = anyio.Event()

    async def first() -> str:
        await later.wait()
        return "first"

    async def second() -> str:
        later.set()
        return "second"

    results = await invoke(first, second)
    assert [result.content for result in results] == ["first", "second"]


async def test_any_iterable_of_calls_will_do_and_none_at_all() -> None:
    invoker = ToolInvoker(ToolRegistry([echo]))

    def calls() -> Iterator[ToolCall]:
        yield call("echo", text="a")
        yield call("echo", text="b")

    assert [result.content for result in await invoker.invoke_all(calls())] == ["a", "b"]
    assert await invoker.invoke_all(()) == ()
    assert await invoker.invoke_all(iter([])) == ()


async def test_nothing_starts_if_the_calls_cannot_be_read() -> None:
    called = []

    async def note() -> None:
        called.append(1)

    def calls() -> Iterator[ToolCall]:
        yield call("note")
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        await ToolInvoker(ToolRegistry([note])).invoke_all(calls())
    assert called == []


@pytest.mark.parametrize("wrong", [0, -1])
async def test_a_limit_below_one_is_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match="max_concurrency must be >= 1"):
        await invoke(echo, max_concurrency=wrong)


async def test_a_limit_that_is_no_integer_is_refused() -> None:
    with pytest.raises(TypeError, match="max_concurrency must be an integer"):
        await invoke(echo, max_concurrency=True)


@pytest.mark.parametrize("limit", [1, 2, 3, None])
async def test_no_more_calls_run_at_once_than_the_limit_says(limit: int | None) -> None:
    running, peak = 0, 0

    async def count() -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        running -= 1

    results = await invoke(count, calls=[call("count")] * 7, max_concurrency=limit)
    assert len(results) == 7
    assert peak == (limit or 7)


async def test_what_is_wrong_with_a_call_is_its_result_and_touches_no_other() -> None:
    async def raises() -> None:
        raise KeyError

    async def says() -> None:
        raise OSError("disk\x1b[31m{gone}")

    async def cancels_itself() -> None:
        raise anyio.get_cancelled_exc_class().__new__(anyio.get_cancelled_exc_class())

    calls = [
        call("nowhere"),
        call("echo", text=1),
        call("echo", text="fine"),
        call("echo"),
        call("echo", text="a", more=1),
        ToolCall(id="x", name="echo", arguments="{not json"),
        call("raises"),
        call("says"),
        call("cancels_itself"),
        call("echo", text="fine, too"),
    ]
    results = await invoke(echo, raises, says, cancels_itself, calls=calls)
    assert [(result.content, result.is_error) for result in results] == [
        ("UnknownToolError: there is no tool 'nowhere'; there are: cancels_itself, echo, raises, says", True),
        ("ToolArgumentsError: $.text: 1 is not of type 'string'", True),
        ("fine", False),
        ("ToolArgumentsError: $: 'text' is a required property", True),
        ("ToolArgumentsError: $: Additional properties are not allowed ('more' was unexpected)", True),
        ("ToolArgumentsError: must be a JSON object, got '{not json'", True),
        ("KeyError (no message)", True),
        ("OSError: disk\x1b[31m{gone}", True),
        ("Cancelled by itself: the tool raised the backend's cancelled exception", True),
        ("fine, too", False),
    ]


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_a_tool_that_cancels_its_own_task_costs_its_own_result_only() -> None:
    async def spoils() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await anyio.lowlevel.checkpoint()

    results = await invoke(spoils, echo, calls=[call("spoils"), call("echo", text="b"), call("spoils")])
    assert [result.is_error for result in results] == [True, False, True]
    await anyio.lowlevel.checkpoint()


async def test_a_tool_cannot_change_its_call() -> None:
    async def changes(arguments: dict[str, Any]) -> str:
        arguments["list"].append(4)
        arguments["table"]["b"] = 2
        arguments.clear()
        return "changed"

    wish = call("tool", list=[1, {"a": []}], table={"a": 1})
    (result,) = await invoke(raw(changes), calls=[wish])
    assert result.content == "changed"
    assert wish.arguments == {"list": [1, {"a": []}], "table": {"a": 1}}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(arguments=st.dictionaries(st.text(), json_values, max_size=4))
def test_a_tool_gets_the_arguments_as_they_are(arguments: dict[str, Any]) -> None:
    seen: list[object] = []

    async def keep(given_arguments: dict[str, Any]) -> None:
        seen.append(given_arguments)

    anyio.run(ToolInvoker(ToolRegistry([raw(keep)])).invoke_all, [ToolCall(id="", name="tool", arguments=arguments)])
    assert seen == [arguments]
    assert type(seen[0]) is dict


@virtual_time
async def test_a_late_call_is_an_error_result() -> None:
    async def hangs() -> None:
        await anyio.sleep_forever()

    async def raises_its_own() -> None:
        raise TimeoutError("mine")

    late = Tool.from_function(hangs, timeout_seconds=2.5)
    own = Tool.from_function(raises_its_own, timeout_seconds=2.5)
    started = anyio.current_time()
    results = await invoke(late, own)
    assert anyio.current_time() - started == pytest.approx(2.5)
    assert [result.content for result in results] == ["TimeoutError: Timed out after 2.5 s", "TimeoutError: mine"]


@virtual_time
async def test_what_a_late_tool_returns_all_the_same_is_its_result() -> None:
    async def swallows() -> str:
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            return "saved"
        return ""

    (result,) = await invoke(Tool.from_function(swallows, timeout_seconds=1))
    assert result == ToolResult(tool_call_id="call-swallows", content="saved")


# What concerns more than one call


@pytest.mark.parametrize("kind", [MemoryError, RecursionError])
async def test_a_fatal_error_is_raised_bare_after_all_have_ended(kind: type[Exception]) -> None:
    is_over, ended = anyio.Event(), []

    async def fails() -> None:
        is_over.set()
        raise kind("too much")

    async def goes_on() -> None:
        await is_over.wait()
        await anyio.lowlevel.checkpoint()
        ended.append(1)

    with pytest.raises(kind, match="too much"):
        await invoke(goes_on, fails)
    assert ended == [1]


async def test_several_fatal_errors_are_a_group() -> None:
    async def one() -> None:
        raise MemoryError("one")

    async def two() -> None:
        raise ExceptionGroup("both", [OSError("no"), RecursionError("two")])

    with pytest.raises(ExceptionGroup) as caught:
        await invoke(one, two)
    assert sorted(map(repr, caught.value.exceptions)) == ["MemoryError('one')", "RecursionError('two')"]


@pytest.mark.parametrize("order", [KeyboardInterrupt, SystemExit])
async def test_an_order_to_end_the_program_stops_all_calls_and_leaves_bare(order: type[BaseException]) -> None:
    started, ended = anyio.Event(), []

    async def waits() -> None:
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(1)

    async def orders() -> None:
        await started.wait()
        raise order

    with pytest.raises(order):
        await invoke(waits, orders)
    assert ended == [1]


async def test_a_question_is_raised_after_all_have_ended_with_all_results() -> None:
    asked = anyio.Event()

    async def asks() -> None:
        asked.set()
        raise NeedsHuman("May I?")

    async def goes_on() -> str:
        await asked.wait()
        return "done"

    async def asks_too() -> None:
        await asked.wait()
        raise NeedsHuman("And I?")

    with pytest.raises(NeedsHuman, match="May I") as caught:
        await invoke(goes_on, asks, asks_too)
    assert [(result.content, result.is_error) for result in caught.value.results] == [
        ("done", False),
        ("A person is asked: May I?", True),
        ("A person is asked: And I?", True),
    ]
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (copied.question, copied.results) == (caught.value.question, caught.value.results)


async def test_a_cancelled_caller_waits_for_all_calls() -> None:
    started, ended = anyio.Event(), []

    async def waits() -> None:
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
            ended.append(1)

    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ToolInvoker(ToolRegistry([waits])).invoke_all, [call("waits")] * 3)
            await started.wait()
            scope.cancel()
    assert scope.cancelled_caught
    assert ended == [1, 1, 1]


def test_cancelled_at_every_step_no_call_is_left_over() -> None:
    running = 0

    async def works() -> None:
        nonlocal running
        running += 1
        try:
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
        finally:
            running -= 1

    async def turn() -> None:
        await ToolInvoker(ToolRegistry([works])).invoke_all([call("works")] * 3, max_concurrency=2)

    def is_clean() -> None:
        assert running == 0

    assert cancel_at_every_checkpoint(turn, check=is_clean) > 5


def test_a_thread_sees_of_the_run_what_the_agent_sees() -> None:
    class Waiting(RunContext):
        @property
        def waits_for_others(self) -> bool:
            return True

        @property
        def budget_exhausted(self) -> bool:
            return True

    (task,) = group_of(1).assignments
    for run, state in ((RunContext("g", task, lambda: False), False), (Waiting("g", task, lambda: True), True)):
        there = RunInAnotherThread(run, lambda function: function())
        assert [there.waits_for_others, there.budget_exhausted, there.shutdown_requested] == [state] * 3


# Registries, schemas, values


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two tools are called 'echo'"):
        ToolRegistry([echo, Tool.from_function(echo)])


def test_a_registry_is_an_iterable_of_its_tools() -> None:
    registry = ToolRegistry([echo, paint])
    assert len(registry) == 2
    assert repr(registry) == "ToolRegistry(echo, paint)"
    assert [tool.name for tool in ToolRegistry([*registry, raw(paint)])] == ["echo", "paint", "tool"]
    with pytest.raises(TypeError, match="each of tools must be a Tool or a function, got 1"):
        ToolRegistry([1])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="registry must be of type ToolRegistry"):
        ToolInvoker([echo])  # type: ignore[arg-type]


async def test_what_is_no_schema_is_refused_and_other_documents_are_not_fetched() -> None:
    with pytest.raises(ValueError, match="parameters of tool 'tool': no JSON Schema: 'objekt' is not valid"):
        raw(paint, parameters={"type": "objekt"})
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/schema"
        elsewhere = raw(paint, parameters={"$ref": address})
        endless = raw(paint, name="endless", parameters={"$ref": "#"})
        results = await invoke(elsewhere, endless)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has called
            server.accept()
    assert [result.content for result in results] == [
        f"ToolArgumentsError: the schema refers to '{address}', which is not in it",
        "ToolArgumentsError: the schema refers to itself without an end",
    ]


def test_a_few_problems_are_told_and_long_ones_are_cut() -> None:
    tool = raw(paint, parameters={"additionalProperties": {"type": "integer"}})
    assert len(tool.problems({str(number): "x" for number in range(50)})) == 5
    (problem,) = tool.problems({"a": "x" * 10_000})
    assert len(problem) < 600


def test_a_call_keeps_its_arguments_read_only() -> None:
    wish = call("echo", text=["a"])
    with pytest.raises(TypeError, match="read-only"):
        wish.arguments["text"] = 1
    with pytest.raises(ValueError, match=r"arguments\[text\] must be finite"):
        call("echo", text=float("nan"))


def test_annotated_descriptions_stand_above_the_docstring() -> None:
    from pydantic import Field  # noqa: PLC0415 - the one test that writes pydantic's own

    def search(query: Annotated[str, Field(description="From the field.", min_length=2)]) -> None:
        """Search.

        Args:
            query: From the docstring.
        """

    tool = Tool.from_function(search)
    assert tool.parameters["properties"]["query"]["description"] == "From the field."
    assert tool.problems({"query": "x"}) == ["$.query: 'x' is too short"]


# Events


class Notes(Observer):
    def __init__(self) -> None:
        self.events: list[ParallelEvent] = []

    def on_event(self, event: ParallelEvent) -> None:
        if event.name.startswith("tool."):
            self.events.append(event)


@pytest.mark.proves("V2")
async def test_events_of_an_agents_tools_carry_its_ids_and_no_arguments() -> None:
    async def fails(secret: str) -> None:
        raise OSError(f"{{{secret[:0]}}}")

    async def agent(assignment: AgentAssignment) -> int:
        registry = ToolRegistry([echo, fails])
        calls = [call("echo", text="secret"), call("fails", secret="secret")]
        return len(await ToolInvoker(registry).invoke_all(calls, max_concurrency=1))

    notes = Notes()
    await ParallelExecutor(engine=FunctionEngine(agent), observers=[notes]).execute_group(group_of(1))
    assert {(e.group_id, e.agent_id, e.task_id) for e in notes.events} == {("g", "a0", "t0")}
    assert [(e.name, e.fields.get("tool"), e.fields.get("error")) for e in notes.events] == [
        (TOOL_INVOKE_ALL_START, None, None),
        (TOOL_INVOKE_START, "echo", None),
        (TOOL_INVOKE_SUCCESS, "echo", None),
        (TOOL_INVOKE_START, "fails", None),
        (TOOL_INVOKE_ERROR, "fails", "OSError: {}"),
        (TOOL_INVOKE_ALL_COMPLETE, None, None),
    ]
    assert notes.events[-1].fields["errors"] == 1
    assert "secret" not in repr(notes.events)


async def test_every_start_of_a_cancelled_turn_has_its_end() -> None:
    notes = Notes()

    async def hangs() -> None:
        await anyio.sleep_forever()

    async def agent(assignment: AgentAssignment) -> None:
        await ToolInvoker(ToolRegistry([hangs])).invoke_all([call("hangs")] * 2)

    async with ParallelExecutor(engine=FunctionEngine(agent), observers=[notes]).open_group(group_of(1)) as run:
        while len(notes.events) < 3:
            await anyio.lowlevel.checkpoint()
        run.cancel()
    names = [event.name for event in notes.events]
    assert names.count(TOOL_INVOKE_START) == names.count(TOOL_INVOKE_ERROR) == 2
    assert names[-1] == TOOL_INVOKE_ALL_COMPLETE
