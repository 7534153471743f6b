"""Claims that wait: assignments that overlap run one after another, and nobody else waits for them."""

from collections.abc import Sequence
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio import wait_all_tasks_blocked
from attrs import define, field
from clocks import virtual_time
from groups import assignment
from hypothesis import given
from hypothesis import strategies as st

from parallel_agents import (
    NEVER_LOST,
    AgentAssignment,
    AgentIdentity,
    ClaimMode,
    ClaimPolicy,
    InMemoryResourceLock,
    Lost,
    OutcomeStatus,
    ParallelAgentsError,
    ParallelEvent,
    ParallelExecutionGroup,
    ParallelExecutor,
    ResourceClaim,
    ResourceConflictError,
    ResourceLock,
    ShutdownManager,
    Task,
    Usage,
    current_run,
)
from parallel_agents._claim_queue import find_overlap
from parallel_agents.events import PARALLEL_AGENT_WAITING
from parallel_agents.locks.memory import MemoryLease

pytestmark = pytest.mark.anyio

WAIT = ClaimPolicy.WAIT


def shared(resource: str) -> ResourceClaim:
    return ResourceClaim(resource=resource, mode=ClaimMode.SHARED)


def waiting(*claims: tuple[str | ResourceClaim, ...], **options: Any) -> ParallelExecutionGroup:
    """Return a group that waits, with one assignment for each tuple of claims."""
    assignments = [assignment(n, resource_claims=own) for n, own in enumerate(claims)]
    return ParallelExecutionGroup(group_id="g", assignments=assignments, claim_policy=WAIT, **options)


@define(eq=False)
class PlainLock:
    """A lock with the five methods and nothing else."""

    holders: dict[str, str] = field(factory=dict)
    acquired: list[str] = field(factory=list)
    released: list[str] = field(factory=list)

    async def acquire(self, resource: str, holder: str) -> bool:
        await anyio.lowlevel.checkpoint()
        got = self.holders.setdefault(resource, holder) == holder
        if got:
            self.acquired.append(resource)
        return got

    async def release(self, resource: str, holder: str) -> None:
        await anyio.lowlevel.checkpoint()
        self.released.append(resource)
        if self.holders.get(resource) == holder:
            del self.holders[resource]

    async def release_all(self, holder: str) -> int:
        raise NotImplementedError

    def is_locked(self, resource: str) -> bool:
        return resource in self.holders

    def holder_of(self, resource: str) -> str | None:
        return self.holders.get(resource)


@define(eq=False)
class Gates:
    """Agents that start, say so, and end when they are let; named by their task."""

    started: list[str] = field(factory=list)
    ended: list[str] = field(factory=list)
    _gates: dict[str, anyio.Event] = field(factory=dict)

    def gate(self, task_id: str) -> anyio.Event:
        return self._gates.setdefault(task_id, anyio.Event())

    async def open(self, *task_ids: str) -> None:
        for task_id in task_ids:
            self.gate(task_id).set()
        await wait_all_tasks_blocked()

    async def __call__(self, task: AgentAssignment) -> str:
        self.started.append(task.task_id)
        try:
            await self.gate(task.task_id).wait()
        finally:
            self.ended.append(task.task_id)
        return task.task_id


@pytest.mark.proves("L3")
async def test_overlapping_assignments_run_one_after_another_and_others_do_not_wait_for_them() -> None:
    agents = Gates()
    group = waiting(("r",), ("r", "s"), ("s",), ("other",), (), max_concurrency=3)
    with anyio.fail_after(5):
        async with ParallelExecutor(engine=agents).open_group(group) as run:
            await wait_all_tasks_blocked()
            assert agents.started == ["t0", "t3", "t4"]
            await agents.open("t0")
            assert agents.started[3:] == ["t1"]
            await agents.open("t3", "t4")
            assert agents.started[4:] == []
            await agents.open("t1", "t2")
    assert run.result.all_succeeded
    assert agents.started == ["t0", "t3", "t4", "t1", "t2"]


