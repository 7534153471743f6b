"""What a journal has, as tables. Reads no file."""

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime

from rich.console import Console
from rich.text import Text

from ._display import id_text, make_table
from ._words import duration_text, harmless, spent_text
from .journals.sqlite import RecordedExecution


def print_history(console: Console, executions: Sequence[RecordedExecution], *, in_use: bool) -> None:
    """Print a line for each run; *in_use* tells that the latest unfinished one is going on."""
    table = make_table("run", "started", "state", "agents", "spent")
    for execution in executions:
        is_last = execution is executions[-1]
        state = "finished" if execution.finished is not None else "running" if in_use and is_last else "unfinished"
        table.add_row(
            id_text(execution.name),
            Text(_time_text(execution.started)),
            Text(state),
            Text(_counts(attempt.status for attempt in execution.last_attempts)),
            Text(spent_text(execution.usage) or "-", no_wrap=True),
        )
    console.print(table)


def print_execution(console: Console, execution: RecordedExecution) -> None:
    """Print a line for each task of a run, and the sums."""
    starts = Counter(attempt.task_id for attempt in execution.attempts)
    table = make_table("agent", "task", "status", "starts", "time", "error")
    for attempt in execution.last_attempts:
        table.add_row(
            id_text(attempt.agent_id),
            id_text(attempt.task_id),
            Text(_status_text(attempt.status)),
            Text(str(starts[attempt.task_id])),
            Text("-" if attempt.ended is None else duration_text(max(0.0, attempt.ended - attempt.started))),
            Text(harmless(attempt.content or "", 200) if attempt.status == "failed" else "", no_wrap=True),
        )
    console.print(table)
    console.print()
    spent = spent_text(execution.usage)
    counts = _counts(attempt.status for attempt in execution.last_attempts)
    console.print(Text(f"{harmless(execution.name)}: {counts}{spent and f'; {spent}'}"), soft_wrap=True)


def _status_text(status: str) -> str:
    return "not ended" if status == "started" else harmless(status)


def _counts(statuses: Iterable[str]) -> str:
    counts = Counter(map(_status_text, statuses))
    return ", ".join(f"{count} {status}" for status, count in counts.most_common()) or "none"


def _time_text(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M:%S}"
    except (OverflowError, ValueError, OSError):  # no time that a clock has shown
        return "-"
