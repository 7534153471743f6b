"""An engine that wraps an engine: it tells how long each agent took, whatever became of it.

Anything that changes how one agent runs is written like this: retries, a rate limit, a cache.
"""

import anyio

from parallel_agents import (
    AgentAssignment,
    AgentEngine,
    AgentIdentity,
    AgentRunResult,
    FunctionEngine,
    ParallelExecutionGroup,
    ParallelExecutor,
    Task,
    Usage,
    current_run,
)


class TimedEngine:
    """Runs another engine and notes the time of each call."""

    def __init__(self, inner: AgentEngine) -> None:
        self._inner = inner
        self.seconds: dict[str, float] = {}

    async def run(self, assignment: AgentAssignment, /) -> AgentRunResult[object]:
        """Run the other engine; whatever it does is what this one does."""
        started = anyio.current_time()
        try:
            return await self._inner.run(assignment)
        finally:  # also when the agent fails or is cancelled; there is no await here, so nothing to shield
            self.seconds[assignment.task_id] = anyio.current_time() - started


async def translate(assignment: AgentAssignment) -> str:
    await anyio.sleep(0.01)
    current_run().record_usage(Usage(input_tokens=len(assignment.task.description), requests=1))  # kept, come what may
    if not assignment.task.description:
        raise ValueError("there is nothing to translate")
    return assignment.task.description.upper()


async def main() -> None:
    engine = TimedEngine(FunctionEngine(translate))
    tasks = [Task(id="one", description="a word"), Task(id="two", description="another word"), Task(id="three")]
    group = ParallelExecutionGroup.map("translate", AgentIdentity(id="translator"), tasks)
    result = await ParallelExecutor(engine=engine).execute_group(group)
    for outcome in result.outcomes:
        print(outcome.task_id, outcome.status, outcome.output or outcome.error)
    print("timed:", ", ".join(sorted(engine.seconds)))
    print("tokens read:", result.total_usage.input_tokens)


if __name__ == "__main__":
    anyio.run(main)
