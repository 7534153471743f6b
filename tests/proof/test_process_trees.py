"""Trees of processes that are cancelled at a random moment: no survivor, no zombie, whatever they do against it."""

import os
from pathlib import Path
from random import Random

import anyio
import pytest

from parallel_agents import AgentAssignment, AgentIdentity, ParallelExecutionGroup, ParallelExecutor, Task
from parallel_agents.engines.process import ProcessEngine
from proof.processes import alive_with, own_children
from proof.tally import Proof

pytestmark = pytest.mark.anyio

SHAPES = {
    "a child": "exec sleep 1000",
    "a child that ignores SIGTERM": 'trap "" TERM; while :; do sleep 0.05; done',
    "a grandchild that holds the pipe": "sleep 1000 & wait",
    "a grandchild without the pipe": "sleep 1000 >/dev/null 2>&1 & wait",
    "a grandchild that ignores SIGTERM": "sh -c 'trap \"\" TERM; while :; do sleep 0.05; done' & wait",
    "a grandchild whose parent is gone": "sh -c 'trap \"\" TERM; while :; do sleep 0.05; done' & exit 0",
    "four generations": "sh -c 'sh -c \"sleep 1000 & wait\" & wait' & wait",
    "many that print without end": "for i in 1 2 3 4 5; do yes & done; wait",
}
"""Programs for a shell; none ends by itself."""


@pytest.mark.proves("X8", "X10", "X11")
async def test_no_process_of_a_cancelled_tree_survives(anyio_backend_name: str, tmp_path: Path, proof: Proof) -> None:
    tally = proof.tally("process trees, cancelled")
    for seed in range(proof.seed, proof.seed + proof.size(few=1, short=3, long=50)):
        with tally.run(anyio_backend_name, f"seed {seed}"):
            await grow_and_fell(Random(seed), f"{anyio_backend_name}{seed}-{os.getpid()}")
        tally.runs += len(SHAPES) - 1


async def grow_and_fell(random: Random, token: str) -> None:
    before = own_children()
    engine = ProcessEngine(
        ["sh", "-c", "{task.description}"], env={"PROOF": token}, terminate_grace_seconds=random.choice([0, 0.05, 0.2])
    )
    assignments = [
        AgentAssignment(
            identity=AgentIdentity(id=f"a{number}"),
            task=Task(id=shape, description=program),
            timeout_seconds=random.choice([None, None, 0.1]),
        )
        for number, (shape, program) in enumerate(SHAPES.items())
    ]
    random.shuffle(assignments)
    group = ParallelExecutionGroup(group_id="g", assignments=assignments)
    with anyio.fail_after(60), anyio.move_on_after(random.uniform(0, 0.3)):
        await ParallelExecutor(engine=engine).execute_group(group)
    assert own_children() <= before, "a program is alive, or dead and not reaped"
    with anyio.fail_after(30):  # whoever adopted killed grandchildren reaps them in his own time
        while alive_with(token):
            await anyio.sleep(0.01)
