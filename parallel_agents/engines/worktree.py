"""WorktreeEngine: each agent works in a git worktree and on a branch of its own.

Owns the worktrees: how many there are, how they are made, kept and taken away. Git's own locks fail instead of waiting,
so everything that changes the repository is done by one agent at a time. Knows nothing of what an agent does in there.
"""

import hashlib
import math
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar
from attrs import evolve, field, frozen
from attrs.validators import optional

from .._checks import integer, not_blank
from .._context import RunContext, current_run
from .._errors import ParallelAgentsError
from .._models import AgentAssignment
from .._outcomes import AgentRunResult
from ._git import GitError, git
from ._metering import Meter
from ._protocol import AgentEngine, check_with, require_engine
from ._workspace import _folder, working_folder

if sys.platform != "win32":
    import fcntl

__all__ = ["GitError", "KeptBranch", "MergeConflictError", "WorktreeEngine", "working_folder"]

CLEANUP_SECONDS = 30.0
"""How long taking a worktree away may take; what is left then is taken away with the next one."""

LOCK_POLL_SECONDS = 0.02
"""How often another process that changes the repository is asked whether it is done."""

_FOLDER_PREFIX = "parallel-agents-worktree-"
_ALIVE = "alive"


class MergeConflictError(ParallelAgentsError):
    """An agent's work cannot be merged; it is kept on its branch.

    Attributes:
        branch: Where its work is.
        target: What it was to be merged into.
        files: What both changed, sorted.
    """

    def __init__(self, branch: str, target: str, files: tuple[str, ...]) -> None:
        super().__init__(branch, target, files)
        self.branch = branch
        self.target = target
        self.files = files

    def __str__(self) -> str:
        files = ", ".join(self.files)
        return f"conflicts with {self.target!r} in {files}. The work is on branch {self.branch!r}: merge it by hand"


@frozen(kw_only=True)
class KeptBranch:
    """What an agent left.

    Attributes:
        branch: Its branch; gone if it was merged.
        commit: The last commit on it.
        merged_into: The branch that has it, if it was merged.
    """

    branch: str
    commit: str
    merged_into: str | None = None


@frozen(kw_only=True)
class _Options:
    base: str = field(validator=not_blank)
    merge_into: str | None = field(validator=optional(not_blank))
    branch_prefix: str = field(validator=not_blank)
    max_worktrees: int | None = field(validator=optional(integer(at_least=1)))
    max_bytes: int | None = field(validator=optional(integer(at_least=1)))


@frozen
class _Worktree:
    """A worktree that exists: where, on which branch, made from which commit."""

    path: Path
    branch: str
    base: str


class _Room:
    """How many worktrees of one engine there are in one event loop, and how large they are."""

    def __init__(self) -> None:
        self.changed = anyio.Condition()
        self.worktrees = 0
        self.bytes = 0


class _Repository:
    """A repository as all engines of one event loop share it."""

    def __init__(self, top: Path, common: Path) -> None:
        self.top = top
        self._lock_file = common / "parallel-agents.lock"
        self._lock = anyio.Lock()
        self.is_swept = False

    @asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """Change the repository for the length of the block, with no other agent of any process beside."""
        async with self._lock:
            file = os.open(self._lock_file, os.O_CREAT | os.O_RDWR, 0o600)
            try:
                while not _lock_now(file):  # noqa: ASYNC110 - no event tells of another process
                    await anyio.sleep(LOCK_POLL_SECONDS)
                yield
            finally:
                os.close(file)


_repositories: RunVar[dict[Path, _Repository]] = RunVar("parallel_agents_repositories")


