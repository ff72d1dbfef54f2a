"""What the service works with: catalog, node id, groups of reservations. Asyncio."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from datetime import date, datetime
from types import TracebackType
from typing import Self

import stamina
import structlog

from assignment import metrics
from assignment.catalog import Catalog, NodeLease
from assignment.client import Assignment
from assignment.errors import AssignmentError, CatalogUnavailable
from assignment.group import IdGroup
from assignment.node_id import NodeIdKeeper
from assignment.sequence import IdBlock
from assignment.service_settings import ServiceSettings
from des_format.shards import placement_shard, shard_hex

log = structlog.get_logger(__name__)

_OPEN_WAIT_S = 5.0  # between two tries to open the catalog, at most
_PROBE_S = 5.0
_LEASES_S = 15.0  # between two looks at how many shards are leased, for the metrics
_FRESH_S = 1.0  # an answer of the catalog that is no older does for a probe: probes need no token


class Assigner:
    """Assignments over a catalog that may come and go. An async context manager; one event loop, any of its tasks.

    It is entered also while the catalog is out of reach, and goes on trying to open it.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        open_catalog: Callable[[], Awaitable[Catalog]],
        *,
        clock_ns: Callable[[], int] = time.time_ns,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.shard_bits = settings.shard_bits
        self._settings = settings
        self._open_catalog = open_catalog
        self._clock_ns = clock_ns
        self._monotonic = monotonic
        self._zone = settings.zone()
        self._catalog: Catalog | None = None
        self._keeper: NodeIdKeeper | None = None
        self._group = IdGroup(self._reserve, lease=self._lease, limit_s=settings.request_timeout_s)
        self._answered_at: float | None = None
        self._probing: asyncio.Task[None] | None = None
        self._opening: asyncio.Task[None] | None = None
        self._counting: asyncio.Task[None] | None = None
        self._stack = AsyncExitStack()

    @property
    def catalog(self) -> Catalog:
        """Raises CatalogUnavailable while it was never reached."""
        if self._catalog is None:
            raise CatalogUnavailable("the catalog was not reached yet")
        return self._catalog

    def today(self) -> date:
        """The day that a file gets which comes now."""
        return self._day_of(self._clock_ns() // 1_000_000)

    async def assign(self, paths: Sequence[str]) -> Callable[[], list[Assignment]]:
        """What builds one assignment per path, in order, in any thread: the ids are reserved, the rest takes time."""
        block = await self._group.reserve(len(paths))
        metrics.ASSIGNMENTS.labels("path").inc(len(paths))
        return lambda: list(self._place(paths, block))

    async def ids(self, count: int, prefix: str | None) -> tuple[date, Iterator[str]]:
        """So many ids, with the service's own prefix or another one, and their day."""
        block = await self._group.reserve(count)
        metrics.ASSIGNMENTS.labels("id").inc(count)
        return block.day, block.names(prefix or self._settings.prefix)

    async def check_ready(self) -> None:
        """Raises AssignmentError while nothing can be assigned. Asks the catalog once a second at most."""
        self._lease()
        now = self._monotonic()
        if self._answered_at is not None and now - self._answered_at < _FRESH_S:
            return
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._probe())
        await asyncio.shield(self._probing)

    async def __aenter__(self) -> Self:
        try:
            await self._begin()
        except AssignmentError as error:
            if not error.temporary:
                raise
            log.warning("the catalog is out of reach, and is tried again", error=str(error))
            self._opening = asyncio.create_task(self._begin_later())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in (self._opening, self._probing, self._counting):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await self._group.close()
        await self._stack.aclose()

    async def _begin(self) -> None:
        catalog = await self._open_catalog()
        self._stack.push_async_callback(catalog.close)
        self._catalog = catalog
        keeper = NodeIdKeeper(catalog, self._settings.holder, self._settings.node_ttl_s, clock=self._monotonic)
        self._keeper = await self._stack.enter_async_context(keeper)
        self._counting = asyncio.create_task(self._count_leases(catalog))

    async def _count_leases(self, catalog: Catalog) -> None:
        while True:
            try:
                holders = await catalog.list_holders(self.today())
            except AssignmentError as error:
                log.info("the leases were not counted", error=str(error))
                metrics.SHARD_LEASES.set(math.nan)
            else:
                metrics.SHARD_LEASES.set(sum(each.holds for each in holders))
            await asyncio.sleep(_LEASES_S)

    async def _begin_later(self) -> None:
        try:
            async for attempt in stamina.retry_context(
                on=_is_temporary, attempts=None, timeout=None, wait_max=_OPEN_WAIT_S
            ):
                with attempt:
                    await self._begin()
        except AssignmentError as error:
            log.error("the catalog cannot be used", error=f"{type(error).__name__}: {error}")
        else:
            log.info("the catalog was reached")

    async def _reserve(self, count: int) -> IdBlock:
        now_ms = self._clock_ns() // 1_000_000
        return await self.catalog.reserve_ids(self._lease(), self._day_of(now_ms), count, now_ms)

    def _lease(self) -> NodeLease:
        if self._keeper is None:
            raise CatalogUnavailable("the catalog was not reached yet")
        return self._keeper.lease()

    async def _probe(self) -> None:
        asked_at = self._monotonic()
        try:
            async with asyncio.timeout(_PROBE_S):
                await self.catalog.now()
        except TimeoutError as error:
            raise CatalogUnavailable(f"no answer within {_PROBE_S:g} s") from error
        self._answered_at = asked_at

    def _place(self, paths: Sequence[str], block: IdBlock) -> Iterator[Assignment]:
        for path, name in zip(paths, block.names(self._settings.prefix), strict=True):
            shard = shard_hex(placement_shard(path, self.shard_bits), self.shard_bits)
            yield Assignment(path, block.day, shard, name)

    def _day_of(self, now_ms: int) -> date:
        return datetime.fromtimestamp(now_ms / 1000, self._zone).date()


def _is_temporary(error: Exception) -> bool:
    return isinstance(error, AssignmentError) and error.temporary
