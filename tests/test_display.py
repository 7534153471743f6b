"""What people see: harmless text, the table, lines, JSON lines, and the live display on a recording console."""

import io
import json
import unicodedata
from typing import Any

import pytest

pytest.importorskip("rich")


from parallel_agents import (
    AgentOutcome,
    AgentRunResult,
    ChatMessage,
    OutcomeStatus,
    ParallelEvent,
    ParallelExecutionResult,
    TerminationReason,
    Usage,
)
from parallel_agents._commands import _choose_display
from parallel_agents._display import (
    LISTED_FAILURES,
    LISTED_OUTCOMES,
    Display,
    JsonDisplay,
    LineDisplay,
    make_console,
    print_summary,
)
from parallel_agents._words import ERROR_CHARACTERS, OUTPUT_CHARACTERS, duration_text, error_line, harmless, output_line
from parallel_agents.events import (
    PARALLEL_AGENT_START,
    PARALLEL_AGENT_WAITING,
    PARALLEL_GROUP_START,
    PARALLEL_PROGRESS_UPDATE,
)

HOSTILE = [
    "{braces} {0} {",
    "[/] [bold]markup[/bold] [link=http://evil]x[/link]",
    "<red>loguru</red>",
    ":smile: :skull:",
    "line\nfeed\r\nreturn\ttab",
    "\x1b]0;title\x07 \x1b[2J \x9b31m",
    "\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\",
    "bidi \u202egnp.exe\u2066 zero\u200bwidth \ufeff",
    "\udce9 lone surrogate",
    "nul \0 and unassigned \U000e0080",
    "x" * 10_000,
    "\x1b" * 10_000,
]


def succeeded(name: str = "a", **fields: Any) -> AgentOutcome[Any]:
    result: AgentRunResult[Any] = AgentRunResult(
        task_id=f"task-{name}", agent_id=f"agent-{name}", termination_reason=TerminationReason.COMPLETED, **fields
    )
    return AgentOutcome(
        task_id=result.task_id,
        agent_id=result.agent_id,
        result=result,
        started_after_seconds=0.0,
        duration_seconds=1.25,
    )


def failed(name: str = "b", error: str = "ValueError: no", **fields: Any) -> AgentOutcome[Any]:
    fields = {"started_after_seconds": 0.0, "duration_seconds": 2.0} | fields
    return AgentOutcome(task_id=f"task-{name}", agent_id=f"agent-{name}", error=error, **fields)


def result_of(*outcomes: AgentOutcome[Any], group_id: str = "group") -> ParallelExecutionResult[Any]:
    return ParallelExecutionResult(group_id=group_id, outcomes=outcomes, total_duration_seconds=3.0)


def summary(*outcomes: AgentOutcome[Any], group_id: str = "group") -> str:
    file = io.StringIO()
    print_summary(make_console(file), result_of(*outcomes, group_id=group_id))
    return file.getvalue()


def event(name: str, agent: str | None = None, **fields: Any) -> ParallelEvent:
    ids = {} if agent is None else {"agent_id": f"agent-{agent}", "task_id": f"task-{agent}"}
    return ParallelEvent(name=name, group_id="group", at_seconds=0.5, fields=fields, **ids)


def progress(total: int, *, running: int = 0, succeeded: int = 0, failed: int = 0, parked: int = 0) -> ParallelEvent:
    completed = succeeded + failed + parked
    return event(
        PARALLEL_PROGRESS_UPDATE,
        total=total,
        completed=completed,
        in_progress=running,
        succeeded=succeeded,
        failed=failed,
        parked=parked,
        pending=total - completed - running,
    )


def steers_a_terminal(text: str) -> bool:
    return any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text if c != "\n")


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_harmless_text_holds_nothing_that_steers_a_terminal(text: str) -> None:
    shown = harmless(text, 100)
    assert "\n" not in shown
    assert not steers_a_terminal(shown)
    assert len(shown) <= 100
    shown.encode()


def test_harmless_text_shows_what_it_replaced() -> None:
    assert harmless("a\x1b[1m\n\u202eb\udce9") == r"a\x1b[1m\n\u202eb\udce9"


def test_harmless_text_leaves_ordinary_text_of_any_language_alone() -> None:
    text = "Grüße, 你好\u3000世界, שלום, 😀 [x] {y} :smile:"
    assert harmless(text) == text
    assert harmless(text, len(text)) == text


