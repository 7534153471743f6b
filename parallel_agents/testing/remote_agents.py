"""Agents for the tests of remote engines, and a driver that can be killed; importable wherever the library is.

An agent does what its task's inputs say: ``do`` names a function of this module. What happened to it stands in a file,
the ``diary``, which both ends can read and a kill does not touch.
"""

import importlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio

from .._context import current_run
from .._executor import ParallelExecutor
from .._models import AgentAssignment, AgentIdentity, ParallelExecutionGroup, Task, Usage
from ..engines._protocol import AgentEngine
from ..events import CHAT_REQUEST_RETRY

LOOK_SECONDS = 0.02
"""How often somebody looks whether a file has what it waits for."""


class Diary:
    """What happened, in a file that several processes write to; a line for each event.

    Args:
        path: Of the file; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, *words: object) -> None:
        """Add a line, at once and whole."""
        with self.path.open("ab", buffering=0) as file:
            file.write((" ".join(map(str, words)) + "\n").encode())

    def lines(self, *beginning: str) -> list[list[str]]:
        """Return the words of each line that begins with these."""
        if not self.path.exists():
            return []
        found = [line.split() for line in self.path.read_text("utf-8").splitlines()]
        return [words for words in found if words[: len(beginning)] == list(beginning)]

    async def wait_for(self, *beginning: str, count: int = 1) -> list[list[str]]:
        """Wait until so many lines begin with these words, and return them."""
        while len(found := self.lines(*beginning)) < count:  # noqa: ASYNC110 - another process writes it
            await anyio.sleep(LOOK_SECONDS)
        return found


async def agent(assignment: AgentAssignment) -> Any:
    """Do what the task's inputs say, and keep the diary of it."""
    inputs = assignment.task.inputs
    diary = Diary(Path(str(inputs["diary"])))
    diary.note("started", assignment.task_id, os.getpid())
    try:
        return await _DEEDS[str(inputs["do"])](assignment, diary)
    except anyio.get_cancelled_exc_class():
        diary.note("cancelled", assignment.task_id)
        raise


async def _return(assignment: AgentAssignment, _: Diary) -> Any:
    return assignment.task.inputs.get("output")


async def _return_no_json(_: AgentAssignment, __: Diary) -> Any:
    return {1, 2}


async def _fail(_: AgentAssignment, __: Diary) -> Any:
    current_run().record_usage(Usage(requests=3))
    raise ValueError("it does not work")


async def _fail_when_all_started(assignment: AgentAssignment, diary: Diary) -> Any:
    await diary.wait_for("started", count=int(str(assignment.task.inputs["count"])))
    raise ValueError("the first to fail")


async def _spend_and_wait(_: AgentAssignment, __: Diary) -> Any:
    current_run().record_usage(Usage(requests=1, cost=0.5))
    await anyio.sleep_forever()


async def _emit(_: AgentAssignment, __: Diary) -> Any:
    current_run().emit(CHAT_REQUEST_RETRY, attempt=1, wait_seconds=0.0, error="busy {0} <red>")


async def _tell_the_context(_: AgentAssignment, diary: Diary) -> Any:
    run = current_run()
    diary.note("waits", run.assignment.task_id)
    while not run.shutdown_requested:  # noqa: ASYNC110 - as any agent may do
        await anyio.sleep(LOOK_SECONDS)
    return {
        "group_id": run.group_id,
        "attempt": run.attempt,
        "upstream": {task_id: outcome.output for task_id, outcome in run.upstream.items()},
    }


async def _wait_the_first_time(assignment: AgentAssignment, diary: Diary) -> Any:
    current_run().record_usage(Usage(requests=1))
    if len(diary.lines("started", assignment.task_id)) == 1:
        await anyio.sleep_forever()
    return "the second time"


async def _wait_until_told(_: AgentAssignment, diary: Diary) -> Any:
    current_run().record_usage(Usage(requests=1))
    await diary.wait_for("go")
    return os.urandom(8).hex()


async def _return_when_cancelled(_: AgentAssignment, __: Diary) -> Any:
    current_run().record_usage(Usage(requests=1))
    try:
        await anyio.sleep_forever()
    except anyio.get_cancelled_exc_class():  # noqa: ASYNC103 - this is what it is for
        return "returned all the same"  # noqa: ASYNC104 - the same


async def _go_on_when_cancelled(assignment: AgentAssignment, diary: Diary) -> Any:
    with anyio.CancelScope(shield=True):
        await diary.wait_for("enough")
    diary.note("ended", assignment.task_id)


async def _kill_the_worker(_: AgentAssignment, __: Diary) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


async def _fail_the_first_time(_: AgentAssignment, __: Diary) -> Any:
    if current_run().attempt == 1:
        raise OSError("the first time")
    return current_run().attempt


async def _cancel_itself(_: AgentAssignment, __: Diary) -> Any:
    raise anyio.get_cancelled_exc_class()


_DEEDS: dict[str, Callable[[AgentAssignment, Diary], Awaitable[Any]]] = {
    "return": _return,
    "return no json": _return_no_json,
    "fail": _fail,
    "fail when all started": _fail_when_all_started,
    "spend and wait": _spend_and_wait,
    "emit": _emit,
    "tell the context": _tell_the_context,
    "wait the first time": _wait_the_first_time,
    "wait until told": _wait_until_told,
    "return when cancelled": _return_when_cancelled,
    "go on when cancelled": _go_on_when_cancelled,
    "cancel itself": _cancel_itself,
    "kill the worker": _kill_the_worker,
    "fail the first time": _fail_the_first_time,
}


def assignment(do: str, diary: Diary, number: int = 1, **fields: Any) -> AgentAssignment:
    """Return an assignment for ``agent()``.

    Args:
        do: What is to be done.
        diary: Where it is noted.
        number: Makes the ids: ``t1`` and ``a1``.
        fields: Of the assignment; those that it does not have are inputs of its task, and ``depends_on``.
    """
    of_assignment = {name: fields.pop(name) for name in ("timeout_seconds", "resource_claims") if name in fields}
    task = Task(
        id=f"t{number}",
        depends_on=fields.pop("depends_on", ()),
        inputs={"do": do, "diary": str(diary.path), **fields},
    )
    return AgentAssignment(identity=AgentIdentity(id=f"a{number}"), task=task, **of_assignment)


async def _drive(make_engine: Callable[[str], Awaitable[AgentEngine]], execution: str, diary: Diary) -> None:
    engine = await make_engine(execution)
    group = ParallelExecutionGroup(group_id="contract", assignments=[assignment("wait until told", diary)])
    await ParallelExecutor(engine=engine).execute_group(group)


def main() -> None:
    """Be a driver, on asyncio: run one agent that waits until it is told.

    The arguments of the program are the ``module:attribute`` of a function that makes an engine, the execution, and
    the diary.
    """
    name, execution, path = sys.argv[1:]
    module, _, attribute = name.partition(":")
    anyio.run(_drive, getattr(importlib.import_module(module), attribute), execution, Diary(Path(path)))


if __name__ == "__main__":
    main()
