"""A packer from its start to its end: spool, store, catalog, signals. Asyncio."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable

import structlog

from assignment.client import open_embedded
from desfs.errors import UsageError
from desfs.packer.layout import settle_layout
from desfs.packer.worker import Packer, Summary
from desfs.settings import PackerSettings
from desfs.spool import Spool
from desfs.store import open_store
from desfs.store.url import local_root

log = structlog.get_logger(__name__)

_ENDING = (signal.SIGTERM, signal.SIGINT)


def run_packer(
    spool_path: str,
    store_url: str,
    settings: PackerSettings,
    *,
    once: bool,
    progress: Callable[[Summary, int], None] = lambda summary, waiting: None,
    effect: Callable[[str], None] = lambda name: None,
) -> Summary:
    """Pack a spool into a store: once, or until SIGTERM or SIGINT, which end it after the batch at hand.

    Raises: UsageError; StoreError; AssignmentError; OSError.
    """
    spool = Spool(
        spool_path,
        settle_s=settings.settle,
        max_file_size=settings.max_file_size,
        temporary=[pattern for pattern in map(str.strip, settings.temporary.split(",")) if pattern],
        effect=effect,
    )
    root = local_root(store_url)
    if root is not None and root.resolve().is_relative_to(spool.root.resolve()):
        raise UsageError(f"the store {store_url} is inside the spool {spool_path}: its containers would be packed")
    spool.lock()
    try:
        return asyncio.run(_run(spool, store_url, settings, once, progress, effect))
    finally:
        spool.unlock()


async def _run(
    spool: Spool,
    store_url: str,
    settings: PackerSettings,
    once: bool,
    progress: Callable[[Summary, int], None],
    effect: Callable[[str], None],
) -> Summary:
    store = open_store(store_url, settings.s3_options(), deadline_s=settings.deadline, create=True)
    try:
        layout = await asyncio.to_thread(settle_layout, store, settings.shard_bits, settings.naming)
        client = await open_embedded(
            spool.internal / "catalog.sqlite",
            shard_bits=layout.shard_bits,
            timezone=settings.timezone,
            node_id=settings.node_id,
        )
        async with client:
            if not settings.holder:
                settings = settings.model_copy(update={"holder": f"{socket.gethostname()}:{spool.root}"})
            packer = Packer(spool, store, client, layout, settings, effect=effect, progress=progress)
            loop = asyncio.get_running_loop()

            def stop() -> None:
                packer.stop()
                for number in _ENDING:
                    loop.remove_signal_handler(number)
                    # A second one, of either kind, ends the packer at once: its journals stay. Not KeyboardInterrupt,
                    # which would wait for threads that wait for the store.
                    signal.signal(number, signal.SIG_DFL)

            for number in _ENDING:
                loop.add_signal_handler(number, stop)
            if once:
                return await packer.run_once()
            log.info("packing", spool=str(spool.root), store=store.url)
            return await packer.run()
    finally:
        store.close()
