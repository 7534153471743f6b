"""Runs git: without a shell, without hooks, and without asking anybody anything. Knows no agents."""

import os
from collections.abc import Mapping
from pathlib import Path

import anyio

from .._errors import EngineUnavailableError, ParallelAgentsError

_INHERITED = ("PATH", "HOME", "XDG_CONFIG_HOME", "TMPDIR", "SystemRoot")
_ENV = {"LC_ALL": "C.UTF-8", "GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"}
_CONFIG = ("core.hooksPath=/dev/null", "commit.gpgSign=false", "gc.auto=0", "core.fsmonitor=false")


class GitError(ParallelAgentsError):
    """Git refused.

    Attributes:
        command: The subcommand.
        said: What it printed on standard error.
    """

    def __init__(self, command: str, said: str) -> None:
        super().__init__(command, said)
        self.command = command
        self.said = said

    def __str__(self) -> str:
        return f"git {self.command}: {self.said or 'failed without a message'}"


async def git(folder: Path, *arguments: str, env: Mapping[str, str] | None = None, ok: tuple[int, ...] = (0,)) -> str:
    """Run git in a folder and return what it printed, without the last line end.

    Raises:
        GitError: For an exit code that is not *ok*.
        EngineUnavailableError: If git is not installed.
    """
    config = [item for setting in _CONFIG for item in ("-c", setting)]
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    try:
        done = await anyio.run_process(
            ["git", *config, "-C", str(folder), *arguments], env=inherited | _ENV | dict(env or {}), check=False
        )
    except FileNotFoundError as error:
        raise EngineUnavailableError("WorktreeEngine needs git: install it, version 2.38 or later") from error
    if done.returncode not in ok:
        raise GitError(arguments[0], " ".join(done.stderr.decode("utf-8", "replace").split()))
    return done.stdout.decode("utf-8", "surrogateescape").removesuffix("\n")
