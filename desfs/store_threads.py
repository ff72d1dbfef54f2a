"""The store's blocking calls, in threads. Trio."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import trio

from desfs.errors import DeadlineExceeded
from desfs.store.base import Store
from desfs.store.link import LinkMeter, Measured

T = TypeVar("T")

STORE_THREADS = 32


class StoreThreads:
    """Runs the blocking store in threads. Listings and indexes have threads of their own: they never wait for payloads.
    A cancelled call goes on in its thread: a GET's answer is thrown away. `meter` measures every GET."""

    def __init__(self, store: Store, deadline_s: float = 60.0, limit: int = STORE_THREADS) -> None:
        self.meter = LinkMeter()
        self.store: Store = Measured(store, self.meter)
        # The store ends its tries by the deadline, and a try by its time-outs. A server that sends a byte now and then
        # escapes both: twice the deadline ends any call.
        self._limit_s = 2 * deadline_s
        self._metadata = trio.CapacityLimiter(limit)
        self._payloads = trio.CapacityLimiter(limit)

    async def run(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Call a blocking function that lists or opens. Raises: DeadlineExceeded; what the function raises."""
        return await self._call(self._metadata, partial(function, *arguments, **options))

    async def fetch(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Call a blocking function that brings payloads. Raises: as run."""
        return await self._call(self._payloads, partial(function, *arguments, **options))

    async def wait(self, event: trio.Event) -> None:
        """Wait for what a call brings to somebody else, no longer than a call may take. Raises: DeadlineExceeded."""
        with trio.move_on_after(self._limit_s):
            await event.wait()
            return
        raise DeadlineExceeded(f"{self.store.url}: no answer within {self._limit_s:g} s")

    async def _call(self, limiter: trio.CapacityLimiter, call: Callable[[], T]) -> T:
        with trio.move_on_after(self._limit_s):
            return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=limiter)
        raise DeadlineExceeded(f"{self.store.url}: no answer within {self._limit_s:g} s")
