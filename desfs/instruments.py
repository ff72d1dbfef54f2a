"""What a mount shows of its state: gauges that are read when somebody asks, and a look at the event loop. Trio."""

from __future__ import annotations

import time
from importlib.metadata import version

import trio

from desfs import metrics
from desfs.fs import FileSystem
from desfs.levers import LEVERS

INTERVAL_S = 1.0


def say_what_runs() -> None:
    """Fill in the build's series, when the mount has answered."""
    levers = "yes" if LEVERS.report()["in_force"] else "no"
    metrics.BUILD.info({"version": version("desfs"), "levers": levers, "role": "mount"})


async def watch(fs: FileSystem) -> None:
    """Keep the gauges of a mount true, until cancelled. They are read by another thread, while this one may hang: what
    it reads there are single numbers, or copies made in one step."""
    metrics.OPEN_REQUESTS.set_function(lambda: len(fs.requests.all()))
    metrics.OLDEST_REQUEST.set_function(lambda: fs.requests.state()["oldest_seconds"])
    metrics.FETCH_BYTES.set_function(lambda: fs.fetcher.bytes_in_flight)
    metrics.CACHE_LIMIT.labels("memory").set_function(lambda: fs.settings.memory)
    metrics.CACHE_BYTES.labels("memory").set_function(lambda: fs.fetcher.cache.bytes)
    metrics.OPEN_CONTAINERS.set_function(lambda: len(fs.views.slots))
    disk = fs.caches.disk
    if disk is not None:
        metrics.CACHE_LIMIT.labels("disk").set_function(lambda: disk.state()["max_bytes"])
        metrics.CACHE_BYTES.labels("disk").set_function(lambda: disk.state()["bytes"])
    turned = time.monotonic()
    metrics.LOOP_SILENCE.set_function(lambda: time.monotonic() - turned)
    while True:
        due = trio.current_time() + INTERVAL_S
        await trio.sleep_until(due)
        turned = time.monotonic()
        metrics.LOOP_LAG.observe(trio.current_time() - due)
