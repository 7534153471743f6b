"""Limits in PostgreSQL: places and budgets that drivers share, whatever becomes of a driver or of the server."""

import signal
from collections.abc import Awaitable, Callable, Iterator
from random import Random
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from groups import assignment, group_of
from postgres_server import PostgresServer
from postgres_worker import Worker

from parallel_agents import (
    AgentAssignment,
    AgentOutcome,
    AgentRunResult,
    Budget,
    FunctionEngine,
    OutcomeStatus,
    ParallelExecutor,
    RunContext,
    TerminationReason,
    Usage,
    current_run,
)
from parallel_agents._postgres.connections import OutageError
from parallel_agents.engines.postgres_limit import LimitState, PostgresLimit, PostgresLimitedEngine
from parallel_agents.postgres import PostgresError, PostgresStore

SECONDS = 60.0
LEASE_SECONDS = 1.0

Agent = Callable[[AgentAssignment], Awaitable[Any]]


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    return postgres.empty()


@pytest.fixture
def store(url: str) -> Iterator[PostgresStore]:
    with PostgresStore(url) as store:
        yield store


def state(**fields: Any) -> LimitState:
    return LimitState(**{**dict.fromkeys(LimitState.__annotations__, 0), **fields})


def places(store: PostgresStore, count: int = 1) -> PostgresLimit:
    return PostgresLimit(store, "models", max_concurrency=count)


def money(store: PostgresStore, max_cost: float, reserve: float) -> PostgresLimit:
    return PostgresLimit(store, "money", budget=Budget(max_cost=max_cost), reserve=Usage(cost=reserve))


async def run(limit: PostgresLimit, agent: Agent, count: int = 1, **options: Any) -> tuple[AgentOutcome[Any], ...]:
    engine = PostgresLimitedEngine(FunctionEngine(agent), limit)
    with anyio.fail_after(SECONDS):
        return (await ParallelExecutor(engine=engine).execute_group(group_of(count, **options))).outcomes


def reasons(outcomes: tuple[AgentOutcome[Any], ...]) -> list[TerminationReason]:
    return [outcome.result.termination_reason for outcome in outcomes if outcome.result is not None]


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(SECONDS):
        while not condition():
            await anyio.lowlevel.checkpoint()


def spends(cost: float) -> Agent:
    async def agent(_assignment: AgentAssignment) -> None:
        current_run().record_usage(Usage(cost=cost))

    return agent


class Gate:
    """An agent that runs until it is let go, and whose spending is told before."""

    def __init__(self, cost: float = 0.0) -> None:
        self.cost = cost
        self.runs = anyio.Event()
        self.goes_on = anyio.Event()

    async def __call__(self, _assignment: AgentAssignment) -> str:
        current_run().record_usage(Usage(cost=self.cost))
        self.runs.set()
        await self.goes_on.wait()
        return "done"


# Places


@pytest.mark.anyio
async def test_drivers_together_run_no_more_agents_at_once_than_the_limit_allows(
    store: PostgresStore, url: str
) -> None:
    running, most, gate = 0, 0, Gate()

    async def agent(task: AgentAssignment) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await gate(task)
        running -= 1

    with PostgresStore(url) as other:
        async with anyio.create_task_group() as tasks:
            for each in (store, other):
                tasks.start_soon(run, places(each, 3), agent, 10)
            await until(lambda: _present(store) == (3, 17))
            gate.goes_on.set()
    assert most == 3
    assert places(store).state() == state()


@pytest.mark.anyio
async def test_first_come_first_served_over_all_drivers(store: PostgresStore, url: str) -> None:
    started: list[int] = []
    gate = Gate()

    def agent(number: int) -> Agent:
        async def agent(task: AgentAssignment) -> None:
            started.append(number)
            await gate(task)

        return agent

    with PostgresStore(url) as other:
        async with anyio.create_task_group() as tasks:
            for number in range(5):
                tasks.start_soon(run, places((store, other)[number % 2]), agent(number))
                await until(lambda present=number + 1: sum(_present(store)) == present)  # type: ignore[misc]
            assert places(store).state() == state(running=1, waiting=4)
            gate.goes_on.set()
    assert started == [0, 1, 2, 3, 4]


