"""desfs/merging/merge.py, rows.py and collect.py: one container out of several, whatever is in them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assignment.catalog import Catalog, ContainerRecord, ContainerState, Lease
from assignment.errors import LeaseLost
from des_format import DesReader
from des_format.codec import parse_footer
from des_format.index import TOMBSTONE, Index
from des_format.layout import DELETED, EXTERNAL, FOOTER
from des_format.source import FileSource, open_container
from desfs.errors import DeadlineExceeded, NoSuchObject
from desfs.merging.collect import collect_shard
from desfs.merging.leases import LeaseBusy, held
from desfs.merging.merge import (
    COPIED_FROM,
    Built,
    MergeFailed,
    MergeRefused,
    build,
    check_stored,
    merge_containers,
)
from desfs.merging.plan import Merge, merged_key
from desfs.merging.rows import Entries, extents_of
from desfs.store.file import FileStore
from desfs.store.retrying import Retrying
from tests.fakes.faulty_store import FaultyStore
from tests.merging import DAY, World, build_part
from tests.mount.stores import WatchedStore
from tests.unit.containers import Item
from tests.unit.containers import build as build_raw

STREAMED, COPIED = 1 << 60, 0
SHARD = "3f"
NAMES = ["a", "b", "d/a", "d/b", "d/e/a", "d", "ż/日本", "z" * 200]


def put(store: Retrying, raws: Sequence[bytes]) -> list[ContainerRecord]:
    """Containers in a store, the oldest first, and the rows that a catalog would have of them."""
    records = []
    for number, raw in enumerate(raws, 1):
        key = f"{DAY}/{SHARD}-{number:06d}.des"
        etag = store.put(key, raw)
        records.append(
            ContainerRecord(object_key=key, day=DAY, shard=SHARD, generation=number, size=len(raw), etag=etag)
        )
    return records


def bytes_of(store: Retrying, built: Built) -> bytes:
    """What would be put."""
    if built.file is not None:
        return built.path.read_bytes()
    return b"".join(
        piece if isinstance(piece, bytes) else bytes(store.get_range(piece.key, piece.start, piece.stop).data)
        for piece in built.pieces
        if isinstance(piece, bytes) or piece.start < piece.stop
    )


def merged(
    folder: Path, raws: Sequence[bytes], *, copied_from: int = STREAMED, drop_tombstones: bool = True
) -> tuple[bytes, Built]:
    """The container that others are merged into."""
    store = Retrying(FileStore(folder / "store", create=True))
    with ExitStack() as stack:
        built = build(store, put(store, raws), drop_tombstones=drop_tombstones, stack=stack, copied_from=copied_from)
        raw = bytes_of(store, built)
    assert len(raw) == built.size
    return raw, built


def index_of(raw: bytes) -> Index:
    footer = parse_footer(raw[-FOOTER.size :], len(raw), "test")
    return Index(raw[footer.index_start : footer.index_start + footer.index_length], footer, "test")


def contents(folder: Path, raw: bytes) -> dict[str, tuple[bytes, bytes]]:
    """Payload and raw metadata of each file that a reader shows, by the bytes of a container."""
    path = folder / "read.des"
    path.write_bytes(raw)
    index = index_of(raw)
    with DesReader(path) as reader:
        payloads = reader.get_files_batch([name for name in index if not is_external(index, name)])
    found = {}
    for name in index:
        entry = index.entry(index.find_shown(name))
        meta = raw[entry.meta_offset : entry.meta_offset + entry.meta_length]
        found[name] = payloads.get(name, b"external"), meta
    return found


def is_external(index: Index, name: str) -> bool:
    return index.entry(index.find_shown(name)).is_external


# --- any containers --------------------------------------------------------------------------------------------------

ITEMS = st.builds(
    Item,
    st.sampled_from(NAMES).map(str.encode),
    st.sampled_from([b"", b"x", b"payload" * 3, b"longer" * 40]),
    st.none(),
    st.sampled_from([0, 0, 0, EXTERNAL, DELETED]),
)
GAPS = st.tuples(*[st.sampled_from([b"", b"gap"])] * 4)


@st.composite
def containers(draw: st.DrawFn) -> list[bytes]:
    """Some containers with the same few names: files, tombstones, external ones, a name twice, gaps between regions."""
    raws = []
    for number in range(draw(st.integers(1, 5))):
        items = []
        for place, item in enumerate(draw(st.lists(ITEMS, max_size=8))):
            data = b"" if item.flags & (DELETED | EXTERNAL) else item.data and item.data + b"%d.%d" % (number, place)
            size = 7 + number if item.flags & EXTERNAL else len(data)
            meta = b'{"place":"%d.%d","size":%d}' % (number, place, size) if draw(st.integers(0, 5)) else b""
            items.append(Item(item.name, data, meta, item.flags, data_length=size))
        raws.append(build_raw(items, gaps=draw(GAPS)))
    return raws


def expected(folder: Path, raws: Sequence[bytes]) -> dict[str, tuple[bytes, bytes]]:
    """By a dict: the last container that has a name decides."""
    shown: dict[str, tuple[bytes, bytes]] = {}
    for raw in raws:
        index = index_of(raw)
        for row in np.flatnonzero((index.state & TOMBSTONE) != 0).tolist():
            if index.find(index.name(row)) == row:
                shown.pop(index.name(row).decode(), None)
        shown |= contents(folder, raw)
    return shown


@settings(max_examples=80, deadline=None)
@given(raws=containers(), copied_from=st.sampled_from([STREAMED, COPIED]))
def test_the_newest_version_of_each_name_is_kept(
    tmp_path_factory: pytest.TempPathFactory, raws: list[bytes], copied_from: int
) -> None:
    """Streamed or copied: what is shown of all inputs together is what is shown of the merged one, payloads and
    metadata byte for byte; each name stands there once."""
    folder = tmp_path_factory.mktemp("merge")
    raw, built = merged(folder, raws, copied_from=copied_from)
    assert contents(folder, raw) == expected(folder, raws)
    index = index_of(raw)
    assert index.rows == built.footer.file_count
    assert len(set(map(index.name, range(index.rows)))) == index.rows
    assert list(index.problem_rows()) == []


@settings(max_examples=60, deadline=None)
@given(raws=containers(), copied_from=st.sampled_from([STREAMED, COPIED]), drop=st.booleans())
def test_tombstones_stay_for_as_long_as_they_hide_something(
    tmp_path_factory: pytest.TempPathFactory, raws: list[bytes], copied_from: int, drop: bool
) -> None:
    """A tombstone is kept where an input shows its name, and always where there may be older containers."""
    raw, _ = merged(tmp_path_factory.mktemp("merge"), raws, copied_from=copied_from, drop_tombstones=drop)
    indexes = [index_of(each) for each in raws]
    wanted = set()
    for name in map(str.encode, NAMES):
        rows = [(index, index.find(name)) for index in indexes]
        states = [bool(index.state[row] & TOMBSTONE) for index, row in rows if row is not None]
        if states and states[-1] and (not drop or not all(states)):
            wanted.add(name)
    index = index_of(raw)
    assert {index.name(row) for row in np.flatnonzero(index.state & TOMBSTONE).tolist()} == wanted


@settings(max_examples=30, deadline=None)
@given(raws=containers(), copied_from=st.sampled_from([STREAMED, COPIED]))
def test_the_same_inputs_give_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, raws: list[bytes], copied_from: int
) -> None:
    """Whoever finishes another one's merge finds out by them whether an object is the one that it would put."""
    first, _ = merged(tmp_path_factory.mktemp("merge"), raws, copied_from=copied_from)
    assert merged(tmp_path_factory.mktemp("merge"), raws, copied_from=copied_from)[0] == first


