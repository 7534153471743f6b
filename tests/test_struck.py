"""What an exception leaves that can come at any line: a Ctrl-C without a handler, or memory that runs out.

``proof/test_lines.py`` raises one at each line; here stand the cases in which something has to be made good.
"""

from collections.abc import Sequence
from typing import Any

import anyio
import pytest
from groups import group_of

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    ClaimMode,
    InMemoryResourceLock,
    OutcomeStatus,
    ParallelExecutionError,
    ParallelExecutionGroup,
    ParallelExecutor,
    ResourceClaim,
    ShutdownManager,
    Task,
)
from parallel_agents._claim_queue import ClaimQueue
from parallel_agents._deadlines import DeadlineWatch
from parallel_agents._run import GroupRun
from parallel_agents._slots import Slot, give_back_slots_of
from parallel_agents.locks.memory import MemoryLease

pytestmark = pytest.mark.anyio

CLAIMS = (ResourceClaim(resource="path:/a/b"), ResourceClaim(resource="key", mode=ClaimMode.SHARED))


class StruckError(BaseException):
    """Comes at any line, as KeyboardInterrupt does, but does not end the test run with it."""


async def nothing(_assignment: AgentAssignment) -> None:
    return None


def test_a_queue_forgets_what_was_half_entered_and_keeps_what_it_is_told_to_keep() -> None:
    queue: ClaimQueue[str] = ClaimQueue()
    kept = queue.enter("one", CLAIMS[1:])
    queue.enter("one", CLAIMS)
    other = queue.enter("other", CLAIMS[:1])
    assert not queue.look_again(other)
    queue.forget("one", except_for=[kept])
    assert queue.look_again(other)
    for ticket in (kept, other):
        queue.leave(ticket)
    assert not queue


def test_a_ticket_that_waits_for_nobody_is_still_clear_when_it_is_looked_at_again() -> None:
    queue: ClaimQueue[str] = ClaimQueue()
    assert queue.look_again(queue.enter("one", CLAIMS))


@pytest.mark.proves("L4")
async def test_release_all_is_quiet_about_what_was_taken_quietly_and_lets_go_on_whom_it_can() -> None:
    lock = InMemoryResourceLock()
    lock.take_at_once(CLAIMS[:1], "quiet", is_told=False)
    lock.take_at_once((ResourceClaim(resource="other"),), "another", is_told=False)
    got: list[MemoryLease] = []

    async def wait(resource: str) -> None:
        got.append(await lock.acquire_claims([ResourceClaim(resource=resource)], f"waits for {resource}"))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait, "path:/a/b")
            tasks.start_soon(wait, "other")
            await anyio.wait_all_tasks_blocked()
            assert await lock.release_all("quiet") == 1
            await anyio.wait_all_tasks_blocked()
            assert [lease.holder for lease in got] == ["waits for path:/a/b"]
            assert await lock.release_all("another") == 1
    assert len(got) == 2


