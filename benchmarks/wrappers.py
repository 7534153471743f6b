"""What engines that wrap an engine cost, and how exact a rate limit is: ``python benchmarks/wrappers.py --help``.

A wrapper's overhead is the difference to the bare engine in CPU time, the minimum of interleaved rounds. The accuracy
of a rate limit is what it granted in real time of what it allows, when more is wanted than that.
"""

import argparse
import gc
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version

import anyio
from peers import NoOpEngine, checkpoint_of, group_of

from parallel_agents import AgentAssignment, AgentEngine, ParallelExecutor
from parallel_agents.engines.rate_limit import RateLimit, RateLimitedEngine
from parallel_agents.engines.retry import RetryEngine, RetryPolicy

BARE = "no wrapper"


Wrapper = Callable[[AgentEngine], AgentEngine]


def model_of(assignment: AgentAssignment) -> str | None:
    return assignment.identity.model


def retries(inner: AgentEngine) -> AgentEngine:
    return RetryEngine(inner, RetryPolicy(retry_on=ValueError))


def never_waits(inner: AgentEngine) -> AgentEngine:
    return RateLimitedEngine(inner, RateLimit(1e12, per_seconds=1))


def two_limits_by_key(inner: AgentEngine) -> AgentEngine:
    requests = RateLimit(1e12, per_seconds=1, key=model_of)
    return RateLimitedEngine(inner, requests, RateLimit(1e15, "tokens", per_seconds=1, key=model_of, reserve=1_000))


def all_stand_in_line(inner: AgentEngine) -> AgentEngine:
    return RateLimitedEngine(inner, RateLimit(20_000, per_seconds=1))


WRAPPERS: dict[str, Wrapper] = {
    BARE: lambda inner: inner,
    "RetryEngine, nothing fails": retries,
    "RateLimitedEngine, nobody waits": never_waits,
    "RateLimitedEngine, two limits by key": two_limits_by_key,
    "RateLimitedEngine, all stand in line": all_stand_in_line,
}


def microseconds(wrap: Wrapper, count: int, backend: str) -> float:
    """Return the CPU microseconds per agent."""
    engine = wrap(NoOpEngine(checkpoint_of(backend)))

    async def program() -> float:
        group = group_of(count, 100)
        gc.collect()
        before = time.process_time()
        await ParallelExecutor(engine=engine).execute_group(group)
        return time.process_time() - before

    return anyio.run(program, backend=backend) / count * 1e6


def accuracy(per_second: float, burst: float, seconds: float, backend: str) -> float:
    """Return what was granted as a share of what is allowed, for agents that come as fast as they can."""

    async def program() -> float:
        limit = RateLimit(per_second, per_seconds=1, burst=burst)
        count = int(burst + per_second * seconds)
        engine = RateLimitedEngine(NoOpEngine(checkpoint_of(backend)), limit)
        group = group_of(count, 100)
        before = anyio.current_time()
        await ParallelExecutor(engine=engine).execute_group(group)
        return (count - burst) / per_second / (anyio.current_time() - before)

    return anyio.run(program, backend=backend)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=5_000, help="agents in a group")
    parser.add_argument("--backends", nargs="+", default=["asyncio", "trio"], choices=["asyncio", "trio"])
    parser.add_argument("--rounds", type=int, default=5, help="samples of each case; the minimum counts")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each rate is measured")
    chosen = parser.parse_args()
    print(
        f"{platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} cores, "
        f"anyio {version('anyio')}, trio {version('trio')}, stamina {version('stamina')}"
    )
    print(f"\n{chosen.count:,} agents, 100 at once: CPU microseconds that a wrapper adds to each")
    for backend in chosen.backends:
        best = dict.fromkeys(WRAPPERS, float("inf"))
        for _ in range(chosen.rounds):
            for name, wrap in WRAPPERS.items():
                best[name] = min(best[name], microseconds(wrap, chosen.count, backend))
        for name in WRAPPERS:
            print(f"  {backend:8} {name:38} {best[name] - best[BARE]:8.2f}")
    print("\nGranted, of what a limit allows")
    for backend in chosen.backends:
        for per_second, burst in ((10, 1), (100, 1), (1_000, 1), (1_000, 10)):
            share = accuracy(per_second, burst, chosen.seconds, backend)
            print(f"  {backend:8} {f'{per_second:,} per second, burst {burst}':38} {share:8.2%}")


if __name__ == "__main__":
    main()
