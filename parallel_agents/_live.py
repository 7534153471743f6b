"""The live display: sums on top, and below them a few agents, each in a row that it keeps until it has ended.

What is told is noted in the event loop, in a few steps; what it looks like is worked out by a thread of its own,
several times a second, so that neither a thousand agents nor a terminal that stands still hold anybody up.
"""

import contextlib
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Final, Self

from attrs import define, frozen
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ._context import RunContext, current_run
from ._display import STYLES, Display, id_text
from ._models import NO_USAGE, Usage
from ._outcomes import AgentOutcome, OutcomeStatus
from ._words import ID_CHARACTERS, duration_text, error_line, harmless, spent_text, status_text, waiting_text
from .events import (
    CHAT_REQUEST_RETRY,
    PARALLEL_AGENT_RETRY,
    PARALLEL_AGENT_START,
    PARALLEL_AGENT_WAITING,
    PARALLEL_GROUP_START,
    TOOL_INVOKE_ERROR,
    TOOL_INVOKE_START,
    TOOL_INVOKE_SUCCESS,
    ParallelEvent,
)

ROWS: Final = 12
"""Agents that are shown at most."""

LINGER_SECONDS: Final = 1.5
"""So long an agent that has ended keeps its row, before another may have it: nobody reads faster."""

_SUMS: Final = 3
"""Lines above the rows."""

_STATE_COLUMNS: Final = max(len(status) for status in OutcomeStatus)
"""Wide enough for every state, so that nothing jumps."""

_RETRIES: Final = frozenset({PARALLEL_AGENT_RETRY, CHAT_REQUEST_RETRY})
_TOOLS: Final = frozenset({TOOL_INVOKE_START, TOOL_INVOKE_SUCCESS, TOOL_INVOKE_ERROR})


@define(eq=False)
class _Agent:
    """An agent that waits for its claims, runs, or has ended.

    Attributes:
        since: When its state began.
        doing: What it waits for or does, as far as it was told.
        run: Its run, once it has started.
        status: What came of it.
        seconds: How long it ran, once it has ended.
    """

    agent_id: str
    task_id: str
    since: float = 0.0
    doing: str = ""
    run: RunContext | None = None
    status: OutcomeStatus | None = None
    seconds: float = 0.0

    @property
    def usage(self) -> Usage:
        """What it is known to have spent."""
        return NO_USAGE if self.run is None else self.run.usage

    @property
    def tokens(self) -> int:
        """Those of either kind."""
        return self.usage.input_tokens + self.usage.output_tokens

    @property
    def is_kept_waiting(self) -> bool:
        """Whether it waits for others: for its claims, or while it runs for a limit that it shares with them."""
        return self.run is None or self.run.waits_for_others


