"""Which days there are: the root of a store, and the views of its days. Trio thread only; the store runs in threads."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable

import msgspec
import structlog
import trio

from des_format.layout import BIG_FILES_FOLDER
from des_format.names import name_problem
from des_format.shards import CONTAINER_SUFFIX, is_day, parse_container_name
from desfs.container import LoadedContainer, OpenContainer, load_container
from desfs.day import OPENED_AT_A_TIME, DayView
from desfs.errors import NoSuchObject, NoSuchPath, StoreError
from desfs.inode import Slots
from desfs.layout import CONTROL_NAME, LAYOUT_KEY, LAYOUT_LIMIT, Layout
from desfs.problems import Problems
from desfs.store.base import ObjectInfo, Store
from desfs.store_threads import StoreThreads
from desfs.surroundings import Changes, RootEntry, may_grow
from desfs.tasks import first_of

log = structlog.get_logger(__name__)

_RETIRED_S = 3600.0  # how long a container that left its day can still be read by those who have its files open
_EMPTY_S = 60.0  # how long a folder of the root that is no day, and holds no containers, is not looked at again


class Views:
    """All days of a store. Trio thread only."""

    def __init__(
        self,
        threads: StoreThreads,
        problems: Problems,
        *,
        strict: bool = False,
        now: Callable[[], float] = time.time,
        on_change: Callable[[Changes], None] = lambda changes: None,
        load: Callable[[Store, ObjectInfo], LoadedContainer] = load_container,
    ) -> None:
        """`on_change` is told of every change of what a day has shown; `load` opens a container, in a thread."""
        self.on_change = on_change
        self.load_container = load
        self.opening = trio.CapacityLimiter(OPENED_AT_A_TIME)
        self.threads = threads
        self.problems = problems
        self.strict = strict
        self.now = now
        self.layout = Layout()
        self.names: dict[str, RootEntry] = {}
        self.slots: Slots[OpenContainer] = Slots()
        self.root_bytes = 0  # of the containers in the root
        self.root_mtime_ns = 0  # of no two root listings the same
        self.changes: Counter[str] = Counter()  # of each day, this mount's; a day that went and came again has changed
        self._days: dict[str, DayView] = {}
        self._holders: set[str] = set()  # folders of the root that are no days and hold containers
        self._empty: dict[str, float] = {}  # others, and when they were looked at
        self._asked: set[str] = set()  # those of them that somebody wanted since
        self._retired: list[tuple[float, OpenContainer]] = []
        self._root_lock = trio.Lock()
        self._root_ordinals: dict[str, int] = {}

    async def start(self) -> None:
        """List the root and read the layout. Raises: StoreError: there is nothing to mount."""
        await self.refresh_root()

    async def refresh_root(self) -> set[str]:
        """List the root again; the names that came or went."""
        async with self._root_lock:
            listing = await self.threads.run(self.threads.store.list, "", delimiter=True)
            prefixes = {prefix.rstrip("/") for prefix in listing.prefixes} - {BIG_FILES_FOLDER}
            objects = {
                info.key.removesuffix(CONTAINER_SUFFIX)
                for info in listing.objects
                if info.key.endswith(CONTAINER_SUFFIX)
            }
            self.root_bytes = sum(info.size for info in listing.objects if info.key.endswith(CONTAINER_SUFFIX))
            names: dict[str, RootEntry] = {}
            for name in sorted(prefixes | objects):
                problem = name_problem(name.encode("utf-8", "surrogateescape"))
                if problem is None and name != CONTROL_NAME:
                    ordinal = self._root_ordinals.setdefault(name, len(self._root_ordinals) + 1)
                    names[name] = RootEntry(ordinal, name in prefixes, name in objects)
                elif name in objects:
                    self.problems.report(
                        name + CONTAINER_SUFFIX, problem or "the name is that of the control directory"
                    )
            if any(info.key == LAYOUT_KEY for info in listing.objects) and self.layout == Layout():
                self.layout = await self._read_layout()
            changed = names.keys() ^ self.names.keys()
            if changed:
                self._touch_root()
            for name in self._days.keys() - names.keys():
                self.changes[name] += 1
                self.retire(self._days.pop(name).close())
            self.retire(())  # and let go of what has been read long enough
            self._holders &= names.keys()
            self._empty = {name: looked_at for name, looked_at in self._empty.items() if name in names}
            self.names = dict(sorted(names.items(), key=lambda item: item[1].ordinal))
            return changed

    async def root_names(self) -> list[str]:
        """The directories of the root, by ordinal. A folder that is no day counts if a container stands in it."""
        folders = [name for name in self.names if not self._is_shown_cheaply(name)]
        try:
            async with trio.open_nursery() as nursery:
                for name in folders:
                    nursery.start_soon(self._holds, name)
        except ExceptionGroup as group:
            raise first_of(group) from None
        return [name for name in self.names if self._is_shown_cheaply(name) or name in self._holders]

    async def refresh_folders(self) -> set[str]:
        """Look again into folders of the root that held no containers a minute ago, and that somebody wants to see;
        those that hold some now."""
        due = trio.current_time() - _EMPTY_S
        found: set[str] = set()
        for name in [name for name in self._asked if self._empty.get(name, due) <= due]:
            try:
                if name in self.names and await self._look_into(name):
                    found.add(name)
            except StoreError as error:
                log.warning("a folder of the root could not be looked into", name=name, error=str(error))
            else:
                self._asked.discard(name)
        return found

    async def day(self, name: str) -> DayView:
        """The view of a name of the root, as it was listed last. Raises: NoSuchPath; StoreError."""
        if name not in self.names or not (self._is_shown_cheaply(name) or await self._holds(name)):
            raise NoSuchPath(f"the store has no containers {name!r}", for_long=True)
        view = self._days.get(name)
        if view is None:
            view = self._days[name] = DayView(self, name)
        return view

    def is_current(self, view: DayView) -> bool:
        """False for a view whose name has left the root."""
        return self._days.get(view.name) is view

    def is_open(self, name: str) -> bool:
        """Whether files may still come into a day."""
        return may_grow(name, self.now())

    def known(self, name: str) -> DayView | None:
        """The view of a name that somebody has looked at, as long as it is in the root."""
        return self._days.get(name)

    def day_of(self, container: OpenContainer) -> DayView | None:
        """The view that a container belongs to, or did; None when nobody has looked at it."""
        key = container.info.key
        return self._days.get(key.rpartition("/")[0] or key.removesuffix(CONTAINER_SUFFIX))

    def known_days(self) -> list[DayView]:
        """The days that somebody has looked at."""
        return list(self._days.values())

    def retire(self, containers: Iterable[OpenContainer]) -> None:
        """Let containers that left their day be read for a while by those who have their files open."""
        now = trio.current_time()
        self._retired += [(now, container) for container in containers]
        while self._retired and now - self._retired[0][0] > _RETIRED_S:
            self.slots.remove(self._retired.pop(0)[1].slot)

    def may_show_more(self) -> bool:
        """True when a folder of the root is left out because it held no container when it was looked at."""
        return any(name not in self._holders and not self._is_shown_cheaply(name) for name in self.names)

    def _touch_root(self) -> None:
        self.root_mtime_ns = max(int(self.now() * 1e9), self.root_mtime_ns + 1)

    def _is_shown_cheaply(self, name: str) -> bool:
        return is_day(name) or self.names[name].has_object

    async def _holds(self, name: str) -> bool:
        """Whether containers stand in a folder. Who asks waits for the first look alone: a refresh takes the others."""
        if name in self._holders:
            return True
        if name in self._empty:
            self._asked.add(name)
            return False
        return await self._look_into(name)

    async def _look_into(self, name: str) -> bool:
        listing = await self.threads.run(self.threads.store.list, f"{name}/", delimiter=True)
        if any(parse_container_name(info.key.rpartition("/")[2]) is not None for info in listing.objects):
            self._holders.add(name)
            self._empty.pop(name, None)
            self._touch_root()
            return True
        self._empty[name] = trio.current_time()
        return False

    async def _read_layout(self) -> Layout:
        try:
            answer = await self.threads.run(self.threads.store.get_tail, LAYOUT_KEY, LAYOUT_LIMIT)
            return msgspec.json.decode(answer.data, type=Layout)
        except NoSuchObject:
            return Layout()  # it went after it was listed
        except (msgspec.MsgspecError, RecursionError) as error:
            self.problems.report(LAYOUT_KEY, f"is not understood, every index is read: {error}")
            return Layout()
