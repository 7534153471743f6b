"""Agents on a worker of Temporal: each is an activity, whose heartbeats tell what it has spent and told so far."""

import asyncio  # noqa: TID251 - Temporal's workers run on nothing else
import os
import secrets
import socket
from datetime import timedelta

from attrs import evolve, frozen
from temporalio import activity
from temporalio.client import Client
from temporalio.common import RawValue
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory
from temporalio.worker import Worker

from ..serialization import InvalidDataError
from ._protocol import AgentEngine
from ._remote import Ending, EndingKind, Order, Report, VersionMismatchError, pack, unpack
from ._remote_worker import RunOnWorker
from ._temporal import (
    RUN_AGENT,
    STOPPED,
    TELL_WORKER,
    UNSUCCESSFUL,
    AgentWorkflow,
    News,
    PayloadTooLargeError,
    Starts,
    own_queue,
    raw,
    starts_in,
    text_of,
)

REPORTED_EVENTS = 50
"""So many of an agent's last events are in each of its heartbeats."""

MESSAGE_CHARACTERS = 1000
"""Of an agent's error, for people who look at its workflow; its driver gets all of it."""

STICKY_SECONDS = 1.0
"""How long a workflow waits for the worker that knows it before another one reads it up. The ten seconds that Temporal
waits unless told otherwise come on top of a worker's death."""


@frozen
class Workers:
    """Temporal's workers of a process.

    Attributes:
        agents: Runs agents. Shut down first.
        workflows: Takes note of their ends, also of those of agents that end when no more are taken.
        news: Hears what drivers have to tell agents that run.
    """

    agents: Worker
    workflows: Worker
    news: Worker


