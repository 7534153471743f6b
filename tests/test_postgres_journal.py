"""Journals in PostgreSQL: at most one commit for each step, whatever workers and the server go through."""

import itertools
import os
import random
import re
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from groups import assignment, group_of
from postgres_server import PostgresServer
from postgres_worker import Worker
from programs import ROOT

from parallel_agents import (
    AgentAssignment,
    Budget,
    ClaimPolicy,
    FunctionEngine,
    OutcomeStatus,
    ParallelExecutionGroup,
    ParallelExecutor,
    ResourceClaim,
    Usage,
    current_run,
)
from parallel_agents.engines.journal import JournaledEngine
from parallel_agents.engines.postgres_limit import PostgresLimit, PostgresLimitedEngine
from parallel_agents.journals import Ending, Entry, JournalError, LetsGo, Step
from parallel_agents.journals.postgres import PostgresJournal
from parallel_agents.locks.postgres import PostgresResourceLock
from parallel_agents.postgres import PostgresError, PostgresStore
from parallel_agents.testing import JournalContract
from parallel_agents.testing.stepping import installed_backends

SECONDS = 60.0
RACE_SECONDS = float(os.environ.get("RACE_SECONDS", "8"))


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    return postgres.empty()


@pytest.fixture
def journal(url: str) -> Iterator[PostgresJournal]:
    with PostgresJournal(url) as journal:
        yield journal


class TestPostgresJournal(JournalContract):
    @pytest.fixture
    def journal(self, url: str) -> Iterator[PostgresJournal]:
        with PostgresJournal(url) as journal:
            yield journal


def step(task: str = "t", **fields: Any) -> Step:
    return Step(execution="run", group_id="g", task_id=task, agent_id="a", fingerprint="f", **fields)


def succeeded(content: str = "1", cost: float = 1.0) -> Ending:
    return Ending(status="succeeded", content=content, usage=Usage(cost=cost))


def attempt_of(entry: Entry) -> int:
    assert entry.attempt is not None
    return entry.attempt


def without_the_check(postgres: PostgresServer) -> None:
    """Plant a bug: let everybody end what they have started."""
    ((source,),) = postgres.execute("SELECT pg_get_functiondef('parallel_agents.finish_attempt'::regproc)")
    broken, count = re.subn(r"v_refusal := '[^']*';", "v_refusal := NULL;", str(source))
    assert count == 3
    postgres.execute("SET search_path = parallel_agents; " + broken)


async def expire_and_take_over(postgres: PostgresServer, lock: PostgresResourceLock, resources: list[str]) -> None:
    """Let the lease of everybody else be over, and take what they held."""
    own = await lock.acquire_claims([ResourceClaim(resource="own")], "here")
    postgres.execute(
        "UPDATE parallel_agents.sessions SET expires = '-infinity' WHERE id NOT IN"
        " (SELECT session FROM parallel_agents.tickets WHERE holder = 'here')"
    )
    for resource in resources:
        lease = await lock.acquire_claims([ResourceClaim(resource=resource)], "here", timeout_seconds=0)
        await lease.release()
    await own.release()


async def late_commits(postgres: PostgresServer, backend: str, rounds: int) -> tuple[int, int, set[str]]:
    """Stop a worker that holds 50 resources and runs 50 steps, take over, and let it end them; count what came of it.

    Its own clock says that its lease is good, so that nothing but the check in the database stands against it.
    """
    url = postgres.empty()
    accepted, refused, reasons = 0, 0, set()
    names = [str(number) for number in range(50)]
    with PostgresResourceLock(url) as lock, Worker(url, backend, 60) as worker, anyio.fail_after(SECONDS):
        if rounds < 0:
            without_the_check(postgres)
        for number in range(abs(rounds)):
            worker.ask("take", *names)
            worker.ask("start", f"run-{number}", *names)
            worker.process.send_signal(signal.SIGSTOP)
            await expire_and_take_over(postgres, lock, names)
            worker.process.send_signal(signal.SIGCONT)
            good, bad, *reason = worker.ask("end").split(" ", 2)
            accepted, refused = accepted + int(good), refused + int(bad)
            reasons.update(reason)
            worker.ask("give")
    return accepted, refused, reasons


