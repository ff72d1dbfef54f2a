"""Compaction of the open day: a shard that is fed by a trickle never shows more than a few dozen containers.
Asyncio."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime

import structlog

from assignment.catalog import LIVE, Catalog, ContainerRecord, ContainerState, Lease
from assignment.errors import ContainerExists, ContainersChanged, LeaseLost
from des_format.errors import DesFormatError
from desfs.adoption import list_shard, record_of
from desfs.errors import DesfsError
from desfs.merging.collect import collect_shard
from desfs.merging.leases import LeaseBusy, LeaseKeeper
from desfs.merging.merge import Merged, MergeRefused, merge_containers
from desfs.merging.plan import Merge, due, live_of, name_of, plan_compaction
from desfs.store.retrying import Retrying

log = structlog.get_logger(__name__)

_CONTENT = LIVE | {ContainerState.SUPERSEDED}
_STATES = LIVE | {ContainerState.UPLOADING, ContainerState.SUPERSEDED}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactionSettings:
    """When an open shard is compacted. Sizes in bytes, times in seconds; `delete_grace` from when a container was
    merged to when its object goes: as long as a mount may go on with an old listing. `lease_ttl` is that of the leases
    which are given."""

    max_parts: int = 16
    max_container_bytes: int = 256 * 1024 * 1024
    max_container_files: int = 65_536
    delete_grace: float = 30.0
    lease_ttl: float = 60.0


@dataclass(slots=True)
class Compacted:
    """What was done to a shard: the containers that were made, and how many objects were deleted."""

    day: date
    shard: str
    merged: list[Merged] = field(default_factory=list)
    deleted: int = 0


async def compact_shard(
    store: Retrying,
    catalog: Catalog,
    leases: LeaseKeeper,
    day: date,
    shard: str,
    settings: CompactionSettings,
    effect: Callable[[str], None] = lambda name: None,
    left_alone: set[str] | None = None,
) -> Compacted:
    """Merge containers of a shard of the open day until there are few enough, and delete what was merged before and
    whose grace has passed. A container that cannot be merged is added to `left_alone`, and is from then on.

    Raises: what `leases` raises; MergeFailed; StoreError; AssignmentError; OSError of the directory for temporary
    files.
    """
    left_alone = set() if left_alone is None else left_alone
    lease = await leases.of(day, shard)
    done = Compacted(day, shard)
    records = await _records(catalog, day, shard)
    merge = _plan(records, shard, settings, left_alone)
    done.deleted += await collect_shard(
        store,
        catalog,
        lease,
        records,
        now=await catalog.now(),
        grace_s=settings.delete_grace,
        ttl_s=settings.lease_ttl,
        keep=() if merge is None else (merge.object_key,),
        effect=effect,
    )
    foreign = await _foreign(store, catalog, day, shard)
    merge = _plan(await _records(catalog, day, shard), shard, settings, left_alone, foreign)
    while merge is not None:
        await _merge(store, catalog, lease, merge, settings.lease_ttl, left_alone, done, effect)
        merge = _plan(await _records(catalog, day, shard), shard, settings, left_alone, foreign)
    return done


async def _merge(
    store: Retrying,
    catalog: Catalog,
    lease: Lease,
    merge: Merge,
    ttl_s: float,
    left_alone: set[str],
    done: Compacted,
    effect: Callable[[str], None],
) -> None:
    try:
        # Tombstones stay: what they hide may stand in a container that no catalog knows. Sealing looks there.
        merged = await merge_containers(store, catalog, lease, merge, drop_tombstones=False, ttl_s=ttl_s, effect=effect)
    except MergeRefused as error:
        log.warning("left as it is", reason=str(error))
        left_alone.add(error.key)
        return
    done.merged.append(merged)
    log.info("compacted", key=merged.object_key, inputs=len(merged.inputs), size=merged.size, copied=merged.copied)


async def _records(catalog: Catalog, day: date, shard: str) -> list[ContainerRecord]:
    return await catalog.list_containers(day, shard=shard, states=_STATES)


async def _foreign(store: Retrying, catalog: Catalog, day: date, shard: str) -> list[ContainerRecord]:
    """The containers of a shard that the catalog does not take for content: imports, and what packers with another
    catalog have put, under keys of ours as well. They stay where they are in the order of generations, and nothing is
    merged across one of them: a reader goes by that order. What we have merged ourselves, and not committed, is none.
    """
    objects = await list_shard(store, day, shard)
    # Behind the listing: a row is written before its object.
    for record in await catalog.list_containers(day, shard=shard):
        name = name_of(record.object_key)
        if record.state in _CONTENT or name.first != name.last:
            objects.pop(record.object_key, None)
    return [record_of(info, 0) for info in objects.values()]


def _plan(
    records: Iterable[ContainerRecord],
    shard: str,
    settings: CompactionSettings,
    left_alone: set[str],
    foreign: Sequence[ContainerRecord] = (),
) -> Merge | None:
    return plan_compaction(
        live_of([*records, *foreign], shard),
        max_parts=settings.max_parts,
        max_bytes=settings.max_container_bytes,
        max_files=settings.max_container_files,
        left_alone=left_alone.union(record.object_key for record in foreign),
    )


class Compactor:
    """Compacts what is due, for a packer, between its batches. One task at a time. `effect` is called before each
    change that others can see: tests die there."""

    def __init__(
        self,
        store: Retrying,
        catalog: Catalog,
        settings: CompactionSettings,
        effect: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._settings = settings
        self._effect = effect
        self._left_alone: set[str] = set()

    async def run_due(
        self, leases: LeaseKeeper, days: Iterable[date], wants: Callable[[str], bool] = lambda shard: True
    ) -> list[Compacted]:
        """Compact those of the shards of open days that are wanted and have too many containers, or superseded ones to
        delete; what was done to each. One whose lease another one holds, that others change meanwhile, or that fails,
        is left for later, and logged.

        One query for each day, and one for the clock where something was merged. Raises: CatalogUnavailable,
        CatalogCorrupt.
        """
        done = []
        for day in days:
            by_shard: dict[str, list[ContainerRecord]] = {}
            for record in await self._catalog.list_containers(day, states=_STATES):
                by_shard.setdefault(record.shard, []).append(record)
            now: datetime | None = None
            for shard, records in sorted(by_shard.items()):
                if not wants(shard):
                    continue
                is_due = _plan(records, shard, self._settings, self._left_alone) is not None
                if not is_due and any(record.state is ContainerState.SUPERSEDED for record in records):
                    now = now or await self._catalog.now()
                    is_due = bool(due(records, now, self._settings.delete_grace))
                if is_due:
                    done += await self._compact(leases, day, shard)
        return done

    async def _compact(self, leases: LeaseKeeper, day: date, shard: str) -> list[Compacted]:
        try:
            arguments = (day, shard, self._settings, self._effect, self._left_alone)
            return [await compact_shard(self._store, self._catalog, leases, *arguments)]
        except LeaseBusy as error:
            log.info("compaction is left to another one", shard=shard, reason=str(error))
        except (LeaseLost, ContainersChanged, ContainerExists) as error:
            log.info("compaction is left for later", shard=shard, reason=str(error))
        except (DesfsError, DesFormatError, OSError) as error:
            log.warning("a shard cannot be compacted, and is tried again", day=str(day), shard=shard, error=str(error))
        finally:
            await leases.done_with(day, shard)
        return []
