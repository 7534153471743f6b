"""A Ray cluster for the tests, on 127.0.0.2 with a token of its own; and the engine that its drivers make."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parallel_agents.engines.ray import RayEngine

HOST = "127.0.0.2"
"""Ray takes 127.0.0.1 for a mistake, and uses the machine's own address instead."""

START_SECONDS = 120.0
AGENT = "parallel_agents.testing.remote_agents:agent"


async def make_engine(execution: str, *, cancel_seconds: float = 10.0) -> "RayEngine":
    """Make an engine as a new driver would; the cluster's address and token are in the environment."""
    from parallel_agents.engines.ray import RayEngine  # noqa: PLC0415 - Ray reads the token when it is imported

    return RayEngine(
        AGENT,
        name="contract",
        hosts=2,
        execution=execution,
        cancel_seconds=cancel_seconds,
        address=os.environ["RAY_ADDRESS"],
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def cluster(modules: Path | None = None) -> Iterator[str]:
    """Run a cluster of one node for the length of the block, in which the environment leads to it.

    Args:
        modules: A folder from which its workers import, too.
    """
    address = f"{HOST}:{free_port()}"
    of_ray = {
        "RAY_ADDRESS": address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=8"]
        command += [f"--node-ip-address={HOST}", f"--port={address.rpartition(':')[2]}", f"--temp-dir={folder}"]
        command += ["--include-dashboard=false", f"--dashboard-agent-listen-port={free_port()}"]
        command += ["--object-store-memory=100000000"]
        before = {name: os.environ.get(name) for name in of_ray}
        os.environ |= of_ray
        log = Path(folder, "start.log")
        env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}  # of tests alone
        if modules is not None:
            env["PYTHONPATH"] = str(modules)
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=env, start_new_session=True)
        try:
            wait_until_it_answers(process, address, log)
            yield address
        finally:
            stop(process)
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def wait_until_it_answers(process: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    """Wait until the node says that it runs."""
    ends = time.monotonic() + START_SECONDS
    while "Ray runtime started" not in log.read_text("utf-8"):
        assert process.poll() is None, log.read_text("utf-8")
        assert time.monotonic() < ends, log.read_text("utf-8")
        time.sleep(0.05)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Stop a node as a whole: it leads a session of its own, and its workers end with it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
