"""`desfs status`: what a mount does, what waits in a spool, what a store holds.

`--json` prints one object: `MountStatus`, `SpoolStatus` or `StoreStatus` of desfs.status, as `kind` says. Of a mount
that is not served there are `kind`, `place` and `state` ("dead" or "hung") alone. Exit status: 0; 1 when the mount is
not served or the place cannot be looked at; 2 when it is none of the three.
"""

from __future__ import annotations

import io
import json as jsons
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from des_format.shards import is_day
from desfs.amounts import counted, format_size
from desfs.cli.exits import EXIT_FAILURE, EXIT_USAGE, fail, printable
from desfs.cli.setup import set_up
from desfs.errors import DesfsError, UsageError
from desfs.settings import StoreSettings
from desfs.status import (
    MountStatus,
    NotServed,
    Place,
    SpoolStatus,
    StoreStatus,
    mount_status,
    place_of,
    spool_status,
    store_status,
)
from desfs.store import open_store

_LIMIT_S = 5.0  # for a mount to answer
_DAYS = 30  # shown to people; programs get all
_DAY_COLUMNS = ("day", "containers", "sealed", "parts", "size", "large files", "size", "newest")

Status = MountStatus | SpoolStatus | StoreStatus


def run(place: str, options: dict[str, Any], *, json: bool) -> int:
    """Look, and print what is there; the exit status."""
    try:
        settings = set_up(StoreSettings, options)
        limit_s = min(_LIMIT_S, settings.deadline)
        status = _look(place_of(place, limit_s=limit_s), settings, limit_s)
    except UsageError as error:
        return fail(error, EXIT_USAGE)
    except NotServed as error:
        if json:
            print(jsons.dumps({"kind": "mount", "place": os.path.abspath(place), "state": error.state}))
        return fail(error, EXIT_FAILURE)
    except (DesfsError, OSError) as error:
        return fail(error, EXIT_FAILURE)
    _print(status, json=json)
    return 0


def _look(place: Place, settings: StoreSettings, limit_s: float) -> Status:
    match place.kind:
        case "mount":
            return mount_status(place, limit_s=limit_s)
        case "spool":
            return spool_status(place.path)
    store = open_store(place.path, settings.s3_options(), deadline_s=settings.deadline)
    try:
        return store_status(store)
    finally:
        store.close()


def _print(status: Status, *, json: bool) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that are no UTF-8
    if json:
        print(jsons.dumps(asdict(status), ensure_ascii=False))
    elif isinstance(status, MountStatus):
        _print_pairs(mount_lines(status))
    elif isinstance(status, SpoolStatus):
        _print_pairs(spool_lines(status))
    else:
        _print_pairs(store_lines(status))
        if status.days:
            print()
            _print_table(_DAY_COLUMNS, day_rows(status))
        left = len(status.days) - _DAYS
        if left > 0:
            print(f"and {left:,} older; --json has all")
    sys.stdout.flush()


# --- what people read --------------------------------------------------------------------------------------------


def mount_lines(status: MountStatus) -> list[tuple[str, str]]:
    """What a mount does, a line for each thing."""
    known = [files for files in status.days.values() if files is not None]
    lines = [
        ("mount", status.place),
        ("source", status.source),
        ("up for", _duration(status.uptime_seconds)),
        (
            "days",
            f"{len(status.days):,} looked at, {len(known):,} of them with all indexes: {counted(sum(known), 'file')}",
        ),
        (
            "open containers",
            f"{counted(status.open_containers['files'], 'file')}, {format_size(status.open_containers['bytes'])}",
        ),
    ]
    if status.requests is not None:
        waiting = counted(int(status.requests.get("open") or 0), "request")
        oldest_s = status.requests.get("oldest_seconds", 0.0)
        lines.append(("waiting now", f"{waiting} of the kernel, the oldest for {oldest_s:.1f} s"))
    lines.append(("kernel requests", _counts(status.kernel_requests)))
    if status.kernel_errors:
        lines.append(("failed", _counts(status.kernel_errors)))
    lines += [
        ("store requests", _counts(status.store_requests)),
        ("of these", f"{status.store_failures:,} without success, {status.store_retries:,} tried again"),
        ("bytes", f"{format_size(status.bytes['received'])} received"),
        *((f"cache {name}", _ratio(each)) for name, each in status.caches.items()),
    ]
    if status.disk_cache is not None:
        disk = status.disk_cache
        fault = f"; off: {disk['fault']}" if disk.get("fault") else ""
        held = f"{format_size(disk['bytes'])} of {format_size(disk['max_bytes'])}"
        lines.append(("disk cache", f"{disk['folder']}: {held}{fault}"))
    prefetch = status.prefetch
    levers = status.levers.get("why_not")
    speed = format_size(int(status.link["bandwidth"]))
    lines += [
        (
            "prefetch",
            (
                f"{counted(prefetch['pushed'], 'file')} pushed to the kernel, {prefetch['pushed_in_vain']:,} in vain; "
                f"{counted(prefetch['containers_bought'], 'container')} fetched as a whole"
            ),
        ),
        (
            "link",
            f"{status.link['latency_s'] * 1000:.1f} ms to the first byte, {speed}/s",
        ),
        ("levers", "in force" if status.levers.get("in_force") else f"not in force: {levers}"),
        ("problems", f"{status.problems['count']:,}"),
    ]
    return lines + [("", each) for each in status.problems["first"]]