def _present(store: PostgresStore) -> tuple[int, int]:
    now = places(store).state()
    return now.running, now.waiting


@pytest.mark.anyio
async def test_whose_turn_it_is_is_told_and_need_not_ask(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel_agents._postgres.keeper.LONGEST_WAIT_SECONDS", 1000.0)
    gate = Gate()
    with PostgresStore(url, lease_seconds=10_000) as store:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run, places(store), gate)
            await gate.runs.wait()
            tasks.start_soon(run, places(store), gate)
            # asked by another one, since state() itself lets in who may
            await until(lambda: store.run_now(lambda c, _: _lines(c)) == 1)
            gate.goes_on.set()


def _lines(connection: Any) -> int:
    (count,) = connection.execute("SELECT count(*) FROM places WHERE answer IS NULL").fetchone()
    return int(count)


@pytest.mark.anyio
async def test_who_is_cancelled_while_it_waits_leaves_the_line(store: PostgresStore) -> None:
    gate = Gate()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run, places(store), gate)
        await gate.runs.wait()
        async with anyio.create_task_group() as others:
            others.start_soon(run, places(store), gate)
            await until(lambda: _present(store) == (1, 1))
            others.cancel_scope.cancel()
        assert _present(store) == (1, 0)
        gate.goes_on.set()
    assert places(store).state() == state()


@pytest.mark.anyio
async def test_waiting_is_not_charged_to_the_timeout(store: PostgresStore) -> None:
    gate = Gate()
    waits: list[RunContext] = []

    class Outer:
        async def run(self, task: AgentAssignment) -> AgentRunResult[Any]:
            waits.append(current_run())
            return await PostgresLimitedEngine(FunctionEngine(gate), places(store)).run(task)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run, places(store), gate)
        await gate.runs.wait()
        tasks.start_soon(ParallelExecutor(engine=Outer()).execute_group, group_of(1))
        await until(lambda: _present(store) == (1, 1))
        assert waits[0].waits_for_others
        gate.goes_on.set()
    assert not waits[0].waits_for_others


@pytest.mark.anyio
async def test_a_place_in_the_line_that_was_lost_is_asked_for_again(
    store: PostgresStore, postgres: PostgresServer
) -> None:
    gate = Gate()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run, places(store), gate)
        await gate.runs.wait()
        tasks.start_soon(run, places(store), gate)
        await until(lambda: _present(store) == (1, 1))
        postgres.execute("DELETE FROM parallel_agents.places WHERE answer IS NULL")
        await until(lambda: _present(store) == (1, 1))
        gate.goes_on.set()
    assert places(store).state() == state()


@pytest.mark.anyio
async def test_an_answer_that_was_lost_is_asked_for_again(url: str) -> None:
    class Store(PostgresStore):
        """Loses the first answer of each kind of call, after it was done."""

        lost = 0

        def run_now(self, call: Any) -> Any:
            done = super().run_now(call)
            if self.lost < 2:
                self.lost += 1
                raise OutageError(self.name, "is away")
            return done

    with Store(url) as store:
        assert [outcome.output for outcome in await run(money(store, 1.0, 0.5), _says_done)] == ["done"]
        assert store.lost == 2
        assert money(store, 1.0, 0.5).state() == state()


async def _says_done(_assignment: AgentAssignment) -> str:
    return "done"


# Budgets


@pytest.mark.anyio
async def test_nothing_starts_that_could_spend_more_than_the_budget(store: PostgresStore) -> None:
    outcomes = await run(money(store, 1.0, 0.3), spends(0.1), 10)
    assert sorted(reasons(outcomes)) == [TerminationReason.BUDGET_EXHAUSTED] * 2 + [TerminationReason.COMPLETED] * 8
    assert [outcome.status for outcome in outcomes].count(OutcomeStatus.FAILED) == 2
    assert money(store, 1.0, 0.3).state() == state(cost=0.8)


