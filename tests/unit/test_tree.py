"""docs/architecture.md, The name space: what a day of several containers shows."""

from __future__ import annotations

import itertools
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from des_format.layout import COMPRESSED, DELETED
from des_format.names import name_problem
from des_format.shards import parse_container_name
from des_format.source import open_container
from desfs.folders import Folders
from desfs.tree import DayTree, Member, are_in, same_names
from tests.unit.containers import Item, MemorySource, build


@dataclass(frozen=True, slots=True)
class Container:
    """What a test says of a container: its file name, LastModified, and entries in order (name, deleted)."""

    file_name: str
    mtime_s: int
    entries: tuple[tuple[bytes, bool], ...]


def opened(container: Container, ordinal: int, folder: str = "2026-11-20") -> Member:
    key = f"{folder}/{container.file_name}"
    items = [Item(name, flags=DELETED if deleted else 0) for name, deleted in container.entries]
    index = open_container(MemorySource(build(items), key=key), tail_length=1 << 26).index
    name = parse_container_name(container.file_name)
    assert name is not None
    return Member(ordinal, 1000 + ordinal, index, key, name, container.mtime_s * 10**9)


def day(*containers: Container) -> DayTree:
    return DayTree([opened(container, number) for number, container in enumerate(containers, 1)])


def files(file_name: str, *names: bytes, mtime_s: int = 0, deleted: Iterable[bytes] = ()) -> Container:
    return Container(file_name, mtime_s, (*((name, False) for name in names), *((name, True) for name in deleted)))


class Position(NamedTuple):
    """One entry of a page; `member` is None for a directory."""

    cookie: int
    name: bytes
    member: Member | None
    row: int


def entries(tree: DayTree, path: bytes = b"", after: int = 0) -> Iterator[Position]:
    """What the pages of a directory say, entry by entry."""
    for page in tree.pages(path, after):
        assert len(page.cookies) == len(page.names) > 0
        where: dict[int, tuple[Member | None, int]] = dict.fromkeys(range(len(page.names)), (None, 0))
        if page.shares:
            places = [place for share in page.shares for place in share.places.tolist()]
            assert sorted(places) == list(range(len(page.names)))
        for share in page.shares:
            where.update(
                {p: (share.member, r) for p, r in zip(share.places.tolist(), share.rows.tolist(), strict=True)}
            )
        for place, (cookie, name) in enumerate(zip(page.cookies, page.names, strict=True)):
            yield Position(cookie, name, *where[place])


def walked(tree: DayTree, path: bytes = b"") -> Iterator[tuple[bytes, Position]]:
    for position in entries(tree, path):
        full = path + b"/" + position.name if path else position.name
        yield full, position
        if position.member is None:
            yield from walked(tree, full)


def shown_files(tree: DayTree) -> dict[bytes, str]:
    return {path: where.member.key.rpartition("/")[2] for path, where in walked(tree) if where.member is not None}


def names(tree: DayTree, path: bytes = b"") -> list[bytes]:
    return [position.name for position in entries(tree, path)]


# --- beside a model ----------------------------------------------------------------------------------------------

COMPONENTS = st.sampled_from([b"a", b"b", b"c", "ż".encode()])
GOOD = st.lists(COMPONENTS, min_size=1, max_size=4).map(b"/".join)
BAD = st.sampled_from([b"/a", b"a//b", b"a/../b", b".", b"\xff", b"a\0b", b"a/", b"c" * 256, b"a/" * 2048 + b"b"])
ENTRIES = st.lists(
    st.tuples(st.one_of(GOOD, GOOD, GOOD, BAD), st.sampled_from([False, False, False, True])), max_size=8
)
FILE_NAMES = ["3.des", "3-1.des", "3-000001.des", "3-000002.des", "3-000010.des", "3-000001-000002.des", "4.des"]
FILE_NAMES += ["4-000001.des", "shard_03.des", "shard_4.des", "other.des"]


@st.composite
def days(draw: st.DrawFn) -> list[Container]:
    chosen = draw(st.lists(st.sampled_from(FILE_NAMES), max_size=6, unique=True))
    return [Container(name, draw(st.integers(0, 2)), tuple(draw(ENTRIES))) for name in chosen]


