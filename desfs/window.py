"""What to fetch ahead of the readers of a day: windows for those who walk forward, rent or buy for the others. Pure.

Positions are bytes of the day: the DATA regions of its containers one behind the other, in the order in which a listing
shows them. A reader who walks through the day walks forward in them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from desfs.blocks import BLOCK
from desfs.store.link import Link

# A read that nothing has announced brings its neighbours as well, as many as take this part of a round trip: whoever
# waits for it does not notice.
_RENT_FRACTION = 0.05
_MAX_RENT = 1024 * 1024
# A reader may leave out some files: it still walks forward when it goes on this near.
_STEP = 2 * BLOCK
# Readers that are followed at a time; the one that was quiet longest is forgotten.
_SCANS = 64


class Window(NamedTuple):
    """Bytes [start, stop) of the day to have in memory. The reader will need them if `push`: then they go to the
    kernel, all but the file at `marker`, the first one that begins there or behind: reading it asks for more.
    `goes_on` tells a reader that walks on from one that appears here."""

    start: int
    stop: int
    push: bool
    marker: int
    goes_on: bool


class Folder(NamedTuple):
    """The directory of a file: the bytes [start, stop) of its files in the file's container, and whether somebody has
    listed it."""

    start: int
    stop: int
    listed: bool


@dataclass(slots=True)
class _Scan:
    """One reader that walks forward: what it has been given, and what its next step will look like."""

    start: int
    end: int
    marker: int
    size: int  # of its last window
    folder_stop: int  # the end of the first directory; 0 once it has gone on behind it


class Windows:
    """The readers of one day. `max_window` bounds what is fetched ahead of one of them, in bytes."""

    def __init__(self, max_window: int) -> None:
        self._max_window = max_window
        self._scans: OrderedDict[int, _Scan] = OrderedDict()
        self._next_id = 0

    def read(self, at: int, stop: int, folder: Folder, cached: bool, link: Link) -> Window | None:
        """A file at [at, stop) is read, and what else to have now. A window contains the file if it was not `cached`.

        A scan asks for the next window when its reader comes to the marker in the last one, or stands before nothing.
        Windows double. They begin with what is on its way at a time (latency times bandwidth): less would leave the
        reader waiting, however steadily it walks. Until it has gone on to a second directory, they end with the first.
        """
        found = self._scan_at(at, cached)
        if found is None:
            return None if cached else self._begin(at, stop, folder, link)
        number, scan = found
        self._scans.move_to_end(number)
        if scan.folder_stop and at >= scan.folder_stop:
            scan.folder_stop = 0
        if cached and at < scan.marker:
            return None
        start = scan.end if cached or at < scan.end else at
        size = min(max(2 * scan.size, _on_its_way(link)), self._max_window)
        end = max(start + size, stop)
        if scan.folder_stop:
            end = max(min(end, folder.stop), stop)
        if end <= start:
            return None  # the directory's end: the next step tells
        if start == at and not cached:
            # The reader waits for the first file of the window: the second one is the marker.
            marker = stop
        else:
            marker = start
        scan.start, scan.end, scan.marker, scan.size = min(scan.marker, at), end, marker, max(size, scan.size)
        return Window(start, end, True, marker, True)

    def _scan_at(self, at: int, cached: bool) -> tuple[int, _Scan] | None:
        for number in reversed(self._scans):
            scan = self._scans[number]
            # Inside of what was given: in the kernel's memory for the most part, so few such reads are seen at all.
            if cached and scan.marker <= at < scan.end:
                if at - scan.marker <= _STEP:
                    return number, scan
            elif scan.end - BLOCK <= at <= scan.end + _STEP:
                return number, scan
        return None

    def _begin(self, at: int, stop: int, folder: Folder, link: Link) -> Window:
        rent = rent_size(link)
        # Whoever has listed a directory and then reads its first file reads the others too, most often.
        whole = folder.listed and at - folder.start < BLOCK
        size = min(max(_on_its_way(link), rent), max(folder.stop - at, rent), self._max_window) if whole else rent
        end = max(at + size, stop)
        self._next_id += 1
        self._scans[self._next_id] = _Scan(at, end, stop, size, folder.stop)
        if len(self._scans) > _SCANS:
            self._scans.popitem(last=False)
        return Window(at, end, whole, stop, False)


def _on_its_way(link: Link) -> int:
    return int(link.latency_s * link.bandwidth)


def rent_size(link: Link) -> int:
    """Bytes that a single cold read brings with it."""
    return min(max(int(link.latency_s * link.bandwidth * _RENT_FRACTION), BLOCK), _MAX_RENT)


class Buy(Enum):
    """What to fetch the rest of."""

    NOTHING = 0
    CONTAINER = 1
    DAY = 2


class Accounts:
    """Rent or buy, for a day: what the misses of each container have cost in waiting, against what fetching the rest of
    it would cost. When the first reaches the second, the rest is fetched. The misses of those that were not bought are
    held against the rest of the whole day in the same way: fetched together, it costs fewer round trips.

    Whatever is read afterwards, the sum is at most twice what the best choice would have cost that knew it all before,
    and one miss for each purchase.
    """

    def __init__(self) -> None:
        self._waited_s: dict[int, float] = {}

    def miss(
        self, container: int, waited_s: float, lefts: Mapping[int, int], piece: int, affordable: int, link: Link
    ) -> Buy:
        """A reader has waited for a file of a container. `lefts` are the bytes that are left of each container of the
        day, to be fetched in pieces, many at a time; no more than `affordable` of them are bought at once."""
        waited = self._waited_s.get(container, 0.0) + waited_s
        self._waited_s[container] = waited
        left = lefts.get(container, 0)
        if 0 < left <= affordable and waited >= buy_cost_s(left, -(-left // piece), link):
            self._waited_s[container] = 0.0  # what is bought is not paid for again
            return Buy.CONTAINER
        left = sum(lefts.values())
        requests = sum(-(-each // piece) for each in lefts.values())
        waited = sum(each for number, each in self._waited_s.items() if number in lefts)
        if 0 < left <= affordable and waited >= buy_cost_s(left, requests, link):
            self._waited_s.clear()
            return Buy.DAY
        return Buy.NOTHING


# Requests that run at a time when the rest of something is fetched.
PARALLEL = 16


def buy_cost_s(left: int, requests: int, link: Link) -> float:
    """How long it takes to fetch the rest."""
    return -(-requests // PARALLEL) * link.latency_s + left / link.bandwidth
