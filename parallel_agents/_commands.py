"""The commands: parse, call one public function, print, return an exit code.

Knows the whole library. What is printed is made in ``_display``.
"""

import contextlib
import json
import re
import secrets
import signal
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, TypeAlias

import anyio
import attrs
from attrs import frozen
from cyclopts import App, CycloptsError, Parameter
from loguru import logger
from rich.console import Console
from rich.text import Text

from . import OutcomeStatus, ParallelExecutionResult, ParallelExecutor, ShutdownManager, serialization
from ._databases import Databases, is_address
from ._display import Display, JsonDisplay, LineDisplay, id_text, make_console, make_table, print_summary
from ._errors import InvalidPlanError, ParallelAgentsError, ParallelExecutionError
from ._graph import dot, mermaid, tree_lines
from ._history import print_execution, print_history
from ._holding import refuse_overlaps
from ._live import LiveDisplay
from ._models import Budget, ClaimPolicy
from ._report_file import STDOUT, ReportFile
from ._timeline.page import page
from ._timeline.svg import svg
from ._timeline.trace import trace_json
from ._words import ID_CHARACTERS, harmless, opening_text
from .engines._remote_worker import engine_named
from .engines.journal import JournaledEngine
from .journals import JournalError
from .journals._reading import is_in_use, is_journal
from .journals.sqlite import RecordedExecution, SqliteJournal, read_journal
from .locks.file import FileResourceLock
from .plan import Plan, load_plan
from .serialization import EnvironmentFacts, InvalidDataError

if TYPE_CHECKING:
    from loguru import Message

    from .journals.postgres import PostgresJournal
    from .locks.postgres import PostgresResourceLock

SUCCEEDED, FAILED, WRONG = 0, 1, 2

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_ONE_WORD = re.compile(r"[\w./:#-]+")

_EXIT_CODES = """
Exit codes:

- 0: all agents succeeded
- 1: some did not, or the report could not be written
- 2: the plan or the call is wrong; nothing was run
- 130: interrupted with Ctrl-C (143: with SIGTERM); the report is complete all the same

The first Ctrl-C starts nothing more and lets running agents finish; a second one cancels them.
"""

app = App(
    name="parallel-agents",
    help="Run groups of agents in parallel, and get one outcome for each of them.",
    help_epilogue=_EXIT_CODES,
    help_format="markdown",
    version=lambda: version("parallel-agents"),
    result_action="return_value",
    print_error=False,
    exit_on_error=False,
    suppress_keyboard_interrupt=False,
)
app.register_install_completion_command()

Overrides: TypeAlias = Annotated[tuple[str, ...], Parameter(name="--set", negative="", show_default=False)]
Tasks: TypeAlias = Annotated[tuple[str, ...], Parameter(negative="", show_default=False)]
Flag: TypeAlias = Annotated[bool, Parameter(negative="", show_default=False)]


def dispatch(argv: Sequence[str]) -> int:
    """Run one command and return the exit code of the process."""
    if not argv:
        app.help_print([])
        return WRONG
    try:
        code = app(argv)
    except CycloptsError as error:
        _complain(f"{error} See parallel-agents --help")
        return WRONG
    except (InvalidPlanError, InvalidDataError) as error:
        _complain(str(error))
        return WRONG
    except _CannotGoOnError as error:
        _complain(str(error))
        return error.code
    return code if isinstance(code, int) else SUCCEEDED


class _CannotGoOnError(Exception):
    """A call that cannot be carried out any further: why, and the exit code."""

    def __init__(self, problem: str, code: int = WRONG) -> None:
        super().__init__(problem)
        self.code = code


def _complain(text: str) -> None:
    with contextlib.suppress(OSError):
        for line in text.splitlines():
            sys.stderr.write(f"parallel-agents: {harmless(line)}\n")


