"""The claim queue: who is clear, who waits, and what looking costs; against a definition that tries every pair."""

import gc
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel_agents import ClaimMode, ResourceClaim
from parallel_agents._claim_queue import ClaimQueue, Ticket, find_overlap

paths = st.lists(st.sampled_from("ab"), max_size=3).map(lambda parts: "path:/" + "/".join(parts))
some_claims = st.builds(
    ResourceClaim,
    resource=st.one_of(paths, st.sampled_from(["x", "y", "path:relative", "path:relative/below"])),
    mode=st.sampled_from(ClaimMode),
)
claim_lists = st.lists(some_claims, min_size=1, max_size=3, unique_by=lambda claim: claim.resource)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), st.sampled_from("pqrs"), claim_lists),
        st.tuples(st.just("leave"), st.integers(0, 9), st.none() | st.integers(0, 2)),
    ),
    max_size=30,
)


def overlap(one: ResourceClaim, two: ResourceClaim) -> bool:
    a, b = one.resource.rstrip("/"), two.resource.rstrip("/")
    related = a == b or (
        a.startswith("path:") and b.startswith("path:") and (a.startswith(f"{b}/") or b.startswith(f"{a}/"))
    )
    return related and ClaimMode.EXCLUSIVE in (one.mode, two.mode)


@pytest.mark.proves("L3")
@given(steps=steps)
def test_a_ticket_is_clear_exactly_when_nothing_before_it_is_in_its_way(
    steps: list[tuple[str, str | int, object]],
) -> None:
    queue: ClaimQueue[str] = ClaimQueue()
    inside: dict[Ticket[str], list[ResourceClaim]] = {}

    def clear_by_definition() -> set[Ticket[str]]:
        return {
            ticket
            for ticket, own in inside.items()
            if not any(
                other.owner != ticket.owner and other.number < ticket.number and overlap(a, b)
                for other, others in inside.items()
                for a in own
                for b in others
            )
        }

    for what, who, claims in steps:
        before = clear_by_definition()
        if what == "enter":
            ticket = queue.enter(str(who), claims)  # type: ignore[arg-type]
            inside[ticket] = list(claims)  # type: ignore[call-overload]
            assert repr(ticket).startswith(f"Ticket({who!r}")
        elif inside:
            ticket = list(inside)[int(who) % len(inside)]
            if claims is None or ticket.waits_for is not None:
                freed = queue.leave(ticket, inside.pop(ticket))
            else:
                part = inside[ticket].pop(int(claims) % len(inside[ticket]))  # type: ignore[call-overload]
                freed = queue.leave(ticket, [part])
                if not inside[ticket]:
                    del inside[ticket]
            assert set(freed) == clear_by_definition() - before
            assert freed == sorted(freed, key=lambda one: one.number)
        assert {ticket for ticket in inside if ticket.waits_for is None} == clear_by_definition()
        for ticket in inside:
            found = queue.in_the_way_of(ticket)
            assert (found is None) == (ticket.waits_for is None)
            assert found is None or found[1] in {claim.resource for claim in ticket.claims}
    for ticket, left in inside.items():
        queue.leave(ticket, left)
    assert not queue


@given(held=st.lists(st.tuples(st.sampled_from("pq"), claim_lists), max_size=4), asked=some_claims)
def test_the_owner_of_a_claim_is_one_that_holds_what_overlaps(
    held: list[tuple[str, list[ResourceClaim]]], asked: ResourceClaim
) -> None:
    queue: ClaimQueue[str] = ClaimQueue()
    tickets = [(queue.enter(owner, claims), claims) for owner, claims in held]
    owners = {t.owner for t, own in tickets if t.waits_for is None and any(overlap(asked, claim) for claim in own)}
    found = queue.owner_of(asked)
    assert found in owners if owners else found is None


@given(claims=st.lists(st.tuples(st.sampled_from("pqr"), claim_lists), max_size=5))
def test_an_overlap_is_found_if_there_is_one(claims: list[tuple[str, list[ResourceClaim]]]) -> None:
    pairs = [(one, two) for i, two in enumerate(claims) for one in claims[:i] if one[0] != two[0]]
    there_is_one = any(overlap(a, b) for one, two in pairs for a in one[1] for b in two[1])
    assert (find_overlap(claims) is not None) == there_is_one


def calls_of(work: Callable[[], object]) -> int:
    """Return how many functions *work* calls, those in C included."""
    seen = 0

    def profile(_frame: object, event: str, _argument: object) -> None:
        nonlocal seen
        seen += event in ("call", "c_call")

    gc.disable()  # others are called when it runs
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return seen


def files(count: int) -> list[tuple[ResourceClaim]]:
    return [(ResourceClaim(resource=f"path:/a/b{n % 10}/c{n}"),) for n in range(count)]


def test_looking_costs_the_depth_of_a_path_and_not_the_number_of_claims() -> None:
    def entering_beside(count: int) -> int:
        queue: ClaimQueue[int] = ClaimQueue()
        for n, claims in enumerate(files(count)):
            assert queue.enter(n, claims).waits_for is None

        def once_more() -> None:
            queue.leave(queue.enter(-1, [ResourceClaim(resource="path:/a/b0/new")]))

        once_more()  # the folders above it are worked out once
        return calls_of(once_more)

    assert entering_beside(2_000) == entering_beside(10)


@pytest.mark.parametrize("mode", ClaimMode)
@pytest.mark.parametrize("ahead", [1, 50])
def test_a_line_moves_on_in_linear_time(mode: ClaimMode, ahead: int) -> None:
    """*ahead* shared ones hold the folder, and a line stands behind them, each for its own file or all for one."""

    def per_ticket(count: int) -> float:
        queue: ClaimQueue[int] = ClaimQueue()
        folder, one_file = ResourceClaim(resource="path:/a", mode=ClaimMode.SHARED), ResourceClaim(resource="path:/a/f")
        holders = [queue.enter(-n, [folder]) for n in range(1, ahead + 1)]
        claim = one_file if mode is ClaimMode.EXCLUSIVE else ResourceClaim(resource="path:/", mode=mode)
        blocker = queue.enter(-ahead - 1, [one_file])
        line = [queue.enter(n, [claim]) for n in range(count)]
        served: list[int] = []

        def serve() -> None:
            clear = [ticket for holder in holders for ticket in queue.leave(holder)]
            assert clear == [blocker]
            while clear:
                ticket = clear.pop(0)
                served.append(ticket.owner)
                clear += queue.leave(ticket)

        cost = calls_of(serve)
        assert served[1:] == [ticket.owner for ticket in line]
        return cost / count

    assert per_ticket(1_000) < per_ticket(500) * 1.1
