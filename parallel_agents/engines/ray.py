"""RayEngine: agents that run on a Ray cluster, from asyncio and from trio.

A driver has one link to each host, whose calls tell what has gathered and bring back news of all agents there. Ray's
threads only leave a message in the event loop when a call is answered, so no thread waits for an agent.
What happens on the other side is in ``_ray_host``.
"""

import secrets
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from importlib import import_module
from itertools import islice
from typing import Any

import anyio
import anyio.lowlevel
from anyio.lowlevel import RunVar
from attrs import Factory, define

from .._checks import shown
from .._context import RunContext, current_run
from .._errors import EngineUnavailableError
from .._models import AgentAssignment
from .._outcomes import AgentRunResult
from ..events import error_text
from ..serialization import InvalidDataError
from ._ray_host import AT_ONCE, NEWS_SECONDS, TURNS, Host, News, Parcel
from ._remote import (
    Account,
    Ending,
    EndingKind,
    Order,
    RemoteAgentError,
    Report,
    VersionMismatchError,
    WorkerLostError,
    WorkerRefusedError,
    pack,
    unconfirmed,
    unpack,
)
from .asyncio import raise_a_cancellation  # noqa: ASYNC106 - ours
from .journal import fingerprint

try:
    ray: Any = import_module("ray")  # so large that it is not there where types are checked
except ModuleNotFoundError as error:
    message = "RayEngine needs Ray: pip install 'parallel-agents[ray]'"
    raise ModuleNotFoundError(message, name=error.name) from error

__all__ = ["RayEngine", "RemoteAgentError", "VersionMismatchError", "WorkerLostError", "WorkerRefusedError"]

NAMESPACE = "parallel_agents"
"""Ray's namespace of all hosts."""

PAUSE_SECONDS = 0.5
"""Between two questions for a host, where one is stopping."""

_connecting = threading.Lock()


