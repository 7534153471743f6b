"""ProcessEngine: one real program per assignment, from its command line to the end of its whole process tree.

Owns how assignments become command lines, what is kept of a program's output, and how programs end. Knows no shell
and no executor; timeouts and cancellation arrive as cancellation of the call.
"""

import json
import os
import re
import signal
import string
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import IO, Any, Literal, Protocol

import anyio
import anyio.lowlevel
from attrs import field, frozen
from attrs.validators import optional

from .._checks import frozen_json, integer, number, shown, wrong_type
from .._context import current_run
from .._errors import EngineUnavailableError
from .._models import AgentAssignment, ChatMessage, Usage
from .._outcomes import AgentRunResult, TerminationReason

INHERITED_ENV = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR")
"""Variables of this process that programs see unless ``inherit_env`` says otherwise: enough to find programs, the
home folder, the language and the place for temporary files; nothing that loads code or holds a secret."""

DRAIN_SECONDS = 1.0
"""How long after a program's exit its output is read to the end, where something it started keeps the pipe open."""

KILL_SECONDS = 5.0
"""How long a killed program may take to disappear before it is given up; only the kernel can delay it so long."""

_POLL_SECONDS = 0.02
"""How often a program's exit is looked for where the system cannot announce it."""

_READ_BYTES = 65536
_STDERR_LINES = 20
_STDERR_CHARACTERS = 2000
_JSON_LEVELS = 100


# Command lines: templates whose placeholders are looked up in a table, never evaluated.


_PLACEHOLDERS: Mapping[str, Callable[[AgentAssignment], Any]] = {
    "agent_id": lambda assignment: assignment.agent_id,
    "task_id": lambda assignment: assignment.task_id,
    "agent.id": lambda assignment: assignment.identity.id,
    "agent.name": lambda assignment: assignment.identity.name,
    "agent.role": lambda assignment: assignment.identity.role,
    "agent.instructions": lambda assignment: assignment.identity.instructions,
    "agent.model": lambda assignment: assignment.identity.model,
    "task.id": lambda assignment: assignment.task.id,
    "task.title": lambda assignment: assignment.task.title,
    "task.description": lambda assignment: assignment.task.description,
    "task.inputs": lambda assignment: assignment.task.inputs,
}
_FIELD = re.compile(r"(?P<name>[a-z_.]+)(?P<keys>(?:\[[^\[\]]+\])*)")
_KEY = re.compile(r"\[([^\[\]]+)\]")


@frozen
class _Placeholder:
    text: str
    name: str
    keys: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, place: str) -> "_Placeholder":
        match = _FIELD.fullmatch(text)
        if match is None or match["name"] not in _PLACEHOLDERS or (match["keys"] and match["name"] != "task.inputs"):
            raise ValueError(
                f"{place}: unknown placeholder {{{text}}}. "
                f"There are {', '.join(f'{{{name}}}' for name in _PLACEHOLDERS)} and {{task.inputs[key]}}; "
                "{{ and }} are literal braces"
            )
        return cls(text, match["name"], tuple(_KEY.findall(match["keys"])))

    def look_up(self, assignment: AgentAssignment, place: str) -> str:
        value = _PLACEHOLDERS[self.name](assignment)
        if self.name == "agent.model" and value is None:
            raise ValueError(f"{place}: {{{self.text}}} has no value: agent {assignment.agent_id!r} has no model")
        for key in self.keys:
            step: Any = int(key) if isinstance(value, list) and key.isdecimal() else key
            try:
                value = value[step]
            except (LookupError, TypeError):
                raise ValueError(
                    f"{place}: {{{self.text}}} has no value: "
                    f"in the inputs of task {assignment.task_id!r} there is no [{key}] at that place"
                ) from None
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@frozen
class _Template:
    place: str
    parts: tuple[str | _Placeholder, ...]

    @classmethod
    def parse(cls, text: object, place: str) -> "_Template":
        if not isinstance(text, str):
            raise wrong_type(place, "a string", text)
        template = cls(place, tuple(_parts(text, place)))
        template._refuse_nul("".join(part for part in template.parts if isinstance(part, str)))
        return template

    def fill(self, assignment: AgentAssignment, encode: Callable[[str], bytes] = os.fsencode) -> str:
        """Return the text for *assignment*: one item, whatever the values hold.

        Raises:
            ValueError: A value is missing or cannot be handed to a program; names the item and its placeholders.
        """
        filled = "".join(p if isinstance(p, str) else p.look_up(assignment, self.place) for p in self.parts)
        self._refuse_nul(filled)
        try:
            encode(filled)
        except UnicodeEncodeError as error:
            raise ValueError(f"{self.place} cannot be encoded ({error.reason}){self._names()}") from None
        return filled

    def _refuse_nul(self, text: str) -> None:
        if "\0" in text:
            raise ValueError(f"{self.place} must not hold NUL characters, which no program can be given{self._names()}")

    def _names(self) -> str:
        names = ", ".join(f"{{{part.text}}}" for part in self.parts if isinstance(part, _Placeholder))
        return f"; it is filled from {names}" if names else ""


