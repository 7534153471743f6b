"""The tables and functions in the database: how they come there, and in which version. Synchronous.

They stand in files, each of which leads from one version to the next; what was released does not change any more.
"""

from importlib.resources import files
from typing import Final

from .connections import Connection

VERSION: Final = 1


def version_of(connection: Connection) -> int:
    """Return the version of the tables; 0 if there are none."""
    there = connection.execute("SELECT to_regclass('parallel_agents.meta') IS NOT NULL").fetchone()
    if there is None or not there[0]:
        return 0
    row = connection.execute("SELECT version FROM parallel_agents.meta").fetchone()
    return 0 if row is None else int(row[0])


def migrate(connection: Connection) -> None:
    """Make the tables, or bring them up to this version, in one transaction; alone among all that do."""
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('parallel_agents.meta', 0))")
        connection.execute("CREATE SCHEMA IF NOT EXISTS parallel_agents")
        for version in range(version_of(connection) + 1, VERSION + 1):
            connection.execute(files("parallel_agents._postgres").joinpath(f"version-{version}.sql").read_bytes())
            connection.execute("UPDATE meta SET version = %s", (version,))
