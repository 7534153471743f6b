"""What a running agent can ask about its run: ``current_run()`` inside an engine call.

Knows no executor; the run in flight fills it in.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import MappingProxyType
from typing import Any

from attrs import define, field

from ._models import NO_USAGE, AgentAssignment, Usage
from ._outcomes import AgentOutcome
from .events import write_log
from .locks._protocol import Lease

NO_OUTCOMES: Mapping[str, AgentOutcome[Any]] = MappingProxyType({})


@define(eq=False)
class RunContext:
    """The agent's view of its run; it belongs to the event loop.

    A worker thread that an agent starts itself tells things through it with ``anyio.from_thread.run_sync()``. In plain
    functions that are tools, and in the agents of ``AsyncioEngine``, that has been seen to.

    Attributes:
        group_id: The group it runs in.
        assignment: What it was given.
        attempt: Which attempt this is, from 1.
        usage: What was metered so far.
        upstream: The outcomes of the tasks that this one depends on, by their ids.
        lease: What it holds of its claims; ``None`` without claims, and with a lock that has no leases. A store that
            is given its ``fencing_token`` can refuse what comes too late.
        program_env: Returns variables for programs that are started for this agent; what their engine sets stands
            above.
    """

    group_id: str
    assignment: AgentAssignment
    _shutdown_requested: Callable[[], bool] = field(alias="shutdown_requested", repr=False)
    attempt: int = field(default=1, kw_only=True)
    usage: Usage = field(default=NO_USAGE, kw_only=True)
    upstream: Mapping[str, AgentOutcome[Any]] = field(default=NO_OUTCOMES, kw_only=True, repr=False)
    lease: Lease | None = field(default=None, kw_only=True, repr=False)
    program_env: Callable[[], Mapping[str, str]] = field(default=dict, kw_only=True, repr=False)
    _usage_watchers: tuple[Callable[[Usage], object], ...] = field(default=(), init=False, repr=False)

    @property
    def shutdown_requested(self) -> bool:
        """Whether the program is shutting down; finish soon, or be cancelled after the grace period."""
        return self._shutdown_requested()

    @property
    def budget_exhausted(self) -> bool:
        """Whether the group's budget is spent: finish soon, nobody else starts."""
        return False

    @property
    def waits_for_others(self) -> bool:
        """Whether the agent is in a block of ``not_charged()``."""
        return False

    def record_usage(self, usage: Usage) -> None:
        """Add to what this agent spent; kept in its outcome whatever becomes of the agent."""
        self.usage = self.usage + usage
        for watcher in self._usage_watchers:
            watcher(usage)

    @contextmanager
    def watching_usage(self, watcher: Callable[[Usage], object], /) -> Iterator[None]:
        """Call *watcher* with each usage that is recorded in the block; for engines that wrap another."""
        self._usage_watchers += (watcher,)
        try:
            yield
        finally:
            self._usage_watchers = tuple(known for known in self._usage_watchers if known is not watcher)

    def emit(self, name: str, /, **fields: Any) -> None:
        """Send an event about this agent to the log and to the observers; *name* is a constant of ``events``."""
        ids = {"agent_id": self.assignment.agent_id, "task_id": self.assignment.task_id}
        write_log(name, group_id=self.group_id, **ids, **fields)

    @contextmanager
    def not_charged(self) -> Iterator[None]:
        """Do not count the time in this block towards the assignment's timeout: others make the agent wait.

        Blocks may be nested, and overlap in several tasks of an agent.
        """
        yield


class RunInAnotherThread(RunContext):
    """The run of an agent for code in another thread: what that code tells is sent to the thread of the run.

    Args:
        run: The agent's run.
        send: Has a function called in the run's event loop, after all that was sent before.
    """

    def __init__(self, run: RunContext, send: Callable[[Callable[[], object]], object]) -> None:
        super().__init__(
            run.group_id,
            run.assignment,
            lambda: run.shutdown_requested,
            attempt=run.attempt,
            usage=run.usage,
            upstream=run.upstream,
            lease=run.lease,
            program_env=run.program_env,
        )
        self._run = run
        self._send = send

    @property
    def budget_exhausted(self) -> bool:
        """Whether the group's budget is spent."""
        return self._run.budget_exhausted

    @property
    def waits_for_others(self) -> bool:
        """Whether the agent is in a block of ``not_charged()``."""
        return self._run.waits_for_others

    def record_usage(self, usage: Usage) -> None:
        """Add to what the agent spent; it arrives a moment later."""
        super().record_usage(usage)
        self._send(partial(self._run.record_usage, usage))

    def emit(self, name: str, /, **fields: Any) -> None:
        """Send an event about the agent."""
        self._send(partial(self._run.emit, name, **fields))

    @contextmanager
    def not_charged(self) -> Iterator[None]:
        """Do not count the time in this block towards the agent's timeout."""
        block = self._run.not_charged()
        self._send(block.__enter__)
        try:
            yield
        finally:
            self._send(partial(block.__exit__, None, None, None))


_current: ContextVar[RunContext] = ContextVar("parallel_agents_current_run")


def current_run() -> RunContext:
    """Return the run of the agent that is asking.

    Raises:
        LookupError: Outside an engine call.
    """
    try:
        return _current.get()
    except LookupError:
        raise LookupError("current_run() works inside an engine call only") from None
