"""Puts payloads into the kernel's page cache before a reader asks for them: a thread of its own, with a bounded queue.

It may wait for a page that a pending read has locked, so it never runs inside a request. Pages are a gift: what does
not fit into the queue, or belongs to an inode that the kernel does not know, is read from memory when it is wanted.

Files are queued when the kernel is told of them in a listing, which is a moment before it knows their inodes: the
thread waits for those. So it is ahead of the reader, who asks for the end of the listing first.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import structlog

from desfs import metrics
from desfs.container import OpenContainer
from desfs.inode import file_inode
from desfs.pieces import Piece

log = structlog.get_logger(__name__)

# For inodes that the kernel has just been told of, for all files of a batch together. It makes one in two microseconds,
# when it has a core.
_PATIENCE_S = 0.005
_PAUSE_S = 0.0001

# What we know of the kernel and a row: bits of OpenContainer.pages.
LISTED = 1  # it has been told of the inode, or is being told
PUSHED = 2
ASKED = 4  # it has asked for the payload by itself


class Batch(NamedTuple):
    """Files to put into the page cache. `files` u64[n, 4]: inode, offset in `data`, length, row; `pages` as in
    OpenContainer: what has been ASKED for or PUSHED is left out, the others become PUSHED, or 0 if that fails."""

    data: bytes | memoryview
    files: npt.NDArray[np.uint64]
    pages: bytearray


class Pushed(NamedTuple):
    """What came of batches: files stored, files whose inode the kernel does not know, files refused, the last errno,
    how many batches that were, the first of those that waited, and the bytes of what was stored."""

    stored: int
    unknown: int
    failed: int
    errno: int
    batches: int
    size: int


class PageQueue(Protocol):
    """Batches on their way to the kernel. `put` and `stop` may be called from any thread."""

    def put(self, batch: Batch) -> None:
        """Queue a batch. Never blocks."""
        ...

    def serve(self, most: int) -> Pushed | None:
        """Wait for batches, and store them, until none is left or `most` bytes of their data were held; None when
        stopped."""
        ...

    def stop(self) -> None:
        """Have `serve` return None, behind the file at hand; what waits is dropped."""
        ...


class PlainQueue:
    """A queue that calls `store` for each file: (inode, payload) to the errno, 0 when the kernel took it."""

    def __init__(self, store: Callable[[int, memoryview], int]) -> None:
        self._store = store
        self._waiting: deque[Batch] = deque()
        self._changed = threading.Condition()
        self._stopping = False

    def put(self, batch: Batch) -> None:
        with self._changed:
            self._waiting.append(batch)
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def serve(self, most: int) -> Pushed | None:
        total, size = Pushed(0, 0, 0, 0, 0, 0), 0
        while size < most:
            with self._changed:
                while not self._waiting and not total.batches and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return None
                if not self._waiting:
                    break
                batch = self._waiting.popleft()
            try:
                total = self._store_batch(batch, total)
            except Exception:  # the mount goes on without what was to be pushed
                log.exception("unexpected error in a push")
            total = total._replace(batches=total.batches + 1)
            size += len(batch.data)
        return total

    def _store_batch(self, batch: Batch, total: Pushed) -> Pushed:
        stored, unknown, failed, last, batches, size = total
        data, patience_s = memoryview(batch.data), _PATIENCE_S
        for inode, offset, length, row in batch.files.tolist():
            if self._stopping:
                break
            if batch.pages[row] & (PUSHED | ASKED):
                continue
            batch.pages[row] |= PUSHED
            payload = data[offset : offset + length]
            while (found := self._store(inode, payload)) == errno.ENOENT and patience_s > 0:
                time.sleep(_PAUSE_S)
                patience_s -= _PAUSE_S
            if not found:
                stored, size = stored + 1, size + length
                continue
            batch.pages[row], last = 0, found
            if found == errno.ENOENT:
                unknown += 1
            else:
                failed += 1
        return Pushed(stored, unknown, failed, last, batches, size)


class LeverQueue:
    """The queue of the C extension: its thread never waits for Python's lock while a reader has the core (a directory
    of 200 files: 0.7 ms earlier). One for a process."""

    def __init__(self, extension: Any) -> None:
        self._extension = extension

    def put(self, batch: Batch) -> None:
        self._extension.queue_pages(*batch)

    def serve(self, most: int) -> Pushed | None:
        found = self._extension.serve_pages(PUSHED | ASKED, PUSHED, int(_PATIENCE_S * 1e6), most)
        return None if found is None else Pushed(*found)

    def stop(self) -> None:
        self._extension.stop_pages()


class Pusher:
    """The thread that serves a queue, and the bound of the queue. `push` is for one thread."""

    def __init__(self, queue: PageQueue, max_queued: int) -> None:
        """`max_queued` bounds the pieces that wait, in bytes: the cache may have forgotten them."""
        self._queue = queue
        self._max_queued = max_queued
        self._lock = threading.Lock()
        self._queued = 0
        self._waiting: deque[Piece] = deque()  # that of each batch
        self._batches: dict[int, int] = {}  # of each piece, by id()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="push", daemon=True)

    @property
    def queued(self) -> int:
        """Bytes of the pieces that are queued, or being stored."""
        return self._queued

    def start(self) -> None:
        self._thread.start()

    def stop(self, limit_s: float) -> bool:
        """End the thread; what waits is dropped. Blocks while the kernel takes the last payload, which it may not do
        before a READ is answered; False when that takes longer than `limit_s`."""
        self._stopping = True
        self._queue.stop()
        if self._thread.ident is not None:
            self._thread.join(limit_s)
        return not self._thread.is_alive()

    def push(self, container: OpenContainer, piece: Piece, rows: npt.NDArray[np.uint32]) -> None:
        """Queue the payloads of rows that are in a piece."""
        index = container.loaded.index
        files = np.empty((len(rows), 4), np.uint64)
        files[:, 0] = rows + np.uint64(file_inode(container.slot, 0))
        files[:, 1] = index.data_offset[rows] - np.uint64(piece.start)
        files[:, 2] = index.data_length[rows]
        files[:, 3] = rows
        with self._lock:
            # A piece that is queued several times, for the parts of a listing, is in memory once.
            known = self._batches.get(id(piece), 0)
            size = 0 if known else len(piece.data)
            if self._stopping or self._queued + size > self._max_queued:
                metrics.PAGES_PUSHED.labels("dropped").inc(len(rows))
                return
            self._queued += size
            self._batches[id(piece)] = known + 1
            self._waiting.append(piece)
            self._queue.put(Batch(piece.data, files, container.pages))

    def _done(self, batches: int) -> None:
        with self._lock:
            for _ in range(batches):
                piece = self._waiting.popleft()
                left = self._batches.pop(id(piece)) - 1
                if left:
                    self._batches[id(piece)] = left
                else:
                    self._queued -= len(piece.data)

    def _work(self) -> None:
        # What was stored from is held until the thread comes back: no more of it than that.
        most = max(self._max_queued // 4, 1)
        while (result := self._queue.serve(most)) is not None:
            self._done(result.batches)
            metrics.PAGES_PUSHED.labels("stored").inc(result.stored)
            metrics.READ_BYTES.labels("pushed").inc(result.size)
            metrics.PAGES_PUSHED.labels("unknown").inc(result.unknown)
            metrics.PAGES_PUSHED.labels("failed").inc(result.failed)
            if result.failed:
                log.warning("the kernel did not take pages", files=result.failed, error=os.strerror(result.errno))
