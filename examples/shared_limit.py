"""Two groups at the same time, and one limit for both: at most three engine calls run at once."""

import anyio

from parallel_agents import AgentAssignment, AgentIdentity, ParallelExecutionGroup, ParallelExecutor, Task

running = 0
most = 0


async def agent(assignment: AgentAssignment) -> str:
    global running, most  # noqa: PLW0603 - an example may count in the open
    running += 1
    most = max(most, running)
    await anyio.sleep(0.005)
    running -= 1
    return assignment.task_id


async def main() -> None:
    limiter = anyio.CapacityLimiter(3)
    executor = ParallelExecutor(engine=agent, limiter=limiter)
    async with anyio.create_task_group() as tasks:
        for name in ("api", "docs"):
            work = [Task(id=str(number)) for number in range(20)]
            group = ParallelExecutionGroup.map(name, AgentIdentity(id=name), work, max_concurrency=10)
            tasks.start_soon(executor.execute_group, group)
    print("most at once:", most)


if __name__ == "__main__":
    anyio.run(main)
