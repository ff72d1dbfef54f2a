"""Puts payloads into the kernel's page cache before a reader asks for them: a thread of its own, with a bounded queue.

It may wait for a page that a pending read has locked, so it never runs inside a request. Pages are a gift: what does
not fit into the queue, or belongs to an inode that the kernel does not know, is read from memory when it is wanted.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import structlog

from desfs import metrics
from desfs.fetch import OpenContainer, Piece
from desfs.inode import file_inode

log = structlog.get_logger(__name__)

_BATCH = 256  # files in one call: about 2 ms, after which the thread sees that it has to stop

# What we know of the kernel and a row: bits of OpenContainer.pages.
LISTED = 1  # it has been told of the inode
PUSHED = 2
ASKED = 4  # it has asked for the payload by itself


class Batch(NamedTuple):
    """Files to put into the page cache. `files` u64[n, 4]: inode, offset in `data`, length, row; `pages` as in
    OpenContainer: what has been ASKED for or PUSHED is left out, the others become PUSHED, or 0 if that fails."""

    data: bytes | memoryview
    files: npt.NDArray[np.uint64]
    pages: bytearray


class Pushed(NamedTuple):
    """What came of a batch: files stored, files whose inode the kernel does not know, files refused, the last errno."""

    stored: int
    unknown: int
    failed: int
    errno: int


StorePages = Callable[[Batch], Pushed]


class Pusher:
    """The thread and its queue. `push` may be called from any thread."""

    def __init__(self, store_pages: StorePages, max_queued: int) -> None:
        """`max_queued` bounds the pieces that wait, in bytes: the cache may have forgotten them."""
        self._max_queued = max_queued
        self._store_pages = store_pages
        self._queue: deque[tuple[OpenContainer, Piece, list[int]]] = deque()
        self._queued = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._working = False
        self._when_idle: list[Callable[[], None]] = []
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
            if self._stopping or self._queued + size > self._max_queued:
                metrics.PAGES_PUSHED.labels("dropped").inc(len(rows))
                return
            self._queued += size
            self._queue.append((container, piece, rows))
            self._changed.notify()

    def when_idle(self, tell: Callable[[], None]) -> bool:
        """Have the thread call `tell` when nothing is left to push; False, and no call, if that is so now."""
        with self._changed:
            if not self._queue and not self._working:
                return False
            self._when_idle.append(tell)
            return True

    def _work(self) -> None:
        while True:
            with self._changed:
                self._working = False
                if not self._queue:
                    waiting, self._when_idle = self._when_idle, []
                    for tell in waiting:
                        tell()
                while not self._queue and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return
                self._working = True
                container, piece, rows = self._queue.popleft()
                self._queued -= len(piece.data)
            try:
                self._push_rows(container, piece, rows)
            except Exception:  # the mount goes on without what was to be pushed
                log.exception("unexpected error in a push")

    def _push_rows(self, container: OpenContainer, piece: Piece, rows: list[int]) -> None:
        index = container.loaded.index
        for first in range(0, len(rows), _BATCH):
            if self._stopping:
                return
            some = np.array(rows[first : first + _BATCH], np.uint64)
            files = np.empty((len(some), 4), np.uint64)
            files[:, 0] = some + np.uint64(file_inode(container.slot, 0))
            files[:, 1] = index.data_offset[some] - np.uint64(piece.start)
            files[:, 2] = index.data_length[some]
            files[:, 3] = some
            result = self._store_pages(Batch(piece.data, files, container.pages))
            metrics.PAGES_PUSHED.labels("stored").inc(result.stored)
            metrics.PAGES_PUSHED.labels("unknown").inc(result.unknown)
            metrics.PAGES_PUSHED.labels("failed").inc(result.failed)
            if result.failed:
                log.warning("the kernel did not take pages", files=result.failed, error=os.strerror(result.errno))
