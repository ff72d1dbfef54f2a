"""How many bytes a store holds: what statfs shows. Trio thread only."""

from __future__ import annotations

import structlog
import trio

from desfs.errors import DeadlineExceeded, StoreError
from desfs.views import Views

log = structlog.get_logger(__name__)

_PATIENCE_S = 2.0  # of one who asks: a store of thousands of days takes longer, and the next one who asks has the rest
_AT_A_TIME = 4  # listings: lookups need the threads too
_KEPT_S = 60.0  # the size of a day that may still grow
_KEPT_CLOSED_S = 3600.0


class Totals:
    """The sizes of the days, each from a listing of its own, kept for a while. `run` has to be running; a listing that
    takes longer than who asked for it waits goes on, for the next one who asks."""

    def __init__(self, views: Views) -> None:
        self._views = views
        self._sizes: dict[str, tuple[float, int]] = {}  # by day: when it was listed, bytes
        self._running: dict[str, trio.Event] = {}
        self._limit = trio.CapacityLimiter(_AT_A_TIME)
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """List for those who ask, until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    async def bytes(self) -> int:
        """Bytes of all containers and of the objects beside them, as far as they could be listed in two seconds, now
        and by those who asked before."""
        for name in self._sizes.keys() - self._views.names.keys():
            del self._sizes[name]
        waiting = [self._begin(self._nursery, name) for name in self._views.names if self._is_due(name)]
        with trio.move_on_after(_PATIENCE_S):
            for done in waiting:
                await done.wait()
        return self._views.root_bytes + sum(size for _, size in self._sizes.values())

    def _is_due(self, name: str) -> bool:
        if not self._views.names[name].has_prefix:
            return False
        if name not in self._sizes:
            return True
        kept_s = _KEPT_S if self._views.is_open(name) else _KEPT_CLOSED_S
        return trio.current_time() - self._sizes[name][0] > kept_s

    def _begin(self, nursery: trio.Nursery | None, name: str) -> trio.Event:
        if name not in self._running:
            if nursery is None:
                raise DeadlineExceeded("nothing is counted: the mount has not begun, or is ending")
            self._running[name] = trio.Event()
            nursery.start_soon(self._list, name)
        return self._running[name]

    async def _list(self, name: str) -> None:
        try:
            async with self._limit:
                listing = await self._views.threads.run(self._views.threads.store.list, f"{name}/")
        except StoreError as error:  # df shows what is known; who reads gets the error
            log.warning("a day is not counted, or as it was before", day=name, error=str(error))
        else:
            self._sizes[name] = trio.current_time(), sum(info.size for info in listing.objects)
        finally:
            self._running.pop(name).set()
