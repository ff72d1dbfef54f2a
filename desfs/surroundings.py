"""What the days of a mount share, and what passes between them and the root."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple, Protocol

import trio

from des_format.shards import ContainerKey, is_day
from desfs.container import LoadedContainer, OpenContainer
from desfs.inode import Slots
from desfs.layout import Layout
from desfs.problems import Problems
from desfs.store.base import ObjectInfo, Store
from desfs.store_threads import StoreThreads

_OPEN_DAY_S = 2 * 86400.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A container as a listing has it."""

    info: ObjectInfo
    name: ContainerKey
    ordinal: int


class Changes(NamedTuple):
    """What the kernel has to forget when a day has changed: these names below it, and what it knows of the day and of
    these directories, in which something came or went."""

    day: bytes
    paths: list[bytes]
    folders: list[bytes]


@dataclass(frozen=True, slots=True)
class RootEntry:
    """What the root listing has of a name: a folder, a container, or both. `ordinal` numbers the names in the order in
    which they were first seen, from 1: positions in the root directory."""

    ordinal: int
    has_prefix: bool
    has_object: bool


class Surroundings(Protocol):
    """What the days of a mount share."""

    threads: StoreThreads
    problems: Problems
    strict: bool
    layout: Layout
    names: dict[str, RootEntry]
    slots: Slots[OpenContainer]
    root_mtime_ns: int
    changes: Counter[str]
    opening: trio.CapacityLimiter
    now: Callable[[], float]
    load_container: Callable[[Store, ObjectInfo], LoadedContainer]
    on_change: Callable[[Changes], None]

    def retire(self, containers: Iterable[OpenContainer]) -> None:
        """Let containers that left their day be read for a while by those who have their files open."""
        ...


def may_grow(name: str, now_s: float) -> bool:
    """Whether files may still come into a day: today and yesterday, and names that are no days."""
    return not is_day(name) or now_s - began_s(name) < _OPEN_DAY_S


def began_s(day: str) -> float:
    """When a day begins, UTC: Unix time."""
    return datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()
