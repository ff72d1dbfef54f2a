"""Deleting what is no content of a day any more, under the lease of its shard. Asyncio; the store in threads.

What goes is what the catalog says of a key, never what the store answers: an error is an error, and the row stays as
it is until a DELETE has succeeded. A run that dies in between deletes once more: an object with the ETag of its row, or
an upload; the next holder may have begun the latter again, so the lease is renewed before uploads go.

Two things are looked at in the store before, because a DELETE cannot be taken back: that an upload which nobody can
commit shows nothing that no other container has (`desfs.adoption`), and, before merged containers go, that all of the
shard's content is there as the catalog has it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime

import structlog

from assignment.catalog import LIVE, Catalog, ContainerRecord, ContainerState, Lease
from assignment.errors import LeaseLost
from desfs.adoption import adopt, content_at, list_shard
from desfs.errors import StoreError
from desfs.merging.plan import dead_uploads, due
from desfs.store.base import ObjectInfo, Store

# How long the row of a deleted container stays: it tells an upload that comes late for an orphan.
FORGET_AFTER_S = 30 * 86_400.0

log = structlog.get_logger(__name__)


async def collect_shard(
    store: Store,
    catalog: Catalog,
    lease: Lease,
    records: Sequence[ContainerRecord],
    *,
    now: datetime,
    grace_s: float,
    ttl_s: float,
    keep: Collection[str] = (),
    listed: Collection[str] = (),
    effect: Callable[[str], None] = lambda name: None,
) -> int:
    """Delete, of the rows of a shard: uploads that nobody can commit any more, but for those to `keep`; objects that
    are `listed` and whose rows are `deleted`, which came late; and superseded containers whose grace has passed, the
    oldest first, up to the first that cannot be deleted. How many objects. What stands under the key of an upload or of
    a deleted container, and is content, gets a row instead. `records` has all live rows of the shard; `ttl_s` is the
    lease's.

    Raises: LeaseLost; StoreError, when the rows of what was deleted before have been changed; AssignmentError.
    """
    late = [each for each in records if each.state is ContainerState.DELETED and each.object_key in listed]
    orphans = [each for each in (*dead_uploads(records, lease.token), *late) if each.object_key not in keep]
    live = [each for each in records if each.state in LIVE]
    if orphans:
        content: dict[str, ObjectInfo] = {}
        for each in orphans:
            info = await content_at(store, each, live)
            if info is not None:
                content[each.object_key] = info
        await adopt(store, catalog, lease, content.values(), effect)  # what is no container stays all the same
        orphans = [each for each in orphans if each.object_key not in content]
        if await catalog.renew(lease, ttl_s) is None:
            raise LeaseLost(f"shard {lease.shard} of {lease.day}: its lease has passed")
    merged = due(records, now, grace_s)
    gone: list[str] = []
    taken: list[ObjectInfo] = []
    if merged:
        objects = await list_shard(store, lease.day, lease.shard)
        if _are_there(objects, live):
            # A run that died between a DELETE and its row has left a key that an import may have taken since.
            taken = [
                info for each in merged if (info := objects.get(each.object_key)) is not None and info.etag != each.etag
            ]
            gone = [info.key for info in taken]
            merged = [each for each in merged if each.object_key not in gone]
        else:
            merged = []
    failure: StoreError | None = None
    for record in (*orphans, *merged):
        effect(f"delete {record.object_key}")
        try:
            await asyncio.to_thread(store.delete, record.object_key)
        except StoreError as error:
            failure = error
            break
        gone.append(record.object_key)
    if gone:
        effect(f"forget {len(gone)} of {lease.shard}")
        await catalog.delete_containers(lease, gone)
    await adopt(store, catalog, lease, taken, effect)
    if failure is not None:
        raise failure
    return len(gone) - len(taken)


def _are_there(objects: Mapping[str, ObjectInfo], live: Sequence[ContainerRecord]) -> bool:
    """Whether the store has all live containers of the shard as the catalog has them: what was merged into one that is
    gone may be all that there is."""
    for record in live:
        found = objects.get(record.object_key)
        if found is None or (found.size, found.etag) != (record.size, record.etag):
            log.error(
                "a container is not as in the catalog: nothing that was merged is deleted", container=record.object_key
            )
            return False
    return True
