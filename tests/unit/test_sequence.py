"""Blocks of ids: never overlapping, never before the clock, whatever the clock does."""

from __future__ import annotations

from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assignment.errors import InvalidRequest
from assignment.sequence import IdBlock, SequenceState, reserve
from des_format.assigned_names import parse_name, time_field_of

DAY = date(2025, 11, 25)
NOON_MS = 1_764_072_000_000


def test_the_first_block_starts_at_the_clock() -> None:
    state, block = reserve(None, node_id=3, day=DAY, now_ms=NOON_MS, count=2)
    assert block == IdBlock(3, DAY, NOON_MS, 0, 2)
    assert state == SequenceState(NOON_MS, 2)
    names = [parse_name(name) for name in block.names("DES")]
    assert [(n.day, n.time_field, n.node_id, n.sequence) for n in names] == [
        (DAY, time_field_of(NOON_MS, 32), 3, 0),
        (DAY, time_field_of(NOON_MS, 32), 3, 1),
    ]


def test_a_block_in_the_same_millisecond_goes_on_in_it() -> None:
    _, block = reserve(SequenceState(NOON_MS, 2), node_id=0, day=DAY, now_ms=NOON_MS, count=1)
    assert (block.first_ms, block.first_sequence) == (NOON_MS, 2)


def test_a_used_up_millisecond_is_followed_by_the_next() -> None:
    state, block = reserve(SequenceState(NOON_MS, 256), node_id=0, day=DAY, now_ms=NOON_MS - 5000, count=256)
    assert (block.first_ms, block.first_sequence) == (NOON_MS + 1, 0)
    assert state == SequenceState(NOON_MS + 1, 256)


@pytest.mark.parametrize("count", [0, -1])
def test_no_ids_cannot_be_reserved(count: int) -> None:
    with pytest.raises(InvalidRequest):
        reserve(None, node_id=0, day=DAY, now_ms=NOON_MS, count=count)


@given(st.lists(st.tuples(st.integers(-10_000, NOON_MS * 2), st.integers(1, 700)), min_size=1, max_size=30))
def test_blocks_never_overlap_and_are_never_before_the_clock(calls: list[tuple[int, int]]) -> None:
    state = None
    last_stop = 0
    for now_ms, count in calls:
        state, block = reserve(state, node_id=0, day=DAY, now_ms=now_ms, count=count)
        start = block.first_ms * 256 + block.first_sequence
        assert start >= last_stop
        assert block.first_ms >= now_ms
        assert 0 <= block.first_sequence < 256
        assert 1 <= state.next_sequence <= 256
        last_stop = start + count
        assert state.position == last_stop


@given(st.integers(0, 2**42), st.integers(1, 2000))
def test_the_names_of_a_block_are_as_many_as_it_counts_and_all_different(now_ms: int, count: int) -> None:
    _, block = reserve(SequenceState(now_ms, 77), node_id=255, day=DAY, now_ms=now_ms, count=count)
    names = list(block.names("DES"))
    assert len(set(names)) == count
    assert all(parse_name(name).node_id == 255 for name in names)
