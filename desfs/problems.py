"""What is wrong in the store, or with a cache, for `/.desfs/problems`: nothing that is left out or refused stays
unsaid."""

from __future__ import annotations

import threading

import structlog

from desfs import metrics

log = structlog.get_logger(__name__)

_KEPT = 1000  # lines; a damaged bucket must not fill the memory


class Problems:
    """Lines by the thing they are about; each is kept and logged once. Any thread."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, str], None] = {}
        self._dropped = 0
        self._lock = threading.Lock()

    def report(self, about: str, what: str) -> None:
        """Note a problem of `about` (a container's key, a day)."""
        about = _text(about)
        with self._lock:
            if (about, what) in self._lines:
                return
            if len(self._lines) >= _KEPT:
                self._dropped += 1
                return
            self._lines[about, what] = None
        metrics.PROBLEMS.inc()
        log.warning("problem", about=about, problem=what)

    def clear(self, about: str) -> None:
        """Forget what was noted of a thing that is not there any more."""
        about = _text(about)
        with self._lock:
            self._lines = {line: None for line in self._lines if line[0] != about}

    def lines(self) -> list[str]:
        """`about: what`, in the order of their coming."""
        with self._lock:
            lines = [what if what.startswith(about) else f"{about}: {what}" for about, what in self._lines]
            if self._dropped:
                lines.append(f"and {self._dropped} more that were not kept")
            return lines


def _text(about: str) -> str:
    """Keys that are not UTF-8 cannot go into a log as they are."""
    return about.encode("utf-8", "backslashreplace").decode()
