"""docs/architecture.md, The read path: payloads that are in no block, and external objects."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from des_format import CorruptEntry, DesWriter
from des_format.blocks import BlockSummer
from des_format.layout import HEADER
from desfs.blocks import LARGE_PAYLOAD
from desfs.disk_cache import DiskCache
from desfs.errors import NoSuchObject, ObjectReplaced
from desfs.fetch import UNIT
from tests.mount.stores import meta_of, put_container
from tests.unit.containers import Item, build
from tests.unit.opened import DAY, KEY, Gate, World, until

NAME = "dir/big.bin"
EXTERNAL = f"{DAY}/_bigFiles/{NAME}"
MIB = 1 << 20
LARGE = Random(3).randbytes(LARGE_PAYLOAD + 32 * 1024 + 7)
OLD = Random(4).randbytes(3 * UNIT + 100)
NEW = bytes(reversed(OLD))
CHECKED = ("blocks", "whole")  # how META says what the bytes are
KINDS = (*CHECKED, "none")


def external_meta(data: bytes, kind: str) -> dict[str, object]:
    if kind == "none":
        return {}
    if kind == "whole":
        return meta_of(data)
    summer = BlockSummer(len(data))
    summer.update(data)
    return meta_of(data, **summer.meta())


def put_external(root: Path, data: bytes, key: str = EXTERNAL) -> None:
    """Put an object in its place, as a store does it: whole."""
    target = root / key
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name("fresh")
    fresh.write_bytes(data)
    fresh.rename(target)


def put_entry(root: Path, size: int, meta: dict[str, object], *, key: str | None = None) -> None:
    (root / DAY).mkdir(parents=True)
    with DesWriter(root / KEY, external_prefix=f"{DAY}/") as writer:
        writer.add_external(NAME, size, meta, key=key)


def external_world(
    root: Path, data: bytes, kind: str, *, memory: int = 64 * MIB, disk: DiskCache | None = None
) -> World:
    if not (root / KEY).exists():
        put_entry(root, len(data), external_meta(data, kind))
        put_external(root, data)
    return World(root, memory=memory, disk=disk)


def flip(world: World, data: bytes, at: int, times: int) -> None:
    """Flip the byte of a payload at a place, in the first so many answers that have it."""
    mark, left = data[at : at + 8], [times]
    wrong = bytes([mark[0] ^ 1]) + mark[1:]

    def change(method: str, key: str, answer: bytes) -> bytes:
        if mark in answer and left[0]:
            left[0] -= 1
            return answer.replace(mark, wrong)
        return answer

    world.store.change = change


# --- payloads in the container -----------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path) -> World:
    """A world with a large payload between small ones, and a cache for less than half of it."""
    put_container(tmp_path / KEY, {"before": b"b", "large": LARGE, "z": b"after"})
    return World(tmp_path, memory=8 * MIB)


def test_a_payload_larger_than_the_cache_is_fetched_twice_not_once_a_read(large: World) -> None:
    """A payload above 16 MiB is passed over once for its checksum, then served in units: it need not fit into the cache
    as a whole."""
    step = 128 * 1024  # of the kernel's sequential reads

    async def main() -> None:
        pieces = [await large.read("large", at, step) for at in range(0, len(LARGE), step)]
        assert b"".join(pieces) == LARGE
        assert sum(stop - start for _, start, stop in large.store.ranges) <= 2 * len(LARGE)
        assert large.fetcher.cache.bytes <= 8 * MIB
        assert await large.read("large", len(LARGE) - 3, 10) == LARGE[-3:]
        assert await large.read("large", UNIT - 5, 2 * UNIT) == LARGE[UNIT - 5 : 3 * UNIT - 5]
        assert (await large.read("before"), await large.read("z")) == (b"b", b"after")

    large.run(main)


def test_readers_of_a_large_payload_share_one_pass(tmp_path: Path) -> None:
    put_container(tmp_path / KEY, {"large": LARGE})
    large = World(tmp_path)
    found: list[bytes] = []

    async def reader() -> None:
        found.append(await large.read("large", 4 * UNIT, 10))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(reader)
        assert found == [LARGE[4 * UNIT :][:10]] * 5
        assert sum(stop - start for _, start, stop in large.store.ranges) == len(LARGE)

    large.run(main)


@pytest.mark.parametrize("at", [0, 2 * UNIT + 77, len(LARGE) - 8])
def test_no_byte_of_a_large_payload_is_served_when_one_is_wrong(large: World, at: int) -> None:
    """Verified as a whole before anybody sees a byte: EIO for every read, wherever the damage is, and one line in
    problems."""
    flip(large, LARGE, at, times=1000)

    async def main() -> None:
        for offset in (0, at, len(LARGE) - 1):
            with pytest.raises(CorruptEntry, match=r"large.*found a checksum"):
                await large.read("large", offset, 1)
        assert len(large.problems.lines()) == 1
        assert await large.read("z") == b"after"

    large.run(main)


@pytest.mark.parametrize("at", [0, len(LARGE) - 8])
def test_a_large_payload_that_is_wrong_in_the_first_pass_only_is_served(large: World, at: int) -> None:
    """A mismatch is fetched once more; nothing of the first pass is left in the cache."""
    flip(large, LARGE, at, times=1)

    async def main() -> None:
        assert await large.read("large", at, 8) == LARGE[at : at + 8]
        assert await large.read("large") == LARGE
        assert large.problems.lines() == []

    large.run(main)


@pytest.mark.parametrize(("times", "served"), [(1, True), (2, False)])
def test_a_unit_that_is_fetched_again_has_to_be_what_was_verified(large: World, times: int, served: bool) -> None:
    """docs/semantics.md: On a mismatch they are fetched once more; when they are wrong again, the read answers EIO and
    the problem is reported.

    Bytes with a checksum are verified before anybody sees them: also those of a unit that had left the cache."""

    async def main() -> None:
        assert await large.read("large") == LARGE
        large.fetcher.cache.drop(large.container.number, large.row("large"))
        flip(large, LARGE, 5, times=times)
        if served:
            assert await large.read("large", 0, 8) == LARGE[:8]
            assert large.problems.lines() == []
        else:
            with pytest.raises(CorruptEntry, match="not what was verified before"):
                await large.read("large", 0, 8)
            assert len(large.problems.lines()) == 1

    large.run(main)


def test_payloads_that_share_bytes_are_read_and_verified(tmp_path: Path) -> None:
    """A container may have two entries for the same bytes: the second one is in no block."""
    (tmp_path / DAY).mkdir()
    text = meta_text(b"0123456789")
    wrong = meta_text(b"something else")
    items = [
        Item(b"all", b"0123456789", text),
        Item(b"part", b"", meta_text(b"345"), data_offset=HEADER.size + 3, data_length=3),
        Item(b"twice", b"", text, data_offset=HEADER.size, data_length=10),
        Item(b"wrong", b"", wrong, data_offset=HEADER.size + 5, data_length=5),
    ]
    (tmp_path / KEY).write_bytes(build(items))
    world = World(tmp_path)

    async def main() -> None:
        assert await world.read("all") == await world.read("twice") == b"0123456789"
        assert await world.read("part") == b"345"
        assert await world.read("twice", 8, 100) == b"89"
        with pytest.raises(CorruptEntry):
            await world.read("wrong")

    world.run(main)


def meta_text(data: bytes) -> bytes:
    return b'{"crc32c":"%s"}' % str(meta_of(data)["crc32c"]).encode()


# --- external objects --------------------------------------------------------------------------------------------


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_an_external_file_is_read_from_where_the_rule_says(tmp_path: Path, kind: str) -> None:
    """External files: `{directory of the container's key}/_bigFiles/{entry name}`; a short READ reply is padded with
    zeros by the kernel: every byte up to the end of the file."""
    world = external_world(tmp_path, OLD, kind)

    async def main() -> None:
        at = UNIT - 10
        assert await world.read(NAME, at, 20) == OLD[at : at + 20]
        assert await world.read(NAME) == OLD
        for offset, size in ((len(OLD), 10), (len(OLD) + UNIT, 10), (5, 0), (len(OLD) - 1, 10)):
            assert await world.read(NAME, offset, size) == OLD[offset : offset + size]
        assert world.problems.lines() == []

    world.run(main)


@given(reads=st.lists(st.tuples(st.integers(0, len(OLD)), st.integers(0, 2 * UNIT)), min_size=1, max_size=6))
@settings(max_examples=15)
def test_any_reads_give_the_bytes_that_are_there(
    reads: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.getbasetemp() / "external-reads"
    world = external_world(root, OLD, "blocks", memory=8 * MIB)

    async def main() -> None:
        async def read(offset: int, size: int) -> None:
            assert await world.read(NAME, offset, size) == OLD[offset : offset + size]

        for each in reads:
            await read(*each)
        async with trio.open_nursery() as nursery:
            for each in reads:
                nursery.start_soon(read, *each)

    world.run(main)


def test_with_checksums_of_blocks_nobody_waits_for_the_whole(tmp_path: Path) -> None:
    world = external_world(tmp_path, OLD, "blocks")

    async def main() -> None:
        assert await world.read(NAME, 2 * UNIT + 5, 10) == OLD[2 * UNIT + 5 :][:10]
        assert world.store.ranges == [(EXTERNAL, 2 * UNIT, 3 * UNIT)]

    world.run(main)


@pytest.mark.parametrize("where", ["external", "in the container"])
def test_with_a_checksum_of_the_whole_alone_nobody_sees_a_byte_before_the_last_has_come(
    tmp_path: Path, where: str
) -> None:
    """docs/semantics.md: With a checksum of the whole alone, the first read waits until all of the file has been read
    once."""
    if where == "external":
        world, name, data = external_world(tmp_path, OLD, "whole"), NAME, OLD
    else:
        put_container(tmp_path / KEY, {"large": LARGE})
        world, name, data = World(tmp_path), "large", LARGE
    came = 0

    def count(method: str, key: str, answer: bytes) -> bytes:
        nonlocal came
        came += len(answer)
        return answer

    world.store.change = count

    async def main() -> None:
        assert await world.read(name, 5, 10) == data[5:15]
        assert came == len(data)
        assert await world.read(name) == data
        assert came == len(data)

    world.run(main)


def test_what_has_no_checksum_is_shown_as_it_is(tmp_path: Path) -> None:
    """docs/semantics.md: Only files without any checksum are shown as they are."""
    put_external(tmp_path, OLD)
    small = Random(7).randbytes(100)
    with DesWriter(tmp_path / KEY, external_prefix=f"{DAY}/") as writer:
        writer.add_file("small", small)
        writer.add_file("checked", small[::-1], meta_of(small[::-1]))
        writer.add_external(NAME, len(OLD))
    world = World(tmp_path)

    def change(method: str, key: str, answer: bytes) -> bytes:
        return answer.replace(small, small.upper()).replace(small[::-1], bytes(100)).replace(OLD[:8], b"8 others")

    world.store.change = change

    async def main() -> None:
        assert await world.read("small") == small.upper() != small
        assert await world.read(NAME) == b"8 others" + OLD[8:]
        with pytest.raises(CorruptEntry):
            await world.read("checked")

    world.run(main)


@pytest.mark.parametrize("at", [0, UNIT + 77, len(OLD) - 8])
@pytest.mark.parametrize("kind", CHECKED)
def test_a_wrong_byte_of_an_external_object_is_never_returned(tmp_path: Path, kind: str, at: int) -> None:
    """External files with a checksum: a wrong byte is fetched once more, then EIO with a line in problems; with
    checksums of blocks the other blocks can be read."""
    world = external_world(tmp_path, OLD, kind)
    flip(world, OLD, at, times=1000)

    async def main() -> None:
        for unit in range(4):
            read = world.read(NAME, unit * UNIT, 50)
            if kind == "whole" or at // UNIT == unit:
                with pytest.raises(CorruptEntry, match=r"big\.bin"):
                    await read
            else:
                assert await read == OLD[unit * UNIT :][:50]
        assert len(world.problems.lines()) == 1

    world.run(main)


@pytest.mark.parametrize("kind", CHECKED)
def test_a_byte_that_is_wrong_once_is_fetched_again_and_nowhere_kept(tmp_path: Path, kind: str) -> None:
    """The way's fault: the file is served, and no cache has the wrong byte, on disk neither."""

    def mount() -> World:
        return external_world(tmp_path / "store", OLD, kind, disk=DiskCache(tmp_path / "cache", 1 << 30))

    first, second = mount(), mount()
    flip(first, OLD, UNIT + 5, times=1)

    async def read(world: World) -> None:
        assert await world.read(NAME) == OLD
        assert world.problems.lines() == []

    first.run(lambda: read(first))
    second.run(lambda: read(second))
    assert second.gets() <= 1  # that tells the object's version


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_on_disk_is_fetched_from_the_store(tmp_path: Path, kind: str) -> None:
    """A wrong byte in the disk cache is never returned."""

    def mount() -> World:
        return external_world(tmp_path / "store", OLD, kind, disk=DiskCache(tmp_path / "cache", 1 << 30))

    first, second = mount(), mount()

    async def read(world: World) -> None:
        assert await world.read(NAME) == OLD
        assert world.problems.lines() == []

    first.run(lambda: read(first))
    flipped = 0
    for path in (tmp_path / "cache").rglob("*.data"):
        raw = bytearray(path.read_bytes())
        at = raw.find(OLD[2 * UNIT : 2 * UNIT + 16])
        if at >= 0:
            raw[at + 3] ^= 1
            path.write_bytes(raw)
            flipped += 1
    assert flipped == 1
    second.run(lambda: read(second))
    assert 2 * UNIT in [start for _, start, _ in second.store.ranges]
    assert second.gets() <= 2  # one tells the version


