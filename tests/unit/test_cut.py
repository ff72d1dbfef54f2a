"""How the payloads of a container are cut into blocks, whatever the container claims."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from des_format.index import BAD_DATA, BAD_FLAGS, TOMBSTONE, Index
from des_format.layout import COMPRESSED, DELETED, EXTERNAL, HEADER
from desfs.blocks import BLOCK, LARGE_PAYLOAD, Blocks
from tests.unit.containers import Item, build, footer_of

DATA = 40 << 20  # bytes: room for payloads above the limit


@st.composite
def offsets(draw: st.DrawFn) -> int:
    base = draw(st.sampled_from([0, BLOCK, 2 * BLOCK, 7 * BLOCK, LARGE_PAYLOAD, DATA - BLOCK]))
    return HEADER.size + base + draw(st.integers(-40, 40)) * draw(st.sampled_from([1, 1000]))


LENGTHS = st.one_of(
    st.integers(0, 50),
    st.sampled_from([BLOCK - 16, BLOCK, 3 * BLOCK, LARGE_PAYLOAD, LARGE_PAYLOAD + 1, 2**62, 2**63 - 1, 2**64 - 1]),
)
ITEMS = st.lists(
    st.builds(
        Item,
        name=st.binary(min_size=1, max_size=6),
        flags=st.sampled_from([0, 0, 0, 0, 0, EXTERNAL, COMPRESSED, DELETED]),
        data_offset=st.one_of(offsets(), offsets(), st.sampled_from([0, 2**63, 2**64 - 1])).filter(lambda at: at >= 0),
        data_length=LENGTHS,
    ),
    max_size=25,
)


def index_of(items: list[Item]) -> Index:
    """The index of a container with so much DATA, without the data."""
    raw = build(items)
    footer = footer_of(raw)
    records = raw[footer.index_start : footer.index_start + footer.index_length]
    return Index(records, footer._replace(data_length=DATA), "f.des")


def row_extents(index: Index, rows: list[int]) -> list[tuple[int, int]]:
    return [(int(index.data_offset[row]), int(index.data_offset[row] + index.data_length[row])) for row in rows]


def wanted_rows(index: Index) -> list[int]:
    """The model: small payloads that are there, and begin behind all before them."""
    found, end = [], 0
    for row in range(index.rows):
        start, length = int(index.data_offset[row]), int(index.data_length[row])
        if index.state[row] & (BAD_DATA | BAD_FLAGS | TOMBSTONE) or index.flags[row] & EXTERNAL:
            continue
        if not 0 < length <= LARGE_PAYLOAD:
            continue
        if start >= end:
            found.append(row)
        end = max(end, start + length)
    return found


@given(ITEMS)
@settings(max_examples=150)
def test_blocks_have_each_small_payload_once_ascend_and_do_not_overlap(items: list[Item]) -> None:
    """Payloads that are large, elsewhere, not there, or share bytes with one before them, are in no block."""
    index = index_of(items)
    blocks = Blocks(index)
    wanted = wanted_rows(index)
    assert blocks.rows(0, len(blocks)).tolist() == wanted if len(blocks) else wanted == []
    assert [row for row in range(index.rows) if blocks.contains(row)] == wanted
    for number in range(len(blocks)):
        rows = blocks.rows(number, number + 1).tolist()
        extents = row_extents(index, rows)
        assert blocks.extent(number, number + 1) == (extents[0][0], extents[-1][1])
        assert (blocks.start[number], blocks.stop[number]) == (extents[0][0], extents[-1][1])
        assert len({start // BLOCK for start, _ in extents}) == 1
        assert {blocks.of(start) for start, _ in extents} == {number}
        assert all(before[1] <= after[0] for before, after in pairwise(extents))
    assert np.all(blocks.start[1:] >= blocks.stop[:-1])
    numbers = [int(start) // BLOCK for start in blocks.start]
    assert numbers == sorted(set(numbers))


@given(ITEMS, offsets(), st.integers(1, 3 * BLOCK))
@settings(max_examples=150)
def test_what_lies_between_two_places(items: list[Item], start: int, length: int) -> None:
    index = index_of(items)
    blocks = Blocks(index)
    stop = start + length
    first, last = blocks.between(start, stop)
    assert list(range(first, last)) == [
        number for number in range(len(blocks)) if blocks.start[number] < stop and blocks.stop[number] > start
    ]
    behind = [row for row in wanted_rows(index) if int(index.data_offset[row]) >= start]
    assert blocks.row_at(start) == (behind[0] if behind else None)


@given(ITEMS, st.data())
@settings(max_examples=100)
def test_the_extent_of_rows_is_that_of_those_in_blocks(items: list[Item], data: st.DataObject) -> None:
    index = index_of(items)
    blocks = Blocks(index)
    rows = sorted(data.draw(st.sets(st.sampled_from(range(index.rows))))) if index.rows else []
    inside = row_extents(index, [row for row in rows if row in set(wanted_rows(index))])
    assert blocks.extent_of(np.array(rows, np.uint32)) == ((inside[0][0], inside[-1][1]) if inside else None)


@given(
    ITEMS,
    st.data(),
    st.one_of(st.integers(1, 4 * BLOCK), st.just(1 << 62)),
    st.one_of(st.integers(0, 3 * BLOCK), st.just(1 << 62)),
)
@settings(max_examples=150)
def test_pieces_cover_the_blocks_exactly_within_limits(
    items: list[Item], data: st.DataObject, limit: int, max_gap: int
) -> None:
    """Pieces have no more bytes than they may (one block alone may need more), nor gaps that nobody wants."""
    blocks = Blocks(index_of(items))
    first = data.draw(st.integers(0, len(blocks)))
    last = data.draw(st.integers(first, len(blocks)))
    pieces = blocks.pieces(first, last, limit=limit, max_gap=max_gap)
    assert [number for low, high in pieces for number in range(low, high)] == list(range(first, last))
    for low, high in pieces:
        start, stop = blocks.extent(low, high)
        assert stop - start <= limit or high == low + 1
        assert np.all(blocks.start[low + 1 : high] - blocks.stop[low : high - 1] <= max_gap)
    if max_gap == limit == 1 << 62:
        assert len(pieces) == (last > first)


def test_pieces_are_about_equally_long() -> None:
    """Two requests of 3 MiB are done before one of 4 and one of 2."""
    index = index_of([Item(b"%04d" % n, data_offset=HEADER.size + n * BLOCK, data_length=BLOCK) for n in range(48)])
    pieces = Blocks(index).pieces(0, 48, limit=4 << 20, max_gap=0)
    assert [high - low for low, high in pieces] == [25, 23]


def test_a_container_without_small_payloads_has_no_blocks() -> None:
    blocks = Blocks(index_of([Item(b"far", flags=EXTERNAL, data_length=2**63 - 1)]))
    assert len(blocks) == 0
    assert blocks.between(0, 2**40) == (0, 0)
    assert blocks.row_at(5) is None
    assert blocks.pieces(0, 0, limit=1, max_gap=0) == []
    assert blocks.extent_of(np.array([0], np.uint32)) is None
