"""Builders for odd containers, and a source of bytes in memory that counts how it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from des_format.codec import build_footer, build_header, build_record
from des_format.errors import BadAnswer, CorruptEntry, ObjectReplaced
from des_format.layout import FOOTER, HEADER, Footer
from des_format.source import Tail


@dataclass(frozen=True, slots=True)
class Item:
    """One entry to be; what is None is what a sound writer would put there. Offsets are absolute."""

    name: bytes
    data: bytes = b""
    meta: bytes | None = None
    flags: int = 0
    data_offset: int | None = None
    data_length: int | None = None
    meta_offset: int | None = None
    meta_length: int | None = None


def build(
    items: Iterable[Item] = (),
    *,
    gaps: tuple[bytes, bytes, bytes, bytes] = (b"", b"", b"", b""),
    change: Callable[[Footer], Footer] = lambda footer: footer,
    header: bytes | None = None,
) -> bytes:
    """A container of `items`, with `gaps` before DATA, META, INDEX and FOOTER; `change` lies in the footer."""
    items = list(items)
    data = b"".join(item.data for item in items)
    metas = [b'{"size":%d}' % len(item.data) if item.meta is None else item.meta for item in items]
    meta = b"".join(metas)
    data_start = HEADER.size + len(gaps[0])
    meta_start = data_start + len(data) + len(gaps[1])
    index_start = meta_start + len(meta) + len(gaps[2])
    index = bytearray()
    data_at, meta_at = data_start, meta_start
    for item, encoded in zip(items, metas, strict=True):
        index += build_record(
            item.name,
            data_at if item.data_offset is None else item.data_offset,
            len(item.data) if item.data_length is None else item.data_length,
            meta_at if item.meta_offset is None else item.meta_offset,
            len(encoded) if item.meta_length is None else item.meta_length,
            item.flags,
        )
        data_at += len(item.data)
        meta_at += len(encoded)
    footer = Footer(data_start, len(data), meta_start, len(meta), index_start, len(index), len(items))
    start = build_header() if header is None else header
    regions = (start, gaps[0], data, gaps[1], meta, gaps[2], bytes(index), gaps[3])
    return b"".join(regions) + build_footer(change(footer))


def patched(raw: bytes, offset: int, new: bytes) -> bytes:
    """A copy with `new` written over the bytes at `offset`, which counts from the end if it is negative."""
    offset %= len(raw)
    return raw[:offset] + new + raw[offset + len(new) :]


def footer_of(raw: bytes) -> Footer:
    """The regions that a container claims, unchecked."""
    _, _, *regions = FOOTER.unpack(raw[-FOOTER.size :])
    return Footer(*regions)


@dataclass(slots=True)
class MemorySource:
    """A `RangeSource` over bytes that can be replaced, as an object in S3 can; `reads` are the ranges asked for."""

    raw: bytes
    etag: str = "1"
    key: str = "day/f.des"
    store: str = "memory://"
    externals: dict[str, bytes] = field(default_factory=dict)
    reads: list[tuple[int, int]] = field(default_factory=list)
    tails: int = 0
    pinned: str | None = None

    def replace(self, raw: bytes) -> None:
        self.raw = raw
        self.etag = str(int(self.etag) + 1)

    def version(self) -> str | None:
        return None

    def tail(self, length: int) -> Tail:
        self.tails += 1
        self.pinned = self.etag
        return Tail(self.raw[-length:], len(self.raw), self.etag)

    def pin(self, etag: str) -> None:
        self.pinned = etag

    def read(self, start: int, stop: int) -> bytes:
        assert start < stop
        self.reads.append((start, stop))
        if self.pinned != self.etag:
            raise ObjectReplaced(f"{self.key}: found version {self.etag}, want {self.pinned}")
        if stop > len(self.raw):
            raise BadAnswer(f"{self.key}: asked for {start} to {stop} of {len(self.raw)}")
        return self.raw[start:stop]

    def external(self, name: str, recorded: object, start: int, stop: int, size: int) -> bytes:
        payload = self.externals.get(name)
        if payload is None or len(payload) != size:
            raise CorruptEntry(f"{self.key}: {name!r}: external object is missing or has another size")
        return payload[start:stop]
