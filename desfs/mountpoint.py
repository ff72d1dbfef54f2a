"""The place where a mount goes: is it there, is it free, is what is mounted there still ours. Blocking, no event
loop."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
from dataclasses import dataclass

from desfs.errors import DesfsError, UsageError

FS_TYPE = "fuse.desfs"
_UNMOUNT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Mounted:
    """A line of mountinfo: the mount's id, device, type and source."""

    mount_id: int
    device: str
    fs_type: str
    source: str


def mounted_at(path: str) -> Mounted | None:
    """What is mounted at a path, the topmost if several are. Does not touch the path itself, which may hang."""
    found = None
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.split()
            if _unescaped(fields[4]) == path:
                fs_type, source = fields[fields.index("-") + 1 :][:2]
                found = Mounted(int(fields[0]), fields[2], fs_type, _unescaped(source))
    return found


def check_mountpoint(path: str) -> str:
    """The mount point as an absolute real path. A dead mount of this program is cleared from it.

    Raises: UsageError naming what is wrong.
    """
    absolute = _real(path)
    try:
        status = os.stat(absolute)
        os.statvfs(absolute)  # the kernel may answer stat for a dead daemon, from what it remembers
    except FileNotFoundError:
        raise UsageError(f"mount point {path} does not exist") from None
    except OSError as error:
        mounted = mounted_at(absolute)
        # ECONNABORTED: the daemon is dying right now.
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED) and mounted is not None and mounted.fs_type == FS_TYPE:
            unmount(absolute, lazy=True)
            return check_mountpoint(path)
        raise UsageError(f"mount point {path}: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"mount point {path} is no directory")
    absolute = os.path.realpath(absolute)
    mounted = mounted_at(absolute)
    # autofs is what an automount unit puts there for us to cover; anything else of FUSE is somebody's live mount.
    if mounted is not None and mounted.fs_type.startswith("fuse"):
        raise UsageError(f"mount point {path} is busy: {mounted.source} ({mounted.fs_type}) is mounted there")
    return absolute


def _real(path: str) -> str:
    """The path without symbolic links, but for its last component: that may be a dead mount, which nothing can look
    at."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def unmount(path: str, *, lazy: bool = False) -> None:
    """Unmount what is at a path, with fusermount3, which needs no privilege for one's own mount.

    Raises: DesfsError with the tool's message.
    """
    if mounted_at(_real(path)) is None:
        raise DesfsError(f"{path}: nothing is mounted there")
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", path]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_UNMOUNT_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise DesfsError("fusermount3 is not installed (Debian and Ubuntu: the package fuse3)") from None
    except subprocess.TimeoutExpired:
        raise DesfsError(f"{path}: unmounting takes longer than {_UNMOUNT_TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        raise DesfsError(f"{path}: {done.stderr.strip() or f'fusermount3 ended with {done.returncode}'}")


def _unescaped(field: str) -> str:
    """mountinfo writes space, tab, newline and backslash as octal: Linux, Documentation/filesystems/proc.rst."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
