"""Random groups against a small reference model."""

from collections import Counter

import pytest

from parallel_agents import OutcomeStatus
from parallel_agents.testing.stepping import Backend, installed_backends, run_in_virtual_time
from proof.random_groups import History, plan_of
from proof.reference import judge
from proof.tally import Proof


@pytest.mark.proves("X1", "X2", "X3", "X4", "X5", "X9", "X10", "X11", "X14", "X15", "X17", "L2", "L3", "S1", "V1")
@pytest.mark.parametrize("backend", installed_backends())
def test_random_groups_end_as_the_model_says(backend: Backend, proof: Proof) -> None:
    tally = proof.tally("random groups against a reference model")
    seen: Counter[OutcomeStatus] = Counter()
    first = proof.seed * 1_000_000
    for seed in range(first, first + proof.size(few=60, short=400, long=11_800)):
        plan = plan_of(seed)
        if not plan.has_end:
            continue
        with tally.run(backend, f"plan_of({seed})"):
            history = History(plan)
            run_in_virtual_time(history.happen, backend, seed=seed)
            judge(history)
            if history.handle is not None and history.refused is None:
                seen.update(outcome.status for outcome in history.result.outcomes)
    assert set(seen) == set(OutcomeStatus), "some outcomes were never seen: the groups prove too little"
