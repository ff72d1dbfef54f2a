"""Workers, node ids and ids in a SQL database."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from typing import Any

from sqlalchemy import (
    and_,
    case,
    delete,
    exists,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from assignment.catalog import NodeLease, Worker
from assignment.errors import (
    InvalidRequest,
    NodeIdLost,
)
from assignment.rows import (
    expiry,
    holds_node,
    node_lease_of,
    unlocked,
    worker_of,
)
from assignment.schema import DatabaseNowMs, id_sequence, node, worker
from assignment.sequence import IdBlock, SequenceState, reserve
from assignment.sql_connection import SqlConnection, to_the_end

_NODES = 256  # what the 8 bits of a name's node field hold


class SqlIds(SqlConnection):
    """The part of `assignment.catalog.Catalog` that has nothing to do with containers."""

    # Workers

    @to_the_end
    async def heartbeat(self, name: str, spool: str, details: Mapping[str, Any], ttl_s: float) -> None:
        try:
            text = json.dumps(dict(details))
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"details of worker {name!r}: {error}") from error
        fresh = self._upsert(worker).values(
            name=name, spool=spool, details=text, started_at_ms=DatabaseNowMs(), expires_at_ms=expiry(ttl_s)
        )
        statement = fresh.on_conflict_do_update(
            index_elements=[worker.c.name],
            set_={
                "spool": fresh.excluded.spool,
                "details": fresh.excluded.details,
                "started_at_ms": case(
                    (worker.c.expires_at_ms > DatabaseNowMs(), worker.c.started_at_ms), else_=DatabaseNowMs()
                ),
                "expires_at_ms": expiry(ttl_s),
            },
        )
        async with self.writing() as connection:
            await connection.execute(statement)

    @to_the_end
    async def list_workers(self, *, forget_after_s: float = 86400.0) -> list[Worker]:
        old = select(worker.c.name).where(worker.c.expires_at_ms <= expiry(-forget_after_s))
        statement = select(worker, (worker.c.expires_at_ms > DatabaseNowMs()).label("alive"))
        async with self.writing() as connection:
            await connection.execute(delete(worker).where(worker.c.name.in_(unlocked(old))))
            rows = (await connection.execute(statement)).all()
        return sorted(map(worker_of, rows), key=lambda worker: worker.name)

    @to_the_end
    async def remove_worker(self, name: str) -> None:
        async with self.writing() as connection:
            await connection.execute(delete(worker).where(worker.c.name == name))

    # Ids

    @to_the_end
    async def lease_node_id(self, holder: str, ttl_s: float) -> NodeLease | None:
        free = node.alias("free")
        longest = (
            select(free.c.node_id)
            .where(free.c.expires_at_ms <= DatabaseNowMs())
            .order_by(free.c.expires_at_ms, free.c.node_id)
            .limit(1)
        )
        take = (
            update(node)
            .where(node.c.node_id == unlocked(longest).scalar_subquery())
            .values(holder=holder, token=node.c.token + 1, expires_at_ms=expiry(ttl_s))
            .returning(*node.c)
        )
        async with self.writing() as connection:
            if (await connection.execute(select(node.c.node_id).limit(1))).first() is None:
                # In one order, so that two who do it at once wait for one another, and not each for the other.
                unused = [{"node_id": n, "holder": "", "token": 0, "expires_at_ms": 0} for n in range(_NODES)]
                await connection.execute(self._upsert(node).on_conflict_do_nothing(), unused)
            row = (await connection.execute(take)).one_or_none()
        return None if row is None else node_lease_of(row)

    @to_the_end
    async def renew_node_id(self, lease: NodeLease, ttl_s: float) -> NodeLease | None:
        statement = update(node).where(holds_node(lease)).values(expires_at_ms=expiry(ttl_s)).returning(*node.c)
        async with self.writing() as connection:
            await self._lock_node(connection, lease)
            row = (await connection.execute(statement)).one_or_none()
        return None if row is None else node_lease_of(row)

    @to_the_end
    async def release_node_id(self, lease: NodeLease) -> None:
        async with self.writing() as connection:
            await self._lock_node(connection, lease)
            await connection.execute(update(node).where(holds_node(lease)).values(expires_at_ms=DatabaseNowMs()))

    async def _lock_node(self, connection: AsyncConnection, lease: NodeLease) -> None:
        await self._lock(connection, select(node.c.token).where(node.c.node_id == lease.node_id))

    @to_the_end
    async def reserve_ids(self, node: NodeLease | int, day: date, count: int, now_ms: int) -> IdBlock:
        node_id = node if isinstance(node, int) else node.node_id
        columns = id_sequence.c
        of_node = and_(columns.node_id == node_id, columns.day == day)
        start = self._upsert(id_sequence).values(node_id=node_id, day=day, last_ms=0, next_sequence=0)
        saved = select(columns.last_ms, columns.next_sequence).where(of_node).with_for_update()
        async with self.writing() as connection:
            if isinstance(node, NodeLease):
                await self._lock_node(connection, node)
                held = select(exists().where(holds_node(node)))
                if not (await connection.execute(held)).scalar_one():
                    raise NodeIdLost(f"node {node_id}: the lease with token {node.token} does not hold any more")
            row = (await connection.execute(saved)).one_or_none()
            if row is None:
                # Of two who are the day's first, the second goes on behind the first.
                await connection.execute(start.on_conflict_do_nothing())
                row = (await connection.execute(saved)).one()
            state, block = reserve(
                SequenceState(row.last_ms, row.next_sequence), node_id=node_id, day=day, now_ms=now_ms, count=count
            )
            await connection.execute(
                update(id_sequence).where(of_node).values(last_ms=state.last_ms, next_sequence=state.next_sequence)
            )
        return block
