"""A local store of daily containers, one per shard, that names its files itself."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from des_format.assigned_names import SnowflakeNameConfig, SnowflakeNameGenerator, parse_name
from des_format.codec import Buffer, decode_meta, encode_meta
from des_format.errors import InvalidAssignedName, NoSuchEntry, WriterClosed
from des_format.layout import HEADER
from des_format.names import check_writable
from des_format.reader import DesReader
from des_format.shards import (
    CONTAINER_SUFFIX,
    SEALED,
    ContainerKey,
    hex_group,
    parse_container_name,
    part_name,
    shard_hex,
    shard_of,
)
from des_format.writer import DesWriter

NameAndPath = tuple[str, Path]
_COPY_LIMIT = 8 * 1024 * 1024  # bytes: larger files are streamed


class _OpenShard:
    """A container being written, and where its internal payloads are: name -> (offset, length, metadata)."""

    def __init__(self, writer: DesWriter) -> None:
        self.writer = writer
        self.payloads: dict[str, tuple[int, int, bytes]] = {}


class DailyShardedDesStore:
    """Adds files to `{base_dir}/{day}/{shard}.des` under assigned names, and reads them back by name. Any thread.

    A container gets its name when it is closed: at the day's end, which is noticed when the next file is added, or by
    close(). Where a shard has a container already (an earlier run, or another process), the next part is written:
    `{shard}-{generation}.des`. Payloads of 100 MiB or more become files of their own, `{day}/_bigFiles/{name}`.
    """

    def __init__(
        self,
        base_dir: str | os.PathLike[str],
        shard_bits: int = 8,
        day: date | None = None,
        node_id: int = 0,
        prefix: str = "DES",
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """With `day`, all files go to that day; without, to the day (UTC) that `clock` (seconds) shows."""
        shard_hex(0, shard_bits)  # refuses bits out of range
        self._base_dir = Path(base_dir)
        self._shard_bits = shard_bits
        self._day = day
        self._names = SnowflakeNameGenerator(SnowflakeNameConfig(prefix=prefix, node_id=node_id))
        self._clock = clock
        self._lock = threading.RLock()
        self._open_day: date | None = None
        self._shards: dict[str, _OpenShard] = {}
        self._closed = False

    def add_file(self, data: Buffer, meta: Mapping[str, Any] | None = None, ext: str | None = None) -> NameAndPath:
        """Add a payload; its assigned name, with `ext` (".pdf" or "pdf") behind it, and the container's path.

        Raises: InvalidMeta, InvalidEntryName (an extension that cannot stand in a name), WriterClosed; OSError.
        """
        with self._lock:
            data = memoryview(data).cast("B")  # whose length is bytes
            name, shard = self._next(ext)
            offset = shard.writer.data_length
            shard.writer.add_file(name, data, meta)
            if shard.writer.data_length == offset + len(data):  # not stored as a file of its own
                self._remember(shard, name, offset, len(data), meta)
            return name, shard.writer.path

    def add_file_from_path(
        self, path: str | os.PathLike[str], meta: Mapping[str, Any] | None = None, keep_ext: bool = True
    ) -> NameAndPath:
        """Add a file, streamed if it is large; its assigned name, with the file's extension if `keep_ext`, and the
        container's path. Raises: as add_file; SizeMismatch when the file changes its size meanwhile."""
        source_path = Path(path)
        ext = source_path.suffix if keep_ext else None
        with open(source_path, "rb") as source:
            size = os.fstat(source.fileno()).st_size
            if size <= _COPY_LIMIT:
                return self.add_file(source.read(), meta, ext)
            with self._lock:
                name, shard = self._next(ext)
                offset = shard.writer.data_length
                shard.writer.add_stream(name, source, size, meta)
                if shard.writer.data_length > offset:
                    self._remember(shard, name, offset, size, meta)
                return name, shard.writer.path

    def get_file(self, name: str) -> bytes:
        """The payload of an assigned name, from a container that is still being written as well.

        Raises: NoSuchEntry, InvalidAssignedName, CorruptEntry, SourceError.
        """
        with self._lock:
            for shard in self._shards.values():
                if name in shard.payloads:
                    offset, length, _ = shard.payloads[name]
                    return shard.writer.read_back(offset, length)
        with self._reader_of(name) as reader:
            return reader.get_file(name)

    def get_meta(self, name: str) -> dict[str, Any]:
        """The metadata of an assigned name. Raises: as get_file, CorruptMeta."""
        with self._lock:
            for shard in self._shards.values():
                if name in shard.payloads:
                    _, length, encoded = shard.payloads[name]
                    return decode_meta(encoded, length, name)
        with self._reader_of(name) as reader:
            return reader.get_meta(name)

    def close(self) -> None:
        """Finish all containers. Calling it again does nothing."""
        with self._lock:
            self._closed = True
            self._close_shards()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Also after an exception: what was added before it has been reported as stored.
        self.close()

    def _today(self) -> date:
        return self._day or datetime.fromtimestamp(self._clock(), UTC).date()

    def _next(self, ext: str | None) -> tuple[str, _OpenShard]:
        """A new name and the open container of its shard, after a rollover if the day has changed."""
        if self._closed:
            raise WriterClosed(f"{self._base_dir}: the store is closed")
        day = self._today()
        if self._open_day is not None and day != self._open_day:
            self._close_shards()
        self._open_day = day
        extension = "" if not ext else ext if ext.startswith(".") else f".{ext}"
        name = self._names.next_name(day) + extension
        check_writable(name, strict=True)
        parse_name(name)  # refuses an extension that makes the name unreadable
        shard = shard_hex(shard_of(name, self._shard_bits), self._shard_bits)
        if shard not in self._shards:
            self._shards[shard] = _OpenShard(self._open_writer(day, shard))
        return name, self._shards[shard]

    def _parts(self, day: date, shard: str) -> list[tuple[Path, ContainerKey]]:
        """The finished containers of a shard, newest last."""
        keyed = [(path, parse_container_name(path.name)) for path in (self._base_dir / day.isoformat()).glob("*.des")]
        parts = [(path, key) for path, key in keyed if key is not None and key.group == hex_group(shard)]
        return sorted(parts, key=lambda part: part[1].order)

    def _open_writer(self, day: date, shard: str) -> DesWriter:
        folder = self._base_dir / day.isoformat()
        folder.mkdir(parents=True, exist_ok=True)
        taken = [key.last for _, key in self._parts(day, shard)]
        generation = max(max(taken) + 1, 1) if taken else SEALED
        while True:
            file_name = part_name(shard, generation) if generation != SEALED else f"{shard}{CONTAINER_SUFFIX}"
            try:
                return DesWriter(folder / file_name, external_prefix=f"{day.isoformat()}/", overwrite=False)
            except FileExistsError:
                generation = max(generation + 1, 1)  # another process writes it, or died over it

    def _remember(
        self, shard: _OpenShard, name: str, data_position: int, length: int, meta: Mapping[str, Any] | None
    ) -> None:
        shard.payloads[name] = (HEADER.size + data_position, length, encode_meta(meta, length))

    def _close_shards(self) -> None:
        """Finish every open container, the rest too when one fails; the first failure is raised."""
        failure: Exception | None = None
        for shard in self._shards.values():
            try:
                shard.writer.close()
            except (OSError, WriterClosed) as error:
                failure = failure or error
        self._shards.clear()
        self._open_day = None
        if failure is not None:
            raise failure

    def _reader_of(self, name: str) -> DesReader:
        try:
            day = parse_name(name).day
        except InvalidAssignedName as error:
            raise NoSuchEntry(f"{self._base_dir}: no entry {name!r}: {error}") from error
        shard = shard_hex(shard_of(name, self._shard_bits), self._shard_bits)
        for path, _ in reversed(self._parts(day, shard)):
            reader = DesReader(path)
            if name in reader:
                return reader
            reader.close()
        raise NoSuchEntry(f"{self._base_dir}: no entry {name!r} in the containers of {day}, shard {shard}")
