"""Admission: which assignment may start now. Pure and synchronous, so that each answer is one atomic step.

Knows positions in a group, nothing else: no tasks, no clock, no engine.
"""


class Admission:
    """Hands out the positions of a group's assignments, in order and each at most once.

    Args:
        total: How many assignments there are.
        max_concurrency: The most that may run at the same time; ``None`` is no limit.
    """

    __slots__ = ("_next", "_running", "_total", "_withdrawn", "has_queued", "limit")

    def __init__(self, total: int, max_concurrency: int | None) -> None:
        self.limit = total if max_concurrency is None else min(total, max_concurrency)
        self.has_queued = total > 0
        """Whether any assignment may still start, now or later."""
        self._total = total
        self._next = 0
        self._running = 0
        self._withdrawn: set[int] = set()

    def __repr__(self) -> str:
        return f"Admission(next={self._next}, total={self._total}, running={self._running}, limit={self.limit})"

    def take(self) -> int | None:
        """Return the position that starts now, or ``None`` if none may.

        A position that was taken counts as running until ``finish()``.
        """
        position = self._next
        if not self.has_queued or self._running >= self.limit:
            return None
        self._running += 1
        self._move_on(position + 1)
        return position

    def finish(self) -> None:
        """Note that one of those that were taken has ended."""
        self._running -= 1

    def withdraw(self, position: int) -> bool:
        """Take a position out of the queue; return whether it was still in it."""
        if not self._next <= position < self._total or position in self._withdrawn:
            return False
        self._withdrawn.add(position)
        self._move_on(self._next)
        return True

    def close(self) -> None:
        """Let nothing start any more."""
        self._total = self._next
        self.has_queued = False

    def _move_on(self, position: int) -> None:
        while position in self._withdrawn:
            self._withdrawn.remove(position)
            position += 1
        self._next = position
        self.has_queued = position < self._total
