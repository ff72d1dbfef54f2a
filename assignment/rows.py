"""Rows and the records that they are, and the conditions by which a statement picks them. Pure: nothing is executed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, and_, case

from assignment.catalog import LIVE, ContainerRecord, ContainerState, DaySummary, Lease, NodeLease, Worker
from assignment.errors import CatalogCorrupt, InvalidRequest
from assignment.schema import DatabaseNowMs, container, node, shard_lease

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# What a statement compares with at once. SQLite before 3.32 takes 999 values, asyncpg 32,767.
_KEYS_AT_ONCE = 500


def unlocked(rows: Select[Any]) -> Select[Any]:
    """Those of the rows that nobody is about to change. Who takes rows without waiting is in no circle of waiters."""
    return rows.with_for_update(skip_locked=True)


def expiry(ttl_s: float) -> ColumnElement[int]:
    return DatabaseNowMs() + round(ttl_s * 1000)


def of_shard(lease: Lease) -> ColumnElement[bool]:
    return and_(shard_lease.c.day == lease.day, shard_lease.c.shard == lease.shard)


def holds(lease: Lease) -> ColumnElement[bool]:
    """The lease's row, if nobody else has acquired it since and it has not expired: proof of ownership, by token."""
    columns = shard_lease.c
    return and_(of_shard(lease), columns.token == lease.token, columns.expires_at_ms > DatabaseNowMs())


def holds_node(lease: NodeLease) -> ColumnElement[bool]:
    columns = node.c
    return and_(columns.node_id == lease.node_id, columns.token == lease.token, columns.expires_at_ms > DatabaseNowMs())


def in_shard(lease: Lease) -> ColumnElement[bool]:
    return and_(container.c.day == lease.day, container.c.shard == lease.shard)


def check_shard(lease: Lease, record: ContainerRecord) -> None:
    if (record.day, record.shard) != (lease.day, lease.shard):
        raise InvalidRequest(
            f"{record.object_key}: found a container of {record.day}/{record.shard}, "
            f"want one of the lease's {lease.day}/{lease.shard}"
        )


def greater(column: ColumnElement[int], least: int) -> ColumnElement[int]:
    return case((column > least, column), else_=least)


def batches(keys: Collection[str]) -> Iterator[list[str]]:
    ordered = sorted(keys)
    for start in range(0, len(ordered), _KEYS_AT_ONCE):
        yield ordered[start : start + _KEYS_AT_ONCE]


def no_longer(lease: Lease) -> str:
    return f"{lease.day}/{lease.shard}: the lease of {lease.holder!r} with token {lease.token} does not hold any more"


def instant(unix_ms: int) -> datetime:
    return _EPOCH + timedelta(milliseconds=unix_ms)


def lease_of(row: Row[Any]) -> Lease:
    return Lease(
        day=row.day,
        shard=row.shard,
        holder=row.holder,
        token=row.token,
        expires_at=instant(row.expires_at_ms),
        previous_token=row.previous_token,
        previous_holder=row.previous_holder,
    )


def node_lease_of(row: Row[Any]) -> NodeLease:
    return NodeLease(row.node_id, row.holder, row.token, instant(row.expires_at_ms))


def container_values(lease: Lease, record: ContainerRecord) -> dict[str, Any]:
    return {
        "object_key": record.object_key,
        "day": record.day,
        "shard": record.shard,
        "generation": record.generation,
        "size": record.size,
        "files": record.files,
        "etag": record.etag,
        "mark": record.mark,
        "token": lease.token,
        "state": record.state,
    }


def worker_of(row: Row[Any]) -> Worker:
    """Raises: CatalogCorrupt for details that are no JSON object."""
    try:
        details = json.loads(row.details)
    except ValueError as error:
        raise CatalogCorrupt(f"worker {row.name!r}: its details are no JSON: {error}") from error
    if not isinstance(details, dict):
        raise CatalogCorrupt(f"worker {row.name!r}: its details are {type(details).__name__}, want an object")
    return Worker(
        name=row.name,
        spool=row.spool,
        details=details,
        started_at=instant(row.started_at_ms),
        expires_at=instant(row.expires_at_ms),
        alive=bool(row.alive),
    )


def record_of(row: Row[Any]) -> ContainerRecord:
    return ContainerRecord(
        object_key=row.object_key,
        day=row.day,
        shard=row.shard,
        generation=row.generation,
        size=row.size,
        files=row.files,
        etag=row.etag,
        state=ContainerState(row.state),
        mark=row.mark,
        token=row.token,
        changed_at=instant(row.changed_at_ms),
    )


def summaries_of(rows: Iterable[Row[Any]]) -> list[DaySummary]:
    """Of one row for each day and state, ascending by day."""
    days: dict[date, dict[ContainerState, Row[Any]]] = {}
    for row in rows:
        days.setdefault(row.day, {})[ContainerState(row.state)] = row
    found = []
    for day, states in sorted(days.items()):
        live = [row for state, row in states.items() if state in LIVE]
        # int(): the sum of a BIGINT is a NUMERIC in Postgres.
        files, size = sum(int(row.files) for row in live), sum(int(row.size) for row in live)
        found.append(DaySummary(day, {state: states[state].containers for state in sorted(states)}, files, size))
    return found
