"""Locks in PostgreSQL: what workers do to each other, also when they are killed or stand still."""

import signal
import threading
import traceback
from collections.abc import Iterator

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from groups import assignment
from postgres_server import PASSWORD, PostgresServer
from postgres_worker import Worker

from parallel_agents import (
    AgentAssignment,
    ClaimLock,
    ClaimPolicy,
    OutcomeStatus,
    ParallelExecutionGroup,
    ParallelExecutor,
    ResourceClaim,
    ResourceConflictError,
    current_run,
)
from parallel_agents._postgres.bell import Bell
from parallel_agents.locks.postgres import PostgresResourceLock
from parallel_agents.postgres import PostgresError, PostgresStore
from parallel_agents.testing import ClaimLockContract

CLAIMS = (ResourceClaim(resource="r"),)
SECONDS = 60.0


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    return postgres.empty()


@pytest.fixture
def lock(url: str) -> Iterator[PostgresResourceLock]:
    with PostgresResourceLock(url) as lock:
        yield lock


class TestPostgresResourceLock(ClaimLockContract):
    @pytest.fixture
    def lock(self, url: str) -> Iterator[ClaimLock]:
        with PostgresResourceLock(url) as lock:
            yield lock
            assert lock.statistics().waiting == ()


@pytest.mark.anyio
async def test_what_a_killed_worker_held_is_free_when_its_lease_is_over(url: str) -> None:
    with PostgresResourceLock(PostgresStore(url, lease_seconds=1)) as lock:
        for number in range(3):
            with Worker(url, "asyncio", 1) as worker:
                worker.ask("take", "r")
                assert str(lock.holder_of("r")).startswith("worker")
                worker.process.kill()
                with anyio.fail_after(SECONDS):
                    lease = await lock.acquire_claims(CLAIMS, f"next {number}")
            await lease.release()
    assert lock.statistics().held == ()
    lock.close()


@pytest.mark.anyio
async def test_one_worker_waits_for_another_and_is_told_at_once(url: str) -> None:
    """Nobody polls: the lease is long, and what is told is heard."""
    with PostgresResourceLock(url) as lock, Worker(url, "asyncio", 60) as worker:
        worker.ask("take", "r")
        with pytest.raises(ResourceConflictError, match="'worker"):
            await lock.acquire_claims(CLAIMS, "here", timeout_seconds=0.05)
        with anyio.fail_after(SECONDS):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lock.acquire_claims, CLAIMS, "here")
                while not (waiting := (await anyio.to_thread.run_sync(lock.statistics)).waiting):
                    pass
                assert (waiting[0].holder, waiting[0].resources) == ("here", ("r",))
                worker.ask("give back")
        assert lock.holder_of("r") == "here"


@pytest.mark.anyio
async def test_a_lease_is_lost_before_others_may_have_it_if_it_cannot_be_renewed(postgres: PostgresServer) -> None:
    url = postgres.empty()
    with PostgresResourceLock(PostgresStore(url, lease_seconds=2)) as lock:
        with anyio.fail_after(SECONDS):
            lease = await lock.acquire_claims(CLAIMS, "here")
            assert lease.lost.is_set() is False
            postgres.kill()
            try:
                await lease.lost.wait()
            finally:
                postgres.start()
        assert lease.lost.is_set()
        with anyio.fail_after(SECONDS):
            await lease.release()
            later = await lock.acquire_claims(CLAIMS, "here again")  # with another session
            assert not later.lost.is_set()
            assert later.fencing_token > lease.fencing_token
            await later.release()
            await later.release()


@pytest.mark.anyio
async def test_an_agent_whose_claims_somebody_took_away_is_cancelled_at_once(url: str) -> None:
    group = ParallelExecutionGroup(
        group_id="g",
        assignments=[assignment(0, resource_claims=("r", "q")), assignment(1, resource_claims=("s",))],
        claim_policy=ClaimPolicy.WAIT,
    )
    ended = anyio.Event()
    with PostgresResourceLock(url) as mine, PostgresResourceLock(url) as others:

        async def agent(task: AgentAssignment) -> None:
            lease = current_run().lease
            assert lease is not None
            if task.task_id == "t1":
                await ended.wait()
                assert not lease.lost.is_set()
                return
            assert await others.release_all(lease.holder) == 2
            try:
                await anyio.sleep_forever()
            finally:
                ended.set()

        with anyio.fail_after(SECONDS):
            result = await ParallelExecutor(engine=agent, resource_lock=mine).execute_group(group)
    assert [o.status for o in result.outcomes] == [OutcomeStatus.FAILED, OutcomeStatus.SUCCEEDED]
    assert "Lost its claim while it ran: 'q', 'r'" in str(result.outcomes[0].error)