class LiveDisplay(Display):
    """Draws the sums, and agents that run, wait for claims, or ended last, in place.

    A terminal that is gone is no error: the agents are not.

    Args:
        console: On a terminal.
        clock: Tells the time in seconds.
    """

    event_names = _RETRIES | _TOOLS | {PARALLEL_GROUP_START, PARALLEL_AGENT_START, PARALLEL_AGENT_WAITING}

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._guard = threading.Lock()
        self._started = clock()
        self._group_id = ""
        self._total = 0
        self._counts: Counter[OutcomeStatus] = Counter()
        self._agents: dict[str | None, _Agent] = {}
        self._ended: deque[_Agent] = deque(maxlen=ROWS)
        self._tokens = 0
        self._cost = 0.0
        self._rows: list[_Agent] = []
        self._live = Live(
            console=console,
            get_renderable=self.render,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
        )

    def __enter__(self) -> Self:
        with contextlib.suppress(OSError):
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._live.stop()

    def on_event(self, event: ParallelEvent, /) -> None:
        """Take note of what an agent does, and of the counts."""
        with self._guard:
            if event.name == PARALLEL_AGENT_START:
                agent = self._agent(event)
                agent.run, agent.doing = current_run(), ""
            elif event.name == PARALLEL_AGENT_WAITING:
                self._agent(event).doing = f"for {waiting_text(event)}"
            elif event.name == PARALLEL_GROUP_START:
                self._group_id, self._total = event.group_id, event.fields["agent_count"] or 0
            elif (agent_that_runs := self._agents.get(event.task_id)) is not None:
                agent_that_runs.doing = _doing(event)

    def _agent(self, event: ParallelEvent) -> _Agent:
        """Return the agent that an event is about, which begins something new."""
        agent = self._agents.get(event.task_id)
        if agent is None:
            agent = self._agents[event.task_id] = _Agent(str(event.agent_id), str(event.task_id))
        agent.since = self._clock()
        return agent

    def on_outcome(self, outcome: AgentOutcome[Any]) -> None:
        """Take note of what came of an agent: events of ends, which tell the same, are not asked for."""
        with self._guard:
            self._counts[outcome.status] += 1
            self._tokens += outcome.usage.input_tokens + outcome.usage.output_tokens
            self._cost += outcome.usage.cost
            agent = self._agents.pop(outcome.task_id, None)
            if agent is not None:
                agent.status, agent.since, agent.seconds = outcome.status, self._clock(), outcome.duration_seconds
                agent.doing = error_line(outcome)
                self._ended.append(agent)

    def say(self, text: str) -> None:
        """Print a line above the live part."""
        with contextlib.suppress(OSError):
            self._console.print(Text(text), soft_wrap=True)

    def render(self) -> RenderableType:
        """Return what is to be drawn now."""
        now = self._clock()
        room = max(1, min(ROWS, self._console.height - _SUMS - 2))
        with self._guard:
            counts, running = self._counts.copy(), sum(agent.run is not None for agent in self._agents.values())
            self._rows = _chosen(self._rows, self._agents.values(), self._ended, room, now)
            shown = tuple(self._rows)
            tokens = self._tokens + sum(agent.tokens for agent in self._agents.values())
            cost = self._cost + sum(agent.usage.cost for agent in self._agents.values())
            hidden = len(self._agents) - sum(agent.status is None for agent in shown)
        if not self._total:
            return ""
        width = self._console.width
        more = [Text(f"... and {hidden} more running or waiting", style="dim")] if hidden > 0 else []
        spent = spent_text(Usage(output_tokens=tokens, cost=cost))
        completed = counts.total()
        states = [f"{counts[status]} {status_text(status)}" for status in OutcomeStatus if counts[status]]
        states += [f"{running} running", f"{self._total - completed - running} waiting"]
        pace = [duration_text(now - self._started), *_pace(completed, self._total, now - self._started)]
        return Group(
            _head(self._group_id, completed, self._total, width),
            _one_line(", ".join(states)),
            _one_line(", ".join([*pace, spent] if spent else pace)),
            _table(shown, now, width),
            *more,
        )


def _doing(event: ParallelEvent) -> str:
    """Return what an agent does after an event."""
    text = ""
    if event.name in _RETRIES:
        text = f"tries again in {duration_text(event.fields['wait_seconds'])}: {event.fields['error']}"
    elif event.name == TOOL_INVOKE_START:
        text = f"calls {event.fields['tool']}"
    return harmless(" ".join(text.split()), 200)


def _chosen(
    shown: Iterable[_Agent], moving: Iterable[_Agent], ended: Iterable[_Agent], room: int, now: float
) -> list[_Agent]:
    """Return who is shown: rows stay where they are, and those that ended make room for others after a moment."""
    rows = list(shown)[:room]
    others = iter(agent for agent in sorted(moving, key=_runs_first) if agent not in rows) if room else iter(())
    for number, agent in enumerate(rows):
        if agent.status is not None and now - agent.since >= LINGER_SECONDS:
            rows[number] = next(others, agent)
    while len(rows) < room and (other := next(others, None)) is not None:
        rows.append(other)
    unseen = [agent for agent in ended if agent not in rows]
    return unseen[max(0, len(unseen) - (room - len(rows))) :] + rows if len(rows) < room else rows


