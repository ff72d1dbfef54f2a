"""Making one container out of several, and putting it in their place. Asyncio; the bytes move in threads.

The protocol of one merge, under the lease of its shard. The catalog's commit is the commit: it makes the new container
live and its inputs superseded at once.

    died before   the next run finds                  and does
    begin         inputs                              merges them
    PUT           inputs, row `uploading`             merges them: the key follows from them, the row is taken over
    commit        inputs, row, object                 merges them, finds the object, compares it, commits it; one that
                                                      is not what it would put is deleted, and put again
    delete        container, superseded rows, inputs  deletes these when their grace has passed (collect.py)

Another object under the key can only be a dead upload: no other key is ever put again, and it is deleted only while the
row is `uploading` under the token of a lease that was renewed a moment before.

What is verified before the commit. Streamed: each payload against the checksum in its metadata, as it is read, and of
the object its size, INDEX and FOOTER. Copied by the store: size, INDEX and FOOTER too, and the first and last bytes of
each range that was copied; the store read each range of one version of its source (If-Match). In both cases the index
is parsed, and every range in it has to lie where it should.

What is *not* guaranteed: that a process which is stopped between that renewal and its DELETE for longer than the lease
lives does not delete what its successor has put there. The inputs are there for the grace period, then.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import IO

import numpy as np

from assignment.catalog import Catalog, ContainerRecord, ContainerState, Lease
from assignment.errors import LeaseLost
from des_format.checksum import crc32c
from des_format.codec import build_footer, build_header, check_size, parse_footer, parse_header
from des_format.errors import CorruptEntry, NotAContainer
from des_format.index import BAD_DATA, BAD_META, Index
from des_format.layout import EXTERNAL, FOOTER, HEADER, Footer
from des_format.meta import MetaColumns
from des_format.source import open_container
from desfs.adoption import content_at
from desfs.container import StoreSource, meta_pieces, tail_length
from desfs.errors import DesfsError, NoSuchObject, ObjectExists, ObjectReplaced, StoreError
from desfs.merging.plan import Merge
from desfs.merging.rows import U64, Entries, Rows, extents_of
from desfs.store.base import CopyRange, ObjectInfo
from desfs.store.multipart import MIN_PART, length_of
from desfs.store.retrying import Retrying

Effect = Callable[[str], None]

# Inputs that are smaller on average pass through this process: S3 copies nothing that is below the size of a part.
COPIED_FROM = MIN_PART
# More than this is copied all the same: what is streamed stands in the directory for temporary files, twice.
_MOST_STREAMED = 1 << 30
_DEAD_FRACTION = 5  # dead bytes are dropped when they are more than a fifth of DATA
_AT_A_TIME = 8  # GETs: inputs are many and small, and each costs its round trip
_PIECE = 8 << 20
_BUFFER = 1 << 20
_ROWS_AT_A_TIME = 65_536
_SAMPLE = 512  # bytes of each end of a copied range
_TRIES = 3  # to put a container where dead uploads come in
_SHARED_META = 1024  # bytes; longer metadata that several entries share is written once


class MergeRefused(DesfsError):
    """A container cannot be merged with others without losing something, and is left as it is: `key`."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(f"{key}: not merged: {why}")
        self.key = key


class MergeFailed(DesfsError):
    """What the store has is not what was put: nothing was committed."""


@dataclass(frozen=True, slots=True)
class Merged:
    """A container that was put in the place of others: its `size` in bytes, `files` entries, `copied` by the store or
    streamed through this process."""

    object_key: str
    inputs: tuple[str, ...]
    size: int
    files: int
    copied: bool


