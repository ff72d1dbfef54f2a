"""The file system in plain types: docs/architecture.md, The name space."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
import trio
import trio.testing

from des_format import CorruptEntry, DesFormatError, DesWriter, UnsupportedEntry, placement_shard, shard_hex
from des_format.layout import COMPRESSED
from desfs.entries import Attributes
from desfs.errors import (
    DesfsError,
    IsADirectory,
    NoSuchAttribute,
    NoSuchNamespace,
    NoSuchPath,
    NotADirectory,
    StaleInode,
    StoreUnavailable,
    errno_of,
)
from desfs.fs import FOREVER_S, FileSystem
from desfs.inode import CONTROL_DIRECTORY, ROOT, InodeNumber, directory_inode, split_file_inode
from desfs.push import PageQueue, PlainQueue
from desfs.settings import MountSettings
from desfs.store.file import FileStore
from tests.mount.stores import WatchedStore, meta_of, put_container, put_layout, put_sharded
from tests.unit.containers import Item, build
from tests.unit.opened import Gate, until

DAY = "2026-11-20"


class Kernel:
    """What the kernel was told to forget."""

    def __init__(self) -> None:
        self.told: list[tuple[int, bytes | None]] = []
        self.dropped: list[tuple[int, bytes]] = []  # while somebody waited

    def forget_entry(self, parent: InodeNumber, name: bytes) -> None:
        self.told.append((parent, name))

    def drop_entry(self, parent: InodeNumber, name: bytes) -> None:
        self.dropped.append((parent, name))

    def forget_attributes(self, inode: InodeNumber) -> None:
        self.told.append((inode, None))

    def forget_listing(self, inode: InodeNumber) -> None:
        self.told.append((inode, b""))

    def forget_pages(self, inode: InodeNumber) -> None:
        raise AssertionError(inode)

    def page_queue(self) -> PageQueue:
        def refuse(inode: int, payload: memoryview) -> int:
            raise AssertionError(inode)

        return PlainQueue(refuse)

    def close(self, limit_s: float) -> bool:
        return True


class Entry(NamedTuple):
    """One entry of a page."""

    name: bytes
    cookie: int
    attributes: Attributes


async def entries(fs: FileSystem, inode: int, after: int = 0) -> Iterator[Entry]:
    """What the pages of a directory say, entry by entry."""
    pages = await fs.entries(inode, after)
    return (
        Entry(name, cookie, Attributes(InodeNumber(inode), mode, size, mtime_ns, page.timeout_s))
        for page in pages
        for name, (cookie, inode, mode, size, mtime_ns) in zip(page.names, page.columns.T.tolist(), strict=True)
    )


class World:
    def __init__(self, root: Path, **options: object) -> None:
        root.mkdir(exist_ok=True)
        self.root = root
        self.store = WatchedStore(FileStore(root))
        self.kernel = Kernel()
        # A refresh happens when a test asks for it.
        self.fs = FileSystem(self.store, MountSettings.model_validate({"refresh": 1e-6, **options}))
        self.fs._kernel = self.kernel

    def put(self, key: str, *names: str, content: str = "") -> None:
        put_container(self.root / key, {name: f"{name}{content}".encode() for name in names})

    async def at(self, path: str) -> Attributes:
        attributes = await self.fs.getattr(ROOT)
        for name in path.split("/"):
            attributes = await self.fs.lookup(attributes.inode, name.encode())
        return attributes

    async def read(self, path: str) -> bytes:
        attributes = await self.at(path)
        return bytes(await self.fs.read(attributes.inode, 0, attributes.size))

    async def names(self, path: str = "") -> list[str]:
        inode = (await self.at(path)).inode if path else ROOT
        return [entry.name.decode() for entry in await entries(self.fs, inode, 0)]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "store")


def run(world: World, main: Callable[[], Awaitable[None]], clock: trio.testing.MockClock | None = None) -> None:
    async def bounded() -> None:
        with trio.fail_after(60):
            await world.fs.start()
            async with trio.open_nursery() as nursery:
                await nursery.start(world.fs.fetcher.run)
                await nursery.start(world.fs.totals.run)
                await main()
                nursery.cancel_scope.cancel()

    trio.run(bounded, clock=clock)


# --- names and attributes ----------------------------------------------------------------------------------------


def test_files_have_the_attributes_of_their_metadata(world: World) -> None:
    """docs/semantics.md: A file whose metadata has no time has that of its container, and one whose metadata has no
    mode has 0644."""
    (world.root / DAY).mkdir()
    with DesWriter(world.root / DAY / "0.des") as writer:
        writer.add_file("full", b"12345", {"mtime": 1_700_000_000.5, "mode": 0o640})
        writer.add_file("plain", b"")
        writer.add_file("setuid", b"", {"mode": 0o104755})
        writer.add_file("odd", b"", {"mtime": "yesterday", "mode": -1})
        writer.add_file("ancient", b"", {"mtime": -1.5})

    async def main() -> None:
        mtime_ns = (world.root / DAY / "0.des").stat().st_mtime_ns
        expected = {
            "full": (0o640, 5, 1_700_000_000_500_000_000),
            "plain": (0o644, 0, mtime_ns),
            "setuid": (0o4755, 0, mtime_ns),
            "odd": (0o644, 0, mtime_ns),
            "ancient": (0o644, 0, -1_500_000_000),
        }
        for name, (mode, size, at_ns) in expected.items():
            found = await world.at(f"{DAY}/{name}")
            assert found[1:4] == (stat.S_IFREG | mode, size, at_ns), name
            assert await world.fs.getattr(found.inode) == found

    run(world, main)


@pytest.mark.parametrize("now", ["2026-11-20T00:00:00+00:00", "2026-11-20T23:59:59+00:00"])
def test_directories_have_the_time_of_their_day(world: World, now: str) -> None:
    """docs/semantics.md: The directories of an open day (today and yesterday, UTC, and every name that is no day) have
    the time of its newest container. Those of a closed day have the day's end."""
    newest_ns = 10**18 + 5
    for day in ("2026-11-18", "2026-11-19", "2026-11-20", "archive"):
        for number, mtime_ns in enumerate((10**17, newest_ns, 10**16)):
            world.put(f"{day}/{number}.des", f"d/e/f{number}")
            os.utime(world.root / day / f"{number}.des", ns=(mtime_ns, mtime_ns))
    world.fs.views.now = datetime.fromisoformat(now).timestamp
    ended_ns = int(datetime.fromisoformat("2026-11-19T00:00:00+00:00").timestamp()) * 10**9

    async def main() -> None:
        for day in ("2026-11-18", "2026-11-19", "2026-11-20", "archive"):
            for path in (day, f"{day}/d", f"{day}/d/e"):
                assert (await world.at(path)).mtime_ns == (ended_ns if day == "2026-11-18" else newest_ns), path

    run(world, main)


