"""For the tests of people who write their own engines and locks. Needs pytest; nothing else here imports it."""

from .locks import ClaimLockContract as ClaimLockContract
from .locks import ResourceLockContract as ResourceLockContract

__all__ = ["ClaimLockContract", "ResourceLockContract"]
