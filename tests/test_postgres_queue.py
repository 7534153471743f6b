"""The line for claims in the database: it serves as ``ClaimQueue`` does, and nobody comes in between."""

import random
import threading
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from postgres_server import PostgresServer

from parallel_agents import ClaimMode, ResourceClaim
from parallel_agents._claim_queue import IN_THE_WAY, ClaimQueue, Ticket, notes
from parallel_agents._postgres.connections import Connections
from parallel_agents._postgres.keeper import Session
from parallel_agents.postgres import PostgresStore

RESOURCES = ["r", "s", "path:/a", "path:/a/b", "path:/a/b/c", "path:/ab"]

claims_of = st.lists(
    st.builds(ResourceClaim, resource=st.sampled_from(RESOURCES), mode=st.sampled_from(ClaimMode)),
    min_size=1,
    max_size=3,
    unique_by=lambda claim: claim.resource,
)
steps = st.lists(
    st.tuples(st.sampled_from(["one", "two", "three"]), claims_of) | st.integers(min_value=0, max_value=20),
    max_size=25,
)


class Line:
    """The functions of the database, as one session calls them."""

    def __init__(self, url: str) -> None:
        self.connection = Connections(url).connect()
        self.session = Session(self.connection, 60)

    def enter(self, name: str, holder: str, claims: Sequence[ResourceClaim], *, waits: bool = True) -> int | None:
        noted = [(at, resource, how) for at, claim in enumerate(claims) for resource, how in notes(claim)]
        columns = [[note[column] for note in noted] for column in range(3)]
        row = self.connection.execute(
            "SELECT granted FROM enter(%s, %s, %s, %s, %s::integer[], %s::text[], %s::smallint[])",
            (name, self.session.id, holder, waits, *columns),
        ).fetchone()
        assert row is not None
        granted: int | None = row[0]
        return granted

    def leave(self, name: str) -> None:
        self.connection.execute("CALL leave(%s)", (name,))

    def value(self, query: Any, *arguments: object) -> Any:
        row = self.connection.execute(query, arguments).fetchone()
        assert row is not None
        return row[0]


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    url = postgres.empty()
    with PostgresStore(url):
        return url


def test_what_is_in_the_way_is_the_same_as_in_memory(url: str) -> None:
    line = Line(url)
    assert {how: tuple(line.value("SELECT not_beside(%s::smallint)", how)) for how in range(4)} == IN_THE_WAY
    line.connection.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
def test_the_line_serves_as_the_one_in_memory(url: str, steps: list[Any]) -> None:
    line, queue = Line(url), ClaimQueue[str]()
    line.connection.execute("DELETE FROM tickets")
    tickets: list[tuple[str, Ticket[str]]] = []
    for number, step in enumerate(steps):
        if isinstance(step, tuple):
            holder, claims = step
            ticket = queue.enter(holder, claims)
            tickets.append((f"t{number}", ticket))
            assert (line.enter(f"t{number}", holder, claims) is None) == (ticket.waits_for is not None)
        elif step < len(tickets):
            name, ticket = tickets.pop(step)
            queue.leave(ticket)
            line.leave(name)
        clear = {name for name, ticket in tickets if ticket.waits_for is None}
        assert clear == set(line.value("SELECT coalesce(array_agg(name), '{}') FROM tickets WHERE token IS NOT NULL"))
    line.connection.close()


def test_no_two_threads_ever_hold_what_does_not_go_together_and_everybody_is_served(url: str) -> None:
    """Eight clients enter, wait and leave as fast as they can; nobody polls, so that no turn may be forgotten."""
    guard, held, served = threading.Lock(), dict[str, ResourceClaim](), []
    problems: list[str] = []

    def clash(one: ResourceClaim, other: ResourceClaim) -> bool:
        queue = ClaimQueue[str]()
        queue.enter("one", [one])
        return queue.enter("other", [other]).waits_for is not None

    def is_told(line: Line, name: str) -> bool:
        told = line.connection.notifies(timeout=20)  # earlier ones may come first, for those that left meanwhile
        return any(notification.payload.startswith(f"{name} ") for notification in told)

    def work(number: int) -> None:
        line, chance = Line(url), random.Random(number)
        line.connection.execute(f'LISTEN "{line.session.channel}"'.encode())
        for turn in range(60):
            name = f"{number}-{turn}"
            wanted = chance.sample(RESOURCES, chance.randint(1, 3))
            claims = [ResourceClaim(resource=r, mode=chance.choice(list(ClaimMode))) for r in wanted]
            token = line.enter(name, name, claims)
            if token is None and chance.random() < 0.2:
                line.leave(name)
                continue
            if token is None and not is_told(line, name):
                problems.append(f"{name} was never told")
                break
            with guard:
                problems.extend(f"{name} beside {n}" for n, c in held.items() for own in claims if clash(own, c))
                held.update({f"{name} {c.resource}": c for c in claims})
            with guard:
                for claim in claims:
                    del held[f"{name} {claim.resource}"]
            line.leave(name)
            served.append(name)
        line.connection.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
    assert len(served) > 8 * 60 * 0.6
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT count(*) FROM parallel_agents.tickets").fetchone()
        assert row == (0,)
