"""The name space of a store without a mount: what `desfs ls`, `cat`, `stat` and `extract` read. Trio.

It is the file system that a mount shows, asked by a program instead of by the kernel: same names, same order of
containers, same checks.
"""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import trio

from des_format.errors import DesFormatError
from des_format.shards import CONTAINER_SUFFIX
from desfs.entries import Attributes
from desfs.errors import DesfsError, NoSuchObject, NoSuchPath, NotADirectory
from desfs.fs import FileSystem
from desfs.inode import ROOT, InodeNumber, split_file_inode
from desfs.settings import MountSettings
from desfs.store.base import Listing, Store
from desfs.store.delegating import Delegating
from desfs.store.url import open_store, split_place
from desfs.tasks import first_of

T = TypeVar("T")

_CHUNK = 4 * 1024 * 1024  # bytes of a file at a time: the unit in which large payloads come
_NO_REFRESH_S = 1e9  # a command shows what was there when it began


class Browser:
    """The files of a store, or of one container. Trio thread only. Paths are text with `/`; "" is the top."""

    def __init__(self, fs: FileSystem, top: str) -> None:
        self._fs = fs
        self._top = top

    async def lookup(self, path: str) -> Attributes:
        """What stat shows of a path. Raises: NoSuchPath naming it; NotADirectory; DesfsError."""
        found = await self._fs.getattr(ROOT)
        for part in [part for part in f"{self._top}/{path}".split("/") if part not in ("", ".")]:
            try:
                if not stat.S_ISDIR(found.mode):
                    raise NotADirectory(f"{path}: a part of it is no directory")
                found = await self._fs.lookup(found.inode, part.encode("utf-8", "surrogateescape"))
            except NoSuchPath:
                raise NoSuchPath(f"{path}: no such file or directory") from None
        return found

    async def entries(self, directory: InodeNumber) -> list[tuple[str, Attributes]]:
        """The entries of a directory, in the order of a listing: files in data order, which is the fast one to read."""
        found = []
        for page in await self._fs.entries(directory, 0):
            for name, (_, inode, mode, size, mtime_ns) in zip(page.names, page.columns.T.tolist(), strict=True):
                found.append((name.decode(), Attributes(InodeNumber(inode), mode, size, mtime_ns, page.timeout_s)))
        return found

    async def walk(self, path: str, failed: Callable[[Exception], None]) -> AsyncIterator[tuple[str, Attributes]]:
        """A path and all that is below it, a directory before what is in it. `failed` is told of each directory that
        cannot be listed; the rest goes on. Raises: as lookup, of the path itself."""
        waiting = [(path.strip("/"), await self.lookup(path))]
        while waiting:
            at, attributes = waiting.pop()
            yield at, attributes
            if stat.S_ISDIR(attributes.mode):
                try:
                    inside = await self.entries(attributes.inode)
                except (DesfsError, DesFormatError) as error:
                    failed(error)
                    continue
                waiting += [(f"{at}/{name}" if at else name, each) for name, each in reversed(inside)]

    async def read(self, attributes: Attributes) -> AsyncIterator[bytes | memoryview]:
        """The verified bytes of a file, in order. Raises: CorruptEntry; IsADirectory; StoreError."""
        offset = 0
        while offset < attributes.size or not offset:
            piece = await self._fs.read(attributes.inode, offset, _CHUNK)
            if not piece:
                break
            yield piece
            offset += len(piece)

    def container(self, attributes: Attributes) -> str:
        """The key of the container that a file is in; "" for a directory."""
        if stat.S_ISDIR(attributes.mode):
            return ""
        container = self._fs.views.slots.get(split_file_inode(attributes.inode)[0])
        return "" if container is None else container.info.key

    async def xattrs(self, attributes: Attributes) -> dict[str, bytes]:
        """The extended attributes of a file. Raises: StoreError."""
        names = await self._fs.xattr_names(attributes.inode)
        return {name.decode(): await self._fs.xattr(attributes.inode, name) for name in names}

    def problems(self) -> list[str]:
        """What of the store could not be shown, so far."""
        return self._fs.problems.lines()


def browse(place: str, settings: MountSettings, main: Callable[[Browser], Awaitable[T]]) -> T:
    """Run `main` over a store, or over one container of it (`NAME.des`). Raises: UsageError for a place that is none;
    StoreError; what `main` raises."""

    async def run() -> T:
        store, top = open_place(place, settings)
        try:
            fs = FileSystem(store, settings.model_copy(update={"refresh": _NO_REFRESH_S}))
            await fs.start()
            async with trio.open_nursery() as nursery:
                await nursery.start(fs.fetcher.run)
                result = await main(Browser(fs, top))
                nursery.cancel_scope.cancel()
            return result
        except ExceptionGroup as group:
            raise first_of(group) from None
        except BaseExceptionGroup as group:
            if group.subgroup(KeyboardInterrupt) is not None:
                raise KeyboardInterrupt from None
            raise
        finally:
            store.close()

    return trio.run(run)


def open_place(place: str, settings: MountSettings) -> tuple[Store, str]:
    """The store at a place, and the path in it at which to begin: a container is shown alone.

    Raises: UsageError; NoSuchObject for a container that is not there.
    """
    url, key = split_place(place)
    store = open_store(url, settings.s3_options(), deadline_s=settings.deadline)
    if key is None:
        return store, ""
    alone = OneContainer(store, key)
    if not alone.list(key).objects:
        store.close()
        raise NoSuchObject(f"{place}: no such container")
    return alone, key.rpartition("/")[0] or key.removesuffix(CONTAINER_SUFFIX)


class OneContainer(Delegating):
    """A store in which nothing is listed but one container; what it names beside itself is there. See Store."""

    def __init__(self, store: Store, key: str) -> None:
        super().__init__(store)
        self._key = key

    def list(self, prefix: str = "", *, delimiter: bool = False) -> Listing:
        below, slash, _ = self._key.removeprefix(prefix).partition("/")
        if not self._key.startswith(prefix):
            return Listing((), ())
        if delimiter and slash:
            return Listing((), (f"{prefix}{below}/",))
        objects = self._store.list(self._key, delimiter=True).objects
        return Listing(tuple(info for info in objects if info.key == self._key), ())
