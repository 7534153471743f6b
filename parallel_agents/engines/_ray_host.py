"""The host: an actor of Ray that runs agents, which drivers send to it, ask about and cancel by their ids.

Its methods take and return text, and never raise on purpose. Nothing here imports Ray: the actor is this class, made
one by ``RayEngine``. It outlives its drivers, so that another can go on
where one was killed; an agent that nobody asks about runs to its end, and its ending is kept for a while.
"""

import asyncio  # noqa: TID251 - the methods of an actor run in Ray's own loop, which is asyncio's
import os
import secrets
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice

from attrs import Factory, define, field, frozen

from .._checks import as_tuple
from ..serialization import InvalidDataError
from ._protocol import AgentEngine
from ._remote import Ending, EndingKind, Order, Report, VersionMismatchError, pack, unpack
from ._remote_worker import RunOnWorker, engine_named

NEWS_SECONDS = 1.0
"""How long a driver's call waits for news; drivers tell of shutdowns and spent budgets as often."""

TURNS = 4
"""For so many turns of the event loop more is gathered when there is news, so that a short agent needs one answer."""

SILENT_SECONDS = 60.0
"""A driver that has not called for so long is gone."""

KEEP_SECONDS = 3600.0
"""How long the ending of an agent is kept for a driver that comes back."""

AT_ONCE = 500
"""The most orders or reports in one text."""


@frozen(kw_only=True)
class Parcel:
    """What a driver sends.

    Attributes:
        orders: To be started; one whose id is known is joined.
        cancels: Ids of agents to be cancelled.
        stopping: Ids of agents whose driver is shutting down.
        budget_spent: Ids of agents whose group has spent its budget.
        heard: The number of the last news that arrived.
    """

    orders: tuple[Order, ...] = field(default=(), converter=as_tuple)
    cancels: tuple[str, ...] = field(default=(), converter=as_tuple)
    stopping: tuple[str, ...] = field(default=(), converter=as_tuple)
    budget_spent: tuple[str, ...] = field(default=(), converter=as_tuple)
    heard: int = 0


@frozen(kw_only=True)
class News:
    """What a host answers.

    Attributes:
        link: Names what the host knows of this driver; it forgets one that it has not heard of for long.
        number: Grows; once it is heard, endings in these news and in those before are let go of.
        reports: Of agents of which there is news.
        refusal: Why nothing could be read of what was sent.
    """

    link: str = ""
    number: int = 0
    reports: tuple[Report, ...] = field(default=(), converter=as_tuple)
    refusal: str = ""


@frozen(kw_only=True)
class HostState:
    """How a host is doing.

    Attributes:
        engine: What it runs.
        pid: Its process.
        running: Agents that run.
        queued: Agents that wait for a place.
        started: Agents that it has started in its life.
        untold: Agents that have ended without all drivers that ask for them having heard it.
        is_draining: Whether it takes no more.
    """

    engine: str
    pid: int
    running: int
    queued: int
    started: int
    untold: int
    is_draining: bool


@define(eq=False)
class _Link:
    """A driver, as the host sees it.

    Attributes:
        name: Which no other has, not even one of the same driver.
        called_at: When it last called.
        calls: How often it has called.
        is_wanted: Set when a call that waits has something to answer, or another has come.
        news: Ids of agents of which there is news, in the order in which it came.
        number: Of the last news.
        seen: How many events of each agent it was told.
        told: Agents whose endings it was told, by the number of the news, and has not heard as far as is known.
    """

    name: str = Factory(partial(secrets.token_hex, 8))
    called_at: float = 0.0
    calls: int = 0
    is_wanted: asyncio.Event = Factory(asyncio.Event)
    news: dict[str, None] = Factory(dict)
    number: int = 0
    seen: dict[str, int] = Factory(dict)
    told: "dict[int, list[_Hosted]]" = Factory(dict)

    def note(self, id_: str) -> None:
        """Take note that there is news of an agent."""
        self.news[id_] = None
        self.is_wanted.set()


