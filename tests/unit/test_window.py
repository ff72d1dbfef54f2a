"""docs/architecture.md, Prefetch: what is fetched around a read."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from des_format.index import BAD_DATA, BAD_FLAGS, TOMBSTONE, Index
from des_format.layout import COMPRESSED, DELETED, EXTERNAL
from des_format.source import open_container
from desfs.window import NEIGHBOURHOOD, neighbourhood
from tests.unit.containers import Item, MemorySource, build

ITEMS = st.builds(
    Item,
    name=st.binary(min_size=1, max_size=3),
    data=st.binary(max_size=30),
    flags=st.sampled_from([0, 0, 0, EXTERNAL, COMPRESSED, DELETED]),
    data_offset=st.sampled_from([None, None, None, 0, 16, 20, 10**9]),
)


def index_of(*items: Item) -> Index:
    return open_container(MemorySource(build(items))).index


@given(st.lists(ITEMS, min_size=1, max_size=12), st.data(), st.integers(0, 60))
def test_a_neighbourhood_is_one_range_of_sound_payloads(items: list[Item], data: st.DataObject, limit: int) -> None:
    """A single cold read fetches its file and a small neighbourhood: adjacent payloads, ascending, none twice, within
    the limit; one whose payload is not there ends it."""
    index = index_of(*items)
    sound = [
        row
        for row in range(index.rows)
        if not index.state[row] & (BAD_DATA | BAD_FLAGS | TOMBSTONE) and not index.flags[row] & EXTERNAL
    ]
    if not sound:
        return
    row = data.draw(st.sampled_from(sound))
    rows = neighbourhood(index, row, limit)
    assert rows.start == row
    assert set(rows) <= set(sound)
    ends = [int(index.data_offset[each] + index.data_length[each]) for each in rows]
    starts = [int(index.data_offset[each]) for each in rows]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
    assert len(rows) == 1 or ends[-1] - starts[0] <= limit


def test_small_files_come_together_and_a_large_one_alone() -> None:
    small = index_of(*(Item(b"%03d" % n, b"x" * 1000) for n in range(200)))
    assert neighbourhood(small, 0) == range(NEIGHBOURHOOD // 1000)
    assert neighbourhood(small, 199) == range(199, 200)
    large = index_of(Item(b"a", b"x" * (NEIGHBOURHOOD + 1)), Item(b"b", b"y"))
    assert neighbourhood(large, 0) == range(1)
