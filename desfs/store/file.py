"""A store in a directory: keys are paths below it. Any thread may call; several processes may share the directory.

Paths are walked from the root one component at a time, and no symbolic link is followed on the way, so that nothing
outside the root is ever read or written through a key.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from desfs.errors import (
    AccessDenied,
    BadAnswer,
    NoSuchObject,
    NoSuchStore,
    ObjectExists,
    ObjectReplaced,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from desfs.metrics import STORE_BYTES, STORE_REQUESTS
from desfs.store.base import Answer, CopyRange, Listing, ObjectInfo, can_begin_keys, check_key

P = ParamSpec("P")
R = TypeVar("R")

# A put writes its file under such a name first. Listings leave it out, and no key may have it.
TEMPORARY_PREFIX = ".desfs-put."
# One read or write when the kernel cannot copy by itself: large enough that its system calls cost nothing.
_COPY_PIECE = 1 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# Without O_NONBLOCK the opening of a FIFO waits for its writer.
_OBJECT = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# EOVERFLOW, ELOOP: a link or a file of another kind stands there, which is no object.
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR, errno.ENXIO, errno.EILSEQ}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
# What a network file system says when its server restarts, or this process when it has too much open.
_PASSING = {errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EBUSY}
# The kernel copies only between certain files, and some file systems not at all.
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


def _counted(
    operation: str,
) -> Callable[[Callable[Concatenate[FileStore, P], R]], Callable[Concatenate[FileStore, P], R]]:
    """Counts each call of a method as a request, with "ok" or its error's name, and translates what the system says."""

    def decorate(method: Callable[Concatenate[FileStore, P], R]) -> Callable[Concatenate[FileStore, P], R]:
        def counting(self: FileStore, /, *args: P.args, **kwargs: P.kwargs) -> R:
            status = "ok"
            try:
                return method(self, *args, **kwargs)
            except StoreError as error:
                status = type(error).__name__
                raise
            except OSError as error:
                key = str(args[0]) if args else ""
                translated = self._translated(error, key, writing=operation in ("put", "copy"))
                status = type(translated).__name__
                raise translated from error
            finally:
                STORE_REQUESTS.labels(operation, status).inc()

        functools.update_wrapper(counting, method)
        return counting

    return decorate


