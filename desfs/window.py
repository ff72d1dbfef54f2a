"""What to fetch ahead of the readers of a day: windows for those who walk forward, rent or buy for the others. Pure.

The positions of a reader who walks are its own: bytes of what it walks over, in its order (desfs.walk).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from desfs.blocks import BLOCK
from desfs.store.link import Link, on_its_way

# A read that nothing has announced brings its neighbours as well, as many as take this part of a round trip: whoever
# waits for it does not notice.
_RENT_FRACTION = 0.05
_MAX_RENT = 1024 * 1024
FIRST_WINDOW = 8 * 1024 * 1024  # that a first read brings at most: nothing but its place says that others will follow
# A reader may leave out some files: it still walks forward when it goes on this near.
_STEP = 2 * BLOCK


class Window(NamedTuple):
    """Positions [start, stop) to have in memory. The reader will need them if `push`: then they go to the kernel, all
    but the file at `marker`, the first one that begins there or behind: reading it asks for more."""

    start: int
    stop: int
    push: bool
    marker: int


@dataclass(slots=True)
class Scan:
    """One reader who may walk forward: its last window is [start, end), and `size` bytes long but for what ended it."""

    start: int
    end: int
    marker: int
    size: int
    max_window: int

    @classmethod
    def begin(cls, at: int, stop: int, known: int, least: int, link: Link, max_window: int) -> tuple[Scan, Window]:
        """A reader appears with a file at [at, stop) that is not in memory; what may come behind it is known up to
        `known`. `least` is 0 for one that nothing has announced: it gets what costs nothing. One that has listed a
        directory and reads its first file will read the others too, most often: it gets `least` bytes or more."""
        size = rent_size(link)
        if least:
            size = min(max(min(on_its_way(link), FIRST_WINDOW), size, least), max(known - at, size), max_window)
        end = max(at + size, stop)
        return cls(at, end, stop, size, max_window), Window(at, end, least > 0, stop)

    def is_step(self, at: int, cached: bool) -> bool:
        """Whether a read at `at` is this reader's: at the marker, before nothing, or at what was lost again."""
        if cached and self.marker <= at < self.end:
            return at - self.marker <= _STEP
        return self.end - BLOCK <= at <= self.end + _STEP or (not cached and self.start < at < self.end)

    def next_size(self, link: Link) -> int:
        """How long the next window will be. Windows double. From the second on they have what is on its way at a time
        (latency times bandwidth): less would leave the reader waiting, however steadily it walks."""
        return min(max(2 * self.size, on_its_way(link)), self.max_window)

    def step(self, at: int, stop: int, known: int, cached: bool, link: Link) -> Window | None:
        """The reader is at [at, stop): the next window. It ends at `known` at the latest: nobody knows where the reader
        goes on from there. None if it has that already."""
        start = self.end if cached else at
        size = self.next_size(link)
        end = max(min(start + size, known), stop)
        if end <= start:
            return None
        # A reader that waits for the first file of its window meets the marker with the second one.
        self.start, self.end, self.size, self.marker = start, end, size, start if cached else stop
        return Window(start, end, True, self.marker)


def rent_size(link: Link) -> int:
    """Bytes that a single cold read brings with it."""
    return min(max(int(link.latency_s * link.bandwidth * _RENT_FRACTION), BLOCK), _MAX_RENT)


class Accounts:
    """Rent or buy, for a day: what the misses of each container have cost in waiting, against what fetching the rest of
    it costs. When the first reaches the second, the rest is fetched. What was waited beyond that is saved up, and buys
    other containers of the day: whoever reads here and there in it reads in those next.

    Whatever is read afterwards, the sum is at most twice what the best choice would have cost that knew it all before,
    and one miss for each purchase: what is spent was waited for before, and nobody waits longer for a container than it
    costs.
    """

    def __init__(self) -> None:
        self._waited_s: dict[int, float] = {}
        self._saved_s = 0.0

    def miss(
        self, container: int, waited_s: float, lefts: Mapping[int, int], piece: int, affordable: int, link: Link
    ) -> list[int]:
        """A reader has waited for a file of a container: which containers to fetch the rest of. `lefts` are the bytes
        that are left of each container of the day, to be fetched in pieces; no more than `affordable` of them are
        bought at once."""
        self._waited_s[container] = self._waited_s.get(container, 0.0) + waited_s
        bought, room = [], affordable
        # This one first; others have reached their price when the link turns out to be faster than it was thought.
        for each in sorted(self._waited_s.keys() & {container, *lefts}, key=lambda number: number != container):
            left = lefts.get(each, 0)
            cost = buy_cost_s(left, -(-left // piece), link)
            if left <= room and self._waited_s[each] >= cost:
                self._saved_s += self._waited_s.pop(each) - cost
                if left:
                    bought.append(each)
                    room -= left
        if container in self._waited_s:
            return bought
        for other, left in lefts.items():
            cost = buy_cost_s(left, -(-left // piece), link)
            if other not in bought and 0 < left <= room and cost <= self._saved_s:
                self._saved_s -= cost
                room -= left
                bought.append(other)
                self._saved_s += self._waited_s.pop(other, 0.0)
        return bought


# A request's own part of the cost, whatever it brings: 1 ms of two cores' time between client and server (measured with
# SeaweedFS). Its latency costs nobody anything: it is fetched behind the readers' backs.
_REQUEST_S = 0.001


def buy_cost_s(left: int, requests: int, link: Link) -> float:
    """What it costs to fetch so many bytes in so many requests."""
    return requests * _REQUEST_S + left / link.bandwidth
