"""Stop a program that runs agents without losing what they did: press Ctrl-C, or wait, as it then stops by itself.

Agents that run look at ``shutdown_requested`` and finish early; those that have not started never start; the result is
complete.
"""

import anyio

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    CooperativeTimeout,
    ParallelExecutionGroup,
    ParallelExecutor,
    ShutdownManager,
    Task,
    current_run,
)

manager = ShutdownManager(CooperativeTimeout(grace_seconds=5))


async def count(_assignment: AgentAssignment) -> str:
    for step in range(10_000):
        if current_run().shutdown_requested:
            return f"stopped early, after {'some' if step else 'no'} steps"
        await anyio.sleep(0.001)
    return "counted to the end"


async def main() -> None:
    tasks = [Task(id=str(number)) for number in range(6)]
    group = ParallelExecutionGroup.map("count", AgentIdentity(id="counter"), tasks, max_concurrency=2)
    manager.register_cleanup(lambda: print("cleaning up"))
    executor = ParallelExecutor(engine=count, shutdown_manager=manager)
    async with manager.handle_signals(), anyio.create_task_group() as background:
        background.start_soon(ask_to_stop_after, 0.1)
        result = await executor.execute_group(group)
        background.cancel_scope.cancel()
    for outcome in result.outcomes:
        print(outcome.task_id, outcome.status, "-", outcome.output or outcome.error)


async def ask_to_stop_after(seconds: float) -> None:
    await anyio.sleep(seconds)
    manager.request_shutdown()


if __name__ == "__main__":
    anyio.run(main)
