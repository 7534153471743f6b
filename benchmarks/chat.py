"""Agents per second of ChatEngine, and of the same fan-out in frameworks, against a scripted server without latency.

Each agent asks once and is answered at once, so what is measured is what stands between an agent and its server. The
server is a process of its own; so is each competitor, which says how much processor time and memory it took.

    python benchmarks/chat.py [AGENTS] [IN_FLIGHT]
"""

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

Ask = Callable[[], Awaitable[object]]


def serve() -> None:
    from parallel_agents.testing.chat import scripted_chat_server  # noqa: PLC0415 - of the server's process only

    async def main() -> None:
        async with scripted_chat_server(lambda _: "Fine.") as server:
            print(server.base_url, flush=True)
            await anyio.to_thread.run_sync(sys.stdin.read)

    anyio.run(main)


def chat_engine(base_url: str, agents: int, in_flight: int) -> Callable[[], Awaitable[None]]:
    from parallel_agents import AgentIdentity, ParallelExecutionGroup, ParallelExecutor, Task  # noqa: PLC0415
    from parallel_agents.engines.chat import ChatEngine  # noqa: PLC0415

    engine = ChatEngine(base_url, "m")
    identity = AgentIdentity(id="a", instructions="Be short.")

    async def run() -> None:
        tasks = [Task(id=str(number), description="How are you?") for number in range(agents)]
        group = ParallelExecutionGroup.map("g", identity, tasks, max_concurrency=in_flight)
        result = await ParallelExecutor(engine=engine).execute_group(group)
        assert [outcome.output for outcome in result.outcomes] == ["Fine."] * agents

    return run


def fan_out(ask: Ask, agents: int, in_flight: int) -> Callable[[], Awaitable[None]]:
    """Ask with gather and a semaphore, as people do."""

    async def run() -> None:
        semaphore = asyncio.Semaphore(in_flight)

        async def one() -> object:
            async with semaphore:
                return await ask()

        assert await asyncio.gather(*(one() for _ in range(agents))) == ["Fine."] * agents

    return run


def pydantic_ai(base_url: str, agents: int, in_flight: int) -> Callable[[], Awaitable[None]]:
    from pydantic_ai import Agent  # noqa: PLC0415
    from pydantic_ai.models.openai import OpenAIChatModel  # noqa: PLC0415
    from pydantic_ai.providers.openai import OpenAIProvider  # noqa: PLC0415

    model = OpenAIChatModel("m", provider=OpenAIProvider(base_url=base_url, api_key="none"))
    agent = Agent(model, instructions="Be short.")

    async def ask() -> object:
        return (await agent.run("How are you?")).output

    return fan_out(ask, agents, in_flight)


def openai_agents(base_url: str, agents: int, in_flight: int) -> Callable[[], Awaitable[None]]:
    from agents import Agent, OpenAIChatCompletionsModel, RunConfig, Runner  # noqa: PLC0415
    from openai import AsyncOpenAI  # noqa: PLC0415

    model = OpenAIChatCompletionsModel("m", openai_client=AsyncOpenAI(base_url=base_url, api_key="none"))
    agent = Agent(name="a", instructions="Be short.", model=model)
    config = RunConfig(tracing_disabled=True)

    async def ask() -> object:
        return (await Runner.run(agent, "How are you?", run_config=config)).final_output

    return fan_out(ask, agents, in_flight)


def langgraph(base_url: str, agents: int, in_flight: int) -> Callable[[], Awaitable[None]]:
    from langchain_openai import ChatOpenAI  # noqa: PLC0415
    from langgraph.graph import START, MessagesState, StateGraph  # noqa: PLC0415
    from pydantic import SecretStr  # noqa: PLC0415

    model = ChatOpenAI(model="m", base_url=base_url, api_key=SecretStr("none"))

    async def answer(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(state["messages"])]}

    builder = StateGraph(MessagesState)
    builder.add_node("answer", answer)
    builder.add_edge(START, "answer")
    graph = builder.compile()

    async def ask() -> object:
        said: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "How are you?"}]
        return (await graph.ainvoke({"messages": said}))["messages"][-1].content

    return fan_out(ask, agents, in_flight)


COMPETITORS = {
    "ChatEngine": chat_engine,
    "pydantic-ai": pydantic_ai,
    "OpenAI Agents SDK": openai_agents,
    "LangGraph": langgraph,
}


def compete(name: str, backend: str, base_url: str, agents: int, in_flight: int) -> None:
    """Be one competitor: run once to warm up and once measured, and print what it took."""
    warm_up = COMPETITORS[name](base_url, min(agents, 50), 10)
    run = COMPETITORS[name](base_url, agents, in_flight)

    async def both() -> dict[str, float]:
        await warm_up()
        wall, processor = time.perf_counter(), time.process_time()
        await run()
        return {
            "seconds": time.perf_counter() - wall,
            "processor": time.process_time() - processor,
            "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }

    print(json.dumps(anyio.run(both, backend=backend)))


def measure(name: str, backend: str, agents: int, in_flight: int) -> dict[str, float]:
    command = [sys.executable, __file__]
    with subprocess.Popen([*command, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        place = [name, backend, server.stdout.readline().strip()]
        done = subprocess.run(
            [*command, "--compete", *place, str(agents), str(in_flight)], stdout=subprocess.PIPE, check=True
        )
        server.kill()
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("agents", type=int, nargs="?", default=2_000)
    parser.add_argument("in_flight", type=int, nargs="?", default=100)
    given = parser.parse_args()
    runs = [("ChatEngine", "asyncio"), ("ChatEngine", "trio"), *((name, "asyncio") for name in list(COMPETITORS)[1:])]
    print(f"{given.agents} agents, {given.in_flight} in flight; processor time per agent and memory are the client's;")
    print("the last column is how many times faster ChatEngine is on asyncio")
    base = 0.0
    for name, backend in runs:
        found = measure(name, backend, given.agents, given.in_flight)
        rate = given.agents / found["seconds"]
        base = base or rate
        cost = found["processor"] / given.agents * 1e6
        who = f"{name}, {backend}"
        print(f"{who:27} {rate:6.0f} agents/s {cost:6.0f} us {found['megabytes']:5.0f} MB {base / rate:6.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve()
    elif sys.argv[1:2] == ["--compete"]:
        who, where, address, *sizes = sys.argv[2:7]
        compete(who, where, address, *map(int, sizes))
    else:
        main()
