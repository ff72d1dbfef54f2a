"""What a mount does, as its daemon says it in /.desfs/. Blocking, for a bounded time."""

from __future__ import annotations

import errno
import json
import os
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

from desfs.errors import DesfsError
from desfs.hanging import Call, Outcome, look
from desfs.mountpoint import FS_TYPE, mounted_at
from desfs.spool import INTERNAL
from desfs.status.durations import format_duration
from desfs.status.place import NotServed, Place

_FIRST = 10  # problems that are named; the rest is counted
# The counters whose labels these are.
_BYTES = {
    "received": "desfs_store_bytes_total",
    "sent": "desfs_store_bytes_total",
    "read": "desfs_read_bytes_total",
    "pushed": "desfs_read_bytes_total",
}
# Level and kind of desfs_cache_requests_total.
_CACHES = {
    "memory": ("memory", "block"),
    "disk_blocks": ("disk", "block"),
    "disk_indexes": ("disk", "index"),
    "redis": ("redis", "tail"),
}


@dataclass(frozen=True, slots=True)
class MountStatus:
    """A mount that is served.

    `days`: of each day that somebody has looked at, its files, or null as long as not all its indexes were read.
    `open_containers`: {"bytes", "files"} of those whose index is in memory. `requests`: {"open", "oldest_seconds"} of
    the kernel, which nobody has answered yet; null from a daemon that does not say. `kernel_requests`: how many there
    were of each operation, `kernel_errors` how many were answered with each errno but ENOENT. `store_requests`: by
    operation; `store_failures`: those that got no success, `store_retries` those tried again. `bytes`: {"received",
    "sent"} of the store, {"read", "pushed"} to the kernel: what it asked for, and what it got before. `caches`: of each
    {"hits", "misses"}. `disk_cache`: {"folder", "max_bytes", "bytes", "fault"} or null. `prefetch`: {"pushed",
    "pushed_in_vain", "containers_bought"}. `link`: {"latency_s", "bandwidth"}, the latter in bytes a second. `levers`:
    as in /.desfs/stats. `problems`: {"count", "first"}. `warnings`: what is wrong now, a text for each thing.

    `rates`: {"since", "seconds"}: "start" for averages since the mount began, "look" for what was between two looks,
    and how long that is; by the second those of `bytes`, "kernel_requests" and "store_requests"; "hits": of each cache
    the share that it had of what was looked for in it, null where that was nothing. `looked_at`: since the epoch.
    """

    place: str
    source: str
    uptime_seconds: float
    days: dict[str, int | None]
    open_containers: dict[str, int]
    requests: dict[str, float] | None
    kernel_requests: dict[str, int]
    kernel_errors: dict[str, int]
    store_requests: dict[str, int]
    store_failures: int
    store_retries: int
    bytes: dict[str, int]
    caches: dict[str, dict[str, int]]
    disk_cache: dict[str, Any] | None
    prefetch: dict[str, int]
    link: dict[str, float]
    levers: dict[str, Any]
    problems: dict[str, Any]
    warnings: list[str]
    looked_at: float
    rates: dict[str, Any] = field(default_factory=dict)
    kind: str = "mount"
    state: str = "served"


