"""ChatEngine with a real language model, which runs on this machine: four slots, eight agents, both backends."""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    ChatMessage,
    CompletionConfig,
    OutcomeStatus,
    ParallelExecutionGroup,
    ParallelExecutor,
    Task,
    Usage,
)
from parallel_agents.engines.chat import ChatEngine
from parallel_agents.plan import load_plan

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(
        find_spec("xllamacpp") is None,
        reason="the session 'model' of noxfile.py installs it",
    ),
]

FOLDER = Path(__file__).parent.parent / "examples" / "classify"
LABELS = {"happy", "unhappy"}


def example() -> Any:
    spec = spec_from_file_location("local_model", FOLDER / "local_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with example().local_model() as url:
        yield url


async def busy_slots(base_url: str) -> int:
    async with httpx2.AsyncClient(timeout=60) as client:
        slots = (await client.get(f"{base_url.removesuffix('/v1')}/slots")).json()
    assert len(slots) == 4
    return sum(slot["is_processing"] for slot in slots)


async def test_eight_agents_share_four_slots(base_url: str) -> None:
    plan = load_plan(FOLDER / "plan.toml", overrides={"engine.base_url": base_url})
    busy: list[int] = []

    async def watch() -> None:
        while True:
            busy.append(await busy_slots(base_url))

    with anyio.fail_after(300):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            result = await ParallelExecutor(engine=plan.engine).execute_group(plan.group)
            tasks.cancel_scope.cancel()
    assert [outcome.status for outcome in result.outcomes] == [OutcomeStatus.SUCCEEDED] * 8
    assert {outcome.output["mood"] for outcome in result.outcomes if outcome.output} <= LABELS
    for outcome in result.outcomes:
        assert outcome.usage.input_tokens > 0
        assert outcome.usage.output_tokens > 0
        assert outcome.usage.requests >= 1
    assert max(busy) <= 4


async def test_a_model_chooses_a_tool_and_its_argument(base_url: str) -> None:
    """Models of this size take one fixed step; loops with tools are tested with a scripted server."""
    schema = {
        "type": "object",
        "properties": {"tool": {"enum": ["read", "search", "count"]}, "argument": {"type": "string", "maxLength": 20}},
        "required": ["tool", "argument"],
        "additionalProperties": False,
    }
    said = [
        ChatMessage(role="user", content="How many words are in a.txt?"),
        ChatMessage(role="assistant", content='{"tool": "count", "argument": "a.txt"}'),
        ChatMessage(role="user", content="Where is Oslo mentioned?"),
        ChatMessage(role="assistant", content='{"tool": "search", "argument": "Oslo"}'),
    ]
    one = AgentAssignment(
        identity=AgentIdentity(id="a"),
        task=Task(id="t", description="What is in notes.txt?"),
        completion_config=CompletionConfig(temperature=0, max_tokens=60),
        memory_messages=said,
        timeout_seconds=120,
    )
    group = ParallelExecutionGroup(group_id="g", assignments=[one])
    engine = ChatEngine(base_url, "smollm2-135m", output_schema=schema)
    (outcome,) = (await ParallelExecutor(engine=engine).execute_group(group)).outcomes
    assert outcome.output is not None
    assert outcome.output["tool"] in ("read", "search", "count")
    assert isinstance(outcome.output["argument"], str)


async def test_a_cancelled_agent_that_streams_frees_its_slot_at_once(base_url: str) -> None:
    has_text = anyio.Event()
    engine = ChatEngine(base_url, "smollm2-135m", stream=True, on_text=lambda _, __: has_text.set())
    task = Task(id="t", description="Count from one to a thousand, in words.")
    assignment = AgentAssignment(
        identity=AgentIdentity(id="a"), task=task, completion_config=CompletionConfig(max_tokens=1500, temperature=0)
    )
    group = ParallelExecutionGroup(group_id="g", assignments=[assignment])
    with anyio.fail_after(120):
        async with ParallelExecutor(engine=engine).open_group(group) as run:
            await has_text.wait()
            assert await busy_slots(base_url) == 1
            run.cancel()
    assert run.result is not None
    assert run.result.outcomes[0].status is OutcomeStatus.CANCELLED
    assert run.result.outcomes[0].usage == Usage(requests=1)
    with anyio.fail_after(1):  # not cancelled, it would write for half a minute
        while await busy_slots(base_url):
            pass


def test_the_example_runs_as_its_page_says(tmp_path: Path, anyio_backend: tuple[str, Any]) -> None:
    program = Path(sys.executable).with_name("parallel-agents")
    report = tmp_path / "report.json"
    run = ["run", str(FOLDER / "plan.toml"), "--set", "engine.base_url={base_url}", "--report", str(report)]
    command = [sys.executable, str(FOLDER / "local_model.py"), str(program), *run, "--backend", anyio_backend[0]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    moods = [outcome["result"]["output"]["mood"] for outcome in json.loads(report.read_text())["outcomes"]]
    assert len(moods) == 8
    assert set(moods) <= LABELS
