"""One day of a store: which containers it has, and their indexes, opened when needed, listed again when time passes.
Trio thread only; the store runs in threads.

A view is never half new: a refresh lists, opens what is new and builds a tree beside the old one, then swaps. A refresh
that fails keeps the last good view and says so.

Who may do what at a time: `_gate` lets those who open containers in together, and a refresh in alone, from the listing
that it takes to the trees that it swaps. A container is opened by one of those who want it, `_pending`; the others wait
for that one. Who finds all that he needs waits for nobody.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import structlog
import trio

from des_format.errors import NotAContainer
from des_format.names import name_problem
from des_format.shards import CONTAINER_SUFFIX, ContainerKey, parse_container_name
from desfs import memory, metrics
from desfs.changes import changed_folders, changed_paths, shown_paths
from desfs.container import OpenContainer, tail_length
from desfs.errors import AccessDenied, DamagedDay, NoSuchObject, NoSuchPath, ObjectReplaced, StoreError
from desfs.inode import preferred_slot
from desfs.route import Route, Stop
from desfs.store.base import ObjectInfo
from desfs.surroundings import Candidate, Changes, Surroundings, began_s, may_grow
from desfs.tasks import first_of
from desfs.tree import DayTree, Member
from desfs.turns import Gate, Turns

log = structlog.get_logger(__name__)

OPENED_AT_A_TIME = 16  # containers: each costs some 3 MB while its index is parsed
_OLD_DAY_FACTOR = 60  # days before yesterday are listed again so many times more rarely: they change by accident only
_FEW_TRIPS = 4
_FEW_GROUPS = 3  # who looks up so many files in different places has an end
_PARSE_S = 0.002  # of a container of a thousand files: measured
_LARGE_DAY = 100_000  # entries: what opening it leaves behind is worth the milliseconds of giving it back
_TOLD_AT_A_TIME = 500  # names: some milliseconds
_ATTEMPTS = 3  # to open what a listing named: a container may be replaced between the two
# Of each day, the names that somebody has asked for in vain are remembered, so that the kernel may remember them too.
_ABSENT_NAMES = 10_000
_ABSENT_BYTES = 1024 * 1024


class File(NamedTuple):
    """A path that shows a row of an open container."""

    container: OpenContainer
    row: int


@dataclass(eq=False, slots=True)
class _Pending:
    """A container that is being opened. When it is done it is open, or refused, or one of these says what happened."""

    done: trio.Event = field(default_factory=trio.Event)
    failure: StoreError | None = None
    changed: bool = False


class DayView:
    """One directory of the root: the containers under `{name}/` and the container `{name}.des`."""

    def __init__(self, views: Surroundings, name: str) -> None:
        self.name = name
        self._views = views
        self._gate = Gate()
        self._list_turns, self._load_turns, self._refresh_turns = Turns(), Turns(), Turns()
        self._group_turns: dict[str, Turns] = {}
        self._candidates: dict[str, Candidate] = {}
        self._listed_at: float | None = None
        self._listed_from = -math.inf  # when the request for the current listing was sent
        self._ordinals = 0
        self._open: dict[str, tuple[OpenContainer, Member]] = {}
        self._refused: dict[str, str] = {}  # key -> ETag
        self._pending: dict[str, _Pending] = {}
        self._opened: list[OpenContainer] = []  # since the last refresh began
        self._route: Route | None = None
        self._complete: DayTree | None = None
        self._groups: dict[str, DayTree] = {}
        self._waited_s = 0.0  # by lookups, for groups
        self._absent: dict[bytes, None] = {}
        self._absent_bytes = 0
        self._newest_ns = views.root_mtime_ns

    @property
    def is_open(self) -> bool:
        """True while files may still come in: today and yesterday, and names that are no days."""
        return may_grow(self.name, self._views.now())

    @property
    def mtime_ns(self) -> int:
        """When the day's directories changed last. A closed day's is its end, which needs no listing; an open one's is
        the LastModified of its newest container. A nanosecond more for each change that was seen: as long as it is the
        same, the kernel goes on with the listing that it has (Linux, fs/fuse/readdir.c)."""
        shown_ns = self._newest_ns if self.is_open else int((began_s(self.name) + 86400) * 1_000_000_000)
        return shown_ns + self._views.changes[self.name]

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
        """What `path` is: a file, or None for a directory. Raises: NoSuchPath; DamagedDay; StoreError.

        When a path comes that was absent and said to be so for long, `on_change` is told.
        """
        problem = name_problem(path)
        if problem is not None:
            raise NoSuchPath(f"{self.name}: {problem}", for_long=True)
        await self.ensure_listed()
        group = self._views.layout.group_of(path.decode())
        if self._complete is None and group is not None and not self._views.strict:
            tree = self._groups.get(group)
            if tree is None and self._groups and self._opening_pays():
                tree = await self.load()
            elif tree is None:
                asked = trio.current_time()
                tree = await self._load_group(group)
                self._waited_s += trio.current_time() - asked
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
            raise NoSuchPath(f"{self.name}: no {path.decode()!r}", for_long=self._remember_absent(path))
        return found

    def _opening_pays(self) -> bool:
        """Whether to open all containers for a lookup that needs one more group: when that costs a few round trips, and
        when lookups have waited as long for one group after the other as it costs, which is never worse than twice
        the best choice made with hindsight."""
        cost_s = self._opening_s()
        trips_s = _FEW_TRIPS * self._views.threads.meter.link().latency_s
        return cost_s <= trips_s or (len(self._groups) >= _FEW_GROUPS and self._waited_s >= cost_s)

    def _opening_s(self) -> float:
        """How long it takes to open the containers that are not open."""
        sizes = [each.info.size for key, each in self._candidates.items() if key not in self._open]
        link = self._views.threads.meter.link()
        trips = -(-len(sizes) // OPENED_AT_A_TIME) * link.latency_s
        return trips + sum(map(tail_length, sizes)) / link.bandwidth + len(sizes) * _PARSE_S

    async def load(self) -> DayTree:
        """The tree of the whole day, every index read. Raises: DamagedDay; StoreError."""
        await self.ensure_listed()
        tree = self._complete
        if tree is None:
            async with self._load_turns.turn():
                tree = self._complete or await self._with_open(lambda candidate: True, self._show_all)
        self._check_strict()
        return tree

    async def refresh(self, *, unless_since: float = math.inf) -> None:
        """List again, and show what is new; not if the listing that is shown was asked for at the time `unless_since`
        or later. Raises: StoreError, and the old view stays."""
        if self._listed_at is None:
            return
        async with self._refresh_turns.turn():
            if self._listed_from >= unless_since:
                return
            known, began = self._candidates, trio.current_time()
            found = await self._list()
            async with self._gate.alone():
                if self._candidates is not known:  # somebody had to list it meanwhile, and may know more
                    began, found = trio.current_time(), await self._list()
                trees = await self._refresh_alone(found, began)
            await self._tell(*trees)

    async def reopen(self, container: OpenContainer) -> None:
        """Show what is in a container under a new slot, if the day shows it still: its inodes are not what they were,
        though its index is. Raises: StoreError, and the old view stays."""
        trees: tuple[list[DayTree], list[DayTree]] = ([], [])
        async with self._gate.alone():
            if self.has(container):
                trees = await self._reopen_alone(container)
        await self._tell(*trees)

    def has(self, container: OpenContainer) -> bool:
        """True as long as the day shows what is in a container; during a refresh that is what it has shown before."""
        shown = self._open.get(container.info.key)
        if shown is not None and shown[0] is container:
            return True
        trees = self._groups.values() if self._complete is None else (self._complete,)
        return any(member.slot == container.slot for tree in trees for member in tree.members)

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
            async with self._list_turns.turn():
                if self._listed_at is None:
                    began = trio.current_time()
                    self._take(await self._list(), began)
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

    def _take(self, found: list[tuple[ObjectInfo, ContainerKey]], began: float) -> None:
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
        self._listed_at, self._listed_from = trio.current_time(), began

    def _newest(self) -> int:
        return max((candidate.info.mtime_ns for candidate in self._candidates.values()), default=self._newest_ns)

    def _remember_absent(self, path: bytes) -> bool:
        """Note that somebody was told that a path is not there; False when there are too many of them."""
        if path not in self._absent:
            if len(self._absent) >= _ABSENT_NAMES or self._absent_bytes + len(path) > _ABSENT_BYTES:
                return False
            self._absent[path] = None
            self._absent_bytes += len(path)
        return True

    async def _load_group(self, group: str) -> DayTree:
        async with self._group_turns.setdefault(group, Turns()).turn():
            tree = self._complete or self._groups.get(group)
            if tree is None:
                tree = await self._with_open(
                    lambda candidate: candidate.name.group == group, partial(self._show_group, group)
                )
            return tree

    async def _with_open(self, wanted: Callable[[Candidate], bool], show: Callable[[], Awaitable[DayTree]]) -> DayTree:
        """What `show` makes of the wanted containers, all open. One that was replaced or removed since the listing
        makes a refresh: what other trees show of it has changed as well."""
        for _ in range(_ATTEMPTS):
            async with self._gate.together():
                known = self._candidates
                changed = await self._open_all(wanted)
                if changed is None:
                    return await show()
            trees: tuple[list[DayTree], list[DayTree]] = ([], [])
            async with self._gate.alone():
                if self._candidates is known:
                    began = trio.current_time()
                    trees = await self._refresh_alone(await self._list(), began)
            await self._tell(*trees)
        raise StoreError(f"{self.name}: {changed} changed {_ATTEMPTS} times while it was opened")

    async def _show_group(self, group: str) -> DayTree:
        tree = await self._build(pair for pair in self._open.values() if pair[1].name.group == group)
        if self._complete is not None:
            return self._complete
        self._groups[group] = tree
        return tree

    async def _show_all(self) -> DayTree:
        complete = await self._build(self._open.values())
        if sum(member.index.rows for member in complete.members) >= _LARGE_DAY:
            await trio.to_thread.run_sync(memory.give_back)
        groups, self._groups, self._complete = list(self._groups.values()), {}, complete
        self._report_collisions(complete)
        if groups:  # what one index alone has answered may look otherwise among all
            await self._tell_paths(await trio.to_thread.run_sync(changed_paths, groups, [complete]), [])
        return complete

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
        """Open a container, or wait for who does; a cancelled one is followed by one of those who waited."""
        key = candidate.info.key
        while (pending := self._pending.get(key)) is not None:
            await pending.done.wait()
            if pending.failure is not None:
                raise pending.failure
            if pending.changed:
                changed.append(key)
                return
        if key in self._open or key in self._refused:
            return
        pending = self._pending[key] = _Pending()
        try:
            await self._open_now(candidate)
        except (NoSuchObject, ObjectReplaced):
            pending.changed = True
            changed.append(key)
        except StoreError as error:
            pending.failure = error
            if isinstance(error, AccessDenied):  # nobody but the store's owner can do anything about it
                self._views.problems.report(key, str(error))
            raise
        finally:
            del self._pending[key]
            pending.done.set()

    async def _open_now(self, candidate: Candidate) -> None:
        info = candidate.info
        try:
            async with self._views.opening:
                loaded = await self._views.threads.run(self._views.load_container, self._views.threads.store, info)
        except NotAContainer as error:
            self._refused[info.key] = info.etag
            self._views.problems.clear(info.key)  # of the version before
            self._views.problems.report(info.key, str(error))
            return
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

    async def _refresh_alone(
        self, found: list[tuple[ObjectInfo, ContainerKey]], began: float
    ) -> tuple[list[DayTree], list[DayTree]]:
        """Show what a listing names; `began` is when it was asked for. The trees before and after, none if nothing has
        changed."""
        before, old_open, old_refused = self._candidates, dict(self._open), self._refused
        self._opened.clear()
        old_trees = [self._complete] if self._complete is not None else list(self._groups.values())
        groups = None if self._complete is not None else set(self._groups)
        try:
            changed: str | None = None
            for _ in range(_ATTEMPTS):
                self._take(found, began)
                if self._candidates == before:
                    return [], []
                self._retire_gone()
                changed = await self._open_all(lambda candidate: groups is None or candidate.name.group in groups)
                if changed is None:
                    break
                began, found = trio.current_time(), await self._list()
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
            self._listed_from = -math.inf
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
        if old_trees:
            now_ns = time.time_ns()
            for key in self._candidates.keys() - before.keys():
                metrics.SEEN_SECONDS.observe(max(now_ns - self._candidates[key].info.mtime_ns, 0) / 1e9)
        return old_trees, list(trees.values())

    async def _reopen_alone(self, container: OpenContainer) -> tuple[list[DayTree], list[DayTree]]:
        """The trees that show a container, before and after it has a new slot."""
        key, old = container.info.key, self._open[container.info.key][1]
        fresh = self._views.slots.add(key, container.info.etag, partial(OpenContainer, container.loaded))
        group = None if self._complete is not None else old.name.group
        try:
            member = Member(old.ordinal, fresh.slot, old.index, key, old.name, old.mtime_ns, old.folders)
            pairs = {**self._open, key: (fresh, member)}
            tree = await self._build(pair for pair in pairs.values() if group is None or pair[1].name.group == group)
        except BaseException:
            self._views.slots.remove(fresh.slot)
            raise
        self._open, self._route = pairs, None
        self._views.changes[self.name] += 1
        self._views.retire([container])
        if group is None:
            before, self._complete = self._complete, tree
        else:
            before = self._groups.pop(group, None)
            if before is not None:
                self._groups[group] = tree
        return ([], []) if before is None else ([before], [tree])

    async def _tell(self, old_trees: list[DayTree], new_trees: list[DayTree]) -> None:
        """Say what looks otherwise than before."""
        if not old_trees and not new_trees:
            return
        paths = set(await trio.to_thread.run_sync(changed_paths, old_trees, new_trees))
        folders = await trio.to_thread.run_sync(changed_folders, old_trees, new_trees)
        if self._absent:
            arrived = await trio.to_thread.run_sync(shown_paths, list(self._absent), new_trees)
            for path in arrived:
                if self._absent.pop(path, path) is None:
                    self._absent_bytes -= len(path)
            paths.update(arrived)
        await self._tell_paths(sorted(paths), folders)

    async def _tell_paths(self, paths: list[bytes], folders: list[bytes]) -> None:
        """In pieces: a seal may concern a million names, and others have requests meanwhile."""
        for first in range(0, max(len(paths), 1), _TOLD_AT_A_TIME):
            piece = paths[first : first + _TOLD_AT_A_TIME]
            self._views.on_change(Changes(self.name.encode(), piece, [] if first else folders))
            await trio.lowlevel.checkpoint()

    def _retire_gone(self) -> None:
        """Close what the current listing does not have in this version."""
        for key, (container, _) in list(self._open.items()):
            candidate = self._candidates.get(key)
            if candidate is None or candidate.info.etag != container.info.etag:
                del self._open[key]
                self._route = None
