"""ProcessEngine, with real programs: nothing here is faked but the hurdles that this machine does not have."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextvars import copy_context
from pathlib import Path
from typing import Any

import anyio
import pytest

from parallel_agents._context import RunContext, _current
from parallel_agents._drive import drive
from parallel_agents._errors import EngineUnavailableError
from parallel_agents._models import AgentAssignment, AgentIdentity, ChatMessage, Task, Usage
from parallel_agents._outcomes import AgentRunResult, TerminationReason
from parallel_agents.engines import AgentEngine, _output, _program
from parallel_agents.engines.process import ProcessEngine

pytestmark = pytest.mark.anyio

WAIT_SECONDS = 60.0
"""For a program to do what it does at once; only reached when something is wrong."""

GRANDCHILD_THAT_IGNORES_SIGTERM = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(sys.argv[1], "w") as pids:
    print(os.getpid(), file=pids)
time.sleep(1000)
"""


def assignment(description: str = "", model: str | None = None, **inputs: Any) -> AgentAssignment:
    return AgentAssignment(
        identity=AgentIdentity(id="a1", name="Ada", role="reader", instructions="Read.", model=model),
        task=Task(id="t1", title="One", description=description, inputs=inputs),
    )


def python(code: str, *arguments: str, **options: Any) -> ProcessEngine:
    """An engine whose program is *code*; braces in it are meant as they stand."""
    return ProcessEngine([sys.executable, "-c", code.replace("{", "{{").replace("}", "}}"), *arguments], **options)


def context(of: AgentAssignment) -> RunContext:
    return RunContext(group_id="g", assignment=of, shutdown_requested=lambda: False)


async def run(engine: ProcessEngine, of: AgentAssignment | None = None) -> AgentRunResult[Any]:
    of = assignment() if of is None else of
    _current.set(context(of))
    with anyio.fail_after(WAIT_SECONDS):
        return await engine.run(of)


def text(result: AgentRunResult[Any]) -> str:
    assert isinstance(result.output, str)
    return result.output


async def cancelled_when(
    engine: ProcessEngine, ready: Callable[[], Awaitable[None]], metered: RunContext | None = None
) -> None:
    """Cancel a run as soon as *ready* returns, and make sure that the cancellation goes on."""
    went_on = False

    async def victim() -> None:
        nonlocal went_on
        run_context = metered or context(assignment())
        _current.set(run_context)
        try:
            await engine.run(run_context.assignment)
        except anyio.get_cancelled_exc_class():
            went_on = True
            raise

    with anyio.fail_after(WAIT_SECONDS):
        async with anyio.create_task_group() as group:
            group.start_soon(victim)
            await ready()
            group.cancel_scope.cancel()
    assert went_on


def line_in(path: Path) -> Callable[[], Awaitable[None]]:
    """A wait for a program to have written a whole line into *path*."""

    async def wait() -> None:
        while not (path.exists() and path.read_text().endswith("\n")):
            await anyio.sleep(0.005)

    return wait


