"""What travels between a driver and its workers, as JSON: assignments there, reports and endings back.

The driver is the process that runs the group; a worker runs the inner engine, which ``_remote_worker`` does. How the
text gets from one to the other is the business of an engine for some cluster; this knows none.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from enum import StrEnum, auto
from importlib.metadata import version
from typing import Any, TypeVar

from attrs import evolve, field, frozen

from .._checks import as_tuple, integer, not_blank, shown
from .._context import RunContext
from .._errors import ParallelAgentsError
from .._models import NO_USAGE, AgentAssignment, Usage
from .._outcomes import AgentOutcome, AgentRunResult
from ..events import error_text
from ..serialization import InvalidDataError, parse_json, plain_json, structure, unstructure
from ._metering import difference

PROTOCOL = 1
"""The version of what is written here; grows when a reader has to change."""

VERSION = version("parallel-agents")
"""The library's; both ends must have the same, for an assignment may mean something else to another."""

V = TypeVar("V")


class RemoteAgentError(ParallelAgentsError):
    """An agent failed on its worker.

    Attributes:
        error_type: The class of what it raised, by its name: the object itself does not travel.
        text: What it said, as an outcome would: ``<TypeName>: <message>``.
    """

    def __init__(self, error_type: str, text: str) -> None:
        super().__init__(error_type, text)
        self.error_type = error_type
        self.text = text

    def __str__(self) -> str:
        return self.text


class WorkerLostError(ParallelAgentsError):
    """An agent's worker was lost, and so were those that ran it again, as often as it may be."""


class WorkerRefusedError(ParallelAgentsError):
    """A worker does not run what it was sent; the message says why."""


class VersionMismatchError(ParallelAgentsError):
    """Driver and worker run different versions of the library.

    Attributes:
        sender: Who wrote what cannot be read: ``driver`` or ``worker``.
        theirs: The sender's version.
        ours: This process's version.
    """

    def __init__(self, sender: str, theirs: str, ours: str) -> None:
        super().__init__(sender, theirs, ours)
        self.sender = sender
        self.theirs = theirs
        self.ours = ours

    def __str__(self) -> str:
        reader = "worker" if self.sender == "driver" else "driver"
        return (
            f"The {self.sender} runs parallel_agents {self.theirs}, this {reader} {self.ours}. "
            "Install the same version for both, and start the workers anew"
        )


def pack(value: object) -> str:
    """Return a value of this module as text that says which version wrote it."""
    return json.dumps({"protocol": PROTOCOL, "version": VERSION, "body": unstructure(value)}, allow_nan=False)


def unpack(type_: type[V], text: str, sender: str) -> V:
    """Read what ``pack()`` wrote at the other end.

    Args:
        type_: What it should be.
        text: From ``pack()``.
        sender: Who wrote it: ``driver`` or ``worker``.

    Raises:
        VersionMismatchError: If another version of the library wrote it.
        InvalidDataError: If it is no such value.
    """
    table = parse_json(text)
    if not isinstance(table, dict) or not {"protocol", "version", "body"} <= table.keys():
        raise InvalidDataError([f"not a message of a {sender}: {shown(text)}"])
    if (table["protocol"], table["version"]) != (PROTOCOL, VERSION):
        ours, theirs = f"{VERSION} (protocol {PROTOCOL})", f"{table['version']} (protocol {table['protocol']})"
        raise VersionMismatchError(sender, theirs, ours)
    return structure(type_, table["body"])


@frozen(kw_only=True)
class Order:
    """An assignment on its way to a worker.

    Attributes:
        id: The same whenever the same work is sent again, by whichever driver.
        engine: The inner engine, as ``module:attribute``; ``None`` is the one that the worker was started with.
        group_id: The group it belongs to.
        assignment: Without claims: the driver has taken them.
        attempt: Which attempt this is, from 1, as wrapping engines count them.
        upstream: The outcomes of the tasks that it depends on.
    """

    id: str = field(validator=not_blank)
    engine: str | None = None
    group_id: str = field(validator=not_blank)
    assignment: AgentAssignment
    attempt: int = field(default=1, validator=integer(at_least=1))
    upstream: tuple[AgentOutcome[Any], ...] = field(default=(), converter=as_tuple)

    @classmethod
    def of(cls, run: RunContext, id_: str, engine: str | None = None) -> "Order":
        """Return the order for the assignment of a run."""
        return cls(
            id=id_,
            engine=engine,
            group_id=run.group_id,
            assignment=evolve(run.assignment, resource_claims=()),
            attempt=run.attempt,
            upstream=run.upstream.values(),
        )


