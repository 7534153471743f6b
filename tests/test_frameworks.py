"""Frameworks that run on asyncio only, through AsyncioEngine, on both backends: the real ones, with scripted models."""

import asyncio
import gc
import re
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from groups import assignment

from parallel_agents import (
    AgentAssignment,
    AgentEngine,
    AgentIdentity,
    AgentOutcome,
    ChatMessage,
    FunctionEngine,
    OutcomeStatus,
    ParallelExecutionGroup,
    ParallelExecutor,
    Task,
    TerminationReason,
    Usage,
)

pytestmark = pytest.mark.anyio

pytest.importorskip("pydantic_ai")
pytest.importorskip("agents")
pytest.importorskip("langgraph")

from agents import Agent as OpenAIAgent  # noqa: E402 - where the frameworks are installed
from agents import Model, ModelResponse, RunConfig, function_tool  # noqa: E402
from agents import Usage as OpenAIUsage  # noqa: E402
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel  # noqa: E402
from langchain_core.messages import AIMessage  # noqa: E402
from langgraph.checkpoint.memory import InMemorySaver  # noqa: E402
from langgraph.graph import START, MessagesState, StateGraph  # noqa: E402
from langgraph.types import interrupt  # noqa: E402
from openai import AsyncOpenAI  # noqa: E402
from openai.types.responses import (  # noqa: E402
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputText,
)
from pydantic_ai import Agent as PydanticAgent  # noqa: E402
from pydantic_ai import messages as said_by  # noqa: E402
from pydantic_ai.models.function import AgentInfo, FunctionModel  # noqa: E402
from pydantic_ai.usage import RequestUsage  # noqa: E402

from parallel_agents.engines.asyncio import AsyncioEngine  # noqa: E402
from parallel_agents.engines.langgraph import LangGraphEngine  # noqa: E402
from parallel_agents.engines.openai_agents import OpenAIAgentsEngine  # noqa: E402
from parallel_agents.engines.pydantic_ai import PydanticAIEngine  # noqa: E402
from parallel_agents.testing.chat import scripted_chat_server  # noqa: E402

SPENT = Usage(input_tokens=10, output_tokens=5, requests=1)


class Scripted:
    """What the model of each framework says: a text, a tool call, or nothing until it is cancelled."""

    def __init__(self, *says: str) -> None:
        self.says = iter(says)
        self.is_in_a_scope = False
        self.heard: list[Any] = []
        self.waits = threading.Event()
        self.cleaned_up = False

    async def next(self, heard: Any) -> str:
        self.heard.append(heard)
        await asyncio.sleep(0)
        said = next(self.says)
        if said == "HANG":
            self.waits.set()
            try:
                await asyncio.Event().wait()
            finally:
                with anyio.CancelScope(shield=self.is_in_a_scope):
                    for _ in range(5):
                        await asyncio.sleep(0)
                self.cleaned_up = True
        if said == "FAIL":
            raise OSError("the model is down")
        return said


def pydantic_ai_engine(script: Scripted) -> AgentEngine:
    async def answer(messages: list[said_by.ModelMessage], info: AgentInfo) -> said_by.ModelResponse:
        said = await script.next((messages, info.instructions))
        part = said_by.ToolCallPart("look", {"path": "a"}) if said == "CALL" else said_by.TextPart(said)
        return said_by.ModelResponse(parts=[part], usage=RequestUsage(input_tokens=10, output_tokens=5))

    script.is_in_a_scope = True  # it calls models in anyio's task groups, which cancel again and again
    agent = PydanticAgent(FunctionModel(answer))

    @agent.tool_plain
    async def look(path: str) -> str:
        await asyncio.sleep(0)
        return f"content of {path}"

    return PydanticAIEngine(agent)


