"""Run a program per assignment: one does well, one says what is wrong with its exit code, one is stopped in time."""

import sys

import anyio

from parallel_agents import (
    AgentAssignment,
    AgentFailedError,
    AgentIdentity,
    ParallelExecutionGroup,
    ParallelExecutor,
    Task,
)
from parallel_agents.engines.process import ProcessEngine

PROGRAM = """
import sys, time
name, seconds = sys.argv[1], float(sys.argv[2])
time.sleep(seconds)
sys.exit("no such customer") if name == "nobody" else print("hello,", name)
"""


def greet(task_id: str, name: str, seconds: float, timeout_seconds: float | None = None) -> AgentAssignment:
    return AgentAssignment(
        identity=AgentIdentity(id=f"greeter of {task_id}"),
        task=Task(id=task_id, inputs={"name": name, "seconds": seconds}),
        timeout_seconds=timeout_seconds,
    )


async def main() -> None:
    engine = ProcessEngine([sys.executable, "-c", PROGRAM, "{task.inputs[name]}", "{task.inputs[seconds]}"])
    assignments = [greet("ok", "Ada", 0), greet("bad", "nobody", 0), greet("slow", "Grace", 60, timeout_seconds=0.5)]
    group = ParallelExecutionGroup(group_id="greetings", assignments=assignments, max_concurrency=3)
    result = await ParallelExecutor(engine=engine).execute_group(group)
    print("said:", result.outcome_of("ok").output, end="")
    try:
        result.raise_for_failures()
    except* AgentFailedError as failures:
        print(*failures.exceptions, sep="\n")


if __name__ == "__main__":
    anyio.run(main)
