"""What an agent can leave behind in the task that it ran in, where the next one would run: a scope, a cancellation.

Asking with what is public takes longer than all else that is done for an agent, and does not show everything: a scope
without a deadline that is open can be told only from leaving the one around it. So the scope's own note of the tasks
that are directly in it is read, which both backends keep under one name. Where there is no such note, nobody is known
to be in the scope, and who finds it so leaves it. In the same way the scope is asked whether it is cancelled, itself
or from outside, and where it does not tell, the task is.
"""

from collections.abc import Callable, Collection
from enum import Enum, auto
from functools import partial
from types import TracebackType
from typing import Any, Self

import anyio


class Fitness(Enum):
    """What became of a task in which agents ran."""

    FIT = auto()
    """It can run more."""
    SPOILED = auto()
    """An agent cancelled it natively; it ends, and another takes its place."""
    HOLDS_A_SCOPE = auto()
    """An agent left a cancel scope open in it; another takes its place, and it ends when all else has."""
    NOT_NEEDED = auto()
    """There is nothing for it to run now; another takes its place when there is."""


class OwnScope:
    """A worker's cancel scope; after the block it tells what became of the task.

    Args:
        task: The one that enters it.

    Attributes:
        scope: In which agents run; used up once it was cancelled.
        fitness: What the block says, unless leaving it shows otherwise.
    """

    def __init__(self, task: anyio.TaskInfo) -> None:
        self._task = task
        self.scope = anyio.CancelScope()
        self.fitness = Fitness.FIT

    def __enter__(self) -> Self:
        self.scope.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        try:
            is_over = self.scope.__exit__(kind, error, traceback)
        except RuntimeError:
            self.fitness = Fitness.HOLDS_A_SCOPE  # which is why this one could not be left
            return True
        if is_over or not isinstance(error, anyio.get_cancelled_exc_class()):
            return bool(is_over)
        if self._task.has_pending_cancellation():
            return False
        self.fitness = Fitness.SPOILED  # natively cancelled, by somebody who found this task
        return True


def tasks_directly_in(scope: anyio.CancelScope) -> Collection[Any]:
    """Return the tasks whose innermost scope is *scope*, which has been entered; kept up to date by the backend."""
    tasks: Collection[Any] = getattr(_status_of(scope), "_tasks", ())
    return tasks


def pending_cancellation(scope: anyio.CancelScope, task: anyio.TaskInfo) -> Callable[[], bool]:
    """Return a function that tells what ``task.has_pending_cancellation()`` does, while *scope* is the innermost one.

    Args:
        scope: Has been entered by *task*.
        task: The task that asks.
    """
    status = _status_of(scope)
    if hasattr(status, "effectively_cancelled"):
        return partial(getattr, status, "effectively_cancelled")
    native: Any = next(iter(tasks_directly_in(scope)), None)
    if not all(map(hasattr, [scope, scope, native], ["_cancel_called", "_parent_scope", "_must_cancel"])):
        return task.has_pending_cancellation

    def is_pending() -> bool:
        around: Any = scope
        while around is not None:
            if around._cancel_called:  # perhaps behind a shield
                return task.has_pending_cancellation()
            around = around._parent_scope
        must_cancel: bool = native._must_cancel
        return must_cancel

    return is_pending


def cancel_requests(tasks: Collection[Any]) -> Callable[[], int]:
    """Return a function that counts how often a task was cancelled natively, and did not take it back; on trio, none.

    Args:
        tasks: That task alone.
    """
    return next((task.cancelling for task in tasks if hasattr(task, "cancelling")), int)


def _status_of(scope: anyio.CancelScope) -> Any:
    """Return what keeps a scope's state: a part of trio's, or the scope itself."""
    return getattr(getattr(scope, "_CancelScope__original", None), "_cancel_status", scope)