class OpenAIModel(Model):
    def __init__(self, script: Scripted) -> None:
        self.script = script

    async def get_response(self, system_instructions: Any, input: Any, *_: Any, **__: Any) -> ModelResponse:  # noqa: A002
        said = await self.script.next((system_instructions, input))
        item: Any = ResponseOutputMessage(
            id="1",
            type="message",
            role="assistant",
            status="completed",
            content=[ResponseOutputText(text=said, type="output_text", annotations=[])],
        )
        if said == "CALL":
            item = ResponseFunctionToolCall(
                type="function_call", call_id=str(len(self.script.heard)), name="look", arguments='{"path": "a"}'
            )
        usage = OpenAIUsage(requests=1, input_tokens=10, output_tokens=5, total_tokens=15)
        return ModelResponse(output=[item], usage=usage, response_id=None)

    def stream_response(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        raise NotImplementedError


def openai_agents_engine(script: Scripted) -> AgentEngine:
    @function_tool
    async def look(path: str) -> str:
        await asyncio.sleep(0)
        return f"content of {path}"

    agent = OpenAIAgent(name="a", model=OpenAIModel(script), tools=[look])
    return OpenAIAgentsEngine(agent, run_config=RunConfig(tracing_disabled=True))


def langgraph_engine(script: Scripted) -> AgentEngine:
    async def model(state: MessagesState) -> dict[str, Any]:
        said = await script.next(state["messages"])
        spent = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}
        answer = AIMessage(said, usage_metadata=spent)
        chat: Any = GenericFakeChatModel(messages=iter([answer]))
        return {"messages": [await chat.ainvoke(state["messages"])]}

    def look(state: MessagesState) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "content of a"}]}

    graph = StateGraph(MessagesState)
    graph.add_node("model", model)
    graph.add_node("look", look)
    graph.add_edge(START, "model")
    graph.add_conditional_edges(
        "model", lambda state: "look" if state["messages"][-1].content == "CALL" else "__end__", ["look", "__end__"]
    )
    graph.add_edge("look", "model")
    return LangGraphEngine(graph.compile())


MakeEngine = Callable[[Scripted], AgentEngine]
ENGINES = {"pydantic-ai": pydantic_ai_engine, "openai-agents": openai_agents_engine, "langgraph": langgraph_engine}
each_framework = pytest.mark.parametrize("make_engine", ENGINES.values(), ids=ENGINES)


def group_for(**fields: Any) -> ParallelExecutionGroup:
    one = AgentAssignment(
        identity=AgentIdentity(id="a", instructions="Be short."),
        task=Task(id="t", description="Look.", inputs={"depth": 1}),
        **fields,
    )
    return ParallelExecutionGroup(group_id="g", assignments=[one])


async def outcome_of(engine: AgentEngine, **fields: Any) -> AgentOutcome[Any]:
    with anyio.fail_after(60):
        result = await ParallelExecutor(engine=engine).execute_group(group_for(**fields))
    return result.outcomes[0]


@each_framework
async def test_an_agent_is_asked_calls_a_tool_and_answers(make_engine: MakeEngine) -> None:
    script = Scripted("CALL", "Fine.")
    memory = [ChatMessage(role="user", content="Hi."), ChatMessage(role="assistant", content="Hello.")]
    outcome = await outcome_of(make_engine(script), memory_messages=memory)
    assert outcome.status is OutcomeStatus.SUCCEEDED
    assert outcome.output == "Fine."
    assert outcome.usage == SPENT + SPENT
    assert outcome.result is not None
    assert outcome.result.turns == 2
    heard = repr(script.heard[0])
    for part in ("Be short.", "Hi.", "Hello.", "Look.", "depth"):
        assert part in heard
    assert "content of a" in repr(script.heard[1])


@each_framework
async def test_a_cancelled_agent_cleans_up_and_its_usage_is_kept(make_engine: MakeEngine) -> None:
    script = Scripted("CALL", "HANG")
    with anyio.fail_after(60):
        async with ParallelExecutor(engine=make_engine(script)).open_group(group_for()) as run:
            await anyio.to_thread.run_sync(script.waits.wait)
            run.cancel()
    assert run.result is not None
    (outcome,) = run.result.outcomes
    assert outcome.status is OutcomeStatus.CANCELLED
    assert script.cleaned_up
    assert outcome.usage.input_tokens == 10


@each_framework
async def test_a_failure_is_the_agents(make_engine: MakeEngine) -> None:
    outcome = await outcome_of(make_engine(Scripted("CALL", "FAIL")))
    assert outcome.status is OutcomeStatus.FAILED
    assert outcome.error is not None
    assert "the model is down" in outcome.error
    assert outcome.usage.input_tokens == 10


