"""Where what agents did is kept, so that a crash costs none of it."""

from ._protocol import Ending, Entry, Journal, JournalError, LetsGo, Step

__all__ = ["Ending", "Entry", "Journal", "JournalError", "LetsGo", "Step"]
