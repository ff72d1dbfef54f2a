"""Zip files as sources. `zipfile` reads the central directory; the payloads are read and decompressed here: in pieces
whose size does not depend on what they claim (of bzip2 and LZMA, zipfile expands any amount at a time), at any place,
by any thread.

Facts of the format are from APPNOTE.TXT 6.3.10 (PKWARE), those of extra fields also from Info-ZIP's
proginfo/extrafld.txt.
"""

from __future__ import annotations

import bz2
import lzma
import stat
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from desfs.imports.source import (
    Archive,
    Members,
    OpenFile,
    Report,
    SourceDamaged,
    SourceFile,
    skipped_kind,
    time_or_none,
)

_PERMISSIONS = 0o7777
_CHUNK = 256 * 1024  # bytes read from the archive at a time
_LOCAL = struct.Struct("<4s5H3L2H")  # 4.3.7: signature, …, lengths of name and extra field
_LOCAL_SIGNATURE = b"PK\x03\x04"
_ENCRYPTED, _PATCH, _UTF8 = 1 << 0, 1 << 5, 1 << 11  # 4.4.4
_STORED, _DEFLATED, _BZIP2, _LZMA = 0, 8, 12, 14  # 4.4.5
_FIELD = struct.Struct("<HH")  # 4.5.1: tag and length
_NTFS, _UNIX_TIMES, _UNICODE_PATH = 0x000A, 0x5455, 0x7075
_NTFS_EPOCH = 116_444_736_000_000_000  # of 1970, in its unit of 100 ns since 1601
_MAX_DICTIONARY = 256 * 1024 * 1024  # bytes that an LZMA stream may ask for
# What zipfile raises for a central directory that makes no sense; UnicodeDecodeError is a ValueError.
_NO_DIRECTORY = (zipfile.BadZipFile, NotImplementedError, ValueError, ArithmeticError, LookupError, EOFError)


@dataclass(slots=True, kw_only=True)
class ZipMember(SourceFile):
    """A regular file of an archive, as the central directory has it."""

    archive: Archive
    header_at: int
    stored: int  # bytes in the archive
    method: int
    crc32: int

    @property
    def origin(self) -> str:
        return f"{self.archive.path}: {self.name!r}"

    @contextmanager
    def open(self) -> Iterator[_Expanded]:
        with self.archive.opened() as file:
            header = file.read_at(_LOCAL.size, self.header_at)
            if len(header) < _LOCAL.size or header[:4] != _LOCAL_SIGNATURE:
                raise SourceDamaged(f"local header at byte {self.header_at}: found {header[:4]!r}, want PK\\x03\\x04")
            *_, name, extra = _LOCAL.unpack(header)
            start = self.header_at + _LOCAL.size + int(name) + int(extra)
            if start + self.stored > self.archive.size:
                raise SourceDamaged(
                    f"its data at bytes {start} to {start + self.stored}: the archive ends at byte {self.archive.size}"
                )
            yield _Expanded(file, self, start)


class ZipSource:
    """The members of an archive."""

    def __init__(self, archive: Archive) -> None:
        self.archive = archive

    def files(self, report: Report) -> Iterable[SourceFile]:
        members = Members(self.archive, report)
        with self.archive.opened() as opened:
            try:
                with open(opened.descriptor, "rb", closefd=False) as file, zipfile.ZipFile(file) as zipped:
                    found = zipped.infolist()
            except _NO_DIRECTORY as error:
                raise SourceDamaged(f"damaged: its directory, before byte {self.archive.size}: {error}") from error
            opened.check()
        for info in found:
            self._take(members, info)
        return members.result()

    def close(self) -> None:
        self.archive.close()

    def _take(self, members: Members, info: zipfile.ZipInfo) -> None:
        raw = _name(info)
        mode = info.external_attr >> 16  # of archives from Unix: st_mode; else 0
        kind = skipped_kind(mode)
        if kind is not None:
            members.skip(raw, kind)
        elif stat.S_ISDIR(mode) or (raw.endswith("/") and not info.file_size):
            members.add_directory(raw)
        elif info.flag_bits & _ENCRYPTED:
            members.refuse(raw, "is encrypted")
        elif info.flag_bits & _PATCH or info.compress_type not in (*_DECOMPRESSORS, _STORED):
            members.refuse(raw, f"is compressed by a method that is not supported, {info.compress_type}")
        elif info.header_offset < 0:
            members.refuse(raw, f"its header is at byte {info.header_offset}")
        elif (name := members.name_of(raw)) is not None:
            members.add(
                ZipMember(
                    name=name,
                    size=info.file_size,
                    mtime_ns=_mtime_ns(info),
                    mode=mode & _PERMISSIONS if mode else None,
                    archive=self.archive,
                    header_at=info.header_offset,
                    stored=info.compress_size,
                    method=info.compress_type,
                    crc32=info.CRC,
                )
            )


class _Decompressor(Protocol):
    """As those of bz2 and lzma."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Inflater:
    """zlib's in the form of the others."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(-zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