@pytest.mark.anyio
async def test_what_a_worker_ends_that_stood_still_is_refused_two_hundred_times(
    postgres: PostgresServer, anyio_backend_name: str
) -> None:
    accepted, refused, reasons = await late_commits(postgres, anyio_backend_name, 4)
    assert (accepted, refused) == (0, 200)
    assert all("refuses what the agent did: its session was taken over" in reason for reason in reasons)
    rows = postgres.execute("SELECT status, sum(cost) FROM parallel_agents.attempts GROUP BY status")
    assert rows == [("failed", 200.0)]  # what it spent is known all the same


@pytest.mark.anyio
async def test_without_the_check_it_would_be_accepted(postgres: PostgresServer) -> None:
    accepted, _, _ = await late_commits(postgres, "asyncio", -1)
    assert accepted == 50


def race(postgres: PostgresServer, seconds: float, *, until_it_fails: bool = False) -> tuple[int, int]:
    """Have four workers commit on three resources while each is stopped for longer than its lease, now and then.

    Returns:
        How many commits there were, and how often a resource had one by an older lease after one by a newer.
    """
    url = postgres.empty()
    with PostgresStore(url):
        if until_it_fails:
            without_the_check(postgres)
    end = threading.Event()
    chance = random.Random(1)

    def work(worker: Worker, number: int) -> None:
        own = random.Random(number)
        turn = 0
        while not end.is_set():
            turn += 1
            resource = own.choice("abc")
            if not worker.ask("take", resource) or not worker.ask("start", f"{number}-{turn}", resource):
                return
            worker.ask("end")
            worker.ask("give")

    backends = itertools.cycle(installed_backends())
    workers = [Worker(url, next(backends), 0.6, str(number)) for number in range(4)]
    threads = []
    try:
        for number, worker in enumerate(workers):
            worker.__enter__()
            threads.append(threading.Thread(target=work, args=(worker, number)))
            threads[-1].start()
        pauses = 0
        while pauses * 0.8 < seconds and not (until_it_fails and regressions(postgres)):
            worker = chance.choice(workers)
            worker.process.send_signal(signal.SIGSTOP)
            end.wait(0.8)
            worker.process.send_signal(signal.SIGCONT)
            pauses += 1
    finally:
        end.set()
        for thread in threads:
            thread.join(SECONDS)
        for worker in workers:
            worker.__exit__(None, None, None)
    ((commits,),) = postgres.execute("SELECT count(*) FROM parallel_agents.attempts WHERE status = 'succeeded'")
    return int(str(commits)), regressions(postgres)


def regressions(postgres: PostgresServer) -> int:
    """Return how many commits came with an older token than one before them on the same resource."""
    ((count,),) = postgres.execute(
        "SELECT count(*) FROM (SELECT content::bigint AS token, max(content::bigint) OVER (PARTITION BY task_id"
        " ORDER BY ended ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before"
        " FROM parallel_agents.attempts WHERE status = 'succeeded') AS commits WHERE token < before"
    )
    return int(str(count))


def test_workers_that_stand_still_again_and_again_never_commit_after_those_that_took_over(
    postgres: PostgresServer,
) -> None:
    commits, backwards = race(postgres, RACE_SECONDS)
    sys.stdout.write(f"{commits} commits, {backwards} out of order\n")
    assert commits > 10
    assert backwards == 0


def test_without_the_check_they_would(postgres: PostgresServer) -> None:
    assert race(postgres, 90, until_it_fails=True)[1] > 0


