"""`desfs verify --repair`: bringing catalog and bucket together. Asyncio; the store in threads.

A shard is repaired under its lease, by what rows and listing say then. Acquiring the lease fences the uploaders off
before it: from then on their containers cannot be committed, and may go. Containers without a row become content first;
then what is left over is deleted, as `desfs seal` does it (`desfs.merging.collect`): a run that died is repeated.

What is never done: to delete anything in a shard that has damage, since what is merged may be the last copy; to delete
an object that its row does not describe; to take a row away whose object is missing, which is for people to decide; to
take an error for an answer.

External objects are deleted last (`desfs.merging.externals`), when all containers of the store were read and none
names them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date

from assignment.catalog import LIVE, Catalog, ContainerRecord, Lease
from assignment.client import InvalidRequest, LeaseLost
from des_format.errors import DesFormatError, NotAContainer
from des_format.layout import BIG_FILES_FOLDER
from des_format.shards import is_day
from desfs.adoption import content_at, list_shard, record_of
from desfs.catalog_check.check import State, is_older, read_all, take_state
from desfs.catalog_check.compare import Difference, What, compare
from desfs.catalog_check.contents import Contents, read_contents, unnamed
from desfs.errors import StoreError
from desfs.layout import read_layout
from desfs.merging.collect import FORGET_AFTER_S, collect_shard
from desfs.merging.externals import collect_externals
from desfs.merging.leases import LeaseBusy
from desfs.removal.holding import holding
from desfs.settings import VerifySettings
from desfs.store.base import ObjectInfo, Store

Effect = Callable[[str], None]


@dataclass(slots=True)
class Repaired:
    """What was done: containers that the catalog has now, containers and external objects that were deleted, rows that
    were forgotten."""

    adopted: int = 0
    deleted: int = 0
    external: int = 0
    forgotten: int = 0


class Repair:
    """Repairs a catalog and its bucket, once."""

    def __init__(
        self,
        store: Store,
        catalog: Catalog,
        settings: VerifySettings,
        *,
        left: Callable[[str, str], None] = lambda key, reason: None,
        effect: Effect = lambda name: None,
    ) -> None:
        """`left` is told of what could not be repaired, a key or a prefix of some and the reason; `effect` is called
        before each change that others can see."""
        self._store = store
        self._catalog = catalog
        self._settings = settings
        self._left = left
        self._effect = effect
        self._held = holding(catalog, settings, "verify")
        self._repaired = Repaired()

    async def run(self) -> Repaired:
        """Raises: StoreError when the bucket cannot be listed; AssignmentError."""
        state = await take_state(self._store, self._catalog, self._settings.grace)
        for day, shard in sorted({each.place for each in state.differences if not each.what.is_damage}):
            try:
                async with self._held(day, shard) as lease:
                    await self._repair_shard(lease)
            except (LeaseBusy, LeaseLost, InvalidRequest, StoreError) as error:
                self._left(f"{day}/{shard}", str(error))
        state = await take_state(self._store, self._catalog, self._settings.grace)
        await self._delete_externals(state)
        if all(each.what is not What.DELETED for each in state.differences):  # else they would be adopted some day
            self._effect("forget")
            self._repaired.forgotten = await self._catalog.forget_deleted(FORGET_AFTER_S)
        return self._repaired

    # --- containers ----------------------------------------------------------------------------------------------

    async def _repair_shard(self, lease: Lease) -> None:
        """Raises: LeaseLost; InvalidRequest; StoreError."""
        differences, records = await self._differences(lease)
        live = [each for each in records if each.state in LIVE]
        found: list[ContainerRecord] = []
        leaving: list[Difference] = []
        for each in differences:
            if each.what is What.UNKNOWN or await self._is_content(each, live):
                record = await self._describe(each)
                if record is not None:
                    found.append(record)
            elif not each.what.is_damage:
                leaving.append(each)
        if found:
            self._effect(f"adopt {lease.day}/{lease.shard}")
            await self._catalog.adopt_containers(lease, found)
            self._repaired.adopted += len(found)
        if not leaving:
            return
        damaged = next((each.key for each in differences if each.what.is_damage), None)
        if damaged is None and any(each.what is What.SUPERSEDED for each in leaving):
            damaged = await self._unsound(records)
        if damaged is not None:
            self._left(damaged, f"is damaged: nothing of {lease.day}/{lease.shard} is deleted")
            return
        await collect_shard(
            self._store,
            self._catalog,
            lease,
            [*live, *(each.record for each in leaving if each.record is not None)],
            now=await self._catalog.now(),
            grace_s=self._settings.grace,
            listed={each.key for each in leaving if each.info is not None},
            ttl_s=self._settings.lease_ttl,
            effect=self._effect,
        )
        self._repaired.deleted += sum(each.info is not None for each in leaving)

    async def _differences(self, lease: Lease) -> tuple[list[Difference], list[ContainerRecord]]:
        """What differs in the shard now, ascending by key, and its rows."""
        objects = await list_shard(self._store, lease.day, lease.shard)
        records = await self._catalog.list_containers(lease.day, shard=lease.shard)
        holders = {(each.day, each.shard): each for each in await self._catalog.list_holders(lease.day)}
        now = await self._catalog.now()
        return compare(records, objects, holders, now, grace_s=self._settings.grace), records

    async def _is_content(self, difference: Difference, live: Sequence[ContainerRecord]) -> bool:
        """Whether what stands under the key of an upload, or of a container that was deleted, is content. Raises:
        StoreError."""
        if difference.what not in (What.ORPHAN, What.DELETED) or difference.record is None or difference.info is None:
            return False
        return await content_at(self._store, difference.record, live) is not None

    async def _describe(self, difference: Difference) -> ContainerRecord | None:
        """The row for an object; None for one that is no container. Raises: StoreError."""
        assert difference.info is not None
        try:
            contents = await asyncio.to_thread(read_contents, self._store, difference.info)
        except DesFormatError:  # the comparison names it
            return None
        return record_of(difference.info, contents.files)

    async def _unsound(self, records: Sequence[ContainerRecord]) -> str | None:
        """The key of a container of the catalog that cannot be read as it should: what was merged into it may be all
        that there is. Raises: StoreError."""
        for record in records:
            if record.state in LIVE:
                try:
                    info = ObjectInfo(record.object_key, record.size, record.etag, 0)
                    contents = await asyncio.to_thread(read_contents, self._store, info)
                except DesFormatError:
                    return record.object_key
                if contents.files != record.files:
                    return record.object_key
        return None

    # --- external objects ----------------------------------------------------------------------------------------

    async def _delete_externals(self, state: State) -> None:
        """Raises: AssignmentError; what is left is told."""
        old = {
            key
            for key in state.external_sizes()
            if is_older(state.objects[key], state.now, self._settings.external_grace)
        }
        if not old:
            return
        contents: dict[str, Contents] = {}
        for key, each in (await read_all(self._store, state.containers())).items():
            if not isinstance(each, Contents):
                self._left(key, f"cannot be read, and may name any external object: none is deleted: {each}")
                return
            contents[key] = each
        by_day: dict[date, list[ObjectInfo]] = {}
        for key in unnamed(old, contents.values()):
            folder, _, below = key.partition("/")
            if is_day(folder) and below.startswith(f"{BIG_FILES_FOLDER}/"):  # others have no leases
                by_day.setdefault(date.fromisoformat(folder), []).append(state.objects[key])
        layout = await asyncio.to_thread(read_layout, self._store)
        for day, objects in sorted(by_day.items()):
            try:
                self._repaired.external += await collect_externals(
                    self._store,
                    self._catalog,
                    day,
                    [*state.containers(), *objects],
                    layout,
                    held=self._held,
                    grace_s=self._settings.external_grace,
                    effect=self._effect,
                )
            except (LeaseBusy, NotAContainer, StoreError) as error:
                self._left(f"{day}/{BIG_FILES_FOLDER}/", str(error))
