"""The state of a mount, a spool or a store, read without changing any of them. Blocking.

What a place is: a URL is a store. A path at which this program is mounted is a mount, one with a packer's `.desfs/` is
a spool, one with containers or a layout is a store. One that is both a spool and a store, or nothing of it, is
refused.

The records are what `desfs status --json` prints, one object, keys as named here; more may come, these stay. Sizes are
bytes, times seconds.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from des_format.layout import BIG_FILES_FOLDER
from des_format.names import name_problem
from des_format.shards import CONTAINER_SUFFIX, SEALED, is_day, parse_container_name
from desfs.errors import DesfsError, StoreError, UsageError
from desfs.hanging import Call, Outcome, look
from desfs.layout import LAYOUT_KEY, LAYOUT_LIMIT, Layout
from desfs.mountpoint import FS_TYPE, Mounted, mounted_at, real_place
from desfs.spool import INTERNAL, TEMPORARY_PATTERNS, is_temporary
from desfs.store import ObjectInfo, Store

FIRST = 10  # problems, reasons, keys that are named; the rest is counted
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
# What a packer makes before anything else in its spool: desfs.spool.
_SPOOL_MARKS = ("claims", "workers")
_INIT_PID_NAMESPACE = 0xEFFFFFFC  # Linux, include/linux/proc_ns.h: PROC_PID_INIT_INO


class NotServed(DesfsError):
    """A mount whose daemon has ended, or does not answer; `state` is "dead" or "hung"."""

    def __init__(self, message: str, state: str) -> None:
        super().__init__(message)
        self.state = state


# --- which kind of place -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """What was asked about. `kind`: "mount", "spool" or "store"; `path` is absolute, of a store its URL as given."""

    kind: str
    path: str
    mounted: Mounted | None = None


def place_of(text: str, *, limit_s: float) -> Place:
    """What is at a path or a URL. Raises: UsageError when that cannot be told; DesfsError for a path that cannot be
    looked at."""
    if _URL.match(text):
        return Place("store", text)
    path = os.path.abspath(text)
    (above,) = look([Call("stat", os.path.dirname(path))], limit_s=limit_s)
    if above.value is not None:
        path = real_place(path)
    mounted = mounted_at(path)
    if mounted is None and above.value is not None and os.path.islink(path):
        path = real_place(os.path.join(os.path.dirname(path), os.readlink(path)))
        mounted = mounted_at(path)
    if mounted is not None and mounted.fs_type == FS_TYPE:
        return Place("mount", path, mounted)
    itself, inside, *marks = look(
        [
            Call("stat", path),
            Call("names", path),
            *(Call("stat", os.path.join(path, INTERNAL, mark)) for mark in _SPOOL_MARKS),
        ],
        limit_s=limit_s,
    )
    if itself.value is None:
        if itself.errno == errno.ENOENT:
            raise UsageError(f"{text}: no such directory")
        raise DesfsError(f"{text}: {itself.reason}")
    if not stat.S_ISDIR(itself.value[0]):
        raise UsageError(f"{text} is no directory")
    if inside.value is None:
        raise DesfsError(f"{text}: {inside.reason}")
    is_spool = all(mark.value is not None and stat.S_ISDIR(mark.value[0]) for mark in marks)
    if is_spool and LAYOUT_KEY in inside.value:
        raise UsageError(
            f"{text} has {INTERNAL}/ as a spool has, and {LAYOUT_KEY} as a store has: write {Path(path).as_uri()} for "
            "the store"
        )
    if is_spool:
        return Place("spool", path)
    if any(each == LAYOUT_KEY or each.endswith(CONTAINER_SUFFIX) or is_day(each) for each in inside.value):
        return Place("store", path)
    raise UsageError(
        f"{text}: nothing of desfs is mounted there, and it is no spool (no {INTERNAL}/claims) and no store (no "
        f"{LAYOUT_KEY}, no days, no containers)"
    )


# --- a mount -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MountStatus:
    """A mount that is served.

    `days`: of each day that somebody has looked at, its files, or null as long as not all its indexes were read.
    `open_containers`: {"bytes", "files"} of those whose index is in memory. `requests`: {"open", "oldest_seconds"} of
    the kernel, which nobody has answered yet; null from a daemon that does not say. `kernel_requests`: how many there
    were of each operation, `kernel_errors` how many were answered with each errno but ENOENT. `store_requests`: by
    operation; `store_failures`: those that got no success, `store_retries` those tried again. `bytes`: {"received",
    "sent"}. `caches`: of each level {"hits", "misses"}. `disk_cache`: {"folder", "max_bytes", "bytes", "fault"} or
    null. `prefetch`: {"pushed", "pushed_in_vain", "containers_bought"}. `link`: {"latency_s", "bandwidth"}, the
    latter in bytes a second. `levers`: as in /.desfs/stats. `problems`: {"count", "first"}.
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
    kind: str = "mount"
    state: str = "served"