@define(eq=False)
class _Hosted:
    """An agent on this host.

    Attributes:
        run: Its run.
        watchers: Names of the links that are told of it.
        task: In which it runs, once it has a place.
        ended_at: When it ended, if it has.
    """

    run: RunOnWorker
    watchers: set[str] = Factory(set)
    task: "asyncio.Task[None] | None" = None
    ended_at: float | None = None

    @property
    def is_untold(self) -> bool:
        """Whether a driver waits to hear how it ended."""
        return self.task is not None and self.ended_at is not None and bool(self.watchers)

    def is_no_answer_for(self, order: Order) -> bool:
        """Whether it has ended in a way that lets the same order start it anew."""
        ending = self.run.ending
        if ending is None:
            return False
        return order.attempt > self.run.attempt or ending.kind not in (EndingKind.RETURNED, EndingKind.RAISED)

    def end_unstarted(self, ending: Ending) -> None:
        """Give an agent that never ran its ending."""
        self.run.ending = ending
        self.ended_at = time.monotonic()


class Host:
    """Runs agents for drivers.

    Args:
        engine: The inner engine, as ``module:attribute``; it is imported for the first agent.
        max_agents: The most agents at the same time; more wait for a place, in the order in which they came to this
            host, without their time counting.
    """

    def __init__(self, engine: str, max_agents: int | None = None) -> None:
        self._engine_name = engine
        self._engine: AgentEngine | None = None
        self._max_agents = max_agents
        self._agents: dict[str, _Hosted] = {}
        self._links: dict[str, _Link] = {}
        self._queue: dict[str, _Hosted] = {}
        self._running = 0
        self._started = 0
        self._is_draining = False
        self._swept_at = 0.0

    # What drivers call

    async def exchange(self, driver: str, text: str) -> str:
        """Take a ``Parcel``; answer with ``News`` as soon as there is some, or after a while, or when called again."""
        try:
            parcel = unpack(Parcel, text, "driver")
        except (VersionMismatchError, InvalidDataError) as error:
            return pack(News(refusal=str(error)))
        link = self._link(driver)
        self._let_go(driver, link, parcel.heard)
        for order in parcel.orders:
            self._take(order, driver, link)
        for agent in self._known(parcel.cancels):
            self._stop(agent)
        for agent in self._known(parcel.stopping):
            agent.run.is_stopping = True
        for agent in self._known(parcel.budget_spent):
            agent.run.is_budget_spent = True
        if not await self._is_to_tell(link):
            return pack(News(link=link.name))
        reports = self._gathered(link)
        return pack(News(link=link.name, number=link.number, reports=reports))

    def _known(self, ids: Sequence[str]) -> "list[_Hosted]":
        return [self._agents[id_] for id_ in ids if id_ in self._agents]

    async def _is_to_tell(self, link: _Link) -> bool:
        """Wait for news, or for another call of the driver, which relieves this one; whether this one is to tell it."""
        link.is_wanted.set()
        link.calls += 1
        this = link.calls
        if not link.news:
            link.is_wanted = asyncio.Event()
            try:
                async with asyncio.timeout(NEWS_SECONDS):
                    await link.is_wanted.wait()
            except TimeoutError:
                self._sweep()
        for _ in range(TURNS):
            await asyncio.sleep(0)
        return this == link.calls

    # What the worker command calls

    async def state(self) -> str:
        """Tell how it is doing, as a ``HostState``."""
        return pack(
            HostState(
                engine=self._engine_name,
                pid=os.getpid(),
                running=self._running,
                queued=len(self._queue),
                started=self._started,
                untold=sum(agent.is_untold for agent in self._agents.values()),
                is_draining=self._is_draining,
            )
        )

    async def drain(self) -> str:
        """Take no more; those that wait for a place are to run elsewhere, those that run are told to finish."""
        self._is_draining = True
        for agent in tuple(self._queue.values()):
            self._stop(agent, EndingKind.INTERRUPTED)
        for agent in self._agents.values():
            agent.run.is_stopping = True
        return await self.state()

    async def interrupt(self) -> str:
        """Cancel what still runs; it is to run elsewhere."""
        for agent in tuple(self._agents.values()):
            self._stop(agent, EndingKind.INTERRUPTED)
        return await self.state()

    # Agents

    def _take(self, order: Order, driver: str, link: _Link) -> None:
        """Join the agent that has the order's id, or start one."""
        agent = self._agents.get(order.id)
        if agent is None or agent.is_no_answer_for(order):
            watchers = set() if agent is None else agent.watchers
            agent = _Hosted(RunOnWorker(order, partial(self._note, order.id)), watchers)
            self._agents[order.id] = agent
            self._begin(agent, order)
        agent.watchers.add(driver)
        link.seen[order.id] = 0
        link.note(order.id)

    def _begin(self, agent: _Hosted, order: Order) -> None:
        """Start an agent, let it wait for a place, or end it with the reason why it cannot run here."""
        if self._is_draining:
            agent.end_unstarted(Ending(kind=EndingKind.INTERRUPTED))
        elif order.engine not in (None, self._engine_name):
            agent.end_unstarted(
                _refusal(f"it runs {self._engine_name}, not {order.engine}; give the other engine another name")
            )
        elif self._max_agents is not None and self._running >= self._max_agents:
            agent.run.is_queued = True
            self._queue[order.id] = agent
        else:
            self._start(agent)

    def _start(self, agent: _Hosted) -> None:
        if self._engine is None:
            try:
                self._engine = engine_named(self._engine_name)
            except ValueError as error:
                agent.end_unstarted(_refusal(str(error)))
                return
        agent.run.is_queued = False
        self._running += 1
        self._started += 1
        agent.task = asyncio.get_running_loop().create_task(agent.run.perform(self._engine))
        agent.task.add_done_callback(partial(self._end, agent))

    def _end(self, agent: _Hosted, task: "asyncio.Task[None]") -> None:
        """See to what there is to do when an agent has ended: let the next one start."""
        if not task.cancelled():
            task.exception()  # there is none; asyncio complains of those that nobody has looked at
        agent.ended_at = time.monotonic()
        self._running -= 1
        while self._queue and (self._max_agents is None or self._running < self._max_agents):
            following = self._queue.pop(next(iter(self._queue)))
            self._start(following)
            self._note(following.run.id)

    def _stop(self, agent: _Hosted, kind: EndingKind = EndingKind.CANCELLED) -> None:
        """Cancel an agent, whether it runs or waits for a place."""
        if self._queue.pop(agent.run.id, None) is not None:
            agent.end_unstarted(Ending(kind=kind))
            self._note(agent.run.id)
        elif agent.run.ending is None:
            agent.run.cancel(kind)

    # Telling

    def _link(self, driver: str) -> _Link:
        link = self._links.setdefault(driver, _Link())
        link.called_at = time.monotonic()
        return link

    def _note(self, id_: str) -> None:
        """Let those who watch an agent know that there is news of it."""
        if (agent := self._agents.get(id_)) is not None:
            for name in agent.watchers:
                self._links[name].note(id_)

    def _gathered(self, link: _Link) -> list[Report]:
        """Return the reports of those of which there is news, and take note of what they tell."""
        reports = []
        link.number += 1
        ended = []
        for id_ in tuple(islice(link.news, AT_ONCE)):
            del link.news[id_]
            agent = self._agents.get(id_)
            if agent is None or id_ not in link.seen:
                continue
            report = agent.run.report(link.seen[id_])
            link.seen[id_] = agent.run.event_count
            reports.append(report)
            if report.ending is not None:
                ended.append(agent)
        if ended:
            link.told[link.number] = ended
        return reports

    def _let_go(self, driver: str, link: _Link, heard: int) -> None:
        """Forget endings that all who ask for them have heard."""
        for number in [number for number in link.told if number <= heard]:
            for agent in link.told.pop(number):
                id_ = agent.run.id
                if agent is not self._agents.get(id_):
                    continue  # another start of it has taken its place
                link.seen.pop(id_, None)
                agent.watchers.discard(driver)
                if not agent.watchers:
                    del self._agents[id_]

    def _sweep(self) -> None:
        """Forget drivers that are gone, and the endings that nobody came back for."""
        now = time.monotonic()
        if now - self._swept_at < SILENT_SECONDS:
            return
        self._swept_at = now
        for name, link in tuple(self._links.items()):
            if now - link.called_at > SILENT_SECONDS:
                for agent in self._agents.values():
                    agent.watchers.discard(name)
                del self._links[name]
        for id_, agent in tuple(self._agents.items()):
            if not agent.watchers and agent.ended_at is not None and now - agent.ended_at > KEEP_SECONDS:
                del self._agents[id_]


def _refusal(reason: str) -> Ending:
    return Ending(kind=EndingKind.REFUSED, error=f"The worker does not run it: {reason}")
