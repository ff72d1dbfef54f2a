"""Sealing: the parts of days that are over become one container a shard. Asyncio; the store in threads.

A shard is done under its lease, in this order, and whatever a run dies before, the next one goes on:

    adopt       containers that the catalog does not know, where there is something to merge
    collect     dead uploads, objects that came late, superseded containers whose grace has passed
    merge       what `plan_seal` says, one container after the other (merge.py)

Parts that come late are merged by a later run. What was merged is superseded, and stays for `delete_grace` seconds: a
run after that deletes it. External objects go last (externals.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import UTC, date, tzinfo
from zoneinfo import ZoneInfo

import structlog

from assignment.catalog import Catalog, ContainerRecord, ContainerState, Lease
from assignment.errors import ContainerExists, ContainersChanged, LeaseLost
from des_format.errors import NotAContainer
from des_format.shards import CONTAINER_SUFFIX, is_day
from desfs.adoption import adopt, managed, record_of
from desfs.errors import NoSuchObject, ObjectReplaced, UsageError
from desfs.layout import read_layout
from desfs.merging.collect import FORGET_AFTER_S, collect_shard
from desfs.merging.externals import collect_externals, containers_of
from desfs.merging.leases import LeaseBusy, held
from desfs.merging.merge import MergeFailed, MergeRefused, merge_containers
from desfs.merging.plan import Merge, due, first_open_day, live_of, plan_seal
from desfs.settings import SealSettings
from desfs.store.base import ObjectInfo
from desfs.store.retrying import Retrying

log = structlog.get_logger(__name__)

_NOT_TAKEN = {ContainerState.UPLOADING, ContainerState.DELETED}


@dataclass(slots=True)
class Summary:
    """What a run has done: containers `sealed` from `inputs`, with `files` and `bytes`, `copied` of them by the store;
    objects `deleted`; shards or days that could not be done, with the reason."""

    sealed: int = 0
    inputs: int = 0
    files: int = 0
    bytes: int = 0
    copied: int = 0
    deleted: int = 0
    days: list[date] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class Sealer:
    """Seals days of one store. One task at a time. `effect` is called before each change that others can see: tests die
    there."""

    def __init__(
        self,
        store: Retrying,
        catalog: Catalog,
        settings: SealSettings,
        *,
        holder: str,
        effect: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.summary = Summary()
        self._store = store
        self._catalog = catalog
        self._settings = settings
        self._holder = holder
        self._effect = effect

    async def seal_past(self) -> None:
        """Seal every day that is over, the oldest first. Raises: as `seal_day`."""
        limit = await self._first_open_day()
        prefixes = (await asyncio.to_thread(self._store.list, "", delimiter=True)).prefixes
        days = {date.fromisoformat(prefix[:-1]) for prefix in prefixes if is_day(prefix[:-1])}
        for day in sorted({*days, *await self._catalog.list_days()}):
            if day < limit:
                await self.seal_day(day)
        await self._catalog.forget_deleted(FORGET_AFTER_S)

    async def seal_day(self, day: date) -> None:
        """Seal one day. What others work on, and what is damaged, is named in the summary, and the rest is done.

        Raises: UsageError for a day that is not over; StoreError and AssignmentError when store or catalog cannot be
        reached; OSError of the directory for temporary files.
        """
        if day >= (limit := await self._first_open_day()):
            raise UsageError(f"{day} is not over yet: the last day that is, with its grace, is before {limit}")
        self.summary.days.append(day)
        listing = (await asyncio.to_thread(self._store.list, f"{day.isoformat()}/")).objects
        rows = await self._catalog.list_containers(day)
        containers = containers_of(day, listing)
        whole = day.isoformat() + CONTAINER_SUFFIX
        others = (await asyncio.to_thread(self._store.list, whole)).objects
        # A tombstone may be there for a name in a container that is no shard's, and goes with none of its merges.
        drop_tombstones = not any(info.key == whole for info in others) and all(
            _shard_of(info.key) is not None for info in containers
        )
        shards = {record.shard for record in rows} | {_shard_of(info.key) for info in containers}
        for shard in sorted(shard for shard in shards if shard is not None):
            await self._try_shard(day, shard, rows, containers, drop_tombstones)
        if any(record.state in (ContainerState.SUPERSEDED, ContainerState.DELETED) for record in rows):
            await self._try_externals(day, listing)

    async def _first_open_day(self) -> date:
        return first_open_day(await self._catalog.now(), _zone(self._settings.timezone), self._settings.seal_grace)

    # --- a shard -----------------------------------------------------------------------------------------------------

    async def _try_shard(
        self,
        day: date,
        shard: str,
        rows: Sequence[ContainerRecord],
        containers: Sequence[ObjectInfo],
        drop_tombstones: bool,
    ) -> None:
        """Seal a shard if there is anything to do, as far as one can tell without its lease."""
        own = [record for record in rows if record.shard == shard]
        objects = {info.key: info for info in containers if _shard_of(info.key) == shard}
        if not await self._has_work(shard, own, objects):
            return
        try:
            async with self._held(day, shard) as lease:
                await self._seal_shard(lease, objects, drop_tombstones)
        except LeaseBusy as error:
            self._fail(str(error))
        except (LeaseLost, ContainersChanged, ContainerExists) as error:
            self._fail(f"shard {shard} of {day}: left for the next run: {error}")
        except (MergeFailed, NoSuchObject, ObjectReplaced) as error:
            self._fail(f"shard {shard} of {day}: {error}")

    async def _has_work(self, shard: str, rows: Sequence[ContainerRecord], objects: dict[str, ObjectInfo]) -> bool:
        known = {record.object_key for record in rows}
        foreign = [record_of(info, 0) for key, info in objects.items() if key not in known]
        if self._plan([*rows, *foreign], shard, objects, set()):
            return True
        if any(record.state is ContainerState.UPLOADING for record in rows):
            return True
        if any(record.state is ContainerState.DELETED and record.object_key in objects for record in rows):
            return True
        return bool(due(rows, await self._catalog.now(), self._settings.delete_grace))

    async def _seal_shard(self, lease: Lease, objects: dict[str, ObjectInfo], drop_tombstones: bool) -> None:
        shard = lease.shard
        rows = await self._rows(lease)
        left_alone: set[str] = set()
        known = {record.object_key for record in rows}
        unknown = [info for key, info in objects.items() if key not in known]
        if unknown and self._plan([*rows, *(record_of(info, 0) for info in unknown)], shard, objects, left_alone):
            for error in await adopt(self._store, self._catalog, lease, unknown, self._effect):
                self._fail(f"{error}; left as it is")
            rows = await self._rows(lease)
        merges = self._plan(rows, shard, objects, left_alone)
        self.summary.deleted += await collect_shard(
            self._store,
            self._catalog,
            lease,
            rows,
            now=await self._catalog.now(),
            grace_s=self._settings.delete_grace,
            ttl_s=self._settings.lease_ttl,
            keep={merge.object_key for merge in merges},
            listed=objects,
            effect=self._effect,
        )
        merges = self._plan(await self._rows(lease), shard, objects, left_alone)
        while merges:
            try:
                await self._merge(lease, merges[0], drop_tombstones)
            except MergeRefused as error:
                self._fail(str(error))
                left_alone.add(error.key)
            merges = self._plan(await self._rows(lease), shard, objects, left_alone)

    async def _merge(self, lease: Lease, merge: Merge, drop_tombstones: bool) -> None:
        merged = await merge_containers(
            self._store,
            self._catalog,
            lease,
            merge,
            drop_tombstones=drop_tombstones and merge.at_bottom,
            ttl_s=self._settings.lease_ttl,
            effect=self._effect,
        )
        self.summary.sealed += 1
        self.summary.inputs += len(merged.inputs)
        self.summary.files += merged.files
        self.summary.bytes += merged.size
        self.summary.copied += merged.copied
        log.info("sealed", key=merged.object_key, inputs=len(merged.inputs), size=merged.size, copied=merged.copied)

    def _plan(
        self, rows: Iterable[ContainerRecord], shard: str, objects: dict[str, ObjectInfo], left_alone: set[str]
    ) -> list[Merge]:
        rows = list(rows)
        free = {record.object_key for record in rows if record.state in _NOT_TAKEN}
        return plan_seal(
            live_of(rows, shard),
            max_bytes=self._settings.max_sealed_bytes,
            max_files=self._settings.max_sealed_files,
            taken={record.object_key for record in rows} - free | objects.keys() - free,
            left_alone=left_alone,
        )

    def _held(self, day: date, shard: str) -> AbstractAsyncContextManager[Lease]:
        settings = self._settings
        return held(self._catalog, day, shard, self._holder, settings.lease_ttl, settings.wait)

    async def _rows(self, lease: Lease) -> list[ContainerRecord]:
        return await self._catalog.list_containers(lease.day, shard=lease.shard)

    # --- external objects --------------------------------------------------------------------------------------------

    async def _try_externals(self, day: date, listing: Sequence[ObjectInfo]) -> None:
        """Only of days that were merged or deleted from lately: the rows that tell are forgotten after some days."""
        try:
            layout = await asyncio.to_thread(read_layout, self._store)
            self.summary.deleted += await collect_externals(
                self._store,
                self._catalog,
                day,
                listing,
                layout,
                held=self._held,
                grace_s=self._settings.orphan_grace,
                effect=self._effect,
            )
        except (LeaseBusy, NotAContainer, NoSuchObject, ObjectReplaced) as error:
            log.info("external objects are left for the next run", day=str(day), reason=str(error))

    def _fail(self, message: str) -> None:
        self.summary.failures.append(message)
        log.warning("left for later", reason=message)


def _shard_of(object_key: str) -> str | None:
    """The shard whose container a key is, None for what is no shard's."""
    found = managed(object_key)
    return None if found is None else found[0][1]


def _zone(name: str) -> tzinfo:
    if name == "UTC":  # needs no time zone database, which a container image may lack
        return UTC
    return ZoneInfo(name)
