"""GroupRun: one execution of a group in flight: its workers, their scopes, the counters and the outcomes.

Workers pull assignments from the admission, one after another; an engine call runs in the worker's task but in a
context of its own. A worker has one cancel scope, renewed when it was used up; a task that an agent spoiled is left,
and another takes its place. Everything that decides what came of an agent is one synchronous step.

Knows locks as protocols only, and engines too, but for the one that is a plain function.
"""

import math
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import Context, copy_context
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup
from attrs import Factory, define, field

from ._admission import NO_PREREQUISITES, Admission
from ._claims import ResourceClaim
from ._context import NO_OUTCOMES, RunContext, _current
from ._deadlines import DeadlineWatch, WatchedScope
from ._drive import coroutine_function, drive
from ._endings import (
    BUDGET_SPENT,
    CALLER_CANCELLED,
    ENOUGH,
    RUN_CANCELLED,
    SHUTDOWN,
    TASK_CANCELLED,
    Stop,
    fatal_in,
    is_cancellation,
    order_to_end,
)
from ._errors import ParallelAgentsError, ParallelExecutionError, ResourceConflictError
from ._holding import HeldClaims, HeldLease, PlainLease, refuse_overlaps
from ._models import NO_USAGE, AgentAssignment, ClaimPolicy, GroupOptions, Usage
from ._outcomes import (
    _SUCCEEDED,
    AgentOutcome,
    AgentRunResult,
    OutcomeStatus,
    ParallelExecutionResult,
    ParallelProgress,
    completed_result,
    outcome_of_result,
    progress_of_run,
)
from ._shutdown import ShutdownManager
from ._slots import Slot, give_back_slots_of
from ._traces import Fitness, OwnScope, cancel_requests, pending_cancellation, tasks_directly_in
from .engines._metering import difference, larger
from .engines._protocol import AgentEngine, ChecksAssignments
from .engines.function import call_of
from .events import (
    PARALLEL_AGENT_CANCELLED,
    PARALLEL_AGENT_COMPLETE,
    PARALLEL_AGENT_ERROR,
    PARALLEL_AGENT_START,
    PARALLEL_AGENT_WAITING,
    PARALLEL_GROUP_COMPLETE,
    PARALLEL_GROUP_SUPPRESSED,
    PARALLEL_PROGRESS_UPDATE,
    PARALLEL_VALIDATION_ERROR,
    GroupEvents,
    Observer,
    call_quietly,
    error_text,
)
from .locks._protocol import NEVER_LOST, ResourceLock

T = TypeVar("T")

MAX_NESTING = 32
"""How deep groups may be nested; some hundred nested task groups cannot be cancelled on asyncio any more."""


@define(eq=False, init=False)
class EngineCall(RunContext):
    """One engine call in flight: what ``current_run()`` shows of it, and what the run needs to stop it."""

    run: "GroupRun[Any]"
    position: int
    scope: WatchedScope
    slot: Slot | None
    started: float
    stop: Stop | None
    spoiled_its_task: bool
    lease_watch: anyio.CancelScope | None
    lost_claims: str
    due: float
    waits: int
    waits_since: float

    # filled by GroupRun._start_call(): to enter a function for it would take half as long as all of that
    if TYPE_CHECKING:

        def __init__(self) -> None: ...
    else:
        __init__ = object.__init__

    @contextmanager
    def not_charged(self) -> Iterator[None]:
        if not self.waits:
            self.waits_since = self.run._clock()
        self.waits += 1
        self.run._set_deadline(self)
        try:
            yield
        finally:
            self.waits -= 1
            if not self.waits:
                self.due += self.run._clock() - self.waits_since
                self.run._set_deadline(self)

    @property
    def budget_exhausted(self) -> bool:
        return self.run._is_budget_spent

    @property
    def waits_for_others(self) -> bool:
        return self.waits > 0

    def record_usage(self, usage: Usage) -> None:
        RunContext.record_usage(self, usage)
        if self.run.group.budget is not None:
            self.run._spend(usage)

    def emit(self, name: str, /, **fields: Any) -> None:
        assignment = self.assignment
        self.run._events.emit(name, fields, assignment.task_id, assignment.agent_id)


@define(eq=False, kw_only=True)
class Settings:
    """What an executor gives each of its runs."""

    engine: AgentEngine
    limiter: anyio.CapacityLimiter | None
    resource_lock: ResourceLock
    shutdown_manager: ShutdownManager | None
    progress_callback: Callable[[ParallelProgress], object] | None
    observers: tuple[Observer, ...]
    shutdown_requested: Callable[[], bool] = field(
        init=False, default=Factory(lambda settings: _asks(settings.shutdown_manager), takes_self=True)
    )
    """Made once, because it stands in every engine call."""


def _asks(manager: ShutdownManager | None) -> Callable[[], bool]:
    """Return a function that asks whether the program is shutting down."""
    return bool if manager is None else lambda: manager.is_shutting_down