@pytest.mark.proves("L3", "X5")
async def test_one_that_waits_takes_no_place() -> None:
    agents = Gates()
    limiter = anyio.CapacityLimiter(1)
    lock = InMemoryResourceLock()
    outside = await lock.acquire_claims((ResourceClaim(resource="r"),), "outsider")
    with anyio.fail_after(5):
        executor = ParallelExecutor(engine=agents, limiter=limiter, resource_lock=lock)
        async with executor.open_group(waiting(("r",), ("s",), max_concurrency=1)) as run:
            await wait_all_tasks_blocked()
            assert agents.started == ["t1"]
            outside.release()
            await wait_all_tasks_blocked()
            assert (agents.started, limiter.borrowed_tokens) == (["t1"], 1)
            await agents.open("t1")
            assert agents.started == ["t1", "t0"]
            await agents.open("t0")
    assert run.result.all_succeeded
    assert (limiter.borrowed_tokens, lock.statistics().held) == (0, ())


@pytest.mark.proves("L3")
async def test_shared_claims_run_together_and_an_exclusive_one_is_not_starved() -> None:
    agents = Gates()
    group = waiting((shared("r"),), (shared("r"),), ("r",), (shared("r"),))
    with anyio.fail_after(5):
        async with ParallelExecutor(engine=agents).open_group(group):
            await wait_all_tasks_blocked()
            assert agents.started == ["t0", "t1"]
            await agents.open("t0")
            assert agents.started == ["t0", "t1"]
            await agents.open("t1")
            assert agents.started == ["t0", "t1", "t2"]
            await agents.open("t2", "t3")
    assert agents.started == ["t0", "t1", "t2", "t3"]


@pytest.mark.proves("L3")
@pytest.mark.parametrize("make", [InMemoryResourceLock, PlainLock])
async def test_two_groups_wait_for_each_other(make: Any) -> None:
    lock = make()
    inside: list[str] = []

    async def agent(task: AgentAssignment) -> None:
        inside.append(task.task_id)
        assert len(inside) == 1, "two hold the same resource"
        await anyio.lowlevel.checkpoint()
        inside.clear()

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            for order in (("a", "b"), ("b", "a"), ("b", "c", "a")):
                executor = ParallelExecutor(engine=agent, resource_lock=lock)
                tasks.start_soon(executor.execute_group, waiting(*[order] * 3))
    assert not any(lock.is_locked(resource) for resource in "abc")


@pytest.mark.proves("L3")
@virtual_time
async def test_a_plain_lock_is_asked_in_sorted_order_again_and_again_until_the_time_is_over() -> None:
    lock = PlainLock({"c": "outsider"})
    executor = ParallelExecutor(engine=Gates(), resource_lock=lock)
    started = anyio.current_time()
    result = await executor.execute_group(waiting(("c", "a", "b"), claim_timeout_seconds=60))
    assert anyio.current_time() - started == pytest.approx(60)
    assert [o.status for o in result.outcomes] == [OutcomeStatus.REJECTED]
    assert "'c' is held by 'outsider'" in str(result.outcomes[0].error)
    assert lock.acquired[:2] == ["a", "b"]
    assert 60 <= len(lock.acquired) / 2 <= 150
    assert lock.holders == {"c": "outsider"}
    assert lock.released == lock.acquired


@pytest.mark.proves("L3", "P1")
@virtual_time
async def test_after_its_time_one_that_waits_is_rejected_and_those_behind_it_go_on() -> None:
    lock = InMemoryResourceLock()
    await lock.acquire("outside", "outsider")
    snapshots: list[Any] = []
    seconds = {"t0": 10, "t2": 2, "t3": 1}

    async def agent(task: AgentAssignment) -> None:
        await anyio.sleep(seconds[task.task_id])

    group = waiting(("r",), ("r", "s"), (), ("s",), ("outside",), max_concurrency=2, claim_timeout_seconds=4)
    executor = ParallelExecutor(engine=agent, resource_lock=lock, progress_callback=snapshots.append)
    result = await executor.execute_group(group)
    succeeded, rejected = OutcomeStatus.SUCCEEDED, OutcomeStatus.REJECTED
    assert [o.status for o in result.outcomes] == [succeeded, rejected, succeeded, succeeded, rejected]
    assert result.outcomes[1].error == "Claim not to be had within 4 s: 'r' is held by 'a0'"
    assert result.outcomes[4].error == "Claim not to be had within 4 s: 'outside' is held by 'outsider'"
    assert [o.started_after_seconds for o in result.outcomes] == [0, None, 0, pytest.approx(4), None]
    assert result.total_duration_seconds == pytest.approx(10)
    assert (snapshots[-1].completed, snapshots[-1].failed) == (5, 2)
    assert [held.resource for held in lock.statistics().held] == ["outside"]