@dataclass(slots=True)
class Built:
    """A container that has not been put yet: `pieces` to be copied, or a whole `file`. `index` is its INDEX region."""

    footer: Footer
    index: bytes
    pieces: list[bytes | CopyRange] = field(default_factory=list)
    file: IO[bytes] | None = None

    @property
    def size(self) -> int:
        """Bytes of the object."""
        return self.footer.index_start + self.footer.index_length + FOOTER.size

    @property
    def path(self) -> Path:
        """The file, which has no name."""
        assert self.file is not None
        return Path(f"/proc/self/fd/{self.file.fileno()}")

    def put(self, store: Retrying, key: str) -> None:
        """Store it. Blocking. Raises: ObjectExists; StoreError."""
        if self.file is None:
            store.copy_ranges(key, self.pieces)
        else:
            store.put(key, self.path)

    def is_at(self, store: Retrying, key: str) -> bool:
        """Whether the object there is this container. Blocking. Raises: StoreError."""
        try:
            if self.file is not None:
                return store.etag_if_holds(key, self.path) is not None
            check_stored(store, key, self)
        except (MergeFailed, NoSuchObject):
            return False
        return True


async def merge_containers(
    store: Retrying,
    catalog: Catalog,
    lease: Lease,
    merge: Merge,
    *,
    drop_tombstones: bool,
    ttl_s: float,
    effect: Effect,
) -> Merged:
    """Carry a merge out, and commit it. `drop_tombstones` where nothing older than the inputs can have their names;
    `ttl_s` is the lease's.

    Raises: MergeRefused, and has written nothing; MergeFailed; StoreError; AssignmentError; OSError of the directory
    for temporary files. A call that is cancelled is like one that died.
    """
    key = merge.object_key
    with ExitStack() as stack:
        built = await asyncio.to_thread(build, store, merge.inputs, drop_tombstones=drop_tombstones, stack=stack)
        effect(f"begin {key}")
        await catalog.begin_container(lease, key, merge.generation)
        await _put(store, catalog, lease, merge, built, ttl_s, effect)
        etag = await asyncio.to_thread(check_stored, store, key, built)
        record = ContainerRecord(
            object_key=key,
            day=lease.day,
            shard=lease.shard,
            generation=merge.generation,
            size=built.size,
            files=built.footer.file_count,
            etag=etag,
            state=merge.state,
        )
        inputs = tuple(each.object_key for each in merge.inputs)
        effect(f"commit {key}")
        await catalog.commit_container(lease, record, supersedes=inputs)
    return Merged(key, inputs, record.size, record.files, copied=built.file is None)


async def _put(
    store: Retrying, catalog: Catalog, lease: Lease, merge: Merge, built: Built, ttl_s: float, effect: Effect
) -> None:
    key = merge.object_key
    for _ in range(_TRIES):
        effect(f"put {key}")
        try:
            await asyncio.to_thread(built.put, store, key)
            return
        except ObjectExists:
            if await asyncio.to_thread(built.is_at, store, key):
                return
        row = await catalog.find_container(key)
        is_ours = row is not None and row.state is ContainerState.UPLOADING and row.token == lease.token
        if row is None or not is_ours or await catalog.renew(lease, ttl_s) is None:
            raise LeaseLost(f"{key}: another one puts it")
        if await content_at(store, row, merge.inputs) is not None:
            raise MergeFailed(f"{key}: holds what is nowhere else: it was put by somebody without this catalog")
        effect(f"delete {key}")
        await asyncio.to_thread(store.delete, key)
    raise StoreError(f"{key}: found another object there {_TRIES} times")


# --- building --------------------------------------------------------------------------------------------------------


def build(
    store: Retrying,
    inputs: Sequence[ContainerRecord],
    *,
    drop_tombstones: bool,
    stack: ExitStack,
    copied_from: int = COPIED_FROM,
) -> Built:
    """The container that holds the newest version of each entry of the inputs, which are in order, the oldest first.
    Blocking. Temporary files, which have no names, are closed with `stack`.

    Inputs of `copied_from` bytes on average and more, or of more than 1 GiB in all, are copied by the store: their DATA
    as it is, and in its order, dead bytes included, unless these are more than a fifth. Others are read, and laid out
    by paths. The same inputs give the same bytes.

    Raises: MergeRefused; StoreError; OSError.
    """
    total = sum(record.size for record in inputs)
    if total >= copied_from * len(inputs) or total > _MOST_STREAMED:
        with ThreadPoolExecutor(_AT_A_TIME, "open") as threads:
            indexes = list(threads.map(lambda record: _open(store, record), inputs))
        footers = [index.footer for index in indexes]
        entries = Entries(indexes)
        del indexes  # twice the columns are much, for a million entries
        rows = _kept(entries, inputs, drop_tombstones)
        ranges = _plan_ranges(entries, rows, footers, copied_from)
        if ranges is not None:
            return _copied(inputs, footers, entries, rows, ranges)
        del entries, rows
    return _streamed(store, inputs, drop_tombstones, stack)


