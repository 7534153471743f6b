"""How much a proof tries, and the count of what it tried, which stands at the end of the test run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

from attrs import define, field, frozen

Level: TypeAlias = Literal["few", "short", "long"]
"""How much: where another session runs more; what every change is held against; what takes an hour."""


@define(eq=False)
class Tally:
    """One line of the summary."""

    name: str
    seed: int
    runs: int = 0
    violations: int = 0
    remarks: list[str] = field(factory=list)

    def __str__(self) -> str:
        counted = f"{self.name}: {self.runs:,} runs, {self.violations} violations, seed {self.seed}"
        return "; ".join([counted, *self.remarks])

    @contextmanager
    def run(self, *words: object) -> Iterator[None]:
        """Count one run; what it raises is a violation, and is told how to get it again."""
        self.runs += 1
        try:
            yield
        except BaseException as error:
            self.violations += 1
            error.add_note(f"to see it again: {', '.join(map(str, words))} (--proof-seed={self.seed})")
            raise


@frozen
class Proof:
    """What the tests of one test run share."""

    level: Level
    seed: int
    tallies: dict[str, Tally] = field(factory=dict)

    def size(self, *, few: int, short: int, long: int) -> int:
        return {"few": few, "short": short, "long": long}[self.level]

    def tally(self, name: str) -> Tally:
        """Return the count of that name; tests that share it are one line."""
        return self.tallies.setdefault(name, Tally(name, self.seed))
