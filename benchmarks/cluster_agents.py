"""Agents for ``cluster_ray.py``, which workers import by name."""

import os

import anyio
import anyio.lowlevel

from parallel_agents import AgentAssignment


async def nothing(assignment: AgentAssignment) -> str:
    await anyio.lowlevel.checkpoint()
    return assignment.task_id


async def wait(_: AgentAssignment) -> None:
    await anyio.sleep_forever()


class ByHand:
    """What one would write instead: an async actor, and a call of it for each agent."""

    async def nothing(self, text: str) -> str:
        await anyio.lowlevel.checkpoint()
        return text

    async def wait(self) -> None:
        await anyio.sleep_forever()

    async def pid(self) -> int:
        return os.getpid()
