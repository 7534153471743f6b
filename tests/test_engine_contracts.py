"""Every engine keeps the contract that is given to users for theirs, and an engine that does not is found out."""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from parallel_agents import AgentAssignment, AgentEngine, AgentIdentity, FunctionEngine, Task
from parallel_agents.engines.asyncio import AsyncioEngine
from parallel_agents.engines.chat import ChatEngine
from parallel_agents.engines.process import ProcessEngine
from parallel_agents.testing import Act, AgentEngineContract, ScriptedEngine
from parallel_agents.testing.chat import ChatReply, ChatRequest, scripted_chat_server


def an_assignment(task_id: str, description: str = "") -> AgentAssignment:
    return AgentAssignment(identity=AgentIdentity(id="agent"), task=Task(id=task_id, description=description))


class EngineContract(AgentEngineContract):
    """With assignments that most engines of this file understand."""

    @pytest.fixture
    def assignment(self) -> AgentAssignment:
        return an_assignment("short", "A short one")

    @pytest.fixture
    def long_assignment(self) -> AgentAssignment:
        return an_assignment("long", "A long one")


class TestFunctionEngine(EngineContract):
    @pytest.fixture
    def engine(self) -> AgentEngine:
        async def agent(assignment: AgentAssignment) -> None:
            await anyio.sleep(60 if assignment.task_id.startswith("long") else 0)

        return FunctionEngine(agent)


class TestAsyncioEngine(EngineContract):
    @pytest.fixture
    def engine(self) -> AgentEngine:
        async def agent(assignment: AgentAssignment) -> None:
            await asyncio.sleep(60 if assignment.task_id.startswith("long") else 0)

        return AsyncioEngine(agent)


class TestScriptedEngine(EngineContract):
    @pytest.fixture
    def engine(self) -> AgentEngine:
        return ScriptedEngine(lambda assignment: Act(hangs=assignment.task_id.startswith("long")))


class TestProcessEngine(EngineContract):
    @pytest.fixture
    def engine(self) -> AgentEngine:
        return ProcessEngine([sys.executable, "-c", "{task.description}"])

    @pytest.fixture
    def assignment(self) -> AgentAssignment:
        return an_assignment("short", "print('done')")

    @pytest.fixture
    def long_assignment(self) -> AgentAssignment:
        return an_assignment("long", "import time; time.sleep(60)")


class TestChatEngine(EngineContract):
    @pytest.fixture
    async def engine(self, anyio_backend: Any) -> AsyncIterator[AgentEngine]:
        def answer(request: ChatRequest) -> ChatReply:
            return ChatReply(content="done", delay_seconds=60 if "A long one" in str(request.body["messages"]) else 0)

        async with scripted_chat_server(answer) as server:
            yield ChatEngine(server.base_url, "m")


BROKEN = """
import anyio
import pytest

from parallel_agents import AgentAssignment, AgentIdentity, FunctionEngine, Task
from parallel_agents.testing import AgentEngineContract, engines

running = []

async def swallows(assignment):
    try:
        await anyio.sleep(1)
    except anyio.get_cancelled_exc_class():
        return

async def keeps_state(assignment):
    running.append(1)
    try:
        assert len(running) == 1
        await anyio.lowlevel.checkpoint()
    finally:
        running.pop()

async def fails(assignment):
    raise OSError("no disk")

async def leaves_a_task(assignment):
    import asyncio
    left.append(asyncio.create_task(asyncio.sleep(60)))

left = []

engines.SECONDS = 5.0  # for what is left

class Contract(AgentEngineContract):
    @pytest.fixture
    def anyio_backend(self):
        return "asyncio"

    @pytest.fixture
    def engine(self):
        return FunctionEngine(self.agent)

    @pytest.fixture
    def assignment(self):
        return AgentAssignment(identity=AgentIdentity(id="a"), task=Task(id="t"))

    long_assignment = assignment

class TestSwallows(Contract):
    agent = staticmethod(swallows)

class TestKeepsState(Contract):
    agent = staticmethod(keeps_state)

class TestFails(Contract):
    agent = staticmethod(fails)

class TestLeavesATask(Contract):
    agent = staticmethod(leaves_a_task)

class TestWithoutFixtures(AgentEngineContract):
    anyio_backend = Contract.anyio_backend
"""


def test_engines_that_break_the_contract_are_found_out(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(BROKEN)
    run = pytester.runpytest_subprocess("-q", "-rfE", "--tb=line")
    run.stdout.fnmatch_lines_random(
        [
            "FAILED *TestFails::test_it_completes_an_assignment*",
            "FAILED *TestKeepsState::test_it_runs_several_at_once_and_again_afterwards*",
            "FAILED *TestSwallows::test_a_call_that_is_late_ends_as_timed_out*",
            "FAILED *TestSwallows::test_a_cancelled_call_ends_soon_and_the_engine_goes_on*",
            "FAILED *TestLeavesATask::test_it_leaves_no_task_behind*",
            "ERROR *TestWithoutFixtures::*",
            "E *give your subclass a fixture 'engine'*",
        ]
    )
    assert "TestKeepsState::test_it_completes" not in run.stdout.str()
