"""Which kind of place somebody asks about, told without hanging on it. Blocking, for a bounded time."""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from des_format.shards import CONTAINER_SUFFIX, is_day
from desfs.errors import DesfsError, UsageError
from desfs.hanging import Call, look
from desfs.layout import LAYOUT_KEY
from desfs.mountpoint import FS_TYPE, Mounted, mounted_at, real_place
from desfs.spool import INTERNAL

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
# What a packer makes before anything else in its spool: desfs.spool.
_SPOOL_MARKS = ("claims", "workers")


class NotServed(DesfsError):
    """A mount whose daemon has ended, or does not answer, or that somebody has unmounted meanwhile; `state` is "dead",
    "hung" or "gone"."""

    def __init__(self, message: str, state: str) -> None:
        super().__init__(message)
        self.state = state


@dataclass(frozen=True, slots=True)
class Place:
    """What was asked about. `kind`: "mount", "spool" or "store"; `path` is absolute, of a store its URL as given."""

    kind: str
    path: str
    mounted: Mounted | None = None


def place_of(text: str, *, limit_s: float) -> Place:
    """What is at a path or a URL. Raises: UsageError when that cannot be told; DesfsError for a path that cannot be
    looked at."""
    if _URL.match(text):
        return Place("store", text)
    path = os.path.abspath(text)
    (above,) = look([Call("stat", os.path.dirname(path))], limit_s=limit_s)
    if above.value is not None:
        path = real_place(path)
    mounted = mounted_at(path)
    if mounted is None and above.value is not None and os.path.islink(path):
        path = real_place(os.path.join(os.path.dirname(path), os.readlink(path)))
        mounted = mounted_at(path)
    if mounted is not None and mounted.fs_type == FS_TYPE:
        return Place("mount", path, mounted)
    itself, inside, *marks = look(
        [
            Call("stat", path),
            Call("names", path),
            *(Call("stat", os.path.join(path, INTERNAL, mark)) for mark in _SPOOL_MARKS),
        ],
        limit_s=limit_s,
    )
    if itself.value is None:
        if itself.errno == errno.ENOENT:
            raise UsageError(f"{text}: no such directory")
        raise DesfsError(f"{text}: {itself.reason}")
    if not stat.S_ISDIR(itself.value[0]):
        raise UsageError(f"{text} is no directory")
    if inside.value is None:
        raise DesfsError(f"{text}: {inside.reason}")
    is_spool = all(mark.value is not None and stat.S_ISDIR(mark.value[0]) for mark in marks)
    if is_spool and LAYOUT_KEY in inside.value:
        raise UsageError(
            f"{text} has {INTERNAL}/ as a spool has, and {LAYOUT_KEY} as a store has: write {Path(path).as_uri()} for "
            "the store"
        )
    if is_spool:
        return Place("spool", path)
    if any(each == LAYOUT_KEY or each.endswith(CONTAINER_SUFFIX) or is_day(each) for each in inside.value):
        return Place("store", path)
    raise UsageError(
        f"{text}: nothing of desfs is mounted there, and it is no spool (no {INTERNAL}/claims) and no store (no "
        f"{LAYOUT_KEY}, no days, no containers)"
    )
