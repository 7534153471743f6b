"""An engine for tests whose agents do what they are told, and that remembers who ran when."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import anyio
import anyio.lowlevel
from attrs import define, field, frozen
from attrs.validators import instance_of, optional

from .._checks import FrozenDict, is_a, is_flag, number
from .._context import current_run
from .._models import NO_USAGE, AgentAssignment, Usage
from .._outcomes import AgentRunResult, TerminationReason


@frozen(kw_only=True)
class Act:
    """What a scripted agent does: it spends, waits, and then raises or returns.

    Attributes:
        output: What it returns.
        reason: Why it stopped, as its result says; with ERROR the output is the error's message.
        error: What it raises instead.
        usage: What it spends before it waits.
        wait_for: It goes on when this is set.
        seconds: It goes on so much later, on the clock of the event loop: at once in virtual time.
        hangs: Whether it waits for ever.
        swallows_cancellation: Whether it goes on to its end when it is cancelled while it waits.
    """

    output: Any = None
    reason: TerminationReason = field(default=TerminationReason.COMPLETED, validator=is_a(TerminationReason))
    error: BaseException | None = field(default=None, validator=optional(instance_of(BaseException)))
    usage: Usage = field(default=NO_USAGE, validator=is_a(Usage))
    wait_for: anyio.Event | None = None
    seconds: float = field(default=0.0, validator=number(at_least=0))
    hangs: bool = field(default=False, validator=is_flag)
    swallows_cancellation: bool = field(default=False, validator=is_flag)


@define(eq=False)
class Call:
    """One call of the engine.

    Attributes:
        task_id: The assignment's task.
        agent_id: The assignment's agent.
        attempt: Which attempt it was, from 1.
        started_at: The time of the event loop's clock.
        ended_at: The same; ``None`` while it runs.
        ending: ``returned``, ``raised`` or ``cancelled``; empty while it runs.
    """

    task_id: str
    agent_id: str
    attempt: int
    started_at: float
    ended_at: float | None = None
    ending: str = ""


Script: TypeAlias = "Mapping[str, Act | Sequence[Act]] | Callable[[AgentAssignment], Act]"
"""Acts by task ids, several for several attempts of which the last stands for all that follow; or a function."""


class ScriptedEngine:
    """Runs agents that do what a script says; those that it does not name return None at once.

    Args:
        script: Acts by task ids, or a function of the assignment.

    Attributes:
        calls: In the order in which they started.
        peak: The most that ran at the same time.
    """

    def __init__(self, script: Script = FrozenDict()) -> None:  # noqa: B008 - cannot be changed
        self._script = script
        self._changed: anyio.Event | None = None
        self._running: list[Call] = []
        self._made: Counter[str] = Counter()
        self.calls: list[Call] = []
        self.peak = 0

    def __repr__(self) -> str:
        return "ScriptedEngine()"

    @property
    def in_flight(self) -> tuple[str, ...]:
        """The ids of the tasks that run, in the order in which they started."""
        return tuple(call.task_id for call in self._running)

    @property
    def order(self) -> tuple[str, ...]:
        """The ids of the tasks, in the order in which they started."""
        return tuple(call.task_id for call in self.calls)

    async def until(self, condition: Callable[["ScriptedEngine"], bool]) -> None:
        """Wait until *condition* holds, such as ``lambda engine: len(engine.in_flight) == 3``."""
        while not condition(self):
            if self._changed is None:
                self._changed = anyio.Event()
            await self._changed.wait()

    async def run(self, assignment: AgentAssignment, /) -> AgentRunResult[Any]:
        """Do what the script says; a checkpoint in any case.

        Raises:
            BaseException: What the script says.
        """
        run = current_run()
        act = self._act(assignment)
        call = Call(assignment.task_id, assignment.agent_id, run.attempt, anyio.current_time())
        self.calls.append(call)
        self._running.append(call)
        self.peak = max(self.peak, len(self._running))
        self._tell()
        ending = "raised"
        try:
            if act.usage is not NO_USAGE:
                run.record_usage(act.usage)
            await _wait(act)
            if act.error is not None:
                raise act.error
            result = _result(assignment, act)
            ending = "returned"
        except anyio.get_cancelled_exc_class():
            ending = "cancelled"
            raise
        finally:
            call.ended_at, call.ending = anyio.current_time(), ending
            self._running.remove(call)
            self._tell()
        return result

    def _act(self, assignment: AgentAssignment) -> Act:
        if callable(self._script):
            return self._script(assignment)
        acts = self._script.get(assignment.task_id, Act())
        if isinstance(acts, Act):
            return acts
        self._made[assignment.task_id] += 1
        return acts[min(self._made[assignment.task_id], len(acts)) - 1]

    def _tell(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None


async def _wait(act: Act) -> None:
    try:
        await anyio.lowlevel.checkpoint()
        if act.wait_for is not None:
            await act.wait_for.wait()
        if act.seconds:
            await anyio.sleep(act.seconds)
        if act.hangs:
            await anyio.sleep_forever()
    except anyio.get_cancelled_exc_class():  # noqa: ASYNC103 - as the script wants it
        if not act.swallows_cancellation:
            raise


def _result(assignment: AgentAssignment, act: Act) -> AgentRunResult[Any]:
    is_error = act.reason is TerminationReason.ERROR
    return AgentRunResult(
        task_id=assignment.task_id,
        agent_id=assignment.agent_id,
        termination_reason=act.reason,
        output=None if is_error else act.output,
        error_message=str(act.output) if is_error else None,
    )
