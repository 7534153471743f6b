"""``parallel-agents``: the entry point of the command line, and how its process ends.

Can be imported without the libraries of the ``cli`` extra, to say that they are missing. The commands themselves
stand in ``_commands``.
"""

import io
import os
import sys
from collections.abc import Sequence
from typing import TextIO

INTERRUPTED = 130
"""The exit code after Ctrl-C, as in a shell."""

_EXTRA = ("cyclopts", "rich", "yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; the last thing a process does.

    After a run, SIGINT and SIGTERM are ignored, so that a late one does not change the exit code.

    Args:
        argv: The arguments; by default those of the process.
    """
    try:
        from ._commands import dispatch  # noqa: PLC0415 - its libraries may be missing
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        sys.stderr.write(f"parallel-agents: {error.name} is missing: pip install 'parallel-agents[cli]'\n")
        return 2
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows ASCII only still gets every character, escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        return dispatch(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        for stream in (sys.stdout, sys.stderr):
            _flush(stream)


def _flush(stream: TextIO) -> None:
    """Flush a stream; if its reader is gone, send what is left nowhere: the interpreter's own flush must not fail."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