def spool_lines(status: SpoolStatus) -> list[tuple[str, str]]:
    """What waits in a spool, a line for each thing."""
    waiting, claimed, packer = status.waiting, status.claimed, status.packer
    oldest_s = waiting["oldest_seconds"]
    text = f"{counted(int(waiting['files'] or 0), 'file')}, {format_size(int(waiting['bytes'] or 0))}"
    if oldest_s is not None:
        text += f"; the oldest for {_duration(oldest_s)}"
    if status.temporary:
        text += f"; {status.temporary:,} with temporary names"
    running = {True: "at work", False: "none at work", None: "cannot be told: it may be in another container"}
    rejected = status.rejected
    held = format_size(claimed["bytes"])
    return [
        ("spool", status.place),
        ("packer", running[packer["running"]] + (f", process {packer['pid']}" if packer["pid"] else "")),
        ("waiting", text),
        (
            "claimed",
            f"{counted(claimed['files'], 'file')}, {held}, in {counted(claimed['batches'], 'batch', 'batches')}",
        ),
        ("put aside", f"{rejected['count']:,} in {os.path.join(status.place, '.desfs', 'rejected')}"),
        *(("", f"{each['file']}: {each['reason']}") for each in rejected["first"]),
    ]


def store_lines(status: StoreStatus) -> list[tuple[str, str]]:
    """What a store holds, but for its days."""
    total, foreign, layout = status.total, status.foreign, status.layout
    known = (
        f"{1 << layout['shard_bits']:,} shards a day, placed by {layout['placement']}, named by {layout['naming']}"
        if layout is not None and status.layout_problem is None
        else f"not understood: {status.layout_problem}"
        if status.layout_problem is not None
        else "none: a lookup reads all indexes of a day"
    )
    parts = counted(total.parts, "part")
    days = sum(is_day(each.day) for each in status.days)
    return [
        ("store", status.place),
        ("layout", known),
        ("names", f"{len(status.days):,}, {days:,} of them days"),
        (
            "containers",
            f"{total.containers:,}, {format_size(total.bytes)}: {total.sealed:,} sealed, {parts}",
        ),
        ("large files", f"{counted(total.external, 'object')} of their own, {format_size(total.external_bytes)}"),
        (
            "foreign",
            f"{counted(foreign['count'], 'object')} that a mount does not show, {format_size(foreign['bytes'])}",
        ),
        *(("", each) for each in foreign["first"]),
    ]


def day_rows(status: StoreStatus) -> list[Sequence[str]]:
    """The newest days, and all of them together."""
    return [
        (
            each.day,
            f"{each.containers:,}",
            f"{each.sealed:,}",
            f"{each.parts:,}",
            format_size(each.bytes),
            f"{each.external:,}",
            format_size(each.external_bytes),
            f"{datetime.fromtimestamp(each.newest, UTC):%Y-%m-%d %H:%M:%S}",
        )
        for each in (*status.days[:_DAYS], status.total)
    ]


def _print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    pairs = [(name, printable(text)) for name, text in pairs]
    if not sys.stdout.isatty():
        width = max(len(name) for name, _ in pairs)
        for name, text in pairs:
            print(f"{name:{width}}  {text}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in pairs:
        table.add_row(name, Text(text))  # no markup: names have brackets
    Console(highlight=False).print(table)


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        for row in (columns, *rows):
            first, *rest = (
                f"{printable(text):{'<' if place == 0 else '>'}{width}}"
                for place, (text, width) in enumerate(zip(row, widths, strict=True))
            )
            print("  ".join((first, *rest)).rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place == 0 else "right", no_wrap=True)
    for number, row in enumerate(rows, 1):
        last = number == len(rows)
        table.add_row(*(Text(printable(text)) for text in row), style="bold" if last else None)
    Console(highlight=False).print(table)


def _counts(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    most = sorted(counts.items(), key=lambda each: -each[1])
    return f"{total:,}" + (f" ({', '.join(f'{name} {count:,}' for name, count in most)})" if counts else "")


def _ratio(each: dict[str, int]) -> str:
    asked = each["hits"] + each["misses"]
    share = f" ({each['hits'] / asked:.0%})" if asked else ""
    return f"{each['hits']:,} hits{share}, {each['misses']:,} misses"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
