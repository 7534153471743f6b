"""x"""

from collections.abc import Iterator

import pytest
from postgres_server import PostgresServer, postgres_server

from parallel_agents import ClaimLock
from parallel_agents.locks.postgres import PostgresResourceLock
from parallel_agents.testing import ClaimLockContract


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture
def url(server: PostgresServer) -> str:
    return server.empty()


class TestPostgresResourceLock(ClaimLockContract):
    @pytest.fixture
    def lock(self, url: str) -> Iterator[ClaimLock]:
        with PostgresResourceLock(url) as lock:
            yield lock
            assert lock.statistics().waiting == ()
