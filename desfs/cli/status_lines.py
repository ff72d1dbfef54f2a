"""What people read of a mount, a spool or a store: a line for each thing. Pure."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from des_format.shards import is_day
from desfs.amounts import counted, format_size
from desfs.cli.exits import printable
from desfs.status import MountStatus, NotServed, SpoolStatus, Status, StoreStatus
from desfs.status.durations import format_duration

_DAYS = 30  # shown to people; programs get all
_NAMED = 4  # operations, packers; the others are counted
_HITS = {
    "memory": "memory hits",
    "disk_blocks": "disk block hits",
    "disk_indexes": "disk index hits",
    "redis": "redis hits",
}
_GAP = 2  # between two columns
_NAME_WIDTH = len("2026-11-20")


class Line(NamedTuple):
    """What a line is about, and what it says; `is_bad` for what somebody has to see to."""

    name: str
    text: str
    is_bad: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """A look at a place: the record that programs get, the lines that people read, of a store its days too."""

    record: dict[str, Any]
    lines: list[Line]
    store: StoreStatus | None = None

    @classmethod
    def of(cls, status: Status) -> Report:
        """What there is to say of a place."""
        if isinstance(status, MountStatus):
            return cls(asdict(status), mount_lines(status))
        if isinstance(status, SpoolStatus):
            return cls(asdict(status), spool_lines(status))
        return cls(asdict(status), store_lines(status), status)

    @classmethod
    def of_unserved(cls, place: str, error: NotServed) -> Report:
        """What there is to say of a mount that does not answer."""
        record = {"kind": "mount", "place": place, "state": error.state}
        return cls(record, [Line("mount", place), Line("warning", str(error), True)])


# --- a mount -----------------------------------------------------------------------------------------------------


def mount_lines(status: MountStatus) -> list[Line]:
    """What a mount does; the names of its problems come last, where a low terminal cuts off."""
    problems = status.problems["count"]
    left = problems - len(status.problems["first"])
    return [
        Line("mount", status.place),
        Line("source", status.source),
        Line("up for", format_duration(status.uptime_seconds)),
        *(Line("warning", each, True) for each in status.warnings),
        Line("problems", f"{problems:,}, named below" if problems else "none", problems > 0),
        *_throughput(status),
        *_caches(status),
        *_state(status),
        *(Line("problem", each, True) for each in status.problems["first"]),
        *([Line("", f"and {left:,} more in {status.place}/.desfs/problems")] if left else []),
    ]


def _throughput(status: MountStatus) -> Iterator[Line]:
    rates, so_far = status.rates, status.bytes
    yield Line("rates", _since(rates))
    of_store, requests = _bytes_a_second(rates["received"]), f"{rates['store_requests']:,.1f} requests/s"
    total = f"{format_size(so_far['received'])} in {sum(status.store_requests.values()):,}"
    yield Line("from the store", f"{of_store}, {requests}; so far {total}")
    read, pushed = (f"{_bytes_a_second(rates[way])} {way}" for way in ("read", "pushed"))
    yield Line("to readers", f"{read}, {pushed}; so far {format_size(so_far['read'])}, {format_size(so_far['pushed'])}")
    yield Line("kernel requests", f"{rates['kernel_requests']:,.1f}/s; so far {_counts(status.kernel_requests)}")
    if status.requests is not None:
        waiting = int(status.requests["open"])
        oldest = f"{format_duration(status.requests['oldest_seconds'])}, of {waiting:,} without an answer"
        yield Line("oldest request", oldest if waiting else "none is without an answer")
    if status.kernel_errors:
        # Other errors are answers that programs expect: there is no such attribute, or no such operation.
        yield Line("failed", _counts(status.kernel_errors), "EIO" in status.kernel_errors)
    failures = f"{status.store_failures:,} without success, {status.store_retries:,} tried again"
    yield Line("store requests", f"{_counts(status.store_requests)}; {failures}")


def _since(rates: dict[str, Any]) -> str:
    if rates["since"] == "start":
        return f"averages since the start, {format_duration(rates['seconds'])}"
    return f"between two looks, {format_duration(rates['seconds'])}"


def _caches(status: MountStatus) -> Iterator[Line]:
    for name, each in status.caches.items():
        share, asked = status.rates["hits"][name], each["hits"] + each["misses"]
        now = "not asked" if share is None else f"{share:.0%}"
        yield Line(_HITS[name], f"{now}; so far {each['hits']:,} of {asked:,}")
    if status.disk_cache is not None:
        disk = status.disk_cache
        held = f"{format_size(disk['bytes'])} of {format_size(disk['max_bytes'])}"
        off = "; off" if disk.get("fault") else ""
        yield Line("disk cache", f"{held}{off}, in {disk['folder']}", bool(off))


def _state(status: MountStatus) -> Iterator[Line]:
    prefetch, levers = status.prefetch, status.levers.get("why_not")
    pushed = f"{counted(prefetch['pushed'], 'file')} pushed, {prefetch['pushed_in_vain']:,} in vain"
    yield Line("prefetch", f"{pushed}; {counted(prefetch['containers_bought'], 'container')} fetched whole")
    speed = format_size(int(status.link["bandwidth"]))
    yield Line("link", f"{status.link['latency_s'] * 1000:.1f} ms to the first byte, {speed}/s")
    yield Line("levers", "in force" if status.levers.get("in_force") else f"not in force: {levers}")
    known = [files for files in status.days.values() if files is not None]
    of_days = f"{len(status.days):,} looked at, {len(known):,} with all indexes: {counted(sum(known), 'file')}"
    yield Line("days", of_days)
    held = status.open_containers
    yield Line("open containers", f"{counted(held['files'], 'file')}, {format_size(held['bytes'])}")


# --- a spool -----------------------------------------------------------------------------------------------------


def spool_lines(status: SpoolStatus) -> list[Line]:
    """What waits in a spool; what was put aside comes last."""
    claimed, rejected = status.claimed, status.rejected
    text = f"{counted(claimed['files'], 'file')}, {format_size(claimed['bytes'])}"
    text += f", in {counted(claimed['batches'], 'batch', 'batches')}"
    if claimed["oldest_seconds"] is not None:
        text += f"; the oldest for {format_duration(claimed['oldest_seconds'])}"
    folder = os.path.join(status.place, ".desfs", "rejected")
    return [
        Line("spool", status.place),
        *(Line("warning", each, True) for each in status.warnings),
        *_packers(status),
        *_waiting(status),
        Line("claimed", text, status.overdue["claimed"] > 0),
        Line(
            "put aside",
            f"{rejected['count']:,}" + (f", in {folder}" if rejected["count"] else ""),
            rejected["count"] > 0,
        ),
        *(Line("", f"{each['file']}: {each['reason']}", True) for each in rejected["first"]),
    ]


def _packers(status: SpoolStatus) -> Iterator[Line]:
    running = [each for each in status.packers if each["running"]]
    unknown = [each for each in status.packers if each["running"] is None]
    ended = [each for each in status.packers if each["running"] is False]
    if running:
        yield Line("packers", f"{len(running):,} at work: {_named(running)}")
    elif status.packer["running"] is None:
        yield Line("packers", "cannot be told: they may be in other containers, or on other machines")
    else:
        yield Line("packers", "at work, without a number" if status.packer["running"] else "none at work")
    if unknown:
        yield Line("", f"{len(unknown):,} of which that cannot be told: {_named(unknown)}")
    if ended:
        yield Line("", f"{len(ended):,} ended with batches left: {_named(ended)}", True)


def _named(packers: Sequence[dict[str, Any]]) -> str:
    found = []
    for each in packers[:_NAMED]:
        process = [f"process {each['pid']}"] if each["pid"] else []
        batches = [counted(each["batches"], "batch", "batches")] if each["batches"] else []
        more = ", ".join(process + batches)
        found.append(f"{each['number']} ({more})" if more else each["number"])
    left = len(packers) - _NAMED
    return ", ".join(found) + (f", and {left:,} more" if left > 0 else "")


def _waiting(status: SpoolStatus) -> Iterator[Line]:
    waiting = status.waiting
    text = f"{counted(waiting['files'], 'file')}, {format_size(waiting['bytes'])}"
    if status.temporary:
        text += f"; {status.temporary:,} with temporary names"
    yield Line("waiting", text)
    if status.rates is not None:
        growth = f"{status.rates['files']:+,.1f} files/s, {_growth(status.rates['bytes'])}"
        yield Line("growth", f"{growth} between two looks, {format_duration(status.rates['seconds'])}")
    if waiting["oldest_seconds"] is not None:
        age, limit = format_duration(waiting["oldest_seconds"]), format_duration(status.overdue["expected_seconds"])
        oldest = f"{age}, {limit} expected at most: {waiting['oldest_file']}"
        yield Line("oldest file", oldest, status.overdue["waiting"] > 0)


# --- a store -----------------------------------------------------------------------------------------------------


def store_lines(status: StoreStatus) -> list[Line]:
    """What a store holds, but for its days."""
    total, foreign, layout = status.total, status.foreign, status.layout
    known = (
        f"{1 << layout['shard_bits']:,} shards a day, placed by {layout['placement']}, named by {layout['naming']}"
        if layout is not None and status.layout_problem is None
        else f"not understood: {status.layout_problem}"
        if status.layout_problem is not None
        else "none: a lookup reads all indexes of a day"
    )
    days = sum(is_day(each.day) for each in status.days)
    kinds = f"{total.sealed:,} sealed, {counted(total.parts, 'part')}"
    lines = [
        Line("store", status.place),
        Line("layout", known, status.layout_problem is not None),
        Line("names", f"{len(status.days):,}, {days:,} of them days"),
        Line("containers", f"{total.containers:,}, {format_size(total.bytes)}: {kinds}"),
        Line("large files", f"{counted(total.external, 'object')} of their own, {format_size(total.external_bytes)}"),
    ]
    if status.rates is not None:
        seconds = status.rates["seconds"]
        grown = f"{status.rates['containers'] * seconds:+,.0f} containers, {_growth(status.rates['bytes'])}"
        lines.append(Line("growth", f"{grown} between two looks, {format_duration(seconds)}"))
    lines.append(
        Line(
            "foreign",
            f"{counted(foreign['count'], 'object')} that a mount does not show, {format_size(foreign['bytes'])}",
        )
    )
    return lines + [Line("", each) for each in foreign["first"]]


class DayTable(NamedTuple):
    """Columns, and rows of as many texts; the last row sums them up."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    @property
    def width(self) -> int:
        """Characters of a line; a name of the root that is longer than a day's goes on in the next."""
        widths = [max(map(len, each)) for each in zip(self.columns, *self.rows, strict=True)]
        return min(widths[0], _NAME_WIDTH) + sum(widths[1:]) + _GAP * (len(widths) - 1)


