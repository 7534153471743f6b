"""FunctionEngine: any async function of an assignment as an engine."""

from collections.abc import Awaitable, Callable
from typing import Any

from .._models import AgentAssignment
from .._outcomes import AgentRunResult, completed_result
from ._protocol import AgentEngine


class FunctionEngine:
    """Runs an async function; its return value becomes the output of a completed result.

    A function that returns an ``AgentRunResult`` itself has the last word.

    Args:
        function: Called with the assignment.
    """

    def __init__(self, function: Callable[[AgentAssignment], Awaitable[Any]]) -> None:
        if not callable(function):
            raise TypeError(f"function must be an async function of an assignment, got {function!r}")
        self._function = function

    def __repr__(self) -> str:
        return f"FunctionEngine({getattr(self._function, '__qualname__', self._function)!s})"

    async def run(self, assignment: AgentAssignment, /) -> AgentRunResult[Any]:
        """Await the function."""
        return result_of(assignment, await self._function(assignment))


def result_of(assignment: AgentAssignment, value: Any) -> AgentRunResult[Any]:
    """Return the result that a function's return value stands for: itself, or a completed one with it as the output."""
    if isinstance(value, AgentRunResult):
        return value
    return completed_result(assignment.task.id, assignment.identity.id, value)


def call_of(engine: AgentEngine) -> tuple[Callable[[AgentAssignment], Awaitable[Any]], bool]:
    """Return what an executor awaits for an assignment, and whether ``result_of()`` makes its value a result.

    It is an engine's ``run``, or the function itself of a plain ``FunctionEngine``: a coroutine less for each agent.
    """
    if type(engine) is FunctionEngine:
        return engine._function, True
    return engine.run, False
