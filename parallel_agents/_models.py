"""What to run: frozen values, valid from construction on, also after ``attrs.evolve``.

Knows nothing of how agents are run, where values come from, or of JSON.
"""

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum, auto
from graphlib import CycleError, TopologicalSorter
from typing import Any, Self

from attrs import Factory, field, fields_dict, frozen
from attrs.validators import optional

from ._checks import (
    JSON,
    FrozenDict,
    as_tuple,
    each_is_a,
    frozen_json,
    integer,
    is_a,
    is_flag,
    is_text,
    json_table,
    not_blank,
    number,
    one_of,
)
from ._claims import ResourceClaim

CHAT_ROLES = ("system", "user", "assistant", "tool")
"""Who may speak in a ChatMessage."""


@frozen(kw_only=True)
class Usage:
    """What an agent spent.

    Attributes:
        input_tokens: Tokens read by the model.
        output_tokens: Tokens written by the model.
        requests: Calls made to the model.
        cost: Money, in the user's currency.
    """

    input_tokens: int = field(default=0, validator=integer(at_least=0))
    output_tokens: int = field(default=0, validator=integer(at_least=0))
    requests: int = field(default=0, validator=integer(at_least=0))
    cost: float = field(default=0.0, validator=number(at_least=0))

    def __add__(self, other: object) -> "Usage":
        if not isinstance(other, Usage):
            return NotImplemented
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            requests=self.requests + other.requests,
            cost=self.cost + other.cost,
        )


NO_USAGE = Usage()
"""Nothing spent; values are frozen, so one is enough for everybody."""


def _as_arguments(value: object) -> Any:
    return frozen_json(value, "arguments")


@frozen(kw_only=True)
class ToolCall:
    """A model's wish that a tool be called.

    Attributes:
        id: Tells the calls of a turn apart; made by the model's server, and empty where it makes none.
        name: Of the tool; there may be no such tool.
        arguments: JSON, read-only: a table by the names of parameters, or whatever else the model wrote.
    """

    id: str = field(validator=is_text)
    name: str = field(validator=is_text)
    arguments: Any = field(factory=FrozenDict, converter=_as_arguments)


@frozen(kw_only=True)
class ChatMessage:
    """One message of a conversation.

    Attributes:
        role: ``system``, ``user``, ``assistant`` or ``tool``.
        content: What was said; may be empty.
        tool_calls: What an assistant wants to be called.
        tool_call_id: The call that a message of a tool answers.
    """

    role: str = field(validator=one_of(*CHAT_ROLES))
    content: str = field(default="", validator=is_text)
    tool_calls: tuple[ToolCall, ...] = field(default=(), converter=as_tuple, validator=each_is_a(ToolCall))
    tool_call_id: str | None = field(default=None, validator=optional(is_text))


def _as_response_format(value: object) -> FrozenDict | None:
    return None if value is None else json_table(value, "response_format")


def _as_extra(value: object) -> FrozenDict:
    return json_table(value, "extra")


@frozen(kw_only=True)
class CompletionConfig:
    """How a model should answer; ``None`` leaves the choice to the engine.

    Attributes:
        model: The model's name; stands above the identity's.
        temperature: At least 0.
        max_tokens: The longest answer, in tokens.
        stop: Texts that end the answer.
        seed: For answers that can be repeated, where the model offers it.
        response_format: A JSON table that the model's API understands.
        extra: Further parameters of the model's API, passed on as they are.
    """

    model: str | None = field(default=None, validator=optional(not_blank))
    temperature: float | None = field(default=None, validator=optional(number(at_least=0)))
    max_tokens: int | None = field(default=None, validator=optional(integer(at_least=1)))
    stop: tuple[str, ...] = field(default=(), converter=as_tuple, validator=each_is_a(str))
    seed: int | None = field(default=None, validator=optional(integer()))
    response_format: FrozenDict | None = field(default=None, converter=_as_response_format)
    extra: FrozenDict = field(factory=FrozenDict, converter=_as_extra)


@frozen(kw_only=True)
class AgentIdentity:
    """Who an agent is.

    Attributes:
        id: Anything whose ``str()`` is not blank; kept as a string. Unique within a group.
        name: For people; the id where none is given.
        role: For people and prompts, such as ``reviewer``.
        instructions: The system prompt.
        model: The model that the agent uses; ``None`` leaves the choice to the engine.
        base_url: The server that the agent asks; ``None`` leaves the choice to the engine.
    """

    id: str = field(converter=str, validator=not_blank)
    name: str = field(default=Factory(lambda self: self.id, takes_self=True), validator=not_blank)
    role: str = field(default="", validator=is_text)
    instructions: str = field(default="", validator=is_text)
    model: str | None = field(default=None, validator=optional(not_blank))
    base_url: str | None = field(default=None, validator=optional(not_blank))


