"""What a check finds, and how a check is kept from taking too long. No I/O of its own."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import NoReturn, TypeVar

T = TypeVar("T")


class State(Enum):
    """What a finding means to somebody who wants to mount or to pack."""

    OK = "ok"
    WARNING = "warning"  # it works, but less well, or not for everybody
    ERROR = "error"  # a mount or a packer fails on it
    SKIPPED = "skipped"  # could not be looked at, since something else is missing


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: its name, what was found, and what to do about it, a command where there is one."""

    check: str
    state: State
    found: str
    remedy: str = ""


def ok(check: str, found: str) -> Finding:
    return Finding(check, State.OK, found)


def warning(check: str, found: str, remedy: str) -> Finding:
    return Finding(check, State.WARNING, found, remedy)


def error(check: str, found: str, remedy: str) -> Finding:
    return Finding(check, State.ERROR, found, remedy)


def skipped(check: str, reason: str) -> Finding:
    return Finding(check, State.SKIPPED, reason)


class TooLate(Exception):
    """A call has not come back within its time."""


class Budget:
    """Time for a series of calls: `each_s` for one of them, `total_s` for all from now on."""

    def __init__(self, each_s: float, total_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.each_s = each_s
        self._clock = clock
        self._ends = clock() + total_s

    @property
    def left_s(self) -> float:
        """What the next call may take."""
        return max(0.0, min(self.each_s, self._ends - self._clock()))


def in_time(call: Callable[[], T], budget: Budget) -> T:
    """The call's result. Raises: TooLate, and the call goes on in a thread that nobody waits for: what it does must not
    matter then; whatever the call raises."""
    limit_s = budget.left_s
    if limit_s <= 0:
        raise TooLate("no time is left for it")
    done: queue.SimpleQueue[Callable[[], T]] = queue.SimpleQueue()

    def run() -> None:
        try:
            value = call()
        except Exception as error:
            done.put(partial(_fail, error))
        else:
            done.put(lambda: value)

    # A daemon: the resolver of the C library, say, takes no time limit, and must not keep the program from ending.
    threading.Thread(target=run, name="doctor", daemon=True).start()
    try:
        result = done.get(timeout=limit_s)
    except queue.Empty:
        raise TooLate(f"no answer within {limit_s:.2g} s") from None
    return result()


def _fail(error: Exception) -> NoReturn:
    raise error


def in_parallel(
    series: dict[str, Callable[[], Iterator[Finding]]], total_s: float, *, finishing: Collection[str] = ()
) -> Iterator[Finding]:
    """The findings of several series of checks that run at the same time, series by series in the order given. One that
    is not done after `total_s`, or that fails by itself, says so in a finding under its name. Those that are
    `finishing` are let come to their end even when nobody wants the findings any more: they clean up there."""
    deadline = time.monotonic() + total_s
    found: dict[str, queue.SimpleQueue[Finding | Exception | None]] = {name: queue.SimpleQueue() for name in series}

    def run(name: str) -> None:
        try:
            for finding in series[name]():
                found[name].put(finding)
        except Exception as error:
            found[name].put(error)
        else:
            found[name].put(None)

    for name in series:
        is_daemon = name not in finishing
        threading.Thread(target=run, args=(name,), name=f"doctor {name}", daemon=is_daemon).start()
    for name, findings in found.items():
        while True:
            try:
                finding = findings.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                yield error(
                    name, f"the checks are not done after {total_s:g} s", "look at the last check above this line"
                )
                break
            if finding is None:
                break
            if isinstance(finding, Exception):
                yield error(
                    name,
                    f"the checks ended with {type(finding).__name__}: {finding}",
                    "report this as a defect of desfs, with the output of `desfs doctor --json`",
                )
                break
            yield finding
