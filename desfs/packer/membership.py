"""Who packs a spool: our heartbeat in the catalog, the shares of those who live, and who has died. Asyncio.

A share is a matter of speed alone: two workers that both take themselves for the owner of a shard, while the ring
changes, claim different files of it (a claim is a rename), and the shard's lease lets one of them commit at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import structlog

from assignment.catalog import Catalog
from assignment.client import AssignmentError
from assignment.ring import CLAIMED_SHARDS, Ring, shard_owners
from des_format.shards import placement_shard, shard_hex
from desfs import metrics
from desfs.spool_workers import WorkerPlace, worker_number_of

log = structlog.get_logger(__name__)

_BEATS_PER_TTL = 3
_MOST_BITS = 12  # a store with more shards is shared out by the first bits of them: 4,096 are enough to be even


class Membership:
    """One worker among those of its spool. An async context manager: it beats until the end, and then signs off."""

    def __init__(
        self,
        catalog: Catalog,
        place: WorkerPlace,
        *,
        shared: bool,
        shard_bits: int,
        ttl_s: float,
        details: Callable[[], dict[str, Any]],
    ) -> None:
        """`shared`: the spool may have other workers; else all that is in it is ours. `details` is what the worker says
        of itself with each heartbeat."""
        self.name = place.name
        self._catalog = catalog
        self._place = place
        self._shared = shared
        self._shard_bits = shard_bits
        self._ttl_s = ttl_s
        self._details = details
        self._digits = len(shard_hex(0, shard_bits))
        self._dropped_bits = max(shard_bits - _MOST_BITS, 0)
        bits = shard_bits - self._dropped_bits
        self._shards = [shard_hex(shard, bits) for shard in range(1 << bits)]
        self._alive = frozenset({place.name})
        self._shares: dict[str, str] = dict.fromkeys(self._shards, place.name)
        self._tended: frozenset[str] = frozenset(self._shards)
        self._beating: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Membership:
        self._beating = asyncio.create_task(self._beat_on())
        return self

    async def __aexit__(self, *exception: object) -> None:
        assert self._beating is not None
        self._beating.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._beating  # what has ended it before, unexpectedly, is raised
        try:
            await self._catalog.remove_worker(self.name)
        except AssignmentError as error:
            log.warning("the worker did not sign off, and will be taken for dead", error=str(error))

    async def beat(self) -> None:
        """Say that we live, and learn who else does. Raises: AssignmentError."""
        details = {**self._details(), CLAIMED_SHARDS: sorted(self._tended)}
        await self._catalog.heartbeat(self.name, self._place.spool_id, details, self._ttl_s)
        workers = [worker for worker in await self._catalog.list_workers() if worker.alive]
        alive = frozenset(worker.name for worker in workers if worker.spool == self._place.spool_id) | {self.name}
        if alive != self._alive:
            log.info("workers of this spool", alive=sorted(alive))
            self._shares = Ring(alive).owners(self._shards, {})
            self._alive = alive
        owners = shard_owners(self._shards, workers)
        self._tended = frozenset(shard for shard, owner in owners.items() if owner == self.name)
        metrics.SHARDS_OWNED.set(len(self._tended))

    async def _beat_on(self) -> None:
        is_silent = False
        while True:
            await asyncio.sleep(self._ttl_s / _BEATS_PER_TTL)
            try:
                await self.beat()
            except AssignmentError as error:
                if not is_silent:
                    log.warning("no heartbeat, others may take this worker for dead", error=str(error))
                is_silent = True
            else:
                is_silent = False

    def takes(self, path: str) -> bool:
        """Whether a file of the spool is in our share: that of its directory's shard, so that neighbours stay
        together."""
        if not self._shared:
            return True
        # A name that is no UTF-8 can only be put aside, by one of us.
        shard = placement_shard(path.encode("utf-8", "replace").decode(), self._shard_bits)
        return self._shares[self._shards[shard >> self._dropped_bits]] == self.name

    def tends(self, shard: str) -> bool:
        """Whether a shard is ours to keep in order, among all workers of the catalog. Nobody tends those that the
        layout does not have, which others have put: sealing does."""
        number = int(shard, 16)
        if len(shard) != self._digits or number >> self._dropped_bits >= len(self._shards):
            return False
        return self._shards[number >> self._dropped_bits] in self._tended

    def is_ours(self, batch: str) -> bool:
        """Whether a batch is ours to finish as it stands."""
        return not self._shared or worker_number_of(batch) == self._place.number

    def may_take_over(self, batch: str) -> bool:
        """Whether a batch's worker has died, and we are the one to finish its work."""
        number = worker_number_of(batch)
        is_alive = f"{self._place.spool_id}-{number}" in self._alive and not self._place.has_ended(number)
        return not is_alive and Ring(self._alive).owner(batch) == self.name
