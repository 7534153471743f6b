"""A run as one still image, light or dark as the reader's system is.

A row for each agent while there are few; from ``ROWS`` on agents share lanes, as many as ran at once. Names and errors
are in titles, which browsers show under the pointer.
"""

from collections.abc import Iterator
from html import escape
from math import floor, log10
from typing import Any, Final

from .._outcomes import OutcomeStatus, ParallelExecutionResult
from .._words import ID_CHARACTERS, agents_text, duration_text, harmless, status_text
from .facts import Chart, Picture, Span

ROWS: Final = 60
"""With more agents they share lanes."""

COLOURS: Final = {
    OutcomeStatus.SUCCEEDED: "#2e9e5b",
    OutcomeStatus.FAILED: "#d64545",
    OutcomeStatus.TIMED_OUT: "#e07b1f",
    OutcomeStatus.CANCELLED: "#a0882a",
    OutcomeStatus.REJECTED: "#8a63d2",
    OutcomeStatus.SKIPPED: "#7d8590",
    OutcomeStatus.PARKED: "#3b82d6",
}
"""Told apart by most people who see few colours; names stand beside them, so that nobody has to."""

WIDTH: Final = 1000
_LABELS: Final = 210
_RIGHT: Final = 16
_CHART: Final = 48
_GAP: Final = 18

_STYLE: Final = """
svg{font:12px system-ui,sans-serif;background:#fff;color:#1f2328}
text{fill:currentColor}.dim{fill:#656d76}.grid{stroke:#d8dee4}.wait{stroke:#b6bdc5;stroke-width:2}
path{stroke:#8a63d2;fill:#8a63d233}.running{stroke:#3b82d6;fill:#3b82d633}.waiting{stroke:#8b949e;fill:#8b949e33}
@media(prefers-color-scheme:dark){svg{background:#0d1117;color:#e6edf3}.dim{fill:#9198a1}.grid{stroke:#30363d}
.wait{stroke:#484f58}}
"""


def svg(result: ParallelExecutionResult[Any]) -> str:
    """Return the image as SVG text, in ASCII."""
    drawing = _Drawing(Picture.of(result))
    parts = list(drawing.parts())
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {drawing.height}" width="{WIDTH}" '
        f'height="{drawing.height}" role="img" aria-label="{_text(drawing.title, 200)}"><style>{_STYLE}</style>'
    )
    text = "\n".join([head, *parts, "</svg>\n"])
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii")


class _Drawing:
    """Where everything is: charts on top, agents below, one scale of time for both.

    Args:
        picture: What is drawn.
    """

    def __init__(self, picture: Picture) -> None:
        self._picture = picture
        self._in_rows = len(picture.spans) <= ROWS
        self._lanes = list(range(len(picture.spans))) if self._in_rows else picture.lanes()
        rows = 1 + max((lane for lane in self._lanes if lane is not None), default=-1)
        self._row = 18.0 if self._in_rows else max(2.0, min(18.0, 1000 / max(1, rows)))
        self._left = _LABELS if self._in_rows else 80
        self._charts = picture.charts()
        self._top = 64 + len(self._charts) * (_CHART + _GAP)
        self.height = round(self._top + rows * self._row + 30)

    @property
    def title(self) -> str:
        """What it shows, in a sentence."""
        picture = self._picture
        return f"{picture.group_id}: {agents_text(len(picture.spans))} in {duration_text(picture.seconds)}"

    def parts(self) -> Iterator[str]:
        """Yield all that is drawn."""
        yield f'<text x="16" y="26" font-size="16" font-weight="600">{_text(self.title, 100)}</text>'
        yield from self._legend()
        yield from self._scale()
        for number, chart in enumerate(self._charts):
            yield from self._chart(64 + number * (_CHART + _GAP), chart)
        for span, lane in zip(self._picture.spans, self._lanes, strict=True):
            if lane is not None:
                yield from self._agent(span, self._top + lane * self._row)

    def _x(self, seconds: float) -> float:
        return round(self._left + seconds / (self._picture.seconds or 1) * (WIDTH - self._left - _RIGHT), 2)

    def _legend(self) -> Iterator[str]:
        x = 16.0
        for status in OutcomeStatus:
            count = sum(span.status is status for span in self._picture.spans)
            if count:
                label = f"{count} {status_text(status)}"
                yield f'<rect x="{x:g}" y="38" width="10" height="10" rx="2" fill="{COLOURS[status]}"/>'
                yield f'<text x="{x + 15:g}" y="47">{label}</text>'
                x += 30 + 7 * len(label)

    def _scale(self) -> Iterator[str]:
        for seconds in _ticks(self._picture.seconds):
            x = self._x(seconds)
            yield f'<line class="grid" x1="{x}" x2="{x}" y1="58" y2="{self.height - 24}"/>'
            yield f'<text class="dim" x="{x}" y="{self.height - 8}" text-anchor="middle">{_tick_text(seconds)}</text>'

    def _chart(self, top: float, chart: Chart) -> Iterator[str]:
        highest = chart.highest or 1

        def y(value: float) -> float:
            return round(top + _CHART * (1 - value / highest), 2)

        steps = "".join(f"H{self._x(time)}V{y(value)}" for time, value in chart.steps)
        path = f"M{self._x(0)},{y(0)}{steps}H{self._x(self._picture.seconds)}V{y(0)}Z"
        yield f'<text class="dim" x="{self._left - 8}" y="{top + 10}" text-anchor="end">{highest:.5g}</text>'
        yield f'<text class="dim" x="{self._left - 8}" y="{top + _CHART}" text-anchor="end">{chart.name}</text>'
        yield f'<path class="{chart.name}" d="{path}"/>'

    def _agent(self, span: Span, y: float) -> Iterator[str]:
        middle, thick = round(y + self._row / 2, 2), round(max(1.5, self._row - 4), 2)
        name = span.agent_id if span.agent_id == span.task_id else f"{span.agent_id} / {span.task_id}"
        took = "never started" if span.start is None else duration_text(span.end - span.start)
        told = f"{name}: {status_text(span.status)}, {took}{': ' if span.told else ''}{span.told}"
        yield f"<g><title>{_text(told, 500)}</title>"
        if self._in_rows:
            yield f'<text x="{self._left - 8}" y="{middle + 4}" text-anchor="end">{_text(name, 32)}</text>'
            end = self._picture.seconds if span.start is None else span.start
            yield f'<line class="wait" x1="{self._x(0)}" x2="{self._x(end)}" y1="{middle}" y2="{middle}"/>'
        start = self._picture.seconds if span.start is None else span.start
        x, width = self._x(start), max(1.5, round(self._x(span.end) - self._x(start), 2))
        yield (
            f'<rect x="{x}" y="{round(middle - thick / 2, 2)}" width="{width}" height="{thick}" '
            f'rx="{min(3, thick / 2):g}" fill="{COLOURS[span.status]}"/></g>'
        )


def _text(text: str, at_most: int = ID_CHARACTERS) -> str:
    return escape(harmless(text, at_most))


def _ticks(seconds: float) -> Iterator[float]:
    """Yield round times, about eight of them."""
    if seconds <= 0:
        return
    raw = seconds / 8
    power = 10.0 ** floor(log10(raw))
    step = next(nice * power for nice in (1, 2, 5, 10) if nice * power >= raw)
    count = int(seconds / step + 1e-9)
    for number in range(count + 1):
        yield number * step


def _tick_text(seconds: float) -> str:
    return f"{seconds:g} s" if seconds < 100 else duration_text(seconds)
