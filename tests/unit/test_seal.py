"""desfs/merging/seal.py, compact.py and externals.py: days and shards, over a directory and a SQLite catalog."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from assignment.catalog import Catalog, ContainerState, Lease
from assignment.errors import ContainersChanged
from des_format import DesWriter
from des_format.shards import placement_shard, shard_hex
from desfs.errors import UsageError
from desfs.merging.compact import Compacted, CompactionSettings, Compactor, compact_shard
from desfs.merging.leases import LeaseBusy
from desfs.store.file import FileStore
from desfs.store.retrying import Retrying
from tests.merging import BIG, DAY, World, build_part, commit_part
from tests.mount.stores import WatchedStore

LEFT = "left for later|left as it is"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def files(world: World) -> list[str]:
    """The objects of the day, without its folder."""
    return [key.removeprefix(f"{DAY}/") for key in world.objects()]


# --- a day -----------------------------------------------------------------------------------------------------------


def test_each_shard_becomes_one_container(world: World) -> None:
    """In one run what is there is merged, and in one after the grace the parts are deleted."""
    for shard in ("0", "f"):
        for n in range(5):
            world.put(shard, {f"{shard}/{n}": b"%d" % n, f"{shard}/same": b"version %d" % n})
    before = world.shown().contents
    summary = world.seal()
    assert (summary.sealed, summary.inputs, summary.files, summary.deleted) == (2, 10, 12, 0)
    assert summary.failures == []
    shown = world.shown()
    assert shown.contents == before, "while the parts are there"
    assert len(shown.containers) == 12
    assert world.seal().deleted == 0, "the grace"
    assert world.seal(delete_grace=0).deleted == 10
    assert files(world) == ["0.des", "f.des"]
    assert world.shown().contents == before
    sealed = world.rows()[f"{DAY}/0.des"]
    assert (sealed.state, sealed.generation, sealed.files) == (ContainerState.SEALED, 0, 6)
    again = world.seal(delete_grace=0)
    assert (again.sealed, again.deleted) == (0, 0)


def test_late_files_are_sealed_by_a_later_run(world: World) -> None:
    world.put("0", {"a": b"1", "b": b"1"})
    world.seal()
    world.seal(delete_grace=0)
    world.put("0", {"a": b"2", "c": b"2"})
    assert world.shown().contents == {"a": b"2", "b": b"1", "c": b"2"}
    assert world.seal().inputs == 2
    world.seal(delete_grace=0)
    assert files(world) == ["0-000000-000002.des"]
    assert world.shown().contents == {"a": b"2", "b": b"1", "c": b"2"}
    world.put("0", {"b": b"3"})
    world.seal()
    world.seal(delete_grace=0)
    assert files(world) == ["0-000000-000003.des"]
    assert world.shown().contents == {"a": b"2", "b": b"3", "c": b"2"}


def test_a_tombstone_and_what_it_hides_are_dropped(world: World) -> None:
    world.put("0", {"a": b"1", "b": b"1"})
    world.put("0", {}, deleted=["a", "never was"])
    world.seal()
    assert world.rows()[f"{DAY}/0.des"].files == 2, "the tombstone of what a part shows stays beside it"
    world.seal(delete_grace=0)
    assert world.shown().contents == {"b": b"1"}
    world.put("0", {"c": b"1"})
    world.seal()
    world.seal(delete_grace=0)
    assert world.rows()[f"{DAY}/0-000000-000003.des"].files == 2


def test_tombstones_stay_where_a_container_is_no_shards(world: World) -> None:
    """What a tombstone hides can be in `shard_NN.des` or in the day's one container, which sealing leaves alone."""
    world.put("0", {"b": b"1"})
    world.put("0", {}, deleted=["elsewhere"])
    world.store().put(f"{DAY}/shard_00.des", build_part({"elsewhere": b"hidden"}))
    world.seal()
    world.seal(delete_grace=0)
    assert files(world) == ["0.des", "shard_00.des"]
    assert world.rows()[f"{DAY}/0.des"].files == 2


def test_containers_of_others_are_adopted(world: World) -> None:
    """Imports write parts that no catalog knows; they are merged like others. What is none is left, and named."""
    store = world.store()
    store.put(f"{DAY}/0-000001.des", build_part({"a": b"1", "b": b"1"}))
    store.put(f"{DAY}/0-000002.des", build_part({"a": b"2"}))
    store.put(f"{DAY}/1.des", build_part({"c": b"1"}))
    store.put(f"{DAY}/notes.txt", b"not ours")
    assert world.seal().sealed == 1
    assert set(world.states()) == {"0.des", "0-000001.des", "0-000002.des"}, "and one that is alone is not looked at"
    world.seal(delete_grace=0)
    assert files(world) == ["0.des", "1.des", "notes.txt"]
    assert world.shown().contents == {"a": b"2", "b": b"1", "c": b"1"}