@app.command
def run(
    plan: Path,
    /,
    *,
    backend: Literal["asyncio", "trio"] = "asyncio",
    max_concurrency: int | None = None,
    fail_fast: bool | None = None,
    claim_policy: Literal["reject", "wait"] | None = None,
    claim_timeout: float | None = None,
    lock_dir: Path | None = None,
    locks: str | None = None,
    journal: str | None = None,
    fresh: Flag = False,
    deadline: float | None = None,
    stop_after: int | None = None,
    max_cost: float | None = None,
    max_tokens: int | None = None,
    settings: Overrides = (),
    report: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    only: Tasks = (),
    quiet: Flag = False,
    json_events: Flag = False,
    log_level: Literal["debug", "info", "warning", "error"] | None = None,
) -> int:
    """Run the agents of a plan.

    Progress goes to standard error, the table of outcomes to standard output.

    Args:
        plan: A plan file: TOML, JSON or YAML.
        backend: The event loop.
        max_concurrency: The most agents at the same time; stands above the plan.
        fail_fast: Whether the first failure stops the rest; stands above the plan.
        claim_policy: Whether agents whose claims overlap run one after another; stands above the plan.
        claim_timeout: Seconds that an agent waits for its claims, with the policy `wait`; stands above the plan.
        deadline: Seconds after which what runs times out and nothing more starts; stands above the plan.
        stop_after: After so many successes the rest is stopped, and all is well; stands above the plan.
        max_cost: When agents have spent so much, nothing more starts; stands above the plan's.
        max_tokens: When agents have used so many tokens, nothing more starts; stands above the plan's.
        lock_dir: Keep out of the claims of all runs on this machine that are given the same folder.
        locks: Keep out of the claims of all runs that are given the same database: `postgresql://user@host/name`.
        journal: Keep in this file or database what agents did; where a run of the plan was interrupted, go on with it.
        fresh: Run all agents again, whatever is in the journal.
        settings: Set a key of the plan, as in `--set defaults.timeout_seconds=5`; may be repeated.
        report: Write the report to this file, as JSON; `-` is standard output, and then nothing else goes there.
        only: Run this task only; may be repeated.
        quiet: Show neither progress nor the table.
        json_events: Write each event to standard error, as one line of JSON, instead of the progress.
        log_level: Write the library's log to standard error, from this level on.
    """
    chosen = _load(
        plan,
        settings,
        only,
        max_concurrency=max_concurrency,
        fail_fast=fail_fast,
        claim_policy=None if claim_policy is None else ClaimPolicy(claim_policy),
        claim_timeout_seconds=claim_timeout,
        deadline_seconds=deadline,
        stop_after_successes=stop_after,
        max_cost=max_cost,
        max_tokens=max_tokens,
    )
    if find_spec(backend) is None:
        raise _CannotGoOnError(f"{backend} is not installed: pip install 'parallel-agents[{backend}]'")
    report_file = _report_file(report)
    if log_level is not None:
        _log_to_stderr(log_level)
    display = _choose_display(quiet=quiet, json_events=json_events)
    databases = Databases()
    lock = _lock(lock_dir, locks, databases)
    record = _record(journal, chosen, display, databases, is_fresh=fresh, is_whole=not only)
    is_on_stdout = report_file is not None and report_file.is_stdout
    # What agents print in this process must not mix with the report.
    with contextlib.redirect_stdout(sys.stderr) if is_on_stdout else contextlib.nullcontext():
        ending = _run(chosen, display, backend, lock, record)
    if ending.problem is not None:
        _complain(ending.problem)
    if ending.result is None:
        return ending.code
    code = ending.code
    if report_file is not None:
        code = max(code, _write_report(report_file, chosen, ending.result, backend))
    if not quiet and not (is_on_stdout and json_events):
        with _printing(sys.stderr if is_on_stdout else sys.stdout) as console:
            print_summary(console, ending.result)
    return code