@pytest.mark.parametrize("shard_bits", [4, 8])
def test_a_listing_is_in_the_order_of_inodes_which_is_that_of_the_data(tmp_path: Path, shard_bits: int) -> None:
    """docs/architecture.md: `tar` walks in the order of the listing, `cp -r` in that of inodes: both read one container
    after the other, each from its start to its end."""
    world, old = World(tmp_path), "2020-02-29"
    flat = {f"f{n}": b"%d" % n for n in range(300)}
    deep = {f"d{n % 40}/f{n}": b"%d" % n for n in range(300)}
    for day, files in ((DAY, flat), (old, deep)):
        shards: dict[str, dict[str, bytes]] = {}
        for name in sorted(files):
            shard = shard_hex(placement_shard(name, shard_bits), shard_bits)
            shards.setdefault(f"{shard}-{len(shards) % 2 + 1:06d}", {})[name] = files[name]
        for stem, members in shards.items():
            put_container(world.root / day / f"{stem}.des", members)
    put_layout(world.root, b'{"shard_bits": %d, "placement": "directory"}' % shard_bits)

    async def main() -> None:
        inodes = [entry.attributes.inode for entry in await entries(world.fs, (await world.at(DAY)).inode, 0)]
        assert len(inodes) == 300
        assert inodes == sorted(inodes)
        before = set(inodes)
        world.put(f"{DAY}/00-000009.des", "later")
        await world.fs.refresh()
        now = [entry.attributes.inode for entry in await entries(world.fs, (await world.at(DAY)).inode, 0)]
        assert now[:-1] == inodes
        assert now[-1] not in before
        directories = [entry.attributes.inode for entry in await entries(world.fs, (await world.at(old)).inode, 0)]
        assert len(directories) == 40
        for order in (directories, sorted(directories)):
            first = [next(await entries(world.fs, inode, 0)).attributes.inode for inode in order]
            groups = [split_file_inode(inode)[0] >> 30 - shard_bits for inode in first]
            assert groups == sorted(groups)

    run(world, main)