def test_what_is_no_container_is_left(world: World, announced_logs: list[str]) -> None:
    announced_logs.append(LEFT)
    store = world.store()
    store.put(f"{DAY}/0-000001.des", build_part({"a": b"1"}))
    store.put(f"{DAY}/0-000002.des", b"no container at all")
    summary = world.seal()
    assert summary.sealed == 1
    (failure,) = summary.failures
    assert f"{DAY}/0-000002.des" in failure
    world.seal(delete_grace=0)
    assert files(world) == ["0-000002.des", "0.des"]


def test_a_damaged_container_does_not_hold_up_the_others(world: World, announced_logs: list[str]) -> None:
    """It stays where it is, between what was merged below and above it."""
    announced_logs.append(LEFT)
    for n in range(1, 6):
        world.put("0", {"same": b"%d" % n, f"{n}": b"payload"})
    path = world.folder / f"store/{DAY}/0-000003.des"
    raw = bytearray(path.read_bytes())
    raw[20] ^= 1
    status = path.stat()
    path.write_bytes(raw)
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
    summary = world.seal()
    (failure,) = summary.failures
    assert failure.startswith(f"{DAY}/0-000003.des: not merged: ")
    world.seal(delete_grace=0)
    assert files(world) == ["0-000003.des", "0-000004-000005.des", "0.des"]
    path.unlink()  # which nobody can read as a whole
    assert world.shown().contents == {"same": b"5"} | dict.fromkeys("1245", b"payload")


def test_a_busy_shard_is_left_for_the_next_run(world: World, announced_logs: list[str]) -> None:
    announced_logs.append(LEFT)
    for shard in ("0", "1"):
        world.put(shard, {shard: b"1"})

    async def others(store: Retrying, catalog: Catalog, lease: Lease) -> None:
        summary = await asyncio.to_thread(world.seal)
        assert summary.sealed == 1
        assert summary.failures == [f"shard 1 of {DAY}: somebody else works on it: left for the next run"]

    world.under_lease("1", others)
    assert world.seal().sealed == 1


def test_what_is_too_large_is_sealed_into_several(world: World) -> None:
    for n in range(1, 6):
        world.put("0", {"same": b"%d" % n, f"{n}": b"p" * 3000})
    size = world.rows()[f"{DAY}/0-000001.des"].size
    world.seal(max_sealed_bytes=2 * size)
    world.seal(max_sealed_bytes=2 * size, delete_grace=0)
    assert files(world) == ["0-000003-000004.des", "0-000005.des", "0.des"]
    assert world.shown().contents == {"same": b"5"} | {f"{n}": b"p" * 3000 for n in range(1, 6)}
    assert world.seal(max_sealed_bytes=2 * size).sealed == 0


def test_only_days_that_are_over_are_sealed(world: World) -> None:
    today = datetime.now(UTC).date()
    days = [date(2020, 2, 28), DAY, today]
    for day in days:
        world.put("0", {"a": b"1"}, day=day)
    summary = world.seal(None)
    assert summary.days == days[:2]
    assert sorted(world.states()) == ["0-000001.des", "0.des"]
    assert {key for key, row in world.rows().items() if row.state is ContainerState.SEALED} == {
        f"{day}/0.des" for day in days[:2]
    }
    with pytest.raises(UsageError, match=f"{today} is not over yet"):
        world.seal(today)
    with pytest.raises(UsageError, match="is not over yet"):
        world.seal(today - timedelta(days=3), seal_grace=4 * 86400)


def test_dead_uploads_are_collected(world: World) -> None:
    world.put("0", {"a": b"1"})

    async def dies(store: Retrying, catalog: Catalog, lease: Lease) -> str:
        key = (await catalog.begin_part(lease, mark="the id")).object_key
        store.put(key, build_part({"a": b"never committed"}, first_id="the id"))
        return key

    key = world.under_lease("0", dies)
    world.put("0", {"a": b"packed again"})
    summary = world.seal()
    assert summary.deleted == 1
    assert key not in world.objects()
    assert world.shown().contents == {"a": b"packed again"}
    world.store().put(key, build_part({"a": b"comes late"}, first_id="the id"))
    assert world.seal().deleted == 1
    assert key not in world.objects()


def test_rows_of_what_was_deleted_are_forgotten_some_day(world: World) -> None:
    world.put("0", {"a": b"1"})
    world.seal(None)
    world.seal(None, delete_grace=0)
    assert world.states() == {"0.des": "sealed", "0-000001.des": "deleted"}

    async def forget(store: Retrying, catalog: Catalog) -> int:
        return await catalog.forget_deleted(0)

    assert world.run(forget) == 1
    assert world.seal().sealed == 0


