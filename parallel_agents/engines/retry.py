"""RetryEngine: another attempt after a failure that may pass.

The loop, its backoff and its instrumentation are stamina's, and so are its switches ``stamina.set_active()`` and
``stamina.set_testing()``. What stamina does not know is decided here, before it sees an exception: which exceptions of
an agent are final whatever a policy says, what a server's ``Retry-After`` asks for, results that are no exceptions, and
a total time on the clock of the event loop (stamina's own timeout reads ``time.monotonic()``).
Knows nothing of how many agents run.
"""

import logging
import math
import random
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, TypeAlias

import anyio
from attrs import define, evolve, field, frozen
from attrs.validators import optional

from .._checks import integer, number, wrong_type
from .._context import RunContext, current_run
from .._endings import leaves
from .._models import AgentAssignment
from .._outcomes import AgentRunResult, TerminationReason
from ..events import PARALLEL_AGENT_RETRY, error_text
from ._going_on import may_go_on_after
from ._metering import Meter
from ._protocol import AgentEngine, check_with, require_engine
from ._retry_after import retry_after_seconds

try:
    import stamina
except ModuleNotFoundError as error:
    message = "RetryEngine needs stamina: pip install 'parallel-agents[retry]'"
    raise ModuleNotFoundError(message, name=error.name) from error

logging.getLogger("stamina").addHandler(logging.NullHandler())  # without logging set up, Python would write to stderr

RetryOn: TypeAlias = tuple[type[Exception], ...] | Callable[[Exception], bool]
RetryResults: TypeAlias = frozenset[TerminationReason] | Callable[[AgentRunResult[Any]], bool]

DEFAULT_TOTAL_SECONDS: float | None = 300.0
"""Long enough for a server's bad minutes, and an end to the wait that a wrong ``Retry-After`` asks for."""


def _as_retry_on(value: Any) -> Any:
    if isinstance(value, type):
        return (value,)
    return value if callable(value) else tuple(value)


def _is_retry_on(_instance: object, attribute: Any, value: Any) -> None:
    if not isinstance(value, tuple):
        return
    if not value:
        raise ValueError(f"{attribute.name} must name at least one exception type")
    for kind in value:
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            raise wrong_type(attribute.name, "types of Exception, or a function of an exception", kind)


def _as_retry_results(value: Callable[[AgentRunResult[Any]], bool] | Iterable[TerminationReason]) -> Any:
    return value if callable(value) else frozenset(value)


def _is_retry_results(_instance: object, attribute: Any, value: Any) -> None:
    if not isinstance(value, frozenset):
        return
    for reason in value:
        if not isinstance(reason, TerminationReason):
            raise wrong_type(attribute.name, "TerminationReasons, or a function of a result", reason)
    if final := value & {TerminationReason.COMPLETED, TerminationReason.BUDGET_EXHAUSTED}:
        names = ", ".join(sorted(reason.name for reason in final))
        raise ValueError(f"{attribute.name} must not hold {names}: another attempt would not help")


@frozen(kw_only=True)
class RetryPolicy:
    """When to try again, and how long to wait before.

    The wait after attempt *n* is ``initial_wait_seconds * 2 ** (n - 1)`` and a random part of the jitter, together at
    most ``max_wait_seconds``. Where a server says how long to wait, it is that instead, and the jitter on top.

    Attributes:
        retry_on: The exception types after which there is another attempt, or a function that tells of an exception.
            An exception group counts if each exception in it does.
        retry_results: The termination reasons of results after which there is another attempt, or a function that
            tells of a result.
        attempts: How often the agent is started at most, the first time included.
        initial_wait_seconds: The wait after the first attempt.
        max_wait_seconds: The longest wait that is not asked for by a server.
        jitter_seconds: The most that is added to a wait at random, so that agents do not come back all at once.
        total_seconds: An attempt that would start later than so long after the first is not made, and not waited for;
            ``None`` is no limit. It does not end an attempt: the assignment's ``timeout_seconds`` does.
    """

    retry_on: RetryOn = field(converter=_as_retry_on, validator=_is_retry_on)
    retry_results: RetryResults = field(default=frozenset(), converter=_as_retry_results, validator=_is_retry_results)
    attempts: int = field(default=3, validator=integer(at_least=1))
    initial_wait_seconds: float = field(default=0.5, validator=number(at_least=0))
    max_wait_seconds: float = field(default=30.0, validator=number(at_least=0))
    jitter_seconds: float = field(default=1.0, validator=number(at_least=0))
    total_seconds: float | None = field(default=DEFAULT_TOTAL_SECONDS, validator=optional(number(above=0)))

    def covers(self, error: Exception) -> bool:
        """Whether there may be another attempt after *error*."""
        if not isinstance(self.retry_on, tuple):
            return self.retry_on(error)
        kinds = self.retry_on
        return isinstance(error, kinds) or all(isinstance(leaf, kinds) for leaf in leaves(error))

    def refuses(self, result: object) -> bool:
        """Whether there may be another attempt after *result*; never after a spent budget, or what is no result."""
        if not isinstance(result, AgentRunResult) or result.termination_reason is TerminationReason.BUDGET_EXHAUSTED:
            return False
        if isinstance(self.retry_results, frozenset):
            return result.termination_reason in self.retry_results
        return self.retry_results(result)


