"""The requests that the kernel waits for: which, and for how long. One thread, but for looking at them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import NamedTuple


class OpenRequest(NamedTuple):
    """A request that has not been answered, and how long it has been waiting."""

    operation: str
    age_s: float


class OpenRequests:
    """Requests between their arrival and their answer. `clock` gives seconds, ascending."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._numbers = itertools.count()
        self._open: dict[int, tuple[str, float]] = {}  # the oldest first
        self._idle: Callable[[], None] | None = None

    def begin(self, operation: str) -> int:
        """A request has come; its number, for `end`."""
        number = next(self._numbers)
        self._open[number] = operation, self._clock()
        return number

    def end(self, number: int) -> float:
        """It has been answered; seconds since it came."""
        _, began = self._open.pop(number)
        if not self._open and self._idle is not None:
            self._idle()
        return self._clock() - began

    def when_idle(self, call: Callable[[], None]) -> None:
        """Call it whenever the last open request is answered, and now if there is none."""
        self._idle = call
        if not self._open:
            call()

    def oldest(self) -> OpenRequest | None:
        """The one that has been waiting longest."""
        return next(iter(self.all()), None)

    def all(self) -> list[OpenRequest]:
        """All of them, the oldest first. Any thread."""
        now = self._clock()
        return [OpenRequest(operation, now - began) for operation, began in list(self._open.values())]

    def state(self, *, but_youngest: bool = False) -> dict[str, float]:
        """For the statistics; those who are just being told do not want to hear of themselves."""
        found = self.all()[: -1 if but_youngest else None]
        return {"open": len(found), "oldest_seconds": round(found[0].age_s, 3) if found else 0.0}