@pytest.mark.anyio
async def test_a_server_that_is_killed_and_started_again_loses_no_outcome(postgres: PostgresServer, url: str) -> None:
    runs: list[str] = []
    gone = anyio.Event()

    async def agent(task: AgentAssignment) -> str:
        runs.append(task.task_id)
        if len(runs) == 10:
            await anyio.to_thread.run_sync(postgres.kill)
            gone.set()
        elif len(runs) > 10 and not gone.is_set():
            await gone.wait()
        return task.task_id

    async def start_again() -> None:
        await gone.wait()
        await anyio.to_thread.run_sync(postgres.start)

    group = ParallelExecutionGroup(
        group_id="g",
        assignments=[assignment(n, resource_claims=(f"r{n % 7}",)) for n in range(40)],
        claim_policy=ClaimPolicy.WAIT,
        max_concurrency=8,
    )
    with PostgresStore(url) as store, anyio.fail_after(SECONDS):
        engine = JournaledEngine(FunctionEngine(agent), PostgresJournal(store))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(start_again)
            executor = ParallelExecutor(engine=engine, resource_lock=PostgresResourceLock(store))
            result = await executor.execute_group(group)
    assert [outcome.error for outcome in result.outcomes] == [None] * 40
    assert len(runs) == 40
    rows = postgres.execute("SELECT count(*), count(DISTINCT task_id) FROM parallel_agents.attempts")
    assert rows == [(40, 40)]
    assert postgres.execute("SELECT count(*) FROM parallel_agents.tickets") == [(0,)]


@pytest.mark.anyio
async def test_a_step_that_a_living_worker_runs_does_not_start_on_another_one(
    url: str, anyio_backend_name: str
) -> None:
    with PostgresJournal(url) as journal, Worker(url, anyio_backend_name, 2) as worker, anyio.fail_after(SECONDS):
        worker.ask("start", "run", "t")
        with pytest.raises(JournalError, match="task 't' of 'run' is being run by process") as caught:
            await journal.start(step())
        assert str(worker.process.pid) in str(caught.value)
        assert journal.is_in_use()
        worker.ask("end")
        entry = await journal.start(step())
        assert (entry.attempt, entry.content, entry.reason) == (None, "0", "recorded")
        assert not journal.is_in_use()


@pytest.mark.anyio
async def test_a_step_of_a_killed_worker_starts_when_its_lease_is_over(url: str) -> None:
    with PostgresJournal(url) as journal, Worker(url, "asyncio", 1) as worker, anyio.fail_after(SECONDS):
        worker.ask("start", "run", "t")
        worker.process.kill()
        entry = await journal.start(step())
        assert (entry.reason, entry.attempt is None) == ("interrupted", False)


@pytest.mark.anyio
async def test_the_last_renewal_of_a_killed_worker_does_not_pass_for_life(postgres: PostgresServer, url: str) -> None:
    """It can be on its way when the worker dies, and arrive after the first look."""

    class Store(PostgresStore):
        looks = 0

        async def run(self, *arguments: Any, **options: Any) -> Any:
            seen = await super().run(*arguments, **options)
            self.looks += 1
            if self.looks == 1:
                postgres.execute(
                    "UPDATE parallel_agents.sessions SET expires = expires + interval '0.5 s'"
                    " WHERE id IN (SELECT session FROM parallel_agents.attempts)"
                )
            return seen

    store = Store(url)
    with PostgresJournal(store) as journal, Worker(url, "asyncio", 1) as worker, anyio.fail_after(SECONDS):
        worker.ask("start", "run", "t")
        worker.process.kill()
        worker.process.wait()
        entry = await journal.start(step())
    assert (entry.reason, store.looks > 2) == ("interrupted", True)


@pytest.mark.anyio
async def test_of_two_starts_in_one_worker_the_newer_one_may_end(journal: PostgresJournal) -> None:
    first = attempt_of(await journal.start(step()))
    second = attempt_of(await journal.start(step()))
    with pytest.raises(JournalError, match="started again since"):
        await journal.end(first, succeeded())
    await journal.end(second, succeeded("2"))
    await journal.end(second, succeeded("2"))  # as after an answer that was lost
    entry = await journal.start(step())
    assert (entry.content, entry.spent) == ("2", Usage(cost=2.0))


@pytest.mark.anyio
async def test_what_is_ended_after_its_claims_were_taken_away_is_refused(url: str) -> None:
    """Though its session is alive; also where lock and journal were opened apart."""
    with PostgresResourceLock(url) as lock, PostgresJournal(url) as journal:
        lease = await lock.acquire_claims([ResourceClaim(resource="r")], "here")
        first = attempt_of(await journal.start(step("one", lease=lease)))
        second = attempt_of(await journal.start(step("two", lease=lease)))
        await journal.end(first, succeeded())
        assert await lock.release_all("here") == 1
        with pytest.raises(JournalError, match="its claims were taken over"):
            await journal.end(second, succeeded())