# --- layout ----------------------------------------------------------------------------------------------------------


def test_files_are_laid_out_by_their_paths(tmp_path: Path) -> None:
    """Streamed: the files of one directory stand side by side, those of its subfolders not between them."""
    parts = [build_part({"d/b": b"1", "a": b"2"}), build_part({"d/e/a": b"3", "d/a": b"4", "d.x": b"5", "d!/f": b"6"})]
    raw, built = merged(tmp_path, parts)
    assert list(index_of(raw)) == ["a", "d.x", "d/a", "d/b", "d!/f", "d/e/a"]
    assert built.file is not None


def test_large_containers_are_copied_as_they_are(tmp_path: Path) -> None:
    """From 5 MiB on average on; DATA stays in the order of the containers, and its dead bytes with it while they are a
    fifth at most."""
    dice = Random(1)
    files = [{f"z{n}": dice.randbytes(1 << 20) for n in range(5)}, {f"y{n}": dice.randbytes(1 << 20) for n in range(5)}]
    files[1]["z3"] = b"newer"
    parts = [build_part(each) for each in files]
    assert min(map(len, parts)) > COPIED_FROM
    raw, built = merged(tmp_path, parts, copied_from=COPIED_FROM)
    assert built.file is None
    assert raw[: len(parts[0]) - 2000] == parts[0][:-2000], "the first container from its first byte"
    assert list(index_of(raw)) == ["z0", "z1", "z2", "z4", *(f"y{n}" for n in range(5)), "z3"]
    assert {name: data for name, (data, _) in contents(tmp_path, raw).items()} == files[0] | files[1]


