"""What people read of a run, in words: one harmless line for each thing. Knows values; knows no terminal and no file.

Everything that comes from outside (ids, errors, what programs print) goes through ``harmless()``.
"""

import json
import sys
import unicodedata
from collections import Counter
from typing import Any, Final

from ._models import Usage
from ._outcomes import AgentOutcome, OutcomeStatus, ParallelExecutionResult
from .events import ParallelEvent
from .serialization import plain_json

ID_CHARACTERS: Final = 60
"""Characters of an id that are shown."""

ERROR_CHARACTERS: Final = 300
"""Characters of an error that are shown; the report has all of it."""

OUTPUT_CHARACTERS: Final = 60
"""Characters of an output that are shown; the same holds for it."""

_INVISIBLE: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories that steer a terminal or cannot be seen: control, format, surrogate, unassigned, line ends."""


def harmless(text: str, at_most: int = sys.maxsize) -> str:
    r"""Return *text* for a terminal: one line, no control or format characters, at most so many characters.

    What is not to be printed stands as an escape that can be seen, such as ``\x1b`` or ``\n``.
    """
    start = text[: at_most + 1]  # an escape is never shorter than what it stands for
    shown = start if start.isprintable() else "".join(map(_visible, start))
    return shown if len(shown) <= at_most else f"{shown[: at_most - 1]}…"


def _visible(character: str) -> str:
    if unicodedata.category(character) in _INVISIBLE:
        return character.encode("unicode_escape").decode("ascii")
    return character


def status_text(status: OutcomeStatus) -> str:
    """Return a status in words."""
    return status.value.replace("_", " ")


def duration_text(seconds: float) -> str:
    """Return a duration in seconds, or in hours, minutes and seconds if it is long."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def error_line(outcome: AgentOutcome[Any]) -> str:
    """Return why an agent did not succeed, or what it waits for, in one short line; empty if it succeeded."""
    result = outcome.result
    if result is None:
        error = outcome.error
    elif outcome.is_success:
        return ""
    elif outcome.status is OutcomeStatus.PARKED:
        error = result.completion_summary or "waits for a person"
    else:
        error = result.error_message or result.termination_reason.value
    return harmless(" ".join(str(error).split()), ERROR_CHARACTERS)


def output_line(outcome: AgentOutcome[Any]) -> str:
    """Return what an agent produced, in one short line."""
    output = outcome.output
    text = (
        output
        if isinstance(output, str)
        else ""
        if output is None
        else json.dumps(plain_json(output), ensure_ascii=False)
    )
    return harmless(" ".join(text[: 10 * OUTPUT_CHARACTERS].split()), OUTPUT_CHARACTERS)


def waiting_text(event: ParallelEvent) -> str:
    """Return whom an agent waits for, and for what."""
    holder = harmless(str(event.fields["holder"]), ID_CHARACTERS)
    return f"{holder}: {harmless(str(event.fields['resource']), ID_CHARACTERS)}"


def counts_text(result: ParallelExecutionResult[Any]) -> str:
    """Return how many agents ended how, and how long it all took."""
    counts = Counter(outcome.status for outcome in result.outcomes)
    counted = ", ".join(f"{counts[status]} {status_text(status)}" for status in OutcomeStatus if counts[status])
    return f"{agents_text(len(result.outcomes))} in {duration_text(result.total_duration_seconds)}: {counted}"


def agents_text(count: int) -> str:
    return "1 agent" if count == 1 else f"{count} agents"


def _limit_text(max_concurrency: int | None) -> str:
    return "all at the same time" if max_concurrency is None else f"at most {max_concurrency} at a time"


def opening_text(group_id: str, agent_count: int, max_concurrency: int | None) -> str:
    """Return what a group is, before it runs."""
    return f"{harmless(group_id, ID_CHARACTERS)}: {agents_text(agent_count)}, {_limit_text(max_concurrency)}"


def spent_text(usage: Usage) -> str:
    """Return what was spent, or nothing."""
    tokens = usage.input_tokens + usage.output_tokens
    spent = [f"{tokens} tokens"] if tokens else []
    if usage.cost:
        spent.append(f"cost {usage.cost:g}")
    return ", ".join(spent)