# --- external objects ------------------------------------------------------------------------------------------------

ONE, TWO = b"1" * BIG, b"2" * (BIG + 1)


def shard_of(name: str) -> str:
    return shard_hex(placement_shard(name, 4), 4)


def externals(world: World) -> list[str]:
    return [key.partition("_bigFiles/")[2] for key in world.objects() if "_bigFiles" in key]


@pytest.fixture
def overwritten(world: World) -> World:
    """A day with external files of which some were removed, merged, and the parts deleted."""
    world.put_layout()
    for name in ("kept", "removed", "d/removed"):
        world.put(shard_of(name), {name: ONE})
    for name in ("removed", "d/removed"):
        world.put(shard_of(name), {}, deleted=[name])
    return world


def test_external_objects_that_nothing_names_are_deleted(overwritten: World) -> None:
    """Not before the parts that named them are, and not while they are young."""
    world = overwritten
    world.seal(orphan_grace=0)
    assert len(externals(world)) == 3, "superseded parts name them"
    world.seal(delete_grace=0)
    assert len(externals(world)) == 3, "they are young"
    world.seal(delete_grace=0, orphan_grace=0)
    assert externals(world) == ["kept"]
    assert world.shown().contents == {"kept": ONE}


def test_external_objects_stay_where_the_layout_is_not_known(overwritten: World) -> None:
    world = overwritten
    world.store().delete(".desfs.json")
    for _ in range(3):
        world.seal(delete_grace=0, orphan_grace=0)
    assert len(externals(world)) == 3


def test_external_objects_of_a_shard_that_others_work_on_stay(overwritten: World) -> None:
    """A packer that packs a file again finds its payload in the store, and will name it."""
    world = overwritten
    world.seal()
    world.seal(delete_grace=0)

    async def others(store: Retrying, catalog: Catalog, lease: Lease) -> None:
        await asyncio.to_thread(world.seal, delete_grace=0, orphan_grace=0)

    world.under_lease(shard_of("removed"), others)
    assert "removed" in externals(world)
    world.seal(delete_grace=0, orphan_grace=0)
    assert externals(world) == ["kept"]


def test_an_external_object_that_a_recorded_key_names_stays(world: World) -> None:
    """A later version of a name stands under a folder of its own; only the metadata leads there."""
    world.put_layout()
    world.put("0", {"a": b"1"})
    world.seal()
    world.seal(delete_grace=0)
    store = world.store()
    for key in ("some-id/v", "other-id/v"):
        store.put(f"{DAY}/_bigFiles/{key}", TWO)
    path = world.folder / "part.des"
    with DesWriter(path) as writer:
        writer.add_external("v", len(TWO), {}, key=f"{DAY}/_bigFiles/some-id/v")
    world.put_parts(shard_of("v"), path.read_bytes())
    world.seal()
    world.seal(delete_grace=0, orphan_grace=0)
    world.seal(delete_grace=0, orphan_grace=0)
    assert externals(world) == ["some-id/v"]
    assert world.shown().contents["v"] == TWO


# --- the open day ----------------------------------------------------------------------------------------------------


class OneKeeper:
    """Leases as a packer keeps them; those of shards that are `busy` others hold."""

    def __init__(self, *leases: Lease, busy: Collection[str] = ()) -> None:
        self._leases = {(lease.day, lease.shard): lease for lease in leases}
        self._busy = busy

    async def of(self, day: date, shard: str) -> Lease:
        if shard in self._busy:
            raise LeaseBusy(f"{shard} is busy")
        return self._leases[day, shard]

    async def done_with(self, day: date, shard: str) -> None:
        """Who gave the lease keeps it."""


SMALL = CompactionSettings(max_parts=4, delete_grace=3600)


def compact(world: World, settings: CompactionSettings = SMALL, *, shard: str = "0") -> list[Compacted]:
    """What a packer does between its batches."""

    async def work(store: Retrying, catalog: Catalog, lease: Lease) -> list[Compacted]:
        return await Compactor(store, catalog, settings).run_due(OneKeeper(lease), [DAY], {shard}.__contains__)

    return world.under_lease(shard, work)


def test_a_shard_is_compacted_when_it_has_too_many_parts(world: World) -> None:
    for n in range(1, 5):
        world.put("0", {"same": b"%d" % n, f"{n}": b"p"})
    assert compact(world) == []
    world.put("0", {"same": b"5", "1": b"newer"})
    (done,) = compact(world)
    (merged,) = done.merged
    assert (merged.object_key, len(merged.inputs), done.deleted) == (f"{DAY}/0-000001-000005.des", 5, 0)
    shown = world.shown().contents
    assert shown == {"same": b"5", "1": b"newer", "2": b"p", "3": b"p", "4": b"p"}
    assert compact(world) == []
    (done,) = compact(world, replace(SMALL, delete_grace=0))
    assert (done.merged, done.deleted) == ([], 5)
    assert files(world) == ["0-000001-000005.des"]
    assert world.shown().contents == shown


