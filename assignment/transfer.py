"""From one catalog to another of any kind: how a store that began embedded moves to Postgres."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Table, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from assignment.errors import CatalogTooOld, CatalogUnavailable, InvalidRequest
from assignment.opening import catalog_at
from assignment.schema import DatabaseNowMs, bound_store, container, id_sequence, node, shard_lease, worker
from assignment.sql import SqlCatalog
from assignment.sqlite import SqliteCatalog

_ROWS_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class CopiedRows:
    """How many rows of each kind were copied."""

    shards: int
    containers: int
    id_sequences: int
    nodes: int


async def copy_catalog(source: str, target: str) -> CopiedRows:
    """Copy all that a catalog knows, but for its workers, into one that has no rows; its tables are made if they are
    not there.

    The target has everything or nothing. Nobody writes to either meanwhile; afterwards nobody may use the source any
    more, which is not seen to. Raises CatalogUnavailable when a packer or a service is at work in the source, or one of
    the two cannot be reached; InvalidRequest when the target has rows already, or
    there is no source; what opening raises for either.
    """
    origin, copy = catalog_at(source), catalog_at(target)
    if isinstance(origin, SqliteCatalog) and not origin.path.exists():  # opening would make it
        raise InvalidRequest(f"{origin.label}: there is no catalog to copy")
    try:
        async with copy:
            pass
    except CatalogTooOld:
        await copy.migrate()
    async with origin, copy, origin.writing() as reader, copy.writing() as writer:
        await origin.lock_all(reader)
        await copy.lock_all(writer)
        await _check_at_rest(origin, reader)
        await _check_empty(copy, writer)
        await _copy_rows(bound_store, reader, writer)
        return CopiedRows(
            shards=await _copy_rows(shard_lease, reader, writer),
            containers=await _copy_rows(container, reader, writer),
            id_sequences=await _copy_rows(id_sequence, reader, writer),
            nodes=await _copy_rows(node, reader, writer),
        )


async def _check_at_rest(origin: SqlCatalog, reader: AsyncConnection) -> None:
    """A holder would go on in the source; and the ids of a node that is leased there would be given out twice."""
    shards = select(shard_lease).where(shard_lease.c.expires_at_ms > DatabaseNowMs()).limit(1)
    held = (await reader.execute(shards)).one_or_none()
    if held is not None:
        raise CatalogUnavailable(f"{origin.label}: {held.day}/{held.shard} is held by {held.holder!r}: stop it first")
    nodes = select(node).where(node.c.expires_at_ms > DatabaseNowMs()).limit(1)
    held = (await reader.execute(nodes)).one_or_none()
    if held is not None:
        raise CatalogUnavailable(f"{origin.label}: node {held.node_id} is held by {held.holder!r}: stop it first")


async def _check_empty(copy: SqlCatalog, writer: AsyncConnection) -> None:
    for table in (bound_store, shard_lease, container, id_sequence, node, worker):
        if (await writer.execute(select(table).limit(1))).first() is not None:
            raise InvalidRequest(f"{copy.label}: has rows in its table {table.name} already, want an empty catalog")


async def _copy_rows(table: Table, reader: AsyncConnection, writer: AsyncConnection) -> int:
    copied = 0
    async with reader.stream(select(table)) as result:
        async for rows in result.mappings().partitions(_ROWS_AT_ONCE):
            await writer.execute(insert(table), [dict(row) for row in rows])
            copied += len(rows)
    return copied
