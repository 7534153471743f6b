"""StreamRun: a group whose assignments come one after another, from a source that may never end.

Memory grows with ``max_concurrency``: an assignment is pulled when an agent can start at once, and nothing is pulled
while outcomes wait to be taken. Everything about running agents is the business of ``GroupRun``.
"""

from collections import deque
from collections.abc import AsyncIterable, Iterable
from typing import Any, TypeVar

import anyio
import anyio.lowlevel

from ._admission import Admission
from ._endings import RUN_CANCELLED, Stop
from ._holding import refuse_overlaps
from ._models import AgentAssignment, GroupOptions
from ._outcomes import AgentOutcome, OutcomeStatus
from ._run import GroupRun, Settings, _claims_in_turn
from .engines._protocol import ChecksAssignments
from .events import error_text

T = TypeVar("T")

Source = Iterable[AgentAssignment] | AsyncIterable[AgentAssignment]


CLOSE_SECONDS = 5.0
"""How long closing an asynchronous source may take."""


class StreamRun(GroupRun[T]):
    """A stream in flight, as ``ParallelExecutor.open_stream()`` gives it.

    Iterate over it once for outcomes, in order of completion.
    """

    def __init__(self, source: Source, options: GroupOptions, settings: Settings) -> None:
        if options.max_concurrency is None:
            raise ValueError("max_concurrency must be given: without it a stream would be read to its end at once")
        self._in_flight: dict[int, AgentAssignment] = {}
        super().__init__(options, settings, self._in_flight)
        self._source = source
        self._source_error: Exception | None = None
        self._most = options.max_concurrency
        self._task_ids: dict[str, int] = {}
        self._agent_ids: set[str] = set()
        self._ended: deque[AgentOutcome[T]] = deque()
        self._room: anyio.Event | None = None
        self._feeding = anyio.CancelScope()
        self._is_over = False

    def __aiter__(self) -> "StreamRun[T]":  # type: ignore[override]
        return self

    async def __anext__(self) -> AgentOutcome[T]:
        """Wait for the next outcome. A checkpoint.

        Raises:
            Exception: What the source raised, after the outcomes of what it had given before.
        """
        await anyio.lowlevel.checkpoint()
        while not self._ended:
            if self._is_over and not self._in_flight:
                if self._source_error is not None:
                    raise self._source_error
                raise StopAsyncIteration
            self._news = self._news or anyio.Event()
            await self._news.wait()
        outcome = self._ended.popleft()
        self._make_room()
        return outcome

    def leave(self) -> None:
        """Cancel what runs, and pull nothing more, unless the source has ended."""
        if not (self._is_over and not self._in_flight):
            self._stop_all(RUN_CANCELLED)

    # The source

    def _begin(self) -> None:
        self._tasks.start_soon(self._feed)

    async def _feed(self) -> None:
        """Pull assignments, each when an agent can start at once."""
        try:
            with self._feeding:
                await self._pull_all()
        except Exception as error:  # noqa: BLE001 - raised again where the outcomes are taken
            self._source_error = error
            self._stop_all(Stop(f"the source of the assignments raised {type(error).__name__}", "error"))
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as order:  # noqa: BLE001 - raised at the end of the block, bare
            self._end_for(order, "the source of the assignments")
        finally:
            self._is_over = True
            self._tell_news()
            self._end_if_over()

    async def _pull_all(self) -> None:
        await self._wait_for_room()
        if not isinstance(self._source, AsyncIterable):
            for assignment in self._source:
                self._add(assignment)
                await self._wait_for_room()
            return
        try:
            async for assignment in self._source:
                self._add(assignment)
                await self._wait_for_room()
        finally:
            close: Any = getattr(self._source, "aclose", None)
            if close is not None:
                with anyio.move_on_after(CLOSE_SECONDS, shield=True):
                    await close()

    async def _wait_for_room(self) -> None:
        await anyio.lowlevel.checkpoint()
        while len(self._in_flight) >= self._most or len(self._ended) >= self._most:
            self._room = anyio.Event()
            await self._room.wait()

    def _make_room(self) -> None:
        if self._room is not None:
            self._room.set()
            self._room = None

    def _add(self, assignment: AgentAssignment) -> None:
        """Take one assignment up.

        Raises:
            TypeError: If it is none.
            ValueError: If it depends on others, or has an id of one that is in flight.
            ResourceConflictError: If it claims what an enclosing assignment holds.
        """
        if not isinstance(assignment, AgentAssignment):
            raise TypeError(f"a stream needs AgentAssignments, got {assignment!r}")
        if assignment.task.depends_on:
            raise ValueError(f"task {assignment.task_id!r} depends on others, which a stream cannot wait for")
        if assignment.task_id in self._task_ids:
            raise ValueError(f"Duplicate task IDs: {assignment.task_id} is in flight already")
        if assignment.agent_id in self._agent_ids and not self.group.allow_shared_agents:
            raise ValueError(f"Duplicate agent IDs: {assignment.agent_id} is in flight already")
        refuse_overlaps(self.group, (assignment,), self._enclosing_assignments())
        position = self._admission.extend()
        self._total += 1
        self._in_flight[position] = assignment
        self._task_ids[assignment.task_id] = position
        self._agent_ids.add(assignment.agent_id)
        self._claims.add(position, assignment)
        try:
            if isinstance(self._settings.engine, ChecksAssignments):
                self._settings.engine.check(assignment)
        except ValueError as error:
            self._fail_unstarted(position, OutcomeStatus.FAILED, error_text(error), error)
        else:
            self._call_or_dismiss_workers()

    # What a stream keeps: what is in flight, and outcomes until they are taken

    def _make_admission(self) -> Admission:
        admission = Admission(0, None, _claims_in_turn(self.group, self._in_flight))
        admission.limit = self.group.max_concurrency or 0
        return admission

    def _keep(self, position: int, outcome: AgentOutcome[T]) -> None:
        assignment = self._in_flight.pop(position)
        del self._task_ids[assignment.task_id]
        self._agent_ids.discard(assignment.agent_id)
        self._claims.forget(position)
        self._claim_deadlines.pop(position, None)
        self._ended.append(outcome)
        self._make_room()

    def _has_outcome(self, position: int) -> bool:
        return position not in self._in_flight

    def _without_outcome(self) -> list[int]:
        return list(self._in_flight)

    def _position_of(self, task_id: str) -> int:
        try:
            return self._task_ids[task_id]
        except KeyError:
            raise KeyError(f"stream {self.group.group_id!r} has no task {task_id!r} in flight") from None

    def _start_nothing_more(self, stop: Stop) -> None:
        super()._start_nothing_more(stop)
        self._feeding.cancel()
