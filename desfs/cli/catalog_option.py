"""The catalog that a command is given."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from assignment.catalog import Catalog
from assignment.opening import open_catalog
from desfs.adoption import check_store
from desfs.errors import UsageError
from desfs.layout import read_layout
from desfs.settings import CatalogSettings
from desfs.store.base import Store

_FILES = ("sqlite:///", "sqlite+aiosqlite:///")


def catalog_url(settings: CatalogSettings, *, create: bool = False) -> str:
    """The catalog's URL. A file that is not there is a typing error, unless it may be made.

    Raises: UsageError.
    """
    if settings.catalog is None:
        raise UsageError("--catalog is missing: the catalog of the store's packers, or DESFS_CATALOG for it")
    url = settings.catalog.get_secret_value()
    path = next((url.removeprefix(prefix) for prefix in _FILES if url.startswith(prefix)), url)
    if not create and "://" not in path and not os.path.exists(path):
        raise UsageError(f"--catalog {path}: no such file")
    return url


@asynccontextmanager
async def opened_catalog(url: str, store: Store) -> AsyncIterator[Catalog]:
    """The catalog of a store, closed at the end. Raises: UsageError when it is another store's; StoreError;
    AssignmentError."""
    catalog = await open_catalog(url)
    try:
        await check_store(catalog, store.url, await asyncio.to_thread(read_layout, store))
        yield catalog
    finally:
        await catalog.close()
