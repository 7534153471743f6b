"""One agent on a worker: its ``current_run()``, and how its engine call becomes an ending.

Knows neither a cluster nor how reports get to the driver.
"""

import importlib
import inspect
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import anyio

from .._checks import shown
from .._context import RunContext, _current
from .._models import Usage
from ..events import error_text
from ..serialization import plain_json
from ._protocol import AgentEngine
from ._remote import AgentEvent, Ending, EndingKind, Order, Report
from .function import FunctionEngine

TIMEOUT_SLACK_SECONDS = 30.0
"""How much later than the driver a worker ends an agent whose time is over: it is for where the driver is gone."""

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def engine_named(name: str) -> AgentEngine:
    """Import an engine, or an async function of an assignment, as ``module:attribute``.

    Raises:
        ValueError: If it is not there, or is none; also if importing it raises whatever else.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"an engine must be named as 'module:attribute', got {shown(name)}")
    module, _, attribute = name.partition(":")
    try:
        found = attrgetter(attribute)(importlib.import_module(module))
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name} cannot be imported: {' '.join(error_text(error).split())}") from error
    if isinstance(found, AgentEngine) and not isinstance(found, type):
        return found
    if inspect.iscoroutinefunction(found):
        return FunctionEngine(found)
    raise ValueError(f"{name} must be an engine or an async function, got {shown(found)}")


class RunOnWorker(RunContext):
    """The run of an agent on a worker; what it tells is kept for ``report()``.

    Args:
        order: What is run.
        on_news: Called, without arguments, whenever there is more to report.

    Attributes:
        start: Names this start.
        ending: How the agent ended, when it has.
        is_stopping: Whether the driver, or this worker, is shutting down.
        is_budget_spent: Whether the driver's group has spent its budget.
        is_queued: Whether it waits for a place on its worker, so that its time does not count yet.
    """

    def __init__(self, order: Order, on_news: Callable[[], object]) -> None:
        super().__init__(
            order.group_id,
            order.assignment,
            lambda: self.is_stopping,
            attempt=order.attempt,
            upstream={outcome.task_id: outcome for outcome in order.upstream},
        )
        self.id = order.id
        self.start = secrets.token_hex(8)
        self.ending: Ending | None = None
        self.is_stopping = False
        self.is_budget_spent = False
        self.is_queued = False
        self._on_news = on_news
        self._events: list[AgentEvent] = []
        self._waits = 0
        self._scope = anyio.CancelScope()
        self._kind_if_cancelled = EndingKind.CANCELLED

    @property
    def budget_exhausted(self) -> bool:
        """Whether the group's budget is spent, as far as the driver has told it."""
        return self.is_budget_spent

    @property
    def waits_for_others(self) -> bool:
        """Whether the agent is in a block of ``not_charged()``."""
        return self._waits > 0

    @property
    def event_count(self) -> int:
        """How many events the agent has sent."""
        return len(self._events)

    def record_usage(self, usage: Usage) -> None:
        """Add to what the agent spent; the driver hears of it."""
        super().record_usage(usage)
        self._on_news()

    def emit(self, name: str, /, **fields: Any) -> None:
        """Send an event about the agent to the driver, for its log and its observers."""
        self._events.append(AgentEvent(name=name, fields=plain_json(fields)))
        self._on_news()

    @contextmanager
    def not_charged(self) -> Iterator[None]:
        """Do not count the time in this block towards the agent's timeout."""
        self._waits += 1
        self._on_news()
        try:
            yield
        finally:
            self._waits -= 1
            self._on_news()

    def report(self, seen_events: int = 0) -> Report:
        """Return all there is to tell, but for the first so many events."""
        return Report(
            id=self.id,
            start=self.start,
            usage=self.usage,
            first_event=seen_events,
            events=self._events[seen_events:],
            is_waiting=self.is_queued or self.waits_for_others,
            ending=self.ending,
        )

    def cancel(self, kind: EndingKind = EndingKind.CANCELLED) -> None:
        """Cancel the agent; *kind* is its ending then."""
        self._kind_if_cancelled = kind
        self._scope.cancel()

    async def perform(self, engine: AgentEngine) -> None:
        """Run the agent to its ending, in a task of its own; only a cancellation of that task is raised.

        What the agent returns although it is cancelled is its result.
        """
        _current.set(self)
        ending: Ending | None = None
        timeout = self.assignment.timeout_seconds
        try:
            with self._scope, anyio.move_on_after(None if timeout is None else timeout + TIMEOUT_SLACK_SECONDS):
                ending = Ending.of_value(await engine.run(self.assignment))
        except (anyio.get_cancelled_exc_class(), GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 - an order to end is an agent's own: the worker serves others
            ending = Ending.of_error(error)
        finally:
            self.ending = ending or Ending(kind=self._kind_if_cancelled)
            self._on_news()