@pytest.mark.proves("L3")
@virtual_time
async def test_time_waited_for_others_of_the_group_counts_for_what_is_waited_for_outside() -> None:
    lock = InMemoryResourceLock()
    await lock.acquire("outside", "outsider")
    group = waiting(("r",), ("r", "outside"), claim_timeout_seconds=4)
    executor = ParallelExecutor(engine=lambda task: anyio.sleep(3), resource_lock=lock)
    result = await executor.execute_group(group)
    assert result.outcomes[1].error == "Claim not to be had within 4 s: 'outside' is held by 'outsider'"
    assert result.total_duration_seconds == pytest.approx(4)


@pytest.mark.proves("L3", "X4")
@virtual_time
async def test_one_that_gets_no_claim_in_time_trips_fail_fast() -> None:
    lock = InMemoryResourceLock()
    await lock.acquire("outside", "outsider")
    executor = ParallelExecutor(engine=lambda task: anyio.sleep(30), resource_lock=lock)
    group = waiting(("outside",), ("r",), claim_timeout_seconds=4, fail_fast=True)
    result = await executor.execute_group(group)
    assert [o.status for o in result.outcomes] == [OutcomeStatus.REJECTED, OutcomeStatus.CANCELLED]
    assert result.total_duration_seconds == pytest.approx(4)


@pytest.mark.proves("X4", "L4")
async def test_a_failure_with_fail_fast_ends_all_waiting() -> None:
    lock = InMemoryResourceLock()
    await lock.acquire("outside", "outsider")

    async def agent(task: AgentAssignment) -> None:
        await wait_all_tasks_blocked()
        raise ValueError

    executor = ParallelExecutor(engine=agent, resource_lock=lock)
    with anyio.fail_after(5):
        result = await executor.execute_group(waiting(("r",), ("outside",), ("r",), fail_fast=True))
    assert [o.status for o in result.outcomes] == [OutcomeStatus.FAILED, *[OutcomeStatus.CANCELLED] * 2]
    assert all("'a0' failed" in str(o.error) for o in result.outcomes[1:])
    assert lock.statistics().waiting == ()


@pytest.mark.proves("L3")
@pytest.mark.parametrize("task_id", ["t0", "t1", "t3"])
async def test_one_that_waits_can_be_cancelled_and_is_in_nobodys_way_then(task_id: str) -> None:
    """The first waits for the lock, the second for the first, the fourth for room."""
    lock = InMemoryResourceLock()
    outside = await lock.acquire_claims((ResourceClaim(resource="outside"),), "outsider")
    agents = Gates()
    group = waiting(("outside", "s"), ("s",), ("r",), ("t",), max_concurrency=1)
    with anyio.fail_after(5):
        async with ParallelExecutor(engine=agents, resource_lock=lock).open_group(group) as run:
            await wait_all_tasks_blocked()
            assert run.cancel_task(task_id)
            assert not run.cancel_task(task_id)
            await wait_all_tasks_blocked()
            assert (len(lock.statistics().waiting) == 1) == (task_id != "t0")
            await agents.open("t0", "t1", "t2", "t3")
            assert agents.started == {"t0": ["t2", "t1", "t3"], "t1": ["t2", "t3"], "t3": ["t2"]}[task_id]
            outside.release()
    assert run.result.outcome_of(task_id).status is OutcomeStatus.CANCELLED
    assert (run.result.agents_succeeded, len(agents.started)) == (3, 3)
    assert lock.statistics().held == ()


@pytest.mark.proves("L3", "L4")
async def test_one_that_has_its_claims_but_no_room_yet_can_be_cancelled_and_gives_them_back() -> None:
    lock = InMemoryResourceLock()
    outside = await lock.acquire_claims((ResourceClaim(resource="outside"),), "outsider")
    agents = Gates()
    group = waiting(("outside",), ("r",), ("outside",), max_concurrency=1)
    with anyio.fail_after(5):
        async with ParallelExecutor(engine=agents, resource_lock=lock).open_group(group) as run:
            await wait_all_tasks_blocked()
            outside.release()
            await wait_all_tasks_blocked()
            assert (agents.started, lock.is_locked("outside")) == (["t1"], True)
            assert run.cancel_task("t0")
            assert not lock.is_locked("outside")
            await agents.open("t1", "t2")
    assert agents.started == ["t1", "t2"]


