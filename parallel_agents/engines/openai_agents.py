"""OpenAIAgentsEngine: agents of the OpenAI Agents SDK, from asyncio and from trio."""

from dataclasses import replace
from typing import Any

from .._context import current_run
from .._models import AgentAssignment, Usage
from .._outcomes import AgentRunResult, TerminationReason
from ._prompts import joined, task_text, upstream_text
from .asyncio import AsyncioEngine  # noqa: ASYNC106 - ours

try:
    from agents import Agent, MaxTurnsExceeded, ModelResponse, RunConfig, RunHooks, Runner
except ModuleNotFoundError as error:
    message = "OpenAIAgentsEngine needs the OpenAI Agents SDK: pip install 'parallel-agents[openai-agents]'"
    raise ModuleNotFoundError(message, name=error.name) from error


class OpenAIAgentsEngine:
    """Runs an agent of the OpenAI Agents SDK on each assignment.

    It is asked the task's description, its inputs as JSON, and what the tasks that it depends on have returned, after
    the ``memory_messages``. The identity's ``instructions`` stand in place of the agent's own, its ``model`` above the
    agent's, and the assignment's ``max_turns`` above the SDK's. The output is the run's ``final_output``.

    Usage is recorded after each answer of the model, so that it is kept whatever becomes of the agent. The SDK sends
    traces to OpenAI unless the run config has ``tracing_disabled=True``.

    Args:
        agent: Used for all assignments.
        run_config: Of each run; the SDK's default unless given.
        cleanup_seconds: How long a cancelled agent is waited for.
        options: Further arguments of ``Runner.run()`` but ``hooks``, such as ``context``.
    """

    def __init__(
        self, agent: Agent[Any], *, run_config: RunConfig | None = None, cleanup_seconds: float = 5.0, **options: Any
    ) -> None:
        self._agent = agent
        self._run_config = run_config or RunConfig()
        self._options = options
        self._engine = AsyncioEngine(self._work, cleanup_seconds=cleanup_seconds)

    def __repr__(self) -> str:
        return f"OpenAIAgentsEngine({self._agent.name})"

    async def run(self, assignment: AgentAssignment, /) -> AgentRunResult[Any]:
        """Run the agent; see ``AsyncioEngine`` for what cancelling does."""
        return await self._engine.run(assignment)

    async def _work(self, assignment: AgentAssignment) -> AgentRunResult[Any]:
        identity, hooks = assignment.identity, _Hooks()
        agent = self._agent.clone(instructions=identity.instructions) if identity.instructions else self._agent
        config = self._run_config if identity.model is None else replace(self._run_config, model=identity.model)
        asked = joined([task_text(assignment), upstream_text(current_run())])
        history: list[Any] = [{"role": said.role, "content": said.content} for said in assignment.memory_messages]
        ending: dict[str, Any] = {"termination_reason": TerminationReason.COMPLETED}
        try:
            result = await Runner.run(
                agent,
                [*history, {"role": "user", "content": asked}],
                max_turns=assignment.max_turns,
                run_config=config,
                hooks=hooks,
                **self._options,
            )
            ending["output"] = result.final_output
        except MaxTurnsExceeded:
            ending["termination_reason"] = TerminationReason.MAX_TURNS
        return AgentRunResult(
            task_id=assignment.task_id, agent_id=assignment.agent_id, usage=hooks.spent, turns=hooks.turns, **ending
        )


class _Hooks(RunHooks[Any]):
    """Counts what a run spends, answer by answer."""

    def __init__(self) -> None:
        self.turns = 0
        self.spent = Usage()

    async def on_llm_end(self, context: Any, agent: Any, response: ModelResponse) -> None:  # noqa: ARG002 - given
        self.turns += 1
        told = response.usage
        usage = Usage(input_tokens=told.input_tokens, output_tokens=told.output_tokens, requests=max(told.requests, 1))
        self.spent = self.spent + usage
        current_run().record_usage(usage)
