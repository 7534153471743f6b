"""Who spent what within a run: what was metered, and what a result reports of the same spending.

An engine that makes several calls for one run, or one call of several, has to tell their usage apart.
"""

from .._context import RunContext
from .._models import NO_USAGE, Usage
from .._outcomes import AgentRunResult


def larger(reported: Usage, metered: Usage) -> Usage:
    """Return the larger of two accounts of the same spending, field by field: neither may be complete."""
    return Usage(
        input_tokens=max(reported.input_tokens, metered.input_tokens),
        output_tokens=max(reported.output_tokens, metered.output_tokens),
        requests=max(reported.requests, metered.requests),
        cost=max(reported.cost, metered.cost),
    )


class Meter:
    """Reads what a run spends from now on.

    Args:
        run: Its usage only grows.
    """

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self._before = run.usage

    def metered(self) -> Usage:
        """Return what was told to ``record_usage()`` since."""
        now = self._run.usage
        if now is self._before:
            return NO_USAGE
        return now if self._before is NO_USAGE else difference(now, self._before)

    def spent(self, result: object) -> Usage:
        """Return what was spent since, according to what was metered and to *result*, whatever it is."""
        metered = self.metered()
        if not isinstance(result, AgentRunResult):
            return metered
        return result.usage if metered is NO_USAGE else larger(result.usage, metered)

    def record(self, result: object) -> None:
        """Add to the run's usage what *result* reports and nobody has metered."""
        if isinstance(result, AgentRunResult) and result.usage is not NO_USAGE:
            metered = self.metered()
            self._run.record_usage(difference(larger(result.usage, metered), metered))


def difference(now: Usage, before: Usage) -> Usage:
    """Return what was spent between two accounts, of which the later one is the larger in every field."""
    return Usage(
        input_tokens=now.input_tokens - before.input_tokens,
        output_tokens=now.output_tokens - before.output_tokens,
        requests=now.requests - before.requests,
        cost=now.cost - before.cost,
    )