@pytest.mark.anyio
async def test_tokens_are_a_budget_too_and_what_is_reserved_may_depend_on_the_assignment(store: PostgresStore) -> None:
    async def agent(task: AgentAssignment) -> AgentRunResult[None]:
        return AgentRunResult(
            task_id=task.task_id,
            agent_id=task.agent_id,
            termination_reason=TerminationReason.COMPLETED,
            usage=Usage(input_tokens=4, output_tokens=6),  # reported in the end, not metered
        )

    limit = PostgresLimit(
        store,
        "tokens",
        budget=Budget(max_tokens=100),
        reserve=lambda task: Usage(input_tokens=60 if task.task_id == "t0" else 20, output_tokens=20),
    )
    outcomes = await run(limit, agent, 10, max_concurrency=1)
    # one starts at 0, and those after it at 10, 20, ... as long as 40 more are within 100
    assert reasons(outcomes) == [TerminationReason.COMPLETED] * 7 + [TerminationReason.BUDGET_EXHAUSTED] * 3
    assert limit.state() == state(tokens=70)


@pytest.mark.anyio
async def test_who_would_fit_if_others_spend_less_waits_for_them(store: PostgresStore) -> None:
    limit, gate = money(store, 1.0, 0.6), Gate(0.1)
    ends: list[TerminationReason] = []

    async def second() -> None:
        ends.extend(reasons(await run(limit, spends(0.2))))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run, limit, gate)
        await gate.runs.wait()
        tasks.start_soon(second)
        await until(lambda: limit.state() == state(running=1, waiting=1, cost=0.1, reserved_cost=0.5))
        gate.goes_on.set()
    assert ends == [TerminationReason.COMPLETED]
    assert limit.state() == state(cost=0.3)


@pytest.mark.anyio
async def test_what_a_running_agent_tells_of_beyond_its_reserve_is_not_waited_for(store: PostgresStore) -> None:
    limit, gate = money(store, 1.0, 0.4), Gate(0.9)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run, limit, gate)
        await gate.runs.wait()
        await until(lambda: limit.state() == state(running=1, cost=0.9))
        assert reasons(await run(limit, spends(0.1))) == [TerminationReason.BUDGET_EXHAUSTED]
        gate.goes_on.set()
    assert limit.state() == state(cost=0.9)


@pytest.mark.anyio
async def test_an_agent_that_fails_settles_what_it_spent_and_its_error_is_its_own(store: PostgresStore) -> None:
    async def agent(task: AgentAssignment) -> None:
        await spends(0.2)(task)
        raise LookupError("not there")

    (outcome,) = await run(money(store, 1.0, 0.3), agent)
    assert (outcome.error, outcome.usage) == ("LookupError: not there", Usage(cost=0.2))
    assert money(store, 1.0, 0.3).state() == state(cost=0.2)


@pytest.mark.anyio
async def test_a_cancelled_agent_settles_what_it_spent(store: PostgresStore) -> None:
    gate = Gate(0.2)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run, money(store, 1.0, 0.3), gate)
        await gate.runs.wait()
        tasks.cancel_scope.cancel()
    assert money(store, 1.0, 0.3).state() == state(cost=0.2)


@pytest.mark.anyio
@pytest.mark.parametrize("unit", ["tokens", "cost"])
async def test_whatever_the_order_the_budget_and_the_places_are_kept_and_all_is_accounted_for(
    store: PostgresStore, url: str, unit: str
) -> None:
    random = Random(unit)
    running, spent = 0, 0

    async def agent(_assignment: AgentAssignment) -> None:
        nonlocal running, spent
        running += 1
        assert running <= 4
        for _ in range(random.randint(0, 4)):
            current_run().record_usage(Usage(input_tokens=1, cost=1))
            spent += 1
            await anyio.lowlevel.checkpoint()
        running -= 1

    def limit(store: PostgresStore) -> PostgresLimit:
        budget = Budget(max_tokens=100) if unit == "tokens" else Budget(max_cost=100)
        return PostgresLimit(store, "both", max_concurrency=4, budget=budget, reserve=Usage(input_tokens=4, cost=4))

    with PostgresStore(url) as other:
        async with anyio.create_task_group() as tasks:
            for each in (store, other):
                tasks.start_soon(run, limit(each), agent, 40)
    assert 96 < spent <= 100
    assert limit(store).state() == state(tokens=spent, cost=spent)


