"""Compiled indexes: the columns of an open container in a file, which is mapped instead of parsed.

    header   magic, XXH3-128 of all that follows, bytes of the table
    table    JSON: the columns' types and places, and what is no array
    columns  each at a multiple of 64

The checksum is seeded with the identity of the version (store, key, ETag), and verified once, when the file is mapped.
A file is written under another name and renamed when it is whole; afterwards it is never changed, cut or written to,
only unlinked: its readers have it mapped (desfs.mapped). What does not match its checksum is removed, and a miss.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from des_format.blocks import BlockChecksums
from des_format.index import Index
from des_format.layout import Footer
from des_format.meta import MetaColumns
from desfs import metrics
from desfs.cache_folder import INDEX, CacheFolder, disk_size
from desfs.disk_cache import ObjectVersion, identity
from desfs.folders import Folders
from desfs.mapped import map_file, release_pages

_HEADER = Struct("<8s16sQ")  # magic, checksum, bytes of the table
_CHECKED = 24  # the first byte that the checksum covers
_MAGIC = b"DESFIDX1"
_ALIGNMENT = 64  # of columns: a cache line
_MAPPED = 64 * 1024  # bytes; a smaller file is copied: a map takes whole pages
_META_COLUMNS = {"mtime_ns": "<i8", "mode": "<u2", "crc32c": "<u4", "has_crc32c": "|b1", "damaged": "|b1"}

_HITS = metrics.CACHE_REQUESTS.labels("disk", "index", "hit")
_MISSES = metrics.CACHE_REQUESTS.labels("disk", "index", "miss")
_READ = metrics.DISK_CACHE_BYTES.labels("index", "read")
_WRITTEN = metrics.DISK_CACHE_BYTES.labels("index", "written")


@dataclass(frozen=True, slots=True)
class Compiled:
    """All that is kept of an open container; `problems` are what its opening had to report."""

    index: Index
    meta: MetaColumns
    folders: Folders
    problems: tuple[str, ...]


class _Column(NamedTuple):
    type: str
    offset: int  # from the end of the table, rounded up
    length: int


class _Table(msgspec.Struct):
    footer: tuple[int, ...]
    columns: dict[str, _Column]
    problems: tuple[str, ...]
    sha256: dict[int, str]
    external_key: dict[int, str]
    external_blocks: dict[int, int]  # row -> number of its checksums; rows may share them
    block_sizes: list[int]


class CompiledIndexes:
    """The compiled indexes in the folder of a disk cache. Blocking; any thread; no fault of the disk is raised."""

    def __init__(self, folder: CacheFolder) -> None:
        self._folder = folder
        self._in_use: WeakValueDictionary[str, npt.NDArray[Any]] = WeakValueDictionary()
        folder.indexes_in_use = lambda: list(self._in_use.keys())

    def get(self, version: ObjectVersion) -> Compiled | None:
        """The columns of a container's version, in mapped memory; None if they are not kept, or damaged."""
        compiled = None
        if self._folder.readable():
            try:
                compiled = self._load(version)
            except FileNotFoundError:
                pass
            except OSError as error:
                self._folder.failed("read", error)
        if compiled is None:
            _MISSES.inc()
        else:
            _HITS.inc()
            self._in_use[_name(version)] = compiled.index.state
        return compiled

    def put(self, version: ObjectVersion, compiled: Compiled) -> None:
        """Keep a container's columns, if the folder has room for them."""
        table, columns = _take_apart(compiled)
        try:
            encoded = msgspec.json.encode(table)
        except UnicodeEncodeError:
            return  # a text that cannot be kept as it is
        size = sum(_rounded(column.nbytes) for column in columns.values()) + _rounded(_HEADER.size + len(encoded))
        if not self._folder.admits(disk_size(size)):
            return
        try:
            self._write(version, list(_pieces(version, encoded, columns)))
        except OSError as error:
            self._folder.failed("write", error)
            return
        self._folder.succeeded()
        self._in_use[_name(version)] = compiled.index.state
        _WRITTEN.inc(size)

    def _load(self, version: ObjectVersion) -> Compiled | None:
        name = _name(version)
        descriptor = self._folder.open(INDEX, name, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            raw = _bytes_of(descriptor, size)
            with contextlib.suppress(OSError):  # a disk that can only be read
                os.utime(descriptor)  # the time of use: what eviction goes by
        finally:
            os.close(descriptor)
        compiled = _put_together(version, raw)
        if compiled is None:
            metrics.DISK_CACHE_ERRORS.labels("damaged").inc()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._folder.file(INDEX, name))
        else:
            _READ.inc(size)
        return compiled

    def _write(self, version: ObjectVersion, pieces: list[memoryview]) -> None:
        digest, _ = identity(version)
        temporary = f"{digest}.{secrets.token_hex(8)}.tmp"
        descriptor = self._folder.open(INDEX, temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            with open(descriptor, "wb", buffering=0) as file:
                for piece in pieces:
                    at = 0
                    while at < len(piece):
                        at += file.write(piece[at:])
            os.rename(self._folder.file(INDEX, temporary), self._folder.file(INDEX, _name(version)))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(self._folder.file(INDEX, temporary))
            raise


def _take_apart(compiled: Compiled) -> tuple[_Table, dict[str, npt.NDArray[Any]]]:
    """What goes into the table (places still missing), and the arrays."""
    index, meta = compiled.index, compiled.meta
    paths, rows, starts = compiled.folders.columns()
    checksums = list({id(each): each for each in meta.external_blocks.values()}.values())
    numbers = {id(each): number for number, each in enumerate(checksums)}
    columns = {
        **{f"index.{name}": column for name, column in index.columns().items()},
        **{f"meta.{name}": getattr(meta, name) for name in _META_COLUMNS},
        "folders.rows": rows,
        "folders.starts": starts,
        **_packed("folders.paths", paths),
        **_packed("blocks", [bytes(each.crc32c) for each in checksums]),
    }
    columns = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    places: dict[str, _Column] = {}
    at = 0
    for name, column in columns.items():
        places[name] = _Column(column.dtype.str, at, len(column))
        at += _rounded(column.nbytes)
    table = _Table(
        footer=tuple(index.footer),
        columns=places,
        problems=compiled.problems,
        sha256=meta.sha256,
        external_key=meta.external_key,
        external_blocks={row: numbers[id(each)] for row, each in meta.external_blocks.items()},
        block_sizes=[each.block_size for each in checksums],
    )
    return table, columns


def _packed(name: str, texts: list[bytes]) -> dict[str, npt.NDArray[Any]]:
    """Byte strings as two arrays."""
    ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
    return {name: np.frombuffer(b"".join(texts), np.uint8), f"{name}.ends": ends}


def _unpacked(arrays: dict[str, npt.NDArray[Any]], name: str) -> Iterator[memoryview]:
    view, start = arrays[name].data, 0
    for stop in arrays[f"{name}.ends"].tolist():
        yield view[start:stop]
        start = stop


def _pieces(version: ObjectVersion, encoded: bytes, columns: dict[str, npt.NDArray[Any]]) -> Iterator[memoryview]:
    """The file, in pieces."""
    head = _HEADER.size + len(encoded)
    pieces = [memoryview(len(encoded).to_bytes(8, "little") + encoded + bytes(_rounded(head) - head))]
    for column in columns.values():
        if len(column):
            pieces.append(column.view(np.uint8).data)
            pieces.append(memoryview(bytes(_rounded(column.nbytes) - column.nbytes)))
    checksum = xxhash.xxh3_128(seed=identity(version)[1])
    for piece in pieces:
        checksum.update(piece)
    yield memoryview(_MAGIC + checksum.digest())
    yield from pieces


def _bytes_of(descriptor: int, size: int) -> npt.NDArray[np.uint8]:
    if size >= _MAPPED:
        return map_file(descriptor, size)
    return np.frombuffer(os.pread(descriptor, size, 0), np.uint8)


def _put_together(version: ObjectVersion, raw: npt.NDArray[np.uint8]) -> Compiled | None:
    """The columns as views of a file's bytes; None if these are not what was written for that version."""
    view = raw.data
    if len(view) < _HEADER.size:
        return None
    magic, checksum, length = _HEADER.unpack_from(view)
    if magic != _MAGIC or xxhash.xxh3_128_digest(view[_CHECKED:], identity(version)[1]) != checksum:
        return None
    if len(view) >= _MAPPED:
        release_pages(raw)
    try:
        return _from_table(version, raw, length)
    except (ValueError, LookupError):  # whole, but of a program with other columns; msgspec's errors are ValueErrors
        return None


def _from_table(version: ObjectVersion, raw: npt.NDArray[np.uint8], length: int) -> Compiled:
    table = msgspec.json.decode(raw.data[_HEADER.size : _HEADER.size + length], type=_Table)
    base = _rounded(_HEADER.size + length)
    arrays = {
        name: raw[base + place.offset :][: place.length * np.dtype(place.type).itemsize].view(place.type)
        for name, place in table.columns.items()
    }
    index_columns = {name.removeprefix("index."): arrays[name] for name in arrays if name.startswith("index.")}
    index = Index.from_columns(index_columns, Footer(*table.footer), version.key)
    meta = MetaColumns(0)
    for name in _META_COLUMNS:
        setattr(meta, name, arrays[f"meta.{name}"])
    meta.sha256 = table.sha256
    meta.external_key = table.external_key
    sized = zip(table.block_sizes, _unpacked(arrays, "blocks"), strict=True)
    checksums = [BlockChecksums(size, view) for size, view in sized]
    meta.external_blocks = {row: checksums[number] for row, number in table.external_blocks.items()}
    paths = [bytes(path) for path in _unpacked(arrays, "folders.paths")]
    folders = Folders.from_columns(paths, arrays["folders.rows"], arrays["folders.starts"])
    return Compiled(index, meta, folders, table.problems)


def _name(version: ObjectVersion) -> str:
    return f"{identity(version)[0]}.idx"


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
