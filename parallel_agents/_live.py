"""The live display: sums on top, and below them a few agents, each in a row that it keeps until it has ended.

What is told is noted in the event loop, in a few steps; what it looks like is worked out by a thread of its own,
several times a second, so that neither a thousand agents nor a terminal that stands still hold anybody up.
"""

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Final, Self

from attrs import define, frozen
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

from ._context import RunContext, current_run
from ._display import STYLES, Display
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
        outcome: What came of it.
    """

    agent_id: str
    task_id: str
    since: float = 0.0
    doing: str = ""
    run: RunContext | None = None
    outcome: AgentOutcome[Any] | None = None

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
        self._counts = dict.fromkeys(OutcomeStatus, 0)
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
        usage = outcome.usage
        with self._guard:
            self._counts[outcome.status] += 1
            if usage is not NO_USAGE:
                self._tokens += usage.input_tokens + usage.output_tokens
                self._cost += usage.cost
            agent = self._agents.pop(outcome.task_id, None)
            if agent is not None:
                agent.outcome, agent.since = outcome, self._clock()
                self._ended.append(agent)

    def say(self, text: str) -> None:
        """Print a line above the live part."""
        with contextlib.suppress(OSError):
            self._console.print(Text(text), soft_wrap=True)

    def render(self) -> Segments:
        """Return what is to be drawn now."""
        now = self._clock()
        room = max(1, min(ROWS, self._console.height - _SUMS - 2))
        with self._guard:
            counts, running = self._counts.copy(), sum(agent.run is not None for agent in self._agents.values())
            self._rows = _chosen(self._rows, self._agents.values(), self._ended, room, now)
            shown = tuple(self._rows)
            tokens = self._tokens + sum(agent.tokens for agent in self._agents.values())
            cost = self._cost + sum(agent.usage.cost for agent in self._agents.values())
            hidden = len(self._agents) - sum(agent.outcome is None for agent in shown)
        if not self._total:
            return _lines([])
        width = self._console.width
        spent = spent_text(Usage(output_tokens=tokens, cost=cost))
        completed = sum(counts.values())
        states = [f"{counts[status]} {status_text(status)}" for status in OutcomeStatus if counts[status]]
        states += [f"{running} running", f"{self._total - completed - running} waiting"]
        pace = [duration_text(now - self._started), *_pace(completed, self._total, now - self._started)]
        lines = [
            self._head(completed, width),
            [_cell(", ".join(states), width)],
            [_cell(", ".join([*pace, spent] if spent else pace), width)],
            *_table(shown, now, width),
        ]
        if hidden > 0:
            lines.append([_cell(f"... and {hidden} more running or waiting", width, "dim")])
        return _lines(*lines)

    def _head(self, completed: int, width: int) -> list[Segment]:
        bar_width = min(30, width // 4)
        bar = ProgressBar(total=self._total, completed=completed, width=bar_width)
        count = f"{completed}/{self._total}"
        name = harmless(self._group_id, ID_CHARACTERS if width >= 80 else 20)
        room = max(1, width - bar_width - len(count) - 2 * len(_GAP.text))
        return [_cell(name, room, "bold"), _GAP, *self._console.render(bar), _GAP, Segment(count)]


_GAP: Final = Segment("  ")


def _lines(*lines: Iterable[Segment]) -> Segments:
    """Return lines, as narrow as they come: rich's own tables measure all their texts several times a frame."""
    return Segments(part for line in lines for part in (*line, Segment.line()))


def _cell(text: str, at_most: int, style: str = "") -> Segment:
    """Return a text; if it is wider than *at_most* columns, as much of it as fits."""
    fitting = text if cell_len(text) <= at_most else set_cell_size(text, at_most - 1) + "…"
    return Segment(fitting, Style.parse(style))


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
        if agent.outcome is not None and now - agent.since >= LINGER_SECONDS:
            rows[number] = next(others, agent)
    while len(rows) < room and (other := next(others, None)) is not None:
        rows.append(other)
    unseen = [agent for agent in ended if agent not in rows]
    return unseen[max(0, len(unseen) - (room - len(rows))) :] + rows if len(rows) < room else rows


