"""OpenTelemetryObserver: a span for each group and each agent, and metrics of them. Needs the extra ``otel``.

The names follow OpenTelemetry's conventions for generative AI, https://github.com/open-telemetry/semantic-conventions-genai,
whose status is "development"; they are constants here, so that a change of theirs is a change of this file. Where spans
and metrics go is the application's choice: this module sets up no provider and no exporter.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from importlib.metadata import version
from typing import Any, Final

from attrs import define, field, frozen
from attrs.validators import optional

from .._checks import not_blank
from .._context import RunContext, current_run
from .._outcomes import OutcomeStatus
from ..events import (
    ASYNCIO_AGENT_LEFT,
    CHAT_REQUEST_RETRY,
    PARALLEL_AGENT_CANCELLED,
    PARALLEL_AGENT_COMPLETE,
    PARALLEL_AGENT_ERROR,
    PARALLEL_AGENT_RESUMED,
    PARALLEL_AGENT_RETRY,
    PARALLEL_AGENT_START,
    PARALLEL_GROUP_COMPLETE,
    PARALLEL_GROUP_START,
    TOOL_INVOKE_ALL_COMPLETE,
    TOOL_INVOKE_ALL_START,
    TOOL_INVOKE_ERROR,
    TOOL_INVOKE_START,
    TOOL_INVOKE_SUCCESS,
    ParallelEvent,
)

try:
    from opentelemetry import context, metrics, propagate, trace
    from opentelemetry.context import Context
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider
except ModuleNotFoundError as error:
    message = "OpenTelemetryObserver needs OpenTelemetry's API: pip install 'parallel-agents[otel]'"
    raise ModuleNotFoundError(message, name=error.name) from error

OPERATION: Final = "gen_ai.operation.name"
WORKFLOW: Final = "gen_ai.workflow.name"
PROVIDER: Final = "gen_ai.provider.name"
AGENT_ID: Final = "gen_ai.agent.id"
AGENT_NAME: Final = "gen_ai.agent.name"
MODEL: Final = "gen_ai.request.model"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
TOKEN_TYPE: Final = "gen_ai.token.type"  # noqa: S105 - no password
ERROR_TYPE: Final = "error.type"

GROUP_ID: Final = "parallel_agents.group.id"
GROUP_STATUS: Final = "parallel_agents.group.status"
AGENT_COUNT: Final = "parallel_agents.group.agents"
TASK_ID: Final = "parallel_agents.task.id"
STATUS: Final = "parallel_agents.status"
ATTEMPTS: Final = "parallel_agents.attempts"
COST: Final = "parallel_agents.cost"

NOT_STARTED: Final = "not_started"
"""Stands for the status of agents that never started: events tell their number only."""

_MARKS: Final = frozenset(
    {
        ASYNCIO_AGENT_LEFT,
        CHAT_REQUEST_RETRY,
        PARALLEL_AGENT_RESUMED,
        PARALLEL_AGENT_RETRY,
        TOOL_INVOKE_ALL_COMPLETE,
        TOOL_INVOKE_ALL_START,
        TOOL_INVOKE_ERROR,
        TOOL_INVOKE_START,
        TOOL_INVOKE_SUCCESS,
    }
)
"""What becomes an event of the agent's span."""

_ENDS: Final = frozenset({PARALLEL_AGENT_COMPLETE, PARALLEL_AGENT_ERROR, PARALLEL_AGENT_CANCELLED})

_WELL: Final = frozenset({OutcomeStatus.SUCCEEDED.value, OutcomeStatus.PARKED.value})
_GROUP_IS_WELL: Final = frozenset({"completed", "enough"})
_SECONDS: Final = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600, 14400)
"""Bounds of the histogram: from tools to agents that take hours."""


@frozen(kw_only=True)
class _Names:
    """What the observer is told to call things."""

    provider_name: str = field(validator=not_blank)
    workflow_name: str | None = field(validator=optional(not_blank))


@define(eq=False)
class _GroupTrace:
    """A group that runs, in the context of which its agents are.

    Attributes:
        failed: How many of its agents started and did not end well.
    """

    span: Span
    failed: int = 0


@define(eq=False)
class _AgentTrace:
    """An agent that runs.

    Attributes:
        here: The context in which its span is the current one.
    """

    span: Span
    here: Context
    run: RunContext


