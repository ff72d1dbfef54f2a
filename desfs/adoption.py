"""What a catalog can know of a bucket's containers, and taking in those that it does not. Asyncio; the store in
threads.

Who writes without a catalog (an import, a packer with another one) takes keys that are free in the bucket. Such a key
may have a row here: of an upload that died before its PUT, or of a container that was deleted. What stands under it is
the content of a day then, and no orphan.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import date

from assignment.catalog import Catalog, ContainerRecord, ContainerState, Lease
from des_format.errors import DesFormatError, NotAContainer
from des_format.reader import BaseReader
from des_format.shards import SEALED, ContainerKey, is_day, parse_container_name
from des_format.source import DEFAULT_TAIL, open_container
from desfs.container import StoreSource, load_container, tail_length
from desfs.errors import UsageError
from desfs.layout import LAYOUT_KEY, Layout
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
    listing = await asyncio.to_thread(store.list, f"{day.isoformat()}/{shard}")
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
    for record in await catalog.list_containers(
        lease.day, shard=lease.shard
    ):  # behind the listing: a row is written before its object
        objects.pop(record.object_key, None)
    await adopt(store, catalog, lease, objects.values(), effect)


async def content_at(store: Store, record: ContainerRecord, live: Sequence[ContainerRecord]) -> ObjectInfo | None:
    """The object under the key of an `uploading` or `deleted` row, if it is to be taken for content. None for one that
    can go, and where there is none.

    What an uploader that died has put (its mark tells) can go when its files were packed again, which hides it; until
    then it is as good as committed. Comes it when its row is deleted already, so it was, or is going to be. What has no
    mark goes when it shows nothing that the `live` containers of the shard, as far as they are as new, do not have.

    Raises: NoSuchObject, ObjectReplaced when the shard changes that very moment; StoreError.
    """
    listing = await asyncio.to_thread(store.list, record.object_key)
    info = next((each for each in listing.objects if each.key == record.object_key), None)
    name = parse_container_name(record.object_key.rpartition("/")[2])
    if info is None or name is None:
        return None
    if record.size and info.etag == record.etag:  # it was content once, and was deleted
        return None
    if record.mark:
        if not await asyncio.to_thread(_has_mark, store, info, record.mark):
            return info
        if record.state is ContainerState.DELETED:
            return None
    as_new = [
        each
        for each in live
        if each.object_key != record.object_key
        and (other := parse_container_name(each.object_key.rpartition("/")[2])) is not None
        and other.last >= name.first
    ]
    return None if await asyncio.to_thread(_is_hidden, store, info, as_new) else info


def _has_mark(store: Store, info: ObjectInfo, mark: str) -> bool:
    """Whether a container's first entry has this id."""
    try:
        reader = BaseReader(StoreSource(store, info), None, DEFAULT_TAIL)
        first = next(iter(reader.get_index()), None)
        return first is not None and reader.get_meta(first).get("id") == mark
    except DesFormatError:
        return False  # what we put is whole


def _is_hidden(store: Store, info: ObjectInfo, others: Sequence[ContainerRecord]) -> bool:
    try:
        index = load_container(store, info).index
    except NotAContainer:
        return False  # what we put is whole
    left = {index.name(row) for row in range(index.rows)}
    for record in reversed(others):  # what was packed again is among the newest
        if not left:
            break
        other = load_container(store, ObjectInfo(record.object_key, record.size, record.etag, 0)).index
        left = {name for name in left if other.find(name) is None}
    return not left


def _count_entries(store: Store, info: ObjectInfo) -> int:
    source = StoreSource(store, info)
    return open_container(source, tail_length=tail_length(info.size), max_meta=0).index.footer.file_count


async def check_store(catalog: Catalog, store_url: str, layout: Layout) -> None:
    """Refuse a catalog that is another store's: what it takes for left over may be all that this one has. A store whose
    layout has no id, or that has none, is not told from others.

    Raises: UsageError; CatalogUnavailable, CatalogCorrupt.
    """
    if layout.id and (bound := await catalog.bind_store(layout.id)) != layout.id:
        raise UsageError(
            f"the catalog is that of another store: {store_url}/{LAYOUT_KEY} has the id {layout.id}, "
            f"the catalog {bound}"
        )
