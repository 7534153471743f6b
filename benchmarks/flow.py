"""What dependencies and streams cost: ``python benchmarks/flow.py``. CPU times, the minimum of rounds, one run."""

import argparse
import gc
import resource
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import anyio

from parallel_agents import AgentAssignment, AgentIdentity, ParallelExecutionGroup, ParallelExecutor, Task

BACKENDS = ("asyncio", "trio")
AT_ONCE = 100


async def agent(_: AgentAssignment) -> None:
    return None


def item(number: int, *needs: int) -> AgentAssignment:
    task = Task(id=f"t{number}", depends_on=tuple(f"t{other}" for other in needs))
    return AgentAssignment(identity=AgentIdentity(id=f"a{number}"), task=task)


def group(needs: Callable[[int], tuple[int, ...]], count: int) -> Callable[[], Awaitable[float]]:
    whole = ParallelExecutionGroup(
        group_id="g", assignments=[item(n, *needs(n)) for n in range(count)], max_concurrency=AT_ONCE
    )

    async def program() -> float:
        gc.collect()
        before = time.process_time()
        assert (await ParallelExecutor(engine=agent).execute_group(whole)).all_succeeded
        return time.process_time() - before

    return program


def stream(count: int) -> Callable[[], Awaitable[float]]:
    def source() -> Iterator[AgentAssignment]:
        yield from map(item, range(count))

    async def program() -> float:
        gc.collect()
        before = time.process_time()
        async with ParallelExecutor(engine=agent).open_stream(source(), group_id="s", max_concurrency=AT_ONCE) as outs:
            async for outcome in outs:
                assert outcome.is_success
        return time.process_time() - before

    return program


async def memory_over_time(count: int) -> None:
    """Print the resident memory at each fifth of a stream."""
    seen = 0
    source = map(item, range(count))
    async with ParallelExecutor(engine=agent).open_stream(source, group_id="s", max_concurrency=AT_ONCE) as outcomes:
        async for _ in outcomes:
            seen += 1
            if seen % (count // 5) == 0:
                pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])  # noqa: ASYNC240 - memory, no disk
                print(f"    after {seen:9,}: {pages * resource.getpagesize() / 1e6:.0f} MB")


def peak_bytes(program: Callable[[], Awaitable[float]], backend: str) -> int:
    tracemalloc.start()
    try:
        anyio.run(program, backend=backend)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stream", type=int, default=1_000_000, help="assignments of the long stream")
    long = parser.parse_args().stream
    for backend in BACKENDS:

        def micros(program: Callable[[], Awaitable[float]], count: int, rounds: int = 3, on: str = backend) -> float:
            return min(anyio.run(program, backend=on) for _ in range(rounds)) / count * 1e6

        print(backend)
        plain = micros(group(lambda _: (), 10_000), 10_000)
        chain = micros(group(lambda n: (n - 1,) if n else (), 10_000), 10_000)
        plain_wide = micros(group(lambda _: (), 100_000), 100_000, rounds=2)
        wide = micros(group(lambda n: (n // 2,) if n else (), 100_000), 100_000, rounds=2)
        print(f"  plain group of 10,000              {plain:6.2f} us per agent")
        print(f"  a chain of 10,000                  {chain:6.2f} us, {chain / plain:.2f} of it, aim 2")
        print(f"  plain group of 100,000             {plain_wide:6.2f} us per agent")
        print(f"  a tree of 100,000 nodes            {wide:6.2f} us, {wide / plain_wide:.2f} of it, aim 2")
        print(f"  a stream of {long:<10,}             {micros(stream(long), long, rounds=1):6.2f} us per agent")
        anyio.run(memory_over_time, long, backend=backend)
        few, many = peak_bytes(stream(1_000), backend), peak_bytes(stream(20_000), backend)
        print(f"  peak memory of a stream: {few / 1e3:.0f} kB for 1,000, {many / 1e3:.0f} kB for 20,000 assignments")


if __name__ == "__main__":
    main()
