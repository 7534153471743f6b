"""What an agent can leave behind in the task that it ran in, where the next one would run: a scope, a cancellation.

Asking with what is public takes longer than all else that is done for an agent, and does not show everything: a scope
without a deadline that is open can be told only from leaving the one around it. So the scope's own note of the tasks
that are directly in it is read, which both backends keep under one name. Where there is no such note, nobody is known
to be in the scope, and who finds it so leaves it.
"""

from collections.abc import Callable, Collection
from typing import Any

import anyio


def tasks_directly_in(scope: anyio.CancelScope) -> Collection[Any]:
    """Return the tasks whose innermost scope is *scope*, which has been entered; kept up to date by the backend."""
    on_trio = getattr(scope, "_CancelScope__original", None)
    tasks: Collection[Any] = getattr(getattr(on_trio, "_cancel_status", scope), "_tasks", ())
    return tasks


def cancel_requests(tasks: Collection[Any]) -> Callable[[], int]:
    """Return a function that counts how often a task was cancelled natively, and did not take it back; on trio, none.

    Args:
        tasks: That task alone.
    """
    return next((task.cancelling for task in tasks if hasattr(task, "cancelling")), int)
