"""Overhead per no-op agent, beside peers: ``python benchmarks/overhead.py --help``.

A fresh process for each sample, rounds interleaved, the minimum of the CPU times: a machine that does other things
too makes single samples larger, never smaller. Ratios are of one run. Aims that are missed are shown as missed.
"""

import argparse
import gc
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import anyio
from attrs import evolve
from frameworks import FRAMEWORKS, FRAMEWORKS_ONLY_ON, NEEDS
from peers import (
    AIOMETER,
    ANYIO,
    EVERYTHING,
    EXECUTOR,
    GATHER,
    ONLY_ON,
    PROGRAMS,
    group_of,
)

from parallel_agents import AgentAssignment, ParallelExecutor

SAMPLE_SECONDS = 0.3
"""A program is repeated within its process until it took so long together; the fastest repetition counts."""


def overhead(name: str, count: int, at_once: int, backend: str) -> float:
    """Return the CPU microseconds per agent."""
    make = {**PROGRAMS, **FRAMEWORKS}[name]
    best, spent = float("inf"), 0.0
    anyio.run(make(200, at_once, backend), backend=backend)
    while spent < SAMPLE_SECONDS:
        program = make(count, at_once, backend)

        async def timed(program: Any = program) -> float:
            gc.collect()
            before = time.process_time()
            await program()
            return time.process_time() - before

        took = anyio.run(timed, backend=backend)
        best, spent = min(best, took), spent + took
    return best / count * 1e6


def failure_to_cancelled(count: int, at_once: int, backend: str) -> float:
    """Return the CPU milliseconds from a failure until each of the other running agents was cancelled."""

    async def program() -> float:
        everybody = anyio.Event()
        started = cancelled = 0
        failed = done = 0.0

        async def agent(task: AgentAssignment) -> None:
            nonlocal started, cancelled, failed, done
            started += 1
            if started == at_once:
                everybody.set()
            try:
                await everybody.wait()
                if task.task_id == "t0":
                    failed = time.process_time()
                    raise ValueError
                await anyio.sleep_forever()
            except anyio.get_cancelled_exc_class():
                cancelled += 1
                done = time.process_time()
                raise

        group = evolve(group_of(count, at_once), fail_fast=True)
        await ParallelExecutor(engine=agent).execute_group(group)
        assert started == at_once
        assert cancelled == at_once - 1
        return done - failed

    return min(anyio.run(program, backend=backend) for _ in range(3)) * 1e3


def first_agent(count: int, at_once: int, backend: str) -> float:
    """Return the milliseconds from the call until the first agent runs."""

    async def program() -> float:
        group = group_of(count, at_once)
        first: list[float] = []

        async def agent(_task: AgentAssignment) -> None:
            if not first:
                first.append(time.perf_counter())

        executor = ParallelExecutor(engine=agent)
        before = time.perf_counter()
        await executor.execute_group(group)
        return first[0] - before

    return min(anyio.run(program, backend=backend) for _ in range(3)) * 1e3


SINGLE = {"failure": failure_to_cancelled, "first": first_agent}


def sample(*arguments: object) -> float:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--sample", json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def run_sample(arguments: list[Any]) -> float:
    what, *rest = arguments
    return overhead(*rest) if what == "overhead" else SINGLE[what](*rest)


def missing() -> list[str]:
    """Return the peers that are not installed."""
    return [
        name for name, module in {AIOMETER: "aiometer", **NEEDS}.items() if importlib.util.find_spec(module) is None
    ]


def applies(name: str, backend: str) -> bool:
    return name not in missing() and (ONLY_ON | FRAMEWORKS_ONLY_ON).get(name, backend) == backend


def table(
    names: Iterable[str], count: int, at_once: int, backends: list[str], rounds: int
) -> dict[tuple[str, str], float]:
    """Measure programs on every backend, print a table, and return microseconds per agent."""
    cases = [(name, backend) for backend in backends for name in names if applies(name, backend)]
    best = dict.fromkeys(cases, float("inf"))
    for _ in range(rounds):
        for name, backend in cases:
            best[name, backend] = min(best[name, backend], sample("overhead", name, count, at_once, backend))
    print(f"\n{count:,} agents, {at_once} at once: CPU microseconds per agent, and ours as a ratio to it")
    for (name, backend), microseconds in best.items():
        ratio = best[EXECUTOR, backend] / microseconds
        print(f"  {backend:8} {name:34} {microseconds:8.2f}   {ratio:6.3f}")
    return best


def aim(text: str, value: float, limit: float) -> None:
    print(f"  {'met   ' if value <= limit else 'MISSED'}  {text}: {value:.3f}, aim {limit}")


def show_aims(best: dict[tuple[str, str], float], backends: list[str]) -> None:
    print("\nAims at this size")
    for backend in backends:
        ours = best[EXECUTOR, backend]
        aim(f"{backend}: of {ANYIO}", ours / best[ANYIO, backend], 0.12 if backend == "asyncio" else 0.15)
        if (AIOMETER, backend) in best:
            aim(f"{backend}: of {AIOMETER}", ours / best[AIOMETER, backend], 0.25)
        if (GATHER, backend) in best:
            aim(f"{backend}: of {GATHER}", ours / best[GATHER, backend], 0.5)
            aim(f"{backend}: everything on, of plain {GATHER}", best[EVERYTHING, backend] / best[GATHER, backend], 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0] if __doc__ else None)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000], help="agents in a group, 100 to 1000000")
    parser.add_argument("--at-once", type=int, nargs="+", default=[10, 100], help="limits")
    parser.add_argument("--backends", nargs="+", default=["asyncio", "trio"], choices=["asyncio", "trio"])
    parser.add_argument("--rounds", type=int, default=3, help="samples of each case; the minimum counts")
    parser.add_argument(
        "--framework-counts", type=int, nargs="*", default=[1_000], help="agents in the groups beside frameworks"
    )
    parser.add_argument("--scale", action="store_true", help="also 1,000 beside 1,000,000, cancelling, first agent")
    parser.add_argument("--sample", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.sample:
        print(run_sample(json.loads(chosen.sample)))
        return
    print(
        f"{platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} cores, "
        f"anyio {version('anyio')}, trio {version('trio')}"
    )
    for name in missing():
        print(f"{name}: not installed, left out")
    for count in chosen.counts:
        for at_once in chosen.at_once:
            best = table(PROGRAMS, count, at_once, chosen.backends, chosen.rounds)
            if count == 10_000:
                show_aims(best, chosen.backends)
    for count in chosen.framework_counts:
        for at_once in chosen.at_once:
            table([EXECUTOR, *FRAMEWORKS], count, at_once, chosen.backends, chosen.rounds)
    if chosen.scale:
        show_scale(chosen.backends)


def show_scale(backends: list[str]) -> None:
    print("\nFrom small to large, 100 at once")
    for backend in backends:
        few = min(sample("overhead", EXECUTOR, 1_000, 100, backend) for _ in range(3))
        many = sample("overhead", EXECUTOR, 1_000_000, 100, backend)
        aim(f"{backend}: per agent at 1,000,000, of that at 1,000", many / few, 1.5)
        cancelled = {n: min(sample("failure", n, 100, backend) for _ in range(3)) for n in (100, 100_000)}
        aim(f"{backend}: failure to all cancelled at 100,000, of that at 100", cancelled[100_000] / cancelled[100], 1.5)
        aim(f"{backend}: milliseconds to the first of 100,000 agents", sample("first", 100_000, 100, backend), 30)


if __name__ == "__main__":
    main()
