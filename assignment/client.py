"""What the packer knows of coordination: one interface, in-process here, over HTTP elsewhere.

The service alone decides day, shard and id, so that the clocks of packers do not matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, tzinfo
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self
from zoneinfo import ZoneInfo

from assignment.catalog import Catalog, NodeLease
from assignment.errors import (
    AssignmentError,
    CatalogCorrupt,
    CatalogTooNew,
    CatalogUnavailable,
    ContainerExists,
    InvalidRequest,
    LeaseLost,
)
from des_format.assigned_names import SnowflakeNameConfig
from des_format.errors import InvalidAssignedName
from des_format.shards import placement_shard, shard_hex

__all__ = [
    "MAX_BATCH",
    "Assignment",
    "AssignmentClient",
    "AssignmentError",
    "CatalogCorrupt",
    "CatalogTooNew",
    "CatalogUnavailable",
    "ContainerExists",
    "InProcessAssignment",
    "InvalidRequest",
    "LeaseLost",
    "open_embedded",
]

MAX_BATCH = 10_000
"""Files that one transaction assigns; also the most that the service takes in one request."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """Where a file goes: the day and shard (hex text, as in container keys) of its container, and its id, a
    Snowflake-style name without extension that no other file has."""

    path: str
    day: date
    shard: str
    id: str


class AssignmentClient(Protocol):
    """Assignments, and the catalog with its leases. Asyncio; many tasks may use one. An async context manager."""

    @property
    def catalog(self) -> Catalog:
        """Where leases are held and containers committed; closed with the client."""
        ...

    async def assign(self, paths: Sequence[str]) -> list[Assignment]:
        """One assignment per path, in order; the same path gets a new id each time.

        Any number of paths; each 10,000 are one transaction. An id whose answer was lost is never used. Raises
        CatalogUnavailable, CatalogCorrupt, NodeIdLost; over HTTP ServiceUnavailable, NotAuthorized, InvalidRequest.
        """
        ...

    async def close(self) -> None: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class InProcessAssignment:
    """The assignment service without a server, over a catalog that is open; closing it closes the catalog.

    `node` is a node id that this process shares with nobody, or with those who use the same catalog (their ids come
    from it), or a function that gives the lease of one. `clock_ns` gives Unix time.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        shard_bits: int,
        timezone: str = "UTC",
        node: int | Callable[[], NodeLease] = 0,
        prefix: str = "DES",
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """Raises InvalidRequest for a time zone that the system does not know, or settings out of their range."""
        if not 1 <= shard_bits <= 32:
            raise InvalidRequest(f"shard_bits: found {shard_bits}, want 1 to 32")
        try:
            self._names = SnowflakeNameConfig(prefix=prefix, node_id=node if isinstance(node, int) else 0)
        except InvalidAssignedName as error:
            raise InvalidRequest(str(error)) from error
        self._catalog = catalog
        self._node = node
        self._shard_bits = shard_bits
        self._timezone = _parse_timezone(timezone)
        self._clock_ns = clock_ns

    @property
    def catalog(self) -> Catalog:
        return self._catalog

    async def assign(self, paths: Sequence[str]) -> list[Assignment]:
        assignments: list[Assignment] = []
        for start in range(0, len(paths), MAX_BATCH):
            assignments.extend(await self._assign_batch(paths[start : start + MAX_BATCH]))
        return assignments

    async def _assign_batch(self, paths: Sequence[str]) -> list[Assignment]:
        shards = [shard_hex(placement_shard(path, self._shard_bits), self._shard_bits) for path in paths]
        now_ms = self._clock_ns() // 1_000_000
        day = self._day_of(now_ms)
        node = self._node if isinstance(self._node, int) else self._node()
        block = await self._catalog.reserve_ids(node, day, len(paths), now_ms)
        names = block.names(self._names.prefix, wrap_bits=self._names.wrap_bits)
        return [Assignment(path, day, shard, name) for path, shard, name in zip(paths, shards, names, strict=True)]

    def _day_of(self, now_ms: int) -> date:
        return datetime.fromtimestamp(now_ms / 1000, self._timezone).date()

    async def close(self) -> None:
        await self._catalog.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def open_embedded(
    path: Path,
    *,
    shard_bits: int,
    timezone: str = "UTC",
    node_id: int = 0,
    prefix: str = "DES",
    clock_ns: Callable[[], int] = time.time_ns,
) -> InProcessAssignment:
    """An assignment service of this process over the SQLite catalog at `path`, which is made if it is not there.

    Raises InvalidRequest as `InProcessAssignment` does; CatalogUnavailable, CatalogCorrupt, CatalogTooNew.
    """
    from assignment.sqlite import SqliteCatalog  # not needed by those who talk to a service

    catalog = SqliteCatalog(path)
    client = InProcessAssignment(
        catalog, shard_bits=shard_bits, timezone=timezone, node=node_id, prefix=prefix, clock_ns=clock_ns
    )
    await catalog.open()
    return client


def _parse_timezone(name: str) -> tzinfo:
    if name == "UTC":  # needs no time zone database, which a container image may lack
        return UTC
    try:
        return ZoneInfo(name)
    except (LookupError, ValueError, OSError) as error:
        raise InvalidRequest(f"timezone: found {name!r}, want a name of the time zone database: {error}") from error
