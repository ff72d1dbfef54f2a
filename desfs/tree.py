"""What a day shows: the union of its containers' entries as directories and files. Pure.

Directories are not built as objects: a container keeps the sorted paths of the folders that files stand in directly,
and everything above them follows by bisection. So a name with two thousand levels costs its own bytes, no more.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import InitVar, dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from des_format.index import NOT_SHOWN, Index
from des_format.shards import ContainerKey

Rows = npt.NDArray[np.uint32]

_ROWS_AT_A_TIME = 512
_LISTINGS_KEPT = 64  # directories whose listing is kept between the kernel's READDIRs


class SortedFolders:
    """A set of folder paths that knows all the directories above them."""

    def __init__(self, paths: Iterable[bytes]) -> None:
        # NUL sorts before every byte of a name and stands in none: a folder's subtree is one run behind it.
        self._keys = sorted(path.replace(b"/", b"\0") for path in paths)

    def __contains__(self, path: bytes) -> bool:
        if not path:
            return bool(self._keys)
        key = path.replace(b"/", b"\0")
        at = bisect_left(self._keys, key)
        return at < len(self._keys) and (self._keys[at] == key or self._keys[at].startswith(key + b"\0"))

    def children(self, path: bytes) -> list[bytes]:
        """The names of the directories directly in `path`, ascending."""
        prefix = path.replace(b"/", b"\0") + b"\0" if path else b""
        found = []
        at = bisect_left(self._keys, prefix)
        if not path and at < len(self._keys) and not self._keys[at]:
            at += 1  # the day itself
        while at < len(self._keys) and self._keys[at].startswith(prefix):
            child = self._keys[at][len(prefix) :].partition(b"\0")[0]
            found.append(child)
            at = bisect_left(self._keys, prefix + child + b"\x01", at)  # behind the child's own subtree
        return found


class Folders:
    """Which shown rows of an index stand directly in which folder (b"" is the day itself); rows in data order."""

    def __init__(self, index: Index) -> None:
        shown = index.shown()
        group_of: dict[bytes, int] = {}
        groups = array("q")
        for row in shown.tolist():
            name = index.name(row)
            folder = name[: max(name.rfind(b"/"), 0)]
            groups.append(group_of.setdefault(folder, len(group_of)))
        grouped = np.frombuffer(groups, np.int64)
        self._group_of = group_of
        self._rows: Rows = shown[np.argsort(grouped, kind="stable")]
        self._starts = np.zeros(len(group_of) + 1, np.int64)
        np.cumsum(np.bincount(grouped, minlength=len(group_of)), out=self._starts[1:])

        self.sorted = SortedFolders(group_of)

    @classmethod
    def from_columns(cls, paths: Sequence[bytes], rows: Rows, starts: npt.NDArray[np.int64]) -> Folders:
        """What `columns` gave; the arrays are not copied. Raises: ValueError when they do not fit together."""
        if len(starts) != len(paths) + 1 or int(starts[-1]) != len(rows):
            raise ValueError(f"{len(paths)} folders of {len(rows)} rows with {len(starts)} bounds")
        folders = cls.__new__(cls)
        folders._group_of = {path: group for group, path in enumerate(paths)}
        folders._rows = rows
        folders._starts = starts
        folders.sorted = SortedFolders(folders._group_of)
        return folders

    def columns(self) -> tuple[list[bytes], Rows, npt.NDArray[np.int64]]:
        """(paths, rows: u32[shown], starts: i64[paths + 1]): the rows of a folder are from its start to the next."""
        return list(self._group_of), self._rows, self._starts

    def paths(self) -> Iterator[bytes]:
        """Every folder that a file stands in directly."""
        return iter(self._group_of)

    def rows(self, folder: bytes) -> Rows:
        """The rows directly in a folder, ascending; none for an unknown one."""
        group = self._group_of.get(folder)
        return self._rows[:0] if group is None else self._rows[self._starts[group] : self._starts[group + 1]]


@dataclass(eq=False, slots=True)
class Member:
    """One container of a day: its index, its slot, and what decides its rank. `ordinal` numbers the day's containers in
    the order in which they were first seen, from 1: directory positions are made of it. The folders are computed from
    the index if they are not known."""

    ordinal: int
    slot: int
    index: Index
    key: str
    name: ContainerKey
    mtime_ns: int
    known_folders: InitVar[Folders | None] = None
    folders: Folders = field(init=False)

    def __post_init__(self, known_folders: Folders | None) -> None:
        self.folders = Folders(self.index) if known_folders is None else known_folders


class Position(NamedTuple):
    """Where something stands in a listing; `cookie` is what the kernel hands back to go on behind it."""

    cookie: int
    name: bytes
    member: Member | None  # None: a directory
    row: int


class _Segment(NamedTuple):
    """One container's share of a directory: it depends on the container alone, but for `fresh`, the subdirectories to
    show, which no container before has shown."""

    member: Member
    folders: list[bytes]
    fresh: set[bytes]
    rows: Rows


class DayTree:
    """The union of containers. Immutable: a change of the day makes a new one.

    `collisions` are the files (member, row) that are hidden because a directory has their name.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = sorted(members, key=lambda member: member.ordinal)
        self._groups: dict[str, list[Member]] = {}
        for member in self.members:
            self._groups.setdefault(member.name.group, []).append(member)
        self._hidden: dict[int, npt.NDArray[np.bool_]] = {}
        # Overwritten rows that are listed as their newest version, and the newest versions that are listed there.
        self._listed_for: dict[tuple[int, int], tuple[Member, int]] = {}
        self._listed_elsewhere: set[tuple[int, int]] = set()
        self._listings: dict[bytes, list[_Segment]] = {}
        if len(self.members) > 1:
            self._hide_older_versions()
        self._folders = SortedFolders(self._visible_folders())
        self.collisions = self._hide_colliding_files()

    def find_file(self, path: bytes, likely: str | None = None) -> tuple[Member, int] | None:
        """The container and row that a path shows, or None. A tombstone shows nothing. Containers of the group `likely`
        are asked first."""
        # At most one container shows a path, so the order decides about speed alone.
        for member in chain(self._groups.get(likely or "", ()), self.members):
            row = member.index.find(path)
            if row is not None and self.is_shown(member, row):
                return member, row
        return None

    def is_directory(self, path: bytes) -> bool:
        """True if a shown file stands somewhere below `path`; the day itself is one always."""
        return not path or path in self._folders

    def is_shown(self, member: Member, row: int) -> bool:
        """False for a row that a newer container, a tombstone or a directory hides."""
        hidden = self._hidden.get(member.ordinal)
        return not member.index.state[row] & NOT_SHOWN and (hidden is None or not hidden[row])

    def file_count(self) -> int:
        """Files that the day shows."""
        count = 0
        for member in self.members:
            hidden = self._hidden.get(member.ordinal)
            count += len(member.index) if hidden is None else int(np.count_nonzero(~hidden[member.index.shown()]))
        return count

    def entries(self, path: bytes, after: int = 0) -> Iterator[Position]:
        """The entries of a directory behind the position `after` (0: from the start): for each container in the order
        of arrival its new subdirectories, then its files in data order.

        Positions hold while the day changes: cookie = ordinal << 32 | place in the container's share + 1.
        """
        for member, folders, fresh, rows in self._segments(path):
            base = member.ordinal << 32
            skip = max(after - base, 0)
            if skip >= len(folders) + len(rows):
                continue
            for place in range(skip, len(folders)):
                if folders[place] in fresh:
                    yield Position(base + place + 1, folders[place], None, 0)
            cut = len(path) + 1 if path else 0
            # In pieces: the kernel takes some hundred entries at a time, and asks anew behind them.
            for first in range(max(skip - len(folders), 0), len(rows), _ROWS_AT_A_TIME):
                piece = rows[first : first + _ROWS_AT_A_TIME].tolist()
                for place, row in enumerate(piece, len(folders) + first + 1):
                    shown = self._listed_at(member, row)
                    if shown is not None:
                        yield Position(base + place, member.index.name(row)[cut:], *shown)

    def listed(self, path: bytes, after: int, upto: int) -> Iterator[tuple[int, Rows]]:
        """The files of a directory at the positions (after, upto], as slots and rows: what `entries` has given between
        the two. A file that is shown elsewhere, or not at all, may be among them."""
        for member, folders, _, rows in self._segments(path):
            base = member.ordinal << 32
            low, high = (min(max(at - base - len(folders), 0), len(rows)) for at in (after, upto))
            if low < high:
                yield member.slot, rows[low:high]

    def _listed_at(self, member: Member, row: int) -> tuple[Member, int] | None:
        """What a listing shows in the place of a row: the row, a newer version of its name, or nothing."""
        if self._listed_for:
            winner = self._listed_for.get((member.ordinal, row))
            if winner is not None:
                return winner if self.is_shown(*winner) else None
            if (member.ordinal, row) in self._listed_elsewhere:
                return None
        return (member, row) if self.is_shown(member, row) else None

    def _segments(self, path: bytes) -> list[_Segment]:
        segments = self._listings.get(path)
        if segments is None:
            segments, seen = [], set[bytes]()
            visible = set(self._folders.children(path))
            for member in self.members:
                folders = member.folders.sorted.children(path) if visible else []
                fresh = visible.intersection(folders) - seen
                seen |= fresh
                segments.append(_Segment(member, folders, fresh, member.folders.rows(path)))
            if len(self._listings) >= _LISTINGS_KEPT:
                self._listings.pop(next(iter(self._listings)))
            self._listings[path] = segments
        return segments

    def _hidden_rows(self, member: Member) -> npt.NDArray[np.bool_]:
        hidden = self._hidden.get(member.ordinal)
        if hidden is None:
            hidden = self._hidden[member.ordinal] = np.zeros(member.index.rows, np.bool_)
        return hidden

    def _hide_older_versions(self) -> None:
        """Of all rows with one name (tombstones included) only the newest counts: in a shard the last generation, then
        the newest container, LastModified before key."""
        tables = [member.index.hashes for member in self.members]
        hashes = np.concatenate([table[0] for table in tables])
        owners = np.concatenate([np.full(len(table[0]), n, np.uint32) for n, table in enumerate(tables)])
        rows = np.concatenate([table[1] for table in tables])
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        equal = np.flatnonzero(hashes[1:] == hashes[:-1])
        if not len(equal):
            return
        involved = np.unique(np.concatenate([equal, equal + 1]))
        versions: dict[bytes, list[tuple[Member, int]]] = {}
        current: np.uint64 | None = None
        for at in involved.tolist():
            if hashes[at] != current:
                self._hide_all_but_newest(versions)
                versions, current = {}, hashes[at]
            member, row = self.members[owners[order[at]]], int(rows[order[at]])
            versions.setdefault(member.index.name(row), []).append((member, row))
        self._hide_all_but_newest(versions)

    def _hide_all_but_newest(self, versions: dict[bytes, list[tuple[Member, int]]]) -> None:
        for candidates in versions.values():
            if len(candidates) > 1:
                newest = _newest([member for member, _ in candidates])
                for member, row in candidates:
                    if member is not newest:
                        self._hidden_rows(member)[row] = True
                self._keep_place(candidates, newest)

    def _keep_place(self, candidates: list[tuple[Member, int]], newest: Member) -> None:
        """A name stays where its first container has it when a newer version comes: a listing that is being read then
        neither repeats nor skips it."""
        shown = [(member, row) for member, row in candidates if not member.index.state[row] & NOT_SHOWN]
        winner = next(((member, row) for member, row in shown if member is newest), None)
        if winner is not None:
            home, row = min(shown, key=lambda each: each[0].ordinal)
            if home is not newest:
                self._listed_for[home.ordinal, row] = winner
                self._listed_elsewhere.add((winner[0].ordinal, winner[1]))

    def _visible_folders(self) -> set[bytes]:
        folders: set[bytes] = set()
        for member in self.members:
            hidden = self._hidden.get(member.ordinal)
            for path in member.folders.paths():
                if path not in folders and (hidden is None or not hidden[member.folders.rows(path)].all()):
                    folders.add(path)
        return folders

    def _hide_colliding_files(self) -> list[tuple[Member, int]]:
        """A directory wins over a file of its name. Only the children of folders with files can collide."""
        holders = {path for member in self.members for path in member.folders.paths()}
        if holders <= {b""}:
            return []
        hashes = np.array(
            [
                xxhash.xxh3_64_intdigest(folder + b"/" + name if folder else name)
                for folder in holders
                for name in self._folders.children(folder)
            ],
            np.uint64,
        )
        if not len(hashes):
            return []
        hashes.sort()
        collisions = []
        for member in self.members:
            table, rows = member.index.hashes
            # Names among directories, not the other way: a day has many containers, each with a few of its names.
            at = np.minimum(hashes.searchsorted(table), len(hashes) - 1)
            for row in rows[hashes[at] == table].tolist():
                if self.is_shown(member, row) and self.is_directory(member.index.name(row)):
                    self._hidden_rows(member)[row] = True
                    collisions.append((member, row))
        return collisions


def _newest(members: list[Member]) -> Member:
    by_group: dict[str, Member] = {}
    for member in members:
        other = by_group.get(member.name.group)
        # `3f-1.des` and `3f-000001.des` are one generation: then the newer object counts, as between shards.
        if other is None or (member.name.order, *_age(member)) > (other.name.order, *_age(other)):
            by_group[member.name.group] = member
    return max(by_group.values(), key=_age)


def _age(member: Member) -> tuple[int, str]:
    return member.mtime_ns, member.key