def mount_status(place: Place, *, limit_s: float) -> MountStatus:
    """What the daemon says. Raises: NotServed when it has ended, or does not answer within `limit_s`; DesfsError."""
    control = os.path.join(place.path, INTERNAL)
    stats, problems = look(
        [Call("read", os.path.join(control, "stats")), Call("read", os.path.join(control, "problems"))],
        limit_s=limit_s,
    )
    source = "" if place.mounted is None else place.mounted.source
    for found in (stats, problems):
        if found.value is None:
            raise _not_served(place.path, source, found, limit_s)
    try:
        return build_mount_status(place.path, json.loads(stats.value), problems.value.splitlines())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DesfsError(f"{control}/stats is not understood: {error!r}") from error


def _not_served(path: str, source: str, found: Outcome, limit_s: float) -> DesfsError:
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


def build_mount_status(place: str, stats: dict[str, Any], problems: list[str]) -> MountStatus:
    """From what the files in /.desfs/ say. Pure."""
    metrics: dict[str, float] = stats["metrics"]
    store_requests = _counted(metrics, "desfs_store_requests_total", 0)
    kernel_errors = _counted(metrics, "desfs_fuse_requests_total", 1)
    pushed = _counted(metrics, "desfs_pages_pushed_total", 0)
    requests: dict[str, float] | None = stats.get("requests")
    return MountStatus(
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
        bytes={name: int(metrics.get(f"desfs_store_bytes_total.{name}", 0)) for name in ("received", "sent")},
        caches=_caches(metrics, stats["caches"]),
        disk_cache=stats["caches"].get("disk"),
        prefetch={
            "pushed": pushed.get("stored", 0),
            "pushed_in_vain": sum(count for result, count in pushed.items() if result != "stored"),
            "containers_bought": int(metrics.get("desfs_prefetch_bought_total", 0)),
        },
        link=stats["link"],
        levers=stats["levers"],
        problems={"count": len(problems), "first": problems[:FIRST]},
    )


def _counted(metrics: dict[str, float], name: str, label: int) -> dict[str, int]:
    """A counter's values, summed up by one of its labels."""
    found: defaultdict[str, int] = defaultdict(int)
    for key, value in metrics.items():
        metric, *labels = key.split(".")
        if metric == name and value:
            found[labels[label]] += int(value)
    return dict(sorted(found.items()))


def _caches(metrics: dict[str, float], state: dict[str, Any]) -> dict[str, dict[str, int]]:
    def pair(hits: str, misses: str) -> dict[str, int]:
        return {"hits": int(metrics.get(hits, 0)), "misses": int(metrics.get(misses, 0))}

    found = {"memory": pair("desfs_cache_hits_total.memory", "desfs_cache_misses_total.memory")}
    if state.get("disk") is not None:
        for kind in ("block", "index"):
            name = f"desfs_disk_cache_requests_total.{kind}"
            found[f"disk_{kind}s" if kind == "block" else "disk_indexes"] = pair(f"{name}.hit", f"{name}.miss")
    if state.get("redis"):
        found["redis"] = pair("desfs_redis_requests_total.hit", "desfs_redis_requests_total.miss")
    return found


# --- a spool -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SpoolStatus:
    """A spool.

    `waiting`: {"files", "bytes", "oldest_seconds"}: what nobody has taken yet, and how long ago the oldest of it was
    touched last (null without any); `temporary` of these have names that their owners will change. `claimed`:
    {"files", "bytes", "batches"}: taken, and not yet durable in the store. `rejected`: {"count", "first"}, of each of
    the first {"file", "reason", "folder"}. `packer`: {"running", "pid"}: whether one holds the spool's lock; null where
    that cannot be told, and for the number of one in another container.
    """

    place: str
    waiting: dict[str, float | None]
    temporary: int
    claimed: dict[str, int]
    rejected: dict[str, Any]
    packer: dict[str, Any]
    kind: str = "spool"


