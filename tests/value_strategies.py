"""Hypothesis strategies for every class of values, shared by the tests of the values and of their JSON."""

from typing import Any

import attrs
from hypothesis import strategies as st

from parallel_agents._claims import ClaimMode, ResourceClaim
from parallel_agents._models import (
    CHAT_ROLES,
    AgentAssignment,
    AgentIdentity,
    Budget,
    ChatMessage,
    ClaimPolicy,
    CompletionConfig,
    GroupOptions,
    ParallelExecutionGroup,
    Task,
    ToolCall,
    Usage,
)
from parallel_agents._outcomes import (
    AgentOutcome,
    AgentRunResult,
    OutcomeStatus,
    ParallelExecutionResult,
    ParallelProgress,
    TerminationReason,
)

ids = st.text(min_size=1).filter(str.strip)
counts = st.integers(0, 10**12)
amounts = st.floats(0, 1e12)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
json_values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
json_tables = st.dictionaries(st.text(), json_values, max_size=3)
usages = st.builds(Usage, input_tokens=counts, output_tokens=counts, requests=counts, cost=amounts)
tool_calls = st.builds(ToolCall, id=st.text(), name=st.text(), arguments=json_values)
messages = st.builds(
    ChatMessage,
    role=st.sampled_from(CHAT_ROLES),
    content=st.text(),
    tool_calls=st.lists(tool_calls, max_size=2),
    tool_call_id=st.none() | st.text(),
)
message_lists = st.lists(messages, max_size=2)
configs = st.builds(
    CompletionConfig,
    model=st.none() | ids,
    temperature=st.none() | amounts,
    max_tokens=st.none() | st.integers(1),
    stop=st.lists(st.text(), max_size=2),
    seed=st.none() | st.integers(),
    response_format=st.none() | json_tables,
    extra=json_tables,
)
identities = st.builds(
    AgentIdentity,
    id=ids,
    name=ids,
    role=st.text(),
    instructions=st.text(),
    model=st.none() | ids,
    base_url=st.none() | ids,
)
tasks = st.builds(Task, id=ids, title=st.text(), description=st.text(), inputs=json_tables)
claims = st.builds(ResourceClaim, resource=ids, mode=st.sampled_from(ClaimMode))
assignments = st.builds(
    AgentAssignment,
    identity=identities,
    task=tasks,
    completion_config=st.none() | configs,
    max_turns=st.integers(1),
    timeout_seconds=st.none() | st.floats(0.001, 1e9),
    memory_messages=message_lists,
    resource_claims=st.lists(claims, max_size=2, unique_by=lambda claim: claim.resource),
)
positive = amounts.filter(bool)
budgets = st.builds(Budget, max_cost=st.none() | positive, max_tokens=st.integers(1)) | st.builds(
    Budget, max_cost=positive
)
groups = st.builds(
    ParallelExecutionGroup,
    group_id=ids,
    assignments=st.lists(assignments, min_size=1, max_size=3, unique_by=(lambda a: a.task_id, lambda a: a.agent_id)),
    max_concurrency=st.none() | st.integers(1),
    fail_fast=st.booleans(),
    claim_policy=st.just(ClaimPolicy.WAIT),
    claim_timeout_seconds=st.none() | positive,
    allow_shared_agents=st.booleans(),
    deadline_seconds=st.none() | positive,
    stop_after_successes=st.none() | st.integers(1),
    budget=st.none() | budgets,
)


@st.composite
def results(draw: st.DrawFn) -> AgentRunResult[Any]:
    reason = draw(st.sampled_from(TerminationReason))
    return AgentRunResult(
        task_id=draw(ids),
        agent_id=draw(ids),
        termination_reason=reason,
        output=draw(json_values),
        error_message=draw(ids) if reason is TerminationReason.ERROR else None,
        usage=draw(usages),
        turns=draw(counts),
        duration_seconds=draw(amounts),
        messages=draw(message_lists),
    )


@st.composite
def outcomes(draw: st.DrawFn) -> AgentOutcome[Any]:
    result = draw(st.none() | results())
    failures = st.sampled_from([s for s in OutcomeStatus if s not in {OutcomeStatus.SUCCEEDED, OutcomeStatus.PARKED}])
    kind: dict[str, Any] = {"error": draw(ids), "status": draw(failures)} if result is None else {"result": result}
    return AgentOutcome(
        task_id=result.task_id if result else draw(ids),
        agent_id=result.agent_id if result else draw(ids),
        usage=draw(usages),
        attempts=draw(counts),
        started_after_seconds=draw(st.none() | amounts),
        duration_seconds=draw(amounts),
        **kind,
    )


execution_results: st.SearchStrategy[ParallelExecutionResult[Any]] = st.builds(
    ParallelExecutionResult,
    group_id=ids,
    outcomes=st.lists(outcomes(), max_size=3),
    total_duration_seconds=amounts,
)
progresses = st.tuples(*[st.integers(0, 9)] * 5).map(
    lambda n: ParallelProgress(
        group_id="g", total=sum(n), completed=n[0] + n[1] + n[2], succeeded=n[0], failed=n[1], parked=n[2],
        in_progress=n[3],
    )
)  # fmt: skip
group_options = groups.map(
    lambda group: GroupOptions(**{name: getattr(group, name) for name in attrs.fields_dict(GroupOptions)})
)
STRATEGIES: dict[type, st.SearchStrategy[Any]] = {
    GroupOptions: group_options,
    Usage: usages,
    ToolCall: tool_calls,
    ChatMessage: messages,
    CompletionConfig: configs,
    AgentIdentity: identities,
    Task: tasks,
    ResourceClaim: claims,
    AgentAssignment: assignments,
    Budget: budgets,
    ParallelExecutionGroup: groups,
    AgentRunResult: results(),
    AgentOutcome: outcomes(),
    ParallelExecutionResult: execution_results,
    ParallelProgress: progresses,
}
