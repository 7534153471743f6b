"""A thread with an asyncio event loop, beside trio's: one for each run of trio, for all asyncio agents in it.

It is started for the first of them and ended with the run, so that what agents keep between their calls, such as HTTP
connections, lives as long as they do. Both sides only leave messages for each other and never wait in doing so: an
asyncio loop that waits for trio, which waits for the asyncio loop, is a deadlock.
"""

import asyncio  # noqa: TID251 - this is the asyncio side
import threading
from collections.abc import Callable
from contextlib import suppress

import sniffio
import trio  # noqa: TID251 - this is where trio meets asyncio
from anyio.lowlevel import RunVar

from ..events import ASYNCIO_AGENT_LEFT, write_log

CLOSE_SECONDS = 5.0
"""How long the end of a run of trio waits for agents that could not be stopped."""

_of_this_run: "RunVar[AsyncioThread]" = RunVar("parallel_agents_asyncio_thread")


class AsyncioThread:
    """The asyncio side of a run of trio.

    Attributes:
        loop: Its event loop.
    """

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._trio = trio.lowlevel.current_trio_token()
        self._is_over = trio.Event()
        self._stop = asyncio.Event()
        # not waited for at the end of the program: an agent that blocks it for ever must not block the program too
        self._thread = threading.Thread(target=self._main, name="parallel_agents asyncio", daemon=True)

    @classmethod
    def of_this_run(cls) -> "AsyncioThread":
        """Return the thread of the running trio, which is started if it is not there yet."""
        try:
            return _of_this_run.get()
        except LookupError:
            thread = cls()
            _of_this_run.set(thread)
            thread._thread.start()
            trio.lowlevel.spawn_system_task(thread._end_with_the_run)
            return thread

    def to_asyncio(self, function: Callable[[], object]) -> None:
        """Call *function* in the asyncio loop, some time."""
        self.loop.call_soon_threadsafe(function)

    def to_trio(self, function: Callable[[], object]) -> None:
        """Call *function* in trio's loop, some time, after all that was sent before."""
        with suppress(trio.RunFinishedError):  # then nobody waits for it any more
            self._trio.run_sync_soon(function)

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
                runner.run(self._until_stopped())
        finally:
            self.to_trio(self._is_over.set)

    async def _until_stopped(self) -> None:
        await self._stop.wait()

    async def _end_with_the_run(self) -> None:
        """Wait until the main task has ended; then end all that is left."""
        try:
            await trio.sleep_forever()
        finally:
            with trio.move_on_after(CLOSE_SECONDS) as scope:
                scope.shield = True
                self.to_asyncio(self._stop.set)
                await self._is_over.wait()
                self._thread.join()
            if scope.cancelled_caught:
                write_log(ASYNCIO_AGENT_LEFT, cleanup_seconds=CLOSE_SECONDS)


def forget_the_library() -> None:
    """Let asyncio's code, in a copy of trio's context, find out by itself where it runs."""
    sniffio.current_async_library_cvar.set(None)
