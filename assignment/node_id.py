"""A node id, leased for as long as the process lives. Asyncio.

The catalog decides who has a node id: it compares the lease's token in the transaction that reserves ids. The clock
here only sees to it that a process which was paused stops answering by itself, before it asks the catalog: it counts
from before a request was sent, so that it ends no later than the catalog's own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

import structlog

from assignment.catalog import Catalog, NodeLease
from assignment.errors import AssignmentError, NodeIdLost
from assignment.metrics import NODE_ID, NODE_ID_RENEWALS

log = structlog.get_logger(__name__)

_RENEWALS_PER_TTL = 3
# After a failure: doubled each time, up to a third of the time to live, so that two tries remain within it.
_FIRST_WAIT_S = 0.05
_RELEASE_LIMIT_S = 5.0  # a catalog that is gone keeps nobody from ending


class NodeIdKeeper:
    """Leases a node id, renews it at a third of its time to live, and leases another one when it was lost.

    An async context manager; it is entered without waiting for a node id. One event loop, any of its tasks. A node id
    that is held at the end is released.
    """

    def __init__(
        self,
        catalog: Catalog,
        holder: str,
        ttl_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        """`clock` gives seconds, and never goes back."""
        self._catalog = catalog
        self._holder = holder
        self._ttl_s = ttl_s
        self._clock = clock
        self._sleep = sleep
        self._lease: NodeLease | None = None
        self._holds_until = 0.0
        self._keeping: asyncio.Task[None] | None = None
        self._leased = asyncio.Event()
        self._why_not = "none was leased yet"

    def lease(self) -> NodeLease:
        """The lease of the node id. Raises NodeIdLost when there is none, or by the clock its time has passed."""
        if self._lease is None:
            raise NodeIdLost(f"no node id: {self._why_not}")
        if self._clock() >= self._holds_until:
            raise NodeIdLost(f"node id {self._lease.node_id}: its lease was not renewed for {self._ttl_s:g} s")
        return self._lease

    async def wait_leased(self, limit_s: float) -> None:
        """Wait until a node id is held, or that time is over: `lease` tells."""
        try:
            async with asyncio.timeout(limit_s):
                await self._leased.wait()
        except TimeoutError:
            log.warning("there is no node id yet", why=self._why_not)

    async def __aenter__(self) -> Self:
        self._keeping = asyncio.create_task(self._keep())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._keeping is not None
        self._keeping.cancel()
        (outcome,) = await asyncio.gather(self._keeping, return_exceptions=True)
        lease = self._lease
        self._forget("the service ends")
        if lease is not None:
            await self._release(lease)
        if isinstance(outcome, Exception):  # a mistake of ours, which nobody was there to see
            raise outcome

    async def _release(self, lease: NodeLease) -> None:
        try:
            async with asyncio.timeout(_RELEASE_LIMIT_S):
                await self._catalog.release_node_id(lease)
        except (AssignmentError, TimeoutError) as failure:
            log.warning("the node id was not released, and will pass", node_id=lease.node_id, error=str(failure))

    async def _keep(self) -> None:
        failures = 0
        while True:
            try:
                async with asyncio.timeout(self._ttl_s):
                    is_held = await self._renew() or await self._lease_another()
            except (AssignmentError, TimeoutError) as error:
                NODE_ID_RENEWALS.labels("failed").inc()
                self._why_not = str(error) or "the catalog did not answer in time"
                if not failures:
                    log.warning("the node id was not renewed", error=self._why_not)
                is_held = False
            failures = 0 if is_held else failures + 1
            wait_s = self._ttl_s / _RENEWALS_PER_TTL
            if failures:
                wait_s = min(wait_s, _FIRST_WAIT_S * 2 ** min(failures - 1, 10))
            await self._sleep(wait_s)

    async def _renew(self) -> bool:
        """Whether the node id that we have is still ours."""
        if self._lease is None:
            return False
        sent_at = self._clock()
        renewed = await self._catalog.renew_node_id(self._lease, self._ttl_s)
        if renewed is None:
            NODE_ID_RENEWALS.labels("lost").inc()
            log.warning("the node id was lost", node_id=self._lease.node_id)
            self._forget("it was lost, and there is no other one yet")
            return False
        NODE_ID_RENEWALS.labels("renewed").inc()
        self._hold(renewed, sent_at)
        return True

    async def _lease_another(self) -> bool:
        sent_at = self._clock()
        lease = await self._catalog.lease_node_id(self._holder, self._ttl_s)
        if lease is None:
            NODE_ID_RENEWALS.labels("none_free").inc()
            if self._why_not != "others hold all of them":
                log.warning("no node id: others hold all of them")
            self._forget("others hold all of them")
            return False
        NODE_ID_RENEWALS.labels("leased").inc()
        log.info("holding a node id", node_id=lease.node_id)
        self._hold(lease, sent_at)
        return True

    def _hold(self, lease: NodeLease, sent_at: float) -> None:
        self._lease = lease
        self._holds_until = sent_at + self._ttl_s
        self._leased.set()
        NODE_ID.set(lease.node_id)

    def _forget(self, why_not: str) -> None:
        self._lease = None
        self._leased.clear()
        self._why_not = why_not
        NODE_ID.set(-1)
