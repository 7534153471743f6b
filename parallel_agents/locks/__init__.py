"""Locks: where the claims of assignments are taken."""

from ._protocol import NEVER_LOST as NEVER_LOST
from ._protocol import ClaimLock as ClaimLock
from ._protocol import Lease as Lease
from ._protocol import Lost as Lost
from ._protocol import ResourceLock as ResourceLock
from .memory import InMemoryResourceLock as InMemoryResourceLock

__all__ = ["NEVER_LOST", "ClaimLock", "InMemoryResourceLock", "Lease", "Lost", "ResourceLock"]
