"""One agent's workflow as its driver sees it: started or found, watched, cancelled, and what came of it."""

import asyncio  # noqa: TID251 - Temporal's client runs on nothing else
import atexit
import builtins
import functools
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

from attrs import evolve, field, frozen
from attrs.validators import optional
from temporalio.client import (
    Client,
    WorkflowExecutionDescription,
    WorkflowExecutionStatus,
    WorkflowFailureError,
    WorkflowHandle,
)
from temporalio.common import RawValue, WorkflowIDReusePolicy
from temporalio.exceptions import (
    ActivityError,
    ApplicationError,
    CancelledError,
    TimeoutError,  # noqa: A004 - Temporal's own
    WorkflowAlreadyStartedError,
)
from temporalio.service import RPCError, RPCStatusCode

from .._checks import integer, is_a, is_text, not_blank, number
from .._context import RunContext
from .._errors import ParallelAgentsError
from .._outcomes import AgentRunResult
from ..events import PARALLEL_AGENT_RESUMED
from ..serialization import InvalidDataError
from ._metering import Meter, difference, larger
from ._remote import Account, EndingKind, Order, VersionMismatchError, WorkerLostError, pack, unpack
from ._temporal import UNSUCCESSFUL, AgentWorkflow, News, Starts, own_queue, raw, starts_in, text_of
from .journal import fingerprint

T = TypeVar("T")

WORK = "parallel_agents.work"
"""The key of the workflow's memo that tells its work from another's."""

CALL = "parallel_agents.call"
"""The key of the workflow's memo that tells which call started it."""

AGAIN_SECONDS = 1.0
"""How long a driver waits before it asks a server again that did not answer."""

REQUEST_TIMEOUT = timedelta(seconds=5)
"""How long the server may take to say how an agent is doing."""

REQUEST_END_SECONDS = 0.5
"""How long the end of the program waits where requests were given up; they end at once, if the machine has time."""

FOR_GOOD = frozenset(
    {
        RPCStatusCode.INVALID_ARGUMENT,
        RPCStatusCode.NOT_FOUND,
        RPCStatusCode.PERMISSION_DENIED,
        RPCStatusCode.UNAUTHENTICATED,
        RPCStatusCode.UNIMPLEMENTED,
    }
)
"""Answers of a server that stay the same when it is asked again."""


class AnotherAgentRunsError(ParallelAgentsError):
    """An agent with other work runs under the same execution and task.

    Attributes:
        workflow_id: Of the other.
    """

    def __init__(self, workflow_id: str) -> None:
        super().__init__(workflow_id)
        self.workflow_id = workflow_id

    def __str__(self) -> str:
        return (
            f"The workflow {self.workflow_id!r} runs already, with other work: "
            "cancel it, wait for its end, or give another execution"
        )


@frozen(kw_only=True)
class Settings:
    """How agents run on Temporal; ``TemporalEngine`` says what each means."""

    client: Client = field(validator=is_a(Client))
    task_queue: str = field(validator=not_blank)
    execution: str | None = field(validator=optional(not_blank))
    heartbeat_timeout_seconds: float = field(validator=number(above=0))
    progress_seconds: float = field(validator=number(above=0))
    cancel_seconds: float = field(validator=number(above=0))
    starts: int = field(validator=integer(at_least=1))
    version: str = field(validator=is_text)


