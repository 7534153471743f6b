"""The picture of a run: what is computed, and what the page, the image and the trace show of it."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

pytest.importorskip("playwright")
pytest.importorskip("cyclopts")

from browser import chromium
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Browser, Page, Request, expect

from parallel_agents import (
    AgentOutcome,
    AgentRunResult,
    OutcomeStatus,
    ParallelExecutionResult,
    TerminationReason,
    Usage,
)
from parallel_agents._timeline.facts import Picture
from parallel_agents._timeline.page import page
from parallel_agents._timeline.svg import COLOURS, ROWS, svg
from parallel_agents._timeline.trace import trace_json
from parallel_agents.cli import main
from parallel_agents.serialization import report

SVG = "{http://www.w3.org/2000/svg}"

HOSTILE = "</script><img src=x onerror=alert(1)>\x1b[2J\u202e&amp;{braces}"


def outcome(name: str, start: float | None = 0.0, seconds: float = 1.0, **fields: Any) -> AgentOutcome[Any]:
    ids: dict[str, Any] = {"task_id": f"task-{name}", "agent_id": f"agent-{name}"}
    timing: dict[str, Any] = {"started_after_seconds": start, "duration_seconds": seconds if start is not None else 0.0}
    if "error" in fields:
        return AgentOutcome(**ids, **timing, **fields)
    result: AgentRunResult[Any] = AgentRunResult(**ids, termination_reason=TerminationReason.COMPLETED, output="fine")
    return AgentOutcome(**ids, **timing, result=result, **fields)


def result_of(*outcomes: AgentOutcome[Any], seconds: float = 10.0) -> ParallelExecutionResult[Any]:
    return ParallelExecutionResult(group_id="nightly", outcomes=outcomes, total_duration_seconds=seconds)


SEVERAL = result_of(
    outcome("a", 0.0, 4.0, usage=Usage(input_tokens=10, output_tokens=2, cost=0.5)),
    outcome("b", 1.0, 2.0, error="ValueError: no"),
    outcome("c", 4.0, 5.0, error="Timed out after 5 s", status=OutcomeStatus.TIMED_OUT, usage=Usage(cost=0.25)),
    outcome("d", None, error="Skipped: the budget is spent", status=OutcomeStatus.SKIPPED, attempts=0),
)


def many(count: int, at_once: int) -> ParallelExecutionResult[Any]:
    outcomes = [
        outcome(str(n), float(n // at_once), 0.9) if n % 10 else outcome(str(n), float(n // at_once), 0.9, error="no")
        for n in range(count)
    ]
    return result_of(*outcomes, seconds=count / at_once)


def charts(result: ParallelExecutionResult[Any]) -> dict[str, tuple[tuple[float, float], ...]]:
    return {chart.name: chart.steps for chart in Picture.of(result).charts()}


# What is computed


def test_charts_tell_how_many_ran_and_waited_and_what_was_spent() -> None:
    assert charts(SEVERAL) == {
        "running": ((0.0, 1), (1.0, 2), (3.0, 1), (4.0, 1), (9.0, 0)),
        "waiting": ((0.0, 2), (1.0, 1), (4.0, 0)),
        "cost": ((3.0, 0.0), (4.0, 0.5), (9.0, 0.75)),
    }


def test_tokens_stand_for_a_cost_that_nobody_knows_and_nothing_for_what_was_not_spent() -> None:
    assert charts(result_of(outcome("a", usage=Usage(input_tokens=3, output_tokens=4))))["tokens"] == ((1.0, 7),)
    assert set(charts(result_of(outcome("a")))) == {"running", "waiting"}


def test_a_picture_is_as_long_as_its_last_agent() -> None:
    assert Picture.of(result_of(outcome("a", 1.0, 5.0), seconds=2.0)).seconds == 6.0
    assert Picture.of(result_of(seconds=2.0)).seconds == 2.0


times = st.integers(0, 50).map(float)


@given(st.lists(st.tuples(st.none() | times, times), max_size=30))
def test_lanes_hold_agents_that_never_overlap_and_are_as_few_as_possible(
    spans: list[tuple[float | None, float]],
) -> None:
    result = result_of(*[outcome(str(n), start, seconds) for n, (start, seconds) in enumerate(spans)])
    picture = Picture.of(result)
    lanes = picture.lanes()
    assert [lane is None for lane in lanes] == [start is None for start, _ in spans]
    used = {lane for lane in lanes if lane is not None}
    for lane in used:
        inside = sorted((s.start or 0.0, s.end) for s, of in zip(picture.spans, lanes, strict=True) if of == lane)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(inside))
    running, waiting = picture.charts()[:2]
    assert used == set(range(len(used)))
    assert len(used) >= running.highest
    if all(seconds for _, seconds in spans):
        assert len(used) == running.highest
    assert [steps[-1][1] for steps in (running.steps, waiting.steps) if used] == [0, 0][: 2 * bool(used)]


# The image


def test_an_image_has_a_bar_for_each_agent_in_the_colour_of_its_status() -> None:
    text = svg(SEVERAL)
    assert text.isascii()
    root = ET.fromstring(text)
    bars = {
        (group.findtext(f"{SVG}title") or "").partition(":")[0]: group.find(f"{SVG}rect")
        for group in root.iter(f"{SVG}g")
    }
    assert list(bars) == [f"agent-{name} / task-{name}" for name in "abcd"]
    colours = [bar.get("fill") for bar in bars.values() if bar is not None]
    assert colours == [COLOURS[o.status] for o in SEVERAL.outcomes]
    x = [float(bar.get("x") or -1) for bar in bars.values() if bar is not None]
    assert x[0] < x[1] < x[2] < x[3]
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    assert titles[1] == "agent-b / task-b: failed, 2.0 s: ValueError: no"
    assert titles[3] == "agent-d / task-d: skipped, never started: Skipped: the budget is spent"


def test_an_image_of_many_agents_puts_them_into_lanes() -> None:
    few, lanes = ET.fromstring(svg(many(ROWS, 10))), ET.fromstring(svg(many(1000, 10)))
    assert len(list(lanes.iter(f"{SVG}title"))) == 1000
    assert float(lanes.get("height") or 0) < float(few.get("height") or 0) < 2000
    assert float(ET.fromstring(svg(many(10_000, 5000))).get("height") or 0) < 12_000


@pytest.mark.parametrize("result", [result_of(seconds=0.0), result_of(outcome("a", 0.0, 0.0), seconds=0.0)])
def test_a_run_of_nothing_is_drawn_too(result: ParallelExecutionResult[Any]) -> None:
    ET.fromstring(svg(result))
    json.loads(trace_json(result))
    assert "nightly" in page(result)


# The trace


def test_a_trace_has_an_event_for_each_agent_that_ran_and_counters() -> None:
    events = json.loads(trace_json(SEVERAL))["traceEvents"]
    complete = {event["name"]: event for event in events if event["ph"] == "X"}
    assert {name: (event["ts"], event["dur"], event["cat"]) for name, event in complete.items()} == {
        "task-a": (0, 4e6, "succeeded"),
        "task-b": (1e6, 2e6, "failed"),
        "task-c": (4e6, 5e6, "timed_out"),
    }
    assert complete["task-b"]["args"]["told"] == "ValueError: no"
    counters = [(event["name"], event["ts"], event["args"]) for event in events if event["ph"] == "C"]
    assert ("cost", 4e6, {"cost": 0.5}) in counters
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {"nightly", "lane 1", "lane 2"}
    assert {event["pid"] for event in events} == {1}


def test_events_of_a_lane_follow_each_other() -> None:
    events = [event for event in json.loads(trace_json(many(200, 7)))["traceEvents"] if event["ph"] == "X"]
    assert len(events) == 200
    for lane in range(7):
        inside = sorted((event["ts"], event["dur"]) for event in events if event["tid"] == lane)
        assert inside
        assert all(start + seconds <= later[0] for (start, seconds), later in itertools.pairwise(inside))


# The page, in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


class Opened:
    """A page in the browser; whatever it asks the network for, or complains of, is kept."""

    def __init__(self, browser: Browser, path: Path, **options: Any) -> None:
        self.page: Page = browser.new_page(**options)
        self.page.set_default_timeout(10_000)
        self.requested: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self._note(request))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.goto(path.as_uri())

    def _note(self, request: Request) -> None:
        self.requested.append(request.url)

    def told(self) -> str:
        return self.page.inner_text("#told")

    def bar(self, task: str) -> tuple[float, float]:
        """Return from where to where the bar of a task goes, as parts of the width there is."""
        row = self.page.locator(f'.row:has(b:text-is("agent-{task[-1]} / {task}"))')
        lane, bar = row.locator(".lane").bounding_box(), row.locator("u").bounding_box()
        assert lane is not None
        assert bar is not None
        start = (bar["x"] - lane["x"]) / lane["width"]
        return round(start, 2), round(start + bar["width"] / lane["width"], 2)


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Any]:
    pages: list[Opened] = []

    def show(result: ParallelExecutionResult[Any], **options: Any) -> Opened:
        path = tmp_path / f"{len(pages)}.html"
        path.write_text(page(result), encoding="ascii")
        pages.append(Opened(browser, path, **options))
        return pages[-1]

    yield show
    for shown in pages:
        shown.page.close()
        assert shown.complaints == []
        assert len(shown.requested) == 1  # the page itself


def test_the_page_shows_when_each_agent_waited_and_ran(opened: Any) -> None:
    shown = opened(SEVERAL)
    assert shown.page.inner_text("h1") == "nightly"
    assert shown.page.inner_text("#sums").startswith(
        "4 agents in 10.0 s: 1 succeeded, 1 failed, 1 timed out, 1 skipped"
    )
    assert shown.page.locator(".row").count() == 4
    assert [shown.bar(f"task-{name}") for name in "abc"] == [(0.0, 0.4), (0.1, 0.3), (0.4, 0.9)]
    assert shown.page.locator(".row em").all_inner_texts() == ["4.0 s", "failed 2.0 s", "timed out 5.0 s", "skipped"]
    names = shown.page.locator(".chart svg").evaluate_all("all => all.map(one => one.getAttribute('aria-label'))")
    assert names == ["running over time, at most 2", "waiting over time, at most 2", "cost over time, at most 0.75"]


def test_bars_and_axis_have_one_scale(opened: Any) -> None:
    shown = opened(many(100, 10))
    chart = shown.page.locator(".chart svg").first.bounding_box()
    lane = shown.page.locator(".lane").first.bounding_box()
    assert abs(chart["x"] - lane["x"]) <= 2
    assert abs(chart["width"] - lane["width"]) <= 2


def test_the_pointer_and_the_keys_tell_what_came_of_an_agent(opened: Any) -> None:
    shown = opened(SEVERAL)
    shown.page.hover(".row >> nth=1")
    assert "ValueError: no" in shown.told()
    shown.page.focus("#list")
    for _ in range(3):
        shown.page.keyboard.press("ArrowDown")
    assert "agent-c" in shown.told()
    assert "waited 4.0 s, ended after 9.0 s" in shown.told()
    assert "cost 0.25" in shown.told()
    assert shown.page.get_attribute("#list", "aria-activedescendant") == "row-2"
    assert shown.page.get_attribute("#row-2", "aria-selected") == "true"
    shown.page.click(".row >> nth=3")
    assert "never started" in shown.told()
    assert shown.page.get_attribute("#row-3", "aria-selected") == "true"
    shown.page.keyboard.press("Home")
    assert "10 tokens in, 2 out; cost 0.5" in shown.told()


def test_agents_can_be_filtered_found_and_sorted(opened: Any) -> None:
    shown = opened(SEVERAL)
    shown.page.get_by_role("button", name="1 succeeded").click()
    assert shown.page.locator(".row").count() == 3
    assert shown.page.get_by_role("button", name="1 succeeded").get_attribute("aria-pressed") == "false"
    shown.page.get_by_role("button", name="1 succeeded").click()
    shown.page.fill("#find", "valueerror")
    assert shown.page.locator(".row b").all_inner_texts() == ["agent-b / task-b"]
    shown.page.fill("#find", "nothing has this")
    assert shown.page.inner_text("#none") == "No agent fits."
    shown.page.fill("#find", "")
    shown.page.select_option("#sort", "long")
    first = [text[-1] for text in shown.page.locator(".row b").all_inner_texts()]
    assert first == ["c", "a", "b", "d"]


def test_keys_and_buttons_zoom_and_move_in_time(opened: Any) -> None:
    shown = opened(SEVERAL)
    shown.page.focus("#list")
    shown.page.keyboard.press("+")
    assert shown.bar("task-c") == (0.3, 1.3)  # 2.5 to 7.5 seconds are shown
    shown.page.keyboard.press("ArrowRight")
    assert shown.bar("task-c") == (0.1, 1.1)
    shown.page.keyboard.press("0")
    assert shown.bar("task-c") == (0.4, 0.9)
    shown.page.get_by_role("button", name="Zoom in").click()
    assert shown.bar("task-c") == (0.3, 1.3)
    shown.page.get_by_role("button", name="Zoom out").click()
    assert shown.bar("task-c") == (0.4, 0.9)


def test_of_a_thousand_agents_all_can_be_reached_and_few_are_drawn(opened: Any) -> None:
    shown = opened(many(1000, 20))
    assert shown.page.locator(".row").count() < 60
    shown.page.focus("#list")
    shown.page.keyboard.press("End")
    expect(shown.page.locator("#row-999")).to_be_in_viewport()
    assert "agent-999" in shown.told()
    assert shown.page.get_attribute("#row-999", "aria-setsize") == "1000"
    assert shown.page.inner_text("#statuses").split() == ["900", "succeeded", "100", "failed"]


@pytest.mark.parametrize(("width", "height"), [(390, 800), (1400, 900)])
def test_nothing_is_cut_off_at_the_side(opened: Any, width: int, height: int) -> None:
    shown = opened(many(300, 20), viewport={"width": width, "height": height})
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
    for box in shown.page.locator(".row").first.locator("b, .lane, em").all():
        found = box.bounding_box()
        assert found["x"] >= 0
        assert found["x"] + found["width"] <= width
    marks = [mark.bounding_box()["x"] for mark in shown.page.locator("#axis span").all()]
    assert len(marks) >= 2
    assert marks == sorted(set(marks))


def test_it_is_dark_where_the_reader_likes_it_dark(opened: Any) -> None:
    def brightness(scheme: str, style: str) -> int:
        colour = opened(SEVERAL, color_scheme=scheme).page.evaluate(f"getComputedStyle(document.body).{style}")
        return sum(map(int, re.findall(r"\d+", colour)))

    assert brightness("light", "backgroundColor") > brightness("light", "color")
    assert brightness("dark", "backgroundColor") < brightness("dark", "color")


def test_text_from_outside_is_text(opened: Any) -> None:
    result: ParallelExecutionResult[Any] = ParallelExecutionResult(
        group_id=HOSTILE,
        outcomes=[AgentOutcome(task_id=HOSTILE, agent_id=HOSTILE, error=HOSTILE, started_after_seconds=0.0)],
        total_duration_seconds=1.0,
    )
    shown = opened(result)
    shown.page.hover(".row")
    for place in ("h1", "#told"):
        text = shown.page.inner_text(place)
        assert "</script><img src=x onerror=alert(1)>" in text
        assert r"\x1b[2J\u202e&amp;{braces}" in text
    assert shown.page.locator("img").count() == 0
    assert HOSTILE not in page(result)
    ET.fromstring(svg(result))
    assert "\x1b" not in svg(result)


# The command


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report(SEVERAL)), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "start"), [("run.html", "<!doctype html>"), ("run.svg", "<svg "), ("run.trace.json", '{"displayTimeUnit"')]
)
def test_the_name_of_the_file_says_what_is_drawn(written: Path, tmp_path: Path, name: str, start: str) -> None:
    assert main(["timeline", str(written), "-o", str(tmp_path / name)]) == 0
    text = (tmp_path / name).read_text("ascii")
    assert text.startswith(start)
    assert "nightly" in text


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["{report}", "-o", "run.png"], 2, "--output must end with .html, .svg, .trace.json, got 'run.png'"),
        (["{report}"], 2, "output"),
        (["missing.json", "-o", "run.html"], 2, "missing.json: cannot be read"),
        (["{report}", "-o", "{folder}/missing/run.html"], 1, "cannot be written"),
        (["{journal}", "-o", "run.html"], 2, "is a journal; a timeline is drawn of what run --report writes"),
    ],
)
def test_what_cannot_be_drawn_is_told(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, told: str
) -> None:
    journal = tmp_path / "journal.db"
    journal.write_bytes(b"SQLite format 3\0" + bytes(200))
    names = {"report": written, "folder": tmp_path, "journal": journal}
    assert main(["timeline", *(argument.format(**names) for argument in arguments)]) == code
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run.html").exists()
