"""`desfs verify --catalog`: what differs between catalog and bucket. Asyncio; the store in threads.

    damage      a container that the catalog has, and the store does not have, or has as another object; a container
                that is none; an external object that is missing, or of a wrong size
    warning     what a repair tidies up: objects without a row, uploads that nobody can commit any more, what is left of
                merged and deleted containers, external objects that no container names
    unverified  what could not be read: nothing is known of it. A time-out is not a 404

Work goes on meanwhile. So what looks like damage is looked at again: an object that is missing by the listing has to be
missing by a GET as well, and its row has to be there still after that.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from assignment.catalog import LIVE, Catalog, ContainerRecord
from des_format.errors import NotAContainer
from des_format.layout import BIG_FILES_FOLDER
from des_format.shards import parse_container_name
from desfs.catalog_check.compare import Difference, What, compare
from desfs.catalog_check.contents import Contents, External, first_there, read_contents, unnamed
from desfs.errors import NoSuchObject, ObjectReplaced, StoreError
from desfs.settings import VerifySettings
from desfs.store.base import ObjectInfo, Store
from desfs.verify_container import Finding
from desfs.verify_index import Kind

_AT_A_TIME = 8  # containers, or single objects, that are asked for
_LEAVING = (What.ORPHAN, What.SUPERSEDED, What.DELETED)


@dataclass(slots=True)
class Compared:
    """What was compared, and what came of it. `containers` are those of the catalog that are content, `files` their
    entries."""

    containers: int = 0
    files: int = 0
    external: int = 0
    counts: Counter[Kind] = field(default_factory=Counter)

    @property
    def is_damaged(self) -> bool:
        return self.counts["damage"] > 0


@dataclass(slots=True)
class State:
    """Bucket and catalog at about one time: the objects were listed first. `now` is the catalog's clock."""

    objects: dict[str, ObjectInfo]
    records: dict[str, ContainerRecord]
    differences: list[Difference]
    now: datetime

    def containers(self) -> list[ObjectInfo]:
        """All containers of the store, those too that no catalog can have."""
        return [info for key, info in self.objects.items() if is_container(key)]

    def external_sizes(self) -> dict[str, int]:
        """The size of each external object."""
        return {key: info.size for key, info in self.objects.items() if BIG_FILES_FOLDER in key.split("/")[:-1]}


def is_container(key: str) -> bool:
    """Whether a mount takes an object for a container."""
    *folders, name = key.split("/")
    return len(folders) <= 1 and BIG_FILES_FOLDER not in folders and parse_container_name(name) is not None


async def take_state(store: Store, catalog: Catalog, grace_s: float) -> State:
    """List the bucket, then read the catalog. Raises: StoreError; AssignmentError."""
    listing = await asyncio.to_thread(store.list)
    records = await catalog.list_containers()
    holders = {(each.day, each.shard): each for each in await catalog.list_holders()}
    now = await catalog.now()
    objects = {info.key: info for info in listing.objects}
    differences = compare(records, objects, holders, now, grace_s=grace_s)
    return State(objects, {record.object_key: record for record in records}, differences, now)


async def read_all(store: Store, infos: Sequence[ObjectInfo]) -> dict[str, Contents | NotAContainer | StoreError]:
    """What is in containers, or what kept it from being read, by key."""
    limit = asyncio.Semaphore(_AT_A_TIME)

    async def read(info: ObjectInfo) -> Contents | NotAContainer | StoreError:
        async with limit:
            try:
                return await asyncio.to_thread(read_contents, store, info)
            except (NotAContainer, StoreError) as error:
                return error

    found = await asyncio.gather(*(read(info) for info in infos))
    return {info.key: each for info, each in zip(infos, found, strict=True)}


