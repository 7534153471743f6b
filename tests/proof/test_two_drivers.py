"""Two drivers on one database run the same group; one of them is killed again and again. One commit for each agent."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from random import Random

import pytest
from postgres_server import PostgresServer
from programs import BACKENDS

from parallel_agents.postgres import PostgresStore
from proof.tally import Proof

PROGRAM = """
import sys
import anyio, anyio.lowlevel
from parallel_agents import (
    AgentAssignment, AgentIdentity, ClaimPolicy, FunctionEngine, ParallelExecutionGroup, ParallelExecutor, Task, Usage,
    current_run,
)
from parallel_agents.engines.journal import JournaledEngine
from parallel_agents.journals.postgres import PostgresJournal
from parallel_agents.locks.postgres import PostgresResourceLock
from parallel_agents.postgres import PostgresStore

_, url, backend, name, hangs_after, *order = sys.argv
started = 0

async def agent(assignment):
    global started
    started += 1
    if started > int(hangs_after):
        await anyio.sleep_forever()
    current_run().record_usage(Usage(cost=1.0))
    await anyio.lowlevel.checkpoint()
    return name

async def main():
    assignments = [
        AgentAssignment(identity=AgentIdentity(id=f"a{n}"), task=Task(id=f"t{n}"), resource_claims=(f"r{n}",))
        for n in map(int, order)
    ]
    group = ParallelExecutionGroup(
        group_id="g", assignments=assignments, max_concurrency=32, claim_policy=ClaimPolicy.WAIT
    )
    engine = JournaledEngine(FunctionEngine(agent), PostgresJournal(store), execution="e")
    executor = ParallelExecutor(engine=engine, resource_lock=PostgresResourceLock(store))
    (await executor.execute_group(group)).raise_for_failures()

with PostgresStore(url, lease_seconds=5.0) as store:
    anyio.run(main, backend=backend)
"""

SECONDS = 600.0


def driver(
    url: str, backend: str, name: str, order: list[int], hangs_after: int | None = None
) -> "subprocess.Popen[bytes]":
    """Start a driver; from some agent on, its agents may hang until it is killed."""
    hangs = len(order) * 9 if hangs_after is None else hangs_after
    command = [sys.executable, "-c", PROGRAM, url, backend, name, str(hangs), *map(str, order)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


def counted(postgres: PostgresServer, query: str) -> int:
    ((count,),) = postgres.execute(query)
    return int(str(count))


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_agent_of_two_drivers_has_one_committed_outcome_also_if_one_is_killed(
    postgres: PostgresServer, backend: str, proof: Proof
) -> None:
    tally = proof.tally("two drivers on one database, one of them killed")
    count = proof.size(few=60, short=400, long=10_000)
    url = postgres.empty()
    with PostgresStore(url):
        pass  # the tables are there
    done = "SELECT count(*) FROM parallel_agents.attempts WHERE status = 'succeeded'"
    random = Random(proof.seed)
    order = random.sample(range(count), count)
    by_killed, by_lasting = (f"{done} AND content LIKE '%{name}%'" for name in ("killed", "lasting"))
    quarter = count // 4
    with tally.run(backend, f"{count} agents"):
        lasting = killed = driver(url, backend, "killed", order, hangs_after=quarter)
        try:
            wait_for(lambda: counted(postgres, by_killed) == quarter)
            lasting = driver(url, backend, "lasting", order[::-1])
            wait_for(lambda: counted(postgres, by_lasting) > 0)
            for part in (1, 2, 3):
                while counted(postgres, done) < part * quarter and killed.poll() is None:
                    time.sleep(0.02)
                killed.kill()
                killed.wait()
                killed = driver(url, backend, "killed", order)
            assert (lasting.wait(SECONDS), killed.wait(SECONDS)) == (0, 0)
        finally:
            for process in (lasting, killed):
                process.kill()
                process.wait()
        commits = "SELECT count(DISTINCT task_id), count(*) FROM parallel_agents.attempts WHERE status = 'succeeded'"
        assert postgres.execute(commits) == [(count, count)]
        assert counted(postgres, "SELECT count(*) FROM parallel_agents.tickets") == 0
        starts = counted(postgres, "SELECT count(*) FROM parallel_agents.attempts")
        ended = counted(postgres, by_killed)
    assert quarter <= ended < count
    assert starts >= count
    tally.remarks.append(f"{count:,} agents on {backend} were started {starts:,} times, {ended:,} ended by the killed")
