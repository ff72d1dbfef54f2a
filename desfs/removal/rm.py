"""`desfs rm`: a tombstone container for each shard that has one of the names. Asyncio; the store in threads.

The protocol of one shard, under its lease; the catalog's commit is the commit:

    died before   a mount shows                      the next `desfs rm` of the same paths
    adopt, begin  the files                          removes them
    PUT           the files                          removes them; the row `uploading` is the collector's
    commit        the files no more: the bucket      does not take that tombstone for one that stays, and writes another
                  is what it reads                   one; row and object are the collector's. When nobody repeats the
                                                     command, the collector brings the files back
    release       the files no more                  says that they are gone already

Nothing is written before all paths were found. What a packer commits meanwhile under one of the names has an older
generation than the tombstone, and is removed as well: as by rm(1), the name goes, whatever it names by then.

Containers of the shard that have no row get theirs first: a merge, which knows rows alone, would find nothing that the
tombstone hides, and drop it.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from decimal import Decimal
from pathlib import Path

from assignment.catalog import LIVE, Catalog, ContainerRecord, ContainerState, Lease
from des_format.shards import is_day
from des_format.writer import DesWriter
from desfs.adoption import adopt_unknown, list_shard, managed, record_of
from desfs.container import load_container
from desfs.errors import DesfsError, NoSuchPath, ObjectExists
from desfs.layout import read_layout
from desfs.packer.layout import NEW_SHARD_BITS
from desfs.removal.day import open_day
from desfs.removal.holding import holding
from desfs.removal.plan import Age, DayPlan, plan_removal
from desfs.settings import RemovalSettings
from desfs.store.base import ObjectInfo, Store

Effect = Callable[[str], None]

_TIES = 3  # tombstones that are as old as what they have to hide, before nobody believes it any more
_GRAIN_NS = 1_000_000_000  # of LastModified in S3


@dataclass(slots=True)
class Removed:
    """What was removed, or would be: `files` (their paths), in so many `days`, by so many `containers` of tombstones;
    paths that were `gone` already, and those that were `missing`; `problems` are containers that are none."""

    files: list[str] = field(default_factory=list)
    containers: int = 0
    days: int = 0
    gone: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class NotRemoved(DesfsError):
    """Some of the paths cannot be removed, so none was; `reasons` has a line for each."""

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


async def remove(
    store: Store,
    catalog: Catalog,
    paths: Sequence[str],
    settings: RemovalSettings,
    *,
    recursive: bool = False,
    force: bool = False,
    dry_run: bool = False,
    effect: Effect = lambda name: None,
) -> Removed:
    """Remove paths like `2026-11-20/photos/1.jpg`. `effect` is called before each change that others can see.

    Raises: NotRemoved, before anything is done; LeaseBusy when others do not let go of a shard; StoreError;
    AssignmentError (LeaseLost is one); NotAContainer. What was removed by then stays removed.
    """
    removed = Removed()
    plans = await _plan(store, catalog, paths, removed, recursive=recursive, force=force)
    removed.files = [f"{day}/{name}" for day, plan in plans.items() for name in plan.names()]
    removed.days = sum(bool(plan.shards) for plan in plans.values())
    removed.containers = sum(len(plan.shards) for plan in plans.values())
    if dry_run:
        return removed
    held = holding(catalog, settings, "rm")
    for day, plan in plans.items():
        for shard, names in plan.shards.items():
            async with held(day, shard) as lease:
                newer_than = max((plan.newer_than[name] for name in names if name in plan.newer_than), default=None)
                await _hide(store, catalog, lease, names, newer_than, effect)
                effect(f"release {day}/{shard}")
    return removed


async def _plan(
    store: Store, catalog: Catalog, paths: Sequence[str], removed: Removed, *, recursive: bool, force: bool
) -> dict[date, DayPlan]:
    """What to do, by day. Raises: NotRemoved."""
    by_day: dict[date, dict[str, str]] = {}  # the path below the day, and as it was given
    reasons = []
    for path in paths:
        name, *inside = [part for part in path.split("/") if part not in ("", ".")] or [""]
        if is_day(name):
            by_day.setdefault(date.fromisoformat(name), {})["/".join(inside)] = path
        else:
            reasons.append(f"{path}: is not below a day, such as 2026-11-20/{path.strip('/')}")
    layout = await asyncio.to_thread(read_layout, store)
    shard_bits = layout.shard_bits if layout.is_known else NEW_SHARD_BITS
    plans = {}
    for day, wanted in sorted(by_day.items()):
        # Before the containers: what is committed meanwhile is written once more, which does no harm.
        records = await catalog.list_containers(day)
        passing = {record.object_key for record in records if record.state not in LIVE}
        opened = await asyncio.to_thread(open_day, store, day.isoformat())
        removed.problems += opened.problems
        plan = await asyncio.to_thread(
            plan_removal, opened.members, shard_bits, wanted, recursive=recursive, passing=passing
        )
        plans[day] = plan
        removed.gone += [wanted[path] for path in plan.gone]
        removed.missing += [wanted[path] for path in plan.missing]
        reasons += [f"{wanted[path]}: is a directory: -r removes it with what is in it" for path in plan.directories]
    if not force:
        reasons += [str(NoSuchPath(f"{path}: no such file or directory")) for path in removed.missing]
    if reasons:
        raise NotRemoved(reasons)
    return plans


async def _hide(
    store: Store, catalog: Catalog, lease: Lease, names: Sequence[str], newer_than: Age | None, effect: Effect
) -> None:
    """Write a committed tombstone for each of the names into a shard, and another one when the first is not as new as
    it has to be: S3 counts whole seconds. Raises: DesfsError when `newer_than` lies in the future."""
    await adopt_unknown(store, catalog, lease, effect)
    now = await catalog.now()
    meta = {"mtime": Decimal(int(now.timestamp()))}  # when it was removed, for people: readers show none of it
    raw = await asyncio.to_thread(build_tombstones, names, meta)
    for _ in range(_TIES):
        info = await _publish(store, catalog, lease, raw, len(names), effect)
        if newer_than is None or (info.mtime_ns, info.key) > newer_than:
            return
        if newer_than[0] - info.mtime_ns > _GRAIN_NS:
            break
        await asyncio.sleep(_GRAIN_NS / 1e9)
    assert newer_than is not None
    raise DesfsError(
        f"{newer_than[1]}: was modified in the future, by the store's clock: nothing hides what is in it yet"
    )


async def _publish(store: Store, catalog: Catalog, lease: Lease, raw: bytes, files: int, effect: Effect) -> ObjectInfo:
    """Put a container into a shard, and commit it."""
    while True:
        objects = await list_shard(store, lease.day, lease.shard)
        last = max((name.last for _, name in filter(None, map(managed, objects))), default=0)
        effect(f"begin {lease.day}/{lease.shard}")
        record = await catalog.begin_part(lease, at_least=max(last, 0) + 1)
        effect(f"put {record.object_key}")
        try:
            etag = await asyncio.to_thread(store.put, record.object_key, raw)
        except ObjectExists:
            await _give_up(store, catalog, lease, record, effect)
            continue
        effect(f"commit {record.object_key}")
        committed = replace(record, size=len(raw), files=files, etag=etag, state=ContainerState.COMMITTED)
        await catalog.commit_container(lease, committed)
        info = (await list_shard(store, lease.day, lease.shard)).get(record.object_key)
        if info is None:
            raise DesfsError(f"{record.object_key} is gone as soon as it was written: somebody deletes what is new")
        return info


async def _give_up(store: Store, catalog: Catalog, lease: Lease, record: ContainerRecord, effect: Effect) -> None:
    """Somebody without a catalog was faster with a key. Its container is content: the row that was to be ours becomes
    its, else the collector would take it for our orphan."""
    info = (await list_shard(store, lease.day, lease.shard)).get(record.object_key)
    if info is not None:
        loaded = await asyncio.to_thread(load_container, store, info)
        effect(f"adopt {record.object_key}")
        await catalog.adopt_containers(lease, [record_of(info, loaded.index.rows)])


def build_tombstones(names: Sequence[str], meta: Mapping[str, object]) -> bytes:
    """A container that hides names. Blocking. Raises: OSError."""
    with tempfile.TemporaryDirectory(prefix="desfs-rm-") as folder:
        path = Path(folder) / "tombstones.des"
        with DesWriter(path) as writer:
            for name in names:
                writer.add_deleted(name, meta)
        return path.read_bytes()
