"""Announces days that have new containers. Asyncio.

An announcement saves mounts a wait of up to `refresh` seconds, no more: one that Redis does not take is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
from datetime import date
from typing import TYPE_CHECKING

import structlog

from desfs.announcement import channel_of

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

log = structlog.get_logger(__name__)

_TIMEOUT_S = 2.0


class Announcer:
    """Tells mounts through Redis. An async context manager; what was announced before its end is sent."""

    def __init__(self, redis_url: str, store_url: str) -> None:
        import redis.asyncio
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        self._client = redis.asyncio.Redis.from_url(
            redis_url,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
        self._failures: tuple[type[Exception], ...] = (redis.RedisError, OSError)
        self._channel = channel_of(store_url)
        self._days: set[date] = set()
        self._due = asyncio.Event()
        self._sender: asyncio.Task[None] | None = None
        self._has_failed = False

    def announce(self, day: date) -> None:
        """Say soon that a day has a new container; several at once are one message."""
        self._days.add(day)
        self._due.set()

    async def __aenter__(self) -> Self:
        self._sender = asyncio.create_task(self._send())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._sender is not None
        self._sender.cancel()
        await asyncio.gather(self._sender, return_exceptions=True)
        await self._send_all()
        with contextlib.suppress(*self._failures):
            await self._client.aclose()

    async def _send(self) -> None:
        while True:
            await self._due.wait()
            await self._send_all()

    async def _send_all(self) -> None:
        self._due.clear()
        while self._days:
            day = next(iter(self._days))
            try:
                await self._client.publish(self._channel, day.isoformat())
            except self._failures as error:
                if not self._has_failed:
                    log.warning("a new container was not announced", error=str(error))
                self._has_failed = True
            else:
                self._has_failed = False
            self._days.discard(day)
