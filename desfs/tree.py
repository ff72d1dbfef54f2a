"""What a day shows: the union of its containers' entries as directories and files. Pure.

Directories are not built as objects: a container keeps the sorted paths of the folders that files stand in directly,
and everything above them follows by bisection. So a name with two thousand levels costs its own bytes, no more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass, field
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from des_format.index import NOT_SHOWN, Index
from des_format.shards import ContainerKey
from desfs.folders import Folders, Rows, SortedFolders, words_of

_ROWS_AT_A_TIME = 4096  # that a loop over names has in memory
# The kernel takes some 700 entries at a time (128 KiB of READDIRPLUS, the size of opendir's buffer), and asks anew
# behind them: more in one page would be computed twice, fewer would not be worth the dozen array operations of a page.
_PAGE = 512
_MANY_FOLDERS = 10_000  # of a day: going through them takes some 20 ms
_ORDINAL, _ROW = np.uint64(32), np.uint64((1 << 32) - 1)  # where an ordinal and a row stand in one number
_LISTINGS_KEPT = 64  # directories whose listing is kept between the kernel's READDIRs


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


class Share(NamedTuple):
    """The files of a page that are rows of one container: `rows[i]` stands at `places[i]` of the page."""

    member: Member
    rows: Rows
    places: npt.NDArray[np.int64]


class Page(NamedTuple):
    """Entries of a directory, one behind another; `cookies` are what the kernel hands back to go on behind them.

    All are files, each in one of the `shares`, or all are directories, and there are none.
    """

    cookies: list[int]
    names: list[bytes]
    shares: list[Share]


class _Segment(NamedTuple):
    """One container's share of a directory: it depends on the container alone, but for `fresh`, the subdirectories to
    show, which no container before has shown."""

    member: Member
    folders: list[bytes]
    fresh: set[bytes]
    files: int


class DayTree:
    """The union of containers. Immutable: a change of the day makes a new one.

    `collisions` are the files (member, row) that are hidden because a directory has their name.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = sorted(members, key=lambda member: member.ordinal)
        self._groups: dict[str, list[Member]] = {}
        self._member_of = {member.ordinal: member for member in self.members}
        for member in self.members:
            self._groups.setdefault(member.name.group, []).append(member)
        self._hidden: dict[int, npt.NDArray[np.bool_]] = {}
        # By container, a value for each row: the newest version that is listed in the row's place (ordinal << 32 | row,
        # 0 for none), and whether the row is listed in another's.
        self._listed_for: dict[int, npt.NDArray[np.uint64]] = {}
        self._listed_elsewhere: dict[int, npt.NDArray[np.bool_]] = {}
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

    def pages(self, path: bytes, after: int = 0) -> Iterator[Page]:
        """The entries of a directory behind the position `after` (0: from the start): for each container in the order
        of arrival its new subdirectories, then its files in data order.

        Positions hold while the day changes: cookie = ordinal << 32 | place in the container's share + 1.
        """
        segments = self._segments(path)
        for at in range(_segment_at(segments, after), len(segments)):
            segment = segments[at]
            base = segment.member.ordinal << 32
            skip = max(after - base, 0)
            folders = segment.folders
            if segment.fresh and skip < len(folders):
                fresh = [place for place in range(skip, len(folders)) if folders[place] in segment.fresh]
                for first in range(0, len(fresh), _PAGE):
                    places = fresh[first : first + _PAGE]
                    yield Page([base + place + 1 for place in places], [folders[place] for place in places], [])
            for first in range(max(skip - len(folders), 0), segment.files, _PAGE):
                page = self._files(segment.member, path, first, base + len(folders) + first + 1)
                if page.cookies:
                    yield page

    def listed(self, path: bytes, after: int, upto: int) -> Iterator[tuple[int, Rows]]:
        """The files of a directory at the positions (after, upto], as slots and rows: what `pages` has given between
        the two. A file that is shown elsewhere, or not at all, may be among them."""
        if after >= upto:
            return
        segments = self._segments(path)
        for at in range(_segment_at(segments, after), len(segments)):
            member, folders, _, files = segments[at]
            base = (member.ordinal << 32) + len(folders)
            if base >= upto:
                return
            low, high = (min(max(position - base, 0), files) for position in (after, upto))
            if low < high:
                yield member.slot, member.folders.rows(path, low, high - low)

    def _files(self, member: Member, path: bytes, first: int, cookie: int) -> Page:
        """A page of the files that a container has directly in `path`, from its place `first` on."""
        rows = member.folders.rows(path, first, _PAGE)
        cookies = list(range(cookie, cookie + len(rows)))
        hidden, elsewhere = self._hidden.get(member.ordinal), self._listed_elsewhere.get(member.ordinal)
        replaced = self._listed_for.get(member.ordinal)
        shown = np.ones(len(rows), np.bool_)
        if hidden is not None:
            shown &= ~hidden[rows]
        if elsewhere is not None:
            shown &= ~elsewhere[rows]
        others: list[tuple[Member, Rows, npt.NDArray[np.int64]]] = []
        if replaced is not None:
            winners = replaced[rows]
            for ordinal in set((winners >> _ORDINAL).tolist()) - {0}:
                other, places = self._member_of[ordinal], np.flatnonzero(winners >> _ORDINAL == ordinal)
                its_rows = (winners[places] & _ROW).astype(np.uint32)
                its_hidden = self._hidden.get(ordinal)
                if its_hidden is not None:
                    places, its_rows = places[~its_hidden[its_rows]], its_rows[~its_hidden[its_rows]]
                shown[places] = True
                others.append((other, its_rows, places))
        names = member.index.names_of(rows)
        if path:
            cut = len(path) + 1
            names = [name[cut:] for name in names]
        if not others and shown.all():
            return Page(cookies, names, [Share(member, rows, np.arange(len(rows)))])
        # Where each entry stands in the page when those that are not shown are left out.
        place_of = np.cumsum(shown) - 1
        own = shown.copy()
        shares = []
        for other, its_rows, places in others:
            own[places] = False
            if len(places):
                shares.append(Share(other, its_rows, place_of[places]))
        if own.any():
            shares.append(Share(member, rows[own], place_of[own]))
        kept = np.flatnonzero(shown).tolist()
        return Page([cookies[place] for place in kept], [names[place] for place in kept], shares)

    def subfolders(self, path: bytes) -> list[bytes]:
        """The names of the directories in a directory, in the order of a listing."""
        return [name for segment in self._segments(path) for name in segment.folders if name in segment.fresh]

    def has_files(self, path: bytes) -> bool:
        """Whether a file stands directly in a directory."""
        return any(member.folders.count(path) for member in self.members)

    def shares(self, path: bytes) -> list[tuple[Member, int]]:
        """The containers that have files directly in a directory, in the order of a listing, and how many each."""
        found = ((member, member.folders.count(path)) for member in self.members)
        return [(member, files) for member, files in found if files]

    def is_ready(self, path: bytes) -> bool:
        """False when the first page of a directory may take a while to compute: `prepare` does that, in any thread."""
        return path in self._listings or len(self._folders) < _MANY_FOLDERS

    def prepare(self, path: bytes) -> None:
        """Compute what `pages` needs of a directory."""
        self._segments(path)

    def _segments(self, path: bytes) -> list[_Segment]:
        segments = self._listings.get(path)
        if segments is None:
            segments, seen = [], set[bytes]()
            visible = set(self._folders.children(path))
            for member in self.members:
                folders = member.folders.sorted.children(path) if visible else []
                fresh = visible.intersection(folders) - seen
                seen |= fresh
                files = member.folders.count(path)
                if files or fresh:
                    segments.append(_Segment(member, folders, fresh, files))
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
        hashes = np.concatenate([member.index.hashes[0] for member in self.members])
        hashes.sort()
        repeated = hashes[1:][hashes[1:] == hashes[:-1]]  # ascending; one that stands three times is in it twice
        del hashes
        if not len(repeated):
            return
        found, owners, rows = [], [], []
        for number, member in enumerate(self.members):
            table, its_rows = member.index.hashes
            at = np.flatnonzero(are_in(table, repeated))
            found.append(table[at])
            owners.append(np.full(len(at), number, np.uint32))
            rows.append(its_rows[at])
        keys = np.concatenate(found)
        order = np.argsort(keys, kind="stable")
        bounds = np.append(np.flatnonzero(np.append(True, np.diff(keys[order]) != 0)), len(order))
        owner_of, row_of = np.concatenate(owners)[order], np.concatenate(rows)[order]
        del keys, order
        # Mostly two containers have the same names, all of them: a part and what it was merged into.
        first, count = bounds[:-1], np.diff(bounds)
        twice = (count == 2) & (owner_of[first] != owner_of[np.minimum(first + 1, len(owner_of) - 1)])
        pairs = first[twice]
        both = owner_of[pairs].astype(np.int64) * len(self.members) + owner_of[pairs + 1]
        pairs, both = pairs[np.argsort(both, kind="stable")], np.sort(both)
        for low, high in pairwise(
            [*np.flatnonzero(np.append(True, np.diff(both) != 0))[: len(both)].tolist(), len(both)]
        ):
            at = pairs[low:high]
            self._hide_older(
                (self.members[owner_of[at[0]]], row_of[at]), (self.members[owner_of[at[0] + 1]], row_of[at + 1])
            )
        for low, high in zip(first[~twice].tolist(), bounds[1:][~twice].tolist(), strict=True):
            versions: dict[bytes, list[tuple[Member, int]]] = {}
            for owner, row in zip(owner_of[low:high].tolist(), row_of[low:high].tolist(), strict=True):
                member = self.members[owner]
                versions.setdefault(member.index.name(row), []).append((member, row))
            self._hide_all_but_newest(versions)

    def _hide_older(self, one: tuple[Member, Rows], other: tuple[Member, Rows]) -> None:
        """Hide, of rows with one hash in each of two containers, those of the older one if the names are the same."""
        newest = _newest([one[0], other[0]])
        (member, rows), (_, winners) = (other, one) if newest is one[0] else (one, other)
        same = same_names(member.index, rows, newest.index, winners)
        rows, winners = rows[same], winners[same]
        self._hidden_rows(member)[rows] = True
        if member.ordinal < newest.ordinal:
            both = ((member.index.state[rows] | newest.index.state[winners]) & NOT_SHOWN) == 0
            self._keep_places(member, rows[both], newest, winners[both])

    def _hide_all_but_newest(self, versions: dict[bytes, list[tuple[Member, int]]]) -> None:
        for candidates in versions.values():
            if len(candidates) > 1:
                newest = _newest([member for member, _ in candidates])
                for member, row in candidates:
                    if member is not newest:
                        self._hidden_rows(member)[row] = True
                shown = [(member, row) for member, row in candidates if not member.index.state[row] & NOT_SHOWN]
                winner = next((row for member, row in shown if member is newest), None)
                home, row = min(shown, key=lambda each: each[0].ordinal, default=(newest, 0))
                if winner is not None and home is not newest:
                    self._keep_places(home, np.array([row], np.uint32), newest, np.array([winner], np.uint32))

    def _keep_places(self, home: Member, rows: Rows, newest: Member, winners: Rows) -> None:
        """A name stays where its first container has it when a newer version comes: a listing that is being read then
        neither repeats nor skips it."""
        if home.ordinal not in self._listed_for:
            self._listed_for[home.ordinal] = np.zeros(home.index.rows, np.uint64)
        self._listed_for[home.ordinal][rows] = winners.astype(np.uint64) | np.uint64(newest.ordinal << 32)
        if newest.ordinal not in self._listed_elsewhere:
            self._listed_elsewhere[newest.ordinal] = np.zeros(newest.index.rows, np.bool_)
        self._listed_elsewhere[newest.ordinal][winners] = True

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
            for row in rows[are_in(table, hashes)].tolist():
                if self.is_shown(member, row) and self.is_directory(member.index.name(row)):
                    self._hidden_rows(member)[row] = True
                    collisions.append((member, row))
        return collisions


