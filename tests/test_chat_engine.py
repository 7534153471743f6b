"""ChatEngine against a scripted server on the loopback: real HTTP, real sockets, no model."""

import json
import pickle
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import httpx2
import pytest
import trustme
from loguru import logger

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    Budget,
    ChatMessage,
    CompletionConfig,
    CooperativeTimeout,
    NeedsHuman,
    Observer,
    OutcomeStatus,
    ParallelEvent,
    ParallelExecutionError,
    ParallelExecutionGroup,
    ParallelExecutor,
    ShutdownManager,
    Task,
    TerminationReason,
    Tool,
    ToolCall,
    Usage,
)
from parallel_agents.engines import chat
from parallel_agents.engines._chat_protocol import StreamReader
from parallel_agents.engines.chat import ChatEngine, ChatError, Price
from parallel_agents.events import CHAT_REQUEST_RETRY
from parallel_agents.serialization import report
from parallel_agents.testing.chat import (
    ChatReply,
    ChatRequest,
    Script,
    ScriptedChatServer,
    ScriptExhaustedError,
    scripted_chat_server,
)

pytestmark = pytest.mark.anyio

KEY = "sk-very-secret"
STREAMED_OR_NOT = pytest.mark.parametrize("stream", [False, True])


def wants(name: str = "look", /, *, id: str = "c1", **arguments: Any) -> ToolCall:  # noqa: A002 - as ToolCall calls it
    return ToolCall(id=id, name=name, arguments=arguments)


def group_for(
    agents: int = 1,
    *,
    identity: dict[str, Any] | None = None,
    task: dict[str, Any] | None = None,
    group: dict[str, Any] | None = None,
    **fields: Any,
) -> ParallelExecutionGroup:
    assignments = [
        AgentAssignment(
            identity=AgentIdentity(**{"id": f"a{number}", **(identity or {})}),
            task=Task(**{"id": f"t{number}", "description": "Look.", **(task or {})}),
            **fields,
        )
        for number in range(agents)
    ]
    return ParallelExecutionGroup(group_id="g", assignments=assignments, **(group or {}))


async def outcome_of(engine: ChatEngine, group: ParallelExecutionGroup | None = None, **options: Any) -> Any:
    """Return the one outcome of a group, whose result is left out of its type: each test knows what it is."""
    with anyio.fail_after(60):
        result = await ParallelExecutor(engine=engine, **options).execute_group(group or group_for())
    return result.outcomes[0]


async def ask(
    script: Script, group: ParallelExecutionGroup | None = None, **options: Any
) -> tuple[Any, ScriptedChatServer]:
    async with scripted_chat_server(script) as server:
        return await outcome_of(ChatEngine(server.base_url, "m", **options), group), server


