"""Getting payloads: single flight, verification, a bounded cache. Trio.

The blocks of a container (desfs.blocks) are fetched in pieces: one GET each, or the disk cache, in a thread that also
checks every payload in it against the checksum in META. What does not match is seen by nobody.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial

import google_crc32c
import numpy as np
import structlog
import trio

from des_format.errors import CorruptEntry, DesFormatError
from des_format.plan import DEFAULT_MAX_GAP, plan_gets
from desfs import metrics
from desfs.blocks import BLOCK
from desfs.container import OpenContainer
from desfs.disk_cache import DiskCache, ObjectVersion
from desfs.errors import DeadlineExceeded, DesfsError
from desfs.pieces import META, SMALL, Key, Piece, PieceCache
from desfs.problems import Problems
from desfs.store.base import ObjectInfo, Store
from desfs.store_threads import StoreThreads

log = structlog.get_logger(__name__)

# A GET of 8 MiB takes some milliseconds more than its round trip: short enough to wait for, long enough that a thousand
# small files cost a few of them. With 4 MiB the server and the client were 5 % busier with a scan (measured).
PIECE = 8 * 1024 * 1024
UNIT = 4 * 1024 * 1024  # of large payloads: the longest that is fetched with any memory
# Pieces fetched ahead at a time; those that somebody waits for come on top.
AHEAD = 16
LEAST_AHEAD = 5

_LAST_SAVES_S = 2.0  # for the disk cache to take what has come, when the mount ends

_SECOND_ASKING_S = 0.05  # it comes a millisecond later; a program that tries again is told anew

# What is being fetched is in memory twice while its end is put to its beginning.
_COPIES = 2


class Flight:
    """One fetch under way, or waiting for its turn. `wanted`: somebody waits for it; `ahead`: it started when nobody
    did; `size` is the most that it holds in memory."""

    __slots__ = ("ahead", "bring", "done", "error", "go", "keys", "piece", "size", "wanted")

    def __init__(self, keys: list[Key], size: int, bring: Callable[[], Awaitable[Piece]]) -> None:
        self.keys = keys
        self.size = size
        self.bring = bring
        self.go = trio.Event()
        self.done = trio.Event()
        self.wanted = False
        self.ahead = False
        self.piece: Piece | None = None
        self.error: Exception | None = None


class Fetcher:
    """Pieces of open containers. Trio thread only, no locks; `run` has to be running.

    Invariant: a key is in `_flights` exactly from the call that starts its fetch until the piece is in the cache, or
    has failed, or somebody has waited for it in vain until the deadline. There is no await between finding no key and
    inserting it: keep it so. Fetches run in tasks of their own: a reader that is cancelled leaves them to the others.

    Memory: what is being fetched and what is kept have `cache_bytes` together, the cache gives way. Fetches ahead take
    three eighths, with those that somebody waits for it is twice that; one alone may be of any size.
    """

    def __init__(
        self,
        threads: StoreThreads,
        problems: Problems,
        cache_bytes: int,
        *,
        max_gap: int = DEFAULT_MAX_GAP,
        disk: DiskCache | None = None,
    ) -> None:
        self.cache = PieceCache(cache_bytes)
        self.bytes_in_flight = 0
        self._memory = cache_bytes
        # A piece has to leave room for others.
        self._piece_bytes = min(PIECE, max(cache_bytes // 8, BLOCK))
        # Never less than two of the longest: what a reader is given ahead must not take from it what it is reading.
        self._least_cache = min(cache_bytes, max(cache_bytes // 4, 2 * UNIT))
        self._room_ahead = max(cache_bytes * 3 // 8, _COPIES * UNIT)
        self._max_gap = max_gap
        self.threads = threads
        self.problems = problems
        self.disk = disk
        # Told of every piece of small payloads that has come.
        self.on_piece: Callable[[OpenContainer, Piece], None] = lambda container, piece: None
        self._savers = trio.CapacityLimiter(2)
        self._saves: set[trio.CancelScope] = set()
        self._saves_end = math.inf
        self._unsaved = 0
        self._coming: dict[int, int] = {}  # by container: bytes of small payloads
        self._ahead_running = 0
        self._waiting: deque[Flight] = deque()  # those that are wanted have started, or will from the other queue
        self._wanted: deque[Flight] = deque()
        self._flights: dict[Key, Flight] = {}
        self._failed: dict[Key, tuple[float, int]] = {}  # when, and how many readers have not asked again
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fetch, until cancelled; then what is on its way to the disk cache still gets there, in two seconds."""
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                try:
                    await trio.sleep_forever()
                finally:
                    self._saves_end = trio.current_time() + _LAST_SAVES_S
                    for save in self._saves:
                        save.deadline = self._saves_end
        finally:
            self._nursery = None
            self._saves_end = math.inf

    # --- small payloads ------------------------------------------------------------------------------------------

    def has(self, container: OpenContainer, block: int) -> bool:
        """Whether a block of small payloads is in memory."""
        return (container.number, SMALL, block) in self.cache

    def bytes_of(self, container: OpenContainer) -> int:
        """Bytes of small payloads of a container that are in memory or on their way."""
        return self.cache.bytes_of(container.number) + self._coming.get(container.number, 0)

    def held(self, container: OpenContainer, first: int, last: int) -> list[Piece]:
        """The pieces in memory that have blocks of [first, last), each once."""
        found: dict[int, Piece] = {}
        for block in range(first, last):
            piece = self.cache.get((container.number, SMALL, block))
            if piece is not None:
                found[id(piece)] = piece
        return list(found.values())

    def pieces(self, container: OpenContainer) -> list[tuple[int, int]]:
        """All blocks of a container in runs [first, last) that one GET brings each."""
        return container.blocks.pieces(0, len(container.blocks), limit=self._piece_bytes, max_gap=self._max_gap)

    def fetch_ahead(self, container: OpenContainer, first: int, last: int) -> int:
        """Begin to fetch what of the blocks [first, last) is neither here nor on its way; bytes asked for."""
        asked = 0
        for wanted, run in itertools.groupby(range(first, last), lambda block: self._is_missing(container, block)):
            if wanted:
                places = list(run)
                for low, high in container.blocks.pieces(
                    places[0], places[-1] + 1, limit=self._piece_bytes, max_gap=self._max_gap
                ):
                    self._start_blocks(container, low, high)
                    start, stop = container.blocks.extent(low, high)
                    asked += stop - start
        return asked

    async def payload(self, container: OpenContainer, row: int) -> memoryview:
        """The verified bytes of a small payload.

        Raises: CorruptEntry; ObjectReplaced and NoSuchObject when the container is not there any more; StoreError.
        """
        index = container.loaded.index
        offset, length = int(index.data_offset[row]), int(index.data_length[row])
        block = container.blocks.of(offset)
        key = (container.number, SMALL, block)
        piece = await self.piece(key, lambda: self._start_blocks(container, block, block + 1))
        if row in piece.bad:
            return await self._once_more(container, row, offset, length)
        return memoryview(piece.data)[offset - piece.start : offset - piece.start + length]

    def _is_missing(self, container: OpenContainer, block: int) -> bool:
        key = (container.number, SMALL, block)
        return key not in self._flights and key not in self.cache

    def _start_blocks(self, container: OpenContainer, first: int, last: int) -> Flight:
        keys = [(container.number, SMALL, block) for block in range(first, last)]
        start, stop = container.blocks.extent(first, last)

        async def bring() -> Piece:
            store, disk = self.threads.store, self.disk
            try:
                piece, unsaved = await self.threads.fetch(_bring_blocks, store, disk, container, first, last)
            finally:
                self._expect(container, start - stop)
            self.on_piece(container, piece)
            if disk is not None and unsaved and self._nursery is not None and self._may_keep(piece):
                self._unsaved += len(piece.data)
                self._nursery.start_soon(self._keep, disk, container.info, piece, unsaved)
            return piece

        flight = self.start(keys, stop - start, bring)
        self._expect(container, stop - start)
        return flight

    def _expect(self, container: OpenContainer, size: int) -> None:
        coming = self._coming.pop(container.number, 0) + size
        if coming:
            self._coming[container.number] = coming

    def _may_keep(self, piece: Piece) -> bool:
        """What comes faster than the disk takes it is not kept there: an eighth of the memory may wait for it."""
        return not self._unsaved or self._unsaved + len(piece.data) <= self._memory // 8

    async def _keep(self, disk: DiskCache, info: ObjectInfo, piece: Piece, bounds: list[tuple[int, int]]) -> None:
        """Write to the disk cache what has come: nobody waits for it. One that is given up is as if the process had
        died: the cache takes that."""
        call = partial(_save, disk, self.threads.store, info, piece, bounds)
        with trio.CancelScope(shield=True, deadline=self._saves_end) as save:
            self._saves.add(save)
            try:
                await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._savers)
            except Exception:  # of a cache, which reports its disk's errors by itself
                log.exception("unexpected error in the disk cache")
            finally:
                self._saves.discard(save)
                self._unsaved -= len(piece.data)

    async def _once_more(self, container: OpenContainer, row: int, offset: int, length: int) -> memoryview:
        """A payload that did not match its checksum: it may be the way's fault, not the store's."""
        metrics.CHECKSUM_FAILURES.inc()
        info = container.info
        answer = await self.threads.fetch(
            self.threads.store.get_range, info.key, offset, offset + length, if_match=info.etag
        )
        try:
            await trio.to_thread.run_sync(container.loaded.meta.verify, container.loaded.index, row, bytes(answer.data))
        except CorruptEntry as error:
            self.problems.report(info.key, str(error))
            raise
        return memoryview(answer.data)

    # --- META ----------------------------------------------------------------------------------------------------

    async def meta(self, container: OpenContainer, start: int, stop: int, window: int) -> bytes:
        """[start, stop) of the META region, fetched in windows of that many bytes. Raises: as payload."""
        footer = container.loaded.index.footer
        first = footer.meta_start + (start - footer.meta_start) // window * window
        found = []
        for begin in range(first, stop, window):
            end = min(begin + window, footer.meta_start + footer.meta_length)
            piece = await self.piece((container.number, META, begin), partial(self._start_meta, container, begin, end))
            found.append(bytes(piece.data[max(start - begin, 0) : stop - begin]))
        return b"".join(found)

    def _start_meta(self, container: OpenContainer, begin: int, end: int) -> Flight:
        async def bring() -> Piece:
            info = container.info
            answer = await self.threads.fetch(self.threads.store.get_range, info.key, begin, end, if_match=info.etag)
            return Piece(container.number, META, begin, begin + 1, begin, answer.data)

        return self.start([(container.number, META, begin)], end - begin, bring)

    # --- flights -------------------------------------------------------------------------------------------------

    async def piece(self, key: Key, start: Callable[[], Flight]) -> Piece:
        """The piece with a block: from the cache, from a fetch under way, or from the one that `start` begins.

        Raises: what the fetch raises.
        """
        patience = self.threads.patience()
        while True:
            piece = self.cache.get(key)
            if piece is not None:
                return piece
            flight = self._flights.get(key)
            is_ours = flight is None
            flight = flight or start()
            self._want(flight)
            try:
                # One that had begun before we came may be stuck in a silence that has passed: half of the time is for a
                # try of our own.
                await patience.wait(flight.done, 1.0 if is_ours else 0.5)
            except DeadlineExceeded:
                self._give_up(flight)
                if not is_ours:
                    continue
                failed = self._failed.get(key, (0.0, 0))[1]
                self._failed[key] = trio.current_time(), failed + 1
                raise
            if flight.piece is not None:
                return flight.piece
            assert flight.error is not None
            if is_ours or not isinstance(flight.error, DeadlineExceeded):
                raise flight.error

    def raise_again(self, container: OpenContainer, block: int) -> None:
        """To be called before a block of small payloads is read, and before anything is fetched because of that.

        The kernel asks at once for a second time when a read fails: it takes the first for readahead (Linux,
        mm/filemap.c, filemap_get_pages). Who reads has waited until the deadline by then. Raises: DeadlineExceeded.
        """
        if not self._failed:
            return
        long_ago = trio.current_time() - _SECOND_ASKING_S
        self._failed = {each: found for each, found in self._failed.items() if found[0] > long_ago}
        key = (container.number, SMALL, block)
        when, count = self._failed.get(key, (0.0, 0))
        if count:
            self._failed[key] = when, count - 1
            raise DeadlineExceeded(f"{self.threads.store.url}: no answer, a moment ago")

    def _give_up(self, flight: Flight) -> None:
        """Whoever comes now begins anew, and does not wait for what is stuck."""
        for key in flight.keys:
            if self._flights.get(key) is flight:
                del self._flights[key]

    def is_under_way(self, key: Key) -> bool:
        """Whether a block is being fetched."""
        return key in self._flights

    def start(self, keys: list[Key], size: int, bring: Callable[[], Awaitable[Piece]]) -> Flight:
        """Begin a fetch, of at most `size` bytes, of keys that are neither in the cache nor under way. It waits for its
        turn. Raises: DeadlineExceeded when the fetcher does not run."""
        if self._nursery is None or self._saves_end < math.inf:
            raise DeadlineExceeded("nothing is fetched: the mount has not begun, or is ending")
        flight = Flight(keys, _COPIES * size, bring)
        for key in keys:
            self._flights[key] = flight
        self._waiting.append(flight)  # here: tasks do not begin in the order in which they were started
        self._nursery.start_soon(self._fly, flight)
        return flight

    def _want(self, flight: Flight) -> None:
        """Somebody waits for a flight: it goes before those that nobody waits for."""
        if not flight.wanted:
            flight.wanted = True
            if not flight.go.is_set():
                self._wanted.append(flight)
                self._next_turns()

    async def _fly(self, flight: Flight) -> None:
        try:
            self._next_turns()
            await flight.go.wait()
            flight.piece = await flight.bring()
        except Exception as error:  # those who wait raise it; nobody may wait, and nothing of the mount ends with it
            if not isinstance(error, DesfsError | DesFormatError):
                log.exception("unexpected error in a fetch")
            flight.error = error
        finally:
            self._give_up(flight)
            if flight.error is None and flight.piece is None:  # cancelled: the mount ends
                flight.error = DeadlineExceeded("the mount is ending")
            if flight.go.is_set():
                self._ahead_running -= flight.ahead
                self._count(-flight.size)
            if flight.piece is not None:
                self.cache.put(flight.piece)
            flight.done.set()
            self._next_turns()

    def _next_turns(self) -> None:
        while self._wanted and self._has_room(self._wanted[0], 2 * self._room_ahead):
            self._begin(self._wanted.popleft())
        while self._waiting and not self._wanted:
            flight = self._waiting[0]
            if not flight.wanted:
                if self._ahead_running >= self._ahead_limit() or not self._has_room(flight, self._room_ahead):
                    return
                flight.ahead = True
                self._ahead_running += 1
                self._begin(flight)
            self._waiting.popleft()

    def _ahead_limit(self) -> int:
        """As many as keep the way busy, and not many more: what comes at the same time comes late, all of it."""
        link = self.threads.meter.link()
        return min(max(int(2 * link.latency_s * link.bandwidth / PIECE), LEAST_AHEAD), AHEAD)

    def _has_room(self, flight: Flight, limit: int) -> bool:
        return not self.bytes_in_flight or self.bytes_in_flight + flight.size <= limit

    def _begin(self, flight: Flight) -> None:
        self._count(flight.size)
        flight.go.set()

    def _count(self, size: int) -> None:
        self.bytes_in_flight += size
        self.cache.resize(max(self._memory - self.bytes_in_flight, self._least_cache))