class Comparison:
    """Compares a catalog with its bucket, once."""

    def __init__(
        self, store: Store, catalog: Catalog, settings: VerifySettings, found: Callable[[Finding], None]
    ) -> None:
        """`found` is told of each finding."""
        self._store = store
        self._catalog = catalog
        self._settings = settings
        self._found = found
        self._compared = Compared()

    async def run(self) -> Compared:
        """Raises: StoreError when the bucket cannot be listed; AssignmentError; what `found` raises."""
        state = await take_state(self._store, self._catalog, self._settings.grace)
        for difference in state.differences:
            if difference.what.is_damage:
                await self._look_again(state, difference)
            elif difference.info is not None or difference.what in (What.ORPHAN, What.SUPERSEDED):
                self._tell("warning", difference.key, difference.problem)
        leaving = {each.key for each in state.differences if each.what in _LEAVING}
        infos = [info for info in state.containers() if info.key not in leaving]
        contents: dict[str, Contents] = {}
        is_complete = True
        for key, each in (await read_all(self._store, infos)).items():
            if isinstance(each, NoSuchObject | ObjectReplaced):
                again = await self._read_again(state, key)
                if again is not None:
                    each = again
                else:
                    continue
            if isinstance(each, Contents):
                contents[key] = each
                continue
            is_complete = False
            text = str(each).removeprefix(f"{key}: ")
            self._tell("damage", key, text) if isinstance(each, NotAContainer) else self._tell(
                "unverified", key, f"could not be read: {text}"
            )
        await self._check_contents(state, contents)
        if is_complete:
            self._check_unnamed(state, contents)
        return self._compared

    def _tell(self, kind: Kind, key: str, problem: str, entry: str | None = None) -> None:
        self._compared.counts[kind] += 1
        self._found(Finding(kind, key, entry, None, problem))

    async def _look_again(self, state: State, difference: Difference) -> None:
        """Report what looks like damage, if it does so still."""
        key = difference.key
        try:
            info = await self._current(key)
        except StoreError as error:
            self._tell("unverified", key, f"could not be looked for: {error}")
            return
        record = await self._catalog.find_container(key)
        if record is None or record.state not in LIVE:
            state.objects.pop(key, None)
            return
        state.records[key] = record
        if info is None:
            state.objects.pop(key, None)
            self._tell("damage", key, What.MISSING.value)
            return
        state.objects[key] = info
        if (info.size, info.etag) != (record.size, record.etag):
            again = Difference(What.CHANGED, difference.place, key, record, info)
            self._tell("damage", key, again.problem)

    async def _current(self, key: str) -> ObjectInfo | None:
        """An object as it is now; None when both a listing and a GET say that it is not there. Raises: StoreError, also
        when they contradict each other."""
        listing = await asyncio.to_thread(self._store.list, key, delimiter=True)
        listed = next((info for info in listing.objects if info.key == key), None)
        try:
            tail = await asyncio.to_thread(self._store.get_tail, key, 1)
        except NoSuchObject:
            if listed is None:
                return None
            raise StoreError(f"{key} is in the store's listing, and a GET says that it is not there") from None
        if listed is None:
            raise StoreError(f"{key} can be read, and is not in the store's listing")
        return ObjectInfo(key, tail.size, tail.etag, listed.mtime_ns)

    async def _read_again(self, state: State, key: str) -> Contents | NotAContainer | StoreError | None:
        """A container that was not there, or was another one, when it was to be read; None when it is gone, which is
        reported if the catalog has it."""
        try:
            info = await self._current(key)
        except StoreError as error:
            return error
        if info is not None:
            state.objects[key] = info
            return (await read_all(self._store, [info]))[key]
        state.objects.pop(key, None)
        record = await self._catalog.find_container(key)
        if record is not None and record.state in LIVE:
            self._tell("damage", key, What.MISSING.value)
        return None

    async def _check_contents(self, state: State, contents: dict[str, Contents]) -> None:
        sizes = state.external_sizes()
        for key, each in sorted(contents.items()):
            record = state.records.get(key)
            if record is not None and record.state in LIVE:
                self._compared.containers += 1
                self._compared.files += each.files
                if each.files != record.files and each.info.etag == record.etag:
                    self._tell("damage", key, f"found {each.files} entries, want {record.files} as in the catalog")
            for external in each.external:
                self._compared.external += 1
                there = first_there(external, sizes)
                if there is None or sizes[there] != external.size:
                    await self._check_external(each, external)

    async def _check_external(self, container: Contents, external: External) -> None:
        """Look at an external object that a listing shows as missing, or of another size."""
        key = container.info.key
        found: ObjectInfo | None = None
        try:
            for each in external.keys:
                found = found or await self._current(each)
            if (found is None or found.size != external.size) and await self._current(key) is None:
                return  # its container has gone meanwhile
        except StoreError as error:
            self._tell("unverified", key, f"its external object could not be looked for: {error}", external.name)
            return
        if found is None:
            where = " or ".join(map(repr, external.keys))
            self._tell("damage", key, f"external object {where} is missing", external.name)
        elif found.size != external.size:
            text = f"external object {found.key!r}: found {found.size} bytes, want {external.size}"
            self._tell("damage", key, text, external.name)

    def _check_unnamed(self, state: State, contents: dict[str, Contents]) -> None:
        for key in unnamed(state.external_sizes(), contents.values()):
            if is_older(state.objects[key], state.now, self._settings.external_grace):
                self._tell("warning", key, "is named by no container")


def is_older(info: ObjectInfo, now: datetime, age_s: float) -> bool:
    """Whether an object was modified so long ago, by the catalog's clock and the store's."""
    return info.mtime_ns <= int((now - timedelta(seconds=age_s)).timestamp() * 1_000_000_000)