class GroupRun(Generic[T]):
    """A group in flight, as ``ParallelExecutor.open_group()`` gives it.

    Iterate over it for outcomes in order of completion; each iteration starts from the first one. It waits for the
    next outcome, ends with the group's last, and cancelling it cancels nothing else.
    """

    __slots__ = (
        "__weakref__",
        "_admission",
        "_all_else_ended",
        "_assignments",
        "_block_is_over",
        "_claim_deadlines",
        "_claiming",
        "_claiming_in_vain",
        "_claims",
        "_clock",
        "_context",
        "_deadlines",
        "_depth",
        "_enclosing",
        "_events",
        "_failed",
        "_fatal",
        "_grace_ends",
        "_has_begun",
        "_heeds_ends",
        "_is_budget_spent",
        "_is_settled",
        "_is_watched",
        "_news",
        "_on_order",
        "_order",
        "_orders_to_end",
        "_outcomes",
        "_parked",
        "_parked_tasks",
        "_positions",
        "_ran_at_shutdown",
        "_result",
        "_running",
        "_settings",
        "_spent",
        "_started",
        "_stopped",
        "_succeeded",
        "_successes_matter",
        "_tasks",
        "_total",
        "_waiting",
        "_watches",
        "_watches_claims",
        "_workers",
        "group",
    )

    def __init__(
        self,
        group: GroupOptions,
        settings: Settings,
        assignments: Sequence[AgentAssignment] | dict[int, AgentAssignment],
    ) -> None:
        self.group = group
        self._settings = settings
        self._assignments = assignments
        self._admission = self._make_admission()
        self._heeds_ends = not (group.budget is None and settings.shutdown_manager is None and not group.fail_fast)
        self._successes_matter = self._admission.has_prerequisites or group.stop_after_successes is not None
        self._outcomes: list[AgentOutcome[T] | None] = [None] * len(assignments)
        self._order: list[int] = []
        self._news: anyio.Event | None = None
        self._positions: dict[str, int] | None = None
        self._result: ParallelExecutionResult[T] | None = None

        self._clock = _clock_of_the_loop()
        self._started = self._clock()
        # a strong reference would close a circle, and keep all outcomes until the collector comes by
        this = weakref.proxy(self)
        self._on_order: Callable[[BaseException], None] = lambda order: this._end_for(order, "a callback")
        self._events = GroupEvents(
            group.group_id,
            settings.observers,
            self._clock,
            self._started,
            self._on_order,
        )
        self._claims = HeldClaims(settings.resource_lock, group.group_id, self._events)
        for position, assignment in enumerate(self._known_assignments()):
            if assignment.resource_claims:
                self._claims.add(position, assignment)
        self._enclosing = _enclosing_call()
        self._depth: int = 1 if self._enclosing is None else self._enclosing.run._depth + 1
        self._has_begun = False
        self._is_watched = False
        self._context: Context = copy_context()

        self._tasks: TaskGroup
        self._workers = 0
        self._parked_tasks = 0
        self._block_is_over = False
        self._all_else_ended = anyio.Event()
        self._waiting: set[WatchedScope] = set()
        self._claiming: dict[int, WatchedScope] = {}
        self._claiming_in_vain = 0
        self._claim_deadlines: dict[int, float] = {}
        self._watches_claims = False
        self._watches: set[anyio.CancelScope] = set()
        self._is_settled = False
        self._spent = NO_USAGE
        self._is_budget_spent = False
        running: dict[int, EngineCall] = {}
        self._running = running
        self._deadlines = DeadlineWatch(
            self._clock,
            lambda: [call.scope for call in running.values()],
            lambda: this._tasks.start_soon(this._watch_deadlines),
        )
        self._stopped: Stop | None = None
        self._grace_ends = math.inf
        self._ran_at_shutdown: frozenset[int] = frozenset()
        self._fatal: list[Exception] = []
        self._orders_to_end: list[BaseException] = []
        self._total = len(assignments)
        self._succeeded = self._failed = self._parked = 0

    def __repr__(self) -> str:
        return f"<GroupRun {self.group.group_id!r}: {self.progress}>"

    # What users see

    @property
    def progress(self) -> ParallelProgress:
        """How far the group is, at this moment."""
        return progress_of_run(
            self.group.group_id, self._total, len(self._running), self._succeeded, self._failed, self._parked
        )

    @property
    def result(self) -> ParallelExecutionResult[T]:
        """The outcomes of all assignments; there after the block, however it was left.

        Raises:
            RuntimeError: While the group is running.
        """
        if self._result is None:
            raise RuntimeError(f"group {self.group.group_id!r} is running; its result is there after the block")
        return self._result

    def cancel(self) -> None:
        """Cancel what runs, and start nothing more. Never waits; the block's end waits for the agents."""
        self._stop_all(RUN_CANCELLED)

    def cancel_task(self, task_id: str) -> bool:
        """Cancel one task, running or not. Never waits.

        Returns:
            Whether there was something to cancel; False if the task has its outcome already.

        Raises:
            KeyError: If the group has no such task.
        """
        position = self._position_of(task_id)
        if (call := self._running.get(position)) is not None:
            self._stop_call(call, TASK_CANCELLED)
            return True
        return self._give_up(position, self._unstarted(position, TASK_CANCELLED))

    def __aiter__(self) -> "OutcomeIterator[T]":
        return OutcomeIterator(self)

    # What a group knows of its assignments, and keeps of them

    _is_over = True
    """Whether no assignment can come any more."""

    def _known_assignments(self) -> Sequence[AgentAssignment]:
        assignments = self._assignments
        return tuple(assignments.values()) if isinstance(assignments, dict) else assignments

    def _make_admission(self) -> Admission:
        assignments = self._known_assignments()
        return Admission(
            len(assignments),
            self.group.max_concurrency,
            _claims_in_turn(self.group, self._assignments),
            _prerequisites(assignments),
        )

    def _begin(self) -> None:
        """Start the first task of the group."""
        self._spawn_worker()

    def _keep(self, position: int, outcome: AgentOutcome[T]) -> None:
        self._outcomes[position] = outcome
        self._order.append(position)

    def _has_outcome(self, position: int) -> bool:
        return self._outcomes[position] is not None

    def _without_outcome(self) -> list[int]:
        if len(self._order) == len(self._outcomes):
            return []
        return [position for position, outcome in enumerate(self._outcomes) if outcome is None]

    # From opening to closing

    @asynccontextmanager
    async def opened(self) -> AsyncIterator["GroupRun[T]"]:
        """Run the group for the length of the block, and raise at its end what must be raised."""
        group = self.group
        self._context.run(self._tell_opened)
        try:
            self._validate()
            if group.claim_policy is ClaimPolicy.REJECT:
                await self._claims.take_all()
            async with self._working():
                yield self
        except BaseException as error:
            status = self._status_after(error)
            if self._has_begun and self._result is None:  # it struck on the way in, or while the group was closed
                await self._close()  # noqa: ASYNC102 - it waits for what is shielded and bounded itself
            await self._claims.give_back_all()  # noqa: ASYNC102 - it is shielded and bounded itself
            self._context.run(self._tell_complete, status)
            self._raise_orders_to_end()
            for problem in self._claims.errors:
                error.add_note(f"A lock could not be given back: {error_text(problem)}")
            raise
        self._context.run(self._tell_complete, self._status())
        self._raise_orders_to_end()
        self._raise_for_errors()

    @asynccontextmanager
    async def slot_lent(self) -> AsyncIterator[None]:
        """Lend the slot of the agent that opens this group, if it is one, for the length of the block."""
        if self._enclosing is None or self._enclosing.slot is None:
            yield
        else:
            async with self._enclosing.slot.lent():
                yield

    def _attach_to_shutdown(self) -> None:
        if (manager := self._settings.shutdown_manager) is not None:
            manager.attach(self)
            if manager.is_shutting_down:
                self.begin_shutdown(0.0)

    def _detach_from_shutdown(self) -> None:
        if (manager := self._settings.shutdown_manager) is not None:
            manager.detach(self)

    @asynccontextmanager
    async def _working(self) -> AsyncIterator[None]:
        """Keep the workers for the length of the block; at its end there is an outcome for each assignment."""
        raised: BaseException | None = None
        self._has_begun = True
        self._is_watched = self._settings.progress_callback is not None or self._events.is_wanted(
            PARALLEL_PROGRESS_UPDATE
        )
        if self._is_watched:
            self._tell_progress()
        self._attach_to_shutdown()
        try:
            async with anyio.create_task_group() as self._tasks:
                self._begin()
                if self.group.deadline_seconds is not None:
                    self._tasks.start_soon(self._watch_deadline, self.group.deadline_seconds)
                try:
                    yield
                except (anyio.get_cancelled_exc_class(), GeneratorExit):
                    raise
                except BaseException as error:  # noqa: BLE001 - raised again below, bare: the task group would wrap it
                    raised = error
                    self._stop_all(Stop(f"the block that opened the group raised {type(error).__name__}", "error"))
                finally:
                    self._block_is_over = True
                    self._let_parked_tasks_end()
        except BaseExceptionGroup as errors:  # noqa: ASYNC103 - what parked tasks end with is anyio's, and told already
            others = errors.split(RuntimeError)[1] if self._parked_tasks else errors
            if others is not None:
                raise others from None
            await anyio.lowlevel.checkpoint_if_cancelled()  # the parked tasks' errors stood above a cancellation
        finally:
            await self._close()  # noqa: ASYNC102 - it waits for what is shielded and bounded itself
        if raised is not None:
            raise raised

    async def _close(self) -> None:
        """Give everything its outcome, and give everything back. May be repeated if an exception struck it."""
        self._settle()
        self._detach_from_shutdown()
        await self._claims.give_back_all()
        self._result = ParallelExecutionResult(
            group_id=self.group.group_id,
            outcomes=[outcome for outcome in self._outcomes if outcome is not None],
            total_duration_seconds=self._clock() - self._started,
        )

    def _validate(self) -> None:
        """Refuse what the input alone shows wrong, before anything starts."""
        try:
            if self._depth > MAX_NESTING:
                raise ParallelAgentsError(
                    f"Groups are nested {self._depth} deep, more than {MAX_NESTING}. Give the work to one flat group"
                )
            refuse_overlaps(self.group, self._known_assignments(), self._enclosing_assignments())
            if isinstance(self._settings.engine, ChecksAssignments):
                for assignment in self._known_assignments():
                    self._settings.engine.check(assignment)
        except Exception as error:
            self._events.emit(PARALLEL_VALIDATION_ERROR, {"error": error_text(error)})
            raise

    def _enclosing_assignments(self) -> list[AgentAssignment]:
        found = []
        call = self._enclosing
        while call is not None:
            found.append(call.assignment)
            call = call.run._enclosing
        return found

    def _raise_orders_to_end(self) -> None:
        """Raise, as it is, what told the program to end; it stands above every other error."""
        if self._orders_to_end:
            self._tell_suppressed()
            raise self._orders_to_end[0]

    def _raise_for_errors(self) -> None:
        """Raise at the end of a group that nothing else ended."""
        if self._fatal:
            cause = self._fatal[0] if len(self._fatal) == 1 else ExceptionGroup("several agents", self._fatal)
            error = ParallelExecutionError(
                f"Fatal error in group {self.group.group_id!r}: {error_text(cause)}", self.result
            )
            for problem in self._claims.errors:
                error.add_note(f"A lock could not be given back: {error_text(problem)}")
            raise error from cause
        if self._claims.errors:
            problems = self._claims.errors
            cause = problems[0] if len(problems) == 1 else ExceptionGroup("several locks", problems)
            raise ParallelExecutionError(
                f"Group {self.group.group_id!r} could not give back its locks: {error_text(cause)}", self.result
            ) from cause

    def _status(self) -> str:
        if self._stopped is not None:
            return self._stopped.group_status
        return "fatal" if self._fatal else "completed"

    def _status_after(self, error: BaseException) -> str:
        if self._result is None and isinstance(error, ParallelAgentsError | ValueError):
            return "conflict" if isinstance(error, ResourceConflictError) else "refused"
        if isinstance(error, anyio.get_cancelled_exc_class()):
            return "cancelled"
        return "error" if isinstance(error, Exception) else "interrupted"

    # Workers

    def _spawn_worker(self) -> None:
        self._workers += 1
        self._tasks.start_soon(self._work, name=f"parallel_agents worker of {self.group.group_id!r}")

    async def _work(self) -> None:
        """Be one worker: run assignments until none is left, or until the task is spoiled."""
        task, fitness = anyio.get_current_task(), Fitness.FIT
        try:
            if task.has_pending_cancellation():  # nothing ran in this task yet: it is the group that is cancelled
                self._stop_all(CALLER_CANCELLED)
            while fitness is Fitness.FIT and self._admission.has_ready and not task.has_pending_cancellation():
                with OwnScope(task) as own:
                    own.fitness = await self._work_while_clean(own.scope, task)
                fitness = own.fitness
            if fitness is not Fitness.HOLDS_A_SCOPE and task.has_pending_cancellation():
                await self._take_cancellation(task)
        finally:
            self._workers -= 1
            if self._admission.has_ready and not self._workers_suffice():
                self._spawn_worker()
            else:
                self._end_if_over()
        if fitness is Fitness.HOLDS_A_SCOPE:
            await self._park()

    def _end_if_over(self) -> None:
        """See to what there is to do when nothing runs and nothing more can start."""
        if not self._workers and self._is_over:
            self._settle()
            if self._claims.are_owed:
                self._tasks.start_soon(self._claims.give_back_all)
            self._detach_from_shutdown()
            self._let_parked_tasks_end()

    async def _park(self) -> None:
        """Keep a task in which a scope was left open from ending before everything else has.

        On asyncio it can end only with an error, which would cancel whatever still runs in the task group.
        """
        self._parked_tasks += 1
        with anyio.CancelScope(shield=True):  # bounded by the workers and the block, for which alone it waits
            await self._all_else_ended.wait()

    def _let_parked_tasks_end(self) -> None:
        if self._block_is_over and not self._workers:
            self._all_else_ended.set()

    async def _take_cancellation(self, task: anyio.TaskInfo) -> None:
        """Raise the group's cancellation; use up a native one that an agent left behind for this task alone.

        A task that ends with a native cancellation pending ends as cancelled, which would cancel its whole group.
        """
        try:
            await anyio.lowlevel.checkpoint()
        except anyio.get_cancelled_exc_class():  # noqa: ASYNC103 - what is not raised was for this task alone
            if task.has_pending_cancellation():
                raise

    def _call_or_dismiss_workers(self) -> None:
        """After an assignment was taken: start the next worker, or send those away for whom nothing is left."""
        if not self._admission.has_ready:
            for scope in self._waiting:
                scope.cancel()
        elif not self._workers_suffice():
            self._spawn_worker()

    def _workers_suffice(self) -> bool:
        """Whether another worker would find nothing to do, or only wait beside one that waits for a slot already."""
        return self._workers - self._claiming_in_vain >= self._admission.limit or bool(self._waiting)

    async def _work_while_clean(  # noqa: C901, PLR0912, PLR0915 - in one piece: every agent would pay for calls of parts
        self, own_scope: anyio.CancelScope, task: anyio.TaskInfo
    ) -> Fitness:
        """Run assignments until the scope is used up, or one has left something behind in the task."""
        scope, own_task = WatchedScope(own_scope), tasks_directly_in(own_scope)
        is_cancelled, requests = pending_cancellation(own_scope, task), cancel_requests(own_task)
        clock, limiter = self._clock, self._settings.limiter
        function, takes_any_value = call_of(self._settings.engine)
        call_agent = coroutine_function(function)
        admission, claims, events = self._admission, self._claims, self._events
        make_context, set_current = self._context.copy, _current.set
        now = clock()
        while admission.has_ready:
            if requests():  # what an agent left behind, perhaps beside a cancellation of the scope before this one
                return Fitness.SPOILED
            slot = None if limiter is None else Slot(limiter, self)
            if slot is not None and not slot.take_nowait():
                await self._wait_for(slot, scope)
                if scope.cancel_called:  # dismissed after it was given the slot: no agent may run in a cancelled scope
                    slot.give_back()
                    break
                now = clock()
            position = admission.take()
            if admission.passed_over:
                self._note_passed_over()
            if position is None:
                if slot is not None:
                    slot.give_back()
                return Fitness.NOT_NEEDED
            if claims.may_be_lacking and claims.lack(position):
                await self._claim(position, scope, slot)
                if scope.cancel_called:
                    break
                now = clock()
                continue
            call = self._start_call(position, scope, slot, now)
            context = make_context()
            context.run(set_current, call)
            if events.are_heard:
                context.run(self._tell_started, call.assignment)
            try:
                value = await drive(context, call_agent(call.assignment))
            except BaseException as error:  # noqa: ASYNC103, BLE001 - _take_cancellation() raises one that goes on
                now = clock()
                del self._running[position]
                outcome = self._outcome_of_error(call, error, now, pending=task.has_pending_cancellation())
            else:
                now = clock()
                del self._running[position]
                outcome = self._outcome_of_value(call, value, now, takes_any_value)
            scope.deadline = math.inf
            if slot is not None:
                slot.give_back()
            if call.lease_watch is not None:
                call.lease_watch.cancel()
            if claims.leases and (still_held := claims.give_back(position)) is not None:
                await claims.finish(still_held)
                now = clock()  # the next agent's time does not begin before its call
            admission.finish(position)
            if self._heeds_ends:
                self._heed(call, outcome)
            # warnings and errors are told in any case
            if outcome.result is None or (events.are_heard and events.is_wanted(PARALLEL_AGENT_COMPLETE)):
                context.run(self._tell_ended, outcome)
            self._record(position, outcome)
            if call.spoiled_its_task:
                return Fitness.SPOILED
            if not own_task or is_cancelled():  # a scope was left open, or there is one to be renewed
                break
        return Fitness.FIT

    async def _wait_for(self, slot: Slot, scope: WatchedScope) -> None:
        self._waiting.add(scope)
        try:
            await slot.take()
        finally:
            self._waiting.discard(scope)

    # Waiting for claims

    async def _claim(self, position: int, scope: WatchedScope, slot: Slot | None) -> None:
        """Take the claims of one assignment, which then starts as soon as there is room; or give it its outcome."""
        self._admission.postpone(position)
        self._call_or_dismiss_workers()
        if slot is not None:
            slot.give_back()
        self._claiming[position] = scope
        try:
            try:
                await self._claims.take(position, 0)
            except ResourceConflictError as conflict:
                if self.group.claim_policy is ClaimPolicy.REJECT:
                    raise
                await self._wait_for_claims(position, conflict)
            finally:
                del self._claiming[position]
        except ResourceConflictError as error:
            self._refuse(position, error.resource, error.holder)
        except anyio.get_cancelled_exc_class():
            self._give_up(position, self._unstarted(position, self._stopped or CALLER_CANCELLED))
            raise
        except Exception as error:  # noqa: BLE001 - whatever a user's lock raises
            self._fail_unstarted(position, OutcomeStatus.FAILED, f"Claims not taken: {error_text(error)}", error)
        if not self._has_outcome(position):
            self._admission.resume(position)
        elif (still_held := self._claims.give_back(position)) is not None:
            await self._claims.finish(still_held)

    async def _wait_for_claims(self, position: int, conflict: ResourceConflictError) -> None:
        self._tell_waiting(position, conflict.resource, conflict.holder)
        timeout = self.group.claim_timeout_seconds
        if position in self._claim_deadlines and timeout is not None:
            timeout = max(0.0, self._claim_deadlines[position] - self._clock())
        self._claiming_in_vain += 1
        try:
            self._call_or_dismiss_workers()
            await self._claims.take(position, timeout)
        finally:
            self._claiming_in_vain -= 1

    def _note_passed_over(self) -> None:
        """Take note of those whose turn came while others of the group have their claims."""
        passed_over = tuple(self._admission.passed_over)
        self._admission.passed_over.clear()
        if self._events.are_heard:
            for position in passed_over:
                other, resource = self._admission.in_the_way_of(position)
                self._tell_waiting(position, resource, self._assignments[other].agent_id)
        if self.group.claim_timeout_seconds is not None:
            deadline = self._clock() + self.group.claim_timeout_seconds
            self._claim_deadlines.update((position, deadline) for position in passed_over)
            if not self._watches_claims:
                self._watches_claims = True
                self._tasks.start_soon(self._watch_claim_deadlines)

    async def _watch_claim_deadlines(self) -> None:
        """Give up those that still wait for others of the group when their time is over."""
        with self._watching():
            while self._claim_deadlines:
                position, deadline = next(iter(self._claim_deadlines.items()))
                await anyio.sleep_until(deadline)
                if self._admission.is_passed_over(position):
                    other, resource = self._admission.in_the_way_of(position)
                    agent_id = self._assignments[other].agent_id
                    self._refuse(position, resource, agent_id)
                self._claim_deadlines.pop(position, None)
        self._watches_claims = False

    async def _watch_deadlines(self) -> None:
        """Cancel each engine call when its time is over."""
        with self._watching():
            await self._deadlines.run()

    async def _watch_deadline(self, seconds: float) -> None:
        """Stop the group when its time is over."""
        with self._watching():
            await anyio.sleep_until(self._started + seconds)
            cause = f"the deadline of the group, {seconds:g} s, is over"
            self._stop_all(Stop(cause, "deadline", OutcomeStatus.SKIPPED, OutcomeStatus.TIMED_OUT))

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Be ended when every assignment has its outcome."""
        with anyio.CancelScope() as scope:
            self._watches.add(scope)
            if self._is_settled:  # before this task came to its first step
                scope.cancel()
            try:
                yield
            finally:
                self._watches.discard(scope)

    def _give_up(self, position: int, outcome: AgentOutcome[T]) -> bool:
        """Give an assignment that has not started its outcome; return whether it was one."""
        if self._has_outcome(position) or not self._admission.withdraw(position):
            return False
        if (scope := self._claiming.get(position)) is not None:
            scope.cancel()  # who takes the claims gives them back
        elif (still_held := self._claims.give_back(position)) is not None:
            self._tasks.start_soon(self._claims.finish, still_held)
        self._record(position, outcome)
        self._call_or_dismiss_workers()
        return True

    def _refuse(self, position: int, resource: str, holder: str) -> None:
        seconds = self.group.claim_timeout_seconds
        what = "Claim not to be had" if seconds is None else f"Claim not to be had within {seconds:g} s"
        error = f"{what}: {resource!r} is held by {holder!r}"
        self._fail_unstarted(position, OutcomeStatus.REJECTED, error)

    def _fail_unstarted(
        self, position: int, status: OutcomeStatus, error: str, exception: Exception | None = None
    ) -> None:
        """Give up an assignment for a reason of its own; that is a failure like any other."""
        outcome = self._never_ran(position, status, error, exception)
        if self._give_up(position, outcome) and self.group.fail_fast:
            self._stop_all(Stop(f"agent {outcome.agent_id!r} failed", "failed_fast"))

    async def _watch_lease(self, call: EngineCall, lease: HeldLease, scope: anyio.CancelScope) -> None:
        """Stop an agent whose claims are lost: another may have them by now."""
        with scope:
            await lease.lost.wait()
            call.lost_claims = ", ".join(repr(resource) for resource in sorted(c.resource for c in lease.claims))
            self._stop_call(call, Stop(f"its claim was lost: {call.lost_claims}"))

    # One engine call

    def _start_call(self, position: int, scope: WatchedScope, slot: Slot | None, now: float) -> EngineCall:
        admission, assignment = self._admission, self._assignments[position]
        # what the call would find out as well, and nearly always does
        if not admission.has_ready or self._workers - self._claiming_in_vain < admission.limit:
            self._call_or_dismiss_workers()
        call = EngineCall()
        call.group_id = self.group.group_id
        call.assignment = assignment
        call._shutdown_requested = self._settings.shutdown_requested
        call.attempt = 1
        call.usage = NO_USAGE
        call.upstream = self._upstream_of(assignment) if assignment.task.depends_on else NO_OUTCOMES
        call.lease = None
        call.program_env = dict
        call._usage_watchers = ()
        call.run = self
        call.position = position
        call.scope = scope
        call.slot = slot
        call.started = now
        call.stop = None
        call.spoiled_its_task = False
        call.lease_watch = None
        call.lost_claims = ""
        call.due = math.inf
        call.waits = 0
        call.waits_since = 0.0
        self._running[position] = call
        if self._is_watched:
            self._tell_progress()
        if assignment.timeout_seconds is not None:
            scope.deadline = call.due = now + assignment.timeout_seconds
            if call.due < self._deadlines.looks_at:
                self._deadlines.tell(call.due)
        if self._claims.leases and (lease := self._claims.leases.get(position)) is not None:
            call.lease = None if isinstance(lease, PlainLease) else lease
            if lease.lost is not NEVER_LOST:
                call.lease_watch = anyio.CancelScope()
                self._tasks.start_soon(self._watch_lease, call, lease, call.lease_watch)
        return call

    def _upstream_of(self, assignment: AgentAssignment) -> Mapping[str, AgentOutcome[T]]:
        found = {name: self._outcomes[self._position_of(name)] for name in assignment.task.depends_on}
        return MappingProxyType({name: outcome for name, outcome in found.items() if outcome is not None})

    def _set_deadline(self, call: EngineCall) -> None:
        """Let the scope end when the agent's time is over, which does not pass while it waits for others."""
        if self._running.get(call.position) is call:
            call.scope.deadline = min(math.inf if call.waits else call.due, self._grace_ends)
            self._deadlines.tell(call.scope.deadline)

    def _outcome_of_value(self, call: EngineCall, value: Any, now: float, takes_any_value: bool) -> AgentOutcome[T]:
        assignment = call.assignment
        usage, error = call.usage, ""
        if isinstance(value, AgentRunResult):
            result: AgentRunResult[T] | None = value
            usage = value.usage if usage is NO_USAGE else larger(value.usage, usage)
            if value.task_id != assignment.task.id or value.agent_id != assignment.identity.id:
                error = (
                    f"The engine returned the result of task {value.task_id!r} and agent {value.agent_id!r} "
                    f"for task {assignment.task_id!r} and agent {assignment.agent_id!r}"
                )
        elif takes_any_value:
            result = completed_result(assignment.task.id, assignment.identity.id, value)
        else:
            result = None
            error = f"The engine returned {type(value).__name__} instead of an AgentRunResult"
        if call.lost_claims:
            error = _lost_text(call)
        if error or result is None:
            return self._unsuccessful(call, now, OutcomeStatus.FAILED, error, usage=usage)
        return outcome_of_result(result, usage, call.attempt, call.started - self._started, now - call.started)

    def _outcome_of_error(self, call: EngineCall, error: BaseException, now: float, pending: bool) -> AgentOutcome[T]:
        """Decide what an exception means, and note what concerns more than this agent."""
        assignment = call.assignment
        status, text = OutcomeStatus.FAILED, error_text(error)
        late = now >= call.due
        if (order := order_to_end(error, anyio.get_cancelled_exc_class())) is not None:
            self._end_for(order, f"agent {assignment.agent_id!r}")
        elif (fatal := fatal_in(error)) is not None:
            self._fatal.append(fatal)
            text = f"Fatal: {error_text(fatal)}"
        elif call.lost_claims:
            text = _lost_text(call)
        elif call.stop is not None and call.stop.status_if_running is OutcomeStatus.TIMED_OUT:
            status, text = OutcomeStatus.TIMED_OUT, _late_text(call.stop.text, error, anyio.get_cancelled_exc_class())
        elif call.stop is None and late:
            status, text = (
                OutcomeStatus.TIMED_OUT,
                _late_text(f"Timed out after {assignment.timeout_seconds:g} s", error, anyio.get_cancelled_exc_class()),
            )
        elif is_cancellation(error, anyio.get_cancelled_exc_class()):
            status, text = OutcomeStatus.CANCELLED, _with_notes(self._cancellation_text(call, now, pending), error)
        return self._unsuccessful(call, now, status, text, usage=call.usage, exception=error)

    def _cancellation_text(self, call: EngineCall, now: float, pending: bool) -> str:
        if call.stop is not None:
            return call.stop.text
        if not pending:
            call.spoiled_its_task = True
            return "Cancelled by itself: the agent raised the backend's cancelled exception"
        if now >= self._grace_ends:
            return SHUTDOWN.text
        self._stop_all(CALLER_CANCELLED)
        return CALLER_CANCELLED.text

    def _unsuccessful(
        self,
        call: EngineCall,
        now: float,
        status: OutcomeStatus,
        error: str,
        *,
        usage: Usage,
        exception: BaseException | None = None,
    ) -> AgentOutcome[T]:
        return AgentOutcome(
            task_id=call.assignment.task_id,
            agent_id=call.assignment.agent_id,
            error=error,
            status=status,
            usage=usage,
            attempts=call.attempt,
            started_after_seconds=call.started - self._started,
            duration_seconds=now - call.started,
            exception=exception,
        )

    def _heed(self, call: EngineCall, outcome: AgentOutcome[T]) -> None:
        """Let the end of an engine call have its consequences for what it cost, for the others, and for a shutdown."""
        if self.group.budget is not None and outcome.usage is not call.usage:
            self._spend(difference(outcome.usage, call.usage))
        if self.group.fail_fast and outcome.status in (OutcomeStatus.FAILED, OutcomeStatus.TIMED_OUT):
            self._stop_all(Stop(f"agent {outcome.agent_id!r} failed", "failed_fast"))
        if call.position in self._ran_at_shutdown and (manager := self._settings.shutdown_manager) is not None:
            agent = f"{self.group.group_id}:{outcome.task_id}"
            manager.note_ended(agent, by_itself=outcome.status is not OutcomeStatus.CANCELLED)

    def _record(self, position: int, outcome: AgentOutcome[T]) -> None:
        """Keep an outcome, count it, tell of it, and let it have its consequences for those that have not started."""
        self._keep(position, outcome)
        succeeded = outcome.status is _SUCCEEDED
        if succeeded:
            self._succeeded += 1
        elif outcome.status is OutcomeStatus.PARKED:
            self._parked += 1
        else:
            self._failed += 1
        if self._is_watched or self._news is not None:
            self._tell_news()
        if self._successes_matter or not succeeded:
            self._follow(position, outcome)

    def _follow(self, position: int, outcome: AgentOutcome[T]) -> None:
        """Let an outcome have its consequences for the others."""
        succeeded = outcome.status is _SUCCEEDED
        if succeeded and self._succeeded == self.group.stop_after_successes:
            self._stop_all(ENOUGH)  # whatever stopped the others from starting before
        elif self._stopped is not None:
            return
        elif succeeded:
            self._admission.satisfy(position)
            if self._admission.passed_over:
                self._note_passed_over()
        elif outcome.status is not OutcomeStatus.SKIPPED:  # those that depend on a skipped one are skipped with it
            status = outcome.status.value.replace("_", " ")
            error = f"Skipped: it depends on task {outcome.task_id!r}, which is {status}"
            for dependent in self._admission.dependents_of(position):
                self._give_up(dependent, self._never_ran(dependent, OutcomeStatus.SKIPPED, error))

    def _spend(self, usage: Usage) -> None:
        """Count what an agent spent; when the budget is reached, nothing more starts."""
        self._spent = self._spent + usage
        budget = self.group.budget
        if budget is not None and not self._is_budget_spent and budget.is_spent_by(self._spent):
            self._is_budget_spent = True
            self._start_nothing_more(BUDGET_SPENT)

    # Stopping

    def _stop_all(self, stop: Stop) -> None:
        """Start nothing more and cancel what runs; the first reason stands."""
        self._start_nothing_more(stop)
        for call in self._running.values():
            self._stop_call(call, stop)

    def _stop_call(self, call: EngineCall, stop: Stop) -> None:
        if call.stop is None:
            call.stop = stop
            call.scope.cancel()

    def _start_nothing_more(self, stop: Stop) -> None:
        if self._stopped is None:
            self._stopped = stop
        self._admission.close()
        for scope in self._claiming.values():
            scope.cancel()
        self._call_or_dismiss_workers()

    def begin_shutdown(self, grace_seconds: float) -> None:
        """Start nothing more; cancel what still runs when the grace period is over. Never waits."""
        self._start_nothing_more(SHUTDOWN)
        self._ran_at_shutdown = self._ran_at_shutdown or frozenset(self._running)
        self._grace_ends = min(self._grace_ends, self._clock() + grace_seconds)
        for call in self._running.values():
            if not grace_seconds:
                self._stop_call(call, SHUTDOWN)
            else:
                call.scope.deadline = min(call.scope.deadline, self._grace_ends)
                self._deadlines.tell(call.scope.deadline)

    def _end_for(self, order: BaseException, who: str) -> None:
        """Stop the group because of an order to end the program; it leaves the block, bare."""
        self._orders_to_end.append(order)
        self._stop_all(Stop(f"{who} raised {type(order).__name__}", "interrupted"))

    def _settle(self) -> None:
        """Give an outcome to everything that has none when nothing runs any more."""
        self._is_settled = True
        for watch in self._watches:
            watch.cancel()
        positions = self._without_outcome()
        if not positions:
            return
        self._running.clear()  # of calls that an exception struck before or after their engine ran
        if self._settings.limiter is not None:
            give_back_slots_of(self, self._settings.limiter)
        self._admission.close()
        stop = self._stopped or CALLER_CANCELLED
        for position in positions:
            self._claims.give_back_later(position)
            self._keep(position, self._unstarted(position, stop))
            self._failed += 1
        self._tell_news()

    def _unstarted(self, position: int, stop: Stop) -> AgentOutcome[T]:
        return self._never_ran(position, stop.status, stop.text_if_queued)

    def _never_ran(
        self, position: int, status: OutcomeStatus, error: str, exception: Exception | None = None
    ) -> AgentOutcome[T]:
        assignment = self._assignments[position]
        return AgentOutcome(
            task_id=assignment.task_id,
            agent_id=assignment.agent_id,
            error=error,
            status=status,
            attempts=0,
            exception=exception,
        )

    def _position_of(self, task_id: str) -> int:
        if self._positions is None:
            self._positions = {a.task_id: position for position, a in enumerate(self._known_assignments())}
        try:
            return self._positions[task_id]
        except KeyError:
            raise KeyError(f"group {self.group.group_id!r} has no task {task_id!r}") from None

    # Telling

    def _tell_news(self) -> None:
        """Wake those who iterate over the outcomes, and tell the progress."""
        if self._news is not None:
            self._news.set()
            self._news = None
        if self._is_watched:
            self._tell_progress()

    def _tell_progress(self) -> None:
        callback = self._settings.progress_callback
        if callback is not None:
            call_quietly(callback, self.progress, self._on_order)
        if self._events.are_heard and self._events.is_wanted(PARALLEL_PROGRESS_UPDATE):
            progress = self.progress
            self._events.emit(
                PARALLEL_PROGRESS_UPDATE,
                {
                    "total": progress.total,
                    "completed": progress.completed,
                    "in_progress": progress.in_progress,
                    "succeeded": progress.succeeded,
                    "failed": progress.failed,
                    "parked": progress.parked,
                    "pending": progress.pending,
                },
            )

    def _tell_waiting(self, position: int, resource: str, holder: str) -> None:
        if self._events.are_heard:
            assignment = self._assignments[position]
            fields = {"resource": resource, "holder": holder}
            self._events.emit(PARALLEL_AGENT_WAITING, fields, assignment.task_id, assignment.agent_id)

    def _tell_started(self, assignment: AgentAssignment) -> None:
        self._events.emit(PARALLEL_AGENT_START, {}, assignment.task_id, assignment.agent_id)

    def _tell_ended(self, outcome: AgentOutcome[T]) -> None:
        name, level, usage = PARALLEL_AGENT_ERROR, None, outcome.usage
        told: dict[str, Any] = {}
        if outcome.result is not None:
            name = PARALLEL_AGENT_COMPLETE
            told["success"] = outcome.is_success
        elif outcome.status is OutcomeStatus.CANCELLED:
            name = PARALLEL_AGENT_CANCELLED
        else:
            is_fatal = outcome.exception is not None and fatal_in(outcome.exception) is not None
            level = "ERROR" if is_fatal else None
            told["error"] = outcome.error
            told["error_type"] = "" if outcome.exception is None else type(outcome.exception).__name__
        told["status"] = outcome.status.value
        told["duration_seconds"] = outcome.duration_seconds
        told["input_tokens"] = usage.input_tokens
        told["output_tokens"] = usage.output_tokens
        told["cost"] = usage.cost
        self._events.emit(name, told, outcome.task_id, outcome.agent_id, level)

    def _tell_opened(self) -> None:
        group = self.group
        self._events.start(
            agent_count=len(self._assignments) or None, max_concurrency=group.max_concurrency, fail_fast=group.fail_fast
        )

    def _tell_suppressed(self) -> None:
        if len(self._orders_to_end) > 1:
            first = error_text(self._orders_to_end[0])
            self._events.emit(PARALLEL_GROUP_SUPPRESSED, {"error": first, "exception_count": len(self._orders_to_end)})

    def _tell_complete(self, status: str) -> None:
        self._events.emit(
            PARALLEL_GROUP_COMPLETE,
            {
                "succeeded": self._succeeded,
                "failed": self._failed,
                "duration_seconds": self._clock() - self._started,
                "status": status,
            },
        )