@pytest.mark.proves("S1", "L4")
async def test_a_shutdown_rejects_those_that_wait() -> None:
    lock = InMemoryResourceLock()
    await lock.acquire("outside", "outsider")
    manager = ShutdownManager()
    agents = Gates()
    executor = ParallelExecutor(engine=agents, resource_lock=lock, shutdown_manager=manager)
    with anyio.fail_after(5):
        async with executor.open_group(waiting(("r",), ("outside",), ("r",), fail_fast=True)) as run:
            await wait_all_tasks_blocked()
            manager.request_shutdown()
            await wait_all_tasks_blocked()
            assert lock.statistics().waiting == ()
            assert agents.ended == []
            await agents.open("t0")
    assert [o.status for o in run.result.outcomes] == [OutcomeStatus.SUCCEEDED, *[OutcomeStatus.REJECTED] * 2]
    assert {o.error for o in run.result.outcomes[1:]} == {"Shutdown in progress"}


@pytest.mark.proves("X1", "L3")
async def test_a_lock_that_fails_while_it_is_waited_for_fails_that_agent_alone() -> None:
    class Broken(InMemoryResourceLock):
        async def acquire_claims(self, claims: Sequence[ResourceClaim], holder: str, **options: Any) -> MemoryLease:
            if claims[0].resource == "broken":
                raise OSError("no connection")
            return await super().acquire_claims(claims, holder, **options)

    agents = Gates()
    for n in range(3):
        agents.gate(f"t{n}").set()
    lock = Broken()
    with anyio.fail_after(5):
        executor = ParallelExecutor(engine=agents, resource_lock=lock)
        result = await executor.execute_group(waiting(("broken",), ("broken",), ("r",)))
    assert [o.status for o in result.outcomes] == [*[OutcomeStatus.FAILED] * 2, OutcomeStatus.SUCCEEDED]
    assert result.outcomes[0].error == "Claims not taken: OSError: no connection"
    assert isinstance(result.outcomes[0].exception, OSError)


async def test_those_that_wait_are_told_with_what_and_whom_they_wait_for() -> None:
    lock = InMemoryResourceLock()
    outside = await lock.acquire_claims((ResourceClaim(resource="outside"),), "outsider")
    events: list[ParallelEvent] = []

    class Watcher:
        def on_event(self, event: ParallelEvent) -> None:
            if event.name == PARALLEL_AGENT_WAITING:
                events.append(event)

    async def agent(task: AgentAssignment) -> None:
        await wait_all_tasks_blocked()
        outside.release()

    with anyio.fail_after(5):
        executor = ParallelExecutor(engine=agent, resource_lock=lock, observers=[Watcher()])
        await executor.execute_group(waiting(("r",), ("s", "r"), ("outside",)))
    told = {(e.task_id, e.agent_id, e.fields["resource"], e.fields["holder"]) for e in events}
    assert told == {("t1", "a1", "r", "a0"), ("t2", "a2", "outside", "outsider")}