def _runs_first(agent: _Agent) -> bool:
    return agent.run is None


def _state(agent: _Agent, _now: float) -> str:
    if agent.outcome is not None:
        return status_text(agent.outcome.status).ljust(_STATE_COLUMNS)
    return ("waiting" if agent.is_kept_waiting else "running").ljust(_STATE_COLUMNS)


def _state_style(agent: _Agent) -> str:
    if agent.outcome is not None:
        return STYLES[agent.outcome.status]
    return "yellow" if agent.is_kept_waiting else "cyan"


def _seconds(agent: _Agent, now: float) -> str:
    return duration_text(now - agent.since if agent.outcome is None else agent.outcome.duration_seconds)


def _told(agent: _Agent, _now: float) -> str:
    if agent.outcome is not None:
        return error_line(agent.outcome)
    if not agent.doing and agent.is_kept_waiting:
        return "for a limit that it shares with others"
    return agent.doing


def _number(value: float) -> str:
    return f"{value:g}" if value else ""


@frozen
class _Column:
    """A column of the rows.

    Attributes:
        name: What stands above it.
        from_width: From which width of the terminal on it is there.
        text: Tells what stands in it.
        style: Tells how that looks.
        is_cut: Whether its texts are cut where there is no room; the others are short.
        is_right: Whether its texts stand to the right.
    """

    name: str
    from_width: int
    text: Callable[[_Agent, float], str]
    style: Callable[[_Agent], str] = lambda _: ""
    is_cut: bool = False
    is_right: bool = False

    def padded(self, text: str, width: int, style: str) -> Segment:
        """Return a text that fills the column."""
        pad = " " * (width - cell_len(text))
        return _cell(pad + text if self.is_right else text + pad, width, style)


_COLUMNS: Final = (
    _Column("state", 0, _state, _state_style),
    _Column("agent", 0, lambda agent, _: harmless(agent.agent_id, ID_CHARACTERS), is_cut=True),
    _Column("task", 60, lambda agent, _: harmless(agent.task_id, ID_CHARACTERS), is_cut=True),
    _Column("time", 30, _seconds, is_right=True),
    _Column("turns", 100, lambda agent, _: _number(agent.usage.requests), is_right=True),
    _Column("tokens", 80, lambda agent, _: _number(agent.tokens), is_right=True),
    _Column("cost", 100, lambda agent, _: _number(round(agent.usage.cost, 4)), is_right=True),
    _Column("", 70, _told, lambda _: "dim", is_cut=True),
)


def _table(shown: Iterable[_Agent], now: float, width: int) -> list[list[Segment]]:
    """Return the rows; columns for which no agent has anything, or there is no room, are left out."""
    agents = list(shown)
    told = {column: [column.text(agent, now) for agent in agents] for column in _COLUMNS if width >= column.from_width}
    texts = {column: texts for column, texts in told.items() if any(texts)}
    widths = _widths({column: max(map(cell_len, [column.name, *texts[column]])) for column in texts}, width)
    lines = [[column.padded(column.name, widths[column], "dim") for column in texts]]
    for n, agent in enumerate(agents):
        lines.append([column.padded(texts[column][n], widths[column], column.style(agent)) for column in texts])
    return [[part for cell in line for part in (cell, _GAP)][:-1] for line in lines]


def _widths(wanted: dict[_Column, int], width: int) -> dict[_Column, int]:
    """Return how wide columns are: the widest of those that may be cut give way, until all fit."""
    widths = dict(wanted)
    cut = [column for column in widths if column.is_cut]
    too_much = sum(widths.values()) + (len(widths) - 1) * len(_GAP.text) - width
    for _ in range(too_much):
        widest = max(cut, key=lambda column: widths[column])
        widths[widest] = max(1, widths[widest] - 1)
    return widths


def _pace(completed: int, total: int, seconds: float) -> list[str]:
    """Return how many end in a second or a minute, and how long the rest takes if they go on so."""
    if not completed or seconds <= 0 or completed == total:
        return []
    rate = completed / seconds
    per = f"{rate:.3g} a second" if rate >= 1 else f"{60 * rate:.3g} a minute"
    return [per, f"about {duration_text((total - completed) / rate)} left"]
