"""What peers do when something goes wrong, found by running them: ``python benchmarks/behaviour.py``.

Ten agents, three at a time; each case in a process of its own, which is ended when it takes more than 30 seconds. What
is printed is what stands in the comparison of the documentation.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import anyio
from frameworks import Gathered

Work = Callable[[int], Awaitable[int]]
FanOut = Callable[[Work, int, int], Awaitable[list[Any]]]

COUNT, AT_ONCE, BAD = 10, 3, 5


async def gather(work: Work, count: int, at_once: int) -> list[Any]:
    semaphore = asyncio.Semaphore(at_once)

    async def one(number: int) -> int:
        async with semaphore:
            return await work(number)

    return await asyncio.gather(*(one(number) for number in range(count)))


async def task_group(work: Work, count: int, at_once: int) -> list[Any]:
    limiter = anyio.CapacityLimiter(at_once)
    done: list[Any] = [None] * count

    async def one(number: int) -> None:
        async with limiter:
            done[number] = await work(number)

    async with anyio.create_task_group() as tasks:
        for number in range(count):
            tasks.start_soon(one, number)
    return done


async def nursery(work: Work, count: int, at_once: int) -> list[Any]:
    import trio  # noqa: PLC0415 - of one case only

    limiter = trio.CapacityLimiter(at_once)
    done: list[Any] = [None] * count

    async def one(number: int) -> None:
        async with limiter:
            done[number] = await work(number)

    async with trio.open_nursery() as tasks:
        for number in range(count):
            tasks.start_soon(one, number)
    return done


async def aiometer_all(work: Work, count: int, at_once: int) -> list[Any]:
    import aiometer  # noqa: PLC0415 - of one case only

    return await aiometer.run_all([partial(work, number) for number in range(count)], max_at_once=at_once)


async def langgraph_send(work: Work, count: int, at_once: int) -> list[Any]:
    from langgraph.graph import START, StateGraph  # noqa: PLC0415
    from langgraph.types import Send  # noqa: PLC0415

    async def node(number: int) -> dict[str, list[int]]:
        return {"done": [await work(number)]}

    builder: Any = StateGraph(Gathered)
    builder.add_node("node", node)
    builder.add_conditional_edges(START, lambda _: [Send("node", number) for number in range(count)], ["node"])
    state = await builder.compile().ainvoke({"count": count, "done": []}, {"max_concurrency": at_once})
    return list(state["done"])


async def pydantic_graph(work: Work, count: int, at_once: int) -> list[Any]:
    from pydantic_graph import GraphBuilder, reduce_list_append  # noqa: PLC0415

    builder: Any = GraphBuilder(deps_type=anyio.CapacityLimiter, input_type=list[int], output_type=list[int])

    async def call(step: Any) -> int:
        async with step.deps:
            return await work(step.inputs)

    node = builder.step(call, node_id="call")
    join = builder.join(reduce_list_append, initial_factory=list[int])
    builder.add(
        builder.edge_from(builder.start_node).map().to(node),
        builder.edge_from(node).to(join),
        builder.edge_from(join).to(builder.end_node),
    )
    return list(await builder.build().run(inputs=list(range(count)), deps=anyio.CapacityLimiter(at_once)))


async def dask_map(work: Work, count: int, at_once: int) -> list[Any]:
    from dask import distributed  # noqa: PLC0415

    make_client: Any = distributed.Client
    async with make_client(
        processes=False, n_workers=1, threads_per_worker=at_once, dashboard_address=None, asynchronous=True
    ) as client:
        futures = client.map(work, range(count), pure=False)
        return list(await client.gather(futures))


async def parallel_agents(work: Work, count: int, at_once: int) -> list[Any]:
    from parallel_agents import (  # noqa: PLC0415
        AgentAssignment,
        AgentIdentity,
        ParallelExecutionGroup,
        ParallelExecutor,
        Task,
    )

    async def engine(assignment: AgentAssignment) -> int:
        return await work(int(assignment.task_id))

    tasks = [Task(id=str(number)) for number in range(count)]
    group = ParallelExecutionGroup.map("g", AgentIdentity(id="a"), tasks, max_concurrency=at_once)
    result = await ParallelExecutor(engine=engine).execute_group(group)
    return [outcome.output if outcome.is_success else outcome.status.value for outcome in result.outcomes]


PEERS: dict[str, FanOut] = {
    "gather + Semaphore": gather,
    "anyio group + CapacityLimiter": task_group,
    "trio nursery + CapacityLimiter": nursery,
    "aiometer.run_all": aiometer_all,
    "LangGraph Send": langgraph_send,
    "pydantic-graph map + join": pydantic_graph,
    "dask.distributed": dask_map,
    "parallel_agents": parallel_agents,
}


class Watch:
    """Counts what the agents of one run did.

    Args:
        spoil: What the bad agent does; the others wait for a moment and return their number.
    """

    def __init__(self, spoil: Callable[[], object] = lambda: None) -> None:
        self._spoil = spoil
        self.running = self.peak = self.started = self.ended = 0

    async def work(self, number: int) -> int:
        self.started += 1
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await anyio.sleep(0.05)
            if number == BAD:
                self._spoil()
        finally:
            self.running -= 1
        self.ended += 1
        return number


def fail() -> None:
    raise ValueError("no")


def cancel_itself() -> None:
    raise anyio.get_cancelled_exc_class()


async def well(peer: FanOut) -> str:
    watch = Watch()
    done = await peer(watch.work, COUNT, AT_ONCE)
    order = "in order" if done == list(range(COUNT)) else "in another order"
    return f"{len(done)} results {order}" + (f"; at most {watch.peak} at once" if watch.peak else "")


async def after(peer: FanOut, spoil: Callable[[], object]) -> str:
    watch = Watch(spoil)
    try:
        done: Any = await peer(watch.work, COUNT, AT_ONCE)
        said = f"returned {sum(isinstance(each, int) for each in done)} of {COUNT} results"
    except BaseException as error:  # noqa: ASYNC103, BLE001 - this is what is looked for
        said = f"raised {type(error).__name__}, no results"
    ended = watch.ended
    await anyio.sleep(0.6)
    if not watch.started:  # dask gives its worker a copy of the agents
        return said
    return f"{said}; {ended} agents had ended, {watch.ended - ended} did afterwards"


CASES: dict[str, tuple[str, Callable[[FanOut], Awaitable[str]]]] = {
    "all is well": ("asyncio", well),
    "one fails": ("asyncio", lambda peer: after(peer, fail)),
    "one raises CancelledError": ("asyncio", lambda peer: after(peer, cancel_itself)),
    "all is well, trio": ("trio", well),
    "one fails, trio": ("trio", lambda peer: after(peer, fail)),
}


def run_case(case: str, name: str) -> str:
    backend, ask = CASES[case]
    try:
        return anyio.run(ask, PEERS[name], backend=backend)
    except BaseException as error:  # noqa: ASYNC103, BLE001 - this is what is looked for
        return f"raised {type(error).__name__}: {str(error)[:60]}"  # noqa: ASYNC104 - in a process of its own


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(run_case(*json.loads(sys.argv[1]))))
        return
    packages = ("anyio", "trio", "aiometer", "langgraph", "pydantic-graph", "distributed")
    print(", ".join(f"{package} {version(package)}" for package in packages))
    for case in CASES:
        print(f"\n{case}")
        for name in PEERS:
            command = [sys.executable, __file__, json.dumps([case, name])]
            try:
                done = subprocess.run(
                    command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=30, check=False
                )
                said = json.loads(done.stdout.splitlines()[-1])
            except subprocess.TimeoutExpired:
                said = "still not back after 30 seconds"
            except (IndexError, ValueError):
                said = f"ended with exit code {done.returncode}"
            print(f"  {name:32} {said}")


if __name__ == "__main__":
    main()