def test_umask_masks_files_and_directories(tmp_path: Path) -> None:
    """docs/semantics.md: The bits of `umask=` are taken away from the modes of files and directories."""
    world = World(tmp_path, umask="027")
    world.put(f"{DAY}/0.des", "d/f")

    async def main() -> None:
        assert (await world.fs.getattr(ROOT)).mode == stat.S_IFDIR | 0o750
        assert (await world.at(f"{DAY}/d")).mode == stat.S_IFDIR | 0o750
        assert (await world.at(f"{DAY}/d/f")).mode == stat.S_IFREG | 0o640

    run(world, main)


def test_what_is_not_there_is_enoent(world: World) -> None:
    world.put(f"{DAY}/0.des", "d/f", "g")
    long = "n" * 256

    async def main() -> None:
        for path in ("x", f"{DAY}/x", f"{DAY}/d/x", f"{DAY}/.", f"{DAY}/..", f"{DAY}/{long}", "2026-11-21", ".desfs/x"):
            with pytest.raises(NoSuchPath):
                await world.at(path)
        for path in (f"{DAY}/g/x", ".desfs/stats/x"):
            with pytest.raises(NotADirectory):
                await world.at(path)
        with pytest.raises(NoSuchPath):
            await world.fs.lookup(ROOT, b"\xff")
        with pytest.raises(NoSuchPath):
            await world.fs.lookup(directory_inode(DAY.encode()), b"\xff")

    run(world, main)


def test_every_inode_knows_its_parent(world: World) -> None:
    world.put(f"{DAY}/0.des", "a/b/f")

    async def main() -> None:
        await world.at(f"{DAY}/a/b/f")
        day, a, b = [(await world.at(path)).inode for path in (DAY, f"{DAY}/a", f"{DAY}/a/b")]
        assert [world.fs.parent(inode) for inode in (ROOT, CONTROL_DIRECTORY, day, a, b)] == [ROOT, ROOT, ROOT, day, a]
        with pytest.raises(NotADirectory):
            world.fs.parent((await world.at(f"{DAY}/a/b/f")).inode)
        with pytest.raises(StaleInode):
            world.fs.parent(directory_inode(b"nowhere"))

    run(world, main)


def test_inodes_are_unique_and_survive_a_remount(world: World) -> None:
    """docs/semantics.md: Inode numbers are unique, and the same after a remount as long as the container is the same.

    Slots come from a hash of the container's key."""
    for n in range(16):
        world.put(f"{DAY}/{n:x}.des", *(f"d{n}/f{k}" for k in range(50)))

    async def inodes(world: World) -> dict[str, int]:
        found = {}
        for folder in await world.names(DAY):
            directory = await world.at(f"{DAY}/{folder}")
            found[folder] = int(directory.inode)
            for entry in await entries(world.fs, directory.inode, 0):
                found[f"{folder}/{entry.name.decode()}"] = int(entry.attributes.inode)
        return found

    again = World(world.root)

    async def main() -> None:
        await again.fs.start()
        await again.at(f"{DAY}/d9/f7")
        first, second = await inodes(world), await inodes(again)
        assert first == second
        assert len(set(first.values())) == 16 * 51

    run(world, main)


def test_positions_in_the_root_hold_while_days_come_and_go(world: World) -> None:
    """Positions hold while names come and go: nothing twice, and nothing that stays is skipped."""
    for name in ("2026-11-18", "2026-11-20", "2026-11-22", "archive", "zoo"):
        world.put(f"{name}/0.des", "f")

    async def main() -> None:
        whole = list(await entries(world.fs, ROOT, 0))
        assert [entry.name for entry in whole] == [b"2026-11-18", b"2026-11-20", b"2026-11-22", b"archive", b"zoo"]
        seen = whole[:3]
        (world.root / "2026-11-18/0.des").unlink()
        world.put("2026-11-19/0.des", "f")
        await world.fs.refresh()
        seen += list(await entries(world.fs, ROOT, seen[-1].cookie))
        rest = [entry.name for entry in seen[3:]]
        assert rest == [b"archive", b"zoo", b"2026-11-19"]
        assert (ROOT, None) in world.kernel.told

    run(world, main)


# --- reading -----------------------------------------------------------------------------------------------------


def test_reading_a_directory_is_eisdir(world: World) -> None:
    world.put(f"{DAY}/0.des", "d/f")

    async def main() -> None:
        for inode in (ROOT, CONTROL_DIRECTORY, (await world.at(f"{DAY}/d")).inode):
            with pytest.raises(IsADirectory):
                await world.fs.read(inode, 0, 1)

    run(world, main)


