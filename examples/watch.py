"""Watch a group while it runs, and stop it when enough is known."""

import anyio

from parallel_agents import AgentAssignment, AgentIdentity, ParallelExecutionGroup, ParallelExecutor, Task


async def guess(assignment: AgentAssignment) -> int:
    await anyio.sleep(0.001)
    return int(assignment.task_id) ** 2


async def main() -> None:
    tasks = [Task(id=str(number)) for number in range(100)]
    group = ParallelExecutionGroup.map("guess", AgentIdentity(id="guesser"), tasks, max_concurrency=1)
    async with ParallelExecutor(engine=guess).open_group(group) as run:
        async for outcome in run:  # in order of completion
            print(outcome.task_id, "->", outcome.output)
            if outcome.output == 9:
                run.cancel()
                break
    print("stopped in time:", run.result.agents_succeeded < 100)
    print(len(run.result.outcomes), "outcomes")


if __name__ == "__main__":
    anyio.run(main)