def check_stored(store: Retrying, key: str, built: Built) -> str:
    """Compare a stored container with what was meant, see above; its ETag. Blocking.

    Raises: MergeFailed; NoSuchObject; StoreError.
    """
    length = len(built.index)
    tail = store.get_tail(key, length + FOOTER.size)
    data = memoryview(tail.data)
    is_meant = tail.size == built.size and data[:length] == built.index and data[length:] == build_footer(built.footer)
    if not is_meant:
        raise MergeFailed(f"{key}: found {tail.size} bytes, want {built.size} that end in the index that was put")
    try:
        index = Index(built.index, parse_footer(data[length:], tail.size, key), key)
    except NotAContainer as error:
        raise MergeFailed(str(error)) from error
    if (index.state & (BAD_DATA | BAD_META)).any():
        raise MergeFailed(f"{key}: the index points outside of its container")
    at = 0
    samples: list[tuple[int, CopyRange]] = []
    for piece in built.pieces:
        if isinstance(piece, CopyRange) and piece.start < piece.stop:
            for start in {piece.start, max(piece.start, piece.stop - _SAMPLE)}:
                stop = min(start + _SAMPLE, piece.stop)
                samples.append((at + start - piece.start, CopyRange(piece.key, start, stop, piece.etag)))
        at += length_of(piece)

    def is_same(sample: tuple[int, CopyRange]) -> bool:
        start, source = sample
        found = store.get_range(key, start, start + length_of(source), if_match=tail.etag)
        return bytes(found.data) == _read(store, source)

    with ThreadPoolExecutor(_AT_A_TIME, "compare") as threads:
        for sample, same in zip(samples, threads.map(is_same, samples), strict=True):
            if not same:
                raise MergeFailed(f"{key}: byte {sample[0]} is not what was copied from {sample[1].key}")
    return tail.etag


def _read(store: Retrying, piece: CopyRange) -> bytes:
    return bytes(store.get_range(piece.key, piece.start, piece.stop, if_match=piece.etag).data)


@contextmanager
def _refusing(key: str) -> Iterator[None]:
    """What is wrong with one input, as the refusal to merge it."""
    try:
        yield
    except (NotAContainer, CorruptEntry) as error:
        raise MergeRefused(key, str(error)) from error
    except (NoSuchObject, ObjectReplaced) as error:
        raise MergeRefused(key, f"the catalog has another object than the store: {error}") from error


def _open(store: Retrying, record: ContainerRecord) -> Index:
    info = ObjectInfo(record.object_key, record.size, record.etag, 0)
    with _refusing(record.object_key):
        # META is not needed, so that no more of it is read than what stands in the tail.
        return open_container(StoreSource(store, info), tail_length=tail_length(info.size), max_meta=0).index


def _kept(entries: Entries, inputs: Sequence[ContainerRecord], drop_tombstones: bool) -> Rows:
    rows = entries.kept(drop_tombstones=drop_tombstones)
    bad = entries.uncarriable(rows)
    if bad is not None:
        key = inputs[int(entries.source[bad])].object_key
        raise MergeRefused(key, f"entry {entries.name(bad)[:80]!r} is damaged, or its name is too long")
    return rows


# --- copied by the store ---------------------------------------------------------------------------------------------

_Ranges = list[list[tuple[int, int]]]  # of each input, what is copied of its DATA


