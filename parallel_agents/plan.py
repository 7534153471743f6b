"""Plan files: a group and an engine, written in TOML, JSON or YAML.

All problems of a plan are told at once, each with its place, and nothing is run. What a plan may hold:

- Relative paths (a process's ``cwd``, a claim's ``path``, ``for_each``) are relative to the plan's folder, which is
  also where processes run unless the plan says otherwise.
- ``defaults`` holds any field of an assignment. Tables are merged key by key, and the assignment has the last word.
- An assignment with ``for_each`` stands for one assignment per file that the pattern matches, in the order of their
  paths. ``{path}`` (from the plan's folder, with slashes), ``{stem}`` and ``{index}`` (from 1) are filled into all its
  texts, also those from ``defaults``; braces are then written ``{{`` and ``}}``. Names of fields are never filled.
- ``engine = "module:attribute"`` imports an engine or an async function. Importing runs the module's code, so load
  such plans only from people whose programs you would run. The plan's folder is put at the end of the import path
  while the module is imported: it never hides an installed module, and modules that the engine imports later, while it
  works, are not found there.

Knows the values, how they are read from JSON, and the engines that a plan can name; knows no executor.
"""

import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from functools import cache, partial
from itertools import islice
from operator import attrgetter
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, TypeVar

import attrs
from attrs import field, fields, fields_dict, frozen
from attrs.validators import optional
from cattrs.errors import BaseValidationError
from cattrs.preconf.json import JsonConverter

from ._checks import integer, is_a, not_blank, shown
from ._claims import ClaimMode, ResourceClaim
from ._errors import InvalidPlanError, ParallelAgentsError
from ._models import (
    AgentAssignment,
    AgentIdentity,
    Budget,
    ChatMessage,
    ClaimPolicy,
    CompletionConfig,
    ParallelExecutionGroup,
    Task,
    refuse_timeout_without_waiting,
)
from ._plan_text import read_table, refuse_unfit, toml_value
from ._tools import ToolRegistry
from .engines import AgentEngine, FunctionEngine
from .engines._protocol import ChecksAssignments
from .engines.process import ProcessEngine
from .engines.worktree import WorktreeEngine
from .events import error_text
from .serialization import MISSING, PlanFacts, below, line, make_converter, problems_of, unknown_key

ASSIGNMENTS_LIMIT = 10_000
"""The most assignments of a plan, counted after ``for_each``."""

PROBLEMS_LIMIT = 100
"""A plan with so many problems is not looked at any further."""

_V = TypeVar("_V")
_NO_OVERRIDES: Mapping[str, str] = MappingProxyType({})


@frozen(kw_only=True)
class Plan:
    """A plan that can be run.

    Attributes:
        path: The file, as it was given.
        group: What is to be run.
        engine: What runs it.
        engine_text: What the plan says about the engine and the workspace: other text is other work.
    """

    path: Path = field(validator=is_a(Path))
    group: ParallelExecutionGroup = field(validator=is_a(ParallelExecutionGroup))
    engine: AgentEngine = field(validator=is_a(AgentEngine))
    engine_text: str = field(validator=is_a(str))

    @property
    def facts(self) -> PlanFacts:
        """What a report says about the plan."""
        group = self.group
        return PlanFacts(path=str(self.path), max_concurrency=group.max_concurrency, fail_fast=group.fail_fast)

    def only(self, task_ids: Iterable[str]) -> "Plan":
        """Return the plan with these tasks and what they depend on only, in the plan's order.

        Raises:
            InvalidPlanError: If it has no such task, or none is left.
        """
        wanted = set(task_ids)
        known = [assignment.task_id for assignment in self.group.assignments]
        if problems := [_unknown_task(task_id, known) for task_id in sorted(wanted.difference(known))]:
            raise InvalidPlanError(problems)
        if not wanted:
            raise InvalidPlanError(["no task is chosen, so there is nothing to run"])
        depends_on = {assignment.task_id: assignment.task.depends_on for assignment in self.group.assignments}
        following = list(wanted)
        for task_id in following:
            new = [name for name in depends_on[task_id] if name not in wanted]
            wanted.update(new)
            following += new
        chosen = [assignment for assignment in self.group.assignments if assignment.task_id in wanted]
        return attrs.evolve(self, group=attrs.evolve(self.group, assignments=chosen))


def _unknown_task(task_id: str, known: list[str]) -> str:
    close = get_close_matches(task_id, known, n=1)
    return f"the plan has no task {shown(task_id)}" + (f", did you mean {close[0]!r}?" if close else "")


