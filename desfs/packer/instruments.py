"""What a packer shows of its event loop. Asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from importlib.metadata import version

from desfs import metrics

INTERVAL_S = 1.0


@contextlib.asynccontextmanager
async def watched_loop() -> AsyncIterator[None]:
    """Measure how late the loop is, while the body runs."""
    metrics.BUILD.info({"version": version("desfs"), "levers": "no", "role": "packer"})
    watcher = asyncio.create_task(_watch())
    try:
        yield
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher  # what has ended it before, unexpectedly, is raised


async def _watch() -> None:
    turned = time.monotonic()
    metrics.LOOP_SILENCE.set_function(lambda: time.monotonic() - turned)
    while True:
        due = time.monotonic() + INTERVAL_S
        await asyncio.sleep(INTERVAL_S)
        turned = time.monotonic()
        metrics.LOOP_LAG.observe(max(turned - due, 0.0))
