"""Agents in git worktrees of their own: what is kept, what is merged, and that nothing is left over."""

import math
import os
import pickle
import signal
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from groups import assignment

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    AgentRunResult,
    FunctionEngine,
    OutcomeStatus,
    ParallelExecutionGroup,
    ParallelExecutor,
    Task,
    TerminationReason,
    Usage,
    current_run,
)
from parallel_agents.engines.process import ProcessEngine
from parallel_agents.engines.worktree import GitError, MergeConflictError, WorktreeEngine, _remove, working_folder

pytestmark = pytest.mark.anyio

Agent = Callable[[AgentAssignment], Awaitable[object]]


def run_git(folder: Path, *arguments: str) -> str:
    names = ["-c", "user.name=tester", "-c", "user.email=tester@example.invalid"]
    done = subprocess.run(["git", *names, "-C", folder, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    repo = tmp_path / "repo"
    (repo / "sub").mkdir(parents=True)
    run_git(repo, "init", "--quiet", "--initial-branch=main")
    (repo / "common.txt").write_text("as it was\n")
    (repo / "sub" / "deep.txt").write_text("deep\n")
    run_git(repo, "add", ".")
    run_git(repo, "commit", "--quiet", "-m", "first")
    return repo


def here() -> Path:
    folder = working_folder()
    assert folder is not None
    return folder


def branches(repo: Path) -> list[str]:
    return run_git(repo, "for-each-ref", "--format=%(refname:short)", "refs/heads").split()


def check_that_nothing_is_left(repo: Path, *expected_branches: str) -> None:
    assert len(run_git(repo, "worktree", "list").splitlines()) == 1
    assert list((repo.parent / "temporary").iterdir()) == []
    assert sorted(branches(repo)) == sorted(["main", *expected_branches])


async def run(engine: WorktreeEngine, count: int = 1, **options: Any) -> Any:
    group = ParallelExecutionGroup(group_id="g", assignments=[assignment(n) for n in range(count)], **options)
    with anyio.fail_after(60):
        return await ParallelExecutor(engine=engine).execute_group(group)


async def writes_its_own_file(task: AgentAssignment) -> str:
    (here() / f"{task.task_id}.txt").write_text(task.task_id)
    assert (here() / "common.txt").read_text() == "as it was\n"
    return task.task_id


async def test_each_agent_works_on_a_branch_of_its_own_and_its_work_is_committed(repo: Path) -> None:
    together = 0
    everybody = anyio.Event()

    async def agent(task: AgentAssignment) -> str:
        nonlocal together
        together += 1
        if together == 12:
            everybody.set()
        await everybody.wait()
        return await writes_its_own_file(task)

    engine = WorktreeEngine(FunctionEngine(agent), repo)
    result = await run(engine, 12)
    result.raise_for_failures()
    assert sorted(engine.kept) == sorted(f"t{n}" for n in range(12))
    for task_id, kept in engine.kept.items():
        assert run_git(repo, "show", f"{kept.branch}:{task_id}.txt") == task_id
        assert run_git(repo, "log", "-1", "--format=%an %s", kept.branch) == f"a{task_id[1:]} {task_id}"
        assert run_git(repo, "rev-parse", kept.branch) == kept.commit
        assert kept.merged_into is None
    assert not (repo / "t0.txt").exists()
    check_that_nothing_is_left(repo, *(kept.branch for kept in engine.kept.values()))
    assert working_folder() is None


async def test_the_work_is_merged_into_the_branch_that_is_checked_out_beside_what_is_not_committed(repo: Path) -> None:
    (repo / "sub" / "deep.txt").write_text("not committed\n")
    engine = WorktreeEngine(FunctionEngine(writes_its_own_file), repo, merge_into="main")
    (await run(engine, 4)).raise_for_failures()
    assert sorted(path.name for path in repo.glob("t*.txt")) == [f"t{n}.txt" for n in range(4)]
    assert (repo / "sub" / "deep.txt").read_text() == "not committed\n"
    assert run_git(repo, "status", "--porcelain") == "M sub/deep.txt"
    assert {kept.merged_into for kept in engine.kept.values()} == {"main"}
    check_that_nothing_is_left(repo)


async def test_a_branch_that_is_not_checked_out_can_get_the_work(repo: Path) -> None:
    run_git(repo, "branch", "results")
    engine = WorktreeEngine(FunctionEngine(writes_its_own_file), repo, merge_into="results")
    (await run(engine, 2)).raise_for_failures()
    assert run_git(repo, "show", "results:t1.txt") == "t1"
    assert run_git(repo, "status", "--porcelain") == ""
    check_that_nothing_is_left(repo, "results")


async def test_a_conflict_is_a_failure_that_names_the_files_and_keeps_the_work_and_the_usage(repo: Path) -> None:
    first_is_done = anyio.Event()

    async def agent(task: AgentAssignment) -> AgentRunResult[str]:
        if task.task_id == "t1":
            await first_is_done.wait()
        (here() / "common.txt").write_text(f"{task.task_id}\n")
        (here() / "sub" / "deep.txt").write_text(f"{task.task_id}\n")
        (here() / f"{task.task_id}.txt").write_text("")
        return AgentRunResult(
            task_id=task.task_id,
            agent_id=task.agent_id,
            termination_reason=TerminationReason.COMPLETED,
            usage=Usage(cost=3.0),
        )

    engine = WorktreeEngine(FunctionEngine(agent), repo, merge_into="main")
    group = ParallelExecutionGroup(group_id="g", assignments=[assignment(0), assignment(1)])
    with anyio.fail_after(60):
        async with ParallelExecutor(engine=engine).open_group(group) as open_run:
            async for outcome in open_run:
                first_is_done.set()
                assert outcome.usage.cost == 3.0
    failed = open_run.result.outcomes[1]
    assert failed.status is OutcomeStatus.FAILED
    kept = engine.kept["t1"]
    error = failed.exception
    assert isinstance(error, MergeConflictError)
    assert (error.files, error.target, error.branch) == (("common.txt", "sub/deep.txt"), "main", kept.branch)
    assert "common.txt, sub/deep.txt" in str(failed.error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert (repo / "common.txt").read_text() == "t0\n"
    assert not (repo / "t1.txt").exists()
    assert run_git(repo, "show", f"{kept.branch}:common.txt") == "t1"
    check_that_nothing_is_left(repo, kept.branch)


async def test_what_would_be_overwritten_is_not_and_the_work_is_kept(repo: Path) -> None:
    async def agent(task: AgentAssignment) -> None:
        (here() / "common.txt").write_text("by the agent\n")

    (repo / "common.txt").write_text("by the user, not committed\n")
    engine = WorktreeEngine(FunctionEngine(agent), repo, merge_into="main")
    result = await run(engine)
    assert isinstance(result.outcomes[0].exception, GitError)
    assert "common.txt" in result.outcomes[0].error
    assert engine.kept["t0"].branch in result.outcomes[0].error
    assert (repo / "common.txt").read_text() == "by the user, not committed\n"
    assert run_git(repo, "log", "--format=%s", "main") == "first"
    check_that_nothing_is_left(repo, engine.kept["t0"].branch)


@pytest.mark.parametrize("way", ["raises", "returns a failure", "times out", "is cancelled"])
async def test_what_is_not_finished_is_never_kept_nor_merged(repo: Path, way: str) -> None:
    started = anyio.Event()

    async def agent(task: AgentAssignment) -> AgentRunResult[None]:
        (here() / "common.txt").write_text("half")
        run_git(here(), "commit", "--quiet", "--all", "-m", "by the agent itself")
        started.set()
        if way == "raises":
            raise ValueError
        if way != "returns a failure":
            await anyio.sleep_forever()
        return AgentRunResult(
            task_id=task.task_id, agent_id=task.agent_id, termination_reason=TerminationReason.MAX_TURNS
        )

    engine = WorktreeEngine(FunctionEngine(agent), repo, merge_into="main")
    group = ParallelExecutionGroup(
        group_id="g", assignments=[assignment(0, timeout_seconds=0.01 if way == "times out" else None)]
    )
    with anyio.fail_after(60):
        async with ParallelExecutor(engine=engine).open_group(group) as open_run:
            if way == "is cancelled":
                await started.wait()
                open_run.cancel()
    assert not open_run.result.all_succeeded
    assert engine.kept == {}
    assert run_git(repo, "log", "--format=%s", "main") == "first"
    check_that_nothing_is_left(repo)


async def test_an_agent_that_changes_nothing_leaves_no_branch(repo: Path) -> None:
    async def agent(task: AgentAssignment) -> None:
        return None

    engine = WorktreeEngine(FunctionEngine(agent), repo, merge_into="main")
    (await run(engine)).raise_for_failures()
    assert engine.kept == {}
    assert run_git(repo, "log", "--format=%s", "main") == "first"
    check_that_nothing_is_left(repo)


async def test_work_that_an_agent_committed_by_itself_on_a_branch_of_its_choice_counts(repo: Path) -> None:
    async def agent(task: AgentAssignment) -> None:
        run_git(here(), "checkout", "--quiet", "-b", "elsewhere")
        (here() / "common.txt").write_text("done")
        run_git(here(), "commit", "--quiet", "--all", "-m", "by the agent itself")

    engine = WorktreeEngine(FunctionEngine(agent), repo, merge_into="main")
    (await run(engine)).raise_for_failures()
    assert (repo / "common.txt").read_text() == "done"
    check_that_nothing_is_left(repo, "elsewhere")


@pytest.mark.parametrize("task_id", ["a/../b", "-x", "line\nfeed", "x" * 10_000, "~^:?*[\\ {}@{", ".lock", "é\x1b[2J"])
async def test_any_task_id_makes_a_branch_and_a_commit(repo: Path, task_id: str) -> None:
    engine = WorktreeEngine(FunctionEngine(writes_a_file), repo, merge_into="main")
    item = AgentAssignment(identity=AgentIdentity(id=task_id, name=f"<{task_id}>"), task=Task(id=task_id))
    with anyio.fail_after(60):
        group = ParallelExecutionGroup(group_id="g", assignments=[item])
        (await ParallelExecutor(engine=engine).execute_group(group)).raise_for_failures()
    assert (repo / "new.txt").exists()
    check_that_nothing_is_left(repo)


async def writes_a_file(task: AgentAssignment) -> None:
    (here() / "new.txt").write_text("new")


async def test_a_program_runs_in_the_worktree_below_the_folder_that_was_given(repo: Path) -> None:
    code = "import pathlib; print(pathlib.Path.cwd()); pathlib.Path('new.txt').write_text('new')"
    for cwd, place in [(None, "sub"), ("..", "."), (str(repo.parent), None)]:
        engine = WorktreeEngine(
            ProcessEngine([sys.executable, "-c", code], cwd=cwd), repo / "sub", branch_prefix=f"x{place}/"
        )
        result = await run(engine)
        result.raise_for_failures()
        if place is None:
            assert engine.kept == {}
        else:
            kept = engine.kept["t0"]
            assert kept.branch.startswith(f"x{place}/t0-") or place == "."
            shown = run_git(repo, "show", "--name-only", "--format=", kept.branch)
            assert shown == os.path.normpath(f"{place}/new.txt")
            assert str(repo) not in str(result.outcomes[0].output)


@pytest.mark.parametrize("limits", [{"max_worktrees": 2}, {"max_bytes": 32}])
async def test_no_more_worktrees_than_the_limits_allow(repo: Path, limits: dict[str, Any]) -> None:
    """The files of the repository are 15 bytes together."""
    there = 0
    two = anyio.Event()

    async def agent(task: AgentAssignment) -> None:
        nonlocal there
        there += 1
        if there == 2:
            two.set()
        await two.wait()
        assert len(run_git(repo, "worktree", "list").splitlines()) <= 1 + 2

    result = await run(WorktreeEngine(FunctionEngine(agent), repo, **limits), 6)
    result.raise_for_failures()
    assert run_git(repo, "ls-tree", "-r", "-l", "HEAD").split()[3] == "10"


async def test_one_that_waits_for_room_can_be_cancelled_and_is_not_charged(repo: Path) -> None:
    started = anyio.Event()
    go_on = anyio.Event()
    ran: list[str] = []

    async def agent(task: AgentAssignment) -> None:
        ran.append(task.task_id)
        started.set()
        await go_on.wait()

    engine = WorktreeEngine(FunctionEngine(agent), repo, max_worktrees=1)
    group = ParallelExecutionGroup(group_id="g", assignments=[assignment(n, timeout_seconds=30) for n in range(3)])
    with anyio.fail_after(60):
        async with ParallelExecutor(engine=engine).open_group(group) as open_run:
            await started.wait()
            with anyio.fail_after(30):
                while any(call.waits == 0 for n, call in open_run._running.items() if f"t{n}" not in ran):
                    await anyio.to_thread.run_sync(lambda: None)
            deadlines = {f"t{n}": call.scope.deadline for n, call in open_run._running.items()}
            assert {task_id for task_id, deadline in deadlines.items() if deadline < math.inf} == set(ran)
            waiting = next(task_id for task_id in deadlines if task_id not in ran)
            assert open_run.cancel_task(waiting)
            go_on.set()
    assert waiting not in ran
    for outcome in open_run.result.outcomes:
        cancelled = outcome.task_id == waiting
        assert outcome.status is (OutcomeStatus.CANCELLED if cancelled else OutcomeStatus.SUCCEEDED)
    check_that_nothing_is_left(repo)


async def test_a_worktree_that_is_too_large_or_a_branch_that_is_not_there_is_said_before_an_agent_runs(
    repo: Path,
) -> None:
    ran: list[str] = []

    async def agent(task: AgentAssignment) -> None:
        ran.append(task.task_id)

    for options, said in [
        ({"max_bytes": 14}, "15 bytes, more than max_bytes=14"),
        ({"merge_into": "nowhere"}, "git rev-parse"),
        ({"base": "nowhere"}, "git rev-parse"),
        ({"base": "--help"}, "git rev-parse"),
    ]:
        result = await run(WorktreeEngine(FunctionEngine(agent), repo, **options))  # type: ignore[arg-type]
        assert result.outcomes[0].status is OutcomeStatus.FAILED
        assert said in result.outcomes[0].error
    assert ran == []
    check_that_nothing_is_left(repo)


async def test_files_that_resist_are_taken_away_all_the_same(repo: Path) -> None:
    async def agent(task: AgentAssignment) -> None:
        folder = here() / "locked"
        folder.mkdir()
        (folder / "file").touch()
        (folder / "link").symlink_to("/")
        folder.chmod(0o500)
        if task.task_id == "t1":
            subprocess.run(["rm", "-rf", here()], check=False, cwd="/")
        raise ValueError

    await run(WorktreeEngine(FunctionEngine(agent), repo), 2)
    check_that_nothing_is_left(repo)


def test_only_a_worktree_itself_is_opened_up_to_be_removed(folder_of_nobody: Path) -> None:
    outside = folder_of_nobody / "outside"
    outside.mkdir()
    outside.chmod(0o500)
    worktree = folder_of_nobody / "worktree"
    (worktree / "a" / "b").mkdir(parents=True)
    (worktree / "a" / "b" / "file").touch()
    (worktree / "a" / "link").symlink_to(outside)
    for folder in (worktree / "a" / "b", worktree / "a", worktree):
        folder.chmod(0)
    folder_of_nobody.chmod(0o750)
    _remove(worktree)
    assert list(folder_of_nobody.iterdir()) == [outside]
    _remove(worktree)  # is gone already
    assert stat.S_IMODE(outside.stat().st_mode) == 0o500
    assert stat.S_IMODE(folder_of_nobody.stat().st_mode) == 0o750


async def test_what_a_killed_process_left_is_swept_up_and_what_a_living_one_has_is_not(repo: Path) -> None:
    program = f"""
import anyio, sys, tempfile
sys.path[:0] = {[path for path in sys.path if path]!r}
tempfile.tempdir = {str(repo.parent / "temporary")!r}
from parallel_agents import *
from parallel_agents.engines.worktree import WorktreeEngine

async def agent(task):
    print("started", flush=True)
    await anyio.sleep_forever()

group = ParallelExecutionGroup(
    group_id="g", assignments=[AgentAssignment(identity=AgentIdentity(id="a"), task=Task(id="killed"))]
)
engine = WorktreeEngine(FunctionEngine(agent), {str(repo)!r})
anyio.run(ParallelExecutor(engine=engine).execute_group, group)
"""
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        assert len(branches(repo)) == 3
        (await run(WorktreeEngine(FunctionEngine(writes_a_file), repo, merge_into="main"))).raise_for_failures()
        assert len(branches(repo)) == 2
        assert len(run_git(repo, "worktree", "list").splitlines()) == 2
        processes[1].send_signal(signal.SIGINT)
        processes[1].wait()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    check_that_nothing_is_left(repo)


async def test_the_inner_engine_checks_and_the_repository_must_be_there(repo: Path) -> None:
    class Picky(FunctionEngine):
        def check(self, assignment: AgentAssignment) -> None:
            raise ValueError("not this one")

    with pytest.raises(ValueError, match="not this one"):
        WorktreeEngine(Picky(writes_a_file), repo).check(assignment(0))
    WorktreeEngine(FunctionEngine(writes_a_file), repo / "sub").check(assignment(0))
    with pytest.raises(ValueError, match="is not in a git repository"):
        WorktreeEngine(FunctionEngine(writes_a_file), "/").check(assignment(0))
    with pytest.raises(TypeError, match="inner must be an engine"):
        WorktreeEngine(writes_a_file, repo)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_worktrees"):
        WorktreeEngine(FunctionEngine(writes_a_file), repo, max_worktrees=0)
    assert repr(WorktreeEngine(FunctionEngine(writes_a_file), repo)).startswith("WorktreeEngine(FunctionEngine(")


async def test_a_result_of_a_wrong_type_is_left_to_the_executor(repo: Path) -> None:
    class Wrong:
        async def run(self, assignment: AgentAssignment, /) -> Any:
            current_run().record_usage(Usage(cost=1))
            (here() / "new.txt").write_text("new")
            return "text"

    result = await run(WorktreeEngine(Wrong(), repo, merge_into="main"))
    assert "instead of an AgentRunResult" in result.outcomes[0].error
    check_that_nothing_is_left(repo)


def test_an_engine_made_at_import_time_works_on_one_backend_after_the_other(repo: Path) -> None:
    pytest.importorskip("trio")
    engine = WorktreeEngine(FunctionEngine(writes_its_own_file), repo, max_worktrees=2)
    for backend in ("asyncio", "trio", "asyncio"):
        result = anyio.run(lambda: run(engine, 3), backend=backend)
        result.raise_for_failures()


async def test_without_git_it_says_what_to_install(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(repo))
    result = await run(WorktreeEngine(FunctionEngine(writes_a_file), repo))
    assert "needs git: install it" in result.outcomes[0].error
