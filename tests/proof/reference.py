"""The reference model: what may have come of each agent of a group, from what could be seen of the agents themselves.

It knows nothing of how the library works: a list of causes, each with a time, and what each does to agents that run and
to agents that wait. The first cause decides; of several in the same instant, any.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

from attrs import frozen
from scenarios import check_events, check_progress

from parallel_agents import AgentOutcome, ClaimMode, ClaimPolicy, OutcomeStatus, ResourceClaim, TerminationReason
from proof.random_groups import Call, Disturbance, History, Kind

FAILURES = (OutcomeStatus.FAILED, OutcomeStatus.TIMED_OUT, OutcomeStatus.REJECTED)

OF_RESULTS = {
    TerminationReason.COMPLETED: OutcomeStatus.SUCCEEDED,
    TerminationReason.ERROR: OutcomeStatus.FAILED,
    TerminationReason.PARKED: OutcomeStatus.PARKED,
}

SOME_TIME = -math.inf
"""Of a cause whose time cannot be seen from the agents: the claims of one were not to be had."""


@frozen
class Cause:
    """Why agents did not come to their own end."""

    at: float
    running: OutcomeStatus | None
    waiting: OutcomeStatus | None
    takes_effect_after: float = 0.0
    task: int | None = None


def _ended_at(history: History, number: int) -> float:
    call = history.calls.get(number)
    return math.inf if call is None else call.ended_at


def causes(history: History) -> Iterator[Cause]:
    """Yield everything that stopped agents of the group."""
    plan, options = history.plan, history.plan.options
    outcomes = history.result.outcomes
    cancelled, skipped = OutcomeStatus.CANCELLED, OutcomeStatus.SKIPPED
    if options["deadline_seconds"] is not None:
        yield Cause(history.started_at + options["deadline_seconds"], OutcomeStatus.TIMED_OUT, skipped)
    if options["fail_fast"]:
        for number, outcome in enumerate(outcomes):
            if outcome.status in FAILURES and not outcome_is_of_shutdown(outcome):
                call = history.calls.get(number)
                yield Cause(SOME_TIME if call is None else call.ended_at, cancelled, cancelled)
    successes = sorted(_ended_at(history, n) for n, outcome in enumerate(outcomes) if outcome.is_success)
    enough = options["stop_after_successes"]
    if enough is not None and len(successes) >= enough:
        yield Cause(successes[enough - 1], cancelled, skipped)
    if options["budget"] is not None and history.spent >= options["budget"].max_cost:
        spending = sorted((c.started_at, plan.agents[n].cost) for n, c in history.calls.items())
        total = 0.0
        for at, cost in spending:
            total += cost
            if total >= options["budget"].max_cost:
                yield Cause(at, None, skipped)
                break
    match plan.disturbance:
        case Disturbance.CALLER_CANCELLED | Disturbance.RUN_CANCELLED:
            yield Cause(history.disturbed_at, cancelled, cancelled)
        case Disturbance.TASK_CANCELLED:
            yield Cause(history.disturbed_at, cancelled, cancelled, task=plan.disturbed_task)
        case Disturbance.SHUTDOWN:
            grace = plan.grace_seconds or 0.0
            yield Cause(history.disturbed_at, cancelled, OutcomeStatus.REJECTED, takes_effect_after=grace)


def outcome_is_of_shutdown(outcome: AgentOutcome[object]) -> bool:
    return outcome.error == "Shutdown in progress"


def allowed_if_it_ran(history: History, number: int, call: Call) -> set[OutcomeStatus]:
    plan = history.plan.agents[number]
    if call.value is not None:
        return {OF_RESULTS[call.value.termination_reason]}
    stops = [
        (cause.at + cause.takes_effect_after, cause.running)
        for cause in causes(history)
        if cause.running is not None and cause.task in (None, number)
    ]
    if plan.timeout_seconds is not None:
        stops.append((call.started_at + plan.timeout_seconds, OutcomeStatus.TIMED_OUT))
    stops = [(at, status) for at, status in stops if at <= call.ended_at]
    is_late = {status for _, status in stops if status is OutcomeStatus.TIMED_OUT}
    if isinstance(call.error, Exception):
        return is_late | {OutcomeStatus.FAILED}
    if plan.kind is Kind.CANCELS_ITSELF and call.ended_at >= call.started_at + plan.seconds:
        stops.append((call.ended_at, OutcomeStatus.CANCELLED))
    first = min((at for at, _ in stops), default=math.inf)
    by_first = {status for at, status in stops if at == first}
    # what comes while an agent cleans up after its timeout may be told instead of it
    any_counts = plan.kind is Kind.CLEANS_UP or history.was_blocked or first == SOME_TIME
    return by_first | {status for _, status in stops if any_counts}


def allowed_if_it_never_ran(history: History, number: int) -> set[OutcomeStatus]:
    plan, options = history.plan.agents[number], history.plan.options
    outcomes = history.result.outcomes
    allowed = {
        cause.waiting
        for cause in causes(history)
        if cause.waiting is not None and cause.at < math.inf and cause.task in (None, number)
    }
    if any(not outcomes[other].is_success for other in plan.depends_on):
        allowed.add(OutcomeStatus.SKIPPED)
    if plan.claims and options["claim_policy"] is ClaimPolicy.WAIT and options["claim_timeout_seconds"] is not None:
        allowed.add(OutcomeStatus.REJECTED)
    return allowed


def judge(history: History) -> None:
    """Hold a group against the model and the promises.

    Raises:
        AssertionError: If it could not have ended so.
    """
    assert not history.tasks_left
    assert not history.tokens_left
    assert not history.touched_after_the_end
    assert not history.lock.statistics().held
    assert not history.lock.statistics().waiting
    assert not history.lock._queue
    if history.plan.is_watched:
        check_events(history.events)
    if history.refused is not None:
        assert history.plan.options["claim_policy"] is ClaimPolicy.REJECT
        assert not history.calls
        return
    if history.handle is None:
        assert history.plan.disturbance is Disturbance.CALLER_CANCELLED
        return
    if history.plan.is_watched:
        own = [snapshot for snapshot in history.snapshots if snapshot.group_id == "g"]
        check_progress(own)
    judge_outcomes(history)
    judge_order(history)


def judge_outcomes(history: History) -> None:
    outcomes = history.result.outcomes
    assert [outcome.task_id for outcome in outcomes] == [str(n) for n in range(len(history.plan.agents))]
    assert not history.calls_again
    for number, outcome in enumerate(outcomes):
        call = history.calls.get(number)
        assert (call is None) == (outcome.started_after_seconds is None)
        if call is None:
            allowed = allowed_if_it_never_ran(history, number)
        else:
            assert call.ending, "an agent runs still"
            allowed = allowed_if_it_ran(history, number, call)
            if call.value is not None:
                assert outcome.result is not None
                assert outcome.output == call.value.output
            assert outcome.usage.cost == history.plan.agents[number].cost
            assert outcome.duration_seconds == call.ended_at - call.started_at
        assert outcome.status in allowed, f"task {number} is {outcome.status}, not {allowed}: {outcome.error}"
    for inner in history.inner:
        assert len(inner.outcomes) == 2
    result = history.result
    assert result.agents_succeeded == sum(outcome.is_success for outcome in outcomes)
    assert result.agents_succeeded + result.agents_failed + result.agents_parked == len(outcomes)


def overlap(one: ResourceClaim, other: ResourceClaim) -> bool:
    if one.mode is other.mode is ClaimMode.SHARED:
        return False
    a, b = f"{one.resource}/", f"{other.resource}/"
    return a == b or (a.startswith("path:") and (a.startswith(b) or b.startswith(a)))


def judge_order(history: History) -> None:
    """Look at who ran beside whom, and after whom."""
    plan, calls = history.plan, history.calls
    limit = plan.options["max_concurrency"] or math.inf
    assert plan.limit is None or history.peak_working <= plan.limit
    for number, call in calls.items():
        running = [n for n, o in calls.items() if o.started_mark <= call.started_mark < o.ended_mark]
        assert len(running) <= limit, "too many ran at once"
        for other in running:
            for one_claim in plan.agents[number].claims:
                assert other == number or not any(overlap(one_claim, c) for c in plan.agents[other].claims)
        for other in plan.agents[number].depends_on:
            assert history.result.outcomes[other].is_success
            assert calls[other].ended_mark < call.started_mark
    if not any(agent.claims or agent.depends_on for agent in plan.agents):
        assert sorted(calls, key=lambda n: calls[n].started_mark) == sorted(calls), "out of order"
    judge_stops(history)
    judge_idleness(history, limit)


def judge_stops(history: History) -> None:
    """Nothing starts after what stops the group."""
    last_start = max((call.started_mark for call in history.calls.values()), default=0)
    if history.plan.options["fail_fast"]:
        for number, call in history.calls.items():
            if history.result.outcomes[number].status in FAILURES:
                assert last_start < call.ended_mark, "one started after a failure"
    if history.disturbed_mark is not None and history.plan.disturbance in (
        Disturbance.RUN_CANCELLED,
        Disturbance.SHUTDOWN,
    ):
        assert last_start < history.disturbed_mark, "one started after everything was stopped"


def judge_idleness(history: History, limit: float) -> None:
    """Whoever claims nothing starts as soon as all that it depends on has succeeded and there is room."""
    if history.plan.limit is not None or history.was_blocked:
        return
    calls = history.calls
    times = sorted({t for call in calls.values() for t in (call.started_at, call.ended_at)})
    for now, then in pairwise(times):
        running = [n for n, call in calls.items() if call.started_at <= now < call.ended_at]
        for number, call in calls.items():
            agent = history.plan.agents[number]
            is_ready = all(calls[other].ended_at <= now for other in agent.depends_on)
            if call.started_at >= then and not agent.claims and is_ready:
                assert len(running) >= limit, f"task {number} could have started at {now:g} s"
