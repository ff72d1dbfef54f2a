"""The entries of several containers as columns, which of them a merge keeps, and the INDEX that they get. Pure.

No Python object per entry, but for the order of paths. Measured with 1,000,000 entries of 20 containers: 1.1 s and
380 MB to plan a copy, INDEX included; 4.6 s and 520 MB to stream them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from des_format.index import BAD_DATA, BAD_META, DUPLICATE, HIDDEN, TOMBSTONE, Index
from des_format.layout import EXTERNAL, NAME_LENGTH, RECORD
from des_format.names import MAX_PATH

_AT_A_TIME = 65_536  # entries: bounds the temporary arrays to some 20 MB
_RECORD_DTYPE = np.dtype(
    [("data_offset", "<u8"), ("data_length", "<u8"), ("meta_offset", "<u8"), ("meta_length", "<u8"), ("flags", "<u4")]
)
assert _RECORD_DTYPE.itemsize == RECORD.size

Rows = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]


class Entries:
    """The rows of some containers, one container behind the other, the oldest first. `source: u32[n]` says whose.

    The other columns are those of `Index`; names are kept as `Index` keeps them, cut behind 4,096 bytes.
    """

    __slots__ = (
        "_hashed_rows",
        "_hashes",
        "data_length",
        "data_offset",
        "flags",
        "meta_length",
        "meta_offset",
        "name_length",
        "name_start",
        "names",
        "source",
        "state",
    )

    def __init__(self, indexes: Sequence[Index]) -> None:
        counts = [index.rows for index in indexes]
        self.source = np.repeat(np.arange(len(indexes), dtype=np.uint32), counts)
        texts = [index.columns()["names"] for index in indexes]
        self.names: npt.NDArray[np.uint8] = np.concatenate(texts) if texts else np.empty(0, np.uint8)
        starts, lengths, hashes, hashed = [], [], [], []
        base_row = base_name = 0
        for index, text in zip(indexes, texts, strict=True):
            offsets = index.name_offset.astype(np.int64)
            starts.append(offsets[:-1] + base_name)
            lengths.append(np.diff(offsets))
            hashes.append(index.hashes[0])
            hashed.append(index.hashes[1].astype(np.int64) + base_row)
            base_row += index.rows
            base_name += len(text)
        self.name_start: Rows = _joined(starts, np.int64)
        self.name_length: Rows = _joined(lengths, np.int64)
        self._hashes: U64 = _joined(hashes, np.uint64)
        self._hashed_rows: Rows = _joined(hashed, np.int64)
        self.state: npt.NDArray[np.uint8] = _joined([index.state for index in indexes], np.uint8)
        self.flags: npt.NDArray[np.uint32] = _joined([index.flags for index in indexes], np.uint32)
        self.data_offset: U64 = _joined([index.data_offset for index in indexes], np.uint64)
        self.data_length: U64 = _joined([index.data_length for index in indexes], np.uint64)
        self.meta_offset: U64 = _joined([index.meta_offset for index in indexes], np.uint64)
        self.meta_length: npt.NDArray[np.uint32] = _joined([index.meta_length for index in indexes], np.uint32)

    def name(self, row: int) -> bytes:
        """The name of a row."""
        start = int(self.name_start[row])
        return self.names[start : start + int(self.name_length[row])].tobytes()

    def has_payload(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Which of some rows have bytes in the DATA of their container."""
        holds: npt.NDArray[np.bool_] = (self.flags[rows] & EXTERNAL) == 0
        holds &= ((self.state[rows] & TOMBSTONE) == 0) & (self.data_length[rows] > np.uint64(0))
        return holds

    def kept(self, *, drop_tombstones: bool) -> Rows:
        """The rows that a merge of these containers has, ascending.

        Of each name the last row of the newest container that has it; a tombstone, with `drop_tombstones`, only where
        one of the containers shows the name: it is there for as long as they are. Names that no reader shows stay.
        """
        order = np.lexsort((self._hashed_rows, self._hashes))
        rows, hashes = self._hashed_rows[order], self._hashes[order]
        pairs = np.flatnonzero(hashes[1:] == hashes[:-1])
        same = self._same_names(rows[pairs], rows[pairs + 1])
        older = np.zeros(len(self.state), np.bool_)
        older[rows[pairs[same]]] = True
        is_live = (self.state & TOMBSTONE) == 0
        needed = np.zeros(len(self.state), np.bool_)  # tombstones of names that an input shows
        begins = np.ones(len(rows), np.bool_)
        begins[pairs[same] + 1] = False
        if len(rows):
            starts = np.flatnonzero(begins)
            shown = np.logical_or.reduceat(is_live[rows], starts)
            needed[rows] = np.repeat(shown, np.diff(np.append(starts, len(rows))))
        for value in set(hashes[pairs[~same]].tolist()):  # names that share a hash: whoever likes can make some
            low, high = np.searchsorted(hashes, value, "left"), np.searchsorted(hashes, value, "right")
            newest: dict[bytes, int] = {}
            for row in rows[low:high].tolist():
                needed[row] = True
                name = self.name(row)
                if name in newest:
                    older[newest[name]] = True
                newest[name] = row
        keep = ((self.state & DUPLICATE) == 0) & ~older
        if drop_tombstones:
            keep &= is_live | needed | ((self.state & HIDDEN) != 0)
        return np.flatnonzero(keep)

    def uncarriable(self, rows: Rows) -> int | None:
        """The first of some rows that cannot be put into another container as it is, or None: its payload or metadata
        is not where the index says, or its name is longer than any that is held."""
        bad = ((self.state[rows] & (BAD_DATA | BAD_META)) != 0) | (self.name_length[rows] > MAX_PATH)
        return int(rows[np.argmax(bad)]) if bad.any() else None

    def in_path_order(self, rows: Rows) -> Rows:
        """Rows directory by directory, a folder's own files before those of its subfolders' names, as the packer lays
        them out; equal names in their order."""
        keys = []
        text = self.names.tobytes()
        starts = self.name_start[rows].tolist()
        for start, length in zip(starts, self.name_length[rows].tolist(), strict=True):
            folder, _, name = text[start : start + length].rpartition(b"/")
            keys.append(folder + b"\0" + name)  # NUL is in no name, and sorts before all that is
        return rows[np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)]

    def build_index(self, rows: Rows, data_offset: U64, meta_offset: U64) -> bytes:
        """The INDEX region of a container with these rows, whose payloads and metadata stand at these offsets."""
        fixed = NAME_LENGTH.size + RECORD.size
        lengths = self.name_length[rows]
        out = np.empty(int(lengths.sum()) + fixed * len(rows), np.uint8)
        at = 0
        for low in range(0, len(rows), _AT_A_TIME):
            piece = rows[low : low + _AT_A_TIME]
            count = len(piece)
            records = np.empty(count, _RECORD_DTYPE)
            records["data_offset"] = data_offset[low : low + count]
            records["data_length"] = self.data_length[piece]
            records["meta_offset"] = meta_offset[low : low + count]
            records["meta_length"] = self.meta_length[piece]
            records["flags"] = self.flags[piece]
            around = np.empty((count, fixed), np.uint8)  # what stands before and behind each name
            name_lengths = lengths[low : low + count]
            around[:, : NAME_LENGTH.size] = name_lengths.astype("<u2").view(np.uint8).reshape(count, NAME_LENGTH.size)
            around[:, NAME_LENGTH.size :] = records.view(np.uint8).reshape(count, RECORD.size)
            widths = np.empty((count, 3), np.int64)
            widths[:, 0], widths[:, 1], widths[:, 2] = NAME_LENGTH.size, name_lengths, RECORD.size
            is_name = np.repeat(np.tile(np.array([False, True, False]), count), widths.ravel())
            view = out[at : at + len(is_name)]
            view[is_name] = self._gather(piece)
            view[~is_name] = around.ravel()
            at += len(is_name)
        return out.tobytes()

    def _gather(self, rows: Rows) -> npt.NDArray[np.uint8]:
        """The names of some rows, one behind the other."""
        lengths = self.name_length[rows]
        begins = np.cumsum(lengths) - lengths
        places: Rows = np.arange(int(lengths.sum())) + np.repeat(self.name_start[rows] - begins, lengths)
        return self.names[places]

    def _same_names(self, one: Rows, other: Rows) -> npt.NDArray[np.bool_]:
        """Whether the names of rows are the same, pair by pair."""
        same: npt.NDArray[np.bool_] = self.name_length[one] == self.name_length[other]
        for low in range(0, len(one), _AT_A_TIME):
            pairs = low + np.flatnonzero(same[low : low + _AT_A_TIME])
            if not len(pairs):
                continue
            lengths = self.name_length[one[pairs]]  # none is 0: such a name is never found
            differs = self._gather(one[pairs]) != self._gather(other[pairs])
            same[pairs] = ~np.logical_or.reduceat(differs, np.cumsum(lengths) - lengths)
        return same


def extents_of(offset: U64, length: U64) -> Iterator[tuple[int, int]]:
    """The half-open ranges that some payloads cover together, ascending; those that touch are one."""
    if not len(offset):
        return
    order = np.argsort(offset, kind="stable")
    starts, stops = offset[order], np.maximum.accumulate(offset[order] + length[order])
    first = np.flatnonzero(np.append(True, starts[1:] > stops[:-1]))
    last = np.append(first[1:], len(starts)) - 1
    yield from zip(starts[first].tolist(), stops[last].tolist(), strict=True)


def _joined(columns: Sequence[npt.NDArray[Any]], kind: type) -> npt.NDArray[Any]:
    return np.concatenate([np.empty(0, kind), *columns])
