"""Tools: what an agent may call, and all the calls of one turn at the same time.

The calls of a turn have the guarantees that agents of a group have: exactly one result each, in order, and a call that
fails harms no other. Knows no model and no protocol of one.
"""

import inspect
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Self

import anyio
import anyio.from_thread
import anyio.to_thread
import attrs
from anyio.lowlevel import RunVar
from attrs import define, field, frozen
from attrs.validators import is_callable, optional

from ._checks import (
    FrozenDict,
    integer,
    is_a,
    is_flag,
    is_text,
    json_table,
    not_blank,
    number,
    shown,
    thawed,
    wrong_type,
)
from ._context import RunContext, RunInAnotherThread, _current
from ._endings import fatal_in, is_cancellation, order_to_end
from ._errors import NeedsHuman
from ._models import ToolCall
from .events import (
    TOOL_INVOKE_ALL_COMPLETE,
    TOOL_INVOKE_ALL_START,
    TOOL_INVOKE_ERROR,
    TOOL_INVOKE_START,
    TOOL_INVOKE_SUCCESS,
    error_text,
    write_log,
)
from .serialization import unstructure

THREADS = 40
"""Plain functions that run at the same time, of all agents of an event loop."""

_threads: RunVar[anyio.CapacityLimiter] = RunVar("parallel_agents_tool_threads")


def _thread_limiter() -> anyio.CapacityLimiter:
    try:
        return _threads.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(THREADS)
        _threads.set(limiter)
        return limiter


@frozen(kw_only=True)
class ToolResult:
    """What came of one tool call.

    Attributes:
        tool_call_id: The call's.
        content: For the model: text as the tool returned it, anything else as JSON; or what went wrong.
        is_error: Whether the call did not succeed.
    """

    tool_call_id: str = field(validator=is_text)
    content: str = field(validator=is_text)
    is_error: bool = field(default=False, validator=is_flag)


def _as_parameters(value: object) -> FrozenDict:
    return json_table(value, "parameters")


@frozen(kw_only=True)
class Tool:
    """Something that an agent may call; ``Tool.from_function()`` makes one from a typed function.

    Attributes:
        name: What models call it by.
        description: What it does, for the model.
        parameters: The JSON Schema of the arguments, which are checked against it before the function is called.
        function: Takes the arguments as a dict of its own and returns text, or anything that is JSON.
        timeout_seconds: Counted from the start of the call; ``None`` is no limit.
    """

    name: str = field(validator=not_blank)
    description: str = field(default="", validator=is_text)
    parameters: FrozenDict = field(default=FrozenDict(type="object"), converter=_as_parameters)
    function: Callable[[dict[str, Any]], Awaitable[Any]] = field(validator=is_callable(), repr=False)
    timeout_seconds: float | None = field(default=None, validator=optional(number(above=0)))
    _schema: Any = field(init=False, repr=False, eq=False)

    @_schema.default
    def _make_schema(self) -> Any:
        from ._json_schema import SchemaCheck  # noqa: PLC0415 - of an extra that only users of tools install

        try:
            return SchemaCheck(self.parameters)
        except ValueError as error:
            raise ValueError(f"parameters of tool {self.name!r}: {error}") from None

    @classmethod
    def from_function(
        cls,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        description: str | None = None,
        timeout_seconds: float | None = None,
        abandon_on_cancel: bool = False,
    ) -> Self:
        """Make a tool of a function: its name, its docstring, and the JSON Schema of its typed parameters.

        Arguments arrive as the types of the parameters, which may be whatever pydantic knows. An async function runs in
        the event loop. A plain one runs in a worker thread, 40 of them at a time in an event loop. No thread can be
        stopped: a cancelled call waits until its function returns, which may ask
        ``anyio.from_thread.check_cancelled()`` whether to, unless *abandon_on_cancel* lets it run on by itself.

        Args:
            function: With parameters that can be given by their names.
            name: The function's own unless given.
            description: The docstring without its parameters unless given; those describe the parameters.
            timeout_seconds: Counted from the start of the call; ``None`` is no limit.
            abandon_on_cancel: For plain functions: whether a call that is cancelled or late is left to itself, in
                its thread. What it does then is seen by nobody.

        Raises:
            TypeError: If a parameter cannot be given by its name, or as JSON.
        """
        from ._json_schema import as_json, schema_of, validated  # noqa: PLC0415 - as above

        documented, parameters = schema_of(function)
        typed = validated(function)
        is_async = inspect.iscoroutinefunction(function)

        async def call(arguments: dict[str, Any]) -> Any:
            if is_async:
                value = await typed(**arguments)
            else:
                value = await anyio.to_thread.run_sync(
                    partial(_call_in_thread, _current.get(None), typed, arguments),
                    abandon_on_cancel=abandon_on_cancel,
                    limiter=_thread_limiter(),
                )
            return as_json(value, fallback=partial(_attrs_as_json, function.__name__))

        return cls(
            name=function.__name__ if name is None else name,
            description=documented if description is None else description,
            parameters=parameters,
            function=call,
            timeout_seconds=timeout_seconds,
        )

    def problems(self, arguments: object) -> list[str]:
        """Return what is wrong with the arguments of a call, the first few problems only; empty if they are fine."""
        if not isinstance(arguments, Mapping):
            return [f"must be a JSON object, got {shown(arguments)}"]
        found: list[str] = self._schema.problems(arguments)
        return found