def load_plan(path: str | os.PathLike[str], *, overrides: Mapping[str, str] = _NO_OVERRIDES) -> Plan:
    """Read a plan, check all of it, and run nothing but the import of the engine that it names.

    Args:
        path: A file that ends with ``.toml``, ``.json``, ``.yaml`` or ``.yml``.
        overrides: Values by the dotted path of a key, such as ``{"defaults.timeout_seconds": "5"}``. They are read as
            TOML values, and as text if they are none; they stand above the file.

    Raises:
        InvalidPlanError: With every problem and its place.
    """
    path = Path(path)
    table = read_table(path)
    problems = [problem for key, text in overrides.items() for problem in _override(table, key, text)]
    refuse_unfit(table)
    reader = _PlanReader(path.absolute().parent, problems)
    options = reader.read(PlanTable, table, "")
    defaults = reader.defaults(table.get("defaults"))
    workspace = None if options is None else options.workspace
    engine = reader.engine(table["engine"], workspace) if "engine" in table else None
    assignments = reader.assignments(table.get("assignments"), defaults, engine)
    if options is not None and not options.allow_shared_agents:
        reader.refuse_shared_agents()
    if reader.problems or options is None or engine is None:
        raise InvalidPlanError(reader.problems)
    of_group = {name: getattr(options, name) for name in fields_dict(ParallelExecutionGroup) if name != "assignments"}
    try:
        group = ParallelExecutionGroup(assignments=assignments, **of_group)
    except ValueError as error:  # what only all assignments together show
        raise InvalidPlanError([line("", str(error))]) from error
    engine_text = json.dumps([table["engine"], table.get("workspace")], sort_keys=True, default=str)
    return Plan(path=path, group=group, engine=engine, engine_text=engine_text)


def _override(table: dict[str, Any], key: str, text: str) -> Iterator[str]:
    *parents, last = key.split(".")
    inner: Any = table
    for parent in parents:
        inner = inner.setdefault(parent, {})
        if not isinstance(inner, dict):
            yield line(below("", key), f"{shown(parent)} is no table of the plan, so no key of it can be set")
            return
    inner[last] = toml_value(text)


# The tables of a plan. Their fields follow the rules of the values' own fields.


def _as_in(model: type, name: str) -> Any:
    original = getattr(fields(model), name)
    return field(default=original.default, converter=original.converter, validator=original.validator)


def _is_table(_instance: object, _attribute: Any, value: object) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"must be a table, got {shown(value)}")


def _has_assignments(_instance: object, _attribute: Any, value: object) -> None:
    if not isinstance(value, list):
        raise TypeError(f"must be a list of tables, got {shown(value)}")
    if not value:
        raise ValueError("must hold at least one assignment")
    if len(value) > ASSIGNMENTS_LIMIT:
        raise ValueError(f"must hold at most {ASSIGNMENTS_LIMIT} assignments, got {len(value)}")


def _is_engine(_instance: object, _attribute: Any, value: object) -> None:
    if not isinstance(value, str | dict):
        raise TypeError(f"must be a table or 'module:attribute', got {shown(value)}")


def _is_worktree(_instance: object, _attribute: Any, value: str) -> None:
    if value != "worktree":
        raise ValueError(f"must be 'worktree', got {shown(value)}")


@frozen(kw_only=True)
class WorkspaceTable:
    """A folder of its own for each agent.

    Attributes:
        kind: ``worktree``: a git worktree on a branch of its own.
        repo: The repository, or the folder in it that agents work in; relative to the plan's folder.
        base: What worktrees start from: a branch, tag or commit.
        merge_into: A branch that gets the work of successful agents; it stays on their own branches unless given.
        branch_prefix: What the names of the branches start with.
        max_worktrees: The most worktrees at the same time; no limit unless given.
        max_bytes: The most bytes of all worktrees at the same time; no limit unless given.
    """

    kind: str = field(validator=_is_worktree)
    repo: str = field(default=".", validator=not_blank)
    base: str = field(default="HEAD", validator=not_blank)
    merge_into: str | None = field(default=None, validator=optional(not_blank))
    branch_prefix: str = field(default="agents/", validator=not_blank)
    max_worktrees: int | None = field(default=None, validator=optional(integer(at_least=1)))
    max_bytes: int | None = field(default=None, validator=optional(integer(at_least=1)))

    def around(self, engine: AgentEngine, folder: Path) -> WorktreeEngine:
        """Return an engine that gives each agent its worktree; a relative repository is below *folder*."""
        return WorktreeEngine(
            engine,
            folder / self.repo,
            base=self.base,
            merge_into=self.merge_into,
            branch_prefix=self.branch_prefix,
            max_worktrees=self.max_worktrees,
            max_bytes=self.max_bytes,
        )


