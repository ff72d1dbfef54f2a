"""Which days there are, which containers a day has, and their indexes: opened when needed, listed again when time
passes. Trio thread only; the store runs in threads.

A view is never half new: a refresh lists, opens what is new and builds a tree beside the old one, then swaps. A refresh
that fails keeps the last good view and says so.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple

import msgspec
import structlog
import trio

from des_format.errors import NotAContainer
from des_format.layout import BIG_FILES_FOLDER
from des_format.names import name_problem
from des_format.shards import (
    CONTAINER_SUFFIX,
    ContainerKey,
    is_day,
    parse_container_name,
)
from desfs import memory, metrics
from desfs.changes import changed_folders, changed_paths
from desfs.container import LoadedContainer, load_container
from desfs.errors import DamagedDay, NoSuchObject, NoSuchPath, ObjectReplaced, StoreError
from desfs.fetch import OpenContainer, StoreThreads, first_of
from desfs.inode import Slots, preferred_slot
from desfs.layout import LAYOUT_KEY, LAYOUT_LIMIT, Layout
from desfs.prefetch import Route, Stop
from desfs.problems import Problems
from desfs.store.base import ObjectInfo, Store
from desfs.tree import DayTree, Member

log = structlog.get_logger(__name__)

_RETIRED_S = 3600.0  # how long a container that left its day can still be read by those who have its files open
_OLD_DAY_FACTOR = 60  # days before yesterday are listed again so many times more rarely: they change by accident only
_OPEN_DAY_S = 2 * 86400.0
_EMPTY_S = 60.0  # how long a folder of the root that is no day, and holds no containers, is not looked at again
_OPENED_AT_A_TIME = 16  # containers: each costs some 3 MB while its index is parsed
_LARGE_DAY = 100_000  # entries: what opening it leaves behind is worth the milliseconds of giving it back
_ATTEMPTS = 3  # to open what a listing named: a container may be replaced between the two


class File(NamedTuple):
    """A path that shows a row of an open container."""

    container: OpenContainer
    row: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A container as a listing has it."""

    info: ObjectInfo
    name: ContainerKey
    ordinal: int


class Changes(NamedTuple):
    """What the kernel has to forget when a day has changed: these names below it, and what it knows of the day and of
    these directories, in which something came or went."""

    day: bytes
    paths: list[bytes]
    folders: list[bytes]


class _Turns:
    """One at a time asks the store; those who waited meanwhile share its failure instead of trying in their turn, or
    the last of them would wait for as many deadlines as there are others. Trio thread only."""

    def __init__(self) -> None:
        self._lock = trio.Lock()
        self._failed_at = -math.inf
        self._failure: StoreError | None = None

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        asked_at = trio.current_time()
        async with self._lock:
            if self._failure is not None and self._failed_at >= asked_at:
                raise self._failure
            try:
                yield
            except StoreError as error:
                self._failed_at, self._failure = trio.current_time(), error
                raise