def test_text_that_is_too_long_is_cut_and_the_cut_is_marked() -> None:
    assert harmless("abcdef", 5) == "abcd…"
    assert harmless("abcd\n", 5) == "abcd…"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (99.9, "99.9 s"), (100, "1:40"), (3599.9, "59:59"), (3661, "1:01:01")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_errors_are_one_short_line() -> None:
    assert error_line(failed(error="two\nlines\t\x1b[1m")) == r"two lines \x1b[1m"
    assert len(error_line(failed(error="x" * 10_000))) == ERROR_CHARACTERS
    assert error_line(succeeded()) == ""


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (None, ""),
        ("two\nlines\t\x1b[1m", r"two lines \x1b[1m"),
        ({"mood": "größer", "n": [1]}, '{"mood": "größer", "n": [1]}'),
        (b"x", '{"$repr": "b\'x\'", "$type": "bytes"}'),
        ("x" * 10_000, "x" * (OUTPUT_CHARACTERS - 1) + "…"),
    ],
)
def test_an_output_is_one_harmless_short_line(output: object, line: str) -> None:
    result: AgentRunResult[object] = AgentRunResult(
        task_id="t", agent_id="a", termination_reason=TerminationReason.COMPLETED, output=output
    )
    outcome = AgentOutcome(task_id="t", agent_id="a", result=result)
    assert output_line(outcome) == line
    assert line in summary(outcome)


def test_a_failed_result_says_its_message_or_how_it_ended() -> None:
    def outcome(**fields: Any) -> AgentOutcome[Any]:
        return AgentOutcome(task_id="t", agent_id="a", result=AgentRunResult(task_id="t", agent_id="a", **fields))

    assert error_line(outcome(termination_reason=TerminationReason.ERROR, error_message="exit code 3")) == "exit code 3"
    assert error_line(outcome(termination_reason=TerminationReason.MAX_TURNS)) == "max_turns"
    asks = (ChatMessage(role="assistant", content="May I\nsend it?"),)
    assert error_line(outcome(termination_reason=TerminationReason.PARKED, messages=asks)) == "May I send it?"
    assert error_line(outcome(termination_reason=TerminationReason.PARKED)) == "waits for a person"


def test_the_table_has_a_row_for_each_outcome_and_the_sums() -> None:
    late = failed("c", "Timed out after 2 s", status=OutcomeStatus.TIMED_OUT)
    never = failed("d", "Shutdown in progress", status=OutcomeStatus.REJECTED, started_after_seconds=None)
    text = summary(succeeded("a"), failed("b"), late, never)
    rows = [line.split() for line in text.splitlines()]
    assert rows[0] == ["agent", "task", "status", "time", "result"]
    assert rows[1] == ["agent-a", "task-a", "succeeded", "1.2", "s"]
    assert rows[2] == ["agent-b", "task-b", "failed", "2.0", "s", "ValueError:", "no"]
    assert rows[3][2:6] == ["timed", "out", "2.0", "s"]
    assert rows[4][2:4] == ["rejected", "-"]
    assert text.splitlines()[-1] == "group: 4 agents in 3.0 s: 1 succeeded, 1 failed, 1 timed out, 1 rejected"


def test_a_narrow_terminal_cuts_the_results_and_leaves_the_rest_whole() -> None:
    file = io.StringIO()
    console = make_console(file)
    console.width = 60
    print_summary(console, result_of(succeeded("one", output="x" * 300), failed("two", "e" * 300)))
    first, second = file.getvalue().splitlines()[1:3]
    for line, agent, status in ((first, "agent-one", "succeeded"), (second, "agent-two", "failed")):
        assert line.split()[0] == agent
        assert status in line.split()
        assert line.rstrip().endswith("…")
        assert line.count("…") == 1


def test_the_sums_tell_what_was_spent() -> None:
    text = summary(succeeded(usage=Usage(input_tokens=10, output_tokens=5, cost=0.25)))
    assert text.splitlines()[-1] == "group: 1 agent in 3.0 s: 1 succeeded; 15 tokens, cost 0.25"


def test_a_large_table_lists_only_what_did_not_succeed() -> None:
    many = [succeeded(str(number)) for number in range(LISTED_OUTCOMES)]
    text = summary(*many, failed("x"))
    assert "agent-x" in text
    assert "agent-7" not in text
    assert f"{LISTED_OUTCOMES} more are not listed" in text


def test_a_large_table_of_failures_ends_somewhere() -> None:
    text = summary(*[failed(str(number)) for number in range(LISTED_FAILURES + 5)])
    assert text.count("ValueError") == LISTED_FAILURES
    assert "5 more are not listed" in text
    assert f"{LISTED_FAILURES + 5} failed" in text


def test_a_large_table_in_which_all_succeeded_is_its_sums() -> None:
    text = summary(*[succeeded(str(number)) for number in range(1000)])
    assert text.splitlines()[-1] == "group: 1000 agents in 3.0 s: 1000 succeeded"
    assert len(text.splitlines()) == 2


