"""A day as its readers walk through it: its containers, the runs of files that they come to, and what is left.

Trio thread only; nothing here fetches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from desfs.container import OpenContainer
from desfs.tree import Member
from desfs.walk import Order
from desfs.window import Scan

_EVERYTHING = 1 << 62  # a position behind all days


class Stop(NamedTuple):
    """A container of a day, and what the day's tree knows of it."""

    container: OpenContainer
    member: Member


# The open containers of a day in the order in which a listing shows them; the same object as long as nothing changes.
Route = tuple[Stop, ...]


class Run(NamedTuple):
    """The files of one directory in one container: bytes [begin, end) of the container, from the position `start` of a
    walk on."""

    stop: Stop
    folder: bytes
    begin: int
    end: int
    start: int


class Rest:
    """What is left of a day that a reader walks through: pieces (container, first block, last block) in the order in
    which it needs them. They are given out as it comes along."""

    def __init__(self, pieces: Iterable[tuple[OpenContainer, int, int]]) -> None:
        self._pieces: deque[tuple[int, OpenContainer, int, int]] = deque()
        self._begins: dict[int, list[tuple[int, int]]] = {}  # by container: (first block, position), ascending
        at = 0
        for container, first, last in pieces:
            self._pieces.append((at, container, first, last))
            self._begins.setdefault(container.number, []).append((first, at))
            start, stop = container.blocks.extent(first, last)
            at += stop - start
        for begins in self._begins.values():
            begins.sort()

    def position_of(self, container: OpenContainer, block: int) -> int | None:
        """Where a block stands in the order, to a piece; None for a container that is not part of it."""
        begins = self._begins.get(container.number)
        return None if begins is None else begins[max(bisect_right(begins, (block, _EVERYTHING)) - 1, 0)][1]

    def has_given(self, container: OpenContainer, block: int) -> bool:
        """Whether a block is in a piece that has been given out."""
        position = self.position_of(container, block)
        return position is not None and (not self._pieces or position < self._pieces[0][0])

    def up_to(self, position: int) -> Iterator[tuple[OpenContainer, int, int]]:
        """The pieces that begin before a position and have not been given out."""
        while self._pieces and self._pieces[0][0] < position:
            yield self._pieces.popleft()[1:]


class Walk:
    """A reader, and what it walks over: runs, one behind the other, as far as they are known."""

    def __init__(self, run: Run) -> None:
        self.runs: list[Run] = []
        self.known = 0
        self.scan: Scan
        self.is_ordered = False
        self.rest: Rest | None = None  # once all of the day is to come
        self.may_have_all = True
        # The run that would come next, by container and directory, in each order that the reader may follow.
        self.steps: dict[tuple[int, bytes], Order] | None = None
        self._places: dict[tuple[int, bytes], int] = {}
        self._coming: Iterator[tuple[Stop, bytes, int, int]] = iter(())
        self.add(run.stop, run.folder, run.begin, run.end)

    def add(self, stop: Stop, folder: bytes, begin: int, end: int) -> None:
        """One more run at the end."""
        self._places[stop.container.number, folder] = len(self.runs)
        self.runs.append(Run(stop, folder, begin, end, self.known))
        self.known += end - begin

    def run_of(self, container: OpenContainer, folder: bytes) -> Run | None:
        """The run of a directory in a container."""
        place = self._places.get((container.number, folder))
        return None if place is None else self.runs[place]

    def follow(self, coming: Iterator[tuple[Stop, bytes, int, int]]) -> None:
        """The order is known: what comes next, to the end of the day."""
        self._coming = coming
        self.is_ordered = True

    def know(self, position: int) -> int:
        """How far the runs are known: up to `position`, if there are as many. No more than that is looked for."""
        while self.known < position:
            run = next(self._coming, None)
            if run is None:
                break
            if (run[0].container.number, run[1]) not in self._places:
                self.add(*run)
        return self.known

    def between(self, start: int, stop: int) -> Iterator[tuple[Run, int, int]]:
        """The runs that have positions of [start, stop), each with the bytes of its container."""
        for run in reversed(self.runs):
            if run.start + run.end - run.begin <= start:
                return
            if run.start < stop:
                low = run.begin + max(start - run.start, 0)
                yield run, low, min(run.end, run.begin + stop - run.start)

    def from_position(self, start: int) -> Iterator[tuple[Run, int, int]]:
        """All that the reader will still walk over: the runs, each with the bytes of its container."""
        self.know(_EVERYTHING)
        return reversed(list(self.between(start, self.known)))
