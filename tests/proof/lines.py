"""An exception at a source line of the library, as Ctrl-C or a failing allocation may come at any of them."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from linecache import getline
from pathlib import Path
from types import CodeType, FrameType
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

    code: CodeType
    number: int

    @property
    def function(self) -> str:
        return f"{Path(self.code.co_filename).stem.lstrip('_')}.{self.code.co_qualname}"

    @property
    def text(self) -> str:
        return getline(self.code.co_filename, self.number).strip()

    def __str__(self) -> str:
        return f"{self.function}, line {self.number}: {self.text}"


@define
class Recorder:
    """Counts how often each line of the library is run.

    Two kinds of lines are left out, at which the interpreter looks for no signals and allocates nothing: ``try:``, and
    a ``with`` that is left. Between them and what they protect there is no gap, except for a tracer.
    """

    passed: Counter[Line] = field(factory=Counter)
    _latest: dict[FrameType, int] = field(factory=dict)

    def _on_call(self, frame: FrameType, _event: str, _argument: Any) -> Tracer | None:
        return self._on_line if frame.f_code.co_filename in FILES else None

    def _on_line(self, frame: FrameType, event: str, _argument: Any) -> Tracer:
        if event == "line":
            line = Line(frame.f_code, frame.f_lineno)
            is_left = self._latest.get(frame, 0) > line.number and line.text.startswith(("with ", "async with "))
            self._latest[frame] = line.number
            if line.text != "try:" and not is_left:
                self.passed[line] += 1
                self._on_passed(line)
        return self._on_line

    def _on_passed(self, line: Line) -> None:
        """Called for each line, before it is run."""

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Look at the lines of the block, and of what runs meanwhile."""
        before = sys.gettrace()
        sys.settrace(self._on_call)
        try:
            yield
        finally:
            sys.settrace(before)  # whoever traced before, such as coverage, does so again
            self._latest.clear()


@define
class Tripwire(Recorder):
    """Raises an exception when a line is run for the *turn*-th time, counted from 1."""

    line: Line = field(kw_only=True)
    turn: int = field(kw_only=True)
    exception: type[BaseException] = field(kw_only=True)
    was_hit: bool = field(default=False, init=False)

    def _on_call(self, frame: FrameType, _event: str, _argument: Any) -> Tracer | None:
        return self._on_line if frame.f_code is self.line.code and not self.was_hit else None

    def _on_passed(self, line: Line) -> None:
        if line == self.line and self.passed[line] == self.turn:
            self.was_hit = True
            raise self.exception("injected")
