"""What an exception out of an engine call means, and why agents are stopped. Pure and synchronous.

An exception group counts as what is worst in it: an order to end the program, then a fatal error, then an ordinary
one; it is a cancellation only if nothing else is in it.
"""

from collections.abc import Iterator

from attrs import frozen

from ._outcomes import OutcomeStatus


@frozen
class Stop:
    """Why agents are stopped before their time.

    Attributes:
        cause: Completes the sentence ``Cancelled: ...``.
        status: What becomes of those that have not started.
        group_status: What the group's last event says.
        status_if_running: What becomes of those that run.
    """

    cause: str
    group_status: str = "cancelled"
    status: OutcomeStatus = OutcomeStatus.CANCELLED
    status_if_running: OutcomeStatus = OutcomeStatus.CANCELLED

    @property
    def text(self) -> str:
        """For an agent that was running."""
        what = "Timed out" if self.status_if_running is OutcomeStatus.TIMED_OUT else "Cancelled"
        return f"{what}: {self.cause}"

    @property
    def text_if_queued(self) -> str:
        """For an agent that had not started."""
        if self.status is OutcomeStatus.REJECTED:
            return "Shutdown in progress"
        what = "Skipped" if self.status is OutcomeStatus.SKIPPED else "Cancelled before it started"
        return f"{what}: {self.cause}"


CALLER_CANCELLED = Stop("the caller was cancelled")
RUN_CANCELLED = Stop("cancel() was called")
TASK_CANCELLED = Stop("cancel_task() was called")
ENOUGH = Stop("enough agents succeeded", "enough", OutcomeStatus.SKIPPED)
BUDGET_SPENT = Stop("the budget is spent", "budget", OutcomeStatus.SKIPPED)
SHUTDOWN = Stop("the program is shutting down", "shutdown", OutcomeStatus.REJECTED)


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions that a group holds, however deep, or the one exception itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def order_to_end(error: BaseException, cancelled: type[BaseException]) -> BaseException | None:
    """Return the KeyboardInterrupt, SystemExit or other exception that is no ``Exception``, if there is one."""
    orders = (e for e in leaves(error) if not isinstance(e, Exception | cancelled))
    return next(orders, None)


def fatal_in(error: BaseException) -> Exception | None:
    """Return the MemoryError or RecursionError, if there is one."""
    return next((e for e in leaves(error) if isinstance(e, MemoryError | RecursionError)), None)


def is_cancellation(error: BaseException, cancelled: type[BaseException]) -> bool:
    """Whether there is nothing but cancellation in it."""
    return all(isinstance(e, cancelled) for e in leaves(error))
