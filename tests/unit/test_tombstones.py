"""Tombstones: in a container, and which of them a removal needs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from des_format import DesReader, DesWriter, InvalidEntryName, InvalidMeta, WriterClosed
from des_format.index import TOMBSTONE
from des_format.layout import DELETED
from des_format.names import MAX_COMPONENT
from desfs.removal.day import open_day
from desfs.removal.plan import DayPlan, plan_removal
from desfs.removal.rm import build_tombstones
from desfs.store.file import FileStore
from desfs.tree import DayTree
from tests.removing import BITS, DAY, put_day, put_part, shard_of

# --- in a container --------------------------------------------------------------------------------------------------


def test_a_tombstone_is_a_record_without_a_payload(tmp_path: Path) -> None:
    """Readers list and find nothing under the name; a reader that knows no flags finds an empty payload in DATA."""
    with DesWriter(tmp_path / "f.des") as writer:
        writer.add_file("a", b"1")
        writer.add_deleted("gone", {"mtime": 7})
        writer.add_file("b", b"2")
        assert (writer.file_count, writer.data_length) == (3, 2)
    with DesReader(tmp_path / "f.des") as reader:
        assert reader.list_files() == ["a", "b"]
        assert "gone" not in reader
        assert reader.get_files_batch(["a", "gone", "b"]) == {"a": b"1", "b": b"2"}
        index = reader.get_index()
        row = index.find(b"gone")
        assert row is not None
        assert index.state[row] == TOMBSTONE
        entry = index.entry(row)
        assert (entry.data_offset, entry.data_length, entry.flags) == (17, 0, DELETED)
    raw = (tmp_path / "f.des").read_bytes()
    assert raw[entry.meta_offset : entry.meta_offset + entry.meta_length] == b'{"mtime":7,"size":0}'


def test_the_last_entry_of_a_name_counts(tmp_path: Path) -> None:
    with DesWriter(tmp_path / "f.des") as writer:
        writer.add_file("first", b"1")
        writer.add_deleted("first")
        writer.add_deleted("second")
        writer.add_file("second", b"2")
    with DesReader(tmp_path / "f.des") as reader:
        assert reader.list_files() == ["second"]


def test_what_is_refused_leaves_the_container_as_it_was(tmp_path: Path) -> None:
    with DesWriter(tmp_path / "f.des") as writer:
        for name in ("", "/a", "a/../b", "n" * (MAX_COMPONENT + 1)):
            with pytest.raises(InvalidEntryName):
                writer.add_deleted(name)
        with pytest.raises(InvalidMeta):
            writer.add_deleted("a", {"x": object()})
        writer.add_file("a", b"1")
    with DesReader(tmp_path / "f.des") as reader:
        assert (reader.list_files(), reader.get_index().rows) == (["a"], 1)
    with pytest.raises(WriterClosed):
        writer.add_deleted("b")


# --- which are needed ------------------------------------------------------------------------------------------------

FILES = {name: name.encode() for name in ("a", "b", "photos/1", "photos/2", "photos/old/3", "photosynthesis")}


def plan(root: Path, *paths: str, recursive: bool = False, passing: tuple[str, ...] = ()) -> DayPlan:
    members = open_day(FileStore(root), str(DAY)).members
    return plan_removal(members, BITS, paths, recursive=recursive, passing=passing)


def carry_out(root: Path, found: DayPlan, generation: int = 2) -> None:
    """Write the tombstones of a plan."""
    for shard, names in found.shards.items():
        path = root / f"{DAY}/{shard}-{generation:06d}.des"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(build_tombstones(names, {}))


def shown(root: Path) -> set[str]:
    members = open_day(FileStore(root), str(DAY)).members
    tree = DayTree(members)
    return {
        member.index.name(row).decode()
        for member in members
        for row in range(member.index.rows)
        if tree.is_shown(member, row)
    }


@pytest.mark.parametrize(
    ("paths", "recursive", "gone"),
    [
        (["a"], False, {"a"}),
        (["a", "photos/2"], False, {"a", "photos/2"}),
        (["photos"], True, {"photos/1", "photos/2", "photos/old/3"}),
        (["photos/old", "b"], True, {"photos/old/3", "b"}),
        (["photos", "photos/old"], True, {"photos/1", "photos/2", "photos/old/3"}),
        ([""], True, set(FILES)),
    ],
)
def test_just_what_is_named_goes(tmp_path: Path, paths: list[str], recursive: bool, gone: set[str]) -> None:
    put_day(tmp_path, FILES)
    found = plan(tmp_path, *paths, recursive=recursive)
    assert (found.missing, found.directories, found.gone) == ([], [], [])
    assert found.names() == sorted(gone)
    assert {name: shard for shard, names in found.shards.items() for name in names} == {
        name: shard_of(name) for name in gone
    }
    carry_out(tmp_path, found)
    assert shown(tmp_path) == set(FILES) - gone
    assert plan(tmp_path, *paths, recursive=recursive) == DayPlan(gone=paths)


def test_what_is_not_there_and_what_is_a_directory(tmp_path: Path) -> None:
    put_day(tmp_path, FILES)
    found = plan(tmp_path, "photo", "photos", "a", "photos/1/x", "")
    assert (found.missing, found.directories) == (["photo", "photos/1/x"], ["photos", ""])
    assert plan(tmp_path, "photo", "photos/", recursive=True).missing == ["photo", "photos/"]
    assert plan(tmp_path / "..", "a", recursive=True).missing == ["a"]


def test_a_file_that_a_directory_hides_goes_with_it(tmp_path: Path) -> None:
    """What `rm -r` removed must not leave a file behind that nobody saw."""
    put_day(tmp_path, {"a": b"hidden", "a/b": b"shown"})
    assert shown(tmp_path) == {"a/b"}
    assert plan(tmp_path, "a").directories == ["a"]
    carry_out(tmp_path, plan(tmp_path, "a", recursive=True))
    assert shown(tmp_path) == set()


def test_every_shard_that_has_a_name_gets_a_tombstone(tmp_path: Path) -> None:
    """A version in another shard would come back when this one is merged, and its tombstone dropped."""
    put_day(tmp_path, {"a": b"at home"})
    other = next(shard for shard in "0123" if shard != shard_of("a"))
    put_part(tmp_path, f"{DAY}/{other}-000001.des", {"a": b"elsewhere"})
    found = plan(tmp_path, "a")
    assert found.shards == {shard: ["a"] for shard in sorted((shard_of("a"), other))}
    # Half done: the shard that is newer between the two hides both, and the rest is still to be done.
    (tmp_path / f"{DAY}/{other}-000002.des").write_bytes(build_tombstones(["a"], {}))
    assert shown(tmp_path) == set()
    assert plan(tmp_path, "a").shards == {shard_of("a"): ["a"]}


def test_a_tombstone_that_is_about_to_go_hides_nothing(tmp_path: Path) -> None:
    """That of a removal which was not committed."""
    put_day(tmp_path, {"a": b"1"})
    key = f"{DAY}/{shard_of('a')}-000002.des"
    put_part(tmp_path, key, {}, deleted=["a"])
    assert plan(tmp_path, "a") == DayPlan(gone=["a"])
    assert plan(tmp_path, "a", passing=(key,)).shards == {shard_of("a"): ["a"]}


def test_a_newer_version_goes_as_well(tmp_path: Path) -> None:
    put_day(tmp_path, {"a": b"1"})
    put_part(tmp_path, f"{DAY}/{shard_of('a')}-000002.des", {}, deleted=["a"])
    put_part(tmp_path, f"{DAY}/{shard_of('a')}-000003.des", {"a": b"again"})
    assert plan(tmp_path, "a").shards == {shard_of("a"): ["a"]}


@pytest.mark.parametrize("key", [f"{DAY}.des", f"{DAY}/shard_10.des", f"{DAY}/all.des", f"{DAY}/x{shard_of('a')}.des"])
def test_what_has_no_parts_is_hidden_by_a_later_tombstone(tmp_path: Path, key: str) -> None:
    """Between containers that are no parts of one shard, the one that was modified last counts."""
    path = put_part(tmp_path, key, {"a": b"1", "b": b"2"})
    found = plan(tmp_path, "a")
    assert found.shards == {shard_of("a"): ["a"]}
    assert found.newer_than == {"a": (path.stat().st_mtime_ns, key)}
    carry_out(tmp_path, found)
    assert shown(tmp_path) == {"b"}
    assert plan(tmp_path, "a") == DayPlan(gone=["a"])
    # Modified later than the tombstone, it is shown again, and another one is needed.
    later = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))
    if not key.endswith(f"/x{shard_of('a')}.des"):  # which a mount takes for the shard's sealed container
        assert shown(tmp_path) == {"a", "b"}
    assert plan(tmp_path, "a").newer_than == {"a": (later, key)}


def test_a_container_that_is_none_is_left_out_and_named(tmp_path: Path) -> None:
    put_day(tmp_path, FILES)
    (tmp_path / f"{DAY}/0-000009.des").write_bytes(b"no container at all" * 10)
    opened = open_day(FileStore(tmp_path), str(DAY))
    assert [problem.partition(":")[0] for problem in opened.problems] == [f"{DAY}/0-000009.des"]
    assert len(opened.members) == len(set(map(shard_of, FILES)))
