"""The kernel's requests, turned into calls of the file system and back: nothing is decided here. Trio.

A handle is the inode it was opened for. So the handlers work the same whether the kernel opens files by itself or asks.
"""

from __future__ import annotations

import errno
import functools
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from itertools import chain
from queue import SimpleQueue
from typing import Any, NoReturn, ParamSpec, Protocol, TypeVar

import pyfuse3
import structlog
import trio

from des_format.errors import DesFormatError
from desfs import metrics
from desfs.entries import Attributes, EntryPage
from desfs.errors import DesfsError, NoSuchPath, ReadOnlyMount, errno_of
from desfs.fs import FOREVER_S, FileSystem
from desfs.inode import NOTHING, ROOT, InodeNumber
from desfs.levers import LEVERS
from desfs.push import LeverQueue, PageQueue, PlainQueue
from desfs.settings import MountSettings

log = structlog.get_logger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

_BLOCK = 512  # what st_blocks counts in
_STATFS_BLOCK = 4096
_PREFERRED_READ = 128 * 1024  # st_blksize: what cp and stdio read at a time
_DOTS = 2  # cookies 1 and 2 are `.` and `..`; the file system's own follow
_MAX_NAME = 255


def reply(operation: str) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], Callable[P, Coroutine[Any, Any, R]]]:
    """The one wrapper of every handler: counts, knows what is open, turns errors into FUSEError, logs what it does not
    know. Nothing but FUSEError gets out: any other exception would end pyfuse3's main loop, and leave a request without
    an answer."""

    def wrap(handler: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
        done = metrics.REQUESTS.labels(operation, "OK")
        seconds = metrics.REQUEST_SECONDS.labels(operation)

        @functools.wraps(handler)
        async def handled(*arguments: P.args, **options: P.kwargs) -> R:
            operations: Operations = arguments[0]  # type: ignore[assignment]
            requests = operations.requests
            number = requests.begin(operation)
            try:
                if operations.is_refusing:
                    raise pyfuse3.FUSEError(errno.ENOTCONN)
                answer = await handler(*arguments, **options)
            except (DesfsError, DesFormatError) as error:
                code = errno_of(error)
                if code == errno.EIO:
                    log.warning("request failed", operation=operation, error=str(error))
                _count(operation, code)
                raise pyfuse3.FUSEError(code) from error
            except pyfuse3.FUSEError as error:
                _count(operation, error.errno)
                raise
            except (Exception, trio.Cancelled, BaseExceptionGroup) as error:
                # The next wait of pyfuse3's loop is cancelled again. See Operations.refuse for why it has to be told.
                code = errno.ENOTCONN if _is_cancellation(error) else errno.EIO
                if code == errno.EIO:
                    log.exception("unexpected error", operation=operation)
                _count(operation, code)
                raise pyfuse3.FUSEError(code) from None
            finally:
                seconds.observe(requests.end(number))
            done.inc()
            return answer

        return handled

    return wrap


def _is_cancellation(error: BaseException) -> bool:
    """Whether it is nothing else: of a nursery, which a handler may have, it comes as a group."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)[1] is None
    return isinstance(error, trio.Cancelled)


def _count(operation: str, code: int) -> None:
    metrics.REQUESTS.labels(operation, errno.errorcode.get(code, str(code))).inc()


class Operations(pyfuse3.Operations):
    """A FileSystem as pyfuse3 wants it."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, fs: FileSystem, settings: MountSettings) -> None:
        super().__init__()
        self.requests = fs.requests
        self._fs = fs
        self._uid = settings.uid
        self._gid = settings.gid
        self.is_refusing = False

    def refuse(self) -> None:
        """Answer every request from now on as the kernel does for a dead mount.

        Who puts pages into the kernel or has it forget some waits for those that a pending READ has locked, and holds
        what an unmount needs (fc->killsb: Linux, fs/fuse/dev.c, fuse_notify_store; inode.c, fuse_mount_remove). Neither
        that thread nor the process nor the mount could ever end if nobody answered: seen with Linux 6.18.
        """
        self.is_refusing = True

    @reply("lookup")
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        try:
            return self._entry(await self._fs.lookup(parent_inode, name))
        except NoSuchPath as error:
            if not error.for_long:
                raise
            # Inode 0: the kernel remembers that there is no such name.
            return self._entry(Attributes(NOTHING, 0, 0, 0, FOREVER_S))

    @reply("getattr")
    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._entry(await self._fs.getattr(inode))

    @reply("open")
    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise ReadOnlyMount("opened for writing")
        # keep_cache: what the kernel has of an immutable file stays true. Control files lose theirs by their mtime.
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), keep_cache=True)

    @reply("opendir")
    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        return pyfuse3.FileHandleT(inode)

    @reply("read")
    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        # A memoryview of cached bytes does as well: pyfuse3 takes any buffer.
        return await self._fs.read(fh, off, size)  # type: ignore[return-value]

    @reply("write")
    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> NoReturn:
        # Comes only after somebody has remounted for writing. A kernel that opens by itself then lets a program change
        # pages through a shared mapping, and keeps them when they cannot be written: they have to go.
        self._fs.forget_pages(InodeNumber(fh))
        raise ReadOnlyMount("write")

    @reply("readdir")
    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing = self._listing(token)  # before the first await
        pages: list[EntryPage] = []
        if start_id < _DOTS:
            dots = ((b".", InodeNumber(fh)), (b"..", self._fs.parent(fh)))
            found = [
                (cookie, name, await self._fs.getattr(inode)) for cookie, (name, inode) in enumerate(dots, 1 - _DOTS)
            ]
            pages.append(EntryPage.of(found[start_id:]))
        after = last = max(start_id - _DOTS, 0)
        entries = await self._fs.entries(fh, after)
        with listing:  # no await from here to the reply
            for page in chain(pages, entries):
                room_for = listing.add(page)
                if room_for:
                    last = max(int(page.columns[0, room_for - 1]), last)
                if room_for < len(page.names):
                    break
            self._fs.told(fh, after, last)

    def _listing(self, token: pyfuse3.ReaddirToken) -> Listing:
        """Where the entries of the listing go that was asked for just now."""
        extension = LEVERS.extension
        asked = None if extension is None else extension.asked_listing()
        if asked is None:
            return _EntryList(token, self._entry)
        return _LeverListing(extension, asked, self._uid, self._gid)

    @reply("release")
    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        """Nothing was kept for the handle."""

    @reply("releasedir")
    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        """Nothing was kept for the handle."""

    @reply("flush")
    async def flush(self, fh: pyfuse3.FileHandleT) -> NoReturn:
        # Nothing was written, ever: after ENOSYS the kernel does not ask again when a file is closed.
        raise pyfuse3.FUSEError(errno.ENOSYS)

    @reply("fsync")
    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        """Nothing was written."""

    @reply("fsyncdir")
    async def fsyncdir(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        """Nothing was written."""

    @reply("getxattr")
    async def getxattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext) -> bytes:
        return await self._fs.xattr(inode, name)

    @reply("listxattr")
    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> list[pyfuse3.XAttrNameT]:
        return [pyfuse3.XAttrNameT(name) for name in await self._fs.xattr_names(inode)]

    @reply("statfs")
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        size, files = await self._fs.statfs()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = _STATFS_BLOCK
        data.f_blocks = -(-size // _STATFS_BLOCK)
        data.f_bfree = data.f_bavail = 0
        data.f_files = files
        data.f_ffree = data.f_favail = 0
        data.f_namemax = _MAX_NAME
        return data

    def _entry(self, attributes: Attributes) -> pyfuse3.EntryAttributes:
        inode, mode, size, mtime_ns, timeout_s = attributes
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode)
        entry.st_mode = pyfuse3.ModeT(mode)
        # 1 for directories too: "not known", as btrfs has it; two plus the subdirectories would need them all listed.
        entry.st_nlink = 1
        entry.st_uid = self._uid
        entry.st_gid = self._gid
        entry.st_size = size
        entry.st_blksize = _PREFERRED_READ
        entry.st_blocks = -(-size // _BLOCK)
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = mtime_ns
        entry.entry_timeout = entry.attr_timeout = timeout_s
        return entry


class Listing(Protocol):
    """The reply to a listing, filled from its creation to the handler's return, without an await between."""

    def add(self, page: EntryPage) -> int:
        """Add the entries of a page; how many of them there was room for."""
        ...

    def __enter__(self) -> object: ...

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """After an error nothing of it is sent."""
        ...


class _EntryList:
    """pyfuse3's own way: entry by entry."""

    def __init__(self, token: pyfuse3.ReaddirToken, entry_of: Callable[[Attributes], pyfuse3.EntryAttributes]) -> None:
        self._token = token
        self._entry_of = entry_of

    def add(self, page: EntryPage) -> int:
        # One for all: pyfuse3 copies it into the answer (readdir_reply, fuse_add_direntry_plus).
        entry = self._entry_of(Attributes(ROOT, 0, 0, 0, page.timeout_s))
        for place, (name, row) in enumerate(zip(page.names, page.columns.T.tolist(), strict=True)):
            cookie, entry.st_ino, entry.st_mode, entry.st_size, mtime_ns = row
            entry.st_blocks = -(-entry.st_size // _BLOCK)
            entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = mtime_ns
            if not pyfuse3.readdir_reply(self._token, name, entry, cookie + _DOTS):
                return place
        return len(page.names)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None: ...


class _LeverListing:
    """The C extension's: a page in one call. 200 entries take 30 us instead of 400."""

    def __init__(self, extension: Any, asked: tuple[int, int], uid: int, gid: int) -> None:
        self._extension = extension
        self._asked = asked
        self._owner = uid, gid

    def add(self, page: EntryPage) -> int:
        columns = page.columns.copy()
        columns[0] += _DOTS
        added: int = self._extension.add_entries(page.names, columns, *self._owner, _PREFERRED_READ, page.timeout_s)
        return added

    def __enter__(self) -> None:
        self._extension.begin_entries(*self._asked)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            self._extension.drop_entries()


def _read_only(operation: str) -> Callable[..., Coroutine[Any, Any, NoReturn]]:
    @reply(operation)
    async def refuse(self: Operations, *arguments: object, **options: object) -> NoReturn:
        raise ReadOnlyMount(operation)

    return refuse


# The kernel refuses these by itself on a mount that is `ro`; whoever remounts it otherwise hears the same from us.
for _operation in (
    "create",
    "link",
    "mkdir",
    "mknod",
    "removexattr",
    "rename",
    "rmdir",
    "setattr",
    "setxattr",
    "symlink",
    "unlink",
):
    setattr(Operations, _operation, _read_only(_operation))


def _store(inode: int, payload: Any) -> int:
    """Put a file into the page cache; the errno, 0 if the kernel took it."""
    try:
        pyfuse3.notify_store(pyfuse3.InodeT(inode), 0, payload)  # it takes any buffer
    except OSError as error:
        return error.errno or errno.EIO
    return 0


class KernelNotifier:
    """Tells the kernel what to forget. What can block is done by threads, while requests are answered until `close` has
    returned. Of any thread."""

    def __init__(self) -> None:
        self._calls = 0
        self._returned = threading.Condition()
        self._names: SimpleQueue[tuple[InodeNumber, bytes] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._forget_names, name="forget", daemon=True)
        self._thread.start()

    def forget_entry(self, parent: InodeNumber, name: bytes) -> None:
        self._names.put((parent, name))

    def _forget_names(self) -> None:
        while (found := self._names.get()) is not None:
            self.drop_entry(*found)

    def drop_entry(self, parent: InodeNumber, name: bytes) -> None:
        with self._call(), _unless_unknown():
            pyfuse3.invalidate_entry(pyfuse3.InodeT(parent), pyfuse3.FileNameT(name))

    def page_queue(self) -> PageQueue:
        extension = LEVERS.extension
        return PlainQueue(_store) if extension is None else LeverQueue(extension)

    def forget_attributes(self, inode: InodeNumber) -> None:
        self._forget(inode, attr_only=True)

    def forget_listing(self, inode: InodeNumber) -> None:
        self._forget(inode, attr_only=False)

    def forget_pages(self, inode: InodeNumber) -> None:
        # It waits for the answers to pending requests, so it must not be in the way of them.
        threading.Thread(target=self._forget, args=(inode,), kwargs={"attr_only": False}, daemon=True).start()

    def _forget(self, inode: InodeNumber, *, attr_only: bool) -> None:
        with self._call(), _unless_unknown():
            # There is no writeback here, without which this does not block (pyfuse3's documentation).
            pyfuse3.invalidate_inode(pyfuse3.InodeT(inode), attr_only=attr_only)

    @contextmanager
    def _call(self) -> Iterator[None]:
        with self._returned:
            self._calls += 1
        try:
            yield
        finally:
            with self._returned:
                self._calls -= 1
                self._returned.notify_all()

    def close(self, limit_s: float) -> bool:
        self._names.put(None)
        self._thread.join(limit_s)
        with self._returned:
            return self._returned.wait_for(lambda: not self._calls, limit_s)


@contextmanager
def _unless_unknown() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOENT:  # the kernel does not know it: there is nothing to forget
            log.warning("the kernel did not take a notification", error=str(error))