class OutcomeIterator(Generic[T]):
    """Outcomes of a run in order of completion."""

    def __init__(self, run: GroupRun[T]) -> None:
        self._run = run
        self._seen = 0

    def __aiter__(self) -> "OutcomeIterator[T]":
        return self

    async def __anext__(self) -> AgentOutcome[T]:
        """Wait for the next outcome. A checkpoint."""
        await anyio.lowlevel.checkpoint()
        run = self._run
        while self._seen == len(run._order):
            if self._seen == len(run._outcomes):
                raise StopAsyncIteration
            if run._news is None:
                run._news = anyio.Event()
            await run._news.wait()
        outcome = run._outcomes[run._order[self._seen]]
        assert outcome is not None
        self._seen += 1
        return outcome


def _clock_of_the_loop() -> Callable[[], float]:
    """Return the running loop's clock, which timeouts go by; anyio's function finds out first which backend runs."""
    token = anyio.lowlevel.current_token()
    clock: Callable[[], float] = getattr(token.native_token, "time", token.backend_class.current_time)
    return clock


def _enclosing_call() -> EngineCall | None:
    """Return the engine call that opens a group, if it is one that does."""
    current = _current.get(None)
    return current if isinstance(current, EngineCall) else None


def _claims_in_turn(
    group: GroupOptions, assignments: Sequence[AgentAssignment] | dict[int, AgentAssignment]
) -> Callable[[int], Sequence[ResourceClaim]] | None:
    """Return what the assignment at a position needs for itself among the others of its group, if any may need it.

    An agent that has several tasks is a resource that its tasks claim.
    """
    waits = group.claim_policy is ClaimPolicy.WAIT
    if not group.allow_shared_agents:
        return (lambda position: assignments[position].resource_claims) if waits else None

    def claims_of(position: int) -> Sequence[ResourceClaim]:
        assignment = assignments[position]
        agent = ResourceClaim(resource=f"agent\0{assignment.agent_id}")  # no other resource is named so
        return (agent, *assignment.resource_claims) if waits else (agent,)

    return claims_of


def _prerequisites(assignments: Sequence[AgentAssignment]) -> Mapping[int, Sequence[int]]:
    """Return the positions that others depend on, by theirs."""
    depending = {p: a.task.depends_on for p, a in enumerate(assignments) if a.task.depends_on}
    if not depending:
        return NO_PREREQUISITES
    positions = {a.task_id: position for position, a in enumerate(assignments)}
    return {position: [positions[name] for name in names] for position, names in depending.items()}


def _lost_text(call: EngineCall) -> str:
    return f"Lost its claim while it ran: {call.lost_claims}. Another may have worked on it since"


def _late_text(text: str, error: BaseException, cancelled: type[BaseException]) -> str:
    if is_cancellation(error, cancelled):
        return _with_notes(text, error)
    return f"{text}, then raised {error_text(error)}"


def _with_notes(text: str, cancellation: BaseException) -> str:
    """Return why it was cancelled, and what its engine noted: an agent that runs elsewhere may not have stopped."""
    return ". ".join([text, *getattr(cancellation, "__notes__", ())])
