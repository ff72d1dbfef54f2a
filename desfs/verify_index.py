"""What index and metadata of one container say, for those who compare it with the bytes. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from des_format.blocks import META_KEY
from des_format.codec import decode_meta
from des_format.errors import CorruptMeta
from des_format.index import BAD_DATA, BAD_FLAGS, BAD_META, DUPLICATE, HIDDEN, NOT_SHOWN, TOMBSTONE, Index
from des_format.layout import EXTERNAL
from des_format.meta import MetaColumns
from des_format.names import MAX_PATH, name_problem
from des_format.shards import ContainerKey
from desfs.layout import Layout

Kind = Literal["damage", "warning", "unverified"]
Rows = npt.NDArray[np.int64]

_DIGEST = sha256().digest_size
_EMPTY_SHA256 = sha256().digest()
_HEX = b"0123456789abcdef"
# Bytes of damaged metadata that are looked at to say what is wrong with it. Beyond that it is damaged all the same:
# entries may share their metadata, and a million that share 10 MiB would take days.
_MAX_EXPLAINED = 64 * 1024 * 1024
# Payloads may share their bytes. Those that go on beyond so many times the DATA region are not compared: a container
# whose ranges overlap without end would cost any amount of time.
_MAX_OVERLAP = 4


class Problem(NamedTuple):
    """What is wrong with a row; `offset` is a byte of the container, None where the record alone is wrong."""

    kind: Kind
    row: int
    offset: int | None
    text: str


def entry_label(name: bytes) -> str:
    """A name as text; bytes that are no UTF-8 as `\\xNN`."""
    return name.decode("utf-8", "backslashreplace")


def index_problems(index: Index) -> Iterator[Problem]:
    """What is wrong with names, flags and ranges. Tombstones have none; other rows that a later one overrides have."""
    state = index.state
    for row in np.flatnonzero(state & HIDDEN).tolist():
        name = index.name(row)
        yield Problem("damage" if _is_no_name(name) else "warning", row, None, f"is never shown: {name_problem(name)}")
    live = (state & TOMBSTONE) == 0
    for row in np.flatnonzero(live & ((state & BAD_FLAGS) != 0)).tolist():
        yield Problem("damage", row, None, f"flags: found {int(index.flags[row]):#x}, want none but {EXTERNAL:#x}")
    footer = index.footer
    for row in np.flatnonzero(live & ((state & BAD_DATA) != 0)).tolist():
        start, length = int(index.data_offset[row]), int(index.data_length[row])
        if index.flags[row] & EXTERNAL:
            yield Problem("damage", row, None, f"external payload: found {length} bytes, more than a file can have")
        else:
            stop = footer.data_start + footer.data_length
            yield Problem(
                "damage",
                row,
                start,
                f"payload: found bytes {start} to {start + length}, want them in DATA ({footer.data_start} to {stop})",
            )
    for row in np.flatnonzero(live & ((state & BAD_META) != 0)).tolist():
        start, stop = int(index.meta_offset[row]), footer.meta_start + footer.meta_length
        yield Problem(
            "damage",
            row,
            start,
            f"metadata at byte {start}: is not inside META ({footer.meta_start} to {stop}), or too long",
        )


def _is_no_name(name: bytes) -> bool:
    """Names are UTF-8 and not empty. Others that are never shown can be those of a store of another kind."""
    if len(name) > MAX_PATH:  # the index holds no more of it
        return False
    try:
        return not name.decode("utf-8")
    except UnicodeDecodeError:
        return True


def misplaced(index: Index, key: ContainerKey, layout: Layout) -> Iterator[Problem]:
    """The rows whose names the layout puts into another shard than that of their container; none in one that is no hex
    shard's."""
    if not layout.is_known or not key.group.startswith("x") or key.group[1:].strip(_HEX.decode()):
        return
    of_folder: dict[bytes, str | None] = {}
    rows = index.shown()
    for row, name in zip(rows.tolist(), index.names_of(rows), strict=True):
        folder, slash, _ = name.rpartition(b"/")
        if not slash:
            group = layout.group_of(name.decode())
        elif folder in of_folder:
            group = of_folder[folder]
        else:
            group = of_folder[folder] = layout.group_of(name.decode())
        if group is not None and group != key.group:
            yield Problem(
                "warning",
                row,
                None,
                f"is in shard {key.group[1:]}, but the layout has it in {group[1:]}: a lookup finds it only after all "
                "indexes of its day were read",
            )


