"""Admission: in order, each at most once, never more than the limit; whatever is asked of it, and when."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel_agents._admission import Admission

requests = st.lists(
    st.one_of(
        st.just(("take", 0)),
        st.just(("take", 0)),
        st.just(("finish", 0)),
        st.tuples(st.just("withdraw"), st.integers(0, 12)),
    ),
    max_size=60,
)


@pytest.mark.proves("X1", "X5")
@given(total=st.integers(1, 10), limit=st.none() | st.integers(1, 4), requests=requests, close_at=st.integers(0, 60))
def test_each_position_starts_at_most_once_in_order_and_within_the_limit(
    total: int, limit: int | None, requests: list[tuple[str, int]], close_at: int
) -> None:
    admission = Admission(total, limit)
    taken: list[int] = []
    withdrawn: set[int] = set()
    running = 0
    closed = False
    for number, (request, position) in enumerate(requests):
        if number == close_at:
            admission.close()
            closed = True
        queued = set() if closed else set(range(total)) - set(taken) - withdrawn
        assert admission.has_ready == bool(queued)
        if request == "take":
            got = admission.take()
            if queued and (limit is None or running < limit):
                assert got == min(queued)
                taken.append(min(queued))
                running += 1
            else:
                assert got is None
        elif request == "finish" and running:
            admission.finish(taken[-1])
            running -= 1
        elif request == "withdraw":
            could = admission.withdraw(position)
            assert could == (position in queued)
            withdrawn |= {position} if could else set()
    assert taken == sorted(set(taken))
    assert f"running={running}" in repr(admission)


def test_no_limit_means_as_many_as_there_are() -> None:
    assert Admission(7, None).limit == 7
    assert Admission(7, 3).limit == 3
    assert Admission(2, 3).limit == 2
