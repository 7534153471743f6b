"""Tests that run in virtual time, on both backends."""

import anyio.lowlevel
import pytest

from parallel_agents.testing.stepping import VirtualTimeLoop

virtual_time = pytest.mark.parametrize("anyio_backend", ["asyncio-virtual", "trio-virtual"], indirect=True)
"""Sleeping takes no time in such a test, and what it took can be compared exactly."""


def stall_for(seconds: float) -> None:
    """Let time pass in which nothing else runs, as code that blocks the loop does."""
    loop = anyio.lowlevel.current_token().native_token
    if isinstance(loop, VirtualTimeLoop):
        loop.now += seconds
    else:
        pytest.importorskip("trio").lowlevel.current_clock().jump(seconds)
