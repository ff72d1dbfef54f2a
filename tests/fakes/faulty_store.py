"""A store that fails by script: one word a call, the last one repeats.

ok            the call does what it does
503           Throttled, nothing done
reset         StoreUnavailable, nothing done
stall         StoreUnavailable as after a time-out, nothing done and nothing waited for
short         BadAnswer, nothing done: what the checks make of a short body
412           ObjectExists from put and copy_ranges, ObjectReplaced from the others; nothing done
lost-answer   the call takes effect, then StoreUnavailable
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from desfs.errors import BadAnswer, ObjectExists, ObjectReplaced, StoreError, StoreUnavailable, Throttled
from desfs.store.base import Answer, CopyRange, Listing, Store

R = TypeVar("R")
WORDS = frozenset({"ok", "503", "reset", "stall", "short", "412", "lost-answer"})


class FaultyStore:
    """The store inside, with faults. Any thread may call; which of two concurrent calls gets which word is open."""

    def __init__(self, inner: Store, script: str = "ok") -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self.calls: list[tuple[str, str, str]] = []
        """Method, key and word of each call so far, in order."""
        self._words: list[str] = []
        self.script = script

    @property
    def script(self) -> str:
        """The words that are left."""
        with self._lock:
            return " ".join(self._words)

    @script.setter
    def script(self, script: str) -> None:
        words = script.split()
        if not words or not set(words) <= WORDS:
            raise ValueError(f"script {script!r}: want one or more of {sorted(WORDS)}")
        with self._lock:
            self._words = words

    @property
    def url(self) -> str:
        return self._inner.url

    def list(self, prefix: str = "", *, delimiter: bool = False) -> Listing:
        return self._call("list", prefix, lambda: self._inner.list(prefix, delimiter=delimiter))

    def get_range(self, key: str, start: int, stop: int, *, if_match: str | None = None) -> Answer:
        return self._call("get_range", key, lambda: self._inner.get_range(key, start, stop, if_match=if_match))

    def get_tail(self, key: str, length: int) -> Answer:
        return self._call("get_tail", key, lambda: self._inner.get_tail(key, length))

    def put(self, key: str, source: bytes | Path, *, if_absent: bool = True) -> str:
        return self._call("put", key, lambda: self._inner.put(key, source, if_absent=if_absent))

    def delete(self, key: str) -> None:
        self._call("delete", key, lambda: self._inner.delete(key))

    def copy_ranges(self, key: str, pieces: Sequence[bytes | CopyRange], *, if_absent: bool = True) -> str:
        return self._call("copy_ranges", key, lambda: self._inner.copy_ranges(key, pieces, if_absent=if_absent))

    def close(self) -> None:
        self._inner.close()

    def _call(self, method: str, key: str, call: Callable[[], R]) -> R:
        with self._lock:
            word = self._words.pop(0) if len(self._words) > 1 else self._words[0]
            self.calls.append((method, key, word))
        if word == "ok":
            return call()
        if word == "lost-answer":
            call()
        raise _fault(word, method, key)


def _fault(word: str, method: str, key: str) -> StoreError:
    what = f"{method} {key!r}: scripted fault {word!r}"
    if word == "503":
        return Throttled(what)
    if word == "short":
        return BadAnswer(what)
    if word == "412":
        return (ObjectExists if method in ("put", "copy_ranges") else ObjectReplaced)(what)
    return StoreUnavailable(what)
