"""How far away a store is and how much it brings, measured from the requests that are made anyway."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

from desfs.store.base import Answer, Store
from desfs.store.delegating import Delegating

# Until something has been measured: a region's distance, and what one connection brings from there.
_LATENCY_S = 0.02
_BANDWIDTH = 100e6

_SMALL = 256 * 1024  # bytes: an answer up to this size tells the latency, where nobody knows when its headers came
_ENOUGH = 4 * 1024 * 1024  # bytes: what came together tells the bandwidth from this size on
_BODY = 64 * 1024  # bytes: until then the rate of a single answer from this size on does, without its latency
_PERIOD_S = 0.1  # while requests go on, the bandwidth is known after so long
_LONGEST_S = 5.0
_PERIODS = 8  # whose bandwidths are kept; the highest is what the way can do: the others had less to carry
_KEPT = 64  # latencies: the least of the last ones is what the way takes when nothing is in it


class Link(NamedTuple):
    """What a request costs: `latency_s` for the first byte, and bytes a second of all requests together."""

    latency_s: float
    bandwidth: float

    def time_s(self, size: int) -> float:
        """How long it takes to bring so many bytes."""
        return self.latency_s + size / self.bandwidth


def on_its_way(link: Link) -> int:
    """Bytes that come in a round trip's time."""
    return int(link.latency_s * link.bandwidth)


class LinkMeter:
    """Measures GETs. Any thread. Only what came while at least one request ran counts as time. `answers` counts those
    that came."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.answers = 0
        self._lock = threading.Lock()
        self._latencies: deque[float] = deque(maxlen=_KEPT)
        self._bandwidths: deque[float] = deque(maxlen=_PERIODS)
        self._rates: deque[float] = deque(maxlen=_PERIODS)
        self._alone: deque[float] = deque(maxlen=_PERIODS)  # rates of answers that nothing else was under way with
        self._running = 0
        self._requests = 0
        # The period in which at least one request has been running, without a break.
        self._began_s = 0.0
        self._bytes = 0
        self._is_new = True

    def link(self) -> Link:
        """What has been measured so far."""
        with self._lock:
            if self._bandwidths:
                # What one answer alone brings is what the way can do at least: many small ones together show how fast
                # they are taken apart. The median, since some of it may have come before anybody looked.
                alone = [median(self._alone)] if self._alone else []
                return Link(self._latency(), max([*self._bandwidths, *alone]))
            return Link(self._latency(), median(self._rates) if self._rates else _BANDWIDTH)

    def _latency(self) -> float:
        return min(self._latencies, default=_LATENCY_S)

    @contextmanager
    def request(self) -> Iterator[list[Answer]]:
        """Around a GET; its answer has to be appended to the list. One that fails is not measured."""
        answered: list[Answer] = []
        started = self._clock()
        with self._lock:
            if not self._running:
                self._begin(started)
            self._running += 1
            self._requests += 1
            number = self._requests if self._running == 1 else None
        try:
            yield answered
        finally:
            ended = self._clock()
            with self._lock:
                self._running -= 1
                if answered:
                    self._take(started, ended, answered[0], is_alone=number == self._requests)

    def _take(self, started: float, ended: float, answer: Answer, *, is_alone: bool) -> None:
        self.answers += 1
        size = len(answer.data)
        if answer.body_s is not None:
            self._latencies.append(max(ended - started - answer.body_s, 0.0))
            if size >= _BODY:
                self._rates.append(size / max(answer.body_s, 1e-4))
                if is_alone and size >= 2 * _BODY:
                    self._alone.append(self._rates[-1])
        elif size <= _SMALL:
            self._latencies.append(ended - started)
        elif not self._latencies:
            self._latencies.append(max(ended - started - size / _BANDWIDTH, (ended - started) / 2))
        self._bytes += size
        lasted = ended - self._began_s
        if self._bytes < _ENOUGH or (self._running and lasted < _PERIOD_S):
            return
        # The first bytes came after the latency. A clock that is a little off must not make much of a short period.
        seen = self._bytes / max(lasted - self._latency(), lasted / 2, 1e-4)
        if self._is_new:
            self._bandwidths.append(seen)
        else:
            self._bandwidths[-1] = seen  # the same period, and more of it
        self._is_new = False
        if lasted > _LONGEST_S:  # what is on its way now counts for the next one: little, of so much
            self._begin(ended)

    def _begin(self, now: float) -> None:
        self._began_s, self._bytes, self._is_new = now, 0, True


class Measured(Delegating):
    """A store whose GETs are measured; else the store inside."""

    def __init__(self, store: Store, meter: LinkMeter) -> None:
        super().__init__(store)
        self._meter = meter

    def get_range(self, key: str, start: int, stop: int, *, if_match: str | None = None) -> Answer:
        with self._meter.request() as answered:
            answer = self._store.get_range(key, start, stop, if_match=if_match)
            answered.append(answer)
        return answer

    def get_tail(self, key: str, length: int) -> Answer:
        with self._meter.request() as answered:
            answer = self._store.get_tail(key, length)
            answered.append(answer)
        return answer
