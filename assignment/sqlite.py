"""The catalog of one machine, in a SQLite file. Any number of processes may have it open.

Writers take the write lock when they begin (BEGIN IMMEDIATE), so that a transaction which has started never fails for
want of it, and what a statement reads is what it commits upon. Tasks of one process queue for it in turn; processes
poll for it, for `busy_timeout_s` at most.

A commit survives a power failure: rollback journal, synchronous=EXTRA (which also syncs the directory after the
journal's unlink, https://www.sqlite.org/pragma.html#pragma_synchronous). Not WAL: with several connections its reset
race can corrupt the file in SQLite 3.7.0 to 3.51.2 (https://www.sqlite.org/wal.html, "The WAL-Reset Bug"), which is
what distributions ship, and the few transactions a second of a packer do not need its speed.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, NullPool, Table, create_engine, event, insert
from sqlalchemy.dialects.sqlite import Insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from assignment.errors import AssignmentError, CatalogCorrupt, CatalogTooNew, CatalogUnavailable
from assignment.schema import SCHEMA_VERSION, metadata, revision_name, revision_table
from assignment.sql import SqlCatalog
from assignment.sql_connection import count_connections, to_the_end

APPLICATION_ID = 0x44455343  # "DESC" in the file's header: this is a catalog, and no other SQLite file

_TEMPORARY = {  # https://www.sqlite.org/rescode.html: what may pass without anybody repairing the file
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_AUTH,
}


class SqliteCatalog(SqlCatalog):
    """`assignment.catalog.Catalog` in the file `path`; an async context manager, or `open` and `close`.

    One event loop, any number of its tasks. A call whose caller was cancelled goes on, and takes effect or fails.
    """

    row_locks = False

    def __init__(self, path: Path, *, busy_timeout_s: float = 10.0) -> None:
        super().__init__(str(path))
        self.path = path
        self._busy_timeout_s = busy_timeout_s
        self._turn = asyncio.Lock()  # SQLite's own queue polls, and is not fair

    async def open(self) -> None:
        """Make the file and its tables if they are not there, and bring older ones up to date. The directory has to be.

        Raises CatalogUnavailable; CatalogCorrupt when the file is something else; CatalogTooNew.
        """
        if self._engine is not None:
            return
        await self._ensure_schema()
        self._engine = create_async_engine(
            URL.create("sqlite+aiosqlite", database=str(self.path)),
            connect_args={"timeout": self._busy_timeout_s},
            pool_timeout=self._busy_timeout_s,
            hide_parameters=True,  # in messages
        )
        _listen(self._engine.sync_engine)
        count_connections(self._engine)

    # With the plain driver: aiosqlite's thread dies with a traceback when connecting fails and the loop ends.

    @to_the_end
    async def _ensure_schema(self) -> None:
        await asyncio.to_thread(self._ensure_schema_blocking)

    @to_the_end
    async def migrate(self, revision: str = "head") -> None:
        await asyncio.to_thread(self._migrate_blocking, revision)

    def _ensure_schema_blocking(self) -> None:
        engine = self._plain_engine()
        with self.translated():
            with engine.connect() as connection:
                connection.execution_options(read_only=True)
                if self._stamped_version(connection) == SCHEMA_VERSION:
                    return
            with engine.begin() as connection:
                version = self._stamped_version(connection)  # still: another process may have been faster
                if version == 0:
                    # Not by the migrations, which give the same: most catalogs are new, and Alembic's import is slow.
                    metadata.create_all(connection)
                    self._stamp_revision(connection, SCHEMA_VERSION)
                    self._stamp_version(connection, SCHEMA_VERSION)
                elif version < SCHEMA_VERSION:
                    self._migrate_tables(connection, version, "head")

    def _migrate_blocking(self, revision: str) -> None:
        with self.translated(), self._plain_engine().begin() as connection:
            self._migrate_tables(connection, self._stamped_version(connection), revision)

    def _migrate_tables(self, connection: Connection, version: int, revision: str) -> None:
        from assignment.migrations import migrate_tables

        if version == 1:  # the first catalogs know nothing of Alembic
            self._stamp_revision(connection, version)
        self._stamp_version(connection, migrate_tables(connection, self.label, revision))

    def _plain_engine(self) -> Engine:
        engine = create_engine(
            URL.create("sqlite", database=str(self.path)),
            connect_args={"timeout": self._busy_timeout_s},
            poolclass=NullPool,
        )
        _listen(engine)
        return engine

    def _stamp_version(self, connection: Connection, version: int) -> None:
        connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.exec_driver_sql(f"PRAGMA user_version = {version}")

    def _stamp_revision(self, connection: Connection, version: int) -> None:
        revision_table.create(connection, checkfirst=True)
        connection.execute(revision_table.delete())
        connection.execute(insert(revision_table).values(version_num=revision_name(version)))

    def _stamped_version(self, connection: Connection) -> int:
        """The version of the tables, 0 if there are none."""
        application_id = int(connection.exec_driver_sql("PRAGMA application_id").scalar_one())
        version = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
        if application_id == APPLICATION_ID and version == 0:  # migrated down to nothing
            return 0
        if application_id == 0 and version == 0:
            tables = connection.exec_driver_sql("SELECT count(*) FROM sqlite_schema").scalar_one()
            if tables == 0:
                return 0
        if application_id != APPLICATION_ID or version < 1:
            raise CatalogCorrupt(
                f"{self.path}: found a SQLite file with application id {application_id:#x} and version {version}, "
                f"want a catalog ({APPLICATION_ID:#x}) or an empty file"
            )
        if version > SCHEMA_VERSION:
            raise CatalogTooNew(f"{self.path}: found a catalog of version {version}, want {SCHEMA_VERSION} or older")
        return version

    def _upsert(self, table: Table) -> Insert:
        return sqlite_insert(table)

    @asynccontextmanager
    async def _write_turn(self) -> AsyncIterator[None]:
        async with self._turn:
            yield

    def _meaning(self, error: Exception) -> AssignmentError | None:
        cause = error.orig if isinstance(error, DBAPIError) else error
        if not isinstance(error, DBAPIError | sqlite3.Error):  # plain ones come from `_configure`
            return None
        code = getattr(cause, "sqlite_errorcode", None)
        if code is None or code & 0xFF in _TEMPORARY:  # the low byte of an extended code is the primary one
            return CatalogUnavailable(f"{self.path}: {cause}")
        return CatalogCorrupt(f"{self.path}: {cause}")


def _listen(engine: Engine) -> None:
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)


def _configure(connection: Any, _: object) -> None:
    """For each new connection: transactions are begun by `_begin` alone, not by the driver's guess."""
    try:
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in ("journal_mode = DELETE", "synchronous = EXTRA", "foreign_keys = ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()
    except BaseException:
        connection.close()  # the pool does not know of it yet
        raise


def _begin(connection: Any) -> None:
    read_only = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
