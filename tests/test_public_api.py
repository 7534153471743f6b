"""What is public is in ``__all__``, and importing it needs neither a backend nor an extra."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import parallel_agents

PACKAGE = Path(parallel_agents.__file__).parent
MAY_IMPORT = {
    "_commands.py": {"cyclopts", "rich"},
    "_display.py": {"rich"},
    "_history.py": {"rich"},
    "_json_schema.py": {"docstring_parser", "jsonschema", "pydantic", "pydantic_core", "referencing"},
    "_live.py": {"rich"},
    "_plan_yaml.py": {"yaml"},
    "_postgres/connections.py": {"psycopg"},
    "_postgres/keeper.py": {"psycopg"},
    "engines/_asyncio_thread.py": {"asyncio", "sniffio", "trio"},
    "engines/_chat_client.py": {"httpx2"},
    "_temporal_worker.py": {"temporalio"},
    "engines/_ray_host.py": {"asyncio"},
    "engines/_temporal.py": {"temporalio"},
    "engines/_temporal_call.py": {"asyncio", "temporalio"},
    "engines/_temporal_worker.py": {"asyncio", "temporalio"},
    "engines/asyncio.py": {"asyncio"},
    "engines/chat.py": {"httpx2"},
    "engines/langgraph.py": {"langchain_core", "langgraph"},
    "engines/mcp.py": {"mcp"},
    "engines/openai_agents.py": {"agents"},
    "engines/pydantic_ai.py": {"pydantic_ai"},
    "engines/retry.py": {"stamina"},
    "engines/temporal.py": {"temporalio"},
    "observers/otel.py": {"opentelemetry"},
    "testing/chat.py": {"h11"},
    "testing/engines.py": {"pytest"},
    "testing/journals.py": {"pytest"},
    "testing/locks.py": {"pytest"},
    "testing/plugin.py": {"pytest"},
    "testing/remote.py": {"pytest"},
    "testing/stepping.py": {"asyncio", "trio"},
}
"""What each module may import besides the standard library and the core's own requirements; asyncio is for few, too."""

CORE = {"anyio", "attr", "attrs", "cattrs", "loguru"}
EXTRAS = frozenset(set().union({"ray"}, *MAY_IMPORT.values()) - {"asyncio", "pytest", "trio", "sniffio"})


def imported(source: str) -> Iterator[str]:
    """Yield the top-level packages that a module imports anywhere, also in functions; its own package apart."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def as_isort_orders(name: str) -> tuple[int, str]:
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def test_all_names_exactly_what_is_public() -> None:
    public = {
        name
        for name, value in vars(parallel_agents).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert set(parallel_agents.__all__) - {"__version__"} == public


def test_all_is_sorted_and_names_nothing_twice() -> None:
    names = list(parallel_agents.__all__)
    assert names == sorted(set(names), key=as_isort_orders)


def test_what_users_need_is_importable_from_the_package() -> None:
    needed = {
        "AgentAssignment", "AgentEngine", "AgentFailedError", "AgentIdentity", "AgentOutcome", "AgentRunResult",
        "ChatMessage", "ClaimMode", "CompletionConfig", "CooperativeTimeout", "EngineUnavailableError",
        "FunctionEngine", "ImmediateCancel", "InMemoryResourceLock", "InvalidPlanError", "OutcomeStatus",
        "ParallelAgentsError", "ParallelExecutionError", "ParallelExecutionGroup", "ParallelExecutionResult",
        "ParallelExecutor", "ParallelProgress", "ResourceClaim", "ResourceConflictError", "ResourceLock",
        "RunContext", "ShutdownInProgressError", "ShutdownManager", "ShutdownResult", "Task",
        "TerminationReason", "Usage", "current_run",
    }  # fmt: skip
    assert needed <= set(parallel_agents.__all__)


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_imports_no_backend_and_no_extra_that_is_not_its_own(file: Path) -> None:
    allowed = CORE | MAY_IMPORT.get(file.relative_to(PACKAGE).as_posix(), set())
    others = {name for name in imported(file.read_text("utf-8")) if name not in sys.stdlib_module_names}
    assert others <= allowed
    assert "asyncio" in allowed or "asyncio" not in imported(file.read_text("utf-8"))


def test_imports_inside_functions_are_seen() -> None:
    assert set(imported("def f():\n    import trio.lowlevel\n    from asyncio import run")) == {"trio", "asyncio"}


WITHOUT_EXTRAS = f"""
import builtins, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(EXTRAS | {"trio"})!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())

def guarded(name, globals=None, *rest, real=builtins.__import__):
    ours = ((globals or {{}}).get("__name__") or "").partition(".")[0] == "parallel_agents"
    assert not (ours and name.partition(".")[0] == "asyncio"), f"{{globals['__name__']}} imports asyncio"
    return real(name, globals, *rest)

builtins.__import__ = guarded

import anyio
from parallel_agents import AgentAssignment, AgentIdentity, ParallelExecutionGroup, ParallelExecutor, Task

async def agent(assignment):
    await anyio.sleep(0)
    return assignment.task_id

group = ParallelExecutionGroup.map("g", AgentIdentity(id="a"), [Task(id=str(i)) for i in range(3)])
print(*(o.output for o in anyio.run(ParallelExecutor(engine=agent).execute_group, group).outcomes))
"""


def test_a_group_runs_where_trio_and_all_extras_are_missing() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS], capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == ("0 1 2\n", "")


def test_importing_the_package_loads_no_extra_and_no_trio() -> None:
    program = f"import parallel_agents, sys; print(sorted({{'trio', *{sorted(EXTRAS)!r}}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [
        ("_json_schema", "jsonschema", "tools"),
        ("engines.chat", "httpx2", "chat"),
        ("engines.langgraph", "langgraph", "langgraph"),
        ("engines.mcp", "mcp", "mcp"),
        ("engines.openai_agents", "agents", "openai-agents"),
        ("engines.pydantic_ai", "pydantic_ai", "pydantic-ai"),
        ("engines.ray", "ray", "ray"),
        ("engines.retry", "stamina", "retry"),
        ("engines.temporal", "temporalio", "temporal"),
        ("_postgres.connections", "psycopg", "postgres"),
        ("observers.otel", "opentelemetry", "otel"),
        ("testing.chat", "h11", "chat"),
    ],
)
def test_what_is_missing_is_told_with_what_to_install(
    module: str, missing: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"parallel_agents.{module}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=re.escape(f"pip install 'parallel-agents[{extra}]'")):
        importlib.import_module(f"parallel_agents.{module}")