def mount_status(place: Place, *, limit_s: float) -> MountStatus:
    """What the daemon says. Raises: NotServed when it has ended, does not answer within `limit_s`, or the mount is not
    there any more; DesfsError."""
    control = os.path.join(place.path, INTERNAL)
    names = ("stats", "problems", "config")
    found = look([Call("read", os.path.join(control, name)) for name in names], limit_s=limit_s)
    for each in found:
        if each.value is None:
            raise _not_served(place, each, limit_s)
    stats, problems, config = (each.value for each in found)
    try:
        deadline_s = float(json.loads(config)["deadline"])
        return build_mount_status(
            place.path, json.loads(stats), problems.splitlines(), deadline_s=deadline_s, now_s=time.time()
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DesfsError(f"{control}: stats or config is not understood: {error!r}") from error


def _not_served(place: Place, found: Outcome, limit_s: float) -> DesfsError:
    path, source = place.path, "" if place.mounted is None else place.mounted.source
    mounted = mounted_at(path)
    if mounted is None or mounted.fs_type != FS_TYPE:
        return NotServed(f"{path}: {source} is not mounted there any more", "gone")
    if found.errno in (errno.ENOTCONN, errno.ECONNABORTED):
        return NotServed(
            f"{path}: the mount of {source} is dead, its daemon has ended: desfs mount clears it, or umount --lazy",
            "dead",
        )
    if not found.answered:
        return NotServed(f"{path}: the mount of {source} does not answer within {limit_s:g} s", "hung")
    if found.errno == errno.EACCES:
        return DesfsError(f"{path}: only who mounted {source} may look into it (no allow_other)")
    return DesfsError(f"{path}: {found.reason}")


def build_mount_status(
    place: str, stats: dict[str, Any], problems: list[str], *, deadline_s: float, now_s: float
) -> MountStatus:
    """From what the files in /.desfs/ say, with averages since the start. Pure."""
    metrics: dict[str, float] = stats["metrics"]
    store_requests = _counted(metrics, "desfs_store_requests_total", 0)
    kernel_errors = _counted(metrics, "desfs_fuse_requests_total", 1)
    pushed = _counted(metrics, "desfs_pages_pushed_total", 0)
    requests: dict[str, float] | None = stats.get("requests")
    status = MountStatus(
        place=place,
        source=stats["source"],
        uptime_seconds=stats["uptime_seconds"],
        days={name: day["files"] for name, day in sorted(stats["days"].items())},
        open_containers=stats["open_containers"],
        requests=requests,
        kernel_requests=_counted(metrics, "desfs_fuse_requests_total", 0),
        # A name that is not there is no failure.
        kernel_errors={name: count for name, count in kernel_errors.items() if name not in ("OK", "ENOENT")},
        store_requests=store_requests,
        store_failures=sum(
            count
            for status, count in _counted(metrics, "desfs_store_requests_total", 1).items()
            if status != "ok" and not status.startswith("2")
        ),
        store_retries=sum(_counted(metrics, "desfs_store_retries_total", 0).values()),
        bytes={name: int(metrics.get(f"{metric}.{name}", 0)) for name, metric in _BYTES.items()},
        caches=_caches(metrics, stats["caches"]),
        disk_cache=stats["caches"].get("disk"),
        prefetch={
            "pushed": pushed.get("stored", 0),
            "pushed_in_vain": sum(count for result, count in pushed.items() if result != "stored"),
            "containers_bought": int(metrics.get("desfs_prefetch_bought_total", 0)),
        },
        link=stats["link"],
        levers=stats["levers"],
        problems={"count": len(problems), "first": problems[:_FIRST]},
        warnings=_warnings(requests, stats["caches"].get("disk"), deadline_s),
        looked_at=now_s,
    )
    return replace(status, rates=_rates(status, None))


def _warnings(requests: dict[str, float] | None, disk: dict[str, Any] | None, deadline_s: float) -> list[str]:
    found = []
    oldest_s = 0.0 if requests is None else requests["oldest_seconds"]
    if oldest_s > deadline_s:
        waits, limit = format_duration(oldest_s), format_duration(deadline_s)
        found.append(f"a request has been waiting for {waits}, longer than its deadline of {limit}")
    if disk is not None and disk.get("fault"):
        found.append(f"the disk cache is off: {disk['fault']}")
    return found


def mount_since(now: MountStatus, before: MountStatus) -> MountStatus:
    """The same with the rates between two looks at one mount; since the start where another daemon serves it now.
    Pure."""
    counters, past = _counters(now), _counters(before)
    is_same = now.uptime_seconds > before.uptime_seconds and all(counters[name] >= past[name] for name in past)
    return replace(now, rates=_rates(now, before)) if is_same else now


def _counters(status: MountStatus) -> dict[str, int]:
    return {
        **status.bytes,
        "kernel_requests": sum(status.kernel_requests.values()),
        "store_requests": sum(status.store_requests.values()),
    }


def _rates(now: MountStatus, before: MountStatus | None) -> dict[str, Any]:
    # By the daemon's own clock: what an answer takes on its way does not count.
    seconds = now.uptime_seconds - (0.0 if before is None else before.uptime_seconds)
    past = {} if before is None else _counters(before)
    rates = {
        name: round((count - past.get(name, 0)) / seconds, 3) if seconds > 0 else 0.0
        for name, count in _counters(now).items()
    }
    hits: dict[str, float | None] = {}
    for name, each in now.caches.items():
        old = {"hits": 0, "misses": 0} if before is None else before.caches.get(name, {"hits": 0, "misses": 0})
        found, missed = each["hits"] - old["hits"], each["misses"] - old["misses"]
        hits[name] = round(found / (found + missed), 4) if found + missed > 0 else None
    since = "start" if before is None else "look"
    return {"since": since, "seconds": round(seconds, 3), **rates, "hits": hits}


def _counted(metrics: dict[str, float], name: str, label: int) -> dict[str, int]:
    """A counter's values, summed up by one of its labels."""
    found: defaultdict[str, int] = defaultdict(int)
    for key, value in metrics.items():
        metric, *labels = key.split(".")
        if metric == name and value:
            found[labels[label]] += int(value)
    return dict(sorted(found.items()))


def _caches(metrics: dict[str, float], state: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Hits and misses of the caches that the mount has."""
    has = {"memory": True, "disk": state.get("disk") is not None, "redis": bool(state.get("redis"))}

    def asked(level: str, kind: str, outcome: str) -> int:
        return int(metrics.get(f"desfs_cache_requests_total.{level}.{kind}.{outcome}", 0))

    return {
        name: {"hits": asked(level, kind, "hit"), "misses": asked(level, kind, "miss")}
        for name, (level, kind) in _CACHES.items()
        if has[level]
    }
