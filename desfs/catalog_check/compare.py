"""Rows against a listing. Pure.

Objects are listed before rows are read: a row is written before its object, so an object without a row has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from assignment.catalog import LIVE, ContainerRecord, ContainerState, ShardHolder
from desfs.adoption import Place, managed
from desfs.store.base import ObjectInfo


class What(Enum):
    """How a row and an object differ."""

    MISSING = "is in the catalog, and the store does not have it"
    CHANGED = "is not the object that the catalog knows"
    UNKNOWN = "is not in the catalog"
    ORPHAN = "was begun and never committed, and cannot be any more"
    SUPERSEDED = "is merged into another container, and still there"
    DELETED = "is deleted in the catalog, and still there"

    @property
    def is_damage(self) -> bool:
        return self in (What.MISSING, What.CHANGED)


@dataclass(frozen=True, slots=True)
class Difference:
    """A container on which catalog and store do not agree; `record` or `info` is None where one of them has nothing."""

    what: What
    place: Place
    key: str
    record: ContainerRecord | None
    info: ObjectInfo | None

    @property
    def problem(self) -> str:
        """What to say of it."""
        if self.what is What.CHANGED and self.record is not None and self.info is not None:
            return (
                f"found {self.info.size} bytes with the ETag {self.info.etag}, want {self.record.size} with "
                f"{self.record.etag} as in the catalog"
            )
        if self.info is None and self.what is What.ORPHAN:
            return f"{self.what.value}; there is no object"
        if self.info is None and self.what is What.SUPERSEDED:
            return "is merged into another container, and its object is gone: only its row is left"
        return self.what.value


def compare(
    records: Iterable[ContainerRecord],
    objects: Mapping[str, ObjectInfo],
    holders: Mapping[Place, ShardHolder],
    now: datetime,
    *,
    grace_s: float,
) -> list[Difference]:
    """Where rows and objects differ, ascending by day, shard and key. `now` is the catalog's clock; what changes all
    the time, uploads and merges, counts when it is older than `grace_s`."""
    found: list[Difference] = []
    known = set()
    for record in records:
        known.add(record.object_key)
        info = objects.get(record.object_key)
        what = _difference(record, info, holders.get((record.day, record.shard)), now, grace_s)
        if what is not None:
            found.append(Difference(what, (record.day, record.shard), record.object_key, record, info))
    found += _unknown(objects, known)
    return sorted(found, key=lambda each: (each.place, each.key))


def _unknown(objects: Mapping[str, ObjectInfo], known: set[str]) -> Iterator[Difference]:
    for key, info in objects.items():
        place = managed(key)
        if place is not None and key not in known:
            yield Difference(What.UNKNOWN, place[0], key, None, info)


def _difference(
    record: ContainerRecord, info: ObjectInfo | None, holder: ShardHolder | None, now: datetime, grace_s: float
) -> What | None:
    age_s = grace_s if record.changed_at is None else (now - record.changed_at).total_seconds()
    if record.state in LIVE:
        if info is None:
            return What.MISSING
        return None if (info.size, info.etag) == (record.size, record.etag) else What.CHANGED
    if record.state is ContainerState.DELETED:
        if info is None:
            return None
        # An orphan's row has no ETag. A row that has one was content, and what has another one is somebody else's.
        return What.DELETED if not record.size or record.etag == info.etag else What.UNKNOWN
    if age_s < grace_s:
        return None
    if record.state is ContainerState.SUPERSEDED:
        return What.SUPERSEDED
    is_fenced = holder is None or not holder.holds or holder.token != record.token
    return What.ORPHAN if is_fenced else None