def _parts(text: str, place: str) -> Iterator[str | _Placeholder]:
    # Formatter.parse only splits; str.format on live objects would hand out their attributes to whoever writes plans.
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{place}: {error}; {{{{ and }}}} are literal braces") from None
    for literal, name, spec, conversion in pieces:
        if literal:
            yield literal
        if spec or conversion:
            raise ValueError(f"{place}: {{{name}}} must stand alone, without a conversion or a format")
        if name is not None:
            yield _Placeholder.parse(name, place)


@frozen(kw_only=True)
class _Launch:
    """What a program is started with."""

    argv: tuple[str, ...]
    cwd: str | None
    env: dict[str, str] = field(repr=False)
    stdin: bytes | None = field(repr=False)


# Output: what is kept of it is bounded, whatever a program prints.


@frozen(kw_only=True)
class _Said:
    """What a program's stdout came to."""

    output: Any
    messages: tuple[ChatMessage, ...] = ()
    problem: str | None = None


class _Stdout(Protocol):
    def add(self, data: bytes) -> None: ...

    def said(self) -> _Said: ...


class _Tail:
    """Keeps the last bytes of a stream."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._data = bytearray()
        self._cut = 0

    def add(self, data: bytes) -> None:
        self._data += data
        if len(self._data) > 2 * self._limit:  # not at every call: each cut moves what is kept
            self._drop(len(self._data) - self._limit)

    def text(self) -> str:
        """Return what was kept; where something was cut, the first line says how much."""
        self._drop(len(self._data) - self._limit)
        if not self._cut:
            return self._data.decode(errors="replace")
        # The cut may have hit the middle of a character.
        self._drop(next((i for i, byte in enumerate(self._data[:4]) if byte & 0xC0 != 0x80), 0))
        return f"[... {self._cut} bytes cut ...]\n{self._data.decode(errors='replace')}"

    def said(self) -> _Said:
        return _Said(output=self.text())

    def _drop(self, count: int) -> None:
        if count > 0:
            del self._data[:count]
            self._cut += count


class _JsonLines:
    """Reads the JSON-lines protocol; what is none of it is kept as text."""

    def __init__(self, limit: int, record_usage: Callable[[Usage], None]) -> None:
        self._limit = limit
        self._record_usage = record_usage
        self._text = _Tail(limit)
        self._messages: deque[tuple[ChatMessage, int]] = deque()
        self._messages_bytes = 0
        self._messages_cut = 0
        self._result: Any = None
        self._has_result = False
        self._problem: str | None = None
        self._line = bytearray()
        self._line_number = 1
        self._line_is_text = False

    def add(self, data: bytes) -> None:
        first, *others = data.split(b"\n")
        self._extend_line(first)
        for part in others:
            self._end_line(b"\n")
            self._extend_line(part)

    def said(self) -> _Said:
        self._end_line(b"")
        messages = [message for message, _ in self._messages]
        if self._messages_cut:
            messages.insert(0, ChatMessage(role="system", content=f"[... {self._messages_cut} messages cut ...]"))
        return _Said(
            output=self._result if self._has_result else self._text.text(),
            messages=tuple(messages),
            problem=self._problem,
        )

    def _extend_line(self, part: bytes) -> None:
        if self._line_is_text:
            self._text.add(part)
            return
        self._line += part
        if len(self._line) > self._limit:
            if self._line.lstrip().startswith(b"{"):
                self._refuse_line(f"longer than output_limit_bytes ({self._limit})")
            self._text.add(bytes(self._line))
            self._line.clear()
            self._line_is_text = True

    def _end_line(self, newline: bytes) -> None:
        if self._line_is_text or not self._took(self._line):
            self._text.add(bytes(self._line) + newline)
        self._line.clear()
        self._line_is_text = False
        self._line_number += 1

    def _took(self, line: bytearray) -> bool:
        """Whether *line* belongs to the protocol; if so it has been dealt with."""
        if not line.lstrip().startswith(b"{"):
            return False
        try:
            message = json.loads(line.decode(errors="replace"))
        except json.JSONDecodeError:
            return False
        except (ValueError, RecursionError):  # whatever it is, a number or a nesting of this size means no good
            self._refuse_line("a number is too long, or the nesting too deep")
            return True
        take = self._takers().get(message.get("type")) if isinstance(message.get("type"), str) else None
        if take is None:
            return False
        try:
            del message["type"]
            take(message, len(line))
        except (TypeError, ValueError) as error:
            self._refuse_line(str(error))
        return True

    def _takers(self) -> Mapping[str, Callable[[dict[str, Any], int], None]]:
        return {"usage": self._take_usage, "message": self._take_message, "result": self._take_result}

    def _take_usage(self, message: dict[str, Any], _size: int) -> None:
        _check_keys(message, ("input_tokens", "output_tokens", "requests", "cost"))
        self._record_usage(Usage(**message))

    def _take_message(self, message: dict[str, Any], size: int) -> None:
        _check_keys(message, ("role", "content"), required="role")
        self._messages.append((ChatMessage(**message), size))
        self._messages_bytes += size
        while self._messages_bytes > self._limit:
            self._messages_bytes -= self._messages.popleft()[1]
            self._messages_cut += 1

    def _take_result(self, message: dict[str, Any], _size: int) -> None:
        _check_keys(message, ("output",), required="output")
        if _deeper_than(_JSON_LEVELS, message["output"]):
            raise ValueError(f"output is nested more than {_JSON_LEVELS} levels deep")
        self._result = frozen_json(message["output"], "output")
        self._has_result = True

    def _refuse_line(self, problem: str) -> None:
        self._problem = self._problem or f"line {self._line_number} of stdout: {problem}"


def _check_keys(message: Mapping[str, Any], known: Sequence[str], *, required: str | None = None) -> None:
    if required is not None and required not in message:
        raise ValueError(f"{required} is missing")
    if unknown := sorted(message.keys() - set(known)):
        raise ValueError(f"unknown key {shown(unknown[0])}, there are {', '.join(known)}")


def _deeper_than(levels: int, value: object) -> bool:
    if not isinstance(value, dict | list):
        return False
    children = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper_than(levels - 1, child) for child in children)


def _last_lines(text: str) -> str:
    return "\n".join(text.rstrip()[-_STDERR_CHARACTERS:].splitlines()[-_STDERR_LINES:])


# Programs: started without waiting, reaped by us alone.


class _Pipe:
    """The end of a pipe that we read."""

    def __init__(self, stream: IO[bytes], take: Callable[[bytes], None]) -> None:
        os.set_blocking(stream.fileno(), False)
        self._stream = stream
        self._take = take
        self.ended = False
        self.last_read_at = anyio.current_time()

    async def drain(self) -> None:
        """Read to the end. Cancelling loses nothing: what is not read yet stays in the pipe."""
        while not self.ended:
            await anyio.wait_readable(self._stream.fileno())
            self.read()

    def read(self) -> None:
        """Read once, without waiting."""
        try:
            data = os.read(self._stream.fileno(), _READ_BYTES)
        except BlockingIOError:
            return
        self.ended = not data
        if data:
            self.last_read_at = anyio.current_time()
            self._take(data)

    def close(self) -> None:
        self._stream.close()


class _Program:
    """A running program, leader of a session and process group of its own.

    Why no signal can hit a stranger: the group's id is the program's process id. The kernel gives an id to nobody else
    while a process has it as its own or as its group's, and a program that has exited keeps its own until it is reaped.
    Nothing reaps this one but ``_reap()``, after the last signal; until then its exit is only looked at (WNOWAIT). That
    is why this is no ``anyio.open_process()``: there asyncio's child watcher reaps at once, perhaps in a thread, and
    what is left of the group could be signalled only by an id that may have a new owner.
    """

    def __init__(self, launch: _Launch, stdout: Callable[[bytes], None], stderr: Callable[[bytes], None]) -> None:
        self._popen = _spawn(launch)
        assert self._popen.stdout is not None
        assert self._popen.stderr is not None
        self._stdin = launch.stdin
        self._stdout = _Pipe(self._popen.stdout, stdout)
        self._stderr = _Pipe(self._popen.stderr, stderr)
        self._pidfd = _open_pidfd(self._popen.pid)
        self._is_ours = True
        self._status: tuple[int, int] | None = None

    async def watch(self, idle_seconds: float | None) -> bool:
        """Wait until the program has exited and its output is read; return False if it fell silent before."""
        idle = False
        async with anyio.create_task_group() as helpers:
            helpers.start_soon(self._feed)
            helpers.start_soon(self._stdout.drain)
            helpers.start_soon(self._stderr.drain)
            idle = not await self._exit_unless_idle(idle_seconds)
            helpers.cancel_scope.cancel()
        if not idle:
            await self._wait_gone(DRAIN_SECONDS)
        return not idle

    async def end(self, grace_seconds: float) -> None:
        """End whatever is left of the process tree: SIGTERM, a grace period, SIGKILL; then reap.

        Takes *grace_seconds* and KILL_SECONDS at most. To be called shielded; a native cancellation, which no shield
        stops, shortens the grace period.
        """
        try:
            self._signal_group(signal.SIGTERM)
            await self._wait_gone(grace_seconds)
        finally:
            self._signal_group(signal.SIGKILL)
            try:
                with anyio.move_on_after(KILL_SECONDS, shield=True):
                    await self._wait_exit()
            finally:
                self._reap()

    @property
    def failure(self) -> str | None:
        """How it ended, if not well; to be read after ``end()``."""
        if self._status is None:
            return (
                "its exit status is unknown: SIGKILL did not end it, or this process ignores SIGCHLD "
                "or reaps children that are not its own"
            )
        code, value = self._status
        if code == os.CLD_EXITED:
            return f"exit code {value}" if value else None
        try:
            return f"killed by {signal.Signals(value).name}"
        except ValueError:  # the real-time signals between the first and the last have no names
            return f"killed by signal {value}"

    async def _feed(self) -> None:
        if self._popen.stdin is None or self._stdin is None:
            return
        descriptor = self._popen.stdin.fileno()
        os.set_blocking(descriptor, False)
        left = memoryview(self._stdin)
        try:
            while left:
                await anyio.wait_writable(descriptor)
                with suppress(BlockingIOError):
                    left = left[os.write(descriptor, left) :]
        except BrokenPipeError:
            pass  # the program has read what it wanted to read
        finally:
            self._popen.stdin.close()

    async def _exit_unless_idle(self, idle_seconds: float | None) -> bool:
        """Wait for the exit; return False if nothing was printed for *idle_seconds* before."""
        if idle_seconds is None:
            await self._wait_exit()
            return True
        while True:
            silent_since = self._printed_at()
            with anyio.CancelScope(deadline=silent_since + idle_seconds):
                await self._wait_exit()
                return True
            # When the event loop was held up, it is output that waited for us, not we for output.
            self._stdout.read()
            self._stderr.read()
            if self._printed_at() == silent_since:
                return self._has_exited()

    def _printed_at(self) -> float:
        return max(self._stdout.last_read_at, self._stderr.last_read_at)

    async def _wait_gone(self, seconds: float) -> None:
        """Wait until the program has exited and nothing holds its output open, at most *seconds*."""
        if self._has_exited() and self._stdout.ended and self._stderr.ended:
            return
        with anyio.move_on_after(seconds):
            async with anyio.create_task_group() as readers:
                readers.start_soon(self._stdout.drain)
                readers.start_soon(self._stderr.drain)
                await self._wait_exit()

    async def _wait_exit(self) -> None:
        while not self._has_exited():
            if self._pidfd is None:
                await anyio.sleep(_POLL_SECONDS)
            else:
                await anyio.wait_readable(self._pidfd)

    def _has_exited(self) -> bool:
        """Whether the program has exited, or is nobody's or somebody else's to wait for."""
        if self._is_ours:
            try:
                seen = os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # reaped behind our back: from now on the id may be a stranger's
                self._is_ours = False
            else:
                self._status = seen and (seen.si_code, seen.si_status)
        return self._status is not None or not self._is_ours

    def _signal_group(self, signum: signal.Signals) -> None:
        self._has_exited()
        if self._is_ours:
            # Nobody there, or nobody who may be signalled (macOS says so of a zombie too): nothing more can be done.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, signum)

    def _reap(self) -> None:
        self._stdout.close()
        self._stderr.close()
        if self._popen.stdin is not None:
            self._popen.stdin.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
        self._has_exited()
        self._is_ours = False
        self._popen.poll()


def _spawn(launch: _Launch) -> subprocess.Popen[bytes]:
    # Starting a program blocks the event loop until it is executed, about a millisecond. In exchange no cancellation
    # can come between the start and the moment from which its end is ours to see to.
    return subprocess.Popen(  # noqa: S603 - a list, no shell
        launch.argv,
        stdin=subprocess.DEVNULL if launch.stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        cwd=launch.cwd,
        env=launch.env,
        start_new_session=True,
    )


def _open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):  # not Linux, or one that does not allow it
        return None


def _why_not_started(argv: Sequence[str], error: OSError) -> str:
    about = "" if error.filename in (None, argv[0]) else f": {shown(error.filename)}"
    return f"cannot start {shown(argv[0])}: {error.strerror or error}{about}"


# The engine.


@frozen(kw_only=True)
class _Limits:
    """The engine's numbers."""

    output_limit_bytes: int = field(validator=integer(at_least=1))
    idle_timeout_seconds: float | None = field(validator=optional(number(above=0)))
    terminate_grace_seconds: float = field(validator=number(at_least=0))


