"""What is special to the catalog in Postgres: waiting for locks, a server that goes away, what errors mean."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import asyncpg
import pytest

from assignment.catalog import Lease
from assignment.errors import (
    AssignmentError,
    CatalogCorrupt,
    CatalogTooNew,
    CatalogTooOld,
    CatalogUnavailable,
    InvalidRequest,
    LeaseLost,
    NodeIdLost,
)
from assignment.opening import migrate, open_catalog
from assignment.postgres import PostgresCatalog
from tests.contract.catalog_contract import DAY, HOUR_S, NOW_MS, acquired, begun, committed, record, states
from tests.contract.ids_contract import leased
from tests.servers import POSTGRES_PASSWORD, PostgresServer

T = TypeVar("T")

WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
HELD = "SELECT bool_or(expires_at_ms > extract(epoch FROM clock_timestamp()) * 1000) FROM "


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


async def past_expiry(url: str, table: str, call: Coroutine[Any, Any, T]) -> T:
    """Let the call wait for the table's rows, which are locked and not changed, until all leases in it have passed."""
    async with connected(url) as watcher, connected(url) as locker:
        async with locker.transaction():
            await locker.execute(f"SELECT 1 FROM {table} FOR UPDATE")
            task = asyncio.ensure_future(call)
            while await watcher.fetchval(WAITING) == 0:
                assert not task.done()
            while await watcher.fetchval(HELD + table):
                pass
        return await task


SHORT_S = 0.5


def test_an_update_that_waited_for_a_lock_looks_at_the_clock_only_before(postgres: str) -> None:
    """Why the catalog proves a lease in a statement of its own: Postgres evaluates the condition again only for a row
    that was changed."""

    async def scenario() -> None:
        async with PostgresCatalog(postgres) as catalog, connected(postgres) as connection:
            await acquired(catalog, "a", SHORT_S)
            naive = (
                "UPDATE shard_lease SET holder = 'b' WHERE expires_at_ms > extract(epoch FROM clock_timestamp()) * 1000"
            )
            assert await past_expiry(postgres, "shard_lease", connection.execute(naive)) == "UPDATE 1"

    asyncio.run(scenario())


@pytest.mark.parametrize("action", ["renew", "begin_part", "begin", "commit", "delete", "adopt"])
def test_a_lease_that_passes_behind_a_lock_is_lost(postgres: str, action: str) -> None:
    async def scenario() -> None:
        async with PostgresCatalog(postgres) as catalog:
            lease = await acquired(catalog, "a", HOUR_S)
            await begun(catalog, lease, record(1))
            lease = await acquired(catalog, "a", HOUR_S)
            await begun(catalog, lease, record(1))
            assert await catalog.renew(lease, SHORT_S) is not None
            calls: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
                "renew": lambda: catalog.renew(lease, HOUR_S),
                "begin_part": lambda: catalog.begin_part(lease),
                "begin": lambda: begun(catalog, lease, record(2)),
                "commit": lambda: catalog.commit_container(lease, record(1)),
                "delete": lambda: catalog.delete_containers(lease, [record(1).object_key]),
                "adopt": lambda: catalog.adopt_containers(lease, [record(2)]),
            }
            call = calls[action]()
            before = await catalog.list_containers()
            if action == "renew":
                assert await past_expiry(postgres, "shard_lease", call) is None
            else:
                with pytest.raises(LeaseLost):
                    await past_expiry(postgres, "shard_lease", call)
            assert await catalog.list_containers() == before
            (holder,) = await catalog.list_holders()
            assert not holder.holds

    asyncio.run(scenario())


def test_a_lease_that_passes_while_another_waits_for_it_is_acquired_and_lasts(postgres: str) -> None:
    """The expiry of the new lease counts from after the wait."""

    async def scenario() -> None:
        async with PostgresCatalog(postgres) as catalog:
            await acquired(catalog, "a", SHORT_S)
            lease = await past_expiry(postgres, "shard_lease", catalog.acquire(DAY, "3f", "b", SHORT_S))
            assert lease is not None
            assert lease.token == 2
            assert (lease.expires_at - await catalog.now()).total_seconds() > SHORT_S / 2

    asyncio.run(scenario())


