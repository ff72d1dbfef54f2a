"""A Redis server."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import redis

from tests.servers.processes import (
    HOST,
    START_S,
    START_TRIES,
    ServerError,
    child_process,
    free_ports,
    log_end,
)


@dataclass(frozen=True, slots=True)
class RedisServer:
    """A running Redis that keeps nothing on disk."""

    host: str
    port: int
    pid: int

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}/0"

    def client(self) -> redis.Redis:
        """A client of the caller's own; close it."""
        return redis.Redis(host=self.host, port=self.port)


@contextlib.contextmanager
def redis_server(tmp_dir: Path, *, port: int | None = None) -> Iterator[RedisServer]:
    """Run Redis on a loopback port, one that is free if none is said; it answers when this yields. Raises ServerError
    with its log when it does not."""
    folder = Path(tempfile.mkdtemp(prefix="redis-", dir=tmp_dir))
    try:
        with contextlib.ExitStack() as stack:
            yield _start_redis(stack, folder, port)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start_redis(stack: contextlib.ExitStack, folder: Path, chosen: int | None) -> RedisServer:
    program = shutil.which("redis-server")
    if program is None:
        raise ServerError("redis-server is missing (Debian: redis-server)")
    log = folder / "log"
    for _ in range(START_TRIES):
        port = chosen or free_ports(1)[0]
        settings = {"bind": HOST, "port": port, "daemonize": "no", "save": "", "appendonly": "no", "dir": folder}
        command = [program, *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]
        with contextlib.ExitStack() as attempt:
            process = attempt.enter_context(child_process(command, log=log, cwd=folder))
            server = RedisServer(HOST, port, process.pid)
            if _wait_redis_ready(server, process, log):
                stack.push(attempt.pop_all())
                return server
    raise ServerError(f"redis-server ended at its start, {START_TRIES} times:\n{log_end(log)}")


def _wait_redis_ready(server: RedisServer, process: subprocess.Popen[bytes], log: Path) -> bool:
    deadline = time.monotonic() + START_S
    with contextlib.closing(server.client()) as client:
        while process.poll() is None:
            try:
                client.ping()
                # Not somebody else's server on a port that was free a moment ago.
                return int(client.info("server")["process_id"]) == server.pid
            except redis.RedisError as error:
                if time.monotonic() > deadline:
                    raise ServerError(f"redis-server not ready: {error}\n{log_end(log)}") from error
            time.sleep(0.01)
    return False