class FileStore:
    """The store below the directory `root`; with `create`, the directory is made if it is missing."""

    def __init__(self, root: str | os.PathLike[str], *, create: bool = False) -> None:
        """Raises NoSuchStore if `root` is no directory, AccessDenied if it cannot be made."""
        self._root = os.path.abspath(root)
        try:
            if create:
                os.makedirs(self._root, exist_ok=True)
            os.close(os.open(self._root, _DIRECTORY))
        except OSError as error:
            raise self._translated(error, "") from error

    @property
    def url(self) -> str:
        return Path(self._root).as_uri()

    @_counted("list")
    def list(self, prefix: str = "", *, delimiter: bool = False) -> Listing:
        folder, _, start = prefix.rpartition("/")
        above = folder.split("/") if folder else []
        if not can_begin_keys(prefix):
            self._open_directory([]).close()  # a missing root is reported all the same
            return Listing((), ())
        objects: list[ObjectInfo] = []
        prefixes: list[str] = []
        waiting = [above]
        while waiting:
            parts = waiting.pop()
            base = "".join(part + "/" for part in parts)
            for entry in self._scan(parts):
                if parts is above and not entry.name.startswith(start):
                    continue
                if not entry.is_dir:
                    objects.append(ObjectInfo(base + entry.name, entry.size, entry.etag, entry.mtime_ns))
                elif not delimiter:
                    waiting.append([*parts, entry.name])
                elif self._holds_object([*parts, entry.name]):
                    prefixes.append(base + entry.name + "/")
        objects.sort(key=lambda found: os.fsencode(found.key))
        prefixes.sort(key=os.fsencode)
        return Listing(tuple(objects), tuple(prefixes))

    @_counted("get")
    def get_range(self, key: str, start: int, stop: int, *, if_match: str | None = None) -> Answer:
        if not 0 <= start < stop:
            raise ValueError(f"range [{start}, {stop}) is empty or negative")
        with self._opened(key) as (fd, found):
            _check_version(key, found, if_match)
            if stop > found.st_size:
                raise _outside(key, start, stop, found.st_size)
            return self._answer(key, fd, found, start, stop, if_match)

    @_counted("get")
    def get_tail(self, key: str, length: int) -> Answer:
        if length <= 0:
            raise ValueError(f"a tail of {length} bytes is none")
        with self._opened(key) as (fd, found):
            return self._answer(key, fd, found, max(0, found.st_size - length), found.st_size, None)

    @_counted("put")
    def put(self, key: str, source: bytes | Path, *, if_absent: bool = True) -> str:
        if isinstance(source, bytes):
            return self._publish(key, lambda target: _write(target, source), if_absent)
        try:
            opened = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(f"cannot read {str(source)!r}: {error.strerror}") from error
        with _Descriptor(opened) as fd:
            return self._publish(key, lambda target: _copy(fd, 0, None, target), if_absent)

    @_counted("delete")
    def delete(self, key: str) -> None:
        *above, name = self._parts(key)
        try:
            with self._open_directory(above) as directory:
                with contextlib.suppress(IsADirectoryError):  # no object, so there is none to delete
                    os.unlink(name, dir_fd=directory)
                os.fsync(directory)
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
            self._open_directory([]).close()  # nothing is there, but is the store?

    @_counted("copy")
    def copy_ranges(self, key: str, pieces: Sequence[bytes | CopyRange], *, if_absent: bool = True) -> str:
        def fill(target: int) -> int:
            return sum(
                _write(target, piece) if isinstance(piece, bytes) else self._copy_piece(piece, target)
                for piece in pieces
            )

        return self._publish(key, fill, if_absent)

    def close(self) -> None:
        """Nothing is kept open."""

    # --- reading -------------------------------------------------------------------------------------------------

    def _parts(self, key: str) -> Sequence[str]:
        check_key(key)
        parts = key.split("/")
        if any(part.startswith(TEMPORARY_PREFIX) for part in parts):
            raise StoreError(f"{key!r} cannot be a key: names with {TEMPORARY_PREFIX!r} are the store's own")
        return parts

    def _open_directory(self, parts: Sequence[str], *, make: bool = False) -> _Descriptor:
        """The directory of these components, made (and its entry durable) if need be."""
        at = os.open(self._root, _DIRECTORY)
        for part in parts:
            with _Descriptor(at):
                try:
                    below = os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
                except FileNotFoundError:
                    if not make:
                        raise
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, dir_fd=at)
                    os.fsync(at)
                    below = os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            at = below
        return _Descriptor(at)

    @contextlib.contextmanager
    def _opened(self, key: str) -> Iterator[tuple[int, os.stat_result]]:
        *above, name = self._parts(key)
        with self._open_directory(above) as directory:
            opened = os.open(name, _OBJECT, dir_fd=directory)
        with _Descriptor(opened) as fd:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise NoSuchObject(f"{self._named(key)} is no regular file")
            yield fd, found

    def _answer(self, key: str, fd: int, found: os.stat_result, start: int, stop: int, if_match: str | None) -> Answer:
        """The bytes, if the file is still the same when they have been read: a writer may be at it."""
        pieces: list[bytes] = []
        at = start
        while at < stop and (piece := os.pread(fd, stop - at, at)):
            pieces.append(piece)
            at += len(piece)
        etag = _etag(found)
        if _etag(os.fstat(fd)) != etag:
            raise (BadAnswer if if_match is None else ObjectReplaced)(f"{self._named(key)} changed while it was read")
        if at != stop:
            raise BadAnswer(f"{self._named(key)}: asked for bytes {start}-{stop - 1}, got {at - start} of them")
        STORE_BYTES.labels("received").inc(stop - start)
        return Answer(pieces[0] if len(pieces) == 1 else b"".join(pieces), etag, found.st_size)

    def _scan(self, parts: Sequence[str]) -> Sequence[_Found]:
        """Files and directories in a directory; a directory that is not there (any more) has none."""
        entries: list[_Found] = []
        try:
            with self._open_directory(parts) as directory, os.scandir(directory) as scan:
                for entry in scan:
                    if entry.name.startswith(TEMPORARY_PREFIX):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        entries.append(_Found(entry.name, None))
                    elif entry.is_file(follow_symlinks=False):
                        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                            entries.append(_Found(entry.name, entry.stat(follow_symlinks=False)))
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
            self._open_directory([]).close()  # nothing is there, but is the store?
        return entries

    def _holds_object(self, parts: Sequence[str]) -> bool:
        """Whether there is a file anywhere below: S3 has no empty directories, so listings show none here."""
        waiting = [parts]
        while waiting:
            at = waiting.pop()
            for entry in self._scan(at):
                if not entry.is_dir:
                    return True
                waiting.append([*at, entry.name])
        return False

    # --- writing -------------------------------------------------------------------------------------------------

    def _publish(self, key: str, fill: Callable[[int], int], if_absent: bool) -> str:
        """Write a file under a temporary name, and give it its own when it is durable.

        died before    leaves
        link, rename   the temporary file, which no listing shows
        unlink         the object, and the temporary file as a second name of it
        """
        *above, name = self._parts(key)
        temporary = TEMPORARY_PREFIX + secrets.token_hex(8)
        with self._open_directory(above, make=True) as directory:
            self._check_target(key, name, directory, if_absent)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with _Descriptor(os.open(temporary, flags, 0o666, dir_fd=directory)) as target:
                try:
                    written = fill(target)
                    os.fsync(target)
                    if if_absent:
                        self._link(key, temporary, name, directory)
                    else:
                        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
                    etag = _etag(os.fstat(target))
                finally:
                    with contextlib.suppress(FileNotFoundError):  # renamed
                        os.unlink(temporary, dir_fd=directory)
            os.fsync(directory)
        STORE_BYTES.labels("sent").inc(written)
        return etag

    def _check_target(self, key: str, name: str, directory: int, if_absent: bool) -> None:
        """Before anything is written: what would be refused in the end. Only the link or rename decides."""
        try:
            there = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(there.st_mode):
            raise StoreError(f"{self._named(key)} is a directory: no object can be stored there")
        if if_absent:
            raise ObjectExists(f"{self._named(key)} exists already")

    def _link(self, key: str, temporary: str, name: str, directory: int) -> None:
        try:
            os.link(temporary, name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
        except FileExistsError as error:
            raise ObjectExists(f"{self._named(key)} exists already") from error
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise StoreError(
                    f"{self._named(key)}: the file system has no hard links, which a store needs"
                ) from error
            raise

    def _copy_piece(self, piece: CopyRange, target: int) -> int:
        try:
            with self._opened(piece.key) as (fd, found):
                _check_version(piece.key, found, piece.etag)
                if not 0 <= piece.start <= piece.stop <= found.st_size:
                    raise _outside(piece.key, piece.start, piece.stop, found.st_size)
                copied = _copy(fd, piece.start, piece.stop, target)
                _check_version(piece.key, os.fstat(fd), piece.etag)
        except OSError as error:
            if error.errno in _ABSENT:  # else the error would seem to be the new object's
                raise NoSuchObject(f"{self._named(piece.key)} does not exist") from error
            raise
        if copied != piece.stop - piece.start:
            raise BadAnswer(f"{self._named(piece.key)}: copied {copied} of {piece.stop - piece.start} bytes")
        return copied

    # --- errors --------------------------------------------------------------------------------------------------

    def _named(self, key: str) -> str:
        return repr(os.path.join(self._root, key))

    def _translated(self, error: OSError, key: str, *, writing: bool = False) -> StoreError:
        reason = error.strerror or type(error).__name__
        if error.errno in _ABSENT and not os.path.isdir(self._root):
            return NoSuchStore(f"{self._root!r} is no directory")
        message = f"{self._named(key)}: {reason}"
        if error.errno in _ABSENT and not writing:
            return NoSuchObject(f"{self._named(key)} does not exist" if error.errno == errno.ENOENT else message)
        for numbers, kind in ((_FULL, StoreFull), (_DENIED, AccessDenied)):
            if error.errno in numbers:
                return kind(message)
        return StoreUnavailable(message) if error.errno in _PASSING else StoreError(message)


class _Descriptor:
    """An open file descriptor, closed at the end of its block."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._fd)


class _Found:
    """A directory entry: a directory, or a file with its stat."""

    __slots__ = ("etag", "is_dir", "mtime_ns", "name", "size")

    def __init__(self, name: str, found: os.stat_result | None) -> None:
        self.name = name
        self.is_dir = found is None
        self.size = found.st_size if found else 0
        self.etag = _etag(found) if found else ""
        self.mtime_ns = found.st_mtime_ns if found else 0


def _etag(found: os.stat_result) -> str:
    """A replaced file has another inode number or, if that was used again, another time."""
    return f"{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}"


def _check_version(key: str, found: os.stat_result, if_match: str | None) -> None:
    if if_match is not None and _etag(found) != if_match:
        raise ObjectReplaced(f"{key!r} is version {_etag(found)}, not {if_match}")


def _outside(key: str, start: int, stop: int, size: int) -> BadAnswer:
    error = BadAnswer(f"{key!r}: asked for bytes {start}-{stop - 1}, but the object has {size} bytes")
    error.temporary = False  # asking again would not help
    return error


def _write(target: int, data: bytes) -> int:
    view = memoryview(data)
    at = 0
    while at < len(view):
        at += os.write(target, view[at:])
    return at


def _copy(fd: int, start: int, stop: int | None, target: int) -> int:
    """Copy the bytes from `start` to `stop` (None: the end) to the target's position; how many there were."""
    at = start
    in_kernel = True
    while stop is None or at < stop:
        # The kernel takes at most 2 GiB at a time.
        wanted = (1 << 30) if stop is None else min(1 << 30, stop - at)
        if in_kernel:
            try:
                copied = os.copy_file_range(fd, target, wanted, at)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                in_kernel = False
                continue
        else:
            copied = _write(target, os.pread(fd, min(wanted, _COPY_PIECE), at))
        if copied == 0:
            if in_kernel and at == start:
                in_kernel = False  # files of /proc and some network file systems copy as empty: see copy_file_range(2)
                continue
            break
        at += copied
    return at - start
