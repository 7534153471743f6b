"""Agents for the tests of TemporalEngine, beside those of ``parallel_agents.testing.remote_agents``."""

import os
import signal

import anyio

from parallel_agents import AgentAssignment, AgentRunResult, TerminationReason, Usage, current_run
from parallel_agents.events import CHAT_REQUEST_RETRY


async def agent(assignment: AgentAssignment) -> object:
    """Do what the task's inputs say."""
    inputs, run = assignment.task.inputs, current_run()
    if "characters" in inputs:
        for number in range(int(str(inputs.get("events", 0)))):
            run.emit(CHAT_REQUEST_RETRY, attempt=number, wait_seconds=0.0, error="e" * 50_000)
        return "x" * int(str(inputs["characters"]))
    if "crash" in inputs:
        run.record_usage(Usage(requests=1))
        await anyio.sleep(float(str(inputs["crash"])))
        os.kill(os.getpid(), signal.SIGKILL)
    if "budget" in inputs:
        run.record_usage(Usage(cost=float(str(inputs["budget"]))))
        while not run.budget_exhausted:  # noqa: ASYNC110 - as any agent may do
            await anyio.sleep(0.02)
        return "enough"
    return AgentRunResult(
        task_id=assignment.task_id,
        agent_id=assignment.agent_id,
        termination_reason=TerminationReason.MAX_TURNS,
        usage=Usage(requests=20),
        turns=20,
    )


a_text = "no engine"