class ToolRegistry:
    """The tools that an agent may call, by their names; cannot be changed.

    Args:
        tools: Tools, or typed functions that are made into tools. Another registry is an iterable of its tools.

    Raises:
        ValueError: If two have the same name.
    """

    def __init__(self, tools: Iterable[Tool | Callable[..., Any]] = ()) -> None:
        self._tools: dict[str, Tool] = {}
        for item in tools:
            if not callable(item) and not isinstance(item, Tool):
                raise wrong_type("each of tools", "a Tool or a function", item)
            tool = item if isinstance(item, Tool) else Tool.from_function(item)
            if tool.name in self._tools:
                raise ValueError(f"two tools are called {tool.name!r}; give one of them another name")
            self._tools[tool.name] = tool

    def __repr__(self) -> str:
        return f"ToolRegistry({', '.join(self._tools)})"

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._tools.values())

    def __len__(self) -> int:
        return len(self._tools)

    def get(self, name: str) -> Tool | None:
        """Return the tool of that name, if there is one."""
        return self._tools.get(name)


class ToolInvoker:
    """Runs tool calls.

    Args:
        registry: What may be called.
    """

    def __init__(self, registry: ToolRegistry) -> None:
        is_a(ToolRegistry)(self, _REGISTRY, registry)
        self._registry = registry

    async def invoke_all(
        self, calls: Iterable[ToolCall], *, max_concurrency: int | None = None
    ) -> tuple[ToolResult, ...]:
        """Run all calls at the same time; return one result each, in the order of the calls.

        A tool that is unknown, is given wrong arguments, raises, is late, or cancels itself has an error result and
        touches no other call. When the caller is cancelled, all calls are cancelled and waited for.

        Args:
            calls: Any iterable; it is read to its end before the first call starts.
            max_concurrency: The most calls at the same time; ``None`` is no limit.

        Raises:
            ValueError: If *max_concurrency* is below 1.
            NeedsHuman: After all calls have ended, if a tool raised it; their results are in its ``results``.
            MemoryError: After all calls have ended, if a tool raised it; so with RecursionError. Several fatal errors
                are an ExceptionGroup.
        """
        if max_concurrency is not None:
            integer(at_least=1)(self, _MAX_CONCURRENCY, max_concurrency)
        turn = _Turn(self._registry, tuple(calls))
        if not turn.calls:
            return ()
        return await turn.run(max_concurrency)


@frozen
class _Named:
    name: str


_REGISTRY, _MAX_CONCURRENCY = _Named("registry"), _Named("max_concurrency")


def _emit(name: str, **fields: Any) -> None:
    """Send an event about the agent that calls tools, or about nobody's calls."""
    if (run := _current.get(None)) is not None:
        run.emit(name, **fields)
    else:
        write_log(name, **fields)


