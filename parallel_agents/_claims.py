"""Resource claims: what an assignment may touch, their normal form, and which of them overlap.

Pure but for ``ResourceClaim.path()``, which asks the file system what a path means. Knows no locks.
"""

import os
import stat
from collections.abc import Iterable, Sequence
from enum import StrEnum, auto
from pathlib import Path, PurePosixPath
from typing import Self

from attrs import field, frozen
from attrs.validators import optional

from ._checks import is_a, not_blank

_PATH = "path:"


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
            return cls(resource=f"file:{found.st_dev}:{found.st_ino}", mode=mode, within=f"{_PATH}{real.parent}")
        return cls(resource=f"{_PATH}{real}", mode=mode)


def _ignores_case(real: Path) -> bool:
    """Whether the nearest existing folder is found under another spelling of its name, too."""
    folder = next(candidate for candidate in (real, *real.parents) if candidate.is_dir())
    other = folder.with_name(folder.name.swapcase()) if folder.name else folder
    return other != folder and other.exists() and other.samefile(folder)


def _folders_above(claim: ResourceClaim) -> Sequence[str]:
    """Return the resources of the folders in which a claimed file or folder lies, from the innermost to the root."""
    if claim.within is not None:
        return [claim.within, *_parents(claim.within)]
    return _parents(claim.resource) if claim.resource.startswith(_PATH) else ()


def _parents(resource: str) -> list[str]:
    return [f"{_PATH}{folder}" for folder in PurePosixPath(resource.removeprefix(_PATH)).parents]


class _Owners:
    """Who holds something, by mode, and how many times."""

    __slots__ = ("_by_mode",)

    def __init__(self) -> None:
        self._by_mode: dict[ClaimMode, dict[str, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_mode)

    def add(self, owner: str, mode: ClaimMode) -> None:
        owners = self._by_mode.setdefault(mode, {})
        owners[owner] = owners.get(owner, 0) + 1

    def remove(self, owner: str, mode: ClaimMode) -> None:
        owners = self._by_mode[mode]
        owners[owner] -= 1
        if not owners[owner]:
            del owners[owner]
            if not owners:
                del self._by_mode[mode]

    def in_the_way_of(self, owner: str, mode: ClaimMode) -> str | None:
        """Return another owner that does not go together with *owner* holding this in *mode*."""
        for held_in, owners in self._by_mode.items():
            if held_in is ClaimMode.EXCLUSIVE or mode is ClaimMode.EXCLUSIVE:
                for other in owners:
                    if other != owner:
                        return other
        return None


class ClaimIndex:
    """Claims by what they overlap. Asking, adding and removing cost the depth of a path, not the number of claims."""

    def __init__(self) -> None:
        self._at: dict[str, _Owners] = {}
        self._below: dict[str, _Owners] = {}

    def __bool__(self) -> bool:
        return bool(self._at)

    def in_the_way_of(self, claim: ResourceClaim, owner: str) -> str | None:
        """Return another owner whose claim overlaps *claim* and does not go together with it."""
        resource, mode = claim.resource, claim.mode
        if not self._at:
            return None
        for owners in (self._at.get(resource), self._below.get(resource)):
            if owners is not None and (other := owners.in_the_way_of(owner, mode)) is not None:
                return other
        for folder in _folders_above(claim):
            owners = self._at.get(folder)
            if owners is not None and (other := owners.in_the_way_of(owner, mode)) is not None:
                return other
        return None

    def add(self, claim: ResourceClaim, owner: str) -> None:
        """Note a claim of *owner*; the same one may be noted several times."""
        self._at.setdefault(claim.resource, _Owners()).add(owner, claim.mode)
        for folder in _folders_above(claim):
            self._below.setdefault(folder, _Owners()).add(owner, claim.mode)

    def remove(self, claim: ResourceClaim, owner: str) -> None:
        """Take back one ``add()``; nothing is kept of a resource that nobody claims."""
        self._remove_from(self._at, claim.resource, claim.mode, owner)
        for folder in _folders_above(claim):
            self._remove_from(self._below, folder, claim.mode, owner)

    @staticmethod
    def _remove_from(table: dict[str, _Owners], key: str, mode: ClaimMode, owner: str) -> None:
        owners = table[key]
        owners.remove(owner, mode)
        if not owners:
            del table[key]


def find_overlap(claims: Iterable[tuple[str, Sequence[ResourceClaim]]]) -> tuple[str, str, str] | None:
    """Return the first resource that two owners claim and cannot hold together, with both owners, if there is one.

    An owner's own claims may overlap each other.
    """
    index = ClaimIndex()
    for owner, own in claims:
        for claim in own:
            if (other := index.in_the_way_of(claim, owner)) is not None:
                return claim.resource, other, owner
        for claim in own:
            index.add(claim, owner)
    return None
