"""An exception at a source line of the library, as Ctrl-C or a failing allocation may come at any of them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

from attrs import define, field, frozen

import parallel_agents

PACKAGE = Path(parallel_agents.__file__).parent

FILES = frozenset(
    str(PACKAGE / name)
    for name in (
        "_admission.py",
        "_claim_queue.py",
        "_claims.py",
        "_drive.py",
        "_executor.py",
        "_holding.py",
        "_run.py",
        "_slots.py",
        "locks/memory.py",
    )
)
"""The executor, the claims and the locks."""

Tracer: TypeAlias = Callable[[FrameType, str, Any], Any]


@frozen
class Line:
    """One line of a function."""

    file: str
    function: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}:{self.number} in {self.function}"


@define
class Tripwire:
    """Raises an exception at the *at*-th line of the library that is run, counted from 1; at 0 it only counts."""

    at: int
    exception: type[BaseException]
    passed: list[Line] = field(factory=list)
    hit: Line | None = None

    def _on_call(self, frame: FrameType, _event: str, _argument: Any) -> Tracer | None:
        return self._on_line if frame.f_code.co_filename in FILES and self.hit is None else None

    def _on_line(self, frame: FrameType, event: str, _argument: Any) -> Tracer | None:
        if event != "line" or self.hit is not None:
            return self._on_line
        code = frame.f_code
        line = Line(Path(code.co_filename).name, code.co_qualname, frame.f_lineno)
        self.passed.append(line)
        if len(self.passed) == self.at:
            self.hit = line
            raise self.exception("injected")
        return self._on_line

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Raise within the block only. Whoever traced before, such as coverage, does so again behind it."""
        before = sys.gettrace()
        sys.settrace(self._on_call)
        try:
            yield
        finally:
            sys.settrace(before)
