"""FallbackEngine: another engine where one fails."""

from collections import deque
from typing import Any

from attrs import evolve

from .._context import RunContext, current_run
from .._models import AgentAssignment
from .._outcomes import AgentRunResult, TerminationReason
from ..events import error_text
from ._going_on import may_go_on_after
from ._metering import Meter
from ._protocol import AgentEngine, check_with, require_engine


class FallbackEngine:
    """Runs an agent on the first of several engines, and on the next one if that fails, each once.

    A failure is an exception, or a result that ended with neither success nor parked; the result or error of the last
    engine is the agent's. There is no next one after a cancellation, a MemoryError or RecursionError, a spent budget,
    or while the program shuts down. The usage of all is added up, and what failed before is in the error's notes.

    Args:
        first: What should run agents.
        others: What runs them instead, in order.
    """

    def __init__(self, first: AgentEngine, *others: AgentEngine) -> None:
        self._engines = (first, *others)
        for engine in self._engines:
            require_engine("each", engine)

    def __repr__(self) -> str:
        return f"FallbackEngine({', '.join(map(repr, self._engines))})"

    def check(self, assignment: AgentAssignment, /) -> None:
        """Refuse what any of the engines refuses."""
        for engine in self._engines:
            check_with(engine, assignment)

    async def run(self, assignment: AgentAssignment, /) -> AgentRunResult[Any]:
        """Run the agent on one engine after another until one does not fail.

        Raises:
            LookupError: Outside an engine call of an executor.
        """
        run = current_run()
        total = Meter(run)
        failures: list[str] = []
        left = deque(self._engines)
        while True:
            engine = left.popleft()
            meter = Meter(run)
            try:
                result = await engine.run(assignment)
            except Exception as error:
                if not left or not may_go_on_after(error, run):
                    for text in failures:
                        error.add_note(text)
                    raise
                failures.append(f"{engine!r}: {error_text(error)}")
                continue
            meter.record(result)
            if not left or not _is_worth_another(result, run):
                is_summed_up = failures and isinstance(result, AgentRunResult)
                return evolve(result, usage=total.metered()) if is_summed_up else result
            failures.append(f"{engine!r}: ended with {result.termination_reason.value}")


def _is_worth_another(result: object, run: RunContext) -> bool:
    if not isinstance(result, AgentRunResult) or not result.is_failure:
        return False
    is_final = result.termination_reason is TerminationReason.BUDGET_EXHAUSTED
    return not (is_final or run.shutdown_requested or run.budget_exhausted)
