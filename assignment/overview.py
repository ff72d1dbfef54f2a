"""What the operations page shows, from what the catalog has. Pure.

What workers say of themselves is any JSON value, and names are what somebody chose: numbers are checked here, texts
made printable and cut. What they mean in HTML is the template's business, which escapes everything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from assignment.catalog import DaySummary, ShardHolder, Worker
from assignment.ring import CLAIMED_SHARDS, shard_owners
from des_format.shards import shard_hex

MAX_SHARDS = 256
"""Rows of shards that a page has: all of a store with so many, else those leased last."""

MAX_WORKERS = 200
"""Rows of workers that a page has, those that live first."""

_MAX_FAILURES = 20
_FAILURES_OF_ONE = 5
_MAX_NAME = 120
_MAX_TEXT = 400
# Packers share shards out by so many first bits of them: `desfs.packer.membership`.
_OWNED_BITS = 12


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A packer. Numbers are None where it did not say them; files and bytes, ages in seconds. `owned` is how many
    shards it tends; `heirs` who tends those of one that is gone."""

    name: str
    host: str
    spool: str
    alive: bool
    started_at: datetime
    expires_at: datetime
    waiting_files: int | None
    waiting_bytes: int | None
    oldest_s: float | None
    packed_files: int | None
    packed_bytes: int | None
    owned: int
    heirs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SpoolRow:
    """A spool, by what its live workers say, or its dead ones where none lives: what waited then has grown older."""

    name: str
    path: str
    alive: int
    gone: int
    waiting_files: int
    waiting_bytes: int
    oldest_s: float | None


@dataclass(frozen=True, slots=True)
class ShardRow:
    """A shard of a day: who tends it now, and who holds its lease, or held it last, None if nobody ever did."""

    shard: str
    owner: str | None
    holder: str | None
    holds: bool
    expires_at: datetime | None
    token: int | None


@dataclass(frozen=True, slots=True)
class Failure:
    """What a packer could not do; `at` is None when it did not say when."""

    at: datetime | None
    worker: str
    host: str
    what: str


@dataclass(frozen=True, slots=True)
class Owners:
    """Who tends the shards, among the workers that live."""

    by_group: Mapping[str, str]
    dropped_bits: int
    digits: int

    @classmethod
    def among(cls, workers: Iterable[Worker], shard_bits: int) -> Owners:
        """By what the heartbeats claim, as the packers themselves do it."""
        bits = min(shard_bits, _OWNED_BITS)
        groups = [shard_hex(group, bits) for group in range(1 << bits)]
        return cls(shard_owners(groups, workers), shard_bits - bits, len(shard_hex(0, shard_bits)))

    def of(self, shard: str) -> str | None:
        """The worker of a shard; None for one that the store's layout does not have, and without workers."""
        if not self.dropped_bits:
            return self.by_group.get(shard)
        try:
            group = int(shard, 16) >> self.dropped_bits
        except ValueError:
            return None
        return self.by_group.get(f"{group:0{_OWNED_BITS // 4}x}") if len(shard) == self.digits else None


@dataclass(frozen=True, slots=True)
class Overview:
    """All that a page shows, at an instant of the database's clock."""

    now: datetime
    today: date
    day: date
    days: Sequence[DaySummary]
    workers: Sequence[WorkerRow]
    workers_left_out: int
    spools: Sequence[SpoolRow]
    failures: Sequence[Failure]
    shards: Sequence[ShardRow]
    shards_in_all: int

    @property
    def alive(self) -> int:
        return sum(each.alive for each in self.spools)

    @property
    def gone(self) -> int:
        return sum(each.gone for each in self.spools)

    @property
    def oldest(self) -> SpoolRow | None:
        """The spool whose oldest file waits longest."""
        waiting = [each for each in self.spools if each.oldest_s is not None]
        return max(waiting, key=lambda each: each.oldest_s or 0.0, default=None)

    @property
    def summary_today(self) -> DaySummary:
        return next((each for each in self.days if each.day == self.today), DaySummary(self.today, {}, 0, 0))

    @property
    def held(self) -> int:
        return sum(each.holds for each in self.shards)


def build_overview(
    *,
    now: datetime,
    today: date,
    day: date,
    days: Sequence[DaySummary],
    workers: Sequence[Worker],
    owners: Owners,
    holders: Sequence[ShardHolder],
    shard_bits: int,
) -> Overview:
    """The page of `day`, whose `holders` are at most MAX_SHARDS, at the instant `now`."""
    gone = sorted((each for each in workers if not each.alive), key=lambda each: each.expires_at, reverse=True)
    ordered = [*(each for each in workers if each.alive), *gone]
    by_shard = {each.shard: each for each in holders}
    names = {*by_shard}
    if 1 << shard_bits <= MAX_SHARDS:
        names |= {shard_hex(shard, shard_bits) for shard in range(1 << shard_bits)}
    return Overview(
        now=now,
        today=today,
        day=day,
        days=days,
        workers=[_worker_row(each, owners) for each in ordered[:MAX_WORKERS]],
        workers_left_out=max(len(ordered) - MAX_WORKERS, 0),
        spools=_spools(workers, now),
        failures=_failures(workers),
        shards=[_shard_row(name, owners, by_shard.get(name)) for name in sorted(names)],
        shards_in_all=1 << shard_bits,
    )


