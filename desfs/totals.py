"""How many bytes a store holds: what statfs shows. Trio thread only."""

from __future__ import annotations

import structlog
import trio

from desfs.errors import StoreError
from desfs.tasks import first_of
from desfs.views import Views

log = structlog.get_logger(__name__)

_PATIENCE_S = 2.0  # of one who asks: a store of thousands of days takes longer, and the next one who asks has the rest
_AT_A_TIME = 16  # listings
_KEPT_S = 60.0  # the size of a day that may still grow
_KEPT_CLOSED_S = 3600.0


class Totals:
    """The sizes of the days, each from a listing of its own, kept for a while."""

    def __init__(self, views: Views) -> None:
        self._views = views
        self._sizes: dict[str, tuple[float, int]] = {}  # by day: when it was listed, bytes

    async def bytes(self) -> int:
        """Bytes of all containers and of the objects beside them, as far as they could be listed in two seconds, now
        and by those who asked before."""
        due = [name for name in self._views.names if self._is_due(name)]
        limit = trio.CapacityLimiter(_AT_A_TIME)
        try:
            with trio.move_on_after(_PATIENCE_S):
                async with trio.open_nursery() as nursery:
                    for name in due:
                        nursery.start_soon(self._list, name, limit)
        except ExceptionGroup as group:
            raise first_of(group) from None
        for name in self._sizes.keys() - self._views.names.keys():
            del self._sizes[name]
        return self._views.root_bytes + sum(size for _, size in self._sizes.values())

    def _is_due(self, name: str) -> bool:
        if not self._views.names[name].has_prefix:
            return False
        if name not in self._sizes:
            return True
        kept_s = _KEPT_S if self._views.is_open(name) else _KEPT_CLOSED_S
        return trio.current_time() - self._sizes[name][0] > kept_s

    async def _list(self, name: str, limit: trio.CapacityLimiter) -> None:
        async with limit:
            try:
                listing = await self._views.threads.run(self._views.threads.store.list, f"{name}/")
            except StoreError as error:  # df shows what is known; who reads gets the error
                log.warning("a day is not counted, or as it was before", day=name, error=str(error))
            else:
                self._sizes[name] = trio.current_time(), sum(info.size for info in listing.objects)