def test_damaged_entries_are_eio_and_the_rest_is_read(world: World) -> None:
    """docs/semantics.md: An entry whose payload lies outside DATA, or that has a flag which is not known, answers EIO.
    The rest of its container is readable.

    Each is reported."""
    (world.root / DAY).mkdir()
    items = [
        Item(b"good", b"fine"),
        Item(b"outside", b"x", data_offset=10**9),
        Item(b"packed", b"y", flags=COMPRESSED),
        Item(b"unknown", b"y", flags=1 << 30),
        Item(b"twice", b"older"),
        Item(b"twice", b"newer", data_offset=10**12),
        Item(b"../escape", b"z"),
    ]
    (world.root / DAY / "0.des").write_bytes(build(items))

    async def main() -> None:
        assert sorted(await world.names(DAY)) == ["good", "outside", "packed", "twice", "unknown"]
        assert await world.read(f"{DAY}/good") == b"fine"
        expected: list[tuple[str, type[DesFormatError]]] = [
            ("outside", CorruptEntry),
            ("packed", UnsupportedEntry),
            ("unknown", UnsupportedEntry),
            ("twice", CorruptEntry),
        ]
        for name, kind in expected:
            with pytest.raises(kind) as caught:
                await world.read(f"{DAY}/{name}")
            assert errno_of(caught.value) == errno.EIO
            assert any(name in line for line in world.fs.problems.lines())
        assert any("escape" in line for line in world.fs.problems.lines())

    run(world, main)


@pytest.mark.parametrize("removed", [False, True])
def test_a_container_that_went_between_open_and_read_is_estale_for_the_old_inode(world: World, removed: bool) -> None:
    """docs/semantics.md: Where it stands nowhere, they answer ESTALE, and the next lookup finds what is there now.

    An object that was replaced gives 412: the container is reopened under a new slot."""
    world.put(f"{DAY}/0.des", "f", "g")
    world.put(f"{DAY}/1.des", "h")

    async def main() -> None:
        old = await world.at(f"{DAY}/f")
        world.kernel.told.clear()
        if removed:
            (world.root / DAY / "0.des").unlink()
        else:
            world.put(f"{DAY}/0.des", "f", content=" is new")
        for _ in range(2):
            with pytest.raises(StaleInode) as caught:
                await world.fs.read(old.inode, 0, 10)
            assert errno_of(caught.value) == errno.ESTALE
        day = directory_inode(DAY.encode())
        assert world.kernel.told == [(day, None), (day, b"f"), (day, b"g")]
        if removed:
            with pytest.raises(NoSuchPath):
                await world.at(f"{DAY}/f")
        else:
            assert await world.read(f"{DAY}/f") == b"f is new"
            assert (await world.at(f"{DAY}/f")).inode != old.inode
        with pytest.raises(StaleInode):
            await world.fs.xattr_names(old.inode)

    run(world, main)


def test_a_replaced_external_object_gets_its_container_new_inodes(world: World) -> None:
    """The kernel may have pages of the old version: the old inode never shows the new one. Files of the container that
    have not changed are read on."""
    target = world.root / DAY / "_bigFiles" / "big"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"old")
    with DesWriter(world.root / DAY / "0.des", external_prefix=f"{DAY}/") as writer:
        writer.add_external("big", 3)
        writer.add_file("f", b"small", meta_of(b"small"))

    async def main() -> None:
        old, small = await world.at(f"{DAY}/big"), await world.at(f"{DAY}/f")
        assert await world.fs.read(old.inode, 0, 3) == b"old"
        world.fs.fetcher.cache.resize(0)
        fresh = target.with_name("fresh")
        fresh.write_bytes(b"new")
        fresh.rename(target)
        for _ in range(3):
            with pytest.raises(StaleInode):
                await world.fs.read(old.inode, 0, 3)
        day = directory_inode(DAY.encode())
        assert (day, b"big") in world.kernel.told
        assert (day, b"big") in world.kernel.dropped
        assert await world.read(f"{DAY}/big") == b"new"
        assert (await world.at(f"{DAY}/big")).inode != old.inode
        assert await world.fs.read(small.inode, 0, 5) == b"small"
        with pytest.raises(StaleInode):
            await world.fs.read(old.inode, 0, 3)

    run(world, main)


def test_what_was_read_before_a_container_went_can_still_be_read(world: World) -> None:
    """A container that left its day can be read for a while by those who have its files open."""
    world.put(f"{DAY}/0.des", "f")
    world.put(f"{DAY}/1.des", "h")

    async def main() -> None:
        old = await world.at(f"{DAY}/f")
        assert await world.fs.read(old.inode, 0, 10) == b"f"
        (world.root / DAY / "0.des").unlink()
        await world.fs.refresh()
        assert await world.fs.read(old.inode, 0, 10) == b"f"
        assert (await world.fs.getattr(old.inode)).size == 1
        assert await world.names(DAY) == ["h"]

    run(world, main)