class RemoteLock(InMemoryResourceLock):
    """Stands for a lock that is a round trip away: what was begun goes on, whoever is cancelled meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = anyio.Event()
        self.asked = 0

    async def acquire_claims(self, claims: Sequence[ResourceClaim], holder: str, **options: Any) -> Any:
        self.asked += 1
        with anyio.CancelScope(shield=True):
            await self.answers.wait()
        return RemoteLease(await super().acquire_claims(claims, holder, **options))


@define(eq=False)
class RemoteLease:
    inner: MemoryLease
    lost: Lost = NEVER_LOST

    async def release(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.inner.release()


@pytest.mark.proves("L4")
async def test_claims_that_arrive_after_their_assignment_was_cancelled_are_given_back() -> None:
    lock = RemoteLock()
    agents = Gates()
    with anyio.fail_after(5):
        executor = ParallelExecutor(engine=agents, resource_lock=lock)
        async with executor.open_group(waiting(("r",), ("r",))) as run:
            await wait_all_tasks_blocked()
            assert lock.asked == 1
            assert run.cancel_task("t0")
            lock.answers.set()
            await wait_all_tasks_blocked()
            assert agents.started == ["t1"]
            await agents.open("t1")
            await wait_all_tasks_blocked()
            assert not lock.is_locked("r")
    assert [o.status for o in run.result.outcomes] == [OutcomeStatus.CANCELLED, OutcomeStatus.SUCCEEDED]


@pytest.mark.proves("L4")
async def test_claims_a_round_trip_away_are_given_back_while_others_run() -> None:
    lock = RemoteLock()
    lock.answers.set()
    outside = await InMemoryResourceLock.acquire_claims(lock, (ResourceClaim(resource="r"),), "outsider")
    agents = Gates()
    with anyio.fail_after(5):
        executor = ParallelExecutor(engine=agents, resource_lock=lock)
        async with executor.open_group(waiting(("r",), ("s",), max_concurrency=1)) as run:
            await wait_all_tasks_blocked()
            outside.release()
            await wait_all_tasks_blocked()
            assert (agents.started, lock.is_locked("r")) == (["t1"], True)
            run.cancel_task("t0")
            await wait_all_tasks_blocked()
            assert not lock.is_locked("r")
            await agents.open("t1")
    assert run.result.agents_succeeded == 1


@pytest.mark.proves("L4")
async def test_claims_a_round_trip_away_are_given_back_when_all_is_stopped_and_the_block_goes_on() -> None:
    lock = RemoteLock()
    lock.answers.set()
    outside = await InMemoryResourceLock.acquire_claims(lock, (ResourceClaim(resource="r"),), "outsider")
    agents = Gates()
    with anyio.fail_after(5):
        executor = ParallelExecutor(engine=agents, resource_lock=lock)
        async with executor.open_group(waiting(("r",), ("s",), max_concurrency=1)) as run:
            await wait_all_tasks_blocked()
            outside.release()
            await wait_all_tasks_blocked()
            assert lock.is_locked("r")
            run.cancel()
            await wait_all_tasks_blocked()
            assert not lock.is_locked("r")
    assert run.result.agents_succeeded == 0


def shared_agents(*agents: str, **options: Any) -> ParallelExecutionGroup:
    return ParallelExecutionGroup(
        group_id="g",
        assignments=[
            AgentAssignment(identity=AgentIdentity(id=agent), task=Task(id=f"t{n}")) for n, agent in enumerate(agents)
        ],
        allow_shared_agents=True,
        **options,
    )


@pytest.mark.parametrize("policy", ClaimPolicy)
async def test_tasks_of_one_agent_run_one_after_another(policy: ClaimPolicy) -> None:
    agents = Gates()
    with anyio.fail_after(5):
        group = shared_agents("a", "a", "b", "a", claim_policy=policy)
        async with ParallelExecutor(engine=agents).open_group(group) as run:
            await wait_all_tasks_blocked()
            assert agents.started == ["t0", "t2"]
            await agents.open("t0")
            assert agents.started == ["t0", "t2", "t1"]
            await agents.open("t1", "t2", "t3")
    assert run.result.all_succeeded


def test_what_a_group_can_not_be() -> None:
    with pytest.raises(ValueError, match=r"Duplicate agent IDs: a\. .*allow_shared_agents"):
        ParallelExecutionGroup(group_id="g", assignments=shared_agents("a", "a").assignments)
    with pytest.raises(ValueError, match="claim_timeout_seconds needs the claim_policy 'wait'"):
        ParallelExecutionGroup(group_id="g", assignments=[assignment(0)], claim_timeout_seconds=1)


@pytest.mark.proves("X17")
async def test_a_group_inside_an_agent_that_holds_claims_waits_only_for_a_time() -> None:
    errors: list[Exception] = []

    async def agent(task: AgentAssignment) -> None:
        async def inner(task: AgentAssignment) -> None:
            return None

        executor = ParallelExecutor(engine=inner, resource_lock=lock)
        try:
            await executor.execute_group(waiting(("s",)))
        except ParallelAgentsError as error:
            errors.append(error)
        try:
            await executor.execute_group(waiting(("r",), claim_timeout_seconds=9))
        except ResourceConflictError as error:
            errors.append(error)
        assert (await executor.execute_group(waiting(("s",), claim_timeout_seconds=9))).all_succeeded

    lock = InMemoryResourceLock()
    with anyio.fail_after(5):
        result = await ParallelExecutor(engine=agent, resource_lock=lock).execute_group(waiting(("r",)))
    result.raise_for_failures()
    assert "Set claim_timeout_seconds" in str(errors[0])
    assert isinstance(errors[1], ResourceConflictError)
    assert (errors[1].resource, errors[1].holder, errors[1].claimant) == ("r", "a0", "a0")


class LosingLock(InMemoryResourceLock):
    """A lock that loses leases on command."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[MemoryLease] = []

    async def acquire_claims(self, claims: Sequence[ResourceClaim], holder: str, **options: Any) -> MemoryLease:
        lease = await super().acquire_claims(claims, holder, **options)
        lease.lost = anyio.Event()
        self.given.append(lease)
        return lease

    def lose(self, number: int) -> None:
        self.given[number].release()
        lost: Lost = self.given[number].lost
        assert isinstance(lost, anyio.Event)
        lost.set()