def test_dead_bytes_are_not_copied_when_they_are_many(tmp_path: Path) -> None:
    """More than a fifth: what is alive is copied in ranges where these are large."""
    dice = Random(1)
    parts = [build_part({f"{n}{part}": dice.randbytes(1 << 20) for n in range(14)}) for part in "ab"]
    parts.append(build_part({f"{n}a": b"newer" for n in range(6)} | {f"{n}b": b"newer" for n in range(8, 14)}))
    raw, built = merged(tmp_path, parts, copied_from=COPIED_FROM)
    assert built.file is None
    assert built.footer.data_length == 16 * (1 << 20) + 12 * 5
    shown = contents(tmp_path, raw)
    assert len(shown) == 28
    assert shown["3a"][0] == b"newer"
    assert len(shown["3b"][0]) == 1 << 20


def test_what_is_alive_in_small_pieces_is_read(tmp_path: Path) -> None:
    dice = Random(1)
    parts = [build_part({f"{n}{part}": dice.randbytes(1 << 20) for n in range(12)}) for part in "ab"]
    parts.append(build_part({f"{n}{part}": b"newer" for n in range(0, 12, 2) for part in "ab"}))
    raw, built = merged(tmp_path, parts, copied_from=COPIED_FROM)
    assert built.file is not None
    assert built.footer.data_length == 12 * (1 << 20) + 12 * 5
    assert len(contents(tmp_path, raw)) == 24


def test_metadata_that_entries_share_is_written_once(tmp_path: Path) -> None:
    meta = b'{"note":"' + b"n" * 5000 + b'","size":0}'
    items = [Item(b"%d" % n, b"", meta) for n in range(3)]
    shared = build_raw([*items, Item(b"x", b"", b"", meta_offset=16, meta_length=len(meta))])
    raw, built = merged(tmp_path, [shared])
    assert built.footer.meta_length == 3 * len(meta)
    assert contents(tmp_path, raw)["x"][1] == meta


def test_names_that_no_reader_shows_stay(tmp_path: Path) -> None:
    """A merge is no reason to lose anything, and carries flags over that it does not know."""
    parts = [build_raw([Item(b"../up", b"1"), Item(b"a", b"2", flags=2)]), build_raw([Item(b"a//b", b"3")])]
    for copied_from in (STREAMED, COPIED):
        raw, _ = merged(tmp_path / str(copied_from), parts, copied_from=copied_from)
        index = index_of(raw)
        rows = {index.name(row): (int(index.data_length[row]), int(index.flags[row])) for row in range(index.rows)}
        assert rows == {b"../up": (1, 0), b"a": (1, 2), b"a//b": (1, 0)}


def test_tombstones_alone_leave_an_empty_container(tmp_path: Path) -> None:
    raw, _ = merged(tmp_path, [build_part({}, ["a"]), build_part({}, ["b"])])
    assert index_of(raw).rows == 0


