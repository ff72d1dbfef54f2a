"""Several tasks at a time, and the one error that comes of them. Trio."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import trio


async def in_parallel(calls: Iterable[Callable[[], Any]]) -> None:
    """Run all; the first failure cancels the rest and is raised as itself, not in a group."""
    jobs = list(calls)
    if len(jobs) == 1:
        await jobs[0]()
        return
    try:
        async with trio.open_nursery() as nursery:
            for job in jobs:
                nursery.start_soon(job)
    except ExceptionGroup as group:
        raise first_of(group) from None


def first_of(group: ExceptionGroup[Exception]) -> Exception:
    """One plain exception out of a group."""
    error: Exception = group
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