@frozen(kw_only=True)
class PlanTable:
    """A whole plan.

    Attributes:
        group_id: Names the group in events, reports and locks.
        max_concurrency: The most agents at the same time; no limit unless given.
        fail_fast: Whether the first failure stops the rest.
        claim_policy: ``reject`` a plan whose claims overlap, or ``wait``: run those that overlap one after another.
        claim_timeout_seconds: With ``wait``: how long an agent waits for its claims; no limit unless given.
        allow_shared_agents: Whether an agent may have several tasks, which then run one after another.
        deadline_seconds: When, from the start on, what runs times out and nothing more starts; never unless given.
        stop_after_successes: After so many, what runs is cancelled and nothing more starts; never unless given.
        budget: ``max_cost`` and ``max_tokens``: when agents have spent one of them, nothing more starts.
        engine: What runs the agents: a table whose ``kind`` is ``process``, ``chat`` or ``module:attribute``, or just
            the latter.
        defaults: Fields that all assignments have unless they say otherwise.
        workspace: A folder of its own for each agent; all work in the plan's folder unless given.
        assignments: What is to be run, at least one.
    """

    group_id: str = _as_in(ParallelExecutionGroup, "group_id")
    max_concurrency: int | None = _as_in(ParallelExecutionGroup, "max_concurrency")
    fail_fast: bool = _as_in(ParallelExecutionGroup, "fail_fast")
    claim_policy: ClaimPolicy = _as_in(ParallelExecutionGroup, "claim_policy")  # noqa: RUF009 - makes a field
    claim_timeout_seconds: float | None = _as_in(ParallelExecutionGroup, "claim_timeout_seconds")
    allow_shared_agents: bool = _as_in(ParallelExecutionGroup, "allow_shared_agents")
    deadline_seconds: float | None = _as_in(ParallelExecutionGroup, "deadline_seconds")
    stop_after_successes: int | None = _as_in(ParallelExecutionGroup, "stop_after_successes")
    budget: Budget | None = _as_in(ParallelExecutionGroup, "budget")  # noqa: RUF009 - makes a field
    engine: Any = field(validator=_is_engine)
    workspace: WorkspaceTable | None = None
    defaults: dict[str, Any] = field(factory=dict, validator=_is_table)
    assignments: Any = field(validator=_has_assignments)

    def __attrs_post_init__(self) -> None:
        refuse_timeout_without_waiting(self.claim_policy, self.claim_timeout_seconds)


@frozen(kw_only=True)
class ClaimTable:
    """A resource that nobody else may touch while the agent works.

    Attributes:
        resource: An opaque name.
        path: A file or folder instead, relative to the plan's folder.
        mode: ``exclusive``, or ``shared`` with all that claim it as shared.
    """

    resource: str | None = field(default=None, validator=optional(not_blank))
    path: str | None = field(default=None, validator=optional(not_blank))
    mode: ClaimMode = ClaimMode.EXCLUSIVE

    def __attrs_post_init__(self) -> None:
        if (self.resource is None) == (self.path is None):
            raise ValueError("give either 'resource' or 'path'")

    def claim(self, folder: Path) -> ResourceClaim:
        """Return the claim, with its path below *folder* if it is relative."""
        if self.path is None:
            return ResourceClaim(resource=self.resource or "", mode=self.mode)
        return ResourceClaim.path(folder / self.path, mode=self.mode)