@pytest.mark.anyio
async def test_claims_in_another_database_are_no_business_of_the_journal(
    postgres: PostgresServer, journal: PostgresJournal
) -> None:
    postgres.execute("CREATE DATABASE other")
    try:
        with PostgresResourceLock(postgres.url("other")) as lock:
            lease = await lock.acquire_claims([ResourceClaim(resource="r")], "here")
            attempt = attempt_of(await journal.start(step(lease=lease)))
            await lease.release()
            await journal.end(attempt, succeeded())
    finally:
        postgres.execute("DROP DATABASE other WITH (FORCE)")


@pytest.mark.anyio
async def test_an_agent_that_is_cancelled_lets_its_step_go(url: str) -> None:
    started = anyio.Event()

    async def agent(task: AgentAssignment) -> str:
        current_run().record_usage(Usage(cost=0.5))
        started.set()
        await anyio.sleep_forever()
        return "never"

    with PostgresJournal(url) as mine, PostgresJournal(url) as others, anyio.fail_after(SECONDS):
        assert isinstance(mine, LetsGo)
        executor = ParallelExecutor(engine=JournaledEngine(FunctionEngine(agent), mine, execution="run"))
        async with executor.open_group(group_of(1)) as run:
            await started.wait()
            run.cancel()

        async def another(task: AgentAssignment) -> str:
            return "now"

        engine = JournaledEngine(FunctionEngine(another), others, execution="run")
        result = await ParallelExecutor(engine=engine).execute_group(group_of(1))  # does not wait for a lease
        assert result.outcomes[0].status is OutcomeStatus.SUCCEEDED
        assert result.outcomes[0].usage == Usage(cost=0.5)


@pytest.mark.anyio
async def test_two_drivers_of_one_execution_commit_each_step_once(url: str) -> None:
    """Each runs what the other does not; the rest is taken from the journal."""
    starts: list[str] = []

    async def agent(task: AgentAssignment) -> str:
        starts.append(task.task_id)
        await anyio.lowlevel.checkpoint()
        return task.task_id

    results = []

    async def drive(journal: PostgresJournal) -> None:
        engine = JournaledEngine(FunctionEngine(agent), journal, execution="run")
        results.append(await ParallelExecutor(engine=engine).execute_group(group_of(200, max_concurrency=8)))

    with PostgresJournal(url) as one, PostgresJournal(url) as two, anyio.fail_after(SECONDS):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(drive, one)
            tasks.start_soon(drive, two)
        (execution,) = one.read()
    sys.stdout.write(f"{len(starts)} starts of 200 steps\n")
    assert [result.all_succeeded for result in results] == [True, True]
    assert sorted(a.task_id for a in execution.attempts if a.status == "succeeded") == sorted(set(starts))
    assert len(starts) == 200


@pytest.mark.anyio
async def test_text_that_a_database_cannot_hold_is_recorded_as_text(journal: PostgresJournal) -> None:
    attempt = attempt_of(await journal.start(step("nul \0 and \udcff")))
    await journal.end(attempt, Ending(status="failed", content="a \0 b \udcff", usage=Usage()))
    (execution,) = journal.read()
    assert execution.attempts[0].content == "a \\x00 b \\udcff"