@pytest.mark.proves("V2")
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_ids_and_errors_are_harmless_in_the_table(text: str) -> None:
    outcome: AgentOutcome[Any] = AgentOutcome(task_id=text, agent_id=text, error=text)
    shown = summary(outcome, group_id=text)
    assert not steers_a_terminal(shown)
    assert len(shown.splitlines()) == 4
    assert harmless(text, 20)[:19] in shown


@pytest.mark.proves("V2")
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_ids_are_harmless_in_lines(text: str) -> None:
    start = ParallelEvent(
        name=PARALLEL_GROUP_START, group_id=text, at_seconds=0.0, fields={"agent_count": 1, "max_concurrency": 1}
    )
    agent = ParallelEvent(name=PARALLEL_AGENT_START, group_id=text, task_id=text, agent_id=text, at_seconds=0.0)
    file = io.StringIO()
    display = LineDisplay(file)
    for each in (start, agent, progress(1, running=1)):
        display.on_event(each)
    display.on_outcome(AgentOutcome(task_id=text, agent_id=text, error=text, started_after_seconds=0.0))
    assert len(file.getvalue().splitlines()) == 3
    assert not steers_a_terminal(file.getvalue())
    assert harmless(text, 20)[:19] in file.getvalue()


def test_lines_tell_each_start_and_each_end() -> None:
    file = io.StringIO()
    with LineDisplay(file) as display:
        display.on_event(event(PARALLEL_GROUP_START, agent_count=3, max_concurrency=2))
        display.on_event(progress(3))
        display.on_event(event(PARALLEL_AGENT_START, "a"))
        display.on_event(event(PARALLEL_AGENT_START, "b"))
        display.on_outcome(failed("b"))
        display.on_outcome(succeeded("a"))
        display.on_outcome(
            failed("c", "Shutdown in progress", status=OutcomeStatus.REJECTED, started_after_seconds=None)
        )
        display.say("that was all")
    assert file.getvalue().splitlines() == [
        "group: 3 agents, at most 2 at a time",
        "[0/3] started: agent-a on task-a",
        "[0/3] started: agent-b on task-b",
        "[1/3] failed: agent-b on task-b, 2.0 s: ValueError: no",
        "[2/3] succeeded: agent-a on task-a, 1.2 s",
        "that was all",
    ]


def test_those_that_wait_for_claims_are_shown_with_what_and_whom_they_wait_for() -> None:
    file = io.StringIO()
    LineDisplay(file).on_event(event(PARALLEL_AGENT_WAITING, "a", resource="path:/x/\x1b[2J", holder="agent-b"))
    assert file.getvalue() == "[0/0] waiting: agent-a on task-a, for agent-b: path:/x/\\x1b[2J\n"


def test_each_event_is_one_line_of_json() -> None:
    file = io.StringIO()
    display = JsonDisplay(file)
    for text in HOSTILE:
        display.on_event(ParallelEvent(name=PARALLEL_AGENT_START, group_id=text, task_id=text, at_seconds=1.5))
    lines = file.getvalue().splitlines()
    assert [json.loads(line)["task_id"] for line in lines] == HOSTILE
    assert file.getvalue().isascii()


class NobodyReads(io.StringIO):
    def write(self, text: str, /) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("kind", [LineDisplay, JsonDisplay])
def test_a_reader_that_went_away_does_not_disturb_the_run(kind: type[LineDisplay] | type[JsonDisplay]) -> None:
    display = kind(NobodyReads())
    display.on_event(event(PARALLEL_GROUP_START, agent_count=1, max_concurrency=None))
    display.on_event(event(PARALLEL_AGENT_START, "a"))
    display.on_outcome(succeeded())


def test_the_quiet_display_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with _choose_display(quiet=True, json_events=False) as display:
        assert type(display) is Display
        display.on_event(event(PARALLEL_AGENT_START, "a"))
        display.on_outcome(succeeded())
        display.say("something")
    assert capsys.readouterr() == ("", "")


def test_what_is_no_terminal_gets_lines() -> None:
    assert type(_choose_display(quiet=False, json_events=False)) is LineDisplay
    assert type(_choose_display(quiet=False, json_events=True)) is JsonDisplay


def test_a_console_that_nobody_reads_falls_silent() -> None:
    console = make_console(NobodyReads())
    console.print("x")
    assert console.quiet


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured, plain = Terminal(), Terminal()
    print_summary(make_console(coloured), result_of(failed()))
    monkeypatch.setenv("NO_COLOR", "1")
    print_summary(make_console(plain), result_of(failed()))
    assert "\x1b[31m" in coloured.getvalue()
    assert "\x1b[31m" not in plain.getvalue()