class DayView:
    """One directory of the root: the containers under `{name}/` and the container `{name}.des`."""

    def __init__(self, views: Views, name: str) -> None:
        self.name = name
        self._views = views
        self._lock = _Turns()  # held while listing or opening: those who find all they need do not take it
        self._candidates: dict[str, Candidate] = {}
        self._listed_at: float | None = None
        self._ordinals = 0
        self._open: dict[str, tuple[OpenContainer, Member]] = {}
        self._refused: dict[str, str] = {}  # key -> ETag
        self._opened: list[OpenContainer] = []  # since the last refresh began
        self._route: Route | None = None
        self._complete: DayTree | None = None
        self._groups: dict[str, DayTree] = {}
        self._newest_ns = views.root_mtime_ns

    @property
    def is_open(self) -> bool:
        """True while files may still come in: today and yesterday, and names that are no days."""
        return not is_day(self.name) or self._views.now() - self._began_s() < _OPEN_DAY_S

    @property
    def mtime_ns(self) -> int:
        """When the day's directories changed last. A closed day's is its end, which needs no listing; an open one's is
        the LastModified of its newest container. A nanosecond more for each change that was seen: as long as it is the
        same, the kernel goes on with the listing that it has (Linux, fs/fuse/readdir.c)."""
        shown_ns = self._newest_ns if self.is_open else int((self._began_s() + 86400) * 1_000_000_000)
        return shown_ns + self._views.changes[self.name]

    def _began_s(self) -> float:
        return datetime.fromisoformat(self.name).replace(tzinfo=UTC).timestamp()

    @property
    def route(self) -> Route:
        """The open containers in the order of a listing; the same object until another one is opened or closed."""
        if self._route is None:
            stops = (Stop(container, member) for container, member in self._open.values())
            self._route = tuple(sorted(stops, key=lambda stop: stop.member.ordinal))
        return self._route

    @property
    def tree(self) -> DayTree | None:
        """The tree of the whole day, None as long as not all of its indexes have been read."""
        return self._complete

    def containers(self) -> list[tuple[str, int, str, int | None]]:
        """(key, bytes, state, files) of each container that the last listing had; files of those that are open."""
        rows: list[tuple[str, int, str, int | None]] = []
        for key, candidate in sorted(self._candidates.items()):
            if key in self._open:
                rows.append((key, candidate.info.size, "open", len(self._open[key][1].index)))
            else:
                rows.append((key, candidate.info.size, "refused" if key in self._refused else "listed", None))
        return rows

    async def find(self, path: bytes) -> File | None:
        """What `path` is: a file, or None for a directory. Raises: NoSuchPath; DamagedDay; StoreError."""
        problem = name_problem(path)
        if problem is not None:
            raise NoSuchPath(f"{self.name}: {problem}")
        await self.ensure_listed()
        group = self._views.layout.group_of(path.decode())
        if self._complete is None and group is not None and not self._views.strict:
            tree = self._groups.get(group) or await self._load_group(group)
            found = self._find_in(tree, path, group)
            if found is not None:
                return found
            if tree.is_directory(path):
                return None
        tree = self._complete or await self.load()
        self._check_strict()
        if tree.is_directory(path):
            return None
        found = self._find_in(tree, path, group)
        if found is None:
            raise NoSuchPath(f"{self.name}: no {path.decode()!r}")
        return found

    async def load(self) -> DayTree:
        """The tree of the whole day, every index read. Raises: DamagedDay; StoreError."""
        await self.ensure_listed()
        if self._complete is None:
            async with self._lock.turn():
                if self._complete is None:
                    await self._open_listed(lambda candidate: True)
                    complete = await self._build(self._open.values())
                    if sum(member.index.rows for member in complete.members) >= _LARGE_DAY:
                        await trio.to_thread.run_sync(memory.give_back)
                    groups, self._groups, self._complete = list(self._groups.values()), {}, complete
                    self._report_collisions(complete)
                    if groups:  # what one index alone has answered may look otherwise among all
                        paths = await trio.to_thread.run_sync(changed_paths, groups, [complete])
                        self._views.on_change(Changes(self.name.encode(), paths, []))
        self._check_strict()
        return self._complete

    async def refresh(self) -> None:
        """List again, and show what is new. Raises: StoreError, and the old view stays."""
        if self._listed_at is not None:
            async with self._lock.turn():
                await self._refresh_locked()

    def close(self) -> list[OpenContainer]:
        """Give up the view; the containers that it had open."""
        return [container for container, _ in self._open.values()]

    def file_count(self) -> int | None:
        """Files that the day shows; None as long as not all of its indexes have been read."""
        return None if self._complete is None else self._complete.file_count()

    def due(self, now: float, refresh_s: float) -> bool:
        """True when the day should be listed again."""
        if self._listed_at is None:
            return False
        return now - self._listed_at >= (refresh_s if self.is_open else refresh_s * _OLD_DAY_FACTOR)

    def _find_in(self, tree: DayTree, path: bytes, group: str | None) -> File | None:
        found = tree.find_file(path, group)
        return None if found is None else File(self._views.slots[found[0].slot], found[1])

    def _check_strict(self) -> None:
        if self._views.strict and self._refused:
            raise DamagedDay(f"{self.name}: container {min(self._refused)} was refused, and the mount is strict")

    async def ensure_listed(self) -> None:
        """List the containers if that has not been done yet. Raises: StoreError."""
        if self._listed_at is None:
            async with self._lock.turn():
                if self._listed_at is None:
                    self._take(await self._list())
                    self._newest_ns = self._newest()

    async def _list(self) -> list[tuple[ObjectInfo, ContainerKey]]:
        store = self._views.threads.store
        entry = self._views.names.get(self.name)
        found: list[ObjectInfo] = []
        if entry is None or entry.has_prefix:
            listing = await self._views.threads.run(store.list, f"{self.name}/", delimiter=True)
            found += listing.objects
        if entry is not None and entry.has_object:
            listing = await self._views.threads.run(store.list, self.name + CONTAINER_SUFFIX)
            found += [info for info in listing.objects if info.key == self.name + CONTAINER_SUFFIX]
        named: list[tuple[ObjectInfo, ContainerKey]] = []
        for info in found:
            name = parse_container_name(info.key.rpartition("/")[2])
            if name is None:
                continue
            problem = name_problem(info.key.encode("utf-8", "surrogateescape"))
            if problem is None:
                named.append((info, name))
            else:
                self._views.problems.report(info.key, problem)
        return named

    def _take(self, found: list[tuple[ObjectInfo, ContainerKey]]) -> None:
        """Make a listing the current one. Ordinals of containers that stay do not change. The first ones are given in
        the order of slots, so that the day's listing has the order of inodes; those of later arrivals follow."""
        candidates: dict[str, Candidate] = {}
        if self._listed_at is None:
            found = sorted(found, key=lambda each: preferred_slot(each[0].key, each[0].etag))
        for info, name in found:
            old = self._candidates.get(info.key)
            if old is not None and old.info.etag == info.etag:
                candidates[info.key] = old
            else:
                self._ordinals += 1
                candidates[info.key] = Candidate(info, name, self._ordinals)
        self._refused = {
            key: etag for key, etag in self._refused.items() if key in candidates and candidates[key].info.etag == etag
        }
        self._candidates = candidates
        self._listed_at = trio.current_time()

    def _newest(self) -> int:
        return max((candidate.info.mtime_ns for candidate in self._candidates.values()), default=self._newest_ns)

    async def _load_group(self, group: str) -> DayTree:
        async with self._lock.turn():
            if group not in self._groups:
                if self._complete is not None:
                    return self._complete
                await self._open_listed(lambda candidate: candidate.name.group == group)
                self._groups[group] = await self._build(
                    pair for pair in self._open.values() if pair[1].name.group == group
                )
            return self._groups[group]

    async def _open_listed(self, wanted: Callable[[Candidate], bool]) -> None:
        """Open the wanted containers that are not open yet. One that was replaced or removed since the listing makes a
        refresh: what other trees show of it has changed as well."""
        for _ in range(_ATTEMPTS):
            changed = await self._open_all(wanted)
            if changed is None:
                return
            await self._refresh_locked()
        raise StoreError(f"{self.name}: {changed} changed {_ATTEMPTS} times while it was opened")

    async def _open_all(self, wanted: Callable[[Candidate], bool]) -> str | None:
        """Open the wanted containers that are not open yet, in parallel; one that is no container is refused and
        reported. The key of one that was replaced or removed since the listing, or None."""
        missing = [
            candidate
            for key, candidate in self._candidates.items()
            if wanted(candidate) and key not in self._open and key not in self._refused
        ]
        changed: list[str] = []
        try:
            async with trio.open_nursery() as nursery:
                for candidate in missing:
                    nursery.start_soon(self._open_one, candidate, changed)
        except ExceptionGroup as group:
            raise first_of(group) from None
        return min(changed, default=None)

    async def _open_one(self, candidate: Candidate, changed: list[str]) -> None:
        info = candidate.info
        try:
            async with self._views.opening:
                loaded = await self._views.threads.run(self._views.load_container, self._views.threads.store, info)
        except NotAContainer as error:
            self._refused[info.key] = info.etag
            self._views.problems.clear(info.key)  # of the version before
            self._views.problems.report(info.key, str(error))
            return
        except (NoSuchObject, ObjectReplaced):
            changed.append(info.key)
            return
        metrics.CONTAINERS_OPENED.inc()
        container = self._views.slots.add(info.key, info.etag, partial(OpenContainer, loaded))
        try:
            member = await trio.to_thread.run_sync(
                Member,
                candidate.ordinal,
                container.slot,
                loaded.index,
                info.key,
                candidate.name,
                info.mtime_ns,
                loaded.folders,
            )
        except BaseException:
            self._views.slots.remove(container.slot)
            raise
        self._views.problems.clear(info.key)
        for problem in loaded.problems:
            self._views.problems.report(info.key, problem)
        self._open[info.key] = (container, member)
        self._route = None
        self._opened.append(container)

    def _forget_passing(self, old_open: dict[str, tuple[OpenContainer, Member]]) -> None:
        """Free the slots of containers that were opened during a refresh and are not in its outcome: nobody has seen
        them."""
        seen = {container.slot for container, _ in [*old_open.values(), *self._open.values()]}
        for container in self._opened:
            if container.slot not in seen:
                self._views.slots.remove(container.slot)
        self._opened.clear()

    async def _build(self, pairs: Iterable[tuple[OpenContainer, Member]]) -> DayTree:
        return await trio.to_thread.run_sync(DayTree, [member for _, member in pairs])

    def _report_collisions(self, tree: DayTree) -> None:
        for member, row in tree.collisions:
            name = member.index.entry(row).name
            self._views.problems.report(member.key, f"file {name!r} is hidden by a directory of that name")

    async def _refresh_locked(self) -> None:
        before, old_open, old_refused = self._candidates, dict(self._open), self._refused
        self._opened.clear()
        old_trees = [self._complete] if self._complete is not None else list(self._groups.values())
        groups = None if self._complete is not None else set(self._groups)
        try:
            changed: str | None = None
            for _ in range(_ATTEMPTS):
                self._take(await self._list())
                if self._candidates == before:
                    return
                self._retire_gone()
                changed = await self._open_all(lambda candidate: groups is None or candidate.name.group in groups)
                if changed is None:
                    break
            else:
                raise StoreError(f"{self.name}: {changed} changed {_ATTEMPTS} times while it was opened")
            trees = {
                group: await self._build(
                    pair for pair in self._open.values() if group is None or pair[1].name.group == group
                )
                for group in ([None] if groups is None else groups)
            }
        except BaseException:
            # The new listing cannot be shown yet: keep the old view whole, and try again at the next refresh.
            self._candidates, self._open, self._refused = before, old_open, old_refused
            self._route = None
            raise
        finally:
            self._forget_passing(old_open)
        # The kernel asks for the time before it asks for the listing: never the new time with the old listing.
        self._newest_ns = self._newest()
        self._views.changes[self.name] += 1
        if groups is None:
            self._complete = trees[None]
            self._report_collisions(trees[None])
        else:
            self._groups = {group: tree for group, tree in trees.items() if group is not None}
        kept = {container.slot for container, _ in self._open.values()}
        self._views.retire(container for container, _ in old_open.values() if container.slot not in kept)
        for key in before.keys() - self._candidates.keys():
            self._views.problems.clear(key)
        paths = await trio.to_thread.run_sync(changed_paths, old_trees, list(trees.values()))
        folders = await trio.to_thread.run_sync(changed_folders, old_trees, list(trees.values()))
        self._views.on_change(Changes(self.name.encode(), paths, folders))

    def _retire_gone(self) -> None:
        """Close what the current listing does not have in this version."""
        for key, (container, _) in list(self._open.items()):
            candidate = self._candidates.get(key)
            if candidate is None or candidate.info.etag != container.info.etag:
                del self._open[key]
                self._route = None