def test_a_hundred_thousand_entries_are_merged_without_an_object_for_each(tmp_path: Path) -> None:
    """The columns of the index, byte for byte what the codec writes one by one."""
    parts = []
    for part in range(2):
        items = [Item(b"dir %d/%d" % (n % 50, n * 2 + part), b"", b"") for n in range(50_000)]
        parts.append(build_raw([*items, Item(b"same", b"%d" % part)]))
    raw, built = merged(tmp_path, parts, copied_from=COPIED)
    assert built.footer.file_count == 100_001
    path = tmp_path / "read.des"
    path.write_bytes(raw)
    opened = open_container(source := FileSource(path))
    source.close()
    index = opened.index
    assert [index.name(row) for row in (0, 1, 49_999, 50_000, 99_999)] == [
        b"dir 0/0", b"dir 1/2", b"dir 49/99998", b"dir 0/1", b"dir 49/99999",
    ]  # fmt: skip
    assert contents(tmp_path, raw)["same"][0] == b"1"


def test_names_of_one_hash_are_told_apart(tmp_path: Path) -> None:
    """Whoever knows the hash function can make names that share one. Here the columns are told that they do."""
    indexes = [index_of(build_part({"a": b"1", "b": b"1"})), index_of(build_part({"b": b"2", "a": b"2", "c": b"2"}))]
    for index in indexes:
        index.hashes[0][:] = 7
    entries = Entries(indexes)
    kept = entries.kept(drop_tombstones=True)
    assert sorted(entries.name(row) for row in kept.tolist()) == [b"a", b"b", b"c"]
    assert set(entries.source[kept].tolist()) == {1}


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9))))
def test_extents_cover_each_byte_once(payloads: list[tuple[int, int]]) -> None:
    offsets, lengths = (np.array([each[n] for each in payloads], np.uint64) for n in (0, 1))
    ranges = list(extents_of(offsets, lengths))
    covered = [byte for start, stop in ranges for byte in range(start, stop)]
    assert sorted({byte for start, length in payloads for byte in range(start, start + length)}) == covered
    assert all(one[1] < other[0] for one, other in pairwise(ranges))


# --- what cannot be merged -------------------------------------------------------------------------------------------


def flipped(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: flipped(raw, 16), r"found a checksum of"),
        (lambda raw: flipped(raw, 0), r"header at byte 0"),
        (lambda raw: flipped(raw, len(raw) - 72), r"footer at byte"),
        (lambda raw: build_raw([Item(b"a", b"1", data_offset=10**6)]), r"entry b'a' is damaged"),
        (lambda raw: build_raw([Item(b"a", b"1", meta_offset=10**6)]), r"entry b'a' is damaged"),
        (lambda raw: build_raw([Item(b"n" * 5000, b"1")]), r"its name is too long"),
    ],
)
def test_a_damaged_container_is_not_merged(tmp_path: Path, damage: object, message: str) -> None:
    """It is named, so that the others can be merged without it."""
    good = build_part({"a": b"payload"})
    assert callable(damage)
    with pytest.raises(MergeRefused, match=message) as refused:
        merged(tmp_path, [build_part({"b": b"1"}), damage(good)])
    assert refused.value.key == f"{DAY}/{SHARD}-000002.des"


@pytest.mark.parametrize("copied_from", [STREAMED, COPIED])
def test_an_object_that_is_not_the_catalogs_is_not_merged(tmp_path: Path, copied_from: int) -> None:
    store = Retrying(FileStore(tmp_path / "store", create=True))
    records = put(store, [build_part({"a": b"1"}), build_part({"b": b"2"})])
    store.put(records[0].object_key, build_part({"a": b"3"}), if_absent=False)
    with ExitStack() as stack, pytest.raises(MergeRefused, match=r"another object than the store.*is version"):
        build(store, records, drop_tombstones=True, stack=stack, copied_from=copied_from)
    store.delete(records[1].object_key)
    with ExitStack() as stack, pytest.raises(MergeRefused, match="does not exist") as refused:
        build(store, records[1:], drop_tombstones=True, stack=stack, copied_from=copied_from)
    assert refused.value.key == records[1].object_key


def test_a_container_that_would_grow_without_end_is_not_merged(tmp_path: Path) -> None:
    """A thousand entries that share one payload: written out, each would have its own."""
    items = [Item(b"0", b"p" * 10_000), *(Item(b"%d" % n, data_offset=16, data_length=10_000) for n in range(1, 1000))]
    with pytest.raises(MergeRefused, match="share their payloads"):
        merged(tmp_path, [build_raw(items)])
    raw, built = merged(tmp_path / "copied", [build_raw(items)], copied_from=COPIED)
    assert built.footer.data_length == 10_000
    assert contents(tmp_path, raw)["7"][0] == b"p" * 10_000


