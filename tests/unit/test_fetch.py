"""docs/architecture.md, The read path: single flight, verification, bounds."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random

import pytest
import trio
import trio.lowlevel
from hypothesis import given
from hypothesis import strategies as st

from des_format import CorruptEntry, DesWriter
from desfs.container import load_container
from desfs.errors import DesfsError, NoSuchObject, ObjectReplaced, StoreUnavailable
from desfs.fetch import (
    BLOCK,
    LARGE_PAYLOAD,
    MAX_REQUEST,
    BlockCache,
    ByteBudget,
    Fetcher,
    OpenContainer,
    StoreThreads,
)
from desfs.problems import Problems
from desfs.store import file as file_store
from tests.mount.stores import WatchedStore, meta_of, put_container

KEY = "2026-11-20/0.des"
FILES = {f"f{n:02d}": Random(n).randbytes(1000 + n) for n in range(20)}


class World:
    """A store with one container that is open, and a fetcher."""

    def __init__(self, root: Path, cache_bytes: int = 1 << 20) -> None:
        self.root = root
        self.store = WatchedStore(file_store.FileStore(root))
        self.problems = Problems()
        self.fetcher = Fetcher(StoreThreads(self.store), self.problems, cache_bytes)
        (info,) = self.store.list(KEY.rpartition("/")[0] + "/", delimiter=True).objects
        self.container = OpenContainer(load_container(self.store, info), 7)
        self.store.calls.clear()

    def row(self, name: str) -> int:
        return self.container.loaded.index.find_shown(name)

    async def read(self, name: str, offset: int = 0, size: int = 1 << 30) -> bytes:
        return bytes(await self.fetcher.read(self.container, self.row(name), offset, size))

    def gets(self) -> int:
        return len(self.store.keys("get"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    put_container(tmp_path / KEY, FILES)
    return World(tmp_path)


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(30):
            await main()

    trio.run(bounded)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - of a thread, which sets no trio.Event
        await trio.sleep(0.001)


def test_one_get_brings_a_file_and_its_neighbours(world: World) -> None:
    """A single cold read fetches its file and a small neighbourhood."""

    async def main() -> None:
        assert await world.read("f03") == FILES["f03"]
        for name in sorted(FILES)[3:]:
            assert await world.read(name) == FILES[name]
        assert world.gets() == 1
        assert await world.read("f00", 10, 20) == FILES["f00"][10:30]
        assert world.gets() == 2

    run(main)


@given(offset=st.integers(0, 1100), size=st.integers(0, 1100))
def test_a_read_gives_every_byte_up_to_the_end(
    offset: int, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A short READ reply is padded with zeros by the kernel: every byte up to the end of the file."""
    root = tmp_path_factory.getbasetemp() / "reads"
    if not root.exists():
        put_container(root / KEY, FILES)
    world = World(root)

    async def main() -> None:
        assert await world.read("f05", offset, size) == FILES["f05"][offset : offset + size]

    run(main)


def test_ten_readers_make_one_get(world: World) -> None:
    """Single flight: ten readers of one block make one GET, and readers of its neighbours wait for it as well."""
    go = threading.Event()

    def wait(method: str, key: str) -> None:
        go.wait(20)

    world.store.before = wait
    found: list[bytes] = []

    async def reader(name: str) -> None:
        found.append(await world.read(name))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(reader, "f00")
            await until(lambda: world.store.running == 1)
            nursery.start_soon(reader, "f09")
            await trio.testing.wait_all_tasks_blocked(0.01)
            go.set()

    run(main)
    assert world.gets() == 1
    assert sorted(found) == sorted([FILES["f00"]] * 10 + [FILES["f09"]])


def test_when_the_leader_is_cancelled_one_of_the_others_leads(world: World) -> None:
    """A cancelled leader wakes its followers, and one of them leads again."""
    first, go = threading.Event(), threading.Event()

    def before(method: str, key: str) -> None:
        if not first.is_set():
            first.set()
            go.wait(20)

    world.store.before = before
    found: list[bytes] = []

    async def follower() -> None:
        found.append(await world.read("f00"))

    async def main() -> None:
        leader = trio.CancelScope()

        async def lead() -> None:
            with leader:
                await world.read("f00")
                raise AssertionError("the leader was not cancelled")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lead)
            await until(first.is_set)
            for _ in range(3):
                nursery.start_soon(follower)
            await trio.testing.wait_all_tasks_blocked(0.01)
            leader.cancel()
            await until(lambda: len(found) == 3)
            go.set()

    run(main)
    assert found == [FILES["f00"]] * 3
    assert world.gets() == 2


