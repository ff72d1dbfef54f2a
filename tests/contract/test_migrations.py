"""The catalog's tables from revision to revision, in both databases, and what is in them meanwhile."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect
from sqlalchemy.ext.asyncio import create_async_engine

from assignment.catalog import ContainerState
from assignment.errors import AssignmentError, CatalogTooNew, CatalogUnavailable, InvalidRequest
from assignment.opening import migrate, open_catalog
from assignment.schema import SCHEMA_VERSION, metadata, revision_name
from assignment.sqlite import APPLICATION_ID, SqliteCatalog
from tests.servers import PostgresServer

T = TypeVar("T")

REVISIONS = ["base", *(revision_name(version) for version in range(1, SCHEMA_VERSION + 1))]

# What the first version of the program made, which knew nothing of migrations.
FIRST_TABLES = """
CREATE TABLE shard_lease (
    day DATE NOT NULL,
    shard VARCHAR(8) NOT NULL,
    holder VARCHAR(255) NOT NULL,
    token BIGINT NOT NULL,
    expires_at_ms BIGINT NOT NULL,
    previous_holder VARCHAR(255),
    previous_token BIGINT,
    next_generation BIGINT NOT NULL,
    CONSTRAINT pk_shard_lease PRIMARY KEY (day, shard),
    CONSTRAINT ck_shard_lease_token CHECK (token >= 1),
    CONSTRAINT ck_shard_lease_next_generation CHECK (next_generation >= 1)
);
CREATE TABLE container (
    object_key VARCHAR(1024) NOT NULL,
    day DATE NOT NULL,
    shard VARCHAR(8) NOT NULL,
    generation BIGINT NOT NULL,
    size BIGINT NOT NULL,
    files BIGINT NOT NULL,
    etag VARCHAR(255) NOT NULL,
    token BIGINT NOT NULL,
    state VARCHAR(16) NOT NULL,
    created_at_ms BIGINT NOT NULL,
    CONSTRAINT pk_container PRIMARY KEY (object_key),
    CONSTRAINT ck_container_size CHECK (size >= 0),
    CONSTRAINT ck_container_files CHECK (files >= 0),
    CONSTRAINT ck_container_state CHECK (state IN ('uploading', 'committed', 'sealed', 'superseded', 'deleted'))
);
CREATE INDEX ix_container_day_shard_generation ON container (day, shard, generation);
CREATE TABLE id_sequence (
    node_id INTEGER NOT NULL,
    day DATE NOT NULL,
    last_ms BIGINT NOT NULL,
    next_sequence INTEGER NOT NULL,
    CONSTRAINT pk_id_sequence PRIMARY KEY (node_id, day),
    CONSTRAINT ck_id_sequence_node_id CHECK (node_id BETWEEN 0 AND 255),
    CONSTRAINT ck_id_sequence_next_sequence CHECK (next_sequence BETWEEN 0 AND 256)
);
"""
FIRST_ROWS = """
INSERT INTO shard_lease VALUES ('2026-11-20', '3f', 'a', 7, 1000, 'b', 6, 12);
INSERT INTO container VALUES ('2026-11-20/3f-000011.des', '2026-11-20', '3f', 11, 5, 2, 'e', 7, 'committed', 1500);
INSERT INTO id_sequence VALUES (3, '2026-11-20', 1795000000000, 200);
"""
DAY = date(2026, 11, 20)
NOW_MS = 1_795_000_000_000


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database."""
    if request.param == "sqlite":
        yield str(tmp_path / "catalog.sqlite")
        return
    server: PostgresServer = request.getfixturevalue("postgres_session")
    database = server.new_database()
    yield server.url(database)
    server.drop_database(database)


def within(url: str, function: Callable[[Connection], T]) -> T:
    """What the function returns, called with a connection in a transaction."""
    scheme, _, rest = url.rpartition("://")
    place = f"postgresql+asyncpg://{rest}" if scheme else f"sqlite+aiosqlite:///{rest}"

    async def call() -> T:
        engine = create_async_engine(place)
        try:
            async with engine.begin() as connection:
                return await connection.run_sync(function)
        finally:
            await engine.dispose()

    return asyncio.run(call())


