"""Resource claims: what an assignment may touch, and the normal form in which two of them can be compared.

Pure but for ``ResourceClaim.path()``, which asks the file system what a path means. Knows no locks.
"""

import os
import stat
from enum import StrEnum, auto
from pathlib import Path
from typing import Self

from attrs import field, frozen
from attrs.validators import optional

from ._checks import is_a, not_blank

PATH = "path:"
"""What the resource of a path starts with."""


class ClaimMode(StrEnum):
    """Who else may hold a claimed resource."""

    EXCLUSIVE = auto()
    """Nobody."""
    SHARED = auto()
    """Everybody who claims it as shared too."""


@frozen(kw_only=True)
class ResourceClaim:
    """A resource that an assignment holds while it runs.

    Attributes:
        resource: An opaque key, or what ``ResourceClaim.path()`` makes of a path.
        mode: Whether others may hold it too.
        within: For a file that has several names, which its ``resource`` stands for all of: the folder through which
            it was claimed. A claim of that folder, or of one above it, overlaps.
    """

    resource: str = field(validator=not_blank)
    mode: ClaimMode = field(default=ClaimMode.EXCLUSIVE, validator=is_a(ClaimMode))
    within: str | None = field(default=None, eq=False, repr=False, validator=optional(not_blank))

    @classmethod
    def path(cls, path: str | os.PathLike[str], *, mode: ClaimMode = ClaimMode.EXCLUSIVE) -> Self:
        """Claim a file, or a folder with everything below it; neither needs to exist.

        All spellings of a path are one resource: relative ones, those with ``..``, symbolic links, hard links, and
        other cases on a file system that ignores case. What a path means is decided now, not when it is claimed.

        Args:
            path: Relative paths start at the current folder.
            mode: Whether others may hold it too.

        Raises:
            ValueError: For a blank path, one with a NUL character, and one whose symbolic links go round in circles.
        """
        text = os.fspath(path)
        if not text.strip() or "\0" in str(text):
            raise ValueError(f"path must be text that is not blank and has no NUL in it, got {path!r}")
        real = Path(os.path.realpath(text))
        try:
            found = real.stat()
        except FileNotFoundError:
            found = None
        except OSError as error:
            raise ValueError(f"path {text!r} cannot be followed: {error.strerror}") from error
        if _ignores_case(real):
            real = Path(str(real).casefold())
        if found is not None and not stat.S_ISDIR(found.st_mode) and found.st_nlink > 1:
            return cls(resource=f"file:{found.st_dev}:{found.st_ino}", mode=mode, within=f"{PATH}{real.parent}")
        return cls(resource=f"{PATH}{real}", mode=mode)


def _ignores_case(real: Path) -> bool:
    """Whether the nearest existing folder is found under another spelling of its name, too."""
    folder = next(candidate for candidate in (real, *real.parents) if candidate.is_dir())
    other = folder.with_name(folder.name.swapcase()) if folder.name else folder
    return other != folder and other.exists() and other.samefile(folder)
