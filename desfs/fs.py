"""The file system in plain types: what the kernel asks, answered without knowing FUSE. Trio thread only.

Everything is computed from an inode number: files carry their container's slot and row, directories are found by the
hash of their path. The one table is that of the directories which somebody has looked up.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import structlog
import trio

from des_format.meta import NO_MODE, NO_TIME
from desfs import metrics
from desfs.caches import Caches
from desfs.container import OpenContainer
from desfs.control import ControlDirectory
from desfs.day import DayView, File
from desfs.entries import COLUMNS, Attributes, EntryPage
from desfs.errors import (
    IsADirectory,
    NoSuchAttribute,
    NoSuchPath,
    NotADirectory,
    StaleInode,
    StoreError,
)
from desfs.fetch import Fetcher
from desfs.inode import (
    CONTROL_DIRECTORY,
    ROOT,
    InodeNumber,
    directory_inode,
    file_inode,
    is_directory_inode,
    split_file_inode,
)
from desfs.layout import CONTROL_NAME
from desfs.levers import LEVERS
from desfs.moves import Moves, refreshed
from desfs.prefetch import DayShape, Prefetcher
from desfs.problems import Problems
from desfs.push import PageQueue, Pusher
from desfs.requests import OpenRequests
from desfs.settings import MountSettings
from desfs.store.base import Store
from desfs.store_threads import StoreThreads
from desfs.surroundings import Changes
from desfs.totals import Totals
from desfs.tree import DayTree, Page
from desfs.views import Views
from desfs.xattrs import Xattrs

log = structlog.get_logger(__name__)

T = TypeVar("T")

# Of `memory`: what the allocator keeps of buffers that came and went. A quarter, but this at least (seen: 20 to 30 MiB
# after a thousand of 4 MiB, and twice that after a scan of 1.2 GB).
_SLACK = 32 * 1024 * 1024
# The kernel keeps what it knows of names and attributes, and is told what to forget: containers are immutable, and the
# refresh tells what came and went. Not longer, in case that it did not take a notification.
FOREVER_S = 86400.0
# What SIGHUP can change.
LIVE_SETTINGS = frozenset(("refresh", "deadline", "log_level", "log_format", "log_file"))
_READ_BYTES = metrics.READ_BYTES.labels("read")
_LEAVE_S = 5.0  # for the kernel to take what it is being told
_FORGET_S = 1.0  # that a reader who is told of a change waits for the kernel to forget the old name
_FORGETTING = 8  # at a time
_DEFAULT_FILE_MODE = 0o644
_MAX_SIZE = 2**63 - 1  # what stat can show; a damaged entry may claim more
_DIRECTORY_MODE = 0o755


class KernelCache(Protocol):
    """What the kernel has to forget when the store changes. Never blocks."""

    def forget_entry(self, parent: InodeNumber, name: bytes) -> None:
        """The name does not mean what it meant."""
        ...

    def drop_entry(self, parent: InodeNumber, name: bytes) -> None:
        """As forget_entry, but it is done on return: called in a thread, and may wait for pending lookups."""
        ...

    def forget_attributes(self, inode: InodeNumber) -> None:
        """The attributes are out of date. A directory's listing is kept if they turn out to be the same."""
        ...

    def forget_listing(self, inode: InodeNumber) -> None:
        """The listing of a directory may be out of date, whatever its attributes are."""
        ...

    def forget_pages(self, inode: InodeNumber) -> None:
        """The kernel's pages of a file are not what the file has."""
        ...

    def page_queue(self) -> PageQueue:
        """Where files are queued whose whole content it is to keep; served by a thread of its own, which may wait for a
        pending read."""
        ...

    def close(self, limit_s: float) -> bool:
        """Take nothing more, and wait for what the kernel has been told; False when it is not done in time. Blocks:
        requests have to be answered meanwhile."""
        ...