def _plan_ranges(entries: Entries, rows: Rows, footers: Sequence[Footer], copied_from: int) -> _Ranges | None:
    """What to copy: each DATA region as it is, or only what is alive where much is dead; None where that is in pieces
    too small for it."""
    payloads = rows[entries.has_payload(rows)]
    sources = entries.source[payloads]
    alive: _Ranges = []
    for number in range(len(footers)):
        own = payloads[sources == number]
        alive.append(list(extents_of(entries.data_offset[own], entries.data_length[own])))
    whole = sum(footer.data_length for footer in footers)
    living = sum(stop - start for ranges in alive for start, stop in ranges)
    if (whole - living) * _DEAD_FRACTION <= whole:
        return [
            [(footer.data_start, footer.data_start + footer.data_length)] if footer.data_length else []
            for footer in footers
        ]
    return alive if living >= copied_from * sum(map(len, alive)) else None


def _copied(
    inputs: Sequence[ContainerRecord], footers: Sequence[Footer], entries: Entries, rows: Rows, ranges: _Ranges
) -> Built:
    pieces: list[bytes | CopyRange] = [build_header()]
    position = HEADER.size
    data_offset = np.zeros(len(rows), np.uint64)
    has_payload = entries.has_payload(rows)
    sources = entries.source[rows]
    for number, (record, own) in enumerate(zip(inputs, ranges, strict=True)):
        starts, targets = [], []
        for start, stop in own:
            if position == start == HEADER.size:
                pieces = [CopyRange(record.object_key, 0, stop, record.etag)]  # the header comes with it
            else:
                pieces.append(CopyRange(record.object_key, start, stop, record.etag))
            starts.append(start)
            targets.append(position)
            position += stop - start
        mine = np.flatnonzero((sources == number) & has_payload)
        if len(mine):
            offsets = entries.data_offset[rows[mine]]
            at = np.searchsorted(np.array(starts, np.uint64), offsets, "right") - 1
            data_offset[mine] = np.array(targets, np.uint64)[at] + offsets - np.array(starts, np.uint64)[at]
    data_length = position - HEADER.size
    meta_start = position
    meta_offset = np.full(len(rows), meta_start, np.uint64)
    for number, (record, own_footer) in enumerate(zip(inputs, footers, strict=True)):
        start, length = own_footer.meta_start, own_footer.meta_length
        mine = np.flatnonzero((sources == number) & (entries.meta_length[rows] > 0))
        meta_offset[mine] = entries.meta_offset[rows[mine]] - np.uint64(start) + np.uint64(position)
        pieces.append(CopyRange(record.object_key, start, start + length, record.etag))
        position += length
    raw = entries.build_index(rows, _placed(entries, rows, data_offset), meta_offset)
    footer = Footer(HEADER.size, data_length, meta_start, position - meta_start, position, len(raw), len(rows))
    return Built(footer, raw, [*pieces, raw, build_footer(footer)])


def _placed(entries: Entries, rows: Rows, data_offset: U64) -> U64:
    """The offsets of payloads, and of rows that have none in DATA: what an external one has, or where DATA begins."""
    without = np.where((entries.flags[rows] & EXTERNAL) != 0, entries.data_offset[rows], np.uint64(HEADER.size))
    return np.where(entries.has_payload(rows), data_offset, without)


# --- streamed --------------------------------------------------------------------------------------------------------