def test_an_error_reaches_everybody_who_waited_and_nobody_after(world: World) -> None:
    go = threading.Event()

    def fail(method: str, key: str) -> None:
        go.wait(20)
        raise StoreUnavailable("down")

    world.store.before = fail
    errors: list[Exception] = []

    async def reader() -> None:
        try:
            await world.read("f00")
        except DesfsError as error:
            errors.append(error)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(reader)
            await until(lambda: world.store.running == 1)
            await trio.testing.wait_all_tasks_blocked(0.01)
            go.set()
        assert [str(error) for error in errors] == ["down"] * 5
        assert world.gets() == 1
        world.store.before = lambda method, key: None
        assert await world.read("f00") == FILES["f00"]

    run(main)


# --- verification ------------------------------------------------------------------------------------------------


def damage(world: World, name: str, times: int) -> None:
    """Flip a byte of a payload in the first so many answers that have it."""
    index, row = world.container.loaded.index, world.row(name)
    payload = (world.root / KEY).read_bytes()[int(index.data_offset[row]) :][: int(index.data_length[row])]
    left = [times]

    def change(method: str, key: str, data: bytes) -> bytes:
        if payload in data and left[0]:
            left[0] -= 1
            return data.replace(payload, b"\0" + payload[1:] if payload[0] else b"\1" + payload[1:])
        return data

    world.store.change = change


def test_a_wrong_payload_is_fetched_once_more(world: World) -> None:
    """A mismatch is fetched once more, then EIO: it may be the way's fault."""
    damage(world, "f04", times=1)

    async def main() -> None:
        assert await world.read("f04") == FILES["f04"]
        assert world.gets() == 2
        assert world.problems.lines() == []
        assert await world.read("f05") == FILES["f05"]
        assert world.gets() == 2

    run(main)


def test_a_payload_that_is_wrong_twice_is_an_error_with_a_line_in_problems(world: World) -> None:
    damage(world, "f04", times=100)

    async def main() -> None:
        with pytest.raises(CorruptEntry, match=r"f04.*found a checksum"):
            await world.read("f04")
        assert world.gets() == 2
        (line,) = world.problems.lines()
        assert KEY in line
        assert "f04" in line
        with pytest.raises(CorruptEntry):
            await world.read("f04", 0, 1)

    run(main)


def test_damaged_neighbours_do_not_hurt(world: World) -> None:
    """Neighbours are a gift: a damaged one is left out, and its own read says so."""
    damage(world, "f04", times=100)

    async def main() -> None:
        assert await world.read("f03") == FILES["f03"]
        assert await world.read("f05") == FILES["f05"]
        assert world.gets() == 1
        assert world.problems.lines() == []
        with pytest.raises(CorruptEntry):
            await world.read("f04")
        assert len(world.problems.lines()) == 1

    run(main)


def test_damage_is_that_of_the_file_not_of_its_neighbours_readers(world: World) -> None:
    """Who waits for a fetch that finds the file in front damaged looks for itself."""
    damage(world, "f04", times=100)
    go = threading.Event()

    def wait(method: str, key: str) -> None:
        go.wait(20)

    world.store.before = wait
    found: list[bytes] = []

    async def reader() -> None:
        found.append(await world.read("f05"))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails, world, "f04")
            await until(lambda: world.store.running == 1)
            nursery.start_soon(reader)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert world.gets() == 1  # both wait for the same GET
            go.set()
        assert found == [FILES["f05"]]

    run(main)


async def fails(world: World, name: str) -> None:
    with pytest.raises(CorruptEntry):
        await world.read(name)


def test_sha256_is_checked_where_there_is_no_crc32c(tmp_path: Path) -> None:
    (tmp_path / "2026-11-20").mkdir()
    with DesWriter(tmp_path / KEY) as writer:
        writer.add_file("good", b"x", {"sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"})
        writer.add_file("bad", b"y", {"sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"})
        writer.add_file("none", b"z")
    world = World(tmp_path)

    async def main() -> None:
        assert await world.read("good") == b"x"
        assert await world.read("none") == b"z"
        with pytest.raises(CorruptEntry):
            await world.read("bad")

    run(main)


# --- replaced and removed ----------------------------------------------------------------------------------------


def test_old_index_and_new_bytes_never_mix(world: World) -> None:
    """Every GET carries the ETag that the index came from."""

    async def main() -> None:
        assert await world.read("f19") == FILES["f19"]
        put_container(world.root / KEY, {name: data[::-1] for name, data in FILES.items()})
        with pytest.raises(ObjectReplaced):
            await world.read("f00")
        assert await world.read("f19") == FILES["f19"]  # verified, and of that version
        (world.root / KEY).unlink()
        with pytest.raises(NoSuchObject):
            await world.read("f01")

    run(main)