class ProcessEngine:
    """Runs a program for each assignment, and ends it together with all that it started.

    The program leads a session and process group of its own. When it exits or falls silent, or the call is cancelled,
    whatever is left of the group gets SIGTERM, a grace period, and SIGKILL; then the program is reaped. What has left
    the group by itself (``setsid``, job control of a shell) is not followed.

    Exit code 0 is a completed result; any other one, a signal, or a program that cannot be started is a result with an
    error message, which ends with the last lines of stderr. What was printed is the ``output`` in either case. Bytes
    that are no UTF-8 become replacement characters.

    Placeholders are ``{agent_id}``, ``{task_id}``, ``{agent.id}``, ``.name``, ``.role``, ``.instructions``, ``.model``,
    ``{task.id}``, ``.title``, ``.description``, ``{task.inputs}`` and ``{task.inputs[key]}``, with further ``[key]``
    or ``[0]`` for what is nested. A value never leaves the item it stands in: there is no shell, and white space splits
    nothing. Inputs that are not strings are written as JSON; ``{{`` and ``}}`` are literal braces. An item that is all
    input can still look like an option of the program; where the program knows ``--``, put it before.

    With ``protocol="jsonl"`` lines of stdout that are JSON objects of these types are taken as what they say:

    - ``{"type": "usage", "input_tokens": 1, "output_tokens": 2, "requests": 1, "cost": 0.01}``: added to the run's
      usage at once, all keys optional;
    - ``{"type": "message", "role": "assistant", "content": "..."}``: added to the result's messages;
    - ``{"type": "result", "output": ...}``: the output, any JSON at most 100 levels deep; the last one counts.

    One with other keys or wrong values makes the result an error that names the line. All other lines are text, which
    is the output where no result came.

    Args:
        command: The program and its arguments; placeholders allowed. A program without a slash is looked for in the
            ``PATH`` of its own environment, a relative one with a slash from *cwd*.
        cwd: The program's working folder; placeholders allowed. ``None`` is that of this process.
        env: Variables for the program, above the inherited ones; placeholders allowed in values.
        inherit_env: Names of variables that it gets from this process, where they are set; it gets no others.
        stdin: What it reads from its standard input, in UTF-8; placeholders allowed. ``None`` is an empty input.
        protocol: ``text``, or ``jsonl`` as above.
        output_limit_bytes: How much is kept of stdout, of stderr, and of messages: the end, with a line or a message in
            front that says how much was cut. A line of the JSON protocol may not be longer.
        idle_timeout_seconds: A program that prints nothing for so long is ended; ``None`` is no limit.
        terminate_grace_seconds: How long after SIGTERM comes SIGKILL, if something is left by then. A cancelled call
            takes this long at most, unless the kernel holds the program.

    Raises:
        TypeError: The command is a string, or something else is of the wrong type.
        ValueError: A placeholder is unknown, or a value is out of its range.
        EngineUnavailableError: The operating system cannot tell that a program has exited without reaping it.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        inherit_env: Sequence[str] = INHERITED_ENV,
        stdin: str | None = None,
        protocol: Literal["text", "jsonl"] = "text",
        output_limit_bytes: int = 1024 * 1024,
        idle_timeout_seconds: float | None = None,
        terminate_grace_seconds: float = 5.0,
    ) -> None:
        if not hasattr(os, "waitid"):
            raise EngineUnavailableError("ProcessEngine needs os.waitid: Linux, or macOS with Python 3.13 or later")
        self._command = _command(command)
        folder = os.fspath(cwd) if isinstance(cwd, os.PathLike) else cwd
        self._cwd = None if folder is None else _Template.parse(folder, "cwd")
        self._env = _environment({} if env is None else env)
        self._inherit_env = _variable_names(inherit_env)
        self._stdin = None if stdin is None else _Template.parse(stdin, "stdin")
        if protocol not in ("text", "jsonl"):
            raise ValueError(f"protocol must be 'text' or 'jsonl', got {shown(protocol)}")
        self._protocol = protocol
        self._limits = _Limits(
            output_limit_bytes=output_limit_bytes,
            idle_timeout_seconds=idle_timeout_seconds,
            terminate_grace_seconds=terminate_grace_seconds,
        )
        self._program = command[0]

    def __repr__(self) -> str:
        return f"ProcessEngine({self._program!r}, protocol={self._protocol!r})"

    def check(self, assignment: AgentAssignment) -> None:
        """Make sure that *assignment* has a value for every placeholder; nothing is run.

        Raises:
            ValueError: It has not, or a value cannot be handed to a program; names the item and the placeholder.
        """
        self._launch(assignment)

    async def run(self, assignment: AgentAssignment, /) -> AgentRunResult[Any]:
        """Run the program to its end and return what came of it.

        A checkpoint before the program starts. Cancelling ends the whole process tree before the cancellation goes on;
        usage that the program has told until then stays recorded.

        Raises:
            ValueError: As ``check()`` does.
        """
        run = current_run()
        launch = self._launch(assignment)
        limit = self._limits.output_limit_bytes
        stderr = _Tail(limit)
        stdout = _Tail(limit) if self._protocol == "text" else _JsonLines(limit, run.record_usage)
        await anyio.lowlevel.checkpoint()
        started_at = anyio.current_time()
        problems = await self._run_program(launch, stdout, stderr)
        said = stdout.said()
        problems += [said.problem] if said.problem else []
        return AgentRunResult(
            task_id=assignment.task_id,
            agent_id=assignment.agent_id,
            termination_reason=TerminationReason.ERROR if problems else TerminationReason.COMPLETED,
            output=said.output,
            error_message="; ".join(problems) if problems else None,
            usage=run.usage,
            duration_seconds=anyio.current_time() - started_at,
            messages=said.messages,
        )

    async def _run_program(self, launch: _Launch, stdout: _Stdout, stderr: _Tail) -> list[str]:
        """Run a program with its whole tree from start to end; return what went wrong."""
        try:
            program = _Program(launch, stdout.add, stderr.add)
        except OSError as error:
            return [_why_not_started(launch.argv, error)]
        idle_seconds, grace_seconds = self._limits.idle_timeout_seconds, self._limits.terminate_grace_seconds
        fell_silent = False
        try:
            fell_silent = not await program.watch(idle_seconds)
        finally:
            with anyio.move_on_after(grace_seconds + KILL_SECONDS, shield=True):
                await program.end(grace_seconds)
        problem = f"no output for {idle_seconds:g} s" if fell_silent else program.failure
        if problem is None:
            return []
        complaint = _last_lines(stderr.text())
        return [f"{problem}: {complaint}" if complaint else problem]

    def _launch(self, assignment: AgentAssignment) -> _Launch:
        inherited = {name: os.environ[name] for name in self._inherit_env if name in os.environ}
        return _Launch(
            argv=tuple(item.fill(assignment) for item in self._command),
            cwd=None if self._cwd is None else self._cwd.fill(assignment),
            env=inherited | {name: value.fill(assignment) for name, value in self._env.items()},
            stdin=None if self._stdin is None else self._stdin.fill(assignment, str.encode).encode(),
        )


def _command(command: object) -> tuple[_Template, ...]:
    if isinstance(command, str | bytes):
        raise TypeError(
            f"command must be a list of the program and its arguments, got {shown(command)}; "
            "it is not handed to a shell, so split it into items"
        )
    if not isinstance(command, Sequence):
        raise wrong_type("command", "a list of strings", command)
    items = tuple(_Template.parse(item, f"command[{position}]") for position, item in enumerate(command))
    if not items or not command[0].strip():
        raise ValueError("command must start with a program")
    return items


def _environment(env: object) -> dict[str, _Template]:
    if not isinstance(env, Mapping):
        raise wrong_type("env", "a mapping", env)
    return {name: _Template.parse(env[name], f"env[{name}]") for name in _variable_names(tuple(env), "env")}


def _variable_names(names: object, place: str = "inherit_env") -> tuple[str, ...]:
    if isinstance(names, str | bytes) or not isinstance(names, Sequence):
        raise wrong_type(place, "a list of names", names)
    for name in names:
        if not isinstance(name, str):
            raise wrong_type(f"a name in {place}", "a string", name)
        if not name or "=" in name or "\0" in name:
            raise ValueError(f"a name in {place} must not be empty nor hold '=' or NUL, got {shown(name)}")
    return tuple(names)