def _streamed(store: Retrying, inputs: Sequence[ContainerRecord], drop_tombstones: bool, stack: ExitStack) -> Built:
    bases = [0, *accumulate(record.size for record in inputs)]
    copy, target, meta_file = (stack.enter_context(_temporary()) for _ in range(3))
    with ThreadPoolExecutor(_AT_A_TIME, "download") as threads:
        list(threads.map(lambda record, base: _download(store, record, copy.fileno(), base), inputs, bases))
    view = memoryview(mmap.mmap(copy.fileno(), bases[-1], access=mmap.ACCESS_READ))
    containers = [_Local(record, view[base : base + record.size]) for record, base in zip(inputs, bases, strict=False)]
    entries = Entries([each.index for each in containers])
    rows = entries.in_path_order(_kept(entries, inputs, drop_tombstones))
    has_payload = entries.has_payload(rows)
    if int(entries.data_length[rows[has_payload]].sum()) > 2 * bases[-1]:
        raise MergeRefused(inputs[0].object_key, "its entries, or those of its neighbours, share their payloads")
    first_row = [0, *accumulate(each.index.rows for each in containers)]
    target.write(build_header())
    data_at, meta_at = HEADER.size, 0
    data_offset, meta_offset = array("Q"), array("Q")
    shared: dict[tuple[int, int, int], int] = {}
    for low in range(0, len(rows), _ROWS_AT_A_TIME):
        piece = rows[low : low + _ROWS_AT_A_TIME]
        for row, number, holds, meta_from, meta_length in zip(
            piece.tolist(),
            entries.source[piece].tolist(),
            has_payload[low : low + _ROWS_AT_A_TIME].tolist(),
            entries.meta_offset[piece].tolist(),
            entries.meta_length[piece].tolist(),
            strict=True,
        ):
            container = containers[number]
            data_offset.append(data_at)
            if holds:
                payload = container.payload(row - first_row[number])
                target.write(payload)
                data_at += len(payload)
            known = shared.get((number, meta_from, meta_length)) if meta_length > _SHARED_META else None
            meta_offset.append(meta_at if known is None else known)
            if known is None:
                if meta_length > _SHARED_META:
                    shared[number, meta_from, meta_length] = meta_at
                meta_file.write(container.raw[meta_from : meta_from + meta_length])
                meta_at += meta_length
    meta_file.seek(0)
    shutil.copyfileobj(meta_file, target, _PIECE)
    metas = np.frombuffer(meta_offset, np.uint64) + np.uint64(data_at)
    raw = entries.build_index(rows, _placed(entries, rows, np.frombuffer(data_offset, np.uint64)), metas)
    footer = Footer(HEADER.size, data_at - HEADER.size, data_at, meta_at, data_at + meta_at, len(raw), len(rows))
    target.write(raw)
    target.write(build_footer(footer))
    target.flush()
    return Built(footer, raw, file=target)


def _temporary() -> IO[bytes]:
    """A file without a name, which is gone when it is closed, or its process ends."""
    return tempfile.TemporaryFile(buffering=_BUFFER)


def _download(store: Retrying, record: ContainerRecord, target: int, base: int) -> None:
    """Write an object to a place in a file."""
    with _refusing(record.object_key):
        for start in range(0, record.size, _PIECE):
            data = memoryview(
                _read(store, CopyRange(record.object_key, start, min(start + _PIECE, record.size), record.etag))
            )
            at = base + start
            while data:
                written = os.pwrite(target, data, at)
                data, at = data[written:], at + written


class _Local:
    """A container whose bytes are here; `index` and the payloads, each checked when it is asked for."""

    def __init__(self, record: ContainerRecord, raw: memoryview) -> None:
        """Raises: MergeRefused."""
        self.raw = raw
        self._key = record.object_key
        with _refusing(self._key):
            check_size(len(raw), self._key)
            parse_header(raw[: HEADER.size], self._key)
            footer = parse_footer(raw[-FOOTER.size :], len(raw), self._key)
            region = raw[footer.index_start : footer.index_start + footer.index_length]
            self.index = Index(bytes(region), footer, self._key)
        self._meta = MetaColumns(self.index.rows)
        for start, stop in meta_pieces(self.index):
            self._meta.fill(self.index, bytes(raw[start:stop]), start)
        self._has_crc32c = self._meta.has_crc32c.tolist()

    def payload(self, row: int) -> memoryview:
        """The bytes of a row. Raises: MergeRefused."""
        start = int(self.index.data_offset[row])
        payload = self.raw[start : start + int(self.index.data_length[row])]
        if self._has_crc32c[row] and crc32c(payload) == self._meta.crc32c[row]:
            return payload
        with _refusing(self._key):
            self._meta.verify(self.index, row, payload)
        return payload
