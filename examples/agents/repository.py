"""What the agents of the quickstart share: the files that they look at."""

from collections.abc import Iterator
from pathlib import Path

SKIPPED = {".git", ".nox", ".venv", ".venv-nox", "__pycache__", "build", "dist"}


def files(folder: Path, suffix: str = "") -> Iterator[Path]:
    """Yield the text files below *folder* in a fixed order, without hidden and generated ones."""
    for path in sorted(folder.iterdir()):
        if path.name in SKIPPED or path.name.startswith(".") or path.is_symlink():
            continue
        if path.is_dir():
            yield from files(path, suffix)
        elif path.name.endswith(suffix) and b"\0" not in path.read_bytes()[:1024]:
            yield path