# --- what is put -----------------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def plan(records: Sequence[ContainerRecord]) -> Merge:
    last = records[-1].generation
    key = merged_key(DAY, SHARD, records[0].generation, last)
    return Merge(key, last, tuple(records), at_bottom=True, state=ContainerState.COMMITTED)


def merge(world: World, records: Sequence[ContainerRecord], store: Retrying | None = None) -> list[str]:
    """Carry a merge out; its effects."""
    effects: list[str] = []

    async def work(own: Retrying, catalog: Catalog, lease: Lease) -> None:
        await merge_containers(
            store or own, catalog, lease, plan(records), drop_tombstones=True, ttl_s=60, effect=effects.append
        )

    world.under_lease(SHARD, work)
    return effects


def two_parts(world: World, filler: bytes = b"") -> list[ContainerRecord]:
    return [world.put_parts(SHARD, build_part({name: b"data of " + name.encode() + filler}))[0] for name in "ab"]


def test_a_merge_takes_the_place_of_its_inputs(world: World) -> None:
    records = two_parts(world)
    before = world.shown().contents
    key = plan(records).object_key
    assert merge(world, records) == [f"begin {key}", f"put {key}", f"commit {key}"]
    assert world.states() == {
        f"{SHARD}-000001-000002.des": "committed",
        f"{SHARD}-000001.des": "superseded",
        f"{SHARD}-000002.des": "superseded",
    }
    shown = world.shown()
    assert shown.contents == before
    row = world.rows()[key]
    assert (row.size, row.etag) == (shown.containers[key].size, shown.containers[key].etag)
    assert (row.files, row.generation) == (2, 2)


@pytest.mark.parametrize("size", [100, COPIED_FROM], ids=["streamed", "copied"])
def test_an_object_that_is_the_one_to_be_put_is_committed(world: World, size: int) -> None:
    """desfs/merging/merge.py: died before the commit."""
    records = two_parts(world, bytes(size))

    def die(name: str) -> None:
        if name.startswith("commit"):
            raise KeyboardInterrupt

    async def dies(store: Retrying, catalog: Catalog, lease: Lease) -> None:
        await merge_containers(store, catalog, lease, plan(records), drop_tombstones=True, ttl_s=60, effect=die)

    with pytest.raises(KeyboardInterrupt):
        world.under_lease(SHARD, dies)
    key = plan(records).object_key
    etag = world.shown().containers[key].etag
    assert merge(world, records) == [f"begin {key}", f"put {key}", f"commit {key}"]
    assert world.shown().containers[key].etag == etag, "not put again"
    assert world.states()[key.rpartition("/")[2]] == "committed"


@pytest.mark.parametrize("size", [100, COPIED_FROM], ids=["streamed", "copied"])
def test_another_object_under_the_key_is_a_dead_upload(world: World, size: int) -> None:
    """It is deleted, and the right one put."""
    records = two_parts(world, bytes(size))
    key = plan(records).object_key
    world.store().put(key, build_part({"a": b"an older plan"}))
    assert merge(world, records) == [f"begin {key}", f"put {key}", f"delete {key}", f"put {key}", f"commit {key}"]
    shown = world.shown()
    assert shown.files["a"].container == key
    assert shown.files["a"].data.startswith(b"data of a")


def test_an_upload_of_a_successor_is_not_deleted(world: World) -> None:
    """A paused holder finds its successor's object: it ends, and touches nothing."""
    records = two_parts(world)
    key = plan(records).object_key
    other = build_part({"b": b"the successor's"})
    watched = WatchedStore(FileStore(world.folder / "store"))

    async def work(store: Retrying, catalog: Catalog, lease: Lease) -> None:
        def succeed(method: str, found: str) -> None:
            if method == "put" and found == key:
                watched.before = lambda method, key: None
                store.put(key, other)
                asyncio.run_coroutine_threadsafe(take_over(), loop).result(30)

        async def take_over() -> None:
            await catalog.release(lease)
            successor = await catalog.acquire(DAY, SHARD, "successor", 60)
            assert successor is not None
            await catalog.begin_container(successor, key, 2)

        loop = asyncio.get_running_loop()
        watched.before = succeed
        await merge_containers(
            Retrying(watched), catalog, lease, plan(records), drop_tombstones=True, ttl_s=60, effect=lambda name: None
        )

    with pytest.raises(LeaseLost, match="another one puts it"):
        world.under_lease(SHARD, work)
    assert watched.keys("delete") == []
    assert world.store().get_tail(key, 1 << 20).data == other


