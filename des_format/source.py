"""Opening a container: from a source of byte ranges to its index, in one or two reads."""

from __future__ import annotations

import ctypes
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from struct import Struct
from typing import NamedTuple, Protocol

from des_format.cache import CacheKey, IndexCache
from des_format.codec import check_size, parse_footer, parse_header
from des_format.errors import BadAnswer, CorruptEntry, NoSuchObject, NotAContainer, ObjectReplaced, SourceUnavailable
from des_format.index import Index
from des_format.layout import FOOTER, HEADER, Footer
from des_format.names import external_keys
from des_format.plan import plan_gets
from des_format.shards import guess_root

DEFAULT_TAIL = 256 * 1024  # bytes: index and META of about a thousand files; takes no longer than a round trip
MAX_INDEX = 1024 * 1024 * 1024  # bytes: over ten million files; a footer that claims more is not trusted with memory
MAX_CACHED = 128 * 1024 * 1024  # bytes, index and META: more is fetched again rather than copied
MAX_META_HELD = 64 * 1024 * 1024  # bytes; a larger META region is read entry by entry

_LARGE_INDEX = 100_000  # rows; below, what its temporary arrays leave behind is not worth a look at the heap

_PACKED = Struct("<QQ")  # object size, length of META; then footer, INDEX, META


class Tail(NamedTuple):
    """The last bytes of a container, its size, and which version of it they are of."""

    data: bytes
    size: int
    etag: str


class RangeSource(Protocol):
    """Byte ranges of one container and of its external objects. Raises SourceError and its kin from every method."""

    @property
    def store(self) -> str:
        """The store's URL, for cache keys."""
        ...

    @property
    def key(self) -> str:
        """The container's key in the store."""
        ...

    def version(self) -> str | None:
        """The ETag of the version there is now, if that is known without a request."""
        ...

    def tail(self, length: int) -> Tail:
        """The last `length` bytes or the whole object; pins the version that it found."""
        ...

    def pin(self, etag: str) -> None:
        """From now on read this version only."""
        ...

    def read(self, start: int, stop: int) -> bytes:
        """Exactly [start, stop) of the pinned version, start < stop. Raises: ObjectReplaced."""
        ...

    def external(self, name: str, recorded: object, start: int, stop: int, size: int) -> bytes:
        """[start, stop) of the payload of an external entry of `size` bytes, `recorded` being what META says of its
        key. Raises: CorruptEntry when the object is missing or has another size."""
        ...


@dataclass(frozen=True, slots=True)
class Opened:
    """What opening a container gave. `meta` is the META region, or None when it is too large to be held;
    `confirmed` is False when the version was taken from a cache and no answer of the store has shown it yet."""

    index: Index
    meta: bytes | None
    size: int
    etag: str
    confirmed: bool


def open_container(
    source: RangeSource,
    *,
    cache: IndexCache | None = None,
    tail_length: int = DEFAULT_TAIL,
    trust_cache: bool = True,
    max_meta: int = MAX_META_HELD,
) -> Opened:
    """Read footer, index and META: one read of the tail, more only where the tail was too short, none with a warm
    cache.

    A source that cannot tell its version for free is opened from the cache as the version that was seen last (unless
    `trust_cache` is False); the first read of it, pinned to that version, shows whether it is still there.

    Raises: NotAContainer naming the position; SourceError.
    """
    version = source.version()
    note = CacheKey(source.store, source.key, "")
    if cache is not None:
        confirmed = version is not None
        seen = version if confirmed else _text(cache.get(note)) if trust_cache else None
        packed = cache.get(CacheKey(source.store, source.key, seen)) if seen else None
        opened = _unpack(packed, source.key, seen, confirmed) if seen and packed is not None else None
        if opened is not None:
            source.pin(opened.etag)
            return opened
    tail = source.tail(max(tail_length, FOOTER.size))
    footer, size = _checked_footer(tail, source.key)
    tail_start = size - len(tail.data)
    wanted = [(footer.index_start, footer.index_start + footer.index_length)]
    hold_meta = footer.meta_length <= max_meta
    if hold_meta:
        wanted.append((footer.meta_start, footer.meta_start + footer.meta_length))
    regions = [bytearray(stop - start) for start, stop in wanted]
    pieces = chain([(tail_start, tail.data)], _missing(source, wanted, tail_start))
    for offset, data in pieces:  # copied one by one: a large index is not in memory twice
        for (start, stop), region in zip(wanted, regions, strict=True):
            low, high = max(start, offset), min(stop, offset + len(data))
            if low < high:
                region[low - start : high - start] = memoryview(data)[low - offset : high - offset]
    index = _parse(regions[0], footer, source.key)
    meta = bytes(regions[1]) if hold_meta else None
    if cache is not None and sum(map(len, regions)) <= MAX_CACHED:
        parts = (_PACKED.pack(size, len(meta or b"")), tail.data[-FOOTER.size :], regions[0], meta or b"")
        cache.put(CacheKey(source.store, source.key, tail.etag), b"".join(parts))
        if version is None:
            cache.put(note, tail.etag.encode())
    return Opened(index, meta, size, tail.etag, confirmed=True)


