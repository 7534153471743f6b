"""Bell: threads wake up tasks, each by its name, and never wait for them.

A byte in a socket wakes one task, which has taken it on itself to look for all; when it has what it waits for, another
one does. Knows no database.
"""

import socket
import threading
from collections import deque

import anyio
from attrs import define, field


@define(eq=False)
class _Call:
    """What somebody listens for."""

    message: str | None = None
    sleepers: set[anyio.Event] = field(factory=set)


class Bell:
    """Carries messages from any thread to the tasks of one event loop at a time."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._rung: deque[tuple[str, str]] = deque()
        self._is_rung = False
        self._calls: dict[str, _Call] = {}
        self._has_reader = False
        self._sleepers: dict[anyio.Event, None] = {}
        self._ear, self._clapper = socket.socketpair()

    def close(self) -> None:
        """Let go of the sockets; nobody may wait any more."""
        self._ear.close()
        self._clapper.close()

    def expect(self, name: str) -> None:
        """Keep what comes for a name from now on."""
        self._calls[name] = _Call()

    def forget(self, name: str) -> None:
        """Keep nothing for a name any more; may be repeated."""
        self._calls.pop(name, None)

    def ring(self, name: str, message: str) -> None:
        """Send a message to whoever expects one for that name; from any thread."""
        with self._guard:
            self._rung.append((name, message))
            if not self._is_rung:
                self._is_rung = True
                self._clapper.send(b"!")

    async def wait(self, name: str) -> str:
        """Wait for a message for a name that is expected; return the last one. Not a checkpoint if there is one."""
        call = self._calls[name]
        while True:
            if not self._has_reader:  # it would not wake up to what another one has heard in its place
                self._hear()
            if call.message is not None:
                return call.message
            if self._has_reader:
                await self._sleep(call)
            else:
                self._has_reader = True
                try:
                    await anyio.wait_readable(self._ear)
                finally:
                    self._has_reader = False
                    self._hear()
                    self._wake_next_reader()

    async def _sleep(self, call: _Call) -> None:
        """Wait until there is a message, or nobody who listens for it."""
        event = anyio.Event()
        call.sleepers.add(event)
        self._sleepers[event] = None
        try:
            await event.wait()
        except BaseException:
            del self._sleepers[event]
            if not self._has_reader:  # perhaps it was this one that was to be the next
                self._wake_next_reader()
            raise
        finally:
            call.sleepers.discard(event)
            self._sleepers.pop(event, None)

    def _hear(self) -> None:
        with self._guard:
            if not self._is_rung:
                return
            self._ear.recv(1)
            self._is_rung = False
            rung, self._rung = self._rung, deque()
        for name, message in rung:
            if (call := self._calls.get(name)) is not None:
                call.message = message
                for event in call.sleepers:
                    event.set()

    def _wake_next_reader(self) -> None:
        for event in self._sleepers:
            if not event.is_set():
                event.set()
                return