def test_an_acquisition_that_waits_behind_a_renewal_gets_nothing(postgres: str) -> None:
    async def scenario() -> None:
        async with PostgresCatalog(postgres) as catalog, connected(postgres) as watcher:
            lease = await acquired(catalog, "a", 0)
            async with connected(postgres) as renewer, renewer.transaction():
                await renewer.execute("UPDATE shard_lease SET expires_at_ms = expires_at_ms + 3600000")
                task = asyncio.ensure_future(catalog.acquire(DAY, "3f", "b", HOUR_S))
                while await watcher.fetchval(WAITING) == 0:
                    pass
            assert await task is None
            assert await catalog.renew(lease, HOUR_S) is not None

    asyncio.run(scenario())


def test_a_commit_that_waits_behind_an_acquisition_is_refused(postgres: str) -> None:
    async def scenario() -> None:
        async with PostgresCatalog(postgres) as catalog, connected(postgres) as watcher:
            lease = await acquired(catalog, "a")
            await begun(catalog, lease, record(1))
            async with connected(postgres) as successor, successor.transaction():
                await successor.execute("UPDATE shard_lease SET token = token + 1, holder = 'b'")
                task = asyncio.ensure_future(catalog.commit_container(lease, record(1)))
                while await watcher.fetchval(WAITING) == 0:
                    pass
            with pytest.raises(LeaseLost):
                await task

    asyncio.run(scenario())


def test_a_node_lease_that_passes_behind_a_lock_is_lost(postgres: str) -> None:
    async def scenario() -> None:
        async with PostgresCatalog(postgres) as catalog:
            lease = await leased(catalog, "a", SHORT_S)
            with pytest.raises(NodeIdLost):
                await past_expiry(postgres, "node", catalog.reserve_ids(lease, DAY, 1, NOW_MS))
            lease = await leased(catalog, "a", SHORT_S)
            assert await past_expiry(postgres, "node", catalog.renew_node_id(lease, HOUR_S)) is None

    asyncio.run(scenario())


def test_a_client_that_stops_in_its_transaction_keeps_nobody_waiting(postgres: str) -> None:
    async def scenario() -> None:
        async with PostgresCatalog(postgres, command_timeout_s=0.3) as stuck, PostgresCatalog(postgres) as other:
            await acquired(other, "a")
            meanwhile: list[Lease] = []

            async def stop_and_go_on() -> None:
                async with stuck.writing() as connection:
                    await connection.exec_driver_sql("SELECT 1 FROM shard_lease FOR UPDATE")
                    meanwhile.append(await acquired(other, "a"))
                    await connection.exec_driver_sql("SELECT 1")

            with pytest.raises(CatalogUnavailable):
                await stop_and_go_on()
            assert [lease.token for lease in meanwhile] == [2]
            assert await stuck.acquire(DAY, "3f", "a", HOUR_S) is not None

    asyncio.run(scenario())


def test_waiting_for_a_lock_has_an_end(postgres: str) -> None:
    async def scenario() -> None:
        async with PostgresCatalog(postgres, command_timeout_s=0.3) as catalog, connected(postgres) as locker:
            lease = await acquired(catalog)
            async with locker.transaction():
                await locker.execute("SELECT 1 FROM shard_lease FOR UPDATE")
                for call in (catalog.renew(lease, HOUR_S), catalog.acquire(DAY, "3f", "b", HOUR_S)):
                    with pytest.raises(CatalogUnavailable, match="statement timeout"):
                        await call
            assert await catalog.renew(lease, HOUR_S) is not None

    asyncio.run(scenario())


# A server that goes away


async def blocked(
    locker: asyncpg.Connection, watcher: asyncpg.Connection, call: Coroutine[Any, Any, T]
) -> asyncio.Task[T]:
    """The call, while it waits for a lock that goes with the server."""
    await locker.execute("BEGIN")
    await locker.execute("SELECT 1 FROM shard_lease FOR UPDATE")
    task = asyncio.create_task(call)
    while await watcher.fetchval(WAITING) == 0:
        assert not task.done()
    return task


