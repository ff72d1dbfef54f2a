"""Tar archives as sources. `tarfile` takes the headers apart; payloads are read here, at any place, by any thread."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import ROUND_FLOOR, Decimal, InvalidOperation
from pathlib import Path
from typing import Any, cast

from desfs.imports.source import (
    Archive,
    Members,
    OpenFile,
    Report,
    Skipped,
    SourceDamaged,
    SourceFile,
    time_or_none,
    without_dots,
)

BLOCK = 512  # bytes (pax(1), ustar Interchange Format)
_PERMISSIONS = 0o7777
# Of the headers of one member: names, extended attributes, the map of a sparse file.
_MAX_HEADER = 8 * 1024 * 1024
# What tarfile raises for bytes that are no header: some of it comes from int(), from slices, from too deep a nesting.
_NO_HEADER = (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError, EOFError)
_LONGEST_NUMBER = 64  # digits of a time

_SKIPPED = {
    tarfile.SYMTYPE: Skipped.SYMBOLIC_LINK,
    tarfile.CHRTYPE: Skipped.CHARACTER_DEVICE,
    tarfile.BLKTYPE: Skipped.BLOCK_DEVICE,
    tarfile.FIFOTYPE: Skipped.FIFO,
}

# Of GNU tar: a directory with the list of its names, and the label of an archive.
_GNU_DIRECTORY, _GNU_LABEL = b"D", b"V"

Extents = tuple[tuple[int, int], ...]


@dataclass(slots=True, kw_only=True)
class TarMember(SourceFile):
    """A regular file of an archive. Its data begin at byte `start`; of a sparse file there are the `extents`, as
    (offset in the file, length), ascending, one after the other: the rest is zeros."""

    archive: Archive
    start: int
    extents: Extents | None = None

    @property
    def origin(self) -> str:
        return f"{self.archive.path}: {self.name!r}"

    @contextmanager
    def open(self) -> Iterator[_Stored]:
        with self.archive.opened() as file:
            yield _Stored(file, self)


class _Stored:
    """A payload as it lies in the archive. See `Payload`."""

    path: Path | None = None

    def __init__(self, file: OpenFile, member: TarMember) -> None:
        self._file = file
        self._size = member.size
        self._extents = member.extents if member.extents is not None else ((0, member.size),)
        self._current = 0  # extent
        self._data_at = member.start  # of the current extent, in the archive
        self._at = 0

    def read(self, size: int, /) -> bytes:
        pieces = []
        stop = min(self._at + size, self._size)
        while self._at < stop:
            pieces.append(self._piece(stop))
            self._at += len(pieces[-1])
        return b"".join(pieces)

    def check(self) -> None:
        self._file.check()

    def _piece(self, stop: int) -> bytes:
        """Some bytes from the position on, at least one."""
        while self._current < len(self._extents):
            offset, length = self._extents[self._current]
            if self._at < offset:
                return bytes(min(stop, offset) - self._at)
            if self._at < offset + length:
                at = self._data_at + self._at - offset
                data = self._file.read_at(min(stop, offset + length) - self._at, at)
                if not data:
                    raise SourceDamaged(f"the archive ends at byte {at}, before the end of the file")
                return data
            self._data_at += length
            self._current += 1
        return bytes(stop - self._at)


class TarSource:
    """The members of an archive that is not compressed, or was decompressed."""

    def __init__(self, archive: Archive) -> None:
        self.archive = archive

    def files(self, report: Report) -> Iterable[SourceFile]:
        members = Members(self.archive, report)
        with self.archive.opened() as file:
            for member, following in self._members(file):
                self._take(members, member, following)
            file.check()
        return members.result()

    def close(self) -> None:
        self.archive.close()

    def _members(self, file: OpenFile) -> Iterator[tuple[tarfile.TarInfo, int]]:
        """The members, each with the position of the header that follows it.

        tarfile ends in silence at a header that is damaged or missing, which would lose the rest of an archive.
        Raises: SourceDamaged with the position.
        """
        headers = _Headers(file)
        at = 0
        try:
            tar = tarfile.TarFile(fileobj=headers, encoding="utf-8", errors="surrogateescape", ignore_zeros=False)
            while True:
                headers.begin_member()
                member = tar.next()
                if member is None:
                    break
                tar.members = []  # type: ignore[attr-defined]  # all of them, else, for as long as the archive is open
                if tar.offset < max(member.offset_data, at + BLOCK):
                    raise self._damaged(at, "a header with a negative size")
                if tar.offset > self.archive.size:
                    raise self._damaged(
                        self.archive.size, f"the archive ends, and {member.name!r} goes on to byte {tar.offset}"
                    )
                yield member, tar.offset
                at = tar.offset
        except _NO_HEADER as error:
            raise self._damaged(at, f"no header: {error}") from error
        block = file.read_at(BLOCK, at)
        if not block:
            raise self._damaged(at, "the archive ends without the blocks of zeros that mark its end: it was cut off")
        if any(block):
            reason = "bad checksum" if len(block) == BLOCK else f"the archive ends after {len(block)} bytes of it"
            raise self._damaged(at, f"no header: {reason}")

    def _damaged(self, at: int, reason: str) -> SourceDamaged:
        return SourceDamaged(f"damaged at {self.archive.position(at)}: {reason}")

    def _take(self, members: Members, member: tarfile.TarInfo, following: int) -> None:
        if member.isdir() or member.type == _GNU_DIRECTORY:
            members.add_directory(member.name)
        elif member.type in _SKIPPED:
            members.skip(member.name, _SKIPPED[member.type])
        elif member.islnk():
            self._take_link(members, member)
        elif not member.isreg():
            if member.type != _GNU_LABEL:
                members.refuse(member.name, f"a member of an unknown type, {member.type!r}")
        elif (name := members.name_of(member.name)) is not None:
            try:
                extents = _extents(member, following)
            except ValueError as error:
                members.refuse(member.name, str(error))
                return
            members.add(
                TarMember(
                    name=name,
                    size=member.size,
                    mtime_ns=_mtime_ns(member),
                    mode=member.mode & _PERMISSIONS,
                    archive=self.archive,
                    start=member.offset_data,
                    extents=extents,
                )
            )

    def _take_link(self, members: Members, member: tarfile.TarInfo) -> None:
        """A hard link is the file that its target is where it stands: with its content, time and mode."""
        name = members.name_of(member.name)
        if name is None:
            return
        target = members.find(without_dots(member.linkname))
        if target is None and (kind := members.find_skipped(without_dots(member.linkname))) is not None:
            members.skip(member.name, kind)
        elif target is None:
            members.refuse(member.name, f"a hard link to {member.linkname!r}, which is no file before it")
        elif target.name != name:
            members.add(replace(target, name=name))


def is_header(block: bytes) -> bool:
    """Whether these 512 bytes are the header of a member: its checksum is right."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except _NO_HEADER:
        return False
    return True


