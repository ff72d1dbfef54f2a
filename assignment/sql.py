"""What the catalogs in SQL databases have in common: the statements, and the life of a catalog object.

Every change of a shard is one transaction that first has the shard to itself (SQLite: the write lock; Postgres: a lock
on the shard's row), and then proves the lease in a statement of its own, which reads token and clock after that wait.
Nobody can acquire the shard before the transaction ends, so what follows the proof needs none.

The proof is not left to the statement that waits. In READ COMMITTED, Postgres evaluates the condition of an UPDATE
again after waiting for a row only when the row was changed meanwhile (https://www.postgresql.org/docs/15/
transaction-iso.html, 13.2.1): behind a transaction that only locked it, or was rolled back, a lease that has passed
would still hold. `acquire` is one statement nevertheless: INSERT ... ON CONFLICT DO UPDATE locks the row that is there
before it looks at its WHERE. (Seen with Postgres 15 for both: tests/contract/test_postgres.py.)
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from datetime import date, datetime
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar

from sqlalchemy import (
    ColumnElement,
    Select,
    Table,
    and_,
    case,
    delete,
    exists,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from assignment.catalog import LIVE, ContainerRecord, ContainerState, Lease, NodeLease, ShardHolder, Worker
from assignment.errors import (
    AssignmentError,
    CatalogUnavailable,
    ContainerExists,
    ContainersChanged,
    InvalidRequest,
    LeaseLost,
    NodeIdLost,
)
from assignment.rows import (
    batches,
    check_shard,
    container_values,
    expiry,
    greater,
    holds,
    holds_node,
    in_shard,
    instant,
    lease_of,
    no_longer,
    node_lease_of,
    of_shard,
    record_of,
    unlocked,
)
from assignment.schema import DatabaseNowMs, container, id_sequence, metadata, node, shard_lease, worker
from assignment.sequence import IdBlock, SequenceState, reserve
from des_format.shards import hex_group, parse_container_name, part_name

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql, sqlite

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C", bound="SqlCatalog")

_NODES = 256  # what the 8 bits of a name's node field hold


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


class SqlCatalog(ABC):
    """`assignment.catalog.Catalog` in a SQL database; an async context manager, or `open` and `close`.

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

    # Leases

    @to_the_end
    async def acquire(
        self, day: date, shard: str, holder: str, ttl_s: float, *, first_generation: int = 1
    ) -> Lease | None:
        lease = shard_lease.c
        fresh = self._upsert(shard_lease).values(
            day=day,
            shard=shard,
            holder=holder,
            token=1,
            expires_at_ms=expiry(ttl_s),
            next_generation=first_generation,
        )
        statement = fresh.on_conflict_do_update(
            index_elements=[lease.day, lease.shard],
            set_={
                "previous_holder": lease.holder,
                "previous_token": lease.token,
                "holder": fresh.excluded.holder,
                "token": lease.token + 1,
                # Not `excluded.expires_at_ms`, for which the clock was read before the wait.
                "expires_at_ms": expiry(ttl_s),
                "next_generation": greater(lease.next_generation, first_generation),
            },
            where=or_(lease.expires_at_ms <= DatabaseNowMs(), lease.holder == fresh.excluded.holder),
        ).returning(*lease)
        async with self.writing() as connection:
            row = (await connection.execute(statement)).one_or_none()
        return None if row is None else lease_of(row)

    @to_the_end
    async def renew(self, lease: Lease, ttl_s: float) -> Lease | None:
        statement = (
            update(shard_lease).where(holds(lease)).values(expires_at_ms=expiry(ttl_s)).returning(*shard_lease.c)
        )
        async with self.writing() as connection:
            await self._lock_shard(connection, lease)
            row = (await connection.execute(statement)).one_or_none()
        return None if row is None else lease_of(row)

    @to_the_end
    async def release(self, lease: Lease) -> None:
        async with self.writing() as connection:
            await self._lock_shard(connection, lease)
            await connection.execute(update(shard_lease).where(holds(lease)).values(expires_at_ms=DatabaseNowMs()))

    @to_the_end
    async def list_holders(self, day: date | None = None) -> list[ShardHolder]:
        columns = shard_lease.c
        holds = (columns.expires_at_ms > DatabaseNowMs()).label("holds")
        statement = select(columns.day, columns.shard, columns.holder, columns.token, columns.expires_at_ms, holds)
        if day is not None:
            statement = statement.where(columns.day == day)
        async with self.reading() as connection:
            rows = (await connection.execute(statement)).all()
        holders = [
            ShardHolder(row.day, row.shard, row.holder, row.token, instant(row.expires_at_ms), bool(row.holds))
            for row in rows
        ]
        # Here and below not ORDER BY: a Postgres has the order of the language that it was made for.
        return sorted(holders, key=lambda holder: (holder.day, holder.shard))

    async def _lock_shard(self, connection: AsyncConnection, lease: Lease) -> None:
        await self._lock(connection, select(shard_lease.c.token).where(of_shard(lease)))

    async def _prove(
        self,
        connection: AsyncConnection,
        lease: Lease,
        next_generation: ColumnElement[int] = shard_lease.c.next_generation,
    ) -> int:
        """Have the shard to oneself, prove the lease, and set the generation that comes next, which is returned."""
        await self._lock_shard(connection, lease)
        statement = (
            update(shard_lease)
            .where(holds(lease))
            .values(next_generation=next_generation)
            .returning(shard_lease.c.next_generation)
        )
        following = (await connection.execute(statement)).scalar_one_or_none()
        if following is None:
            raise LeaseLost(no_longer(lease))
        return int(following)

    # Containers

    @to_the_end
    async def begin_part(self, lease: Lease, *, at_least: int = 1, mark: str = "") -> ContainerRecord:
        async with self.writing() as connection:
            following = await self._prove(
                connection, lease, greater(shard_lease.c.next_generation, at_least) + literal(1)
            )
            generation = following - 1
            key = f"{lease.day}/{part_name(lease.shard, generation)}"
            return await self._begin(connection, lease, key, generation, mark)

    @to_the_end
    async def begin_container(self, lease: Lease, object_key: str, generation: int) -> ContainerRecord:
        folder, _, file_name = object_key.rpartition("/")
        parsed = parse_container_name(file_name)
        if folder != str(lease.day) or parsed is None or parsed.group != hex_group(lease.shard):
            raise InvalidRequest(f"{object_key}: want a container of the lease's {lease.day}/{lease.shard}")
        async with self.writing() as connection:
            # A part that is begun under a name of its own must not come again from `begin_part`.
            await self._prove(connection, lease, greater(shard_lease.c.next_generation, generation + 1))
            return await self._begin(connection, lease, object_key, generation)

    async def _begin(
        self, connection: AsyncConnection, lease: Lease, object_key: str, generation: int, mark: str = ""
    ) -> ContainerRecord:
        record = ContainerRecord(
            object_key=object_key,
            day=lease.day,
            shard=lease.shard,
            generation=generation,
            state=ContainerState.UPLOADING,
            mark=mark,
        )
        row = (
            await connection.execute(self._put_container().returning(*container.c), container_values(lease, record))
        ).one_or_none()
        if row is None:
            raise ContainerExists(f"{object_key}: is committed already")
        return record_of(row)

    def _put_container(self) -> sqlite.Insert | postgresql.Insert:
        """A row for a container, or in place of one that is not the content of a day, nor was."""
        fresh = self._upsert(container).values(changed_at_ms=DatabaseNowMs())
        names = [column.name for column in container.c if not column.primary_key]
        return fresh.on_conflict_do_update(
            index_elements=[container.c.object_key],
            set_={name: fresh.excluded[name] for name in names},
            # Not in_(), whose length SQLAlchemy settles per execution, and not for many rows at once.
            where=or_(container.c.state == ContainerState.UPLOADING, container.c.state == ContainerState.DELETED),
        )

    @to_the_end
    async def commit_container(
        self, lease: Lease, record: ContainerRecord, *, supersedes: Collection[str] = ()
    ) -> None:
        check_shard(lease, record)
        if record.state not in LIVE:
            raise InvalidRequest(f"{record.object_key}: found state {record.state} to commit, want committed or sealed")
        if record.object_key in supersedes:
            raise InvalidRequest(f"{record.object_key}: cannot supersede itself")
        columns = container.c
        commit = (
            update(container)
            .where(
                columns.object_key == record.object_key,
                in_shard(lease),
                columns.state == ContainerState.UPLOADING,
                columns.token == lease.token,
                exists().where(holds(lease)),
            )
            .values(
                state=record.state,
                size=record.size,
                files=record.files,
                etag=record.etag,
                changed_at_ms=DatabaseNowMs(),
            )
        )
        async with self.writing() as connection:
            await self._lock_shard(connection, lease)
            if (await connection.execute(commit)).rowcount == 0:
                raise await self._why_not_committed(connection, lease, record)
            superseded = 0
            for keys in batches(set(supersedes)):
                statement = (
                    update(container)
                    .where(columns.object_key.in_(keys), in_shard(lease), columns.state.in_(LIVE))
                    .values(state=ContainerState.SUPERSEDED, changed_at_ms=DatabaseNowMs())
                )
                superseded += (await connection.execute(statement)).rowcount
            if superseded != len(set(supersedes)):  # and with the exception all of the transaction is undone
                raise ContainersChanged(
                    f"{record.object_key}: found {superseded} of {len(set(supersedes))} containers to supersede live"
                )

    async def _why_not_committed(
        self, connection: AsyncConnection, lease: Lease, record: ContainerRecord
    ) -> AssignmentError:
        held = select(exists().where(holds(lease)))
        if not (await connection.execute(held)).scalar_one():
            return LeaseLost(no_longer(lease))
        found = select(container.c.state, container.c.token).where(container.c.object_key == record.object_key)
        row = (await connection.execute(found)).one_or_none()
        if row is None or row.state == ContainerState.DELETED:
            return InvalidRequest(f"{record.object_key}: was not begun")
        if row.state != ContainerState.UPLOADING:
            return ContainerExists(f"{record.object_key}: is committed already")
        if row.token == lease.token:  # the clock went back between two statements
            return LeaseLost(no_longer(lease))
        return InvalidRequest(
            f"{record.object_key}: was begun under token {row.token}, and not under the lease's {lease.token}"
        )

    @to_the_end
    async def delete_containers(self, lease: Lease, object_keys: Collection[str]) -> None:
        async with self.writing() as connection:
            await self._prove(connection, lease)
            for keys in batches(set(object_keys)):
                statement = (
                    update(container)
                    .where(
                        container.c.object_key.in_(keys),
                        in_shard(lease),
                        container.c.state != ContainerState.DELETED,  # its time goes on
                    )
                    .values(state=ContainerState.DELETED, changed_at_ms=DatabaseNowMs())
                )
                await connection.execute(statement)

    @to_the_end
    async def adopt_containers(self, lease: Lease, records: Sequence[ContainerRecord]) -> None:
        for record in records:
            check_shard(lease, record)
        behind = 1 + max((record.generation for record in records), default=0)
        async with self.writing() as connection:
            await self._prove(connection, lease, greater(shard_lease.c.next_generation, behind))
            if records:
                await connection.execute(self._put_container(), [container_values(lease, record) for record in records])

    @to_the_end
    async def find_container(self, object_key: str) -> ContainerRecord | None:
        async with self.reading() as connection:
            statement = select(container).where(container.c.object_key == object_key)
            row = (await connection.execute(statement)).one_or_none()
        return None if row is None else record_of(row)

    @to_the_end
    async def list_containers(
        self, day: date | None = None, *, shard: str | None = None, states: Collection[ContainerState] | None = None
    ) -> list[ContainerRecord]:
        statement = select(container)
        if day is not None:
            statement = statement.where(container.c.day == day)
        if shard is not None:
            statement = statement.where(container.c.shard == shard)
        if states is not None:
            statement = statement.where(container.c.state.in_(states))
        async with self.reading() as connection:
            records = [record_of(row) for row in await connection.execute(statement)]
        return sorted(records, key=lambda record: (record.day, record.shard, record.generation, record.object_key))

    @to_the_end
    async def list_days(self, *, latest: int | None = None) -> list[date]:
        there = select(container.c.day).where(container.c.state != ContainerState.DELETED)
        async with self.reading() as connection:
            if latest is None:
                return sorted((await connection.execute(there.distinct())).scalars())
            # One step down the index for each: DISTINCT would read every row of every day for the last two.
            days: list[date] = []
            while len(days) < latest:
                older = there if not days else there.where(container.c.day < days[-1])
                day = (await connection.execute(older.order_by(container.c.day.desc()).limit(1))).scalar_one_or_none()
                if day is None:
                    break
                days.append(day)
            return days[::-1]

    @to_the_end
    async def forget_deleted(self, older_than_s: float) -> int:
        old = select(container.c.object_key).where(
            container.c.state == ContainerState.DELETED, container.c.changed_at_ms <= expiry(-older_than_s)
        )
        statement = delete(container).where(container.c.object_key.in_(unlocked(old)))
        async with self.writing() as connection:
            return (await connection.execute(statement)).rowcount

    @to_the_end
    async def now(self) -> datetime:
        async with self.reading() as connection:
            return instant((await connection.execute(select(DatabaseNowMs()))).scalar_one())

    # Workers

    @to_the_end
    async def heartbeat(self, name: str, spool: str, details: Mapping[str, Any], ttl_s: float) -> None:
        try:
            text = json.dumps(dict(details))
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"details of worker {name!r}: {error}") from error
        fresh = self._upsert(worker).values(
            name=name, spool=spool, details=text, started_at_ms=DatabaseNowMs(), expires_at_ms=expiry(ttl_s)
        )
        statement = fresh.on_conflict_do_update(
            index_elements=[worker.c.name],
            set_={
                "spool": fresh.excluded.spool,
                "details": fresh.excluded.details,
                "started_at_ms": case(
                    (worker.c.expires_at_ms > DatabaseNowMs(), worker.c.started_at_ms), else_=DatabaseNowMs()
                ),
                "expires_at_ms": expiry(ttl_s),
            },
        )
        async with self.writing() as connection:
            await connection.execute(statement)

    @to_the_end
    async def list_workers(self, *, forget_after_s: float = 86400.0) -> list[Worker]:
        old = select(worker.c.name).where(worker.c.expires_at_ms <= expiry(-forget_after_s))
        statement = select(worker, (worker.c.expires_at_ms > DatabaseNowMs()).label("alive"))
        async with self.writing() as connection:
            await connection.execute(delete(worker).where(worker.c.name.in_(unlocked(old))))
            rows = (await connection.execute(statement)).all()
        workers = [
            Worker(
                name=row.name,
                spool=row.spool,
                details=json.loads(row.details),
                started_at=instant(row.started_at_ms),
                expires_at=instant(row.expires_at_ms),
                alive=bool(row.alive),
            )
            for row in rows
        ]
        return sorted(workers, key=lambda worker: worker.name)

    @to_the_end
    async def remove_worker(self, name: str) -> None:
        async with self.writing() as connection:
            await connection.execute(delete(worker).where(worker.c.name == name))

    # Ids

    @to_the_end
    async def lease_node_id(self, holder: str, ttl_s: float) -> NodeLease | None:
        free = node.alias("free")
        longest = (
            select(free.c.node_id)
            .where(free.c.expires_at_ms <= DatabaseNowMs())
            .order_by(free.c.expires_at_ms, free.c.node_id)
            .limit(1)
        )
        take = (
            update(node)
            .where(node.c.node_id == unlocked(longest).scalar_subquery())
            .values(holder=holder, token=node.c.token + 1, expires_at_ms=expiry(ttl_s))
            .returning(*node.c)
        )
        async with self.writing() as connection:
            if (await connection.execute(select(node.c.node_id).limit(1))).first() is None:
                # In one order, so that two who do it at once wait for one another, and not each for the other.
                unused = [{"node_id": n, "holder": "", "token": 0, "expires_at_ms": 0} for n in range(_NODES)]
                await connection.execute(self._upsert(node).on_conflict_do_nothing(), unused)
            row = (await connection.execute(take)).one_or_none()
        return None if row is None else node_lease_of(row)

    @to_the_end
    async def renew_node_id(self, lease: NodeLease, ttl_s: float) -> NodeLease | None:
        statement = update(node).where(holds_node(lease)).values(expires_at_ms=expiry(ttl_s)).returning(*node.c)
        async with self.writing() as connection:
            await self._lock_node(connection, lease)
            row = (await connection.execute(statement)).one_or_none()
        return None if row is None else node_lease_of(row)

    @to_the_end
    async def release_node_id(self, lease: NodeLease) -> None:
        async with self.writing() as connection:
            await self._lock_node(connection, lease)
            await connection.execute(update(node).where(holds_node(lease)).values(expires_at_ms=DatabaseNowMs()))

    async def _lock_node(self, connection: AsyncConnection, lease: NodeLease) -> None:
        await self._lock(connection, select(node.c.token).where(node.c.node_id == lease.node_id))

    @to_the_end
    async def reserve_ids(self, node: NodeLease | int, day: date, count: int, now_ms: int) -> IdBlock:
        node_id = node if isinstance(node, int) else node.node_id
        columns = id_sequence.c
        of_node = and_(columns.node_id == node_id, columns.day == day)
        start = self._upsert(id_sequence).values(node_id=node_id, day=day, last_ms=0, next_sequence=0)
        saved = select(columns.last_ms, columns.next_sequence).where(of_node).with_for_update()
        async with self.writing() as connection:
            if isinstance(node, NodeLease):
                await self._lock_node(connection, node)
                held = select(exists().where(holds_node(node)))
                if not (await connection.execute(held)).scalar_one():
                    raise NodeIdLost(f"node {node_id}: the lease with token {node.token} does not hold any more")
            row = (await connection.execute(saved)).one_or_none()
            if row is None:
                # Of two who are the day's first, the second goes on behind the first.
                await connection.execute(start.on_conflict_do_nothing())
                row = (await connection.execute(saved)).one()
            state, block = reserve(
                SequenceState(row.last_ms, row.next_sequence), node_id=node_id, day=day, now_ms=now_ms, count=count
            )
            await connection.execute(
                update(id_sequence).where(of_node).values(last_ms=state.last_ms, next_sequence=state.next_sequence)
            )
        return block


def _cause(error: SQLAlchemyError) -> object:
    """The driver's own error: SQLAlchemy's text has the statement and its values in it."""
    original = getattr(error, "orig", None)
    return getattr(original, "__cause__", None) or original or error