def spool_status(path: str, *, now_s: float | None = None) -> SpoolStatus:
    """What is in a spool. What comes and goes meanwhile is counted or not. Raises: DesfsError for what may not be
    read."""
    now_s = time.time() if now_s is None else now_s
    internal = os.path.join(path, INTERNAL)
    try:
        files = size = temporary = 0
        oldest_s: float | None = None
        for name, status in _files(path, leave_out=INTERNAL):
            files += 1
            size += status.st_size
            temporary += is_temporary(name, TEMPORARY_PATTERNS)
            # ctime, as the packer: programs set mtime, and a rename into the spool counts.
            oldest_s = status.st_ctime if oldest_s is None else min(oldest_s, status.st_ctime)
        batches = os.listdir(os.path.join(internal, "claims"))
        folders = [os.path.join(internal, "claims", batch, "files") for batch in batches]
        claimed = [status.st_size for folder in folders for _, status in _files(folder)]
        rejected = sorted(os.listdir(os.path.join(internal, "rejected")))
        return SpoolStatus(
            place=path,
            waiting={
                "files": files,
                "bytes": size,
                "oldest_seconds": None if oldest_s is None else round(max(0.0, now_s - oldest_s), 1),
            },
            temporary=temporary,
            claimed={
                "files": len(claimed),
                "bytes": sum(claimed),
                "batches": len(batches),
            },
            rejected={
                "count": len(rejected),
                "first": [_rejection(os.path.join(internal, "rejected", each)) for each in rejected[:FIRST]],
            },
            packer=_packer(os.path.join(internal, "lock")),
        )
    except PermissionError as error:
        raise DesfsError(f"spool {path}: {error.strerror}: {error.filename}") from error


def _files(root: str, *, leave_out: str | None = None) -> Iterator[tuple[str, os.stat_result]]:
    """Everything below a folder that is no folder, by its path from there; symbolic links are not followed."""
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            entries = list(os.scandir(os.path.join(root, folder)))
        except (FileNotFoundError, NotADirectoryError):
            continue  # gone meanwhile
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if name == leave_out:
                continue
            try:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(name)
                else:
                    yield name, entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue


def _rejection(folder: str) -> dict[str, str]:
    """What was put aside, and why."""
    try:
        text = Path(folder, "reason.txt").read_text(encoding="utf-8", errors="backslashreplace").strip()
    except FileNotFoundError:
        return {"file": "", "reason": "no reason was left", "folder": folder}
    # "PATH: reason", and both may have colons: the path ends in the name of what lies beside.
    beside = next((each for each in os.listdir(folder) if each != "reason.txt"), "")
    at = text.find(f"{beside}: ")
    file, reason = (text[: at + len(beside)], text[at + len(beside) + 2 :]) if at >= 0 else ("", text)
    return {"file": file, "reason": reason, "folder": folder}


def _packer(lock: str) -> dict[str, Any]:
    """Whether somebody holds the lock, without taking it: a packer that starts at that moment would give up."""
    try:
        status = os.stat(lock)
    except FileNotFoundError:
        return {"running": False, "pid": None}
    try:
        lines = Path("/proc/locks").read_text().splitlines()
        sees_all = os.stat("/proc/self/ns/pid").st_ino == _INIT_PID_NAMESPACE
    except OSError:
        return {"running": None, "pid": None}
    holder = lock_holder(lines, status)
    if holder is not None:
        return {"running": True, "pid": holder or None}
    # Locks of processes in other pid namespaces are not in the list: Linux, fs/locks.c, locks_show.
    return {"running": False if sees_all else None, "pid": None}


def lock_holder(lines: Iterable[str], status: os.stat_result) -> int | None:
    """The process that holds a flock on a file, by the lines of /proc/locks; 0 when that is not shown, None when there
    is none."""
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    for line in lines:
        # 1: FLOCK  ADVISORY  WRITE 1635 fe:00:1474573 0 EOF; "->" after the number: it waits
        fields = line.split()
        if len(fields) >= 6 and fields[1] == "FLOCK" and fields[5] == f"{device}:{status.st_ino}":
            return max(0, int(fields[4]))
    return None


# --- a store -----------------------------------------------------------------------------------------------------


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
    `foreign`: {"count", "bytes", "first"}: objects that a mount does not show, with the first keys.
    """

    place: str
    layout: dict[str, Any] | None
    layout_problem: str | None
    days: list[DayStatus]
    total: DayStatus
    foreign: dict[str, Any]
    kind: str = "store"


def store_status(store: Store) -> StoreStatus:
    """What a store holds, by one listing of all of it. Raises: StoreError."""
    objects = store.list("").objects
    layout, problem = _layout(store) if any(each.key == LAYOUT_KEY for each in objects) else (None, None)
    return build_store_status(store.url, objects, layout, problem)


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
    url: str, objects: Iterable[ObjectInfo], layout: dict[str, Any] | None, problem: str | None
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
                foreign.first += [each.key] if len(foreign.first) < FIRST else []
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
    )
