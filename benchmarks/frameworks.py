"""The same fan-out in frameworks: as many steps, tasks or runs as there are agents, each of which does nothing.

They do more than run no-op agents, and what they do it for is not in these figures: LangGraph keeps a state that can be
stored after each step, dask finds a machine for each task, the Agents SDK prepares for a model's answer. The figures
say what an agent costs whose work is short, and nothing else.
"""

import asyncio
import operator
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, TypedDict, cast

import anyio
from peers import Checkpoint, Program, checkpoint_of


class Gathered(TypedDict):
    """The state of LangGraph's graph."""

    count: int
    done: Annotated[list[int], operator.add]


def langgraph_send(count: int, at_once: int, backend: str) -> Program:
    """A ``Send`` for each agent, in one superstep, with the limit that LangGraph has."""
    from langgraph.graph import END, START, StateGraph  # noqa: PLC0415 - a peer that need not be installed
    from langgraph.types import Send  # noqa: PLC0415

    checkpoint = checkpoint_of(backend)

    async def work(number: int) -> dict[str, list[int]]:
        await checkpoint()
        return {"done": [number]}

    def fan_out(state: Gathered) -> Sequence[Send]:
        return [Send("work", number) for number in range(state["count"])]

    builder: Any = StateGraph(Gathered)
    builder.add_node("work", work)
    builder.add_conditional_edges(START, fan_out, ["work"])
    builder.add_edge("work", END)
    graph = builder.compile()

    async def program() -> None:
        state = await graph.ainvoke({"count": count, "done": []}, {"max_concurrency": at_once})
        assert len(state["done"]) == count

    return program


def pydantic_graph(count: int, at_once: int, backend: str) -> Program:
    """A map and a join; it has no limit of its own, so that each step waits for an anyio one."""
    from pydantic_graph import GraphBuilder, reduce_list_append  # noqa: PLC0415

    checkpoint = checkpoint_of(backend)
    builder: Any = GraphBuilder(deps_type=anyio.CapacityLimiter, input_type=list[int], output_type=list[int])

    async def work(step: Any) -> int:
        async with step.deps:
            await checkpoint()
        return int(step.inputs)

    node = builder.step(work, node_id="work")
    join = builder.join(reduce_list_append, initial_factory=list[int])
    builder.add(
        builder.edge_from(builder.start_node).map().to(node),
        builder.edge_from(node).to(join),
        builder.edge_from(join).to(builder.end_node),
    )
    graph = builder.build()
    numbers = list(range(count))

    async def program() -> None:
        done = await graph.run(inputs=numbers, deps=anyio.CapacityLimiter(at_once))
        assert len(done) == count

    return program


def agents_sdk(count: int, at_once: int, backend: str) -> Program:
    """A run for each agent behind gather and a semaphore, of a model that answers at once; nothing is traced."""
    from agents import Agent, RunConfig, Runner  # noqa: PLC0415

    agent = Agent(name="a", model=_silent_model(checkpoint_of(backend)))
    config = RunConfig(tracing_disabled=True)

    async def program() -> None:
        semaphore = asyncio.Semaphore(at_once)

        async def one() -> object:
            async with semaphore:
                return (await Runner.run(agent, "go", run_config=config)).final_output

        assert await asyncio.gather(*(one() for _ in range(count))) == ["done"] * count

    return program


def _silent_model(checkpoint: Checkpoint) -> Any:
    """Return a model of the Agents SDK that asks nobody."""
    from agents import Model, ModelResponse, Usage  # noqa: PLC0415
    from openai.types.responses import ResponseOutputMessage, ResponseOutputText  # noqa: PLC0415

    text = ResponseOutputText(text="done", type="output_text", annotations=[])
    message = ResponseOutputMessage(id="m", content=[text], role="assistant", status="completed", type="message")

    class Silent(Model):
        async def get_response(self, *_: Any, **__: Any) -> ModelResponse:
            await checkpoint()
            return ModelResponse(output=[message], usage=Usage(), response_id=None)

        def stream_response(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

    return Silent()


@cache
def _dask_client(at_once: int) -> Any:
    from dask import distributed  # noqa: PLC0415

    make_client: Any = distributed.Client
    return make_client(processes=False, n_workers=1, threads_per_worker=at_once, dashboard_address=None)


def dask_map(count: int, at_once: int, backend: str) -> Program:
    """A task for each agent on a cluster inside this process, which is started before the clock is."""
    client, checkpoint = _dask_client(at_once), checkpoint_of(backend)

    async def work(number: int) -> int:
        await checkpoint()
        return number

    async def program() -> None:
        done = client.gather(client.map(work, range(count), pure=False))  # blocks: dask's loop is in another thread
        assert len(cast("list[int]", done)) == count

    return program


LANGGRAPH, GRAPH = "LangGraph Send", "pydantic-graph map + join"
SDK, DASK = "OpenAI Agents SDK + gather", "dask.distributed, in process"

FRAMEWORKS = {GRAPH: pydantic_graph, LANGGRAPH: langgraph_send, SDK: agents_sdk, DASK: dask_map}

NEEDS = {GRAPH: "pydantic_graph", LANGGRAPH: "langgraph", SDK: "agents", DASK: "distributed"}
"""The module without which a framework is left out."""

FRAMEWORKS_ONLY_ON = {LANGGRAPH: "asyncio", SDK: "asyncio", DASK: "asyncio"}