def _bring_blocks(
    store: Store, disk: DiskCache | None, container: OpenContainer, first: int, last: int
) -> tuple[Piece, list[tuple[int, int]]]:
    """Fetch and verify blocks that are one run of bytes; blocking. Also the blocks that the disk cache lacks.

    Raises: NoSuchObject, ObjectReplaced; StoreError.
    """
    blocks, info = container.blocks, container.info
    start, stop = blocks.extent(first, last)
    bounds = [(int(blocks.start[place]), int(blocks.stop[place])) for place in range(first, last)]
    data: bytes | memoryview | None = None
    missing = bounds if disk is not None else []
    if disk is not None:
        version = ObjectVersion(store.url, info.key, info.etag)
        data = disk.get(version, start, stop)  # without gaps between the blocks it is all or nothing, most often
        if data is None:
            found = disk.get_many(version, bounds)
            missing = [bound for bound, block in zip(bounds, found, strict=True) if block is None]
            if len(missing) < len(bounds):
                whole = bytearray(stop - start)
                for (low, high), block in zip(bounds, found, strict=True):
                    if block is not None:
                        whole[low - start : high - start] = block
                for low, high in plan_gets(missing, max_gap=0, max_request=PIECE):
                    whole[low - start : high - start] = store.get_range(info.key, low, high, if_match=info.etag).data
                    metrics.FILES_PER_GET.observe(
                        sum(
                            len(blocks.rows(place, place + 1))
                            for place, (at, _) in enumerate(bounds, first)
                            if low <= at < high
                        )
                    )
                data = memoryview(whole).toreadonly()
        else:
            missing = []
    if data is None:
        data = store.get_range(info.key, start, stop, if_match=info.etag).data
        metrics.FILES_PER_GET.observe(len(blocks.rows(first, last)))
    bad = _bad_rows(container, first, last, start, data)
    return Piece(container.number, SMALL, first, last, start, data, bad), [] if bad else missing