@pytest.mark.anyio
async def test_a_worker_that_stood_still_for_longer_than_its_lease_fails_its_agent(
    url: str, anyio_backend_name: str
) -> None:
    with (
        PostgresResourceLock(PostgresStore(url, lease_seconds=2)) as lock,
        Worker(url, anyio_backend_name, 2) as worker,
    ):
        worker.ask("run", "r")
        worker.process.send_signal(signal.SIGSTOP)
        with anyio.fail_after(SECONDS):
            lease = await lock.acquire_claims(CLAIMS, "here")
        worker.process.send_signal(signal.SIGCONT)
        worker.tell("finish")
        status, _, error = worker.answer().partition(" ")
        assert status == "failed"
        assert "Lost its claim" in error or "refuses what the agent did" in error
        assert not lease.lost.is_set()
        assert lock.holder_of("r") == "here"


@pytest.mark.anyio
async def test_one_that_is_cancelled_at_any_moment_leaves_nothing_in_line(lock: PostgresResourceLock) -> None:
    held = await lock.acquire_claims(CLAIMS, "holder")
    for checkpoints in range(8):
        with anyio.fail_after(SECONDS):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lock.acquire_claims, CLAIMS, f"cancelled {checkpoints}")
                for _ in range(checkpoints):
                    await anyio.lowlevel.checkpoint()
                if checkpoints == 7:
                    await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
        assert lock.statistics().waiting == ()
    await held.release()
    assert lock.statistics().held == ()


@pytest.mark.anyio
async def test_claims_that_are_taken_away_from_the_line_are_asked_for_again(
    postgres: PostgresServer, lock: PostgresResourceLock
) -> None:
    held = await lock.acquire_claims(CLAIMS, "holder")
    with anyio.fail_after(SECONDS):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lock.acquire_claims, CLAIMS, "here")
            for _ in range(2):
                while not (await anyio.to_thread.run_sync(lock.statistics)).waiting:
                    pass
                postgres.execute("DELETE FROM parallel_agents.tickets WHERE token IS NULL")
            while not (await anyio.to_thread.run_sync(lock.statistics)).waiting:
                pass
            await held.release()
    assert lock.holder_of("r") == "here"


@pytest.mark.anyio
async def test_a_turn_is_not_missed_when_a_notification_is(
    postgres: PostgresServer, lock: PostgresResourceLock
) -> None:
    held = await lock.acquire_claims(CLAIMS, "holder")
    with anyio.fail_after(SECONDS):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lock.acquire_claims, CLAIMS, "here")
            while not (await anyio.to_thread.run_sync(lock.statistics)).waiting:
                pass
            postgres.execute("DELETE FROM parallel_agents.tickets WHERE token IS NOT NULL")
    assert lock.holder_of("r") == "here"
    await held.release()


@pytest.mark.anyio
async def test_one_resource_of_several_can_be_given_back_and_its_lease_stays(lock: PostgresResourceLock) -> None:
    lease = await lock.acquire_claims([ResourceClaim(resource=name) for name in "abc"], "here")
    with anyio.fail_after(SECONDS):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lock.acquire_claims, [ResourceClaim(resource="b")], "there")
            while not (await anyio.to_thread.run_sync(lock.statistics)).waiting:
                pass
            await lock.release("b", "here")
    assert [lock.holder_of(name) for name in "abc"] == ["here", "there", "here"]
    assert not lease.lost.is_set()
    await lease.release()
    assert [lock.holder_of(name) for name in "abc"] == [None, "there", None]


@pytest.mark.anyio
async def test_names_that_a_database_cannot_hold_are_kept_apart_all_the_same(lock: PostgresResourceLock) -> None:
    names = ["nul\0", "lone \udcff", "quote' \"", "ü", "x" * 5000]
    for name in names:
        assert await lock.acquire(name, f"holder of {name}")
        assert not await lock.acquire(name, "another")
    assert lock.holder_of("ü") == "holder of ü"
    assert len(lock.statistics().held) == len(names)


@pytest.mark.anyio
async def test_two_groups_of_two_workers_keep_out_of_each_others_claims(url: str) -> None:
    inside: set[str] = set()

    async def agent(task: AgentAssignment) -> None:
        wanted = {claim.resource for claim in task.resource_claims}
        assert not wanted & inside
        inside.update(wanted)
        await anyio.to_thread.run_sync(lambda: None)
        inside.difference_update(wanted)

    group = ParallelExecutionGroup(
        group_id="g",
        assignments=[assignment(n, resource_claims=(f"r{n % 3}", f"r{(n + 1) % 3}")) for n in range(12)],
        claim_policy=ClaimPolicy.WAIT,
    )
    results = []

    async def run(lock: PostgresResourceLock) -> None:
        results.append(await ParallelExecutor(engine=agent, resource_lock=lock).execute_group(group))

    with PostgresResourceLock(url) as one, PostgresResourceLock(url) as two, anyio.fail_after(SECONDS):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run, one)
            tasks.start_soon(run, two)
    assert [result.all_succeeded for result in results] == [True, True]