def test_a_lost_lease_supersedes_nothing(world: World) -> None:
    records = two_parts(world)

    async def work(store: Retrying, catalog: Catalog, lease: Lease) -> None:
        await catalog.release(lease)
        await merge_containers(
            store, catalog, lease, plan(records), drop_tombstones=True, ttl_s=60, effect=lambda name: None
        )

    with pytest.raises(LeaseLost):
        world.under_lease(SHARD, work)
    assert set(world.states().values()) == {"committed"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: flipped(raw, len(raw) - 100), "want .* that end in the index that was put"),
        (lambda raw: raw + b"x", "want .* that end in the index that was put"),
        (lambda raw: flipped(raw, 20), "byte 0 is not what was copied from"),
        (lambda raw: flipped(raw, COPIED_FROM + 30), "is not what was copied from"),
    ],
)
def test_what_the_store_has_is_compared_with_what_was_meant(tmp_path: Path, change: object, message: str) -> None:
    store = Retrying(FileStore(tmp_path / "store", create=True))
    records = put(store, [build_part({name: name.encode() * COPIED_FROM}) for name in "ab"])
    with ExitStack() as stack:
        built = build(store, records, drop_tombstones=True, stack=stack)
        built.put(store, "there")
        assert check_stored(store, "there", built) == store.get_tail("there", 1).etag
        assert built.is_at(store, "there")
        raw = bytes(store.get_tail("there", 1 << 30).data)
        assert callable(change)
        store.put("there", change(raw), if_absent=False)
        with pytest.raises(MergeFailed, match=message):
            check_stored(store, "there", built)
        assert not built.is_at(store, "there")
        assert not built.is_at(store, "nowhere")
        with pytest.raises(NoSuchObject):
            check_stored(store, "nowhere", built)


# --- what is deleted -------------------------------------------------------------------------------------------------


def collect(world: World, *, grace_s: float = 0, store: Retrying | None = None, **more: object) -> list[str]:
    """Delete what can be deleted of the shard; the effects."""
    effects: list[str] = []

    async def work(own: Retrying, catalog: Catalog, lease: Lease) -> None:
        records = await catalog.list_containers(DAY)
        now = await catalog.now() + timedelta(seconds=1)  # the clock may have stood still
        await collect_shard(
            store or own,
            catalog,
            lease,
            records,
            now=now,
            grace_s=grace_s,
            ttl_s=60,
            effect=effects.append,
            **more,  # type: ignore[arg-type]
        )

    world.under_lease(SHARD, work)
    return [effect.replace(f"{DAY}/", "") for effect in effects]


def test_superseded_objects_go_the_oldest_first(world: World) -> None:
    records = two_parts(world)
    merge(world, records)
    assert collect(world, grace_s=60) == []
    assert len(world.objects()) == 3
    assert collect(world) == [f"delete {SHARD}-000001.des", f"delete {SHARD}-000002.des", f"forget 2 of {SHARD}"]
    assert world.objects() == [plan(records).object_key]
    assert list(world.states().values()).count("deleted") == 2
    assert collect(world) == [], "nothing is deleted twice"


def test_an_error_is_not_taken_for_success(world: World) -> None:
    """The older one cannot be deleted, so the newer one is not either: the older version would show."""
    merge(world, two_parts(world))
    faulty = FaultyStore(FileStore(world.folder / "store"), script="503")
    with pytest.raises(DeadlineExceeded):
        collect(world, store=Retrying(faulty, 0.01))
    assert len(world.objects()) == 3
    assert sorted(world.states().values()) == ["committed", "superseded", "superseded"]