def is_alive(pid: int) -> bool:
    """Whether *pid* is a process that is more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def hold_up_the_loop_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.005)


async def gone(pid: int) -> None:
    """Wait for a killed grandchild to disappear; whoever adopted it reaps it in its own time."""
    with anyio.fail_after(WAIT_SECONDS):
        while is_alive(pid):
            await anyio.sleep(0.005)


def own_children() -> set[int]:
    return {
        int(child) for children in Path("/proc/self/task").glob("*/children") for child in children.read_text().split()
    }


@pytest.fixture(autouse=True)
def _no_child_survives() -> Iterator[None]:
    before, descriptors = own_children(), len(list(Path("/proc/self/fd").iterdir()))
    yield
    assert own_children() <= before, "a program is alive, or dead and not reaped"
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors, "a pipe is still open"


# What comes of a program.


async def test_exit_code_0_is_a_completed_result_whose_output_is_what_was_printed() -> None:
    result = await run(python("import sys; print('out'); print('err', file=sys.stderr)"))
    assert (result.task_id, result.agent_id) == ("t1", "a1")
    assert result.termination_reason is TerminationReason.COMPLETED
    assert result.output == "out\n"
    assert result.error_message is None
    assert result.duration_seconds > 0


def test_a_process_engine_is_an_engine_and_its_repr_shows_no_arguments() -> None:
    engine = ProcessEngine(["tool", "--password=hunter2"], env={"TOKEN": "hunter2"})
    assert isinstance(engine, AgentEngine)
    assert repr(engine) == "ProcessEngine('tool', protocol='text')"


async def test_another_exit_code_is_an_error_with_the_last_lines_of_stderr_and_keeps_the_output() -> None:
    code = "import sys; print('half'); print(*range(50), sep='\\n', file=sys.stderr); sys.exit(3)"
    result = await run(python(code))
    assert result.termination_reason is TerminationReason.ERROR
    assert result.error_message == "exit code 3: " + "\n".join(str(number) for number in range(30, 50))
    assert result.output == "half\n"


async def test_an_exit_code_without_a_word_on_stderr_stands_alone() -> None:
    assert (await run(python("raise SystemExit(4)"))).error_message == "exit code 4"


async def test_the_last_lines_of_stderr_are_bounded_in_characters_too() -> None:
    result = await run(python("import sys; sys.exit('x' * 100_000 + 'end')"))
    assert result.error_message == "exit code 1: " + "x" * 1997 + "end"


@pytest.mark.parametrize(
    ("signum", "name"), [(signal.SIGSEGV, "SIGSEGV"), (signal.SIGKILL, "SIGKILL"), (40, "signal 40")]
)
async def test_a_program_killed_by_a_signal_is_an_error_that_names_the_signal(signum: int, name: str) -> None:
    code = f"import os, sys; print('oh', file=sys.stderr, flush=True); os.kill(os.getpid(), {int(signum)})"
    assert (await run(python(code))).error_message == f"killed by {name}: oh"


async def test_a_program_that_does_not_exist_is_an_error_that_names_it() -> None:
    result = await run(ProcessEngine(["no-such-program"]))
    assert result.error_message == "cannot start 'no-such-program': No such file or directory"


async def test_a_program_that_is_not_executable_is_an_error_that_names_it(tmp_path: Path) -> None:
    program = tmp_path / "tool"
    program.write_text("#!/bin/sh\n")
    result = await run(ProcessEngine([str(program)]))
    assert result.error_message is not None
    assert result.error_message.startswith(f"cannot start {str(program)!r}"[:60])
    assert result.error_message.endswith("Permission denied")


async def test_a_working_folder_that_does_not_exist_is_an_error_that_names_it() -> None:
    result = await run(ProcessEngine([sys.executable], cwd="/no/such/folder"))
    assert result.error_message is not None
    assert result.error_message.endswith("No such file or directory: '/no/such/folder'")


async def test_a_program_whose_arguments_are_too_long_is_an_error() -> None:
    result = await run(ProcessEngine(["/bin/true", "{task.description}"]), assignment("x" * 10_000_000))
    assert result.error_message == "cannot start '/bin/true': Argument list too long"


async def test_the_engine_works_where_exits_cannot_be_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(pid: int) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "pidfd_open", refused)
    assert (await run(python("print('seen')"))).output == "seen\n"


async def test_a_program_reaped_by_somebody_else_is_an_error_and_never_a_success() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        result = await run(python("print('done')"))
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert result.error_message is not None
    assert "exit status is unknown" in result.error_message
    assert result.output == "done\n"


async def test_a_run_works_inside_a_driven_coroutine_with_a_context_of_its_own() -> None:
    of = assignment()
    own = copy_context()
    own.run(_current.set, context(of))
    with anyio.fail_after(WAIT_SECONDS):
        result = await drive(own, python("print('driven')").run(of))
    assert result.output == "driven\n"


# The command line.


async def arguments_seen(item: str, of: AgentAssignment) -> list[str]:
    code = "import sys; sys.stdout.write('\\0'.join(sys.argv[1:]))"
    return text(await run(python(code, item, "after"), of)).split("\0")


@pytest.mark.parametrize(
    ("item", "seen"),
    [
        ("{task.id}:{task_id}", "t1:t1"),
        ("{agent.id}:{agent_id}", "a1:a1"),
        ("{task.title} {task.description}", "One Do it."),
        ("{agent.name}, {agent.role}, {agent.instructions}", "Ada, reader, Read."),
        ("--model={agent.model}", "--model=m"),
        ("{task.inputs[path]}", "src/a b.py"),
        ("{task.inputs[deep][er][1]}", "two"),
        ("{task.inputs[a:b!r]}", "odd"),
        ("{task.inputs[number]}{task.inputs[flag]}{task.inputs[nothing]}", "7truenull"),
        ("{task.inputs[deep]}", '{"er": [1, "two"]}'),
        ("{{task.id}} }}{{", "{task.id} }{"),
        ("", ""),
    ],
)
async def test_placeholders_are_filled_inside_their_item(item: str, seen: str) -> None:
    inputs = {
        "path": "src/a b.py",
        "deep": {"er": [1, "two"]},
        "number": 7,
        "flag": True,
        "nothing": None,
        "a:b!r": "odd",
    }
    assert await arguments_seen(item, assignment("Do it.", model="m", **inputs)) == [seen, "after"]


async def test_all_inputs_can_be_handed_over_as_one_json_table() -> None:
    of = assignment(path="ä", count=2)
    assert await arguments_seen("{task.inputs}", of) == ['{"path": "ä", "count": 2}', "after"]


@pytest.mark.parametrize(
    "value",
    [
        "$(touch pwned); `touch pwned` && $HOME > pwned | * ? ~",
        "-rf",
        "--help",
        "two words\nand lines\t'\"\\",
        "{task.id} {{ }} {0.__class__}",
        "",
        "é\u202e😀",
        "\udcff",
    ],
)
async def test_a_value_stays_one_argument_and_is_neither_expanded_nor_evaluated(value: str, tmp_path: Path) -> None:
    code = "import os, sys; sys.stdout.buffer.write(b'\\0'.join(map(os.fsencode, sys.argv[1:])))"
    of = assignment(value=value)
    output = (await run(python(code, "{task.inputs[value]}", "after", cwd=tmp_path), of)).output
    assert output == os.fsencode(value).decode(errors="replace") + "\0after"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        ("{task.owner}", "command[1]: unknown placeholder {task.owner}"),
        ("{}", "command[1]: unknown placeholder {}"),
        ("{0}", "command[1]: unknown placeholder {0}"),
        ("{task}", "command[1]: unknown placeholder {task}"),
        ("{task.id.__class__}", "command[1]: unknown placeholder"),
        ("{task.__class__.__init__.__globals__}", "command[1]: unknown placeholder"),
        ("{task.id[0]}", "command[1]: unknown placeholder {task.id[0]}"),
        ("{task.inputs[a].b}", "command[1]: unknown placeholder"),
        ("{task.inputs[]}", "command[1]: unknown placeholder"),
        ("{task.id!r}", "command[1]: {task.id} must stand alone"),
        ("{task.id:>9}", "command[1]: {task.id} must stand alone"),
        ("{task.id:{task.id}}", "command[1]: {task.id} must stand alone"),
        ("{task.id", "command[1]: expected '}' before end of string; {{ and }} are literal braces"),
        ("}", "command[1]: Single '}' encountered in format string"),
        ("a\0b", "command[1] must not hold NUL characters"),
    ],
)
def test_a_placeholder_that_cannot_exist_is_refused_when_the_engine_is_made(item: str, problem: str) -> None:
    with pytest.raises(ValueError) as refused:
        ProcessEngine(["tool", item])
    assert str(refused.value).startswith(problem)


@pytest.mark.parametrize("place", ["cwd", "stdin", "env"])
def test_placeholders_are_refused_wherever_they_stand(place: str) -> None:
    options: dict[str, Any] = {place: {"KEY": "{nobody}"} if place == "env" else "{nobody}"}
    with pytest.raises(ValueError, match=r"^(cwd|stdin|env\[KEY\]): unknown placeholder {nobody}"):
        ProcessEngine(["tool"], **options)


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        ("{task.inputs[path]}", "{task.inputs[path]} has no value: in the inputs of task 't1' there is no [path]"),
        ("{task.inputs[a][b]}", "{task.inputs[a][b]} has no value: in the inputs of task 't1' there is no [b]"),
        ("{task.inputs[a][b][c]}", "there is no [b]"),
        ("{task.inputs[list][9]}", "there is no [9]"),
        ("{task.inputs[list][x]}", "there is no [x]"),
        ("{task.inputs[list][-1]}", "there is no [-1]"),
        ("{agent.model}", "{agent.model} has no value: agent 'a1' has no model"),
        ("{task.inputs[nul]}", "must not hold NUL characters, which no program can be given; it is filled from {task"),
        ("{task.inputs[half]}", "cannot be encoded (surrogates not allowed); it is filled from {task.inputs[half]}"),
    ],
)
async def test_a_value_that_an_assignment_lacks_is_refused_before_anything_starts(item: str, problem: str) -> None:
    of = assignment(a={"x": "text"}, list=[1], nul="\0", half="\ud800")
    for place, engine in {
        "command[1]": ProcessEngine(["/no/such/program", item]),
        "cwd": ProcessEngine(["/no/such/program"], cwd=item),
        "stdin": ProcessEngine(["/no/such/program"], stdin=item),
        "env[KEY]": ProcessEngine(["/no/such/program"], env={"KEY": item}),
    }.items():
        with pytest.raises(ValueError) as refused:
            engine.check(of)
        assert str(refused.value).startswith(place)
        assert problem in str(refused.value)
        with pytest.raises(ValueError):
            await run(engine, of)


def test_an_assignment_that_has_every_value_passes_the_check() -> None:
    ProcessEngine(["tool", "{task.inputs[path]}"], stdin="{task.description}").check(assignment(path="x"))


@pytest.mark.parametrize(
    ("error", "problem", "options"),
    [
        (TypeError, "command must be a list of the program and its arguments, got 'ls -l'", {"command": "ls -l"}),
        (TypeError, "command must be a list", {"command": b"ls"}),
        (TypeError, "command must be a list", {"command": 7}),
        (TypeError, "command[1] must be a string, got 7 (int)", {"command": ["ls", 7]}),
        (ValueError, "command must start with a program", {"command": []}),
        (ValueError, "command must start with a program", {"command": [" "]}),
        (TypeError, "cwd must be a string, got 7 (int)", {"cwd": 7}),
        (TypeError, "env must be a mapping", {"env": ["A=b"]}),
        (TypeError, "env[A] must be a string, got 1 (int)", {"env": {"A": 1}}),
        (TypeError, "a name in env must be a string", {"env": {1: "A"}}),
        (ValueError, "a name in env must not be empty nor hold '=' or NUL, got 'A=B'", {"env": {"A=B": ""}}),
        (TypeError, "inherit_env must be a list of names, got 'PATH'", {"inherit_env": "PATH"}),
        (ValueError, "a name in inherit_env must not be empty", {"inherit_env": [""]}),
        (TypeError, "stdin must be a string", {"stdin": b"text"}),
        (ValueError, "protocol must be 'text' or 'jsonl', got 'xml'", {"protocol": "xml"}),
        (ValueError, "output_limit_bytes must be >= 1, got 0", {"output_limit_bytes": 0}),
        (TypeError, "output_limit_bytes must be an integer", {"output_limit_bytes": 1.5}),
        (ValueError, "idle_timeout_seconds must be > 0, got 0", {"idle_timeout_seconds": 0}),
        (ValueError, "terminate_grace_seconds must be >= 0, got -1", {"terminate_grace_seconds": -1}),
        (TypeError, "terminate_grace_seconds must be a number, got True", {"terminate_grace_seconds": True}),
    ],
)
def test_arguments_of_a_wrong_type_or_value_are_refused(
    error: type[Exception], problem: str, options: dict[str, Any]
) -> None:
    with pytest.raises(error) as refused:
        ProcessEngine(**{"command": ["ls"], **options})
    assert str(refused.value).startswith(problem)


def test_a_system_that_cannot_look_at_an_exit_without_reaping_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "waitid")
    with pytest.raises(EngineUnavailableError, match="waitid"):
        ProcessEngine(["ls"])


# Folder, environment, standard input.


async def test_the_working_folder_may_hold_placeholders(tmp_path: Path) -> None:
    (tmp_path / "t1").mkdir()
    code = "import os; print(os.getcwd(), end='')"
    assert (await run(python(code, cwd=tmp_path / "{task.id}"))).output == str(tmp_path / "t1")


async def environment_seen(**options: Any) -> Mapping[str, str]:
    # From the kernel: Python itself adds LC_CTYPE to os.environ where no language is set.
    code = "import sys; sys.stdout.write(open('/proc/self/environ').read())"
    entries = text(await run(python(code, **options))).split("\0")
    return dict(entry.split("=", 1) for entry in entries if entry)


async def test_the_environment_is_the_allow_list_and_what_is_given_and_no_secret_comes_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("API_KEY", "LD_PRELOAD_NOT", "PYTHONPATH", "LC_ALL"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("HOME", "/home/of/ada")
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.delenv("LANG", raising=False)
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    seen = await environment_seen(env={"TASK": "{task.id}", "HOME": "/else"})
    assert seen == {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "HOME": "/else", "TASK": "t1"}


async def test_a_variable_is_inherited_when_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "given on purpose")
    assert await environment_seen(inherit_env=["API_KEY", "NOT_SET"]) == {"API_KEY": "given on purpose"}
    assert await environment_seen(inherit_env=[]) == {}


async def test_standard_input_is_empty_unless_something_is_given() -> None:
    code = "import sys; print(repr(sys.stdin.read()))"
    assert (await run(python(code))).output == "''\n"
    given = await run(python(code, stdin="{task.description}!"), assignment("Ümlaut"))
    assert given.output == "'Ümlaut!'\n"


async def test_a_large_input_is_fed_while_the_output_is_read() -> None:
    code = "import sys\nfor line in sys.stdin: print(line, end='')"
    lines = "a line of text\n" * 100_000
    result = await run(python(code, stdin="{task.description}", output_limit_bytes=len(lines)), assignment(lines))
    assert result.output == lines


async def test_a_program_that_closes_its_input_early_is_no_error() -> None:
    code = "import os; os.close(0); print('enough')"
    result = await run(python(code, stdin="{task.description}"), assignment("x" * 10_000_000))
    assert result.is_success
    assert result.output == "enough\n"


async def test_a_program_that_exits_without_reading_its_input_is_no_error() -> None:
    result = await run(python("print('done')", stdin="{task.description}"), assignment("x" * 10_000_000))
    assert result.output == "done\n"


# Output.


async def test_of_much_output_the_end_is_kept_and_the_cut_is_marked() -> None:
    code = "import sys; sys.stdout.write('a' * 5000 + 'end'); sys.stderr.write('b' * 5000 + 'END'); sys.exit(1)"
    result = await run(python(code, output_limit_bytes=10))
    assert result.output == "[... 4993 bytes cut ...]\naaaaaaaend"
    assert result.error_message == "exit code 1: [... 4993 bytes cut ...]\nbbbbbbbEND"


async def test_output_of_just_the_limit_is_not_cut() -> None:
    assert (await run(python("print('123456789')", output_limit_bytes=10))).output == "123456789\n"


async def test_a_cut_inside_a_character_takes_the_whole_character() -> None:
    result = await run(python("import sys; sys.stdout.buffer.write('aé€z'.encode())", output_limit_bytes=3))
    assert result.output == "[... 6 bytes cut ...]\nz"


async def test_bytes_that_are_no_text_are_replaced() -> None:
    result = await run(python("import sys; sys.stdout.buffer.write(b'a\\xff\\xfeb\\x80' * 2)"))
    assert result.output == "a\ufffd\ufffdb\ufffda\ufffd\ufffdb\ufffd"


@pytest.mark.parametrize("protocol", ["text", "jsonl"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("line", ["'x' * 1_000_000", "'x' * 99 + '\\n'"], ids=["one long line", "many lines"])
async def test_a_hundred_megabytes_of_output_take_little_memory(protocol: Any, stream: str, line: str) -> None:
    code = f"import sys; chunk = ({line}) * (1_000_000 // len({line}))\nfor _ in range(100): sys.{stream}.write(chunk)"
    tail = _output.Tail.add
    largest = 0

    def measured(self: _output.Tail, data: bytes) -> None:
        nonlocal largest
        tail(self, data)
        largest = max(largest, len(self._data))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_output.Tail, "add", measured)
        result = await run(python(code, protocol=protocol, output_limit_bytes=100_000))
    assert result.is_success
    assert 100_000 <= largest <= 400_000
    assert text(result).startswith("[... 99900000 bytes cut ...]\n") == (stream == "stdout")


# The JSON-lines protocol.


async def say(*lines: str | bytes, exit_code: int = 0, limit: int = 1000) -> tuple[AgentRunResult[Any], RunContext]:
    data = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    engine = python(
        "import sys; sys.stdout.buffer.write(bytes.fromhex(sys.stdin.read())); sys.exit(int(sys.argv[1]))",
        str(exit_code),
        stdin=data.hex(),
        protocol="jsonl",
        output_limit_bytes=limit,
    )
    metered = context(assignment())
    _current.set(metered)
    with anyio.fail_after(WAIT_SECONDS):
        return await engine.run(metered.assignment), metered


async def test_lines_of_the_protocol_become_usage_messages_and_output() -> None:
    result, metered = await say(
        "starting",
        '{"type": "usage", "input_tokens": 10, "output_tokens": 2, "requests": 1, "cost": 0.5}',
        '{"type": "message", "role": "assistant", "content": "Héllo"}',
        ' {"type": "usage", "input_tokens": 5}\r',
        '{"type": "message", "role": "user"}',
        '{"type": "result", "output": "draft"}',
        '{"type": "result", "output": {"found": [1, 2.5, null, "x"]}}',
    )
    assert result.is_success
    assert result.output == {"found": [1, 2.5, None, "x"]}
    assert result.messages == (ChatMessage(role="assistant", content="Héllo"), ChatMessage(role="user"))
    assert result.usage == metered.usage == Usage(input_tokens=15, output_tokens=2, requests=1, cost=0.5)


async def test_a_result_holds_what_this_call_spent_and_not_what_was_spent_before() -> None:
    engine = python('print(\'{"type": "usage", "requests": 1}\')', protocol="jsonl")
    metered = context(assignment())
    metered.record_usage(Usage(requests=5))
    _current.set(metered)
    with anyio.fail_after(WAIT_SECONDS):
        result = await engine.run(metered.assignment)
    assert result.usage == Usage(requests=1)
    assert metered.usage == Usage(requests=6)


async def test_a_result_of_null_is_a_result() -> None:
    result, _ = await say("text", '{"type": "result", "output": null}')
    assert result.is_success
    assert result.output is None


async def test_lines_that_are_not_of_the_protocol_are_the_output_when_no_result_came() -> None:
    lines = [
        "plain",
        '{"type": "log", "x": 1}',
        '{"type": ["usage"]}',
        '{"no": "type"}',
        "{broken",
        "[1]",
        "7",
        "",
        "end",
    ]
    result, _ = await say(*lines, '{"type": "usage", "requests": 1}')
    assert result.is_success
    assert result.output == "\n".join(lines) + "\n"


async def test_bytes_that_are_no_text_are_replaced_in_the_protocol_too() -> None:
    result, _ = await say(b'{"type": "result", "output": "a\xffb"}')
    assert result.output == "a\ufffdb"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"type": "usage", "input_tokens": -1}', "input_tokens must be >= 0, got -1"),
        ('{"type": "usage", "input_tokens": "7"}', "input_tokens must be an integer, got '7' (str)"),
        ('{"type": "usage", "requests": true}', "requests must be an integer, got True (bool)"),
        ('{"type": "usage", "cost": NaN}', "cost must be finite, got nan"),
        ('{"type": "usage", "cost": 1e999}', "cost must be finite, got inf"),
        ('{"type": "usage", "input_token": 1}', "unknown key 'input_token', there are input_tokens, output_tokens"),
        (f'{{"type": "usage", "requests": {"9" * 5000}}}', "a number is too long, or the nesting too deep"),
        ('{"type": "message", "content": "x"}', "role is missing"),
        ('{"type": "message", "role": "robot", "content": "x"}', "role must be one of"),
        ('{"type": "message", "role": "user", "content": 5}', "content must be a string, got 5 (int)"),
        ('{"type": "result"}', "output is missing"),
        ('{"type": "result", "output": [Infinity]}', "output[0] must be finite, got inf"),
        ('{"type": "result", "output": ' + "[" * 102 + "]" * 102 + "}", "output is nested more than 100 levels deep"),
        ('{"type": "result", "output": ' + "[" * 50_000 + "]" * 50_000 + "}", "a number is too long, or the nesting"),
        ('{"type": "result", "output": "' + "x" * 200_000 + '"}', "longer than output_limit_bytes (150000)"),
    ],
)
async def test_a_malformed_object_of_the_protocol_is_an_error_that_names_its_line(line: str, problem: str) -> None:
    result, metered = await say("first", line, '{"type": "usage", "requests": 1}', '{"type": "result"}', limit=150_000)
    assert result.termination_reason is TerminationReason.ERROR
    assert result.error_message is not None
    assert result.error_message.startswith(f"line 2 of stdout: {problem}")
    assert metered.usage.requests == 1, "what comes after it is still metered"


async def test_a_bad_exit_and_a_malformed_line_are_both_told() -> None:
    result, _ = await say('{"type": "result"}', '{"type": "result", "output": 1}', exit_code=3)
    assert result.error_message == "exit code 3; line 1 of stdout: output is missing"
    assert result.output == 1


async def test_messages_beyond_the_limit_are_cut_from_the_front_and_the_cut_is_marked() -> None:
    lines = [f'{{"type": "message", "role": "user", "content": "{number:090d}"}}' for number in range(100)]
    result, _ = await say(*lines)
    mark, *kept = result.messages
    assert mark == ChatMessage(role="system", content=f"[... {100 - len(kept)} messages cut ...]")
    assert [int(message.content) for message in kept] == list(range(100 - len(kept), 100))
    assert 5 <= len(kept) <= 10


async def test_a_long_line_that_is_no_object_is_text_and_the_lines_after_it_count() -> None:
    result, _ = await say("x" * 5000, '{"type": "usage", "requests": 1}', "end")
    assert result.is_success
    assert result.usage.requests == 1
    assert text(result).startswith("[... ")
    assert text(result).endswith("x\nend")


async def test_usage_that_was_told_is_kept_when_the_run_is_cancelled(tmp_path: Path) -> None:
    code = (
        'import sys, time; print(\'{"type": "usage", "requests": 1}\', flush=True);'
        "open(sys.argv[1], 'w').write('told\\n'); time.sleep(1000)"
    )
    metered = context(assignment())
    ready = tmp_path / "ready"
    await cancelled_when(python(code, str(ready), protocol="jsonl"), line_in(ready), metered)
    assert metered.usage == Usage(requests=1)


# Silence.


async def test_a_program_that_prints_nothing_for_too_long_is_ended() -> None:
    code = "import time; print('working', flush=True); time.sleep(1000)"
    result = await run(python(code, idle_timeout_seconds=1.5))
    assert result.error_message == "no output for 1.5 s"
    assert result.output == "working\n"


async def test_a_program_that_closed_its_output_is_silent_too() -> None:
    code = "import os, time; os.close(1); os.close(2); time.sleep(1000)"
    assert (await run(python(code, idle_timeout_seconds=0.2))).error_message == "no output for 0.2 s"


@pytest.mark.parametrize("descriptor", [1, 2])
async def test_output_on_either_pipe_keeps_a_program_alive(descriptor: int) -> None:
    code = f"import os, time\nfor _ in range(8): os.write({descriptor}, b'.'); time.sleep(0.25)"
    assert (await run(python(code, idle_timeout_seconds=1.5))).is_success


async def test_output_that_waited_because_the_event_loop_was_held_up_is_no_silence(tmp_path: Path) -> None:
    code = (
        "import os, time\n"
        "open('ready', 'w').write('\\n')\n"
        "time.sleep(0.1); print('in time', flush=True); open('printed', 'w')\n"
        "while not os.path.exists('end'): time.sleep(0.005)"
    )

    async def blocks_when_it_is_ready() -> None:
        await line_in(tmp_path / "ready")()
        hold_up_the_loop_until((tmp_path / "printed").exists)
        long_enough = time.monotonic() + 1.6
        hold_up_the_loop_until(lambda: time.monotonic() > long_enough)
        await anyio.wait_all_tasks_blocked()
        (tmp_path / "end").touch()

    async with anyio.create_task_group() as group:
        group.start_soon(blocks_when_it_is_ready)
        result = await run(python(code, cwd=tmp_path, idle_timeout_seconds=1.5))
        assert result.error_message is None
        assert result.output == "in time\n"


# The end of the process tree.


async def test_a_run_that_is_cancelled_before_it_starts_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(subprocess, "Popen", started.append)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await run(python(""))
    assert scope.cancelled_caught
    assert started == []


async def test_cancelling_asks_the_program_to_end_and_gives_it_time(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time\n"
        "def end(*_):\n"
        "    sys.stdout.write('x' * 1_000_000); sys.stdout.flush()\n"
        "    open(sys.argv[2], 'w').write('cleaned up'); sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "open(sys.argv[1], 'w').write('\\n'); time.sleep(1000)"
    )
    ready, cleaned = tmp_path / "ready", tmp_path / "cleaned"
    await cancelled_when(python(code, str(ready), str(cleaned)), line_in(ready))
    assert cleaned.read_text() == "cleaned up"


PARENT = """
import os, subprocess, sys, time
how, pids, grandchild = sys.argv[1:4]
options = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) if "quiet" in how else {}
subprocess.Popen([sys.executable, "-c", grandchild, pids], **options)
while not (os.path.exists(pids) and open(pids).read().endswith("\\n")):
    time.sleep(0.005)
