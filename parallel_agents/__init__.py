"""Run groups of agents in parallel with structured concurrency, on asyncio and trio."""

from loguru import logger as _logger

from ._claims import ClaimMode as ClaimMode
from ._claims import ResourceClaim as ResourceClaim
from ._context import RunContext as RunContext
from ._context import current_run as current_run
from ._errors import AgentFailedError as AgentFailedError
from ._errors import EngineUnavailableError as EngineUnavailableError
from ._errors import InvalidPlanError as InvalidPlanError
from ._errors import NeedsHuman as NeedsHuman
from ._errors import ParallelAgentsError as ParallelAgentsError
from ._errors import ParallelExecutionError as ParallelExecutionError
from ._errors import ResourceConflictError as ResourceConflictError
from ._errors import ShutdownInProgressError as ShutdownInProgressError
from ._executor import ParallelExecutor as ParallelExecutor
from ._models import AgentAssignment as AgentAssignment
from ._models import AgentIdentity as AgentIdentity
from ._models import Budget as Budget
from ._models import ChatMessage as ChatMessage
from ._models import ClaimPolicy as ClaimPolicy
from ._models import CompletionConfig as CompletionConfig
from ._models import GroupOptions as GroupOptions
from ._models import ParallelExecutionGroup as ParallelExecutionGroup
from ._models import Task as Task
from ._models import ToolCall as ToolCall
from ._models import Usage as Usage
from ._outcomes import AgentOutcome as AgentOutcome
from ._outcomes import AgentRunResult as AgentRunResult
from ._outcomes import OutcomeStatus as OutcomeStatus
from ._outcomes import ParallelExecutionResult as ParallelExecutionResult
from ._outcomes import ParallelProgress as ParallelProgress
from ._outcomes import TerminationReason as TerminationReason
from ._run import GroupRun as GroupRun
from ._shutdown import CooperativeTimeout as CooperativeTimeout
from ._shutdown import ImmediateCancel as ImmediateCancel
from ._shutdown import ShutdownManager as ShutdownManager
from ._shutdown import ShutdownResult as ShutdownResult
from ._stream import StreamRun as StreamRun
from ._tools import Tool as Tool
from ._tools import ToolInvoker as ToolInvoker
from ._tools import ToolRegistry as ToolRegistry
from ._tools import ToolResult as ToolResult
from .engines import AgentEngine as AgentEngine
from .engines import FunctionEngine as FunctionEngine
from .events import Observer as Observer
from .events import ParallelEvent as ParallelEvent
from .locks import NEVER_LOST as NEVER_LOST
from .locks import ClaimLock as ClaimLock
from .locks import InMemoryResourceLock as InMemoryResourceLock
from .locks import Lease as Lease
from .locks import Lost as Lost
from .locks import ResourceLock as ResourceLock

__all__ = [
    "NEVER_LOST",
    "AgentAssignment",
    "AgentEngine",
    "AgentFailedError",
    "AgentIdentity",
    "AgentOutcome",
    "AgentRunResult",
    "Budget",
    "ChatMessage",
    "ClaimLock",
    "ClaimMode",
    "ClaimPolicy",
    "CompletionConfig",
    "CooperativeTimeout",
    "EngineUnavailableError",
    "FunctionEngine",
    "GroupOptions",
    "GroupRun",
    "ImmediateCancel",
    "InMemoryResourceLock",
    "InvalidPlanError",
    "Lease",
    "Lost",
    "NeedsHuman",
    "Observer",
    "OutcomeStatus",
    "ParallelAgentsError",
    "ParallelEvent",
    "ParallelExecutionError",
    "ParallelExecutionGroup",
    "ParallelExecutionResult",
    "ParallelExecutor",
    "ParallelProgress",
    "ResourceClaim",
    "ResourceConflictError",
    "ResourceLock",
    "RunContext",
    "ShutdownInProgressError",
    "ShutdownManager",
    "ShutdownResult",
    "StreamRun",
    "Task",
    "TerminationReason",
    "Tool",
    "ToolCall",
    "ToolInvoker",
    "ToolRegistry",
    "ToolResult",
    "Usage",
    "current_run",
]

_logger.disable("parallel_agents")