def _parse(raw: bytearray | memoryview, footer: Footer, container: str) -> Index:
    index = Index(raw, footer, container)
    if index.rows >= _LARGE_INDEX:
        # Have glibc return what the temporary arrays took. Once it has freed a few, it keeps arrays of up to 32 MiB on
        # its heap, and the columns hold the space between them: 189 bytes an entry instead of 87, for a million.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)
    return index


def _missing(source: RangeSource, wanted: list[tuple[int, int]], tail_start: int) -> Iterator[tuple[int, bytes]]:
    """What of the wanted ranges lies before the tail."""
    for start, stop in plan_gets((start, min(stop, tail_start)) for start, stop in wanted):
        yield start, source.read(start, stop)


def cut(pieces: list[tuple[int, bytes]], start: int, stop: int) -> bytes:
    """The bytes [start, stop) out of pieces (offset, data), ascending, that cover them."""
    out = []
    first = max(bisect_right(pieces, start, key=lambda piece: piece[0]) - 1, 0)
    for offset, data in islice(pieces, first, None):
        if offset >= stop:
            break
        low, high = max(start - offset, 0), min(stop - offset, len(data))
        if low < high:
            out.append(data[low:high])
            start = offset + high
    return out[0] if len(out) == 1 else b"".join(out)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "replace")


def _checked_footer(tail: Tail, container: str) -> tuple[Footer, int]:
    check_size(tail.size, container)
    if len(tail.data) == tail.size:
        parse_header(tail.data[: HEADER.size], container)
    footer = parse_footer(tail.data[-FOOTER.size :], tail.size, container)
    if footer.index_length > MAX_INDEX:
        raise NotAContainer(
            f"{container}: INDEX in the footer at byte {tail.size - FOOTER.size}: found {footer.index_length} bytes, "
            f"want at most {MAX_INDEX}"
        )
    return footer, tail.size


def _unpack(packed: bytes, container: str, etag: str, confirmed: bool) -> Opened | None:
    """What a cache kept, None if it is nothing that was put there."""
    head = _PACKED.size + FOOTER.size
    if len(packed) < head:
        return None
    size, meta_length = _PACKED.unpack_from(packed)
    stop = len(packed) - meta_length
    try:
        footer = parse_footer(packed[_PACKED.size : head], size, container)
        if stop - head != footer.index_length or meta_length not in (0, footer.meta_length):
            return None
        index = _parse(memoryview(packed)[head:stop], footer, container)
    except NotAContainer:
        return None
    meta = packed[stop:] if meta_length == footer.meta_length else None
    return Opened(index, meta, size, etag, confirmed)


class FileSource:
    """A container in a file, with its external objects beside it. Any thread."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises: NoSuchObject, SourceUnavailable."""
        self._path = Path(path).absolute()
        self._descriptor = _open(self._path)
        self._etag = self.version()
        self._size = os.fstat(self._descriptor).st_size

    @property
    def store(self) -> str:
        return "file://"

    @property
    def key(self) -> str:
        return str(self._path)

    def version(self) -> str:
        status = os.fstat(self._descriptor)
        return f"{status.st_dev:x}-{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"

    def tail(self, length: int) -> Tail:
        start = max(self._size - length, 0)
        return Tail(self.read(start, self._size) if self._size else b"", self._size, self._etag)

    def pin(self, etag: str) -> None:
        if etag != self._etag:
            raise ObjectReplaced(f"{self.key}: found version {self._etag}, want {etag}")

    def read(self, start: int, stop: int) -> bytes:
        data = _read_all(self._descriptor, start, stop, self.key)
        if self.version() != self._etag:
            raise ObjectReplaced(f"{self.key}: the file was changed while it was read")
        return data

    def external(self, name: str, recorded: object, start: int, stop: int, size: int) -> bytes:
        keys = external_keys(self.key, name, recorded, root=guess_root(self.key))
        for key in keys:
            try:
                descriptor = _open(Path(key))
            except NoSuchObject:
                continue
            try:
                found = os.fstat(descriptor).st_size
                if found != size:
                    raise CorruptEntry(f"{self.key}: {name!r}: external file {key}: found {found} bytes, want {size}")
                return _read_all(descriptor, start, stop, key) if start < stop else b""
            finally:
                os.close(descriptor)
        raise CorruptEntry(f"{self.key}: {name!r}: external file {keys[0]} is missing")

    def close(self) -> None:
        """Close the file; nothing can be read any more."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _open(path: Path) -> int:
    try:
        # O_NONBLOCK: a FIFO would wait for a writer.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise NoSuchObject(f"{path}: no such file") from None
    except OSError as error:
        raise SourceUnavailable(f"{path}: {error.strerror}") from error


def _read_all(descriptor: int, start: int, stop: int, what: str) -> bytes:
    pieces: list[bytes] = []
    at = start
    while at < stop:
        try:
            # Linux moves at most 2^31 - 4096 bytes in one call.
            piece = os.pread(descriptor, min(stop - at, 1 << 30), at)
        except OSError as error:
            raise SourceUnavailable(f"{what}: cannot read at byte {at}: {error.strerror}") from error
        if not piece:
            raise BadAnswer(f"{what}: found its end at byte {at}, want bytes {start} to {stop}")
        pieces.append(piece)
        at += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
