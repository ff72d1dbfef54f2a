"""desfs/packer/batch.py: which files go into which container, and in which order."""

from __future__ import annotations

import itertools
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from desfs.packer.batch import Cut, Item, cut
from desfs.spool import FileState

DAYS = [date(2026, 11, 20), date(2026, 11, 21)]


def item(path: str, size: int = 1, *, day: date = DAYS[0], shard: str = "0") -> Item:
    return Item(path, path, f"id of {path}", day, shard, FileState(1, size, 0))


def names(cuts: list[Cut]) -> list[list[str]]:
    return [[each.name for each in one.items] for one in cuts]


def test_one_container_for_each_day_and_shard() -> None:
    """docs/architecture.md: a container holds files of one day and one shard."""
    items = [item("a"), item("b", day=DAYS[1]), item("c", shard="f"), item("d")]
    cuts = list(cut(items, max_bytes=100, max_files=100, big_file_threshold=100))
    assert [(one.day, one.shard) for one in cuts] == [(DAYS[0], "0"), (DAYS[0], "f"), (DAYS[1], "0")]
    assert names(cuts) == [["a", "d"], ["c"], ["b"]]


def test_the_files_of_one_directory_stand_side_by_side() -> None:
    """DESIGN: a container's entries are laid out in path order, and the files of one directory are adjacent: those of
    its subfolders do not stand between them."""
    paths = ["a/x", "a.txt", "a/b/1", "a/y", "a/b/2", "a/a", "b/1"]
    (only,) = cut(map(item, paths), max_bytes=100, max_files=100, big_file_threshold=100)
    assert names([only]) == [["a.txt", "a/a", "a/x", "a/y", "a/b/1", "a/b/2", "b/1"]]


def test_containers_are_cut_by_size_and_by_count() -> None:
    """`--max-container-bytes` and `--max-container-files` say where a container ends."""
    items = [item(f"{number}", 10) for number in range(5)]
    assert names(list(cut(items, max_bytes=20, max_files=100, big_file_threshold=100))) == [
        ["0", "1"],
        ["2", "3"],
        ["4"],
    ]
    assert names(list(cut(items, max_bytes=1000, max_files=4, big_file_threshold=100))) == [["0", "1", "2", "3"], ["4"]]


def test_a_file_that_is_larger_than_a_container_may_be_has_one_of_its_own() -> None:
    """A file is never split, and never refused for its size here."""
    items = [item("a", 5), item("b", 500), item("c", 5)]
    assert names(list(cut(items, max_bytes=100, max_files=9, big_file_threshold=1000))) == [["a"], ["b"], ["c"]]


def test_external_files_count_as_files_not_as_bytes() -> None:
    """The bytes of a file of `--big-file-threshold` or more do not lie in the container."""
    items = [item(f"{number}", 1000) for number in range(4)]
    assert names(list(cut(items, max_bytes=100, max_files=3, big_file_threshold=1000))) == [["0", "1", "2"], ["3"]]


def test_nothing_makes_no_container() -> None:
    """No files, no container."""
    assert list(cut([], max_bytes=1, max_files=1, big_file_threshold=1)) == []


@given(
    st.lists(
        st.builds(
            item,
            st.text("ab/", min_size=1, max_size=6),
            st.integers(0, 60),
            day=st.sampled_from(DAYS),
            shard=st.sampled_from("01"),
        ),
        max_size=30,
        unique_by=lambda each: (each.path, each.day, each.shard),
    ),
    st.integers(0, 100),
    st.integers(1, 5),
    st.integers(1, 60),
)
def test_every_file_is_in_one_container_within_the_limits(
    items: list[Item], max_bytes: int, max_files: int, threshold: int
) -> None:
    """Each file is planned once, with those of its day and shard; only a single file is larger than a container may
    be; a container ends only where the next file would not fit."""
    cuts = list(cut(items, max_bytes=max_bytes, max_files=max_files, big_file_threshold=threshold))

    def inside(members: tuple[Item, ...]) -> int:
        return sum(each.state.size for each in members if each.state.size < threshold)

    planned = [each for one in cuts for each in one.items]
    assert sorted(map(id, planned)) == sorted(map(id, items))
    for one in cuts:
        assert one.items
        assert {(each.day, each.shard) for each in one.items} == {(one.day, one.shard)}
        assert len(one.items) <= max_files
        assert inside(one.items) <= max_bytes or len(one.items) == 1 or inside(one.items[:-1]) == 0
        folders = [each.name.rpartition("/")[0] for each in one.items]
        assert folders == sorted(folders)
    for one, following in itertools.pairwise(cuts):
        if (one.day, one.shard) == (following.day, following.shard):
            assert len(one.items) == max_files or inside((*one.items, following.items[0])) > max_bytes


def test_the_plan_does_not_depend_on_the_order_of_the_scan() -> None:
    """Equal files give equal containers."""
    items = [item(f"{number % 3}/{number}") for number in range(10)]
    once = list(cut(items, max_bytes=3, max_files=3, big_file_threshold=9))
    assert once == list(cut(reversed(items), max_bytes=3, max_files=3, big_file_threshold=9))


def test_an_item_cannot_be_changed() -> None:
    """A plan is made of values."""
    with pytest.raises(AttributeError):
        item("a").name = "b"  # type: ignore[misc]