def _choose_display(*, quiet: bool, json_events: bool) -> Display:
    """Return the display for standard error as it is."""
    if json_events:
        return JsonDisplay(sys.stderr)
    if quiet:
        return Display()
    console = make_console(sys.stderr)
    return LiveDisplay(console) if console.is_terminal and console.is_interactive else LineDisplay(sys.stderr)


@app.command
def worker(
    *,
    engine: str,
    ray: Flag = False,
    name: str = "parallel-agents",
    hosts: int = 1,
    task_queue: str | None = None,
    namespace: str | None = None,
    heartbeat: float = 5.0,
    address: str | None = None,
    max_concurrency: int = 1000,
    grace: float = 30.0,
    health: str | None = None,
    log_level: Literal["debug", "info", "warning", "error"] | None = None,
) -> int:
    """Run agents for drivers elsewhere, with a `RayEngine` or a `TemporalEngine`, until SIGTERM or Ctrl-C.

    Then no more are taken, and those that run may finish; a second signal cancels them, and they run on another worker.

    Exit codes:

    - 0: stopped by a signal; all its agents had ended
    - 1: the cluster is not to be had, or agents had to be cancelled to stop
    - 2: the call is wrong; nothing was run

    Args:
        engine: What runs agents: an engine or an async function, as `module:attribute`, on asyncio.
        ray: Run them on a Ray cluster: this process looks after their hosts.
        name: On Ray: names the hosts, as in `RayEngine`.
        hosts: On Ray: how many hosts there are, as in `RayEngine`.
        task_queue: Run them for Temporal, from this queue, as in `TemporalEngine`: they run in this process.
        namespace: Of Temporal.
        heartbeat: On Temporal: seconds between two reports of an agent, at which it hears that it is cancelled.
        address: Of the cluster, as `host:port`; unless given, RAY_ADDRESS or the one of this machine. On Temporal, what
            its own configuration says, such as TEMPORAL_ADDRESS, or `localhost:7233`; TLS and keys stand there as well.
        max_concurrency: The most agents of each host, or of this process, at the same time.
        grace: Seconds that agents may go on after a signal.
        health: Answer HTTP requests at this `host:port`: 200, or 503 when it is stopping; `/metrics` for Prometheus.
        log_level: Write the library's log to standard error, from this level on.
    """
    if ray == (task_queue is not None):
        raise _CannotGoOnError("a worker needs to know of which cluster: --ray or --task-queue NAME")
    if log_level is not None:
        _log_to_stderr(log_level)
    common: dict[str, Any] = {"grace_seconds": grace}
    try:
        common["health"] = None if health is None else _host_and_port(health)
        if task_queue is None:
            serve = _ray_worker(engine, name=name, hosts=hosts, max_agents=max_concurrency, address=address, **common)
        else:
            common |= {"max_agents": max_concurrency, "heartbeat_seconds": heartbeat}
            serve = _temporal_worker(engine, task_queue=task_queue, address=address, namespace=namespace, **common)
    except (ValueError, TypeError) as error:
        raise _CannotGoOnError(str(error)) from error
    try:
        return anyio.run(serve)
    except ParallelAgentsError as error:
        raise _CannotGoOnError(str(error), FAILED) from error


def _ray_worker(engine: str, *, address: str | None, **settings: Any) -> Callable[[], Awaitable[int]]:
    try:
        from ._ray_worker import RayWorkerSettings, serve  # noqa: PLC0415 - needs an extra
    except ModuleNotFoundError as error:
        raise _CannotGoOnError("Ray is missing: pip install 'parallel-agents[ray]'") from error
    return partial(serve, RayWorkerSettings(engine=engine, address=address or "auto", **settings))


def _temporal_worker(engine: str, **settings: Any) -> Callable[[], Awaitable[int]]:
    try:
        from ._temporal_worker import TemporalWorkerSettings, serve  # noqa: PLC0415 - needs an extra
    except ModuleNotFoundError as error:
        raise _CannotGoOnError("temporalio is missing: pip install 'parallel-agents[temporal]'") from error
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)
    return partial(serve, engine_named(engine), TemporalWorkerSettings(**settings))


