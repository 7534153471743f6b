"""The journal of the library keeps the contract that is given to users for theirs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel_agents.journals import Journal
from parallel_agents.journals.sqlite import SqliteJournal
from parallel_agents.testing import JournalContract


class TestSqliteJournal(JournalContract):
    @pytest.fixture
    def journal(self, tmp_path: Path) -> Iterator[Journal]:
        with SqliteJournal(tmp_path / "journal") as journal:
            yield journal


def test_a_subclass_without_a_journal_is_told_so(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        from parallel_agents.testing import JournalContract

        class TestContract(JournalContract):
            pass
        """
    )
    run = pytester.runpytest_inprocess("-q", "-k", "protocol")
    run.stdout.fnmatch_lines(["E *give your subclass a fixture 'journal'"])
