"""Pictures of what depends on what: a tree for a terminal, Mermaid and DOT for others. Pure; knows no files."""

from collections.abc import Iterator, Sequence

from ._models import AgentAssignment


def tree_lines(assignments: Sequence[AgentAssignment]) -> Iterator[tuple[str, str, str]]:
    """Yield a line for each task below each that it depends on: what is drawn before its id, the id, and a remark.

    Tasks that depend on nothing come first, in their order. What depends on a task is drawn once; where the task comes
    again, a remark says so.
    """
    dependents: dict[str, list[str]] = {a.task_id: [] for a in assignments}
    for assignment in assignments:
        for name in assignment.task.depends_on:
            dependents[name].append(assignment.task_id)
    drawn: set[str] = set()
    roots = [a.task_id for a in assignments if not a.task.depends_on]
    waiting = [("", "", name) for name in reversed(roots)]
    while waiting:
        indent, branch, name = waiting.pop()
        below = dependents[name]
        yield indent + branch, name, "(see above)" if name in drawn and below else ""
        if name not in drawn:
            drawn.add(name)
            further = indent + {"": "", "├── ": "│   ", "└── ": "    "}[branch]
            branches = ["├── "] * (len(below) - 1) + ["└── "] * bool(below)
            waiting += [(further, *pair) for pair in reversed(list(zip(branches, below, strict=True)))]


def mermaid(assignments: Sequence[AgentAssignment]) -> str:
    """Return the graph as a Mermaid flowchart; arrows lead from a task to those that depend on it."""
    numbers = {a.task_id: f"t{number}" for number, a in enumerate(assignments)}
    lines = ["flowchart TD"]
    lines += [f'    {number}["{_for_mermaid(name)}"]' for name, number in numbers.items()]
    lines += [f"    {numbers[name]} --> {numbers[a.task_id]}" for a in assignments for name in a.task.depends_on]
    return "\n".join(lines)


def dot(assignments: Sequence[AgentAssignment]) -> str:
    """Return the graph in the DOT language; arrows lead from a task to those that depend on it."""
    lines = ["digraph plan {"]
    lines += [f"    {_for_dot(a.task_id)};" for a in assignments]
    lines += [f"    {_for_dot(name)} -> {_for_dot(a.task_id)};" for a in assignments for name in a.task.depends_on]
    return "\n".join([*lines, "}"])


def _for_mermaid(text: str) -> str:
    return "".join(c if c.isalnum() or c in " -_./" else f"#{ord(c)};" for c in text)


def _for_dot(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else " " for c in escaped) + '"'
