"""Deleting the payloads of big files that no container names any more. Asyncio; the store in threads.

An external object goes when three things hold. No container that the day's folder has names it, superseded ones
included. It is older than a grace period, so that the batch which stored it has long been committed. And while that is
looked at, and while it is deleted, the leases of the shards that its name can be in are held, so that no packer that
can still commit is about to name it: a packer that finds the payload of a file which it packs again in the store
already does not store it anew, however old it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from datetime import date, timedelta

import numpy as np

from assignment.catalog import Catalog, Lease
from des_format.index import HIDDEN
from des_format.layout import BIG_FILES_FOLDER, EXTERNAL
from des_format.meta import MetaColumns
from des_format.names import external_keys
from des_format.plan import plan_gets
from des_format.shards import parse_container_name, placement_shard, shard_hex
from des_format.source import open_container
from desfs.container import StoreSource, tail_length
from desfs.layout import Layout
from desfs.store.base import ObjectInfo, Store

_AT_A_TIME = 8


async def collect_externals(
    store: Store,
    catalog: Catalog,
    day: date,
    listing: Iterable[ObjectInfo],
    layout: Layout,
    *,
    held: Callable[[date, str], AbstractAsyncContextManager[Lease]],
    grace_s: float,
    effect: Callable[[str], None] = lambda name: None,
) -> int:
    """Delete the external objects of a day that nothing names, and that are older than `grace_s` seconds; how many.
    `listing` is what the day's folder has, from before; `held` gives the lease of a shard for as long as a block lasts.
    Nothing goes where the layout does not tell who may name it.

    Raises: LeaseBusy; NotAContainer when a container cannot be read, and what it names is not known; StoreError;
    AssignmentError.
    """
    listing = list(listing)
    limit_ns = int((await catalog.now() - timedelta(seconds=grace_s)).timestamp() * 1e9)
    folder = f"{day.isoformat()}/{BIG_FILES_FOLDER}/"
    old = {info.key for info in listing if info.key.startswith(folder) and info.mtime_ns < limit_ns}
    if not old or not layout.is_known:
        return 0
    containers = containers_of(day, listing)
    unnamed = old - await asyncio.to_thread(named_externals, store, containers)
    if not unnamed:
        return 0
    async with AsyncExitStack() as stack:
        for shard in sorted({shard for key in unnamed for shard in _shards_of(key.removeprefix(folder), layout)}):
            await stack.enter_async_context(held(day, shard))
        again = (await asyncio.to_thread(store.list, f"{day.isoformat()}/", delimiter=True)).objects
        known = {(info.key, info.etag) for info in containers}
        new = [info for info in containers_of(day, again) if (info.key, info.etag) not in known]
        unnamed -= await asyncio.to_thread(named_externals, store, new)
        for key in sorted(unnamed):
            effect(f"delete {key}")
            await asyncio.to_thread(store.delete, key)
    return len(unnamed)


def containers_of(day: date, listing: Iterable[ObjectInfo]) -> list[ObjectInfo]:
    """The containers in a day's folder."""
    folder = f"{day.isoformat()}/"
    return [
        info
        for info in listing
        if info.key.startswith(folder)
        and "/" not in info.key.removeprefix(folder)
        and parse_container_name(info.key.removeprefix(folder)) is not None
    ]


def named_externals(store: Store, containers: Iterable[ObjectInfo]) -> set[str]:
    """The keys of all external objects that some containers name. Blocking. Raises: NotAContainer; StoreError."""
    with ThreadPoolExecutor(_AT_A_TIME, "open") as threads:
        return set().union(*threads.map(lambda info: _named_by(store, info), containers))


def _named_by(store: Store, info: ObjectInfo) -> set[str]:
    source = StoreSource(store, info)
    index = open_container(source, tail_length=tail_length(info.size), max_meta=0).index
    rows = np.flatnonzero(((index.flags & EXTERNAL) != 0) & ((index.state & HIDDEN) == 0))
    meta = MetaColumns(index.rows)
    starts = index.meta_offset[rows].tolist()
    lengths = index.meta_length[rows].tolist()
    # A range of metadata ends where an entry's does: no request is so long that it is cut.
    for start, stop in plan_gets((start, start + length) for start, length in zip(starts, lengths, strict=True)):
        meta.fill(index, source.read(start, stop), start)
    named: set[str] = set()
    for row in rows.tolist():
        name = index.name(row).decode()
        named.update(external_keys(info.key, name, meta.external_key.get(row)), external_keys(info.key, name))
    return named


def _shards_of(inside: str, layout: Layout) -> set[str]:
    """The shards that an entry can be in whose payload stands at a path below the folder of big files: at its name, or
    below a folder of its own (`desfs.packer.build.put_external`)."""
    names = {inside, inside.partition("/")[2]} - {""}
    return {shard_hex(placement_shard(name, layout.shard_bits), layout.shard_bits) for name in names}
