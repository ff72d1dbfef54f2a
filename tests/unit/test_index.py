"""The index against a model of dicts, and the names, ranges and flags of its table of damaged containers."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from des_format import CorruptEntry, Entry, Index, NoSuchEntry, NotAContainer, UnsupportedEntry
from des_format.layout import DELETED, EXTERNAL, Footer
from des_format.names import name_problem
from tests.unit.containers import Item, build, footer_of, patched

# XXH3 folds the product of two 8-byte halves, each combined with a constant: exchanged halves, adjusted by the
# difference of the constants, give the same hash.
COLLIDING = (
    "x" * 16 + '\u1993!ph\u02d5\u0570"\u065ah\u0302',
    "x" * 16 + "y$\ub52eK<FM2ZlDK;Q",
)


def index_of(raw: bytes) -> Index:
    footer = footer_of(raw)
    return Index(raw[footer.index_start :][: footer.index_length], footer, "f.des")


def test_an_empty_index() -> None:
    index = index_of(build())
    assert (index.rows, len(index), list(index)) == (0, 0, [])
    assert index.find(b"a") is None
    assert "a" not in index
    assert index.shown().tolist() == index.problem_rows().tolist() == []
    with pytest.raises(NoSuchEntry, match=r"f.des: no entry 'a'"):
        index.find_shown("a")


def test_a_row_is_as_the_format_stores_it() -> None:
    index = index_of(
        build([Item(b"a", b"12"), Item("ż/ó".encode(), b"345", b""), Item(b"big", flags=1, data_offset=0)])
    )
    assert [index.entry(row) for row in range(3)] == [
        Entry("a", 16, 2, 21, 10, 0),
        Entry("ż/ó", 18, 3, 31, 0, 0),
        Entry("big", 0, 0, 31, 10, 1),
    ]
    assert [index.entry(row).is_external for row in range(3)] == [False, False, True]
    assert list(index) == ["a", "ż/ó", "big"]
    assert "ż/ó" in index
    assert "\ud800" not in index


# --- names ---------------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        b"a",
        b"b",
        b"/",
        b".",
        b"..",
        b"\0",
        b"\xff",
        b"\xc5",
        b"\xbc",
        b"\xe2",
        b"\x82",
        b"\xac",
        "€".encode(),
        b"n" * 255,
    ]
)
NAMES = st.lists(PIECES, max_size=5).map(b"".join)


@given(st.lists(NAMES, max_size=8))
def test_what_is_shown_follows_the_rule_for_names(names: list[bytes]) -> None:
    """A name that is not UTF-8, empty, absolute, has empty, `.` or `..` components or NUL, a component over 255 bytes,
    or a path over 4,095: not shown, reported. Also where two names share a character."""
    index = index_of(_with_names(names))
    last = {name: number for number, name in enumerate(names) if name_problem(name) is None}
    shown = [name.decode() for number, name in enumerate(names) if last.get(name) == number]
    assert list(index) == shown
    hidden = [name for name in names if name_problem(name) is not None]
    reported = [index.problem(row) or "" for row in index.problem_rows().tolist()]
    assert len(reported) == len(hidden)
    for name, text in zip(hidden, reported, strict=True):
        assert "not shown" in text
        assert str(name_problem(name)) in text
        assert index.find(name) is None


def _with_names(names: list[bytes]) -> bytes:
    # An empty name makes a record smaller than the smallest one: the index needs room for it.
    return build([*(Item(name, b"x") for name in names)]) if all(names) else _roomy(names)


def _roomy(names: list[bytes]) -> bytes:
    return build([*(Item(name, b"x") for name in names), Item(b"room" * 10, flags=DELETED)])


@pytest.mark.parametrize("length", [4096, 65_535])
def test_a_name_too_long_for_a_path_is_reported_with_few_words(length: int) -> None:
    name = (b"d" * 200 + b"/") * (length // 201) + b"e" * (length % 201)
    index = index_of(build([Item(name), Item(b"a")]))
    assert list(index) == ["a"]
    (row,) = index.problem_rows().tolist()
    problem = index.problem(row)
    assert problem is not None
    assert "more than the 4095 bytes of a path" in problem
    assert len(problem) < 300


def test_names_that_share_a_character_are_both_hidden() -> None:
    index = index_of(build([Item(b"a\xc5", b"1"), Item(b"\xbcb", b"2"), Item(b"c", b"3")]))
    assert list(index) == ["c"]
    assert index.problem_rows().tolist() == [0, 1]


# --- one name several times ----------------------------------------------------------------------------------------

ROWS = st.lists(
    st.tuples(
        st.sampled_from([b"a", b"b", b"c", b"d/e", b"d/f", "ż".encode(), b"../x"]),
        st.sampled_from([0, 0, 0, EXTERNAL, DELETED, DELETED | 2, DELETED | EXTERNAL, 2, 4, 16, EXTERNAL | 1 << 31]),
        st.binary(max_size=4),
        st.sampled_from([None, None, None, 0, 15, 2**64 - 1]),
    ),
    max_size=12,
)


@given(ROWS)
def test_the_last_entry_of_a_name_decides(
    rows: list[tuple[bytes, int, bytes, int | None]],
) -> None:
    """If a name stands twice in one container, the last entry wins; DELETED is a tombstone for the name; the last of
    several entries that is damaged is EIO, never the older bytes."""
    items = [Item(name, data, flags=flags, data_offset=offset) for name, flags, data, offset in rows]
    raw = build(items)
    index = index_of(raw)
    model: dict[bytes, int] = {name: number for number, (name, *_) in enumerate(rows) if name != b"../x"}
    alive = {name: number for name, number in model.items() if not rows[number][1] & DELETED}
    assert sorted(index) == sorted(name.decode() for name in alive)
    assert len(index) == len(alive)
    for name, number in model.items():
        _, flags, data, offset = rows[number]
        row = index.find(name)
        assert row is not None
        assert int(index.flags[row]) == flags
        text = name.decode()
        assert (text in index) == (name in alive)
        if name not in alive:
            with pytest.raises(NoSuchEntry):
                index.find_shown(text)
            continue
        assert index.find_shown(text) == row
        entry = index.entry(row)
        assert (entry.name, entry.data_length, entry.flags) == (text, len(data), flags)
        if flags & ~EXTERNAL:
            with pytest.raises(UnsupportedEntry, match=f"f.des: entry {row} .*flags: found {flags:#x}"):
                index.check_readable(row)
        elif offset is not None and data and not flags:
            with pytest.raises(CorruptEntry, match=f"f.des: entry {row} .*payload: found bytes {offset} to"):
                index.check_readable(row)
        else:
            index.check_readable(row)
            if not flags and data:
                assert raw[entry.data_offset :][: entry.data_length] == data


def test_a_damaged_last_entry_hides_a_sound_older_one() -> None:
    """The last of several entries of one name is damaged: EIO, never the older bytes."""
    index = index_of(build([Item(b"a", b"old"), Item(b"a", b"new", data_offset=0), Item(b"b", b"x")]))
    row = index.find_shown("a")
    with pytest.raises(CorruptEntry):
        index.check_readable(row)


def test_a_tombstone_and_an_entry_after_it() -> None:
    """DELETED: a tombstone for the name; with another flag it is hidden as well."""
    gone = index_of(build([Item(b"a", b"1"), Item(b"a", flags=DELETED)]))
    assert "a" not in gone
    back = index_of(build([Item(b"a", b"1"), Item(b"a", flags=DELETED | 2), Item(b"a", b"2")]))
    assert back.entry(back.find_shown("a")).data_offset == 17
    assert back.problem_rows().tolist() == []


# --- order -----------------------------------------------------------------------------------------------------------


@given(st.permutations(range(8)), st.sets(st.integers(0, 7), max_size=3))
def test_rows_are_in_data_order(order: list[int], external: set[int]) -> None:
    """Iteration in data order: ascending payload offset, external entries where the writer put them."""
    data = {number: b"%d" % number * 3 for number in order}
    at = {number: 16 + 3 * number for number in order}
    items = [
        Item(b"%d" % number, data[number], flags=EXTERNAL, data_offset=0)
        if number in external
        else Item(b"%d" % number, data[number], data_offset=at[number])
        for number in order
    ]
    index = index_of(build(items))
    inside = [int(name) for name in index if int(name) not in external]
    assert inside == sorted(inside)
    for name in index:
        entry = index.entry(index.find_shown(name))
        assert entry.data_offset == (0 if int(name) in external else at[int(name)])
    for number in external:  # behind the entry that the writer put before it
        place = order.index(number)
        before = [each for each in order[:place] if each not in external]
        names = [int(name) for name in index]
        if before:
            previous = names[: names.index(number)]
            assert [each for each in previous if each not in external][-1] == before[-1]


def test_the_last_entry_wins_also_when_its_bytes_come_first() -> None:
    """If a name stands twice in one container, the last entry wins: the last record, not the last payload."""
    index = index_of(
        build([Item(b"a", b"old", data_offset=19), Item(b"a", b"new", data_offset=16), Item(b"b", b"xyz")])
    )
    assert index.entry(index.find_shown("a")).data_offset == 16


# --- equal hashes ----------------------------------------------------------------------------------------------------


def test_names_with_the_same_hash_are_told_apart() -> None:
    first, second = COLLIDING
    assert first != second
    assert xxhash.xxh3_64_intdigest(first.encode()) == xxhash.xxh3_64_intdigest(second.encode())
    for names in ((first, second), (second, first), (first, "a", second, "b", first)):
        raw = build([Item(name.encode(), b"%d" % number) for number, name in enumerate(names)])
        index = index_of(raw)
        assert sorted(index) == sorted(set(names))
        for name in set(names):
            last = len(names) - 1 - names[::-1].index(name)
            assert index.entry(index.find_shown(name)).data_offset == 16 + last
    only = index_of(build([Item(first.encode())]))
    assert second not in only


def test_many_entries_of_few_names() -> None:
    names = [b"%d" % (number % 7) for number in range(10_000)]
    index = index_of(build([Item(name, b"x") for name in names]))
    assert len(index) == 7
    assert [index.entry(index.find_shown(str(n))).data_offset - 16 for n in range(7)] == [
        max(at for at in range(10_000) if at % 7 == n) for n in range(7)
    ]
    hashes, rows = index.hashes
    assert len(hashes) == len(rows) == 7
    assert bool(np.all(hashes[1:] >= hashes[:-1]))


def test_more_records_than_are_gathered_at_once() -> None:
    count = 200_000
    raw = build([Item(b"%x" % number, b"x", b"") for number in range(count)])
    index = index_of(raw)
    assert len(index) == count
    for number in (0, 1, 131_071, 131_072, 131_073, count - 1):
        assert index.entry(index.find_shown(f"{number:x}")).data_offset == 16 + number


LENGTHS = st.sampled_from([0, 1, 2, 3, 12, 12, 12, 255, 300, 4095, 4096, 4097])


@given(
    st.lists(st.tuples(LENGTHS, st.integers(1, 80), st.sampled_from([b"x", b"\0", b"/"])), max_size=6),
    st.sampled_from([-1, 0, 0, 0, 1]),
    st.sampled_from([0, 0, 0, 1, 40]),
)
@settings(deadline=None)
def test_stretches_of_names_of_one_length(runs: list[tuple[int, int, bytes]], more: int, behind: int) -> None:
    """They are parsed together, which nobody can see: each record is where it is and what it is."""
    names = [
        (b"%d" % number).ljust(length, filler)[:length] for length, count, filler in runs for number in range(count)
    ]
    raw = build([Item(name, b"x", b"") for name in names], gaps=(b"", b"", b"", b"\xff" * behind))
    footer = footer_of(raw)._replace(
        file_count=max(len(names) + more, 0), index_length=footer_of(raw).index_length + behind
    )
    region = raw[footer.index_start :][: footer.index_length]
    if behind or footer.file_count != len(names):
        with pytest.raises(NotAContainer) as caught:
            Index(region, footer, "f.des")
        position, found = 0, 0
        while found < footer.file_count and position <= len(region) - 38:
            position += 38 + int.from_bytes(region[position : position + 2], "little")
            found += 1
        assert f"found {found} records that end at byte {footer.index_start + position}," in str(caught.value)
        return
    index = Index(region, footer, "f.des")
    assert [index.name(row) for row in range(index.rows)] == [name[:4096] for name in names]
    assert index.data_offset.tolist() == list(range(16, 16 + len(names)))
    assert index.data_length.tolist() == [1] * len(names)
    findable = {name: row for row, name in enumerate(names) if name_problem(name) is None}
    hashes, rows = index.hashes
    assert sorted(zip(hashes.tolist(), rows.tolist(), strict=True)) == sorted(
        (xxhash.xxh3_64_intdigest(name), row) for name, row in findable.items()
    )


# --- ranges ------------------------------------------------------------------------------------------------------

START, STOP = 16, 26  # of DATA in the containers below


@pytest.mark.parametrize(
    ("offset", "length", "readable"),
    [
        (START, 10, True),
        (STOP, 0, True),
        (STOP - 1, 1, True),
        (START - 1, 1, False),
        (0, 1, False),
        (START, 11, False),
        (STOP, 1, False),
        (STOP - 1, 2, False),
        (2**64 - 1, 1, False),
        (2**64 - 1, 2, False),
        (2**64 - 1, 2**64 - 1, False),
        (START, 2**64 - 1, False),
        (START, 2**64 - 16, False),
        (2**63, 2**63, False),
    ],
)
def test_a_payload_lies_in_data_or_its_entry_is_damaged(offset: int, length: int, readable: bool) -> None:
    """An entry whose payload range is not inside DATA: that entry is EIO and reported."""
    index = index_of(build([Item(b"a", b"0123456789", data_offset=offset, data_length=length), Item(b"b")]))
    row = index.find_shown("a")
    assert (index.problem(row) is None) == readable
    if readable:
        index.check_readable(row)
    else:
        assert index.problem_rows().tolist() == [row]
        with pytest.raises(CorruptEntry, match=rf"f.des: entry {row} 'a': payload: .* want them in DATA \(16 to 26\)"):
            index.check_readable(row)
    index.check_readable(index.find_shown("b"))


@pytest.mark.parametrize(
    ("offset", "length", "sound"),
    [
        (16, 10, True),
        (0, 0, True),
        (15, 1, False),
        (16, 11, False),
        (26, 1, False),
        (2**64 - 1, 1, False),
        (2**64 - 1, 2**64 - 1, False),
        (16, 2**32 + 1, False),
        (16, 2**64 - 16, False),
    ],
)
def test_metadata_lies_in_meta_or_is_damaged(offset: int, length: int, sound: bool) -> None:
    """An entry whose META range is not inside META: the index and the bytes are served."""
    raw = build([Item(b"a", b"", b'{"size":0}', meta_offset=offset, meta_length=length)])
    index = index_of(raw)
    index.check_readable(0)
    assert (index.problem(0) is None) == sound
    assert int(index.meta_length[0]) == (length if sound else 0)


def test_an_external_payload_has_no_place_in_data() -> None:
    """External and DELETED entries aside: their ranges are not looked at."""
    index = index_of(
        build(
            [
                Item(b"a", flags=EXTERNAL, data_offset=2**64 - 1, data_length=2**40),
                Item(b"b", flags=EXTERNAL, data_length=2**63),
                Item(b"c", flags=DELETED, data_offset=2**64 - 1, data_length=9),
            ]
        )
    )
    index.check_readable(index.find_shown("a"))
    with pytest.raises(CorruptEntry):  # no file can be so long
        index.check_readable(index.find_shown("b"))
    assert [index.problem(row) is None for row in range(3)] == [True, False, True]


@pytest.mark.parametrize("flags", [2, 4, 6, 16, 1 << 31, EXTERNAL | 2, EXTERNAL | 1 << 20])
def test_a_flag_that_is_not_implemented_is_said_for_that_entry_alone(flags: int) -> None:
    """A reserved or unknown flag, other than DELETED: that entry is EIO and reported."""
    index = index_of(build([Item(b"a", b"1", flags=flags), Item(b"b", b"2")]))
    assert list(index) == ["a", "b"]
    with pytest.raises(UnsupportedEntry, match=f"f.des: entry 0 'a': flags: found {flags:#x}, want no flag but 0x1"):
        index.check_readable(0)
    index.check_readable(1)
    assert index.problem_rows().tolist() == [0]


# --- records that do not fit the footer ------------------------------------------------------------------------------

GOOD = build([Item(b"aa", b"1"), Item(b"b" * 60, b"2"), Item(b"cc", b"3")])
AT = footer_of(GOOD)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(build([Item(b"a"), Item(b"b" * 60)], change=lambda f: f._replace(file_count=1)), id="one more"),
        pytest.param(build([Item(b"a"), Item(b"b" * 60)], change=lambda f: f._replace(file_count=0)), id="two more"),
        pytest.param(build([Item(b"a"), Item(b"b" * 60)], change=lambda f: f._replace(file_count=3)), id="one less"),
        pytest.param(
            build([Item(b"a"), Item(b"b" * 60)], change=lambda f: f._replace(index_length=f.index_length - 1)),
            id="cut short",
        ),
        pytest.param(patched(GOOD, AT.index_start, b"\xff\xff"), id="a name that goes on too long"),
        pytest.param(patched(GOOD, AT.index_start, b"\x00"), id="a name that ends too early"),
        pytest.param(
            build([], gaps=(b"", b"", b"", b"x" * 50), change=lambda f: f._replace(index_length=50)), id="none"
        ),
    ],
)
def test_records_must_be_as_many_as_the_footer_says(raw: bytes) -> None:
    """`file_count` that is not the number of records; a record cut short: container refused."""
    with pytest.raises(
        NotAContainer, match=r"f.des: INDEX at byte \d+: found \d+ records .*, want \d+ that end at \d+"
    ):
        index_of(raw)


@given(st.binary(max_size=200), st.integers(0, 5))
def test_any_bytes_are_an_index_or_refused(raw: bytes, count: int) -> None:
    footer = Footer(16, 100, 116, 100, 216, len(raw), count)
    try:
        index = Index(raw, footer, "f.des")
    except NotAContainer:
        return
    assert index.rows == count
    for name in index:
        assert index.name(index.find_shown(name)).decode() == name
    for row in index.problem_rows().tolist():
        assert index.problem(row) is not None
