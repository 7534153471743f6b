"""The workflow of an agent, and what its driver and its workers tell each other through Temporal.

Everything travels as JSON of ``_remote``, in raw payloads: no data converter of Temporal reads or writes it, though a
codec of the client, such as one that encrypts, still does.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from enum import StrEnum, auto
from typing import Any

from attrs import frozen
from temporalio import workflow
from temporalio.api.common.v1 import Payload
from temporalio.common import RawValue, RetryPolicy
from temporalio.exceptions import ActivityError

from ._remote import Report, unpack

WORKFLOW = "parallel_agents.agent"
RUN_AGENT = "parallel_agents.run_agent"
TELL_WORKER = "parallel_agents.tell_worker"

PAYLOAD_BYTES = 1_500_000
"""The most that one message may hold; Temporal's own limit of 2 MB also counts what a codec adds."""

LONGEST_AGENT = timedelta(days=365)
"""Temporal wants a limit for each start; the real one is the assignment's."""

NEWS_TIMEOUT = timedelta(seconds=30)
"""How long a worker may take to hear what the driver has to say."""

UNSUCCESSFUL = "AgentDidNotSucceed"
"""The type of Temporal's error for an agent that ended; its reports are in the details."""

STOPPED = "WorkerStopped"
"""The same for one that its worker stopped to end itself: it runs again."""


class PayloadTooLargeError(ValueError):
    """Something is too large to be sent through Temporal; nothing was sent."""

    def __init__(self, what: str, size: int) -> None:
        super().__init__(what, size)
        self.what = what
        self.size = size

    def __str__(self) -> str:
        return (
            f"{self.what} is {self.size / 1e6:.2f} MB as JSON, more than the {PAYLOAD_BYTES / 1e6:g} MB that may go "
            "through Temporal: pass the path or the address of a file instead"
        )


@frozen(kw_only=True)
class Starts:
    """What is known of every start of an agent, the oldest first; a later one goes on where the others were lost.

    Attributes:
        reports: One for each start; the last is of the one that runs, or has ended.
    """

    reports: tuple[Report, ...] = ()


class News(StrEnum):
    """What a driver tells the worker of a running agent."""

    SHUTDOWN = auto()
    BUDGET_SPENT = auto()


def own_queue(task_queue: str, identity: str) -> str:
    """Return the task queue that a worker has for itself, by which it is told news."""
    return f"{task_queue}@{identity}"


def raw(text: str, what: str) -> RawValue:
    """Return a payload of JSON.

    Raises:
        PayloadTooLargeError: Naming *what* it is.
    """
    data = text.encode()
    if len(data) > PAYLOAD_BYTES:
        raise PayloadTooLargeError(what, len(data))
    return RawValue(Payload(metadata={"encoding": b"json/plain"}, data=data))


def text_of(value: RawValue) -> str:
    """Return the JSON of a payload."""
    return value.payload.data.decode()


def starts_in(details: Sequence[Any]) -> Starts:
    """Return what a heartbeat or an error tells; nothing, if it tells nothing.

    Raises:
        VersionMismatchError: If another version of the library wrote it.
    """
    if not details:
        return Starts()
    return unpack(Starts, json.dumps(details[0]), "worker")


@workflow.defn(name=WORKFLOW, sandboxed=False)
class AgentWorkflow:
    """Runs one agent as one activity, again and again until a worker lives to see its end."""

    @workflow.signal(unfinished_policy=workflow.HandlerUnfinishedPolicy.ABANDON)
    async def tell(self, task_queue: str, news: str) -> None:
        """Bring news to the worker that has this task queue for itself; if it is gone, they are lost."""
        with suppress(ActivityError):
            await workflow.execute_activity(
                TELL_WORKER,
                args=[workflow.info().workflow_id, news],
                task_queue=task_queue,
                schedule_to_close_timeout=NEWS_TIMEOUT,
            )

    @workflow.run
    async def run(self, order: RawValue, heartbeat_timeout_seconds: float, max_starts: int) -> RawValue:
        """Return the reports of an agent that succeeded.

        A cancellation is given to the agent, and what it makes of it is how the workflow ends.

        Raises:
            ActivityError: With the reports, of an agent that did not succeed or whose workers were all lost.
        """
        reports: RawValue = await workflow.execute_activity(
            RUN_AGENT,
            order,
            result_type=RawValue,
            start_to_close_timeout=LONGEST_AGENT,
            heartbeat_timeout=timedelta(seconds=heartbeat_timeout_seconds),
            retry_policy=RetryPolicy(
                initial_interval=timedelta(seconds=0.1),
                maximum_interval=timedelta(seconds=10),
                maximum_attempts=max_starts,
            ),
            cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
        )
        return reports