def said(request: ChatRequest) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in request.body["messages"]]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let requests be sent again without a wait."""
    monkeypatch.setattr(chat, "FIRST_WAIT_SECONDS", 0.0)


# What an agent is given and says


@STREAMED_OR_NOT
async def test_an_agent_is_asked_and_answers(stream: bool) -> None:
    outcome, server = await ask(["Fine — thank you ✓"], stream=stream)
    assert outcome.status is OutcomeStatus.SUCCEEDED
    assert outcome.output == "Fine — thank you ✓"
    assert outcome.result.turns == 1
    assert outcome.result.duration_seconds > 0
    assert outcome.usage == outcome.result.usage == Usage(input_tokens=10, output_tokens=5, requests=1)
    assert outcome.result.completion_summary == "Fine — thank you ✓"
    (request,) = server.requests
    assert request.path == "/v1/chat/completions"
    assert said(request) == [("user", "Look.")]
    assert request.body["model"] == "m"
    assert request.body.get("stream", False) is stream
    assert "authorization" not in request.headers


async def test_instructions_memory_task_inputs_and_files_make_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"in the file \xff")
    group = group_for(
        identity={"instructions": "Be short."},
        task={"inputs": {"path": "a.txt", "depth": 2}},
        memory_messages=[ChatMessage(role="user", content="Hi."), ChatMessage(role="assistant", content="Hello.")],
    )
    _, server = await ask(["ok"], group, attach=["path"], folder=tmp_path)
    assert said(server.requests[0]) == [
        ("system", "Be short."),
        ("user", "Hi."),
        ("assistant", "Hello."),
        ("user", 'Look.\n\n{"depth": 2}\n\na.txt:\nin the file \N{REPLACEMENT CHARACTER}'),
    ]


async def test_a_prompt_of_its_own_is_filled() -> None:
    group = group_for(task={"inputs": {"path": "x\0{y}"}})
    _, server = await ask(["ok"], group, prompt="{agent_id}: {task.inputs[path]} {{}}")
    assert said(server.requests[0]) == [("user", "a0: x\0{y} {}")]


async def test_a_task_knows_what_those_it_depends_on_have_returned() -> None:
    tasks = [Task(id="one", title="First"), Task(id="two", description="Second", depends_on=["one"])]
    group = ParallelExecutionGroup.map("g", AgentIdentity(id="a"), tasks)
    async with scripted_chat_server(['{"n": 1}', "2"]) as server:
        engine = ChatEngine(server.base_url, "m", output_schema={"type": ["object", "integer"]})
        result = await ParallelExecutor(engine=engine).execute_group(group)
    assert result.all_succeeded
    assert said(server.requests[0]) == [("user", "First")]
    assert said(server.requests[1]) == [("user", 'Second\n\nResult of one:\n{"n": 1}')]


async def test_the_completion_config_is_passed_on() -> None:
    config = CompletionConfig(
        temperature=0.5, max_tokens=7, stop=["END"], seed=3, response_format={"type": "text"}, extra={"top_p": 0.1}
    )
    _, server = await ask(["ok"], group_for(completion_config=config))
    body = dict(server.requests[0].body)
    del body["messages"]
    assert body == {
        "model": "m",
        "temperature": 0.5,
        "max_tokens": 7,
        "stop": ["END"],
        "seed": 3,
        "response_format": {"type": "text"},
        "top_p": 0.1,
    }


async def test_the_nearest_model_and_server_are_asked() -> None:
    async with scripted_chat_server(lambda _: "one") as one, scripted_chat_server(lambda _: "two") as two:
        engine = ChatEngine(one.base_url, "of-engine")
        own = {"model": "of-identity", "base_url": two.base_url}
        assert (await outcome_of(engine)).output == "one"
        assert (await outcome_of(engine, group_for(identity=own))).output == "two"
        config = CompletionConfig(model="of-config")
        assert (await outcome_of(engine, group_for(identity=own, completion_config=config))).output == "two"
    assert [request.body["model"] for request in (*one.requests, *two.requests)] == [
        "of-engine",
        "of-identity",
        "of-config",
    ]


@STREAMED_OR_NOT
async def test_text_of_every_kind_arrives_as_it_is(stream: bool) -> None:
    text = "".join(map(chr, range(0x20))) + '\x7f\x85\u2028\u202e"\\\N{GRINNING FACE}</s>{braces}'
    outcome, server = await ask([text], group_for(task={"description": text + "\ud800"}), stream=stream)
    assert said(server.requests[0]) == [("user", text + "?")]  # half of a surrogate pair is no character
    assert outcome.output == text


async def test_text_is_told_as_it_comes() -> None:
    pieces: list[tuple[str, str]] = []
    await ask(["abcdef"], stream=True, on_text=lambda assignment, text: pieces.append((assignment.agent_id, text)))
    assert pieces == [("a0", "ab"), ("a0", "cd"), ("a0", "ef")]


def test_a_stream_can_be_cut_anywhere() -> None:
    events = b'data: {"choices": [{"delta": {"content": "h\xc3\xa9"}}]}\n: a comment\n\ndata:[DONE]\n\n'
    for cut in range(len(events)):
        reader = StreamReader()
        assert reader.add(events[:cut]) + reader.add(events[cut:]) == "hé"
        assert reader.is_done


# Tools


@STREAMED_OR_NOT
async def test_tools_are_called_and_their_results_are_heard(stream: bool) -> None:
    both = anyio.Event()

    async def look(path: str) -> str:
        """Look into a file.

        Args:
            path: Of the file.
        """
        await both.wait()
        return f"content of {path}"

    async def count(numbers: list[int]) -> int:
        both.set()  # the tools of a turn run at the same time
        return sum(numbers)

    calls = [wants("look", id="c1", path="a"), wants("count", id="c2", numbers=[1, 2])]
    script: Script = [ChatReply(content="Let me see.", tool_calls=calls), "Three in a."]
    outcome, server = await ask(script, tools=[look, count], stream=stream)
    assert outcome.output == "Three in a."
    assert outcome.result.turns == 2
    assert outcome.usage == Usage(input_tokens=20, output_tokens=10, requests=2)
    assert [tool["function"]["name"] for tool in server.requests[0].body["tools"]] == ["look", "count"]
    described = server.requests[0].body["tools"][0]["function"]
    assert described["description"] == "Look into a file."
    assert described["parameters"]["properties"]["path"]["description"] == "Of the file."
    assert server.requests[1].body["messages"][1:] == [
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"path": "a"}'}},
                {"id": "c2", "type": "function", "function": {"name": "count", "arguments": '{"numbers": [1, 2]}'}},
            ],
        },
        {"role": "tool", "content": "content of a", "tool_call_id": "c1"},
        {"role": "tool", "content": "3", "tool_call_id": "c2"},
    ]
    assert outcome.result.messages[1].tool_calls == tuple(calls)
    assert [message.role for message in outcome.result.messages] == ["user", "assistant", "tool", "tool", "assistant"]


async def test_no_more_tools_run_at_once_than_allowed() -> None:
    running, peak = 0, 0

    async def look() -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        running -= 1

    script: Script = [ChatReply(tool_calls=[wants(id=str(n)) for n in range(6)]), "done"]
    await ask(script, tools=[look], max_concurrent_tools=2)
    assert peak == 2


@STREAMED_OR_NOT
@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ('{"path": ', "ToolArgumentsError: must be a JSON object, got '{\"path\": '"),
        ("[" * 100_000, "ToolArgumentsError: must be a JSON object, got '[[["),
        ("[" * 200 + "]" * 200, "ToolArgumentsError: must be a JSON object, got '[[["),
        ('{"path": NaN}', "ToolArgumentsError: must be a JSON object, got '{\"path\": NaN}'"),
        ('"text"', "ToolArgumentsError: must be a JSON object, got 'text'"),
        ("", "ToolArgumentsError: $: 'path' is a required property"),
        ('{"path": "\\ud800"}', "seen"),
    ],
)
async def test_arguments_that_are_none_are_told_to_the_model(arguments: str, answer: str, stream: bool) -> None:
    async def look(path: str) -> str:
        return "seen"

    call = ToolCall(id="c1", name="look", arguments=arguments)
    outcome, server = await ask([ChatReply(tool_calls=[call]), "I see."], tools=[look], stream=stream)
    assert outcome.output == "I see."
    assert said(server.requests[1])[-1][1].startswith(answer)
    json.loads(server.requests[1].body["messages"][1]["tool_calls"][0]["function"]["arguments"])


async def test_a_tool_that_is_not_there_is_told_to_the_model() -> None:
    outcome, server = await ask([ChatReply(tool_calls=[wants("fly")]), "I cannot."])
    assert outcome.output == "I cannot."
    assert said(server.requests[1])[-1] == ("tool", "UnknownToolError: there is no tool 'fly'; there are: none")


async def test_a_tool_that_fails_or_cancels_itself_is_told_to_the_model() -> None:
    async def fails() -> None:
        raise OSError("no disk")

    async def stops() -> None:
        raise anyio.get_cancelled_exc_class().__new__(anyio.get_cancelled_exc_class())

    script: Script = [ChatReply(tool_calls=[wants("fails"), wants("stops")]), "Sorry."]
    outcome, server = await ask(script, tools=[fails, stops])
    assert outcome.output == "Sorry."
    assert [text for _, text in said(server.requests[1])[-2:]] == [
        "OSError: no disk",
        "Cancelled by itself: the tool raised the backend's cancelled exception",
    ]


@pytest.mark.proves("X6")
async def test_a_fatal_error_of_a_tool_is_the_agents() -> None:
    async def eats() -> None:
        raise MemoryError("all of it")

    async with scripted_chat_server([ChatReply(tool_calls=[wants("eats")])]) as server:
        with pytest.raises(ParallelExecutionError) as caught:
            await outcome_of(ChatEngine(server.base_url, "m", tools=[eats]))
    (outcome,) = caught.value.result.outcomes
    assert outcome.error == "Fatal: MemoryError: all of it"
    assert outcome.usage.requests == 1


async def test_a_tool_that_runs_for_ever_is_given_up_and_told() -> None:
    async def hangs() -> None:
        await anyio.sleep_forever()

    tool = Tool.from_function(hangs, timeout_seconds=0.001)
    _, server = await ask([ChatReply(tool_calls=[wants("hangs")]), "Well."], tools=[tool])
    assert said(server.requests[1])[-1] == ("tool", "TimeoutError: Timed out after 0.001 s")


# How it ends


async def test_turns_run_out() -> None:
    async def look(n: int) -> int:
        return n

    script: Script = [ChatReply(tool_calls=[wants(n=n)]) for n in range(3)]
    outcome, server = await ask(script, group_for(max_turns=3), tools=[look])
    assert outcome.status is OutcomeStatus.FAILED
    assert outcome.result.termination_reason is TerminationReason.MAX_TURNS
    assert outcome.result.turns == len(server.requests) == 3
    assert outcome.result.messages[-1].role == "tool"


async def test_the_same_calls_again_and_again_are_stagnation() -> None:
    called: list[int] = []

    async def look(n: int) -> None:
        called.append(n)

    numbers = [1, 1, 2, 2, 2]
    script: Script = [ChatReply(tool_calls=[wants(id=str(turn), n=n)]) for turn, n in enumerate(numbers)]
    outcome, _ = await ask(script, tools=[look])
    assert outcome.result.termination_reason is TerminationReason.STAGNATION
    assert called == [1, 1, 2, 2]


async def test_a_spent_budget_ends_an_agent_between_turns() -> None:
    called: list[int] = []

    async def look() -> None:
        called.append(1)

    group = group_for(group={"budget": Budget(max_cost=1.0)})
    prices = {"m": Price(input_per_million=100_000, output_per_million=0)}
    outcome, server = await ask(lambda _: ChatReply(tool_calls=[wants()]), group, tools=[look], prices=prices)
    assert outcome.result.termination_reason is TerminationReason.BUDGET_EXHAUSTED
    assert (len(server.requests), called) == (1, [1])
    assert outcome.usage.cost == pytest.approx(1.0)


async def test_an_agent_that_answers_has_completed_whatever_it_spent() -> None:
    outcome, _ = await ask(["Done."], group_for(group={"budget": Budget(max_tokens=1)}))
    assert outcome.status is OutcomeStatus.SUCCEEDED


async def test_a_shutdown_lets_the_turn_end() -> None:
    manager = ShutdownManager(CooperativeTimeout(grace_seconds=60))

    async def look() -> str:
        manager.request_shutdown()
        return "seen"

    async with scripted_chat_server([ChatReply(tool_calls=[wants()])]) as server:
        engine = ChatEngine(server.base_url, "m", tools=[look])
        outcome = await outcome_of(engine, shutdown_manager=manager)
    assert outcome.result.termination_reason is TerminationReason.SHUTDOWN
    assert outcome.result.messages[-1].content == "seen"


async def test_a_question_parks_the_agent_which_can_go_on_with_the_answer() -> None:
    async def send() -> None:
        raise NeedsHuman("May I send it?")

    async def look() -> str:
        return "seen"

    calls = [wants("send", id="c1"), wants("look", id="c2")]
    outcome, _ = await ask([ChatReply(tool_calls=calls)], tools=[send, look])
    assert outcome.status is OutcomeStatus.PARKED
    assert outcome.result.completion_summary == "May I send it?"
    assert [message.content for message in outcome.result.messages[-3:]] == [
        "A person is asked: May I send it?",
        "seen",
        "May I send it?",
    ]
    again = group_for(task={"description": "You may."}, memory_messages=outcome.result.messages)
    _, server = await ask(["Sent."], again)
    roles = ["user", "assistant", "tool", "tool", "assistant", "user"]
    assert [message["role"] for message in server.requests[0].body["messages"]] == roles
    assert server.requests[0].body["messages"][2]["tool_call_id"] == "c1"


@STREAMED_OR_NOT
@pytest.mark.parametrize(
    ("reason", "text"), [("length", "the reply was cut"), ("content_filter", "the server filtered the reply")]
)
async def test_a_reply_that_is_not_whole_is_an_error(reason: str, text: str, stream: bool) -> None:
    called: list[int] = []

    async def look(path: str) -> None:
        called.append(1)

    cut = ToolCall(id="c", name="look", arguments='{"path": "a')
    reply = ChatReply(content="half", tool_calls=[cut], finish_reason=reason)
    outcome, _ = await ask([reply], tools=[look], stream=stream)
    assert outcome.result.termination_reason is TerminationReason.ERROR
    assert outcome.result.error_message.startswith(text)
    assert outcome.result.messages[-1].content == "half"
    assert outcome.usage.output_tokens == 5
    assert called == []


@STREAMED_OR_NOT
async def test_a_refusal_is_an_error(stream: bool) -> None:
    message = {"role": "assistant", "content": None, "refusal": "I will not."}
    body = {"choices": [{"message": message, "delta": message, "finish_reason": "stop"}]}
    text = json.dumps(body).encode()
    reply = ChatReply(body=text)
    if stream:
        reply = ChatReply(body=b"data: " + text + b"\n\n", headers={"content-type": "text/event-stream"})
    outcome, _ = await ask([reply])
    assert outcome.result.error_message == "the model refused: I will not."


# Structured output

LABEL = {
    "type": "object",
    "properties": {"label": {"enum": ["good", "bad"]}},
    "required": ["label"],
    "additionalProperties": False,
}


async def test_an_output_that_fits_the_schema_is_json() -> None:
    outcome, server = await ask(['{"label": "good"}'], output_schema=LABEL)
    assert outcome.output == {"label": "good"}
    assert server.requests[0].body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "output", "strict": True, "schema": LABEL},
    }


async def test_a_model_is_told_what_is_wrong_with_its_output() -> None:
    outcome, server = await ask(["good", '{"label": "fine"}', '{"label": "good"}'], output_schema=LABEL)
    assert outcome.output == {"label": "good"}
    assert outcome.result.turns == 3
    corrections = [said(request)[-1] for request in server.requests[1:]]
    assert corrections == [
        (
            "user",
            (
                "This does not fit the JSON Schema of the answer: it is no JSON: line 1, column 1: Expecting value. "
                "Answer with the JSON alone."
            ),
        ),
        (
            "user",
            (
                "This does not fit the JSON Schema of the answer: $.label: 'fine' is not one of ['good', 'bad']. "
                "Answer with the JSON alone."
            ),
        ),
    ]


async def test_a_model_that_ignores_the_schema_ends_with_an_error() -> None:
    outcome, server = await ask(lambda _: "good", output_schema=LABEL)
    assert outcome.result.termination_reason is TerminationReason.ERROR
    assert outcome.result.error_message.startswith("the output does not fit its schema: it is no JSON")
    assert len(server.requests) == 3


# Servers that fail


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(ChatReply(status=429), id="429"),
        pytest.param(ChatReply(status=500), id="500"),
        pytest.param(ChatReply(status=503, headers={"retry-after": "0"}), id="503"),
        pytest.param(ChatReply(content="abc", drop_after=0), id="dropped at once"),
        pytest.param(ChatReply(content="abc", drop_after=30), id="dropped in the middle"),
        pytest.param(ChatReply(body=b'{"choices": ['), id="half a JSON"),
        pytest.param(ChatReply(body=b"\xff"), id="no text"),
        pytest.param(ChatReply(body=b"[1]"), id="no table"),
        pytest.param(ChatReply(body=b'{"choices": []}'), id="no choices"),
        pytest.param(ChatReply(body=b'{"choices": [1]}'), id="no choice"),
        pytest.param(ChatReply(body=b'{"choices": [{}]}'), id="no message"),
        pytest.param(ChatReply(body=b'{"choices": [{"message": {"content": 1}}]}'), id="no content"),
        pytest.param(ChatReply(body=b'{"choices": [{"message": {"tool_calls": 1}}]}'), id="no tool calls"),
        pytest.param(ChatReply(body=b'{"choices": [{"message": {"tool_calls": [{}]}}]}'), id="no function"),
        pytest.param(ChatReply(body=b'{"error": {"message": "overloaded"}}'), id="an error called 200"),
    ],
)
@STREAMED_OR_NOT
async def test_what_may_pass_is_asked_again(failure: ChatReply, stream: bool) -> None:
    if failure.body is not None and stream:
        kind = {"content-type": "text/event-stream"}
        body = failure.body.replace(b'{"message": {', b'{"delta": {')  # as it is called in a stream
        failure = ChatReply(body=b"data: " + body + b"\n\n", headers=kind)
    outcome, server = await ask([failure, failure, "there"], stream=stream)
    assert outcome.output == "there"
    assert len(server.requests) == 3
    assert outcome.usage.requests == 3


@pytest.mark.usefixtures("at_once")
async def test_after_so_many_tries_the_error_is_raised() -> None:
    outcome, server = await ask(lambda _: ChatReply(status=500, content="down"), max_retries=1)
    assert outcome.status is OutcomeStatus.FAILED
    assert outcome.error == f"ChatError: {server.base_url} answered 500: down"
    assert outcome.exception.status == 500
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_what_will_not_pass_is_not_asked_again(status: int) -> None:
    outcome, server = await ask([ChatReply(status=status, content="no\x1b[31m")])
    assert outcome.error == f"ChatError: {server.base_url} answered {status}: no\x1b[31m"


async def test_explanations_of_any_form_are_told_and_long_ones_cut() -> None:
    bodies = [b'{"error": "text"}', b'{"detail": [1]}', b"<h1>No</h1>", b"", b'"' + b"x" * 5_000 + b'"']
    outcome_texts = []
    for body in bodies:
        outcome, _ = await ask([ChatReply(status=400, body=body)])
        outcome_texts.append(outcome.error.partition("answered 400: ")[2])
    assert outcome_texts[:4] == ["text", '{"detail": [1]}', "<h1>No</h1>", "Bad Request"]
    assert len(outcome_texts[4]) == 1_003


async def test_a_server_says_when_to_ask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[ParallelEvent] = []

    class Notes(Observer):
        def on_event(self, event: ParallelEvent) -> None:
            if event.name == CHAT_REQUEST_RETRY:
                events.append(event)

    slow_down = ChatReply(status=429, headers={"retry-after": "0.001"})
    async with scripted_chat_server([slow_down, "there"]) as server:
        outcome = await outcome_of(ChatEngine(server.base_url, "m"), observers=[Notes()])
    assert outcome.output == "there"
    (event,) = events
    assert event.fields["wait_seconds"] == 0.001
    assert event.fields["attempt"] == 1
    assert event.fields["error"].endswith("answered 429: scripted")


async def test_a_server_that_wants_a_long_rest_is_not_waited_for() -> None:
    outcome, server = await ask([ChatReply(status=429, headers={"retry-after": "61"})])
    assert outcome.exception.retry_after_seconds == 61.0
    assert len(server.requests) == 1


def test_waits_grow_and_have_an_end() -> None:
    lost = ChatError("lost", may_pass=True)
    waits = [chat._wait_after(attempt, lost) for attempt in (1, 2, 3, 20)]
    for wait, least in zip(waits, (0.5, 1.0, 2.0, 60.0), strict=True):
        assert wait is not None
        assert least <= wait <= least * 1.5
    assert chat._wait_after(1, ChatError("wrong", 400)) is None


@pytest.mark.usefixtures("at_once")
async def test_a_server_that_is_not_there() -> None:
    async with scripted_chat_server([]) as server:
        pass
    outcome = await outcome_of(ChatEngine(server.base_url, "m"))
    assert outcome.error.startswith(f"ChatError: {server.base_url} did not answer: ConnectError: ")
    assert outcome.usage == Usage(requests=3)


@pytest.mark.usefixtures("at_once")
@STREAMED_OR_NOT
async def test_a_server_that_falls_silent_is_given_up(stream: bool) -> None:
    silent = ChatReply(content="abcdef", wait_between=anyio.Event())
    async with scripted_chat_server([silent, "there"]) as server:
        engine = ChatEngine(server.base_url, "m", stream=stream, answer_seconds=0.05)
        assert (await outcome_of(engine)).output == "there"
        await server.until(lambda s: s.hung_up == [0])


@pytest.mark.usefixtures("at_once")
async def test_a_stream_that_stops_in_the_middle_begins_again() -> None:
    pieces: list[str] = []
    dropped = ChatReply(content="abcdef", drop_after=400)
    outcome, _ = await ask([dropped, "abcdef"], stream=True, on_text=lambda _, text: pieces.append(text))
    assert outcome.output == "abcdef"
    assert "".join(pieces) == "ababcdef"


@STREAMED_OR_NOT
async def test_an_endless_answer_is_cut_off(stream: bool) -> None:
    kind = {"content-type": "text/event-stream" if stream else "application/json"}
    async with scripted_chat_server([ChatReply(body=b"data: " + b" " * 100 * 1024 * 1024, headers=kind)]) as server:
        outcome = await outcome_of(ChatEngine(server.base_url, "m"))
        with anyio.fail_after(60):
            await server.until(lambda s: s.hung_up == [0])
    assert outcome.error == "ChatError: the answer is longer than reply_limit_bytes, 8388608"


async def test_an_endless_explanation_is_cut_off() -> None:
    async with scripted_chat_server([ChatReply(status=400, body=b"x" * 100 * 1024 * 1024)]) as server:
        outcome = await outcome_of(ChatEngine(server.base_url, "m"))
        with anyio.fail_after(60):
            await server.until(lambda s: s.hung_up == [0])
    assert len(outcome.error) < 1_200


async def test_an_answer_that_is_packed_is_refused() -> None:
    outcome, server = await ask([ChatReply(body=b"", headers={"content-encoding": "gzip"})])
    assert server.requests[0].headers["accept-encoding"] == "identity"
    assert "packs its answers" in outcome.error


async def test_a_redirect_is_not_followed() -> None:
    elsewhere = ChatReply(status=307, headers={"location": "http://example.test/v1"})
    outcome, _ = await ask([elsewhere])
    assert outcome.error.endswith("answered 307: it is elsewhere, at 'http://example.test/v1'; set base_url")


async def test_a_certificate_that_nobody_vouches_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    async with scripted_chat_server(lambda _: "trusted", tls=context) as server:
        outcome = await outcome_of(ChatEngine(server.base_url, "m"))
        assert outcome.error.startswith(f"ChatError: {server.base_url} cannot be trusted: ")
        assert "SSL_CERT_FILE" in outcome.error
        assert outcome.usage == Usage(requests=1)
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        assert (await outcome_of(ChatEngine(server.base_url, "m"))).output == "trusted"


async def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    async with scripted_chat_server(["through", ChatReply(status=407, content="who are you?")]) as proxy:
        monkeypatch.setenv("http_proxy", proxy.base_url.removesuffix("/v1"))
        engine = ChatEngine("http://example.test/v1", "m")
        assert (await outcome_of(engine)).output == "through"
        assert proxy.requests[0].path == "http://example.test/v1/chat/completions"
        assert (await outcome_of(engine)).error.endswith("answered 407: who are you?")


async def test_clients_of_ones_own() -> None:
    made: list[httpx2.AsyncClient] = []

    def make() -> httpx2.AsyncClient:
        made.append(httpx2.AsyncClient(headers={"x-team": "blue"}))
        return made[-1]

    _, server = await ask(["ok"], make_client=make)
    assert server.requests[0].headers["x-team"] == "blue"
    assert [client.is_closed for client in made] == [True]


# Connections and cancelling


async def test_agents_share_connections_which_are_closed_after_the_last() -> None:
    async with scripted_chat_server(lambda _: "ok") as server:
        engine = ChatEngine(server.base_url, "m")
        group = group_for(1_000, group={"max_concurrency": 50})
        with anyio.fail_after(120):
            result = await ParallelExecutor(engine=engine).execute_group(group)
        assert result.all_succeeded
        assert len(server.requests) == 1_000
        assert server.peak <= 50
        assert server.connections < 500
        assert engine._client._idle.get().clients == []


@STREAMED_OR_NOT
async def test_a_cancelled_agent_hangs_up_at_once_and_its_costs_are_kept(stream: bool) -> None:
    async def look() -> str:
        return "seen"

    never = anyio.Event()
    script: Script = [ChatReply(tool_calls=[wants()]), ChatReply(content="abc", wait_between=never if stream else None,
              wait_for=None if stream else never)]  # fmt: skip
    prices = {"m": Price(input_per_million=1e5, output_per_million=0)}
    async with scripted_chat_server(script) as server:
        engine = ChatEngine(server.base_url, "m", tools=[look], stream=stream, prices=prices)
        with anyio.fail_after(60):
            async with ParallelExecutor(engine=engine).open_group(group_for()) as run:
                await server.until(lambda s: len(s.requests) == 2)
                run.cancel()
            await server.until(lambda s: s.hung_up == [1])
    assert run.result is not None
    (outcome,) = run.result.outcomes
    assert outcome.status is OutcomeStatus.CANCELLED
    assert outcome.usage == Usage(input_tokens=10, output_tokens=5, requests=2, cost=1.0)


async def test_one_agent_that_is_cancelled_leaves_the_others_their_connections() -> None:
    go = anyio.Event()
    async with scripted_chat_server(lambda _: ChatReply(content="ok", wait_for=go)) as server:
        engine = ChatEngine(server.base_url, "m")
        with anyio.fail_after(60):
            async with ParallelExecutor(engine=engine).open_group(group_for(3)) as run:
                await server.until(lambda s: len(s.requests) == 3)
                run.cancel_task("t1")
                await server.until(lambda s: len(s.hung_up) == 1)
                go.set()
    assert run.result is not None
    statuses = [outcome.status for outcome in run.result.outcomes]
    assert statuses == [OutcomeStatus.SUCCEEDED, OutcomeStatus.CANCELLED, OutcomeStatus.SUCCEEDED]


def test_an_engine_made_at_import_time_serves_one_event_loop_after_another() -> None:
    pytest.importorskip("trio")
    engine = ChatEngine(model="m")

    async def once() -> Any:
        async with scripted_chat_server(["ok"]) as server:
            return await outcome_of(engine, group_for(identity={"base_url": server.base_url}))

    for backend in ("asyncio", "trio", "asyncio"):
        assert anyio.run(once, backend=backend).output == "ok"


# Keys


@pytest.fixture
def everything_logged() -> Iterator[list[str]]:
    lines: list[str] = []
    logger.enable("parallel_agents")
    sink = logger.add(lambda line: lines.append(str(line)), level=0, serialize=True, diagnose=True)
    yield lines
    logger.remove(sink)
    logger.disable("parallel_agents")


@pytest.mark.proves("V2")
@pytest.mark.usefixtures("at_once")
async def test_a_key_reaches_its_server_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, everything_logged: list[str]
) -> None:
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    script: Script = [
        ChatReply(status=500, content=f"odd key {KEY}"),
        ChatReply(status=401, content=f"Wrong key: {KEY}"),
    ]
    async with scripted_chat_server(script) as server, scripted_chat_server(lambda _: "ok") as other:
        engine = ChatEngine(server.base_url, "m", api_key_env="MY_KEY")
        result = await ParallelExecutor(engine=engine).execute_group(group_for(1))
        await outcome_of(engine, group_for(identity={"base_url": other.base_url}))
    assert [request.headers["authorization"] for request in server.requests] == [f"Bearer {KEY}"] * 2
    assert "authorization" not in other.requests[0].headers
    (outcome,) = result.outcomes
    assert outcome.error is not None
    assert outcome.error.endswith("Wrong key: [key]")
    written = [json.dumps(report(result)), repr(outcome), repr(engine), *everything_logged]
    assert any(CHAT_REQUEST_RETRY in line for line in everything_logged)
    assert not [text for text in written if KEY in text]


async def test_each_server_can_have_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE", "key-one")
    async with scripted_chat_server(["ok"]) as server:
        engine = ChatEngine(model="m", api_key_env={server.base_url: "ONE"})
        await outcome_of(engine, group_for(identity={"base_url": server.base_url}))
    assert server.requests[0].headers["authorization"] == "Bearer key-one"


# What is refused before anything starts


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"base_url": "ftp://x"}, "base_url must be an address"),
        ({"base_url": "localhost"}, "base_url must be an address"),
        ({"base_url": "http://x:y"}, "base_url must be an address"),
        ({"base_url": "http://x?key=1"}, "base_url must be an address"),
        ({"base_url": "http://me:secret@x/v1"}, "base_url must not hold a password"),
        ({"model": " "}, "model must not be blank"),
        ({"prompt": "{x}"}, "prompt: unknown placeholder {x}"),
        ({"output_schema": {"type": "objekt"}}, "output_schema: no JSON Schema"),
        ({"max_concurrent_tools": 0}, "max_concurrent_tools must be >= 1"),
        ({"max_retries": -1}, "max_retries must be >= 0"),
        ({"answer_seconds": 0}, "answer_seconds must be > 0"),
        ({"reply_limit_bytes": 0}, "reply_limit_bytes must be >= 1"),
    ],
)
def test_settings_that_are_wrong_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        ChatEngine(**options)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"api_key_env": 1}, {"tools": "ab"}, {"attach": "ab"}, {"prices": {"m": 1}}, {"on_text": 1}]
)
def test_settings_of_the_wrong_type_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        ChatEngine("http://x", **options)


@pytest.mark.parametrize(
    ("options", "fields", "problem"),
    [
        ({"base_url": None}, {}, "agent 'a0' has no base_url"),
        ({"model": None}, {}, "agent 'a0' has no model"),
        ({}, {"identity": {"base_url": "x"}}, "base_url must be an address"),
        ({"api_key_env": "NOT_SET"}, {}, "the environment variable NOT_SET with the key of http://x is not set"),
        ({"api_key_env": "ODD"}, {}, "the environment variable ODD holds no key"),
        ({"attach": ["path"]}, {}, "attach: the inputs of task 't0' have no path called 'path'"),
        ({"prompt": "{task.inputs[x]}"}, {}, "prompt: {task.inputs\\[x\\]} has no value"),
        ({}, {"completion_config": CompletionConfig(extra={"stream": True})}, "extra must not hold stream"),
    ],
)
def test_assignments_that_cannot_be_run_are_refused(
    options: dict[str, Any], fields: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ODD", "a\nb")
    engine = ChatEngine(**{"base_url": "http://x", "model": "m", **options})
    with pytest.raises(ValueError, match=problem):
        engine.check(group_for(**fields).assignments[0])


async def test_a_file_that_is_too_long_or_missing_is_the_agents_failure(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(b"x" * (chat.FILE_BYTES + 1))
    for path, problem in (("long", "ValueError: attach: long is longer"), ("none", "FileNotFoundError")):
        group = group_for(task={"inputs": {"path": path}})
        outcome, _ = await ask([], group, attach=["path"], folder=tmp_path)
        assert outcome.error.startswith(problem)


def test_an_engine_can_be_made_from_another() -> None:
    async def a_tool() -> None: ...

    engine = ChatEngine("http://x", "m", prompt="{task.title}", tools=[a_tool], output_schema={"type": "string"})
    other = attrs.evolve(engine, model="n", base_url="http://y")
    assert repr(other) == "ChatEngine('http://y', 'n')"
    assert (other.prompt, other.tools, other.output_schema) == (engine.prompt, engine.tools, engine.output_schema)
    assert other._client is not engine._client


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(ChatError("no", 429, 2.0, may_pass=True)))
    assert (str(error), error.status, error.retry_after_seconds, error.may_pass) == ("no", 429, 2.0, True)


# The server itself


async def test_a_script_that_is_too_short_is_the_tests_failure() -> None:
    exhausted = pytest.RaisesExc(ScriptExhaustedError, match="the script has no reply for request 1")
    with pytest.RaisesGroup(exhausted, flatten_subgroups=True):
        await ask(["one"], group_for(2), max_retries=0)


async def test_answers_can_be_late_and_without_usage() -> None:
    outcome, _ = await ask([ChatReply(content="late", delay_seconds=0.001, usage=None)])
    assert outcome.output == "late"
    assert outcome.usage == Usage(requests=1)
