"""Every async test runs on asyncio and on trio; what only virtual time can show runs on trio's."""

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
