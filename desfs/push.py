"""Puts payloads into the kernel's page cache before a reader asks for them: a thread of its own, with a bounded queue.

It may wait for a page that a pending read has locked, so it never runs inside a request. Pages are a gift: what does
not fit into the queue, or belongs to an inode that the kernel does not know, is read from memory when it is wanted.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Callable

import structlog

from desfs import metrics
from desfs.fetch import OpenContainer, Piece

log = structlog.get_logger(__name__)

_QUEUE = 64 * 1024 * 1024  # bytes of pieces that may wait

# What we know of the kernel and a row: bits of OpenContainer.pages.
LISTED = 1  # it has been told of the inode
PUSHED = 2
ASKED = 4  # it has asked for the payload by itself

# slot, row, the whole payload; raises OSError: ENOENT for an inode that the kernel does not know
StorePages = Callable[[int, int, memoryview], None]


class Pusher:
    """The thread and its queue. `push` may be called from any thread."""

    def __init__(self, store_pages: StorePages) -> None:
        """`store_pages` is given slot, row and payload."""
        self._store_pages = store_pages
        self._queue: deque[tuple[OpenContainer, Piece, list[int]]] = deque()
        self._queued = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="push", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what waits is dropped. Blocks while the kernel takes the last payload."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def push(self, container: OpenContainer, piece: Piece, rows: list[int]) -> None:
        """Queue the payloads of rows that are in a piece."""
        size = len(piece.data)
        with self._changed:
            if self._stopping or self._queued + size > _QUEUE:
                metrics.PAGES_PUSHED.labels("dropped").inc(len(rows))
                return
            self._queued += size
            self._queue.append((container, piece, rows))
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return
                container, piece, rows = self._queue.popleft()
                self._queued -= len(piece.data)
            self._push_rows(container, piece, rows)

    def _push_rows(self, container: OpenContainer, piece: Piece, rows: list[int]) -> None:
        index, pages, data = container.loaded.index, container.pages, memoryview(piece.data)
        offsets = (index.data_offset[rows] - piece.start).tolist()
        lengths = index.data_length[rows].tolist()
        done = unknown = failed = 0
        for row, offset, length in zip(rows, offsets, lengths, strict=True):
            if pages[row] & (PUSHED | ASKED) or self._stopping:
                continue  # the reader was faster
            pages[row] |= PUSHED
            try:
                self._store_pages(container.slot, row, data[offset : offset + length])
                done += 1
            except OSError as error:
                pages[row] = 0
                if error.errno == errno.ENOENT:
                    unknown += 1
                    continue
                failed += 1
                if failed == 1:
                    log.warning("the kernel did not take pages", error=str(error))
        metrics.PAGES_PUSHED.labels("stored").inc(done)
        metrics.PAGES_PUSHED.labels("unknown").inc(unknown)
        metrics.PAGES_PUSHED.labels("failed").inc(failed)
