"""Mounts that are gone after the test, whatever happens."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.servers.processes import (
    command_of,
    is_running,
)

_FUSE_CONNECTIONS = Path("/sys/fs/fuse/connections")


@dataclass(frozen=True, slots=True)
class MountEntry:
    """A line of /proc/self/mountinfo. `minor` is the number of a FUSE connection, for a FUSE mount."""

    path: Path
    fstype: str
    minor: int


def mount_table() -> list[MountEntry]:
    """All mounts, in the order of the kernel: of two at one place the later is on top."""
    entries = []
    for line in Path("/proc/self/mountinfo").read_bytes().decode(errors="surrogateescape").split("\n")[:-1]:
        left, _, right = line.partition(" - ")
        words = left.split(" ")
        path = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), words[4])
        entries.append(MountEntry(Path(path), right.split(" ")[0], int(words[2].partition(":")[2])))
    return entries


def is_mounted(path: Path) -> bool:
    """Whether something is mounted exactly there. Does not touch the mount, which may hang."""
    wanted = Path(os.path.abspath(path))
    return any(entry.path == wanted for entry in mount_table())


def mount_daemons(path: Path) -> list[int]:
    """Processes that hold /dev/fuse open and were started with the mount point as an argument."""
    wanted = os.fsencode(os.path.abspath(path))
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if wanted in (folder / "cmdline").read_bytes().split(b"\0") and any(
                os.readlink(descriptor) == "/dev/fuse" for descriptor in (folder / "fd").iterdir()
            ):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


# For sh in a new mount namespace. It has copies of the mounts that there were, and a mount of which there is a copy
# does not end when it is unmounted.
DROP_COPIED_MOUNTS = r"""
copied=$(cat /proc/self/mounts)
echo "$copied" | while read -r _ place kind _; do
    test "$kind" != fuse.desfs || umount -l "$(printf %b "$place")"
done
"""


@dataclass(slots=True)
class MountPoint:
    """A directory to mount on. Daemons that do not have it on their command line are registered by `daemons.append`."""

    path: Path
    daemons: list[int] = field(default_factory=list)


@contextlib.contextmanager
def mount_point(path: Path, *, stop_s: float = 10.0) -> Iterator[MountPoint]:
    """Make a directory to mount on, and see to it that nothing is mounted there afterwards and that its daemons end.

    They are given `stop_s` to end by themselves after the unmount. A daemon that does not is killed, its connection
    aborted so that nobody waits for it, and AssertionError raised, unless the body has failed already.
    """
    path.mkdir(parents=True, exist_ok=True)
    mount = MountPoint(path)
    try:
        yield mount
    except BaseException:
        _clear_mount(mount, stop_s)
        raise
    killed = _clear_mount(mount, stop_s)
    assert not killed, f"still running {stop_s} s after {path} was unmounted, and killed: {killed}"


def _clear_mount(mount: MountPoint, stop_s: float) -> list[str]:
    """Unmount, wait for the daemons, kill those that stay; the command lines of the killed."""
    place = Path(os.path.abspath(mount.path))
    daemons = {*mount.daemons, *mount_daemons(place)}
    connections = {entry.minor for entry in mount_table() if entry.path == place and entry.fstype.startswith("fuse")}
    for _ in range(10):  # a mount over a mount, and not without end
        if not is_mounted(place):
            break
        subprocess.run(["fusermount3", "-uz", place], check=False, timeout=30, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + stop_s
    while any(is_running(pid) for pid in daemons) and time.monotonic() < deadline:
        time.sleep(0.01)
    stubborn = {pid: command_of(pid) for pid in daemons if is_running(pid)}
    if stubborn:
        for pid in stubborn:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        abort_connections(connections)
    return [f"{pid} {command}" for pid, command in stubborn.items()]


def abort_connections(minors: set[int]) -> None:
    """Let every process that waits for one of these FUSE connections go on, with an error. Needs root."""
    if not minors:
        return
    control_mounted = any(entry.path == _FUSE_CONNECTIONS for entry in mount_table())
    if not control_mounted:
        subprocess.run(["mount", "-t", "fusectl", "fusectl", _FUSE_CONNECTIONS], check=True, timeout=30)
    try:
        for minor in minors:
            with contextlib.suppress(FileNotFoundError):
                (_FUSE_CONNECTIONS / str(minor) / "abort").write_text("1")
    finally:
        if not control_mounted:
            subprocess.run(["umount", _FUSE_CONNECTIONS], check=True, timeout=30)
