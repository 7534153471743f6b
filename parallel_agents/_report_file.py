"""Where a report goes: a file that is complete or not there at all, or standard output. Knows nothing of reports."""

import os
import secrets
import stat
import sys
from pathlib import Path

STDOUT = "-"
"""Stands for standard output in place of a path."""


class ReportFile:
    """Takes one text, at the end of a run; finds out at the start whether it will be able to.

    A regular file is written beside its place and then renamed, so that readers see the old one or the new one. A
    symbolic link stays, and what is no regular file (a device, a pipe) is written to as it is.

    Args:
        path: The file, or ``-``.

    Raises:
        OSError: If it cannot be written.
    """

    def __init__(self, path: str) -> None:
        self.is_stdout = path == STDOUT
        self._path = Path(path).resolve()
        self._mode: int | None = None
        self._is_replaced = True
        if not self.is_stdout:
            self._examine()

    def _examine(self) -> None:
        if self._path.exists():
            mode = self._path.stat().st_mode
            self._mode = stat.S_IMODE(mode)
            self._is_replaced = stat.S_ISREG(mode)
            if not self._is_replaced and not stat.S_ISDIR(mode):
                return
            os.close(os.open(self._path, os.O_WRONLY))  # refused for folders and for files that may not be written
        probe, name = self._open_beside()
        os.close(probe)
        name.unlink()

    def _open_beside(self) -> tuple[int, Path]:
        name = self._path.with_name(f".{secrets.token_hex(8)}.tmp")
        return os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), name

    def write(self, text: str) -> None:
        """Write the text; for a regular file wait until it is on the disk.

        Raises:
            OSError: If it cannot be written; a file that was there before is as it was.
        """
        if self.is_stdout:
            sys.stdout.write(text)
            sys.stdout.flush()
        elif self._is_replaced:
            self._replace(text)
        else:
            self._path.write_text(text, "utf-8")

    def _replace(self, text: str) -> None:
        descriptor, name = self._open_beside()
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                if self._mode is not None:
                    os.fchmod(descriptor, self._mode)
                file.write(text)
                file.flush()
                os.fsync(descriptor)
            name.replace(self._path)
        except BaseException:
            name.unlink(missing_ok=True)
            raise
