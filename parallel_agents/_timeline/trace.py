"""A run in the Trace Event Format of Chrome, which Perfetto (https://ui.perfetto.dev) opens."""

import json
from typing import Any

from .._outcomes import ParallelExecutionResult
from .facts import Chart, Picture, Span

_PROCESS = 1


def trace_json(result: ParallelExecutionResult[Any]) -> str:
    """Return the trace as JSON: a lane for as many agents as ran at once, and counters. Times are microseconds."""
    picture = Picture.of(result)
    lanes = picture.lanes()
    events = [_metadata("process_name", 0, picture.group_id)]
    events += [
        _metadata("thread_name", lane, f"lane {lane + 1}") for lane in sorted({n for n in lanes if n is not None})
    ]
    events += [_complete(span, lane) for span, lane in zip(picture.spans, lanes, strict=True) if lane is not None]
    events += [event for chart in picture.charts() for event in _counter(chart)]
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, allow_nan=False)


def _metadata(kind: str, lane: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": _PROCESS, "tid": lane, "args": {"name": name}}


def _complete(span: Span, lane: int) -> dict[str, Any]:
    start = span.start or 0.0
    told = {
        "agent": span.agent_id,
        "status": span.status.value,
        "attempts": span.attempts,
        "input_tokens": span.input_tokens,
        "output_tokens": span.output_tokens,
        "cost": span.cost,
        "told": span.told,
    }
    return {
        "ph": "X",
        "name": span.task_id,
        "cat": span.status.value,
        "pid": _PROCESS,
        "tid": lane,
        "ts": _microseconds(start),
        "dur": _microseconds(span.end - start),
        "args": told,
    }


def _counter(chart: Chart) -> list[dict[str, Any]]:
    return [
        {"ph": "C", "name": chart.name, "pid": _PROCESS, "ts": _microseconds(time), "args": {chart.name: value}}
        for time, value in chart.steps
    ]


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)