@define(eq=False)
class _Turn:
    """The calls of one ``invoke_all()``."""

    registry: ToolRegistry
    calls: tuple[ToolCall, ...]
    results: dict[int, ToolResult] = field(factory=dict)
    questions: dict[int, NeedsHuman] = field(factory=dict)
    fatal: list[Exception] = field(factory=list)
    orders_to_end: list[BaseException] = field(factory=list)

    async def run(self, max_concurrency: int | None) -> tuple[ToolResult, ...]:
        started = anyio.current_time()
        _emit(TOOL_INVOKE_ALL_START, count=len(self.calls))
        try:
            await self._run_each(max_concurrency)
        finally:
            _emit(
                TOOL_INVOKE_ALL_COMPLETE,
                count=len(self.calls),
                errors=sum(result.is_error for result in self.results.values()),
                duration_seconds=anyio.current_time() - started,
            )
        if self.orders_to_end:
            raise self.orders_to_end[0]
        if len(self.fatal) > 1:
            raise ExceptionGroup(f"{len(self.fatal)} tool calls met fatal errors", self.fatal)
        if self.fatal:
            raise self.fatal[0]
        results = tuple(self.results[position] for position in range(len(self.calls)))
        if self.questions:
            question = self.questions[min(self.questions)]
            question.results = results
            raise question
        return results

    async def _run_each(self, max_concurrency: int | None) -> None:
        slots = None if max_concurrency is None else anyio.Semaphore(max_concurrency)
        async with anyio.create_task_group() as tasks:
            for position, call in enumerate(self.calls):
                if slots is not None:
                    await slots.acquire()
                tasks.start_soon(self._run_one, position, call, slots, tasks.cancel_scope)

    async def _run_one(
        self, position: int, call: ToolCall, slots: anyio.Semaphore | None, all_calls: anyio.CancelScope
    ) -> None:
        """Give one call its result; in a task of its own, which a tool may spoil."""
        started = anyio.current_time()
        _emit(TOOL_INVOKE_START, tool=call.name, tool_call_id=call.id)
        try:
            content = await self._content_of(call)
        except BaseException as error:  # noqa: ASYNC103 - a real cancellation is raised below
            problem = error_text(error)
            if (order := order_to_end(error, anyio.get_cancelled_exc_class())) is not None:
                self.orders_to_end.append(order)
                all_calls.cancel()
            elif (fatal := fatal_in(error)) is not None:
                self.fatal.append(fatal)
            elif is_cancellation(error, anyio.get_cancelled_exc_class()):
                if anyio.get_current_task().has_pending_cancellation():
                    self._tell(TOOL_INVOKE_ERROR, call, started, error="Cancelled")
                    raise
                problem = "Cancelled by itself: the tool raised the backend's cancelled exception"
            elif isinstance(error, NeedsHuman):
                self.questions[position] = error
                problem = f"A person is asked: {error.question}"
            self.results[position] = ToolResult(tool_call_id=call.id, content=problem, is_error=True)
            self._tell(TOOL_INVOKE_ERROR, call, started, error=problem)
        else:
            self.results[position] = ToolResult(tool_call_id=call.id, content=content)
            self._tell(TOOL_INVOKE_SUCCESS, call, started)
        finally:
            if slots is not None:
                slots.release()

    async def _content_of(self, call: ToolCall) -> str:
        tool = self.registry.get(call.name)
        if tool is None:
            names = ", ".join(sorted(tool.name for tool in self.registry)) or "none"
            raise UnknownToolError(f"there is no tool {shown(call.name)}; there are: {names}")
        if problems := tool.problems(call.arguments):
            raise ToolArgumentsError("; ".join(problems))
        if tool.timeout_seconds is None:
            return _as_text(await tool.function(thawed(call.arguments)))
        with anyio.move_on_after(tool.timeout_seconds) as scope:
            return _as_text(await tool.function(thawed(call.arguments)))
        assert scope.cancelled_caught
        raise TimeoutError(f"Timed out after {tool.timeout_seconds:g} s")

    @staticmethod
    def _tell(name: str, call: ToolCall, started: float, **fields: Any) -> None:
        duration = anyio.current_time() - started
        _emit(name, tool=call.name, tool_call_id=call.id, duration_seconds=duration, **fields)


class UnknownToolError(LookupError):
    """There is no tool of that name."""


class ToolArgumentsError(ValueError):
    """The arguments are not what the tool takes."""


def _call_in_thread(run: RunContext | None, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call a plain function in a worker thread, where the agent's run is seen from another thread."""
    if run is not None:
        _current.set(RunInAnotherThread(run, anyio.from_thread.run_sync))
    return function(**arguments)


def _attrs_as_json(name: str, value: object) -> dict[str, Any]:
    if not attrs.has(type(value)):
        raise TypeError(f"{name} returned {type(value).__name__}, which cannot be written as JSON")
    return unstructure(value)


def _as_text(value: object) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)