def _save(disk: DiskCache, store: Store, info: ObjectInfo, piece: Piece, bounds: list[tuple[int, int]]) -> None:
    """Keep blocks of a piece on the disk; blocking."""
    view, start = memoryview(piece.data), piece.start
    version = ObjectVersion(store.url, info.key, info.etag)
    disk.put(version, [(low, high, view[low - start : high - start]) for low, high in bounds])


def _bad_rows(container: OpenContainer, first: int, last: int, start: int, data: bytes | memoryview) -> frozenset[int]:
    """The rows of the blocks whose payloads do not match the checksum in META."""
    index, meta = container.loaded.index, container.loaded.meta
    rows = container.blocks.rows(first, last)
    view = memoryview(data)
    bad = []
    checksum = google_crc32c.value
    array = np.frombuffer(view.toreadonly(), np.uint8)  # which the library takes, and no memoryview
    for row, offset, length, known, wanted in zip(
        rows.tolist(),
        (index.data_offset[rows] - start).tolist(),
        index.data_length[rows].tolist(),
        meta.has_crc32c[rows].tolist(),
        meta.crc32c[rows].tolist(),
        strict=True,
    ):
        if known:
            if checksum(array[offset : offset + length]) != wanted:
                bad.append(row)
        elif row in meta.sha256:
            try:
                meta.verify(index, row, bytes(view[offset : offset + length]))
            except CorruptEntry:
                bad.append(row)
    return frozenset(bad)
