"""TemporalEngine: agents on workers of Temporal, which survive their driver, their workers and their server."""

from typing import Any

import anyio

from .._context import current_run
from .._models import AgentAssignment
from .._outcomes import AgentRunResult
from ._remote import pack, unconfirmed
from .asyncio import AsyncioEngine  # noqa: ASYNC106 - ours

try:
    from temporalio.client import Client
except ModuleNotFoundError as error:
    message = "TemporalEngine needs temporalio: pip install 'parallel-agents[temporal]'"
    raise ModuleNotFoundError(message, name=error.name) from error

from ._temporal import PayloadTooLargeError, raw
from ._temporal_call import AnotherAgentRunsError, Call, Settings

__all__ = ["AnotherAgentRunsError", "PayloadTooLargeError", "TemporalEngine"]


BRIDGE_SECONDS = 1.0
"""How much longer than for its agent a cancelled call is waited for."""


class TemporalEngine:
    """Runs agents on workers of Temporal, for work of minutes to days that must not be lost or paid twice.

    Each assignment is a workflow with the id ``{execution}/{task}``, in which one activity runs the agent on a worker:
    ``parallel-agents worker --engine module:attribute --task-queue NAME``. An agent's execution is *at least once*:
    when its worker is lost, another one runs it again. Its commit is *at most once*: whatever is started or
    delivered twice, all drivers get the one result of the workflow.

    When a driver comes back after it was killed, an agent of its execution that still runs is waited for, one that has
    succeeded returns its result, and one that failed or was cancelled runs again. An event
    ``execution.parallel.agent_resumed`` tells of the first two, with the reason ``running`` or ``recorded``. One that
    has other work than then runs again too, but not beside the old one: that is an error.

    A cancelled call cancels the agent on its worker and waits for it, so that what it returns all the same is its
    result. If it has not ended after *cancel_seconds*, the outcome says that this is unconfirmed.

    Messages are JSON. What is larger than 1.5 MB is refused before anything is sent; so is an agent's result on its
    worker, and the agent has failed.

    The time until a worker takes an agent does not count towards its timeout. On trio, Temporal's client runs in a
    thread beside it, as with ``AsyncioEngine``.

    Args:
        client: Good in every event loop, such as ``asyncio.run(Client.connect("127.0.0.1:7233"))``.
        task_queue: The name of the queue that the workers take assignments from.
        execution: All runs of one name continue each other; the id of the group unless given.
        heartbeat_timeout_seconds: When its worker has told nothing for so long, an agent is lost, and runs again.
            Longer than any code of an agent blocks its event loop.
        progress_seconds: How often the driver asks what an agent has spent and told; agents hear of a shutdown and of
            a spent budget as late.
        cancel_seconds: How long a cancelled agent is waited for. Longer than the heartbeats of its worker are apart.
        starts: How often an agent is started at most, when its worker is lost.
        version: Stands for whatever else decides what agents do, such as the code or a prompt.
    """

    def __init__(
        self,
        client: Client,
        task_queue: str,
        *,
        execution: str | None = None,
        heartbeat_timeout_seconds: float = 30.0,
        progress_seconds: float = 5.0,
        cancel_seconds: float = 30.0,
        starts: int = 5,
        version: str = "",
    ) -> None:
        self._settings = Settings(
            client=client,
            task_queue=task_queue,
            execution=execution,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            progress_seconds=progress_seconds,
            cancel_seconds=cancel_seconds,
            starts=starts,
            version=version,
        )

    def __repr__(self) -> str:
        return f"TemporalEngine({self._settings.task_queue!r})"

    def check(self, assignment: AgentAssignment, /) -> None:
        """Refuse what is too large for Temporal.

        Raises:
            ValueError: Saying by how much.
        """
        raw(pack(assignment), f"The assignment of task {assignment.task_id!r}")

    async def run(self, assignment: AgentAssignment, /) -> AgentRunResult[Any]:
        """Have a worker run the agent, or wait for the one that runs it already.

        Raises:
            RemoteAgentError: If the agent raised.
            WorkerLostError: If its workers were lost, as often as it may be started, or somebody ended its workflow.
            VersionMismatchError: If its worker runs another version of the library.
            AnotherAgentRunsError: If other work of the same name runs.
            PayloadTooLargeError: If it is too large to be sent, together with what it depends on.
            RPCError: If the server refuses it. One that does not answer is asked again until it does.
            LookupError: Outside an engine call of an executor.
        """
        call: Call | None = None

        async def perform(_: AgentAssignment) -> AgentRunResult[Any]:
            nonlocal call
            call = Call(self._settings, current_run())  # beside trio, the run has a stand-in here
            return await call.perform()

        seconds = self._settings.cancel_seconds
        try:
            return await AsyncioEngine(perform, cleanup_seconds=seconds + BRIDGE_SECONDS).run(assignment)
        except anyio.get_cancelled_exc_class() as cancelled:
            if call is None or not call.is_over:
                cancelled.add_note(unconfirmed(seconds))
            raise
