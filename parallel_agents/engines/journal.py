"""JournaledEngine: what an agent did is kept, and not done again.

Decides what is kept of an agent, and when a kept result may stand for a new one. Knows no file.
"""

import hashlib
import json
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

from attrs import evolve, fields, has

from .._checks import wrong_type
from .._context import RunContext, current_run
from .._models import NO_USAGE, AgentAssignment
from .._outcomes import AgentOutcome, AgentRunResult
from ..events import PARALLEL_AGENT_RESUMED, error_text
from ..journals import Ending, Entry, Journal, JournalError, LetsGo, Step
from ..serialization import make_converter, parse_json, plain_json, structure, unstructure
from ._metering import Meter
from ._protocol import AgentEngine, check_with, require_engine

__all__ = ["Journal", "JournalError", "JournaledEngine"]

FINGERPRINT_LEAVES_OUT = ("timeout_seconds", "resource_claims")
"""Fields of an assignment that say when an agent runs and for how long, not what it does."""

_runs_that_know: "weakref.WeakSet[RunContext]" = weakref.WeakSet()


class JournaledEngine:
    """Runs each agent until it has succeeded once, over all runs of an execution.

    Its start, what it spends and how it ended are recorded durably, in this order, and an ending before anybody hears
    of it. When the same execution is run again, after a crash or an interruption, an agent that succeeded (or is
    parked) returns its recorded result and does not run. One that failed, was stopped or had not ended runs again: *at
    least once*, so what it does to the world should bear being done twice. What earlier starts spent is kept in the
    outcome, and counts towards a budget.

    An agent that has other work than when it succeeded runs again too: another identity, task, configuration, memory or
    *version*, or other outputs of the tasks that it depends on. The timeout and the claims do not count.

    Events called ``execution.parallel.agent_resumed`` tell of all that, with the reason: ``recorded``, ``changed``,
    ``interrupted`` or ``failed``.

    Args:
        inner: What runs agents.
        journal: Where it is kept; open while agents run.
        execution: All runs of one name continue each other; the id of the group unless given.
        version: Stands for whatever else decides what agents do, such as the code or a prompt; text of any kind.
        output_type: The type of the agents' outputs, as ``cattrs`` knows it: a class of attrs, a dataclass, a
            ``tuple[int, ...]``. Unless given, outputs are plain JSON: text, numbers, booleans, None, lists, and dicts
            with text as keys.
    """

    def __init__(
        self,
        inner: AgentEngine,
        journal: Journal,
        *,
        execution: str | None = None,
        version: str = "",
        output_type: Any = None,
    ) -> None:
        require_engine("inner", inner)
        if not isinstance(journal, Journal):
            raise wrong_type("journal", "a Journal, such as SqliteJournal(path)", journal)
        if execution is not None and not execution.strip():
            raise ValueError("execution must not be blank")
        self._inner = inner
        self._journal = journal
        self._execution = execution
        self._version = version
        self._output_type = output_type
        self._converter = make_converter()

    def __repr__(self) -> str:
        return f"JournaledEngine({self._inner!r}, {self._journal!r})"

    def check(self, assignment: AgentAssignment, /) -> None:
        """Refuse what the inner engine refuses."""
        check_with(self._inner, assignment)

    async def run(self, assignment: AgentAssignment, /) -> AgentRunResult[Any]:
        """Return the recorded result of an agent, or run it and record how it ends.

        Waits for the journal before and after. A cancellation that arrives while a result is recorded comes too late.

        Raises:
            JournalError: If something cannot be recorded. What the agent returned is in its ``result``.
            TypeError: If its output cannot be recorded.
            LookupError: Outside an engine call of an executor.
        """
        run = current_run()
        total = Meter(run)
        entry = await self._journal.start(self._step(assignment, run))
        if run not in _runs_that_know:  # where it is retried, what it spent before is known from the first time
            _runs_that_know.add(run)
            if entry.spent is not NO_USAGE:
                run.record_usage(entry.spent)
            if entry.reason is not None:
                run.emit(PARALLEL_AGENT_RESUMED, reason=entry.reason)
        if entry.attempt is None:
            return self._recalled(entry)
        earlier = total.metered()
        result = await self._run_recorded(assignment, entry.attempt, run)
        if earlier is NO_USAGE or not isinstance(result, AgentRunResult):
            return result
        return evolve(result, usage=total.metered())

    async def _run_recorded(self, assignment: AgentAssignment, attempt: int, run: RunContext) -> AgentRunResult[Any]:
        meter = Meter(run)
        try:
            with run.watching_usage(partial(self._journal.spend, attempt)):
                result = await self._inner.run(assignment)
            meter.record(result)
            status, content = self._content(result)
        except Exception as error:
            failure = Ending(status="failed", content=_text(error_text(error)), usage=meter.metered())
            await self._journal.end(attempt, failure)  # noqa: ASYNC120 - a cancellation does not end it
            raise
        except BaseException:
            if isinstance(self._journal, LetsGo):
                self._journal.let_go(attempt)
            raise
        try:
            await self._journal.end(attempt, Ending(status=status, content=content, usage=meter.metered()))
        except JournalError as error:
            error.result = result
            raise
        return result

    def _step(self, assignment: AgentAssignment, run: RunContext) -> Step:
        return Step(
            execution=_text(self._execution or run.group_id),
            group_id=_text(run.group_id),
            task_id=_text(assignment.task_id),
            agent_id=_text(assignment.agent_id),
            fingerprint=fingerprint(assignment, run.upstream, self._version),
            lease=run.lease,
        )

    def _content(self, result: object) -> tuple[str, str]:
        """Return what is kept of a result: a status, and the result as JSON if it is final."""
        if not isinstance(result, AgentRunResult):
            return "failed", f"returned {type(result).__name__} instead of an AgentRunResult"
        if result.is_failure:
            return "failed", _text(result.error_message or f"ended with {result.termination_reason.value}")
        table = {**unstructure(evolve(result, output=None)), "output": self._written(result.output)}
        return "succeeded" if result.is_success else "parked", json.dumps(table, allow_nan=False)

    def _written(self, output: object) -> Any:
        if self._output_type is not None:
            return plain_json(self._converter.unstructure(output, unstructure_as=self._output_type))
        written = plain_json(output)
        if written != output:
            raise TypeError(
                f"an output of type {type(output).__name__} would not come back from the journal as it is: "
                "return plain JSON, or give JournaledEngine an output_type"
            )
        return written

    def _recalled(self, entry: Entry) -> AgentRunResult[Any]:
        """Return the result as it was recorded.

        Raises:
            ValueError: If it is none, or its output is not of the type that this engine was given.
        """
        table = parse_json(entry.content or "")
        written = table.pop("output", None) if isinstance(table, dict) else None
        result: AgentRunResult[Any] = structure(AgentRunResult, table)
        if self._output_type is None or written is None:
            return evolve(result, output=written)
        return evolve(result, output=self._converter.structure(written, self._output_type))


