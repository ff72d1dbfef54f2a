"""docs/architecture.md, The read path: single flight, verification, bounds."""

from __future__ import annotations

import errno
from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from des_format import CorruptEntry, DesWriter
from desfs.blocks import BLOCK
from desfs.container import OpenContainer
from desfs.errors import DeadlineExceeded, DesfsError, NoSuchObject, ObjectReplaced, StoreUnavailable, errno_of
from desfs.fetch import LEAST_AHEAD, PIECE, Fetcher
from desfs.pieces import SMALL, Piece, PieceCache
from desfs.problems import Problems
from desfs.store.file import FileStore
from desfs.store_threads import StoreThreads
from tests.mount.stores import WatchedStore, put_container
from tests.unit.opened import KEY, Gate, World, until

FILES = {f"f{n:02d}": Random(n).randbytes(1000 + n) for n in range(20)}
# A block each.
APART = {f"f{n:02d}": Random(n).randbytes(BLOCK) for n in range(12)}


@pytest.fixture
def world(tmp_path: Path) -> World:
    put_container(tmp_path / KEY, FILES)
    return World(tmp_path)


@pytest.fixture
def apart(tmp_path: Path) -> World:
    put_container(tmp_path / KEY, APART)
    return World(tmp_path, max_gap=0)


def damage(world: World, name: str, times: int) -> None:
    """Flip a byte of a payload in the first so many answers that have it."""
    index, row = world.container.loaded.index, world.row(name)
    payload = (world.root / KEY).read_bytes()[int(index.data_offset[row]) :][: int(index.data_length[row])]
    left = [times]

    def change(method: str, key: str, data: bytes) -> bytes:
        if payload in data and left[0]:
            left[0] -= 1
            return data.replace(payload, bytes([payload[0] ^ 1]) + payload[1:])
        return data

    world.store.change = change


# --- single flight -----------------------------------------------------------------------------------------------


def test_a_block_comes_in_one_get_for_all_that_is_in_it(world: World) -> None:
    async def main() -> None:
        for name, data in FILES.items():
            assert await world.payload(name) == data
        assert world.gets() == 1

    world.run(main)


def test_ten_readers_make_one_get(world: World) -> None:
    """Single flight: ten readers of one block make one GET, and readers of its neighbours wait for it as well."""
    world.store.before = gate = Gate()
    found: list[bytes] = []

    async def reader(name: str) -> None:
        found.append(await world.payload(name))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(reader, "f00")
            await until(lambda: gate.waiting == 1)
            nursery.start_soon(reader, "f09")
            await trio.testing.wait_all_tasks_blocked(0.01)
            gate.open()

    world.run(main)
    assert world.gets() == 1
    assert sorted(found) == sorted([FILES["f00"]] * 10 + [FILES["f09"]])


def test_a_reader_that_is_cancelled_leaves_the_fetch_to_the_others(world: World) -> None:
    world.store.before = gate = Gate()
    found: list[bytes] = []

    async def follower() -> None:
        found.append(await world.payload("f00"))

    async def main() -> None:
        first = trio.CancelScope()

        async def lead() -> None:
            with first:
                await world.payload("f00")
                raise AssertionError("the first reader was not cancelled")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lead)
            await until(lambda: gate.waiting == 1)
            for _ in range(3):
                nursery.start_soon(follower)
            await trio.testing.wait_all_tasks_blocked(0.01)
            first.cancel()
            await trio.testing.wait_all_tasks_blocked(0.01)
            gate.open()

    world.run(main)
    assert found == [FILES["f00"]] * 3
    assert world.gets() == 1


def test_an_error_reaches_everybody_who_waited_and_the_next_read_tries_again(world: World) -> None:
    gate = Gate()

    def fail(method: str, key: str) -> None:
        gate(method, key)
        raise StoreUnavailable("down")

    world.store.before = fail
    errors: list[str] = []

    async def reader() -> None:
        try:
            await world.payload("f00")
        except DesfsError as error:
            errors.append(str(error))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(reader)
            await until(lambda: gate.waiting == 1)
            await trio.testing.wait_all_tasks_blocked(0.01)
            gate.open()
        assert errors == ["down"] * 5
        assert world.gets() == 1
        world.store.before = lambda method, key: None
        assert await world.payload("f00") == FILES["f00"]

    world.run(main)
    assert world.fetcher.bytes_in_flight == 0