def _are_distinct(_instance: object, attribute: Any, values: tuple[str, ...]) -> None:
    if values and (repeated := _repeated(values)):
        raise ValueError(f"{attribute.name} names tasks twice: {', '.join(repeated)}")


def _as_inputs(value: object) -> FrozenDict:
    return json_table(value, "inputs")


@frozen(kw_only=True)
class Task:
    """What is to be done.

    Attributes:
        id: Unique within a group.
        title: For people.
        description: What the agent is asked to do.
        inputs: JSON for the engine, read-only.
        depends_on: Ids of tasks of the same group that have to succeed before this one starts.
    """

    id: str = field(validator=not_blank)
    title: str = field(default="", validator=is_text)
    description: str = field(default="", validator=is_text)
    inputs: FrozenDict = field(factory=FrozenDict, converter=_as_inputs)
    depends_on: tuple[str, ...] = field(default=(), converter=as_tuple, validator=[each_is_a(str), _are_distinct])


def _as_claims(values: Iterable[ResourceClaim | str]) -> tuple[ResourceClaim, ...]:
    return tuple(ResourceClaim(resource=value) if isinstance(value, str) else value for value in as_tuple(values))


def _repeated(values: Iterable[str]) -> list[str]:
    return sorted(value for value, count in Counter(values).items() if count > 1)


def _claims_are_distinct(_instance: object, _attribute: Any, claims: tuple[ResourceClaim, ...]) -> None:
    if claims and (repeated := _repeated(claim.resource for claim in claims)):
        raise ValueError(f"Duplicate resource claims: {', '.join(repeated)}. Claim each resource once.")


@frozen(kw_only=True)
class AgentAssignment:
    """One task for one agent, with its limits.

    Attributes:
        identity: Who works.
        task: On what.
        completion_config: How the model should answer; ``None`` leaves it to the engine.
        max_turns: The most turns an agent may take; engines that work in turns honour it.
        timeout_seconds: Counted from the start of the engine call, not from the queue; ``None`` is no limit.
        memory_messages: What was said before.
        resource_claims: What nobody else may touch meanwhile; a plain string is an exclusive claim.
    """

    identity: AgentIdentity = field(validator=is_a(AgentIdentity))
    task: Task = field(validator=is_a(Task))
    completion_config: CompletionConfig | None = field(default=None, validator=optional(is_a(CompletionConfig)))
    max_turns: int = field(default=20, validator=integer(at_least=1))
    timeout_seconds: float | None = field(default=None, validator=optional(number(above=0)))
    memory_messages: tuple[ChatMessage, ...] = field(default=(), converter=as_tuple, validator=each_is_a(ChatMessage))
    resource_claims: tuple[ResourceClaim, ...] = field(
        default=(), converter=_as_claims, validator=[each_is_a(ResourceClaim), _claims_are_distinct]
    )

    @property
    def agent_id(self) -> str:
        """The identity's id."""
        return self.identity.id

    @property
    def task_id(self) -> str:
        """The task's id."""
        return self.task.id


@frozen(kw_only=True)
class Budget:
    """What a group may spend, as far as agents meter it; at least one of both is given.

    Attributes:
        max_cost: In the currency of ``Usage.cost``.
        max_tokens: Input and output tokens together.
    """

    max_cost: float | None = field(default=None, validator=optional(number(above=0)))
    max_tokens: int | None = field(default=None, validator=optional(integer(at_least=1)))

    def __attrs_post_init__(self) -> None:
        if self.max_cost is None and self.max_tokens is None:
            raise ValueError("a Budget needs max_cost, max_tokens, or both")

    def is_spent_by(self, usage: Usage) -> bool:
        """Whether nothing is left after *usage*."""
        if self.max_cost is not None and usage.cost >= self.max_cost:
            return True
        return self.max_tokens is not None and usage.input_tokens + usage.output_tokens >= self.max_tokens


class ClaimPolicy(StrEnum):
    """What is done about claims that overlap."""

    REJECT = auto()
    """The group is refused before anything runs; all claims are held from its start on."""
    WAIT = auto()
    """Assignments that overlap run one after another; each takes its claims when its turn comes."""


def _ids_are_unique(_instance: object, _attribute: Any, assignments: tuple[AgentAssignment, ...]) -> None:
    if not assignments:
        raise ValueError("assignments must hold at least one assignment")
    if len({a.task.id for a in assignments}) < len(assignments):
        repeated = _repeated(a.task_id for a in assignments)
        raise ValueError(f"Duplicate task IDs: {', '.join(repeated)}. Give each task its own.")


