"""ChatEngine: agents that are language models, work in turns and call tools.

Speaks the chat completions protocol of OpenAI, which most servers of models speak as well, over httpx2, on asyncio and
trio. Knows nothing of how many agents run.
"""

import os
import random
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import attrs
from attrs import Factory, define, field, frozen
from attrs.validators import deep_mapping, instance_of, is_callable, optional

from .._checks import FrozenDict, as_tuple, each_is_a, integer, is_a, is_flag, json_table, not_blank, number, shown
from .._context import RunContext, current_run
from .._errors import NeedsHuman
from .._models import AgentAssignment, ChatMessage, ToolCall, Usage
from .._outcomes import AgentRunResult, TerminationReason
from .._tools import Tool, ToolInvoker, ToolRegistry, ToolResult
from ..events import CHAT_REQUEST_RETRY
from ..serialization import InvalidDataError, parse_json
from ._chat_protocol import ChatError, ChatReply, request_body
from ._going_on import may_go_on_after
from ._metering import Meter
from ._prompts import joined, task_text, upstream_text
from ._templates import Template
from ._workspace import working_folder

try:
    import httpx2

    from .._json_schema import SchemaCheck
    from ._chat_client import ChatClient
except ModuleNotFoundError as error:
    message = "ChatEngine needs httpx2 and jsonschema: pip install 'parallel-agents[chat]'"
    raise ModuleNotFoundError(message, name=error.name) from error

__all__ = ["ChatEngine", "ChatError", "Price"]

STAGNATION_TURNS = 3
"""An agent that wants the same calls in so many turns in a row goes round in circles."""

CORRECTIONS = 2
"""How often an agent is told that its output is not what the schema wants."""

FILE_BYTES = 1024 * 1024
"""The largest file that is put into a prompt."""

MAX_RETRIES = 2
ANSWER_SECONDS = 600.0
REPLY_LIMIT_BYTES = 8 * 1024 * 1024
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 60.0

_RESERVED = frozenset({"messages", "model", "stream", "stream_options", "tools"})
"""What a request's ``extra`` must leave to the engine."""

_ONE_REQUEST = Usage(requests=1)


@frozen(kw_only=True)
class Price:
    """What a model costs, in the user's currency.

    Attributes:
        input_per_million: For a million tokens that it reads.
        output_per_million: For a million tokens that it writes.
    """

    input_per_million: float = field(validator=number(at_least=0))
    output_per_million: float = field(validator=number(at_least=0))

    def of(self, usage: Usage) -> float:
        """Return what the tokens of *usage* cost."""
        millionths = usage.input_tokens * self.input_per_million + usage.output_tokens * self.output_per_million
        return millionths / 1_000_000


def _as_registry(tools: Iterable[Tool | Callable[..., Any]]) -> ToolRegistry:
    return tools if isinstance(tools, ToolRegistry) else ToolRegistry(as_tuple(tools))


def _as_schema(value: Mapping[str, Any] | None) -> FrozenDict | None:
    return None if value is None else json_table(value, "output_schema")


def _as_template(value: str | Template | None) -> Template | None:
    return value if value is None or isinstance(value, Template) else Template.parse(value, "prompt")


def _is_address(_instance: object, attribute: Any, value: str) -> None:
    not_blank(_instance, attribute, value)
    try:
        url = httpx2.URL(value)
        is_address = url.scheme in ("http", "https") and bool(url.host) and not (url.query or url.fragment)
    except httpx2.InvalidURL:
        is_address = False
    if not is_address:
        raise ValueError(f"{attribute.name} must be an address such as http://127.0.0.1:8080/v1, got {shown(value)}")
    if url.userinfo:
        raise ValueError(f"{attribute.name} must not hold a password; name an environment variable in api_key_env")


def _make_check(engine: "ChatEngine") -> SchemaCheck | None:
    if engine.output_schema is None:
        return None
    try:
        return SchemaCheck(engine.output_schema)
    except ValueError as error:
        raise ValueError(f"output_schema: {error}") from None