class Agents:
    """Runs agents as activities of Temporal.

    Args:
        engine: What runs them, on asyncio.
        heartbeat_seconds: How often each one tells what it has spent, and hears whether it is cancelled.

    Attributes:
        is_stopping: Whether the worker is shutting down.
        ended_late: The workflows of agents that have ended since.
        interrupted: How many agents were cancelled because of that.
    """

    def __init__(self, engine: AgentEngine, *, heartbeat_seconds: float) -> None:
        self.is_stopping = False
        self.ended_late: list[str] = []
        self.interrupted = 0
        self._engine = engine
        self._heartbeat_seconds = heartbeat_seconds
        self._runs: set[RunOnWorker] = set()
        self._started = 0

    @property
    def running(self) -> int:
        """How many run."""
        return len(self._runs)

    def numbers(self) -> dict[str, int]:
        """Return what a monitor wants to know."""
        return {"running": len(self._runs), "started": self._started, "interrupted": self.interrupted}

    def stop(self) -> None:
        """Tell agents that the worker is shutting down: they may finish soon."""
        self.is_stopping = True
        for run in self._runs:
            run.is_stopping = True

    def interrupt(self) -> None:
        """Cancel all agents; they run again on another worker."""
        for run in self._runs:
            run.cancel(EndingKind.INTERRUPTED)

    def workers(self, client: Client, task_queue: str, *, max_agents: int, grace_seconds: float) -> "Workers":
        """Return Temporal's workers for these agents; to be made in a running event loop.

        Args:
            client: Connected.
            task_queue: Where assignments come from.
            max_agents: The most agents at the same time.
            grace_seconds: How long agents may go on when their worker is shut down.
        """
        identity = f"{os.getpid()}@{socket.gethostname()}-{secrets.token_hex(4)}"
        agents = Worker(
            client,
            task_queue=task_queue,
            identity=identity,
            activities=[self.run_agent],
            max_concurrent_activities=max_agents,
            graceful_shutdown_timeout=timedelta(seconds=grace_seconds),
            max_heartbeat_throttle_interval=timedelta(seconds=self._heartbeat_seconds / 2),
        )
        workflows = Worker(
            client,
            task_queue=task_queue,
            identity=identity,
            workflows=[AgentWorkflow],
            sticky_queue_schedule_to_start_timeout=timedelta(seconds=STICKY_SECONDS),
        )
        news = Worker(client, task_queue=own_queue(task_queue, identity), identity=identity, activities=[self.tell])
        return Workers(agents, workflows, news)

    @activity.defn(name=TELL_WORKER)
    async def tell(self, workflow_id: str, news: str) -> None:
        """Let an agent of this worker know what its driver has told it."""
        for run in self._runs:
            if run.id == workflow_id:
                run.is_stopping |= news == News.SHUTDOWN
                run.is_budget_spent |= news == News.BUDGET_SPENT

    @activity.defn(name=RUN_AGENT)
    async def run_agent(self, order: RawValue) -> RawValue:
        """Run one agent to its ending, and return the reports of all its starts.

        Raises:
            ApplicationError: With the reports, if it did not succeed, or the worker was stopped before it ended.
        """
        try:
            earlier = _without_events(starts_in(activity.info().heartbeat_details))
            run = RunOnWorker(unpack(Order, text_of(order), "driver"), lambda: None)
        except (InvalidDataError, VersionMismatchError) as error:
            ending = Ending(kind=EndingKind.REFUSED, error=str(error))
            report = Report(id=activity.info().activity_id, start="none", ending=ending)
            raise _unsuccessful(report, _payload(Starts(), report)) from None
        run.is_stopping = self.is_stopping
        self._runs.add(run)
        self._started += 1
        try:
            await self._perform(run, earlier)
        finally:
            self._runs.discard(run)
        report, payload = _fitting(earlier, run)
        assert report.ending is not None
        if report.ending.kind is EndingKind.INTERRUPTED:
            self.interrupted += self.is_stopping
            raise ApplicationError(
                "the worker was stopped before the agent had ended",
                payload,
                type=STOPPED,
                category=ApplicationErrorCategory.BENIGN,
            )
        if self.is_stopping:
            self.ended_late.append(run.id)
        if report.ending.kind is not EndingKind.RETURNED or report.ending.value().is_failure:
            raise _unsuccessful(report, payload)
        return payload

    async def _perform(self, run: RunOnWorker, earlier: Starts) -> None:
        performing = asyncio.create_task(run.perform(self._engine))
        beating = asyncio.create_task(self._beat(run, earlier))
        try:
            while not performing.done():
                try:
                    await asyncio.wait([performing])
                except asyncio.CancelledError:  # noqa: ASYNC103 - the agent gets it; what it makes of it is told
                    run.cancel(EndingKind.CANCELLED if _is_cancel_requested() else EndingKind.INTERRUPTED)
        finally:
            beating.cancel()
        activity.heartbeat(_fitting(earlier, run)[1])

    async def _beat(self, run: RunOnWorker, earlier: Starts) -> None:
        while True:
            activity.heartbeat(_fitting(earlier, run)[1])
            await asyncio.sleep(self._heartbeat_seconds)


def _is_cancel_requested() -> bool:
    details = activity.cancellation_details()
    return details is not None and details.cancel_requested


def _unsuccessful(report: Report, payload: RawValue) -> ApplicationError:
    """Return the error for an agent that has ended, but is to run again when somebody asks for it again."""
    ending = report.ending
    assert ending is not None
    text = ending.error or (ending.result and ending.result.error_message) or ending.kind.value
    return ApplicationError(
        text[:MESSAGE_CHARACTERS],
        payload,
        type=UNSUCCESSFUL,
        non_retryable=True,
        category=ApplicationErrorCategory.BENIGN,  # the driver tells it, so that Temporal's logger need not
    )


def _without_events(starts: Starts) -> Starts:
    return Starts(reports=tuple(evolve(report, events=()) for report in starts.reports))


def _fitting(earlier: Starts, run: RunOnWorker) -> tuple[Report, RawValue]:
    """Return the report of a run, and the payload of it; what makes it too large is left out."""
    report = run.report(max(0, run.event_count - REPORTED_EVENTS))
    without_events = evolve(report, first_event=run.event_count, events=())
    for fitting in (report, without_events):
        try:
            return fitting, _payload(earlier, fitting)
        except PayloadTooLargeError as error:
            too_large = error
    without_result = evolve(without_events, ending=report.ending and Ending.of_error(too_large))
    return without_result, _payload(earlier, without_result)


def _payload(earlier: Starts, report: Report) -> RawValue:
    return raw(pack(Starts(reports=(*earlier.reports, report))), "What the agent returned")
