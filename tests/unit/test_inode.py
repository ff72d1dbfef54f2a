"""docs/architecture.md, The read path: inode numbers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from desfs.inode import (
    CONTROL_DIRECTORY,
    CONTROL_FILES,
    ROOT,
    Slots,
    directory_inode,
    file_inode,
    is_directory_inode,
    preferred_slot,
    split_file_inode,
)


@given(st.integers(1, 2**30 - 1), st.integers(0, 2**32 - 2))
def test_a_file_is_its_slot_and_row(slot: int, row: int) -> None:
    """Inode = (container slot << 32) | (entry + 1): positive as a signed number, and no directory's."""
    inode = file_inode(slot, row)
    assert split_file_inode(inode) == (slot, row)
    assert CONTROL_FILES + 4 < inode < 2**62
    assert not is_directory_inode(inode)


@given(st.binary(max_size=50), st.sampled_from([None, "x3", "x3f", "x3f1", "d10", "other"]))
def test_a_directory_has_the_hash_of_its_path(path: bytes, group: str | None) -> None:
    inode = directory_inode(path, group)
    assert is_directory_inode(inode)
    assert 0 < inode < 2**63
    assert inode == directory_inode(path, group)
    assert inode != directory_inode(path + b"x", group)


GROUPS = [[f"{n:0{digits}x}" for n in range(0, 16**digits, step)] for digits, step in ((1, 1), (2, 1), (3, 64))]


@pytest.mark.parametrize("groups", GROUPS)
@given(st.lists(st.text("ab", max_size=8), min_size=256, max_size=256))
def test_directories_sort_by_the_group_of_their_files(groups: list[str], paths: list[str]) -> None:
    """`cp -r` walks in the order of inodes: group by group, as slots do."""
    inodes = [directory_inode(path.encode(), f"x{group}") for group, path in zip(groups, paths, strict=False)]
    first = [inode >> 54 & 255 for inode in inodes]
    assert first == sorted(first)
    assert first == [int(f"{group:0<2}"[:2], 16) for group in groups]


@pytest.mark.parametrize("groups", GROUPS)
def test_slots_begin_with_the_group(groups: list[str]) -> None:
    """The containers of one shard are neighbours in the order of inodes, whatever days and parts there are."""
    slots = Slots[int]()
    for group in groups:
        for key in (f"2026-11-20/{group}.des", f"2026-11-19/{group}-000001.des", f"x/{group}-000002-000010.des"):
            slot = slots.add(key, "etag", lambda slot: slot)
            assert slot == preferred_slot(key, "etag")
            assert slot >> 22 == int(f"{group:0<2}"[:2], 16) or (len(group) == 1 and slot >> 26 == int(group, 16))


def test_other_containers_have_any_slot() -> None:
    slots = [preferred_slot(f"2026-11-20/{name}.des", "e") for name in ("shard_10", "shard_11", "other", "x", "xz")]
    assert len({slot >> 22 for slot in slots}) > 1
    assert all(0 <= slot < 2**30 for slot in slots)


def test_root_and_control_files_are_neither() -> None:
    for inode in (ROOT, CONTROL_DIRECTORY, CONTROL_FILES):
        assert not is_directory_inode(inode)
        assert split_file_inode(inode)[0] == 0


def test_slots_survive_a_remount() -> None:
    """Slots come from a hash of the container's key and ETag, so that inode numbers survive a remount, in whatever
    order containers are opened."""
    containers = [(f"2026-11-20/{n:02x}.des", f"etag{n}") for n in range(256)]
    first, second = Slots[int](), Slots[int]()
    slots = {key: first.add(key, etag, lambda slot: slot) for key, etag in containers}
    assert {key: second.add(key, etag, lambda slot: slot) for key, etag in reversed(containers)} == slots
    assert len(set(slots.values())) == 256
    assert all(0 < slot < 2**30 for slot in slots.values())


def test_another_version_has_another_slot() -> None:
    slots = Slots[int]()
    assert slots.add("k", "1", lambda slot: slot) != slots.add("k", "2", lambda slot: slot)


def test_on_a_collision_the_next_free_slot_is_taken() -> None:
    slots = Slots[tuple[str, int]]()
    one = slots.add("k", "1", lambda slot: ("one", slot))
    two = slots.add("k", "1", lambda slot: ("two", slot))
    assert two[1] == one[1] + 1
    assert slots.get(one[1]) == one
    assert slots[two[1]] == two
    assert sorted(slots) == [one, two]
    slots.remove(one[1])
    assert slots.get(one[1]) is None
    assert slots.add("k", "1", lambda slot: ("three", slot))[1] == one[1]


def test_on_a_collision_a_slot_stays_in_its_group() -> None:
    slots = Slots[int]()
    taken = [slots.add("7f.des", "1", lambda slot: slot) for _ in range(3)]
    assert taken == [taken[0], taken[0] + 1, taken[0] + 2]
    last = next(etag for etag in map(str, itertools.count()) if (preferred_slot("00.des", etag) + 1) % 2**22 == 0)
    assert [slots.add("00.des", last, lambda slot: slot) for _ in range(2)] == [2**22 - 1, 1]  # 0 is the root's


def test_a_slot_that_was_freed_is_its_versions_for_ever() -> None:
    """What the kernel and the caches keep of a slot must not become another version's: when it is free again, the same
    version gets it, and no other ever."""
    first, second = colliding()
    slots = Slots[int]()
    slot = slots.add("k", first, lambda slot: slot)
    slots.remove(slot)
    other = slots.add("k", second, lambda slot: slot)
    assert other == slot + 1
    slots.remove(other)
    assert slots.add("k", second, lambda slot: slot) == other
    assert slots.add("k", first, lambda slot: slot) == slot


def colliding() -> tuple[str, str]:
    """Two ETags of a key that have the same slot in a new mount: about 40,000 tries."""
    seen: dict[int, str] = {}
    for etag in map(str, itertools.count()):
        slot = Slots[int]().add("k", etag, lambda slot: slot)
        if slot in seen:
            return seen[slot], etag
        seen[slot] = etag
    raise AssertionError