# --- large, empty, external --------------------------------------------------------------------------------------


def test_an_empty_file_needs_no_get(tmp_path: Path) -> None:
    put_container(tmp_path / KEY, {"a": b"x", "empty": b"", "z": b"y"})
    world = World(tmp_path)

    async def main() -> None:
        assert await world.read("empty") == b""
        assert world.gets() == 0
        assert await world.read("a") == b"x"
        assert await world.read("z") == b"y"
        assert world.gets() == 1

    run(main)


def test_a_large_payload_comes_in_parallel_ranges(tmp_path: Path) -> None:
    data = Random(1).randbytes(MAX_REQUEST * 2 + 5)
    put_container(tmp_path / KEY, {"large": data, "small": b"s"})
    world = World(tmp_path, cache_bytes=64 << 20)

    async def main() -> None:
        assert await world.read("large", MAX_REQUEST - 5, 10) == data[MAX_REQUEST - 5 : MAX_REQUEST + 5]
        assert world.gets() == 3
        assert await world.read("large") == data
        assert world.gets() == 3

    run(main)


STEP = 128 * 1024  # of the kernel's sequential reads
LARGE = Random(3).randbytes(LARGE_PAYLOAD + BLOCK // 4 + 7)


@pytest.fixture
def large(tmp_path: Path) -> World:
    """A world with a large payload between small ones, and a cache for less than half of it."""
    put_container(tmp_path / KEY, {"before": b"b", "large": LARGE, "z": b"after"})
    return World(tmp_path, cache_bytes=2 * BLOCK)


def counted_bytes(world: World) -> Callable[[], int]:
    """How many bytes the store has given from now on."""
    given: list[int] = []

    def change(method: str, key: str, data: bytes) -> bytes:
        given.append(len(data))
        return data

    world.store.change = change
    return lambda: sum(given)


def test_a_payload_larger_than_the_cache_is_fetched_twice_not_once_a_read(large: World) -> None:
    """Large payloads are verified in one pass and served in blocks: they need not fit into the cache as a whole."""
    given = counted_bytes(large)

    async def main() -> None:
        pieces = [await large.read("large", at, STEP) for at in range(0, len(LARGE), STEP)]
        assert b"".join(pieces) == LARGE
        assert given() <= 2 * len(LARGE)
        assert large.gets() <= 2 * -(-len(LARGE) // BLOCK)
        assert large.fetcher.cache.bytes <= 2 * BLOCK
        assert await large.read("large", len(LARGE) - 3, 10) == LARGE[-3:]
        assert await large.read("large", BLOCK - 5, 2 * BLOCK) == LARGE[BLOCK - 5 : 3 * BLOCK - 5]
        assert (await large.read("before"), await large.read("z")) == (b"b", b"after")

    run(main)


def test_readers_of_a_large_payload_share_one_pass(large: World) -> None:
    given = counted_bytes(large)
    found: list[bytes] = []

    async def reader() -> None:
        found.append(await large.read("large", 4 * BLOCK, 10))  # in the last block, which the pass leaves in the cache

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(reader)
        assert found == [LARGE[4 * BLOCK :][:10]] * 5
        assert given() == len(LARGE)

    run(main)


def flip(world: World, at: int, times: int) -> None:
    """Flip the byte of the large payload at a place, in the first so many answers that have it."""
    mark, left = LARGE[at : at + 8], [times]
    wrong = bytes([mark[0] ^ 1]) + mark[1:]

    def change(method: str, key: str, data: bytes) -> bytes:
        if mark in data and left[0]:
            left[0] -= 1
            return data.replace(mark, wrong)
        return data

    world.store.change = change


@pytest.mark.parametrize("at", [0, 2 * BLOCK + 77, len(LARGE) - 8])
def test_no_byte_of_a_large_payload_is_served_when_one_is_wrong(large: World, at: int) -> None:
    """Verified as a whole before anybody sees a byte: EIO for every read, wherever the damage is, and one line in
    problems."""
    flip(large, at, times=1000)

    async def main() -> None:
        for offset in (0, at, len(LARGE) - 1):
            with pytest.raises(CorruptEntry, match=r"large.*found a checksum"):
                await large.read("large", offset, 1)
        assert len(large.problems.lines()) == 1
        assert await large.read("z") == b"after"

    run(main)


@pytest.mark.parametrize("at", [0, len(LARGE) - 8])
def test_a_large_payload_that_is_wrong_in_the_first_pass_only_is_served(large: World, at: int) -> None:
    """A mismatch is fetched once more; nothing of the first pass is left in the cache."""
    flip(large, at, times=1)

    async def main() -> None:
        assert await large.read("large", at, 8) == LARGE[at : at + 8]
        assert await large.read("large") == LARGE
        assert large.problems.lines() == []

    run(main)


@pytest.mark.parametrize(("times", "served"), [(1, True), (2, False)])
def test_a_block_that_is_fetched_again_has_to_be_what_was_verified(large: World, times: int, served: bool) -> None:
    """When META has a checksum, the bytes are verified before anybody sees them: also those of a block that had left
    the cache. A mismatch is fetched once more, then it is an error that is reported."""

    async def main() -> None:
        assert await large.read("large") == LARGE  # the last blocks are in the cache now, the first is not
        flip(large, 5, times=times)
        if served:
            assert await large.read("large", 0, 8) == LARGE[:8]
            assert large.problems.lines() == []
        else:
            with pytest.raises(CorruptEntry, match="not what was verified before"):
                await large.read("large", 0, 8)
            assert len(large.problems.lines()) == 1

    run(main)


def external_world(tmp_path: Path, data: bytes, *, recorded: str | None = None) -> World:
    (tmp_path / "2026-11-20").mkdir()
    with DesWriter(tmp_path / KEY, external_prefix="2026-11-20/") as writer:
        writer.add_external("dir/big.bin", len(data), meta_of(data), key=recorded)
    return World(tmp_path, cache_bytes=64 << 20)


def test_an_external_file_is_read_in_blocks_from_where_the_rule_says(tmp_path: Path) -> None:
    """External files: `{directory of the container's key}/_bigFiles/{entry name}`."""
    data = Random(2).randbytes(BLOCK + 100)
    world = external_world(tmp_path, data)
    target = tmp_path / "2026-11-20/_bigFiles/dir/big.bin"
    target.parent.mkdir(parents=True)
    target.write_bytes(data)

    async def main() -> None:
        at = BLOCK - 10
        assert await world.read("dir/big.bin", at, 20) == data[at : at + 20]
        assert world.gets() == 2
        assert await world.read("dir/big.bin") == data
        assert await world.read("dir/big.bin", len(data), 10) == b""
        assert world.problems.lines() == []

    run(main)


def test_a_recorded_key_in_a_folder_for_big_files_is_honoured(tmp_path: Path) -> None:
    """`external_key`: used only if it lies in a `_bigFiles/` folder of the store and ends in the entry's name."""
    world = external_world(tmp_path, b"elsewhere", recorded="2026-11-19/_bigFiles/dir/big.bin")
    (tmp_path / "2026-11-19/_bigFiles/dir").mkdir(parents=True)
    (tmp_path / "2026-11-19/_bigFiles/dir/big.bin").write_bytes(b"elsewhere")

    async def main() -> None:
        assert await world.read("dir/big.bin") == b"elsewhere"

    run(main)


@pytest.mark.parametrize("found", [None, b"", b"shor", b"longer"])
def test_an_external_object_that_is_missing_or_has_another_size_is_an_error(
    tmp_path: Path, found: bytes | None
) -> None:
    """An external object that is missing, or whose size differs from the index: EIO, reported."""
    world = external_world(tmp_path, b"right", recorded="../outside")
    if found is not None:
        (tmp_path / "2026-11-20/_bigFiles/dir").mkdir(parents=True)
        (tmp_path / "2026-11-20/_bigFiles/dir/big.bin").write_bytes(found)

    async def main() -> None:
        with pytest.raises(CorruptEntry, match="external object"):
            await world.read("dir/big.bin")
        assert any("big.bin" in line for line in world.problems.lines())

    run(main)


def test_an_empty_external_file_is_checked_too(tmp_path: Path) -> None:
    world = external_world(tmp_path, b"")

    async def main() -> None:
        with pytest.raises(CorruptEntry, match="missing"):
            await world.read("dir/big.bin")
        (tmp_path / "2026-11-20/_bigFiles/dir").mkdir(parents=True)
        (tmp_path / "2026-11-20/_bigFiles/dir/big.bin").write_bytes(b"")
        assert await world.read("dir/big.bin") == b""

    run(main)


def replace_external(world: World, data: bytes) -> None:
    """Put another object in the external object's place, as a store does it: whole."""
    target = world.root / "2026-11-20/_bigFiles/dir/big.bin"
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name("fresh")
    fresh.write_bytes(data)
    fresh.rename(target)


OLD, NEW = (bytes([letter]) * (BLOCK + 100) for letter in b"on")


def test_a_replaced_external_object_is_stale_once_and_then_the_new_one(tmp_path: Path) -> None:
    """One version of an external object or an error, never two in one: and the error is not for ever."""
    world = external_world(tmp_path, OLD)
    replace_external(world, OLD)

    async def main() -> None:
        assert await world.read("dir/big.bin", 0, 10) == OLD[:10]
        replace_external(world, NEW)
        with pytest.raises(ObjectReplaced):
            await world.read("dir/big.bin", BLOCK, 10)
        assert await world.read("dir/big.bin") == NEW

    run(main)


@pytest.mark.parametrize("last", ["old", "new"])
def test_two_first_reads_of_an_external_object_that_is_replaced_between_them(tmp_path: Path, last: str) -> None:
    """The first reads name no version: whichever answer comes second must be of the same."""
    world = external_world(tmp_path, OLD)
    replace_external(world, OLD)
    go = {"old": threading.Event(), "new": threading.Event()}
    arrived: set[str] = set()

    def change(method: str, key: str, data: bytes) -> bytes:
        version = "old" if data[:1] == OLD[:1] else "new"
        arrived.add(version)
        go[version].wait(20)
        return data

    world.store.change = change
    found: dict[str, bytes | ObjectReplaced] = {}

    async def reader(version: str, offset: int) -> None:
        try:
            found[version] = await world.read("dir/big.bin", offset, 10)
        except ObjectReplaced as error:
            found[version] = error

    async def main() -> None:
        first = ({"old", "new"} - {last}).pop()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader, "old", 0)
            await until(lambda: "old" in arrived)
            replace_external(world, NEW)
            nursery.start_soon(reader, "new", BLOCK)
            await until(lambda: "new" in arrived)
            go[first].set()
            await until(lambda: first in found)
            go[last].set()
        assert found[first] == (NEW if first == "new" else OLD)[:10]
        assert isinstance(found[last], ObjectReplaced)
        assert await world.read("dir/big.bin") == NEW

    run(main)


# --- threads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stalled", ["fetch", "run"])
def test_payloads_that_stall_do_not_hold_up_listings_and_indexes(tmp_path: Path, stalled: str) -> None:
    """Metadata never waits for payloads, nor they for it: each has threads of its own."""
    store = WatchedStore(file_store.FileStore(tmp_path))
    threads = StoreThreads(store, limit=2)
    stall, other = (threads.fetch, threads.run) if stalled == "fetch" else (threads.run, threads.fetch)
    go = threading.Event()
    store.before = lambda method, key: None if key == "free" else wait(go)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(stall, store.list, "stalled")
            await until(lambda: store.running == 2)
            assert (await other(store.list, "free")).objects == ()
            assert store.running == 2
            go.set()

    run(main)


def wait(event: threading.Event) -> None:
    event.wait(20)


# --- bounds ------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60)), max_size=50))
def test_the_cache_never_holds_more_than_it_may_and_drops_the_oldest(puts: list[tuple[int, int]]) -> None:
    cache, limit = BlockCache(100), 100
    model: dict[int, int] = {}
    for number, size in puts:
        cache.put((number, 0, -1), b"x" * size)
        model.pop(number, None)
        model[number] = size
        while sum(model.values()) > limit:
            del model[next(iter(model))]
        assert cache.bytes == sum(model.values())
        assert len(cache) == len(model)
        assert all((kept, 0, -1) in cache for kept in model)


def test_a_block_larger_than_the_cache_is_not_kept_and_an_older_one_of_its_key_goes() -> None:
    cache = BlockCache(10)
    cache.put((1, 0, -1), b"old")
    cache.put((1, 0, -1), b"x" * 11)
    assert cache.bytes <= 3
    assert cache.get((2, 0, -1)) is None


def test_no_more_bytes_than_the_budget_are_fetched_at_a_time() -> None:
    """Memory is bounded: `max_inflight` bytes; what is larger than all is let in alone."""
    taken, most = 0, 0

    async def main() -> None:
        budget = ByteBudget(100)

        async def take(size: int) -> None:
            nonlocal taken, most
            async with budget.taken(size):
                assert taken == 0 or taken + size <= 100
                taken += size
                most = max(most, taken)
                await trio.lowlevel.checkpoint()
                taken -= size

        async with trio.open_nursery() as nursery:
            for size in [30, 40, 50, 60, 250, 10, 100, 90] * 5:
                nursery.start_soon(take, size)
        with trio.move_on_after(0.01):
            async with budget.taken(100):
                await trio.sleep_forever()
        async with budget.taken(100):
            pass

    run(main)
    assert taken == 0
    assert most == 250
