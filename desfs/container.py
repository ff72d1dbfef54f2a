"""Opening the containers of a store. Blocking: the mount runs it in threads."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field

import numpy as np

from des_format.cache import IndexCache
from des_format.errors import CorruptEntry
from des_format.index import Index
from des_format.layout import MAX_META
from des_format.meta import MetaColumns
from des_format.names import external_keys
from des_format.source import Tail, open_container
from desfs import metrics
from desfs.blocks import Blocks
from desfs.compiled import Compiled, CompiledIndexes
from desfs.disk_cache import ObjectVersion
from desfs.errors import BadAnswer, NoSuchObject
from desfs.folders import Folders
from desfs.store.base import Answer, ObjectInfo, Store

# Index and META take about 230 bytes a file: a thirty-second of a container holds them for files of 8 KiB, and reads at
# most 3 % too much. Below 256 KiB a GET costs its round trip whatever it brings, above 1 MiB it begins to cost more.
_TAIL_FRACTION = 32
_MIN_TAIL = 256 * 1024
_MAX_TAIL = 1024 * 1024
_META_PIECE = 16 * 1024 * 1024  # bytes of META in memory at a time, where the whole region is not held

# Held by those who parse, and not while they wait for the store: sixteen threads that take turns with Python's lock
# needed 80 ms for what one of them does in 32.
_PARSING = threading.Semaphore(1)

_PROBLEMS_NAMED = 20  # of one container; the rest is counted


@dataclass(frozen=True, slots=True)
class LoadedContainer:
    """The columns of a container's index and metadata, and its folders; nothing else of it stays in memory."""

    info: ObjectInfo
    index: Index
    meta: MetaColumns
    folders: Folders
    problems: tuple[str, ...]


class StoreSource:
    """One version of an object of a store, known from a listing, as a source of ranges, for `load_container`."""

    def __init__(self, store: Store, info: ObjectInfo) -> None:
        self._store = store
        self._info = info
        self.was_read = False

    @property
    def store(self) -> str:
        return self._store.url

    @property
    def key(self) -> str:
        return self._info.key

    def version(self) -> str:
        return self._info.etag

    def tail(self, length: int) -> Tail:
        size = self._info.size
        start = max(size - length, 0)
        return Tail(self.read(start, size) if size else b"", size, self._info.etag)

    def pin(self, etag: str) -> None:
        if etag != self._info.etag:
            raise ValueError(f"{self.key}: pinned to {self._info.etag}, not to {etag}")

    def read(self, start: int, stop: int) -> bytes:
        self.was_read = True
        _PARSING.release()
        try:
            return bytes(self._store.get_range(self.key, start, stop, if_match=self._info.etag).data)
        finally:
            _PARSING.acquire()

    def external(self, name: str, recorded: object, start: int, stop: int, size: int) -> bytes:
        return bytes(read_external(self._store, self.key, name, recorded, start, stop, size)[0].data)


def read_external(
    store: Store,
    container: str,
    name: str,
    recorded: object,
    start: int,
    stop: int,
    size: int,
    *,
    if_match: str | None = None,
    known: str | None = None,
) -> tuple[Answer, str]:
    """[start, stop) of an external payload that should have `size` bytes, and its key; the one that is `known` to have
    been right is tried first. Raises: CorruptEntry, StoreError."""
    keys = external_keys(container, name, recorded)
    for key in sorted(keys, key=lambda each: each != known):
        try:
            if start < stop:
                answer = store.get_range(key, start, stop, if_match=if_match)
            else:
                answer = store.get_tail(key, 1)  # of an empty object: a range cannot be empty
        except NoSuchObject:
            continue
        except BadAnswer as error:
            if error.temporary:
                raise
            raise CorruptEntry(f"{container}: {name!r}: external object {key}: want {size} bytes: {error}") from error
        if answer.size != size:
            raise CorruptEntry(f"{container}: {name!r}: external object {key}: found {answer.size} bytes, want {size}")
        return answer, key
    raise CorruptEntry(f"{container}: {name!r}: external object {keys[0]} is missing")


