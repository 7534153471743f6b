"""What is spent is told to the database soon, many amounts at once. Knows threads; does not know what spends."""

import threading
from collections.abc import Callable
from typing import Any, Generic, LiteralString, TypeVar

from .._models import NO_USAGE, Usage
from .connections import Connection

K = TypeVar("K")


class Spending(Generic[K]):
    """Amounts that the database does not know yet.

    Args:
        statement: Adds amounts: takes arrays of keys, input tokens, output tokens, requests and costs.
        soon: Has something done when the database is there.
    """

    def __init__(self, statement: LiteralString, soon: Callable[[Callable[[Connection], Any]], None]) -> None:
        self._statement: LiteralString = statement
        self._soon = soon
        self._guard = threading.Lock()
        self._writing = threading.Lock()
        self._spent: dict[K, Usage] = {}
        self._is_to_be_written = False

    def add(self, key: K, usage: Usage) -> None:
        """Add to what is to be told; never waits."""
        with self._guard:
            self._spent[key] = self._spent.get(key, NO_USAGE) + usage
            is_news, self._is_to_be_written = not self._is_to_be_written, True
        if is_news:
            self._soon(self.write)

    def write(self, connection: Connection) -> None:
        """Tell what was spent since the last time; who tells something later waits for it."""
        with self._writing:
            with self._guard:
                spent, self._spent = self._spent, {}
                self._is_to_be_written = False
            if not spent:
                return
            columns = [(key, *columns_of(usage)) for key, usage in spent.items()]
            try:
                connection.execute(self._statement, [list(column) for column in zip(*columns, strict=True)])
            except BaseException:
                with self._guard:
                    for key, usage in spent.items():
                        self._spent[key] = self._spent.get(key, NO_USAGE) + usage
                raise


def columns_of(usage: Usage) -> tuple[int, int, int, float]:
    """Return a usage as the tables hold it."""
    return usage.input_tokens, usage.output_tokens, usage.requests, usage.cost
