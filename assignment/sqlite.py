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
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, date, datetime, timedelta
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    NullPool,
    Row,
    and_,
    case,
    create_engine,
    event,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from assignment.catalog import ContainerRecord, ContainerState, Lease
from assignment.errors import (
    AssignmentError,
    CatalogCorrupt,
    CatalogTooNew,
    CatalogUnavailable,
    ContainerExists,
    InvalidRequest,
    LeaseLost,
)
from assignment.schema import SCHEMA_VERSION, DatabaseNowMs, container, id_sequence, metadata, shard_lease
from assignment.sequence import IdBlock, SequenceState, reserve

APPLICATION_ID = 0x44455343  # "DESC" in the file's header: this is a catalog, and no other SQLite file

P = ParamSpec("P")
T = TypeVar("T")

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
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


def _to_the_end(
    method: Callable[Concatenate[SqliteCatalog, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[SqliteCatalog, P], Coroutine[Any, Any, T]]:
    """Cancelling the caller does not stop the call: a connection that is abandoned while its thread works cannot be
    told what became of the transaction, and aiosqlite 0.22 leaves the thread behind. `close` waits for such calls."""

    @wraps(method)
    async def call(self: SqliteCatalog, /, *args: P.args, **kwargs: P.kwargs) -> T:
        task = asyncio.create_task(method(self, *args, **kwargs))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # else asyncio reports it as lost
        return await asyncio.shield(task)

    return call


class SqliteCatalog:
    """`assignment.catalog.Catalog` in the file `path`; an async context manager, or `open` and `close`.

    One event loop, any number of its tasks. A call whose caller was cancelled goes on, and takes effect or fails.
    """

    def __init__(self, path: Path, *, busy_timeout_s: float = 10.0) -> None:
        self.path = path
        self._busy_timeout_s = busy_timeout_s
        self._engine: AsyncEngine | None = None
        self._calls: set[asyncio.Task[Any]] = set()
        self._write_turn = asyncio.Lock()  # SQLite's own queue polls, and is not fair

    async def open(self) -> None:
        """Make the file and its tables if they are not there. The directory has to be.

        Raises CatalogUnavailable; CatalogCorrupt when the file is something else; CatalogTooNew.
        """
        if self._engine is not None:
            return
        await self._ensure_schema()
        self._engine = create_async_engine(
            URL.create("sqlite+aiosqlite", database=str(self.path)),
            connect_args={"timeout": self._busy_timeout_s},
            pool_timeout=self._busy_timeout_s,
        )
        _listen(self._engine.sync_engine)

    async def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.gather(*self._calls, return_exceptions=True)
            await engine.dispose()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @_to_the_end
    async def _ensure_schema(self) -> None:
        # With the plain driver: aiosqlite's thread dies with a traceback when connecting fails and the loop ends.
        await asyncio.to_thread(self._ensure_schema_blocking)

    def _ensure_schema_blocking(self) -> None:
        engine = create_engine(
            URL.create("sqlite", database=str(self.path)),
            connect_args={"timeout": self._busy_timeout_s},
            poolclass=NullPool,
        )
        _listen(engine)
        with self._translated():
            with engine.connect() as connection:
                connection.execution_options(read_only=True)
                if self._stamped_version(connection) == SCHEMA_VERSION:
                    return
            with engine.begin() as connection:
                if self._stamped_version(connection) == 0:  # still: another process may have been faster
                    metadata.create_all(connection)
                    connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
                    connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _stamped_version(self, connection: Connection) -> int:
        """The version of the tables, 0 if the file is empty."""
        application_id = int(connection.exec_driver_sql("PRAGMA application_id").scalar_one())
        version = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
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

    def _open_engine(self) -> AsyncEngine:
        if self._engine is None:
            raise CatalogUnavailable(f"{self.path}: the catalog is not open")
        return self._engine

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[AsyncConnection]:
        """A connection that sees one state of the catalog; other statements than SELECT do not belong here."""
        engine = self._open_engine()
        with self._translated():
            async with engine.connect() as connection:
                await connection.execution_options(read_only=True)
                yield connection

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that has the write lock from its start, committed when the block ends without an exception."""
        engine = self._open_engine()  # before the turn comes: `close` waits for those who wait for it
        with self._translated():
            async with self._write_turn, engine.begin() as connection:
                yield connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except AssignmentError:
            raise
        except IntegrityError as error:
            raise InvalidRequest(f"{self.path}: refused by the catalog's rules: {error.orig}") from error
        except PoolTimeout as error:
            raise CatalogUnavailable(f"{self.path}: no connection within {self._busy_timeout_s} s") from error
        except (DBAPIError, sqlite3.Error) as error:  # plain ones come from `_configure`
            cause = error.orig if isinstance(error, DBAPIError) else error
            code = getattr(cause, "sqlite_errorcode", None)
            if code is None or code & 0xFF in _TEMPORARY:  # the low byte of an extended code is the primary one
                raise CatalogUnavailable(f"{self.path}: {cause}") from error
            raise CatalogCorrupt(f"{self.path}: {cause}") from error
        except (SQLAlchemyError, OverflowError) as error:
            raise InvalidRequest(f"{self.path}: {error}") from error

    @_to_the_end
    async def acquire(
        self, day: date, shard: str, holder: str, ttl_s: float, *, first_generation: int = 1
    ) -> Lease | None:
        lease = shard_lease.c
        fresh = sqlite_insert(shard_lease).values(
            day=day,
            shard=shard,
            holder=holder,
            token=1,
            expires_at_ms=_expiry(ttl_s),
            next_generation=first_generation,
        )
        statement = fresh.on_conflict_do_update(
            index_elements=[lease.day, lease.shard],
            set_={
                "previous_holder": lease.holder,
                "previous_token": lease.token,
                "holder": fresh.excluded.holder,
                "token": lease.token + 1,
                "expires_at_ms": fresh.excluded.expires_at_ms,
                "next_generation": _greater(lease.next_generation, first_generation),
            },
            where=(lease.expires_at_ms <= DatabaseNowMs()) | (lease.holder == fresh.excluded.holder),
        ).returning(*lease)
        async with self._writing() as connection:
            row = (await connection.execute(statement)).one_or_none()
        return None if row is None else _lease(row)

    @_to_the_end
    async def renew(self, lease: Lease, ttl_s: float) -> Lease | None:
        statement = (
            update(shard_lease).where(_holds(lease)).values(expires_at_ms=_expiry(ttl_s)).returning(*shard_lease.c)
        )
        async with self._writing() as connection:
            row = (await connection.execute(statement)).one_or_none()
        return None if row is None else _lease(row)

    @_to_the_end
    async def release(self, lease: Lease) -> None:
        async with self._writing() as connection:
            await connection.execute(update(shard_lease).where(_holds(lease)).values(expires_at_ms=DatabaseNowMs()))

    @_to_the_end
    async def next_generation(self, lease: Lease, *, at_least: int = 1) -> int:
        statement = (
            update(shard_lease)
            .where(_holds(lease))
            .values(next_generation=_greater(shard_lease.c.next_generation, at_least) + 1)
            .returning(shard_lease.c.next_generation)
        )
        async with self._writing() as connection:
            following = (await connection.execute(statement)).scalar_one_or_none()
        if following is None:
            raise LeaseLost(_no_longer(lease))
        return int(following) - 1

    @_to_the_end
    async def commit_container(self, lease: Lease, record: ContainerRecord) -> None:
        if (record.day, record.shard) != (lease.day, lease.shard):
            raise InvalidRequest(
                f"{record.object_key}: found a container of {record.day}/{record.shard}, "
                f"want one of the lease's {lease.day}/{lease.shard}"
            )
        values: dict[str, ColumnElement[Any]] = {
            "object_key": literal(record.object_key),
            "day": shard_lease.c.day,
            "shard": shard_lease.c.shard,
            "generation": literal(record.generation),
            "size": literal(record.size),
            "files": literal(record.files),
            "etag": literal(record.etag),
            "token": shard_lease.c.token,
            "state": literal(str(record.state)),
            "created_at_ms": DatabaseNowMs(),
        }
        held = select(*values.values()).where(_holds(lease))
        statement = insert(container).from_select(list(values), held).returning(container.c.object_key)
        async with self._writing() as connection:
            try:
                written = (await connection.execute(statement)).one_or_none()
            except IntegrityError as error:
                if getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY:
                    raise ContainerExists(f"{record.object_key}: is committed already") from error
                raise
        if written is None:
            raise LeaseLost(_no_longer(lease))

    @_to_the_end
    async def find_container(self, object_key: str) -> ContainerRecord | None:
        async with self._reading() as connection:
            statement = select(container).where(container.c.object_key == object_key)
            row = (await connection.execute(statement)).one_or_none()
        return None if row is None else _record(row)

    @_to_the_end
    async def list_containers(self, day: date | None = None) -> list[ContainerRecord]:
        columns = container.c
        statement = select(container).order_by(columns.day, columns.shard, columns.generation, columns.object_key)
        if day is not None:
            statement = statement.where(columns.day == day)
        async with self._reading() as connection:
            return [_record(row) for row in await connection.execute(statement)]

    @_to_the_end
    async def reserve_ids(self, node_id: int, day: date, count: int, now_ms: int) -> IdBlock:
        columns = id_sequence.c
        of_node = and_(columns.node_id == node_id, columns.day == day)
        async with self._writing() as connection:
            row = (
                await connection.execute(select(columns.last_ms, columns.next_sequence).where(of_node))
            ).one_or_none()
            state = None if row is None else SequenceState(row.last_ms, row.next_sequence)
            state, block = reserve(state, node_id=node_id, day=day, now_ms=now_ms, count=count)
            saved = {"last_ms": state.last_ms, "next_sequence": state.next_sequence}
            if row is None:
                await connection.execute(insert(id_sequence).values(node_id=node_id, day=day, **saved))
            else:
                await connection.execute(update(id_sequence).where(of_node).values(**saved))
        return block


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


def _expiry(ttl_s: float) -> ColumnElement[int]:
    return DatabaseNowMs() + round(ttl_s * 1000)


def _holds(lease: Lease) -> ColumnElement[bool]:
    """The lease's row, if nobody else has acquired it since and it has not expired: proof of ownership, by token."""
    columns = shard_lease.c
    return and_(
        columns.day == lease.day,
        columns.shard == lease.shard,
        columns.token == lease.token,
        columns.expires_at_ms > DatabaseNowMs(),
    )


def _greater(column: ColumnElement[int], least: int) -> ColumnElement[int]:
    return case((column > least, column), else_=least)


def _no_longer(lease: Lease) -> str:
    return f"{lease.day}/{lease.shard}: the lease of {lease.holder!r} with token {lease.token} does not hold any more"


def _instant(unix_ms: int) -> datetime:
    return _EPOCH + timedelta(milliseconds=unix_ms)


def _lease(row: Row[Any]) -> Lease:
    return Lease(
        day=row.day,
        shard=row.shard,
        holder=row.holder,
        token=row.token,
        expires_at=_instant(row.expires_at_ms),
        previous_token=row.previous_token,
        previous_holder=row.previous_holder,
    )


def _record(row: Row[Any]) -> ContainerRecord:
    return ContainerRecord(
        object_key=row.object_key,
        day=row.day,
        shard=row.shard,
        generation=row.generation,
        size=row.size,
        files=row.files,
        etag=row.etag,
        state=ContainerState(row.state),
        token=row.token,
        created_at=_instant(row.created_at_ms),
    )
