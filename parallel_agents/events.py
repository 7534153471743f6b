"""Events: their names, their levels, and the one place from which they go to loguru and to observers.

The library adds no sink and is silent until an application calls ``logger.enable("parallel_agents")``.
A log record's message is always one of the constants below; data travels in its bound extras, because loguru
formats a message that comes with keyword arguments, and text from outside must never be a format string.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol, runtime_checkable

import anyio
from attrs import field, frozen
from loguru import logger

from ._drafts import draft_class

PARALLEL_GROUP_START: Final = "execution.parallel.group_start"
"""Info: ``group_id``, ``agent_count``, ``max_concurrency``, ``fail_fast``."""
PARALLEL_GROUP_COMPLETE: Final = "execution.parallel.group_complete"
"""Info: ``group_id``, ``succeeded``, ``failed``, ``duration_seconds``, ``status``."""
PARALLEL_AGENT_START: Final = "execution.parallel.agent_start"
"""Info, when the engine call starts: ``group_id``, ``agent_id``, ``task_id``."""
PARALLEL_AGENT_WAITING: Final = "execution.parallel.agent_waiting"
"""Debug, when its turn has come but its claims are not to be had: ``group_id``, ``agent_id``, ``task_id``,
``resource``, ``holder`` (an agent of the group, or the name of a holder outside)."""
PARALLEL_AGENT_COMPLETE: Final = "execution.parallel.agent_complete"
"""Info, when the engine returned a result: ``group_id``, ``agent_id``, ``task_id``, ``success``, and what every end of
an agent tells: ``status``, ``duration_seconds``, ``input_tokens``, ``output_tokens``, ``cost``."""
PARALLEL_AGENT_ERROR: Final = "execution.parallel.agent_error"
"""Warning, error when fatal: ``group_id``, ``agent_id``, ``task_id``, ``error``, ``error_type`` (the exception's
class, empty without one), and what every end of an agent tells."""
PARALLEL_AGENT_CANCELLED: Final = "execution.parallel.agent_cancelled"
"""Warning: ``group_id``, ``agent_id``, ``task_id``, and what every end of an agent tells."""
PARALLEL_AGENT_RETRY: Final = "execution.parallel.agent_retry"
"""Warning, before the wait: ``group_id``, ``agent_id``, ``task_id``, ``attempt`` (the failed one), ``wait_seconds``,
``error``."""
PARALLEL_AGENT_RESUMED: Final = "execution.parallel.agent_resumed"
"""Info, when a journal or a cluster knows the agent: ``group_id``, ``agent_id``, ``task_id``, ``reason`` (``recorded``:
its result is taken from there; ``running``: it is waited for; ``changed``, ``interrupted`` or ``failed``: why it runs
again)."""
PARALLEL_LOCK_ACQUIRED: Final = "execution.parallel.lock_acquired"
"""Debug: ``resource``, ``holder``."""
PARALLEL_LOCK_RELEASED: Final = "execution.parallel.lock_released"
"""Debug: ``resource``, ``holder``."""
PARALLEL_LOCK_CONFLICT: Final = "execution.parallel.lock_conflict"
"""Debug for a refused acquire, warning for a wrong holder's release: ``resource``, ``holder``, ``current_holder``."""
PARALLEL_LOCK_RELEASE_ERROR: Final = "execution.parallel.lock_release_error"
"""Error: ``group_id``, ``error``."""
PARALLEL_PROGRESS_UPDATE: Final = "execution.parallel.progress_update"
"""Debug: ``group_id`` and all counters."""
PARALLEL_VALIDATION_ERROR: Final = "execution.parallel.validation_error"
"""Warning: ``group_id``, ``error``."""
PARALLEL_GROUP_SUPPRESSED: Final = "execution.parallel.group_suppressed"
"""Warning, when several exceptions end a group and one is raised: ``group_id``, ``error``, ``exception_count``."""
PARALLEL_OBSERVER_ERROR: Final = "execution.parallel.observer_error"
"""Warning, when a callback or an observer raised: ``error``."""
ASYNCIO_AGENT_LEFT: Final = "execution.asyncio.agent_left"
"""Warning, when a cancelled asyncio agent has not ended in its time and is left to itself: ``group_id``, ``agent_id``,
``task_id``, ``cleanup_seconds``; without the ids at the end of a run of trio."""
CHAT_REQUEST_RETRY: Final = "chat.request_retry"
"""Warning, before the wait: ``group_id``, ``agent_id``, ``task_id``, ``attempt`` (the failed one), ``wait_seconds``,
``error``."""
TOOL_INVOKE_ALL_START: Final = "tool.invoke_all.start"
"""Debug: ``count``; the ids of the group, the agent and the task as well where an agent calls tools."""
TOOL_INVOKE_ALL_COMPLETE: Final = "tool.invoke_all.complete"
"""Debug, on every path: ``count``, ``errors`` (so many ended with an error result), ``duration_seconds``."""
TOOL_INVOKE_START: Final = "tool.invoke.start"
"""Debug: ``tool``, ``tool_call_id``."""
TOOL_INVOKE_SUCCESS: Final = "tool.invoke.success"
"""Debug: ``tool``, ``tool_call_id``, ``duration_seconds``."""
TOOL_INVOKE_ERROR: Final = "tool.invoke.error"
"""Warning, for each call that did not succeed: ``tool``, ``tool_call_id``, ``duration_seconds``, ``error``."""
MCP_SERVER_LOST: Final = "mcp.server_lost"
"""Warning, when a connection to an MCP server broke, and its tools fail from then on: ``error``."""