@pytest.mark.proves("L4")
@pytest.mark.parametrize("policy", ClaimPolicy)
@pytest.mark.parametrize("swallows", [False, True])
async def test_an_agent_whose_lease_is_lost_is_cancelled_and_fails_with_the_resource_named(
    policy: ClaimPolicy, *, swallows: bool
) -> None:
    lock = LosingLock()
    ended = anyio.Event()

    async def agent(task: AgentAssignment) -> str:
        current_run().record_usage(Usage(cost=2.5))
        try:
            await (anyio.sleep_forever() if task.task_id == "t0" else ended.wait())
        except anyio.get_cancelled_exc_class():
            if not swallows:
                raise
        finally:
            ended.set()
        return "done"

    assignments = [assignment(0, resource_claims=("s", "r")), assignment(1, resource_claims=("t",))]
    group = ParallelExecutionGroup(group_id="g", assignments=assignments, claim_policy=policy)
    with anyio.fail_after(5):
        async with ParallelExecutor(engine=agent, resource_lock=lock).open_group(group) as run:
            await wait_all_tasks_blocked()
            lock.lose(0)
    lost, other = run.result.outcomes
    assert lost.status is OutcomeStatus.FAILED
    assert lost.error == "Lost its claim while it ran: 'r', 's'. Another may have worked on it since"
    assert (lost.usage.cost, other.is_success) == (2.5, True)
    assert [lease.lost.is_set() for lease in lock.given] == [True, False]


@pytest.mark.parametrize("held_by_another", [False, True])
async def test_a_lease_that_is_lost_before_its_agent_starts_is_taken_again_if_it_is_to_be_had(
    *, held_by_another: bool
) -> None:
    lock = LosingLock()
    agents = Gates()
    assignments = [assignment(0), assignment(1, resource_claims=("r",))]
    group = ParallelExecutionGroup(group_id="g", assignments=assignments, max_concurrency=1)
    with anyio.fail_after(5):
        async with ParallelExecutor(engine=agents, resource_lock=lock).open_group(group) as run:
            await wait_all_tasks_blocked()
            lock.lose(0)
            if held_by_another:
                assert await lock.acquire("r", "another")
            await agents.open("t0", "t1")
    outcome = run.result.outcomes[1]
    if held_by_another:
        assert outcome.status is OutcomeStatus.REJECTED
        assert outcome.error == "Claim not to be had: 'r' is held by 'another'"
    else:
        assert outcome.is_success
        assert not lock.is_locked("r")


@pytest.mark.parametrize("held_by_another", [False, True])
async def test_a_lease_that_is_lost_while_its_agent_waits_for_room_is_waited_for_again(
    *, held_by_another: bool
) -> None:
    lock = LosingLock()
    outside = await lock.acquire_claims((ResourceClaim(resource="r"),), "outsider")
    agents = Gates()
    with anyio.fail_after(5):
        executor = ParallelExecutor(engine=agents, resource_lock=lock)
        async with executor.open_group(waiting(("r",), ("s",), max_concurrency=1)) as run:
            await wait_all_tasks_blocked()
            outside.release()
            await wait_all_tasks_blocked()
            lock.lose(2)
            if held_by_another:
                assert await lock.acquire("r", "another")
            await agents.open("t1", "t0")
            assert agents.started == (["t1"] if held_by_another else ["t1", "t0"])
            await lock.release("r", "another")
    assert run.result.all_succeeded
    assert agents.started == ["t1", "t0"]


