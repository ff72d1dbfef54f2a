"""The folders of a container: which paths there are, and the rows that stand in each. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from des_format.index import Index

Rows = npt.NDArray[np.uint32]

_ROWS_AT_A_TIME = 4096  # that a loop over names has in memory


class SortedFolders:
    """A set of folder paths that knows all the directories above them."""

    def __init__(self, paths: Iterable[bytes]) -> None:
        # NUL sorts before every byte of a name and stands in none: a folder's subtree is one run behind it.
        self._keys = sorted(path.replace(b"/", b"\0") for path in paths)

    def __len__(self) -> int:
        """Folders that files stand in directly."""
        return len(self._keys)

    def __contains__(self, path: bytes) -> bool:
        if not path:
            return bool(self._keys)
        key = path.replace(b"/", b"\0")
        at = bisect_left(self._keys, key)
        return at < len(self._keys) and (self._keys[at] == key or self._keys[at].startswith(key + b"\0"))

    def children(self, path: bytes) -> list[bytes]:
        """The names of the directories directly in `path`, ascending."""
        prefix = path.replace(b"/", b"\0") + b"\0" if path else b""
        found = []
        at = bisect_left(self._keys, prefix)
        if not path and at < len(self._keys) and not self._keys[at]:
            at += 1  # the day itself
        while at < len(self._keys) and self._keys[at].startswith(prefix):
            child = self._keys[at][len(prefix) :].partition(b"\0")[0]
            found.append(child)
            at = bisect_left(self._keys, prefix + child + b"\x01", at)  # behind the child's own subtree
        return found


class Folders:
    """Which shown rows of an index stand directly in which folder (b"" is the day itself); rows in data order."""

    def __init__(self, index: Index) -> None:
        shown = index.shown()
        names = index.columns()["names"]
        group_of: dict[bytes, int] = {}
        grouped = np.empty(len(shown), np.uint32)
        for first in range(0, len(shown), _ROWS_AT_A_TIME):
            piece = shown[first : first + _ROWS_AT_A_TIME]
            starts = index.name_offset[piece].astype(np.int64)
            lengths, heads = _runs(names, starts, index.name_offset[piece + 1].astype(np.int64))
            places = zip(starts[heads].tolist(), (starts + lengths)[heads].tolist(), strict=True)
            groups = [group_of.setdefault(names[low:high].tobytes(), len(group_of)) for low, high in places]
            grouped[first : first + len(piece)] = np.repeat(groups, np.diff(np.append(heads, len(piece))))
        self._group_of = group_of
        self._starts = np.zeros(len(group_of) + 1, np.int64)
        np.cumsum(np.bincount(grouped, minlength=len(group_of)), out=self._starts[1:])
        # Mostly all rows are shown, and folder by folder: then a row's number says where it is, and there are no rows.
        in_order = len(shown) == index.rows and bool(np.all(grouped[1:] >= grouped[:-1]))
        self._rows: Rows = shown[:0] if in_order else shown[np.argsort(grouped, kind="stable")]
        self.sorted = SortedFolders(group_of)

    @classmethod
    def from_columns(cls, paths: Sequence[bytes], rows: Rows, starts: npt.NDArray[np.int64]) -> Folders:
        """What `columns` gave; the arrays are not copied. Raises: ValueError when they do not fit together."""
        if len(starts) != len(paths) + 1 or len(rows) not in (0, int(starts[-1])):
            raise ValueError(f"{len(paths)} folders of {len(rows)} rows with {len(starts)} bounds")
        folders = cls.__new__(cls)
        folders._group_of = {path: group for group, path in enumerate(paths)}
        folders._rows = rows
        folders._starts = starts
        folders.sorted = SortedFolders(folders._group_of)
        return folders

    def columns(self) -> tuple[list[bytes], Rows, npt.NDArray[np.int64]]:
        """(paths, rows: u32[shown], starts: i64[paths + 1]): the rows of a folder are from its start to the next. No
        rows: each is its own place."""
        return list(self._group_of), self._rows, self._starts

    def paths(self) -> Iterator[bytes]:
        """Every folder that a file stands in directly."""
        return iter(self._group_of)

    def count(self, folder: bytes) -> int:
        """How many rows are directly in a folder; 0 for an unknown one."""
        group = self._group_of.get(folder)
        return 0 if group is None else int(self._starts[group + 1] - self._starts[group])

    def rows(self, folder: bytes, first: int = 0, count: int | None = None) -> Rows:
        """The rows directly in a folder, ascending: all, or `count` of them from the place `first` on."""
        group = self._group_of.get(folder)
        if group is None:
            return np.empty(0, np.uint32)
        start, stop = int(self._starts[group]) + first, int(self._starts[group + 1])
        if count is not None:
            stop = min(stop, start + count)
        return self._rows[start:stop] if len(self._rows) else np.arange(start, stop, dtype=np.uint32)


def _runs(
    names: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """How long the folder is that each of some ascending names begins with, and where another one begins than that of
    the name before."""
    low, high = int(starts[0]), int(stops[-1])
    piece = names[low:high]
    starts, stops = starts - low, stops - low
    slashes = np.append(-1, np.flatnonzero(piece == ord("/")))
    lengths = np.maximum(slashes[np.searchsorted(slashes, stops) - 1] - starts, 0)
    differs = np.append(True, lengths[1:] != lengths[:-1])
    # Eight bytes at a time, of those folders that are as long as the one before and equal so far.
    words = words_of(piece)
    rows, done = np.flatnonzero(~differs & (lengths > 0)), 0
    while len(rows):
        beyond = np.maximum(done + 8 - lengths[rows], 0).astype(np.uint64) * np.uint64(8)
        differs[rows] = (words[starts[rows] + done] ^ words[starts[rows - 1] + done]) << beyond != 0
        done += 8
        rows = rows[~differs[rows] & (lengths[rows] > done)]
    return lengths, np.flatnonzero(differs)


def words_of(names: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Element i is the eight bytes from byte i on, with zeros behind the last."""
    padded = np.append(names, np.zeros(8, np.uint8))
    return np.ndarray((len(padded) - 7,), "<u8", padded.data, strides=(1,))
