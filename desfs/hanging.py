"""Looking at paths that may hang: those of a mount whose daemon does not answer. Blocking, for a bounded time.

A process with a thread that waits for such a mount cannot be killed, not even with SIGKILL, and does not end before the
mount answers: a time limit within the process is none. The calls are made by another one, which belongs to nobody: it
may stay where it is stuck.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

Name = Literal["stat", "statvfs", "list", "names", "read", "writable"]


class Call(NamedTuple):
    """A system call, or a few, on a path."""

    name: Name
    path: str


class Outcome(NamedTuple):
    """What came of a call: `value`, or the number of the error, or None for both when no answer came in time."""

    value: Any = None
    errno: int | None = None

    @property
    def answered(self) -> bool:
        """False when the time was over first."""
        return self.value is not None or self.errno is not None

    @property
    def reason(self) -> str:
        """Why there is no value, in words."""
        return "no answer in time" if self.errno is None else os.strerror(self.errno)


_PROGRAM = """
import json, os, signal, sys
if os.fork():
    os._exit(0)
signal.alarm(int(sys.argv[2]))
def stat(path):
    found = os.stat(path)
    return [found.st_mode, found.st_uid, found.st_gid, found.st_dev]
def statvfs(path):
    found = os.statvfs(path)
    return [found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize]
def list(path):
    with os.scandir(path) as entries:
        return sum(1 for _, _ in zip(range(1000), entries))
def names(path):
    return os.listdir(path)
def read(path):
    with open(path, "rb") as file:
        return file.read(1 << 26).decode("utf-8", "replace")
def writable(path):
    return os.access(path, os.W_OK | os.X_OK, effective_ids=True)
for name, path in json.loads(sys.argv[1]):
    try:
        answer = {"value": globals()[name](path)}
    except OSError as error:
        answer = {"errno": error.errno}
    print(json.dumps(answer), flush=True)
"""


def look(calls: Sequence[Call], *, limit_s: float) -> list[Outcome]:
    """Make the calls one after the other; an outcome for each, in their order. `stat` gives mode, uid, gid and device;
    `statvfs` the bytes that are free and all; `list` how many entries there are, 1,000 at most; `names` the entries;
    `read` a text of at most 64 MiB; `writable` whether this user may make files there."""
    deadline = time.monotonic() + limit_s
    # json spells names that are not UTF-8, and keeps them what they are.
    command = [sys.executable, "-IS", "-c", _PROGRAM, json.dumps(calls), str(int(limit_s) + 1)]
    reader, writer = os.pipe()
    try:
        try:
            with subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.DEVNULL, start_new_session=True
            ):
                pass  # it ends at once: its child makes the calls
        finally:
            os.close(writer)
        waiting = select.poll()
        waiting.register(reader)
        text = b""
        while text.count(b"\n") < len(calls):
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not waiting.poll(left_s * 1000):
                break
            piece = os.read(reader, 1 << 20)
            if not piece:
                break
            text += piece
    finally:
        os.close(reader)
    found = [Outcome(**json.loads(line)) for line in text.split(b"\n")[:-1]]
    return found + [Outcome()] * (len(calls) - len(found))