# Drivers that are lost, and a server that is


@pytest.mark.anyio
@pytest.mark.parametrize(("spent", "unknown"), [(0.1, 0.4), (0.7, 0.7)])
async def test_what_a_killed_driver_had_reserved_is_unknown_spend_and_never_zero(
    url: str, store: PostgresStore, spent: float, unknown: float
) -> None:
    limit = PostgresLimit(store, "money", max_concurrency=1, budget=Budget(max_cost=1.0), reserve=Usage(cost=0.4))
    with Worker(url, "asyncio", LEASE_SECONDS) as worker:
        assert worker.ask("limited", "money", "1", "1.0", "0.4", str(spent)) == "running"
        await until(lambda: limit.state().cost == spent)
        worker.process.kill()
        ends = reasons(await run(limit, spends(0.1)))  # waits for the end of the lease, unless it is sure already
        await until(lambda: limit.state().running == 0)
    fits = unknown + 0.4 <= 1.0
    assert ends == [TerminationReason.COMPLETED if fits else TerminationReason.BUDGET_EXHAUSTED]
    assert limit.state() == state(cost=0.1 if fits else 0, unknown_cost=unknown)
    assert reasons(await run(money(store, 1.0, 0.7), spends(0.1))) == [TerminationReason.BUDGET_EXHAUSTED]
    limit.settle_unknown(Usage(cost=0.25))
    assert limit.state() == state(cost=0.35 if fits else 0.25)


@pytest.mark.anyio
async def test_an_agent_whose_driver_stood_still_is_cancelled_and_tells_what_it_spent(
    url: str, store: PostgresStore, anyio_backend_name: str
) -> None:
    limit = PostgresLimit(store, "money", max_concurrency=1, budget=Budget(max_cost=1.0), reserve=Usage(cost=0.4))
    with Worker(url, anyio_backend_name, LEASE_SECONDS) as worker:
        assert worker.ask("limited", "money", "1", "1.0", "0.4", "0.1") == "running"
        worker.process.send_signal(signal.SIGSTOP)
        await until(lambda: limit.state().unknown_cost == 0.4)
        assert limit.state().running == 0
        worker.process.send_signal(signal.SIGCONT)
        said = worker.answer()
    assert said.startswith("failed PostgresError: Database ")
    assert "has given the agent's place at the limit 'money' to others: the session of this worker was not" in said
    assert limit.state() == state(cost=0.1)


@pytest.mark.anyio
async def test_a_driver_that_is_lost_while_its_agents_wait_is_not_waited_for(
    postgres: PostgresServer, url: str, store: PostgresStore
) -> None:
    limit = PostgresLimit(store, "money", max_concurrency=1, budget=Budget(max_cost=9.0), reserve=Usage(cost=1.0))
    gate, third = Gate(), Gate()
    with Worker(url, "asyncio", LEASE_SECONDS) as worker:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run, limit, gate)
            await gate.runs.wait()
            worker.tell("limited", "money", "1", "9.0", "1.0", "0")
            await until(lambda: limit.state().waiting == 1)
            worker.process.kill()
            await until(lambda: limit.state().waiting == 0)
            tasks.start_soon(run, limit, third)
            await until(lambda: limit.state().waiting == 1)
            gate.goes_on.set()
            await third.runs.wait()
            third.goes_on.set()
    assert limit.state() == state()
    assert postgres.execute("SELECT count(*) FROM parallel_agents.places") == [(0,)]


@pytest.mark.anyio
async def test_what_is_spent_while_the_server_is_away_is_settled_when_it_is_back(
    postgres: PostgresServer, store: PostgresStore
) -> None:
    limit, gate = money(store, 1.0, 0.3), Gate(0.2)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run, limit, gate)
            await gate.runs.wait()
            postgres.kill()
            gate.goes_on.set()
    finally:
        postgres.start()
    await until(lambda: _state_if_it_is_back(limit) == state(cost=0.2))


def _state_if_it_is_back(limit: PostgresLimit) -> LimitState | None:
    try:
        return limit.state()
    except PostgresError:
        return None


