"""Retries around any store: temporary errors are tried again, with backoff and jitter, inside a deadline."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import stamina
import stamina.instrumentation

from desfs.errors import DeadlineExceeded, ObjectExists, StoreError
from desfs.metrics import STORE_RETRIES
from desfs.store.base import Answer, CopyRange, Listing, Store

R = TypeVar("R")

# Backoff: 0.05 s, doubled each time up to 5 s, and a random bit on top, so that clients that failed together do not
# come back together. S3 asks for exponential backoff after SlowDown; most resets are gone at the first retry.
WAIT_INITIAL_S = 0.05
WAIT_MAX_S = 5.0
WAIT_JITTER_S = 0.25
# One GET when stored bytes are compared with what was sent.
_COMPARE_PIECE = 8 << 20

_log = logging.getLogger(__name__)

# stamina's own hooks report every retry through structlog or logging, as a warning with all arguments, which may be the
# bytes of an object. `call_with_retries` counts and logs instead. The hooks are the process's, not a caller's.
stamina.instrumentation.set_on_retry_hooks(())


def call_with_retries(
    operation: str,
    call: Callable[[], R],
    *,
    deadline_s: float,
    from_first_failure: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> R:
    """Call until it succeeds or fails for good; a StoreError with `temporary` is tried again.

    No try begins later than `deadline_s` after the start, or, with `from_first_failure`, after the first try has
    failed: for calls that may rightly take longer than that.

    Raises DeadlineExceeded from the last temporary error, other errors as they are.
    """
    started: float | None = None if from_first_failure else clock()

    def again(error: Exception) -> bool | float:
        """Whether to try again; a number is the seconds to wait before."""
        nonlocal started
        if not (isinstance(error, StoreError) and error.temporary):
            return False
        now = clock()
        started = now if started is None else started
        left_s = deadline_s - (now - started)
        if left_s <= 0:
            return False
        STORE_RETRIES.labels(operation).inc()
        _log.info("%s is tried again: %s", operation, error)
        # The last try comes at the deadline, not after it.
        return left_s if left_s <= WAIT_MAX_S else True

    try:
        for attempt in stamina.retry_context(
            on=again,
            attempts=None,
            timeout=None,
            wait_initial=WAIT_INITIAL_S,
            wait_max=WAIT_MAX_S,
            wait_jitter=WAIT_JITTER_S,
        ):
            with attempt:
                return call()
    except StoreError as error:
        if error.temporary:
            raise DeadlineExceeded(f"gave up after {deadline_s:g} s: {error}") from error
        raise
    raise AssertionError("a retry loop ends by returning or raising")


class Retrying:
    """A store whose temporary errors are retried for `deadline_s` seconds a call; else the store inside.

    The deadline of list, get and delete counts from the call; that of put and copy_ranges, which may take long for
    their size, from their first failure. A try that is under way at the deadline is not cut short: the store inside
    bounds it by its own time-outs.
    """

    def __init__(self, store: Store, deadline_s: float = 60.0, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self.deadline_s = deadline_s
        self._clock = clock

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def inner(self) -> Store:
        """The store inside."""
        return self._store

    def list(self, prefix: str = "", *, delimiter: bool = False) -> Listing:
        return self._call("list", lambda: self._store.list(prefix, delimiter=delimiter))

    def get_range(self, key: str, start: int, stop: int, *, if_match: str | None = None) -> Answer:
        return self._call("get", lambda: self._store.get_range(key, start, stop, if_match=if_match))

    def get_tail(self, key: str, length: int) -> Answer:
        return self._call("get", lambda: self._store.get_tail(key, length))

    def put(self, key: str, source: bytes | Path, *, if_absent: bool = True) -> str:
        """As the store inside; an object that is found on a retry, and has exactly the bytes that were sent, is the one
        that an earlier try has stored without its answer arriving: its ETag is returned."""
        return self._store_once(
            "put", key, lambda: self._store.put(key, source, if_absent=if_absent), lambda: _pieces_of(source)
        )

    def delete(self, key: str) -> None:
        self._call("delete", lambda: self._store.delete(key))

    def copy_ranges(self, key: str, pieces: Sequence[bytes | CopyRange], *, if_absent: bool = True) -> str:
        """As the store inside; an object that is found on a retry is compared as `put` does, every byte of it: both it
        and the sources are read. That is slow, but happens only when an answer was lost."""
        return self._store_once(
            "copy",
            key,
            lambda: self._store.copy_ranges(key, pieces, if_absent=if_absent),
            lambda: self._bytes_of(pieces),
        )

    def close(self) -> None:
        self._store.close()

    def _call(self, operation: str, call: Callable[[], R], *, from_first_failure: bool = False) -> R:
        return call_with_retries(
            operation, call, deadline_s=self.deadline_s, from_first_failure=from_first_failure, clock=self._clock
        )

    def etag_if_holds(self, key: str, source: bytes | Path) -> str | None:
        """The ETag of the stored object if its bytes are those of `source`, every one compared; else None. Raises
        NoSuchObject."""
        return self._etag_if_equal(key, _pieces_of(source))

    def _store_once(
        self, operation: str, key: str, store: Callable[[], str], sent: Callable[[], Iterator[bytes]]
    ) -> str:
        tries = 0

        def counting() -> str:
            nonlocal tries
            tries += 1
            return store()

        try:
            return self._call(operation, counting, from_first_failure=True)
        except ObjectExists:
            # Only an earlier try of ours can have stored it, or somebody else: the bytes tell.
            etag = self._etag_if_equal(key, sent()) if tries > 1 else None
            if etag is None:
                raise
            return etag

    def _etag_if_equal(self, key: str, sent: Iterator[bytes]) -> str | None:
        """The ETag of the stored object if its bytes are those, else None. Pieces may be empty."""
        tail = self.get_tail(key, 1)
        at = 0
        for piece in sent:
            stop = at + len(piece)
            if stop > tail.size:
                return None
            if piece and bytes(self.get_range(key, at, stop, if_match=tail.etag).data) != piece:
                return None
            at = stop
        return tail.etag if at == tail.size else None

    def _bytes_of(self, pieces: Sequence[bytes | CopyRange]) -> Iterator[bytes]:
        for piece in pieces:
            if isinstance(piece, bytes):
                yield from _pieces_of(piece)
                continue
            for start in range(piece.start, piece.stop, _COMPARE_PIECE):
                stop = min(piece.stop, start + _COMPARE_PIECE)
                yield bytes(self.get_range(piece.key, start, stop, if_match=piece.etag).data)


def _pieces_of(source: bytes | Path) -> Iterator[bytes]:
    if isinstance(source, bytes):
        for start in range(0, len(source), _COMPARE_PIECE):
            yield source[start : start + _COMPARE_PIECE]
        return
    try:
        with source.open("rb") as file:
            while piece := file.read(_COMPARE_PIECE):
                yield piece
    except OSError as error:
        raise StoreError(f"cannot read {str(source)!r}: {error.strerror}") from error
