"""docs/architecture.md, The read path: blocks that are kept on disk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from des_format import CorruptEntry
from desfs import fetch
from desfs.blocks import BLOCK
from desfs.disk_cache import Buffer, DiskCache, ObjectVersion
from tests.mount.stores import put_container
from tests.unit.opened import KEY, World

# A block each.
APART = {f"f{n:02d}": Random(n).randbytes(BLOCK) for n in range(12)}


def fetch_all(world: World) -> None:
    world.fetcher.fetch_ahead(world.container, 0, len(world.container.blocks))


def on_disk(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "cache", 1 << 30)


def disk_world(tmp_path: Path, files: dict[str, bytes] | None = None) -> Callable[[], World]:
    """Mounts of one store, one after the other, with one folder for their caches."""
    put_container(tmp_path / "store" / KEY, files or APART)
    return lambda: World(tmp_path / "store", max_gap=0, disk=on_disk(tmp_path))


def test_blocks_from_disk_need_no_get(tmp_path: Path) -> None:
    mount = disk_world(tmp_path)
    first, second = mount(), mount()

    async def read_all(world: World) -> None:
        fetch_all(world)
        for name, data in APART.items():
            assert await world.payload(name) == data

    first.run(lambda: read_all(first))
    assert first.gets() == 1
    second.run(lambda: read_all(second))
    assert second.gets() == 0


@given(kept=st.sets(st.integers(0, len(APART) - 1)))
def test_what_of_a_piece_is_not_on_disk_comes_from_the_store(
    kept: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A piece is put together of blocks from disk and ranges of the store, and asks for none twice."""
    tmp_path = tmp_path_factory.mktemp("mixed")
    mount = disk_world(tmp_path)
    first, second, third = mount(), mount(), mount()
    size = sum(map(len, APART.values()))

    async def some() -> None:
        for number in kept:
            assert await first.payload(f"f{number:02d}") == APART[f"f{number:02d}"]

    async def rest(world: World) -> None:
        fetch_all(world)
        for name, data in APART.items():
            assert await world.payload(name) == data

    first.run(some)
    second.run(lambda: rest(second))
    given_ = sum(stop - start for _, start, stop in first.store.ranges + second.store.ranges)
    assert given_ == size
    third.run(lambda: rest(third))
    assert third.gets() == 0


def test_a_flipped_byte_on_disk_is_a_block_that_comes_from_the_store(tmp_path: Path) -> None:
    """A wrong byte in the disk cache is never returned."""
    mount = disk_world(tmp_path)
    first, second = mount(), mount()

    async def read(world: World) -> None:
        for name, data in APART.items():
            assert await world.payload(name) == data

    first.run(lambda: read(first))
    flipped = 0
    for path in (tmp_path / "cache").rglob("*.data"):
        raw = bytearray(path.read_bytes())
        at = raw.find(APART["f03"])
        if at >= 0:
            raw[at + 100] ^= 1
            path.write_bytes(raw)
            flipped += 1
    assert flipped == 1
    second.run(lambda: read(second))
    assert second.gets() == 1
    assert second.problems.lines() == []


def test_wrong_bytes_with_right_seals_on_disk_are_found_by_their_checksum_in_meta(tmp_path: Path) -> None:
    """Whoever can write to the cache's folder can seal anything: META is what counts."""
    mount = disk_world(tmp_path)
    world, disk = mount(), on_disk(tmp_path)
    start, stop = world.container.blocks.extent(3, 4)
    version = ObjectVersion(world.store.url, KEY, world.container.info.etag)
    disk.put(version, [(start, stop, b"x" * (stop - start))])

    async def main() -> None:
        assert await world.payload("f03") == APART["f03"]
        assert world.gets() == 1

    world.run(main)


def test_what_does_not_match_is_not_kept_on_disk(tmp_path: Path) -> None:
    mount = disk_world(tmp_path)
    first, second = mount(), mount()
    first.store.change = lambda method, key, data: data.replace(APART["f03"], APART["f04"])

    async def fails() -> None:
        with pytest.raises(CorruptEntry):
            await first.payload("f03")

    async def succeeds() -> None:
        assert await second.payload("f03") == APART["f03"]

    first.run(fails)
    second.run(succeeds)
    assert second.gets() == 1


class SlowDisk(DiskCache):
    """A disk that takes nothing before the gate is open."""

    gate: threading.Event

    def put(self, version: ObjectVersion, blocks: Sequence[tuple[int, int, Buffer]]) -> None:
        self.gate.wait(30)
        super().put(version, blocks)


def slow_world(tmp_path: Path) -> tuple[World, SlowDisk]:
    put_container(tmp_path / "store" / KEY, APART)
    disk = SlowDisk(tmp_path / "cache", 1 << 30)
    disk.gate = threading.Event()
    return World(tmp_path / "store", max_gap=0, disk=disk), disk


def test_what_has_come_is_on_disk_after_the_end(tmp_path: Path) -> None:
    """docs/operations.md: What has come when a mount ends is kept."""
    world, disk = slow_world(tmp_path)

    async def read_some() -> None:
        for name in list(APART)[:6]:
            assert await world.payload(name) == APART[name]
        threading.Timer(0.1, disk.gate.set).start()

    world.run(read_some)
    second = World(tmp_path / "store", max_gap=0, disk=on_disk(tmp_path))

    async def read_again() -> None:
        for name in list(APART)[:6]:
            assert await second.payload(name) == APART[name]

    second.run(read_again)
    assert second.gets() == 0


def test_a_disk_that_hangs_does_not_hold_up_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_LAST_SAVES_S", 0.05)
    world, disk = slow_world(tmp_path)
    ended = False

    async def read_one() -> None:
        nonlocal ended
        async with trio.open_nursery() as nursery:
            await nursery.start(world.fetcher.run)
            assert await world.payload("f03") == APART["f03"]
            nursery.cancel_scope.cancel()
        ended = True

    trio.run(read_one)
    assert ended
    assert not disk.gate.is_set()
    disk.gate.set()