def test_an_open_file_goes_on_after_a_merge(world: World) -> None:
    """docs/semantics.md: When a container is replaced or removed, files of it that are open are read on where the same
    content stands now, as after a merge or a seal; size, time and checksum tell.

    A merge or a seal moves content to another container, and deletes the parts. Who knows of the merge asks the store
    for nothing twice."""
    for day in (DAY, "archive"):
        world.put(f"{day}/0-000001.des", "f", "d/g")
        world.put(f"{day}/0-000002.des", "changed", "h")
        world.put(f"{day}/1.des", "other")

    async def main() -> None:
        for day in (DAY, "archive"):
            old = {name: await world.at(f"{day}/{name}") for name in ("f", "d/g", "h", "changed")}
            put_container(
                world.root / day / "0.des", {"f": b"f", "d/g": b"d/g", "h": b"h", "changed": b"changed"}, id="new"
            )
            put_container(world.root / day / "0-000003.des", {"changed": b"CHANGED"})
            for part in (1, 2):
                (world.root / day / f"0-{part:06d}.des").unlink()
            if day == "archive":
                await world.fs.refresh()
            for again in (False, True):
                world.store.calls.clear()
                for name in ("f", "d/g", "h"):
                    assert bytes(await world.fs.read(old[name].inode, 0, 10)) == name.encode()
                assert len(world.store.keys("list")) == (day == DAY and not again)
            assert not {f"{day}/0-000001.des", f"{day}/0-000002.des"}.intersection(world.store.keys("get"))
            assert await world.fs.xattr(old["f"].inode, b"user.des.container") == f"{day}/0.des".encode()
            with pytest.raises(StaleInode):
                await world.fs.read(old["changed"].inode, 0, 10)
            assert (directory_inode(day.encode()), b"changed") in world.kernel.told
            assert await world.read(f"{day}/changed") == b"CHANGED"
            assert (await world.at(f"{day}/f")).inode != old["f"].inode

    run(world, main)


@pytest.mark.parametrize("same", ["checksum", "sha256", "nothing"])
def test_only_a_checksum_tells_that_content_is_the_same(world: World, same: str) -> None:
    """docs/semantics.md: When a container is replaced or removed, files of it that are open are read on where the same
    content stands now, as after a merge or a seal; size, time and checksum tell.

    Without a checksum, or with another time or size, a file that moved is another file."""
    data = b"12345"
    checksums: dict[str, dict[str, object]] = {
        "checksum": meta_of(data, mtime=5),
        "sha256": {"sha256": sha256(data).hexdigest(), "mtime": 5},
        "nothing": {"mtime": 5},
    }

    def put(stem: str, more: dict[str, object]) -> None:
        (world.root / DAY).mkdir(exist_ok=True)
        with DesWriter(world.root / DAY / stem) as writer:
            writer.add_file("f", data, checksums[same])
            writer.add_file("g", data, checksums[same] | more)
            writer.add_file("h", data + b"6" * len(more), checksums[same])  # whatever its checksum says

    put("0-000001.des", {})

    async def main() -> None:
        f, g, h = [await world.at(f"{DAY}/{name}") for name in "fgh"]
        put("0.des", {"mtime": 6})
        (world.root / DAY / "0-000001.des").unlink()
        if same == "nothing":
            with pytest.raises(StaleInode):
                await world.fs.read(f.inode, 0, 10)
        else:
            assert bytes(await world.fs.read(f.inode, 0, 10)) == data
        for other in (g, h):
            with pytest.raises(StaleInode):
                await world.fs.read(other.inode, 0, 10)

    run(world, main)


def test_many_readers_of_a_container_that_went_list_its_day_once(world: World) -> None:
    world.put(f"{DAY}/0-000001.des", *(f"f{n}" for n in range(20)))

    async def main() -> None:
        old = [await world.at(f"{DAY}/f{n}") for n in range(20)]
        (world.root / DAY / "0-000001.des").rename(world.root / DAY / "0.des")
        world.store.calls.clear()
        read: list[bytes] = []

        async def one(inode: int) -> None:
            read.append(bytes(await world.fs.read(inode, 0, 10)))

        async with trio.open_nursery() as nursery:
            for attributes in old:
                nursery.start_soon(one, attributes.inode)
        assert sorted(read) == sorted(b"f%d" % n for n in range(20))
        assert len(world.store.keys("list")) <= 2

    run(world, main)