def _runs_first(agent: _Agent) -> bool:
    return agent.run is None


@frozen
class _Column:
    """A column of the rows.

    Attributes:
        name: What stands above it.
        from_width: From which width of the terminal on it is there.
        cell: Makes what stands in it.
        is_cut: Whether its texts are cut where there is no room; the others are short.
        justify: To which side its texts stand.
        style: How its texts look.
    """

    name: str
    from_width: int
    cell: Callable[[_Agent, float], Text]
    is_cut: bool = False
    justify: Any = "left"
    style: str = ""


def _state(agent: _Agent, _now: float) -> Text:
    if agent.status is not None:
        return _padded(status_text(agent.status), STYLES[agent.status])
    return _padded("waiting", "yellow") if agent.is_kept_waiting else _padded("running", "cyan")


def _padded(state: str, style: str) -> Text:
    return Text(state.ljust(_STATE_COLUMNS), style=style)


def _seconds(agent: _Agent, now: float) -> Text:
    return Text(duration_text(agent.seconds if agent.status is not None else now - agent.since))


def _told(agent: _Agent, _now: float) -> Text:
    if not agent.doing and agent.status is None and agent.is_kept_waiting:
        return Text("for a limit that it shares with others")
    return Text(agent.doing)


def _number(value: float) -> Text:
    return Text(f"{value:g}" if value else "")


_COLUMNS: Final = (
    _Column("state", 0, _state),
    _Column("agent", 0, lambda agent, _: id_text(agent.agent_id), is_cut=True),
    _Column("task", 60, lambda agent, _: id_text(agent.task_id), is_cut=True),
    _Column("time", 30, _seconds, justify="right"),
    _Column("turns", 100, lambda agent, _: _number(agent.usage.requests), justify="right"),
    _Column("tokens", 80, lambda agent, _: _number(agent.tokens), justify="right"),
    _Column("cost", 100, lambda agent, _: _number(round(agent.usage.cost, 4)), justify="right"),
    _Column("", 70, _told, is_cut=True, style="dim"),
)


def _table(shown: Iterable[_Agent], now: float, width: int) -> Table:
    """Return the rows; columns for which no agent has anything, or there is no room, are left out."""
    agents = list(shown)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    columns: list[list[Text]] = []
    for column in _COLUMNS:
        cells = [column.cell(agent, now) for agent in agents]
        if width < column.from_width or not any(cells):
            continue
        for cell in cells:
            cell.no_wrap, cell.overflow = True, "ellipsis"
        columns.append(cells)
        table.add_column(
            column.name,
            no_wrap=not column.is_cut,  # rich takes room from columns that may wrap, and from others when none is left
            justify=column.justify,
            style=column.style,
            min_width=None if column.is_cut else max(cell.cell_len for cell in cells),
        )
    for row in zip(*columns, strict=True):
        table.add_row(*row)
    return table


def _head(group_id: str, completed: int, total: int, width: int) -> Table:
    head = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(3):
        head.add_column(no_wrap=True, overflow="ellipsis")
    name = Text(harmless(group_id, ID_CHARACTERS if width >= 80 else 20), style="bold")
    head.add_row(name, ProgressBar(total=total, completed=completed, width=min(30, width // 4)), f"{completed}/{total}")
    return head


def _pace(completed: int, total: int, seconds: float) -> list[str]:
    """Return how many end in a second or a minute, and how long the rest takes if they go on so."""
    if not completed or seconds <= 0 or completed == total:
        return []
    rate = completed / seconds
    per = f"{rate:.3g} a second" if rate >= 1 else f"{60 * rate:.3g} a minute"
    return [per, f"about {duration_text((total - completed) / rate)} left"]


def _one_line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")
