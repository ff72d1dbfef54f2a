"""Who holds a lock of flock(2), told without taking it: a packer that starts at that moment would give up. Blocking."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_INIT_PID_NAMESPACE = 0xEFFFFFFC  # Linux, include/linux/proc_ns.h: PROC_PID_INIT_INO
# File systems without a block device of their own whose locks are all made on this machine. Those that are not here,
# such as NFS, may have locks of other machines, which no list of ours has.
_LOCAL = frozenset(("bcachefs", "btrfs", "overlay", "ramfs", "tmpfs", "zfs"))


@dataclass(frozen=True, slots=True)
class Locks:
    """The lines of /proc/locks, None where they cannot be read, and whether those of all processes of the machine are
    among them."""

    lines: list[str] | None
    has_all: bool

    @classmethod
    def read(cls) -> Locks:
        """What is locked now."""
        try:
            # Locks of processes in other pid namespaces are not in the list: Linux, fs/locks.c, locks_show.
            has_all = os.stat("/proc/self/ns/pid").st_ino == _INIT_PID_NAMESPACE
            return cls(Path("/proc/locks").read_text().splitlines(), has_all)
        except OSError:  # no /proc
            return cls(None, False)

    def holders(self, path: str) -> list[int] | None:
        """The processes that hold a file's lock, 0 for one whose number is not shown; None when it cannot be told
        whether there are any. Raises: OSError for a file that may not be looked at."""
        try:
            device, fs_type, inode = _identity(path)
        except FileNotFoundError:
            return []
        found = [] if self.lines is None else lock_holders(self.lines, device, inode)
        sees_all = self.has_all and (not device.startswith("00:") or fs_type in _LOCAL)
        return found if found or sees_all else None


def lock_holders(lines: Iterable[str], device: str, inode: int) -> list[int]:
    """The processes that hold a flock on a file, by the lines of /proc/locks; 0 for one that is not shown. `device` as
    in these lines: `fe:00`."""
    found = []
    for line in lines:
        # 1: FLOCK  ADVISORY  WRITE 1635 fe:00:1474573 0 EOF; "->" after the number: it waits
        fields = line.split()
        if len(fields) >= 6 and fields[1] == "FLOCK" and fields[5] == f"{device}:{inode}":
            found.append(max(0, int(fields[4])))
    return found


def _identity(path: str) -> tuple[str, str, int]:
    """Device, type of the file system, inode. The device is that of the mount: stat(2) has another one for the files of
    btrfs, which /proc/locks does not."""
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        about = Path(f"/proc/self/fdinfo/{descriptor}").read_text().split()
        mount_id = about[about.index("mnt_id:") + 1]
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as mounts:
            for line in mounts:
                fields = line.split(" ")
                if fields[0] == mount_id:
                    major, minor = map(int, fields[2].split(":"))
                    return f"{major:02x}:{minor:02x}", fields[fields.index("-") + 1], status.st_ino
    finally:
        os.close(descriptor)
    # Unmounted at that moment.
    return f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", "", status.st_ino