@frozen(eq=False)
class ChatEngine:
    """Runs agents that are language models: they answer, or call tools and go on, until they have answered.

    An agent is given its identity's ``instructions`` as the system message, the ``memory_messages``, and then the
    prompt: the task's description, and below it the inputs as JSON, the text of attached files, and what the tasks that
    it depends on have returned. Its last answer is the output: text, or with *output_schema* JSON that fits it.

    How an agent ends:

    - COMPLETED: it answered.
    - MAX_TURNS: it still called tools in the last turn that its assignment gives it.
    - BUDGET_EXHAUSTED, SHUTDOWN: after the tools of a turn had run, the group's budget was spent, or the program was
      shutting down.
    - STAGNATION: it wanted the same calls in three turns in a row.
    - PARKED: a tool raised ``NeedsHuman``. Its question is the last message. With all messages and the answer as the
      ``memory_messages`` of another assignment the agent goes on.
    - ERROR: its reply was cut by length or filtered, it refused, or it was told twice that its output does not fit the
      schema and it still did not.

    A server that does not answer, or not with what can be used, is a ``ChatError``: at once where asking again is of no
    use, as after a status such as 400 or 401, and after *max_retries* where it may pass: a lost connection, status 429
    or 5xx, an answer that is no JSON or has no choices. Before it asks again the engine waits for what ``Retry-After``
    says, but not for more than 60 s, or else for 0.5 s, doubled each time, and up to half as much again at random.
    Redirects are not followed.

    Tokens and costs are recorded turn by turn, and a request when it is sent: what an agent spent is kept whatever
    becomes of it. Cancelling closes the connection at once. Servers notice that while they stream; many do not while
    they prepare an answer in one piece.

    Connections are shared by the agents of an event loop, and kept open as long as any of them runs.

    Args:
        base_url: The server, such as ``http://127.0.0.1:8080/v1``; an identity's stands above it.
        model: The model's name; an identity's stands above it, and a completion config's above both.
        api_key_env: The environment variable that holds the key of *base_url*, or a table of variables by base URL:
            no other server gets a key.
        tools: What agents may call: tools, or typed functions.
        max_concurrent_tools: The most calls of one turn at the same time; ``None`` is no limit.
        prompt: What agents are asked, instead of description and inputs; placeholders as in ``ProcessEngine``.
        attach: Names of inputs that are paths of text files, of up to 1 MiB, whose text is put below the prompt.
        folder: Where relative paths of files start. A folder that was made for the agent, as by ``WorktreeEngine``,
            stands above it.
        output_schema: The JSON Schema of outputs.
        prices: What models cost, by their names; others cost nothing.
        stream: Whether the server is asked to send its answers piece by piece.
        on_text: A plain function that is called with the assignment and each piece of text that is streamed; it must
            not block. When a request is sent again, the text begins again.
        max_retries: How often a request is sent again.
        answer_seconds: A server that sends nothing for so long is given up.
        reply_limit_bytes: The longest answer.
        make_client: Makes an ``httpx2.AsyncClient`` for each connection, which the engine closes. Unless given, clients
            are set up by the environment, such as ``HTTPS_PROXY`` and ``SSL_CERT_FILE``.

    Raises:
        TypeError: Something is of the wrong type.
        ValueError: An address is none, a schema is none, or a number is out of its range.
    """

    base_url: str | None = field(default=None, validator=optional(_is_address))
    model: str | None = field(default=None, validator=optional(not_blank))
    api_key_env: str | Mapping[str, str] | None = field(
        default=None, kw_only=True, validator=optional(instance_of((str, Mapping)))
    )
    tools: ToolRegistry = field(factory=ToolRegistry, kw_only=True, converter=_as_registry)
    max_concurrent_tools: int | None = field(default=None, kw_only=True, validator=optional(integer(at_least=1)))
    prompt: Template | None = field(default=None, kw_only=True, converter=_as_template)
    attach: tuple[str, ...] = field(default=(), kw_only=True, converter=as_tuple, validator=each_is_a(str))
    folder: Path = field(default=Path(), kw_only=True, converter=Path)
    output_schema: FrozenDict | None = field(default=None, kw_only=True, converter=_as_schema)
    prices: Mapping[str, Price] = field(
        factory=FrozenDict, kw_only=True, validator=deep_mapping(instance_of(str), is_a(Price))
    )
    stream: bool = field(default=False, kw_only=True, validator=is_flag)
    on_text: Callable[[AgentAssignment, str], object] | None = field(
        default=None, kw_only=True, validator=optional(is_callable())
    )
    max_retries: int = field(default=MAX_RETRIES, kw_only=True, validator=integer(at_least=0))
    answer_seconds: float = field(default=ANSWER_SECONDS, kw_only=True, validator=number(above=0))
    reply_limit_bytes: int = field(default=REPLY_LIMIT_BYTES, kw_only=True, validator=integer(at_least=1))
    make_client: Callable[[], httpx2.AsyncClient] | None = field(
        default=None, kw_only=True, validator=optional(is_callable())
    )
    _output_check: SchemaCheck | None = field(init=False, default=Factory(_make_check, takes_self=True))
    _client: ChatClient = field(
        init=False,
        default=Factory(lambda e: ChatClient(e.make_client, e.answer_seconds, e.reply_limit_bytes), takes_self=True),
    )
    _invoker: ToolInvoker = field(init=False, default=Factory(lambda e: ToolInvoker(e.tools), takes_self=True))

    def __repr__(self) -> str:
        return f"ChatEngine({self.base_url!r}, {self.model!r})"

    def check(self, assignment: AgentAssignment, /) -> None:
        """Make sure that an agent has a server, its key, a model, and all that is put into its prompt.

        Raises:
            ValueError: It has not.
        """
        if self.prompt is not None:
            self.prompt.fill(assignment)
        for name in self.attach:
            if not isinstance(assignment.task.inputs.get(name), str):
                raise ValueError(  # noqa: TRY004 - what is missing has no type
                    f"attach: the inputs of task {assignment.task_id!r} have no path called {name!r}"
                )
        config = assignment.completion_config
        if config is not None and (reserved := sorted(_RESERVED.intersection(config.extra))):
            raise ValueError(f"completion_config.extra must not hold {', '.join(reserved)}: the engine sets that")
        self._model(assignment)
        self._key(self._base_url(assignment))

    async def run(self, assignment: AgentAssignment, /) -> AgentRunResult[Any]:
        """Let the agent work until it has answered.

        Raises:
            ChatError: The server did not answer with what can be used.
            ValueError: As ``check()`` does.
            OSError: An attached file cannot be read.
        """
        run = current_run()
        self.check(assignment)
        started = anyio.current_time()
        messages = [
            *([ChatMessage(role="system", content=text)] if (text := assignment.identity.instructions) else ()),
            *assignment.memory_messages,
            ChatMessage(role="user", content=await self._prompt(assignment, run)),
        ]
        async with self._client.kept_open():
            result = await _Conversation(self, assignment, run, messages).hold()
        return attrs.evolve(result, duration_seconds=anyio.current_time() - started)

    # What an agent is given

    def _base_url(self, assignment: AgentAssignment) -> str:
        if assignment.identity.base_url is not None:
            _is_address(self, attrs.fields(type(self)).base_url, assignment.identity.base_url)
            return assignment.identity.base_url
        if self.base_url is None:
            raise ValueError(f"agent {assignment.agent_id!r} has no base_url, and neither has its engine")
        return self.base_url

    def _model(self, assignment: AgentAssignment) -> str:
        config = assignment.completion_config
        model = (config and config.model) or assignment.identity.model or self.model
        if model is None:
            raise ValueError(f"agent {assignment.agent_id!r} has no model, and neither has its engine")
        return model

    def _key(self, base_url: str) -> str | None:
        named = self.api_key_env
        variables = {self.base_url: named} if isinstance(named, str) else named or {}
        if (variable := variables.get(base_url)) is None:
            return None
        key = os.environ.get(variable, "").strip()
        if not key:
            raise ValueError(f"the environment variable {variable} with the key of {base_url} is not set")
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"the environment variable {variable} holds no key: it has odd characters in it")
        return key

    async def _prompt(self, assignment: AgentAssignment, run: RunContext) -> str:
        inputs = assignment.task.inputs
        asked = task_text(assignment, self.attach) if self.prompt is None else self.prompt.fill(assignment)
        files = [f"{inputs[name]}:\n{await self._content_of(inputs[name])}" for name in self.attach]
        return joined([asked, *files, upstream_text(run)])

    async def _content_of(self, path: str) -> str:
        async with await anyio.open_file((working_folder() or self.folder) / path, "rb") as file:
            data = await file.read(FILE_BYTES + 1)
        if len(data) > FILE_BYTES:
            raise ValueError(f"attach: {path} is longer than {FILE_BYTES} bytes")
        return data.decode("utf-8", "replace")

    # What it says

    async def _reply(self, assignment: AgentAssignment, messages: list[ChatMessage], run: RunContext) -> ChatReply:
        """Ask for the next reply, again if that may help, and record what it costs."""
        base_url, model = self._base_url(assignment), self._model(assignment)
        body = request_body(
            model,
            messages,
            tools=self.tools,
            config=assignment.completion_config,
            output_schema=self.output_schema,
            stream=self.stream,
        )
        on_text = None if self.on_text is None else partial(self.on_text, assignment)
        attempt = 1
        while True:
            run.record_usage(_ONE_REQUEST)
            try:
                reply = await self._client.ask(base_url, self._key(base_url), body, on_text)
                break
            except ChatError as error:
                seconds = _wait_after(attempt, error)
                if attempt > self.max_retries or seconds is None or not may_go_on_after(error, run):
                    raise
                run.emit(CHAT_REQUEST_RETRY, attempt=attempt, wait_seconds=seconds, error=str(error))
            await anyio.sleep(seconds)
            attempt += 1
        price = self.prices.get(model)
        run.record_usage(reply.usage if price is None else attrs.evolve(reply.usage, cost=price.of(reply.usage)))
        return reply

    async def _results(self, calls: tuple[ToolCall, ...]) -> tuple[ToolResult, ...]:
        return await self._invoker.invoke_all(calls, max_concurrency=self.max_concurrent_tools)

    def _output_of(self, text: str) -> tuple[Any, str]:
        """Return the output that a text stands for, and what is wrong with it."""
        if self._output_check is None:
            return text, ""
        try:
            output = parse_json(text)
        except InvalidDataError as error:
            return None, f"it is no JSON: {error}"
        return output, "; ".join(self._output_check.problems(output))


