"""What every journal must do, as a test class: subclass it for your journal, and give it a fixture ``journal``."""

import anyio
import pytest

from .._models import NO_USAGE, Usage
from ..journals import Ending, Entry, Journal, Step

SECONDS = 30.0
"""How long a test may take; a journal that has not answered by then hangs."""


def step_of(name: str, *, execution: str = "run", group_id: str = "group", fingerprint: str = "work") -> Step:
    """Return a step of the task and the agent *name*."""
    return Step(execution=execution, group_id=group_id, task_id=name, agent_id=f"agent-{name}", fingerprint=fingerprint)


def _attempt(entry: Entry) -> int:
    assert entry.attempt is not None
    return entry.attempt


@pytest.mark.anyio
class JournalContract:
    """Starts, what was spent, endings. A subclass has a fixture ``journal`` that gives an open, empty journal."""

    @pytest.fixture
    def journal(self) -> Journal:
        """Return an open journal with nothing in it."""
        raise NotImplementedError("give your subclass a fixture 'journal'")

    def test_it_has_the_methods_of_the_protocol(self, journal: Journal) -> None:
        """It is what ``JournaledEngine`` takes."""
        assert isinstance(journal, Journal)

    async def test_a_first_start_knows_nothing(self, journal: Journal) -> None:
        """And each start has a name of its own."""
        with anyio.fail_after(SECONDS):
            first, second = await journal.start(step_of("a")), await journal.start(step_of("b"))
        assert (first.reason, first.content, first.spent) == (None, None, NO_USAGE)
        assert _attempt(first) != _attempt(second)

    @pytest.mark.parametrize("status", ["succeeded", "parked"])
    async def test_what_is_done_is_not_started_again(self, journal: Journal, status: str) -> None:
        """Its content and what it cost come back as they were."""
        usage = Usage(input_tokens=3, output_tokens=2, requests=1, cost=0.5)
        content = '{"é": "\\u0000 \\ud800"}'
        with anyio.fail_after(SECONDS):
            entry = await journal.start(step_of("a"))
            await journal.end(_attempt(entry), Ending(status=status, content=content, usage=usage))
            again = await journal.start(step_of("a"))
        assert (again.attempt, again.content, again.spent, again.reason) == (None, content, usage, "recorded")

    async def test_what_failed_starts_again_and_what_it_spent_is_kept(self, journal: Journal) -> None:
        """Over all earlier starts."""
        with anyio.fail_after(SECONDS):
            for number in range(3):
                entry = await journal.start(step_of("a"))
                assert entry.reason == ("failed" if number else None)
                assert entry.spent == Usage(requests=number)
                ending = Ending(status="failed", content="no", usage=Usage(requests=1))
                await journal.end(_attempt(entry), ending)

    async def test_what_did_not_end_was_interrupted(self, journal: Journal) -> None:
        """What it had told to have spent until then is known, as soon as something later was recorded."""
        with anyio.fail_after(SECONDS):
            first = await journal.start(step_of("a"))
            journal.spend(_attempt(first), Usage(input_tokens=5))
            journal.spend(_attempt(first), Usage(input_tokens=2, cost=0.25))
            await journal.start(step_of("b"))
            again = await journal.start(step_of("a"))
        assert again.reason == "interrupted"
        assert again.spent == Usage(input_tokens=7, cost=0.25)
        assert _attempt(again) != _attempt(first)

    async def test_other_work_starts_again(self, journal: Journal) -> None:
        """Though the task has the same name."""
        with anyio.fail_after(SECONDS):
            entry = await journal.start(step_of("a"))
            await journal.end(_attempt(entry), Ending(status="succeeded", content="1", usage=NO_USAGE))
            changed = await journal.start(step_of("a", fingerprint="other work"))
        assert changed.reason == "changed"
        assert changed.attempt is not None

    async def test_executions_and_groups_know_nothing_of_each_other(self, journal: Journal) -> None:
        """Names are compared whole."""
        with anyio.fail_after(SECONDS):
            entry = await journal.start(step_of("a"))
            await journal.end(_attempt(entry), Ending(status="succeeded", content="1", usage=Usage(requests=1)))
            others = [
                await journal.start(step_of("a", execution="another run")),
                await journal.start(step_of("a", group_id="another group")),
                await journal.start(step_of("A")),
            ]
        assert [(other.reason, other.spent) for other in others] == [(None, NO_USAGE)] * 3

    async def test_many_at_once_each_have_their_own_ending(self, journal: Journal) -> None:
        """However the journal puts them together."""

        async def record(number: int) -> None:
            entry = await journal.start(step_of(str(number)))
            ending = Ending(status="succeeded", content=str(number), usage=Usage(requests=number))
            await journal.end(_attempt(entry), ending)

        with anyio.fail_after(SECONDS):
            async with anyio.create_task_group() as tasks:
                for number in range(50):
                    tasks.start_soon(record, number)
            recorded = [await journal.start(step_of(str(number))) for number in range(50)]
        assert [entry.content for entry in recorded] == [str(number) for number in range(50)]
        assert [entry.spent.requests for entry in recorded] == list(range(50))