def test_uploads_that_nobody_can_commit_are_deleted(world: World) -> None:
    """When their files were packed again. And objects that come when their row is deleted already; what has no row is
    nobody's."""

    async def begin(store: Retrying, catalog: Catalog, lease: Lease) -> list[str]:
        return [(await catalog.begin_part(lease)).object_key for _ in range(3)]

    keys = world.under_lease(SHARD, begin)
    store = world.store()
    again = world.put(SHARD, {"a": b"1"}).object_key
    for key in (*keys, foreign := f"{DAY}/{SHARD}-000009.des"):
        store.put(key, build_part({"a": b"1"}))
    names = [key.rpartition("/")[2] for key in keys]
    assert collect(world, keep=[keys[1]]) == [f"delete {names[0]}", f"delete {names[2]}", f"forget 2 of {SHARD}"]
    assert world.objects() == [keys[1], again, foreign]
    store.put(keys[0], build_part({"a": b"late"}))
    assert collect(world, keep=[keys[1]], listed=world.objects()) == [f"delete {names[0]}", f"forget 1 of {SHARD}"]
    assert world.objects() == [keys[1], again, foreign]


def test_what_others_put_under_the_key_of_an_upload_becomes_content(world: World) -> None:
    """An import takes a key that is free in the bucket, and knows of no row: its files are not an orphan's.

    So it is with a key whose container was deleted, and with what is no container at all: that stays."""

    async def begin(store: Retrying, catalog: Catalog, lease: Lease) -> list[str]:
        keys = [(await catalog.begin_part(lease)).object_key for _ in range(3)]
        await catalog.delete_containers(lease, keys[1:2])
        return keys

    keys = world.under_lease(SHARD, begin)
    store = world.store()
    for key in keys[:2]:
        store.put(key, build_part({"a": b"imported"}))
    store.put(keys[2], b"no container")
    assert collect(world, listed=world.objects()) == [f"adopt 2 of {SHARD}"]
    assert world.objects() == keys
    assert list(world.states().values()) == ["committed", "committed", "uploading"]
    store.delete(keys[2])
    assert world.shown().contents == {"a": b"imported"}


def test_what_others_put_under_the_key_of_a_merged_container_becomes_content(world: World) -> None:
    """A run that has deleted the object and died before it said so leaves a key that an import takes."""
    records = two_parts(world)
    merge(world, records)
    store = world.store()
    key = records[0].object_key
    store.delete(key)
    store.put(key, build_part({"imported": b"1"}))
    assert collect(world) == [
        f"delete {SHARD}-000002.des",
        f"forget 2 of {SHARD}",
        f"adopt 1 of {SHARD}",
    ]
    assert key in world.objects()
    assert world.shown().contents["imported"] == b"1"
    assert world.rows()[key].state is ContainerState.COMMITTED


def test_an_upload_of_the_holder_is_left(world: World) -> None:
    async def work(store: Retrying, catalog: Catalog, lease: Lease) -> int:
        await catalog.begin_part(lease)
        records = await catalog.list_containers(DAY)
        return await collect_shard(store, catalog, lease, records, now=await catalog.now(), grace_s=0, ttl_s=60)

    assert world.under_lease(SHARD, work) == 0
    assert list(world.states().values()) == ["uploading"]


# --- leases ----------------------------------------------------------------------------------------------------------


def test_a_lease_is_held_renewed_and_let_go(world: World) -> None:
    async def work(store: Retrying, catalog: Catalog) -> None:
        async with held(catalog, DAY, SHARD, "one", 0.3) as lease:
            with pytest.raises(LeaseBusy, match=f"shard {SHARD} of {DAY}"):
                async with held(catalog, DAY, SHARD, "two"):
                    pass
            before = lease.expires_at
            while before == (await catalog.list_holders(DAY))[0].expires_at:  # noqa: ASYNC110 - all there is to be seen
                await asyncio.sleep(0.01)
            waiting = asyncio.create_task(hold(catalog))
        await waiting
        assert (await catalog.list_holders(DAY))[0].holder == "two"

    async def hold(catalog: Catalog) -> None:
        async with held(catalog, DAY, SHARD, "two", wait_s=30):
            pass

    world.run(work)
