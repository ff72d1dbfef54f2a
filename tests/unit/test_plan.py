"""docs/format.md, Batched reads: the plan, as properties."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from des_format import plan_gets

RANGES = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40)).map(lambda pair: (pair[0], pair[0] + pair[1])))


@given(RANGES, st.integers(0, 60), st.integers(1, 80))
def test_a_plan_covers_what_is_wanted_and_nothing_twice(
    wanted: list[tuple[int, int]], max_gap: int, max_request: int
) -> None:
    """Adjacent entries are read with one Range GET when the gap between them is at most `max_gap`."""
    gets = plan_gets(iter(wanted), max_gap=max_gap, max_request=max_request)
    read = [byte for start, stop in gets for byte in range(start, stop)]
    needed = {byte for start, stop in wanted for byte in range(start, stop)}
    assert read == sorted(set(read)), "ascending, no byte twice"
    assert needed <= set(read)
    assert all(0 < stop - start <= max_request for start, stop in gets)
    for unneeded in set(read) - needed:
        below = max(byte for byte in needed if byte < unneeded)
        above = min(byte for byte in needed if byte > unneeded)
        assert above - below - 1 <= max_gap, "only a gap that is small enough is read over"
    ordered = sorted(needed)
    wide = sum(later - earlier - 1 > max_gap for earlier, later in pairwise(ordered))
    merged = plan_gets(wanted, max_gap=max_gap, max_request=10_000)
    assert len(merged) == (wide + 1 if needed else 0), "no more GETs than there are gaps that are too wide"


def test_equal_and_empty_ranges() -> None:
    """An empty payload needs no GET (an HTTP range cannot be empty)."""
    assert plan_gets([(5, 9), (5, 9), (7, 7), (100, 100), (3, 1)]) == [(5, 9)]
    assert plan_gets([(7, 7)]) == []
    assert plan_gets([]) == []


def test_the_default_gap_is_one_mebibyte() -> None:
    """Batched reads: `max_gap` (default 1 MiB)."""
    mib = 1024 * 1024
    assert plan_gets([(0, 1), (1 + mib, 2 + mib)]) == [(0, 2 + mib)]
    assert plan_gets([(0, 1), (2 + mib, 3 + mib)]) == [(0, 1), (2 + mib, 3 + mib)]


@pytest.mark.parametrize(("max_gap", "max_request"), [(-1, 1), (0, 0)])
def test_a_senseless_limit_is_refused(max_gap: int, max_request: int) -> None:
    with pytest.raises(ValueError, match=f"max_gap is {max_gap}"):
        plan_gets([(0, 1)], max_gap=max_gap, max_request=max_request)
