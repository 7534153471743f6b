"""Fixtures for pytest, which finds this module by itself where the library is installed."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .._models import AgentIdentity, ParallelExecutionGroup, Task
from ..events import ParallelEvent
from .scripted import Script, ScriptedEngine


class EventRecorder:
    """An observer that keeps what it is told.

    Attributes:
        events: In the order in which they came.
    """

    def __init__(self) -> None:
        self.events: list[ParallelEvent] = []

    def on_event(self, event: ParallelEvent, /) -> None:
        """Keep the event."""
        self.events.append(event)

    def names(self, task_id: str | None = None) -> list[str]:
        """Return the names of the events, or of those about one task."""
        return [event.name for event in self.events if task_id in (None, event.task_id)]


@pytest.fixture
def recorded_events() -> EventRecorder:
    """An observer for ``ParallelExecutor(observers=[recorded_events])`` that keeps what happens."""
    return EventRecorder()


@pytest.fixture
def scripted_engine() -> Iterator[Callable[..., ScriptedEngine]]:
    """Makes engines whose agents do what a script says; fails the test if one of them still runs at its end."""
    made: list[ScriptedEngine] = []

    def make(script: "Script | None" = None) -> ScriptedEngine:
        made.append(ScriptedEngine() if script is None else ScriptedEngine(script))
        return made[-1]

    yield make
    left = [task_id for engine in made for task_id in engine.in_flight]
    assert not left, f"agents outlived the test: {', '.join(left)}"


@pytest.fixture
def agent_group() -> Callable[..., ParallelExecutionGroup]:
    """Makes groups: ``agent_group("a", "b", fail_fast=True)`` has two tasks, each for an agent of its own."""

    def make(*task_ids: str, group_id: str = "test", **options: Any) -> ParallelExecutionGroup:
        tasks = [Task(id=task_id) for task_id in task_ids]
        return ParallelExecutionGroup.map(group_id, AgentIdentity(id="agent"), tasks, **options)

    return make
