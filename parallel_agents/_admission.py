"""Admission: which assignment may start now, and why not. Pure and synchronous, so that each answer is one atomic step.

Knows positions in a group, what they claim and what they depend on, nothing else: no clock, no engine, no locks.
"""

from collections.abc import Callable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from types import MappingProxyType

from ._claim_queue import ClaimQueue, Ticket
from ._claims import ResourceClaim

NO_PREREQUISITES: Mapping[int, Sequence[int]] = MappingProxyType({})


class Admission:
    """Hands out the positions of a group's assignments, each at most once, in order among those that may start.

    A position whose turn has come stays in line for its claims until it is finished, and those that overlap it are
    passed over meanwhile. One that depends on others gets in line for its claims only when they are satisfied.

    Args:
        total: How many assignments there are.
        max_concurrency: The most that may run at the same time; ``None`` is no limit.
        claims_of: What the assignment at a position needs for itself among the others; ``None`` if none needs anything.
        prerequisites: The positions that others depend on, by theirs; no circles.
    """

    __slots__ = (
        "_claims_of",
        "_dependents",
        "_is_closed",
        "_next",
        "_nothing_holds_back",
        "_postponed",
        "_queue",
        "_returned",
        "_running",
        "_tickets",
        "_total",
        "_unmet",
        "_withdrawn",
        "has_ready",
        "limit",
        "passed_over",
    )

    def __init__(
        self,
        total: int,
        max_concurrency: int | None,
        claims_of: Callable[[int], Sequence[ResourceClaim]] | None = None,
        prerequisites: Mapping[int, Sequence[int]] = NO_PREREQUISITES,
    ) -> None:
        self.limit = total if max_concurrency is None else min(total, max_concurrency)
        self.has_ready = total > 0
        """Whether ``take()`` may find one that can start, now or as soon as there is room."""
        self.passed_over: list[int] = []
        """Positions whose turn came before that of their claims; for the caller to take note of, and to clear."""
        self._claims_of = claims_of
        self._total = total
        self._next = 0
        self._running = 0
        self._withdrawn: set[int] = set()
        self._queue: ClaimQueue[int] = ClaimQueue()
        self._tickets: dict[int, Ticket[int]] = {}
        self._postponed: set[int] = set()
        self._returned: list[int] = []
        self._is_closed = False
        self._unmet = {position: len(others) for position, others in prerequisites.items()}
        self._nothing_holds_back = claims_of is None and not prerequisites
        self._dependents: dict[int, list[int]] = {}
        for position, others in prerequisites.items():
            for other in others:
                self._dependents.setdefault(other, []).append(position)

    @property
    def has_prerequisites(self) -> bool:
        """Whether any position depends on others."""
        return bool(self._dependents)

    def __repr__(self) -> str:
        return f"Admission(next={self._next}, total={self._total}, running={self._running}, limit={self.limit})"

    def take(self) -> int | None:
        """Return the position that starts now, or ``None`` if none may.

        A position that was taken counts as running until ``finish()`` or ``postpone()``.
        """
        if not self.has_ready or self._running >= self.limit:
            return None
        if self._returned:
            position: int | None = heappop(self._returned)
        elif self._nothing_holds_back:
            position = self._next
            self._next = position + 1
        else:
            position = self._take_next()
        if self._next >= self._total:
            self.has_ready = bool(self._returned)
        if position is not None:
            self._running += 1
        return position

    def extend(self) -> int:
        """Add a position after all others, and return it."""
        position = self._total
        if not self._is_closed:
            self._total += 1
            self.has_ready = True
        return position

    def finish(self, position: int) -> None:
        """Note that one of those that were taken has ended; those it was in the way of may start."""
        self._running -= 1
        if self._tickets:
            self._let_go(position)

    def satisfy(self, position: int) -> None:
        """Note that one has succeeded; those that depend on it, and on nothing else any more, may start."""
        for dependent in self._dependents.get(position, ()):
            self._unmet[dependent] -= 1
            if not self._unmet[dependent] and dependent < self._next and not self._is_closed:
                self._line_up(dependent)

    def dependents_of(self, position: int) -> list[int]:
        """Return all that depend on one, directly or not, each before those that depend on it."""
        found = dict.fromkeys(self._dependents.get(position, ()))
        following = list(found)
        for dependent in following:
            new = [further for further in self._dependents.get(dependent, ()) if further not in found]
            found.update(dict.fromkeys(new))
            following += new
        return following

    def postpone(self, position: int) -> None:
        """Take back that a position runs, until ``resume()``; it stays in line for its claims."""
        self._running -= 1
        self._postponed.add(position)

    def resume(self, position: int) -> None:
        """Let a postponed position start when there is room; before all that come after it."""
        self._postponed.remove(position)
        self._return(position)

    def withdraw(self, position: int) -> bool:
        """Take a position out that has not started; return whether there was one: False if it runs, or ran."""
        if self._next <= position < self._total and position not in self._withdrawn:
            self._forget_prerequisites(position)
            self._withdrawn.add(position)
            self._nothing_holds_back = False
            self._move_on(self._next)
            self.has_ready = self._next < self._total or bool(self._returned)
            return True
        if position in self._postponed:
            self._postponed.remove(position)
        elif position in self._returned:
            self._returned.remove(position)
            heapify(self._returned)
            self.has_ready = self._next < self._total or bool(self._returned)
        elif not self.is_passed_over(position) and not self._is_held_back(position):
            return False
        self._forget_prerequisites(position)
        self._let_go(position)
        return True

    def _forget_prerequisites(self, position: int) -> None:
        """Have what a position depends on make no difference to it any more."""
        if position in self._unmet:
            self._unmet[position] = -1  # never 0 again, however many succeed

    def close(self) -> None:
        """Let nothing start any more."""
        self._is_closed = True
        self._total = self._next
        self._returned.clear()
        self.has_ready = False

    def is_passed_over(self, position: int) -> bool:
        """Whether the turn of a position has come, but not that of its claims."""
        ticket = self._tickets.get(position)
        return ticket is not None and ticket.waits_for is not None

    def _is_held_back(self, position: int) -> bool:
        """Whether the turn of a position has come, but others that it depends on have not succeeded yet."""
        return position < self._next and self._unmet.get(position, 0) > 0

    def in_the_way_of(self, position: int) -> tuple[int, str]:
        """Return an earlier position that one that was passed over waits for, and over which resource."""
        found = self._queue.in_the_way_of(self._tickets[position])
        assert found is not None, "only for positions that are passed over"
        return found[0].owner, found[1]

    def _take_next(self) -> int | None:
        """Return the next position in order that may start; those that may not get their turn later."""
        while self._next < self._total:
            position = self._next
            self._move_on(position + 1)
            if not self._unmet.get(position) and self._gets_its_claims(position):
                return position
        return None

    def _line_up(self, position: int) -> None:
        """Let a position start that was held back, as soon as there is room and its claims are to be had."""
        if self._gets_its_claims(position):
            self._return(position)

    def _gets_its_claims(self, position: int) -> bool:
        """Put a position in line for its claims; return whether it may have them, or else pass it over."""
        claims = None if self._claims_of is None else self._claims_of(position)
        if not claims:
            return True
        ticket = self._tickets[position] = self._queue.enter(position, claims)
        if ticket.waits_for is None:
            return True
        self.passed_over.append(position)
        return False

    def _move_on(self, position: int) -> None:
        while position in self._withdrawn:
            self._withdrawn.remove(position)
            position += 1
        self._next = position

    def _let_go(self, position: int) -> None:
        """Take a position out of the line for its claims, and return those that it was in the way of."""
        ticket = self._tickets.pop(position, None)
        if ticket is not None:
            for cleared in self._queue.leave(ticket):
                self._return(cleared.owner)

    def _return(self, position: int) -> None:
        if not self._is_closed:
            heappush(self._returned, position)
            self.has_ready = True
