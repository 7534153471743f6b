"""What a lock is, and what more a lock can offer that knows whole claims."""

from collections.abc import Awaitable, Sequence
from typing import Protocol, runtime_checkable

import anyio

from .._claims import ResourceClaim


@runtime_checkable
class ResourceLock(Protocol):
    """Names that one holder at a time can hold. Blank names are refused with a ``ValueError``."""

    async def acquire(self, resource: str, holder: str) -> bool:
        """Take a resource; never waits for another holder.

        Returns:
            True if it was free or *holder* has it already; False if another has it.
        """
        ...

    async def release(self, resource: str, holder: str) -> None:
        """Give a resource back. Does nothing if it is free, and changes nothing if another holder has it."""
        ...

    async def release_all(self, holder: str) -> int:
        """Give back all that *holder* has; return how many resources that were."""
        ...

    def is_locked(self, resource: str) -> bool:
        """Whether anybody has it."""
        ...

    def holder_of(self, resource: str) -> str | None:
        """Return who has it, if anybody."""
        ...


class Lost(Protocol):
    """Tells that a lease was lost."""

    def is_set(self) -> bool:
        """Whether it was."""
        ...

    async def wait(self) -> None:
        """Wait until it is."""
        ...


class _NeverLost:
    def is_set(self) -> bool:
        return False

    async def wait(self) -> None:
        await anyio.sleep_forever()


NEVER_LOST: Lost = _NeverLost()
"""For the leases of a lock that loses none; nobody needs to watch them."""


class Lease(Protocol):
    """Claims that are held.

    Attributes:
        claims: What was asked for.
        holder: By whom.
        fencing_token: Grows with each lease of a lock, so that a store can refuse what an older lease writes.
        lost: Tells when the lease was lost; ``NEVER_LOST`` if the lock loses none.
    """

    @property
    def claims(self) -> tuple[ResourceClaim, ...]: ...
    @property
    def holder(self) -> str: ...
    @property
    def fencing_token(self) -> int: ...
    @property
    def lost(self) -> Lost: ...

    def release(self) -> Awaitable[None] | None:
        """Give everything back; may be repeated.

        Returns:
            ``None`` if that is done, as in memory; otherwise what to await for it.
        """
        ...


@runtime_checkable
class ClaimLock(ResourceLock, Protocol):
    """A lock that takes all claims of an assignment at once, shared ones and folders included."""

    async def acquire_claims(
        self, claims: Sequence[ResourceClaim], holder: str, *, timeout_seconds: float | None = None
    ) -> Lease:
        """Take all claims or none, first come, first served, waiting until they can be held together.

        Cancelled while it waits, it holds nothing.

        Args:
            claims: What to take; they may overlap each other, and what *holder* has already.
            holder: For whom.
            timeout_seconds: How long to wait; 0 is not at all, ``None`` as long as it takes.

        Raises:
            ResourceConflictError: If they are not to be had in time.
        """
        ...
