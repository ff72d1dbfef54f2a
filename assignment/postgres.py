"""The catalog of many machines, in a Postgres database. Any number of processes may have it open.

Transactions are READ COMMITTED, and lock the row of the shard or node that they are about (`assignment.sql`). The
server ends a transaction whose client has stopped in the middle of it (`idle_in_transaction_session_timeout`): a packer
that is paused keeps nobody waiting for longer than a statement may take.

The tables are made and changed by `desfs catalog migrate` alone, so that a new program beside old ones changes nothing
by being started.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import asyncpg
from sqlalchemy import NullPool, Table, select, text
from sqlalchemy.dialects.postgresql import Insert
from sqlalchemy.dialects.postgresql import insert as postgres_insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from assignment.errors import (
    AssignmentError,
    CatalogCorrupt,
    CatalogTooNew,
    CatalogTooOld,
    CatalogUnavailable,
    InvalidRequest,
)
from assignment.schema import MIGRATE_COMMAND, SCHEMA_VERSION, revision_name, revision_table
from assignment.sql import SqlCatalog
from assignment.sql_connection import count_connections, to_the_end

SCHEMES = ("postgresql", "postgresql+asyncpg")

# "desfscat": who migrates the tables of a database holds the advisory lock of this number.
_MIGRATION_LOCK = 0x6465736673636174
# A migration may have to wait for all who use the tables, and to rewrite them.
_MIGRATE_TIMEOUT_S = 600.0
# The server speaks first; this much later the client stops waiting for it.
_ANSWER_LATE_S = 2.0

# https://www.postgresql.org/docs/current/errcodes-appendix.html, by code or class (the first two characters).
_BROKEN = ("XX001", "XX002")  # data and index corrupted
_NO_SUCH_TABLE = ("42P01", "42703")  # or column
_BAD_REQUEST = ("22", "23")  # a value that does not fit, a rule that it breaks


class PostgresCatalog(SqlCatalog):
    """`assignment.catalog.Catalog` in the database of a `postgresql://` URL; an async context manager, or `open` and
    `close`.

    What the URL leaves open comes from where libpq takes it (PGPASSWORD, ~/.pgpass and so on). One event loop, any
    number of its tasks, of which `pool_size` work at once and the others wait. A call whose caller was cancelled goes
    on, and takes effect or fails.

    Whatever the server says but that the request is wrong is CatalogUnavailable, refused passwords and databases that
    are not there too: somebody may put it right while the program waits.
    """

    row_locks = True

    def __init__(
        self, url: str, *, pool_size: int = 5, connect_timeout_s: float = 10.0, command_timeout_s: float = 15.0
    ) -> None:
        """A statement may take `command_timeout_s`, as may the wait for a free connection.

        Raises InvalidRequest for a URL that is none of Postgres.
        """
        self._dsn, label = _parse_url(url)
        super().__init__(label)
        self._pool_size = pool_size
        self._connect_timeout_s = connect_timeout_s
        self._command_timeout_s = command_timeout_s

    async def open(self) -> None:
        """Connect, and see that the tables are those that this program knows.

        Raises CatalogUnavailable; CatalogTooOld, also when there are no tables; CatalogTooNew; InvalidRequest.
        """
        if self._engine is not None:
            return
        engine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=lambda: self._connect(self._command_timeout_s),
            isolation_level="READ COMMITTED",  # what the locks are made for, whatever the server's default is
            hide_parameters=True,  # in messages
            pool_size=self._pool_size,
            max_overflow=0,
            pool_timeout=self._command_timeout_s,
            pool_pre_ping=True,  # a server that was restarted is found out before a transaction is lost to it
        )
        count_connections(engine)
        try:
            with self.translated():
                async with engine.connect() as connection:
                    await self._check_version(connection)
        except BaseException:
            await engine.dispose()
            raise
        self._engine = engine

    @to_the_end
    async def migrate(self, revision: str = "head") -> None:
        from assignment.migrations import migrate_tables

        engine: AsyncEngine = create_async_engine(
            "postgresql+asyncpg://", async_creator=lambda: self._connect(_MIGRATE_TIMEOUT_S), poolclass=NullPool
        )
        with self.translated():
            async with engine.begin() as connection:
                await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
                await connection.run_sync(migrate_tables, self.label, revision)

    async def _connect(self, command_timeout_s: float) -> Any:
        timeout_ms = str(round(command_timeout_s * 1000))
        return await asyncpg.connect(
            self._dsn,
            timeout=self._connect_timeout_s,
            command_timeout=command_timeout_s + _ANSWER_LATE_S,
            server_settings={
                "application_name": "desfs",
                "synchronous_commit": "on",  # a commit is durable when it returns, whatever the server's default
                "statement_timeout": timeout_ms,
                "idle_in_transaction_session_timeout": timeout_ms,
            },
        )

    async def _check_version(self, connection: AsyncConnection) -> None:
        found = (await connection.execute(select(revision_table.c.version_num))).scalar_one_or_none()
        wanted = revision_name(SCHEMA_VERSION)
        if found is None or found < wanted:
            raise CatalogTooOld(
                f"{self.label}: found a catalog of revision {found or 'none'}, want {wanted}: run `{MIGRATE_COMMAND}`"
            )
        if found > wanted:
            raise CatalogTooNew(f"{self.label}: found a catalog of revision {found}, want {wanted} or older")

    def _upsert(self, table: Table) -> Insert:
        return postgres_insert(table)

    def _meaning(self, error: Exception) -> AssignmentError | None:
        # SQLAlchemy wraps what asyncpg raises, and that is the cause of what it wraps; a connection that breaks, and
        # a time that is over, come as they are.
        cause: BaseException | None = error
        if isinstance(error, DBAPIError):
            cause = error.orig.__cause__ if error.orig is not None and error.orig.__cause__ is not None else error.orig
        if isinstance(cause, TimeoutError):
            return CatalogUnavailable(f"{self.label}: no answer in time")
        if isinstance(cause, OSError | asyncpg.InternalClientError):
            return CatalogUnavailable(f"{self.label}: {cause}")
        if not isinstance(cause, asyncpg.PostgresError | asyncpg.InterfaceError):
            return None
        code = getattr(cause, "sqlstate", None) or ""
        if code in _NO_SUCH_TABLE:
            return CatalogTooOld(f"{self.label}: {cause}: run `{MIGRATE_COMMAND}`")
        if code in _BROKEN:
            return CatalogCorrupt(f"{self.label}: {cause}")
        if code[:2] in _BAD_REQUEST or isinstance(cause, ValueError):  # asyncpg's own word for values and settings
            return InvalidRequest(f"{self.label}: {cause}")
        return CatalogUnavailable(f"{self.label}: {cause}")


def _parse_url(url: str) -> tuple[str, str]:
    """The URL as asyncpg wants it, and as messages show it: without password and options."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # its text may have part of a password in it
        raise InvalidRequest("catalog: found a postgresql URL with a bad host or port") from None
    if parts.scheme not in SCHEMES:
        raise InvalidRequest(f"catalog: found a URL of scheme {parts.scheme!r}, want postgresql")
    user = f"{parts.username}@" if parts.username else ""
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    label = f"postgresql://{user}{host}{'' if port is None else f':{port}'}{parts.path}"
    return parts._replace(scheme="postgresql").geturl(), label