def are_in(values: npt.NDArray[np.uint64], ascending: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which of some values are among others. NumPy's own isin takes seconds for a million hashes (2.3, measured)."""
    if not len(ascending):
        return np.zeros(len(values), np.bool_)
    found: npt.NDArray[np.bool_] = ascending[np.minimum(ascending.searchsorted(values), len(ascending) - 1)] == values
    return found


def same_names(one: Index, its_rows: Rows, other: Index, other_rows: Rows) -> npt.NDArray[np.bool_]:
    """Whether the names of rows of two containers are the same, row by row."""
    starts, lengths, words = [], [], []
    for index, rows in ((one, its_rows), (other, other_rows)):
        starts.append(index.name_offset[rows].astype(np.int64))
        lengths.append(index.name_offset[rows + 1].astype(np.int64) - starts[-1])
        words.append(words_of(index.columns()["names"]))
    same: npt.NDArray[np.bool_] = lengths[0] == lengths[1]
    left, done = np.flatnonzero(same & (lengths[0] > 0)), 0
    while len(left):
        beyond = np.maximum(done + 8 - lengths[0][left], 0).astype(np.uint64) * np.uint64(8)
        same[left] = (words[0][starts[0][left] + done] ^ words[1][starts[1][left] + done]) << beyond == 0
        done += 8
        left = left[same[left] & (lengths[0][left] > done)]
    return same


def _segment_at(segments: list[_Segment], position: int) -> int:
    """The place of the first segment that goes beyond a position's container, or is that container's."""
    return bisect_left(segments, position >> 32, key=lambda segment: segment.member.ordinal)


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