def test_large_payloads_are_kept_on_disk_too(tmp_path: Path) -> None:
    put_container(tmp_path / "store" / KEY, {"large": LARGE})
    first, second = (World(tmp_path / "store", disk=DiskCache(tmp_path / "cache", 1 << 30)) for _ in range(2))

    async def read(world: World) -> None:
        assert await world.read("large") == LARGE

    first.run(lambda: read(first))
    second.run(lambda: read(second))
    assert second.gets() == 0


def test_a_recorded_key_in_a_folder_for_big_files_is_honoured(tmp_path: Path) -> None:
    """`external_key`: used only if it lies in a `_bigFiles/` folder of the store and ends in the entry's name."""
    elsewhere = f"2026-11-19/_bigFiles/{NAME}"
    put_entry(tmp_path, 9, meta_of(b"elsewhere"), key=elsewhere)
    put_external(tmp_path, b"elsewhere", elsewhere)
    world = World(tmp_path)

    async def main() -> None:
        assert await world.read(NAME) == b"elsewhere"

    world.run(main)


@pytest.mark.parametrize("found", [None, b"", b"shor", b"longer"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_external_object_that_is_missing_or_has_another_size_is_an_error(
    tmp_path: Path, kind: str, found: bytes | None
) -> None:
    """docs/semantics.md: The size of an external file is checked always.

    An external object that is missing, or whose size differs from the index: EIO, reported."""
    put_entry(tmp_path, 5, external_meta(b"right", kind), key="../outside")
    if found is not None:
        put_external(tmp_path, found)
    world = World(tmp_path)

    async def main() -> None:
        with pytest.raises(CorruptEntry, match="external object"):
            await world.read(NAME)
        assert any("big.bin" in line for line in world.problems.lines())

    world.run(main)


@pytest.mark.parametrize(
    "meta", [{}, meta_of(b""), {"sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}]
)
def test_an_empty_external_file_is_checked_too(tmp_path: Path, meta: dict[str, object]) -> None:
    put_entry(tmp_path, 0, meta)
    world = World(tmp_path)

    async def main() -> None:
        with pytest.raises(CorruptEntry, match="missing"):
            await world.read(NAME)
        put_external(tmp_path, b"")
        assert await world.read(NAME) == b""
        assert await world.read(NAME, 10, 10) == b""

    world.run(main)


@pytest.mark.parametrize("size", [2**62, 2**63 - 1])
@pytest.mark.parametrize("kind", CHECKED)
def test_an_entry_that_claims_exabytes_costs_nothing(tmp_path: Path, kind: str, size: int) -> None:
    """What is done about an object that was replaced, or is not what the entry says, goes by what is in memory."""
    put_entry(tmp_path, size, external_meta(b"small", kind))
    put_external(tmp_path, b"small")
    world = World(tmp_path)
    row = world.row(NAME)

    async def main() -> None:
        for offset in (0, size // 2, size - 1):
            with pytest.raises(CorruptEntry):
                await world.read(NAME, offset, 10)
        world.container.externals[row] = "another version"
        with pytest.raises(ObjectReplaced):
            await world.read(NAME, 0, 10)
        assert row not in world.container.externals

    world.run(main)


# --- replaced ----------------------------------------------------------------------------------------------------


async def settled(world: World) -> bytes:
    """The whole file, after the errors of fetches that were under way ahead of a reader when it was replaced."""
    for _ in range(5):
        try:
            return await world.read(NAME)
        except (ObjectReplaced, CorruptEntry):
            continue
    return await world.read(NAME)


def test_a_replaced_external_object_is_stale_and_then_the_new_one(tmp_path: Path) -> None:
    """docs/semantics.md: An external object without a checksum that is replaced while its container stays is noticed
    when more of it is fetched: until then its readers see the old version.

    Then one version of it or an error, never two in one; and the error is not for ever."""
    world = external_world(tmp_path, OLD, "none")

    async def main() -> None:
        assert await world.read(NAME, 0, 10) == OLD[:10]
        put_external(tmp_path, NEW)
        assert await world.read(NAME, 0, 10) == OLD[:10]
        with pytest.raises(ObjectReplaced):
            await world.read(NAME, 3 * UNIT, 10)
        assert await settled(world) == NEW
        (tmp_path / EXTERNAL).unlink()
        assert await world.read(NAME) == NEW  # from memory, of one version
        world.fetcher.cache.drop(world.container.number, world.row(NAME))
        with pytest.raises(CorruptEntry, match="missing"):
            await world.read(NAME)

    world.run(main)


def test_a_read_over_several_units_is_of_one_version(tmp_path: Path) -> None:
    """docs/semantics.md: No read returns bytes of two versions.

    Replaced in the middle of a read: an error, not a mixture."""
    world = external_world(tmp_path, OLD, "none")

    def replace(method: str, key: str, data: bytes) -> bytes:
        if data[:10] == OLD[:10]:
            put_external(tmp_path, NEW)
        return data

    world.store.change = replace

    async def main() -> None:
        with pytest.raises(ObjectReplaced):
            await world.read(NAME)
        world.store.change = lambda method, key, data: data
        assert await settled(world) == NEW

    world.run(main)


@pytest.mark.parametrize("kind", CHECKED)
def test_what_takes_the_place_of_a_verified_object_is_verified_too(tmp_path: Path, kind: str) -> None:
    """docs/semantics.md: One with a checksum answers EIO when what has taken its place does not match it."""
    world = external_world(tmp_path, OLD, kind)

    async def main() -> None:
        assert await world.read(NAME) == OLD
        put_external(tmp_path, NEW)
        assert await world.read(NAME) == OLD  # from memory
        world.fetcher.cache.drop(world.container.number, world.row(NAME))
        with pytest.raises(ObjectReplaced):
            await world.read(NAME, 0, 10)
        with pytest.raises(CorruptEntry):
            await world.read(NAME, 0, 10)
        put_external(tmp_path, OLD)
        assert await settled(world) == OLD

    world.run(main)


def test_a_unit_of_the_old_version_in_memory_never_stands_beside_the_new_one(tmp_path: Path) -> None:
    """A fetch that was under way when its object was replaced may leave a unit of the old version behind."""
    world = external_world(tmp_path, OLD, "none")
    row = world.row(NAME)

    async def main() -> None:
        assert await world.read(NAME, 0, 10) == OLD[:10]
        await world.idle()
        put_external(tmp_path, NEW)
        # As if another reader had found out, and read the new version, while unit 0 was still on its way.
        version = world.container.externals.pop(row)
        assert await world.read(NAME, 3 * UNIT, 10) == NEW[3 * UNIT :][:10]
        assert world.container.externals[row] != version
        assert await settled(world) == NEW

    world.run(main)


@pytest.mark.parametrize("last", ["old", "new"])
def test_two_first_reads_of_an_external_object_that_is_replaced_between_them(tmp_path: Path, last: str) -> None:
    """docs/semantics.md: No read returns bytes of two versions.

    The first reads name no version: whichever answer comes second must be of the same."""
    world = external_world(tmp_path, OLD, "none")
    gates = {"old": Gate(), "new": Gate()}

    def change(method: str, key: str, data: bytes) -> bytes:
        gates["old" if data[:10] in OLD else "new"](method, key)
        return data

    world.store.change = change
    found: dict[str, bytes | ObjectReplaced] = {}

    async def reader(version: str, offset: int) -> None:
        try:
            found[version] = await world.read(NAME, offset, 10)
        except ObjectReplaced as error:
            found[version] = error

    async def main() -> None:
        first = ({"old", "new"} - {last}).pop()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader, "old", 2 * UNIT)
            await until(lambda: gates["old"].waiting > 0)
            put_external(tmp_path, NEW)
            nursery.start_soon(reader, "new", 3 * UNIT)
            await until(lambda: gates["new"].waiting > 0)
            gates[first].open()
            await until(lambda: first in found)
            gates[last].open()
        assert found[first] == (NEW[3 * UNIT :] if first == "new" else OLD[2 * UNIT :])[:10]
        assert isinstance(found[last], ObjectReplaced)
        assert await settled(world) == NEW

    world.run(main)


def test_a_container_that_went_is_an_error(tmp_path: Path) -> None:
    put_container(tmp_path / KEY, {"large": LARGE})
    world = World(tmp_path)

    async def main() -> None:
        (tmp_path / KEY).unlink()
        with pytest.raises(NoSuchObject):
            await world.read("large", 0, 10)

    world.run(main)


# --- ahead of a reader -------------------------------------------------------------------------------------------

LONG = 30 * UNIT


def long_world(tmp_path: Path, max_prefetch: int) -> World:
    """An external file of 120 MiB, of zeros: a hole on disk."""
    put_entry(tmp_path, LONG, {})
    put_external(tmp_path, b"")
    with open(tmp_path / EXTERNAL, "r+b") as file:
        file.truncate(LONG)
    return World(tmp_path, memory=64 * MIB, max_prefetch=max_prefetch)


@pytest.mark.parametrize("max_prefetch", [UNIT, 4 * UNIT, 64 * MIB])
def test_a_reader_who_walks_forward_is_given_twice_as_much_with_each_unit_up_to_a_limit(
    tmp_path: Path, max_prefetch: int
) -> None:
    world = long_world(tmp_path, max_prefetch)
    most = 0

    def asked() -> int:
        return max(stop for _, _, stop in world.store.ranges)

    async def main() -> None:
        nonlocal most
        for at in range(0, LONG, UNIT):
            await world.read(NAME, at, UNIT)
            most = max(most, asked() - at - UNIT)
        assert most <= max(min(max_prefetch, 16 * MIB), UNIT)  # a quarter of the memory
        assert sum(stop - start for _, start, stop in world.store.ranges) == LONG  # each byte once
        assert world.gets() <= LONG // UNIT

    world.run(main)
    assert most > 0


def test_a_reader_who_jumps_is_given_what_he_asks_for(tmp_path: Path) -> None:
    world = long_world(tmp_path, 64 * MIB)

    async def main() -> None:
        places = [5, 20, 11, 28, 2, 16]
        for number in places:
            await world.read(NAME, number * UNIT + 5, 100)
        assert sorted(start // UNIT for _, start, _ in world.store.ranges) == sorted(places)

    world.run(main)


def test_of_units_that_come_together_the_damaged_one_alone_is_an_error(tmp_path: Path) -> None:
    """docs/semantics.md: External files that have the checksums of their blocks are verified block by block.

    Also where several blocks are fetched at a time."""
    data = Random(5).randbytes(12 * UNIT)
    world = external_world(tmp_path, data, "blocks", memory=256 * MIB)
    damaged = 6
    flip(world, data, damaged * UNIT + 77, times=1 << 30)

    async def main() -> None:
        failed = []
        for number in range(12):
            try:
                assert await world.read(NAME, number * UNIT, UNIT) == data[number * UNIT : (number + 1) * UNIT]
            except CorruptEntry:
                failed.append(number)
        assert failed == [damaged]
        together = [(start, stop) for _, start, stop in world.store.ranges if start <= damaged * UNIT < stop - UNIT]
        assert together, "the damaged unit was never fetched with others"
        assert len(world.problems.lines()) == 1

    world.run(main)


def test_a_damaged_unit_ahead_is_not_fetched_with_every_read(tmp_path: Path) -> None:
    data = Random(6).randbytes(12 * UNIT)
    world = external_world(tmp_path, data, "blocks", memory=256 * MIB)
    flip(world, data, 8 * UNIT + 1, times=1 << 30)

    async def main() -> None:
        for at in range(0, 8 * UNIT, 128 * 1024):
            assert await world.read(NAME, at, 128 * 1024) == data[at : at + 128 * 1024]
        await world.idle()
        assert sum(stop - start for _, start, stop in world.store.ranges) <= 2 * len(data)
        with pytest.raises(CorruptEntry):
            await world.read(NAME, 8 * UNIT, 10)
        assert await world.read(NAME, 9 * UNIT, 10) == data[9 * UNIT : 9 * UNIT + 10]

    world.run(main)
