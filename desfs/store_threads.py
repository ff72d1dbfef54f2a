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
        self.deadline_s = deadline_s
        self._metadata = trio.CapacityLimiter(limit)
        self._payloads = trio.CapacityLimiter(limit)

    async def run(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Call a blocking function that lists or opens. Raises: DeadlineExceeded; what the function raises."""
        return await self._call(self._metadata, partial(function, *arguments, **options))

    async def fetch(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Call a blocking function that brings payloads. Raises: as run."""
        return await self._call(self._payloads, partial(function, *arguments, **options))

    def patience(self) -> Patience:
        """Of somebody who begins to wait now."""
        return Patience(self)

    async def _call(self, limiter: trio.CapacityLimiter, call: Callable[[], T]) -> T:
        # The store ends its tries by the deadline, and a try by its time-outs. A server that sends a byte now and then
        # escapes both: twice the deadline ends any call.
        with trio.move_on_after(2 * self.deadline_s):
            return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=limiter)
        raise DeadlineExceeded(f"{self.store.url}: no answer within {2 * self.deadline_s:g} s")


class Patience:
    """How long a reader waits for what calls bring: the deadline, and as long again if the store has sent something
    meanwhile. Then it is slow, and not silent."""

    def __init__(self, threads: StoreThreads) -> None:
        self._threads = threads
        self._began = trio.current_time()
        self._answers = threads.meter.answers

    async def wait(self, event: trio.Event, share: float = 1.0) -> None:
        """Wait, for a silent store no longer than a share of the deadline. Raises: DeadlineExceeded."""
        deadline_s = self._threads.deadline_s
        for limit_s in (share * deadline_s, 2 * deadline_s):
            with trio.move_on_at(self._began + limit_s):
                await event.wait()
                return
            if self._threads.meter.answers == self._answers:
                break
        raise DeadlineExceeded(f"{self._threads.store.url}: no answer within {limit_s:g} s")
