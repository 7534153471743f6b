"""Trees of groups in groups that share one limiter, up to the depth that is allowed, with agents that fail and hang."""

from collections.abc import Iterator
from itertools import count
from random import Random

import anyio
import pytest
from attrs import define, field
from scenarios import check_events

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    OutcomeStatus,
    ParallelAgentsError,
    ParallelEvent,
    ParallelExecutionGroup,
    ParallelExecutionResult,
    ParallelExecutor,
    Task,
)
from parallel_agents.testing.stepping import Backend, installed_backends, run_in_virtual_time
from proof.tally import Proof

DEEPEST = 32


@define(eq=False)
class Tree:
    """Groups inside agents, so many in all, of which each agent opens some more while there are any left."""

    groups: int
    tokens: int
    random: Random
    opened: int = 0
    deepest_seen: int = 0
    working: int = 0
    peak: int = 0
    refused: int = 0
    limiter: anyio.CapacityLimiter = field(init=False)
    executor: ParallelExecutor = field(init=False)
    events: list[ParallelEvent] = field(factory=list)
    numbers: Iterator[int] = field(factory=count)

    def on_event(self, event: ParallelEvent, /) -> None:
        self.events.append(event)

    async def agent(self, of: AgentAssignment) -> int:
        """Return how many agents worked below."""
        depth = int(str(of.task.inputs["depth"]))
        if self.opened < self.groups and self.random.random() < 0.9:
            return await self._open(depth + 1)
        self.working += 1
        self.peak = max(self.peak, self.working)
        try:
            await anyio.sleep(self.random.choice([0, 0.5, 1]))
        finally:
            self.working -= 1
        return 1

    async def _open(self, depth: int) -> int:
        self.opened += 1
        self.deepest_seen = max(self.deepest_seen, depth)
        number = next(self.numbers)
        tasks = [Task(id=f"{number}.{n}", inputs={"depth": depth}) for n in range(self.random.randint(1, 3))]
        group = ParallelExecutionGroup.map(
            f"g{number}", AgentIdentity(id="a"), tasks, max_concurrency=self.random.choice([None, 1, 2])
        )
        try:
            result: ParallelExecutionResult[int] = await self.executor.execute_group(group)
        except ParallelAgentsError:
            assert depth > DEEPEST
            self.refused += 1
            return 0
        assert [outcome.task_id for outcome in result.outcomes] == [task.id for task in tasks]
        assert {outcome.status for outcome in result.outcomes} == {OutcomeStatus.SUCCEEDED}
        return sum(outcome.output or 0 for outcome in result.outcomes)

    async def grow(self) -> None:
        self.limiter = anyio.CapacityLimiter(self.tokens)
        self.executor = ParallelExecutor(engine=self.agent, limiter=self.limiter, observers=[self])
        with anyio.fail_after(10_000):
            while self.opened < self.groups:
                assert await self._open(1) > 0

    def check(self) -> None:
        assert self.limiter.borrowed_tokens == 0
        assert self.limiter.statistics().tasks_waiting == 0
        assert self.working == 0
        assert self.peak <= self.tokens
        check_events(self.events)
        assert bool(self.refused) == (self.deepest_seen > DEEPEST)


@pytest.mark.proves("X1", "X5", "X11", "X17")
@pytest.mark.parametrize("backend", installed_backends())
@pytest.mark.parametrize("tokens", [1, 3])
def test_trees_of_groups_on_one_limiter_end_and_keep_to_it(backend: Backend, tokens: int, proof: Proof) -> None:
    tally = proof.tally("nested groups on one limiter")
    groups = proof.size(few=20, short=100, long=1_000)
    for seed in range(proof.seed, proof.seed + proof.size(few=1, short=3, long=20)):
        with tally.run(backend, f"{groups} groups on {tokens} tokens", f"seed {seed}"):
            tree = Tree(groups, tokens, Random(seed))
            run_in_virtual_time(tree.grow, backend, seed=seed)
            tree.check()
            assert tree.opened >= groups
    tally.remarks = [f"{groups} groups in each tree"]
