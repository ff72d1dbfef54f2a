"""What is read, and what is fetched and pushed because of it. Trio thread only.

The decisions are those of desfs.window; here they meet the containers of a day.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import trio

from des_format.layout import EXTERNAL
from desfs import metrics
from desfs.blocks import LARGE_PAYLOAD
from desfs.fetch import PIECE, Fetcher, OpenContainer, Piece
from desfs.large import LargePayloads
from desfs.push import ASKED, LISTED, PUSHED, Pusher
from desfs.store.link import Link
from desfs.tree import Member
from desfs.window import Accounts, Buy, Folder, Windows, rent_size


class Stop(NamedTuple):
    """A container of a day, and what the day's tree knows of it."""

    container: OpenContainer
    member: Member


# The open containers of a day in the order in which a listing shows them; the same object as long as nothing changes.
Route = tuple[Stop, ...]


@dataclass(slots=True)
class _Plan:
    """What of a container goes to the kernel when it comes: runs of blocks, but not the rows that are markers."""

    runs: list[tuple[int, int]] = field(default_factory=list)
    markers: set[int] = field(default_factory=set)


class _Day:
    """A route with positions: byte 0 of DATA of the i-th container is at bases[i]."""

    def __init__(self, route: Route, max_window: int) -> None:
        self.windows = Windows(max_window)
        self.accounts = Accounts()
        self.route: Route = ()
        self.bases: list[int] = [0]
        self.places: dict[int, int] = {}
        self.follow(route, max_window)

    def follow(self, route: Route, max_window: int) -> None:
        """Take a new route. Readers keep their place if it only got longer."""
        if route[: len(self.route)] != self.route:
            self.windows = Windows(max_window)
        self.route = route
        sizes = (stop.container.loaded.index.footer.data_length for stop in route)
        self.bases = list(accumulate(sizes, initial=0))
        self.places = {stop.container.slot: place for place, stop in enumerate(route)}


