"""What a catalog can know of a bucket's containers, and taking in those that it does not. Asyncio; the store in
threads.

Who writes without a catalog (an import, a packer with another one) takes keys that are free in the bucket. Such a key
may have a row here: of an upload that died before its PUT, or of a container that was deleted. What stands under it is
the content of a day then, and no orphan.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable
from datetime import date

from assignment.catalog import Catalog, ContainerRecord, ContainerState, Lease
from des_format.errors import DesFormatError, NotAContainer
from des_format.reader import BaseReader
from des_format.shards import SEALED, ContainerKey, is_day, parse_container_name
from des_format.source import DEFAULT_TAIL, open_container
from desfs.container import StoreSource, tail_length
from desfs.store.base import ObjectInfo, Store

Place = tuple[date, str]  # day and shard

_SHARD = re.compile(r"([0-9a-f]{1,8})[-.]", re.ASCII)
_MAX_GENERATION = (1 << 53) - 1  # a number that no database holds is no packer's


def managed(key: str) -> tuple[Place, ContainerKey] | None:
    """The place of a container that has, or can get, a row in a catalog, and what its name says: `{day}/{shard}.des`
    and parts. None for all other keys, containers of another layout among them."""
    folder, _, file_name = key.rpartition("/")
    name, shard = parse_container_name(file_name), _SHARD.match(file_name)
    if name is None or shard is None or not is_day(folder):
        return None
    if name.group != f"x{shard[1]}" or name.last > _MAX_GENERATION:
        return None
    return (date.fromisoformat(folder), shard[1]), name


def record_of(info: ObjectInfo, files: int) -> ContainerRecord:
    """The row of a container that is content, by its object. Raises: ValueError for one that can have none."""
    found = managed(info.key)
    if found is None:
        raise ValueError(f"{info.key} is no container of a shard")
    (day, shard), name = found
    is_sealed = name.last == SEALED
    return ContainerRecord(
        object_key=info.key,
        day=day,
        shard=shard,
        generation=0 if is_sealed else name.last,
        size=info.size,
        files=files,
        etag=info.etag,
        state=ContainerState.SEALED if is_sealed else ContainerState.COMMITTED,
    )


async def list_shard(store: Store, day: date, shard: str) -> dict[str, ObjectInfo]:
    """The containers of a shard that a catalog can have, by key. Raises: StoreError."""
    listing = await asyncio.to_thread(store.list, f"{day.isoformat()}/", delimiter=True)
    return {
        info.key: info
        for info in listing.objects
        if (found := managed(info.key)) is not None and found[0] == (day, shard)
    }


async def adopt(
    store: Store, catalog: Catalog, lease: Lease, objects: Iterable[ObjectInfo], effect: Callable[[str], None]
) -> list[NotAContainer]:
    """Write rows for containers of the lease's shard that have none, or that of an upload; what is no container is
    left, and returned. Raises: LeaseLost; NoSuchObject, ObjectReplaced; StoreError; CatalogUnavailable."""
    found, refused = [], []
    for info in objects:
        try:
            found.append(record_of(info, await asyncio.to_thread(_count_entries, store, info)))
        except NotAContainer as error:
            refused.append(error)
    if found:
        effect(f"adopt {len(found)} of {lease.day}/{lease.shard}")
        await catalog.adopt_containers(lease, found)
    return refused


async def adopt_unknown(store: Store, catalog: Catalog, lease: Lease, effect: Callable[[str], None]) -> None:
    """Write rows for the containers of a shard that have none: those of imports. What is no container is left.

    Raises: as `adopt`.
    """
    objects = await list_shard(store, lease.day, lease.shard)
    for record in await catalog.list_containers(lease.day):  # behind the listing: a row is written before its object
        objects.pop(record.object_key, None)
    await adopt(store, catalog, lease, objects.values(), effect)


async def others_at(store: Store, record: ContainerRecord) -> ObjectInfo | None:
    """The object under the key of an `uploading` or `deleted` row, if somebody without this catalog put it there.

    Raises: NoSuchObject, ObjectReplaced when it changes that very moment; StoreError.
    """
    listing = await asyncio.to_thread(store.list, record.object_key)
    info = next((each for each in listing.objects if each.key == record.object_key), None)
    name = parse_container_name(record.object_key.rpartition("/")[2])
    if info is None or name is None or name.first == SEALED or name.first != name.last:  # merges are ours alone
        return None
    if record.etag:  # it was committed: what came later is another version
        return None if info.etag == record.etag else info
    try:
        return info if await asyncio.to_thread(is_imported, store, info) else None
    except DesFormatError:  # what we put is whole
        return info


def is_imported(store: Store, info: ObjectInfo) -> bool:
    """Whether a container was written by somebody who assigns no ids: an import, which knows no catalog. Packers give
    each file an id, and what `desfs rm` writes has no files. Blocking.

    Raises: NotAContainer; NoSuchObject, ObjectReplaced when it is not there any more; StoreError.
    """
    reader = BaseReader(StoreSource(store, info), None, DEFAULT_TAIL)
    first = next(iter(reader.get_index()), None)
    return first is not None and "id" not in reader.get_meta(first)


def _count_entries(store: Store, info: ObjectInfo) -> int:
    source = StoreSource(store, info)
    return open_container(source, tail_length=tail_length(info.size), max_meta=0).index.footer.file_count
