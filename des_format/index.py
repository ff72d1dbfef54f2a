"""The parsed index of a container: a handful of arrays, no object per file.

Memory per entry, besides its name: offset of the name 4, hash 8, row 4, data offset 8, data length 8, META offset 8,
META length 4, flags 4, state 1: 49 bytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from itertools import pairwise, repeat
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from des_format.errors import CorruptEntry, NoSuchEntry, NotAContainer, UnsupportedEntry
from des_format.layout import DELETED, EXTERNAL, MAX_META, NAME_LENGTH, RECORD, Footer
from des_format.names import MAX_COMPONENT, MAX_PATH, name_problem

_RECORD_DTYPE = np.dtype(
    [("data_offset", "<u8"), ("data_length", "<u8"), ("meta_offset", "<u8"), ("meta_length", "<u8"), ("flags", "<u4")]
)
assert _RECORD_DTYPE.itemsize == RECORD.size
_FIXED = NAME_LENGTH.size + RECORD.size
# At a time: bounds the temporary arrays, which have up to nine bytes for one of a name, to a few dozen MB.
_CHUNK = 1 << 17  # records
_CHUNK_BYTES = 1 << 20  # of their names
# Records whose names have one length are parsed together; fewer would not be worth the dozen array operations.
_RUN = 32
_ONE_BY_ONE = 256  # records, before another run is looked for
_HASHED = 8192  # names: lists of them and of their digests are far larger than they are
_KEPT = MAX_PATH + 1  # bytes of a name: one that is too long for a path is never shown, and its end never looked at
_MAX_FILE = 2**63 - 1  # st_size is signed

# States of a row. A row without HIDDEN, DUPLICATE and DELETED is shown; BAD_FLAGS and BAD_DATA make it unreadable.
HIDDEN = 1  # its name cannot be shown
DUPLICATE = 2  # a later row has the same name
TOMBSTONE = 4  # flag DELETED: hides older entries of the name
BAD_FLAGS = 8  # a flag that this reader does not implement
BAD_DATA = 16  # the payload's range is not inside DATA
BAD_META = 32  # the META range is not inside META, or longer than an entry's may be
NOT_SHOWN = HIDDEN | DUPLICATE | TOMBSTONE

# The columns as they can be kept elsewhere: their types, and their length.
_COLUMNS = {
    "names": (("|u1",), "any"),
    "name_offset": (("<u4", "<u8"), "rows + 1"),
    "state": (("|u1",), "rows"),
    "data_offset": (("<u8",), "rows"),
    "data_length": (("<u8",), "rows"),
    "meta_offset": (("<u8",), "rows"),
    "meta_length": (("<u4",), "rows"),
    "flags": (("<u4",), "rows"),
    "hash": (("<u8",), "found"),
    "hash_row": (("<u4",), "found"),
}

Bytes1 = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.uint32] | npt.NDArray[np.uint64]


class Entry(NamedTuple):
    """One row as the format stores it; offsets are absolute, `meta_length` 0 means no metadata."""

    name: str
    data_offset: int
    data_length: int
    meta_offset: int
    meta_length: int
    flags: int

    @property
    def is_external(self) -> bool:
        return bool(self.flags & EXTERNAL)


class Index:
    """The entries of one container. Rows are numbered in data order: ascending payload offset, external entries where
    the writer put them.

    Columns, all of length `rows`: `data_offset`, `data_length`, `meta_offset` u64, `meta_length` u32, `flags` u32,
    `state` u8 (the bits above); `name_offset` u32 or u64 of length rows + 1 into the names' bytes. `find` searches
    `hash: u64[n] ascending` with `row: u32[n]`, n being the rows that are shown or tombstones.
    """

    __slots__ = (
        "_hash",
        "_hash_row",
        "_names",
        "container",
        "data_length",
        "data_offset",
        "flags",
        "footer",
        "meta_length",
        "meta_offset",
        "name_offset",
        "state",
    )

    def __init__(self, raw: bytes | bytearray | memoryview, footer: Footer, container: str) -> None:
        """Parse the INDEX region `raw` of a container whose footer has been checked; `container` names it in errors.

        Raises: NotAContainer when the records do not fill the region, or are not `file_count`.
        """
        self.container = container
        self.footer = footer
        starts, name_lengths = _record_starts(raw, footer, container)
        records, names = _gather(np.frombuffer(raw, np.uint8), starts, name_lengths)
        del starts
        name_lengths = np.minimum(name_lengths, _KEPT)
        offsets: Offsets = np.zeros(len(name_lengths) + 1, np.dtype(np.uint32 if len(names) < 2**32 else np.uint64))
        np.cumsum(name_lengths, out=offsets[1:])
        state = _states(records, footer)
        state[_unshowable(names, offsets)] |= HIDDEN
        hashes = _hashes(names, offsets)
        state[_older_duplicates(names, offsets, hashes)] |= DUPLICATE
        order = _data_order(records, state)
        if order is not None:
            names, offsets = _permute_names(names, offsets, order)
            records, state, hashes = records[order], state[order], hashes[order]
        self._names: bytes | memoryview = names
        self.name_offset = offsets
        self.state = state
        self.data_offset = records["data_offset"].copy()
        self.data_length = records["data_length"].copy()
        self.meta_offset = records["meta_offset"].copy()
        self.meta_length = np.where(state & BAD_META, 0, records["meta_length"]).astype(np.uint32)
        self.flags = records["flags"].copy()
        del records
        findable = np.flatnonzero((state & (HIDDEN | DUPLICATE)) == 0).astype(np.uint32)
        hashes = hashes[findable]
        by_hash = np.argsort(hashes, kind="stable")
        self._hash = hashes[by_hash]
        self._hash_row = findable[by_hash]

    @classmethod
    def from_columns(cls, columns: Mapping[str, npt.NDArray[Any]], footer: Footer, container: str) -> Index:
        """The index that `columns` were taken from; they are not copied, and may be read-only.

        Raises: ValueError when they cannot be those of an index. That they are right has to be known.
        """
        index = cls.__new__(cls)
        index.container = container
        index.footer = footer
        rows, found = len(columns["state"]), len(columns["hash"])
        for name, (types, length) in _COLUMNS.items():
            column = columns[name]
            wanted = {"rows": rows, "rows + 1": rows + 1, "found": found}.get(length)
            if column.dtype.str not in types or (wanted is not None and len(column) != wanted):
                raise ValueError(f"{container}: column {name}: {len(column)} of {column.dtype}")
            if name not in ("names", "hash", "hash_row"):
                setattr(index, name, column)
        if int(index.name_offset[-1]) != len(columns["names"]):
            raise ValueError(f"{container}: names of {len(columns['names'])} bytes, not {int(index.name_offset[-1])}")
        index._names = columns["names"].data
        index._hash = columns["hash"]
        index._hash_row = columns["hash_row"]
        return index

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """All that `from_columns` needs, besides footer and container. Views, not to be written to."""
        columns: dict[str, npt.NDArray[Any]] = {
            name: getattr(self, name) for name in _COLUMNS if name not in ("names", "hash", "hash_row")
        }
        names = np.frombuffer(self._names, np.uint8)
        return columns | {"names": names, "hash": self._hash, "hash_row": self._hash_row}

    @property
    def rows(self) -> int:
        """All rows, shown or not."""
        return len(self.state)

    @property
    def hashes(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
        """The name table (hash ascending, row): rows that are shown or tombstones. Not to be written to."""
        return self._hash, self._hash_row

    def shown(self) -> npt.NDArray[np.uint32]:
        """The rows whose names a reader shows, ascending, which is data order."""
        return np.flatnonzero((self.state & NOT_SHOWN) == 0).astype(np.uint32)

    def __len__(self) -> int:
        return int(np.count_nonzero((self.state & NOT_SHOWN) == 0))

    def __iter__(self) -> Iterator[str]:
        """The shown names in data order."""
        for row in self.shown().tolist():
            yield self.name(row).decode()

    def __contains__(self, name: str) -> bool:
        row = self.find(name.encode("utf-8", "surrogatepass"))
        return row is not None and not self.state[row] & TOMBSTONE

    def name(self, row: int) -> bytes:
        """The name of a row as it stands in the container."""
        return bytes(self._names[self.name_offset[row] : self.name_offset[row + 1]])

    def names_of(self, rows: npt.NDArray[Any]) -> list[bytes]:
        """The names of some rows, in their order."""
        starts, stops = self.name_offset[rows].tolist(), self.name_offset[rows + 1].tolist()
        names = self._names
        if isinstance(names, memoryview):
            return [bytes(names[start:stop]) for start, stop in zip(starts, stops, strict=True)]
        return [names[start:stop] for start, stop in zip(starts, stops, strict=True)]

    def find(self, name: bytes) -> int | None:
        """The row that decides about `name`: its last one, a tombstone included; None when there is none."""
        wanted = np.uint64(xxhash.xxh3_64_intdigest(name))
        at = int(self._hash.searchsorted(wanted))
        while at < len(self._hash) and self._hash[at] == wanted:
            row = int(self._hash_row[at])
            if self.name(row) == name:
                return row
            at += 1
        return None

    def find_shown(self, name: str) -> int:
        """The row of a name that a reader shows. Raises: NoSuchEntry."""
        row = self.find(name.encode("utf-8", "surrogatepass"))
        if row is None or self.state[row] & TOMBSTONE:
            raise NoSuchEntry(f"{self.container}: no entry {name!r}")
        return row

    def entry(self, row: int) -> Entry:
        """One row as a value; its name must be one that a reader shows."""
        return Entry(
            self.name(row).decode(),
            int(self.data_offset[row]),
            int(self.data_length[row]),
            int(self.meta_offset[row]),
            int(self.meta_length[row]),
            int(self.flags[row]),
        )

    def check_readable(self, row: int) -> None:
        """Raises: UnsupportedEntry for a flag that this reader does not implement; CorruptEntry for a payload that does
        not lie in DATA."""
        state = self.state[row]
        if state & (BAD_FLAGS | BAD_DATA):
            problem = self.problem(row)
            raise (UnsupportedEntry if state & BAD_FLAGS else CorruptEntry)(f"{self.container}: {problem}")

    def problem(self, row: int) -> str | None:
        """What is wrong with a row, for a report; None for a sound one, a tombstone or an overridden duplicate."""
        state = int(self.state[row])
        name = self.name(row)
        label = name[:80].decode("utf-8", "backslashreplace") + ("…" if len(name) > 80 else "")
        if state & HIDDEN:
            return f"entry {row} {label!r}: not shown: {name_problem(name)}"
        if state & (DUPLICATE | TOMBSTONE):
            return None
        if state & BAD_FLAGS:
            return f"entry {row} {label!r}: flags: found {int(self.flags[row]):#x}, want no flag but {EXTERNAL:#x}"
        if state & BAD_DATA:
            start, length = int(self.data_offset[row]), int(self.data_length[row])
            stop = self.footer.data_start + self.footer.data_length
            return (
                f"entry {row} {label!r}: payload: found bytes {start} to {start + length}, "
                f"want them in DATA ({self.footer.data_start} to {stop})"
            )
        if state & BAD_META:
            return (
                f"entry {row} {label!r}: metadata at byte {int(self.meta_offset[row])} is not inside META "
                f"({self.footer.meta_start} to {self.footer.meta_start + self.footer.meta_length}) or too long"
            )
        return None

    def problem_rows(self) -> npt.NDArray[np.int64]:
        """The rows that `problem` has something to say about."""
        bad = (self.state & (HIDDEN | BAD_FLAGS | BAD_DATA | BAD_META)) != 0
        silent = ((self.state & (DUPLICATE | TOMBSTONE)) != 0) & ((self.state & HIDDEN) == 0)
        return np.flatnonzero(bad & ~silent)


def _record_starts(
    raw: bytes | bytearray | memoryview, footer: Footer, container: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where each record begins, relative to the region, and the length of its name."""
    found = array("q")
    append = found.append
    position, last = 0, len(raw) - _FIXED
    ahead = _RUN
    while position <= last and len(found) < footer.file_count:
        run = _equal_records(raw, position, min(footer.file_count - len(found), ahead))
        # Farther with every success: what is looked at in vain is in proportion to what was found.
        ahead = min(ahead * 8, _CHUNK) if run == ahead else _RUN
        if run >= _RUN:
            length = _FIXED + (raw[position] | raw[position + 1] << 8)
            found.frombytes(np.arange(position, position + run * length, length, dtype=np.int64).tobytes())
            position += run * length
            continue
        for _ in repeat(None, min(footer.file_count - len(found), _ONE_BY_ONE)):
            if position > last:
                break
            append(position)
            position += _FIXED + (raw[position] | raw[position + 1] << 8)
    if len(found) < footer.file_count or position != len(raw):
        raise NotAContainer(
            f"{container}: INDEX at byte {footer.index_start}: found {len(found)} records that end at byte "
            f"{footer.index_start + position}, want {footer.file_count} that end at {footer.index_start + len(raw)}"
        )
    append(position)
    bounds = np.frombuffer(found, np.int64)
    return bounds[:-1], np.diff(bounds) - _FIXED