class Call:
    """An engine call; each has its own.

    Args:
        settings: How it runs.
        run: Of the call; its methods may be called from asyncio's thread.

    Attributes:
        is_over: Whether it is known that the agent runs no more.
    """

    def __init__(self, settings: Settings, run: RunContext) -> None:
        self.is_over = False
        self._settings = settings
        self._run = run
        self._account = Account(run)
        self._start = ""
        self._token = secrets.token_hex(8)
        self._told: set[tuple[str, News]] = set()
        self._id = workflow_id(settings.execution or run.group_id, run.assignment.task_id)

    async def perform(self) -> AgentRunResult[Any]:
        """Run the agent, or wait for the one that runs already; cancelling cancels it, and waits for a limited time."""
        order = raw(pack(Order.of(self._run, self._id)), f"The assignment of task {self._run.assignment.task_id!r}")
        self._account.wait(is_waiting=True)  # for a worker that takes it
        starting = asyncio.create_task(self._started_or_found(order))
        ending = asyncio.create_task(self._end_of(starting))
        try:
            await asyncio.wait([ending])
        except asyncio.CancelledError:  # noqa: ASYNC103 - what the agent returns all the same is its result
            await self._cancel(starting, ending)  # noqa: ASYNC102 - asyncio cancels once, and it is bounded
            if not ending.done():
                raise
        finally:
            self.is_over = ending.done()
            if not self.is_over:
                starting.cancel()
                ending.cancel()
                _let_requests_end_before_the_program()
            self._account.wait(is_waiting=False)
        return ending.result()

    async def _cancel(self, starting: "asyncio.Task[WorkflowHandle[Any, Any]]", ending: "asyncio.Task[Any]") -> None:
        """Cancel the agent first; then wait until it has ended, or its time is over."""
        with suppress(builtins.TimeoutError):
            async with asyncio.timeout(self._settings.cancel_seconds):
                await asyncio.wait([starting])
                if starting.exception() is None:
                    with suppress(RPCError):  # it has ended already, or nobody confirms it
                        await starting.result().cancel()
                await asyncio.wait([ending])

    async def _started_or_found(self, order: RawValue) -> WorkflowHandle[Any, Any]:
        """Start the agent, unless one with the same work runs or has succeeded.

        What became of a start that nobody answered is looked up before it is tried again.
        """
        work = fingerprint(self._run.assignment, self._run.upstream, self._settings.version)
        id_reuse_policy = WorkflowIDReusePolicy.ALLOW_DUPLICATE_FAILED_ONLY
        while True:
            try:
                return await self._start_workflow(order, work, id_reuse_policy)
            except WorkflowAlreadyStartedError:
                known = await self._last_known()
            except RPCError as error:
                await _wait_after(error)
                known = await self._last_known()
            if known is None:
                continue
            memo, client = await known.memo(), self._settings.client
            handle = client.get_workflow_handle(self._id, run_id=known.run_id, result_type=RawValue)
            if memo.get(CALL) == self._token:
                return handle
            is_running = known.status is WorkflowExecutionStatus.RUNNING
            if not is_running and known.status is not WorkflowExecutionStatus.COMPLETED:
                continue
            if memo.get(WORK) == work:
                self._run.emit(PARALLEL_AGENT_RESUMED, reason="running" if is_running else "recorded")
                return handle
            if is_running:
                raise AnotherAgentRunsError(self._id)
            if id_reuse_policy is not WorkflowIDReusePolicy.ALLOW_DUPLICATE:
                self._run.emit(PARALLEL_AGENT_RESUMED, reason="changed")
                id_reuse_policy = WorkflowIDReusePolicy.ALLOW_DUPLICATE

    async def _start_workflow(
        self, order: RawValue, work: str, id_reuse_policy: WorkflowIDReusePolicy
    ) -> WorkflowHandle[Any, Any]:
        return await self._settings.client.start_workflow(
            AgentWorkflow.run,
            args=[order, self._settings.heartbeat_timeout_seconds, self._settings.starts],
            id=self._id,
            task_queue=self._settings.task_queue,
            id_reuse_policy=id_reuse_policy,
            memo={WORK: work, CALL: self._token},
        )

    async def _last_known(self) -> WorkflowExecutionDescription | None:
        """Return what the server knows of the agent's last workflow; None if it had none yet."""
        try:
            return await _answer_to(self._settings.client.get_workflow_handle(self._id).describe)
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                return None
            raise

    async def _end_of(self, starting: "asyncio.Task[WorkflowHandle[Any, Any]]") -> AgentRunResult[Any]:
        """Wait for the agent's end, and return its result."""
        handle = await asyncio.shield(starting)
        has_ended, meter = asyncio.Event(), Meter(self._run)
        watching = asyncio.create_task(self._watch(handle, has_ended))
        try:
            starts, error = await _result_of(handle)
        finally:
            has_ended.set()
        await asyncio.wait([watching])
        self._take(starts)
        last = starts.reports[-1] if starts.reports else None
        if error is not None or last is None or last.ending is None:
            raise WorkerLostError(f"workflow {self._id!r}: {error}")
        if last.ending.kind is EndingKind.CANCELLED:
            raise asyncio.CancelledError
        result = last.ending.value()
        if len(starts.reports) == 1:
            return result
        self._run.record_usage(difference(larger(result.usage, last.usage), last.usage))
        return evolve(result, usage=meter.metered())

    async def _watch(self, handle: WorkflowHandle[Any, Any], has_ended: asyncio.Event) -> None:
        """Bring what the agent tells to its run, and news to its worker, until it has ended.

        Is not cancelled, for then a request could outlive the event loop.
        """
        while not has_ended.is_set():
            with suppress(builtins.TimeoutError):
                async with asyncio.timeout(self._settings.progress_seconds):
                    await has_ended.wait()
                return
            with suppress(RPCError, InvalidDataError, VersionMismatchError):  # the last report has it all, or says why
                known = await handle.describe(rpc_timeout=REQUEST_TIMEOUT)
                for pending in known.raw_description.pending_activities:
                    heartbeat = pending.heartbeat_details.payloads
                    if heartbeat:
                        (told,) = await self._settings.client.data_converter.decode(heartbeat, [RawValue])
                        self._take(unpack(Starts, text_of(told), "worker"))
                        await self._tell(handle, pending.last_worker_identity)

    def _take(self, starts: Starts) -> None:
        """Take note of the last start, and of those before it that are not known yet."""
        known = next((n for n, report in enumerate(starts.reports) if report.start == self._start), 0)
        for report in starts.reports[known:]:
            self._account.take(report)
            self._start = report.start

    async def _tell(self, handle: WorkflowHandle[Any, Any], worker: str) -> None:
        news = {News.SHUTDOWN: self._run.shutdown_requested, News.BUDGET_SPENT: self._run.budget_exhausted}
        for kind in (kind for kind, is_true in news.items() if is_true and (worker, kind) not in self._told):
            await handle.signal(AgentWorkflow.tell, args=[own_queue(self._settings.task_queue, worker), kind])
            self._told.add((worker, kind))