class _LzmaExpander:
    """A raw LZMA stream behind its properties (5.8.8): two bytes of a version, two of a length, then so many."""

    def __init__(self) -> None:
        self._head = b""
        self._inner: lzma.LZMADecompressor | None = None

    @property
    def eof(self) -> bool:
        return self._inner is not None and self._inner.eof

    @property
    def needs_input(self) -> bool:
        return self._inner is None or self._inner.needs_input

    def decompress(self, data: bytes, max_length: int) -> bytes:
        if self._inner is None:
            self._head += data
            if len(self._head) < 9:
                return b""
            length, packed, dictionary = struct.unpack_from("<HBL", self._head, 2)
            if length != 5 or packed >= 9 * 5 * 5 or dictionary > _MAX_DICTIONARY:
                raise lzma.LZMAError(f"properties of {length} bytes, {packed}, a dictionary of {dictionary} bytes")
            rest, lc = divmod(packed, 9)
            pb, lp = divmod(rest, 5)
            chain = [{"id": lzma.FILTER_LZMA1, "dict_size": max(dictionary, 4096), "lc": lc, "lp": lp, "pb": pb}]
            self._inner = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=chain)
            data = self._head[9:]
        return self._inner.decompress(data, max_length)


_DECOMPRESSORS: dict[int, Callable[[], _Decompressor]] = {
    _DEFLATED: _Inflater,
    _BZIP2: bz2.BZ2Decompressor,
    _LZMA: _LzmaExpander,
}


class _Expanded:
    """A payload, decompressed as it is read, and checked against its checksum at its end. See `Payload`."""

    path: Path | None = None

    def __init__(self, file: OpenFile, member: ZipMember, start: int) -> None:
        self._file = file
        self._member = member
        self._next = start
        self._stop = start + member.stored
        self._left = member.size
        self._crc32 = 0
        self._is_checked = False
        kind = _DECOMPRESSORS.get(member.method)
        self._decompressor: _Decompressor | None = None if kind is None else kind()

    def read(self, size: int, /) -> bytes:
        pieces = []
        wanted = min(size, self._left)
        while wanted:
            piece = self._more(wanted)
            if not piece:
                raise SourceDamaged(f"ends after {self._member.size - self._left} of {self._member.size} bytes")
            self._crc32 = zlib.crc32(piece, self._crc32)
            self._left -= len(piece)
            wanted -= len(piece)
            pieces.append(piece)
        if not self._left and not self._is_checked:
            self._check_end()
        return b"".join(pieces)

    def check(self) -> None:
        self._file.check()

    def _check_end(self) -> None:
        self._is_checked = True
        # A raw LZMA stream need not say where it ends, and would be taken for one that goes on.
        if self._member.method != _LZMA and self._more(1):
            raise SourceDamaged(f"goes on after its {self._member.size} bytes")
        if self._crc32 != self._member.crc32:
            raise SourceDamaged(f"found a checksum of {self._crc32:08x}, want {self._member.crc32:08x}")

    def _more(self, limit: int) -> bytes:
        """From 1 to `limit` bytes; none at the end."""
        if self._decompressor is None:
            return self._stored(limit)
        while not self._decompressor.eof:
            at = self._next
            is_fed = not self._decompressor.needs_input
            data = b"" if is_fed else self._stored(_CHUNK)
            try:
                piece = self._decompressor.decompress(data, limit)
            except (zlib.error, lzma.LZMAError, OSError, ValueError, EOFError) as error:  # OSError is bz2's
                raise SourceDamaged(f"its data at byte {at}: {error}") from error
            if piece or not (data or is_fed):
                return piece
        return b""

    def _stored(self, limit: int) -> bytes:
        """The next bytes as they lie in the archive."""
        data = self._file.read_at(min(limit, self._stop - self._next), self._next)
        self._next += len(data)
        return data


def _fields(extra: bytes) -> Iterator[tuple[int, bytes]]:
    """Tags and contents of an extra field."""
    at = 0
    while at + _FIELD.size <= len(extra):
        tag, length = _FIELD.unpack_from(extra, at)
        at += _FIELD.size
        yield tag, extra[at : at + length]
        at += length


def _name(info: zipfile.ZipInfo) -> str:
    """A member's name with all its characters: zipfile cuts it at a NUL, and does not know (before Python 3.14) the
    extra field that has it in UTF-8, with the checksum of the name that it belongs to (4.6.9)."""
    name = info.orig_filename
    if info.flag_bits & _UTF8:
        return name
    raw = name.encode("cp437", "replace")
    for tag, content in _fields(info.extra):
        if tag == _UNICODE_PATH and content[:5] == b"\x01" + zlib.crc32(raw).to_bytes(4, "little"):
            return content[5:].decode("utf-8", "surrogateescape")
    return name


def _mtime_ns(info: zipfile.ZipInfo) -> int | None:
    """The modification time: of NTFS, in steps of 100 ns; of Unix, in seconds; else local time, in steps of 2 s. None
    for what is no time."""
    fields = dict(_fields(info.extra))
    ntfs = fields.get(_NTFS, b"")[4:]  # 4.5.5: 4 bytes reserved, then attributes; the first has the times
    if len(ntfs) >= 12 and _FIELD.unpack_from(ntfs) == (1, 24):
        filetime = int.from_bytes(ntfs[4:12], "little")
        if filetime:
            return time_or_none((filetime - _NTFS_EPOCH) * 100)
    unix = fields.get(_UNIX_TIMES, b"")
    if len(unix) >= 5 and unix[0] & 1:
        return int.from_bytes(unix[1:5], "little", signed=True) * 10**9
    year, month, day, hour, minute, second = info.date_time
    try:
        moment = datetime(year, month, day, hour, minute, min(second, 59))  # noqa: DTZ001 - local time is what it is
        return int(time.mktime(moment.timetuple())) * 10**9
    except (ValueError, OverflowError):
        return None
