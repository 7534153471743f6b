"""A run as one page: it holds its data, its style and its program, and asks no network for anything.

What the page does is in ``page.html``. Text from outside travels as JSON, in which nothing can end the element it
stands in, and becomes text nodes only.
"""

import json
from collections import Counter
from html import escape
from importlib.resources import files
from typing import Any, Final

from .._outcomes import OutcomeStatus, ParallelExecutionResult
from .._words import counts_text, harmless, spent_text, status_text
from .facts import Picture, Span
from .svg import COLOURS

_ORDER: Final = tuple(OutcomeStatus)


def page(result: ParallelExecutionResult[Any]) -> str:
    """Return the page, in ASCII."""
    picture = Picture.of(result)
    counts = Counter(span.status for span in picture.spans)
    total = spent_text(result.total_usage)
    data = {
        "group": harmless(picture.group_id),
        "sums": f"{counts_text(result)}{total and f'; {total}'}",
        "seconds": picture.seconds,
        "statuses": [{"name": status_text(s), "colour": COLOURS[s], "count": counts[s]} for s in _ORDER],
        "agents": [_row(span) for span in picture.spans],
        "charts": [
            {"name": chart.name, "steps": [[round(time, 6), value] for time, value in chart.steps]}
            for chart in picture.charts()
        ],
    }
    template = files("parallel_agents._timeline").joinpath("page.html").read_text("utf-8")
    title = escape(harmless(picture.group_id, 100)).encode("ascii", "xmlcharrefreplace").decode("ascii")
    before, _, rest = template.partition("@title@")
    between, _, after = rest.partition("@data@")
    return "".join([before, title, between, json.dumps(data, allow_nan=False).replace("<", "\\u003c"), after])


def _row(span: Span) -> list[Any]:
    """Return an agent as the page's program reads it: by position."""
    return [
        harmless(span.agent_id, 200),
        harmless(span.task_id, 200),
        _ORDER.index(span.status),
        None if span.start is None else round(span.start, 6),
        round(span.end, 6),
        span.attempts,
        span.input_tokens,
        span.output_tokens,
        span.cost,
        span.told,
    ]