@dataclass(frozen=True, slots=True)
class RootEntry:
    """What the root listing has of a name: a folder, a container, or both. `ordinal` numbers the names in the order in
    which they were first seen, from 1: positions in the root directory."""

    ordinal: int
    has_prefix: bool
    has_object: bool


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
        self.opening = trio.CapacityLimiter(_OPENED_AT_A_TIME)
        self.threads = threads
        self.problems = problems
        self.strict = strict
        self.now = now
        self.layout = Layout()
        self.names: dict[str, RootEntry] = {}
        self.slots: Slots[OpenContainer] = Slots()
        self.root_mtime_ns = 0  # of no two root listings the same
        self.changes: Counter[str] = Counter()  # of each day, this mount's; a day that went and came again has changed
        self._days: dict[str, DayView] = {}
        self._holders: set[str] = set()  # folders of the root that are no days and hold containers
        self._empty: dict[str, float] = {}  # others, and when they were looked at
        self._retired: list[tuple[float, OpenContainer]] = []
        self._root_lock = trio.Lock()
        self._root_ordinals: dict[str, int] = {}
        self._root_listed_at = 0.0

    async def start(self) -> None:
        """List the root and read the layout. Raises: StoreError: there is nothing to mount."""
        await self.refresh_root()

    async def refresh_root(self) -> bool:
        """List the root again; True if a name came or went."""
        async with self._root_lock:
            listing = await self.threads.run(self.threads.store.list, "", delimiter=True)
            prefixes = {prefix.rstrip("/") for prefix in listing.prefixes} - {BIG_FILES_FOLDER}
            objects = {
                info.key.removesuffix(CONTAINER_SUFFIX)
                for info in listing.objects
                if info.key.endswith(CONTAINER_SUFFIX)
            }
            names: dict[str, RootEntry] = {}
            for name in sorted(prefixes | objects):
                problem = name_problem(name.encode("utf-8", "surrogateescape"))
                if problem is None and name != ".desfs":
                    ordinal = self._root_ordinals.setdefault(name, len(self._root_ordinals) + 1)
                    names[name] = RootEntry(ordinal, name in prefixes, name in objects)
                elif name in objects:
                    self.problems.report(
                        name + CONTAINER_SUFFIX, problem or "the name is that of the control directory"
                    )
            if any(info.key == LAYOUT_KEY for info in listing.objects) and self.layout == Layout():
                self.layout = await self._read_layout()
            self._root_listed_at = trio.current_time()
            changed = names.keys() != self.names.keys()
            if changed:
                self._touch_root()
            for name in self._days.keys() - names.keys():
                self.changes[name] += 1
                self.retire(self._days.pop(name).close())
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

    async def day(self, name: str, refresh_s: float) -> DayView:
        """The view of a name of the root. Raises: NoSuchPath; StoreError."""
        if name not in self.names and trio.current_time() - self._root_listed_at >= refresh_s:
            await self.refresh_root()
        if name not in self.names or not (self._is_shown_cheaply(name) or await self._holds(name)):
            raise NoSuchPath(f"the store has no containers {name!r}")
        view = self._days.get(name)
        if view is None:
            view = self._days[name] = DayView(self, name)
        return view

    def is_current(self, view: DayView) -> bool:
        """False for a view whose name has left the root."""
        return self._days.get(view.name) is view

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
        if name not in self._holders and trio.current_time() - self._empty.get(name, -math.inf) >= _EMPTY_S:
            listing = await self.threads.run(self.threads.store.list, f"{name}/", delimiter=True)
            if any(parse_container_name(info.key.rpartition("/")[2]) is not None for info in listing.objects):
                self._holders.add(name)
                self._touch_root()
            else:
                self._empty[name] = trio.current_time()
        return name in self._holders

    async def _read_layout(self) -> Layout:
        try:
            answer = await self.threads.run(self.threads.store.get_tail, LAYOUT_KEY, LAYOUT_LIMIT)
            return msgspec.json.decode(answer.data, type=Layout)
        except NoSuchObject:
            return Layout()  # it went after it was listed
        except (msgspec.MsgspecError, RecursionError) as error:
            self.problems.report(LAYOUT_KEY, f"is not understood, every index is read: {error}")
            return Layout()
