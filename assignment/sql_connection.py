"""The life of a catalog in a SQL database: connections, transactions, and what its errors mean."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar

from sqlalchemy import (
    Select,
    Table,
    event,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry

from assignment import metrics
from assignment.errors import (
    AssignmentError,
    CatalogUnavailable,
    InvalidRequest,
)
from assignment.schema import metadata

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql, sqlite

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C", bound="SqlConnection")


def to_the_end(
    method: Callable[Concatenate[C, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[C, P], Coroutine[Any, Any, T]]:
    """Cancelling the caller does not stop the call: a connection that is abandoned while it works cannot be told what
    became of the transaction, and aiosqlite 0.22 leaves its thread behind. `close` waits for such calls."""

    @wraps(method)
    async def call(self: C, /, *args: P.args, **kwargs: P.kwargs) -> T:
        task = asyncio.create_task(method(self, *args, **kwargs))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # else asyncio reports it as lost
        return await asyncio.shield(task)

    return call


def count_connections(engine: AsyncEngine) -> None:
    """Have the metrics tell how many connections of an engine there are, and how many are at work."""
    at_work: set[ConnectionPoolEntry] = set()
    opened, used = (metrics.CATALOG_CONNECTIONS.labels(state) for state in ("open", "used"))

    @event.listens_for(engine.sync_engine, "connect")
    def connected(*_: object) -> None:
        opened.inc()

    @event.listens_for(engine.sync_engine, "close")
    def closed(*_: object) -> None:
        opened.dec()

    @event.listens_for(engine.sync_engine, "checkout")
    def checked_out(_: object, record: ConnectionPoolEntry, *__: object) -> None:
        at_work.add(record)
        used.set(len(at_work))

    @event.listens_for(engine.sync_engine, "checkin")
    def checked_in(_: object, record: ConnectionPoolEntry) -> None:
        # It comes also for one that could not be connected, and was never checked out.
        at_work.discard(record)
        used.set(len(at_work))


class SqlConnection(ABC):
    """A catalog in a SQL database, before what is in it; an async context manager, or `open` and `close`.

    One event loop, any number of its tasks. A call whose caller was cancelled goes on, and takes effect or fails.
    """

    row_locks: ClassVar[bool]
    """Whether transactions that write run side by side, and have to lock rows. (SQLite leaves FOR UPDATE out.)"""

    def __init__(self, label: str) -> None:
        """`label` is what messages call the catalog: no secrets in it."""
        self.label = label
        self._engine: AsyncEngine | None = None
        self._calls: set[asyncio.Task[Any]] = set()

    @abstractmethod
    async def open(self) -> None:
        """Connect, and see that the tables are those that this program knows.

        Raises CatalogUnavailable, CatalogCorrupt, CatalogTooNew, CatalogTooOld, InvalidRequest.
        """

    @abstractmethod
    async def migrate(self, revision: str = "head") -> None:
        """Bring the tables up or down to a revision (`base`: none). The catalog need not be open; others may be.

        Raises InvalidRequest for a revision that there is not; CatalogUnavailable, CatalogCorrupt, CatalogTooNew.
        """

    @abstractmethod
    def _upsert(self, table: Table) -> sqlite.Insert | postgresql.Insert:
        """The database's own INSERT, which knows ON CONFLICT."""

    @abstractmethod
    def _meaning(self, error: Exception) -> AssignmentError | None:
        """What an error of the driver or of SQLAlchemy means to the caller; None when it is none of theirs."""

    async def _lock(self, connection: AsyncConnection, rows: Select[Any]) -> None:
        """Wait until nobody else changes these rows, and keep others from it to the end of the transaction."""
        if self.row_locks:
            await connection.execute(rows.with_for_update())

    async def lock_all(self, connection: AsyncConnection) -> None:
        """The same for all rows, those too that are not there yet. For this package alone."""
        if self.row_locks:
            names = ", ".join(table.name for table in metadata.sorted_tables)
            await connection.exec_driver_sql(f"LOCK TABLE {names} IN EXCLUSIVE MODE")

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

    def _open_engine(self) -> AsyncEngine:
        if self._engine is None:
            raise CatalogUnavailable(f"{self.label}: the catalog is not open")
        return self._engine

    def reading(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A connection for one SELECT: several need not see one state of the catalog. For this package alone."""
        return self._transaction(read_only=True)

    def writing(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A transaction, committed when the block ends without an exception. For this package alone."""
        return self._transaction(read_only=False)

    @asynccontextmanager
    async def _transaction(self, *, read_only: bool) -> AsyncIterator[AsyncConnection]:
        engine = self._open_engine()
        with self.translated():
            if read_only:
                async with engine.connect() as connection:
                    await connection.execution_options(read_only=True)
                    yield connection
            else:
                async with self._write_turn(), engine.begin() as connection:
                    yield connection

    @asynccontextmanager
    async def _write_turn(self) -> AsyncIterator[None]:
        """What a task waits for before its transaction begins."""
        yield

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Foreign errors in the block leave it as this package's."""
        try:
            yield
        except AssignmentError:
            raise
        except IntegrityError as error:
            raise InvalidRequest(f"{self.label}: refused by the catalog's rules: {_cause(error)}") from error
        except PoolTimeout as error:
            raise CatalogUnavailable(f"{self.label}: all connections are in use, and none came free") from error
        except Exception as error:
            meaning = self._meaning(error)
            if meaning is not None:
                raise meaning from error
            if isinstance(error, SQLAlchemyError | OverflowError | UnicodeError):
                raise InvalidRequest(f"{self.label}: {error}") from error
            raise


def _cause(error: SQLAlchemyError) -> object:
    """The driver's own error: SQLAlchemy's text has the statement and its values in it."""
    original = getattr(error, "orig", None)
    return getattr(original, "__cause__", None) or original or error
