"""When an engine that has another try may make it, whatever its own rules say."""

import anyio

from .._context import RunContext
from .._endings import fatal_in


def may_go_on_after(error: Exception, run: RunContext) -> bool:
    """Whether the agent may do anything more after *error*.

    Not after a MemoryError or RecursionError, not when the program shuts down or the budget is spent, and not if what
    it raised is how it took its cancellation.
    """
    if fatal_in(error) is not None or run.shutdown_requested or run.budget_exhausted:
        return False
    return not anyio.get_current_task().has_pending_cancellation()
