"""docs/architecture.md, Prefetch: what is fetched and pushed because of what is read."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from des_format import CorruptEntry
from des_format.layout import HEADER
from desfs import metrics
from desfs.blocks import BLOCK
from desfs.container import OpenContainer
from desfs.fetch import PIECE
from desfs.pieces import Piece
from desfs.prefetch import DayShape
from desfs.push import ASKED, LISTED, PUSHED, PlainQueue, Pusher
from desfs.store.link import Link, LinkMeter
from desfs.walk import Order, following
from tests.mount.stores import put_container
from tests.unit.containers import Item, build
from tests.unit.opened import DAY, KEY, World

FILES = {f"f{n:03d}": Random(n).randbytes(1000 + n) for n in range(400)}
NEAR, FAR = Link(1e-9, 1e15), Link(1000.0, 1.0)  # fetching the rest costs nothing; more than anybody ever waits


class FixedMeter(LinkMeter):
    """A link that is known."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._fixed = link

    def link(self) -> Link:
        return self._fixed


class Kernel(Pusher):
    """Takes at once what is pushed, and knows what it got."""

    def __init__(self) -> None:
        super().__init__(PlainQueue(lambda inode, payload: 0), 1 << 30)
        self.pages: dict[tuple[int, int], bytes] = {}
        self.twice: list[tuple[int, int]] = []

    def push(self, container: OpenContainer, piece: Piece, rows: npt.NDArray[np.uint32]) -> None:
        index = container.loaded.index
        for row in rows.tolist():
            offset = int(index.data_offset[row]) - piece.start
            if (container.number, row) in self.pages:
                self.twice.append((container.number, row))
            self.pages[container.number, row] = bytes(memoryview(piece.data)[offset:][: int(index.data_length[row])])
            container.pages[row] |= PUSHED

    def names(self, container: OpenContainer) -> set[str]:
        index = container.loaded.index
        return {index.name(row).decode() for number, row in self.pages if number == container.number}


def with_kernel(world: World, link: Link = FAR) -> Kernel:
    kernel = Kernel()
    world.prefetcher.pusher = kernel
    world.threads.meter = FixedMeter(link)
    return kernel


def list_all(world: World) -> None:
    for container in world.containers:
        world.prefetcher.listed(DAY, container, np.arange(container.loaded.index.rows, dtype=np.uint32))


@pytest.fixture
def world(tmp_path: Path) -> World:
    put_container(tmp_path / KEY, FILES)
    return World(tmp_path, max_gap=0)


# --- reads -------------------------------------------------------------------------------------------------------


