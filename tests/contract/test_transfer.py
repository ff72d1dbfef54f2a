"""From an embedded catalog to Postgres, and back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from assignment.catalog import ContainerRecord, ContainerState, Lease
from assignment.errors import CatalogUnavailable, InvalidRequest
from assignment.opening import catalog_at
from assignment.schema import metadata
from assignment.sql import SqlCatalog
from assignment.transfer import CopiedRows, copy_catalog
from tests.contract.catalog_contract import DAY, HOUR_S, NEXT_DAY, NOW_MS, acquired, record
from tests.contract.ids_contract import leased
from tests.servers import PostgresServer


async def rows(catalog: SqlCatalog) -> dict[str, list[tuple[Any, ...]]]:
    found = {}
    async with catalog.reading() as connection:
        for table in metadata.sorted_tables:
            found[table.name] = sorted(tuple(row) for row in await connection.execute(select(table)))
    return found


async def filled(catalog: SqlCatalog) -> None:
    """Something of everything, and nobody at work any more."""
    lease = await acquired(catalog)
    records = [record(generation) for generation in range(1, 2500)]
    await catalog.adopt_containers(lease, [*records, *_one_of_each_state()])
    await catalog.release(lease)
    assert await catalog.acquire(NEXT_DAY, "0a", "b", 0) is not None
    node = await leased(catalog)
    for node_id in (node, 0, 255):
        await catalog.reserve_ids(node_id, DAY, 300, NOW_MS)
    await catalog.release_node_id(node)
    await catalog.heartbeat("a", "spool", {}, HOUR_S)


def _one_of_each_state() -> list[ContainerRecord]:
    return [
        replace(record(3000 + number), state=state, size=0, files=0, etag="")
        for number, state in enumerate(ContainerState)
    ]


def in_catalog(url: str, use: Callable[[SqlCatalog], Any]) -> Any:
    async def opened() -> Any:
        async with catalog_at(url) as catalog:
            return await use(catalog)

    return asyncio.run(opened())


@pytest.mark.parametrize("back", [False, True])
def test_everything_but_the_workers_is_copied(tmp_path: Path, postgres: str, back: bool) -> None:
    embedded = str(tmp_path / "catalog.sqlite")
    source, target = (postgres, embedded) if back else (embedded, postgres)
    in_catalog(source, filled)
    copied = asyncio.run(copy_catalog(source, target))
    assert copied == CopiedRows(shards=2, containers=2504, id_sequences=2, nodes=256)
    wanted = in_catalog(source, rows)
    assert len(wanted["worker"]) == 1
    assert in_catalog(target, rows) == {**wanted, "worker": []}

    async def goes_on(catalog: SqlCatalog) -> None:
        lease = await acquired(catalog, "c")
        assert lease.token == 2
        assert (await catalog.begin_part(lease)).generation == 3005
        assert (await catalog.reserve_ids(255, DAY, 1, NOW_MS)).first_sequence == 44

    in_catalog(target, goes_on)


async def _hold_shard(catalog: SqlCatalog) -> Lease:
    return await acquired(catalog, "packer 7")


async def _hold_node(catalog: SqlCatalog) -> None:
    await leased(catalog, "replica 7")


@pytest.mark.parametrize(
    ("hold", "named"),
    [(_hold_shard, "2026-11-20/3f is held by 'packer 7'"), (_hold_node, "node 0 is held by 'replica 7'")],
)
def test_a_source_in_which_somebody_is_at_work_is_refused(
    tmp_path: Path, postgres: str, hold: Callable[[SqlCatalog], Any], named: str
) -> None:
    source = str(tmp_path / "catalog.sqlite")
    in_catalog(source, hold)
    with pytest.raises(CatalogUnavailable, match=named):
        asyncio.run(copy_catalog(source, postgres))
    assert not any(in_catalog(postgres, rows).values())


async def _register_worker(catalog: SqlCatalog) -> None:
    await catalog.heartbeat("a", "spool", {}, HOUR_S)


@pytest.mark.parametrize("fill", [filled, _register_worker])
def test_a_target_that_has_rows_is_refused_and_left_alone(
    tmp_path: Path, postgres: str, fill: Callable[[SqlCatalog], Any]
) -> None:
    source = str(tmp_path / "catalog.sqlite")
    in_catalog(source, filled)
    in_catalog(postgres, fill)
    before = in_catalog(postgres, rows)
    with pytest.raises(InvalidRequest, match="has rows"):
        asyncio.run(copy_catalog(source, postgres))
    assert in_catalog(postgres, rows) == before


def test_a_source_that_is_not_there_is_not_made(tmp_path: Path, postgres: str) -> None:
    with pytest.raises(InvalidRequest, match="no catalog to copy"):
        asyncio.run(copy_catalog(str(tmp_path / "catalog.sqlite"), postgres))
    assert list(tmp_path.iterdir()) == []


def test_a_target_without_tables_gets_them(tmp_path: Path, postgres_session: PostgresServer) -> None:
    """docs/operations.md: a catalog in Postgres with one command, which makes the tables if they are not there."""
    source = str(tmp_path / "catalog.sqlite")
    in_catalog(source, filled)
    database = postgres_session.new_database()
    target = postgres_session.url(database)
    assert asyncio.run(copy_catalog(source, target)).containers == 2504
    postgres_session.drop_database(database)


def test_a_copy_that_fails_in_the_middle_leaves_nothing(
    tmp_path: Path, postgres_session: PostgresServer, postgres: str
) -> None:
    source = str(tmp_path / "catalog.sqlite")
    in_catalog(source, filled)
    database = postgres.rpartition("/")[2]
    postgres_session.run("ALTER TABLE node ADD CHECK (node_id < 200)", database=database)
    with pytest.raises(InvalidRequest, match="refused"):
        asyncio.run(copy_catalog(source, postgres))
    assert not any(in_catalog(postgres, rows).values())
