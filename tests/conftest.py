"""Every async test runs on asyncio and on trio."""

from typing import Any

import pytest

BACKENDS = [
    pytest.param(("asyncio", {"debug": True}), id="asyncio"),
    pytest.param(("trio", {}), id="trio"),
]


@pytest.fixture(params=BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """The backends of every test marked ``anyio``."""
    if request.param[0] == "trio":
        pytest.importorskip("trio")
    backend: tuple[str, dict[str, Any]] = request.param
    return backend
