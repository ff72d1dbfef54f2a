"""Running the program as a user does."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import servers
from tests.mount.stores import upload

PROGRAM = Path(sys.executable).parent / "desfs"
# Nothing here takes a fraction of it; a machine that is busy with other things may.
PATIENCE_S = 60.0
KINDS = ("file", "s3")
# Kinds of stores, and whether the kernel opens files by itself (`levers=`).
WAYS = (("file", "auto"), ("file", "off"), ("s3", "auto"))


def desfs(
    *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `desfs` to its end. Variables in `env` are set in addition."""
    return subprocess.run(
        [PROGRAM, *map(str, arguments)],
        env=os.environ | (env or {}),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@contextlib.contextmanager
def mounted(source: object, where: Path, *options: str, env: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Mount, and unmount at the end whatever happened; the daemon has ended then."""
    with servers.mount_point(where):
        mount(source, where, *options, env=env)
        yield where


def mount(source: object, where: Path, *options: str, env: Mapping[str, str] | None = None) -> None:
    """Mount below a `servers.mount_point`; AssertionError with the message if that fails."""
    done = desfs("mount", source, where, *(word for option in options for word in ("-o", option)), env=env)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", ""), done.stderr


def daemon_of(where: Path) -> int:
    """The process that serves a mount."""
    (pid,) = servers.mount_daemons(where)
    return pid


@dataclass(frozen=True, slots=True)
class Source:
    """A store that can be mounted: its URL, and the variables that a program needs to reach it."""

    url: str
    env: Mapping[str, str]


@contextlib.contextmanager
def source_of(kind: str, folder: Path, request: pytest.FixtureRequest) -> Iterator[Source]:
    """The objects in a folder as a store: the folder itself, or a copy in a bucket of the run's S3 server."""
    if kind == "file":
        yield Source(folder.as_uri(), {})
        return
    server: servers.S3Server = request.getfixturevalue("s3")
    bucket = server.new_bucket("mount")
    try:
        upload(server, bucket, folder, "some/prefix/")
        yield Source(f"s3://{bucket}/some/prefix", server.environ())
    finally:
        server.delete_bucket(bucket)


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait for something that another process does. Raises AssertionError when it takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:g} s for {what}"
        time.sleep(0.01)


def run(command: Sequence[object], *, cwd: Path | None = None) -> bytes:
    """The output of a program that must succeed without a word on stderr."""
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
        cwd=cwd,
        env=os.environ | {"LC_ALL": "C.UTF-8"},
    )
    assert (done.returncode, done.stderr) == (0, b""), command
    return done.stdout


def outcome(call: Callable[[], object]) -> str:
    """The name of the error that a system call answers with, or "no error"."""
    try:
        call()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "no error"


class Dirent(ctypes.Structure):
    _fields_ = (
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_ushort),
        ("d_type", ctypes.c_ubyte),
        ("d_name", ctypes.c_char * 256),
    )


LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.opendir.restype = ctypes.c_void_p
LIBC.readdir.restype = ctypes.POINTER(Dirent)
LIBC.telldir.restype = ctypes.c_long
LIBC.readdir.argtypes = LIBC.telldir.argtypes = LIBC.closedir.argtypes = LIBC.rewinddir.argtypes = [ctypes.c_void_p]
LIBC.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]


class Directory:
    """libc's directory stream."""

    def __init__(self, path: Path) -> None:
        self._stream = LIBC.opendir(os.fsencode(path))
        assert self._stream, path

    def read(self) -> tuple[str, int] | None:
        entry = LIBC.readdir(self._stream)
        return (entry.contents.d_name.decode(), int(entry.contents.d_ino)) if entry else None

    def tell(self) -> int:
        return int(LIBC.telldir(self._stream))

    def seek(self, position: int) -> None:
        LIBC.seekdir(self._stream, position)

    def rewind(self) -> None:
        LIBC.rewinddir(self._stream)

    def close(self) -> None:
        LIBC.closedir(self._stream)