@each_framework
async def test_turns_run_out(make_engine: MakeEngine) -> None:
    script = Scripted(*["CALL"] * 10)
    outcome = await outcome_of(make_engine(script), max_turns=3)
    assert outcome.result is not None
    assert outcome.result.termination_reason is TerminationReason.MAX_TURNS
    assert 3 <= len(script.heard) <= 4
    assert outcome.usage.input_tokens == 10 * len(script.heard)


@each_framework
async def test_many_at_once(make_engine: MakeEngine) -> None:
    script = Scripted(*["Fine."] * 100)
    group = ParallelExecutionGroup(group_id="g", assignments=[assignment(number) for number in range(100)])
    with anyio.fail_after(60):
        result = await ParallelExecutor(engine=make_engine(script)).execute_group(group)
    assert [outcome.output for outcome in result.outcomes] == ["Fine."] * 100


async def test_a_graph_that_interrupts_itself_is_parked() -> None:
    def ask(state: MessagesState) -> dict[str, Any]:
        interrupt("May I?")
        return {}

    graph = StateGraph(MessagesState)
    graph.add_node("ask", ask)
    graph.add_edge(START, "ask")
    outcome = await outcome_of(LangGraphEngine(graph.compile(checkpointer=InMemorySaver())))
    assert outcome.status is OutcomeStatus.PARKED
    assert outcome.result is not None
    assert outcome.result.completion_summary == "May I?"


@pytest.mark.parametrize(
    ("make_engine", "model"), [(pydantic_ai_engine, "no-such:model"), (openai_agents_engine, "no-such/model")]
)
async def test_models_of_identities_stand_above_those_of_agents(make_engine: MakeEngine, model: str) -> None:
    script = Scripted("Fine.")
    own = AgentAssignment(identity=AgentIdentity(id="a", model=model), task=Task(id="t"))
    group = ParallelExecutionGroup(group_id="g", assignments=[own])
    (outcome,) = (await ParallelExecutor(engine=make_engine(script)).execute_group(group)).outcomes
    assert "no-such" in str(outcome.error)
    assert script.heard == []


PAGE = Path(__file__).parent.parent / "docs" / "howto" / "frameworks.md"
NAMES = {"pydantic-ai": "pydantic-ai", "openai-agents": "OpenAI Agents SDK", "langgraph": "LangGraph"}


def says_the_page(name: str, backend: str, *, through_its_engine: bool) -> bool:
    (row,) = re.findall(rf"^\| {name} \| (.*) \|$", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    return bool(row.split(" | ")[2 * through_its_engine + (backend == "trio")] == "yes")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # failing leaves things behind
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("through_its_engine", [False, True])
async def test_it_runs_where_the_page_says(
    name: str, through_its_engine: bool, anyio_backend: tuple[str, dict[str, Any]]
) -> None:
    engine: Any = ENGINES[name](Scripted("Fine."))
    outcome = await outcome_of(engine if through_its_engine else FunctionEngine(engine._work))
    gc.collect()
    assert outcome.is_success is says_the_page(NAMES[name], anyio_backend[0], through_its_engine=through_its_engine)


@pytest.mark.parametrize("through_its_engine", [False, True])
async def test_the_openai_client_runs_where_the_page_says(
    through_its_engine: bool, anyio_backend: tuple[str, dict[str, Any]]
) -> None:
    async with scripted_chat_server(["Fine."]) as server:

        async def ask(assignment: AgentAssignment) -> str | None:
            async with AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
                said = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi."}])
            return said.choices[0].message.content

        outcome = await outcome_of(AsyncioEngine(ask) if through_its_engine else FunctionEngine(ask))
    assert (outcome.output == "Fine.") is says_the_page(
        "openai client", anyio_backend[0], through_its_engine=through_its_engine
    )


def test_engines_say_what_they_run() -> None:
    engines = [make_engine(Scripted()) for make_engine in ENGINES.values()]
    assert [repr(engine) for engine in engines] == [
        "PydanticAIEngine(agent)",
        "OpenAIAgentsEngine(a)",
        "LangGraphEngine(LangGraph)",
    ]
