"""A worker in a process of its own, which tests tell what to do, kill, and let stand still."""

import os
import signal
import subprocess
import sys
import threading
from types import TracebackType
from typing import Self

SECONDS = 120.0
"""How long a worker lives; a test that waits for it longer would wait for ever."""

PROGRAM = """
import sys
import anyio, anyio.to_thread
from parallel_agents import (
    AgentAssignment, AgentIdentity, Budget, ClaimPolicy, FunctionEngine, ParallelExecutionGroup, ParallelExecutor,
    ResourceClaim, Task, Usage, current_run
)
from parallel_agents.engines.journal import JournaledEngine
from parallel_agents.engines.postgres_limit import PostgresLimit, PostgresLimitedEngine
from parallel_agents.journals import Ending, JournalError, Step
from parallel_agents.journals.postgres import PostgresJournal
from parallel_agents.locks.postgres import PostgresResourceLock
from parallel_agents.postgres import PostgresStore

_, url, backend, lease_seconds, name = sys.argv
store = PostgresStore(url, lease_seconds=float(lease_seconds))
lock, journal = PostgresResourceLock(store), PostgresJournal(store)
held, started = [], []

def say(*words):
    print(*words, flush=True)

async def take(*resources):
    for resource in resources:
        held.append(await lock.acquire_claims([ResourceClaim(resource=resource)], f"worker {name}"))
    say("taken", *(lease.fencing_token for lease in held))

async def give_back():
    while held:
        await held.pop().release()
    say("given back")

async def start(execution, *tasks):
    for number, task in enumerate(tasks):
        lease = held[number] if held else None
        step = Step(execution=execution, group_id="g", task_id=task, agent_id="a", fingerprint="f", lease=lease)
        entry = await journal.start(step)
        started.append((entry.attempt, lease))
    say("started", *(attempt for attempt, _ in started))

async def end():
    refused = []

    async def end_one(attempt, lease):
        content = str(lease.fencing_token if lease else 0)
        try:
            await journal.end(attempt, Ending(status="succeeded", content=content, usage=Usage(cost=1.0)))
        except JournalError as error:
            refused.append(str(error))

    async with anyio.create_task_group() as tasks:
        for attempt, lease in started:
            tasks.start_soon(end_one, attempt, lease)
    count = len(started)
    started.clear()
    say(count - len(refused), len(refused), *set(refused))

async def run(resource):
    async def agent(assignment):
        say("running")
        with anyio.CancelScope(shield=True):  # it hears of nothing, and goes on
            await anyio.to_thread.run_sync(sys.stdin.readline)
        return "late"

    task = AgentAssignment(identity=AgentIdentity(id="a"), task=Task(id="t"), resource_claims=(resource,))
    group = ParallelExecutionGroup(group_id="g", assignments=[task], claim_policy=ClaimPolicy.WAIT)
    engine = JournaledEngine(FunctionEngine(agent), journal, execution="run")
    result = await ParallelExecutor(engine=engine, resource_lock=lock).execute_group(group)
    say(result.outcomes[0].status, result.outcomes[0].error)

async def limited(name, places, max_cost, reserve, spent):
    async def agent(assignment):
        current_run().record_usage(Usage(cost=float(spent)))
        say("running")
        await anyio.sleep_forever()

    budget, reserve = Budget(max_cost=float(max_cost)), Usage(cost=float(reserve))
    limit = PostgresLimit(store, name, max_concurrency=int(places), budget=budget, reserve=reserve)
    group = ParallelExecutionGroup.map("g", AgentIdentity(id="a"), [Task(id="t")])
    result = await ParallelExecutor(engine=PostgresLimitedEngine(FunctionEngine(agent), limit)).execute_group(group)
    say(result.outcomes[0].status, result.outcomes[0].error)

async def main():
    store.open()
    say("ready")
    while words := (await anyio.to_thread.run_sync(sys.stdin.readline)).split():
        command, arguments = words[0], words[1:]
        commands = {"take": take, "give": give_back, "start": start, "end": end, "run": run, "limited": limited}
        await commands[command](*(() if command == "give" else arguments))

anyio.run(main, backend=backend)
store.close()
"""


class Worker:
    """A process with a lock and a journal in one store; it ends with the block."""

    def __init__(self, url: str, backend: str, lease_seconds: float, name: str = "") -> None:
        command = [sys.executable, "-c", PROGRAM, url, backend, str(lease_seconds), name]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

        self._watchdog = threading.Timer(SECONDS, self.process.kill)
        self._watchdog.start()

    def __enter__(self) -> Self:
        assert self.answer() == "ready"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._watchdog.cancel()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.communicate()

    def tell(self, *words: str) -> None:
        """Have it do something."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(words) + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        """Wait for what it says next."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, *words: str) -> str:
        """Have it do something, and return what it says of it."""
        self.tell(*words)
        return self.answer()