def test_who_joined_an_old_fetch_that_ran_out_of_time_begins_one_of_his_own(world: World) -> None:
    """The store may be well again when a fetch fails that had begun before the reader came: he has time left. Who began
    it has none."""
    gate = Gate()

    def run_out_of_time(method: str, key: str) -> None:
        if world.gets() == 1:
            gate(method, key)
            raise DeadlineExceeded("gave up")

    world.store.before = run_out_of_time
    errors: list[str] = []
    found: list[bytes] = []

    async def reader() -> None:
        try:
            found.append(await world.payload("f00"))
        except DeadlineExceeded as error:
            errors.append(str(error))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await until(lambda: gate.waiting == 1)
            for _ in range(3):
                nursery.start_soon(reader)
            await trio.testing.wait_all_tasks_blocked(0.01)
            gate.open()

    world.run(main)
    assert errors == ["gave up"]
    assert found == [FILES["f00"]] * 3
    assert world.gets() == 2


def test_a_defect_of_ours_is_an_error_of_that_read_alone(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing that happens in a fetch ends the fetcher."""

    def fail(method: str, key: str) -> None:
        raise ZeroDivisionError("a defect of ours")

    world.store.before = fail

    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            await world.payload("f00")
        world.store.before = lambda method, key: None
        assert await world.payload("f00") == FILES["f00"]

    world.run(main)
    assert "unexpected error in a fetch" in capsys.readouterr().out


def test_a_fetcher_that_does_not_run_is_an_error_not_a_wait(world: World) -> None:
    async def main() -> None:
        with pytest.raises(DeadlineExceeded):
            await world.payload("f00")

    trio.run(main)


def test_who_waits_when_the_mount_ends_hears_of_it(world: World) -> None:
    world.store.before = gate = Gate()
    errors: list[str] = []

    async def reader() -> None:
        try:
            await world.payload("f00")
        except DeadlineExceeded as error:
            errors.append(str(error))

    async def main() -> None:
        async with trio.open_nursery() as readers, trio.open_nursery() as nursery:
            await nursery.start(world.fetcher.run)
            readers.start_soon(reader)
            await until(lambda: gate.waiting == 1)
            nursery.cancel_scope.cancel()
        gate.open()

    trio.run(main)
    assert errors == ["the mount is ending"]


# --- what is fetched ahead ---------------------------------------------------------------------------------------


def fetch_ahead(world: World, first: int, last: int) -> int:
    return world.fetcher.fetch_ahead(world.container, first, last)


def test_what_is_here_or_on_its_way_is_not_asked_for_again(apart: World) -> None:
    blocks = apart.container.blocks

    async def main() -> None:
        await apart.payload("f05")
        apart.forget_calls()
        middle = blocks.of(int(apart.container.loaded.index.data_offset[apart.row("f05")]))
        asked = fetch_ahead(apart, 0, len(blocks))
        assert asked == sum(stop - start for start, stop in (blocks.extent(0, middle), blocks.extent(middle + 1, 12)))
        assert fetch_ahead(apart, 0, len(blocks)) == 0
        for name, data in APART.items():
            assert await apart.payload(name) == data
        assert apart.gets() == 2
        assert fetch_ahead(apart, 0, len(blocks)) == 0

    apart.run(main)


def test_a_fetch_ahead_that_waits_for_its_turn_starts_when_somebody_waits_for_it(tmp_path: Path) -> None:
    """Fetches that nobody waits for keep to a number at a time; a read goes before them."""
    put_container(tmp_path / KEY, {f"{n:02d}": bytes([n]) * BLOCK for n in range(40)})
    world = World(tmp_path)
    world.store.before = gate = Gate()

    async def main() -> None:
        for block in range(len(world.container.blocks)):
            fetch_ahead(world, block, block + 1)
        await until(lambda: gate.waiting == LEAST_AHEAD)
        starts = [start for _, start, _ in world.store.ranges]
        assert sorted(starts) == world.container.blocks.start[:LEAST_AHEAD].tolist()  # the first ones
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert gate.waiting == LEAST_AHEAD
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.payload, "39")
            await until(lambda: gate.waiting == LEAST_AHEAD + 1)
            start = int(world.container.loaded.index.data_offset[world.row("39")])
            assert world.store.ranges[-1] == (KEY, start, start + BLOCK)
            gate.open()
        for n in range(40):
            assert await world.payload(f"{n:02d}") == bytes([n]) * BLOCK

    world.run(main)
    assert world.gets() == 40


@pytest.mark.parametrize("memory", [16 << 20, 64 << 20])
def test_memory_holds_for_what_is_kept_and_in_flight_together(tmp_path: Path, memory: int) -> None:
    """Memory is bounded: fetches leave a part of it to the cache, and the cache gives way to them."""
    put_container(tmp_path / KEY, {f"{n:02d}": bytes([n]) * (2 << 20) for n in range(40)})
    world = World(tmp_path, memory=memory)
    held: list[int] = []
    flights: list[int] = []

    def came(container: OpenContainer, piece: Piece) -> None:
        held.append(world.fetcher.cache.bytes + world.fetcher.bytes_in_flight)
        flights.append(world.fetcher.bytes_in_flight)

    world.fetcher.on_piece = came

    async def main() -> None:
        fetch_ahead(world, 0, len(world.container.blocks))
        async with trio.open_nursery() as nursery:
            for n in range(40):
                nursery.start_soon(world.payload, f"{n:02d}")
        assert memory // 4 <= world.fetcher.cache.bytes <= memory

    world.run(main)
    assert max(held) <= max(memory, 6 * PIECE)
    assert max(flights) <= max(memory * 3 // 4, 4 * PIECE)
    assert world.fetcher.bytes_in_flight == 0


def test_a_piece_that_is_larger_than_all_comes_alone_and_is_not_kept(tmp_path: Path) -> None:
    files = {f"{n}": bytes([n]) * (10 << 20) for n in range(3)}
    put_container(tmp_path / KEY, files)
    world = World(tmp_path, memory=1 << 20)
    found: list[bytes] = []

    async def reader(name: str) -> None:
        found.append(await world.payload(name))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for name in files:
                nursery.start_soon(reader, name)

    world.run(main)
    assert sorted(found) == sorted(files.values())
    assert world.store.most_running == 1
    assert world.fetcher.cache.bytes == 0


# --- verification ------------------------------------------------------------------------------------------------


def test_a_wrong_payload_is_fetched_once_more(world: World) -> None:
    """A mismatch is fetched once more, then EIO: it may be the way's fault."""
    damage(world, "f04", times=1)

    async def main() -> None:
        assert await world.payload("f04") == FILES["f04"]
        assert world.gets() == 2
        assert world.problems.lines() == []
        assert await world.payload("f05") == FILES["f05"]
        assert world.gets() == 2

    world.run(main)


def test_a_payload_that_is_wrong_twice_is_an_error_with_a_line_in_problems(world: World) -> None:
    """docs/semantics.md: On a mismatch they are fetched once more; when they are wrong again, the read answers EIO and
    the problem is reported."""
    damage(world, "f04", times=100)

    async def main() -> None:
        with pytest.raises(CorruptEntry, match=r"f04.*found a checksum") as caught:
            await world.payload("f04")
        assert errno_of(caught.value) == errno.EIO
        assert world.gets() == 2
        (line,) = world.problems.lines()
        assert KEY in line
        assert "f04" in line
        with pytest.raises(CorruptEntry):
            await world.payload("f04")
        assert len(world.problems.lines()) == 1

    world.run(main)


def test_damaged_neighbours_do_not_hurt(world: World) -> None:
    """Neighbours are a gift: a damaged one is known as such, and its own read says so."""
    damage(world, "f04", times=100)
    pieces: list[Piece] = []
    world.fetcher.on_piece = lambda container, piece: pieces.append(piece)

    async def main() -> None:
        assert await world.payload("f03") == FILES["f03"]
        assert await world.payload("f05") == FILES["f05"]
        assert world.gets() == 1
        assert world.problems.lines() == []
        assert [piece.bad for piece in pieces] == [{world.row("f04")}]
        with pytest.raises(CorruptEntry):
            await world.payload("f04")
        assert len(world.problems.lines()) == 1

    world.run(main)


def test_sha256_is_checked_where_there_is_no_crc32c(tmp_path: Path) -> None:
    (tmp_path / KEY).parent.mkdir()
    with DesWriter(tmp_path / KEY) as writer:
        writer.add_file("good", b"x", {"sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"})
        writer.add_file("bad", b"y", {"sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"})
        writer.add_file("none", b"z")
    world = World(tmp_path)

    async def main() -> None:
        assert await world.payload("good") == b"x"
        assert await world.payload("none") == b"z"
        with pytest.raises(CorruptEntry):
            await world.payload("bad")

    world.run(main)


def test_old_index_and_new_bytes_never_mix(apart: World) -> None:
    """Every GET carries the ETag that the index came from."""

    async def main() -> None:
        assert await apart.payload("f11") == APART["f11"]
        put_container(apart.root / KEY, {name: data[::-1] for name, data in APART.items()})
        with pytest.raises(ObjectReplaced):
            await apart.payload("f00")
        assert await apart.payload("f11") == APART["f11"]  # verified, and of that version
        (apart.root / KEY).unlink()
        with pytest.raises(NoSuchObject):
            await apart.payload("f01")

    apart.run(main)


# --- threads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stalled", ["fetch", "run"])
def test_payloads_that_stall_do_not_hold_up_listings_and_indexes(tmp_path: Path, stalled: str) -> None:
    """Metadata never waits for payloads, nor they for it: each has threads of its own."""
    store = WatchedStore(FileStore(tmp_path))
    threads = StoreThreads(store, limit=2)
    stall, other = (threads.fetch, threads.run) if stalled == "fetch" else (threads.run, threads.fetch)
    store.before = gate = Gate(lambda method, key: key != "free")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(stall, store.list, "stalled")
            await until(lambda: store.running == 2)
            assert (await other(store.list, "free")).objects == ()
            assert store.running == 2
            gate.open()

    trio.run(main)


def test_no_read_waits_for_ever(tmp_path: Path) -> None:
    """Every request has a deadline: a call that ends in none is given up."""
    put_container(tmp_path / KEY, FILES)
    world = World(tmp_path, deadline_s=0.05)
    world.store.before = gate = Gate()

    async def main() -> None:
        with pytest.raises(DeadlineExceeded):
            await world.payload("f00")
        gate.open()

    world.run(main)


@pytest.mark.parametrize("answers", [False, True])
def test_how_long_a_reader_waits(tmp_path: Path, answers: bool) -> None:
    """docs/semantics.md: When other requests were answered meanwhile, a read waits on, and answers EIO by twice the
    deadline.

    A silent store is given up at the deadline; the next read succeeds when the store is back."""
    put_container(tmp_path / KEY, APART)
    world = World(tmp_path, max_gap=0, deadline_s=100.0)
    row = world.row("f00")
    begin = int(world.container.loaded.index.data_offset[row])
    gate = Gate()

    def before(method: str, key: str) -> None:
        if world.store.ranges[-1][1] == begin:  # nobody answers for the first file; the others are read as usual
            gate(method, key)

    world.store.before = before
    clock = trio.testing.MockClock(rate=1.0)
    errors: list[DeadlineExceeded] = []

    async def reader() -> None:
        with pytest.raises(DeadlineExceeded) as caught:
            await world.payload("f00")
        errors.append(caught.value)

    async def later(seconds: float) -> None:
        clock.jump(seconds)
        await trio.testing.wait_all_tasks_blocked(0.01)

    async def main() -> None:
        async with trio.open_nursery() as fetching:
            await fetching.start(world.fetcher.run)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader)
                await until(lambda: gate.waiting == 1)
                if answers:
                    assert await world.payload("f11") == APART["f11"]
                await later(90)
                assert errors == []
                await later(100)  # 190 s: the deadline has passed
                assert len(errors) == (0 if answers else 1)
                await later(100)
            assert errno_of(errors[0]) == errno.EIO
            gate.open()
            world.store.before = lambda method, key: None
            await world.idle()
            assert await world.payload("f00") == APART["f00"]
            fetching.cancel_scope.cancel()

    trio.run(main, clock=clock)