class RayEngine:
    """Runs agents on hosts: actors of a Ray cluster, which outlive the driver and are found by their names.

    The inner engine travels by its name and an assignment as JSON, and so do results: outputs are plain JSON. An agent
    reports its usage and its events while it runs. What it raises is a ``RemoteAgentError`` here.

    An agent's execution is at least once: when its host is killed, it runs again on another. Its result is told once to
    each driver that waits for it, and two that wait for the same agent are told the same.

    A cancelled agent is told so first, and then waited for. If its host has not confirmed after *cancel_seconds* that
    it stopped, the outcome says so: it may still run.

    The time until an agent has a place on its host does not count towards its timeout.

    Args:
        inner: The engine that the hosts run, as ``module:attribute``: an engine or an async function of an assignment.
            Ray's workers import it, so it must be installed, or on ``PYTHONPATH``, wherever they run.
        name: Names the hosts ``{name}-0``, ``{name}-1``, ...; each inner engine needs a name of its own.
        hosts: How many there are; agents are spread over them by their ids.
        starts_hosts: Whether those that are missing are started; otherwise they are waited for, and the command
            ``parallel-agents worker --ray`` starts and stops them.
        max_agents: The most agents of each host that is started; more wait for a place, in the order in which they came
            to the host: those that start at once may come in another.
        execution: All drivers that are given the same name mean the same agents: one that is started after another was
            killed goes on with those that run. Unless given, no other driver does.
        version: Stands for whatever else decides what agents do, such as the code or a prompt.
        cancel_seconds: How long a cancelled agent is waited for.
        reach_seconds: How long a host may take to answer an agent, such as to be started.
        starts: How often an agent is started at most, when its host is lost.
        address: Of the cluster, where this process is not connected yet: ``ray.init()`` is called with it.
        actor_options: Ray's options for hosts that are started, such as ``resources`` or ``runtime_env``.
    """

    def __init__(
        self,
        inner: str,
        *,
        name: str = "parallel-agents",
        hosts: int = 1,
        starts_hosts: bool = True,
        max_agents: int | None = None,
        execution: str | None = None,
        version: str = "",
        cancel_seconds: float = 10.0,
        reach_seconds: float = 120.0,
        starts: int = 3,
        address: str = "auto",
        actor_options: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(inner, str):
            raise TypeError(f"inner must be 'module:attribute', for live objects do not travel; got {shown(inner)}")
        for what, text in (
            ("inner", inner),
            ("name", name),
            ("execution", "given" if execution is None else execution),
        ):
            if not text.strip():
                raise ValueError(f"{what} must not be blank")
        for what, number in (
            ("hosts", hosts),
            ("max_agents", 1 if max_agents is None else max_agents),
            ("starts", starts),
        ):
            if number < 1:
                raise ValueError(f"{what} must be >= 1, got {number}")
        for what, seconds in (("cancel_seconds", cancel_seconds), ("reach_seconds", reach_seconds)):
            if not seconds >= 0:
                raise ValueError(f"{what} must be >= 0, got {seconds}")
        self._inner = inner
        self._name = name
        self._hosts = hosts
        self._starts_hosts = starts_hosts
        self._max_agents = max_agents
        self._execution = execution or secrets.token_hex(8)
        self._version = version
        self._cancel_seconds = cancel_seconds
        self._reach_seconds = reach_seconds
        self._starts = starts
        self._address = address
        self._actor_options = dict(actor_options or {})
        self._links_of_this_loop: RunVar[_Links] = RunVar("parallel_agents_ray_links")

    def __repr__(self) -> str:
        return f"RayEngine({self._inner!r}, name={self._name!r}, hosts={self._hosts})"

    async def run(self, assignment: AgentAssignment, /) -> AgentRunResult[Any]:
        """Run the agent on its host, again where that is lost.

        Raises:
            RemoteAgentError: If the agent raised something.
            WorkerLostError: If its hosts were lost as often as it may be started.
            WorkerRefusedError: If its host does not run it, as where the inner engine cannot be imported there.
            VersionMismatchError: If its host runs another version of the library.
            EngineUnavailableError: If there is no connection to the cluster, or the host does not answer in time.
            LookupError: Outside an engine call of an executor.
        """
        run = current_run()
        work = fingerprint(assignment, run.upstream, self._version)[:16]
        id_ = f"{self._execution}/{run.group_id}/{assignment.task_id}/{work}"
        agent = _Agent(Order.of(run, id_, self._inner), run, Account(run))
        losses = 0
        while True:
            try:
                ending = await self._run_on_a_host(agent)
            except _HostLostError as error:
                losses += 1
                if losses == self._starts:
                    raise WorkerLostError(f"its worker was lost {losses} times, the last time with {error}") from error
            else:
                if ending.kind is EndingKind.CANCELLED:
                    await raise_a_cancellation()
                if ending.kind is not EndingKind.INTERRUPTED:
                    return ending.value()
            with run.not_charged():
                await anyio.sleep(PAUSE_SECONDS)

    async def _run_on_a_host(self, agent: "_Agent") -> Ending:
        """Send an agent to its host, and return how it ended."""
        agent.account.wait(is_waiting=True)
        try:
            link = await self._link(zlib.crc32(agent.order.id.encode()) % self._hosts)
            link.submit(agent)
            try:
                return await agent.ended()
            except anyio.get_cancelled_exc_class() as cancellation:  # noqa: ASYNC103 - what it returned is its result
                link.cancel(agent)
                ending = await self._ended_after_all(agent)  # noqa: ASYNC102 - it is shielded and bounded itself
                if ending is None:
                    cancellation.add_note(unconfirmed(self._cancel_seconds))
                if ending is None or ending.kind not in (EndingKind.RETURNED, EndingKind.RAISED):
                    raise
                return ending  # noqa: ASYNC104 - the same
            finally:
                link.leave(agent)
        finally:
            agent.account.wait(is_waiting=False)

    async def _ended_after_all(self, agent: "_Agent") -> Ending | None:
        """Wait for the end of a cancelled agent, in time."""
        with anyio.move_on_after(self._cancel_seconds, shield=True):
            try:
                return await agent.ended()
            except _HostLostError:  # its process is gone, and so is the agent
                return Ending(kind=EndingKind.CANCELLED)
        return None

    async def _link(self, number: int) -> "_Link":
        """Return the link to a host, after connecting to it if need be."""
        try:
            links = self._links_of_this_loop.get()
        except LookupError:
            links = _Links()
            self._links_of_this_loop.set(links)
        link = links.known.get(number)
        if link is not None and not link.is_broken:
            return link
        failures = links.failures
        async with links.lock:
            link = links.known.get(number)
            if link is not None and not link.is_broken:
                return link
            if links.failures > failures:  # while this one waited; each trying for itself would take too long
                raise EngineUnavailableError(links.failure)
            try:
                actor = await self._host(number)
            except Exception as error:
                links.failures += 1
                links.failure = f"No host is to be had from Ray at {self._address!r}: {first_line(error)}"
                raise EngineUnavailableError(links.failure) from error
            link = links.known[number] = _Link(actor)
            return link

    async def _host(self, number: int) -> Any:
        """Return a host's actor, started if it is not there, as soon as it answers."""
        name = f"{self._name}-{number}"
        await anyio.to_thread.run_sync(connect, self._address)
        actor = None
        with anyio.move_on_after(self._reach_seconds):
            while True:
                if self._starts_hosts:
                    make = partial(host_actor, max_agents=self._max_agents, options=self._actor_options)
                    actor = await anyio.to_thread.run_sync(make, name, self._inner)
                else:
                    actor = await anyio.to_thread.run_sync(_actor_if_there, name)
                if actor is not None and await _answers(actor):
                    return actor
                await anyio.sleep(PAUSE_SECONDS)
        if actor is None:
            raise TimeoutError(f"there is no host {name!r}: parallel-agents worker --ray --engine {self._inner}")
        raise TimeoutError(
            f"host {name!r} did not answer within {self._reach_seconds:g} s: is there room for it? See: ray status"
        )


def connect(address: str) -> None:
    """Connect this process to a cluster, unless it is connected. Waits for the cluster."""
    with _connecting:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, configure_logging=False)


