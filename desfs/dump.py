"""The state of a mount, written to its log when somebody asks: what waits, and for what. Trio thread only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import structlog
import trio

from desfs.fs import FileSystem

log = structlog.get_logger(__name__)

_REQUESTS = 100  # named one by one, the oldest first


def dump_state(fs: FileSystem) -> None:
    """Log open requests with their age, tasks by what they wait in, caches, memory in flight and the link."""
    requests = fs.requests.all()
    log.info("state: requests", **fs.requests.state())
    for request in requests[:_REQUESTS]:
        log.info("state: open request", operation=request.operation, age_s=round(request.age_s, 3))
    root = trio.lowlevel.current_root_task()
    places = Counter(_place(task) for task in ([] if root is None else _tasks(root)))
    for (name, place), count in sorted(places.items()):
        log.info("state: tasks", name=name, waits_in=place, count=count)
    log.info(
        "state: caches",
        pieces=len(fs.fetcher.cache),
        bytes=fs.fetcher.cache.bytes,
        bytes_in_flight=fs.fetcher.bytes_in_flight,
        **fs.caches.state(),
    )
    link = fs.threads.meter.link()
    log.info("state: link", latency_s=round(link.latency_s, 4), bytes_per_second=round(link.bandwidth))
    log.info("state: problems", count=len(fs.problems.lines()))


def _tasks(task: trio.lowlevel.Task) -> Iterator[trio.lowlevel.Task]:
    yield task
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield from _tasks(child)


def _place(task: trio.lowlevel.Task) -> tuple[str, str]:
    """The task's name, and the innermost line of this package that it is in."""
    place = "?"
    for frame, line in task.iter_await_frames():
        module = frame.f_globals.get("__name__", "")
        if place == "?" or module.startswith("desfs."):
            place = f"{module}:{line}"
    return task.name, place