def test_inodes_of_a_day_that_went_are_stale(world: World) -> None:
    world.put(f"{DAY}/0.des", "d/f")
    world.put("2026-11-21/0.des", "g")

    async def main() -> None:
        day, folder = await world.at(DAY), await world.at(f"{DAY}/d")
        assert await world.names(f"{DAY}/d") == ["f"]
        (world.root / DAY / "0.des").unlink()
        await world.fs.refresh()
        for inode in (day.inode, folder.inode):
            with pytest.raises(StaleInode):
                await world.fs.getattr(inode)
            with pytest.raises(StaleInode):
                await entries(world.fs, inode, 0)
        assert (ROOT, DAY.encode()) in world.kernel.told
        assert await world.names() == ["2026-11-21"]
        world.put(f"{DAY}/0.des", "d/new")
        world.kernel.told.clear()
        await world.fs.refresh()
        assert {(ROOT, None), (ROOT, DAY.encode())} <= set(world.kernel.told)
        assert await world.names(f"{DAY}/d") == ["new"]
        assert (await world.at(DAY)).inode == day.inode

    run(world, main)


# --- refresh -----------------------------------------------------------------------------------------------------


def test_the_kernel_keeps_what_it_knows_until_it_is_told(world: World) -> None:
    """No time-to-live cliff: names and attributes are kept for a day, of open days and of names that are not there too;
    what comes is told. No lookup waits for a listing when there is a view."""
    world.put(f"{DAY}/0.des", "d/f")
    world.put("archive/0.des", "f")

    async def absent(parent: int, name: bytes) -> bool:
        with pytest.raises(NoSuchPath) as caught:
            await world.fs.lookup(parent, name)
        return caught.value.for_long

    async def main() -> None:
        day, archive, folder = [await world.at(path) for path in (DAY, "archive", f"{DAY}/d")]
        for attributes in (day, archive, folder, await world.fs.getattr(ROOT), await world.at(f"{DAY}/d/f")):
            assert attributes.timeout_s == FOREVER_S
        assert (await world.at(".desfs")).timeout_s == 0
        assert all([await absent(parent.inode, b"new") for parent in (day, archive, folder)])
        world.store.calls.clear()
        assert await absent(ROOT, b"2026-11-22")
        assert await absent(ROOT, b"\xff")
        assert await absent(archive.inode, b"n" * 256)
        assert not await absent(CONTROL_DIRECTORY, b"new")
        assert world.store.calls == []
        for key in (f"{DAY}/1.des", "archive/1.des", "2026-11-22/0.des"):
            world.put(key, "new", "d/new")
        await world.fs.refresh()
        told = [(ROOT, b"2026-11-22"), (day.inode, b"new"), (archive.inode, b"new"), (folder.inode, b"new")]
        assert set(told) <= set(world.kernel.told)
        assert {(inode, None) for inode in (ROOT, day.inode, archive.inode, folder.inode)} <= set(world.kernel.told)
        assert await world.read(f"{DAY}/d/new") == b"d/new"

    run(world, main)


def test_a_day_that_cannot_be_listed_does_not_hold_up_the_others(world: World) -> None:
    for name in ("a", "b", "c"):
        world.put(f"{name}/0.des", "f")

    async def main() -> None:
        for name in ("a", "b", "c"):
            assert await world.names(name) == ["f"]
            world.put(f"{name}/1.des", "g")

        def fail(method: str, key: str) -> None:
            if key in ("", "a/"):
                raise StoreUnavailable("down")
            if key == "b/":
                raise ZeroDivisionError("a defect of ours")

        world.store.before = fail
        await world.fs.refresh()
        assert [await world.names(name) for name in ("a", "b", "c")] == [["f"], ["f"], ["f", "g"]]
        world.store.before = lambda method, key: None
        await world.fs.refresh()
        assert [await world.names(name) for name in ("a", "b", "c")] == [["f", "g"]] * 3

    run(world, main)


def test_the_loop_refreshes_until_it_is_cancelled(tmp_path: Path) -> None:
    world = World(tmp_path, refresh=0.01)
    world.put("archive/0.des", "f")

    async def main() -> None:
        assert await world.names("archive") == ["f"]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.fs.run, world.kernel)
            world.put("archive/1.des", "g")
            while (directory_inode(b"archive"), None) not in world.kernel.told:  # noqa: ASYNC110 - it is a refresh
                await trio.sleep(0.005)
            nursery.cancel_scope.cancel()
        assert await world.names("archive") == ["f", "g"]

    run(world, main)