async def _answers(actor: Any) -> bool:
    """Wait for an actor's first answer; whether it is one."""
    is_answered, to_loop = anyio.Event(), _to_this_loop()
    answer = actor.state.remote().future()
    answer.add_done_callback(lambda _: to_loop(is_answered.set))
    await is_answered.wait()
    return answer.exception() is None


def host_actor(name: str, inner: str, *, max_agents: int | None, options: Mapping[str, Any]) -> Any:
    """Return the actor of a host, started if it is not there. Waits for the cluster."""
    return (
        ray.remote(Host)
        .options(
            **{
                "name": name,
                "namespace": NAMESPACE,
                "lifetime": "detached",
                "get_if_exists": True,
                "max_restarts": -1,
                "max_task_retries": 0,  # an agent that kills its host would be started again for ever
                "max_concurrency": 1000,
                "num_cpus": 1,
                "scheduling_strategy": "SPREAD",
                **options,
            }
        )
        .remote(inner, max_agents)
    )


def answers(actors: Sequence[Any], method: str, seconds: float) -> list[str]:
    """Call a method of hosts and return what they answer. Waits for it, so many seconds at most."""
    found: list[str] = ray.get([getattr(actor, method).remote() for actor in actors], timeout=seconds)
    return found


def end_host(actor: Any) -> None:
    """End a host for good, with all that runs there."""
    ray.kill(actor, no_restart=True)


def _actor_if_there(name: str) -> Any:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def first_line(error: Exception) -> str:
    """Return the first line of an error; Ray's have many."""
    return error_text(error).strip().splitlines()[0]


class _HostLostError(Exception):
    """The host of an agent was lost, and the agent with it."""


@define(eq=False)
class _Agent:
    """An agent on a host, as its engine call sees it.

    Attributes:
        order: What was sent.
        run: Its run here.
        account: Where reports go.
        told: What the host was told of its group: whether it is shutting down, and whether its budget is spent.
    """

    order: Order
    run: RunContext
    account: Account
    told: tuple[bool, bool] = (False, False)
    _reports: deque[Report] = Factory(deque)
    _news: anyio.Event = Factory(anyio.Event)
    _failure: Exception | None = None

    def begin(self) -> None:
        """Forget what was before: it goes to a host."""
        self.told, self._failure = (False, False), None
        self._reports.clear()
        self._news = anyio.Event()

    def take(self, report: Report) -> None:
        """Take a report."""
        self._reports.append(report)
        self._news.set()

    def fail(self, failure: Exception) -> None:
        """Let the engine call raise *failure*."""
        self._failure = failure
        self._news.set()

    async def ended(self) -> Ending:
        """Wait for the agent's end; what is reported until then goes into its run."""
        while True:
            await self._news.wait()
            self._news = anyio.Event()
            while self._reports:
                report = self._reports.popleft()
                self.account.take(report)
                if report.ending is not None:
                    return report.ending
            if self._failure is not None:
                raise self._failure


@define(eq=False)
class _Links:
    """An engine's links in one event loop.

    Attributes:
        known: By the number of the host.
        lock: Held by who makes one.
        failures: How often that failed.
        failure: Why it failed the last time.
    """

    known: "dict[int, _Link]" = Factory(dict)
    lock: anyio.Lock = Factory(anyio.Lock)
    failures: int = 0
    failure: str = ""


