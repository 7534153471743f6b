"""What Temporal adds to an agent that does nothing: through TemporalEngine, and submitted by hand, on the same server.

Starts the development server, which needs the dependency group ``temporal``; ``--synced`` lets its database wait for
the disk, as it does for everybody else. ``--in-flight`` measures the memory of waiting agents instead, in a driver and
a worker of their own.

    python benchmarks/cluster_temporal.py --count 200
"""

import argparse
import asyncio
import multiprocessing
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.worker import Worker

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    FunctionEngine,
    ParallelExecutionGroup,
    ParallelExecutor,
    Task,
)
from parallel_agents.engines._temporal_worker import Agents
from parallel_agents.engines.rate_limit import RateLimit, RateLimitedEngine
from parallel_agents.engines.temporal import TemporalEngine

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from temporal_server import TemporalServer  # pyright: ignore[reportMissingImports] - from the tests

HOUR = 3600.0


async def nothing(assignment: AgentAssignment) -> str:
    return assignment.task_id


@activity.defn
async def by_hand_activity(text: str) -> str:
    return text


@workflow.defn(sandboxed=False)
class ByHand:
    @workflow.run
    async def run(self, text: str) -> str:
        return await workflow.execute_activity(by_hand_activity, text, start_to_close_timeout=timedelta(minutes=1))


def group_of(count: int, at_once: int | None) -> ParallelExecutionGroup:
    tasks = [Task(id=f"t{n}") for n in range(count)]
    identity = AgentIdentity(id="a")
    return ParallelExecutionGroup.map(f"g-{secrets.token_hex(4)}", identity, tasks, max_concurrency=at_once)


@asynccontextmanager
async def workers_of(client: Client, agents: Agents) -> AsyncIterator[None]:
    ours = agents.workers(client, "ours", max_agents=20_000, grace_seconds=0)
    by_hand = Worker(client, task_queue="hand", workflows=[ByHand], activities=[by_hand_activity])
    async with by_hand, ours.workflows, ours.news, ours.agents:
        yield


async def milliseconds(work: Callable[[], Awaitable[object]], count: int) -> float:
    began = time.perf_counter()
    await work()
    return (time.perf_counter() - began) / count * 1000


async def overhead(address: str, count: int, at_once: int) -> None:
    client = await Client.connect(address)

    async def by_hand(limit: int) -> None:
        places = asyncio.Semaphore(limit)

        async def one() -> None:
            async with places:
                await client.execute_workflow(ByHand.run, "x", id=secrets.token_hex(8), task_queue="hand")

        await asyncio.gather(*(one() for _ in range(count)))

    async def through(engine: TemporalEngine | FunctionEngine, limit: int) -> None:
        (await ParallelExecutor(engine=engine).execute_group(group_of(count, limit))).raise_for_failures()

    remote, plain = TemporalEngine(client, "ours"), FunctionEngine(nothing)
    async with workers_of(client, Agents(FunctionEngine(nothing), heartbeat_seconds=5.0)):
        await by_hand(at_once)
        await through(remote, at_once)
        print(f"{'milliseconds per agent':24}{'plain':>10}{'by hand':>10}{'Temporal':>10}{'of by hand':>12}")
        for name, limit in (("serial", 1), (f"{at_once} at once", at_once)):
            alone = await milliseconds(partial(through, plain, limit), count)
            hand = min([await milliseconds(partial(by_hand, limit), count) for _ in range(3)])
            ours = min([await milliseconds(partial(through, remote, limit), count) for _ in range(3)])
            print(f"{name:24}{alone:10.3f}{hand:10.1f}{ours:10.1f}{ours / hand:12.2f}")


async def drive(address: str, count: int, per_second: float) -> None:
    """Have agents started, until this process is killed."""
    client = await Client.connect(address)
    engine = TemporalEngine(client, "ours", progress_seconds=HOUR, heartbeat_timeout_seconds=HOUR)
    await ParallelExecutor(engine=RateLimitedEngine(engine, RateLimit(per_second, per_seconds=1))).execute_group(
        group_of(count, None)
    )


async def work(address: str, running: "Synchronized[int]") -> None:
    """Run agents that never end, until this process is killed."""

    async def wait(_: AgentAssignment) -> None:
        running.value += 1
        await asyncio.Event().wait()

    async with workers_of(await Client.connect(address), Agents(FunctionEngine(wait), heartbeat_seconds=HOUR)):
        await asyncio.Event().wait()


def run_async(function: Callable[..., Coroutine[object, object, None]], *args: object) -> None:
    asyncio.run(function(*args))


def resident_kilobytes(process: BaseProcess) -> int:
    for line in Path(f"/proc/{process.pid}/status").read_text("utf-8").splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    raise RuntimeError("no VmRSS")


def memory(address: str, count: int, per_second: float) -> None:
    """How much an agent in flight takes of its driver and of its worker, counted from the first tenth on.

    Until nearly all are in flight: one whose start got lost on a busy server begins when its heartbeats are missed.
    """
    spawn = multiprocessing.get_context("spawn")
    running = spawn.Value("i", 0)
    driver = spawn.Process(target=run_async, args=(drive, address, count, per_second))
    worker = spawn.Process(target=run_async, args=(work, address, running))
    print(f"{'in flight':>10}{'driver kB':>12}{'each':>8}{'worker kB':>12}{'each':>8}")
    first: tuple[int, int, int] | None = None
    try:
        driver.start()
        worker.start()
        for percent in (*range(10, 100, 10), 99):
            while running.value < count * percent // 100:
                if not (driver.is_alive() and worker.is_alive()):
                    raise RuntimeError(f"the driver or the worker has ended, with {running.value} in flight")
                time.sleep(0.1)
            now = running.value, resident_kilobytes(driver), resident_kilobytes(worker)
            first = first or now
            more = now[0] - first[0]
            each = [f"{(b - a) / more:8.0f}" if more else f"{'':8}" for a, b in zip(first[1:], now[1:], strict=True)]
            print(f"{now[0]:10}{now[1]:12}{each[0]}{now[2]:12}{each[1]}", flush=True)
    finally:
        for process in (driver, worker):
            process.kill()
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=100)
    parser.add_argument("--synced", action="store_true")
    parser.add_argument("--in-flight", type=float, metavar="N", help="start N of --count waiting agents per second")
    chosen = parser.parse_args()
    polls = None if chosen.in_flight is None else 3 * chosen.count  # each agent that is waited for is one
    with (
        tempfile.TemporaryDirectory() as folder,
        TemporalServer(Path(folder), is_synced=chosen.synced, polls=polls) as server,
    ):
        if chosen.in_flight is None:
            asyncio.run(overhead(server.address, chosen.count, chosen.at_once))
        else:
            memory(server.address, chosen.count, chosen.in_flight)


if __name__ == "__main__":
    main()
