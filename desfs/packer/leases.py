"""The leases that a batch needs. Asyncio."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import date

import structlog

from assignment.catalog import Catalog, Lease
from assignment.client import AssignmentError
from desfs import metrics
from desfs.merging.leases import LeaseBusy

log = structlog.get_logger(__name__)

_RENEWALS_PER_TTL = 3


class Leases:
    """The leases that a batch needs: acquired when asked for, renewed at a third of their time to live, released when
    they are done with, at the latest at the end. One that was lost raises LeaseLost at the commit: the token decides,
    not this."""

    def __init__(self, catalog: Catalog, holder: str, ttl_s: float) -> None:
        self._catalog = catalog
        self._holder = holder
        self._ttl_s = ttl_s
        self._leases: dict[tuple[date, str], Lease] = {}
        self._lost: set[tuple[date, str]] = set()  # whose commits will be refused
        self._renewer: asyncio.Task[None] | None = None

    async def of(self, day: date, shard: str) -> Lease:
        """The lease of a shard. Raises: LeaseBusy."""
        lease = self._leases.get((day, shard))
        if lease is None:
            lease = await self._catalog.acquire(day, shard, self._holder, self._ttl_s)
            metrics.LEASES.labels("refused" if lease is None else "acquired").inc()
            if lease is None:
                raise LeaseBusy(f"shard {shard} of {day}: another packer works on it")
            self._leases[day, shard] = lease
        return lease

    async def done_with(self, day: date, shard: str) -> bool:
        """Let others have a shard; False when the catalog did not answer, and the lease has to pass."""
        lease = self._leases.pop((day, shard), None)
        self._lost.discard((day, shard))
        if lease is not None:
            try:
                await self._catalog.release(lease)
            except AssignmentError as error:
                log.warning("a lease was not released, and will pass", shard=shard, error=str(error))
                return False
        return True

    async def __aenter__(self) -> Leases:
        self._renewer = asyncio.create_task(self._renew())
        return self

    async def __aexit__(self, *exception: object) -> None:
        assert self._renewer is not None
        self._renewer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._renewer  # what has ended it before, unexpectedly, is raised
        for day, shard in list(self._leases):
            if not await self.done_with(day, shard):
                break  # the others would wait as long for a catalog that does not answer, and pass as well

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._ttl_s / _RENEWALS_PER_TTL)
            for place, lease in list(self._leases.items()):
                if place in self._lost:
                    continue
                try:
                    renewed = await self._catalog.renew(lease, self._ttl_s)
                except AssignmentError as error:
                    log.warning("a lease was not renewed", shard=lease.shard, error=str(error))
                    continue
                if place not in self._leases:
                    continue  # released meanwhile
                if renewed is None:
                    log.warning("a lease was lost", shard=lease.shard)
                    metrics.LEASES.labels("lost").inc()
                    self._lost.add(place)
                else:
                    self._leases[place] = renewed