def printable(text: object, most: int = _MAX_NAME) -> str:
    """A text that shows what it is, and no longer than that: what has no shape of its own becomes a question mark in a
    diamond, such as controls, what turns the direction of writing, and halves of characters, which no page can hold."""
    if not isinstance(text, str) or not text:
        return "?"
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in cut)


def _worker_row(worker: Worker, owners: Owners) -> WorkerRow:
    details = worker.details
    claimed = details.get(CLAIMED_SHARDS)
    heirs: set[str] = set()
    if not worker.alive and isinstance(claimed, list):
        heirs = {
            printable(owners.by_group[each]) for each in claimed if isinstance(each, str) and each in owners.by_group
        }
    waiting = _waiting(worker)
    return WorkerRow(
        name=printable(worker.name),
        host=printable(details.get("host")),
        spool=_path(worker),
        alive=worker.alive,
        started_at=worker.started_at,
        expires_at=worker.expires_at,
        waiting_files=waiting[0],
        waiting_bytes=waiting[1],
        oldest_s=_number(details, "oldest_waiting_s"),
        packed_files=_count(details, "packed_files"),
        packed_bytes=_count(details, "packed_bytes"),
        owned=sum(owner == worker.name for owner in owners.by_group.values()) << owners.dropped_bits,
        heirs=tuple(sorted(heirs)),
    )


def _spools(workers: Sequence[Worker], now: datetime) -> list[SpoolRow]:
    groups: dict[str, list[Worker]] = defaultdict(list)
    for worker in workers:
        groups[worker.spool].append(worker)
    rows = []
    for spool, members in groups.items():
        alive = [each for each in members if each.alive]
        # What a dead one had in hand its successor counts again.
        telling = alive or members
        waits = [_waiting(each) for each in telling]
        ages = [
            age if each.alive else age + max((now - each.expires_at).total_seconds(), 0.0)
            for each in telling
            if (age := _number(each.details, "oldest_waiting_s")) is not None
        ]
        rows.append(
            SpoolRow(
                name=printable(spool),
                path=next((path for each in telling if (path := _path(each)) != printable(spool)), printable(spool)),
                alive=len(alive),
                gone=len(members) - len(alive),
                waiting_files=sum(files or 0 for files, _ in waits),
                waiting_bytes=sum(size or 0 for _, size in waits),
                oldest_s=max(ages, default=None),
            )
        )
    return sorted(rows, key=lambda row: (row.path, row.name))


def _failures(workers: Sequence[Worker]) -> list[Failure]:
    """Those that were said last, the newest first."""
    found = []
    for worker in workers:
        said = worker.details.get("failures")
        for each in said[-_FAILURES_OF_ONE:] if isinstance(said, list) else []:
            if isinstance(each, dict):
                what = printable(each.get("what"), _MAX_TEXT)
                found.append(
                    Failure(
                        _instant(each.get("at")), printable(worker.name), printable(worker.details.get("host")), what
                    )
                )
    never = datetime.min.replace(tzinfo=UTC)
    return sorted(found, key=lambda each: each.at or never, reverse=True)[:_MAX_FAILURES]


def _shard_row(name: str, owners: Owners, holder: ShardHolder | None) -> ShardRow:
    owner = owners.of(name)
    shown_owner = None if owner is None else printable(owner)
    if holder is None:
        return ShardRow(printable(name), shown_owner, None, False, None, None)
    return ShardRow(
        printable(name), shown_owner, printable(holder.holder), holder.holds, holder.expires_at, holder.token
    )


def _path(worker: Worker) -> str:
    path = worker.details.get("spool")
    return printable(path if isinstance(path, str) and path else worker.spool)


def _waiting(worker: Worker) -> tuple[int | None, int | None]:
    return _count(worker.details, "waiting_files"), _count(worker.details, "waiting_bytes")


def _number(details: Mapping[str, Any], key: str) -> float | None:
    """A number that is none below zero, nor one that nothing has so many of."""
    value = details.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1 << 63:
        return None
    return value


def _count(details: Mapping[str, Any], key: str) -> int | None:
    value = _number(details, key)
    return None if value is None else int(value)


def _instant(text: object) -> datetime | None:
    if not isinstance(text, str):
        return None
    try:
        found = datetime.fromisoformat(text)
        return (found if found.tzinfo is not None else found.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):  # the second for what is before the year 1 in UTC
        return None
