"""A Postgres server, as the user `postgres` or a throw-away one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg

from tests.servers.processes import (
    HOST,
    START_S,
    START_TRIES,
    ServerError,
    child_process,
    child_processes,
    free_ports,
    log_end,
)

POSTGRES_USER = "postgres"
# Of no use elsewhere, and nothing that a message could hold by chance.
POSTGRES_PASSWORD = "pg-test-9d2f"


@dataclass(slots=True)
class PostgresServer:
    """A Postgres with a data directory of its own, which wants its password from those who come over TCP.

    It can be stopped and started again, on the same port and with the same data, and may be stopped when it is left.
    """

    port: int
    _folder: Path
    _sync: bool
    _process: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)
    _running: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    host: str = HOST

    @property
    def pid(self) -> int:
        """The postmaster's."""
        assert self._running is not None, "stopped"
        return self._running.pid

    @property
    def password_file(self) -> Path:
        """In the form of ~/.pgpass."""
        return self._folder / "passwords"

    def url(self, database: str = "postgres") -> str:
        """The URL of a database, with everything that a client needs in it."""
        return f"postgresql://{POSTGRES_USER}:{POSTGRES_PASSWORD}@{self.host}:{self.port}/{database}"

    def run(self, *statements: str, database: str = "postgres") -> list[Any]:
        """Execute the statements one by one, each a transaction of its own; the rows of the last one."""

        async def execute() -> list[Any]:
            connection = await asyncpg.connect(self.url(database), timeout=START_S)
            try:
                rows: list[Any] = []
                for statement in statements:
                    rows = await connection.fetch(statement)
                return rows
            finally:
                await connection.close()

        return asyncio.run(execute())

    def new_database(self, template: str = "template0") -> str:
        """Make a database with a name of its own, a copy of the template, which nobody uses meanwhile."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        self.run(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def drop_database(self, name: str) -> None:
        """Drop a database, if it is there, from under those who use it."""
        self.run(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def start(self) -> None:
        """Start it, on its port; it answers when this returns. Raises ServerError."""
        deadline = time.monotonic() + START_S
        # After a kill, until the last process of the old server has seen it, the new one refuses the data and ends.
        while not self._try_start():
            if time.monotonic() > deadline:
                raise ServerError(f"Postgres does not start:\n{log_end(self._folder / 'log')}")
            time.sleep(0.05)

    def _try_start(self) -> bool:
        assert self._running is None, "is running"
        settings = {
            "listen_addresses": self.host,
            "port": self.port,
            "unix_socket_directories": self._folder,
            "dynamic_shared_memory_type": "mmap",  # in the data directory: nothing stays in /dev/shm after a kill
            "fsync": "on" if self._sync else "off",
            "max_connections": 300,
            "shared_buffers": "32MB",
        }
        options = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        data = self._folder / "data"
        command: list[str | Path] = [*_as_postgres(), _postgres_program("postgres"), "-D", data, *options]
        log = self._folder / "log"
        with contextlib.ExitStack() as attempt:
            process = attempt.enter_context(child_process(command, log=log, cwd=self._folder))
            if not _wait_postgres_ready(self, process, log):
                return False
            self._running = process
            self._process = attempt.pop_all()
        return True

    def stop(self) -> None:
        """End it as an administrator would, and its clients' connections."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Kill it; the processes that serve its clients end when they see it."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self._running is not None:
            self.resume()
            self._running.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._running.wait(START_S)
            self._running = None
            self._process.close()

    def pause(self) -> None:
        """Stop it, and the processes that serve its clients, where they are: connections stay, and nobody answers."""
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `pause`."""
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: signal.Signals) -> None:
        for pid in [self.pid, *child_processes(self.pid)]:  # the parent first: it starts no others then
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@contextlib.contextmanager
def postgres_server(*, sync: bool = False) -> Iterator[PostgresServer]:
    """Run Postgres on a loopback port; it answers when this yields. Its data is gone at the end.

    `sync`: a commit survives a power failure, which takes time and which few tests need. Its folder is below the
    system's temporary directory: as root it runs as another user, who may not enter the run's own. Raises ServerError
    with its log when it does not start.
    """
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    try:
        (folder / "secret").write_text(POSTGRES_PASSWORD)
        if os.getuid() == 0:
            for path in (folder, folder / "secret"):
                shutil.chown(path, POSTGRES_USER)
        command: list[str | Path] = [
            *_as_postgres(),
            _postgres_program("initdb"),
            *("--pgdata", folder / "data", "--username", POSTGRES_USER, "--pwfile", folder / "secret"),
            *("--auth-local=trust", "--auth-host=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8"),
            *("--no-sync", "--no-instructions"),
        ]
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=START_S, check=False
        )
        if done.returncode != 0:
            raise ServerError(f"initdb failed:\n{done.stdout.decode(errors='replace')[-4000:]}")
        server = _start_postgres(folder, sync=sync)
        server.password_file.write_text(f"{HOST}:*:*:{POSTGRES_USER}:{POSTGRES_PASSWORD}\n")
        server.password_file.chmod(0o600)
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start_postgres(folder: Path, *, sync: bool) -> PostgresServer:
    for _ in range(START_TRIES):
        (port,) = free_ports(1)
        server = PostgresServer(port, folder, sync)
        if server._try_start():
            return server
    raise ServerError(f"Postgres ended at its start, {START_TRIES} times:\n{log_end(folder / 'log')}")


def _postgres_program(name: str) -> Path:
    # Debian has each version in a folder of its own, which is not on PATH.
    versions = Path("/usr/lib/postgresql").glob(f"*/bin/{name}")
    newest = max(versions, key=lambda path: float(path.parts[4]), default=None)
    found = newest or shutil.which(name)
    if found is None:
        raise ServerError(f"{name} is missing (Debian: postgresql)")
    return Path(found)


def _as_postgres() -> list[str]:
    """Postgres does not run as root. Changing its user, a process forgets with whom it is to die: it is told again."""
    if os.getuid() != 0:
        return []
    user = pwd.getpwnam(POSTGRES_USER)
    change = ["--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--init-groups"]
    return ["setpriv", *change, "--pdeathsig", "KILL", "--"]


def _wait_postgres_ready(server: PostgresServer, process: subprocess.Popen[bytes], log: Path) -> bool:
    deadline = time.monotonic() + START_S
    while process.poll() is None:
        try:
            (row,) = server.run("SELECT pg_read_file('postmaster.pid') AS pid")
            # Not somebody else's server on a port that was free a moment ago.
            return int(row["pid"].split("\n")[0]) == process.pid
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            if time.monotonic() > deadline:
                raise ServerError(f"Postgres not ready: {error}\n{log_end(log)}") from error
        time.sleep(0.02)
    return False
