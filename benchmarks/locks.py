"""What claims cost: ``python benchmarks/locks.py``. CPU times, the minimum of several rounds, ratios of one run."""

import gc
import time
from collections.abc import Awaitable, Callable

import anyio

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    ClaimPolicy,
    InMemoryResourceLock,
    ParallelExecutionGroup,
    ParallelExecutor,
    ResourceClaim,
    Task,
)

ROUNDS = 5
BACKENDS = ("asyncio", "trio")


def cpu_seconds(program: Callable[[], Awaitable[float]], backend: str) -> float:
    """Return the least that *program* says it took, each time in a fresh event loop."""
    gc.collect()
    return min(anyio.run(program, backend=backend) for _ in range(ROUNDS))


async def bare_lock() -> float:
    lock = anyio.Lock()
    before = time.process_time()
    for _ in range(10_000):
        async with lock:
            pass
    return time.process_time() - before


async def fast_bare_lock() -> float:
    lock = anyio.Lock(fast_acquire=True)
    before = time.process_time()
    for _ in range(10_000):
        async with lock:
            pass
    return time.process_time() - before


def one_claim(held: int, resource: str = "file") -> Callable[[], Awaitable[float]]:
    async def program() -> float:
        lock = InMemoryResourceLock()
        for number in range(held):
            await lock.acquire_claims([ResourceClaim(resource=f"path:/a/b{number % 100}/c{number}")], f"h{number}")
        claims = (ResourceClaim(resource=resource),)
        before = time.process_time()
        for _ in range(10_000):
            lease = await lock.acquire_claims(claims, "me")
            lease.release()
        return time.process_time() - before

    return program


def line_of(waiters: int) -> Callable[[], Awaitable[float]]:
    async def program() -> float:
        lock = InMemoryResourceLock()
        claims = (ResourceClaim(resource="file"),)
        first = await lock.acquire_claims(claims, "first")

        async def wait(number: int) -> None:
            lease = await lock.acquire_claims(claims, str(number))
            lease.release()

        async with anyio.create_task_group() as tasks:
            for number in range(waiters):
                tasks.start_soon(wait, number)
            await anyio.wait_all_tasks_blocked()
            before = time.process_time()
            first.release()
        return time.process_time() - before

    return program


def group(policy: ClaimPolicy) -> Callable[[], Awaitable[float]]:
    assignments = [
        AgentAssignment(
            identity=AgentIdentity(id=f"a{number}"),
            task=Task(id=f"t{number}"),
            resource_claims=[
                ResourceClaim(resource=f"path:/repository/src/part{number % 50}/file{number}-{n}") for n in range(5)
            ],
        )
        for number in range(10_000)
    ]
    whole = ParallelExecutionGroup(group_id="g", assignments=assignments, max_concurrency=100, claim_policy=policy)

    async def agent(_: AgentAssignment) -> None:
        return None

    async def program() -> float:
        before = time.process_time()
        result = await ParallelExecutor(engine=agent).execute_group(whole)
        assert result.all_succeeded
        return time.process_time() - before

    return program


def main() -> None:
    for backend in BACKENDS:
        print(backend)
        bare = cpu_seconds(bare_lock, backend) * 100
        fast = cpu_seconds(fast_bare_lock, backend) * 100
        ours = cpu_seconds(one_claim(0), backend) * 100
        print(f"  take and give back one claim           {ours:8.2f} us")
        print(f"  async with anyio.Lock                  {bare:8.2f} us   ours is {ours / bare:.2f} of it, aim 3")
        print(f"  async with anyio.Lock, fast_acquire    {fast:8.2f} us   ours is {ours / fast:.2f} of it")
        for resource in ("file", "path:/a/b0/new"):
            few = cpu_seconds(one_claim(10, resource), backend) * 100
            many = cpu_seconds(one_claim(100_000, resource), backend) * 100
            ratio = f"ratio {many / few:.2f}, aim 1.2"
            print(f"  {resource:16} 10 held {few:6.2f} us, 100,000 held {many:6.2f} us, {ratio}")
        small, large = (cpu_seconds(line_of(count), backend) / count * 1e6 for count in (1_000, 10_000))
        ratio = f"ratio {large / small:.2f}, aim 1.5"
        print(f"  one of 1,000 waiters woken {small:6.2f} us, of 10,000 {large:6.2f} us, {ratio}")
        for policy in ClaimPolicy:
            seconds = cpu_seconds(group(policy), backend)
            print(f"  10,000 assignments, 50,000 claims, {policy:6} {seconds:6.2f} s, aim 1")


if __name__ == "__main__":
    main()