while "told" in how and not os.path.exists(pids + ".go"):
    time.sleep(0.005)
print("parent is ready", flush=True)
if "waits" in how:
    time.sleep(1000)
"""


def family(how: str, pids: Path, grace: float = 0.1, **options: Any) -> ProcessEngine:
    return python(PARENT, how, str(pids), GRANDCHILD_THAT_IGNORES_SIGTERM, terminate_grace_seconds=grace, **options)


@pytest.mark.parametrize("how", ["waits", "waits, quiet"])
async def test_cancelling_ends_a_grandchild_that_ignores_sigterm(how: str, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    await cancelled_when(family(how, pids), line_in(pids))
    await gone(int(pids.read_text()))


async def test_silence_ends_a_grandchild_that_ignores_sigterm(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    result = await run(family("waits", pids, idle_timeout_seconds=2))
    assert result.error_message == "no output for 2 s"
    await gone(int(pids.read_text()))


@pytest.mark.parametrize("how", ["exits", "exits, quiet"])
async def test_what_a_program_leaves_behind_is_ended_and_holds_nothing_up(how: str, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    result = await run(family(how, pids))
    assert result.is_success
    assert result.output == "parent is ready\n"
    await gone(int(pids.read_text()))


async def test_cancelling_while_the_output_of_a_grandchild_is_drained_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_program, "DRAIN_SECONDS", 1000)
    draining = anyio.Event()
    wait_gone = _program.Program._wait_gone

    async def announced(self: _program.Program, seconds: float) -> None:
        draining.set()
        await wait_gone(self, seconds)

    monkeypatch.setattr(_program.Program, "_wait_gone", announced)
    pids = tmp_path / "pids"
    await cancelled_when(family("exits", pids), draining.wait)
    await gone(int(pids.read_text()))


async def test_a_grandchild_that_left_the_group_cannot_hold_the_run_up(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    escape = "import os; os.setsid()\n" + GRANDCHILD_THAT_IGNORES_SIGTERM
    engine = python(PARENT, "exits", str(pids), escape, terminate_grace_seconds=0.1)
    try:
        result = await run(engine)
    finally:
        os.kill(int(pids.read_text()), signal.SIGKILL)
    assert result.output == "parent is ready\n"


async def test_output_written_just_before_the_end_is_read_even_if_the_time_for_it_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_program, "DRAIN_SECONDS", 0)
    pids, go = tmp_path / "pids", tmp_path / "pids.go"
    before = own_children()

    async def blocks_until_the_parent_has_exited() -> None:
        await line_in(pids)()
        (parent,) = own_children() - before
        go.touch()
        hold_up_the_loop_until(lambda: not is_alive(parent))

    async with anyio.create_task_group() as group:
        group.start_soon(blocks_until_the_parent_has_exited)
        result = await run(family("exits when told", pids, grace=0))
        assert result.output == "parent is ready\n"
    await gone(int(pids.read_text()))


async def test_no_signal_is_sent_once_the_program_is_reaped(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    killpg, poll = os.killpg, subprocess.Popen.poll
    own: set[int] = set()

    def noted_killpg(group: int, signum: int) -> None:
        own.add(group)
        calls.append("signal")
        # Whatever has exited by now is a zombie still: its id is taken.
        assert Path(f"/proc/{group}").exists()
        killpg(group, signum)

    def noted_poll(self: subprocess.Popen[bytes]) -> int | None:
        calls.append("reap")
        return poll(self)

    monkeypatch.setattr(os, "killpg", noted_killpg)
    monkeypatch.setattr(subprocess.Popen, "poll", noted_poll)
    await run(python("print('done')"))
    assert calls == ["signal", "signal", "reap"]


@pytest.mark.parametrize("anyio_backend", [pytest.param(("asyncio", {"debug": True}), id="asyncio")])
async def test_a_native_cancellation_which_no_shield_stops_ends_the_grace_period_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    ready, asked = tmp_path / "ready", tmp_path / "asked"
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: open(sys.argv[2], 'w').write('\\n'))\n"
        "open(sys.argv[1], 'w').write('\\n')\n"
        "while True: time.sleep(1000)"
    )
    engine = python(code, str(ready), str(asked), terminate_grace_seconds=1000)
    _current.set(context(assignment()))
    with anyio.fail_after(WAIT_SECONDS):
        task = asyncio.create_task(engine.run(assignment()))
        await line_in(ready)()
        task.cancel()
        await line_in(asked)()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
