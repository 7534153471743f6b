"""ProcessEngine: one real program per assignment, from its command line to the end of its whole process tree.

Owns what the parts beside it are put together for. Knows no shell and no executor; timeouts and cancellation arrive as
cancellation of the call.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import anyio
import anyio.lowlevel
from attrs import field, frozen
from attrs.validators import optional

from .._checks import integer, number, shown, wrong_type
from .._context import current_run
from .._errors import EngineUnavailableError
from .._models import AgentAssignment
from .._outcomes import AgentRunResult, TerminationReason
from ._metering import Meter
from ._output import JsonLines, Stdout, Tail, last_lines
from ._program import KILL_SECONDS, Launch, Program, why_not_started
from ._templates import ProgramText
from ._workspace import working_folder

INHERITED_ENV = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR")
"""Variables of this process that programs see unless ``inherit_env`` says otherwise: enough to find programs, the
home folder, the language and the place for temporary files; nothing that loads code or holds a secret."""


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
        cwd: The program's working folder; placeholders allowed. ``None`` is that of this process. In a folder that was
            made for the agent, as by ``WorktreeEngine``, it is relative to that one, and ``None`` is that one.
        env: Variables for the program, above the inherited ones; placeholders allowed in values.
        inherit_env: Names of variables that it gets from this process, where they are set; it gets no others. What
            ``current_run().program_env()`` returns, such as ``TRACEPARENT``, comes besides.
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
        self._cwd = None if folder is None else ProgramText.parse(folder, "cwd")
        self._env = _environment({} if env is None else env)
        self._inherit_env = _variable_names(inherit_env)
        self._stdin = None if stdin is None else ProgramText.parse(stdin, "stdin")
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
        self._launch(assignment, {})

    async def run(self, assignment: AgentAssignment, /) -> AgentRunResult[Any]:
        """Run the program to its end and return what came of it.

        A checkpoint before the program starts. Cancelling ends the whole process tree before the cancellation goes on;
        usage that the program has told until then stays recorded.

        Raises:
            ValueError: As ``check()`` does.
        """
        run = current_run()
        meter = Meter(run)
        launch = self._launch(assignment, run.program_env())
        limit = self._limits.output_limit_bytes
        stderr = Tail(limit)
        stdout = Tail(limit) if self._protocol == "text" else JsonLines(limit, run.record_usage)
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
            usage=meter.metered(),
            duration_seconds=anyio.current_time() - started_at,
            messages=said.messages,
        )

    async def _run_program(self, launch: Launch, stdout: Stdout, stderr: Tail) -> list[str]:
        """Run a program with its whole tree from start to end; return what went wrong."""
        try:
            program = Program(launch, stdout.add, stderr.add)
        except OSError as error:
            return [why_not_started(launch.argv, error)]
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
        complaint = last_lines(stderr.text())
        return [f"{problem}: {complaint}" if complaint else problem]

    def _launch(self, assignment: AgentAssignment, program_env: Mapping[str, str]) -> Launch:
        env = {name: os.environ[name] for name in self._inherit_env if name in os.environ}
        env |= program_env
        env |= {name: value.fill(assignment) for name, value in self._env.items()}
        return Launch(
            argv=tuple(item.fill(assignment) for item in self._command),
            cwd=_below_the_workspace(None if self._cwd is None else self._cwd.fill(assignment)),
            env=env,
            stdin=None if self._stdin is None else self._stdin.fill(assignment, str.encode).encode(),
        )


def _below_the_workspace(cwd: str | None) -> str | None:
    """Return where a program runs: relative folders start at the one that was made for the agent, if one was."""
    folder = working_folder()
    return cwd if folder is None else str(folder / (cwd or "."))


def _command(command: object) -> tuple[ProgramText, ...]:
    if isinstance(command, str | bytes):
        raise TypeError(
            f"command must be a list of the program and its arguments, got {shown(command)}; "
            "it is not handed to a shell, so split it into items"
        )
    if not isinstance(command, Sequence):
        raise wrong_type("command", "a list of strings", command)
    items = tuple(ProgramText.parse(item, f"command[{position}]") for position, item in enumerate(command))
    if not items or not command[0].strip():
        raise ValueError("command must start with a program")
    return items


def _environment(env: object) -> dict[str, ProgramText]:
    if not isinstance(env, Mapping):
        raise wrong_type("env", "a mapping", env)
    return {name: ProgramText.parse(env[name], f"env[{name}]") for name in _variable_names(tuple(env), "env")}


def _variable_names(names: object, place: str = "inherit_env") -> tuple[str, ...]:
    if isinstance(names, str | bytes) or not isinstance(names, Sequence):
        raise wrong_type(place, "a list of names", names)
    for name in names:
        if not isinstance(name, str):
            raise wrong_type(f"a name in {place}", "a string", name)
        if not name or "=" in name or "\0" in name:
            raise ValueError(f"a name in {place} must not be empty nor hold '=' or NUL, got {shown(name)}")
    return tuple(names)
