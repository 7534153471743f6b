"""Short ways to build groups for tests."""

from typing import Any

from parallel_agents import AgentAssignment, AgentIdentity, ParallelExecutionGroup, Task


def assignment(number: int, **fields: Any) -> AgentAssignment:
    """Return assignment *number*: agent ``a<number>`` on task ``t<number>``."""
    return AgentAssignment(identity=AgentIdentity(id=f"a{number}"), task=Task(id=f"t{number}"), **fields)


def group_of(count: int, *, each: dict[str, Any] | None = None, **options: Any) -> ParallelExecutionGroup:
    """Return a group of *count* assignments; *each* holds fields of every one, *options* those of the group."""
    assignments = [assignment(number, **(each or {})) for number in range(count)]
    return ParallelExecutionGroup(group_id="g", assignments=assignments, **options)
