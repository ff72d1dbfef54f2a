"""What a packer has done. Pure but for the metrics."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

import structlog

from desfs import metrics

log = structlog.get_logger(__name__)


class Failure(NamedTuple):
    """What went wrong, and when."""

    at: datetime
    what: str


@dataclass(slots=True)
class Summary:
    """What a packer has done so far. `left` are the files that it found and could not take, by why; `emptied` the
    folders that it took files from; `recent` what failed last."""

    files: int = 0
    bytes: int = 0
    containers: int = 0
    external: int = 0
    rejected: int = 0
    merged: int = 0
    left: dict[str, int] = field(default_factory=dict)
    failures: deque[str] = field(default_factory=lambda: deque(maxlen=100))
    emptied: set[str] = field(default_factory=set)
    recent: deque[Failure] = field(default_factory=lambda: deque(maxlen=5))

    def count(self, sizes: list[int], big_file_threshold: int) -> None:
        """Add a container that was committed, by the sizes of its files in bytes."""
        self.containers += 1
        self.files += len(sizes)
        self.bytes += sum(sizes)
        self.external += sum(each >= big_file_threshold for each in sizes)
        metrics.PACKED_FILES.inc(len(sizes))
        metrics.PACKED_BYTES.inc(sum(sizes))
        metrics.PACKED_CONTAINERS.inc()

    def fail(self, message: str) -> None:
        """Remember, once, what could not be done."""
        if message not in self.failures:
            self.failures.append(message)
            self.note_failure(message)
            log.warning("left for later", reason=message)

    def note_failure(self, message: str) -> None:
        """Remember it among the last ones, which others are shown."""
        self.recent.append(Failure(datetime.now(UTC), message))
