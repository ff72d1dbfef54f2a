"""Which files go into which container. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date

from desfs.spool import FileState


@dataclass(frozen=True, slots=True)
class Item:
    """A claimed file with its place: `path` in the spool, `name` its entry's, `id` its assigned name."""

    path: str
    name: str
    id: str
    day: date
    shard: str
    state: FileState


@dataclass(frozen=True, slots=True)
class Cut:
    """The items of one container to be, in the order that they will have in it."""

    day: date
    shard: str
    items: tuple[Item, ...]


def cut(items: Iterable[Item], *, max_bytes: int, max_files: int, big_file_threshold: int) -> Iterator[Cut]:
    """One or more containers for each day and shard. Entries are laid out in path order, the files of one directory
    side by side. External files count as files, not as bytes."""
    groups: dict[tuple[date, str], list[Item]] = {}
    for item in items:
        groups.setdefault((item.day, item.shard), []).append(item)
    for (day, shard), members in sorted(groups.items()):
        current: list[Item] = []
        size = 0
        for item in sorted(members, key=_path_order):
            inside = item.state.size if item.state.size < big_file_threshold else 0
            if current and (len(current) >= max_files or size + inside > max_bytes):
                yield Cut(day, shard, tuple(current))
                current, size = [], 0
            current.append(item)
            size += inside
        yield Cut(day, shard, tuple(current))


def _path_order(item: Item) -> tuple[str, str]:
    """Directory by directory: a folder's own files stand together, not mixed with those of its subfolders."""
    folder, _, name = item.name.rpartition("/")
    return folder, name