class RetryEngine:
    """Runs an agent again when it fails in a way that may pass.

    There is no other attempt after a cancellation, a MemoryError or RecursionError (also in an exception group), a
    result that says that the budget is spent, or a failure while the program shuts down. Waiting is cancellable, and
    counts towards the assignment's timeout.

    Each retry is an event, ``execution.parallel.agent_retry``. The usage of all attempts is added up. The error of the
    last attempt is raised as it is, with what came of the earlier ones as its notes; a refused result of the last
    attempt is returned.

    Args:
        inner: Makes one attempt; ``current_run().attempt`` says which.
        policy: When to try again.
    """

    def __init__(self, inner: AgentEngine, policy: RetryPolicy) -> None:
        require_engine("inner", inner)
        if not isinstance(policy, RetryPolicy):
            raise wrong_type("policy", "a RetryPolicy", policy)
        self._inner = inner
        self._policy = policy

    def __repr__(self) -> str:
        return f"RetryEngine({self._inner!r}, attempts={self._policy.attempts})"

    def check(self, assignment: AgentAssignment, /) -> None:
        """Refuse what the inner engine refuses."""
        check_with(self._inner, assignment)

    async def run(self, assignment: AgentAssignment, /) -> AgentRunResult[Any]:
        """Run the agent until an attempt is good, or the last one.

        Raises:
            LookupError: Outside an engine call of an executor.
        """
        return await _Attempts(self._policy, current_run()).make(self._inner, assignment)


class _RefusedResultError(Exception):
    """Carries a result that the policy refuses to where retries are decided."""

    def __init__(self, result: AgentRunResult[Any]) -> None:
        super().__init__(result)
        self.result = result

    def __str__(self) -> str:
        text = f"ended with {self.result.termination_reason.value}"
        return f"{text}: {self.result.error_message}" if self.result.error_message else text


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, _RefusedResultError) else error_text(error)


@define(eq=False)
class _Backoff:
    """Tells stamina how long to wait; stamina leaves it in a circle, which therefore must not hold the run."""

    seconds: float = 0.0

    def __call__(self, _error: Exception) -> float:
        return self.seconds


@define(eq=False)
class _Attempts:
    """The attempts of one engine call."""

    policy: RetryPolicy
    run: RunContext
    backoff: _Backoff = field(factory=_Backoff)
    end: float = math.inf
    earlier: list[str] = field(factory=list)

    async def make(self, inner: AgentEngine, assignment: AgentAssignment) -> AgentRunResult[Any]:
        """Make them, and put together what came of them."""
        meter = Meter(self.run)
        if self.policy.total_seconds is not None:
            self.end = anyio.current_time() + self.policy.total_seconds
        try:
            result = await self._until_one_is_good(inner, assignment)
        except _RefusedResultError as refused:
            result = refused.result
        except Exception as error:
            for number, text in enumerate(self.earlier, start=1):
                error.add_note(f"Attempt {number}: {text}")
            raise
        if self.earlier and isinstance(result, AgentRunResult):
            return evolve(result, usage=meter.metered())
        return result

    async def _until_one_is_good(self, inner: AgentEngine, assignment: AgentAssignment) -> AgentRunResult[Any]:
        attempt: stamina.Attempt | None = None
        self.run.attempt = 1
        while True:
            meter = Meter(self.run)
            try:
                result = await inner.run(assignment)
                is_refused = self.policy.refuses(result)
                if is_refused or attempt is not None:
                    meter.record(result)
                if not is_refused:
                    return result
                raise _RefusedResultError(result)
            except Exception as error:
                if attempt is None:  # stamina costs more than the executor: who succeeds at once does not need it
                    attempts = self._stamina_attempts()
                    attempt = await anext(attempts)  # noqa: ASYNC120 - the first one is there without a wait
                if not self._may_go_on(error, attempt):
                    raise
                with attempt:  # which tells stamina that this one failed
                    raise
            # the type of stamina's __exit__ does not tell that it swallows the error
            attempt = await anext(attempts)  # type: ignore[unreachable]
            self.run.attempt = attempt.num

    def _stamina_attempts(self) -> AsyncIterator[stamina.Attempt]:
        return aiter(
            stamina.retry_context(
                on=self.backoff,
                attempts=self.policy.attempts,
                timeout=None,
                wait_initial=self.policy.initial_wait_seconds,
                wait_max=self.policy.max_wait_seconds,
            )
        )

    def _may_go_on(self, error: Exception, attempt: stamina.Attempt) -> bool:
        """Decide whether there is another attempt, and tell about it."""
        if attempt.num >= self.policy.attempts or not stamina.is_active() or not self._may_pass(error):
            return False
        seconds = self._wait_after(error, attempt)
        if anyio.current_time() + seconds > self.end:
            return False
        self.backoff.seconds = seconds
        text = _text(error)
        self.earlier.append(text)
        self.run.emit(PARALLEL_AGENT_RETRY, attempt=attempt.num, wait_seconds=seconds, error=text)
        return True

    def _may_pass(self, error: Exception) -> bool:
        is_covered = isinstance(error, _RefusedResultError) or self.policy.covers(error)
        return is_covered and may_go_on_after(error, self.run)

    def _wait_after(self, error: Exception, attempt: stamina.Attempt) -> float:
        jitter = random.uniform(0.0, self.policy.jitter_seconds)  # noqa: S311 - spreads load, hides nothing
        asked = retry_after_seconds(error)
        if asked is not None:
            return asked + jitter
        return min(attempt.next_wait + jitter, self.policy.max_wait_seconds)
