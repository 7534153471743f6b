"""Every async test runs on asyncio and on trio; what only virtual time can show runs on trio's."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {"debug": True}),
    "trio": ("trio", {}),
}


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """The backends of every test marked ``anyio``; ``trio-virtual`` has a clock that jumps instead of sleeping."""
    if request.param == "asyncio":
        return BACKENDS["asyncio"]
    pytest.importorskip("trio")
    if request.param == "trio":
        return BACKENDS["trio"]
    from trio.testing import MockClock  # noqa: PLC0415 - one session of the checks runs without it

    return "trio", {"clock": MockClock(autojump_threshold=0)}


@pytest.fixture
def folder_of_nobody() -> Iterator[Path]:
    """A folder of a user whom permissions bind, whoever runs the tests; this process is that user meanwhile."""
    base = Path(tempfile.mkdtemp())
    folder = base / "folder"
    folder.mkdir()
    user, is_root = os.geteuid(), os.geteuid() == 0
    if is_root:
        base.chmod(0o755)
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(user)
        shutil.rmtree(base)
