"""From a URL to the catalog that it names."""

from __future__ import annotations

from pathlib import Path

from assignment.catalog import Catalog
from assignment.errors import InvalidRequest
from assignment.sql import SqlCatalog

_SQLITE = ("sqlite:///", "sqlite+aiosqlite:///")


def catalog_at(url: str) -> SqlCatalog:
    """The catalog that a URL or a plain path names, not open yet.

    `sqlite:///PATH` (an absolute path has four slashes then) or a plain path: a file of this machine;
    `postgresql://USER@HOST:PORT/DATABASE`: a Postgres server. Raises InvalidRequest for anything else.
    """
    for prefix in _SQLITE:
        if url.startswith(prefix):
            return _sqlite(url.removeprefix(prefix))
    scheme, separator, _ = url.partition("://")
    if not separator:
        return _sqlite(url)
    if scheme not in ("postgresql", "postgresql+asyncpg"):
        raise InvalidRequest(
            f"catalog: found a URL of scheme {scheme!r}, want a path, sqlite:///PATH or postgresql://HOST/DATABASE"
        )
    from assignment.postgres import PostgresCatalog  # the embedded catalog does without asyncpg

    return PostgresCatalog(url)


def _sqlite(path: str) -> SqlCatalog:
    if path in ("", ":memory:"):
        raise InvalidRequest(f"catalog: found {path!r}, want the path of a file")
    from assignment.sqlite import SqliteCatalog

    return SqliteCatalog(Path(path))


async def open_catalog(url: str) -> Catalog:
    """The catalog that a URL or a plain path names (`catalog_at`), open; the caller closes it.

    A file is made if it is not there, and brought up to date; a Postgres database has to be (`migrate`). Raises
    InvalidRequest, CatalogUnavailable, CatalogCorrupt, CatalogTooNew, CatalogTooOld.
    """
    catalog = catalog_at(url)
    await catalog.open()
    return catalog


async def migrate(url: str, revision: str = "head") -> None:
    """Bring a catalog's tables up or down to a revision; `base` drops them, with all that is in them.

    Raises InvalidRequest, also for a revision that there is not; CatalogUnavailable, CatalogCorrupt, CatalogTooNew.
    """
    await catalog_at(url).migrate(revision)