@frozen(kw_only=True)
class AssignmentTable:
    """One task for one agent, or with ``for_each`` one for each file.

    Attributes:
        agent: Who works: an id, or a table of the agent's fields.
        task: On what.
        claims: What nobody else may touch meanwhile: names, or tables with a ``resource`` or a ``path``.
        completion_config: How a model should answer.
        max_turns: The most turns an agent may take.
        timeout_seconds: Counted from the agent's start; no limit unless given.
        memory_messages: What was said before.
        for_each: A pattern such as ``src/**/*.py``: one assignment per file below the plan's folder that matches.
    """

    agent: AgentIdentity
    task: Task
    claims: tuple[ClaimTable, ...] = ()
    completion_config: CompletionConfig | None = _as_in(  # noqa: RUF009 - makes a field
        AgentAssignment, "completion_config"
    )
    max_turns: int = _as_in(AgentAssignment, "max_turns")
    timeout_seconds: float | None = _as_in(AgentAssignment, "timeout_seconds")
    memory_messages: tuple[ChatMessage, ...] = _as_in(AgentAssignment, "memory_messages")
    for_each: str | None = field(default=None, validator=optional(not_blank))

    def assignment(self, folder: Path) -> AgentAssignment:
        """Return the assignment; relative paths are below *folder*."""
        return AgentAssignment(
            identity=self.agent,
            task=self.task,
            resource_claims=[claim.claim(folder) for claim in self.claims],
            completion_config=self.completion_config,
            max_turns=self.max_turns,
            timeout_seconds=self.timeout_seconds,
            memory_messages=self.memory_messages,
        )


@cache
def _converter() -> JsonConverter:
    converter = make_converter()
    _accept_text(converter, AgentIdentity, "id")
    _accept_text(converter, ClaimTable, "resource")
    return converter


def _accept_text(converter: JsonConverter, model: type, name: str) -> None:
    """Let a plain text stand for a table with one field."""
    read = converter.get_structure_hook(model)

    def read_either(value: object, kind: Any) -> Any:
        if not isinstance(value, str | dict):
            raise TypeError(f"must be text or a table, got {shown(value)}")
        return read({name: value} if isinstance(value, str) else value, kind)

    converter.register_structure_hook(model, read_either)


