"""What people see of a run: its progress on standard error, and the table of its outcomes.

Everything that comes from outside is made harmless in ``_words`` and then goes into a ``Text`` of rich, which
interprets neither markup nor emoji codes. Knows values and events; knows nothing of plans, files or signals.
"""

import contextlib
from collections.abc import Collection, Iterable, Mapping
from types import TracebackType
from typing import Any, Final, Self, TextIO

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from ._outcomes import AgentOutcome, OutcomeStatus, ParallelExecutionResult
from ._words import (
    ID_CHARACTERS,
    counts_text,
    duration_text,
    error_line,
    harmless,
    opening_text,
    output_line,
    spent_text,
    status_text,
    waiting_text,
)
from .events import (
    _LEVELS,
    PARALLEL_AGENT_RESUMED,
    PARALLEL_AGENT_START,
    PARALLEL_AGENT_WAITING,
    PARALLEL_GROUP_START,
    ParallelEvent,
)
from .serialization import to_json

LISTED_OUTCOMES: Final = 50
"""A result with more outcomes is shown without those that succeeded."""

LISTED_FAILURES: Final = 200
"""Outcomes that are shown of a large result."""

PIPE_COLUMNS: Final = 200
"""Columns of a table that no terminal bounds."""

STYLES: Final[Mapping[OutcomeStatus, str]] = {
    OutcomeStatus.SUCCEEDED: "green",
    OutcomeStatus.FAILED: "red",
    OutcomeStatus.TIMED_OUT: "red",
    OutcomeStatus.CANCELLED: "yellow",
    OutcomeStatus.REJECTED: "yellow",
    OutcomeStatus.SKIPPED: "dim",
    OutcomeStatus.PARKED: "blue",
}


class _Console(Console):
    """A console that falls silent when nobody reads it any more; rich would end the program."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


def make_console(file: TextIO) -> Console:
    """Return a console on *file*; on anything but a terminal lines are long and without colour."""
    is_terminal = file.isatty()
    width = None if is_terminal else PIPE_COLUMNS
    return _Console(file=file, width=width, force_terminal=is_terminal, markup=False, emoji=False, highlight=False)


def make_table(*columns: str) -> Table:
    """Return a table whose cells are lines; the last column gives way to the others before their text is cut.

    Texts in the last column must not wrap by themselves: rich narrows only columns that could wrap.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        is_last = column is columns[-1]
        justify: JustifyMethod = "right" if column == "time" else "left"
        table.add_column(column, no_wrap=not is_last, overflow="ellipsis", justify=justify)
    return table


def id_text(text: str) -> Text:
    """Return an id for a table."""
    return Text(harmless(text, ID_CHARACTERS))


def print_summary(console: Console, result: ParallelExecutionResult[Any]) -> None:
    """Print a table of the outcomes, and the sums. Of a large result those that succeeded are only counted."""
    listed = list(result.outcomes)
    if len(listed) > LISTED_OUTCOMES:
        listed = [outcome for outcome in listed if not outcome.is_success][:LISTED_FAILURES]
    if listed:
        console.print(_summary_table(listed))
        console.print()
    if len(listed) < len(result.outcomes):
        console.print(Text(f"{len(result.outcomes) - len(listed)} more are not listed here; a report has them all"))
    group = harmless(result.group_id, ID_CHARACTERS)
    spent = spent_text(result.total_usage)
    console.print(Text(f"{group}: {counts_text(result)}{spent and f'; {spent}'}"), soft_wrap=True)


def _summary_table(outcomes: Iterable[AgentOutcome[Any]]) -> Table:
    table = make_table("agent", "task", "status", "time", "result")
    for outcome in outcomes:
        table.add_row(
            id_text(outcome.agent_id),
            id_text(outcome.task_id),
            Text(status_text(outcome.status), style=STYLES[outcome.status]),
            Text("-" if outcome.started_after_seconds is None else duration_text(outcome.duration_seconds)),
            Text(output_line(outcome), style="dim", no_wrap=True)
            if outcome.is_success
            else Text(error_line(outcome), no_wrap=True),
        )
    return table


class Display:
    """Shows nothing: the choice for ``--quiet``, and what the other displays build on.

    A display is entered for the length of a run, observes its events, and is told each outcome.
    """

    event_names: Collection[str] = frozenset()
    """What it wants to be told of."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def on_event(self, event: ParallelEvent, /) -> None:
        """Take note of an event."""

    def on_outcome(self, outcome: AgentOutcome[Any]) -> None:
        """Take note of what came of an agent."""

    def say(self, text: str) -> None:
        """Tell people something that is no event."""


class JsonDisplay(Display):
    """Writes each event as one line of JSON, in ASCII.

    Args:
        file: Where to.
    """

    event_names = frozenset(_LEVELS)

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def on_event(self, event: ParallelEvent, /) -> None:
        """Write the event."""
        _write_line(self._file, to_json(event))


class LineDisplay(Display):
    """Writes a line when an agent has to wait for its claims, when it starts and when it ends: for logs and pipes.

    Args:
        file: Where to.
    """

    event_names = frozenset(
        {PARALLEL_GROUP_START, PARALLEL_AGENT_START, PARALLEL_AGENT_WAITING, PARALLEL_AGENT_RESUMED}
    )

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._total = 0
        self._ended = 0
        self._recalled: set[str | None] = set()

    def on_event(self, event: ParallelEvent, /) -> None:
        """Write a line for the start of the group, and of each agent."""
        if event.name == PARALLEL_GROUP_START:
            self._total = event.fields["agent_count"]
            self.say(opening_text(event.group_id, self._total, event.fields["max_concurrency"]))
        elif event.name == PARALLEL_AGENT_START:
            self._write("started", event.agent_id, event.task_id, "")
        elif event.name == PARALLEL_AGENT_WAITING:
            self._write("waiting", event.agent_id, event.task_id, f", for {waiting_text(event)}")
        elif event.name == PARALLEL_AGENT_RESUMED and event.fields["reason"] == "recorded":
            self._recalled.add(event.task_id)

    def on_outcome(self, outcome: AgentOutcome[Any]) -> None:
        """Write a line for an agent that ran; those that never started are in the table at the end."""
        self._ended += 1
        if outcome.started_after_seconds is None:
            return
        error = error_line(outcome)
        took = "from the journal" if outcome.task_id in self._recalled else duration_text(outcome.duration_seconds)
        told = f", {took}{': ' if error else ''}{error}"
        self._write(status_text(outcome.status), outcome.agent_id, outcome.task_id, told)

    def say(self, text: str) -> None:
        """Write a line."""
        _write_line(self._file, text)

    def _write(self, status: str, agent_id: str | None, task_id: str | None, told: str) -> None:
        agent, task = harmless(str(agent_id), ID_CHARACTERS), harmless(str(task_id), ID_CHARACTERS)
        self.say(f"[{self._ended}/{self._total}] {status}: {agent} on {task}{told}")


def _write_line(file: TextIO, text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads any more; the agents and the report are worth more
        file.write(f"{text}\n")
        file.flush()