@given(offset=st.integers(0, 1100), size=st.integers(0, 1100))
@settings(max_examples=30)
def test_a_read_gives_every_byte_up_to_the_end(
    offset: int, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A short READ reply is padded with zeros by the kernel: every byte up to the end of the file."""
    root = tmp_path_factory.getbasetemp() / "prefetched-reads"
    if not root.exists():
        put_container(root / KEY, FILES)
    world = World(root)

    async def main() -> None:
        assert await world.read("f005", offset, size) == FILES["f005"][offset : offset + size]

    world.run(main)


def test_an_empty_file_needs_no_get(tmp_path: Path) -> None:
    put_container(tmp_path / KEY, {"a": b"x", "empty": b"", "z": b"y"})
    world = World(tmp_path)

    async def main() -> None:
        assert await world.read("empty") == b""
        assert world.gets() == 0
        assert await world.read("a") == b"x"
        assert await world.read("z") == b"y"
        assert world.gets() == 1

    world.run(main)


def test_a_container_that_has_left_its_day_can_be_read(world: World) -> None:
    world.shape = DayShape("", (), None, lambda path: 0)

    async def main() -> None:
        for name in ("f300", "f005", "f399"):
            assert await world.read(name) == FILES[name]

    world.run(main)


def test_a_container_whose_entries_lie_is_read_as_far_as_it_can(tmp_path: Path) -> None:
    """Entries that overlap, lie nowhere or in each other, in a directory that is walked."""
    data = bytes(range(200))
    items = [
        Item(b"d/a", data),
        Item(b"d/b", b"", data_offset=HEADER.size + 50, data_length=100),
        Item(b"d/c", b"", data_offset=2**63, data_length=2**63),
        Item(b"d/d", b"", data_offset=2**64 - 1, data_length=0),
        Item(b"d/e", b"last"),
    ]
    (tmp_path / DAY).mkdir()
    (tmp_path / KEY).write_bytes(build(items))
    world = World(tmp_path)
    kernel = with_kernel(world)

    async def main() -> None:
        list_all(world)
        assert await world.read("d/a") == data
        assert await world.read("d/b") == data[50:150]
        with pytest.raises(CorruptEntry):
            await world.read("d/c")
        assert await world.read("d/d") == b""
        assert await world.read("d/e") == b"last"
        list_all(world)

    world.run(main)
    assert kernel.names(world.container) <= {"d/a", "d/e"}


# --- windows and pushes ------------------------------------------------------------------------------------------


def test_who_lists_and_reads_the_first_file_is_given_the_directory(world: World) -> None:
    """All but the markers is pushed, once, and what is not pushed is in memory."""
    kernel = with_kernel(world)

    async def main() -> None:
        list_all(world)
        seen = []
        for name, data in FILES.items():
            if (world.container.number, world.row(name)) not in kernel.pages:
                seen.append(name)
                assert await world.read(name) == data
                await world.idle()
        assert len(seen) <= 6
        assert kernel.names(world.container) == set(FILES) - set(seen)

    world.run(main)
    assert {
        name: kernel.pages[world.container.number, world.row(name)] for name in kernel.names(world.container)
    }.items() <= FILES.items()
    assert kernel.twice == []
    assert sum(stop - start for _, start, stop in world.store.ranges) <= sum(map(len, FILES.values()))


def test_nothing_is_pushed_that_the_kernel_was_not_told_of_or_has_asked_for(world: World) -> None:
    kernel = with_kernel(world)
    half = world.row("f200")

    async def main() -> None:
        world.prefetcher.listed(DAY, world.container, np.arange(half, dtype=np.uint32))
        world.container.pages[world.row("f050")] |= ASKED
        await world.read("f000")
        await world.idle()
        for name in sorted(FILES)[1:200]:
            if name != "f050" and name not in kernel.names(world.container):
                await world.read(name)
                await world.idle()
        assert kernel.names(world.container) <= {name for name in FILES if name < "f200"} - {"f000", "f050"}
        assert len(kernel.pages) > 150
        world.prefetcher.listed(DAY, world.container, np.arange(half, len(FILES), dtype=np.uint32))
        assert max(kernel.names(world.container)) > "f200"  # what had come before it was listed

    world.run(main)


def test_a_damaged_payload_is_pushed_to_nobody(world: World) -> None:
    """Nothing is seen before it is verified: bad rows go to no reader, and not to the kernel."""
    kernel = with_kernel(world)
    wrong = {"f100", "f101", "f399"}

    def change(method: str, key: str, data: bytes) -> bytes:
        for name in wrong:
            data = data.replace(FILES[name], FILES[name][::-1])
        return data

    world.store.change = change

    async def main() -> None:
        list_all(world)
        for name, data in FILES.items():
            if name not in kernel.names(world.container):
                if name in wrong:
                    with pytest.raises(CorruptEntry):
                        await world.read(name)
                else:
                    assert await world.read(name) == data
                await world.idle()
        assert not kernel.names(world.container) & wrong

    world.run(main)
    assert len(world.problems.lines()) == 3


def test_a_random_reader_is_given_no_pushes(two: World) -> None:
    kernel = with_kernel(two)

    async def main() -> None:
        list_all(two)
        for n in (25, 3, 17):
            assert await two.read(f"a{n:02d}") == bytes([n]) * BLOCK
        await two.idle()

    two.run(main)
    assert kernel.pages == {}


def test_a_file_that_is_asked_for_again_has_lost_its_pages_and_so_have_others(world: World) -> None:
    kernel = with_kernel(world)

    async def main() -> None:
        list_all(world)
        await world.read("f000")
        await world.idle()
        assert world.container.pages[5] == LISTED | PUSHED
        await world.read("f000")
        assert world.container.pages[5] & ~PUSHED == LISTED

    world.run(main)
    assert kernel.pages


# --- rent or buy -------------------------------------------------------------------------------------------------


def slowly() -> None:
    """A miss costs its reader 20 ms."""
    threading.Event().wait(0.02)


def bought() -> float:
    return metrics.snapshot()["desfs_prefetch_bought_total"]


@pytest.fixture
def two(tmp_path: Path) -> World:
    """A container of many blocks, and one of a single file."""
    put_container(tmp_path / KEY, {f"a{n:02d}": bytes([n]) * BLOCK for n in range(30)})
    put_container(tmp_path / DAY / "1.des", {"b": b"alone"})
    return World(tmp_path, max_gap=0, keys=(KEY, f"{DAY}/1.des"))


def test_misses_that_have_cost_as_much_buy_the_rest_of_the_container(two: World) -> None:
    two.threads.meter = FixedMeter(NEAR)
    two.store.before = lambda method, key: slowly()
    before = bought()

    async def main() -> None:
        await two.read("a20")
        await two.idle()
        assert bought() > before
        gets = two.gets()
        for n in range(30):
            assert await two.read(f"a{n:02d}") == bytes([n]) * BLOCK
        assert two.gets() == gets

    two.run(main)


def test_what_a_miss_has_cost_beyond_its_container_buys_another(two: World) -> None:
    two.threads.meter = FixedMeter(NEAR)
    two.store.before = lambda method, key: slowly()
    before = bought()

    async def main() -> None:
        assert await two.read("b", container=two.containers[1]) == b"alone"  # nothing is left of that one
        await two.idle()
        assert bought() == before + 1
        gets = two.gets()
        for n in range(30):
            assert await two.read(f"a{n:02d}") == bytes([n]) * BLOCK
        assert two.gets() == gets

    two.run(main)


def test_nothing_is_bought_for_more_than_it_costs_to_wait(two: World) -> None:
    two.threads.meter = FixedMeter(FAR)
    before = bought() + bought()

    async def main() -> None:
        for n in (25, 3, 17):
            await two.read(f"a{n:02d}")

    two.run(main)
    assert bought() + bought() == before


def test_nothing_is_bought_that_memory_does_not_hold(tmp_path: Path) -> None:
    put_container(tmp_path / KEY, {f"a{n:02d}": bytes([n]) * BLOCK for n in range(30)})
    world = World(tmp_path, max_gap=0, memory=3 << 20)
    world.threads.meter = FixedMeter(NEAR)
    before = bought() + bought()

    async def main() -> None:
        for n in (25, 3, 17):
            assert await world.read(f"a{n:02d}") == bytes([n]) * BLOCK

    world.run(main)
    assert bought() + bought() == before


def test_days_that_are_not_there_any_more_are_let_go(world: World) -> None:
    with_kernel(world)

    async def main() -> None:
        list_all(world)
        await world.read("f000")
        await world.idle()
        world.prefetcher.keep_days([])

    world.run(main)
    gone = weakref.ref(world.container)
    world.containers.clear()
    world.shape = DayShape("", (), None, lambda path: 0)
    del world.container
    gc.collect()
    assert gone() is None


# --- whole days --------------------------------------------------------------------------------------------------

FOLDERS = ("", "a/", "a/b/", "a/b/c/", "b/", "z/y/")


@given(
    seed=st.integers(0, 2**32),
    order=st.sampled_from(Order),
    listed=st.booleans(),
    counts=st.lists(st.integers(0, 60), min_size=len(FOLDERS), max_size=len(FOLDERS)),
    containers=st.integers(1, 4),
    link=st.sampled_from([NEAR, FAR, Link(0.02, 100e6)]),
)
@settings(max_examples=40)
def test_a_walk_through_a_day_sees_every_byte_and_fetches_none_twice(
    seed: int,
    order: Order,
    listed: bool,
    counts: list[int],
    containers: int,
    link: Link,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Whatever order a program walks in, and whether it lists or not: what it reads, and what the kernel is given, is
    what was stored; the bytes fetched are those of the day at most."""
    random = Random(seed)
    root = tmp_path_factory.mktemp("day")
    shares: list[dict[str, bytes]] = [{} for _ in range(containers)]
    for folder, count in zip(FOLDERS, counts, strict=True):
        for n in range(count):
            random.choice(shares)[f"{folder}{n:03d}"] = random.randbytes(random.choice([0, 1, 5000, 90_000]))
    shares[0]["first"] = b"there is a file"
    keys = tuple(f"{DAY}/{number:x}.des" for number in range(containers))
    for key, share in zip(keys, shares, strict=True):
        put_container(root / key, dict(sorted(share.items())))
    world = World(root, keys=keys, max_gap=0)
    kernel = with_kernel(world, link)
    tree = world.shape.tree
    assert tree is not None
    folders = [b"", *following(tree, b"", order, world.shape.inode)]
    if order is Order.LISTED:  # the day's own files come last
        first = next(
            folder.encode().rstrip(b"/")
            for folder in (*FOLDERS[3:0:-1], *FOLDERS)
            if tree.has_files(folder.encode().rstrip(b"/"))
        )
        folders = [first, *following(tree, first, order, world.shape.inode)]

    async def main() -> None:
        if listed:
            list_all(world)
        for folder in folders:
            for container, stop in zip(world.containers, world.shape.route, strict=True):
                for row in stop.member.folders.rows(folder).tolist():
                    name = container.loaded.index.name(row).decode()
                    if (container.number, row) not in kernel.pages:
                        expected = shares[world.containers.index(container)][name]
                        assert await world.read(name, container=container) == expected
        await world.idle()
        for container, share in zip(world.containers, shares, strict=True):
            for name in kernel.names(container):
                assert kernel.pages[container.number, world.row(name, container)] == share[name]

    world.run(main)
    assert sum(stop - start for _, start, stop in world.store.ranges) <= sum(
        container.loaded.index.footer.data_length for container in world.containers
    )
    assert kernel.twice == []
    assert listed or not kernel.pages


def test_the_rest_of_a_day_is_fetched_as_its_reader_comes_along(tmp_path: Path) -> None:
    """docs/architecture.md: the rest of a day comes two round trips, or pieces, ahead of its reader; each byte once."""
    count, size = 8, 64 * 1024
    keys = tuple(f"{DAY}/{number:x}.des" for number in range(count))
    shares = [
        {f"d{number}/{n:03d}": Random(number * 1000 + n).randbytes(size) for n in range(100)} for number in range(count)
    ]
    for key, share in zip(keys, shares, strict=True):
        put_container(tmp_path / key, share)
    world = World(tmp_path, memory=256 << 20, keys=keys)
    kernel = with_kernel(world, Link(0.02, 1e6))
    ahead: list[int] = []

    async def main() -> None:
        world.prefetcher.listing(DAY, b"")
        read = 0
        for container, share in zip(world.containers, shares, strict=True):
            folder = next(iter(share)).rpartition("/")[0]
            world.prefetcher.listing(DAY, folder.encode())
            world.prefetcher.listed(DAY, container, np.arange(len(share), dtype=np.uint32))
            for name, data in share.items():
                row = world.row(name, container)
                if (container.number, row) not in kernel.pages:
                    assert await world.read(name, container=container) == data
                    await world.idle()
            await world.idle()
            read += len(share) * size
            ahead.append(sum(stop - start for _, start, stop in world.store.ranges) - read)

    world.run(main)
    assert max(ahead) <= 3 * PIECE  # two of the reach, and one that begins within it
    assert min(ahead[2:-4]) >= PIECE
    assert ahead[-1] == 0


def test_who_lists_a_large_directory_and_then_reads_it_is_never_left_behind(tmp_path: Path) -> None:
    """A directory that is larger than what is fetched ahead is listed as a whole before it is read: the files that are
    held back tell how far its reader has come."""
    size = 64 * 1024
    keys = (f"{DAY}/0.des", f"{DAY}/1.des")
    shares = [{f"d{number}/{n:04d}": Random(n).randbytes(size) for n in range(600)} for number in range(2)]
    for key, share in zip(keys, shares, strict=True):
        put_container(tmp_path / key, share)
    world = World(tmp_path, memory=512 << 20, keys=keys)
    kernel = with_kernel(world, Link(0.02, 1e6))
    missed = []

    async def main() -> None:
        world.prefetcher.listing(DAY, b"")
        for container, share in zip(world.containers, shares, strict=True):
            world.prefetcher.listing(DAY, next(iter(share)).rpartition("/")[0].encode())
            world.prefetcher.listed(DAY, container, np.arange(len(share), dtype=np.uint32))
            for name, data in share.items():
                row = world.row(name, container)
                if (container.number, row) not in kernel.pages:
                    block = container.blocks.of(int(container.loaded.index.data_offset[row]))
                    if not world.fetcher.has(container, block):
                        missed.append(name)
                    assert await world.read(name, container=container) == data
                await world.idle()

    world.run(main)
    assert missed == ["d0/0000"]
    assert sum(stop - start for _, start, stop in world.store.ranges) == 2 * 600 * size