class Model:
    """The same rules over dicts: name -> the container that decides about it, then files and directories."""

    def __init__(self, containers: list[Container]) -> None:
        deciding: dict[bytes, list[tuple[Container, bool]]] = {}
        for container in containers:
            last = {name: deleted for name, deleted in container.entries if name_problem(name) is None}
            for name, deleted in last.items():
                deciding.setdefault(name, []).append((container, deleted))
        winners = {name: self.newest(versions) for name, versions in deciding.items()}
        alive = {name: container.file_name for name, (container, deleted) in winners.items() if not deleted}
        self.directories = {
            b"/".join(parts[:n]) for parts in (name.split(b"/") for name in alive) for n in range(1, len(parts))
        }
        self.collisions = {(name, where) for name, where in alive.items() if name in self.directories}
        self.files = {name: where for name, where in alive.items() if name not in self.directories}

    @staticmethod
    def newest(versions: list[tuple[Container, bool]]) -> tuple[Container, bool]:
        def generation(file_name: str) -> tuple[str, int, int]:
            stem = file_name.removesuffix(".des")
            if stem.startswith("shard_"):
                return f"d{int(stem[6:])}", -1, 0
            shard, *parts = stem.split("-")
            return shard, int(parts[-1]) if parts else -1, -int(parts[0]) if parts else 0

        def age(version: tuple[Container, bool]) -> tuple[int, str]:
            return version[0].mtime_s, version[0].file_name

        shards = itertools.groupby(
            sorted(versions, key=lambda version: generation(version[0].file_name)[0]),
            key=lambda version: generation(version[0].file_name)[0],
        )
        heads = [
            max(group, key=lambda version: (generation(version[0].file_name)[1:], age(version))) for _, group in shards
        ]
        return max(heads, key=age)

    def listing(self, path: bytes) -> list[bytes]:
        prefix = path + b"/" if path else b""
        return sorted(
            name[len(prefix) :]
            for name in {*self.files, *self.directories}
            if name.startswith(prefix) and b"/" not in name[len(prefix) :]
        )


@given(days())
@settings(max_examples=120, deadline=None)
@example([files("3.des", b"a"), files("4.des", b"a/b")])
@example([files("3.des", b"a/b"), files("3-000001.des", b"a", deleted=[b"a/b"])])
@example([files("3-1.des", b"a", mtime_s=1), files("3-000001.des", b"a")])
def test_a_day_shows_what_the_model_says(containers: list[Container]) -> None:
    """docs/semantics.md: A day is the union of the entries of its containers. A `/` in an entry's name makes
    directories. Same name in several containers: the newest wins. A DELETED entry hides older entries of its name.

    Where a file and a directory collide the directory wins and the file is reported; names that cannot be shown are
    not."""
    model, tree = Model(containers), day(*containers)
    assert shown_files(tree) == model.files
    assert tree.file_count() == len(model.files)
    assert {path for path, where in walked(tree) if where.member is None} == model.directories
    for path in {b"", *model.directories}:
        assert sorted(names(tree, path)) == model.listing(path)
        assert tree.is_directory(path)
    found = {(member.index.name(row), member.key.rpartition("/")[2]) for member, row in tree.collisions}
    assert found == model.collisions
    for name in {name for container in containers for name, _ in container.entries}:
        where = tree.find_file(name)
        assert (where and where[0].key.rpartition("/")[2]) == model.files.get(name)
        if name_problem(name) is None:  # what a tree may be asked
            assert tree.is_directory(name) == (name in model.directories)
        if where is not None:
            assert where[0].index.name(where[1]) == name