async def outcome(task: asyncio.Task[T]) -> T:
    return await task


@pytest.mark.parametrize("way", ["kill", "stop"])
def test_after_a_restart_of_the_server_the_same_catalog_goes_on(
    postgres_session: PostgresServer, postgres: str, way: str
) -> None:
    """Postgres is down: files wait in the spool; packing resumes by itself."""
    with asyncio.Runner() as runner:
        catalog = PostgresCatalog(postgres)
        runner.run(catalog.open())
        lease = runner.run(acquired(catalog))
        runner.run(committed(catalog, lease, record(1)))

        async def use_all_connections() -> None:
            await asyncio.gather(*(catalog.begin_part(lease) for _ in range(20)))

        runner.run(use_all_connections())
        locker, watcher = runner.run(asyncpg.connect(postgres)), runner.run(asyncpg.connect(postgres))
        task = runner.run(blocked(locker, watcher, catalog.renew(lease, HOUR_S)))
        getattr(postgres_session, way)()
        try:
            with pytest.raises(CatalogUnavailable):
                runner.run(outcome(task))
            for _ in range(7):  # more than there are connections
                with pytest.raises(CatalogUnavailable):
                    runner.run(catalog.list_containers())
            with pytest.raises(CatalogUnavailable):
                runner.run(open_catalog(postgres))
        finally:
            postgres_session.start()
        assert runner.run(catalog.renew(lease, HOUR_S)) is not None
        runner.run(use_all_connections())
        assert len(runner.run(states(catalog))) == 41
        locker.terminate()
        watcher.terminate()
        runner.run(catalog.close())


def test_a_restart_that_nobody_noticed_costs_no_call(postgres_session: PostgresServer, postgres: str) -> None:
    with asyncio.Runner() as runner:
        catalog = PostgresCatalog(postgres)
        runner.run(catalog.open())
        lease = runner.run(acquired(catalog))
        postgres_session.kill()
        postgres_session.start()
        assert runner.run(catalog.renew(lease, HOUR_S)) is not None
        runner.run(catalog.close())


def test_a_server_that_hangs_has_a_deadline(postgres_session: PostgresServer, postgres: str) -> None:
    with asyncio.Runner() as runner:
        catalog = PostgresCatalog(postgres, connect_timeout_s=0.5, command_timeout_s=0.5)
        runner.run(catalog.open())
        lease = runner.run(acquired(catalog))
        postgres_session.pause()
        try:
            started = time.monotonic()
            with pytest.raises(CatalogUnavailable, match="in time"):
                runner.run(catalog.renew(lease, HOUR_S))
            with pytest.raises(CatalogUnavailable, match="in time"):
                runner.run(catalog.renew(lease, HOUR_S))
            with pytest.raises(CatalogUnavailable, match="in time"):
                runner.run(PostgresCatalog(postgres, connect_timeout_s=0.5).open())
            assert time.monotonic() - started < 20
        finally:
            postgres_session.resume()
        assert runner.run(catalog.renew(lease, HOUR_S)) is not None
        runner.run(catalog.close())


# What errors mean


@pytest.mark.parametrize(
    ("code", "meaning"),
    [
        ("08006", CatalogUnavailable),  # connection failure
        ("22001", InvalidRequest),  # a text that is too long
        ("23514", InvalidRequest),  # a check
        ("25006", CatalogUnavailable),  # a standby, which is read-only
        ("40001", CatalogUnavailable),  # serialization failure
        ("40P01", CatalogUnavailable),  # deadlock
        ("42501", CatalogUnavailable),  # no permission
        ("42703", CatalogTooOld),  # no such column
        ("42P01", CatalogTooOld),  # no such table
        ("53100", CatalogUnavailable),  # disk full
        ("53300", CatalogUnavailable),  # too many connections
        ("57014", CatalogUnavailable),  # cancelled
        ("57P01", CatalogUnavailable),  # shut down
        ("58030", CatalogUnavailable),  # I/O error
        ("XX001", CatalogCorrupt),  # damaged data
    ],
)
def test_what_the_server_says_becomes_what_the_caller_can_do(
    postgres: str, code: str, meaning: type[AssignmentError]
) -> None:
    async def scenario() -> None:
        async with PostgresCatalog(postgres) as catalog:
            with pytest.raises(AssignmentError, match="as it happens") as caught:
                async with catalog.writing() as connection:
                    await connection.exec_driver_sql(
                        f"DO $$ BEGIN RAISE EXCEPTION 'as it happens' USING ERRCODE = '{code}'; END $$"
                    )
            assert type(caught.value) is meaning
            assert ("desfs catalog migrate" in str(caught.value)) == (meaning is CatalogTooOld)
            assert await catalog.list_containers() == []

    asyncio.run(scenario())


