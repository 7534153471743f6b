"""What an agent costs on a Ray cluster: ``python benchmarks/cluster_ray.py``, or a part of it by its name.

Starts a cluster of one node on this machine. Times are of the wall clock, for driver and worker share the work, the
least of several rounds; memory is what processes grow by. The same work is submitted by hand beside it.
"""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import anyio

from parallel_agents import AgentIdentity, ParallelExecutionGroup, ParallelExecutor, Task

FOLDER = Path(__file__).parent
sys.path += [str(FOLDER), str(FOLDER.parent / "tests")]

ROUNDS = 3
SERIAL, PARALLEL, AT_ONCE, IN_FLIGHT = 200, 3000, 1000, 10_000
BACKENDS = ("asyncio", "trio")


def resident_kb(pid: int | str = "self") -> int:
    lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def engine(function: str, **options: Any) -> Any:
    module = import_module("parallel_agents.engines.ray")
    return module.RayEngine(f"cluster_agents:{function}", name=f"bench-{function}", **options)


async def run_group(runs: Any, count: int, at_once: int | None) -> float:
    tasks = [Task(id=f"t{number}") for number in range(count)]
    group = ParallelExecutionGroup.map(secrets.token_hex(4), AgentIdentity(id="a"), tasks, max_concurrency=at_once)
    before = time.perf_counter()
    result = await ParallelExecutor(engine=runs).execute_group(group)
    assert result.all_succeeded, result.outcomes[0]
    return (time.perf_counter() - before) / count * 1e6


async def by_hand(actor: Any, count: int, at_once: int) -> float:
    """Await calls of an actor, so many at once; on asyncio, as Ray's own are."""
    limiter = anyio.CapacityLimiter(at_once)

    async def one(number: int) -> None:
        async with limiter:
            assert await actor.nothing.remote(f"t{number}") == f"t{number}"

    before = time.perf_counter()
    async with anyio.create_task_group() as tasks:
        for number in range(count):
            tasks.start_soon(one, number)
    return (time.perf_counter() - before) / count * 1e6


def least(program: Callable[..., Awaitable[float]], *args: Any, backend: str = "asyncio") -> float:
    return min(anyio.run(program, *args, backend=backend) for _ in range(ROUNDS))


def overhead() -> None:
    """Print what an agent that does nothing costs: here, by hand, and with RayEngine."""
    ray = import_module("ray")
    plain = import_module("cluster_agents").nothing
    actor = ray.remote(import_module("cluster_agents").ByHand).options(max_concurrency=20_000, num_cpus=0).remote()
    ray.get(actor.pid.remote())
    anyio.run(run_group, engine("nothing"), 10, 10)
    print(f"microseconds per agent: one after another ({SERIAL}), and {AT_ONCE} at once ({PARALLEL})")
    here = least(run_group, plain, SERIAL, 1), least(run_group, plain, PARALLEL, AT_ONCE)
    print(f"  {'plain engine, asyncio':26} {here[0]:8.0f} {here[1]:8.0f}")
    hand = least(by_hand, actor, SERIAL, 1), least(by_hand, actor, PARALLEL, AT_ONCE)
    print(f"  {'by hand, asyncio':26} {hand[0]:8.0f} {hand[1]:8.0f}")
    for backend in BACKENDS:
        runs = engine("nothing")
        ours = [least(run_group, runs, count, n, backend=backend) for count, n in ((SERIAL, 1), (PARALLEL, AT_ONCE))]
        print(f"  {f'RayEngine, {backend}':26} {ours[0]:8.0f} {ours[1]:8.0f}")
        print(f"  {'  of by hand':26} {ours[0] / hand[0]:8.2f} {ours[1] / hand[1]:8.2f}")


async def grown_by_hand(actor: Any, pid: int) -> tuple[float, float]:
    before = resident_kb(), resident_kb(pid)
    calls = [actor.wait.remote() for _ in range(IN_FLIGHT)]

    async def one(call: Any) -> None:
        await call

    async with anyio.create_task_group() as tasks:
        for call in calls:
            tasks.start_soon(one, call)
        await settled(pid)
        after = resident_kb(), resident_kb(pid)
        tasks.cancel_scope.cancel()
    return (after[0] - before[0]) / IN_FLIGHT, (after[1] - before[1]) / IN_FLIGHT


async def settled(pid: int) -> None:
    """Wait until a process grows no more."""
    seen = -1
    while (now := resident_kb(pid)) != seen:
        seen = now
        await anyio.sleep(2)


async def grown(runs: Any, pid: int) -> tuple[float, float]:
    before = resident_kb(), resident_kb(pid)
    tasks = [Task(id=f"t{number}") for number in range(IN_FLIGHT)]
    group = ParallelExecutionGroup.map(secrets.token_hex(4), AgentIdentity(id="a"), tasks)
    async with ParallelExecutor(engine=runs).open_group(group) as run:
        await settled(pid)
        after = resident_kb(), resident_kb(pid)
        cancelled = time.perf_counter()
        run.cancel()
    seconds = time.perf_counter() - cancelled
    confirmed = sum(outcome.error == "Cancelled: cancel() was called" for outcome in run.result.outcomes)
    print(f"  cancelling {IN_FLIGHT:,} of them took {seconds:.1f} s, and {confirmed:,} confirmed that they stopped")
    return (after[0] - before[0]) / IN_FLIGHT, (after[1] - before[1]) / IN_FLIGHT


def tell(name: str, kilobytes: tuple[float, float]) -> None:
    print(f"  {name:26} driver {kilobytes[0]:6.1f}, worker {kilobytes[1]:6.1f}, both {sum(kilobytes):6.1f}")


def memory(backend: str) -> None:
    """Print what an agent in flight takes of the driver and of its worker, in kB."""
    ray = import_module("ray")
    anyio.run(run_group, engine("nothing"), 10, 10, backend=backend)
    runs = engine("wait", cancel_seconds=60.0)
    anyio.run(runs._link, 0, backend=backend)  # starts the host
    host = ray.get_actor("bench-wait-0", namespace=import_module("parallel_agents.engines.ray").NAMESPACE)
    pid = json.loads(ray.get(host.state.remote()))["body"]["pid"]
    tell(f"RayEngine, {backend}", anyio.run(grown, runs, pid, backend=backend))
    ray.kill(host, no_restart=True)


def memory_by_hand() -> None:
    """Print the same for calls of an actor."""
    ray = import_module("ray")
    actor = ray.remote(import_module("cluster_agents").ByHand).options(max_concurrency=20_000, num_cpus=0).remote()
    tell("by hand, asyncio", anyio.run(grown_by_hand, actor, ray.get(actor.pid.remote())))


PARTS: dict[str, Callable[[], None]] = {
    "overhead": overhead,
    "memory-asyncio": partial(memory, "asyncio"),
    "memory-trio": partial(memory, "trio"),
    "memory-by-hand": memory_by_hand,
}


def main(names: list[str]) -> None:
    """Run each part in a process of its own, on one cluster."""
    if names[:1] == ["--part"]:
        import_module("ray").init(log_to_driver=False, configure_logging=False)
        PARTS[names[1]]()
        return
    os.environ["PYTHONPATH"] = str(FOLDER)
    with import_module("ray_cluster").cluster():
        for name in names or PARTS:
            if name == "memory-asyncio":
                print(f"kB per agent in flight, {IN_FLIGHT:,} of them", flush=True)
            subprocess.run([sys.executable, __file__, "--part", name], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
