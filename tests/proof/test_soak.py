"""The same again and again in one event loop: nothing may pile up."""

import gc
import threading
import time
from collections import Counter
from pathlib import Path

import anyio
import pytest

from proof.random_groups import History, Kind, plan_of
from proof.tally import Proof

pytestmark = pytest.mark.anyio

WARM_UP = 40
"""Groups that fill caches, before anything is counted."""

FLAT_WITHIN = 300
"""Objects by which two counts may differ however long it was between them."""


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


async def run_groups(first: int, count: int) -> int:
    """Run so many random groups in virtual time; return how many."""
    run = 0
    for seed in range(first, first + count):
        plan = plan_of(seed)
        if plan.has_end and not any(agent.kind is Kind.BLOCKS for agent in plan.agents):
            await History(plan).happen()
            run += 1
    return run


def objects() -> Counter[str]:
    gc.collect()
    return Counter(type(item).__name__ for item in gc.get_objects())


@pytest.mark.proves("X11")
@pytest.mark.parametrize("anyio_backend", ["asyncio-virtual", "trio-virtual"], indirect=True)
async def test_nothing_piles_up(anyio_backend_name: str, proof: Proof) -> None:
    tally = proof.tally("soak")
    ends_at = time.monotonic() + proof.size(few=0, short=0, long=900)
    groups = proof.size(few=40, short=150, long=500)
    await run_groups(0, WARM_UP)
    before, files, threads = objects(), open_files(), threading.active_count()
    tasks, megabytes = len(anyio.get_running_tasks()), resident_megabytes()
    first = proof.seed * 1_000_000
    while True:
        with tally.run(anyio_backend_name, f"groups from {first}"):
            ran = await run_groups(first, groups)
            after = objects()
            more = after.total() - before.total()
            assert more <= FLAT_WITHIN, f"{more} objects more: {(after - before).most_common(5)}"
            assert len(anyio.get_running_tasks()) == tasks
            assert threading.active_count() == threads
            assert open_files() <= files
        tally.runs += ran - 1
        first += groups
        if time.monotonic() >= ends_at:
            break
    assert resident_megabytes() < megabytes + 50
    tally.remarks.append(f"{anyio_backend_name}: {more:+} objects, {resident_megabytes() - megabytes:+.0f} MB")
