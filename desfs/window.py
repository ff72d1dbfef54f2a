"""How much to fetch around a read. Pure."""

from __future__ import annotations

from des_format.index import BAD_DATA, BAD_FLAGS, TOMBSTONE, Index
from des_format.layout import EXTERNAL

NEIGHBOURHOOD = 128 * 1024  # bytes: at 50 MB/s under 3 ms, a fraction of a round trip
_UNFETCHABLE = BAD_DATA | BAD_FLAGS | TOMBSTONE


def neighbourhood(index: Index, row: int, limit: int = NEIGHBOURHOOD) -> range:
    """The rows to fetch when `row` is read: itself and those right behind it in DATA, `limit` bytes together at most.

    Rows are in data order, so they are one range of bytes; a row whose payload is not there ends it.
    """
    start = int(index.data_offset[row])
    end = start + int(index.data_length[row])
    last = row + 1
    while last < index.rows:
        offset, length = int(index.data_offset[last]), int(index.data_length[last])
        if index.state[last] & _UNFETCHABLE or index.flags[last] & EXTERNAL:
            break
        if offset < end or offset + length - start > limit:
            break
        end = offset + length
        last += 1
    return range(row, last)