def test_a_lock_made_outside_a_loop_serves_one_backend_after_the_other(url: str) -> None:
    pytest.importorskip("trio")
    lock = PostgresResourceLock(url)

    async def use() -> None:
        lease = await lock.acquire_claims(CLAIMS, "here")
        with anyio.move_on_after(0.01):
            await lock.acquire_claims(CLAIMS, "there")
        await lease.release()

    for backend in ("asyncio", "trio", "asyncio"):
        anyio.run(use, backend=backend)
    assert lock.statistics().held == ()
    lock.close()
    lock.close()
    assert not lock.is_locked("r")
    lock.close()


def test_closing_gives_everything_back_at_once_and_leaves_no_thread(url: str) -> None:
    before = threading.active_count()
    other = PostgresResourceLock(url)
    with PostgresResourceLock(url) as lock:
        anyio.run(lock.acquire_claims, CLAIMS, "here")
        assert other.holder_of("r") == "here"
    assert other.holder_of("r") is None
    other.close()
    assert threading.active_count() <= before + 1  # anyio keeps worker threads for a while


def test_an_address_never_shows_its_password(postgres: PostgresServer) -> None:
    url = postgres.url("postgres")
    lock = PostgresResourceLock(url)
    assert repr(lock) == f"PostgresResourceLock('postgresql://owner@127.0.0.1:{postgres.port}/postgres')"
    for wrong in (f"postgresql://u:{PASSWORD}@h", "postgresql://u:x@geheim/geheim@h", "", "mysql://u:geheim@h"):
        with pytest.raises(ValueError, match="postgresql://user@host") as caught:
            PostgresStore(wrong)
        told = "".join(traceback.format_exception(caught.value))
        assert "geheim" not in told
        assert PASSWORD not in told


@pytest.mark.parametrize("options", [{"lease_seconds": 0}, {"lease_seconds": float("nan")}, {"connections": 0}])
def test_numbers_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        PostgresStore("postgresql://h/d", **options)  # type: ignore[arg-type]


def test_a_server_that_is_away_and_a_wrong_password_are_errors_at_once(postgres: PostgresServer) -> None:
    with pytest.raises(PostgresError, match=r"cannot be reached: .*password authentication failed") as caught:
        PostgresStore(postgres.url("postgres", password="wr0ng")).open()
    assert "wr0ng" not in str(caught.value)
    with pytest.raises(PostgresError, match=r"cannot be reached: .*does not exist"):
        PostgresStore(postgres.url("nothing")).open()
    with pytest.raises(PostgresError, match=r"cannot be reached: .*refused"):
        PostgresStore("postgresql://owner@127.0.0.1:1/x").open()


@pytest.mark.anyio
async def test_a_lock_whose_server_was_never_there_says_so_at_once() -> None:
    lock = PostgresResourceLock("postgresql://owner@127.0.0.1:1/x")
    with anyio.fail_after(SECONDS), pytest.raises(PostgresError, match="cannot be reached"):
        await lock.acquire_claims(CLAIMS, "here")


@pytest.mark.anyio
async def test_who_comes_to_wait_hears_nothing_in_the_place_of_who_listens_already() -> None:
    bell = Bell()
    heard: list[str] = []

    async def first() -> None:
        heard.append(await bell.wait("first"))

    for name in ("first", "second"):
        bell.expect(name)
    with anyio.fail_after(SECONDS):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(first)
            await anyio.wait_all_tasks_blocked()
            bell.ring("first", "your turn")
            with anyio.move_on_after(0.05):
                await bell.wait("second")
    assert heard == ["your turn"]
    bell.close()


@pytest.mark.anyio
@pytest.mark.parametrize("bound", ["locks.postgres.RELEASE_SECONDS", "postgres.PATIENT_CALLS"])
async def test_giving_back_does_not_wait_for_long_when_very_much_is_given_back_at_once(
    url: str, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    """Ten thousand cancelled agents give back their claims through a few connections."""
    monkeypatch.setattr(f"parallel_agents.{bound}", 0)
    others_are_done, is_busy = threading.Event(), anyio.Event()
    with PostgresStore(url, connections=1) as store, PostgresResourceLock(url) as other, anyio.fail_after(SECONDS):
        lock = PostgresResourceLock(store)
        leases = [await lock.acquire_claims([ResourceClaim(resource=str(n))], "here") for n in range(3)]

        async def occupy_the_connection() -> None:
            def wait(_connection: object, _session: object) -> None:
                anyio.from_thread.run_sync(is_busy.set)
                others_are_done.wait()

            await store.run(wait)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(occupy_the_connection)
            await is_busy.wait()
            for lease in leases:
                await lease.release()
            for n in range(3):  # done by the thread that keeps the session
                assert (await other.acquire_claims([ResourceClaim(resource=str(n))], "there")).fencing_token
            others_are_done.set()
