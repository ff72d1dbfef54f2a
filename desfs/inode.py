"""Inode numbers: computed, never counted, the same after a remount. Pure.

    slot << 32 | row + 1        a file: its container's slot, its row in the container's index
    1, 2 …                      slot 0: the root and the control files
    1 << 62 | 62 bits of hash   a directory: the hash of its path from the root

Slots have 30 bits, so a file's number stays below a directory's, and both are positive as signed integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, NewType, TypeVar

import xxhash

InodeNumber = NewType("InodeNumber", int)
T = TypeVar("T")

ROOT = InodeNumber(1)  # FUSE_ROOT_ID
CONTROL_DIRECTORY = InodeNumber(2)
CONTROL_FILES = 3  # the first of them

_ROW_BITS = 32
_ROW_MASK = (1 << _ROW_BITS) - 1
_SLOT_BITS = 30
_DIRECTORY = 1 << 62


def file_inode(slot: int, row: int) -> InodeNumber:
    """The inode of a row of an open container."""
    return InodeNumber(slot << _ROW_BITS | row + 1)


def split_file_inode(inode: int) -> tuple[int, int]:
    """(slot, row) of a file's inode."""
    return inode >> _ROW_BITS, (inode & _ROW_MASK) - 1


def directory_inode(path: bytes) -> InodeNumber:
    """The inode of a directory, from its path below the root: `2026-11-20` or `2026-11-20/a/b`."""
    return InodeNumber(_DIRECTORY | xxhash.xxh3_64_intdigest(path) & (_DIRECTORY - 1))


def is_directory_inode(inode: int) -> bool:
    """True for what `directory_inode` gives."""
    return inode & _DIRECTORY != 0


class Slots(Generic[T]):
    """Which open container has which slot. Slots come from a hash of key and ETag: the same version has the same slot
    in every mount, another version has another one. On a collision the next free slot is taken. One thread."""

    def __init__(self) -> None:
        self._containers: dict[int, T] = {}
        # Of each slot ever given, the version: what the kernel and the caches keep of it must not become another's.
        self._versions: dict[int, tuple[str, str]] = {}

    def add(self, key: str, etag: str, make: Callable[[int], T]) -> T:
        """Give a container its slot: `make` is called with it."""
        version = (key, etag)
        slot = xxhash.xxh3_64_intdigest(f"{key}\0{etag}".encode()) & ((1 << _SLOT_BITS) - 1)
        while slot == 0 or slot in self._containers or self._versions.get(slot, version) != version:
            slot = (slot + 1) & ((1 << _SLOT_BITS) - 1)
        self._versions[slot] = version
        container = self._containers[slot] = make(slot)
        return container

    def get(self, slot: int) -> T | None:
        """The container in a slot."""
        return self._containers.get(slot)

    def __getitem__(self, slot: int) -> T:
        return self._containers[slot]

    def __iter__(self) -> Iterator[T]:
        return iter(list(self._containers.values()))

    def remove(self, slot: int) -> None:
        """Free a slot; inodes in it are stale from now on."""
        del self._containers[slot]