# --- the cache ---------------------------------------------------------------------------------------------------


def piece(container: int, first: int, last: int, size: int, kind: int = SMALL) -> Piece:
    return Piece(container, kind, first, last, 0, b"x" * size)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(0, 5), st.integers(1, 3), st.integers(0, 60)),
            st.tuples(st.just("get"), st.integers(0, 8), st.just(0), st.just(0)),
            st.tuples(st.just("resize"), st.integers(0, 150), st.just(0), st.just(0)),
        ),
        max_size=40,
    )
)
def test_the_cache_never_holds_more_than_it_may_and_drops_what_was_used_longest_ago(
    steps: list[tuple[str, int, int, int]],
) -> None:
    cache, limit = PieceCache(100), 100
    kept: list[Piece] = []  # the model: least recently used first
    holders: dict[int, Piece] = {}

    def evict() -> None:
        while sum(len(each.data) for each in kept) > limit:
            gone = kept.pop(0)
            for place in [place for place, holder in holders.items() if holder is gone]:
                del holders[place]

    for step, number, count, size in steps:
        if step == "put":
            fresh = piece(1, number, number + count, size)
            cache.put(fresh)
            if size <= limit:
                kept.append(fresh)
                holders |= dict.fromkeys(range(number, number + count), fresh)
                kept = [each for each in kept if each in holders.values()]  # none of another's blocks twice
        elif step == "resize":
            limit = number
            cache.resize(limit)
        else:
            found = cache.get((1, SMALL, number))
            assert found is holders.get(number)
            if found is not None:
                kept.remove(found)
                kept.append(found)
        evict()
        assert cache.bytes == cache.bytes_of(1) == sum(len(each.data) for each in kept) <= limit
        assert len(cache) == len(kept)
        assert {place for place in range(9) if (1, SMALL, place) in cache} == set(holders)