names = st.lists(st.sampled_from(["x", "y", "path:/a", "path:/a/b", "path:/a/c"]), max_size=3, unique=True)
wishes = st.lists(st.tuples(names, st.sampled_from(ClaimMode), st.sampled_from("ab"), st.integers(0, 3)), min_size=1)


Wish = tuple[list[str], ClaimMode, str, int]


@pytest.mark.proves("X1", "X5", "L3", "L4")
@given(wishes=wishes, limit=st.none() | st.integers(1, 3), cancelled=st.sets(st.integers(0, 9)))
async def test_whatever_is_claimed_everybody_runs_and_no_two_at_once_that_overlap(
    wishes: list[Wish], limit: int | None, cancelled: set[int]
) -> None:
    lock = InMemoryResourceLock()
    await check_that_everybody_runs(lock, wishes, limit, cancelled)
    assert not lock._queue


@pytest.mark.proves("X1", "X5", "L3", "L4")
@virtual_time
@given(wishes=wishes, limit=st.none() | st.integers(1, 3), cancelled=st.sets(st.integers(0, 9)))
async def test_with_a_plain_lock_as_well(wishes: list[Wish], limit: int | None, cancelled: set[int]) -> None:
    lock = PlainLock()
    await check_that_everybody_runs(lock, wishes, limit, cancelled)
    assert lock.holders == {}


async def check_that_everybody_runs(
    lock: ResourceLock, wishes: list[Wish], limit: int | None, cancelled: set[int]
) -> None:
    running: dict[str, AgentAssignment] = {}

    async def agent(task: AgentAssignment) -> None:
        running[task.task_id] = task
        assert find_overlap((name, a.resource_claims) for name, a in running.items()) is None
        assert len({(a.agent_id) for a in running.values()}) == len(running)
        assert limit is None or len(running) <= limit
        try:
            for _ in range(task.task.inputs["steps"]):
                await anyio.lowlevel.checkpoint()
        finally:
            del running[task.task_id]

    assignments = [
        AgentAssignment(
            identity=AgentIdentity(id=f"{agent_id}{number % 3}"),
            task=Task(id=f"t{number}", inputs={"steps": steps}),
            resource_claims=tuple(ResourceClaim(resource=name, mode=mode) for name in own),
        )
        for number, (own, mode, agent_id, steps) in enumerate(wishes)
    ]
    group = ParallelExecutionGroup(
        group_id="g", assignments=assignments, claim_policy=WAIT, max_concurrency=limit, allow_shared_agents=True
    )
    with anyio.fail_after(1_000):
        async with ParallelExecutor(engine=agent, resource_lock=lock).open_group(group) as run:
            for number in sorted(cancelled):
                await anyio.lowlevel.checkpoint()
                if number < len(assignments):
                    run.cancel_task(f"t{number}")
    for number, outcome in enumerate(run.result.outcomes):
        allowed = {OutcomeStatus.SUCCEEDED} | ({OutcomeStatus.CANCELLED} if number in cancelled else set())
        assert outcome.status in allowed, outcome
    assert not running


@pytest.mark.proves("X4", "X8", "L3")
@pytest.mark.parametrize("anyio_backend", ["asyncio-virtual", "trio-virtual"], indirect=True)
async def test_whoever_waits_for_room_and_is_sent_away_as_he_gets_it_runs_nothing() -> None:
    async def agent(of: AgentAssignment) -> None:
        await anyio.sleep(int(of.task_id[1:]) % 2)

    group = waiting(*((("r",) if n % 3 == 0 else ()) for n in range(12)))
    executor = ParallelExecutor(engine=agent, limiter=anyio.CapacityLimiter(4))
    with anyio.fail_after(30):
        result = await executor.execute_group(group)
    assert [outcome.error for outcome in result.outcomes] == [None] * 12


async def test_ten_thousand_that_want_the_same_need_few_tasks() -> None:
    tasks = 0

    async def agent(task: AgentAssignment) -> None:
        nonlocal tasks
        if int(task.task_id[1:]) % 1_000 == 0:
            tasks = max(tasks, len(anyio.get_running_tasks()))

    group = waiting(*[("r",)] * 3_000, max_concurrency=10)
    with anyio.fail_after(60):
        assert (await ParallelExecutor(engine=agent).execute_group(group)).all_succeeded
    assert tasks < 20
