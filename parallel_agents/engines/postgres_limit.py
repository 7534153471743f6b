"""PostgresLimitedEngine: drivers on many machines share how many agents run at once, and what they may spend.

A place is asked for before an agent runs, with what it may spend at most; afterwards what it did spend takes the place
of that. The database decides who is next. Knows tasks and threads through the store. Needs the extra ``postgres``.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup
from attrs import Factory, field, frozen
from attrs.validators import optional

from .._checks import integer, is_a, not_blank, shown, wrong_type
from .._context import current_run
from .._models import NO_USAGE, AgentAssignment, Budget, Usage
from .._outcomes import AgentRunResult, TerminationReason
from .._postgres.connections import Connection, PostgresError, text
from .._postgres.keeper import Session
from .._postgres.line import Place, TakenOver
from .._postgres.spending import Spending
from ..postgres import PostgresStore
from ._metering import Meter
from ._protocol import AgentEngine, check_with, require_engine

__all__ = ["LimitState", "PostgresLimit", "PostgresLimitedEngine", "PostgresStore"]

SPEND: Final = "SELECT spend_at_limits(%s::text[], %s::bigint[], %s::bigint[], %s::bigint[], %s::float8[])"

NAME_CHARACTERS: Final = 200

SETTLE_SECONDS: Final = 2.0
"""How long an agent's end waits for a server that is away; after that it is settled as soon as the server is back."""

_entered: ContextVar[frozenset[str]] = ContextVar("parallel_agents_postgres_limits", default=frozenset())
"""The limits at which the agent has a place that is asking."""


def _name(instance: object, attribute: Any, value: str) -> None:
    not_blank(instance, attribute, value)
    if len(value) > NAME_CHARACTERS:
        raise ValueError(f"{attribute.name} must have at most {NAME_CHARACTERS} characters, got {shown(value)}")


def _reserve(_instance: object, attribute: Any, value: object) -> None:
    if not (isinstance(value, Usage) or callable(value)):
        raise wrong_type(attribute.name, "a Usage, or a function of an assignment", value)


def _store(value: object) -> PostgresStore:
    if isinstance(value, str):
        return PostgresStore(value)
    if not isinstance(value, PostgresStore):
        raise wrong_type("store", "a PostgresStore or its address", value)
    return value


@frozen(kw_only=True)
class LimitState:
    """What stands in the database of a limit, at one moment.

    Attributes:
        running: Agents that have a place.
        waiting: Agents that wait for one.
        cost: What is known to be spent.
        tokens: The same in tokens.
        reserved_cost: What those that run may spend further.
        reserved_tokens: The same in tokens.
        unknown_cost: What was reserved for agents of drivers that were lost, or more if they told of more. It counts
            as spent until somebody says what it was.
        unknown_tokens: The same in tokens.
    """

    running: int
    waiting: int
    cost: float
    tokens: int
    reserved_cost: float
    reserved_tokens: int
    unknown_cost: float
    unknown_tokens: int


