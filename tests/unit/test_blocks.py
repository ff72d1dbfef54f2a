"""Checksums of the blocks of external payloads: taken by writers, kept by columns, held against what is read."""

from __future__ import annotations

import base64
import io
import itertools
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from des_format import CorruptEntry, DesReader, DesWriter, Index, SizeMismatch
from des_format.blocks import (
    BLOCK,
    MAX_BLOCK,
    META_KEY,
    BlockChecksums,
    BlockSummer,
    block_bounds,
    block_count,
    block_size_for,
    parse_blocks,
)
from des_format.codec import build_record, encode_meta
from des_format.layout import EXTERNAL, HEADER, MAX_META, Footer
from des_format.meta import MetaColumns, _Keys
from tests.unit.containers import Item, build, footer_of

TIB = 2**40
PAYLOAD = random.Random(1).randbytes(BLOCK // 4 + 1) * 13  # three blocks and a bit


def blocks_of(payload: bytes, block_size: int = BLOCK) -> list[bytes]:
    return [payload[at : at + block_size] for at in range(0, len(payload), block_size)]


def values_of(payload: bytes) -> bytes:
    return b"".join(google_crc32c.value(each).to_bytes(4, "little") for each in blocks_of(payload))


def columns_of(*items: Item) -> tuple[Index, MetaColumns]:
    raw = build(items)
    footer = footer_of(raw)
    index = Index(raw[footer.index_start :][: footer.index_length], footer, "f.des")
    columns = MetaColumns(index.rows)
    columns.fill(index, raw[footer.meta_start :][: footer.meta_length], footer.meta_start)
    return index, columns


def external(name: bytes, size: int, meta: bytes) -> Item:
    return Item(name, meta=meta, flags=EXTERNAL, data_offset=0, data_length=size)


# --- taken -------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.sampled_from([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 3 * BLOCK + 5, len(PAYLOAD)]),
    st.lists(st.integers(0, len(PAYLOAD)), max_size=6),
    st.booleans(),
)
def test_a_block_has_its_checksum_however_the_payload_came_in(size: int, cuts: list[int], views: bool) -> None:
    """`crc32c_blocks`: the CRC-32C of each block in the payload's order, the last one of what is left."""
    payload = PAYLOAD[:size]
    summer = BlockSummer(size)
    for start, stop in itertools.pairwise([0, *sorted(cuts), len(PAYLOAD)]):
        summer.update(memoryview(payload)[start:stop] if views else payload[start:stop])
    checksums = summer.checksums()
    assert (checksums.block_size, bytes(checksums.crc32c)) == (BLOCK, values_of(payload))
    assert checksums.fits(size)
    for number, block in enumerate(blocks_of(payload)):
        checksums.check(number, block)
        checksums.check(number, memoryview(block))


def test_a_payload_of_one_block_needs_no_checksums_of_blocks() -> None:
    """The checksum of its block is `crc32c`."""
    for size in (0, 1, BLOCK):
        summer = BlockSummer(size)
        summer.update(PAYLOAD[:size])
        assert summer.meta() == {}
    summer = BlockSummer(BLOCK + 1)
    summer.update(PAYLOAD[: BLOCK + 1])
    assert summer.meta() == {
        "crc32c_blocks": {"size": 4194304, "values": base64.b64encode(values_of(PAYLOAD[: BLOCK + 1])).decode()}
    }


@pytest.mark.parametrize(("taken", "size"), [(0, 1), (1, 0), (BLOCK, BLOCK + 1), (BLOCK + 1, BLOCK), (9, 2 * BLOCK)])
def test_a_payload_of_another_size_has_no_checksums(taken: int, size: int) -> None:
    summer = BlockSummer(size)
    summer.update(PAYLOAD[:taken])
    with pytest.raises(SizeMismatch, match=f"had {taken} bytes, want {size}"):
        summer.meta()


