"""RateLimitedEngine: agents wait until a limit of requests or tokens per time lets them start.

A limit is a generic cell rate algorithm (GCRA): per key one point in time up to which everything granted so far is paid
off at the allowed rate. Whoever waits stands in line at all its limits from the moment of its arrival, and takes from
all of them in one synchronous step, so that nothing is used up while another limit is waited for, and nobody waits for
somebody who came later.
Knows nothing of what agents do, and nothing of other processes.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import anyio
from anyio.lowlevel import RunVar
from attrs import Factory, define, field, frozen

from .._checks import number, one_of, shown, wrong_type
from .._context import current_run
from .._models import AgentAssignment, Usage
from .._outcomes import AgentRunResult
from ._metering import Meter
from ._protocol import AgentEngine, check_with, require_engine
from ._retry_after import retry_after_seconds

LATE_SECONDS = 0.05
"""How late an event loop may wake somebody up in line without lowering the rate; what is later is lost."""

KEYS_KEPT_AT_LEAST = 16
"""Below so many keys nobody looks whether some of them are idle."""


def _is_callable(_instance: object, attribute: Any, value: object) -> None:
    if not callable(value):
        raise wrong_type(attribute.name, "a function of an assignment", value)


def _is_reserve(instance: object, attribute: Any, value: object) -> None:
    if not callable(value):
        number(at_least=0)(instance, attribute, value)


def _one_for_all(_assignment: AgentAssignment) -> None:
    return None


@frozen(eq=False)
class RateLimit:
    """So many requests or tokens per time, for all engines that are given it.

    Before an engine call, *reserve* is taken; afterwards that is corrected by the usage of the call, if it has any. A
    call may cost more than has been saved up: it starts when all before it is paid off, and those after it wait for it.
    So there are never more than ``burst + amount * t / per_seconds`` granted in any *t* seconds, and what the last of
    them cost above one. Where the event loop wakes those in line up late, *t* counts up to ``LATE_SECONDS`` more.

    May be made outside an event loop, and be used in several, one after another; each has a count of its own. Keys
    that are idle are forgotten.

    Attributes:
        amount: How many in *per_seconds*, at an even pace.
        unit: What is counted of a ``Usage``: ``requests``, or ``tokens`` (input and output).
        per_seconds: The length of the period.
        key: Calls count together if this function gives the same for their assignments, such as
            ``lambda a: a.identity.model``; by default all do.
        reserve: What a call is taken to cost until its usage is known, or a function that says so of an assignment.
        burst: How many may be granted at once after a pause. With 1, the half millisecond by which a clock wakes
            somebody too late is lost, which matters from some ten calls per second on; a few more make up for it.
    """

    amount: float = field(validator=number(above=0))
    unit: str = field(default="requests", validator=one_of("requests", "tokens"))
    per_seconds: float = field(validator=number(above=0), kw_only=True)
    key: Callable[[AgentAssignment], Hashable] = field(default=_one_for_all, validator=_is_callable, kw_only=True)
    reserve: float | Callable[[AgentAssignment], float] = field(default=1, validator=_is_reserve, kw_only=True)
    burst: float = field(default=1, validator=number(at_least=1), kw_only=True)
    _cells: "RunVar[_Cells]" = field(init=False, repr=False, default=Factory(lambda: RunVar("parallel_agents_cells")))

    def _share_of(self, assignment: AgentAssignment) -> "_Share":
        cost = self.reserve(assignment) if callable(self.reserve) else self.reserve
        if type(cost) not in (int, float) or not 0 <= cost < math.inf:
            raise ValueError(f"reserve must give a number >= 0, got {shown(cost)}")
        cells = self._cells.get(None)
        if cells is None:
            cells = _Cells()
            self._cells.set(cells)
        interval = self.per_seconds / self.amount
        tolerance = (self.burst - 1) * interval
        return _Share(cells.of(self.key(assignment)), cost, interval, tolerance, self.unit)


class RateLimitedEngine:
    """Lets agents start no faster than limits allow, first come, first served.

    Waiting is cancellable, takes nothing then, and does not count towards the assignment's timeout. A call that need
    not wait starts without a checkpoint. An exception that carries a server's ``Retry-After`` makes everybody wait who
    shares a key with the agent, at least so long.

    Agents that wait here have started: they take a place of ``max_concurrency`` and of the executor's limiter.

    Args:
        inner: Makes the call.
        limits: All must let an agent start. Other engines may be given the same ones.
    """

    def __init__(self, inner: AgentEngine, *limits: RateLimit) -> None:
        require_engine("inner", inner)
        if not limits:
            raise ValueError("limits must hold at least one RateLimit")
        for limit in limits:
            if not isinstance(limit, RateLimit):
                raise wrong_type("limits", "RateLimits", limit)
        self._inner = inner
        self._limits = limits

    def __repr__(self) -> str:
        return f"RateLimitedEngine({self._inner!r}, {', '.join(map(repr, self._limits))})"

    def check(self, assignment: AgentAssignment, /) -> None:
        """Refuse what the inner engine refuses."""
        check_with(self._inner, assignment)

    async def run(self, assignment: AgentAssignment, /) -> AgentRunResult[Any]:
        """Wait until all limits let the agent start, and run it.

        Raises:
            LookupError: Outside an engine call of an executor.
            ValueError: A limit's ``reserve`` gave what is no number.
        """
        run = current_run()
        turn = _Turn([limit._share_of(assignment) for limit in self._limits])
        with turn:
            if not turn.take_nowait():
                with run.not_charged():
                    await turn.wait_and_take()
            meter = Meter(run)
            result: AgentRunResult[Any] | None = None
            try:
                return (result := await self._inner.run(assignment))
            except Exception as error:
                if (seconds := retry_after_seconds(error)) is not None:
                    turn.hold_back_all(seconds)
                raise
            finally:
                turn.correct(meter.spent(result))


@define(eq=False)
class _Cell:
    """What was granted of one limit to one key."""

    paid_off_at: float = -math.inf
    held_back_until: float = -math.inf
    returned: float = 0.0
    users: int = 0
    line: "OrderedDict[_Turn, None]" = field(factory=OrderedDict)

    @property
    def first(self) -> "_Turn | None":
        return next(iter(self.line), None)

    def is_idle(self, now: float) -> bool:
        return not self.users and self.paid_off_at <= now and self.held_back_until <= now


@define(eq=False)
class _Cells:
    """The cells of one limit in one event loop, by key."""

    by_key: dict[Hashable, _Cell] = field(factory=dict)
    look_for_idle_at: int = KEYS_KEPT_AT_LEAST

    def of(self, key: Hashable) -> _Cell:
        cell = self.by_key.get(key)
        if cell is None:
            if len(self.by_key) >= self.look_for_idle_at:
                self._forget_idle()
            cell = self.by_key[key] = _Cell()
        return cell

    def _forget_idle(self) -> None:
        now = anyio.current_time()
        self.by_key = {key: cell for key, cell in self.by_key.items() if not cell.is_idle(now)}
        self.look_for_idle_at = max(KEYS_KEPT_AT_LEAST, 2 * len(self.by_key))


@define(eq=False)
class _Share:
    """What one call takes of one cell: a stretch of time at the allowed rate."""

    cell: _Cell
    cost: float
    interval: float
    tolerance: float
    unit: str
    end: float = -math.inf
    returned_before: float = 0.0

    @property
    def ready_at(self) -> float:
        return max(self.cell.paid_off_at - self.tolerance, self.cell.held_back_until)

    def take(self, now: float) -> None:
        self.end = self.cell.paid_off_at = max(self.cell.paid_off_at, now) + self.cost * self.interval
        self.returned_before = self.cell.returned

    def correct(self, usage: Usage, now: float) -> None:
        """Take what a call cost above its share, or give back what it did not use of the time still to come."""
        spent = usage.requests if self.unit == "requests" else usage.input_tokens + usage.output_tokens
        if not spent:  # not reported
            return
        extra = (spent - self.cost) * self.interval
        if extra >= 0:
            self.cell.paid_off_at = max(self.cell.paid_off_at, now) + extra
            return
        end = self.end - (self.cell.returned - self.returned_before)  # at the latest
        unused = min(-extra, max(0.0, end - now))
        self.cell.paid_off_at -= unused
        self.cell.returned += unused


@define(eq=False)
class _Turn:
    """One call in line at all its limits; a context manager for as long as the call takes."""

    shares: list[_Share]
    news: anyio.Event | None = None

    def __enter__(self) -> None:
        for share in self.shares:
            share.cell.users += 1

    def __exit__(self, *_error: object) -> None:
        for share in self.shares:
            share.cell.users -= 1

    def take_nowait(self) -> bool:
        """Take all shares if nobody stands in line and nothing is to be waited for; return whether it was so."""
        now = anyio.current_time()
        if any(share.cell.line or share.ready_at > now for share in self.shares):
            return False
        for share in self.shares:
            share.take(now)
        return True

    async def wait_and_take(self) -> None:
        """Stand in line until all shares can be taken. Cancelled, it takes none."""
        for share in self.shares:
            share.cell.line[self] = None
        try:
            while (ready_at := self._ready_at()) > anyio.current_time():
                self.news = anyio.Event()
                with anyio.CancelScope(deadline=ready_at):
                    await self.news.wait()
            # Counted from when it was due, so that the time by which a loop wakes up late is not lost each time.
            due = max(ready_at, anyio.current_time() - LATE_SECONDS)
            for share in self.shares:
                share.take(due)
        finally:
            for share in self.shares:
                share.cell.line.pop(self, None)
            self._tell_those_in_front()

    def _ready_at(self) -> float:
        if any(share.cell.first is not self for share in self.shares):
            return math.inf
        return max(share.ready_at for share in self.shares)

    def _tell_those_in_front(self) -> None:
        for share in self.shares:
            if (first := share.cell.first) is not None and first.news is not None:
                first.news.set()

    def correct(self, usage: Usage) -> None:
        """Count what the call has cost instead of what was reserved for it."""
        now = anyio.current_time()
        for share in self.shares:
            share.correct(usage, now)
        self._tell_those_in_front()

    def hold_back_all(self, seconds: float) -> None:
        """Let nobody start for so long; never sooner than what was said before."""
        until = anyio.current_time() + seconds
        for share in self.shares:
            share.cell.held_back_until = max(share.cell.held_back_until, until)