@frozen(eq=False)
class PostgresLimit:
    """How many agents run at once, and what they may spend, over all drivers that name the same limit.

    A driver that is lost has no places any more when its lease is over. What was reserved for its agents then is
    *unknown spend*, and stays in the account: they may have spent it. It leaves when the driver turns out to live and
    tells, or by ``settle_unknown()``.

    Each who asks is judged by the numbers that come with it, so give all drivers the same; a budget is raised by
    starting them with a larger one. What is spent is kept for ever under the name, so give a new budget a new one.

    Attributes:
        store: A database, or its address; may be that of locks and journals.
        name: Of the limit in this database; at most 200 characters.
        max_concurrency: How many agents have a place at once.
        budget: What may be spent. Nothing starts that could spend more; what an agent spends beyond what was reserved
            for it counts from when it tells. Needs *reserve*.
        reserve: What an agent may spend, or a function that says so of an assignment. The more exact, the fewer wait
            near the end of the budget.

    Raises:
        ValueError: If there is neither *max_concurrency* nor *budget*, or nothing is reserved of what is budgeted.
    """

    store: PostgresStore = field(converter=_store)
    name: str = field(validator=_name)
    max_concurrency: int | None = field(default=None, validator=optional(integer(at_least=1)), kw_only=True)
    budget: Budget | None = field(default=None, validator=optional(is_a(Budget)), kw_only=True)
    reserve: Usage | Callable[[AgentAssignment], Usage] = field(default=NO_USAGE, validator=_reserve, kw_only=True)
    _spending: Spending[str] = field(
        init=False, repr=False, default=Factory(lambda self: Spending(SPEND, self.store.soon), takes_self=True)
    )

    def __attrs_post_init__(self) -> None:
        if self.max_concurrency is None and self.budget is None:
            raise ValueError("a PostgresLimit needs max_concurrency, budget, or both")
        if isinstance(self.reserve, Usage):
            self._refuse_to_reserve_nothing(self.reserve)

    def reserved_for(self, assignment: AgentAssignment) -> Usage:
        """Return what is reserved for an agent.

        Raises:
            TypeError: If *reserve* gives no Usage.
            ValueError: If it gives nothing of what is budgeted.
        """
        reserve = self.reserve(assignment) if callable(self.reserve) else self.reserve
        if not isinstance(reserve, Usage):
            raise wrong_type("what reserve gives", "a Usage", reserve)
        self._refuse_to_reserve_nothing(reserve)
        return reserve

    def _refuse_to_reserve_nothing(self, reserve: Usage) -> None:
        if self.budget is None:
            return
        if self.budget.max_cost is not None and not reserve.cost:
            raise ValueError("reserve must say what an agent may cost, since the budget has a max_cost")
        if self.budget.max_tokens is not None and not _tokens(reserve):
            raise ValueError("reserve must say how many tokens an agent may use, since the budget has max_tokens")

    def state(self) -> LimitState:
        """Return what stands in the database now. Blocks for some milliseconds.

        Raises:
            PostgresError: If the database cannot be read.
        """

        def read(connection: Connection, _: Session) -> LimitState:
            self._spending.write(connection)
            connection.execute("CALL tend()")
            row = connection.execute("SELECT * FROM state_of_limit(%s)", (text(self.name),)).fetchone()
            assert row is not None
            return LimitState(**dict(zip(LimitState.__annotations__, row, strict=True)))

        return self.store.run_now(read)

    def settle_unknown(self, spent: Usage = NO_USAGE) -> None:
        """Let *spent* stand for all that is unknown, as the bill of a provider says it. Blocks for some milliseconds.

        Raises:
            PostgresError: If the database cannot be used.
        """
        self.store.run_now(
            lambda c, _: c.execute("SELECT settle_unknown(%s, %s, %s)", (text(self.name), spent.cost, _tokens(spent)))
        )


class PostgresLimitedEngine:
    """Runs agents while they have a place at a limit that all drivers share, first come, first served.

    Waiting is cancellable, takes nothing then, and does not count towards the assignment's timeout. Agents that wait
    here have started: they take a place of ``max_concurrency`` of their group and of the executor's limiter.

    If what may be spent is spent, an agent ends with ``TerminationReason.BUDGET_EXHAUSTED`` and does not run; while
    others run that may spend less than was reserved for them, it waits.

    An agent whose driver lost its session is cancelled before others can have its place. What it spent is told all the
    same, as soon as the server is back.

    A group that an agent runs must not use the limit at which the agent itself has a place: it would wait for itself.

    Args:
        inner: Runs agents. Where that is on another machine, put this engine there, around what runs them: what they
            spend is then told from where it is spent.
        limit: Engines of one process had better share one; for several limits nest engines, everywhere in the same
            order.
    """

    def __init__(self, inner: AgentEngine, limit: PostgresLimit) -> None:
        require_engine("inner", inner)
        if not isinstance(limit, PostgresLimit):
            raise wrong_type("limit", "a PostgresLimit", limit)
        self._inner = inner
        self._limit = limit

    def __repr__(self) -> str:
        return f"PostgresLimitedEngine({self._inner!r}, {self._limit.name!r})"

    def check(self, assignment: AgentAssignment, /) -> None:
        """Refuse what the inner engine refuses."""
        check_with(self._inner, assignment)

    async def run(self, assignment: AgentAssignment, /) -> AgentRunResult[Any]:
        """Wait for a place, run the agent, and settle what it spent.

        Raises:
            PostgresError: If the database cannot be used; if the place was lost.
            RuntimeError: If an enclosing agent has a place at the same limit.
            LookupError: Outside an engine call of an executor.
        """
        run = current_run()
        key = f"{self._limit.store.name} {self._limit.name}"
        if key in _entered.get():
            raise RuntimeError(
                f"an agent that has a place at the limit {self._limit.name!r} waits for agents that want one there: "
                "give the groups inside of agents a limit of their own"
            )
        reserve = self._limit.reserved_for(assignment)
        with run.not_charged():
            held = await _enter(self._limit, reserve)
        if held is None:
            return AgentRunResult(
                task_id=assignment.task_id,
                agent_id=assignment.agent_id,
                termination_reason=TerminationReason.BUDGET_EXHAUSTED,
            )
        meter, result = Meter(run), None
        token = _entered.set(_entered.get() | {key})
        try:
            with run.watching_usage(held.spend):
                result = await self._run_while(held, assignment)
            return result
        finally:
            _entered.reset(token)
            with anyio.CancelScope(shield=True):  # bounded by its patience, and one call to the server
                await held.settle(meter.spent(result))

    async def _run_while(self, held: "_Held", assignment: AgentAssignment) -> AgentRunResult[Any]:
        """Run the agent for as long as the place is its own."""
        failure: Exception | None = None
        is_over = False
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(held.cancel_when_lost, tasks)
            try:
                result = await self._inner.run(assignment)
            except Exception as error:  # noqa: BLE001 - raised below, not in a group
                failure = error
            is_over = True
            tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if not is_over:
            raise held.loss()
        return result