def _refuse_circles(assignments: tuple[AgentAssignment, ...]) -> None:
    """Refuse dependencies on tasks that are not there, and circles."""
    graph = {a.task.id: a.task.depends_on for a in assignments if a.task.depends_on}
    if not graph:
        return
    known = {a.task.id for a in assignments}
    unknown = sorted({name for names in graph.values() for name in names} - known)
    if unknown:
        raise ValueError(f"Unknown task IDs in depends_on: {', '.join(unknown)}. Name tasks of the same group.")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise ValueError(f"Tasks depend on each other in a circle: {' -> '.join(reversed(error.args[1]))}") from None


def refuse_timeout_without_waiting(policy: ClaimPolicy, timeout_seconds: float | None) -> None:
    """Refuse a time to wait for claims where nobody waits for them.

    Raises:
        ValueError: Saying so.
    """
    if timeout_seconds is not None and policy is not ClaimPolicy.WAIT:
        raise ValueError("claim_timeout_seconds needs the claim_policy 'wait': with 'reject' nobody waits for claims")


@frozen(kw_only=True)
class GroupOptions:
    """How assignments run together, whichever they are.

    Attributes:
        group_id: Names the group in events, reports and locks.
        max_concurrency: The most engine calls at the same time; ``None`` is no limit.
        fail_fast: Whether the first failure stops the rest.
        claim_policy: What is done about claims that overlap each other, or what is held outside the group.
        claim_timeout_seconds: With ``WAIT``: how long an assignment whose turn has come waits for its claims before
            it is given up; ``None`` is as long as it takes.
        allow_shared_agents: Whether an agent may have several tasks; they run one after another.
        deadline_seconds: Counted from the start of the group; then what runs times out, and nothing more starts.
        stop_after_successes: After so many, what runs is cancelled, and nothing more starts. 1 is a race.
        budget: When the metered usage reaches it, nothing more starts; what runs is told and may finish.
    """

    group_id: str = field(validator=not_blank)
    max_concurrency: int | None = field(default=None, validator=optional(integer(at_least=1)))
    fail_fast: bool = field(default=False, validator=is_flag)
    claim_policy: ClaimPolicy = field(default=ClaimPolicy.REJECT, validator=is_a(ClaimPolicy))
    claim_timeout_seconds: float | None = field(default=None, validator=optional(number(above=0)))
    allow_shared_agents: bool = field(default=False, validator=is_flag)
    deadline_seconds: float | None = field(default=None, validator=optional(number(above=0)))
    stop_after_successes: int | None = field(default=None, validator=optional(integer(at_least=1)))
    budget: Budget | None = field(default=None, validator=optional(is_a(Budget)))

    def __attrs_post_init__(self) -> None:
        refuse_timeout_without_waiting(self.claim_policy, self.claim_timeout_seconds)


@frozen(kw_only=True)
class ParallelExecutionGroup(GroupOptions):
    """Assignments that run together; see ``GroupOptions`` for how.

    Attributes:
        assignments: At least one; task ids are unique, and so are agent ids unless ``allow_shared_agents``.
    """

    assignments: tuple[AgentAssignment, ...] = field(
        converter=as_tuple, validator=[each_is_a(AgentAssignment), _ids_are_unique]
    )

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        _refuse_circles(self.assignments)
        if not self.allow_shared_agents and len({a.identity.id for a in self.assignments}) < len(self.assignments):
            repeated = _repeated(a.agent_id for a in self.assignments)
            raise ValueError(
                f"Duplicate agent IDs: {', '.join(repeated)}. Give each agent its own, or set allow_shared_agents."
            )

    @classmethod
    def map(cls, group_id: str, identity: AgentIdentity, tasks: Iterable[Task], **options: Any) -> Self:
        """Build a group in which each task has its own numbered replica of one identity.

        Args:
            group_id: Names the group.
            identity: The replicas are ``{id}-1``, ``{id}-2``, ... in the order of *tasks*.
            tasks: What is to be done, one assignment each.
            options: Fields of the group, and fields of an assignment, which then hold for each of them.
        """
        of_each = {name: options.pop(name) for name in fields_dict(AgentAssignment) if name in options}
        assignments = [
            AgentAssignment(identity=_replica(identity, number), task=task, **of_each)
            for number, task in enumerate(tasks, start=1)
        ]
        return cls(group_id=group_id, assignments=assignments, **options)


def _replica(identity: AgentIdentity, number: int) -> AgentIdentity:
    return AgentIdentity(
        id=f"{identity.id}-{number}",
        name=f"{identity.name}-{number}",
        role=identity.role,
        instructions=identity.instructions,
        model=identity.model,
        base_url=identity.base_url,
    )


__all__ = [
    "CHAT_ROLES",
    "JSON",
    "NO_USAGE",
    "AgentAssignment",
    "AgentIdentity",
    "Budget",
    "ChatMessage",
    "ClaimPolicy",
    "CompletionConfig",
    "GroupOptions",
    "ParallelExecutionGroup",
    "ResourceClaim",
    "Task",
    "ToolCall",
    "Usage",
]
