"""Locks and journal in PostgreSQL, beside memory and beside three commits by hand; a part of ``cluster.py``."""

import itertools
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import anyio.lowlevel
import psycopg

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    Budget,
    ClaimPolicy,
    FunctionEngine,
    ParallelExecutionGroup,
    ParallelExecutor,
    ResourceClaim,
    Task,
    Usage,
)
from parallel_agents.engines.journal import JournaledEngine
from parallel_agents.engines.postgres_limit import PostgresLimit, PostgresLimitedEngine
from parallel_agents.journals import Ending, Step
from parallel_agents.journals.postgres import PostgresJournal
from parallel_agents.locks.postgres import PostgresResourceLock
from parallel_agents.postgres import PostgresStore

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from postgres_server import postgres_server

BACKENDS = ("asyncio", "trio")
ROUNDS = 3
COUNT = 400
PARALLEL = 16
CONNECTIONS = 8
IN_FLIGHT = 10_000

fresh = itertools.count()


def by_hand(url: str, connections: int) -> float:
    """Return the milliseconds of three commits without this library."""

    def work() -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            for _ in range(COUNT // connections):
                number = next(fresh)
                connection.execute("INSERT INTO by_hand VALUES (%s, false)", (number,))
                connection.execute("UPDATE by_hand SET done = true WHERE id = %s", (number,))
                connection.execute("DELETE FROM by_hand WHERE id = %s", (number,))

    threads = [threading.Thread(target=work) for _ in range(connections)]
    before = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (time.perf_counter() - before) / COUNT * 1e3


def claims(store: PostgresStore, parallel: int, *, commits: bool) -> Callable[[], Awaitable[None]]:
    lock, journal = PostgresResourceLock(store), PostgresJournal(store)

    async def one() -> None:
        name = str(next(fresh))
        lease = await lock.acquire_claims((ResourceClaim(resource=name),), name)
        if commits:
            step = Step(execution="e", group_id="g", task_id=name, agent_id="a", fingerprint="f", lease=lease)
            attempt = (await journal.start(step)).attempt
            assert attempt is not None
            await journal.end(attempt, Ending(status="succeeded", content="1", usage=Usage()))
        await lease.release()

    async def several() -> None:
        for _ in range(COUNT // parallel):
            await one()

    async def program() -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(parallel):
                tasks.start_soon(several)

    return program


async def agent(_: AgentAssignment) -> None:
    await anyio.lowlevel.checkpoint()


def groups(store: PostgresStore | None) -> Callable[[], Awaitable[None]]:
    assignments = [
        AgentAssignment(identity=AgentIdentity(id=f"a{n}"), task=Task(id=f"t{n}"), resource_claims=(f"r{n}",))
        for n in range(COUNT)
    ]
    group = ParallelExecutionGroup(
        group_id="g", assignments=assignments, max_concurrency=PARALLEL, claim_policy=ClaimPolicy.WAIT
    )

    async def program() -> None:
        if store is None:
            executor = ParallelExecutor(engine=agent)
        else:
            engine = JournaledEngine(FunctionEngine(agent), PostgresJournal(store), execution=str(next(fresh)))
            executor = ParallelExecutor(engine=engine, resource_lock=PostgresResourceLock(store))
        assert (await executor.execute_group(group)).all_succeeded

    return program


def limited(store: PostgresStore) -> Callable[[], Awaitable[None]]:
    budget = Budget(max_cost=1e9)
    limit = PostgresLimit(store, "bench", max_concurrency=COUNT, budget=budget, reserve=Usage(cost=1.0))
    executor = ParallelExecutor(engine=PostgresLimitedEngine(FunctionEngine(agent), limit))
    group = ParallelExecutionGroup.map(
        "g", AgentIdentity(id="a"), [Task(id=str(n)) for n in range(COUNT)], max_concurrency=PARALLEL
    )

    async def program() -> None:
        assert (await executor.execute_group(group)).all_succeeded

    return program


def resident_kb() -> int:
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


async def in_flight(store: PostgresStore) -> float:
    """Return the kB of the driver for each agent that runs with a claim and an open step, many at once."""
    all_run = anyio.Event()
    running = 0

    async def waits(_: AgentAssignment) -> None:
        nonlocal running
        running += 1
        if running == IN_FLIGHT:
            all_run.set()
        await all_run.wait()
        await anyio.sleep_forever()

    assignments = [
        AgentAssignment(identity=AgentIdentity(id=f"a{n}"), task=Task(id=f"t{n}"), resource_claims=(f"r{n}",))
        for n in range(IN_FLIGHT)
    ]
    group = ParallelExecutionGroup(group_id="g", assignments=assignments, claim_policy=ClaimPolicy.WAIT)
    engine = JournaledEngine(FunctionEngine(waits), PostgresJournal(store), execution=str(next(fresh)))
    executor = ParallelExecutor(engine=engine, resource_lock=PostgresResourceLock(store))
    before = resident_kb()
    async with executor.open_group(group) as run:
        await all_run.wait()
        used = resident_kb() - before
        run.cancel()
    return used / IN_FLIGHT


def milliseconds(program: Callable[[], Awaitable[None]], backend: str) -> float:
    """Return how long one assignment takes, the least of some rounds."""

    async def timed() -> float:
        before = time.perf_counter()
        await program()
        return time.perf_counter() - before

    return min(anyio.run(timed, backend=backend) for _ in range(ROUNDS)) / COUNT * 1e3


def main() -> None:
    with postgres_server(fsync="on") as server:
        url = server.url("postgres")
        server.execute("CREATE TABLE by_hand (id bigint PRIMARY KEY, done boolean)")
        print(f"postgres: milliseconds per assignment, {COUNT} of them, with an fsync for each commit")
        alone, together = (min(by_hand(url, n) for _ in range(ROUNDS)) for n in (1, CONNECTIONS))
        print(f"  {'three commits by hand, one after the other':60} {alone:7.2f}")
        print(f"  {f'three commits by hand, {CONNECTIONS} connections':60} {together:7.2f}")
        for backend in BACKENDS:
            with PostgresStore(url, connections=CONNECTIONS) as store:
                for text, program, peer in (
                    ("take and give back, one after the other", claims(store, 1, commits=False), alone),
                    (f"take and give back, {PARALLEL} at once", claims(store, PARALLEL, commits=False), together),
                    ("take, start, commit, give back, one after the other", claims(store, 1, commits=True), alone),
                    (f"all of that, {PARALLEL} at once", claims(store, PARALLEL, commits=True), together),
                    (f"a group with locks and journal there, {PARALLEL} at once", groups(store), together),
                    (f"a group with a limit and a budget there, {PARALLEL} at once", limited(store), together),
                    (f"a group with locks in memory and no journal, {PARALLEL} at once", groups(None), together),
                ):
                    figure = milliseconds(program, backend)
                    print(f"  {text:60} {figure:7.2f}   {figure / peer:.2f} of by hand, {backend}", flush=True)
        for backend in BACKENDS:
            with PostgresStore(url, connections=CONNECTIONS) as store:
                kilobytes = anyio.run(in_flight, store, backend=backend)
            print(f"  {IN_FLIGHT:,} agents in flight, with locks and journal there: {kilobytes:.1f} kB each, {backend}")


if __name__ == "__main__":
    main()
