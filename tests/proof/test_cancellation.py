"""Every public operation that waits is cancelled at each step of the scheduler in turn; nothing may be left undone.

Found this way, and by nothing else: a lock noted after an await, a swallowed cancellation, a worker that starts one
agent too many.
"""

import asyncio

import anyio
import pytest
from scenarios import Scenario, fails_after_one_second, scenarios, sleeps_one_second

from parallel_agents.testing.stepping import Backend, installed_backends
from proof import anyio_bug
from proof.injection import WAYS, Kind, LostCancellationError, run_once
from proof.operations import OPERATIONS, RunsAGroup
from proof.tally import Proof


@pytest.mark.proves("X1", "X4", "X5", "X8", "X9", "X10", "X11", "L4", "P1", "P2", "V1")
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("backend", "kind"), WAYS)
def test_nothing_is_left_undone_when_the_caller_is_cancelled_at_any_step(
    backend: Backend, kind: Kind, name: str, proof: Proof
) -> None:
    tally = proof.tally("cancelled at every step of the scheduler")
    stride = proof.size(few=5, short=1, long=1)
    for seed in (None, *range(proof.seed, proof.seed + proof.size(few=0, short=1, long=220))):
        undisturbed = run_once(OPERATIONS[name](), backend, kind, seed, None)
        assert undisturbed.steps > 5
        for step in range(1, undisturbed.steps + 1, stride):
            with tally.run(name, backend, kind, f"order {seed}", f"step {step} of {undisturbed.steps}"):
                try:
                    injection = run_once(OPERATIONS[name](), backend, kind, seed, step)
                except LostCancellationError:  # allowed exactly where it is anyio's
                    with anyio_bug.mended():
                        injection = run_once(OPERATIONS[name](), backend, kind, seed, step)
                assert injection.happened


def lose_a_native_cancellation() -> None:
    async def child() -> None:
        with anyio.move_on_after(0.01), anyio.CancelScope() as inner:
            inner.cancel()
            try:
                await anyio.sleep(1)
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.05)

    async def program() -> str:
        task = asyncio.current_task()
        assert task is not None
        with anyio.CancelScope() as outer:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(child)
                await anyio.wait_all_tasks_blocked()
                asyncio.get_running_loop().call_soon(outer.cancel)
                asyncio.get_running_loop().call_soon(task.cancel)
                await anyio.sleep(1)
        await anyio.sleep(0)
        return "nobody was cancelled"

    with pytest.raises(asyncio.CancelledError):
        anyio.run(program)


@pytest.mark.xfail(strict=True, reason="a bug of anyio 4.16.0, see proof.anyio_bug")
def test_anyio_loses_no_native_cancellation_beside_one_of_its_own() -> None:
    lose_a_native_cancellation()


def test_anyio_would_lose_none_if_scopes_kept_their_count_within_a_task() -> None:
    with anyio_bug.mended():
        lose_a_native_cancellation()


@pytest.mark.proves("X4")
@pytest.mark.parametrize("backend", installed_backends())
def test_no_agent_starts_after_the_first_failure_in_any_order_of_events(backend: Backend, proof: Proof) -> None:
    tally = proof.tally("failures and ends in the same instant, in any order")
    for seed in range(proof.seed, proof.seed + proof.size(few=20, short=100, long=20_000)):
        with tally.run(backend, f"order {seed}"):
            tie = Scenario((sleeps_one_second, fails_after_one_second) * 4, {"max_concurrency": 2, "fail_fast": True})
            run_once(RunsAGroup(tie), backend, "scope", seed, None)


@pytest.mark.parametrize("backend", installed_backends())
def test_one_seed_gives_one_order(backend: Backend) -> None:
    def order(seed: int) -> list[str]:
        scenario = scenarios()["plain"]()
        run_once(RunsAGroup(scenario), backend, "scope", seed, None)
        return scenario.closed

    assert order(3) == order(3)
