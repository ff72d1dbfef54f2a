"""Hears which days have new containers, and has them listed again at once. Trio; Redis in a thread.

A Redis that is down, or a message that is lost, costs the wait for the next refresh, no more.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import structlog
import trio

from desfs.announcement import channel_of

if TYPE_CHECKING:
    import redis

log = structlog.get_logger(__name__)

_POLL_S = 1.0  # how often the thread asks whether it is still wanted
_HEALTH_S = 15
_TOGETHER_S = 0.2  # what a packer announces within so long is one listing: a batch has a container for each shard
_FIRST_RETRY_S, _LONGEST_RETRY_S = 1.0, 30.0
_MOST_NAME = 255  # bytes of a day's name


class Announcements:
    """The days that are announced for a store. `run` in a nursery."""

    def __init__(self, redis_url: str, store_url: str, refresh: Callable[[str], Awaitable[None]]) -> None:
        """`refresh` lists a day again; it raises nothing."""
        self._redis_url = redis_url
        self._channel = channel_of(store_url)
        self._refresh = refresh
        self._days: set[str] = set()
        self._heard = trio.Event()

    async def run(self) -> None:
        """Hear and refresh, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen)
            while True:
                await self._heard.wait()
                await trio.sleep(_TOGETHER_S)
                self._heard = trio.Event()
                days, self._days = self._days, set()
                for day in sorted(days):
                    await self._refresh(day)

    async def _listen(self) -> None:
        import redis

        retry_s = _FIRST_RETRY_S
        while True:
            began = trio.current_time()
            try:
                await trio.to_thread.run_sync(self._listen_in_thread, abandon_on_cancel=True)
            except (redis.RedisError, OSError) as error:
                if retry_s == _FIRST_RETRY_S:
                    log.warning("new containers are not announced, only found by refreshes", error=str(error))
            retry_s = _FIRST_RETRY_S if trio.current_time() - began > _LONGEST_RETRY_S else retry_s * 2
            await trio.sleep(min(retry_s, _LONGEST_RETRY_S))

    def _listen_in_thread(self) -> None:
        """Pass on what is announced until the task is cancelled. Abandoned, it ends within a second."""
        import redis

        client = redis.Redis.from_url(
            self._redis_url,
            socket_timeout=2 * _POLL_S,
            socket_connect_timeout=2 * _POLL_S,
            health_check_interval=_HEALTH_S,  # a connection that is half open says nothing by itself
        )
        with client, client.pubsub(ignore_subscribe_messages=True) as subscription:  # type: ignore[no-untyped-call]
            subscription.subscribe(self._channel)
            while True:
                trio.from_thread.check_cancelled()
                day = _day_in(subscription, _POLL_S)
                if day is not None:
                    trio.from_thread.run_sync(self._note, day)

    def _note(self, day: str) -> None:
        self._days.add(day)
        self._heard.set()


def _day_in(subscription: redis.client.PubSub, timeout_s: float) -> str | None:
    """The day that the next message names, if one comes in time and names one."""
    message = subscription.get_message(timeout=timeout_s)
    data = message["data"] if message else b""
    if not isinstance(data, bytes) or not 0 < len(data) <= _MOST_NAME:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
