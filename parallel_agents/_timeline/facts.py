"""What a picture of a run shows: a span for each agent, and how many ran and what was spent at each moment. Pure."""

from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import accumulate
from typing import Any

from attrs import frozen

from .._outcomes import AgentOutcome, OutcomeStatus, ParallelExecutionResult
from .._words import error_line, output_line


@frozen(kw_only=True)
class Span:
    """An agent in the picture. Times are seconds from the start of the group.

    Attributes:
        agent_id: The agent.
        task_id: The task.
        status: What came of it.
        start: When its engine call began; ``None`` if it never did.
        end: When it had its outcome; the end of the group for one that never started.
        attempts: How often it was tried.
        input_tokens: What it spent.
        output_tokens: What it spent.
        cost: What it spent.
        told: Its error, or the beginning of its output, in one line.
    """

    agent_id: str
    task_id: str
    status: OutcomeStatus
    start: float | None
    end: float
    attempts: int
    input_tokens: int
    output_tokens: int
    cost: float
    told: str

    @property
    def tokens(self) -> int:
        """Those of either kind."""
        return self.input_tokens + self.output_tokens


@frozen
class Chart:
    """A number over time.

    Attributes:
        name: What it counts.
        steps: Times, and what it is from each of them on.
    """

    name: str
    steps: tuple[tuple[float, float], ...]

    @property
    def highest(self) -> float:
        """The most it was."""
        return max((value for _, value in self.steps), default=0.0)


@frozen(kw_only=True)
class Picture:
    """A run, as it is drawn.

    Attributes:
        group_id: The group.
        seconds: How long it took.
        spans: In the order of the assignments.
    """

    group_id: str
    seconds: float
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, result: ParallelExecutionResult[Any]) -> "Picture":
        """Return the picture of a result."""
        ends = [(o.started_after_seconds or 0.0) + o.duration_seconds for o in result.outcomes]
        seconds = max([result.total_duration_seconds, *ends])
        spans = tuple(_span(outcome, seconds) for outcome in result.outcomes)
        return cls(group_id=result.group_id, seconds=seconds, spans=spans)

    @property
    def started(self) -> Iterator[tuple[float, Span]]:
        """Yield those that ran with the time of their start, in the order of the assignments."""
        return ((span.start, span) for span in self.spans if span.start is not None)

    def charts(self) -> tuple[Chart, ...]:
        """Return what is drawn over time: how many ran, how many waited, and what was spent, if anything was.

        Those that never started do not wait. What an agent spent is counted at its end: cost if any is known, tokens
        if not.
        """
        starts = [start for start, _ in self.started]
        spans = [span for _, span in self.started]
        charts = [
            Chart("running", _sums([*((start, 1) for start in starts), *((span.end, -1) for span in spans)])),
            Chart("waiting", _sums([(0.0, len(starts)), *((start, -1) for start in starts)])),
        ]
        if any(span.cost for span in spans):
            charts.append(Chart("cost", _sums([(span.end, span.cost) for span in spans])))
        elif any(span.input_tokens + span.output_tokens for span in spans):
            charts.append(
                Chart("tokens", _sums([(span.end, span.input_tokens + span.output_tokens) for span in spans]))
            )
        return tuple(charts)

    def lanes(self) -> list[int | None]:
        """Return a lane for each span that ran, as few as there are agents at the same time; none overlap in one."""
        order = sorted((start, number) for number, (start, _) in self._numbered())
        lanes: list[int | None] = [None] * len(self.spans)
        free: list[int] = []
        busy: list[tuple[float, int]] = []
        for start, number in order:
            while busy and busy[0][0] <= start:
                heappush(free, heappop(busy)[1])
            lane = heappop(free) if free else len(busy)
            lanes[number] = lane
            heappush(busy, (self.spans[number].end, lane))
        return lanes

    def _numbered(self) -> Iterator[tuple[int, tuple[float, Span]]]:
        return ((number, (s.start, s)) for number, s in enumerate(self.spans) if s.start is not None)


def _span(outcome: AgentOutcome[Any], seconds: float) -> Span:
    start = outcome.started_after_seconds
    return Span(
        agent_id=outcome.agent_id,
        task_id=outcome.task_id,
        status=outcome.status,
        start=start,
        end=seconds if start is None else start + outcome.duration_seconds,
        attempts=outcome.attempts,
        input_tokens=outcome.usage.input_tokens,
        output_tokens=outcome.usage.output_tokens,
        cost=outcome.usage.cost,
        told=error_line(outcome) or output_line(outcome),
    )


def _sums(changes: Iterable[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Return the sum of all changes up to each time; changes at one time are one step."""
    ordered = sorted(changes, key=lambda change: change[0])
    sums: Sequence[float] = list(accumulate(change for _, change in ordered))
    times = [time for time, _ in ordered]
    last_of_its_time = (n for n in range(len(times)) if n + 1 == len(times) or times[n + 1] != times[n])
    return tuple((times[n], sums[n]) for n in last_of_its_time)