class Prefetcher:
    """Reads payloads, and fetches ahead. `pusher` is None as long as there is no kernel to push to."""

    def __init__(self, fetcher: Fetcher, memory: int, max_prefetch: int) -> None:
        """`memory` is what the caches may hold, in bytes; a window takes no more than a quarter of it."""
        self.pusher: Pusher | None = None
        self._fetcher = fetcher
        self._max_window = max(min(max_prefetch, memory // 4), PIECE)
        self._affordable = memory * 9 // 16  # three quarters of what the cache holds: the rest is for the readers
        self._large = LargePayloads(fetcher, self._max_window)
        self._days: dict[str, _Day] = {}
        self._plans: WeakKeyDictionary[OpenContainer, _Plan] = WeakKeyDictionary()
        self._bought: set[int] = set()
        fetcher.on_piece = self._came

    async def read(
        self, day: str, route: Route, container: OpenContainer, row: int, offset: int, size: int
    ) -> bytes | memoryview:
        """The bytes [offset, offset + size) of an entry, all of them up to the end of the file. `route` is its day's.

        Raises: CorruptEntry; ObjectReplaced and NoSuchObject when the container is not there any more; StoreError.
        """
        index = container.loaded.index
        index.check_readable(row)
        length = int(index.data_length[row])
        stop = min(offset + size, length)
        if index.flags[row] & EXTERNAL:
            return await self._large.read(container, row, offset, stop)
        if offset >= stop:
            return b""
        if length > LARGE_PAYLOAD or not container.blocks.contains(row):
            return await self._large.read(container, row, offset, stop)
        if offset == 0 and container.pages[row] & ASKED:
            # It has dropped the pages that it had; most likely not these alone.
            np.frombuffer(container.pages, np.uint8)[:] &= LISTED
        container.pages[row] |= ASKED
        begin = int(index.data_offset[row])
        block = container.blocks.of(begin)
        cached = self._fetcher.has(container, block)
        where = self._day(day, route)
        walks = self._look_ahead(where, container, row, cached)
        if cached:
            metrics.CACHE_HITS.labels("memory").inc()
            return (await self._fetcher.payload(container, row))[offset:stop]
        metrics.CACHE_MISSES.labels("memory").inc()
        asked = trio.current_time()
        payload = await self._fetcher.payload(container, row)
        if not walks:
            self._has_waited(where, container, trio.current_time() - asked)
        return payload[offset:stop]

    def listed(self, container: OpenContainer, rows: npt.NDArray[np.uint32]) -> None:
        """The kernel knows the inodes of these rows now, ascending: their payloads can be pushed."""
        if self.pusher is None or not len(rows):
            return
        np.frombuffer(container.pages, np.uint8)[rows] |= LISTED
        plan = self._plans.get(container)
        if plan is not None:
            # Those in blocks; the others have no place among them.
            rows = rows[[container.blocks.contains(row) for row in rows.tolist()]]
        if plan is None or not len(rows):
            return
        index, blocks = container.loaded.index, container.blocks
        first, last = blocks.between(
            int(index.data_offset[rows].min()), int((index.data_offset[rows] + index.data_length[rows]).max())
        )
        for piece in self._fetcher.held(container, first, last):
            self._push(container, plan, piece, first, last)

    def keep_days(self, names: Iterable[str]) -> None:
        """There are no other days than these."""
        for name in self._days.keys() - set(names):
            del self._days[name]

    # --- what to fetch -------------------------------------------------------------------------------------------

    def _day(self, name: str, route: Route) -> _Day:
        day = self._days.get(name)
        if day is None:
            day = self._days[name] = _Day(route, self._max_window)
        elif day.route is not route:
            day.follow(route, self._max_window)
        return day

    def _look_ahead(self, day: _Day, container: OpenContainer, row: int, cached: bool) -> bool:
        """Begin to fetch what the read announces; whether its reader walks on from what it was given before."""
        index = container.loaded.index
        link = self._fetcher.threads.meter.link()
        place = day.places.get(container.slot)
        if place is None:  # it has left its day, and is read by those who had its files open
            if not cached:
                self._rent(container, int(index.data_offset[row]), link)
            return False
        base = day.bases[place] - index.footer.data_start
        at = base + int(index.data_offset[row])
        folder = self._folder(day.route[place], row, base)
        window = day.windows.read(at, at + int(index.data_length[row]), folder, cached, link)
        if window is None:
            return False
        place = max(bisect_right(day.bases, window.start) - 1, 0)
        marker = window.marker if window.push else None
        while place < len(day.route) and day.bases[place] < window.stop:
            each = day.route[place].container
            base = day.bases[place] - each.loaded.index.footer.data_start
            first, last = each.blocks.between(max(window.start, day.bases[place]) - base, window.stop - base)
            if first < last:
                self._fetcher.fetch_ahead(each, first, last)
            if window.push:
                plan = self._plans.setdefault(each, _Plan())
                if first < last and marker is not None:
                    found = each.blocks.row_at(marker - base)
                    if found is not None:
                        plan.markers.add(found)
                        marker = None
                self._mark_for_push(each, plan, first, last)
            place += 1
        return window.goes_on

    def _rent(self, container: OpenContainer, offset: int, link: Link) -> None:
        self._fetcher.fetch_ahead(container, *container.blocks.between(offset, offset + rent_size(link)))

    @staticmethod
    def _folder(stop: Stop, row: int, base: int) -> Folder:
        """The directory of a row, as positions."""
        index = stop.container.loaded.index
        rows = stop.member.folders.rows(index.name(row).rpartition(b"/")[0])
        if not len(rows):
            return Folder(0, 0, False)
        last = int(rows[-1])
        # A listing comes from its start to its end: whoever has the last names has had them all.
        listed = bool(stop.container.pages[int(rows[0])] & LISTED)
        return Folder(
            base + int(index.data_offset[rows[0]]),
            base + int(index.data_offset[last]) + int(index.data_length[last]),
            listed,
        )

    def _has_waited(self, day: _Day, container: OpenContainer, waited_s: float) -> None:
        """Rent or buy."""
        stops = day.route if container.slot in day.places else ()
        lefts = {stop.container.number: self._left(stop.container) for stop in stops}
        lefts.setdefault(container.number, self._left(container))
        link = self._fetcher.threads.meter.link()
        buy = day.accounts.miss(container.number, waited_s, lefts, PIECE, self._affordable, link)
        if buy is Buy.CONTAINER:
            metrics.PREFETCH_BOUGHT.labels("container").inc()
            self._fetcher.fetch_ahead(container, 0, len(container.blocks))
        elif buy is Buy.DAY:
            metrics.PREFETCH_BOUGHT.labels("day").inc()
            for stop in stops:
                self._fetcher.fetch_ahead(stop.container, 0, len(stop.container.blocks))

    def _left(self, container: OpenContainer) -> int:
        held = self._fetcher.cache.bytes_of(container.number)
        return max(container.loaded.index.footer.data_length - held, 0)

    # --- what to push --------------------------------------------------------------------------------------------

    def _mark_for_push(self, container: OpenContainer, plan: _Plan, first: int, last: int) -> None:
        if first >= last:
            return
        joined = [run for run in plan.runs if run[0] <= last and first <= run[1]]
        plan.runs = [run for run in plan.runs if run not in joined]
        plan.runs.append((min([first, *(run[0] for run in joined)]), max([last, *(run[1] for run in joined)])))
        for piece in self._fetcher.held(container, first, last):
            self._push(container, plan, piece, first, last)

    def _came(self, container: OpenContainer, piece: Piece) -> None:
        plan = self._plans.get(container)
        if plan is not None:
            self._push(container, plan, piece, piece.first, piece.last)

    def _push(self, container: OpenContainer, plan: _Plan, piece: Piece, first: int, last: int) -> None:
        """Queue what the kernel can take now of the blocks [first, last) of a piece."""
        if self.pusher is None:
            return
        pages = np.frombuffer(container.pages, np.uint8)
        for low, high in plan.runs:
            low, high = max(low, first, piece.first), min(high, last, piece.last)
            if low >= high:
                continue
            rows = container.blocks.rows(low, high)
            rows = rows[(pages[rows] & (LISTED | PUSHED | ASKED)) == LISTED]
            wanted = [row for row in rows.tolist() if row not in plan.markers and row not in piece.bad]
            if wanted:
                self.pusher.push(container, piece, wanted)