_LEVELS: Final = {
    PARALLEL_GROUP_START: "INFO",
    PARALLEL_GROUP_COMPLETE: "INFO",
    PARALLEL_AGENT_START: "INFO",
    PARALLEL_AGENT_WAITING: "DEBUG",
    PARALLEL_AGENT_COMPLETE: "INFO",
    PARALLEL_AGENT_ERROR: "WARNING",
    PARALLEL_AGENT_CANCELLED: "WARNING",
    PARALLEL_AGENT_RETRY: "WARNING",
    PARALLEL_AGENT_RESUMED: "INFO",
    PARALLEL_LOCK_ACQUIRED: "DEBUG",
    PARALLEL_LOCK_RELEASED: "DEBUG",
    PARALLEL_LOCK_CONFLICT: "DEBUG",
    PARALLEL_LOCK_RELEASE_ERROR: "ERROR",
    PARALLEL_PROGRESS_UPDATE: "DEBUG",
    PARALLEL_VALIDATION_ERROR: "WARNING",
    PARALLEL_GROUP_SUPPRESSED: "WARNING",
    PARALLEL_OBSERVER_ERROR: "WARNING",
    ASYNCIO_AGENT_LEFT: "WARNING",
    CHAT_REQUEST_RETRY: "WARNING",
    TOOL_INVOKE_ALL_START: "DEBUG",
    TOOL_INVOKE_ALL_COMPLETE: "DEBUG",
    TOOL_INVOKE_START: "DEBUG",
    TOOL_INVOKE_SUCCESS: "DEBUG",
    TOOL_INVOKE_ERROR: "WARNING",
    MCP_SERVER_LOST: "WARNING",
}


@frozen(kw_only=True)
class ParallelEvent:
    """Something that happened in a group.

    Attributes:
        name: One of this module's constants.
        group_id: The group.
        task_id: The task, where the event is about one agent.
        agent_id: The agent, where the event is about one agent.
        at_seconds: From the start of the group.
        fields: What the constant's documentation lists besides the ids.
    """

    name: str
    group_id: str
    task_id: str | None = None
    agent_id: str | None = None
    at_seconds: float
    fields: Mapping[str, Any] = field(factory=dict)


_EventDraft = draft_class(ParallelEvent)


@runtime_checkable
class Observer(Protocol):
    """Watches a run. What it raises is logged and changes nothing; it must not block.

    It is told of an agent's start and end in that agent's own copy of the context variables, in which ``current_run()``
    works, and of the group's in the copy from which those of the agents are made: what an observer sets there is seen
    by what runs below, and by nothing else.

    An observer that has an attribute ``event_names``, a set of this module's constants, is told of those alone; events
    that nobody wants are not even made.
    """

    def on_event(self, event: ParallelEvent, /) -> None:
        """Take note of an event; called in the event loop, while nothing else runs."""
        ...


