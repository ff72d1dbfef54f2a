"""The leases that a batch needs. Asyncio."""

from __future__ import annotations

import asyncio
from datetime import date

import structlog

from assignment.catalog import Lease
from assignment.client import AssignmentClient, AssignmentError
from desfs.errors import DesfsError

log = structlog.get_logger(__name__)

LEASE_TTL_S = 60.0
_RENEWALS_PER_TTL = 3


class LeaseBusy(DesfsError):
    """Another packer works on the shard: its files wait."""


class Leases:
    """The leases that a batch needs: acquired when asked for, renewed at a third of their time to live, released at the
    end. One that was lost raises LeaseLost at the commit: the token decides, not this."""

    def __init__(self, client: AssignmentClient, holder: str) -> None:
        self._client = client
        self._holder = holder
        self._leases: dict[tuple[date, str], Lease] = {}
        self._renewer: asyncio.Task[None] | None = None

    async def of(self, day: date, shard: str) -> Lease:
        """The lease of a shard. Raises: LeaseBusy."""
        lease = self._leases.get((day, shard))
        if lease is None:
            lease = await self._client.acquire(day, shard, self._holder, LEASE_TTL_S)
            if lease is None:
                raise LeaseBusy(f"shard {shard} of {day}: another packer works on it")
            self._leases[day, shard] = lease
        return lease

    async def __aenter__(self) -> Leases:
        self._renewer = asyncio.create_task(self._renew())
        return self

    async def __aexit__(self, *exception: object) -> None:
        assert self._renewer is not None
        self._renewer.cancel()
        for lease in self._leases.values():
            try:
                await self._client.release(lease)
            except AssignmentError as error:
                log.warning("a lease was not released, and will pass", shard=lease.shard, error=str(error))

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(LEASE_TTL_S / _RENEWALS_PER_TTL)
            for place, lease in list(self._leases.items()):
                try:
                    renewed = await self._client.renew(lease, LEASE_TTL_S)
                except AssignmentError as error:
                    log.warning("a lease was not renewed", shard=lease.shard, error=str(error))
                    continue
                if renewed is None:
                    log.warning("a lease was lost", shard=lease.shard)
                else:
                    self._leases[place] = renewed