def payload_rows(index: Index) -> Rows:
    """The rows with a payload in DATA that can be read, in data order; empty ones are nowhere."""
    sound = (index.state & (TOMBSTONE | BAD_FLAGS | BAD_DATA)) == 0
    return np.flatnonzero(sound & ((index.flags & EXTERNAL) == 0) & (index.data_length > 0))


def external_rows(index: Index) -> Rows:
    """The rows with an external payload that a reader reads: a row that is overridden may have had its object's place
    taken by its successor's."""
    sound = (index.state & (NOT_SHOWN | BAD_FLAGS | BAD_DATA)) == 0
    return np.flatnonzero(sound & ((index.flags & EXTERNAL) != 0))


def overridden_external_rows(index: Index) -> Rows:
    """The rows with an external payload that a later one of the same name hides."""
    hidden = (index.state & (NOT_SHOWN | BAD_FLAGS)) == DUPLICATE
    return np.flatnonzero(hidden & ((index.flags & EXTERNAL) != 0))


def extents(index: Index, rows: Rows) -> tuple[Rows, Rows]:
    """First byte and end of the payloads of rows that lie in DATA."""
    starts = index.data_offset[rows].astype(np.int64)
    return starts, starts + index.data_length[rows].astype(np.int64)


def overlapping(index: Index, rows: Rows) -> Iterator[Problem]:
    """Rows, in data order, whose payload shares a part of its bytes with an earlier one. Payloads that are the same
    bytes are stored once on purpose; the format allows the others too, but nobody writes them."""
    starts, stops = extents(index, rows)
    reach = np.maximum.accumulate(stops)
    same = (starts[1:] == starts[:-1]) & (stops[1:] == stops[:-1])
    for place in (np.flatnonzero((starts[1:] < reach[:-1]) & ~same) + 1).tolist():
        start, stop = int(starts[place]), int(stops[place])
        yield Problem(
            "warning", int(rows[place]), start, f"payload: bytes {start} to {stop} are in part those of another entry"
        )


def affordable(index: Index, rows: Rows) -> int:
    """How many of the rows, in data order, are to be compared with their bytes."""
    starts, stops = extents(index, rows)
    new = np.ones(len(rows), np.bool_)
    new[1:] = (starts[1:] != starts[:-1]) | (stops[1:] != stops[:-1])
    # As floats: the sum may be beyond 64 bits.
    work = np.cumsum(np.where(new, (stops - starts).astype(np.float64), 0.0))
    return int(np.searchsorted(work, float(_MAX_OVERLAP * index.footer.data_length), "right"))


class _Keys(msgspec.Struct):
    sha256: msgspec.Raw = msgspec.Raw()


_decoder = msgspec.json.Decoder(_Keys)


