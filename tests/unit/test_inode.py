"""docs/architecture.md, The read path: inode numbers."""

from __future__ import annotations

import itertools

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
    split_file_inode,
)


@given(st.integers(1, 2**30 - 1), st.integers(0, 2**32 - 2))
def test_a_file_is_its_slot_and_row(slot: int, row: int) -> None:
    """Inode = (container slot << 32) | (entry + 1): positive as a signed number, and no directory's."""
    inode = file_inode(slot, row)
    assert split_file_inode(inode) == (slot, row)
    assert CONTROL_FILES + 4 < inode < 2**62
    assert not is_directory_inode(inode)


@given(st.binary(max_size=50))
def test_a_directory_has_the_hash_of_its_path(path: bytes) -> None:
    inode = directory_inode(path)
    assert is_directory_inode(inode)
    assert 0 < inode < 2**63
    assert inode == directory_inode(path)


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
