"""What it costs to watch: the live view, OpenTelemetry, the page of a run: ``python benchmarks/observing.py --help``.

Costs are differences in CPU time between a run that is watched and one that is not: a fresh process for each sample,
rounds interleaved, the minimum of each. The live view draws a terminal of 120 by 40 into a device that throws it away.
The page is opened in a headless Chromium, from the call until what it shows was painted.
"""

import argparse
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio
from peers import NoOpEngine, checkpoint_of, group_of

from parallel_agents import (
    AgentAssignment,
    AgentOutcome,
    AgentRunResult,
    ParallelExecutionResult,
    ParallelExecutor,
    TerminationReason,
    Usage,
)
from parallel_agents.events import PARALLEL_AGENT_COMPLETE, PARALLEL_AGENT_START, ParallelEvent

COUNT = 10_000
AT_ONCE = 100

QUIET, LIVE = "run without a view", "live view"
BARE = "no observer"
API = "API alone, no SDK set up"
NO_PROCESSOR = "SDK, spans that nobody processes, metrics that nobody reads"
BATCHED = "SDK, spans in batches to an exporter that drops them"
BY_HAND = "of which: the SDK's own calls, with as many attributes"


async def one_millisecond(_assignment: AgentAssignment) -> None:
    await anyio.sleep(0.001)


@contextmanager
def display_for(name: str) -> Iterator[Any]:
    """Give what the command line shows a run with: nothing, or the live view."""
    from rich.console import Console  # noqa: PLC0415 - of one case only

    from parallel_agents._display import Display  # noqa: PLC0415
    from parallel_agents._live import LiveDisplay  # noqa: PLC0415

    with Path(os.devnull).open("w", encoding="utf-8") as terminal:
        console = Console(file=terminal, width=120, height=40, force_terminal=True, force_interactive=True)
        with LiveDisplay(console) if name == LIVE else Display() as display:
            yield display


def view(name: str, at_once: int, backend: str) -> tuple[float, float]:
    """Return the CPU seconds and the seconds of a run, shown as the command line shows it."""
    group = group_of(COUNT, at_once)

    async def program(display: Any) -> tuple[float, float]:
        executor = ParallelExecutor(engine=one_millisecond, observers=[display])
        gc.collect()
        before, began = time.process_time(), time.perf_counter()
        async with executor.open_group(group) as run:
            async for outcome in run:
                display.on_outcome(outcome)
        return time.process_time() - before, time.perf_counter() - began

    with display_for(name) as display:
        return anyio.run(program, display, backend=backend)


def observers_for(name: str) -> list[Any]:
    if name == BARE:
        return []
    from opentelemetry.sdk.metrics import MeterProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult  # noqa: PLC0415

    from parallel_agents.observers.otel import OpenTelemetryObserver  # noqa: PLC0415

    class Drop(SpanExporter):
        def export(self, spans: object) -> SpanExportResult:
            del spans
            return SpanExportResult.SUCCESS

    if name == API:
        return [OpenTelemetryObserver()]
    if name == BY_HAND:
        return [ByHand(TracerProvider(), MeterProvider())]
    tracers = TracerProvider()
    if name == BATCHED:
        tracers.add_span_processor(BatchSpanProcessor(Drop(), max_queue_size=2 * COUNT))
    return [OpenTelemetryObserver(tracer_provider=tracers, meter_provider=MeterProvider())]


class ByHand:
    """Makes for each agent the span and the duration that OpenTelemetryObserver does, and knows nothing of agents.

    Args:
        tracers: Where spans go.
        meters: Where metrics go.
    """

    event_names = frozenset({PARALLEL_AGENT_START, PARALLEL_AGENT_COMPLETE})

    def __init__(self, tracers: Any, meters: Any) -> None:
        self._tracer = tracers.get_tracer("by hand")
        self._durations = meters.get_meter("by hand").create_histogram("duration")
        self._span: ContextVar[Any] = ContextVar("span")

    def on_event(self, event: ParallelEvent) -> None:
        if event.name == PARALLEL_AGENT_START:
            span = self._tracer.start_span("agent", attributes={f"key.{n}": "value" for n in range(6)})
            self._span.set(span)
        else:
            self._durations.record(1.0, {"workflow": "g", "status": "succeeded"})
            self._span.get().set_attributes({"status": "succeeded"})
            self._span.get().end()


def telemetry(name: str, at_once: int, backend: str) -> tuple[float, float]:
    """Return the CPU seconds and the seconds of a run of no-op agents."""
    group = group_of(COUNT, at_once)
    observers = observers_for(name)

    async def program() -> tuple[float, float]:
        executor = ParallelExecutor(engine=NoOpEngine(checkpoint_of(backend)), observers=observers)
        gc.collect()
        before, began = time.process_time(), time.perf_counter()
        await executor.execute_group(group)
        return time.process_time() - before, time.perf_counter() - began

    anyio.run(program, backend=backend)
    return anyio.run(program, backend=backend)


