"""From a path to a source: what it is, its content says, not its name. Blocking."""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import os
import re
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from typing import BinaryIO, cast

from des_format.writer import ReadableBytes
from desfs.errors import DesfsError
from desfs.imports.directory import DirectorySource, FileSource
from desfs.imports.source import Archive, Identity, OpenFile, Source, SourceDamaged, skipped_kind
from desfs.imports.tar import BLOCK, TarSource, is_header
from desfs.imports.zip import ZipSource

_CHUNK = 1024 * 1024
_Reader = Callable[[BinaryIO], ReadableBytes]
# The beginnings of compressed files, and what reads them. The last is LZMA's older form, as lzma(1) writes it.
_COMPRESSIONS: tuple[tuple[bytes, _Reader], ...] = (
    (b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\x00", lzma.LZMAFile),
    (b"]\x00\x00", lzma.LZMAFile),
)
# OSError: gzip's BadGzipFile, and bz2's own. MemoryError: a dictionary of LZMA's may have 4 GiB.
_NOT_DECOMPRESSED = (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, MemoryError)
_ZIP_BEGINNINGS = (b"PK\x03\x04", b"PK\x05\x06")  # a member, or the end of a file without any
_TAR_NAME = re.compile(
    r"\.(tar(\.(gz|bz2|xz|lzma|lz|lz4|lzo|zst|z|br))?|t(gz|az|bz2?|b2|xz|lz|lzma|zst))\Z", re.IGNORECASE
)


class TemporaryFailed(DesfsError):
    """The directory for temporary files has no room, or cannot be written to."""

    def __init__(self, error: OSError) -> None:
        hint = ": set TMPDIR to a directory with more room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        super().__init__(f"temporary files in {tempfile.gettempdir()}: {error.strerror}{hint}")


def open_source(path: str) -> Source:
    """The source at a path. A compressed archive is decompressed, once, into a temporary file.

    Raises: SourceDamaged for what has the name of an archive and is none, or is neither a directory nor a file;
    SourceChanged; TemporaryFailed; OSError.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        return DirectorySource(path)
    if not stat.S_ISREG(status.st_mode):
        kind = skipped_kind(status.st_mode)
        raise SourceDamaged(f"want a directory, an archive or a file, found a {kind.value if kind else 'special file'}")
    archive = Archive(path, Identity.of(status))
    is_called_tar = _TAR_NAME.search(path) is not None
    is_called_zip = path.lower().endswith(".zip")
    with archive.opened() as opened, open(opened.descriptor, "rb", closefd=False) as file:
        head = file.read(BLOCK)
        if is_header(head) or (is_called_tar and head and not any(head)):  # zeros: an archive without members
            return TarSource(archive)
        for beginning, reader in _COMPRESSIONS:
            if head.startswith(beginning) and (is_called_tar or _holds_tar(file, reader)):
                return TarSource(archive.decompressed(_decompress(opened, file, reader)))
        if (head.startswith(_ZIP_BEGINNINGS) and zipfile.is_zipfile(file)) or is_called_zip:
            return ZipSource(archive)
    if is_called_tar:
        found = f"found {head[:8]!r}" if head else "the file is empty"
        raise SourceDamaged(f"damaged at byte 0: {found}, want the header of a tar archive, or gzip, bzip2 or xz")
    return FileSource(path, status)


def _holds_tar(file: BinaryIO, reader: _Reader) -> bool:
    """Whether a compressed file begins as a tar archive does."""
    file.seek(0)
    try:
        return is_header(reader(file).read(BLOCK))
    except _NOT_DECOMPRESSED:
        return False


def _decompress(opened: OpenFile, file: BinaryIO, reader: _Reader) -> BinaryIO:
    """What a compressed file holds, in an unnamed temporary file."""
    file.seek(0)
    stream = reader(file)
    try:
        temporary = cast(BinaryIO, tempfile.TemporaryFile(prefix="desfs-import-"))  # noqa: SIM115 - returned open
    except OSError as error:
        raise TemporaryFailed(error) from error
    written = 0
    try:
        while True:
            try:
                piece = stream.read(_CHUNK)
            except _NOT_DECOMPRESSED as error:
                raise SourceDamaged(f"damaged: after {written} bytes of what it holds decompressed: {error}") from error
            try:
                if not piece:
                    temporary.flush()
                    opened.check()
                    return temporary
                temporary.write(piece)
            except OSError as error:
                raise TemporaryFailed(error) from error
            written += len(piece)
    except BaseException:
        temporary.close()
        raise
