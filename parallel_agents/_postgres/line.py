"""A place in a line that the database keeps: asked for in a thread, waited for by a task, lost with the session.

What the line is for, and who is next, is decided by the statements of those who stand in it.
"""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import anyio

from ..postgres import PostgresStore
from .connections import Connection
from .keeper import Session, lost

T = TypeVar("T")

GIVE_UP_SECONDS = 5.0
"""How long a cancelled wait may take to leave the line; after that it is left as soon as the server is back."""


class Place(ABC, Generic[T]):
    """One's place, from where it is asked for until it is granted or left.

    Attributes:
        name: Stands for it in the database.
    """

    def __init__(self, store: PostgresStore) -> None:
        self.name = secrets.token_hex(8)
        self._store = store
        self._opened = store.opened
        self._is_abandoned = False
        self._opened.bell.expect(self.name)

    @abstractmethod
    def ask(self, connection: Connection, session: Session) -> T:
        """Ask for it; runs in a thread, and may be repeated."""

    @abstractmethod
    def leave(self, connection: Connection) -> None:
        """Leave it, whether it was granted or not; runs in a thread, and may be repeated."""

    async def enter(self) -> T:
        """Ask for it, again if the server is away."""
        return await self._store.run(self._ask_unless_abandoned)

    def _ask_unless_abandoned(self, connection: Connection, session: Session) -> T:
        answer = self.ask(connection, session)
        if self._is_abandoned:  # a native cancellation does not wait for this thread
            self.leave(connection)
        return answer

    async def turn(self) -> str:
        """Wait for one's turn; return what the database says, or nothing if the place was lost."""
        self._opened.keeper.wait_for(self.name)
        return await self._opened.bell.wait(self.name)

    async def abandon(self) -> None:
        """Leave it; later, if the server is away for long."""
        self._is_abandoned = True
        await self._store.run_or_soon(self.leave, patience_seconds=GIVE_UP_SECONDS)

    @asynccontextmanager
    async def standing(self) -> AsyncIterator[None]:
        """Stand in the line for the length of the block, and leave it if the block raises."""
        try:
            yield
        except BaseException:
            with anyio.CancelScope(shield=True):  # bounded by its patience, and one call to the server
                await self.abandon()
            raise
        finally:
            self._opened.keeper.forget(self.name)
            self._opened.bell.forget(self.name)


class TakenOver:
    """Tells that others may have taken over what was granted; see ``Lost``.

    They may as soon as its session was not renewed for most of a lease, or somebody has taken it away by name.
    """

    def __init__(self, store: PostgresStore, session: Session, name: str) -> None:
        self._bell = store.opened.bell
        self._session = session
        self._name = name
        self._is_released = False
        self._was_set = False
        self._bell.expect(lost(name))
        self._session.keep(name)

    def is_set(self) -> bool:
        """Whether they may."""
        return self._was_set if self._is_released else not self._session.has(self._name)

    async def wait(self) -> None:
        """Wait until they may."""
        while not self.is_set():
            if self._is_released:
                await anyio.sleep_forever()
            with anyio.move_on_after(max(0.0, self._session.good_until - time.monotonic())):
                await self._bell.wait(lost(self._name))

    def forget(self) -> None:
        """Stay as it is from now on, because it is given back; may be repeated."""
        self._was_set, self._is_released = self.is_set(), True
        self._bell.forget(lost(self._name))
        self._session.forget(self._name)
