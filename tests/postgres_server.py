"""A PostgreSQL server of the tests' own: Debian's programs, a temporary folder, a free port of the loopback."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import pytest

psycopg = pytest.importorskip("psycopg")

OWNER = "owner"
PASSWORD = "se:cret/@ %41"  # every character that an address can garble
SECONDS = 30.0

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "fsync": "off",  # a killed process loses nothing that the kernel has; only a loss of power would
    "shared_buffers": "16MB",
    "max_connections": "200",
    "deadlock_timeout": "100ms",
    "log_min_messages": "warning",
}


def programs() -> Path:
    """Return the folder of the server's programs; the test is skipped where there are none."""
    if (found := shutil.which("initdb")) is not None:
        return Path(found).parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not folders:
        pytest.skip("no PostgreSQL is installed: apt-get install postgresql")
    return folders[-1].parent


class PostgresServer:
    """A server that can be killed and started again on the same port."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self._settings = settings
        self._programs = programs()
        self._folder = folder
        self._user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
        self._process: subprocess.Popen[bytes] | None = None
        self._made = 0
        self.port = 0

    def make(self) -> None:
        """Make the files of the server."""
        if self._user is not None:
            self._folder.chmod(0o755)
            shutil.chown(self._folder, self._user)
        secret = self._folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        wanted = f"--username={OWNER} --auth=scram-sha-256 --no-sync --no-instructions --encoding=UTF8 --locale=C"
        files = [f"--pgdata={self._folder / 'data'}", f"--pwfile={secret}"]
        subprocess.run(
            [str(self._programs / "initdb"), *wanted.split(), *files],
            user=self._user,
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            check=True,
        )

    def start(self) -> None:
        """Start it, and wait until it answers."""
        settings = [word for name, value in self._settings.items() for word in ("-c", f"{name}={value}")]
        end = time.monotonic() + SECONDS
        port = self.port
        while True:
            if not port:
                with socket.create_server(("127.0.0.1", 0)) as free:
                    self.port = free.getsockname()[1]
            with (self._folder / "log").open("ab") as log:
                self._process = subprocess.Popen(
                    [self._programs / "postgres", "-D", str(self._folder / "data"), "-p", str(self.port), *settings],
                    user=self._user,
                    cwd=self._folder,
                    stderr=log,
                    stdout=log,
                )
            while self._process.poll() is None:
                with contextlib.suppress(psycopg.OperationalError):
                    psycopg.connect(self.url("postgres"), connect_timeout=2).close()
                    return
                time.sleep(0.02)
            # what is left of a killed one, or another user of the port, may be gone at the next try
            assert time.monotonic() < end, (self._folder / "log").read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        """Kill all of it, as a crash does."""
        assert self._process is not None
        pid = self._process.pid
        workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        self._process.kill()
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(worker), signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()

    def url(self, database: str, user: str = OWNER, password: str = PASSWORD) -> str:
        """Return the address of a database."""
        return f"postgresql://{user}:{quote(password, safe='')}@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """Do something as the owner of everything; return the rows, if it has some."""
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def empty(self) -> str:
        """Return the address of a database that has nothing of ours in it."""
        self.execute("DROP SCHEMA IF EXISTS parallel_agents CASCADE")
        return self.url("postgres")


@contextlib.contextmanager
def postgres_server(**settings: str) -> Iterator[PostgresServer]:
    """Give a running server with some settings of its own, and leave nothing of it."""
    with tempfile.TemporaryDirectory(prefix="parallel-agents-postgres-") as folder:
        server = PostgresServer(Path(folder), {**SETTINGS, **settings})
        server.make()
        server.start()
        try:
            yield server
        finally:
            server.stop()
