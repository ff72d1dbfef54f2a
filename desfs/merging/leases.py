"""Holding the lease of one shard. Asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import date
from typing import Protocol

import structlog

from assignment.catalog import Catalog, Lease
from assignment.errors import AssignmentError
from desfs.errors import DesfsError

log = structlog.get_logger(__name__)

LEASE_TTL_S = 60.0
_RENEWALS_PER_TTL = 3
_POLL_S = 0.25  # between two tries to get a lease; packers hold one for the seconds that a batch takes


class LeaseBusy(DesfsError):
    """Somebody else works on the shard: it is left for the next run."""


class LeaseKeeper(Protocol):
    """Whoever holds leases and renews them: a packer does, for its batches."""

    async def of(self, day: date, shard: str) -> Lease:
        """The lease of a shard. Raises: LeaseBusy when another one holds it; AssignmentError."""
        ...

    async def done_with(self, day: date, shard: str) -> object:
        """Let others have a shard; one that is not held is no error. Raises nothing."""
        ...


@asynccontextmanager
async def held(
    catalog: Catalog, day: date, shard: str, holder: str, ttl_s: float = LEASE_TTL_S, wait_s: float = 0.0
) -> AsyncIterator[Lease]:
    """The lease of a shard for as long as the block lasts, renewed at a third of its time to live. One that is lost
    meanwhile raises LeaseLost at the commit: the token decides, not this.

    Raises: LeaseBusy when another one does not let it go within `wait_s`; AssignmentError.
    """
    deadline = time.monotonic() + wait_s
    while (lease := await catalog.acquire(day, shard, holder, ttl_s)) is None:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise LeaseBusy(f"shard {shard} of {day}: somebody else works on it: left for the next run")
        await asyncio.sleep(min(_POLL_S, left_s))
    renewer = asyncio.create_task(_renew(catalog, lease, ttl_s))
    try:
        yield lease
    finally:
        renewer.cancel()
        with suppress(asyncio.CancelledError):
            await renewer  # what has ended it before, unexpectedly, is raised
        try:
            await catalog.release(lease)
        except AssignmentError as error:
            log.warning("a lease was not released, and will pass", shard=shard, error=str(error))


async def _renew(catalog: Catalog, lease: Lease, ttl_s: float) -> None:
    while True:
        await asyncio.sleep(ttl_s / _RENEWALS_PER_TTL)
        try:
            if await catalog.renew(lease, ttl_s) is None:
                log.warning("a lease was lost", shard=lease.shard)
                return
        except AssignmentError as error:
            log.warning("a lease was not renewed", shard=lease.shard, error=str(error))