# What is refused


@pytest.mark.anyio
async def test_a_group_inside_an_agent_must_not_wait_for_the_place_of_that_agent(store: PostgresStore) -> None:
    engine = PostgresLimitedEngine(FunctionEngine(_says_done), places(store))

    async def outer(_assignment: AgentAssignment) -> str | None:
        inner = await ParallelExecutor(engine=engine).execute_group(group_of(1))
        return inner.outcomes[0].error

    (outcome,) = await run(places(store), outer)
    assert outcome.output is not None
    assert (
        "RuntimeError: an agent that has a place at the limit 'models' waits for agents that want one" in outcome.output
    )
    assert [outcome.output for outcome in await run(places(store), _says_done, 2)] == ["done"] * 2


@pytest.mark.anyio
async def test_an_agent_that_has_left_its_place_may_ask_for_one_again(store: PostgresStore) -> None:
    engine = PostgresLimitedEngine(FunctionEngine(_says_done), places(store))

    class Twice:
        async def run(self, task: AgentAssignment) -> AgentRunResult[Any]:
            await engine.run(task)
            return await engine.run(task)

    with anyio.fail_after(SECONDS):
        result = await ParallelExecutor(engine=Twice()).execute_group(group_of(1))
    assert result.outcomes[0].output == "done"


@pytest.mark.anyio
async def test_a_reserve_that_is_none_fails_its_agent(store: PostgresStore) -> None:
    budget = Budget(max_cost=1)
    for gives, error in ((3, "TypeError: what reserve gives must be a Usage, got 3"), (Usage(), "ValueError: reserve")):
        limit = PostgresLimit(store, "x", budget=budget, reserve=lambda _, gives=gives: gives)  # type: ignore[misc]
        (outcome,) = await run(limit, _says_done)
        assert outcome.error is not None
        assert error in outcome.error


def test_what_makes_no_sense_is_refused(url: str) -> None:
    tokens, cost = Budget(max_tokens=1), Budget(max_cost=1)
    bad: list[tuple[dict[str, Any], str]] = [
        ({}, "needs max_concurrency, budget, or both"),
        ({"name": " ", "max_concurrency": 1}, "name must not be blank"),
        ({"name": "n" * 201, "max_concurrency": 1}, "at most 200 characters"),
        ({"max_concurrency": 0}, "max_concurrency must be >= 1"),
        ({"budget": cost}, "reserve must say what an agent may cost"),
        ({"budget": tokens, "reserve": Usage(cost=1)}, "how many tokens an agent may use"),
    ]
    for given, message in bad:
        with pytest.raises(ValueError, match=message):
            PostgresLimit(**{"store": url, "name": "n", **given})
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"store": 3, "max_concurrency": 1}, "store must be a PostgresStore or its address"),
        ({"budget": 3}, "budget must be of type Budget"),
        ({"max_concurrency": 1, "reserve": 3}, "reserve must be a Usage, or a function"),
    ]
    for given, message in wrong:
        with pytest.raises(TypeError, match=message):
            PostgresLimit(**{"store": url, "name": "n", **given})
    limit = PostgresLimit(url, "n", max_concurrency=1)
    with pytest.raises(TypeError, match="inner must be an engine"):
        PostgresLimitedEngine(3, limit)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="limit must be a PostgresLimit"):
        PostgresLimitedEngine(FunctionEngine(_says_done), 3)  # type: ignore[arg-type]
    assert repr(PostgresLimitedEngine(FunctionEngine(_says_done), limit)).endswith("_says_done), 'n')")


def test_the_inner_engine_is_asked_whether_it_can_run_an_assignment(url: str) -> None:
    class Picky:
        def check(self, task: AgentAssignment) -> None:
            raise ValueError(task.task_id)

        async def run(self, task: AgentAssignment) -> AgentRunResult[Any]:
            raise NotImplementedError

    limit = PostgresLimit(url, "n", max_concurrency=1)
    with pytest.raises(ValueError, match="t7"):
        PostgresLimitedEngine(Picky(), limit).check(assignment(7))
    PostgresLimitedEngine(FunctionEngine(_says_done), limit).check(assignment(7))