@given(st.integers(0, 2**64 - 1))
def test_checksums_of_blocks_leave_room_in_meta(size: int) -> None:
    """The block size is a multiple of 4 MiB, 4 MiB itself wherever the checksums fit into four fifths of META."""
    block_size = block_size_for(size)
    assert block_size % BLOCK == 0
    base64_length = -(-4 * block_count(size, block_size) // 3) * 4
    assert base64_length <= MAX_META * 4 // 5 + 4
    if block_size > BLOCK:
        assert block_count(size, block_size - BLOCK) * 4 * 8 // 6 > MAX_META * 4 // 5 - 16


@pytest.mark.parametrize(
    ("size", "block_size"), [(0, BLOCK), (1, BLOCK), (5 * TIB, BLOCK), (6 * TIB, BLOCK), (6 * TIB + 1, 2 * BLOCK)]
)
def test_meta_of_the_largest_files(size: int, block_size: int) -> None:
    """At most 10 MiB per entry: also for a file of 5 TiB, and one of 96 TiB."""
    assert block_size_for(size) == block_size
    checksums = BlockChecksums(block_size, b"\xff" * 4 * block_count(size, block_size))
    encoded = encode_meta({META_KEY: checksums.meta(), "original_name": "n" * 4000}, size, "k" * 4000)
    assert len(encoded) < MAX_META
    _, columns = columns_of(external(b"a", size, encoded))
    assert columns.external_blocks == {0: checksums}
    assert not columns.damaged[0]
    assert block_size_for(96 * TIB) == MAX_BLOCK


def test_beyond_the_longest_block_there_are_none() -> None:
    class Counted(BlockSummer):
        def checksums(self) -> BlockChecksums:
            return BlockChecksums(self._block_size, b"")

    assert META_KEY in Counted(96 * TIB).meta()
    assert Counted(96 * TIB + 1).meta() == {}


# --- held against what is read --------------------------------------------------------------------------------------


@given(st.integers(0, 2**50), st.integers(1, 16).map(lambda n: n * BLOCK), st.data())
def test_blocks_cover_a_payload_once(size: int, block_size: int, data: st.DataObject) -> None:
    count = block_count(size, block_size)
    for number in (-1, count):
        with pytest.raises(IndexError, match=f"block {number} of {count}"):
            block_bounds(size, block_size, number)
    if count:
        number = data.draw(st.integers(0, count - 1))
        start, stop = block_bounds(size, block_size, number)
        assert start == number * block_size
        assert start < stop <= size
        assert stop - start == block_size or (number == count - 1 and stop == size)
        assert (number == count - 1) == (stop == size)


@settings(max_examples=40)
@given(st.integers(0, 3), st.integers(0, BLOCK), st.integers(1, 255))
def test_a_changed_byte_a_missing_byte_and_another_block_are_found(number: int, at: int, change: int) -> None:
    """Raises CorruptEntry, with the payload, the block, its place and both checksums."""
    checksums = BlockChecksums(BLOCK, values_of(PAYLOAD))
    blocks = blocks_of(PAYLOAD)
    block = bytearray(blocks[number])
    checksums.check(number, block)
    block[at % len(block)] ^= change
    for wrong in (bytes(block), blocks[number][:-1], blocks[number] + b"\0", b"", blocks[(number + 1) % 4]):
        with pytest.raises(CorruptEntry, match=rf"^film: block {number} at byte {number * BLOCK}: found .*, want"):
            checksums.check(number, wrong, "film")


def test_checksums_may_be_a_view() -> None:
    """As an index that is mapped has them."""
    checksums = BlockChecksums(BLOCK, np.frombuffer(b"x" + values_of(PAYLOAD), np.uint8)[1:].data)
    assert checksums == BlockChecksums(BLOCK, values_of(PAYLOAD))
    assert checksums.fits(len(PAYLOAD))
    assert checksums.meta() == BlockChecksums(BLOCK, values_of(PAYLOAD)).meta()
    for number, block in enumerate(blocks_of(PAYLOAD)):
        checksums.check(number, block)
        with pytest.raises(CorruptEntry):
            checksums.check(number, block[1:])


@pytest.mark.parametrize("number", [-1, 4, 2**70])
def test_there_is_no_such_block(number: int) -> None:
    with pytest.raises(IndexError):
        BlockChecksums(BLOCK, values_of(PAYLOAD)).check(number, b"")


# --- in metadata -----------------------------------------------------------------------------------------------------


def test_the_key_has_one_name() -> None:
    assert META_KEY in _Keys.__struct_fields__


@given(st.integers(1, 16).map(lambda n: n * BLOCK), st.lists(st.integers(0, 2**32 - 1)))
def test_what_is_written_is_parsed_back(block_size: int, values: list[int]) -> None:
    checksums = BlockChecksums(block_size, b"".join(each.to_bytes(4, "little") for each in values))
    assert parse_blocks(json.dumps(checksums.meta()).encode()) == checksums


FOUR = base64.b64encode(bytes(16)).decode()


@pytest.mark.parametrize(
    "value",
    [
        None,
        "text",
        7,
        True,
        [],
        {},
        [BLOCK, FOUR],
        {"size": BLOCK},
        {"values": FOUR},
        {"size": "4194304", "values": FOUR},
        {"size": 4194304.0, "values": FOUR},
        {"size": True, "values": FOUR},
        {"size": None, "values": FOUR},
        {"size": BLOCK, "values": [0, 0, 0, 0]},
        {"size": BLOCK, "values": None},
    ],
    ids=ascii,
)
def test_a_value_of_another_form_is_an_applications_own(value: Any) -> None:
    """Any other keys belong to the application: what it keeps under the name is no damage."""
    index, columns = columns_of(external(b"a", 4 * BLOCK, encode_meta({"k": 1, META_KEY: value}, 4 * BLOCK)))
    assert columns.external_blocks == {}
    assert not columns.damaged[0]
    assert columns.block_checksums(index, 0) is None


@pytest.mark.parametrize(
    "value",
    [
        {"size": 0, "values": FOUR},
        {"size": -BLOCK, "values": FOUR},
        {"size": 1, "values": FOUR},
        {"size": BLOCK + 1, "values": FOUR},
        {"size": 2 * BLOCK, "values": FOUR},
        {"size": MAX_BLOCK + BLOCK, "values": "AAAAAA=="},
        {"size": 2**62, "values": "AAAAAA=="},
        {"size": 10**400, "values": "AAAAAA=="},
        {"size": BLOCK, "values": ""},
        {"size": BLOCK, "values": FOUR[:-1]},
        {"size": BLOCK, "values": FOUR.strip("=")},
        {"size": BLOCK, "values": FOUR[:-4]},
        {"size": BLOCK, "values": FOUR + "AAAA"},
        {"size": BLOCK, "values": FOUR + "\n"},
        {"size": BLOCK, "values": "ä" * 24},
        {"size": BLOCK, "values": "-_" * 12},
        {"size": BLOCK, "values": base64.b64encode(bytes(15)).decode()},
        {"size": BLOCK, "values": base64.b64encode(bytes(20)).decode()},
    ],
    ids=ascii,
)
def test_checksums_that_the_payload_cannot_have_are_damage(value: Any) -> None:
    """Reported as damaged metadata; the other keys hold, so the bytes are found and verified as a whole."""
    meta = encode_meta({"mode": 0o600, "crc32c": "0000002a", META_KEY: value}, 4 * BLOCK, "x/_bigFiles/a")
    index, columns = columns_of(external(b"a", 4 * BLOCK, meta), Item(b"b", b"x"))
    assert columns.damaged.tolist() == [True, False]
    assert columns.external_blocks == {}
    assert columns.block_checksums(index, 0) is None
    assert columns.external_key == {0: "x/_bigFiles/a"}
    assert (columns.mode[0], columns.crc32c[0], columns.has_crc32c[0]) == (0o600, 42, True)


def test_only_external_entries_have_them() -> None:
    meta = encode_meta({META_KEY: {"size": BLOCK, "values": "AAAAAA=="}, "crc32c": "00000000"}, 3)
    index, columns = columns_of(Item(b"a", b"abc", meta), external(b"b", 3, meta))
    assert set(columns.external_blocks) == {1}
    assert columns.block_checksums(index, 0) is None


@pytest.mark.parametrize(("size", "found"), [(0, True), (5, True), (BLOCK, True), (BLOCK + 1, False)])
def test_the_checksum_of_a_payload_of_one_block_is_that_of_its_block(size: int, found: bool) -> None:
    payload = PAYLOAD[:size]
    meta = encode_meta({"crc32c": f"{google_crc32c.value(payload):08x}"}, size)
    index, columns = columns_of(external(b"a", size, meta), external(b"b", size, b'{"size":%d}' % size))
    checksums = columns.block_checksums(index, 0)
    assert (checksums is not None) is found
    if checksums is not None:
        checksums.check(0, payload)
        with pytest.raises(CorruptEntry):
            checksums.check(0, payload + b"x")
    assert columns.block_checksums(index, 1) is None


SIZES = [b"4194304", b"8388608", b"0", b"-1", b"1e400", b"99999999999999999999", b"null", b'"x"']
VALUES = [b'"AAAAAA=="', b'"AAAA"', b'"\\u0041AAAAA=="', b'"\\ud800"', b'"\xff"']
JSON_BYTES = st.one_of(
    st.binary(max_size=30),
    st.builds(
        lambda size, values: b'{"crc32c_blocks":{"size":%b,"values":%b}}' % (size, values),
        st.sampled_from(SIZES),
        st.one_of(st.binary(max_size=20), st.sampled_from(VALUES)),
    ),
    st.just(b'{"crc32c_blocks":' + b"[" * 100_000),
)


@given(st.lists(JSON_BYTES, min_size=1, max_size=4), st.sampled_from([0, 3, BLOCK, BLOCK + 1, 2**64 - 1]))
def test_no_metadata_makes_the_columns_fail(metas: list[bytes], size: int) -> None:
    index, columns = columns_of(*(external(b"%d" % n, size, meta) for n, meta in enumerate(metas)))
    for row in range(index.rows):
        checksums = columns.block_checksums(index, row)
        if checksums is not None:
            assert checksums.fits(size)
            checksums.check(0, b"")  # a checksum of 0, as all here


# --- containers that are out to cost time or memory ------------------------------------------------------------------


def shared(meta: bytes, rows: int, size: int) -> tuple[Index, bytes]:
    """Rows that all have the same metadata."""
    start = HEADER.size
    records = b"".join(build_record(b"%d" % row, 0, size, start, len(meta), EXTERNAL) for row in range(rows))
    footer = Footer(start, 0, start, len(meta), start + len(meta), len(records), rows)
    return Index(records, footer, "f.des"), meta


@pytest.mark.parametrize(
    ("meta", "damaged"),
    [
        (encode_meta({META_KEY: {"size": BLOCK, "values": "A" * 6_000_000}}, 5), True),
        (encode_meta({META_KEY: {"size": BLOCK, "values": "A" * 5_999_999 + "!"}}, 5), True),
        (encode_meta({META_KEY: "A" * 6_000_000}, 5), False),
        (encode_meta({}, 5, "k" * 6_000_000), False),
        (b'{"mtime":' + b"1" * 6_000_000 + b"}", False),
        (b'{"sha256":"' + b"1" * 6_000_000 + b'"}', False),
        (b'{"no object"' + b" " * 6_000_000, True),
    ],
    ids=["values", "no Base64", "another's", "external_key", "mtime", "sha256", "no JSON"],
)
def test_metadata_that_many_rows_share_is_looked_at_once(meta: bytes, damaged: bool) -> None:
    """A container is never trusted with memory or time: 5,000 times 6 MB would be more than either."""
    index, raw = shared(meta, 5000, 5)
    columns = MetaColumns(index.rows)
    tracemalloc.start()
    try:
        columns.fill(index, raw, HEADER.size)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * 2**20
    assert set(columns.damaged.tolist()) == {damaged}


def test_no_container_has_more_checksums_than_payloads_could_need() -> None:
    """What goes beyond 64 MiB is taken for damaged; the rows before it keep theirs."""
    size = TIB
    values = base64.b64encode(bytes(size // BLOCK * 4)).decode()
    index, columns = columns_of(
        *(
            external(b"%d" % n, size, encode_meta({META_KEY: {"size": BLOCK, "values": values}}, size))
            for n in range(70)
        )
    )
    kept = sum(len(each.crc32c) for each in columns.external_blocks.values())
    assert 62 * 2**20 < kept <= 65 * 2**20
    assert columns.damaged.tolist() == [row not in columns.external_blocks for row in range(70)]
    assert columns.block_checksums(index, 69) is None


# --- from the writer to the columns --------------------------------------------------------------------------------


def read_columns(path: Path) -> tuple[Index, MetaColumns]:
    with DesReader(path) as reader:
        index = reader.get_index()
    columns = MetaColumns(index.rows)
    columns.fill(
        index, path.read_bytes()[index.footer.meta_start :][: index.footer.meta_length], index.footer.meta_start
    )
    return index, columns


def test_the_writer_takes_them_of_what_it_reads(tmp_path: Path) -> None:
    """An external payload of more than one block has `crc32c_blocks` behind the application's keys; others do not."""
    path = tmp_path / "f.des"
    with DesWriter(path) as writer:
        writer.add_file("memory", PAYLOAD, {"k": 1}, force_external=True)
        writer.add_stream("stream", io.BytesIO(PAYLOAD), len(PAYLOAD), lambda: {"k": 1}, force_external=True)
        writer.add_file("no keys", PAYLOAD, force_external=True)
        writer.add_file("short", PAYLOAD[:BLOCK], {"k": 1}, force_external=True)
        writer.add_file("internal", PAYLOAD, {"k": 1})
        writer.add_file("own", PAYLOAD, {META_KEY: "my own"}, force_external=True)
        writer.add_external("elsewhere", len(PAYLOAD), {"k": 1})
    want = {"size": BLOCK, "values": base64.b64encode(values_of(PAYLOAD)).decode()}
    size = {"size": len(PAYLOAD)}
    wanted: dict[str, dict[str, Any]] = {
        "memory": {"k": 1, META_KEY: want} | size,
        "stream": {"k": 1, META_KEY: want} | size,
        "no keys": {META_KEY: want} | size,
        "short": {"k": 1, "size": BLOCK},
        "own": {META_KEY: "my own"} | size,
        "elsewhere": {"k": 1} | size,
    }
    with DesReader(path) as reader:
        for name, meta in wanted.items():
            in_order = [*meta.items(), ("is_external", True), ("external_key", f"_bigFiles/{name}")]
            assert list(reader.get_meta(name).items()) == in_order
        assert reader.get_meta("internal") == {"k": 1} | size
        assert reader.get_file("memory") == reader.get_file("stream") == PAYLOAD
    index, columns = read_columns(path)
    assert {index.entry(row).name for row in columns.external_blocks} == {"memory", "stream", "no keys"}
    for checksums in columns.external_blocks.values():
        for number, block in enumerate(blocks_of(PAYLOAD)):
            checksums.check(number, block)
    assert not columns.damaged.any()


def test_an_applications_metadata_goes_before_the_checksums(tmp_path: Path) -> None:
    """At most 10 MiB per entry: where the application has used them up, there are no checksums of blocks."""
    path = tmp_path / "f.des"
    with DesWriter(path) as writer:
        full = {"k": "x" * (MAX_META - len(encode_meta({"k": ""}, len(PAYLOAD), "_bigFiles/a")))}
        writer.add_file("a", PAYLOAD, full, force_external=True)
    _, columns = read_columns(path)
    assert columns.external_blocks == {}
    assert not columns.damaged.any()