_group: ContextVar[_GroupTrace | None] = ContextVar("parallel_agents_otel_group", default=None)
_agent: ContextVar[_AgentTrace | None] = ContextVar("parallel_agents_otel_agent", default=None)


class OpenTelemetryObserver:
    """Makes spans and metrics of what groups and their agents do.

    A group is a span ``invoke_workflow {group_id}`` below the span that is current where it is opened; each agent that
    starts is a span ``invoke_agent {name}`` below that one, and is current in the agent's code, so that what other
    instrumentations make there, and groups opened there, are below it. Programs that ``ProcessEngine`` starts get it as
    ``TRACEPARENT``. Retries, tool calls and the like are span events of the agent.

    Metrics, by workflow: ``parallel_agents.agents.in_progress``; ``parallel_agents.agents`` by status;
    ``parallel_agents.agent.duration`` in seconds, by status; ``parallel_agents.tokens`` by type;
    ``parallel_agents.cost`` in the unit in which engines report it. All but durations are read when a reader collects
    them.

    Messages and outputs are not recorded; the text of an error is, as the description of a span's status. One observer
    may serve any number of executors. For use in the event loop's thread; nothing in it waits.

    Args:
        tracer_provider: Where spans go; the global one unless given.
        meter_provider: Where metrics go; the global one unless given.
        provider_name: The conventions want to know whose models are asked, such as ``openai``.
        workflow_name: Name of all groups, for programs that give each group an id of its own: names of spans and
            metrics should be few. The group's id unless given.

    Raises:
        ValueError: For a blank name.
        TypeError: For a name that is no string.
    """

    event_names: Final = _MARKS | _ENDS | {PARALLEL_GROUP_START, PARALLEL_GROUP_COMPLETE, PARALLEL_AGENT_START}
    """What it wants to be told of."""

    def __init__(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        provider_name: str = "parallel_agents",
        workflow_name: str | None = None,
    ) -> None:
        self._names = _Names(provider_name=provider_name, workflow_name=workflow_name)
        library = version("parallel-agents")
        self._tracer = trace.get_tracer("parallel_agents", library, tracer_provider)
        meter = metrics.get_meter("parallel_agents", library, meter_provider)
        self._running: defaultdict[str, int] = defaultdict(int)
        self._ended: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._tokens: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._cost: defaultdict[str, float] = defaultdict(float)
        self._durations = meter.create_histogram(
            "parallel_agents.agent.duration",
            unit="s",
            description="Time from the start of an agent to its end.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        meter.create_observable_up_down_counter(
            "parallel_agents.agents.in_progress",
            [_reader(self._running, WORKFLOW)],
            unit="{agent}",
            description="Agents that run.",
        )
        meter.create_observable_counter(
            "parallel_agents.agents",
            [_reader(self._ended, WORKFLOW, STATUS)],
            unit="{agent}",
            description="Agents that have an outcome.",
        )
        meter.create_observable_counter(
            "parallel_agents.tokens",
            [_reader(self._tokens, WORKFLOW, TOKEN_TYPE)],
            unit="{token}",
            description="Tokens that agents used.",
        )
        meter.create_observable_counter(
            "parallel_agents.cost", [_reader(self._cost, WORKFLOW)], description="What agents cost."
        )

    def on_event(self, event: ParallelEvent, /) -> None:
        """Start, mark or end a span, and count."""
        if event.name == PARALLEL_AGENT_START:
            self._start_agent(event)
        elif event.name in _ENDS:
            self._end_agent(event)
        elif event.name == PARALLEL_GROUP_START:
            self._start_group(event)
        elif event.name == PARALLEL_GROUP_COMPLETE:
            self._end_group(event)
        else:
            _mark(event)

    def _workflow(self, event: ParallelEvent) -> str:
        return self._names.workflow_name or event.group_id

    def _start_group(self, event: ParallelEvent) -> None:
        _group.set(None)  # should the next line fail, this group is not taken for the one around it
        workflow = self._workflow(event)
        attributes = {OPERATION: "invoke_workflow", WORKFLOW: workflow, GROUP_ID: event.group_id}
        if event.fields["agent_count"] is not None:
            attributes[AGENT_COUNT] = event.fields["agent_count"]
        span = self._tracer.start_span(f"invoke_workflow {workflow}", kind=SpanKind.INTERNAL, attributes=attributes)
        _group.set(_GroupTrace(span))
        context.attach(trace.set_span_in_context(span))

    def _end_group(self, event: ParallelEvent) -> None:
        group = _group.get()
        if group is None:
            return
        never_started = event.fields["failed"] - group.failed
        if never_started > 0:
            self._ended[self._workflow(event), NOT_STARTED] += never_started
        status = event.fields["status"]
        group.span.set_attribute(GROUP_STATUS, status)
        if status not in _GROUP_IS_WELL:
            group.span.set_attribute(ERROR_TYPE, status)
            group.span.set_status(Status(StatusCode.ERROR, status))
        group.span.end()

    def _start_agent(self, event: ParallelEvent) -> None:
        run = current_run()
        workflow, identity = self._workflow(event), run.assignment.identity
        self._running[workflow] += 1
        facts = {
            OPERATION: "invoke_agent",
            PROVIDER: self._names.provider_name,
            WORKFLOW: workflow,
            AGENT_ID: identity.id,
            AGENT_NAME: identity.name,
            TASK_ID: str(event.task_id),
        }
        if identity.model is not None:
            facts[MODEL] = identity.model
        around = context.get_current()
        span = self._tracer.start_span(f"invoke_agent {identity.name}", around, SpanKind.INTERNAL, facts)
        here = trace.set_span_in_context(span, around)
        context.attach(here)
        _agent.set(_AgentTrace(span, here, run))
        run.program_env = partial(_program_env, run.program_env, here)

    def _end_agent(self, event: ParallelEvent) -> None:
        agent, fields, workflow = _agent.get(), event.fields, self._workflow(event)
        if agent is not None and agent.run is not current_run():
            agent = None  # it is the one around this agent, whose own span could not start
        status = fields["status"]
        self._running[workflow] -= 1
        self._ended[workflow, status] += 1
        here = None if agent is None else agent.here
        self._durations.record(fields["duration_seconds"], {WORKFLOW: workflow, STATUS: status}, here)
        if tokens := fields["input_tokens"]:
            self._tokens[workflow, "input"] += tokens
        if tokens := fields["output_tokens"]:
            self._tokens[workflow, "output"] += tokens
        if cost := fields["cost"]:
            self._cost[workflow] += cost
        if status not in _WELL and (group := _group.get()) is not None:
            group.failed += 1
        if agent is not None:
            _end_span(agent, fields)


