"""What a store holds, by one listing. Blocking."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from des_format.layout import BIG_FILES_FOLDER
from des_format.names import name_problem
from des_format.shards import CONTAINER_SUFFIX, SEALED, is_day, parse_container_name
from desfs.errors import StoreError
from desfs.layout import LAYOUT_KEY, LAYOUT_LIMIT, Layout
from desfs.store import ObjectInfo, Store

_FIRST = 10  # keys that are named; the rest is counted


@dataclass(slots=True)
class DayStatus:
    """A name of the root; large files of the root itself are under `_bigFiles`. `sealed` containers are whole for their
    shard, `parts` are not; `external` objects stand for one large file each. `bytes` are those of the containers,
    `newest` is LastModified of the newest of all of it, since the epoch."""

    day: str
    containers: int = 0
    sealed: int = 0
    parts: int = 0
    bytes: int = 0
    external: int = 0
    external_bytes: int = 0
    newest: float = 0.0


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """A store.

    `layout`: {"shard_bits", "placement", "naming"}; null without one, and `layout_problem` says why when there is one
    that is not understood. `days`: newest first, then other names; `total` sums them up, as "day": "total".
    `foreign`: {"count", "bytes", "first"}: objects that a mount does not show, with the first keys. `rates`: null, or
    by how much it grew since the look before, by the second: {"seconds", "containers", "bytes"}, the latter those of
    containers and large files; below 0 where it shrank. `looked_at`: since the epoch.
    """

    place: str
    layout: dict[str, Any] | None
    layout_problem: str | None
    days: list[DayStatus]
    total: DayStatus
    foreign: dict[str, Any]
    looked_at: float
    rates: dict[str, float] | None = None
    kind: str = "store"


def store_status(store: Store) -> StoreStatus:
    """What a store holds, by one listing of all of it. Raises: StoreError."""
    now_s = time.time()
    objects = store.list("").objects
    layout, problem = _layout(store) if any(each.key == LAYOUT_KEY for each in objects) else (None, None)
    return build_store_status(store.url, objects, layout, problem, now_s=now_s)


def _layout(store: Store) -> tuple[dict[str, Any] | None, str | None]:
    try:
        layout = msgspec.json.decode(store.get_tail(LAYOUT_KEY, LAYOUT_LIMIT).data, type=Layout)
    except (StoreError, msgspec.MsgspecError, RecursionError) as error:
        return None, str(error)
    return msgspec.structs.asdict(layout), None if layout.is_known else "a rule that this version does not know"


@dataclass(slots=True)
class _Foreign:
    count: int = 0
    bytes: int = 0
    first: list[str] = field(default_factory=list)


def build_store_status(
    url: str, objects: Iterable[ObjectInfo], layout: dict[str, Any] | None, problem: str | None, *, now_s: float
) -> StoreStatus:
    """Count objects by the names of the root. Pure."""
    days: dict[str, DayStatus] = {}
    foreign = _Foreign()
    for each in objects:
        folder, _, name = each.key.rpartition("/")
        top, _, below = folder.partition("/")
        container = parse_container_name(name)
        if BIG_FILES_FOLDER in (top, below.partition("/")[0]):
            day = days.setdefault(top, DayStatus(top))
            day.external += 1
            day.external_bytes += each.size
        elif container is not None and not below and name_problem(each.key.encode("utf-8", "surrogateescape")) is None:
            shown = top or name.removesuffix(CONTAINER_SUFFIX)
            day = days.setdefault(shown, DayStatus(shown))
            day.containers += 1
            day.bytes += each.size
            if container.first == SEALED:
                day.sealed += 1
            else:
                day.parts += 1
        else:
            if each.key != LAYOUT_KEY:
                foreign.count += 1
                foreign.bytes += each.size
                foreign.first += [each.key] if len(foreign.first) < _FIRST else []
            continue
        day.newest = max(day.newest, each.mtime_ns / 1e9)
    total = DayStatus("total")
    for day in days.values():
        for key in ("containers", "sealed", "parts", "bytes", "external", "external_bytes"):
            setattr(total, key, getattr(total, key) + getattr(day, key))
        total.newest = max(total.newest, day.newest)
    newest_first = sorted((name for name in days if is_day(name)), reverse=True)
    others = sorted(name for name in days if not is_day(name))
    return StoreStatus(
        place=url,
        layout=layout,
        layout_problem=problem,
        days=[days[name] for name in (*newest_first, *others)],
        total=total,
        foreign={"count": foreign.count, "bytes": foreign.bytes, "first": foreign.first},
        looked_at=now_s,
    )


def store_since(now: StoreStatus, before: StoreStatus) -> StoreStatus:
    """The same with rates: what came and went between two looks at one store. Pure."""
    seconds = now.looked_at - before.looked_at
    if seconds <= 0:  # somebody has set the clock
        return now
    grown = {
        "containers": now.total.containers - before.total.containers,
        "bytes": sum(
            each.total.bytes * sign + each.total.external_bytes * sign for each, sign in ((now, 1), (before, -1))
        ),
    }
    return replace(now, rates={"seconds": round(seconds, 3)} | {k: round(v / seconds, 3) for k, v in grown.items()})
