"""Programs: started without waiting, reaped by us alone, and ended with all that they started. Knows no assignment."""

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO

import anyio
import anyio.lowlevel
from attrs import field, frozen

from .._checks import shown

DRAIN_SECONDS = 1.0
"""How long after a program's exit its output is read to the end, where something it started keeps the pipe open."""

KILL_SECONDS = 5.0
"""How long a killed program may take to disappear before it is given up; only the kernel can delay it so long."""

_POLL_SECONDS = 0.02
"""How often a program's exit is looked for where the system cannot announce it."""

_READ_BYTES = 65536


@frozen(kw_only=True)
class Launch:
    """What a program is started with."""

    argv: tuple[str, ...]
    cwd: str | None
    env: dict[str, str] = field(repr=False)
    stdin: bytes | None = field(repr=False)


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


class Program:
    """A running program, leader of a session and process group of its own.

    Why no signal can hit a stranger: the group's id is the program's process id. The kernel gives an id to nobody else
    while a process has it as its own or as its group's, and a program that has exited keeps its own until it is reaped.
    Nothing reaps this one but ``_reap()``, after the last signal; until then its exit is only looked at (WNOWAIT). That
    is why this is no ``anyio.open_process()``: there asyncio's child watcher reaps at once, perhaps in a thread, and
    what is left of the group could be signalled only by an id that may have a new owner.
    """

    def __init__(self, launch: Launch, stdout: Callable[[bytes], None], stderr: Callable[[bytes], None]) -> None:
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


def _spawn(launch: Launch) -> subprocess.Popen[bytes]:
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


def why_not_started(argv: Sequence[str], error: OSError) -> str:
    about = "" if error.filename in (None, argv[0]) else f": {shown(error.filename)}"
    return f"cannot start {shown(argv[0])}: {error.strerror or error}{about}"
