"""Slots: one place of a shared limiter for one engine call, lent while its agent waits for a nested group.

Knows the limiter; does not know who runs what.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio


class Slot:
    """A place of a limiter, taken for one engine call.

    Args:
        limiter: What bounds the engine calls of all who share it.
        owner: The run whose engine call it is.
    """

    __slots__ = ("_limiter", "_loans", "_over", "owner")

    def __init__(self, limiter: anyio.CapacityLimiter, owner: object) -> None:
        self._limiter = limiter
        self.owner = owner
        self._loans = 0
        self._over = False

    def take_nowait(self) -> bool:
        """Take the place if it is free and nobody waits for one; return whether it was."""
        try:
            self._limiter.acquire_on_behalf_of_nowait(self)
        except anyio.WouldBlock:
            return False
        return True

    async def take(self) -> None:
        """Wait for the place, first come, first served. Cancelled while waiting, it holds none."""
        await self._limiter.acquire_on_behalf_of(self)

    def give_back(self) -> None:
        """End the use of this slot: the engine call is over."""
        self._over = True
        if not self._loans:
            self._release_if_held()

    @asynccontextmanager
    async def lent(self) -> AsyncIterator[None]:
        """Free the place for the length of the block, so that a group that the agent waits for can use it.

        Leaving waits for a place again, because the agent goes on; cancelled there, it goes on without one.
        Groups that one agent waits for side by side share the loan: the last one to end brings the place back.
        """
        if not self._loans:
            self._release_if_held()
        self._loans += 1
        try:
            yield
        finally:
            self._loans -= 1
            if not self._loans and not self._over:
                await self.take()  # noqa: ASYNC102 - when cancelled it must not wait: the agent only cleans up then

    def _release_if_held(self) -> None:
        try:
            self._limiter.release_on_behalf_of(self)
        except RuntimeError:  # not held: the agent was cancelled while it waited to get its place back
            return


def give_back_slots_of(owner: object, limiter: anyio.CapacityLimiter) -> None:
    """Give back the places of a run of which nothing runs any more: an exception may have struck their workers."""
    for borrower in limiter.statistics().borrowers:
        if isinstance(borrower, Slot) and borrower.owner is owner:
            borrower.give_back()
