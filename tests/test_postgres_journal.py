"""x"""

from collections.abc import Iterator

import pytest
from postgres_server import PostgresServer, postgres_server

from parallel_agents.journals.postgres import PostgresJournal
from parallel_agents.testing import JournalContract


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture
def url(server: PostgresServer) -> str:
    return server.empty()


class TestPostgresJournal(JournalContract):
    @pytest.fixture
    def journal(self, url: str) -> Iterator[PostgresJournal]:
        with PostgresJournal(url) as journal:
            yield journal