class FileSystem:
    """The name space of a store: days, directories, files, and `/.desfs`."""

    def __init__(self, store: Store, settings: MountSettings) -> None:
        self.settings = settings
        self.problems = Problems()
        self.requests = OpenRequests()
        self.threads = StoreThreads(store, settings.deadline)
        self.caches = Caches(settings, self.problems)
        self.views = Views(
            self.threads, self.problems, strict=settings.strict, on_change=self._forget, load=self.caches.load
        )
        payloads = settings.memory - max(settings.memory // 4, min(_SLACK, settings.memory // 2))
        self.fetcher = Fetcher(self.threads, self.problems, payloads, max_gap=settings.max_gap, disk=self.caches.disk)
        self.prefetcher = Prefetcher(self.fetcher, payloads, settings.max_prefetch)
        self.totals = Totals(self.views)
        self._xattrs = Xattrs(self.threads, self.fetcher)
        self._control = ControlDirectory(self.render_control)
        self._directories: dict[int, tuple[DayView, bytes]] = {}
        self._moves = Moves(self.views, self._forget_stale)
        self._kernel: KernelCache | None = None
        self._reconfigured = trio.Event()
        self._forgetting = trio.CapacityLimiter(_FORGETTING)
        self._started = time.time()
        self._file_mask = ~settings.umask & 0o7777
        self._directory_mode = stat.S_IFDIR | _DIRECTORY_MODE & self._file_mask

    async def start(self) -> None:
        """Reach the store once. Raises: StoreError: there is nothing to mount."""
        await self.views.start()

    async def run(self, kernel: KernelCache, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fetch what is read, and refresh the days that may change, until cancelled. It has ended when the kernel has
        taken what it was told: the caller has requests answered until then, at least with an error."""
        self._kernel = kernel
        pusher = Pusher(kernel.page_queue(), self.settings.memory // 8)
        pusher.start()
        self.prefetcher.pusher = pusher
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.fetcher.run)
                await nursery.start(self.totals.run)
                task_status.started()
                while True:
                    self._reconfigured = trio.Event()
                    with trio.move_on_after(self.settings.refresh):
                        await self._reconfigured.wait()
                        continue
                    await self.refresh()
        finally:
            self.prefetcher.pusher = None
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._leave_kernel, kernel, pusher, limiter=trio.CapacityLimiter(1))

    @staticmethod
    def _leave_kernel(kernel: KernelCache, pusher: Pusher) -> None:
        pushed, told = pusher.stop(_LEAVE_S), kernel.close(_LEAVE_S)
        if not (pushed and told):
            log.error("the kernel still waits for the answer to a request: this process may not be able to end")

    def reconfigure(self, settings: MountSettings) -> list[str]:
        """Take over the settings that may change under a mount, LIVE_SETTINGS; the names of the others that differ."""
        changed = [name for name, value in settings if value != getattr(self.settings, name)]
        live = {name: getattr(settings, name) for name in LIVE_SETTINGS}
        self.settings = self.settings.model_copy(update=live)
        self.threads.deadline_s = settings.deadline
        self._reconfigured.set()
        return [name for name in changed if name not in LIVE_SETTINGS]

    async def refresh(self, *, everything: bool = False) -> None:
        """List again what is due, or all that somebody has looked at, and make the kernel forget what has changed. A
        failure keeps the old view."""
        changed = await refreshed(self.views.refresh_root) or set()
        changed |= await refreshed(self.views.refresh_folders) or set()
        if self._kernel is not None and changed:
            self._kernel.forget_attributes(ROOT)
            for name in changed:
                self._kernel.forget_entry(ROOT, name.encode())
        elif self._kernel is not None and self.views.may_show_more():
            self._kernel.forget_listing(ROOT)  # only who lists the root looks into its folders
        self.prefetcher.keep_days(day.name for day in self.views.known_days())
        now = trio.current_time()
        for day in self.views.known_days():
            # Half an interval of grace: a day listed just after the last round is not left for one more.
            if everything or day.due(now + self.settings.refresh / 2, self.settings.refresh):
                await refreshed(day.refresh)

    async def refresh_day(self, name: str) -> None:
        """List a day again that somebody says has changed; the root, when it is new. Raises nothing, as `refresh`."""
        day = self.views.known(name)
        if day is not None:
            await refreshed(day.refresh)
        elif name not in self.views.names:
            await self.refresh()

    async def lookup(self, parent: int, name: bytes) -> Attributes:
        """The entry `name` of a directory. Raises: NoSuchPath, NotADirectory; StoreError."""
        if parent == ROOT:
            if name == CONTROL_NAME.encode():
                return self._control_attributes(CONTROL_DIRECTORY)
            day = await self._day(name)
            if day.is_open:
                await day.ensure_listed()  # for its mtime; what is in it will be asked for next
            return self._day_attributes(day)
        if parent == CONTROL_DIRECTORY:
            return self._control_attributes(self._control.lookup(name))
        day, folder = self._directory(parent)
        path = folder + b"/" + name if folder else name
        found = await day.find(path)
        return self._directory_attributes(day, path) if found is None else self._file_attributes(*found)

    async def getattr(self, inode: int) -> Attributes:
        """What stat shows of an inode. Raises: StaleInode."""
        if inode == ROOT:
            return Attributes(ROOT, self._directory_mode, 0, self.views.root_mtime_ns, FOREVER_S)
        if self._control.owns(inode):
            return self._control_attributes(InodeNumber(inode))
        if is_directory_inode(inode):
            day, path = self._directory(inode)
            return self._directory_attributes(day, path) if path else self._day_attributes(day)
        return self._file_attributes(*self._file(inode))

    async def entries(self, inode: int, after: int) -> Iterator[EntryPage]:
        """The entries of a directory behind the cookie `after` (0: all), without `.` and `..`, a page at a time. What
        has to be fetched for them has been fetched when this returns.

        Raises: NotADirectory, StaleInode; DamagedDay; StoreError.
        """
        if inode == ROOT:
            return self._pages(await self._days(after))
        if inode == CONTROL_DIRECTORY:
            files = enumerate(self._control.files()[after:], after + 1)
            return self._pages([(place, name, self._control_attributes(file)) for place, (name, file) in files])
        day, path = self._directory(inode)
        if not after:
            self.prefetcher.listing(day.name, path)
        tree = await day.load()
        if not tree.is_ready(path):
            await trio.to_thread.run_sync(tree.prepare, path)
        return self._entries(day, tree, path, after)

    def told(self, inode: int, after: int, upto: int) -> None:
        """The kernel is being told of the entries of a directory behind the cookie `after`, up to `upto`: their content
        can follow."""
        found = self._directories.get(inode)
        tree = None if found is None or after >= upto else found[0].tree
        if found is not None and tree is not None:
            for slot, rows in tree.listed(found[1], after, upto):
                self.prefetcher.listed(found[0].name, self.views.slots[slot], rows)

    def parent(self, inode: int) -> InodeNumber:
        """The directory that a directory is in; the root is in itself. Raises: NotADirectory, StaleInode."""
        if inode in (ROOT, CONTROL_DIRECTORY):
            return ROOT
        day, path = self._directory(inode)
        if not path:
            return ROOT
        return self._directory_inode(day.name.encode(), path.rpartition(b"/")[0])

    async def read(self, inode: int, offset: int, size: int) -> bytes | memoryview:
        """The bytes [offset, offset + size) of a file, every one up to its end: the kernel fills a short answer with
        zeros. Raises: StaleInode when the container was replaced or removed; CorruptEntry; StoreError."""
        if self._control.owns(inode):
            return self._control.read(inode)[offset : offset + size]
        if is_directory_inode(inode) or inode == ROOT:
            raise IsADirectory(f"inode {inode:#x} is a directory")

        async def read(container: OpenContainer, row: int) -> bytes | memoryview:
            return await self.prefetcher.read(self._shape_of(container), container, row, offset, size)

        answer = await self._moves.current(self._file(inode), read)
        _READ_BYTES.inc(len(answer))
        return answer

    def _shape_of(self, container: OpenContainer) -> DayShape:
        day = self.views.day_of(container)
        if day is None:
            return DayShape("", (), None, lambda path: 0)
        return DayShape(day.name, day.route, day.tree, partial(self._directory_inode, day.name.encode()))

    async def xattr(self, inode: int, name: bytes) -> bytes:
        """An extended attribute. Raises: NoSuchNamespace, NoSuchAttribute; StaleInode; StoreError."""
        Xattrs.check_name(name)
        if self._control.owns(inode) or is_directory_inode(inode) or inode == ROOT:
            raise NoSuchAttribute(name.decode("utf-8", "backslashreplace"))
        values = await self._moves.current(self._file(inode), self._xattrs.of)
        if name not in values:
            raise NoSuchAttribute(name.decode("utf-8", "backslashreplace"))
        return values[name]

    async def xattr_names(self, inode: int) -> list[bytes]:
        """The names of a file's extended attributes; directories have none. Raises: StaleInode; StoreError."""
        if self._control.owns(inode) or is_directory_inode(inode) or inode == ROOT:
            return []
        return list(await self._moves.current(self._file(inode), self._xattrs.of))

    def forget_pages(self, inode: InodeNumber) -> None:
        """Let the kernel ask for a file's bytes again."""
        if self._kernel is not None:
            self._kernel.forget_pages(inode)

    async def statfs(self) -> tuple[int, int]:
        """(bytes of the store, files in the indexes that have been read): nobody knows the others'."""
        return await self.totals.bytes(), self._open_totals()[1]

    def _open_totals(self) -> tuple[int, int]:
        """(bytes, files) of the containers that are open."""
        size = files = 0
        for container in self.views.slots:
            size += container.info.size
            files += len(container.loaded.index)
        return size, files

    def render_control(self, name: str) -> object:
        """What a control file shows, as a JSON value or lines. No request to the store."""
        if name == "problems":
            return self.problems.lines()
        if name == "config":
            return {"source": self.threads.store.url, **self.settings.model_dump(mode="json")}
        if name == "containers":
            return [
                {"day": day.name, "key": key, "bytes": size, "state": state, "files": files}
                for day in sorted(self.views.known_days(), key=lambda day: day.name)
                for key, size, state, files in day.containers()
            ]
        size, files = self._open_totals()
        return {
            "source": self.threads.store.url,
            "uptime_seconds": round(time.time() - self._started, 3),
            "open_containers": {"bytes": size, "files": files},
            "days": {day.name: {"files": day.file_count()} for day in self.views.known_days()},
            "block_cache": {"pieces": len(self.fetcher.cache), "bytes": self.fetcher.cache.bytes},
            "caches": self.caches.state(),
            "link": self.threads.meter.link()._asdict(),
            "levers": LEVERS.report(),
            "requests": self.requests.state(but_youngest=True),
            "metrics": metrics.snapshot(),
        }

    async def _days(self, after: int) -> list[tuple[int, bytes, Attributes]]:
        """The directories of the root behind a position."""
        days = []
        for name in await self.views.root_names():
            entry = self.views.names.get(name)
            if entry is None or entry.ordinal <= after:
                continue
            try:
                days.append((entry.ordinal, await self.views.day(name)))
            except NoSuchPath:
                continue  # it went meanwhile
        async with trio.open_nursery() as nursery:
            for _, day in days:
                if day.is_open:
                    nursery.start_soon(self._list_if_possible, day)  # for its mtime
        return [(place, day.name.encode(), self._day_attributes(day)) for place, day in days]

    @staticmethod
    async def _list_if_possible(day: DayView) -> None:
        try:
            await day.ensure_listed()
        except StoreError as error:
            log.warning("a day is shown without having been listed", day=day.name, error=str(error))

    @staticmethod
    def _pages(entries: Sequence[tuple[int, bytes, Attributes]]) -> Iterator[EntryPage]:
        """Those that are there anyway, as one page."""
        if entries:
            yield EntryPage.of(entries)

    def _entries(self, day: DayView, tree: DayTree, path: bytes, after: int) -> Iterator[EntryPage]:
        prefix = path + b"/" if path else b""
        for page in tree.pages(path, after):
            if page.shares:
                yield self._file_page(page)
            else:
                directories = zip(page.cookies, page.names, strict=True)
                yield EntryPage.of(
                    [(cookie, name, self._directory_attributes(day, prefix + name)) for cookie, name in directories]
                )

    def _file_page(self, page: Page) -> EntryPage:
        """The attributes of files as `_file_attributes` has them, computed for all together."""
        columns = np.empty((len(COLUMNS), len(page.names)), np.int64)
        cookies, inodes, modes, sizes, mtimes_ns = columns
        cookies[:] = page.cookies
        for member, rows, places in page.shares:
            loaded = self.views.slots[member.slot].loaded
            inodes[places] = rows.astype(np.int64) + file_inode(member.slot, 0)
            mode = loaded.meta.mode[rows]
            modes[places] = np.where(mode == NO_MODE, _DEFAULT_FILE_MODE, mode)
            sizes[places] = np.minimum(loaded.index.data_length[rows], _MAX_SIZE)
            mtime_ns = loaded.meta.mtime_ns[rows]
            mtimes_ns[places] = np.where(mtime_ns == NO_TIME, loaded.info.mtime_ns, mtime_ns)
        modes &= self._file_mask
        modes |= stat.S_IFREG
        return EntryPage(page.names, columns, FOREVER_S)

    async def _day(self, name: bytes) -> DayView:
        try:
            text = name.decode()
        except UnicodeDecodeError:
            raise NoSuchPath("no name of a day is anything but UTF-8", for_long=True) from None
        return await self.views.day(text)

    def _directory(self, inode: int) -> tuple[DayView, bytes]:
        found = self._directories.get(inode)
        if found is None:
            if is_directory_inode(inode):
                raise StaleInode(f"directory {inode:#x} is not known any more")
            raise NotADirectory(f"inode {inode:#x} is no directory")
        if not self.views.is_current(found[0]):
            day = self.views.known(found[0].name)
            if day is None:
                del self._directories[inode]
                raise StaleInode(f"{found[0].name} is not there any more")
            found = self._directories[inode] = (day, found[1])  # it went and came again
        return found

    def _file(self, inode: int) -> File:
        slot, row = split_file_inode(inode)
        container = self.views.slots.get(slot)
        if container is None or not 0 <= row < container.loaded.index.rows:
            raise StaleInode(f"the container of inode {inode:#x} is not there any more")
        return File(container, row)

    def _day_attributes(self, day: DayView) -> Attributes:
        inode = self._directory_inode(day.name.encode(), b"")
        self._directories[inode] = (day, b"")
        return Attributes(inode, self._directory_mode, 0, day.mtime_ns, FOREVER_S)

    def _directory_attributes(self, day: DayView, path: bytes) -> Attributes:
        inode = self._directory_inode(day.name.encode(), path)
        self._directories[inode] = (day, path)
        return Attributes(inode, self._directory_mode, 0, day.mtime_ns, FOREVER_S)

    def _directory_inode(self, day: bytes, path: bytes) -> InodeNumber:
        """The inode of a directory of a day; `path` is b"" for the day itself."""
        if not path:
            return directory_inode(day)
        return directory_inode(day + b"/" + path, self.views.layout.group_of(path.decode() + "/"))

    def _file_attributes(self, container: OpenContainer, row: int) -> Attributes:
        loaded = container.loaded
        mode = int(loaded.meta.mode[row])
        mtime_ns = int(loaded.meta.mtime_ns[row])
        return Attributes(
            file_inode(container.slot, row),
            stat.S_IFREG | (_DEFAULT_FILE_MODE if mode == NO_MODE else mode) & self._file_mask,
            min(int(loaded.index.data_length[row]), _MAX_SIZE),
            loaded.info.mtime_ns if mtime_ns == NO_TIME else mtime_ns,
            FOREVER_S,
        )

    def _control_attributes(self, inode: InodeNumber) -> Attributes:
        if inode == CONTROL_DIRECTORY:
            return Attributes(inode, self._directory_mode, 0, time.time_ns(), 0.0)
        # No timeout, and a new mtime with each content: the kernel then drops the pages that it kept (AUTO_INVAL_DATA).
        control = self._control
        return Attributes(inode, stat.S_IFREG | 0o444, control.size(inode), control.changed_ns(inode), 0.0)

    async def _forget_stale(self, file: File) -> None:
        """Whoever is told that a file is stale, and opens it again at once, must not get the same inode: the kernel has
        forgotten it when this returns."""
        day = self.views.day_of(file.container)
        if self._kernel is None or day is None:
            return
        folder, _, name = file.container.loaded.index.name(file.row).rpartition(b"/")
        parent = self._directory_inode(day.name.encode(), folder)
        with trio.move_on_after(_FORGET_S):  # it waits for lookups in the directory
            await trio.to_thread.run_sync(
                self._kernel.drop_entry, parent, name, abandon_on_cancel=True, limiter=self._forgetting
            )

    def _forget(self, changes: Changes) -> None:
        if self._kernel is None:
            return
        for folder in (b"", *changes.folders):
            inode = self._directory_inode(changes.day, folder)
            if inode in self._directories:
                self._kernel.forget_attributes(inode)
        inodes: dict[bytes, InodeNumber] = {}
        for path in changes.paths:
            folder, _, name = path.rpartition(b"/")
            if folder not in inodes:
                inodes[folder] = self._directory_inode(changes.day, folder)
            self._kernel.forget_entry(inodes[folder], name)
