"""How the payloads of a container are cut into blocks, the unit of what is fetched and kept. Pure.

A block holds the small payloads that begin in one stretch of BLOCK bytes of the container. So the blocks of a container
are the same in every mount and after every restart, and no payload is in two of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from des_format.index import BAD_DATA, BAD_FLAGS, TOMBSTONE, Index
from des_format.layout import EXTERNAL

# At 50 MB/s 128 KiB take under 3 ms, a fraction of a round trip: there is no use in asking for less.
BLOCK = 128 * 1024

# Larger payloads are read in units of their own (desfs.large): they need not fit into the cache as a whole.
LARGE_PAYLOAD = 16 * 1024 * 1024

_NOT_HERE = BAD_DATA | BAD_FLAGS | TOMBSTONE


class Blocks:
    """The blocks of one container, numbered from 0 by their place; those without a payload do not exist.

    Columns, one value a block: `start`, `stop` i64, the bytes of the container that it needs; they ascend and do not
    overlap. Payloads that are large, or share bytes with one before them, are in no block: checking the blocks must not
    cost more than their bytes, whatever a container claims.
    """

    __slots__ = ("_first", "_length", "_number", "_offset", "_rows", "start", "stop")

    def __init__(self, index: Index) -> None:
        length = index.data_length
        inside = (length > 0) & (length <= LARGE_PAYLOAD)
        inside &= (index.state & _NOT_HERE) == 0
        inside &= (index.flags & EXTERNAL) == 0
        inside &= ~_overlapping(index.data_offset, length, inside)
        rows: npt.NDArray[np.uint32] | None = None
        if inside.all():
            offset, length = index.data_offset, index.data_length
        else:
            rows = np.flatnonzero(inside).astype(np.uint32)
            offset, length = index.data_offset[rows], index.data_length[rows]
        self._rows = rows
        self._offset = index.data_offset
        self._length = index.data_length
        number = offset // np.uint64(BLOCK)
        begins = np.ones(len(number), np.bool_)
        begins[1:] = number[1:] != number[:-1]
        first = np.flatnonzero(begins)
        self._number = number[first]
        self._first = np.append(first, len(number))
        self.start: npt.NDArray[np.int64] = offset[first].astype(np.int64)
        ends = (offset + length).astype(np.int64)
        self.stop: npt.NDArray[np.int64] = ends[self._first[1:] - 1]

    def __len__(self) -> int:
        return len(self.start)

    def contains(self, row: int) -> bool:
        """Whether the payload of a row is in a block."""
        if self._rows is None:
            return True
        at = int(self._rows.searchsorted(np.uint32(row)))
        return at < len(self._rows) and int(self._rows[at]) == row

    def contained(self, rows: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        """Those of some rows, ascending, whose payloads are in blocks."""
        return rows if self._rows is None else np.intersect1d(rows, self._rows, assume_unique=True)

    def of(self, offset: int) -> int:
        """The block of a small payload, by the offset of its first byte in the container."""
        return int(self._number.searchsorted(np.uint64(offset // BLOCK)))

    def between(self, start: int, stop: int) -> tuple[int, int]:
        """The blocks [first, last) that have bytes of [start, stop) of the container."""
        first = int(self.stop.searchsorted(start, "right"))
        return first, max(int(self.start.searchsorted(stop)), first)

    def row_at(self, offset: int) -> int | None:
        """The first row that begins at `offset` or behind it."""
        block = max(int(self.start.searchsorted(offset, "right")) - 1, 0)
        for place in range(block, min(block + 2, len(self))):
            rows = self.rows(place, place + 1)
            at = int(self._offset[rows].searchsorted(np.uint64(max(offset, 0))))
            if at < len(rows):
                return int(rows[at])
        return None

    def rows(self, first: int, last: int) -> npt.NDArray[np.uint32]:
        """The rows whose payloads are in the blocks [first, last), ascending."""
        low, high = int(self._first[first]), int(self._first[last])
        if self._rows is not None:
            return self._rows[low:high]
        return np.arange(low, high, dtype=np.uint32)

    def extent_of(self, rows: npt.NDArray[np.uint32]) -> tuple[int, int] | None:
        """From the first to the last byte of the payloads of these rows, ascending, that are in blocks."""
        rows = self.contained(rows)
        if not len(rows):
            return None
        last = int(rows[-1])
        return int(self._offset[int(rows[0])]), int(self._offset[last]) + int(self._length[last])

    def extent(self, first: int, last: int) -> tuple[int, int]:
        """The bytes of the container that hold the blocks [first, last)."""
        return int(self.start[first]), int(self.stop[last - 1])

    def pieces(self, first: int, last: int, *, limit: int, max_gap: int) -> list[tuple[int, int]]:
        """[first, last) in runs that need at most `limit` bytes each (a single block may need more), have no more than
        `max_gap` bytes that nobody wants between two blocks, and are about equally long."""
        gaps = np.flatnonzero(self.start[first + 1 : last] - self.stop[first : max(last - 1, first)] > max_gap)
        edges = [first, *(gaps + (first + 1)).tolist(), last]
        return [piece for low, high in pairwise(edges) for piece in self._cut(low, high, limit)]

    def _cut(self, first: int, last: int, limit: int) -> Iterator[tuple[int, int]]:
        while first < last:
            start, stop = int(self.start[first]), int(self.stop[last - 1])
            goal = start + -(-(stop - start) // -(-(stop - start) // limit))
            # The last block that ends within the goal, rounded up where the limit allows it.
            after = int(self.stop[:last].searchsorted(goal, "right"))
            if after < last and self.stop[after] - start <= limit:
                after += 1
            after = min(max(after, first + 1), last)
            yield first, after
            first = after


def _overlapping(
    offset: npt.NDArray[np.uint64], length: npt.NDArray[np.uint64], inside: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """The rows that begin before all payloads ahead of them have ended."""
    ends = np.where(inside, offset + length, np.uint64(0))
    found = np.zeros(len(offset), np.bool_)
    if len(ends):
        found[1:] = offset[1:] < np.maximum.accumulate(ends)[:-1]
    return found