def test_tables_of_a_newer_version_are_refused_and_missing_ones_are_made_once(postgres: PostgresServer) -> None:
    url = postgres.empty()
    stores = [PostgresStore(url) for _ in range(4)]
    threads = [threading.Thread(target=store.open) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in stores:
        store.close()
    assert postgres.execute("SELECT version FROM parallel_agents.meta") == [(1,)]
    postgres.execute("UPDATE parallel_agents.meta SET version = 2")
    with pytest.raises(JournalError, match="has tables of version 2, this library knows up to 1: use a newer one"):
        PostgresJournal(url).open()


@pytest.mark.anyio
async def test_a_journal_that_cannot_be_reached_or_written_is_a_journal_error(
    postgres: PostgresServer, url: str
) -> None:
    away = PostgresJournal("postgresql://owner@127.0.0.1:1/x")
    assert repr(away) == "PostgresJournal('postgresql://owner@127.0.0.1:1/x')"
    with anyio.fail_after(SECONDS), pytest.raises(JournalError, match="cannot be reached"):
        await away.start(step())
    with pytest.raises(JournalError, match="cannot be reached"):
        away.unfinished("g")
    with PostgresJournal(PostgresStore(url, lease_seconds=1)) as journal, anyio.fail_after(SECONDS):
        attempt = attempt_of(await journal.start(step()))
        postgres.kill()
        try:
            with pytest.raises(JournalError, match=r"does not answer|cannot be reached"):
                await journal.end(attempt, succeeded())
        finally:
            postgres.start()
        postgres.execute("DROP TABLE parallel_agents.attempts")
        with pytest.raises(JournalError, match="refuses it: relation"):
            await journal.start(step())


def test_executions_are_unfinished_until_they_are_finished(journal: PostgresJournal) -> None:
    assert journal.unfinished("g") is None
    anyio.run(journal.start, step())
    assert journal.unfinished("g") == "run"
    journal.finish("run")
    assert journal.unfinished("g") is None
    assert journal.read()[0].finished is not None
    assert not journal.is_in_use() or journal.read()[0].attempts[0].status == "started"


def test_a_user_who_may_not_make_tables_is_told_who_may(postgres: PostgresServer) -> None:
    postgres.empty()
    postgres.execute("DROP ROLE IF EXISTS nobody")
    postgres.execute("CREATE ROLE nobody LOGIN PASSWORD 'x'")
    with pytest.raises(PostgresError, match="let the owner of the database open it once"):
        PostgresStore(postgres.url("postgres", "nobody", "x")).open()
    with PostgresStore(postgres.url("postgres")):
        pass
    with pytest.raises(PostgresError, match=r"forbids it: permission denied .*grant the user what the docs list"):
        PostgresStore(postgres.url("postgres", "nobody", "x")).open()
    postgres.execute("DROP ROLE nobody")


async def spends_a_little(_assignment: AgentAssignment) -> None:
    current_run().record_usage(Usage(cost=0.5))


@pytest.mark.anyio
async def test_the_user_of_the_docs_may_do_all_that_is_needed(postgres: PostgresServer) -> None:
    with PostgresStore(postgres.empty()):
        pass
    page = (ROOT / "docs" / "howto" / "many-machines.md").read_text("utf-8")
    (statements,) = re.findall(r"^```sql\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    postgres.execute(statements)
    postgres.execute("ALTER ROLE agents PASSWORD 'x'")
    try:
        url = postgres.url("postgres", "agents", "x")
        with PostgresStore(PostgresStore(url).name.replace("//agents", "//agents:x")) as store:
            lock, journal = PostgresResourceLock(store), PostgresJournal(store)
            lease = await lock.acquire_claims([ResourceClaim(resource="r")], "here")
            first = await journal.start(step(lease=lease))
            journal.spend(attempt_of(first), Usage(cost=1.0))
            journal.let_go(attempt_of(first))
            attempt = attempt_of(await journal.start(step(lease=lease)))
            await journal.end(attempt, succeeded())
            assert await lock.acquire("s", "here")
            await lock.release("s", "here")
            await lease.release()
            assert await lock.release_all("here") == 0
            await anyio.to_thread.run_sync(journal.finish, "run")
            assert len(journal.read()[0].attempts) == 2
            limit = PostgresLimit(store, "l", max_concurrency=1, budget=Budget(max_cost=1), reserve=Usage(cost=1.0))
            engine = PostgresLimitedEngine(FunctionEngine(spends_a_little), limit)
            (outcome,) = (await ParallelExecutor(engine=engine).execute_group(group_of(1))).outcomes
            assert outcome.is_success
            limit.settle_unknown()
            assert limit.state().cost == 0.5
    finally:
        postgres.execute("DROP OWNED BY agents; DROP ROLE agents")