def test_a_random_history_shows_what_is_stored(world: World) -> None:
    """Containers come, go and are replaced, with lookups of all kinds in between: after each refresh the day is the
    union of what is stored, and what it shows can be read."""
    random = Random(7)
    stored: dict[str, dict[str, bytes]] = {}
    names = [f"{folder}{n}" for folder in ("", "d/", "d/e/") for n in range(3)]

    async def main() -> None:
        count = 0
        for _ in range(60):
            shard = random.choice("0123")
            if stored and random.random() < 0.3:
                stored.pop(gone := random.choice(sorted(stored)))
                (world.root / "archive" / gone).unlink()
            else:
                count += 1
                files = {name: f"{name} {count}".encode() for name in random.sample(names, random.randint(0, 4))}
                stored[f"{shard}-{count:06d}.des"] = files
                path = put_container(world.root / "archive" / f"{shard}-{count:06d}.des", files)
                os.utime(path, ns=(count * 10**9, count * 10**9))
            if not stored:
                continue
            await world.fs.refresh()
            expected: dict[str, bytes] = {}
            for _, files in sorted(stored.items(), key=lambda item: int(item[0][2:8])):
                expected |= files
            found = {}
            for name in names:
                try:
                    found[name] = await world.read(f"archive/{name}")
                except NoSuchPath:
                    continue
            assert found == expected

    run(world, main)


# --- extended attributes, control files, totals ------------------------------------------------------------------


def test_extended_attributes_tell_where_a_file_lies_and_its_metadata(world: World) -> None:
    """docs/semantics.md: Files have the extended attributes `user.des.container`, `user.des.id`, `user.des.meta` (the
    metadata as stored), `user.mime_type` and `user.sha256`, as far as their metadata has them."""
    (world.root / DAY).mkdir()
    with DesWriter(world.root / DAY / "0.des") as writer:
        writer.add_file("f", b"x", {"id": "I-1", "mime": "text/plain", "sha256": "nonsense", "own": {"ż": 1}})
        writer.add_file("plain", b"y")
        writer.add_file("odd", b"z", {"id": 7, "mime": None})
    items = [Item(b"broken", b"x", meta=b"{no"), Item(b"none", b"y", meta=b"")]
    (world.root / DAY / "1.des").write_bytes(build(items))

    async def attributes(name: str) -> dict[str, bytes]:
        inode = (await world.at(f"{DAY}/{name}")).inode
        names = await world.fs.xattr_names(inode)
        return {key.decode(): await world.fs.xattr(inode, key) for key in names}

    async def main() -> None:
        found = await attributes("f")
        assert json.loads(found.pop("user.des.meta"))["own"] == {"ż": 1}
        assert found == {
            "user.des.container": f"{DAY}/0.des".encode(),
            "user.des.id": b"I-1",
            "user.mime_type": b"text/plain",
            "user.sha256": b"nonsense",
        }
        assert await attributes("plain") == {
            "user.des.container": f"{DAY}/0.des".encode(),
            "user.des.meta": b'{"size":1}',
        }
        assert (await attributes("odd"))["user.des.id"] == b"7"
        assert list(await attributes("broken")) == ["user.des.container"]
        assert list(await attributes("none")) == ["user.des.container"]
        inode = (await world.at(f"{DAY}/f")).inode
        for name in (b"user.other", b"user.des.nothing", b"user.des.\xff"):
            with pytest.raises(NoSuchAttribute):
                await world.fs.xattr(inode, name)
        for name in (b"security.selinux", b"system.posix_acl_access", b"trusted.x", b"\xff"):
            for each in (inode, ROOT, CONTROL_DIRECTORY):
                with pytest.raises(NoSuchNamespace):
                    await world.fs.xattr(each, name)
        for directory in (ROOT, CONTROL_DIRECTORY, (await world.at(DAY)).inode):
            assert await world.fs.xattr_names(directory) == []
            with pytest.raises(NoSuchAttribute):
                await world.fs.xattr(directory, b"user.des.container")

    run(world, main)


def test_the_metadata_of_neighbours_comes_in_one_get(world: World) -> None:
    world.put(f"{DAY}/0.des", *(f"f{n:03d}" for n in range(500)))

    async def main() -> None:
        inodes = [entry.attributes.inode for entry in await entries(world.fs, (await world.at(DAY)).inode, 0)]
        world.store.calls.clear()
        for inode in inodes:
            assert await world.fs.xattr(inode, b"user.des.meta")
        assert world.store.keys("get") == [f"{DAY}/0.des"]

    run(world, main)