@pytest.mark.proves("L4")
@pytest.mark.parametrize("error", [StruckError(), MemoryError()])
async def test_no_lock_is_left_when_its_taking_at_once_is_struck(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = InMemoryResourceLock.take_at_once

    def struck(*args: Any, **options: Any) -> None:
        take(*args, **options)
        raise error

    monkeypatch.setattr(InMemoryResourceLock, "take_at_once", struck)
    lock = InMemoryResourceLock()
    with anyio.fail_after(5), pytest.raises(type(error)):
        await ParallelExecutor(engine=nothing, resource_lock=lock).execute_group(
            group_of(1, each={"resource_claims": CLAIMS})
        )
    assert lock.statistics().held == ()
    assert not lock._queue


@pytest.mark.proves("L4")
async def test_release_all_gives_back_what_was_taken_and_never_handed_over() -> None:
    lock = InMemoryResourceLock()
    lock._queue.enter("struck", CLAIMS)  # as if it had been struck before it made a lease of that
    got: list[MemoryLease] = []

    async def wait() -> None:
        got.append(await lock.acquire_claims(CLAIMS[:1], "other"))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            assert got == []
            await lock.release_all("struck")
    assert [lease.holder for lease in got] == ["other", "other"]


class StruckOnTaking(InMemoryResourceLock):
    """Is struck when the claims are taken, before anybody has the lease."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    async def acquire_claims(
        self, claims: Sequence[ResourceClaim], holder: str, *, timeout_seconds: float | None = None
    ) -> MemoryLease:
        await super().acquire_claims(claims, holder, timeout_seconds=timeout_seconds)
        raise self.error


@pytest.mark.proves("L4")
@pytest.mark.parametrize("error", [StruckError(), MemoryError()])
async def test_no_lock_is_left_when_its_taking_is_struck(error: BaseException) -> None:
    lock = StruckOnTaking(error)
    group = group_of(1, each={"resource_claims": CLAIMS})
    with anyio.fail_after(5), pytest.raises(type(error)):
        await ParallelExecutor(engine=nothing, resource_lock=lock).execute_group(group)
    assert lock.statistics().held == ()
    assert not lock._queue


class StruckOnGivingBack(InMemoryResourceLock):
    """Is struck, once, when one of two claims is given back."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.errors = [error]

    def _give_back(self, lease: MemoryLease, claims: tuple[ResourceClaim, ...]) -> None:
        if not self.errors:
            super()._give_back(lease, claims)
        else:
            super()._give_back(lease, claims[:1])
            raise self.errors.pop()


@pytest.mark.proves("L4", "X1")
@pytest.mark.parametrize("error", [StruckError(), MemoryError()])
async def test_no_lock_is_left_when_its_giving_back_is_struck(error: BaseException) -> None:
    lock = StruckOnGivingBack(error)
    group = group_of(2, each={"resource_claims": CLAIMS[1:]})
    runs: list[GroupRun[Any]] = []
    with anyio.fail_after(5), pytest.raises((ParallelExecutionError, BaseExceptionGroup)):
        async with ParallelExecutor(engine=nothing, resource_lock=lock).open_group(group) as run:
            runs.append(run)
    assert lock.statistics().held == ()
    assert not lock._queue
    assert len(runs[0].result.outcomes) == 2


@pytest.mark.proves("X1")
async def test_a_group_that_is_struck_on_the_way_in_has_its_outcomes_and_no_locks() -> None:
    class Manager(ShutdownManager):
        def attach(self, run: Any) -> None:
            self.run = run
            raise StruckError

    manager, lock = Manager(), InMemoryResourceLock()
    group = group_of(2, each={"timeout_seconds": 5})
    with pytest.raises(StruckError):
        await ParallelExecutor(engine=nothing, resource_lock=lock, shutdown_manager=manager).execute_group(group)
    assert {outcome.status for outcome in manager.run.result.outcomes} == {OutcomeStatus.CANCELLED}
    assert lock.statistics().held == ()


@pytest.mark.proves("X1", "P1", "P2")
async def test_an_agent_that_is_struck_before_its_engine_runs_is_not_counted_as_running(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def struck(_watch: object, _deadline: object) -> None:
        raise StruckError

    monkeypatch.setattr(DeadlineWatch, "tell", struck)
    first, second = (
        AgentAssignment(identity=AgentIdentity(id=name), task=Task(id=name), timeout_seconds=seconds)
        for name, seconds in (("first", None), ("second", 60.0))
    )
    group = ParallelExecutionGroup(group_id="g", assignments=(first, second), max_concurrency=1)
    runs: list[GroupRun[Any]] = []
    with anyio.fail_after(5), pytest.raises(BaseExceptionGroup):
        async with ParallelExecutor(engine=nothing).open_group(group) as run:
            runs.append(run)
    assert [outcome.is_success for outcome in runs[0].result.outcomes] == [True, False]
    assert (runs[0].progress.completed, runs[0].progress.in_progress) == (2, 0)


async def test_places_of_a_run_are_given_back_and_those_of_others_are_not() -> None:
    limiter = anyio.CapacityLimiter(3)
    mine, other = object(), object()
    for owner in (mine, other):
        assert Slot(limiter, owner).take_nowait()
    limiter.acquire_on_behalf_of_nowait("somebody else")
    give_back_slots_of(mine, limiter)
    assert limiter.borrowed_tokens == 2
