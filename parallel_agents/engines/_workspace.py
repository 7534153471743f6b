"""The folder in which the agent of the current engine call works; whoever makes one for it sets it.

Knows nothing of how such a folder is made.
"""

from contextvars import ContextVar
from pathlib import Path

_folder: ContextVar[Path] = ContextVar("parallel_agents_working_folder")


def working_folder() -> Path | None:
    """Return the folder that was made for the agent that is asking, if one was."""
    return _folder.get(None)
