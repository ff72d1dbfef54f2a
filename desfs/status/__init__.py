"""The state of a mount, a spool or a store, read without changing any of them. Blocking.

What a place is: a URL is a store. A path at which this program is mounted is a mount, one with a packer's `.desfs/` is
a spool, one with containers or a layout is a store. One that is both a spool and a store, or nothing of it, is
refused.

The records are what `desfs status --json` prints, one object, with `--watch` one a line, keys as named here; more may
come, these stay. Sizes are bytes, times seconds.
"""

from __future__ import annotations

from desfs.status.mount import MountStatus, build_mount_status, mount_since, mount_status
from desfs.status.place import NotServed, Place, place_of
from desfs.status.spool import SpoolStatus, expected_wait_s, spool_since, spool_status
from desfs.status.store import DayStatus, StoreStatus, build_store_status, store_since, store_status

__all__ = [
    "DayStatus",
    "MountStatus",
    "NotServed",
    "Place",
    "SpoolStatus",
    "Status",
    "StoreStatus",
    "build_mount_status",
    "build_store_status",
    "expected_wait_s",
    "mount_since",
    "mount_status",
    "place_of",
    "since",
    "spool_since",
    "spool_status",
    "store_since",
    "store_status",
]

Status = MountStatus | SpoolStatus | StoreStatus


def since(now: Status, before: Status | None) -> Status:
    """A record with the rates between two looks at one place; without an earlier one as it is. Pure."""
    if isinstance(now, MountStatus) and isinstance(before, MountStatus):
        return mount_since(now, before)
    if isinstance(now, SpoolStatus) and isinstance(before, SpoolStatus):
        return spool_since(now, before)
    if isinstance(now, StoreStatus) and isinstance(before, StoreStatus):
        return store_since(now, before)
    return now
