"""Small group commit: what is asked for while a transaction is under way shares the next one. Asyncio.

A catalog makes each transaction durable, which takes milliseconds, and does so for one caller or for thirty alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from assignment.catalog import NodeLease
from assignment.errors import CatalogUnavailable
from assignment.metrics import IDS, TRANSACTIONS
from assignment.sequence import IdBlock
from des_format.assigned_names import SEQUENCES_PER_MS


class IdGroup:
    """Blocks of ids for many callers out of few reservations, one at a time.

    Invariant: `_reserving` is a task exactly while `_waiting` may have entries. There is no await between finding
    `_waiting` empty and clearing `_reserving`, or a caller could wait for nobody. A cancelled caller loses its ids, the
    others get theirs.
    """

    def __init__(
        self, reserve: Callable[[int], Awaitable[IdBlock]], *, limit_s: float, lease: Callable[[], NodeLease]
    ) -> None:
        """`reserve` makes one transaction, and is given up after `limit_s`; `lease` raises NodeIdLost when the node id
        of what it has reserved may be another's meanwhile."""
        self._reserve = reserve
        self._limit_s = limit_s
        self._lease = lease
        self._waiting: list[tuple[int, asyncio.Future[IdBlock]]] = []
        self._reserving: asyncio.Task[None] | None = None

    async def reserve(self, count: int) -> IdBlock:
        """`count` ids (> 0) that are the caller's alone. Raises what the reservation raises; CatalogUnavailable when it
        takes too long."""
        future: asyncio.Future[IdBlock] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, future))
        if self._reserving is None:
            self._reserving = asyncio.create_task(self._reserve_all())
        block = await future
        # The process may have been paused since: ids of a node that another holds by now are not handed out.
        if self._lease().node_id != block.node_id:
            raise CatalogUnavailable(f"node id {block.node_id} was lost while ids were reserved")
        return block

    async def close(self) -> None:
        """Give up what is under way; callers that wait get CancelledError."""
        if self._reserving is not None:
            self._reserving.cancel()
            await asyncio.gather(self._reserving, return_exceptions=True)

    async def _reserve_all(self) -> None:
        group: list[tuple[int, asyncio.Future[IdBlock]]] = []
        try:
            while self._waiting:
                group, self._waiting = [each for each in self._waiting if not each[1].done()], []
                if group:
                    await self._reserve_for(group)
        finally:
            for _, future in (*group, *self._waiting):
                future.cancel()  # of those that have their answer it is none
            self._waiting = []
            self._reserving = None

    async def _reserve_for(self, group: list[tuple[int, asyncio.Future[IdBlock]]]) -> None:
        total = sum(count for count, _ in group)
        try:
            async with asyncio.timeout(self._limit_s):
                block = await self._reserve(total)
        except Exception as error:  # whatever it is, it is for those who wait
            TRANSACTIONS.labels("failed").inc()
            failure = CatalogUnavailable("no answer in time") if isinstance(error, TimeoutError) else error
            for _, future in group:
                if not future.done():
                    future.set_exception(failure)
            return
        TRANSACTIONS.labels("ok").inc()
        IDS.inc(total)
        for count, future in group:
            mine, block = split(block, count)
            if not future.done():
                future.set_result(mine)


def split(block: IdBlock, count: int) -> tuple[IdBlock, IdBlock]:
    """The first `count` ids of a block, and the others. Pure."""
    position = block.first_ms * SEQUENCES_PER_MS + block.first_sequence + count
    first_ms, first_sequence = divmod(position, SEQUENCES_PER_MS)
    rest = replace(block, first_ms=first_ms, first_sequence=first_sequence, count=block.count - count)
    return replace(block, count=count), rest
