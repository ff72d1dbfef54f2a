"""Inode numbers: computed, never counted, the same after a remount. Pure.

    slot << 32 | row + 1                    a file: its container's slot, its row in the container's index
    1, 2 …                                  slot 0: the root and the control files
    1 << 62 | group << 54 | 54 bits of hash a directory: the shard group that its files are in, the hash of its path
    1 << 62 | 62 bits of hash               a directory of which no group is known

Slots have 30 bits, so a file's number stays below a directory's, and both are positive as signed integers. A slot
begins with the shard group as well: who walks in the order of inodes, as `cp -r` does, or in that of the listing, which
is the same, reads one container after the other, each from its start to its end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Generic, NewType, TypeVar

import xxhash

from des_format.shards import parse_container_name

InodeNumber = NewType("InodeNumber", int)
T = TypeVar("T")

NOTHING = InodeNumber(0)
ROOT = InodeNumber(1)  # FUSE_ROOT_ID
CONTROL_DIRECTORY = InodeNumber(2)
CONTROL_FILES = 3  # the first of them

_ROW_BITS = 32
_ROW_MASK = (1 << _ROW_BITS) - 1
_SLOT_BITS = 30
_GROUP_BITS = 8  # as many as a store has that spreads a day over 256 containers
_DIRECTORY_BITS = 62
_DIRECTORY = 1 << _DIRECTORY_BITS
_HEX_GROUP = re.compile(r"x([0-9a-f]+)", re.ASCII)  # ContainerKey.group


def file_inode(slot: int, row: int) -> InodeNumber:
    """The inode of a row of an open container."""
    return InodeNumber(slot << _ROW_BITS | row + 1)


def split_file_inode(inode: int) -> tuple[int, int]:
    """(slot, row) of a file's inode."""
    return inode >> _ROW_BITS, (inode & _ROW_MASK) - 1


def directory_inode(path: bytes, group: str | None = None) -> InodeNumber:
    """The inode of a directory, from its path below the root, `2026-11-20` or `2026-11-20/a/b`, and the shard group of
    the files in it."""
    place, bits = _leading(group)
    if bits == 0:
        return InodeNumber(_DIRECTORY | xxhash.xxh3_64_intdigest(path) & (_DIRECTORY - 1))
    rest = _DIRECTORY_BITS - _GROUP_BITS
    return InodeNumber(
        _DIRECTORY | place << _DIRECTORY_BITS - bits | xxhash.xxh3_64_intdigest(path) & ((1 << rest) - 1)
    )


def is_directory_inode(inode: int) -> bool:
    """True for what `directory_inode` gives."""
    return inode & _DIRECTORY != 0


def preferred_slot(key: str, etag: str) -> int:
    """The slot that a version of a container has as long as no other has taken it: the leading bits of its shard group,
    then a hash."""
    low, width = _slot_range(key)
    return low + xxhash.xxh3_64_intdigest(f"{key}\0{etag}".encode()) % width


def _slot_range(key: str) -> tuple[int, int]:
    """The first of the slots that a container may have, and how many there are."""
    name = parse_container_name(key.rpartition("/")[2])
    place, bits = _leading(None if name is None else name.group)
    width = 1 << _SLOT_BITS - bits
    return place * width, width


def _leading(group: str | None) -> tuple[int, int]:
    """The first bits of a group's hex digits, and how many these are: at most `_GROUP_BITS`, none for other groups."""
    digits = None if group is None else _HEX_GROUP.fullmatch(group)
    if digits is None:
        return 0, 0
    first = digits[1][: _GROUP_BITS // 4]
    return int(first, 16), 4 * len(first)


class Slots(Generic[T]):
    """Which open container has which slot. Slots come from key and ETag: the same version has the same slot in every
    mount, another version has another one. On a collision the next free slot of the group is taken. One thread."""

    def __init__(self) -> None:
        self._containers: dict[int, T] = {}
        # Of each slot ever given, the version: what the kernel and the caches keep of it must not become another's.
        self._versions: dict[int, tuple[str, str]] = {}

    def add(self, key: str, etag: str, make: Callable[[int], T]) -> T:
        """Give a container its slot: `make` is called with it."""
        version = (key, etag)
        slot = preferred_slot(key, etag)
        low, width = _slot_range(key)
        while slot == 0 or slot in self._containers or self._versions.get(slot, version) != version:
            slot = low + (slot + 1 - low) % width
        self._versions[slot] = version
        container = self._containers[slot] = make(slot)
        return container

    def get(self, slot: int) -> T | None:
        """The container in a slot."""
        return self._containers.get(slot)

    def __getitem__(self, slot: int) -> T:
        return self._containers[slot]

    def __len__(self) -> int:
        return len(self._containers)

    def __iter__(self) -> Iterator[T]:
        return iter(list(self._containers.values()))

    def remove(self, slot: int) -> None:
        """Free a slot; inodes in it are stale from now on."""
        del self._containers[slot]