class _Headers(io.RawIOBase):
    """What tarfile reads the headers from. It believes what they say of their size: here they may not be larger than
    they can have to be."""

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self._at = 0
        self._left = _MAX_HEADER

    def begin_member(self) -> None:
        self._left = _MAX_HEADER

    def read(self, size: int = -1, /) -> bytes:
        if not 0 <= size <= self._left:
            raise tarfile.ReadError(f"found {size} bytes of it, want at most {self._left}")
        data = self._file.read_at(size, self._at)
        self._at += len(data)
        self._left -= size
        return data

    def tell(self) -> int:
        return self._at

    def seek(self, position: int, whence: int = io.SEEK_SET, /) -> int:
        if whence != io.SEEK_SET or position < 0:
            raise tarfile.ReadError(f"found a position of {position}")
        self._at = position
        return position


def _extents(member: tarfile.TarInfo, following: int) -> Extents | None:
    """Where the data of a sparse member go, None for one that is not sparse.

    Raises: ValueError for sizes and maps that make no sense.
    """
    if member.size < 0:
        raise ValueError(f"a size of {member.size} bytes")
    stored = following - member.offset_data
    if not member.issparse():
        if member.size > stored:
            raise ValueError(f"a size of {member.size} bytes, of which the archive has {stored}")
        return None
    extents = tuple((offset, length) for offset, length in cast(Any, member.sparse) if length)
    end = 0
    for offset, length in extents:
        if offset < end or length < 0 or offset + length > member.size:
            raise ValueError(f"a sparse file of {member.size} bytes with {length} bytes at {offset}, after {end}")
        end = offset + length
    if sum(length for _, length in extents) > stored:
        raise ValueError(f"a sparse file with more data than the {stored} bytes that the archive has")
    return extents


def _mtime_ns(member: tarfile.TarInfo) -> int | None:
    """Of an extended header (pax(1)) the time is decimal, and tarfile would make a float of it. None for what is no
    time."""
    text = member.pax_headers.get("mtime", str(member.mtime))
    try:
        seconds = Decimal(text if len(text) <= _LONGEST_NUMBER else "NaN")
    except InvalidOperation:
        return None
    if not seconds.is_finite() or seconds.adjusted() > _LONGEST_NUMBER:
        return None
    # The digits past the ninth are cut, downwards: a file does not become younger than it was.
    return time_or_none(int((seconds * 10**9).to_integral_value(ROUND_FLOOR)))
