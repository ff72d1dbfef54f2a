"""What the kernel is told of files and directories, in plain types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from desfs.inode import InodeNumber


class Attributes(NamedTuple):
    """What stat shows. `mode` has the file type; `timeout_s` is how long the kernel may keep name and attributes."""

    inode: InodeNumber
    mode: int
    size: int
    mtime_ns: int
    timeout_s: float


class EntryPage(NamedTuple):
    """Names of a directory, one behind another, and a column for each of COLUMNS: i64[5, n]. Behind a cookie the
    listing goes on; `mode`, `size` and `mtime_ns` are what stat shows. `timeout_s` holds for all."""

    names: list[bytes]
    columns: npt.NDArray[np.int64]
    timeout_s: float

    @classmethod
    def of(cls, entries: Sequence[tuple[int, bytes, Attributes]]) -> EntryPage:
        """A page of (cookie, name, attributes), at least one, which share their time-out."""
        rows = [(cookie, each.inode, each.mode, each.size, each.mtime_ns) for cookie, _, each in entries]
        timeout_s = min(each.timeout_s for _, _, each in entries)
        return cls([name for _, name, _ in entries], np.array(rows, np.int64).T.copy(), timeout_s)


COLUMNS = ("cookie", "inode", "mode", "size", "mtime_ns")
