"""A packer from its start to its end: spool, store, catalog, signals. Asyncio."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack

import structlog

from assignment.client import AssignmentClient, open_embedded
from desfs import metrics
from desfs.adoption import check_store
from desfs.errors import UsageError
from desfs.layout import Layout
from desfs.packer.announce import Announcer
from desfs.packer.instruments import watched_loop
from desfs.packer.layout import settle_layout
from desfs.packer.summary import Summary
from desfs.packer.worker import Packer
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
    shared = settings.catalog is not None
    spool.join(shared=shared)
    try:
        return asyncio.run(_run(spool, store_url, settings, shared, once, progress, effect))
    finally:
        spool.leave()


async def _run(
    spool: Spool,
    store_url: str,
    settings: PackerSettings,
    shared: bool,
    once: bool,
    progress: Callable[[Summary, int], None],
    effect: Callable[[str], None],
) -> Summary:
    store = open_store(store_url, settings.s3_options(), deadline_s=settings.deadline, create=True)
    try:
        layout = await asyncio.to_thread(settle_layout, store, settings.shard_bits, settings.naming)
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(await _open_client(spool, settings, layout))
            await check_store(client.catalog, store.url, layout)
            announcer = None
            if settings.redis is not None:
                announcer = Announcer(settings.redis.get_secret_value(), store.url)
                await stack.enter_async_context(announcer)
            packer = Packer(
                spool,
                store,
                client,
                layout,
                settings,
                shared=shared,
                announcer=announcer,
                effect=effect,
                progress=progress,
            )
            _stop_at_signals(packer)
            if settings.metrics is not None:
                metrics.serve(settings.metrics, metrics.PROCESS, metrics.STORE, metrics.PACKER)
                await stack.enter_async_context(watched_loop())
            if once:
                return await packer.run_once()
            log.info("packing", spool=str(spool.root), store=store.url, worker=spool.place.name)
            return await packer.run()
    finally:
        store.close()


async def _open_client(spool: Spool, settings: PackerSettings, layout: Layout) -> AssignmentClient:
    """The embedded catalog of the spool, or the one that is named, with the service that is.

    Raises: UsageError; AssignmentError.
    """
    if settings.catalog is None:
        if settings.assignment is not None:
            raise UsageError("--assignment needs --catalog: containers are committed there, not by the service")
        return await open_embedded(
            spool.internal / "catalog.sqlite",
            shard_bits=layout.shard_bits,
            timezone=settings.timezone,
            node_id=settings.node_id,
        )
    from assignment.connect import open_client, read_token  # with what an embedded catalog has no need of

    return await open_client(
        settings.catalog.get_secret_value(),
        shard_bits=layout.shard_bits,
        timezone=settings.timezone,
        holder=spool.place.name,
        service_url=settings.assignment,
        token=read_token(settings.assignment_token_file),
        ca_bundle=settings.ca_bundle,
        deadline_s=settings.deadline,
    )


def _stop_at_signals(packer: Packer) -> None:
    """The first SIGTERM or SIGINT stops a packer, a second one of either kind ends it at once: its journals stay."""
    loop = asyncio.get_running_loop()
    is_stopping = False

    def stop() -> None:
        nonlocal is_stopping
        for number in _ENDING:
            # Not KeyboardInterrupt, which would wait for threads that wait for the store.
            signal.signal(number, signal.SIG_DFL)
        if is_stopping:  # the second came before the loop had looked at the first
            os.kill(os.getpid(), signal.SIGTERM)
        is_stopping = True
        packer.stop()

    for number in _ENDING:
        loop.add_signal_handler(number, stop)
