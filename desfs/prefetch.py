"""What is read, and what is fetched and pushed because of it. Trio thread only.

The decisions are those of desfs.window and desfs.walk; here they meet the containers of a day.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import structlog
import trio

from des_format.layout import EXTERNAL
from desfs import metrics
from desfs.blocks import BLOCK, LARGE_PAYLOAD
from desfs.container import OpenContainer
from desfs.errors import DeadlineExceeded
from desfs.fetch import PIECE, Fetcher
from desfs.large import LargePayloads
from desfs.pieces import SMALL, Piece
from desfs.push import ASKED, LISTED, PUSHED, Pusher
from desfs.route import Rest, Route, Run, Stop, Walk
from desfs.store.link import Link, on_its_way
from desfs.tree import DayTree
from desfs.walk import Order, entered, following
from desfs.window import FIRST_WINDOW, Accounts, Scan, Window, rent_size

log = structlog.get_logger(__name__)

_WALKS = 32  # readers of a day that are followed at a time; the one that was quiet longest is forgotten
# Whoever walks through a day that so many windows would bring is brought all of it: in whole pieces of the containers,
# which takes fewer requests than the directories' own pieces in the order of the walk.
_MOST = 16
# Whoever lists a directory, then those below it, and reads the first file of all, walks through it: if there is no more
# time than this between.
_AT_ONCE_S = 2.0
_LEAST_WINDOW = 4 * 1024 * 1024  # whatever the memory is
_REACH = 2  # round trips, or pieces, that the rest of a day is fetched ahead
_LISTINGS = 1000  # that are remembered
_HITS = metrics.CACHE_REQUESTS.labels("memory", "block", "hit")
_MISSES = metrics.CACHE_REQUESTS.labels("memory", "block", "miss")


class DayShape(NamedTuple):
    """A day as it is now. `tree` is None as long as not all of it is known; `inode` numbers its directories."""

    name: str
    route: Route
    tree: DayTree | None
    inode: Callable[[bytes], int]


@dataclass(slots=True)
class _Plan:
    """What of a container goes to the kernel when it comes: runs of blocks, but not the rows that are markers."""

    runs: list[tuple[int, int]] = field(default_factory=list)
    markers: set[int] = field(default_factory=set)


class _Day:
    """What is known of the readers of a day."""

    def __init__(self) -> None:
        self.accounts = Accounts()
        self.walks: deque[Walk] = deque(maxlen=_WALKS)  # the one that was used last stands last
        self.listings: OrderedDict[bytes, float] = OrderedDict()  # when a directory was listed
        self._route: Route = ()
        self._stops: dict[int, Stop] = {}

    def stops(self, route: Route) -> dict[int, Stop]:
        """The containers of a day by slot."""
        if route is not self._route:
            self._route = route
            self._stops = {stop.container.slot: stop for stop in route}
        return self._stops


class Prefetcher:
    """Reads payloads, and fetches ahead. `pusher` is None as long as there is no kernel to push to."""

    def __init__(self, fetcher: Fetcher, memory: int, max_prefetch: int) -> None:
        """`memory` is what the caches may hold, in bytes; a window takes no more than a quarter of it."""
        self.pusher: Pusher | None = None
        self._fetcher = fetcher
        self._max_window = max(min(max_prefetch, memory // 4), _LEAST_WINDOW)
        self._affordable = memory * 5 // 8  # the rest is for other readers, and for what is on its way
        self._large = LargePayloads(fetcher, self._max_window)
        self._days: dict[str, _Day] = {}
        self._plans: WeakKeyDictionary[OpenContainer, _Plan] = WeakKeyDictionary()
        fetcher.on_piece = self._came

    async def read(
        self, shape: DayShape, container: OpenContainer, row: int, offset: int, size: int
    ) -> bytes | memoryview:
        """The bytes [offset, offset + size) of an entry, all of them up to the end of the file. `shape` is its day's.

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
        self._fetcher.raise_again(container, container.blocks.of(int(index.data_offset[row])))
        if offset == 0 and container.pages[row] & ASKED:
            # It has dropped the pages that it had; most likely not these alone.
            np.frombuffer(container.pages, np.uint8)[:] &= LISTED
        container.pages[row] |= ASKED
        begin = int(index.data_offset[row])
        block = container.blocks.of(begin)
        cached = self._fetcher.has(container, block)
        day = self._days.setdefault(shape.name, _Day())
        walks = self._look_ahead(day, shape, container, row, cached)
        if cached:
            _HITS.inc()
            return (await self._fetcher.payload(container, row))[offset:stop]
        _MISSES.inc()
        asked = trio.current_time()
        payload = await self._fetcher.payload(container, row)
        if not walks:
            # After the answer: a purchase takes a moment to begin.
            waited_s = trio.current_time() - asked
            trio.lowlevel.current_trio_token().run_sync_soon(self._has_waited, day, shape, container, waited_s)
        return payload[offset:stop]

    def listed(self, day: str, container: OpenContainer, rows: npt.NDArray[np.uint32]) -> None:
        """The kernel knows the inodes of these rows, or will at once; ascending. Their payloads can be pushed."""
        if self.pusher is None or not len(rows):
            return
        np.frombuffer(container.pages, np.uint8)[rows] |= LISTED
        plan = self._plans.get(container)
        if plan is not None:
            # Those in blocks; the others have no place among them.
            rows = container.blocks.contained(rows)
        if plan is None or not len(rows):
            return
        index, blocks = container.loaded.index, container.blocks
        first, last = blocks.between(
            int(index.data_offset[rows].min()), int((index.data_offset[rows] + index.data_length[rows]).max())
        )
        for piece in self._fetcher.held(container, first, last):
            self._push(container, plan, piece, first, last)
        for walk in self._days[day].walks if day in self._days else ():
            self._come_along(walk, container, last - 1)

    def listing(self, day: str, path: bytes) -> None:
        """Somebody begins to list a directory of a day."""
        listings = self._days.setdefault(day, _Day()).listings
        listings.pop(path, None)
        listings[path] = trio.current_time()
        if len(listings) > _LISTINGS:
            listings.popitem(last=False)

    def keep_days(self, names: Iterable[str]) -> None:
        """There are no other days than these."""
        for name in self._days.keys() - set(names):
            del self._days[name]

    # --- what to fetch -------------------------------------------------------------------------------------------

    def _look_ahead(self, day: _Day, shape: DayShape, container: OpenContainer, row: int, cached: bool) -> bool:
        """Begin to fetch what the read announces; whether its reader walks on from what it was given before."""
        index = container.loaded.index
        link = self._fetcher.threads.meter.link()
        block = container.blocks.of(int(index.data_offset[row]))
        is_coming = cached or self._fetcher.is_under_way((container.number, SMALL, block))
        for walk in day.walks:
            self._come_along(walk, container, block)
            if is_coming and walk.rest is not None and walk.rest.has_given(container, block):
                return True
        stop = day.stops(shape.route).get(container.slot)
        offset, length = int(index.data_offset[row]), int(index.data_length[row])
        if stop is None:  # it has left its day, and is read by those who had its files open
            if not cached:
                self._fetcher.fetch_ahead(container, *container.blocks.between(offset, offset + rent_size(link)))
            return False
        folder = index.name(row).rpartition(b"/")[0]
        found = self._walk_to(day, shape, container, folder, offset, cached)
        if found is None:
            if not cached:
                self._appear(day, shape, stop, folder, row, link)
            return False
        walk = found
        run = walk.run_of(container, folder)
        assert run is not None
        at = run.start + offset - run.begin
        known = walk.know(max(walk.scan.end, at) + walk.scan.next_size(link))
        window = walk.scan.step(at, at + length, known, cached, link)
        if window is not None and not self._take_all(shape, walk, window):
            self._open(walk, window)
        return True

    def _come_along(self, walk: Walk, container: OpenContainer, block: int) -> None:
        """A reader who is given all of a day has come to a block: fetch what lies ahead of it now."""
        position = None if walk.rest is None else walk.rest.position_of(container, block)
        if walk.rest is not None and position is not None:
            self._give(walk.rest, position + self._reach())

    def _reach(self) -> int:
        """How far ahead of a reader the rest of a day is fetched, in bytes: far enough that it never waits, no farther.
        What comes earlier than it is needed takes the time of those who read now, and their memory."""
        return max(_REACH * on_its_way(self._fetcher.threads.meter.link()), _REACH * PIECE)

    def _walk_to(
        self, day: _Day, shape: DayShape, container: OpenContainer, folder: bytes, offset: int, cached: bool
    ) -> Walk | None:
        """The reader whose next step is at `offset` of a container, if one is known."""
        for walk in reversed(day.walks):
            run = walk.run_of(container, folder)
            if run is not None:
                if walk.scan.is_step(run.start + offset - run.begin, cached):
                    break
            elif not walk.is_ordered and walk.scan.end >= walk.known:
                coming = self._order_of(day, shape, walk, container, folder)
                if coming is not None:
                    walk.follow(coming)
                    walk.know(walk.known + 1)
                    if walk.run_of(container, folder) is not None:
                        break  # else the day has changed since its orders were looked up
        else:
            return None
        day.walks.remove(walk)
        day.walks.append(walk)
        return walk

    def _order_of(
        self, day: _Day, shape: DayShape, walk: Walk, container: OpenContainer, folder: bytes
    ) -> Iterator[tuple[Stop, bytes, int, int]] | None:
        """What comes after a walk that has gone on to a directory in a container, if that is a step in some order."""
        if walk.steps is None:
            walk.steps = {}
            for order in Order:
                first = next(self._coming(day, shape, walk.runs[-1], order), None)
                if first is not None:
                    walk.steps.setdefault((first[0].container.number, first[1]), order)
        found = walk.steps.get((container.number, folder))
        return None if found is None else self._coming(day, shape, walk.runs[-1], found)

    @staticmethod
    def _coming(
        day: _Day, shape: DayShape, last: Run, order: Order, top: bytes = b""
    ) -> Iterator[tuple[Stop, bytes, int, int]]:
        """The runs behind a run in a walk of `top`: the same directory in the next containers, then the directories
        that follow."""
        tree, stops = shape.tree, day.stops(shape.route)
        if tree is None:
            return
        passed = False
        for folder in chain((last.folder,), following(tree, last.folder, order, shape.inode, top=top)):
            for member, _ in tree.shares(folder):
                stop = stops.get(member.slot)
                if stop is None:
                    continue
                if not passed:
                    passed = stop.container is last.stop.container
                    continue
                extent = stop.container.blocks.extent_of(member.folders.rows(folder))
                if extent is not None:
                    yield stop, folder, *extent
            passed = True

    def _appear(self, day: _Day, shape: DayShape, stop: Stop, folder: bytes, row: int, link: Link) -> None:
        """A reader is seen for the first time."""
        container, index = stop.container, stop.container.loaded.index
        rows = stop.member.folders.rows(folder)
        extent = container.blocks.extent_of(rows)
        if extent is None:  # a file that is not shown, read by somebody who had it open
            return
        begin, end = extent
        walk = Walk(Run(stop, folder, begin, end, 0))
        at = int(index.data_offset[row]) - begin
        # A listing comes from its start to its end: whoever has had the first names has had a page of them.
        announced = bool(container.pages[int(rows[0])] & LISTED) and at < BLOCK
        if announced:
            walked = self._walk_from_above(day, shape, folder)
            if walked is not None:
                walk.follow(self._coming(day, shape, walk.runs[0], *walked))
                walk.may_have_all = not walked[1]  # of a part of the day it is never given the whole
        known = walk.know(at + self._max_window) if walk.is_ordered else walk.known
        length = int(index.data_length[row])
        least = 0 if not announced else FIRST_WINDOW if walk.is_ordered else 1
        walk.scan, window = Scan.begin(at, at + length, known, least, link, self._max_window)
        day.walks.append(walk)
        # What somebody waits for comes in a request of its own: in a round trip, whatever else is wanted.
        offset = begin + at
        self._fetcher.fetch_ahead(container, *container.blocks.between(offset, offset + max(length, rent_size(link))))
        self._open(walk, window)

    def _walk_from_above(self, day: _Day, shape: DayShape, folder: bytes) -> tuple[Order, bytes] | None:
        """In which order, and below which directory, somebody walks who has come to a directory just now."""
        if shape.tree is None:
            return None
        now = trio.current_time()
        top, found = folder, None
        while top:
            top = top.rpartition(b"/")[0]
            if now - day.listings.get(top, -_AT_ONCE_S) >= _AT_ONCE_S:
                break
            for order in Order:
                if next(entered(shape.tree, top, order, shape.inode), None) == folder:
                    found = order, top
                    break
        return found

    def _open(self, walk: Walk, window: Window) -> None:
        """Fetch a window, and have it pushed if its reader will need it."""
        marker = window.marker if window.push else None
        for run, low, high in reversed(list(walk.between(window.start, window.stop))):
            container = run.stop.container
            first, last = container.blocks.between(low, high)
            if first >= last:
                continue
            self._fetcher.fetch_ahead(container, first, last)
            if window.push:
                plan = self._plans.setdefault(container, _Plan())
                if marker is not None:
                    found = container.blocks.row_at(max(run.begin + marker - run.start, run.begin))
                    if found is not None:
                        plan.markers.add(found)
                        marker = None
                self._mark_for_push(container, plan, first, last)
        if not window.push and walk.known < window.stop:  # a rent that goes on behind its directory
            run = walk.runs[-1]
            first, last = run.stop.container.blocks.between(run.end, run.end + window.stop - walk.known)
            self._fetcher.fetch_ahead(run.stop.container, first, last)

    def _take_all(self, shape: DayShape, walk: Walk, window: Window) -> bool:
        """Fetch the rest of a day that somebody walks through, as it comes along. False if nobody knows its way, or
        that is too much."""
        if not walk.is_ordered or not walk.may_have_all or walk.rest is not None:
            return False
        left = sum(self._left(stop.container) for stop in shape.route)
        if not 0 < left <= min(self._affordable, _MOST * walk.scan.size):
            return False
        pieces = {stop.container: self._fetcher.pieces(stop.container) for stop in shape.route}
        order: dict[tuple[OpenContainer, int, int], None] = {}
        for run, low, high in walk.from_position(window.start):
            container = run.stop.container
            first, last = container.blocks.between(low, high)
            for piece in pieces.get(container, ()):
                if piece[0] < last and first < piece[1]:
                    order[container, *piece] = None
        walk.rest = Rest(order)
        for container in pieces:
            self._mark_for_push(container, self._plans.setdefault(container, _Plan()), 0, len(container.blocks))
        self._give(walk.rest, self._reach())
        return True

    def _give(self, rest: Rest, position: int) -> None:
        """Fetch the pieces of a rest that begin before a position. One file of each is held back: the read for it,
        answered from memory, tells how far its reader has come."""
        for container, first, last in rest.up_to(position):
            marker = int(container.blocks.rows(first, first + 1)[0])
            self._plans.setdefault(container, _Plan()).markers.add(marker)
            self._fetcher.fetch_ahead(container, first, last)

    def _has_waited(self, day: _Day, shape: DayShape, container: OpenContainer, waited_s: float) -> None:
        """Rent or buy. Called by the event loop itself, so nothing may get out of it."""
        try:
            self._buy(day, shape, container, waited_s)
        except DeadlineExceeded:
            log.debug("nothing is bought: the mount is ending")
        except Exception:
            log.exception("unexpected error in a purchase")

    def _buy(self, day: _Day, shape: DayShape, container: OpenContainer, waited_s: float) -> None:
        stops = shape.route if container.slot in day.stops(shape.route) else ()
        lefts = {stop.container.number: self._left(stop.container) for stop in stops}
        lefts.setdefault(container.number, self._left(container))
        link = self._fetcher.threads.meter.link()
        bought = day.accounts.miss(container.number, waited_s, lefts, PIECE, self._affordable, link)
        containers = {stop.container.number: stop.container for stop in stops}
        for number in bought:
            metrics.PREFETCH_BOUGHT.inc()
            each = containers.get(number, container)
            self._fetcher.fetch_ahead(each, 0, len(each.blocks))

    def _left(self, container: OpenContainer) -> int:
        return max(container.loaded.index.footer.data_length - self._fetcher.bytes_of(container), 0)

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
            left_out = plan.markers | piece.bad
            if left_out:
                rows = rows[[row not in left_out for row in rows.tolist()]]
            if len(rows):
                self.pusher.push(container, piece, rows)
