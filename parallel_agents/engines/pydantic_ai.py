"""PydanticAIEngine: agents of pydantic-ai, from asyncio and from trio."""

from typing import Any

from .._context import current_run
from .._models import AgentAssignment, ChatMessage, Usage
from .._outcomes import AgentRunResult, TerminationReason
from ._prompts import joined, task_text, upstream_text
from .asyncio import AsyncioEngine  # noqa: ASYNC106 - ours

try:
    from pydantic_ai import Agent, UsageLimitExceeded, UsageLimits
    from pydantic_ai.messages import ModelMessage, ModelRequest, ModelResponse, SystemPromptPart, TextPart
    from pydantic_ai.usage import RunUsage
except ModuleNotFoundError as error:
    message = "PydanticAIEngine needs pydantic-ai: pip install 'parallel-agents[pydantic-ai]'"
    raise ModuleNotFoundError(message, name=error.name) from error


class PydanticAIEngine:
    """Runs a pydantic-ai agent on each assignment.

    It is asked the task's description, its inputs as JSON, and what the tasks that it depends on have returned. The
    identity's ``instructions`` are added to the agent's own, its ``model`` stands above the agent's, the assignment's
    ``max_turns`` is the most requests to the model, and ``memory_messages`` are its history. The output is the agent's.

    Usage is recorded when the run ends, however it ends.

    Args:
        agent: Used for all assignments; it keeps nothing between them.
        cleanup_seconds: How long a cancelled agent is waited for.
        options: Further arguments of ``Agent.run()``, such as ``deps``, ``toolsets`` or ``model_settings``.
    """

    def __init__(self, agent: Agent[Any, Any], *, cleanup_seconds: float = 5.0, **options: Any) -> None:
        self._agent = agent
        self._options = options
        self._engine = AsyncioEngine(self._work, cleanup_seconds=cleanup_seconds)

    def __repr__(self) -> str:
        return f"PydanticAIEngine({self._agent.name or 'agent'})"

    async def run(self, assignment: AgentAssignment, /) -> AgentRunResult[Any]:
        """Run the agent; see ``AsyncioEngine`` for what cancelling does."""
        return await self._engine.run(assignment)

    async def _work(self, assignment: AgentAssignment) -> AgentRunResult[Any]:
        run, identity, spent = current_run(), assignment.identity, RunUsage()
        ending: dict[str, Any] = {"termination_reason": TerminationReason.COMPLETED}
        try:
            result = await self._agent.run(
                joined([task_text(assignment), upstream_text(run)]),
                model=identity.model,
                instructions=identity.instructions or None,
                message_history=[_message(message) for message in assignment.memory_messages],
                usage=spent,
                usage_limits=UsageLimits(request_limit=assignment.max_turns),
                **self._options,
            )
            ending["output"] = result.output
        except UsageLimitExceeded:
            if spent.requests < assignment.max_turns:
                raise
            ending["termination_reason"] = TerminationReason.MAX_TURNS
        finally:
            usage = Usage(input_tokens=spent.input_tokens, output_tokens=spent.output_tokens, requests=spent.requests)
            run.record_usage(usage)
        return AgentRunResult(
            task_id=assignment.task_id, agent_id=assignment.agent_id, usage=usage, turns=spent.requests, **ending
        )


def _message(message: ChatMessage) -> ModelMessage:
    if message.role == "assistant":
        return ModelResponse(parts=[TextPart(message.content)])
    if message.role == "system":
        return ModelRequest(parts=[SystemPromptPart(message.content)])
    return ModelRequest.user_text_prompt(message.content)
