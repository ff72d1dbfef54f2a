"""The place where a mount goes: is it there, is it free, is what is mounted there still ours. Blocking, no event
loop."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from desfs import connection
from desfs.errors import DesfsError, UsageError
from desfs.hanging import Call, look

FS_TYPE = "fuse.desfs"
FUSE_CONF = "/etc/fuse.conf"
_UNMOUNT_TIMEOUT_S = 10.0
_LOOK_S = 5.0  # for a live mount to answer


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
    for place, mounted in _mounts():
        if place == path:
            found = mounted
    return found


def _mounts() -> Iterator[tuple[str, Mounted]]:
    """The place and the line of each mount, in the kernel's order: of two at one place the later is on top."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
        for line in lines:
            # Of the blanks, a path has escapes for space, tab and newline alone.
            fields = line.rstrip("\n").split(" ")
            fs_type, source = fields[fields.index("-") + 1 :][:2]
            yield _unescaped(fields[4]), Mounted(int(fields[0]), fields[2], fs_type, _unescaped(source))


def check_mountpoint(path: str) -> str:
    """The mount point as an absolute real path. A dead mount of this program is cleared from it.

    Raises: UsageError naming what is wrong.
    """
    absolute = real_place(path)
    mounted = mounted_at(absolute)
    if mounted is not None and mounted.fs_type == "autofs":
        # An automount unit's, for us to cover. statfs(2) would wait for the mount that we are about to make.
        return absolute
    if mounted is not None and mounted.fs_type.startswith("fuse"):
        what = f"{mounted.source} ({mounted.fs_type}) is mounted there"
        # The kernel may answer stat for a dead daemon, from what it remembers.
        outcomes = look([Call("stat", absolute), Call("statvfs", absolute)], limit_s=_LOOK_S)
        # ECONNABORTED: the daemon is dying right now.
        is_dead = any(outcome.errno in (errno.ENOTCONN, errno.ECONNABORTED) for outcome in outcomes)
        if not all(outcome.answered for outcome in outcomes) and mounted.fs_type == FS_TYPE:
            is_dead = is_dead or cut_orphan(absolute)
        if not is_dead or mounted.fs_type != FS_TYPE:
            how = "" if all(outcome.answered for outcome in outcomes) else f", and does not answer within {_LOOK_S:g} s"
            raise UsageError(f"mount point {path} is busy: {what}{how}")
        if mounted_at(absolute) == mounted:
            unmount(absolute, lazy=True)
        return check_mountpoint(path)
    try:
        status = os.stat(absolute)
    except FileNotFoundError:
        raise UsageError(f"mount point {path} does not exist") from None
    except OSError as error:
        raise UsageError(f"mount point {path}: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"mount point {path} is no directory")
    final = os.path.realpath(absolute)
    return final if final == absolute else check_mountpoint(final)


def lock_mountpoint(path: str) -> int | None:
    """An open file that keeps others from mounting at a checked mount point until it is closed: of several who try at
    a time one wins. None at an automount point, where the kernel lets one in.

    Raises: UsageError when somebody else has mounted there meanwhile, or OSError's reason.
    """
    if mounted_at(path) is not None:
        return None
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # who may not read it may mount there all the same
        return None
    except OSError as error:
        raise UsageError(f"mount point {path}: {error.strerror}") from error
    fcntl.flock(lock, fcntl.LOCK_EX)
    if mounted_at(path) is not None:
        os.close(lock)
        check_mountpoint(path)
        return None
    return lock


def place_of(mount_id: int) -> str | None:
    """Where a mount is now: directories above it may have been renamed. None when it is not there any more, or when
    another one covers it."""
    found = None
    for path, mounted in _mounts():
        if mounted.mount_id == mount_id:
            found = path
    top = None if found is None else mounted_at(found)
    return found if top is not None and top.mount_id == mount_id else None


def real_place(path: str) -> str:
    """The path without symbolic links, but for its last component: that may be a dead mount, which nothing can look
    at."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def unmount(path: str, *, lazy: bool = False, limit_s: float = _UNMOUNT_TIMEOUT_S) -> None:
    """Unmount what is at a path, with fusermount3, which needs no privilege for one's own mount.

    Raises: DesfsError with the tool's message.
    """
    place = real_place(path)
    if mounted_at(place) is None and os.path.islink(place):
        place = os.path.realpath(place)
    if mounted_at(place) is None:
        raise DesfsError(f"{path}: nothing is mounted there")
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", place]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=limit_s, check=False)
    except FileNotFoundError:
        raise DesfsError("fusermount3 is not installed (Debian and Ubuntu: the package fuse3)") from None
    except subprocess.TimeoutExpired:
        raise DesfsError(f"{path}: unmounting takes longer than {limit_s:g} s") from None
    if done.returncode != 0:
        raise DesfsError(f"{path}: {done.stderr.strip() or f'fusermount3 ended with {done.returncode}'}")


def cut_orphan(path: str) -> bool:
    """Make a mount dead that hangs because its daemon was killed and cannot end; whether it was one. Others are left as
    they are. Raises: DesfsError when that is not permitted."""
    place = real_place(path)
    mounted = mounted_at(place)
    if mounted is None or mounted.fs_type != FS_TYPE or not connection.is_orphaned(mounted.device):
        return False
    connection.abort(mounted.device, place)
    return True


def user_allow_other() -> bool:
    """Whether ordinary users may let others use their mounts: fuse.conf, as fusermount3 reads it."""
    try:
        with open(FUSE_CONF, encoding="utf-8", errors="replace") as lines:
            return any(line.partition("#")[0].strip() == "user_allow_other" for line in lines)
    except OSError:  # as fusermount3: none is one without lines
        return False


def _unescaped(field: str) -> str:
    """mountinfo writes space, tab, newline and backslash as octal: Linux, Documentation/filesystems/proc.rst."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
