"""Every async test runs on asyncio and on trio; those marked ``virtual_time`` do so in virtual time.

The proofs get their size and their seed here; what they tried is printed at the end, also by workers of pytest-xdist.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from proof.tally import Proof

from parallel_agents.testing import virtual_time

if TYPE_CHECKING:
    from postgres_server import PostgresServer

pytest_plugins = ["pytester"]

NEEDED = {"ray": "test_ray_engine.py", "temporalio": "test_temporal_engine.py"}
collect_ignore = [file for package, file in NEEDED.items() if not find_spec(package)]
"""The sessions ``ray`` and ``temporal`` of noxfile.py run them; their packages are too large for all others."""

# a busy machine is no failure
hypothesis.settings.register_profile(
    "any speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any speed")

PROOF = pytest.StashKey[Proof]()
TRIED = pytest.StashKey[list[str]]()

BACKENDS: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {
    "asyncio": lambda: ("asyncio", {"debug": True}),
    "trio": lambda: ("trio", {}),
    "asyncio-virtual": lambda: virtual_time("asyncio"),
    "trio-virtual": lambda: virtual_time("trio"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("proof")
    group.addoption("--proof", choices=["few", "short", "long"], default="short", help="how much tests/proof tries")
    group.addoption("--proof-seed", type=int, default=1, help="where the proofs start to count")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[PROOF] = Proof(config.option.proof, config.option.proof_seed)
    config.stash[TRIED] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and "postgres" in item.fixturenames:
            item.add_marker(pytest.mark.integration)


def pytest_sessionfinish(session: pytest.Session) -> None:
    tried = [str(tally) for tally in session.config.stash[PROOF].tallies.values()]
    session.config.stash[TRIED] += tried
    getattr(session.config, "workeroutput", {})["tried"] = tried


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker tried; one that crashed tells nothing."""
    node.config.stash[TRIED] += getattr(node, "workeroutput", {}).get("tried", [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[TRIED]:
        terminalreporter.section(f"proof ({config.option.proof})")
        for line in config.stash[TRIED]:
            terminalreporter.line(line)


@pytest.fixture
def proof(request: pytest.FixtureRequest) -> Proof:
    return request.config.stash[PROOF]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """The backends of every test marked ``anyio``; ``virtual`` ones have a clock that jumps instead of sleeping."""
    if request.param.startswith("trio"):
        pytest.importorskip("trio")
    return BACKENDS[request.param]()


@pytest.fixture(scope="session")
def postgres() -> "Iterator[PostgresServer]":
    """A PostgreSQL server, one for all tests."""
    from postgres_server import postgres_server  # noqa: PLC0415 - one session of the checks runs without it

    with postgres_server() as server:
        yield server


@pytest.fixture
def folder_of_nobody() -> Iterator[Path]:
    """A folder of a user whom permissions bind, whoever runs the tests; this process is that user meanwhile."""
    base = Path(tempfile.mkdtemp())
    folder = base / "folder"
    folder.mkdir()
    user, is_root = os.geteuid(), os.geteuid() == 0
    if is_root:
        base.chmod(0o755)
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(user)
        shutil.rmtree(base)