def test_values_that_the_database_cannot_hold_are_the_callers_mistake(postgres: str) -> None:
    async def scenario() -> None:
        async with PostgresCatalog(postgres) as catalog:
            lease = await acquired(catalog)
            for call in (
                catalog.acquire(DAY, "3f", "a" * 256, HOUR_S),
                catalog.acquire(DAY, "3f", "a\0", HOUR_S),
                catalog.acquire(DAY, "3f", "\udcff", HOUR_S),
                catalog.begin_part(lease, at_least=2**70),
                catalog.heartbeat("a", "s", {}, 1e30),
            ):
                with pytest.raises(InvalidRequest):
                    await call
            assert (await catalog.begin_part(lease)).generation == 1

    asyncio.run(scenario())


def _refusal(url: str, error: type[AssignmentError]) -> str:
    with pytest.raises(error) as caught:
        asyncio.run(open_catalog(url))
    text = "".join(traceback.format_exception(caught.value))
    assert POSTGRES_PASSWORD not in text
    return str(caught.value)


def test_who_is_not_let_in_hears_why_and_not_the_password(postgres_session: PostgresServer, postgres: str) -> None:
    wrong = postgres.replace(POSTGRES_PASSWORD, "wrong-geheim")
    assert "password authentication failed" in _refusal(wrong, CatalogUnavailable)
    assert "geheim" not in _refusal(wrong, CatalogUnavailable)
    assert '"nowhere" does not exist' in _refusal(postgres_session.url("nowhere"), CatalogUnavailable)
    refused = f"postgresql://postgres:{POSTGRES_PASSWORD}@127.0.0.1:1/db?application_name=geheim"
    message = _refusal(refused, CatalogUnavailable)
    assert message.startswith("postgresql://postgres@127.0.0.1:1/db: ")
    assert "geheim" not in message


def test_too_many_connections_are_a_reason_to_wait(postgres_session: PostgresServer, postgres: str) -> None:
    postgres_session.run(f"CREATE ROLE crowded LOGIN PASSWORD '{POSTGRES_PASSWORD}' CONNECTION LIMIT 0")
    try:
        url = postgres.replace("//postgres:", "//crowded:")
        assert "too many connections" in _refusal(url, CatalogUnavailable)
    finally:
        postgres_session.run("DROP ROLE crowded")


def test_the_password_comes_from_where_libpq_has_it(
    postgres_session: PostgresServer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSFILE", str(postgres_session.password_file))
    url = postgres.replace(f":{POSTGRES_PASSWORD}", "").replace("postgresql:", "postgresql+asyncpg:")

    async def scenario() -> Lease:
        async with PostgresCatalog(url) as catalog:
            return await acquired(catalog)

    assert asyncio.run(scenario()).token == 1


def test_a_database_without_the_tables_names_the_command_that_makes_them(postgres_session: PostgresServer) -> None:
    database = postgres_session.new_database()
    url = postgres_session.url(database)
    for revision in (None, "base", "0001"):
        if revision is not None:
            asyncio.run(migrate(url, revision))
        assert "desfs catalog migrate" in _refusal(url, CatalogTooOld)
    asyncio.run(migrate(url))
    postgres_session.run("UPDATE alembic_version SET version_num = '0099'", database=database)
    assert "0099" in _refusal(url, CatalogTooNew)
    with pytest.raises(CatalogTooNew, match="0099"):
        asyncio.run(migrate(url))
    postgres_session.drop_database(database)
