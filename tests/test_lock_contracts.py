"""Every lock of the library keeps the contracts that are given to users for theirs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel_agents import ClaimLock, InMemoryResourceLock
from parallel_agents.locks.file import FileResourceLock
from parallel_agents.testing import ClaimLockContract


class TestInMemoryResourceLock(ClaimLockContract):
    @pytest.fixture
    def lock(self) -> ClaimLock:
        return InMemoryResourceLock()


class TestFileResourceLock(ClaimLockContract):
    @pytest.fixture
    def lock(self, tmp_path: Path) -> Iterator[ClaimLock]:
        lock = FileResourceLock(tmp_path / "locks")
        yield lock
        lock.close()
        (tmp_path / "locks").mkdir(exist_ok=True)  # a test that refuses its input never makes it
        assert sorted(path.name for path in (tmp_path / "locks").iterdir()) in ([], ["locks.sqlite3", "opening"])
