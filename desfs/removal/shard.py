"""The containers of one shard, and taking in those that the catalog does not know. Asyncio; the store in threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import date

from assignment.catalog import Catalog, Lease
from des_format.errors import NotAContainer
from desfs.container import load_container
from desfs.removal.place import managed, record_of
from desfs.store.base import ObjectInfo, Store


async def list_shard(store: Store, day: date, shard: str) -> dict[str, ObjectInfo]:
    """The containers of a shard that a catalog can have. Raises: StoreError."""
    listing = await asyncio.to_thread(store.list, f"{day.isoformat()}/", delimiter=True)
    return {
        info.key: info
        for info in listing.objects
        if (found := managed(info.key)) is not None and found[0] == (day, shard)
    }


async def adopt_unknown(store: Store, catalog: Catalog, lease: Lease, effect: Callable[[str], None]) -> None:
    """Write rows for the containers of a shard that have none: those of imports. What is no container is left.

    Raises: StoreError; AssignmentError.
    """
    objects = await list_shard(store, lease.day, lease.shard)
    for record in await catalog.list_containers(lease.day):  # behind the listing: a row is written before its object
        objects.pop(record.object_key, None)
    found = []
    for info in objects.values():
        try:
            loaded = await asyncio.to_thread(load_container, store, info)
        except NotAContainer:
            continue
        found.append(record_of(info, loaded.index.rows))
    if found:
        effect(f"adopt {lease.day}/{lease.shard}")
        await catalog.adopt_containers(lease, found)