def _host_and_port(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not (colon and port.isdecimal()):
        raise ValueError(f"--health needs host:port, got {address!r}")
    return host, int(port)


@app.command
def check(
    plan: Path,
    /,
    *,
    max_concurrency: int | None = None,
    claim_policy: Literal["reject", "wait"] | None = None,
    settings: Overrides = (),
    only: Tasks = (),
) -> int:
    """Tell all that is wrong with a plan, or what it would run. Nothing is run.

    Args:
        plan: A plan file: TOML, JSON or YAML.
        max_concurrency: The most agents at the same time; stands above the plan.
        claim_policy: Whether agents whose claims overlap run one after another; stands above the plan.
        settings: Set a key of the plan, as in `--set defaults.timeout_seconds=5`; may be repeated.
        only: Check this task only; may be repeated.
    """
    policy = None if claim_policy is None else ClaimPolicy(claim_policy)
    group = _load(plan, settings, only, max_concurrency=max_concurrency, claim_policy=policy).group
    table = make_table("agent", "task", "timeout", "claims")
    for assignment in group.assignments:
        timeout = "-" if assignment.timeout_seconds is None else f"{assignment.timeout_seconds:g} s"
        claims = ", ".join(f"{claim.resource} ({claim.mode})" for claim in assignment.resource_claims)
        table.add_row(
            id_text(assignment.agent_id),
            id_text(assignment.task_id),
            Text(timeout),
            Text(harmless(claims or "-", 200), no_wrap=True),
        )
    opening = opening_text(group.group_id, len(group.assignments), group.max_concurrency)
    with _printing(sys.stdout) as console:
        console.print(table)
        console.print()
        console.print(Text(f"{opening}. The plan can be run; nothing was run"), soft_wrap=True)
    return SUCCEEDED


@app.command
def graph(
    plan: Path,
    /,
    *,
    style: Annotated[Literal["tree", "mermaid", "dot"], Parameter(name=["--style", "-s"])] = "tree",
    settings: Overrides = (),
    only: Tasks = (),
) -> int:
    """Show which tasks of a plan wait for which. Nothing is run.

    Args:
        plan: A plan file: TOML, JSON or YAML.
        style: A tree to read; or `mermaid` or `dot` for programs that draw.
        settings: Set a key of the plan, as in `--set defaults.timeout_seconds=5`; may be repeated.
        only: Show this task and what it depends on; may be repeated.
    """
    assignments = load_plan(plan, overrides=dict(map(_split_setting, settings)))
    chosen = (assignments.only(only) if only else assignments).group.assignments
    with _printing(sys.stdout) as console:
        if style == "tree":
            for before, name, remark in tree_lines(chosen):
                console.print(Text(f"{before}{harmless(name, ID_CHARACTERS)} {remark}".rstrip()), soft_wrap=True)
        else:
            console.print(Text(mermaid(chosen) if style == "mermaid" else dot(chosen)), soft_wrap=True)
    return SUCCEEDED


@app.command
def history(journal: str, /) -> int:
    """List the runs that a journal has, the latest one last.

    Args:
        journal: A file or database that `run --journal` wrote to; it may be in use.
    """
    executions, in_use = _read_journal(journal)
    with _printing(sys.stdout) as console:
        print_history(console, executions, in_use=in_use)
    return SUCCEEDED


@app.command
def show(report: str, /, *, execution: str | None = None) -> int:
    """Show an earlier run as a table, with the exit code of its outcomes.

    Args:
        report: A file that `run --report` or `run --journal` wrote, or a database.
        execution: Which run of a journal, as `history` names it; the latest one unless given.
    """
    if is_address(report) or is_journal(Path(report)):
        return _show_execution(report, execution)
    if execution is not None:
        raise _CannotGoOnError("--execution goes with a journal, not with a report")
    result = serialization.read_report(Path(report)).result
    with _printing(sys.stdout) as console:
        print_summary(console, result)
    return SUCCEEDED if result.all_succeeded else FAILED


@app.command
def timeline(report: Path, /, *, output: Annotated[str, Parameter(name=["--output", "-o"])]) -> int:
    """Draw an earlier run: who waited and ran when, what came of it, and what was spent.

    Args:
        report: A file that `run --report` wrote.
        output: Where to: a page (`run.html`), an image (`run.svg`), or a trace for Perfetto (`run.trace.json`).
    """
    draw = next((function for suffix, function in _DRAWN_AS.items() if output.endswith(suffix)), None)
    if draw is None:
        raise _CannotGoOnError(f"--output must end with {', '.join(_DRAWN_AS)}, got {output!r}")
    if is_journal(report):
        raise _CannotGoOnError(f"{str(report)!r} is a journal; a timeline is drawn of what run --report writes")
    result = serialization.read_report(report).result
    try:
        ReportFile(output).write(draw(result))
    except (OSError, ValueError) as error:
        raise _CannotGoOnError(f"the timeline cannot be written to {output!r}: {_reason(error)}", FAILED) from error
    return SUCCEEDED


_DRAWN_AS: Mapping[str, Callable[[ParallelExecutionResult[Any]], str]] = {
    ".html": page,
    ".svg": svg,
    ".trace.json": trace_json,
}


def _show_execution(journal: str, name: str | None) -> int:
    executions, _ = _read_journal(journal)
    chosen = [execution for execution in executions if name in (None, execution.name)]
    if not chosen:
        raise _CannotGoOnError(f"the journal has no run {name!r}" if name else "the journal has no runs")
    with _printing(sys.stdout) as console:
        print_execution(console, chosen[-1])
    return SUCCEEDED if all(a.status == "succeeded" for a in chosen[-1].last_attempts) else FAILED


def _read_journal(journal: str) -> tuple[tuple[RecordedExecution, ...], bool]:
    """Return what stands in a journal, and whether it is in use."""
    try:
        if not is_address(journal):
            return read_journal(journal), is_in_use(Path(journal))
        with Databases().journal(journal) as opened:
            return opened.read(), opened.is_in_use()
    except (ModuleNotFoundError, ValueError, ParallelAgentsError) as error:
        raise _CannotGoOnError(str(error)) from error


def _load(path: Path, settings: Iterable[str], only: Sequence[str], **wanted: Any) -> Plan:
    """Return the plan as the call wants it, checked as far as it can be without running it.

    Args:
        path: The plan file.
        settings: Keys and values that stand above the file.
        only: Tasks to choose, if any.
        wanted: Fields of the group, or of its budget, that stand above the plan; ``None`` leaves a field as it is.
    """
    overrides = dict(_split_setting(setting) for setting in settings)
    plan = load_plan(path, overrides=overrides)
    if only:
        plan = plan.only(only)
    changes = {name: value for name, value in wanted.items() if value is not None}
    try:
        if limits := {name: changes.pop(name) for name in attrs.fields_dict(Budget) if name in changes}:
            budget = plan.group.budget
            changes["budget"] = Budget(**limits) if budget is None else attrs.evolve(budget, **limits)
        plan = attrs.evolve(plan, group=attrs.evolve(plan.group, **changes))
        refuse_overlaps(plan.group, plan.group.assignments, ())
    except (ValueError, ParallelAgentsError) as error:
        raise _CannotGoOnError(str(error)) from error
    return plan


def _split_setting(setting: str) -> tuple[str, str]:
    key, separator, value = setting.partition("=")
    if not separator or not key:
        raise _CannotGoOnError(f"--set needs key=value, got {setting!r}")
    return key, value


def _lock(
    folder: Path | None, address: str | None, databases: Databases
) -> "FileResourceLock | PostgresResourceLock | None":
    if address is not None:
        if folder is not None:
            raise _CannotGoOnError("--locks and --lock-dir do not go together; nothing was run")
        try:
            return databases.lock(address)
        except (ModuleNotFoundError, ValueError, ParallelAgentsError) as error:
            raise _CannotGoOnError(f"--locks: {error}; nothing was run") from error
    if folder is None:
        return None
    lock = FileResourceLock(folder)
    try:
        lock.open()
    except (OSError, sqlite3.Error) as error:
        raise _CannotGoOnError(f"no locks can be kept in {str(folder)!r}: {_reason(error)}; nothing was run") from error
    return lock


@frozen
class _Record:
    """Where a run is recorded, and under which name.

    Attributes:
        journal: Open.
        execution: The name.
        is_whole: Whether all agents of the plan are run, so that the execution may be finished.
    """

    journal: "SqliteJournal | PostgresJournal"
    execution: str
    is_whole: bool

    def finish_if_done(self, result: ParallelExecutionResult[Any], *, is_well: bool) -> None:
        """Let the next run start afresh if each agent came to an end of its own, or the group to what it was for."""
        if self.is_whole and (is_well or all(outcome.status in _OWN_ENDS for outcome in result.outcomes)):
            self.journal.finish(self.execution)


_OWN_ENDS = (OutcomeStatus.SUCCEEDED, OutcomeStatus.PARKED, OutcomeStatus.FAILED, OutcomeStatus.TIMED_OUT)


def _record(
    where: str | None, plan: Plan, display: Display, databases: Databases, *, is_fresh: bool, is_whole: bool
) -> _Record | None:
    """Open the journal, and choose the run to go on with, or the name of a new one."""
    if where is None:
        if is_fresh:
            raise _CannotGoOnError("--fresh goes with --journal")
        return None
    group_id = plan.group.group_id
    journal: SqliteJournal | PostgresJournal
    try:
        if is_address(where):
            journal = databases.journal(where)
        else:
            journal = SqliteJournal(where)
            journal.open()
        earlier = None if is_fresh else journal.unfinished(group_id)
    except (ModuleNotFoundError, ValueError, JournalError) as error:
        raise _CannotGoOnError(f"{error}; nothing was run") from error
    if earlier is not None:
        display.say(f"Going on with {earlier}: what succeeded there does not run again (it would with --fresh)")
    return _Record(journal, earlier or f"{group_id}-{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}", is_whole)


def _report_file(path: str | None) -> ReportFile | None:
    if path is None:
        return None
    if path.startswith("-") and path != STDOUT:  # an option, where the path was forgotten
        raise _CannotGoOnError(f"--report needs a path or -, got {path!r}")
    try:
        return ReportFile(path)
    except (OSError, ValueError) as error:
        raise _CannotGoOnError(
            f"the report cannot be written to {path!r}: {_reason(error)}; nothing was run"
        ) from error


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _write_report(file: ReportFile, plan: Plan, result: ParallelExecutionResult[Any], backend: str) -> int:
    environment = attrs.evolve(EnvironmentFacts.current(), backend=backend)
    content = serialization.report(result, plan=plan.facts, environment=environment)
    try:
        file.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
    except BrokenPipeError:  # whoever reads standard output has seen enough
        return SUCCEEDED
    except OSError as error:
        _complain(f"the report could not be written: {_reason(error)}")
        return FAILED
    return SUCCEEDED


@contextlib.contextmanager
def _printing(file: TextIO) -> Iterator[Console]:
    """Give a console on *file*; a reader that went away is no error, a full disk is."""
    try:
        yield make_console(file)
    except OSError as error:
        raise _CannotGoOnError(f"the table could not be printed: {_reason(error)}", FAILED) from error


def _log_to_stderr(level: str) -> None:
    logger.remove()
    logger.add(
        _log,
        level=level.upper(),
        format="{message}",
        colorize=False,
        backtrace=False,
        diagnose=False,
    )
    logger.enable("parallel_agents")


def _log(message: "Message") -> None:
    """Write a record as one line; text in it is never a format, a markup or a terminal sequence."""
    record = message.record
    said = [f"{record['time']:%H:%M:%S.%f}"[:-3], f"{record['level'].name:<7}", harmless(record["message"])]
    said += [f"{key}={_log_value(value)}" for key, value in record["extra"].items()]
    if record["exception"] is not None:
        said.append(harmless(f"exception={record['exception'].value!r}"))
    sys.stderr.write(" ".join(said) + "\n")


def _log_value(value: object) -> str:
    """Return a value that ends where it seems to end: quoted if it holds more than one word."""
    text = str(value)
    return text if _ONE_WORD.fullmatch(text) else harmless(repr(text))


@frozen
class _Ending:
    """How a run ended: its result, unless nothing was run; what people must know; the exit code."""

    result: ParallelExecutionResult[Any] | None
    problem: str | None
    code: int


def _run(
    plan: Plan,
    display: Display,
    backend: str,
    lock: "FileResourceLock | PostgresResourceLock | None",
    record: _Record | None,
) -> _Ending:
    """Run a plan, and be deaf to signals afterwards: the exit code is decided."""
    try:
        return anyio.run(_run_until_signalled, plan, display, lock, record, backend=backend)
    finally:
        if lock is not None:
            lock.close()
        if record is not None:
            record.journal.close()
        for signum in _SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


class _Announcer:
    """Says what a signal does; attached to the shutdown manager as if it were a run."""

    def __init__(self, display: Display) -> None:
        self._display = display

    def begin_shutdown(self, grace_seconds: float) -> None:
        if grace_seconds:
            self._display.say(
                f"Interrupted: nothing more starts, running agents have {grace_seconds:g} s to finish. "
                "Interrupt again to cancel them now"
            )
        else:
            self._display.say("Interrupted again: cancelling what still runs")


async def _run_until_signalled(
    plan: Plan, display: Display, lock: "FileResourceLock | PostgresResourceLock | None", record: _Record | None
) -> _Ending:
    manager = ShutdownManager()
    engine = plan.engine
    if record is not None:
        engine = JournaledEngine(engine, record.journal, execution=record.execution, version=plan.engine_text)
    executor = ParallelExecutor(engine=engine, resource_lock=lock, shutdown_manager=manager, observers=(display,))
    async with manager.handle_signals():
        try:
            announcer = _Announcer(display)
            manager.attach(announcer)
            with display:
                ending = await _run_watched(executor, plan, display)
            manager.detach(announcer)
            if manager.received_signal is not None:
                ending = attrs.evolve(ending, code=128 + manager.received_signal)
            elif record is not None and ending.result is not None:
                try:
                    record.finish_if_done(ending.result, is_well=ending.code == SUCCEEDED)
                except JournalError as error:
                    ending = attrs.evolve(ending, problem=str(error), code=FAILED)
        finally:
            # A signal between here, where the handlers go, and where signals are ignored has to wait.
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    return ending


async def _run_watched(executor: ParallelExecutor, plan: Plan, display: Display) -> _Ending:
    run = None
    try:
        async with executor.open_group(plan.group) as run:
            async for outcome in run:
                display.on_outcome(outcome)
    except ParallelExecutionError as error:
        return _Ending(error.result, error.message, FAILED)
    except (ParallelAgentsError, ValueError) as error:
        if run is not None:
            raise
        return _Ending(None, str(error), WRONG)
    except (KeyboardInterrupt, SystemExit) as error:  # an agent's own: signals do not raise here
        if run is None:
            raise
        problem = f"an agent stopped the program with {type(error).__name__}"
        code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else FAILED
        return _Ending(run.result, problem, code)
    enough = plan.group.stop_after_successes
    is_well = run.result.all_succeeded or (enough is not None and run.result.agents_succeeded >= enough)
    return _Ending(run.result, None, SUCCEEDED if is_well else FAILED)
