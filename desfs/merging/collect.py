"""Deleting what is no content of a day any more, under the lease of its shard. Asyncio; the store in threads.

What goes is what the catalog says of a key, never what the store answers: an error is an error, and the row stays as
it is until a DELETE has succeeded. A run that dies in between deletes once more, which does no harm: such a key never
holds anything else, but for an upload that the next holder may have begun; so the lease is renewed before one of those
goes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from datetime import datetime

from assignment.catalog import Catalog, ContainerRecord, ContainerState, Lease
from assignment.errors import LeaseLost
from desfs.adoption import adopt, others_at
from desfs.errors import StoreError
from desfs.merging.leases import LEASE_TTL_S
from desfs.merging.plan import dead_uploads, due
from desfs.store.base import Store


async def collect_shard(
    store: Store,
    catalog: Catalog,
    lease: Lease,
    records: Sequence[ContainerRecord],
    *,
    now: datetime,
    grace_s: float,
    keep: Collection[str] = (),
    listed: Collection[str] = (),
    effect: Callable[[str], None] = lambda name: None,
) -> int:
    """Delete, of the rows of a shard: uploads that nobody can commit any more, but for those to `keep`; objects that
    are `listed` and whose rows are `deleted`, which came late; and superseded containers whose grace has passed, the
    oldest first, up to the first that cannot be deleted. How many objects. What others have put under the key of an
    upload, or of a deleted container, becomes content instead.

    Raises: LeaseLost; StoreError, when the rows of what was deleted before have been changed; AssignmentError.
    """
    late = [each for each in records if each.state is ContainerState.DELETED and each.object_key in listed]
    orphans = [each for each in (*dead_uploads(records, lease.token), *late) if each.object_key not in keep]
    if orphans:
        of_others = {info.key: info for each in orphans if (info := await others_at(store, each)) is not None}
        await adopt(store, catalog, lease, of_others.values(), effect)  # what is no container stays all the same
        orphans = [each for each in orphans if each.object_key not in of_others]
        if await catalog.renew(lease, LEASE_TTL_S) is None:
            raise LeaseLost(f"shard {lease.shard} of {lease.day}: its lease has passed")
    gone: list[str] = []
    failure: StoreError | None = None
    for record in (*orphans, *due(records, now, grace_s)):
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
    if failure is not None:
        raise failure
    return len(gone)