def test_dropping_a_kind_leaves_the_others() -> None:
    cache = PieceCache(1000)
    for container in (1, 2):
        for kind in (SMALL, 5, 6):
            for number in range(3):
                cache.put(piece(container, number, number + 1, 10, kind))
    cache.drop(1, 5)
    cache.drop(9, 9)
    assert cache.bytes == 150
    assert {(container, kind) for container in (1, 2) for kind in (SMALL, 5, 6) if (container, kind, 1) in cache} == {
        (1, SMALL),
        (1, 6),
        (2, SMALL),
        (2, 5),
        (2, 6),
    }


def test_pieces_are_small_where_memory_is(tmp_path: Path) -> None:
    """A piece has to leave room for others in the cache."""
    put_container(tmp_path / KEY, {f"{n:02d}": bytes([n]) * BLOCK for n in range(40)})
    for memory, longest in ((64 << 20, PIECE), (4 << 20, 512 * 1024), (1 << 20, BLOCK), (0, BLOCK)):
        world = World(tmp_path, memory=memory)

        async def main(world: World = world) -> None:
            fetch_ahead(world, 0, len(world.container.blocks))
            assert await world.payload("39") == bytes([39]) * BLOCK

        world.run(main)
        assert max(stop - start for _, start, stop in world.store.ranges) <= longest
        assert isinstance(world.fetcher, Fetcher)
        assert world.problems.lines() == Problems().lines()