def _end_span(agent: _AgentTrace, fields: Mapping[str, Any]) -> None:
    span, status = agent.span, fields["status"]
    span.set_attribute(STATUS, status)
    if (attempts := agent.run.attempt) > 1:
        span.set_attribute(ATTEMPTS, attempts)
    if fields["input_tokens"] or fields["output_tokens"]:
        span.set_attribute(INPUT_TOKENS, fields["input_tokens"])
        span.set_attribute(OUTPUT_TOKENS, fields["output_tokens"])
    if fields["cost"]:
        span.set_attribute(COST, fields["cost"])
    if status not in _WELL:
        is_late = status == OutcomeStatus.TIMED_OUT
        span.set_attribute(ERROR_TYPE, "timeout" if is_late else fields.get("error_type") or status)
        span.set_status(Status(StatusCode.ERROR, fields.get("error")))
    span.end()


def _program_env(others: Callable[[], Mapping[str, str]], here: Context) -> dict[str, str]:
    """Return what programs need to find the span of their agent, besides what *others* want them to have."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier, here)
    return {**others(), **{name.upper().replace("-", "_"): value for name, value in carrier.items()}}


def _mark(event: ParallelEvent) -> None:
    """Make a span event of what happened to an agent that runs; one that waits has no span yet."""
    agent = _agent.get()
    if agent is not None and agent.run.assignment.task_id == event.task_id:
        told = {name: value for name, value in event.fields.items() if isinstance(value, str | int | float | bool)}
        agent.span.add_event(event.name, told)


def _reader(counts: Mapping[Any, float], *names: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
    """Return what tells a table of counts, the keys of which are values of the attributes *names*."""

    def read(_options: CallbackOptions) -> Iterator[Observation]:
        for key, count in tuple(counts.items()):  # one step, as readers have threads of their own
            values = key if isinstance(key, tuple) else (key,)
            yield Observation(count, dict(zip(names, values, strict=True)))

    return read