def test_a_tombstone_survives_compaction(world: World) -> None:
    """What it hides may stand in a container that no catalog knows."""
    for n in range(1, 5):
        world.put("0", {f"{n}": b"p"})
    world.put("0", {}, deleted=["unknown"])
    compact(world)
    assert world.rows()[f"{DAY}/0-000001-000005.des"].files == 5


def test_shards_that_others_hold_or_change_are_left(world: World) -> None:
    for n in range(1, 6):
        world.put("0", {f"{n}": b"p"})

    async def busy(store: Retrying, catalog: Catalog) -> list[Compacted]:
        return await Compactor(store, catalog, SMALL).run_due(OneKeeper(busy=["0"]), [DAY], {"0"}.__contains__)

    async def lost(store: Retrying, catalog: Catalog, lease: Lease) -> list[Compacted]:
        await catalog.release(lease)
        return await Compactor(store, catalog, SMALL).run_due(OneKeeper(lease), [DAY], {"0"}.__contains__)

    assert world.run(busy) == []
    assert world.under_lease("0", lost) == []
    assert len(world.shown().contents) == 5
    assert len(compact(world)) == 1


def test_a_container_that_cannot_be_compacted_is_tried_once(world: World, announced_logs: list[str]) -> None:
    announced_logs.append(LEFT)
    for n in range(1, 7):
        world.put("0", {f"{n}": b"p" * 100})
    (world.folder / f"store/{DAY}/0-000001.des").unlink()

    async def work(store: Retrying, catalog: Catalog, lease: Lease) -> None:
        watched = WatchedStore(FileStore(world.folder / "store"))
        compactor = Compactor(Retrying(watched), catalog, SMALL)
        (done,) = await compactor.run_due(OneKeeper(lease), [DAY], {"0"}.__contains__)
        assert [merged.object_key for merged in done.merged] == [f"{DAY}/0-000002-000006.des"]
        watched.calls.clear()
        assert await compactor.run_due(OneKeeper(lease), [DAY], {"0"}.__contains__) == []
        assert watched.calls == []

    world.under_lease("0", work)


def test_inputs_that_somebody_else_has_merged_are_not_merged_again(world: World) -> None:
    for n in range(1, 6):
        world.put("0", {f"{n}": b"p"})

    async def work(store: Retrying, catalog: Catalog, lease: Lease) -> None:
        watched = WatchedStore(FileStore(world.folder / "store"))
        loop = asyncio.get_running_loop()

        def before(method: str, key: str) -> None:
            if method == "put":
                gone = f"{DAY}/0-000002.des"
                asyncio.run_coroutine_threadsafe(catalog.delete_containers(lease, [gone]), loop).result(30)

        watched.before = before
        with pytest.raises(ContainersChanged):
            await compact_shard(Retrying(watched), catalog, OneKeeper(lease), DAY, "0", SMALL)

    world.under_lease("0", work)
    assert sorted(world.states().values()) == ["committed"] * 4 + ["deleted", "uploading"]


def test_large_parts_are_merged_by_the_store(world: World) -> None:
    """Nothing but indexes and samples is read."""
    raws = [build_part({f"{n}": bytes([n]) * (6 << 20)}) for n in range(5)]

    async def work(store: Retrying, catalog: Catalog, lease: Lease) -> None:
        for raw in raws:
            await commit_part(store, catalog, lease, raw)
        watched = WatchedStore(FileStore(world.folder / "store"))
        read = 0

        def count(method: str, key: str, data: bytes) -> bytes:
            nonlocal read
            read += len(data)
            return data

        watched.change = count
        (done,) = await Compactor(Retrying(watched), catalog, SMALL).run_due(
            OneKeeper(lease), [DAY], {"0"}.__contains__
        )
        assert done.merged[0].copied
        assert watched.keys("copy") == [done.merged[0].object_key]
        assert watched.keys("put") == []
        assert read < sum(map(len, raws)) / 20

    world.under_lease("0", work)
    assert world.shown().contents == {f"{n}": bytes([n]) * (6 << 20) for n in range(5)}


def test_shards_that_nobody_wants_are_left(world: World) -> None:
    """A packer compacts what the ring gives it."""
    for n in range(1, 6):
        world.put("0", {f"{n}": b"p"})

    async def work(store: Retrying, catalog: Catalog, lease: Lease) -> list[Compacted]:
        compactor = Compactor(store, catalog, SMALL)
        return await compactor.run_due(OneKeeper(lease), [DAY], lambda shard: shard == "1")

    assert world.under_lease("0", work) == []
    assert len(world.objects()) == 5