class _Link:
    """What goes to and fro between this event loop and one host. Its methods are called in the loop, and never wait.

    Args:
        actor: The host's.

    Attributes:
        is_broken: Whether the host is gone for good; another may have its name.
    """

    def __init__(self, actor: Any) -> None:
        self.is_broken = False
        self._actor = actor
        self._name = secrets.token_hex(8)
        self._to_loop = _to_this_loop()
        self._agents: dict[str, list[_Agent]] = {}
        self._orders: dict[_Agent, None] = {}
        self._cancels: list[str] = []
        self._calls = 0
        self._link = ""
        self._heard = self._told = 0
        self._told_at = 0.0

    def submit(self, agent: _Agent) -> None:
        """Send an agent's order to the host, and bring its reports from then on."""
        agent.begin()
        self._agents.setdefault(agent.order.id, []).append(agent)
        self._orders[agent] = None
        self._call()

    def cancel(self, agent: _Agent) -> None:
        """Have an agent cancelled; its report tells when it has ended."""
        if agent in self._orders:
            del self._orders[agent]
            agent.take(Report(id=agent.order.id, start="", ending=Ending(kind=EndingKind.CANCELLED)))
        else:
            self._cancels.append(agent.order.id)
            self._call()

    def leave(self, agent: _Agent) -> None:
        """Bring no more reports of an agent."""
        self._orders.pop(agent, None)
        ours = self._agents.get(agent.order.id, [])
        if agent in ours:
            ours.remove(agent)
        if not ours:
            self._agents.pop(agent.order.id, None)

    def _call(self) -> None:
        """Call the host, if there is something to say to it or to hear from it.

        Two calls are under way at most: one that waits there for news, and the next, whose arrival relieves it. What
        there is to say meanwhile gathers.
        """
        has_to_say = bool(self._orders or self._cancels)
        is_enough = self._calls >= (2 if has_to_say else 1)
        if self.is_broken or is_enough or not (has_to_say or self._agents or self._heard > self._told):
            return
        text = pack(self._parcel())
        self._calls += 1
        try:
            answer: Future[str] = self._actor.exchange.remote(self._name, text).future()
        except Exception as error:  # noqa: BLE001 - whatever Ray raises where this process is not connected any more
            self._break(_HostLostError(first_line(error)))
        else:
            answer.add_done_callback(lambda done: self._to_loop(partial(self._on_answer, done)))

    def _parcel(self) -> Parcel:
        """Return what there is to say, which is said then."""
        stopping, budget_spent = self._news_of_groups()
        orders = list(islice(self._orders, AT_ONCE))
        for agent in orders:
            del self._orders[agent]
        cancels, self._cancels = self._cancels, []
        self._told = self._heard
        return Parcel(
            orders=[agent.order for agent in orders],
            cancels=cancels,
            stopping=stopping,
            budget_spent=budget_spent,
            heard=self._heard,
        )

    def _news_of_groups(self) -> tuple[list[str], list[str]]:
        """Return the ids of agents whose host does not know yet that they are to finish, and those without a budget."""
        stopping: list[str] = []
        budget_spent: list[str] = []
        now = time.monotonic()
        if now - self._told_at < NEWS_SECONDS:
            return stopping, budget_spent
        self._told_at = now
        for id_, agents in self._agents.items():
            for agent in agents:
                state = agent.run.shutdown_requested, agent.run.budget_exhausted
                if agent not in self._orders and state != agent.told:
                    agent.told = state
                    stopping += [id_] * state[0]
                    budget_spent += [id_] * state[1]
        return stopping, budget_spent

    def _on_answer(self, answer: "Future[str]") -> None:
        self._calls -= 1
        news = self._read(answer)
        if news is None:
            return
        if news.link != self._link:
            self._start_over(news.link)
        for report in news.reports:
            for agent in self._agents.get(report.id, ()):
                agent.take(report)
            if report.ending is not None:
                self._agents.pop(report.id, None)
        self._heard = max(self._heard, news.number)
        self._call_soon(0 if self._agents or self._orders else TURNS)

    def _call_soon(self, turns: int) -> None:
        """Call the host some turns of the event loop later: an agent that follows can go with what was heard."""
        if turns:
            self._to_loop(partial(self._call_soon, turns - 1))
        else:
            self._call()

    def _start_over(self, link: str) -> None:
        """Send all agents again that the host should know, unless this is its first answer: it has forgotten them."""
        if self._link:
            self._orders |= dict.fromkeys(agent for agents in self._agents.values() for agent in agents)
            self._heard = self._told = 0
        self._link = link

    def _read(self, answer: "Future[str]") -> News | None:
        """Return what the host said; None if it said nothing that can be read, which its agents are told."""
        try:
            news = unpack(News, answer.result(), "worker")
        except (VersionMismatchError, InvalidDataError) as error:
            self._break(error)
            return None
        except Exception as error:  # noqa: BLE001 - whatever Ray raises for an actor that is gone
            self._break(_HostLostError(first_line(error)))
            return None
        if news.refusal:
            self._break(WorkerRefusedError(news.refusal))
            return None
        return news

    def _break(self, failure: Exception) -> None:
        """Give up the link; its agents are told why."""
        self.is_broken = True
        for agents in self._agents.values():
            for agent in agents:
                agent.fail(failure)


def _to_this_loop() -> Callable[[Callable[[], object]], None]:
    """Return what has a function called in the running event loop from any thread, without waiting for it."""
    token: Any = anyio.lowlevel.current_token().native_token
    send = getattr(token, "call_soon_threadsafe", None) or token.run_sync_soon

    def to_loop(function: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the loop has ended, and nobody waits in it any more
            send(function)

    return to_loop
