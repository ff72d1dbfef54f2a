"""The leases of commands that work on a store beside its packers. Asyncio."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from datetime import date
from functools import partial

from assignment.catalog import Catalog, Lease
from desfs.merging.leases import held
from desfs.settings import CatalogSettings

Held = Callable[[date, str], AbstractAsyncContextManager[Lease]]


def holding(catalog: Catalog, settings: CatalogSettings, command: str) -> Held:
    """What gives the lease of a shard, waited for as the settings say, for as long as a block lasts (`held`)."""
    # A name that no other process has: two that are at work on one shard must not take it from each other.
    holder = f"{socket.gethostname()}:{os.getpid()}:{command}"
    return partial(held, catalog, holder=holder, ttl_s=settings.lease_ttl, wait_s=settings.wait)