def _wait_after(attempt: int, error: ChatError) -> float | None:
    """Return how long to wait before a request is sent again; ``None`` if that is of no use."""
    if not error.may_pass:
        return None
    if error.retry_after_seconds is not None:
        return error.retry_after_seconds if error.retry_after_seconds <= LONGEST_WAIT_SECONDS else None
    wait: float = FIRST_WAIT_SECONDS * 2 ** (attempt - 1)
    return min(wait, LONGEST_WAIT_SECONDS) * random.uniform(1.0, 1.5)  # noqa: S311 - spreads load, hides nothing


_ENDS_BADLY: Mapping[str, str] = {
    "length": "the reply was cut: it is longer than max_tokens or than what the model can hold",
    "content_filter": "the server filtered the reply",
}
"""What is wrong with a reply, by the reason for which it stopped."""


@define(eq=False)
class _Conversation:
    """One agent at work."""

    engine: ChatEngine
    assignment: AgentAssignment
    run: RunContext
    messages: list[ChatMessage]
    turns: int = 0
    corrections: int = 0
    last_calls: list[tuple[str, Any]] = field(factory=list)
    times_called: int = 0
    meter: Meter = field(default=Factory(lambda self: Meter(self.run), takes_self=True))

    async def hold(self) -> AgentRunResult[Any]:
        """Take turns until one is the last."""
        while self.turns < self.assignment.max_turns:
            self.turns += 1
            if (result := await self._turn()) is not None:
                return result
            if self.run.budget_exhausted:
                return self._ended(TerminationReason.BUDGET_EXHAUSTED)
            if self.run.shutdown_requested:
                return self._ended(TerminationReason.SHUTDOWN)
        return self._ended(TerminationReason.MAX_TURNS)

    async def _turn(self) -> AgentRunResult[Any] | None:
        """Let the model say something, and do what it wants; return the result if the agent has ended."""
        reply = await self.engine._reply(self.assignment, self.messages, self.run)
        self.messages.append(reply.message)
        if reply.finish_reason in _ENDS_BADLY:
            return self._ended(TerminationReason.ERROR, error_message=_ENDS_BADLY[reply.finish_reason])
        if reply.refusal:
            return self._ended(TerminationReason.ERROR, error_message=f"the model refused: {reply.refusal}")
        if not reply.tool_calls:
            return self._answered(reply.content)
        if self._goes_round_in_circles(reply.tool_calls):
            return self._ended(TerminationReason.STAGNATION)
        try:
            results = await self.engine._results(reply.tool_calls)
        except NeedsHuman as needs:
            self._hear(needs.results)
            self.messages.append(ChatMessage(role="assistant", content=needs.question))
            return self._ended(TerminationReason.PARKED)
        self._hear(results)
        return None

    def _hear(self, results: Iterable[ToolResult]) -> None:
        for result in results:
            self.messages.append(ChatMessage(role="tool", content=result.content, tool_call_id=result.tool_call_id))

    def _goes_round_in_circles(self, calls: tuple[ToolCall, ...]) -> bool:
        wanted = [(call.name, call.arguments) for call in calls]
        self.times_called = self.times_called + 1 if wanted == self.last_calls else 1
        self.last_calls = wanted
        return self.times_called >= STAGNATION_TURNS

    def _answered(self, text: str) -> AgentRunResult[Any] | None:
        """End the agent with its output, or tell it what is wrong with that."""
        output, problems = self.engine._output_of(text)
        if not problems:
            return self._ended(TerminationReason.COMPLETED, output=output)
        if self.corrections == CORRECTIONS:
            return self._ended(TerminationReason.ERROR, error_message=f"the output does not fit its schema: {problems}")
        self.corrections += 1
        correction = f"This does not fit the JSON Schema of the answer: {problems}. Answer with the JSON alone."
        self.messages.append(ChatMessage(role="user", content=correction))
        return None

    def _ended(self, reason: TerminationReason, **fields: Any) -> AgentRunResult[Any]:
        return AgentRunResult(
            task_id=self.assignment.task_id,
            agent_id=self.assignment.agent_id,
            termination_reason=reason,
            usage=self.meter.metered(),
            turns=self.turns,
            messages=tuple(self.messages),
            **fields,
        )
