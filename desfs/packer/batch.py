"""Which files go into which container. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from typing import Protocol, TypeVar

from desfs.spool import FileState


class Placed(Protocol):
    """A file with its place: the name of its entry, and the day and shard that get it. `size` in bytes."""

    @property
    def name(self) -> str: ...

    @property
    def day(self) -> date: ...

    @property
    def shard(self) -> str: ...

    @property
    def size(self) -> int: ...


P = TypeVar("P", bound=Placed)


@dataclass(frozen=True, slots=True)
class Item:
    """A claimed file with its place: `path` in the spool, `name` its entry's, `id` its assigned name."""

    path: str
    name: str
    id: str
    day: date
    shard: str
    state: FileState

    @property
    def size(self) -> int:
        return self.state.size


@dataclass(frozen=True, slots=True)
class Cut:
    """The items of one container to be, in the order that they will have in it."""

    day: date
    shard: str
    items: tuple[Item, ...]


def cut(items: Iterable[Item], *, max_bytes: int, max_files: int, big_file_threshold: int) -> Iterator[Cut]:
    """The containers that the items of a batch go into, as `cut_groups` has them."""
    for members in cut_groups(items, max_bytes=max_bytes, max_files=max_files, big_file_threshold=big_file_threshold):
        yield Cut(members[0].day, members[0].shard, tuple(members))


def cut_groups(items: Iterable[P], *, max_bytes: int, max_files: int, big_file_threshold: int) -> Iterator[list[P]]:
    """One or more containers for each day and shard: the files of each. Entries are laid out in path order, the files
    of one directory side by side. External files count as files, not as bytes."""
    groups: dict[tuple[date, str], list[P]] = {}
    for item in items:
        groups.setdefault((item.day, item.shard), []).append(item)
    for _, members in sorted(groups.items(), key=lambda group: group[0]):
        current: list[P] = []
        size = 0
        for item in sorted(members, key=_path_order):
            inside = item.size if item.size < big_file_threshold else 0
            if current and (len(current) >= max_files or size + inside > max_bytes):
                yield current
                current, size = [], 0
            current.append(item)
            size += inside
        yield current


def _path_order(item: Placed) -> tuple[str, str]:
    """Directory by directory: a folder's own files stand together, not mixed with those of its subfolders."""
    folder, _, name = item.name.rpartition("/")
    return folder, name