class _PlanReader:
    """Reads the parts of one plan and collects their problems."""

    def __init__(self, folder: Path, problems: list[str]) -> None:
        self.folder = folder
        self.problems = problems
        self._agents: list[tuple[str, str]] = []

    def tell(self, place: str, problem: str) -> None:
        text = line(place, problem)
        if text not in self.problems:  # the assignments of one for_each share most of their problems
            self.problems.append(text)

    def read(self, model: type[_V], table: object, place: str) -> _V | None:
        try:
            return _converter().structure(table, model)
        except BaseValidationError as error:
            for problem in problems_of(error, place):
                self.tell(*problem)
        return None

    def defaults(self, table: object) -> dict[str, Any]:
        """Return the defaults without those that are wrong, which would be told again for each assignment."""
        if not isinstance(table, dict):
            return {}
        sound = dict(table)
        if sound.pop("for_each", None) is not None:
            self.tell("defaults.for_each", "belongs into an assignment")
        try:
            _converter().structure(sound, AssignmentTable)
        except BaseValidationError as error:
            for place, problem in problems_of(error):
                if problem != MISSING:  # whether it is missing is seen with each assignment
                    self.tell(below("defaults", place), problem)
                    sound.pop(re.split(r"[.\[]", place)[0], None)
        return sound

    def assignments(self, entries: object, defaults: dict[str, Any], engine: object) -> list[AgentAssignment]:
        found: list[tuple[str, AgentAssignment]] = []
        if not isinstance(entries, list) or len(entries) > ASSIGNMENTS_LIMIT:
            return []
        for position, entry in enumerate(entries):
            place = f"assignments[{position}]"
            if len(self.problems) >= PROBLEMS_LIMIT:
                self.tell(place, f"not looked at any more, after {PROBLEMS_LIMIT} problems")
                break
            for assignment in self._entry(entry, defaults, place):
                found.append((place, assignment))
                self._check(engine, assignment, place)
            if len(found) > ASSIGNMENTS_LIMIT:
                self.tell(place, f"makes more than {ASSIGNMENTS_LIMIT} assignments of the plan")
                break
        self._refuse_repeated("task.id", [(place, assignment.task_id) for place, assignment in found])
        known = {assignment.task_id for _, assignment in found}
        any_wrong = bool(self.problems)  # then a task that is missing here may be one that could not be read
        for place, assignment in found:
            for name in assignment.task.depends_on:
                if name not in known and not any_wrong:
                    self.tell(f"{place}.task.depends_on", _unknown_task(name, sorted(known)))
        self._agents = [(place, assignment.agent_id) for place, assignment in found]
        return [assignment for _, assignment in found]

    def _entry(self, entry: object, defaults: dict[str, Any], place: str) -> Iterator[AgentAssignment]:
        if not isinstance(entry, dict):
            self.tell(place, f"must be a table, got {shown(entry)}")
            return
        table = _merged(defaults, entry)
        pattern = table.get("for_each")
        if not isinstance(pattern, str):
            yield from self._assignment(table, place)
            return
        del table["for_each"]
        known_problems = len(self.problems)
        for index, path in enumerate(self._files(pattern, below(place, "for_each")), start=1):
            values = {"path": str(path), "stem": path.stem, "index": str(index)}
            yield from self._assignment(self._filled(table, values, place), place)
            if len(self.problems) > known_problems:
                return  # what is wrong with the first file's assignment is wrong with all of them

    def _assignment(self, table: Any, place: str) -> Iterator[AgentAssignment]:
        read = self.read(AssignmentTable, table, place)
        if read is None:
            return
        try:
            yield read.assignment(self.folder)
        except (ValueError, TypeError, OSError) as error:
            self.tell(below(place, "claims"), str(error))

    def _files(self, pattern: str, place: str) -> list[PurePosixPath]:
        """Return the files that match, from the plan's folder, sorted; one that lies outside is a problem."""
        if pattern.startswith("/") or ".." in re.split(r"[/\\]", pattern):
            self.tell(place, f"must stay inside the plan's folder, got {shown(pattern)}")
            return []
        if "\0" in pattern:  # what a glob makes of it differs between versions of Python
            self.tell(place, f"is no pattern: {shown(pattern)} has a NUL character in it")
            return []
        try:
            matches = (path for path in self.folder.glob(pattern) if path.is_file())
            files = sorted(islice(matches, ASSIGNMENTS_LIMIT + 1), key=Path.as_posix)
        except (ValueError, NotImplementedError, OSError) as error:
            self.tell(place, f"is no pattern: {error}")
            return []
        home = self.folder.resolve()
        for path in files:
            if not path.resolve().is_relative_to(home):
                self.tell(place, f"{shown(str(path.relative_to(self.folder)))} leads out of the plan's folder")
                return []
        if not files:
            self.tell(place, f"no file matches {shown(pattern)}")
        return [PurePosixPath(path.relative_to(self.folder).as_posix()) for path in files]

    def _filled(self, value: Any, values: Mapping[str, str], place: str) -> Any:
        if isinstance(value, dict):
            return {key: self._filled(item, values, below(place, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self._filled(item, values, below(place, index)) for index, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        try:
            return _PLACEHOLDER.sub(lambda found: _fill(found[0], values), value)
        except ValueError as error:
            self.tell(place, str(error))
            return value

    def _check(self, engine: object, assignment: AgentAssignment, place: str) -> None:
        if isinstance(engine, ChecksAssignments):
            try:
                engine.check(assignment)
            except ValueError as error:
                self.tell(place, str(error))

    def refuse_shared_agents(self) -> None:
        """Tell which agents have several tasks."""
        self._refuse_repeated("agent.id", self._agents)

    def _refuse_repeated(self, name: str, ids: list[tuple[str, str]]) -> None:
        first: dict[str, str] = {}
        for place, id_ in ids:
            if id_ not in first:
                first[id_] = place
            elif len(self.problems) < PROBLEMS_LIMIT:
                other = "several files; write {index} into it" if first[id_] == place else f"{first[id_]} already"
                self.tell(f"{place}.{name}", f"{shown(id_)} is the id of {other}")

    def engine(self, engine: object, workspace: WorkspaceTable | None) -> AgentEngine | None:
        """Return the engine of a plan, with a workspace for each agent around it if the plan wants one."""
        inner = self._engine(engine, has_workspace=workspace is not None)
        return inner if inner is None or workspace is None else workspace.around(inner, self.folder)

    def _engine(self, engine: object, *, has_workspace: bool) -> AgentEngine | None:
        if isinstance(engine, str):
            return self._imported(engine, "engine")
        if not isinstance(engine, dict):
            return None  # told with the plan's own fields
        options = dict(engine)
        kind = options.pop("kind", None)
        if kind == "process":
            return self._process(options, has_workspace=has_workspace)
        if kind == "chat":
            return self._chat(options)
        for key in options:
            self.tell(below("engine", key), f"unknown key {shown(key)} for an engine that is imported")
        if kind is None:
            self.tell("engine.kind", MISSING)
            return None
        return self._imported(kind, "engine.kind")

    def _process(self, options: dict[str, Any], *, has_workspace: bool) -> AgentEngine | None:
        known = inspect.signature(ProcessEngine).parameters
        problems_before = len(self.problems)
        for key in [key for key in options if key not in known]:
            self.tell(below("engine", key), unknown_key(key, [*known, "kind"]))
        if "command" not in options:
            self.tell("engine.command", MISSING)
        cwd = options.setdefault("cwd", ".")
        if isinstance(cwd, str) and not has_workspace:
            options["cwd"] = str(self.folder / cwd)
        for key in [key for key in options if key in known]:  # one at a time, so that all problems are told
            self._made(partial(ProcessEngine, **{"command": ["true"], key: options[key]}), known)
        if len(self.problems) > problems_before:
            return None
        return self._made(partial(ProcessEngine, **options), known)

    def _chat(self, options: dict[str, Any]) -> AgentEngine | None:
        try:
            from ._plan_chat import ChatTable  # noqa: PLC0415 - needs an extra
            from .engines.chat import Price  # noqa: PLC0415 - as above
        except ModuleNotFoundError as error:
            self.tell("engine.kind", str(error))
            return None
        problems_before = len(self.problems)
        table = self.read(ChatTable, options, "engine")
        names, tables = options.get("tools"), options.get("prices")
        found = [
            self._found(name, f"engine.tools[{position}]")
            for position, name in enumerate(names if isinstance(names, list) else ())
        ]
        prices: dict[str, Price] = {}
        for name, price in tables.items() if isinstance(tables, dict) else ():
            if (read := self.read(Price, price, f"engine.prices[{name}]")) is not None:
                prices[name] = read
        if table is None or len(self.problems) > problems_before:
            return None
        tools = [tool for item in found for tool in (item if isinstance(item, ToolRegistry) else [item])]
        known = [attribute.name for attribute in fields(ChatTable)]
        return self._made(lambda: table.engine(self.folder, tools, prices), known)

    def _made(self, make: Callable[[], AgentEngine], names: Iterable[str]) -> AgentEngine | None:
        try:
            return make()
        except (ValueError, TypeError, OSError, ParallelAgentsError) as error:
            found = re.match(rf"({'|'.join(names)})((?:\[[^\]]*\])*)(?:: | (?=must ))", str(error))
            place = f"engine.{found[1]}{found[2]}" if found else "engine"
            self.tell(place, str(error)[found.end() if found else 0 :])
            return None

    def _found(self, name: object, place: str, or_else: str = "") -> Any:
        """Import what a ``module:attribute`` names; None if that is not to be had, which is told."""
        if not isinstance(name, str) or not _IMPORTABLE.fullmatch(name):
            self.tell(place, f"must be 'module:attribute'{or_else}, got {shown(name)}")
            return None
        module, _, attribute = name.partition(":")
        try:
            with _importable_from(self.folder):
                return attrgetter(attribute)(importlib.import_module(module))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a module may raise anything, also by calling exit()
            self.tell(place, f"{name} cannot be imported: {' '.join(error_text(error).split())}")
            return None

    def _imported(self, name: object, place: str) -> AgentEngine | None:
        or_else = " or a table of kind 'process' or 'chat'" if place == "engine" else ", 'process' or 'chat'"
        problems_before = len(self.problems)
        found = self._found(name, place, or_else)
        if len(self.problems) > problems_before:
            return None
        if isinstance(found, AgentEngine) and not isinstance(found, type):
            return found
        if inspect.iscoroutinefunction(found):
            return FunctionEngine(found)
        self.tell(place, f"{name} must be an engine or an async function, got {shown(found)}")
        return None


_IMPORTABLE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]")


def _fill(placeholder: str, values: Mapping[str, str]) -> str:
    if placeholder in ("{{", "}}"):
        return placeholder[0]
    if (name := placeholder[1:-1]) not in values:
        known = ", ".join(f"{{{key}}}" for key in values)
        raise ValueError(f"unknown placeholder {shown(placeholder)}; there are {known}; {{{{ and }}}} are braces")
    return values[name]


def _merged(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Merge tables key by key; an agent given by its id only is a table with that id."""
    merged = dict(defaults)
    for key, value in own.items():
        default, given = (_agent_table(item) if key == "agent" else item for item in (defaults.get(key), value))
        if isinstance(default, dict) and isinstance(given, dict):
            merged[key] = _merged(default, given)
        else:
            merged[key] = value
    return merged


def _agent_table(agent: Any) -> Any:
    return {"id": agent} if isinstance(agent, str) else agent


@contextmanager
def _importable_from(folder: Path) -> Iterator[None]:
    entry = str(folder)
    if entry in sys.path:
        yield
        return
    sys.path.append(entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with suppress(ValueError):  # the module may have changed the path, too
            sys.path.remove(entry)
