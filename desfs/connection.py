"""The kernel's connection to the daemon of a mount: whether anybody will answer it, and how it is cut. Blocking.

A daemon that is killed while the kernel takes a page from it, which a READ has locked, does not end: that thread waits
for an answer which the daemon would have to give, and keeps the connection open (Linux, fs/fuse/dev.c,
fuse_notify_store). The mount hangs then, instead of being dead, until somebody aborts the connection.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

from desfs.errors import DesfsError

_DEVICE = "/dev/fuse"
_ABORT = "/sys/fs/fuse/connections/{}/abort"  # of fusectl, which systemd mounts there; belongs to who has mounted
_SIGKILL = 1 << 8  # of the masks in /proc/PID/status
_TIMEOUT_S = 10.0


def is_orphaned(device: str) -> bool:
    """Whether the processes that hold the connection of a mount were all killed. `device` is the mount's, as in
    mountinfo. False when none is seen: it may belong to another user, run in another container, or the kernel is one
    that does not say who holds what, in the fdinfo of /dev/fuse."""
    holders = [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if _holds(pid, device)]
    return bool(holders) and all(map(_is_killed, holders))


def abort(device: str, place: str) -> None:
    """End all requests of a mount with an error, for good. Raises: DesfsError when that is not permitted."""
    try:
        with open(_ABORT.format(_number(device)), "w", encoding="ascii") as file:
            file.write("1")
    except OSError as error:
        # --force aborts as well, and needs no fusectl, but root.
        command = ["umount", "--no-canonicalize", "--force", "--lazy", "--", place]
        failure = _run(command)
        if failure is not None:
            reason = f"{error.strerror}: {error.filename}; {failure}"
            raise DesfsError(f"{place}: the connection of a dead daemon cannot be aborted: {reason}") from error


def _run(command: list[str]) -> str | None:
    """Why it failed, or None."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip() or f"{command[0]} ended with {done.returncode}"


def _number(device: str) -> str:
    # A connection has the device's number, whose major is 0: Linux, fs/fuse/control.c.
    return device.rpartition(":")[2]


def _holds(pid: int, device: str) -> bool:
    wanted = f"fuse_connection:\t{_number(device)}"
    for folder in _descriptors(pid):
        try:
            for name in os.listdir(folder):
                if os.readlink(f"{folder}/{name}") == _DEVICE:
                    with open(f"{folder}info/{name}", encoding="ascii") as file:
                        if wanted in file.read().splitlines():
                            return True
        except OSError:
            continue  # another user's, or it has ended meanwhile
    return False


def _descriptors(pid: int) -> Iterator[str]:
    """Folders with the open files of a process: of one whose first thread has ended, the other threads have them."""
    yield f"/proc/{pid}/fd"
    if _status(pid).get("State", "").startswith("Z"):
        try:
            threads = os.listdir(f"/proc/{pid}/task")
        except OSError:
            return
        yield from (f"/proc/{pid}/task/{thread}/fd" for thread in threads)


def _is_killed(pid: int) -> bool:
    status = _status(pid)
    pending = int(status.get("SigPnd", "0"), 16) | int(status.get("ShdPnd", "0"), 16)
    return status.get("State", "Z").startswith("Z") or bool(pending & _SIGKILL)


def _status(pid: int) -> dict[str, str]:
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}
    except OSError:
        return {}