def _equal_records(raw: bytes | bytearray | memoryview, position: int, limit: int) -> int:
    """How many records, from the one at `position` on, have names as long as its own."""
    length = _FIXED + (raw[position] | raw[position + 1] << 8)
    count = min((len(raw) - _FIXED - position) // length + 1, limit)
    lengths: npt.NDArray[np.uint16] = np.ndarray((count,), "<u2", raw, position, (length,))
    same = lengths == lengths[0]
    return count if same.all() else int(same.argmin())


def _runs(lengths: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Row ranges of names of one length; none if they are too short to be treated as a whole each."""
    changes = np.flatnonzero(lengths[1:] != lengths[:-1]) + 1
    return list(pairwise([0, *changes.tolist(), len(lengths)])) if len(changes) * _RUN <= len(lengths) else []


def _gather(
    raw: Bytes1, starts: npt.NDArray[np.int64], name_lengths: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.void], bytes]:
    """The fixed parts of all records as one structured array, and all names in one piece, cut at `_KEPT` bytes."""
    count = len(starts)
    records = np.empty(count, _RECORD_DTYPE)
    if count == 0:
        return records, b""
    # A view with a stride of one byte: element i is the record whose fixed part begins at byte i. Without the fields,
    # which numpy would copy one by one.
    fixed = f"V{RECORD.size}"
    anywhere: npt.NDArray[np.void] = np.ndarray((len(raw) - RECORD.size + 1,), fixed, raw.data, strides=(1,))
    names = []
    for low, high in _chunks(np.append(starts, len(raw))):
        begin, lengths = starts[low:high], name_lengths[low:high]
        records.view(fixed)[low:high] = anywhere[begin + NAME_LENGTH.size + lengths]
        if runs := _runs(lengths):
            for first, stop in runs:
                size = _FIXED + int(lengths[first])
                table = raw[begin[first] :][: (stop - first) * size].reshape(-1, size)
                names.append(table[:, NAME_LENGTH.size : -RECORD.size][:, :_KEPT].tobytes())
            continue
        kept = np.minimum(lengths, _KEPT)
        widths = np.empty((high - low, 3), np.int64)
        widths[:, 0], widths[:, 1], widths[:, 2] = NAME_LENGTH.size, kept, lengths - kept + RECORD.size
        is_name = np.repeat(np.tile(np.array([False, True, False]), high - low), widths.ravel())
        names.append(raw[begin[0] : begin[0] + len(is_name)][is_name].tobytes())
    return records, b"".join(names)


def _chunks(bounds: npt.NDArray[Any], most: int = _CHUNK) -> Iterator[tuple[int, int]]:
    """Row ranges of at most `most` rows and, but for a single row, `_CHUNK_BYTES` bytes; row i has the bytes from
    bounds[i] to bounds[i + 1]."""
    low, count = 0, len(bounds) - 1
    while low < count:
        fitting = int(np.searchsorted(bounds, int(bounds[low]) + _CHUNK_BYTES, "right")) - 1
        high = max(min(fitting, low + most, count), low + 1)
        yield low, high
        low = high


def _states(records: npt.NDArray[np.void], footer: Footer) -> Bytes1:
    """BAD_FLAGS, TOMBSTONE, BAD_DATA and BAD_META of each row."""
    flags = records["flags"]
    state = np.zeros(len(records), np.uint8)
    deleted = (flags & DELETED) != 0
    state[deleted] |= TOMBSTONE
    state[~deleted & ((flags & ~np.uint32(EXTERNAL)) != 0)] |= BAD_FLAGS
    external = (flags & EXTERNAL) != 0
    start, length = records["data_offset"], records["data_length"]
    # An empty payload lies everywhere. The rest is written so that nothing wraps at 64 bits.
    stop = np.uint64(footer.data_start + footer.data_length)
    inside = (start >= np.uint64(footer.data_start)) & (start <= stop) & (length <= stop - np.minimum(start, stop))
    inside |= length == 0
    state[~deleted & np.where(external, length > np.uint64(_MAX_FILE), ~inside)] |= BAD_DATA
    start, length = records["meta_offset"], records["meta_length"]
    stop = np.uint64(footer.meta_start + footer.meta_length)
    inside = (start >= np.uint64(footer.meta_start)) & (start <= stop) & (length <= stop - np.minimum(start, stop))
    state[(length != 0) & (~inside | (length > np.uint64(MAX_META)))] |= BAD_META
    return state


def _hashes(names: bytes, offsets: Offsets) -> npt.NDArray[np.uint64]:
    digest = xxhash.xxh3_64_digest
    hashes = np.empty(len(offsets) - 1, np.uint64)
    for low, high in _chunks(offsets, _HASHED):
        bounds = offsets[low : high + 1].astype(np.int64)
        lengths = np.diff(bounds)
        digests: list[bytes] = []
        for first, stop in _runs(lengths) if lengths.all() else []:
            # Element i of the array is a name: all are cut out at once.
            piece = names[bounds[first] : bounds[stop]]
            digests += map(digest, np.frombuffer(piece, f"V{lengths[first]}").tolist())
        if not digests:
            digests = [digest(names[start:stop]) for start, stop in pairwise(bounds.tolist())]
        hashes[low:high] = np.frombuffer(b"".join(digests), ">u8")  # the canonical form of a digest
    return hashes


def _unshowable(names: bytes, offsets: Offsets) -> list[int]:
    """The rows with names that a reader never shows."""
    rows: list[int] = []
    for low, high in _chunks(offsets):
        bounds = offsets[low : high + 1].astype(np.int64)
        piece = names[bounds[0] : bounds[-1]]
        bounds -= bounds[0]
        for row in _suspects(piece, bounds[:-1], bounds[1:]):
            if name_problem(piece[bounds[row] : bounds[row + 1]]) is not None:
                rows.append(low + row)  # noqa: PERF401 - a name is cut out once
    return rows


def _suspects(names: bytes, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> list[int]:
    """The rows with names that look odd in a scan of all bytes, to be checked one by one: all that cannot be shown, and
    more."""
    raw = np.frombuffer(names, np.uint8)
    lengths = stops - starts
    suspects = [np.flatnonzero((lengths == 0) | (lengths > MAX_COMPONENT))]
    if len(raw):
        real = np.flatnonzero(lengths > 0)
        begins_component = np.zeros(len(raw), np.bool_)
        begins_component[1:] = raw[:-1] == ord("/")
        begins_component[starts[real]] = True
        odd = (raw == 0) | (begins_component & ((raw == ord("/")) | (raw == ord("."))))
        odd[stops[real] - 1] |= raw[stops[real] - 1] == ord("/")
        try:
            names.decode("utf-8")
            # Sound as a whole. Where a name begins with a continuation byte, it and the name before share a character.
            shared = np.flatnonzero((raw[starts[real]] & 0xC0) == 0x80)
            suspects += [real[shared], real[shared - 1]]
        except UnicodeDecodeError:
            odd |= raw >= 0x80
        suspects.append(np.searchsorted(starts, np.flatnonzero(odd), "right") - 1)
    rows: list[int] = _unique(np.concatenate(suspects)).tolist()
    return rows


def _unique(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Ascending, each once. NumPy's own imports all of numpy.ma when it is called first: 6 ms, in which somebody waits
    for his first listing (measured)."""
    rows = np.sort(rows)
    once: npt.NDArray[np.int64] = rows[np.append(True, rows[1:] != rows[:-1])[: len(rows)]]
    return once


def _older_duplicates(names: bytes, offsets: Offsets, hashes: npt.NDArray[np.uint64]) -> list[int]:
    """The rows whose name stands again in a later row."""
    order = np.argsort(hashes, kind="stable")
    ascending = hashes[order]
    equal = np.flatnonzero(ascending[1:] == ascending[:-1])
    older: list[int] = []
    latest: dict[bytes, int] = {}
    rows = _unique(np.concatenate([order[equal], order[equal + 1]]))
    for low in range(0, len(rows), _CHUNK):
        piece = rows[low : low + _CHUNK]
        bounds = zip(offsets[piece].tolist(), offsets[piece + 1].tolist(), strict=True)
        for row, (start, stop) in zip(piece.tolist(), bounds, strict=True):
            name = names[start:stop]
            if name in latest:
                older.append(latest[name])
            latest[name] = row
    return older


def _data_order(records: npt.NDArray[np.void], state: Bytes1) -> npt.NDArray[np.int64] | None:
    """The permutation that puts the rows in the order of their payloads; None if they are. Rows without a payload in
    DATA stay behind their predecessor."""
    placed = (
        ((records["flags"] & EXTERNAL) == 0) & ((state & (TOMBSTONE | BAD_DATA)) == 0) & (records["data_length"] > 0)
    )
    position = np.where(placed, np.arange(len(records)), 0)
    np.maximum.accumulate(position, out=position)
    key = np.where(placed[position], records["data_offset"][position], 0) if len(records) else position
    if len(records) < 2 or bool(np.all(key[1:] >= key[:-1])):
        return None
    return np.argsort(key, kind="stable")


def _permute_names(names: bytes, offsets: Offsets, order: npt.NDArray[np.int64]) -> tuple[bytes, Offsets]:
    bounds = offsets.tolist()
    moved = b"".join(names[bounds[row] : bounds[row + 1]] for row in order.tolist())
    lengths = np.diff(offsets.astype(np.int64))[order]
    permuted = np.zeros_like(offsets)
    np.cumsum(lengths, out=permuted[1:])
    return moved, permuted
