"""How an object is cut into the parts of an upload."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from desfs.store.base import CopyRange
from desfs.store.multipart import MAX_PARTS, MIB, PART, Piece, length_of, part_size, plan_parts

SOURCE = bytes(range(256)) * 8


def piece(kind: int, start: int, length: int) -> Piece:
    if kind == 0:
        return SOURCE[start : start + length]
    return CopyRange(f"source-{kind}", start, start + length, f"etag-{kind}")


PIECES = st.lists(st.builds(piece, st.integers(0, 2), st.integers(0, 1000), st.integers(0, 1000)), max_size=30)


def content(pieces: list[Piece]) -> list[tuple[str, int]]:
    """Where each byte comes from."""
    places: list[tuple[str, int]] = []
    for each in pieces:
        if isinstance(each, bytes):
            places += [("", byte) for byte in each]
        else:
            places += [(each.key + each.etag, at) for at in range(each.start, each.stop)]
    return places


@given(PIECES, st.integers(1, 50), st.integers(0, 50), st.integers(1, 200), st.integers(2, 30))
def test_parts_are_the_pieces_in_order_and_obey_the_rules(
    pieces: list[Piece], min_part: int, more: int, copy_part: int, max_parts: int
) -> None:
    parts = plan_parts(pieces, min_part=min_part, part=min_part + more, copy_part=copy_part, max_parts=max_parts)
    assert content([each for part in parts for each in part]) == content(pieces)
    lengths = [sum(map(length_of, part)) for part in parts]
    assert all(length >= min_part for length in lengths[:-1])
    assert all(length > 0 for length in lengths)
    assert len(parts) <= max_parts


def test_a_merge_of_containers_is_copied_but_for_its_ends() -> None:
    pieces: list[Piece] = [
        CopyRange("a", 0, 600 * MIB, "a"),
        CopyRange("b", 16, 100 * MIB, "b"),
        CopyRange("c", 16, 2 * MIB, "c"),
        b"META, INDEX and FOOTER",
    ]
    *copied, last = plan_parts(pieces)
    assert [len(part) for part in copied] == [1, 1, 1, 1]
    assert [length_of(part[0]) for part in copied] == [200 * MIB] * 3 + [100 * MIB - 16]
    assert last == pieces[2:]


def test_parts_of_a_file() -> None:
    assert part_size(65 * MIB) == PART
    for size in (PART * MAX_PARTS, PART * MAX_PARTS + 1, 5 << 40):
        length = part_size(size)
        assert length % MIB == 0
        assert -(-size // length) <= MAX_PARTS
    assert part_size(PART * MAX_PARTS + 1) == PART + MIB