def execute(url: str, script: str) -> None:
    def statements(connection: Connection) -> None:
        for statement in filter(str.strip, script.split(";")):
            connection.exec_driver_sql(statement)

    within(url, statements)


def described(connection: Connection) -> dict[str, Any]:
    """All that the database says of its tables."""
    inspector = inspect(connection)
    return {
        name: {
            "columns": {
                column["name"]: (str(column["type"]), column["nullable"], column["default"])
                for column in inspector.get_columns(name)
            },
            "key": inspector.get_pk_constraint(name),
            "checks": sorted(inspector.get_check_constraints(name), key=lambda check: str(check["name"])),
            "indexes": inspector.get_indexes(name),
        }
        for name in inspector.get_table_names()
        if name != "alembic_version"
    }


def tables(url: str) -> dict[str, Any]:
    return within(url, described)


def move(url: str, revision: str = "head") -> None:
    asyncio.run(migrate(url, revision))


def test_the_migrations_make_the_tables_of_the_schema(url: str) -> None:
    within(url, metadata.create_all)
    wanted = tables(url)
    within(url, metadata.drop_all)
    assert tables(url) == {}
    move(url)
    assert tables(url) == wanted
    assert sorted(wanted) == sorted(table.name for table in metadata.sorted_tables)

    def differences(connection: Connection) -> list[Any]:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return list(compare_metadata(context, metadata))

    assert within(url, differences) == []


@pytest.mark.parametrize("start", REVISIONS)
def test_up_down_and_up_from_every_revision(url: str, start: str) -> None:
    move(url, start)
    before = tables(url)
    later = REVISIONS[REVISIONS.index(start) :]
    seen = {}
    for revision in later:
        move(url, revision)
        seen[revision] = tables(url)
    for revision in reversed(later):
        move(url, revision)
        assert tables(url) == seen[revision]
    assert tables(url) == before
    move(url)
    assert tables(url) == seen[REVISIONS[-1]]
    asyncio.run(asyncio.wait_for(_opened(url), 60))


async def _opened(url: str) -> None:
    catalog = await open_catalog(url)
    assert await catalog.list_containers() == []
    await catalog.close()


def test_what_is_in_the_tables_stays(url: str) -> None:
    move(url, "0001")
    execute(url, FIRST_ROWS)
    move(url)

    async def scenario() -> None:
        catalog = await open_catalog(url)
        (container,) = await catalog.list_containers()
        assert (container.object_key, container.state) == ("2026-11-20/3f-000011.des", ContainerState.COMMITTED)
        assert (container.generation, container.size, container.files) == (11, 5, 2)
        assert container.changed_at is not None
        assert container.changed_at.timestamp() == 1.5
        lease = await catalog.acquire(DAY, "3f", "c", 60)
        assert lease is not None
        assert (lease.token, lease.previous_token, lease.previous_holder) == (8, 7, "a")
        assert (await catalog.begin_part(lease)).generation == 12
        block = await catalog.reserve_ids(3, DAY, 1, NOW_MS)
        assert (block.first_ms, block.first_sequence) == (NOW_MS, 200)
        await catalog.close()

    asyncio.run(scenario())


def test_on_the_way_down_only_what_is_content_stays(url: str) -> None:
    """The first version of the program takes every row for a commit."""
    move(url)
    values = ", ".join(
        f"('{state}', '2026-11-20', '3f', {number}, 1, 1, 'e', 1, '{state}', 1500, '')"
        for number, state in enumerate(ContainerState)
    )
    execute(url, f"INSERT INTO container VALUES {values}")
    move(url, "0001")
    rows = within(
        url, lambda connection: connection.exec_driver_sql("SELECT object_key FROM container").scalars().all()
    )
    assert sorted(rows) == ["committed", "sealed"]


