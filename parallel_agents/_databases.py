"""Databases on the command line: an address where a file or a folder could stand.

Loads what they need only when one is given.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .journals.postgres import PostgresJournal
    from .locks.postgres import PostgresResourceLock
    from .postgres import PostgresStore


def is_address(text: str) -> bool:
    """Whether a text is the address of a database, and no path."""
    return text.startswith(("postgresql://", "postgres://"))


class Databases:
    """Opens each database once: what a run keeps in it shares one session.

    All methods raise ``ModuleNotFoundError`` if psycopg is missing, ``ValueError`` for what is no address, and
    ``ParallelAgentsError`` if a database cannot be used.
    """

    def __init__(self) -> None:
        self._stores: dict[str, PostgresStore] = {}

    def lock(self, address: str) -> "PostgresResourceLock":
        """Return an open lock."""
        from .locks.postgres import PostgresResourceLock  # noqa: PLC0415 - an extra

        lock = PostgresResourceLock(self._store(address))
        lock.open()
        return lock

    def journal(self, address: str) -> "PostgresJournal":
        """Return an open journal."""
        from .journals.postgres import PostgresJournal  # noqa: PLC0415 - an extra

        journal = PostgresJournal(self._store(address))
        journal.open()
        return journal

    def _store(self, address: str) -> "PostgresStore":
        from .postgres import PostgresStore  # noqa: PLC0415 - an extra

        if not is_address(address):
            raise ValueError("an address starts with postgresql://")
        return self._stores.setdefault(address, PostgresStore(address))