class WorktreeEngine:
    """Runs each agent in a git worktree of its own, and keeps what the successful ones did.

    The inner engine finds its folder through ``working_folder()``; ``ProcessEngine`` runs its program there. After a
    successful result all that the agent changed is committed on its branch. With *merge_into* it is then merged, one
    after another in the order in which agents end; a conflict makes that agent's outcome a failure that names the
    files, and its branch stays. Without *merge_into* the branches stay: see ``kept``. What a failed or cancelled agent
    did is thrown away with its worktree, which is taken away on every path; those of a process that was killed are
    taken away by the next engine that works on the repository.

    The files that the user has checked out are touched by a merge only if *merge_into* is checked out there, and then
    only as ``git merge --ff-only`` does it, which refuses to overwrite what is not committed. Hooks are not run.
    Submodules and ignored files are not there in a worktree. Waiting for room is not charged to an agent's timeout.
    May be made outside an event loop, and used on one after another.

    Args:
        inner: What runs an agent.
        repo: The repository, or a folder in it: then agents work in the same folder of their worktree.
        base: What worktrees start from: a branch, tag or commit; looked up for each agent.
        merge_into: An existing branch that gets the work of successful agents; ``None`` leaves it on their branches.
        branch_prefix: What the names of the branches start with.
        max_worktrees: The most worktrees at the same time; agents wait for room.
        max_bytes: The most bytes of all worktrees at the same time, as git checks them out; agents wait for room.

    Raises:
        TypeError: *inner* is no engine, or something else is of the wrong type.
        ValueError: A number is out of its range, or a name is blank.
    """

    def __init__(
        self,
        inner: AgentEngine,
        repo: str | os.PathLike[str],
        *,
        base: str = "HEAD",
        merge_into: str | None = None,
        branch_prefix: str = "agents/",
        max_worktrees: int | None = None,
        max_bytes: int | None = None,
    ) -> None:
        require_engine("inner", inner)
        self._inner = inner
        self._repo = Path(repo).absolute()
        self._options = _Options(
            base=base,
            merge_into=merge_into,
            branch_prefix=branch_prefix,
            max_worktrees=max_worktrees,
            max_bytes=max_bytes,
        )
        self._rooms: RunVar[_Room] = RunVar("parallel_agents_worktrees")
        self._kept: dict[str, KeptBranch] = {}

    def __repr__(self) -> str:
        return f"WorktreeEngine({self._inner!r}, {str(self._repo)!r})"

    @property
    def kept(self) -> Mapping[str, KeptBranch]:
        """What agents left, by the id of their task; a later run of a task replaces an earlier one."""
        return MappingProxyType(self._kept)

    def check(self, assignment: AgentAssignment, /) -> None:
        """Refuse what the inner engine refuses.

        Raises:
            ValueError: As the inner engine does, or because there is no repository.
        """
        if not any((folder / ".git").exists() for folder in (self._repo, *self._repo.parents)):
            raise ValueError(f"repo {str(self._repo)!r} is not in a git repository")
        check_with(self._inner, assignment)

    async def run(self, assignment: AgentAssignment, /) -> AgentRunResult[Any]:
        """Make a worktree, run the inner engine in it, keep what it did if it succeeded, and take the worktree away.

        Waits for room. Cancelling takes the worktree away before the cancellation goes on.

        Raises:
            MergeConflictError: If the work cannot be merged; the usage is kept.
            GitError: If git refuses something else.
        """
        run = current_run()
        options = self._options
        repository = await self._repository()
        top = repository.top
        base = await git(self._repo, "rev-parse", "--verify", "--end-of-options", f"{options.base}^{{commit}}")
        if options.merge_into is not None:  # said before anything is spent
            await git(top, "rev-parse", "--verify", "--end-of-options", f"refs/heads/{options.merge_into}^{{commit}}")
        size = 0 if options.max_bytes is None else await _size_of(top, base)
        async with self._room(run, size), self._worktree(repository, run, base) as worktree:
            token = _folder.set(worktree.path / self._repo.resolve().relative_to(top))
            meter = Meter(run)
            try:
                result = await self._inner.run(assignment)
            finally:
                _folder.reset(token)
            if _is_success(result):
                try:
                    await self._keep(repository, worktree, assignment)
                except ParallelAgentsError:
                    meter.record(result)
                    raise
            return result

    async def _repository(self) -> _Repository:
        top = Path(await git(self._repo, "rev-parse", "--show-toplevel"))
        common = Path(await git(self._repo, "rev-parse", "--path-format=absolute", "--git-common-dir"))
        known = _repositories.get(None)
        if known is None:
            known = {}
            _repositories.set(known)
        return known.setdefault(common, _Repository(top, common))

    @asynccontextmanager
    async def _room(self, run: RunContext, size: int) -> AsyncIterator[None]:
        """Wait until one more worktree may be there, and count it for the length of the block."""
        most, most_bytes = self._options.max_worktrees or math.inf, self._options.max_bytes or math.inf
        if size > most_bytes:
            raise GitError("worktree add", f"a worktree takes {size} bytes, more than max_bytes={most_bytes}")
        room = self._rooms.get(None)
        if room is None:
            room = _Room()
            self._rooms.set(room)
        with run.not_charged():
            async with room.changed:
                while room.worktrees >= most or room.bytes + size > most_bytes:
                    await room.changed.wait()
                room.worktrees += 1
                room.bytes += size
        try:
            yield
        finally:
            room.worktrees -= 1
            room.bytes -= size
            with anyio.CancelScope(shield=True):  # nobody holds the condition's lock for longer than a step
                async with room.changed:
                    room.changed.notify_all()

    @asynccontextmanager
    async def _worktree(self, repository: _Repository, run: RunContext, base: str) -> AsyncIterator[_Worktree]:
        """Make a worktree for the length of the block."""
        top = repository.top
        folder = _new_folder()
        worktree = _Worktree(folder / top.name, self._new_branch(run), base)
        alive = _stay_alive(folder)
        try:
            with run.not_charged():
                async with repository.changing():
                    if not repository.is_swept:
                        await _sweep(top)
                        repository.is_swept = True
                    path = str(worktree.path)
                    await git(top, "worktree", "add", "--quiet", "-b", worktree.branch, path, base)
            yield worktree
        finally:
            # What fails here must not hide how the agent ended; the next engine sweeps up what is left.
            with anyio.move_on_after(CLEANUP_SECONDS, shield=True), suppress(GitError):
                async with repository.changing():
                    await _take_away(top, worktree.path)
                    if worktree.branch not in self._branches():
                        await git(top, "branch", "--quiet", "-D", worktree.branch, ok=(0, 1))
            os.close(alive)

    def _branches(self) -> set[str]:
        return {kept.branch for kept in self._kept.values() if kept.merged_into is None}

    def _new_branch(self, run: RunContext) -> str:
        task_id = run.assignment.task_id
        words = re.sub(r"[^A-Za-z0-9]+", "-", task_id)[:40].strip("-")
        digest = hashlib.sha256(f"{run.group_id}\0{task_id}".encode("utf-8", "surrogatepass")).hexdigest()
        return f"{self._options.branch_prefix}{words or 'task'}-{digest[:6]}-{secrets.token_hex(3)}"

    async def _keep(self, repository: _Repository, worktree: _Worktree, assignment: AgentAssignment) -> None:
        """Commit what is in a worktree, and merge it if that is wanted; nothing is kept where nothing was changed."""
        author = {
            "GIT_AUTHOR_NAME": _one_line(assignment.identity.name) or "agent",
            "GIT_AUTHOR_EMAIL": "agent@parallel-agents.invalid",
            "GIT_COMMITTER_NAME": "parallel_agents",
            "GIT_COMMITTER_EMAIL": "agent@parallel-agents.invalid",
        }
        title = _one_line(assignment.task.title) or _one_line(assignment.task_id) or "task"
        await git(worktree.path, "add", "--all")
        if await git(worktree.path, "status", "--porcelain"):
            await git(worktree.path, "commit", "--quiet", "--message", title, env=author)
        commit = await git(worktree.path, "rev-parse", "HEAD")
        if commit == worktree.base:
            return
        # The agent may have worked on another branch.
        await git(repository.top, "update-ref", f"refs/heads/{worktree.branch}", commit)
        kept = self._kept[assignment.task_id] = KeptBranch(branch=worktree.branch, commit=commit)
        if self._options.merge_into is not None:
            async with repository.changing():
                await _merge(repository.top, kept, self._options.merge_into, title, author)
            self._kept[assignment.task_id] = evolve(kept, merged_into=self._options.merge_into)