def error_text(error: BaseException) -> str:
    """Return ``<TypeName>: <message>``, or ``<TypeName> (no message)``; only its type where it cannot be written."""
    name = type(error).__name__
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 - an agent's own __str__ failed; its outcome must be written all the same
        return f"{name} (its message cannot be read)"
    return f"{name}: {message}" if message.strip() else f"{name} (no message)"


def write_log(name: str, /, *, level: str | None = None, **fields: Any) -> None:
    """Write one record to loguru, with *name* as its message and *fields* as its extras."""
    logger.bind(**fields).log(level or _LEVELS[name], name)


def call_quietly(function: Callable[[Any], object], value: object, on_order: Callable[[BaseException], object]) -> None:
    """Call a user's callback; what it raises is logged and goes no further.

    An order to end the program is handed to *on_order*: raised in a task, it would leave asyncio's loop at once.
    """
    try:
        function(value)
    except (Exception, anyio.get_cancelled_exc_class()) as error:  # noqa: ASYNC103, BLE001 - nothing was awaited
        write_log(PARALLEL_OBSERVER_ERROR, error=error_text(error))
    except BaseException as order:  # noqa: BLE001 - raised at the end of the group
        on_order(order)


class GroupEvents:
    """Sends one group's events to loguru and to the observers; costs next to nothing when nobody listens.

    Whether anybody reads logs at level info is asked once, with the group's first event: logging that is switched
    on in the middle of a group is seen by the next group, except for warnings and errors, which are always sent.

    Args:
        group_id: The group.
        observers: Who is told.
        clock: Tells the time.
        started: Its time at the start of the group.
        on_order: Takes an observer's order to end the program.
    """

    def __init__(
        self,
        group_id: str,
        observers: Sequence[Observer],
        clock: Callable[[], float],
        started: float,
        on_order: Callable[[BaseException], object],
    ) -> None:
        self._group_id = group_id
        wanted = [(observer, getattr(observer, "event_names", _LEVELS)) for observer in observers]
        names = frozenset().union(*(names for _, names in wanted))
        self._observers = {name: tuple(o for o, of_its in wanted if name in of_its) for name in names}
        self._clock = clock
        self._started = started
        self._on_order = on_order
        self._logs_are_read = False
        self.are_heard = bool(names)

    def is_wanted(self, name: str) -> bool:
        """Whether anybody is told of such an event."""
        return self._logs_are_read or name in self._observers

    def start(self, **fields: Any) -> None:
        """Tell that the group starts, and find out whether anybody reads the log."""
        extras = {"group_id": self._group_id, **fields}
        # loguru calls the argument of a lazy record only when a sink takes the record
        logger.bind(**extras).opt(lazy=True).info(PARALLEL_GROUP_START, self._note_that_logs_are_read)
        if PARALLEL_GROUP_START in self._observers:
            self._tell_observers(PARALLEL_GROUP_START, fields)

    def emit(
        self,
        name: str,
        fields: Mapping[str, Any],
        task_id: str | None = None,
        agent_id: str | None = None,
        level: str | None = None,
    ) -> None:
        """Send one event; *level* stands above the one of the table."""
        level = level or _LEVELS[name]
        if self._logs_are_read or level not in ("INFO", "DEBUG"):
            ids = {} if task_id is None else {"agent_id": agent_id, "task_id": task_id}
            write_log(name, level=level, group_id=self._group_id, **ids, **fields)
        if name in self._observers:
            self._tell_observers(name, fields, task_id, agent_id)

    def _note_that_logs_are_read(self) -> str:
        self._logs_are_read = self.are_heard = True
        return ""

    def _tell_observers(
        self, name: str, fields: Mapping[str, Any], task_id: str | None = None, agent_id: str | None = None
    ) -> None:
        event: Any = _EventDraft()
        event.name = name
        event.group_id = self._group_id
        event.task_id = task_id
        event.agent_id = agent_id
        event.at_seconds = self._clock() - self._started
        event.fields = fields
        event.__class__ = ParallelEvent
        for observer in self._observers[name]:
            call_quietly(observer.on_event, event, self._on_order)