def fingerprint(assignment: AgentAssignment, upstream: Mapping[str, AgentOutcome[Any]], version: str) -> str:
    """Return 64 characters that are the same for the same work; what is no JSON counts as its ``repr()``."""
    work = {name: value for name, value in _said(assignment).items() if name not in FINGERPRINT_LEAVES_OUT}
    work["upstream"] = {task_id: plain_json(outcome.output) for task_id, outcome in upstream.items()}
    work["version"] = version
    return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()


def _said(value: Any) -> Any:
    """Return a value as JSON without the fields that have their defaults: a field that is new changes no old work."""
    if isinstance(value, tuple):
        return [_said(item) for item in value]
    if not has(type(value)):
        return plain_json(value)
    given = {
        a.name: getattr(value, a.name) for a in fields(type(value)) if getattr(value, a.name) != _default(a, value)
    }
    return {name: _said(item) for name, item in given.items()}


def _default(attribute: Any, owner: object) -> Any:
    """Return what a field has where nothing is given."""
    default = attribute.default
    if not hasattr(default, "takes_self"):
        return default
    return default.factory(owner) if default.takes_self else default.factory()


def _text(text: str) -> str:
    """Return text that UTF-8 can hold: a lone surrogate is written as its number."""
    return text.encode("utf-8", "backslashreplace").decode()