def _is_success(result: object) -> bool:
    return isinstance(result, AgentRunResult) and result.is_success


async def _merge(top: Path, kept: KeptBranch, target: str, title: str, author: Mapping[str, str]) -> None:
    """Merge a branch without anybody's worktree, and then bring the one that has the target checked out along."""
    old = await git(top, "rev-parse", "--verify", "--end-of-options", f"refs/heads/{target}^{{commit}}")
    how = ("--write-tree", "--name-only", "--no-messages", "-z")
    said = await git(top, "merge-tree", *how, old, kept.commit, ok=(0, 1))
    tree, *files = said.split("\0")
    if files := sorted({file for file in files if file}):
        raise MergeConflictError(kept.branch, target, tuple(files))
    merged = await git(top, "commit-tree", tree, "-p", old, "-p", kept.commit, "-m", f"Merge {title}", env=author)
    checked_out = await _worktree_of(top, target)
    if checked_out is None:
        await git(top, "update-ref", f"refs/heads/{target}", merged, old)
    else:
        try:
            await git(checked_out, "merge", "--quiet", "--ff-only", merged)
        except GitError as error:
            raise GitError("merge", f"{error.said} The work is on branch {kept.branch!r}: merge it by hand") from error


async def _worktree_of(top: Path, branch: str) -> Path | None:
    """Return the worktree in which a branch is checked out, if there is one."""
    return next((path for path, head in await _worktrees(top) if head == f"refs/heads/{branch}"), None)


