"""What a language model is asked when nobody says otherwise: the task, its inputs, and what it depends on."""

import json
from collections.abc import Iterable

from .._context import RunContext
from .._models import AgentAssignment
from ..serialization import plain_json


def task_text(assignment: AgentAssignment, left_out: Iterable[str] = ()) -> str:
    """Return the task's description, or else its title, and below it the inputs as JSON but for those *left_out*."""
    task = assignment.task
    inputs = {name: value for name, value in task.inputs.items() if name not in left_out}
    return joined([task.description or task.title, as_text(inputs) if inputs else ""])


def upstream_text(run: RunContext) -> str:
    """Return what the tasks that this one depends on have returned."""
    return joined(f"Result of {task_id}:\n{as_text(outcome.output)}" for task_id, outcome in run.upstream.items())


def joined(parts: Iterable[str]) -> str:
    """Put paragraphs together, without those that are empty."""
    return "\n\n".join(part for part in parts if part)


def as_text(value: object) -> str:
    """Return text as it is, and anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(plain_json(value), ensure_ascii=False)