# What a narrow terminal does without, the first of them first: the seconds of the newest, and whole columns.
_COLUMNS = ("day", "containers", "sealed", "parts", "size", "large", "large size", "newest")
_LEFT_OUT = (
    frozenset[str](),
    frozenset(("seconds",)),
    frozenset(("seconds", "sealed")),
    frozenset(("seconds", "sealed", "parts")),
    frozenset(("seconds", "sealed", "parts", "large")),
    frozenset(("sealed", "parts", "large", "newest")),
)


def day_table(status: StoreStatus, width: int | None) -> DayTable:
    """The newest days, and all of them together, in as many columns as `width` characters have room for; in all of them
    without one."""
    for left_out in _LEFT_OUT:
        table = _day_table(status, left_out)
        if width is None or table.width <= width:
            break
    return table


def _day_table(status: StoreStatus, left_out: frozenset[str]) -> DayTable:
    stamp = "%Y-%m-%d %H:%M" if "seconds" in left_out else "%Y-%m-%d %H:%M:%S"
    rows = []
    for each in (*status.days[:_DAYS], status.total):
        texts = (
            printable(each.day),
            f"{each.containers:,}",
            f"{each.sealed:,}",
            f"{each.parts:,}",
            format_size(each.bytes),
            f"{each.external:,}",
            format_size(each.external_bytes),
            f"{datetime.fromtimestamp(each.newest, UTC):{stamp}}",
        )
        rows.append(tuple(text for name, text in zip(_COLUMNS, texts, strict=True) if name not in left_out))
    return DayTable(tuple(name for name in _COLUMNS if name not in left_out), rows)


def days_left_out(status: StoreStatus) -> int:
    """How many days the table has not."""
    return max(0, len(status.days) - _DAYS)


def _bytes_a_second(rate: float) -> str:
    return f"{format_size(int(rate))}/s"


def _growth(rate: float) -> str:
    return f"{'-' if rate < 0 else '+'}{_bytes_a_second(abs(rate))}"


def _counts(counts: dict[str, int]) -> str:
    """The sum, and the most frequent."""
    most = sorted(counts.items(), key=lambda each: -each[1])
    named = [f"{name} {count:,}" for name, count in most[:_NAMED]]
    others = sum(count for _, count in most[_NAMED:])
    named += [f"others {others:,}"] if others else []
    return f"{sum(counts.values()):,}" + (f" ({', '.join(named)})" if named else "")
