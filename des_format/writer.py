"""Writing one container to a file.

The order of writes: everything goes to a temporary file in the same folder; close() appends META, INDEX and FOOTER,
then fsync, rename, fsync of the folder. The final name is the commit: whatever dies before it leaves the temporary file
alone, which an exception removes and a crash leaves behind under a name that no reader takes for a container.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from des_format.blocks import BlockSummer
from des_format.codec import Buffer, build_footer, build_header, build_record, encode_meta
from des_format.errors import InvalidMeta, SizeMismatch, WriterClosed
from des_format.layout import BIG_FILE_THRESHOLD, DELETED, EXTERNAL, HEADER, Footer
from des_format.names import check_writable, external_key

_COPY_CHUNK = 1024 * 1024
_BUFFER = 1024 * 1024  # of the container file: thousands of small payloads, few writes

Meta = Mapping[str, Any] | None


class ReadableBytes(Protocol):
    """What a streamed payload is read from: any binary file."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""
        ...


class ExternalStore(Protocol):
    """Where external payloads go. Every store of `desfs.store` is one."""

    def put(self, key: str, source: bytes | Path) -> object:
        """Store an object, durable when this returns."""
        ...


class DesWriter:
    """Writes a container. One thread at a time.

        with DesWriter("2026-11-20.des") as writer:
            writer.add_file("hello.txt", b"hello", {"mime": "text/plain"})

    Leaving the block closes the container, an exception discards it. Payloads of `big_file_threshold` bytes or more,
    and those added with `force_external`, become objects of their own: `{external_prefix}_bigFiles/{name}` in
    `external_store`, or without one the file `_bigFiles/{name}` beside the container. `external_prefix` is the folder
    of the key that the container will have, with its `/`: readers look there. Their metadata has the checksums of their
    blocks (`des_format.blocks`) if they are longer than one.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        strict_names: bool = False,
        big_file_threshold: int = BIG_FILE_THRESHOLD,
        external_store: ExternalStore | None = None,
        external_prefix: str = "",
        overwrite: bool = True,
    ) -> None:
        """`strict_names` refuses the characters that the format's first writers refuse, `/` among them. With
        `overwrite` false, the container's name is reserved from now on, and FileExistsError raised if it is taken."""
        if big_file_threshold < 1:
            raise ValueError(f"big_file_threshold is {big_file_threshold}, want 1 or more")
        if external_prefix and not external_prefix.endswith("/"):
            raise ValueError(f"external_prefix is {external_prefix!r}, want it empty or ending in '/'")
        self.path = Path(path)
        self._strict_names = strict_names
        self._big_file_threshold = big_file_threshold
        self._external_store = external_store
        self._external_prefix = external_prefix
        self._overwrite = overwrite
        unique = secrets.token_hex(4) if overwrite else "writing"
        self._temporary = self.path.with_name(f".{self.path.name}.{unique}.tmp")
        self._file = open(self._temporary, "x+b", buffering=_BUFFER)  # noqa: SIM115 - closed by close() and discard()
        self._folder_files: list[tuple[Path, Path]] = []  # external payloads to be renamed by close()
        self._meta = bytearray()
        self._records: list[tuple[bytes, int, int, int, int, int]] = []  # offsets of META relative to its start
        self._position = HEADER.size
        self._closed = False
        self._failed = False
        # After the reservation: whoever held it until now may have given its file the name a moment ago.
        if not overwrite and self.path.exists():
            self.discard()
            raise FileExistsError(f"{self.path} exists")
        self._file.write(build_header())

    @property
    def file_count(self) -> int:
        """Entries added so far."""
        return len(self._records)

    @property
    def data_length(self) -> int:
        """Bytes of internal payloads added so far."""
        return self._position - HEADER.size

    def add_file(self, name: str, data: Buffer, meta: Meta = None, force_external: bool = False) -> None:
        """Add an entry from memory.

        Raises: InvalidEntryName, InvalidMeta (the container can be continued without the entry); OSError.
        """
        raw_name = self._check(name)
        data = memoryview(data).cast("B")  # whose length is bytes
        if force_external or len(data) >= self._big_file_threshold:
            key = self._external_key(name)
            summer = BlockSummer(len(data))
            summer.update(data)
            encoded = _encode_external(meta, len(data), key, summer)
            if self._external_store is not None:
                self._external_store.put(key, bytes(data))
            else:
                staged = self._stage_external(name)
                try:
                    with open(staged, "xb") as file:
                        file.write(data)
                        file.flush()
                        os.fsync(file.fileno())
                except BaseException:
                    self._unstage(staged)
                    raise
            self._append(raw_name, 0, len(data), encoded, EXTERNAL)
            return
        encoded = encode_meta(meta, len(data))
        with self._discarding():
            self._file.write(data)
        self._append(raw_name, self._position, len(data), encoded, 0)
        self._position += len(data)

    def add_stream(
        self,
        name: str,
        source: ReadableBytes,
        size: int,
        meta: Meta | Callable[[], Meta] = None,
        force_external: bool = False,
    ) -> None:
        """Add an entry of `size` bytes that are never in memory as a whole. `meta` may be a function, which is called
        when the last byte has been read: for checksums taken on the way.

        Raises: SizeMismatch when the source has more or fewer bytes, InvalidEntryName, InvalidMeta, and whatever the
        source or `meta` raise (the container can be continued without the entry); OSError of the container's own file,
        which is discarded.
        """
        raw_name = self._check(name)
        if force_external or size >= self._big_file_threshold:
            key = self._external_key(name)
            staged = self._stage_external(name)
            try:
                summer = BlockSummer(size)
                with open(staged, "xb") as file:
                    for chunk in _chunks(source, size, name):
                        file.write(chunk)
                        summer.update(chunk)
                    file.flush()
                    os.fsync(file.fileno())
                encoded = _encode_external(meta() if callable(meta) else meta, size, key, summer)
                if self._external_store is not None:
                    self._external_store.put(key, staged)
            except BaseException:
                self._unstage(staged)
                raise
            if self._external_store is not None:
                self._unstage(staged)
            self._append(raw_name, 0, size, encoded, EXTERNAL)
            return
        try:
            for chunk in _chunks(source, size, name):
                with self._discarding():
                    self._file.write(chunk)
            encoded = encode_meta(meta() if callable(meta) else meta, size)
        except BaseException:
            if not self._closed:  # the source's fault, not the container's: go on without the entry
                with self._discarding():
                    self._file.seek(self._position)
                    self._file.truncate()
            raise
        self._append(raw_name, self._position, size, encoded, 0)
        self._position += size

    def add_external(self, name: str, size: int, meta: Meta = None, *, key: str | None = None) -> None:
        """Record an entry whose payload its caller has stored already, under `key` or where readers look for it. What
        `meta` says of it is written as it is: checksums of its blocks come from a `BlockSummer`."""
        raw_name = self._check(name)
        encoded = encode_meta(meta, size, key if key is not None else self._external_key(name))
        self._append(raw_name, 0, size, encoded, EXTERNAL)

    def add_deleted(self, name: str, meta: Meta = None) -> None:
        """Add a tombstone: no older entry of the name is shown, neither of this container nor of those before it.

        Raises: InvalidEntryName, InvalidMeta (the container can be continued without the entry).
        """
        raw_name = self._check(name)
        # Where an empty payload would lie: a reader that knows no flags finds a sound record.
        self._append(raw_name, self._position, 0, encode_meta(meta, 0), DELETED)

    def close(self) -> None:
        """Finish the container and give it its name; durable when this returns. Calling it again does nothing.

        Raises: OSError; FileExistsError with `overwrite` false when somebody took the name. The temporary file is gone
        then, and the writer closed. WriterClosed when an earlier error had the container discarded.
        """
        if self._failed:
            raise WriterClosed(f"{self.path}: the container was discarded after an error")
        if self._closed:
            return
        with self._discarding():
            meta_start = self._position
            index_start = meta_start + len(self._meta)
            self._file.write(self._meta)
            index_length = 0
            for name, offset, length, meta_offset, meta_length, flags in self._records:
                record = build_record(name, offset, length, meta_start + meta_offset, meta_length, flags)
                self._file.write(record)
                index_length += len(record)
            footer = Footer(
                HEADER.size,
                self._position - HEADER.size,
                meta_start,
                len(self._meta),
                index_start,
                index_length,
                len(self._records),
            )
            self._file.write(build_footer(footer))
            self._file.flush()
            os.fsync(self._file.fileno())
            for staged, final in self._folder_files:
                os.replace(staged, final)
                sync_folder(final.parent)
            if self._overwrite:
                os.replace(self._temporary, self.path)
            else:
                os.link(self._temporary, self.path)
                self._temporary.unlink()
            sync_folder(self.path.parent)
            self._file.close()
            self._closed = True

    def discard(self) -> None:
        """Give the container up: nothing is left under its name. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        with suppress(OSError):  # a full disk: what could not be written is thrown away anyway
            self._file.close()
        self._temporary.unlink(missing_ok=True)
        for staged, _ in self._folder_files:
            staged.unlink(missing_ok=True)

    def read_back(self, offset: int, length: int) -> bytes:
        """A payload that was added, before the container is closed; `offset` counts from the container's first byte."""
        self._file.flush()
        return os.pread(self._file.fileno(), length, offset)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    @contextmanager
    def _discarding(self) -> Iterator[None]:
        """Discard the container when the block raises: a half-written payload must not be followed by another entry."""
        try:
            yield
        except BaseException:
            self._failed = True
            self.discard()
            raise

    def _check(self, name: str) -> bytes:
        if self._closed:
            raise WriterClosed(f"{self.path}: the writer is closed")
        return check_writable(name, strict=self._strict_names)

    def _external_key(self, name: str) -> str:
        return external_key(self._external_prefix, name)

    def _stage_external(self, name: str) -> Path:
        final = Path(external_key(str(self.path.absolute()), name))
        if self._external_store is None:
            final.parent.mkdir(parents=True, exist_ok=True)
            staged = final.with_name(f".{secrets.token_hex(8)}.tmp")
        else:
            staged = self.path.with_name(f".{secrets.token_hex(8)}.external.tmp")
        self._folder_files.append((staged, final))
        return staged

    def _unstage(self, staged: Path) -> None:
        staged.unlink(missing_ok=True)
        self._folder_files = [pair for pair in self._folder_files if pair[0] != staged]

    def _append(self, name: bytes, offset: int, length: int, meta: bytes, flags: int) -> None:
        self._records.append((name, offset, length, len(self._meta), len(meta), flags))
        self._meta += meta


def _encode_external(meta: Meta, size: int, key: str, summer: BlockSummer) -> bytes:
    """Metadata with the checksums of the blocks; what the application has set itself stays, and where its metadata
    leaves no room there are none."""
    blocks = {name: value for name, value in summer.meta().items() if name not in (meta or {})}
    if blocks:
        with suppress(InvalidMeta):
            return encode_meta({**(meta or {}), **blocks}, size, key)
    return encode_meta(meta, size, key)


def _chunks(source: ReadableBytes, size: int, name: str) -> Iterator[bytes]:
    """The source in pieces, exactly `size` bytes in all. Raises: SizeMismatch, after the last good byte."""
    left = size
    while left:
        chunk = source.read(min(_COPY_CHUNK, left))
        if not chunk:
            raise SizeMismatch(f"{name!r}: the source ended at byte {size - left}, want {size}")
        left -= len(chunk)
        yield chunk
    if source.read(1):
        raise SizeMismatch(f"{name!r}: the source goes on after byte {size}")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