@given(days(), st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_the_order_in_which_containers_were_seen_decides_nothing_but_the_order_of_names(
    containers: list[Container], shuffle: Random
) -> None:
    shuffled = list(containers)
    shuffle.shuffle(shuffled)
    assert shown_files(day(*shuffled)) == shown_files(day(*containers))


# --- named cases -------------------------------------------------------------------------------------------------


def test_parts_override_the_sealed_container_by_generation_whatever_their_age() -> None:
    """docs/semantics.md: Within a shard that is the one with the highest generation.

    Order of containers within a shard: the sealed one first, then parts by generation, as numbers."""
    tree = day(
        files("3f-000010.des", b"f", mtime_s=1),
        files("3f-9.des", b"f", mtime_s=5),
        files("3f.des", b"f", b"g", mtime_s=9),
    )
    assert shown_files(tree) == {b"f": "3f-000010.des", b"g": "3f.des"}


def test_a_merged_part_overrides_the_parts_in_it() -> None:
    """Precedence of a merged part goes by the last generation."""
    merged = files("3f-000001-000004.des", b"f")
    assert shown_files(day(merged, files("3f-000004.des", b"f", mtime_s=9))) == {b"f": "3f-000001-000004.des"}
    assert shown_files(day(merged, files("3f-000005.des", b"f"))) == {b"f": "3f-000005.des"}


def test_between_shards_the_newer_container_wins_and_ties_go_to_the_greater_key() -> None:
    """docs/semantics.md: Between shards it is the one that was modified last; of those of one time, the one with the
    greatest key.

    LastModified has a resolution of one second."""
    assert shown_files(day(files("b.des", b"f", mtime_s=1), files("a.des", b"f", mtime_s=2))) == {b"f": "a.des"}
    assert shown_files(day(files("b.des", b"f", mtime_s=1), files("a.des", b"f", mtime_s=1))) == {b"f": "b.des"}


def test_a_tombstone_hides_older_entries_and_a_newer_entry_comes_back() -> None:
    """docs/semantics.md: A DELETED entry hides older entries of its name."""
    gone = [files("3.des", b"f", b"d/g"), files("3-000001.des", deleted=[b"f", b"d/g"])]
    assert shown_files(day(*gone)) == {}
    assert names(day(*gone)) == []
    assert not day(*gone).is_directory(b"d")
    assert shown_files(day(*gone, files("3-000002.des", b"f"))) == {b"f": "3-000002.des"}


def test_deleted_with_another_flag_is_hidden() -> None:
    """DELETED with another flag is hidden."""
    raw = build([Item(b"f", b"x", flags=DELETED | COMPRESSED), Item(b"g", b"y")])
    index = open_container(MemorySource(raw)).index
    name = parse_container_name("0.des")
    assert name is not None
    assert names(DayTree([Member(1, 1, index, "d/0.des", name, 0)])) == [b"g"]


def test_a_file_under_a_directory_of_its_name_is_reported_once() -> None:
    tree = day(files("0.des", b"a", b"a/b", b"a/b/c"), files("1.des", b"a", mtime_s=5))
    assert [(member.key[-5:], member.index.name(row)) for member, row in tree.collisions] == [
        ("0.des", b"a/b"),
        ("1.des", b"a"),
    ]
    assert shown_files(tree) == {b"a/b/c": "0.des"}


def test_when_the_directory_is_deleted_the_file_is_shown_again() -> None:
    tree = day(files("0.des", b"a"), files("1.des", b"a/b"), files("1-000001.des", deleted=[b"a/b"]))
    assert shown_files(tree) == {b"a": "0.des"}
    assert tree.collisions == []


def test_names_sort_around_a_slash_as_components_do() -> None:
    """`a-b` and `a!b` stand between `a` and `a/b` as bytes, and are no part of the directory `a`."""
    tree = day(files("0.des", b"a/b/x", b"a!b/y", b"a-b/z", b"ab", b"a/b!/w"))
    assert sorted(names(tree)) == [b"a", b"a!b", b"a-b", b"ab"]
    assert sorted(names(tree, b"a")) == [b"b", b"b!"]
    assert tree.is_directory(b"a!b")
    assert not tree.is_directory(b"a!")
    assert names(tree, b"nowhere") == []


def test_an_empty_day_is_a_directory() -> None:
    assert names(day()) == []
    assert day().is_directory(b"")
    assert day(files("0.des")).file_count() == 0
    assert day().find_file(b"f") is None


def test_files_come_in_the_order_of_their_data() -> None:
    """READDIRPLUS in data order: tools that walk in directory order read the container sequentially."""
    items = [Item(b"z", b"1"), Item(b"m", b"2"), Item(b"a", b"3")]
    index = open_container(MemorySource(build(items))).index
    name = parse_container_name("0.des")
    assert name is not None
    assert names(DayTree([Member(1, 1, index, "d/0.des", name, 0)])) == [b"z", b"m", b"a"]


# --- positions ---------------------------------------------------------------------------------------------------


def read_on(tree: DayTree, path: bytes, after: int, count: int | None = None) -> list[Position]:
    return list(itertools.islice(entries(tree, path, after), count))


@given(days(), st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_reading_on_behind_any_position_gives_the_rest(containers: list[Container], step: int) -> None:
    tree = day(*containers)
    for path in [b"", *(path for path, where in walked(tree) if where.member is None)]:
        whole = list(entries(tree, path))
        cookies = [position.cookie for position in whole]
        assert cookies == sorted(set(cookies))
        assert all(0 < cookie < 2**62 for cookie in cookies)
        pieces: list[Position] = []
        while piece := read_on(tree, path, pieces[-1].cookie if pieces else 0, step):
            pieces += piece
        assert pieces == whole


@st.composite
def changing_days(draw: st.DrawFn) -> tuple[list[Container], list[int], list[Container]]:
    """Containers, which of them go, and those that come. No name is in two of them, as the layout by hash has it;
    directories may be."""
    chosen = draw(st.lists(st.sampled_from(FILE_NAMES), min_size=2, max_size=6, unique=True))
    everything = [
        files(
            name,
            *(folder + b"%d" % number for folder in draw(st.lists(st.sampled_from([b"", b"d/", b"e/g/"]), max_size=4))),
        )
        for number, name in enumerate(chosen)
    ]
    split = draw(st.integers(1, len(everything)))
    return everything[:split], draw(st.lists(st.integers(0, split - 1), unique=True)), everything[split:]


@given(changing_days(), st.integers(0, 8))
@settings(max_examples=120, deadline=None)
def test_positions_hold_while_containers_come_and_go(
    change: tuple[list[Container], list[int], list[Container]], first: int
) -> None:
    """docs/semantics.md: A listing that is under way while its day changes leaves out nothing that stays, but may have
    a name twice.

    What stays is shown once, files and directories, and nothing is skipped. A directory whose first container went may
    come twice, once behind each place."""
    before, gone, new = change
    members = [opened(container, number) for number, container in enumerate(before, 1)]
    coming = [opened(container, number) for number, container in enumerate(new, len(before) + 1)]
    old = DayTree(members)
    now = DayTree([member for place, member in enumerate(members) if place not in gone] + coming)
    for path in (b"", b"d", b"e", b"e/g"):
        seen = read_on(old, path, 0, first)
        seen += read_on(now, path, seen[-1].cookie if seen else 0)
        staying = [position for position in entries(old, path) if position.name in set(names(now, path))]
        assert {position.name for position in staying} <= {position.name for position in seen}
        shown = [position.name for position in seen if position.member is not None]
        assert len(shown) == len(set(shown))
        if not gone:
            everything = [position.name for position in seen]
            assert len(everything) == len(set(everything))
            assert set(everything) == set(names(now, path))


# --- bounds ------------------------------------------------------------------------------------------------------


def test_thousands_of_levels_cost_no_more_than_their_bytes() -> None:
    """30,000 levels of directories cost no more than 512 MiB and 5 s; what cannot be shown is not, and what can (2,047
    levels in 4,095 bytes) is found at every level."""
    deepest = b"/".join([b"d"] * 2047 + [b"f"])
    hidden = b"/".join([b"d"] * 30_000)
    others = [b"/".join([b"%d" % number, *([b"d"] * 2000), b"f"]) for number in range(200)]
    tracemalloc.start()
    began = time.monotonic()
    tree = day(files("0.des", deepest, hidden, *others))
    path = b""
    for _ in range(2047):
        assert tree.is_directory(path)
        path = path + b"/d" if path else b"d"
    assert names(tree, path) == [b"f"]
    assert time.monotonic() - began < 5
    assert tracemalloc.get_traced_memory()[1] < 64 * 1024 * 1024
    tracemalloc.stop()
    assert tree.file_count() == 201


@pytest.mark.parametrize("containers", [1, 64])
def test_a_hundred_thousand_directories_open_and_list_quickly(containers: int) -> None:
    """A container is never trusted with memory or time: 100,000 directories, each with files beside it, 5 s."""
    each = 100_000 // containers
    members = [
        opened(files(f"{n:02x}.des", b"top%d" % n, *(b"d%d_%d/f" % (n, k) for k in range(each))), n + 1)
        for n in range(containers)
    ]
    began = time.monotonic()
    tree = DayTree(members)
    assert not tree.is_ready(b"")  # it takes a while, in whatever thread
    tree.prepare(b"")
    assert tree.is_ready(b"")
    assert len(names(tree)) == containers * (each + 1)
    assert time.monotonic() - began < 5
    assert tree.collisions == []


# --- columns -----------------------------------------------------------------------------------------------------


@given(days())
@settings(max_examples=60, deadline=None)
def test_folders_taken_from_their_columns_are_the_same(containers: list[Container]) -> None:
    for member in day(*containers).members:
        again = Folders.from_columns(*member.folders.columns())
        assert list(again.paths()) == list(member.folders.paths())
        for path in (*member.folders.paths(), b"nowhere"):
            rows = member.folders.rows(path)
            assert again.rows(path).tolist() == rows.tolist()
            assert member.folders.count(path) == len(rows)
            assert member.folders.rows(path, 1, 2).tolist() == rows[1:3].tolist()
            assert all(member.index.name(row).rpartition(b"/")[0] == path for row in rows.tolist())


@given(days())
@settings(max_examples=60, deadline=None)
def test_what_was_listed_between_two_positions_is_known(containers: list[Container]) -> None:
    """The rows that a listing has passed, so that their payloads can be pushed: all that it showed, in its order."""
    tree = day(*containers)
    for path in {b"", *(path for path, where in walked(tree) if where.member is None)}:
        cookies = [0, *(position.cookie for position in entries(tree, path))]
        for after, upto in itertools.combinations(cookies, 2):
            passed = [(slot, row) for slot, rows in tree.listed(path, after, upto) for row in rows.tolist()]
            for cookie, _, member, row in entries(tree, path):
                if member is not None and after < cookie <= upto and member.ordinal == cookie >> 32:
                    assert (member.slot, row) in passed
        assert list(tree.listed(path, 5, 5)) == []


# --- many names at once ------------------------------------------------------------------------------------------

NAMES = st.one_of(GOOD, st.integers(1, 40).map(lambda length: b"n" * length), st.integers(0, 40).map(b"n%040d".__mod__))


@given(st.lists(st.tuples(NAMES, NAMES), max_size=20))
@settings(deadline=None)
def test_names_are_compared_to_their_last_byte(pairs: list[tuple[bytes, bytes]]) -> None:
    """Two names with one hash are not taken for one name."""
    one, other = (
        open_container(MemorySource(build([Item(name) for name in names])), tail_length=1 << 26).index
        for names in ([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    )
    rows = np.arange(len(pairs), dtype=np.uint32)
    assert same_names(one, rows, other, rows).tolist() == [one.name(row) == other.name(row) for row in rows.tolist()]


HASHES = st.lists(st.one_of(st.integers(0, 5), st.integers(0, 2**64 - 1)), max_size=20)


@given(HASHES, HASHES)
def test_hashes_are_found_among_others(values: list[int], others: list[int]) -> None:
    found = are_in(np.array(values, np.uint64), np.array(sorted(others), np.uint64))
    assert found.tolist() == [value in others for value in values]


def test_a_day_whose_parts_were_merged_shows_each_file_once() -> None:
    """For a while all files stand in the parts and in what these were merged into; they keep their places."""
    names = [b"d%d/name-%d" % (number % 50, number) for number in range(20_000)]
    merged = opened(files("3.des", *names), 3)
    parts = [opened(files(f"4-{n:06d}.des", *names[n * 10_000 :][:10_000], mtime_s=1), n + 1) for n in range(2)]
    tree = DayTree([*parts, merged])
    assert tree.file_count() == 20_000
    assert {position.member for _, position in walked(tree) if position.member is not None} == set(parts)