def report_of(count: int) -> ParallelExecutionResult[str]:
    """Return a result as of a run of *count* agents that took a second and more, a tenth of which failed."""
    outcomes: list[AgentOutcome[str]] = []
    for n in range(count):
        ids: dict[str, Any] = {"task_id": f"task-{n}", "agent_id": f"agent-{n}"}
        start, seconds = n // AT_ONCE * 1.3, 1 + n % 7 / 23
        timing: dict[str, Any] = {
            "started_after_seconds": start,
            "duration_seconds": seconds,
            "usage": Usage(input_tokens=n % 900, output_tokens=n % 70, requests=1, cost=n % 13 / 1000),
        }
        result: AgentRunResult[str] = AgentRunResult(
            **ids, termination_reason=TerminationReason.COMPLETED, output=f"What agent {n} found out."
        )
        what: dict[str, Any] = {"result": result} if n % 10 else {"error": "ValueError: the answer is no JSON"}
        outcomes.append(AgentOutcome(**ids, **timing, **what))
    return ParallelExecutionResult(group_id="g", outcomes=outcomes, total_duration_seconds=count / AT_ONCE * 1.3)


def page_seconds(_name: str, _at_once: int, _backend: str) -> tuple[float, float]:
    """Return the seconds to write the page of a report, and those until a browser shows it."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - of this case only

    from parallel_agents._timeline.page import page  # noqa: PLC0415

    result = report_of(COUNT)
    began = time.perf_counter()
    text = page(result)
    written = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder, "run.html")
        file.write_text(text, "ascii")
        installed = shutil.which("chromium") or shutil.which("google-chrome") or playwright.chromium.executable_path
        browser = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page()
        tab.goto("about:blank")
        began = time.perf_counter()
        tab.goto(file.as_uri())
        tab.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        opened = time.perf_counter() - began
        assert tab.locator(".row").count() > 10
        browser.close()
    return written, opened


CASES = {"view": view, "telemetry": telemetry, "page": page_seconds}


def sample(*arguments: object) -> tuple[float, float]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--sample", json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    first, second = json.loads(done.stdout)
    return first, second


def best_of(case: str, names: list[str], at_once: int, backend: str, rounds: int) -> dict[str, tuple[float, float]]:
    """Return the smallest of both times, for each name."""
    best = {name: (float("inf"), float("inf")) for name in names}
    for _ in range(rounds):
        for name in names:
            first, second = sample(case, name, at_once, backend)
            best[name] = min(best[name][0], first), min(best[name][1], second)
    return best


def aim(text: str, value: float, limit: float, unit: str) -> None:
    print(f"  {'met   ' if value <= limit else 'MISSED'}  {text}: {value:.3g} {unit}, aim {limit:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0] if __doc__ else None)
    parser.add_argument("--backends", nargs="+", default=["asyncio", "trio"], choices=["asyncio", "trio"])
    parser.add_argument("--rounds", type=int, default=5, help="samples of each case; the minimum counts")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--sample", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.sample:
        case, *rest = json.loads(chosen.sample)
        print(json.dumps(CASES[case](*rest)))
        return
    print(
        f"{platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} cores, "
        f"anyio {version('anyio')}, trio {version('trio')}, rich {version('rich')}, "
        f"opentelemetry-sdk {version('opentelemetry-sdk')}"
    )
    for case in chosen.cases:
        SHOW[case](chosen.backends, chosen.rounds)


def show_view(backends: list[str], rounds: int) -> None:
    print(f"\n{COUNT:,} agents of one millisecond: CPU time of the live view, as a share of the time the run takes")
    for backend in backends:
        for at_once in (1, 10):
            best = best_of("view", [QUIET, LIVE], at_once, backend, rounds)
            cost, seconds = best[LIVE][0] - best[QUIET][0], best[QUIET][1]
            print(f"  {backend:8} {at_once:3} at once: {seconds:6.2f} s, with the view {best[LIVE][1]:6.2f} s")
            aim(f"{backend}, {at_once} at once", 100 * cost / seconds, 5, "%")


def show_telemetry(backends: list[str], rounds: int) -> None:
    print(f"\n{COUNT:,} no-op agents, {AT_ONCE} at once: CPU microseconds that OpenTelemetryObserver adds to each")
    for backend in backends:
        best = best_of("telemetry", [BARE, API, NO_PROCESSOR, BY_HAND, BATCHED], AT_ONCE, backend, rounds)
        for name in (API, NO_PROCESSOR, BY_HAND, BATCHED):
            print(f"  {backend:8} {name:60} {(best[name][0] - best[BARE][0]) / COUNT * 1e6:7.2f}")
        aim(backend, (best[NO_PROCESSOR][0] - best[BARE][0]) / COUNT * 1e6, 30, "us")


def show_page(_backends: list[str], rounds: int) -> None:
    print(f"\nThe page of {COUNT:,} agents")
    written, opened = best_of("page", ["page"], AT_ONCE, "asyncio", rounds)["page"]
    print(f"  written in {written:.2f} s")
    aim("open, until it is painted", opened, 2, "s")


SHOW = {"view": show_view, "telemetry": show_telemetry, "page": show_page}


if __name__ == "__main__":
    main()