@functools.cache
def _let_requests_end_before_the_program() -> None:
    """See to it that a request which nobody waits for any more has ended when the interpreter does.

    Temporal's threads bring its end to Python; when they do so while the interpreter ends, each waits for the other
    for ever.
    """
    atexit.register(time.sleep, REQUEST_END_SECONDS)


def workflow_id(execution: str, task_id: str) -> str:
    """Return the same id for the same task of an execution, and another for every other one."""
    name = f"{execution.replace('%', '%25').replace('/', '%2F')}/{task_id}"
    return name.encode("utf-8", "backslashreplace").decode()


async def _answer_to(ask: Callable[[], Awaitable[T]]) -> T:
    """Ask a server until it answers: it may be restarting, or have too much to do, or an answer may have been lost."""
    while True:
        try:
            return await ask()
        except RPCError as error:
            await _wait_after(error)


async def _wait_after(error: RPCError) -> None:
    """Wait until the server may be asked again; raise what it would only repeat."""
    if error.status in FOR_GOOD:
        raise error
    await asyncio.sleep(AGAIN_SECONDS)


async def _result_of(handle: WorkflowHandle[Any, Any]) -> tuple[Starts, BaseException | None]:
    """Wait for the end of a workflow; return what is known of its agent, and the error if it did not end by itself."""
    try:
        return unpack(Starts, text_of(await _answer_to(handle.result)), "worker"), None
    except WorkflowFailureError as error:
        cause = error.cause.cause if isinstance(error.cause, ActivityError) else error.cause
        if isinstance(cause, CancelledError):
            raise asyncio.CancelledError from error
        if isinstance(cause, TimeoutError):
            return starts_in(cause.last_heartbeat_details), cause
        if isinstance(cause, ApplicationError):
            return starts_in(cause.details), None if cause.type == UNSUCCESSFUL else cause
        return Starts(), cause
