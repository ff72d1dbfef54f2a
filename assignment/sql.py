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

from collections.abc import Collection, Sequence
from datetime import date, datetime
from typing import TYPE_CHECKING

from sqlalchemy import (
    ColumnElement,
    delete,
    exists,
    func,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from assignment.catalog import LIVE, ContainerRecord, ContainerState, DaySummary, Lease, ShardHolder
from assignment.errors import (
    AssignmentError,
    ContainerExists,
    ContainersChanged,
    InvalidRequest,
    LeaseLost,
)
from assignment.rows import (
    batches,
    check_shard,
    container_values,
    expiry,
    greater,
    holds,
    in_shard,
    instant,
    lease_of,
    no_longer,
    of_shard,
    record_of,
    summaries_of,
    unlocked,
)
from assignment.schema import DatabaseNowMs, bound_store, container, shard_lease
from des_format.shards import hex_group, parse_container_name, part_name

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql, sqlite

from assignment.sql_connection import to_the_end
from assignment.sql_ids import SqlIds


class SqlCatalog(SqlIds):
    """`assignment.catalog.Catalog` in a SQL database; an async context manager, or `open` and `close`.

    One event loop, any number of its tasks. A call whose caller was cancelled goes on, and takes effect or fails.
    """

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
    async def list_holders(self, day: date | None = None, *, latest: int | None = None) -> list[ShardHolder]:
        columns = shard_lease.c
        holds = (columns.expires_at_ms > DatabaseNowMs()).label("holds")
        statement = select(columns.day, columns.shard, columns.holder, columns.token, columns.expires_at_ms, holds)
        if day is not None:
            statement = statement.where(columns.day == day)
        if latest is not None:
            statement = statement.order_by(columns.expires_at_ms.desc()).limit(latest)
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
    async def begin_container(
        self, lease: Lease, object_key: str, generation: int, *, mark: str = ""
    ) -> ContainerRecord:
        folder, _, file_name = object_key.rpartition("/")
        parsed = parse_container_name(file_name)
        if folder != str(lease.day) or parsed is None or parsed.group != hex_group(lease.shard):
            raise InvalidRequest(f"{object_key}: want a container of the lease's {lease.day}/{lease.shard}")
        async with self.writing() as connection:
            # A part that is begun under a name of its own must not come again from `begin_part`.
            await self._prove(connection, lease, greater(shard_lease.c.next_generation, generation + 1))
            return await self._begin(connection, lease, object_key, generation, mark)

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
    async def summarize_days(self, latest: int) -> list[DaySummary]:
        columns, older = container.c, container.alias("older").c
        # One step down the index for each day, as in `list_days`, but in one statement; after the oldest comes NULL. Of
        # 800,000 rows of 1,000 days it reads those of the latest 30: seen with SQLite 3.40 and Postgres 15, whose
        # planner has to have looked at the table once (autovacuum), and takes it for small before.
        newest = select(func.max(columns.day).label("day"), literal(1).label("number")).where(
            columns.state != ContainerState.DELETED
        )
        days = newest.cte("days", recursive=True)
        before = select(func.max(older.day)).where(older.day < days.c.day, older.state != ContainerState.DELETED)
        days = days.union_all(
            select(before.scalar_subquery(), days.c.number + 1).where(days.c.number < latest, days.c.day.is_not(None))
        )
        statement = (
            select(
                columns.day,
                columns.state,
                func.count().label("containers"),
                func.sum(columns.files).label("files"),
                func.sum(columns.size).label("size"),
            )
            .join(days, days.c.day == columns.day)
            .where(columns.state != ContainerState.DELETED)
            .group_by(columns.day, columns.state)
        )
        async with self.reading() as connection:
            rows = (await connection.execute(statement)).all()
        return summaries_of(rows)

    @to_the_end
    async def forget_deleted(self, older_than_s: float) -> int:
        old = select(container.c.object_key).where(
            container.c.state == ContainerState.DELETED, container.c.changed_at_ms <= expiry(-older_than_s)
        )
        statement = delete(container).where(container.c.object_key.in_(unlocked(old)))
        async with self.writing() as connection:
            return (await connection.execute(statement)).rowcount

    @to_the_end
    async def bind_store(self, store_id: str) -> str:
        statement = self._upsert(bound_store).values(number=0, id=store_id).on_conflict_do_nothing()
        async with self.writing() as connection:
            await connection.execute(statement)
            return str((await connection.execute(select(bound_store.c.id))).scalar_one())

    @to_the_end
    async def now(self) -> datetime:
        async with self.reading() as connection:
            return instant((await connection.execute(select(DatabaseNowMs()))).scalar_one())
