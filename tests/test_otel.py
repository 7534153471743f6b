"""Spans and metrics: with the SDK's own exporters in memory, and sent to a receiver of OTLP on loopback."""

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Sampler, SamplingResult
from opentelemetry.trace import StatusCode

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    AgentRunResult,
    ClaimPolicy,
    InMemoryResourceLock,
    ParallelExecutionGroup,
    ParallelExecutor,
    ResourceConflictError,
    Task,
    TerminationReason,
    Usage,
    current_run,
)
from parallel_agents.engines.process import ProcessEngine
from parallel_agents.events import CHAT_REQUEST_RETRY
from parallel_agents.observers.otel import OpenTelemetryObserver

pytestmark = pytest.mark.anyio


class Telemetry:
    """Providers whose spans and metrics stay here."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracer_provider = TracerProvider()
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meter_provider = MeterProvider([self.reader])

    def observer(self, **options: Any) -> OpenTelemetryObserver:
        return OpenTelemetryObserver(
            tracer_provider=self.tracer_provider, meter_provider=self.meter_provider, **options
        )

    def spans(self) -> dict[str, ReadableSpan]:
        spans = self.exporter.get_finished_spans()
        assert len({span.name for span in spans}) == len(spans)
        return {span.name: span for span in spans}

    def parent_of(self, name: str) -> str | None:
        spans = self.spans()
        parent = spans[name].parent
        if parent is None:
            return None
        (found,) = (s.name for s in spans.values() if s.context is not None and s.context.span_id == parent.span_id)
        return found

    def metrics(self) -> dict[str, dict[tuple[object, ...], Any]]:
        """Return the points of each metric by the values of their attributes, in the order of their names."""
        data = self.reader.get_metrics_data()
        assert data is not None
        found: dict[str, dict[tuple[object, ...], Any]] = {}
        for metric in data.resource_metrics[0].scope_metrics[0].metrics:
            points = found.setdefault(metric.name, {})
            for point in metric.data.data_points:
                attributes = dict(point.attributes or {})
                points[tuple(attributes[name] for name in sorted(attributes))] = point
        return found


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    made = Telemetry()
    yield made
    made.tracer_provider.shutdown()
    made.meter_provider.shutdown()


def assignment(name: str, **fields: Any) -> AgentAssignment:
    identity = AgentIdentity(id=f"agent-{name}", name=name, model="small" if name == "a" else None)
    return AgentAssignment(identity=identity, task=Task(id=f"task-{name}"), **fields)


def group_of(*assignments: AgentAssignment, group_id: str = "g", **options: Any) -> ParallelExecutionGroup:
    return ParallelExecutionGroup(group_id=group_id, assignments=assignments, **options)


async def as_named(task: AgentAssignment) -> object:
    await anyio.lowlevel.checkpoint()
    if task.task_id == "task-fails":
        raise KeyError("gone")
    if task.task_id == "task-hangs":
        await anyio.sleep_forever()
    if task.task_id == "task-says-no":
        return AgentRunResult(
            task_id=task.task_id, agent_id=task.agent_id, termination_reason=TerminationReason.MAX_TURNS
        )
    current_run().record_usage(Usage(input_tokens=10, output_tokens=5, cost=0.25))
    return "done"


async def test_a_group_is_a_span_and_each_agent_one_below_it(telemetry: Telemetry) -> None:
    executor = ParallelExecutor(engine=as_named, observers=[telemetry.observer(provider_name="openai")])
    await executor.execute_group(group_of(assignment("a"), assignment("b")))
    spans = telemetry.spans()
    assert set(spans) == {"invoke_workflow g", "invoke_agent a", "invoke_agent b"}
    assert dict(spans["invoke_workflow g"].attributes or {}) == {
        "gen_ai.operation.name": "invoke_workflow",
        "gen_ai.workflow.name": "g",
        "parallel_agents.group.id": "g",
        "parallel_agents.group.agents": 2,
        "parallel_agents.group.status": "completed",
    }
    assert dict(spans["invoke_agent a"].attributes or {}) == {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.provider.name": "openai",
        "gen_ai.workflow.name": "g",
        "gen_ai.agent.id": "agent-a",
        "gen_ai.agent.name": "a",
        "gen_ai.request.model": "small",
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 5,
        "parallel_agents.task.id": "task-a",
        "parallel_agents.status": "succeeded",
        "parallel_agents.cost": 0.25,
    }
    assert "gen_ai.request.model" not in (spans["invoke_agent b"].attributes or {})
    assert [telemetry.parent_of(name) for name in ("invoke_agent a", "invoke_agent b")] == ["invoke_workflow g"] * 2
    assert telemetry.parent_of("invoke_workflow g") is None
    assert {span.status.status_code for span in spans.values()} == {StatusCode.UNSET}


async def test_spans_are_below_what_is_current_where_their_code_runs(telemetry: Telemetry) -> None:
    tracer = telemetry.tracer_provider.get_tracer("test")
    executor = ParallelExecutor(engine=as_named, observers=[telemetry.observer()])

    async def opens_a_group(task: AgentAssignment) -> None:
        with tracer.start_as_current_span(f"own {task.task_id}"):
            await executor.execute_group(group_of(assignment("b"), group_id=f"inner {task.task_id}"))

    async def in_a_task(task: AgentAssignment) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(opens_a_group, task)

    outer = ParallelExecutor(engine=in_a_task, observers=[telemetry.observer()])
    with tracer.start_as_current_span("caller") as caller:
        await outer.execute_group(group_of(assignment("a"), group_id="outer"))
        assert trace.get_current_span() is caller
    names = ["invoke_agent b", "invoke_workflow inner task-a", "own task-a", "invoke_agent a", "invoke_workflow outer"]
    assert [telemetry.parent_of(name) for name in names] == [*names[1:], "caller"]


async def test_what_runs_beside_an_agent_does_not_see_its_span(telemetry: Telemetry) -> None:
    seen: dict[str, object] = {}

    async def looks(task: AgentAssignment) -> None:
        for _ in range(3):
            seen[task.task_id] = trace.get_current_span()
            await anyio.lowlevel.checkpoint()

    before = trace.get_current_span()
    executor = ParallelExecutor(engine=looks, observers=[telemetry.observer()])
    async with executor.open_group(group_of(assignment("a"), assignment("b"))) as run:
        async for _ in run:
            assert trace.get_current_span() is before
    assert len({id(span) for span in seen.values()}) == 2
    assert before not in seen.values()


async def test_what_did_not_go_well_is_an_error_with_its_kind(telemetry: Telemetry) -> None:
    executor = ParallelExecutor(engine=as_named, observers=[telemetry.observer()])
    late = assignment("hangs", timeout_seconds=0.01)
    await executor.execute_group(group_of(assignment("fails"), late, assignment("says-no")))
    spans = telemetry.spans()
    kinds = {name: dict(span.attributes or {}).get("error.type") for name, span in spans.items()}
    assert kinds == {
        "invoke_workflow g": None,
        "invoke_agent fails": "KeyError",
        "invoke_agent hangs": "timeout",
        "invoke_agent says-no": "failed",
    }
    assert spans["invoke_agent fails"].status.description == "KeyError: 'gone'"
    assert spans["invoke_agent hangs"].status.status_code is StatusCode.ERROR
    assert "gen_ai.usage.input_tokens" not in (spans["invoke_agent fails"].attributes or {})


async def test_a_group_that_ends_early_says_so_and_every_span_ends(telemetry: Telemetry) -> None:
    executor = ParallelExecutor(engine=as_named, observers=[telemetry.observer()])
    group = group_of(
        assignment("hangs"), assignment("fails"), assignment("b"), max_concurrency=2, fail_fast=True, group_id="early"
    )
    await executor.execute_group(group)
    spans = telemetry.spans()
    assert set(spans) == {"invoke_workflow early", "invoke_agent hangs", "invoke_agent fails"}
    assert dict(spans["invoke_workflow early"].attributes or {})["error.type"] == "failed_fast"
    assert dict(spans["invoke_agent hangs"].attributes or {})["parallel_agents.status"] == "cancelled"
    outcomes = {key[1]: point.value for key, point in telemetry.metrics()["parallel_agents.agents"].items()}
    assert outcomes == {"cancelled": 1, "failed": 1, "not_started": 1}


async def test_a_group_that_is_refused_has_a_span_too(telemetry: Telemetry) -> None:
    lock = InMemoryResourceLock()
    assert await lock.acquire("r", "somebody")
    executor = ParallelExecutor(engine=as_named, resource_lock=lock, observers=[telemetry.observer()])
    with pytest.raises(ResourceConflictError):
        await executor.execute_group(group_of(assignment("a", resource_claims=("r",))))
    (span,) = telemetry.spans().values()
    assert dict(span.attributes or {})["parallel_agents.group.status"] == "conflict"


async def test_what_happens_to_an_agent_is_marked_on_its_own_span(telemetry: Telemetry) -> None:
    async def retries(task: AgentAssignment) -> None:
        current_run().emit(CHAT_REQUEST_RETRY, attempt=1, wait_seconds=0.5, error="503", other=object())

    lock = InMemoryResourceLock()
    group = group_of(
        assignment("a", resource_claims=("r",)), assignment("b", resource_claims=("r",)), claim_policy=ClaimPolicy.WAIT
    )
    await ParallelExecutor(engine=retries, resource_lock=lock, observers=[telemetry.observer()]).execute_group(group)
    for name in "ab":
        (marked,) = telemetry.spans()[f"invoke_agent {name}"].events
        assert marked.name == "chat.request_retry"
        assert dict(marked.attributes or {}) == {"attempt": 1, "wait_seconds": 0.5, "error": "503"}
    assert telemetry.spans()["invoke_workflow g"].events == ()


async def test_metrics_count_agents_durations_tokens_and_cost(telemetry: Telemetry) -> None:
    running: list[int] = []

    async def looks(task: AgentAssignment) -> object:
        running.append(telemetry.metrics()["parallel_agents.agents.in_progress"]["g",].value)
        return await as_named(task)

    executor = ParallelExecutor(engine=looks, observers=[telemetry.observer()])
    await executor.execute_group(group_of(assignment("a"), assignment("b"), assignment("fails"), max_concurrency=1))
    found = telemetry.metrics()
    assert running == [1, 1, 1]
    assert found["parallel_agents.agents.in_progress"]["g",].value == 0
    assert {key: p.value for key, p in found["parallel_agents.agents"].items()} == {
        ("g", "succeeded"): 2,
        ("g", "failed"): 1,
    }
    assert {key: p.count for key, p in found["parallel_agents.agent.duration"].items()} == {
        ("g", "succeeded"): 2,
        ("g", "failed"): 1,
    }
    assert {key[0]: p.value for key, p in found["parallel_agents.tokens"].items()} == {"input": 20, "output": 10}
    assert found["parallel_agents.cost"]["g",].value == 0.5


async def test_groups_with_ids_of_their_own_can_share_a_name(telemetry: Telemetry) -> None:
    observer = telemetry.observer(workflow_name="review")
    for number in range(2):
        executor = ParallelExecutor(engine=as_named, observers=[observer])
        await executor.execute_group(group_of(assignment(str(number)), group_id=f"run-{number}"))
    names = [span.name for span in telemetry.exporter.get_finished_spans() if "workflow" in span.name]
    assert names == ["invoke_workflow review"] * 2
    assert {key: p.value for key, p in telemetry.metrics()["parallel_agents.agents"].items()} == {
        ("review", "succeeded"): 2
    }


@pytest.mark.parametrize("options", [{"provider_name": " "}, {"workflow_name": ""}])
def test_blank_names_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must not be blank"):
        OpenTelemetryObserver(**options)


PROGRAM = """
import os
version, trace_id, span_id, flags = os.environ["TRACEPARENT"].split("-")
print(trace_id, span_id)
"""


async def test_a_program_gets_the_span_of_its_agent(telemetry: Telemetry) -> None:
    engine = ProcessEngine([sys.executable, "-c", PROGRAM], env={"GIVEN": "1"})
    result = await ParallelExecutor(engine=engine, observers=[telemetry.observer()]).execute_group(
        group_of(assignment("a"))
    )
    context = telemetry.spans()["invoke_agent a"].context
    assert context is not None
    assert str(result.outcomes[0].output).split() == [f"{context.trace_id:032x}", f"{context.span_id:016x}"]


async def test_what_an_engine_sets_for_its_programs_stands_above(telemetry: Telemetry) -> None:
    engine = ProcessEngine(
        [sys.executable, "-c", "import os; print(os.environ['TRACEPARENT'])"], env={"TRACEPARENT": "own"}
    )
    result = await ParallelExecutor(engine=engine, observers=[telemetry.observer()]).execute_group(
        group_of(assignment("a"))
    )
    assert str(result.outcomes[0].output).strip() == "own"


class Receiver(BaseHTTPRequestHandler):
    """Takes what is sent to it as OTLP."""

    received: ClassVar[list[ExportTraceServiceRequest]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == "/v1/traces"
        self.received.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is that of the base class
        pass


@pytest.fixture
def receiver() -> Iterator[str]:
    Receiver.received.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces"
        server.shutdown()
        thread.join()


class RefusesAnAgent(Sampler):
    """A sampler that is broken for one name."""

    def should_sample(self, parent_context: Any, trace_id: int, name: str, *args: Any, **kwargs: Any) -> SamplingResult:
        if name == "invoke_agent fails":
            raise RuntimeError("broken")
        return ALWAYS_ON.should_sample(parent_context, trace_id, name, *args, **kwargs)

    def get_description(self) -> str:
        return "broken for one name"


async def test_an_agent_whose_span_could_not_start_leaves_the_one_around_it_alone(telemetry: Telemetry) -> None:
    telemetry.tracer_provider.sampler = RefusesAnAgent()
    observer = telemetry.observer()
    inner = ParallelExecutor(engine=as_named, observers=[observer])

    async def opens_a_group(task: AgentAssignment) -> object:
        await inner.execute_group(group_of(assignment("fails"), group_id="inner"))
        return await as_named(task)

    await ParallelExecutor(engine=opens_a_group, observers=[observer]).execute_group(group_of(assignment("a")))
    spans = telemetry.spans()
    assert set(spans) == {"invoke_workflow g", "invoke_workflow inner", "invoke_agent a"}
    assert spans["invoke_agent a"].status.status_code is StatusCode.UNSET
    assert (spans["invoke_agent a"].attributes or {})["gen_ai.usage.input_tokens"] == 10
    ended = {key: p.value for key, p in telemetry.metrics()["parallel_agents.agents"].items()}
    assert ended == {("inner", "failed"): 1, ("g", "succeeded"): 1}


async def test_spans_arrive_at_a_receiver_of_otlp(receiver: str) -> None:
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=receiver)))
    executor = ParallelExecutor(engine=as_named, observers=[OpenTelemetryObserver(tracer_provider=provider)])
    await executor.execute_group(group_of(*[assignment(str(number)) for number in range(20)]))
    await anyio.to_thread.run_sync(provider.shutdown)
    sent = [
        span
        for request in Receiver.received
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    (group,) = (span for span in sent if span.name == "invoke_workflow g")
    agents = [span for span in sent if span.name != group.name]
    assert {span.name for span in agents} == {f"invoke_agent {number}" for number in range(20)}
    assert {span.parent_span_id for span in agents} == {group.span_id}
    assert {span.trace_id for span in agents} == {group.trace_id}
    assert all(group.start_time_unix_nano <= span.start_time_unix_nano for span in agents)
    assert all(span.end_time_unix_nano <= group.end_time_unix_nano for span in agents)
