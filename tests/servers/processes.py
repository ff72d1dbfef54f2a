"""Processes that end with the test that started them, and what there is to know of a process."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

HOST = "127.0.0.1"
# `weed server` sleeps 2 s before it starts its S3 gateway; all in all it needs 2.4 s here, and a loaded machine more.
START_S = 60.0
# A port that is free when it is chosen can be taken before the server binds it.
START_TRIES = 5


class ServerError(Exception):
    """A server did not start; the message has the end of its log."""


# Set once for a test run and inherited by all that it starts, daemons included: how leftovers are found.
RUN_VARIABLE = "TEST_RUN"


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on, from below the kernel's range for outgoing connections."""
    ports: list[int] = []
    for port in random.sample(range(10_000, 32_000), k=2_000):
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise ServerError(f"no {count} free ports between 10000 and 32000 on {HOST}")


@contextlib.contextmanager
def child_process(
    argv: Sequence[str | Path],
    *,
    log: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stop_s: float = 10.0,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program with its output in `log`; at the end SIGTERM, and SIGKILL after `stop_s` (0: at once).

    The kernel kills it when the calling thread dies.
    """
    command = ["setpriv", "--pdeathsig", "KILL", "--", *argv]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=cwd, env=env)
    try:
        yield process
    finally:
        if stop_s > 0 and process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(stop_s)
        if process.poll() is None:
            process.kill()
        process.wait()


def log_end(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:]


def is_running(pid: int) -> bool:
    """Whether the process lives; one that has ended and was not waited for does not."""
    return state_of(pid) not in ("", "Z", "X")


def state_of(pid: int) -> str:
    """The process's state, a letter as ps(1) shows it; "" when there is none."""
    return _state_and_parent(pid)[0]


def _state_and_parent(pid: int) -> tuple[str, int]:
    try:
        # The name, in parentheses, may hold anything.
        words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2].split()
    except OSError:
        return "", 0
    return words[0], int(words[1])


def child_processes(parent: int | None = None) -> list[int]:
    """Living children of a process, or of this one."""
    pids = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    return [pid for pid in pids if _state_and_parent(pid)[1] == (parent or os.getpid()) and is_running(pid)]


def processes_with(variable: str, value: str) -> list[int]:
    """Living processes, but for this one, that were started with the variable set so."""
    wanted = f"{variable}={value}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            environ = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted in environ and is_running(int(folder.name)):
            found.append(int(folder.name))
    return found


def command_of(pid: int) -> str:
    """The process's command line, for messages; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
