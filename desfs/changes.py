"""What differs between a day as it was shown and as it is shown now. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

from des_format.index import Index
from des_format.meta import MetaColumns
from desfs.tree import DayTree, are_in


def changed_paths(old_trees: list[DayTree], new_trees: list[DayTree]) -> list[bytes]:
    """The paths that showed a row of an old tree and show something else, or nothing, in the new ones; directories that
    are gone included."""
    new_members = {id(member) for tree in new_trees for member in tree.members}
    old_members = {id(member) for tree in old_trees for member in tree.members}
    known = np.concatenate([np.empty(0, np.uint64), *(m.index.hashes[0] for tree in old_trees for m in tree.members)])
    known.sort()
    suspects: dict[bytes, str] = {}  # and the group to look in first: a day may have hundreds of containers
    for tree in old_trees:
        for member in tree.members:
            if id(member) not in new_members:
                for row in member.index.shown().tolist():
                    if tree.is_shown(member, row):
                        suspects[member.index.name(row)] = member.name.group
    for tree in new_trees:
        for member in tree.members:
            if id(member) not in old_members:
                hashes, rows = member.index.hashes
                for row in rows[are_in(hashes, known)].tolist():
                    suspects.setdefault(member.index.name(row), member.name.group)
        for member, row in tree.collisions:
            suspects.setdefault(member.index.name(row), member.name.group)
    changed: set[bytes] = set()
    for path, group in suspects.items():
        before = _shows(old_trees, path, group)
        if before is not None and before != _shows(new_trees, path, group):
            changed.add(path)
    for path in list(changed):
        folder = path.rpartition(b"/")[0]
        while folder and not any(tree.is_directory(folder) for tree in new_trees):
            changed.add(folder)
            folder = folder.rpartition(b"/")[0]
    return sorted(changed)


def changed_folders(old_trees: list[DayTree], new_trees: list[DayTree]) -> list[bytes]:
    """The directories in which something may have come or gone, the day itself left out."""
    old_members, new_members = ({id(m): m for tree in trees for m in tree.members} for trees in (old_trees, new_trees))
    found: set[bytes] = set()
    for place in old_members.keys() ^ new_members.keys():
        for folder in (old_members.get(place) or new_members[place]).folders.paths():
            while folder and folder not in found:
                found.add(folder)
                folder = folder.rpartition(b"/")[0]
    return sorted(found)


def shown_paths(paths: Sequence[bytes], trees: list[DayTree]) -> list[bytes]:
    """Those of some paths that are a file or a directory in one of the trees."""
    hashes = np.array([xxhash.xxh3_64_intdigest(path) for path in paths], np.uint64)
    known = np.zeros(len(paths), np.bool_)
    for tree in trees:
        for member in tree.members:
            known |= are_in(hashes, member.index.hashes[0])
    return [
        path
        for path, is_known in zip(paths, known.tolist(), strict=True)
        if any(tree.is_directory(path) or (is_known and tree.find_file(path)) for tree in trees)
    ]


def same_content(index: Index, meta: MetaColumns, row: int, new: Index, new_meta: MetaColumns, new_row: int) -> bool:
    """Whether two rows have one content, as far as their size, time and checksum tell; False without a checksum."""
    if index.data_length[row] != new.data_length[new_row] or meta.mtime_ns[row] != new_meta.mtime_ns[new_row]:
        return False
    if meta.has_crc32c[row] and new_meta.has_crc32c[new_row]:
        return bool(meta.crc32c[row] == new_meta.crc32c[new_row])
    return row in meta.sha256 and meta.sha256[row] == new_meta.sha256.get(new_row)


def _shows(trees: list[DayTree], path: bytes, group: str) -> tuple[int, int] | None:
    for tree in trees:
        found = tree.find_file(path, group)
        if found is not None:
            return id(found[0]), found[1]
    return None