def test_a_revision_that_there_is_not_is_refused(url: str) -> None:
    move(url, "0001")
    before = tables(url)
    for revision in ("0003", "heads", "-1", ""):
        with pytest.raises(InvalidRequest, match="want one of 0001, 0002, base, head"):
            move(url, revision)
    assert tables(url) == before


def test_a_migration_that_fails_has_changed_nothing(url: str) -> None:
    move(url, "0001")
    execute(url, "CREATE TABLE node (mine INTEGER)")
    before = tables(url)
    with pytest.raises(AssignmentError, match="node"):
        move(url)
    assert tables(url) == before
    execute(url, "DROP TABLE node")
    move(url)
    assert "worker" in tables(url)


def test_several_may_migrate_at_once(url: str) -> None:
    async def scenario() -> None:
        for revision in ("0001", "head"):
            await asyncio.gather(*(migrate(url, revision) for _ in range(4)))

    asyncio.run(scenario())
    assert sorted(tables(url)) == sorted(table.name for table in metadata.sorted_tables)


# SQLite alone: what is opened is brought up to date


def first_catalog(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(FIRST_TABLES + FIRST_ROWS)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 1")


def test_the_first_revision_is_what_the_first_version_made(tmp_path: Path) -> None:
    first_catalog(tmp_path / "first")
    move(str(tmp_path / "migrated"), "0001")
    assert tables(str(tmp_path / "first")) == tables(str(tmp_path / "migrated"))


def test_an_older_file_is_brought_up_to_date_when_it_is_opened(tmp_path: Path) -> None:
    """Several processes may open it at once."""
    path = tmp_path / "catalog.sqlite"
    first_catalog(path)

    async def scenario() -> None:
        catalogs = [SqliteCatalog(path) for _ in range(8)]
        await asyncio.gather(*(catalog.open() for catalog in catalogs))
        for catalog in catalogs:
            (container,) = await catalog.list_containers()
            assert container.object_key == "2026-11-20/3f-000011.des"
            assert (await catalog.reserve_ids(3, DAY, 1, NOW_MS)).first_sequence >= 200
        await asyncio.gather(*(catalog.close() for catalog in catalogs))

    asyncio.run(scenario())
    move(str(tmp_path / "new"))
    assert tables(str(path)) == tables(str(tmp_path / "new"))
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(REVISIONS[-1],)]


def test_a_new_file_and_a_migrated_one_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    asyncio.run(_opened(str(path)))
    move(str(tmp_path / "migrated"))
    assert tables(str(path)) == tables(str(tmp_path / "migrated"))
    for revision in ("0001", "base", "head"):
        move(str(path), revision)
    assert tables(str(path)) == tables(str(tmp_path / "migrated"))


def test_a_file_that_stays_locked_is_not_migrated(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    first_catalog(path)
    before = tables(str(path))
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for call in (
            SqliteCatalog(path, busy_timeout_s=0.05).open(),
            SqliteCatalog(path, busy_timeout_s=0.05).migrate(),
        ):
            with pytest.raises(CatalogUnavailable, match="locked"):
                asyncio.run(call)
    assert tables(str(path)) == before


def test_a_file_of_a_newer_version_is_not_migrated(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    move(str(path))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(CatalogTooNew, match="version 99"):
        move(str(path), "0001")


def test_opening_a_file_needs_neither_alembic_nor_asyncpg(tmp_path: Path) -> None:
    """They take their time to import."""
    program = (
        "import asyncio, sys\n"
        "from assignment.opening import open_catalog\n"
        "async def go():\n"
        "    await (await open_catalog(sys.argv[1])).close()\n"
        "asyncio.run(go())\n"
        "sys.exit(' '.join(sorted({'alembic', 'asyncpg', 'mako'} & set(sys.modules))))\n"
    )
    for _ in ("new", "there"):
        command = [sys.executable, "-c", program, str(tmp_path / "catalog.sqlite")]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
        assert done.stderr.strip() == ""
        assert (tmp_path / "catalog.sqlite").exists()
