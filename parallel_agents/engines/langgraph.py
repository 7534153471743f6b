"""LangGraphEngine: graphs of LangGraph, from asyncio and from trio."""

from collections.abc import Callable
from typing import Any

from .._context import RunContext, current_run
from .._models import AgentAssignment, ChatMessage, Usage
from .._outcomes import AgentRunResult, TerminationReason
from ._metering import Meter
from ._prompts import joined, task_text, upstream_text
from .asyncio import AsyncioEngine  # noqa: ASYNC106 - ours

try:
    from langchain_core.callbacks import AsyncCallbackHandler
    from langchain_core.messages import AIMessage
    from langchain_core.outputs import ChatGeneration, LLMResult
    from langgraph.errors import GraphRecursionError
except ModuleNotFoundError as error:
    message = "LangGraphEngine needs LangGraph: pip install 'parallel-agents[langgraph]'"
    raise ModuleNotFoundError(message, name=error.name) from error


def messages_of(assignment: AgentAssignment) -> dict[str, Any]:
    """Return the input of a graph whose state is a list of messages: instructions, memory, and what is asked."""
    instructions = assignment.identity.instructions
    system = [ChatMessage(role="system", content=instructions)] if instructions else []
    asked = joined([task_text(assignment), upstream_text(current_run())])
    said = [*system, *assignment.memory_messages, ChatMessage(role="user", content=asked)]
    return {"messages": [{"role": message.role, "content": message.content} for message in said]}


def last_message(state: Any) -> Any:
    """Return the content of the last message of a graph's state."""
    return state["messages"][-1].content


class LangGraphEngine:
    """Runs a compiled LangGraph graph on each assignment.

    Unless told otherwise, a graph is given messages: the identity's ``instructions``, the ``memory_messages``, and the
    task's description, inputs and what it depends on; and its output is the last message. Its models are its own.

    A turn is a step of the model and one of its tools, so the graph may take ``2 * max_turns + 1`` steps; one that
    needs more ends with MAX_TURNS. One that interrupts itself is parked, with what it asks as the last message. The
    usage that chat models report is recorded after each of their answers.

    Args:
        graph: Compiled; used for all assignments.
        to_input: Makes the graph's input of an assignment.
        to_output: Makes the output of the graph's last state.
        cleanup_seconds: How long a cancelled graph is waited for.
    """

    def __init__(
        self,
        graph: Any,
        *,
        to_input: Callable[[AgentAssignment], Any] = messages_of,
        to_output: Callable[[Any], Any] = last_message,
        cleanup_seconds: float = 5.0,
    ) -> None:
        self._graph = graph
        self._to_input = to_input
        self._to_output = to_output
        self._engine = AsyncioEngine(self._work, cleanup_seconds=cleanup_seconds)

    def __repr__(self) -> str:
        return f"LangGraphEngine({getattr(self._graph, 'name', 'graph')})"

    async def run(self, assignment: AgentAssignment, /) -> AgentRunResult[Any]:
        """Run the graph; see ``AsyncioEngine`` for what cancelling does."""
        return await self._engine.run(assignment)

    async def _work(self, assignment: AgentAssignment) -> AgentRunResult[Any]:
        run = current_run()
        meter, listener = Meter(run), _Listener(run)
        config = {
            "recursion_limit": 2 * assignment.max_turns + 1,
            "callbacks": [listener],
            "configurable": {"thread_id": f"{run.group_id}:{assignment.task_id}"},
        }
        ending: dict[str, Any] = {}
        try:
            state = await self._graph.ainvoke(self._to_input(assignment), config)
        except GraphRecursionError:
            ending["termination_reason"] = TerminationReason.MAX_TURNS
        else:
            ending = _parked(state) or {
                "termination_reason": TerminationReason.COMPLETED,
                "output": self._to_output(state),
            }
        return AgentRunResult(
            task_id=assignment.task_id,
            agent_id=assignment.agent_id,
            usage=meter.metered(),
            turns=listener.turns,
            **ending,
        )


def _parked(state: Any) -> dict[str, Any]:
    """Return how a graph ends that waits for a person; nothing if it does not."""
    interrupts = state.get("__interrupt__") if isinstance(state, dict) else None
    if not interrupts:
        return {}
    asked = ChatMessage(role="assistant", content="\n".join(str(interrupt.value) for interrupt in interrupts))
    return {"termination_reason": TerminationReason.PARKED, "messages": (asked,)}


class _Listener(AsyncCallbackHandler):
    """Records what chat models report of their usage."""

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self.turns = 0

    async def on_llm_end(self, response: LLMResult, **_: Any) -> None:
        self.turns += 1
        usage = Usage(requests=1)
        for generation in (one for several in response.generations for one in several):
            message = generation.message if isinstance(generation, ChatGeneration) else None
            if isinstance(message, AIMessage) and (told := message.usage_metadata) is not None:
                usage = usage + Usage(input_tokens=told["input_tokens"], output_tokens=told["output_tokens"])
        self._run.record_usage(usage)