def tail_length(size: int) -> int:
    """How many bytes to get of the end of a container of `size` bytes, to open it."""
    return min(max(size // _TAIL_FRACTION, _MIN_TAIL), _MAX_TAIL)


def load_container(
    store: Store,
    info: ObjectInfo,
    *,
    compiled: CompiledIndexes | None = None,
    tails: IndexCache | None = None,
) -> LoadedContainer:
    """Open a container: from its compiled index, else from its raw tail in a shared cache, else in one or two reads.

    Raises: NotAContainer; NoSuchObject, ObjectReplaced; StoreError.
    """
    version = ObjectVersion(store.url, info.key, info.etag)
    found = compiled.get(version) if compiled is not None else None
    if found is not None:
        metrics.INDEX_LOADS.labels("disk").inc()
    else:
        with _PARSING:
            found = _parsed(store, info, tails)
        if compiled is not None:
            compiled.put(version, found)
    return LoadedContainer(info, found.index, found.meta, found.folders, found.problems)


def _parsed(store: Store, info: ObjectInfo, tails: IndexCache | None) -> Compiled:
    source = StoreSource(store, info)
    opened = open_container(source, cache=tails, tail_length=tail_length(info.size))
    metrics.INDEX_LOADS.labels("store" if source.was_read else "redis").inc()
    index = opened.index
    meta = MetaColumns(index.rows)
    if opened.meta is not None:
        meta.fill(index, opened.meta, index.footer.meta_start)
    else:
        for start, stop in meta_pieces(index):
            meta.fill(index, source.read(start, stop), start)
    return Compiled(index, meta, Folders(index), _problems(index, meta))


def meta_pieces(index: Index, limit: int = _META_PIECE) -> list[tuple[int, int]]:
    """Ranges that together hold the META of every row, each row's whole in one of them; about `limit` bytes long.
    Pure."""
    rows = np.flatnonzero(index.meta_length > 0)
    rows = rows[np.argsort(index.meta_offset[rows], kind="stable")]
    starts = index.meta_offset[rows].astype(np.int64)
    stops = starts + index.meta_length[rows]
    pieces = []
    first = 0
    while first < len(rows):
        last = max(int(np.searchsorted(starts, starts[first] + limit - MAX_META)), first + 1)
        pieces.append((int(starts[first]), int(stops[first:last].max())))
        first = last
    return pieces


def _problems(index: Index, meta: MetaColumns) -> tuple[str, ...]:
    rows = index.problem_rows().tolist()
    lines = [problem for row in rows[:_PROBLEMS_NAMED] if (problem := index.problem(row)) is not None]
    if len(rows) > _PROBLEMS_NAMED:
        lines.append(f"and {len(rows) - _PROBLEMS_NAMED} more damaged entries")
    shown = index.shown()
    damaged = shown[meta.damaged[shown]].tolist()
    lines += [f"entry {row} {index.entry(row).name[:80]!r}: damaged metadata" for row in damaged[:_PROBLEMS_NAMED]]
    if len(damaged) > _PROBLEMS_NAMED:
        lines.append(f"and {len(damaged) - _PROBLEMS_NAMED} more entries with damaged metadata")
    return tuple(lines)


@dataclass(eq=False, slots=True, weakref_slot=True)
class OpenContainer:
    """A container with a slot. `externals` has the ETag of each external object that has been read, `external_keys` the
    key that it has; `verified` the
    CRC-32C of each unit of the large payloads that matched their checksum as a whole, by row. `outdated`: an external
    object was replaced, and the kernel may have pages of the version before: its inodes must not be given the new one.
    `number` is of no other: a slot may be given away again, and what caches hold of the last one there must not be
    taken for its successor's."""

    loaded: LoadedContainer
    slot: int
    number: int = field(default_factory=itertools.count().__next__)
    externals: dict[int, str] = field(default_factory=dict)
    external_keys: dict[int, str] = field(default_factory=dict)
    verified: dict[int, list[int]] = field(default_factory=dict)
    outdated: bool = False
    _blocks: Blocks | None = None
    _pages: bytearray | None = None

    @property
    def info(self) -> ObjectInfo:
        return self.loaded.info

    @property
    def blocks(self) -> Blocks:
        """How its small payloads are cut; made when something is read from it."""
        if self._blocks is None:
            self._blocks = Blocks(self.loaded.index)
        return self._blocks

    @property
    def pages(self) -> bytearray:
        """A byte a row, for whoever pushes its payloads to the kernel."""
        if self._pages is None:
            self._pages = bytearray(self.loaded.index.rows)
        return self._pages