class EndingKind(StrEnum):
    """How an agent ended on its worker."""

    RETURNED = auto()
    """With a result."""
    RAISED = auto()
    """With an error."""
    CANCELLED = auto()
    """It was cancelled, or raised the cancelled exception by itself."""
    INTERRUPTED = auto()
    """The worker stopped, and it has to run again somewhere else."""
    REFUSED = auto()
    """It never started there; the error says why."""


@frozen(kw_only=True)
class Ending:
    """How an agent ended on its worker.

    Attributes:
        kind: Which of the others is given.
        result: What it returned; its output is plain JSON.
        error_type: The class of what it raised.
        error: What it raised, as text.
    """

    kind: EndingKind
    result: AgentRunResult[Any] | None = None
    error_type: str = ""
    error: str = ""

    @classmethod
    def of_value(cls, value: object) -> "Ending":
        """Return the ending of an agent that returned *value*."""
        if not isinstance(value, AgentRunResult):
            return cls.of_error(TypeError(f"The engine returned {type(value).__name__} instead of an AgentRunResult"))
        written = plain_json(value.output)
        if written != value.output:
            kind = type(value.output).__name__
            return cls.of_error(TypeError(f"an output of type {kind} cannot travel as it is: return plain JSON"))
        return cls(kind=EndingKind.RETURNED, result=value)

    @classmethod
    def of_error(cls, error: BaseException) -> "Ending":
        """Return the ending of an agent that raised *error*."""
        return cls(kind=EndingKind.RAISED, error_type=type(error).__name__, error=error_text(error))

    def value(self) -> AgentRunResult[Any]:
        """Return what the agent returned, or raise what stands for what it raised; not for the other kinds.

        Raises:
            RemoteAgentError: If it raised.
            WorkerRefusedError: If it never started.
        """
        if self.kind is EndingKind.REFUSED:
            raise WorkerRefusedError(self.error)
        if self.kind is EndingKind.RAISED:
            raise RemoteAgentError(self.error_type, self.error)
        assert self.result is not None
        return self.result


@frozen(kw_only=True)
class AgentEvent:
    """What an agent told with ``current_run().emit()``.

    Attributes:
        name: A constant of ``events``.
        fields: JSON.
    """

    name: str
    fields: Mapping[str, Any]


@frozen(kw_only=True)
class Report:
    """What a worker tells of an agent; saying it twice, or leaving out one before the last, does no harm.

    Attributes:
        id: Of its order.
        start: Names this start of the agent, whatever was started before.
        usage: All that it spent since.
        first_event: How many events are left out, because the driver has them.
        events: Those that it sent after these.
        is_waiting: Whether it waits for others, so that its time does not count.
        ending: How it ended, when it has.
    """

    id: str
    start: str
    usage: Usage = NO_USAGE
    first_event: int = 0
    events: tuple[AgentEvent, ...] = field(default=(), converter=as_tuple)
    is_waiting: bool = False
    ending: Ending | None = None


class Account:
    """Brings what workers report of an agent into its run at the driver, once, whatever is told twice.

    What a lost worker had reported stays counted; that of the next start is added to it.

    Args:
        run: At the driver.
    """

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self._start = ""
        self._usage = NO_USAGE
        self._events = 0
        self._waits = ExitStack()
        self._is_waiting = False

    def take(self, report: Report) -> None:
        """Take note of a report; never waits."""
        if report.start != self._start:
            self._start, self._usage, self._events = report.start, NO_USAGE, 0
        if report.usage != self._usage:
            spent, self._usage = difference(report.usage, self._usage), report.usage
            self._run.record_usage(spent)
        for event in report.events[max(0, self._events - report.first_event) :]:
            self._run.emit(event.name, **event.fields)
        self._events = max(self._events, report.first_event + len(report.events))
        self.wait(is_waiting=report.is_waiting and report.ending is None)

    def wait(self, *, is_waiting: bool) -> None:
        """Let the time of the agent count, or not: it waits for others."""
        if is_waiting and not self._is_waiting:
            self._waits.enter_context(self._run.not_charged())
        elif not is_waiting:
            self._waits.close()
        self._is_waiting = is_waiting


def unconfirmed(seconds: float) -> str:
    """Return the note on a cancellation that the worker has not confirmed; notes become part of the outcome."""
    return f"The worker did not confirm within {seconds:g} s that the agent stopped: it may still run, and spend"