class _Entry(Place[tuple[Session, str | None]]):
    """A place at a limit."""

    def __init__(self, limit: PostgresLimit, reserve: Usage) -> None:
        super().__init__(limit.store)
        self._limit = limit
        self._reserve = reserve

    def ask(self, connection: Connection, session: Session) -> tuple[Session, str | None]:
        budget = self._limit.budget
        row = connection.execute(
            "SELECT enter_limit(%s, %s, %s, %s, %s::float8, %s, %s::float8, %s)",
            (
                self.name,
                session.id,
                text(self._limit.name),
                self._limit.max_concurrency,
                None if budget is None else budget.max_cost,
                None if budget is None else budget.max_tokens,
                self._reserve.cost,
                _tokens(self._reserve),
            ),
        ).fetchone()
        assert row is not None
        return session, row[0]

    def leave(self, connection: Connection) -> None:
        _settle(connection, self.name, NO_USAGE)


async def _enter(limit: PostgresLimit, reserve: Usage) -> "_Held | None":
    """Wait for a place; return None if the budget is spent."""
    await limit.store.open_in_thread()
    while True:
        entry = _Entry(limit, reserve)
        async with entry.standing():
            session, answer = await entry.enter()
            if answer is None:
                answer = await entry.turn()
            if answer == "granted":
                return _Held(limit, session, entry.name)
            if answer == "refused":
                await entry.abandon()
                return None


class _Held:
    """A place that was granted."""

    def __init__(self, limit: PostgresLimit, session: Session, name: str) -> None:
        self._limit = limit
        self._name = name
        self._lost = TakenOver(limit.store, session, name)

    def spend(self, usage: Usage) -> None:
        self._limit._spending.add(self._name, usage)

    async def cancel_when_lost(self, tasks: TaskGroup) -> None:
        await self._lost.wait()
        tasks.cancel_scope.cancel()

    def loss(self) -> PostgresError:
        return PostgresError(
            self._limit.store.name,
            f"has given the agent's place at the limit {self._limit.name!r} to others: "
            "the session of this worker was not renewed in time",
        )

    async def settle(self, spent: Usage) -> None:
        """Leave the place, and say what was spent."""
        self._lost.forget()
        await self._limit.store.run_or_soon(
            lambda connection: _settle(connection, self._name, spent), patience_seconds=SETTLE_SECONDS
        )


def _settle(connection: Connection, name: str, spent: Usage) -> None:
    connection.execute("SELECT leave_limit(%s, %s, %s)", (name, spent.cost, _tokens(spent)))


def _tokens(usage: Usage) -> int:
    return usage.input_tokens + usage.output_tokens