class Checksums:
    """All checksums that the metadata of a container's rows has, and which metadata is damaged.

    `meta` as the mount has it; `has_sha256: bool[rows]`.
    """

    def __init__(self, index: Index, found: Callable[[Problem], None]) -> None:
        """`found` is told of each damaged metadata, once."""
        self._index = index
        self._found = found
        self.meta = MetaColumns(index.rows)
        self.has_sha256: npt.NDArray[np.bool_] = np.zeros(index.rows, np.bool_)
        self._told: npt.NDArray[np.bool_] = np.zeros(index.rows, np.bool_)
        self._sha256 = bytearray(_DIGEST * index.rows)
        self._left = _MAX_EXPLAINED

    def fill(self, raw: bytes, start: int) -> None:
        """Decode the rows whose META lies in `raw`, which begins at byte `start` of the container."""
        index = self._index
        self.meta.fill(index, raw, start)
        view = memoryview(raw)
        offsets, lengths = index.meta_offset, index.meta_length
        stop = np.uint64(start + len(raw))
        here = (lengths > 0) & (offsets >= np.uint64(start)) & (offsets + lengths <= stop)
        rows = np.flatnonzero(here & ((index.state & TOMBSTONE) == 0))
        decoded: tuple[int, int] | None = None
        digest: bytes | None = None
        for row, at, length, damaged in zip(
            rows.tolist(),
            (offsets[rows] - np.uint64(start)).tolist(),
            lengths[rows].tolist(),
            self.meta.damaged[rows].tolist(),
            strict=True,
        ):
            if damaged:
                if not self._told[row]:
                    self._told[row] = True
                    self._found(self._explain(row, view[at : at + length]))
                continue
            if decoded != (at, length):
                decoded = (at, length)
                digest = _sha256_of(view[at : at + length])
            if digest is not None:
                self.has_sha256[row] = True
                self._sha256[row * _DIGEST : (row + 1) * _DIGEST] = digest

    def has_any(self) -> npt.NDArray[np.bool_]:
        """The rows with a checksum of the whole payload."""
        return self.meta.has_crc32c | self.has_sha256

    def wanted_crc32c(self, rows: Rows) -> npt.NDArray[np.int64]:
        """The CRC-32C of rows, -1 where there is none."""
        return np.where(self.meta.has_crc32c[rows], self.meta.crc32c[rows].astype(np.int64), -1)

    def wanted_sha256(self, row: int) -> bytes:
        """The SHA-256 of a row that has one."""
        return bytes(self._sha256[row * _DIGEST : (row + 1) * _DIGEST])

    def mismatch(self, row: int, crc32c: int | None, digest: bytes | None) -> str | None:
        """What to say of a payload with these checksums; None for one of which nothing is known to be wrong, and in
        the place of a checksum that was not taken."""
        if crc32c is not None and self.meta.has_crc32c[row] and crc32c != int(self.meta.crc32c[row]):
            return f"found a crc32c of {crc32c:08x}, want {int(self.meta.crc32c[row]):08x}"
        if digest is not None and self.has_sha256[row] and digest != self.wanted_sha256(row):
            return f"found a sha256 of {digest.hex()}, want {self.wanted_sha256(row).hex()}"
        return None

    def empty_mismatches(self) -> Iterator[Problem]:
        """The rows in DATA whose payload is empty, and whose checksum is not that of nothing."""
        index = self._index
        plain = (index.state & (TOMBSTONE | BAD_FLAGS)) == 0
        plain &= (index.flags & EXTERNAL) == 0
        for row in np.flatnonzero(plain & (index.data_length == 0) & self.has_any()).tolist():
            text = self.mismatch(row, 0, _EMPTY_SHA256)
            if text is not None:
                yield Problem("damage", row, int(index.data_offset[row]), f"payload of no bytes: {text}")

    def without(self) -> int:
        """How many of the rows that a reader shows have no checksum at all, and sound metadata."""
        index = self._index
        shown = (index.state & (NOT_SHOWN | BAD_FLAGS | BAD_DATA | BAD_META)) == 0
        missing = shown & ~self.has_any() & ~self.meta.damaged
        return int(np.count_nonzero(missing)) - sum(bool(missing[row]) for row in self.meta.external_blocks)

    def _explain(self, row: int, view: memoryview) -> Problem:
        """Say what is wrong with the metadata of a row. Readers serve the bytes all the same, so it is damage only
        where a checksum went with it: nobody can tell any more whether they are right."""
        index = self._index
        offset, size = int(index.meta_offset[row]), int(index.data_length[row])
        if len(view) > self._left:
            return Problem("damage", row, offset, f"metadata at byte {offset}: damaged")
        self._left -= len(view)
        raw = bytes(view)
        try:
            meta = decode_meta(raw, size, f"metadata at byte {offset}")
        except CorruptMeta as error:
            text = str(error)
        else:
            form = f"{META_KEY} that do not fit {size} bytes" if META_KEY in meta else "a form that readers do not take"
            text = f"metadata at byte {offset}: found {form}"
        lost = b'"crc32c' in raw or b'"sha256"' in raw
        return Problem("damage" if lost else "warning", row, offset, f"{text}; its checksum is lost" if lost else text)


def _sha256_of(raw: memoryview) -> bytes | None:
    """The digest in one entry's metadata, if it has one of the form that the format gives it."""
    value = bytes(_decoder.decode(raw).sha256)
    if len(value) != 2 * _DIGEST + 2 or value[:1] != b'"' or value[1:-1].strip(_HEX):
        return None
    return bytes.fromhex(value[1:-1].decode("ascii"))