async def _worktrees(top: Path) -> list[tuple[Path, str]]:
    """Return the worktrees of a repository, with the branch that each has checked out, or nothing."""
    found = []
    for block in (await git(top, "worktree", "list", "--porcelain", "-z")).split("\0\0"):
        facts: dict[str, str] = {}
        for line in block.strip("\0").split("\0"):
            name, _, value = line.partition(" ")
            facts[name] = value
        if "worktree" in facts:
            found.append((Path(facts["worktree"]), facts.get("branch", "")))
    return found


async def _size_of(top: Path, commit: str) -> int:
    """Return the bytes of all files of a commit."""
    listed = await git(top, "ls-tree", "-r", "-l", "-z", commit)
    sizes = (entry.split(None, 4)[3] for entry in listed.split("\0") if entry)
    return sum(int(size) for size in sizes if size.isdigit())


async def _take_away(top: Path, path: Path) -> None:
    """Remove a worktree with its folder, whatever is in there and whatever of it is there."""
    await anyio.to_thread.run_sync(_remove, path.parent)
    await git(top, "worktree", "prune", "--expire", "now")


def _remove(folder: Path) -> None:
    """Remove a folder with all in it, also what its owner may not change."""
    try:
        shutil.rmtree(folder)
    except OSError:
        _allow_changes(folder)
        for parent, names, _ in os.walk(folder):  # looks into a folder after its parent's turn
            for name in names:
                _allow_changes(Path(parent, name))
        shutil.rmtree(folder, ignore_errors=True)


def _allow_changes(folder: Path) -> None:
    if not folder.is_symlink():  # may lead out of the worktree
        with suppress(OSError):
            folder.chmod(stat.S_IRWXU)


async def _sweep(top: Path) -> None:
    """Take away the worktrees of processes that ended without doing so, with branches that have nothing on them."""
    for path, branch in await _worktrees(top):
        if path.parent.name.startswith(_FOLDER_PREFIX) and not _is_alive(path.parent):
            await _take_away(top, path)
            if branch:
                await git(top, "branch", "--quiet", "-d", branch.removeprefix("refs/heads/"), ok=(0, 1))


def _new_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX)).resolve()


def _stay_alive(folder: Path) -> int:
    """Hold a lock in a folder for as long as this process lives; return the file, which keeps it."""
    file = os.open(folder / _ALIVE, os.O_CREAT | os.O_RDWR, 0o600)
    _lock_now(file)
    return file


def _is_alive(folder: Path) -> bool:
    try:
        file = os.open(folder / _ALIVE, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _lock_now(file)
    finally:
        os.close(file)


def _lock_now(file: int) -> bool:
    """Lock an open file until it is closed, also by the end of this process; return whether that was possible."""
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _one_line(text: str) -> str:
    """Return text for a commit: printable, one line, not long."""
    return " ".join("".join(c if c.isprintable() and c not in "<>" else " " for c in text).split())[:200]
