"""Blocks of objects on disk: survives restarts and kill -9, shared by processes. Blocking; any thread.

A version of an object is kept in segments of 64 MiB, each two files: `.data`, sparse, with each block at its natural
place (its start in the object less the segment's), and `.rec`, to which a record per block is appended once the block's
bytes are written. Nothing is ever synced, and no order of writes is relied on: a record says where its block is and has
a checksum of its bytes, a second checksum covers the record, and both are seeded with the identity of the version.

    the system died, a file was torn, cut, swapped or changed   what does not match its checksum is a miss
    the disk filled in the middle of a record                   the next one is put at the next multiple of their size
    two processes write one block at once                       they write the same bytes; a record twice does no harm
    another process removed the segment                         its files are cut and unlinked: misses, until a put

The checksums (XXH3) find damage; they are no protection against somebody who can write to the folder, whence its mode.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from itertools import groupby
from struct import Struct
from typing import Any, NamedTuple

import xxhash

from desfs import metrics
from desfs.cache_folder import BLOCKS, CacheFolder, disk_size
from desfs.problems import Problems

Buffer = bytes | bytearray | memoryview

SEGMENT = 64 * 1024 * 1024  # bytes of an object in one pair of files: what is evicted at a time
_RECORD = Struct("<QQ16sQ")  # start and stop in the object, XXH3-128 of the bytes, XXH3-64 of the fields before
_FIELDS = _RECORD.size - 8
_OPEN_SEGMENTS = 128  # with two descriptors each; a process has 1,024 unless somebody allows it more
_MAX_RECORDS = 16 * 1024 * 1024  # bytes of them in a segment that are looked at
_RUN = 8 * 1024 * 1024  # bytes read at a time
_BLOCKS_AT_A_TIME = 256  # written by one system call, which takes 1,024
_TOUCH_S = 60.0  # how exactly the time of last use is kept
_HITS = metrics.CACHE_REQUESTS.labels("disk", "block", "hit")
_MISSES = metrics.CACHE_REQUESTS.labels("disk", "block", "miss")
_READ = metrics.DISK_CACHE_BYTES.labels("block", "read")
_DAMAGED = metrics.DISK_CACHE_ERRORS.labels("damaged")
_WRITTEN = metrics.DISK_CACHE_BYTES.labels("block", "written")


class ObjectVersion(NamedTuple):
    """One version of an object of a store: what a block is of."""

    store_url: str
    key: str
    etag: str


class _Piece(NamedTuple):
    """A block as a record has it."""

    segment: _Segment
    start: int
    stop: int
    checksum: bytes


class _Segment:
    """An open pair of files and what its records say. `lock` is for `blocks` and `parsed`; the descriptors are closed
    when the last thread that uses the object lets go of it."""

    __slots__ = ("blocks", "data", "lock", "number", "parsed", "records", "seed", "touched_at", "writable")

    def __init__(self, data: int, records: int, number: int, seed: int, writable: bool) -> None:
        self.data = data
        self.records = records
        self.number = number
        self.seed = seed
        self.writable = writable
        self.lock = threading.Lock()
        self.blocks: dict[int, tuple[int, bytes]] = {}  # start -> stop, checksum
        self.parsed = 0  # bytes of the records' file
        self.touched_at = -_TOUCH_S

    def __del__(self) -> None:
        os.close(self.data)
        os.close(self.records)

    def refresh(self) -> bool:
        """Take in the records that were appended since the last time; False when the files were removed."""
        status = os.fstat(self.records)
        if not status.st_nlink or not os.fstat(self.data).st_nlink:
            return False
        with self.lock:
            if status.st_size < self.parsed:
                self.parsed = 0  # somebody has cut it
            size = (min(status.st_size, _MAX_RECORDS) - self.parsed) // _RECORD.size * _RECORD.size
            if size > 0:
                raw = os.pread(self.records, size, self.parsed)
                raw = raw[: len(raw) // _RECORD.size * _RECORD.size]
                self.blocks.update(_parse_records(raw, self.number, self.seed))
                self.parsed += len(raw)
        return True

    def drop(self, start: int, checksum: bytes) -> None:
        """Forget a block that does not match its checksum."""
        with self.lock:
            if self.blocks.get(start, (0, b""))[1] == checksum:
                del self.blocks[start]

    def add(self, blocks: dict[int, tuple[int, bytes]]) -> None:
        """Note blocks that were written and recorded."""
        with self.lock:
            self.blocks.update(blocks)

    def append(self, records: bytes) -> None:
        """Append records, behind what a full disk may have left of one."""
        torn = os.fstat(self.records).st_size % _RECORD.size
        _write_all(os.write(self.records, bytes(-torn % _RECORD.size) + records), -torn % _RECORD.size + len(records))


class DiskCache:
    """A bounded cache of blocks in a folder. Never raises for a fault of the disk: what cannot be had is a miss, what
    cannot be kept is let go."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        max_bytes: int,
        *,
        problems: Problems | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_bytes` is what the files may take on disk. Raises: UsageError, see CacheFolder."""
        self.folder = CacheFolder(folder, max_bytes, problems=problems, clock=clock)
        self._clock = clock
        self._lock = threading.Lock()
        self._segments: OrderedDict[tuple[str, int], _Segment] = OrderedDict()

    def get(self, version: ObjectVersion, start: int, stop: int) -> bytes | None:
        """The bytes [start, stop) of a version, where they are exactly one kept block, or adjacent ones."""
        return self.get_many(version, [(start, stop)])[0]

    def get_many(self, version: ObjectVersion, bounds: Sequence[tuple[int, int]]) -> list[bytes | None]:
        """As get, for several ranges; those that adjoin are read at once."""
        found: list[bytes | None] = [None] * len(bounds)
        if self.folder.readable():
            try:
                if self._read(version, bounds, found):
                    self._read(version, bounds, found)
            except OSError as error:
                self.folder.failed("read", error)
        hits = [block for block in found if block is not None]
        _HITS.inc(len(hits))
        _MISSES.inc(len(bounds) - len(hits))
        _READ.inc(sum(map(len, hits)))
        return found

    def put(self, version: ObjectVersion, blocks: Sequence[tuple[int, int, Buffer]]) -> None:
        """Keep the blocks (start, stop, bytes) of a version, if the cache can; older ones make room."""
        for start, stop, data in blocks:
            if not 0 <= start < stop or len(data) != stop - start:
                raise ValueError(f"{version.key}: a block from {start} to {stop} has {len(data)} bytes")
        size = sum(stop - start for start, stop, _ in blocks)
        if not blocks or not self.folder.admits(disk_size(size) + disk_size(_RECORD.size * len(blocks))):
            return
        ascending = sorted(blocks, key=lambda block: block[:2])
        try:
            for number, share in groupby(ascending, key=lambda block: block[0] // SEGMENT):
                self._write(version, number, list(share))
        except OSError as error:
            self.folder.failed("write", error)
            return
        self.folder.succeeded()
        _WRITTEN.inc(size)

    def state(self) -> dict[str, Any]:
        """For the statistics."""
        return self.folder.state() | {"open_segments": len(self._segments)}

    # --- reading ---

    def _read(self, version: ObjectVersion, bounds: Sequence[tuple[int, int]], found: list[bytes | None]) -> bool:
        """Look for what has not been found; True when that showed that a segment was removed: it may be there anew."""
        current: dict[int, _Segment | None] = {}  # the segments that were looked at, with all their records
        chains = [
            self._chain(version, start, stop, current) if block is None else []
            for (start, stop), block in zip(bounds, found, strict=True)
        ]
        runs = list(_runs(piece for chain in chains for piece in chain))
        contents = [_read_run(run) for run in runs]
        run_of = {piece[1:3]: number for number, run in enumerate(runs) for piece in run}
        for place, chain in enumerate(chains):
            if not chain or not all(piece[1:3] in contents[run_of[piece[1:3]]].good for piece in chain):
                continue
            parts = []
            for number, pieces in groupby(chain, key=lambda piece: run_of[piece[1:3]]):
                share = list(pieces)
                parts.append(contents[number].cut(share[0].start, share[-1].stop))
            found[place] = parts[0] if len(parts) == 1 else b"".join(parts)
        removed = {run[0].segment for run, content in zip(runs, contents, strict=True) if content.removed}
        for segment in removed:
            self._forget(version, segment)
        return bool(removed)

    def _chain(
        self, version: ObjectVersion, start: int, stop: int, current: dict[int, _Segment | None]
    ) -> list[_Piece]:
        """The kept blocks that are [start, stop) together; none if there are no such blocks."""
        chain: list[_Piece] = []
        at = start
        while at < stop:
            number = at // SEGMENT
            segment = current[number] if number in current else self._segment(version, number)
            block = segment.blocks.get(at) if segment is not None else None
            if block is None and number not in current:
                segment = current[number] = self._refreshed(version, number, segment)
                block = segment.blocks.get(at) if segment is not None else None
            if segment is None or block is None or block[0] > stop:
                return []
            chain.append(_Piece(segment, at, *block))
            at = block[0]
        return chain

    def _refreshed(self, version: ObjectVersion, number: int, segment: _Segment | None) -> _Segment | None:
        """The segment with all its records; None when there is none."""
        if segment is not None and not segment.refresh():
            self._forget(version, segment)
            segment = self._segment(version, number)
            if segment is not None and not segment.refresh():
                return None
        return segment

    # --- writing ---

    def _write(self, version: ObjectVersion, number: int, blocks: list[tuple[int, int, Buffer]]) -> None:
        segment = self._writable_segment(version, number)
        records: list[bytes] = []
        fresh: dict[int, tuple[int, bytes]] = {}
        run: list[tuple[int, int, Buffer]] = []
        for block in blocks:
            start, stop, data = block
            checksum = xxhash.xxh3_128_digest(data, segment.seed)
            if run and (run[-1][1] != start or len(run) == _BLOCKS_AT_A_TIME):
                _write_run(segment, run)
                run = []
            run.append(block)
            records.append(_build_record(start, stop, checksum, segment.seed))
            fresh[start] = (stop, checksum)
        _write_run(segment, run)
        segment.append(b"".join(records))
        segment.add(fresh)

    def _writable_segment(self, version: ObjectVersion, number: int) -> _Segment:
        segment = self._segment(version, number, create=True)
        if segment is not None and (not segment.writable or not segment.refresh()):
            self._forget(version, segment)
            segment = self._segment(version, number, create=True)
        assert segment is not None
        return segment

    # --- open segments ---

    def _segment(self, version: ObjectVersion, number: int, *, create: bool = False) -> _Segment | None:
        """The open segment, opened if it is there, or made with `create`. Raises: OSError."""
        digest, seed = identity(version)
        with self._lock:
            segment = self._segments.get((digest, number))
            if segment is not None:
                self._segments.move_to_end((digest, number))
        if segment is None:
            segment = self._opened(f"{digest}-{number:x}", number, seed, create)
            if segment is None:
                return None
            segment.refresh()
            with self._lock:
                segment = self._segments.setdefault((digest, number), segment)
                while len(self._segments) > _OPEN_SEGMENTS:
                    self._segments.popitem(last=False)
        now = self._clock()
        if now - segment.touched_at >= _TOUCH_S:
            segment.touched_at = now
            if segment.writable:
                with contextlib.suppress(OSError):  # a disk that has become read-only
                    os.utime(segment.data)  # the time of use: what eviction goes by
        return segment

    def _opened(self, name: str, number: int, seed: int, create: bool) -> _Segment | None:
        flags, writable = (os.O_RDWR | os.O_CREAT if create else os.O_RDWR), True
        try:
            data = self.folder.open(BLOCKS, f"{name}.data", flags)
        except FileNotFoundError:
            return None
        except OSError:
            if create:
                raise
            flags, writable = os.O_RDONLY, False  # a disk that can only be read still gives what it has
            data = self.folder.open(BLOCKS, f"{name}.data", flags)
        try:
            records = self.folder.open(BLOCKS, f"{name}.rec", flags | os.O_APPEND)
        except OSError as error:
            os.close(data)
            if isinstance(error, FileNotFoundError):
                return None
            raise
        return _Segment(data, records, number, seed, writable)

    def _forget(self, version: ObjectVersion, segment: _Segment) -> None:
        digest, _ = identity(version)
        with self._lock:
            if self._segments.get((digest, segment.number)) is segment:
                del self._segments[digest, segment.number]


@lru_cache(maxsize=4096)
def identity(version: ObjectVersion) -> tuple[str, int]:
    """A name for a version, 40 hex digits, and the seed of the checksums of what is kept of it."""
    fields = [field.encode("utf-8", "surrogatepass") for field in version]
    digest = sha256(b"".join(b"%d:%s" % (len(field), field) for field in fields)).digest()
    return digest[:20].hex(), int.from_bytes(digest[20:28], "little")


def _build_record(start: int, stop: int, checksum: bytes, seed: int) -> bytes:
    fields = _RECORD.pack(start, stop, checksum, 0)[:_FIELDS]
    return fields + xxhash.xxh3_64_intdigest(fields, seed).to_bytes(8, "little")


def _parse_records(raw: bytes, number: int, seed: int) -> dict[int, tuple[int, bytes]]:
    """start -> stop, checksum of the records that are whole; a later one takes the place of an earlier."""
    blocks: dict[int, tuple[int, bytes]] = {}
    for at in range(0, len(raw), _RECORD.size):
        start, stop, checksum, own = _RECORD.unpack_from(raw, at)
        if (
            xxhash.xxh3_64_intdigest(raw[at : at + _FIELDS], seed) == own
            and start < stop
            and start // SEGMENT == number
        ):
            blocks[start] = (stop, checksum)
    return blocks


def _write_run(segment: _Segment, run: list[tuple[int, int, Buffer]]) -> None:
    """Write adjacent blocks. Raises: OSError."""
    written = os.pwritev(segment.data, [data for _, _, data in run], run[0][0] - segment.number * SEGMENT)
    _write_all(written, run[-1][1] - run[0][0])


def _write_all(written: int, wanted: int) -> None:
    if written != wanted:  # the kernel writes less only where the disk is full, or the file too large
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _Content(NamedTuple):
    """The bytes of a run, and the bounds of those of its blocks that match their checksums; `removed` when others do
    not because another process has made room."""

    start: int
    data: bytes
    good: set[tuple[int, int]]
    removed: bool

    def cut(self, start: int, stop: int) -> bytes:
        return self.data[start - self.start : stop - self.start]


def _runs(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Blocks that stand one behind the other in a file, each once, together."""
    run: list[_Piece] = []
    for piece in sorted(set(pieces), key=lambda piece: piece.start):
        if run and not (
            run[-1].segment is piece.segment and run[-1].stop == piece.start and piece.stop - run[0].start <= _RUN
        ):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _read_run(run: list[_Piece]) -> _Content:
    segment, first = run[0].segment, run[0].start
    data = os.pread(segment.data, run[-1].stop - first, first - segment.number * SEGMENT)
    view = memoryview(data)
    good = set()
    for piece in run:
        block = view[piece.start - first : piece.stop - first]
        if len(block) == piece.stop - piece.start and (xxhash.xxh3_128_digest(block, segment.seed) == piece.checksum):
            good.add((piece.start, piece.stop))
            continue
        segment.drop(piece.start, piece.checksum)
    removed = len(good) < len(run) and not os.fstat(segment.data).st_nlink
    if not removed:
        _DAMAGED.inc(len(run) - len(good))
    return _Content(first, data, good, removed)
