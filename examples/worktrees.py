"""Four agents edit one repository at the same time, each in a worktree of its own; two want the same line."""

import subprocess
import tempfile
from pathlib import Path

import anyio

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    FunctionEngine,
    ParallelExecutionGroup,
    ParallelExecutor,
    Task,
)
from parallel_agents.engines.worktree import WorktreeEngine, working_folder

EDITS = {
    "greet": ("hello.txt", "Hello, Ada"),
    "part": ("bye.txt", "Bye"),
    "hush": ("hello.txt", ""),
    "add": ("new.txt", "!"),
}


def make_repository(folder: Path) -> None:
    subprocess.run(["git", "init", "-q", "-b", "main", folder], check=True)
    (folder / "hello.txt").write_text("Hello\n")
    name = ["-c", "user.name=Ada", "-c", "user.email=ada@example.com"]
    subprocess.run(["git", "-C", folder, "add", "."], check=True)
    subprocess.run(["git", "-C", folder, *name, "commit", "-qm", "Say hello"], check=True)


async def edit(assignment: AgentAssignment) -> None:
    folder = working_folder()
    assert folder is not None
    file, text = EDITS[assignment.task_id]
    async with await anyio.open_file(folder / file, "w") as stream:
        await stream.write(f"{text}\n")


async def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        repo = Path(name, "repo")
        make_repository(repo)
        engine = WorktreeEngine(FunctionEngine(edit), repo, merge_into="main")
        assignments = [AgentAssignment(identity=AgentIdentity(id=f"{task}er"), task=Task(id=task)) for task in EDITS]
        group = ParallelExecutionGroup(group_id="edits", assignments=assignments)
        result = await ParallelExecutor(engine=engine).execute_group(group)
        print(result.agents_succeeded, "merged")
        for outcome in result.outcomes:
            if not outcome.is_success:
                branch = engine.kept[outcome.task_id].branch
                print("not merged:", str(outcome.error).replace(branch, "agents/..."))
        print(*sorted([path.name async for path in anyio.Path(repo).glob("*.txt")]))


if __name__ == "__main__":
    anyio.run(main)
