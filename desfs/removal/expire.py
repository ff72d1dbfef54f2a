"""`desfs expire`: whole days, oldest first. Asyncio; the store in threads.

The protocol of one day, under the leases of all its shards:

    died before        the next `desfs expire`
    rows               begins anew
    a container        goes on: a day is found by its objects as well as by its rows
    an external object goes on
    release            finds nothing of the day

Rows first: a container whose row says `deleted` is nobody's damage, one that is missing would be. Containers before
their external objects, so that no file is shown whose bytes are gone; among containers the older versions first, so
that nothing comes back that a newer one hides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from zoneinfo import ZoneInfo

from assignment.catalog import Catalog, ContainerState
from des_format.layout import BIG_FILES_FOLDER
from des_format.shards import CONTAINER_SUFFIX, is_day, parse_container_name, shard_hex
from desfs.adoption import managed
from desfs.layout import read_layout
from desfs.removal.holding import Held, holding
from desfs.settings import ExpireSettings
from desfs.store.base import ObjectInfo, Store

Effect = Callable[[str], None]

_MOST_BITS = 12  # of a layout whose shards are all leased: 4,096 leases
Progress = Callable[[date, int, int], None]  # a day, its objects that are deleted, and all that are to be


@dataclass(slots=True)
class Expired:
    """What was deleted, or would be; `bytes` with external objects; `foreign` are objects of the days that are left,
    because they are neither containers nor external objects."""

    days: list[date] = field(default_factory=list)
    containers: int = 0
    external: int = 0
    bytes: int = 0
    foreign: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Day:
    """The objects of a day: the containers in the order in which they may go, the external objects, the others."""

    containers: list[ObjectInfo] = field(default_factory=list)
    external: list[ObjectInfo] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    shards: set[str] = field(default_factory=set)


async def find_expired(store: Store, catalog: Catalog, settings: ExpireSettings) -> list[date]:
    """The days that are older than `older_than`, oldest first, by the catalog's clock: those whose last moment is so
    long ago. Raises: StoreError; AssignmentError."""
    today = _today(await catalog.now(), settings.timezone)
    listing = await asyncio.to_thread(store.list, "", delimiter=True)
    names = [prefix.rstrip("/") for prefix in listing.prefixes]
    names += [info.key.removesuffix(CONTAINER_SUFFIX) for info in listing.objects]
    found = {date.fromisoformat(name) for name in names if is_day(name)} | set(await catalog.list_days())
    return sorted(day for day in found if today - day > timedelta(days=settings.older_than))


async def expire(
    store: Store,
    catalog: Catalog,
    days: Sequence[date],
    settings: ExpireSettings,
    *,
    dry_run: bool = False,
    effect: Effect = lambda name: None,
    progress: Progress = lambda day, done, total: None,
) -> Expired:
    """Delete days. `effect` is called before each change that others can see.

    Raises: LeaseBusy when others do not let go of a shard; StoreError; AssignmentError. What was deleted by then is.
    """
    expired = Expired()
    held = holding(catalog, settings, "expire")
    for day in days:
        found = await _find(store, day)
        records = await catalog.list_containers(day)
        if not dry_run:
            found = await _delete(store, catalog, day, found, held, effect, progress)
        # Else it is the folder alone that a store still lists, or what stands in it is left.
        if found.containers or found.external or any(each.state is not ContainerState.DELETED for each in records):
            expired.days.append(day)
        expired.containers += len(found.containers)
        expired.external += len(found.external)
        expired.bytes += sum(info.size for info in (*found.containers, *found.external))
        expired.foreign += found.foreign
    return expired


async def _delete(
    store: Store, catalog: Catalog, day: date, found: _Day, held: Held, effect: Effect, progress: Progress
) -> _Day:
    records = await catalog.list_containers(day)
    holders = await catalog.list_holders(day)
    layout = await asyncio.to_thread(read_layout, store)
    # Those too that nobody has used on that day: a packer with a late file may be about to.
    every = (
        {shard_hex(shard, layout.shard_bits) for shard in range(1 << layout.shard_bits)}
        if layout.is_known and layout.shard_bits <= _MOST_BITS
        else set()
    )
    shards = sorted(every | found.shards | {record.shard for record in records} | {holder.shard for holder in holders})
    async with AsyncExitStack() as stack:
        leases = {shard: await stack.enter_async_context(held(day, shard)) for shard in shards}
        # Now nobody else commits to the day: what has come since is found, and the rest does not change.
        found = await _find(store, day)
        records = await catalog.list_containers(day)
        for shard, lease in leases.items():
            keys = [
                record.object_key
                for record in records
                if record.shard == shard and record.state is not ContainerState.DELETED
            ]
            if keys:
                effect(f"rows {day}/{shard}")
                await catalog.delete_containers(lease, keys)
        total = len(found.containers) + len(found.external)
        for done, info in enumerate((*found.containers, *found.external)):
            progress(day, done, total)
            effect(f"delete {info.key}")
            await asyncio.to_thread(store.delete, info.key)
        progress(day, total, total)
        effect(f"release {day}")
    return found


async def _find(store: Store, day: date) -> _Day:
    name = day.isoformat()
    below = await asyncio.to_thread(store.list, f"{name}/")
    beside = await asyncio.to_thread(store.list, name + CONTAINER_SUFFIX, delimiter=True)
    found = _Day()
    ranked: list[tuple[tuple[int, int], int, str, ObjectInfo]] = []
    for info in (*below.objects, *(each for each in beside.objects if each.key == name + CONTAINER_SUFFIX)):
        *folders, file_name = info.key.split("/")
        key, place = parse_container_name(file_name), managed(info.key)
        if BIG_FILES_FOLDER in folders:
            found.external.append(info)
        elif key is None or len(folders) > 1:
            found.foreign.append(info.key)
        else:
            if place is not None:
                found.shards.add(place[0][1])
            ranked.append((key.order, info.mtime_ns, info.key, info))
    found.containers = [each[-1] for each in sorted(ranked, key=lambda each: each[:-1])]
    return found


def _today(now: datetime, timezone: str) -> date:
    return (now if timezone == "UTC" else now.astimezone(ZoneInfo(timezone))).date()