def test_control_files_say_what_they_should_and_ask_the_store_nothing(world: World) -> None:
    """`/.desfs/`: reachable by name, not listed. Reading it never touches S3."""
    world.put(f"{DAY}/0.des", "f")
    (world.root / DAY / "1.des").write_bytes(b"garbage" * 30)

    async def main() -> None:
        assert await world.names(DAY) == ["f"]
        assert ".desfs" not in await world.names()
        world.store.calls.clear()
        assert await world.names(".desfs") == ["stats", "containers", "problems", "config"]
        stats = json.loads(await world.read(".desfs/stats"))
        assert stats["source"] == world.store.url
        assert stats["open_containers"] == {"bytes": (world.root / DAY / "0.des").stat().st_size, "files": 1}
        assert json.loads(await world.read(".desfs/config"))["refresh"] == 1e-6
        containers = json.loads(await world.read(".desfs/containers"))
        assert [(row["day"], row["key"], row["state"], row["files"]) for row in containers] == [
            (DAY, f"{DAY}/0.des", "open", 1),
            (DAY, f"{DAY}/1.des", "refused", None),
        ]
        assert (await world.read(".desfs/problems")).decode().startswith(f"{DAY}/1.des")
        assert world.store.calls == []
        for entry in await entries(world.fs, CONTROL_DIRECTORY, 0):
            assert entry.attributes.timeout_s == 0
            assert entry.attributes.mode == stat.S_IFREG | 0o444

    run(world, main)


def sizes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def test_totals_are_the_bytes_of_the_store_and_the_files_of_open_containers(world: World) -> None:
    """docs/semantics.md: The number that `df -i` shows is that of the files in those containers whose indexes have been
    read.

    The bytes are those of all objects below the folders of the root, and of the containers beside them."""
    put_sharded(world.root, DAY, {f"f{n}": b"x" for n in range(20)})
    world.put("2026-11-19/0.des", "old", "older")
    world.put("2026-11-21.des", "beside")
    (world.root / "2026-11-19/_bigFiles/deep").mkdir(parents=True)
    (world.root / "2026-11-19/_bigFiles/deep/external").write_bytes(b"e" * 5000)
    (world.root / "folder").mkdir()
    (world.root / "folder/foreign").write_bytes(b"f" * 700)
    size = sizes(world.root) - (world.root / ".desfs.json").stat().st_size

    async def main() -> None:
        assert await world.fs.statfs() == (size, 0)
        await world.names(DAY)
        assert await world.fs.statfs() == (size, 20)
        await world.names("2026-11-19")
        assert await world.fs.statfs() == (size, 22)

    run(world, main)


def test_who_asks_for_totals_waits_two_seconds_and_the_next_one_has_the_rest(world: World) -> None:
    """docs/semantics.md: The size that `df` shows is the bytes of all objects in the store's days and other folders,
    and of the containers beside them, as far as they could be listed in two seconds."""
    world.put(f"{DAY}/0.des", "f")
    clock = trio.testing.MockClock(rate=1.0)
    found: list[tuple[int, int]] = []

    async def ask() -> None:
        found.append(await world.fs.statfs())

    async def main() -> None:
        await ask()
        for day in ("2026-11-18", "2026-11-19"):
            world.put(f"{day}/0.des", "g")
        await world.fs.refresh()
        world.store.before = gate = Gate(lambda method, key: key.startswith("2026-11-1"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await until(lambda: gate.waiting == 2)
            clock.jump(1.5)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert len(found) == 1
            clock.jump(1)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert len(found) == 2
        gate.open()
        await ask()
        assert [size for size, _ in found] == [sizes(world.root / DAY)] * 2 + [sizes(world.root)]

    run(world, main, clock)


def test_a_day_that_cannot_be_listed_is_not_counted(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Who asks for the totals gets what is known, and the log says what is not."""
    world.put(f"{DAY}/0.des", "f")
    world.put("2026-11-19/0.des", "g")

    def fail(method: str, key: str) -> None:
        if key == "2026-11-19/":
            raise StoreUnavailable("down")

    async def main() -> None:
        world.store.before = fail
        assert (await world.fs.statfs())[0] == sizes(world.root / DAY)
        world.store.before = lambda method, key: None
        assert (await world.fs.statfs())[0] == sizes(world.root)

    run(world, main)
    assert "a day is not counted" in capsys.readouterr().out


def test_stale_and_foreign_inodes_are_estale(world: World) -> None:
    world.put(f"{DAY}/0.des", "f")

    async def main() -> None:
        file = (await world.at(f"{DAY}/f")).inode
        for inode in (file + 1, file + 2**32, directory_inode(b"nowhere"), 99):
            with pytest.raises(DesfsError) as caught:
                await world.fs.getattr(inode)
            assert errno_of(caught.value) == errno.ESTALE

    run(world, main)
