"""The catalogs that there are, under the contract; what is special to each; the client over them."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
import traceback
from contextlib import closing
from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from assignment.catalog import Lease
from assignment.client import AssignmentClient, InProcessAssignment, open_embedded
from assignment.errors import CatalogCorrupt, CatalogTooNew, CatalogUnavailable, InvalidRequest, NodeIdLost
from assignment.opening import open_catalog
from assignment.sqlite import SqliteCatalog
from des_format.assigned_names import parse_name
from des_format.shards import placement_shard, shard_hex
from tests.contract.catalog_contract import DAY, HOUR_S, CatalogContract, acquired, committed, record
from tests.contract.containers_contract import ContainersContract
from tests.contract.ids_contract import IdsContract, leased


class TestSqliteCatalog(CatalogContract, ContainersContract, IdsContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return str(tmp_path / "catalog.sqlite")


class TestPostgresCatalog(CatalogContract, ContainersContract, IdsContract):
    @pytest.fixture
    def url(self, postgres: str) -> str:
        return postgres


ALLOCATE = """
import asyncio, datetime, json, pathlib, sys
from assignment.catalog import Lease
from assignment.sqlite import SqliteCatalog
from tests.contract.catalog_contract import DAY, HOUR_S

async def allocate(path, me):
    lease = Lease(DAY, "3f", "a", 1, datetime.datetime.now(datetime.UTC), None, None)
    generations, names = [], []
    async with SqliteCatalog(path) as catalog:
        for number in range(12):
            generations.append((await catalog.begin_part(lease)).generation)
            names += (await catalog.reserve_ids(0, DAY, 10, 1_000_000 - number)).names("DES")
        shards = [await catalog.acquire(DAY, f"{shard:02x}", me, HOUR_S) for shard in range(8)]
    print(json.dumps([generations, names, sum(lease is not None for lease in shards)]))

asyncio.run(allocate(pathlib.Path(sys.argv[1]), sys.argv[2]))
"""


def test_several_processes_share_one_sqlite_catalog(tmp_path: Path) -> None:
    """Generations and ids never repeat, and each shard has one holder."""
    path = tmp_path / "catalog.sqlite"

    async def lease() -> Lease:
        async with SqliteCatalog(path) as catalog:
            return await acquired(catalog, "a")

    assert asyncio.run(lease()).token == 1
    commands = [[sys.executable, "-c", ALLOCATE, str(path), f"process {number}"] for number in range(3)]
    root = Path(__file__).parents[2]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for command in commands]
    results = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert sorted(number for generations, _, _ in results for number in generations) == list(range(1, 37))
    assert len({name for _, names, _ in results for name in names}) == 360
    assert sum(shards for _, _, shards in results) == 8


def test_many_processes_may_make_the_catalog_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        catalogs = [SqliteCatalog(tmp_path / "catalog.sqlite") for _ in range(8)]
        await asyncio.gather(*(catalog.open() for catalog in catalogs))
        await asyncio.gather(*(catalog.close() for catalog in catalogs))

    asyncio.run(scenario())


def test_a_commit_is_on_disk_when_it_returns(tmp_path: Path) -> None:
    """A commit survives a power failure: rollback journal, synchronous=EXTRA."""

    async def scenario() -> None:
        async with SqliteCatalog(tmp_path / "catalog.sqlite") as catalog, catalog.reading() as connection:
            assert (await connection.exec_driver_sql("PRAGMA journal_mode")).scalar_one() == "delete"
            assert (await connection.exec_driver_sql("PRAGMA synchronous")).scalar_one() == 3
            assert (await connection.exec_driver_sql("PRAGMA foreign_keys")).scalar_one() == 1

    asyncio.run(scenario())


def _open(path: Path) -> None:
    async def scenario() -> None:
        async with SqliteCatalog(path, busy_timeout_s=0.05):
            pass

    asyncio.run(scenario())


def test_a_catalog_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    _open(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(CatalogTooNew, match="version 99, want 2"):
        _open(path)


def test_a_file_that_is_no_catalog_is_refused_and_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.sqlite"
    with closing(sqlite3.connect(foreign)) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    text = tmp_path / "text"
    text.write_text("no database at all, but more than a hundred bytes of something else " * 9)
    for path in (foreign, text):
        before = path.read_bytes()
        with pytest.raises(CatalogCorrupt, match=path.name):
            _open(path)
        assert path.read_bytes() == before


def test_a_catalog_out_of_reach_is_unavailable_and_temporary(tmp_path: Path) -> None:
    with pytest.raises(CatalogUnavailable) as caught:
        _open(tmp_path / "missing" / "catalog.sqlite")
    assert caught.value.temporary


def test_a_catalog_that_stays_locked_is_unavailable_and_works_again_later(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"

    async def scenario() -> None:
        async with SqliteCatalog(path, busy_timeout_s=0.05) as catalog:
            with closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute("BEGIN EXCLUSIVE")
                with pytest.raises(CatalogUnavailable, match="locked"):
                    await catalog.acquire(DAY, "3f", "a", HOUR_S)
                with pytest.raises(CatalogUnavailable, match="locked"):
                    await catalog.list_containers()
            assert await catalog.acquire(DAY, "3f", "a", HOUR_S) is not None

    asyncio.run(scenario())


def test_readers_and_writers_of_one_process_do_not_run_out_of_connections(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with SqliteCatalog(tmp_path / "catalog.sqlite") as catalog:
            lease = await acquired(catalog)
            commits = [committed(catalog, lease, record(generation)) for generation in range(1, 40)]
            lists = [catalog.list_containers(DAY) for _ in range(60)]
            await asyncio.gather(*commits, *lists)
            assert len(await catalog.list_containers(DAY)) == 39

    asyncio.run(scenario())


@pytest.mark.parametrize("form", ["{}", "sqlite:///{}", "sqlite+aiosqlite:///{}"])
def test_a_file_is_named_by_its_path_or_a_url(tmp_path: Path, form: str) -> None:
    path = tmp_path / "of 100%"

    async def scenario() -> None:
        catalog = await open_catalog(form.format(path))
        await catalog.heartbeat("a", "s", {}, HOUR_S)
        await catalog.close()
        assert path.read_bytes().startswith(b"SQLite format 3")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "url",
    [
        "mysql://u:geheim@host/db",
        "postgresql+psycopg://u:geheim@host/db",
        "postgresql://u:geheim/x@host/db",
        "postgresql://u:p@[geheim/db",
        "",
        "sqlite:///",
        "sqlite:///:memory:",
    ],
)
def test_what_is_no_catalog_is_refused_without_its_secrets(url: str) -> None:
    with pytest.raises(InvalidRequest, match="catalog: found") as caught:
        asyncio.run(open_catalog(url))
    assert "geheim" not in "".join(traceback.format_exception(caught.value))


NOON_NS = 1_795_176_000_000_000_000  # 2026-11-20 12:00 UTC
PATHS = ["a/b/1.txt", "a/b/2.txt", "flat.txt", "a/b/1.txt", "é/x"]


def test_each_path_gets_day_shard_and_an_id_of_its_own(tmp_path: Path) -> None:
    async def scenario() -> None:
        client: AssignmentClient
        async with await open_embedded(
            tmp_path / "catalog.sqlite", shard_bits=9, node_id=5, prefix="X1", clock_ns=lambda: NOON_NS
        ) as client:
            assignments = await client.assign(PATHS)
        assert [a.path for a in assignments] == PATHS
        assert {a.day for a in assignments} == {date(2026, 11, 20)}
        assert [a.shard for a in assignments] == [shard_hex(placement_shard(path, 9), 9) for path in PATHS]
        assert assignments[0].shard == assignments[1].shard
        names = [parse_name(a.id) for a in assignments]
        assert {(n.prefix, n.day, n.node_id, n.extension) for n in names} == {("X1", date(2026, 11, 20), 5, "")}
        assert len({a.id for a in assignments}) == len(PATHS)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("timezone", "hour", "day"),
    [
        ("UTC", 23, date(2026, 11, 20)),
        ("Europe/Berlin", 23, date(2026, 11, 21)),
        ("America/New_York", 3, date(2026, 11, 19)),
    ],
)
def test_the_day_is_that_of_the_services_clock_in_its_time_zone(
    tmp_path: Path, timezone: str, hour: int, day: date
) -> None:
    now_ns = int(datetime(2026, 11, 20, hour, 30, tzinfo=UTC).timestamp()) * 10**9

    async def scenario() -> None:
        path = tmp_path / "catalog.sqlite"
        async with await open_embedded(path, shard_bits=4, timezone=timezone, clock_ns=lambda: now_ns) as client:
            (assignment,) = await client.assign(["a"])
        assert assignment.day == parse_name(assignment.id).day == day

    asyncio.run(scenario())


def test_more_than_a_batch_of_paths_and_none(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with await open_embedded(tmp_path / "catalog.sqlite", shard_bits=4) as client:
            assert await client.assign([]) == []
            assignments = await client.assign([f"d/{number}" for number in range(20_001)])
        assert len({a.id for a in assignments}) == 20_001

    asyncio.run(scenario())


def test_ids_do_not_repeat_over_restarts_whatever_the_clock_does(tmp_path: Path) -> None:
    async def assign(now_ns: int) -> list[str]:
        async with await open_embedded(tmp_path / "catalog.sqlite", shard_bits=4, clock_ns=lambda: now_ns) as client:
            return [assignment.id for assignment in await client.assign(["a"] * 700)]

    clocks = [NOON_NS, NOON_NS, NOON_NS - 10**9, NOON_NS + (2**32) * 10**6, NOON_NS + 10**6]
    ids = [name for now_ns in clocks for name in asyncio.run(assign(now_ns))]
    assert len(set(ids)) == len(ids)
    assert [parse_name(name).day for name in ids[::700]] == [
        *[date(2026, 11, 20)] * 3,
        date(2027, 1, 9),
        date(2026, 11, 20),
    ]


def test_the_client_has_the_catalog_and_closes_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with SqliteCatalog(tmp_path / "catalog.sqlite") as catalog:
            client: AssignmentClient
            async with InProcessAssignment(catalog, shard_bits=4) as client:
                assert client.catalog is catalog
                await acquired(client.catalog)
            with pytest.raises(CatalogUnavailable, match="not open"):
                await catalog.list_holders()

    asyncio.run(scenario())


def test_ids_come_under_the_lease_of_a_node(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with SqliteCatalog(tmp_path / "catalog.sqlite") as catalog:
            leases = [await leased(catalog) for _ in range(3)]
            client = InProcessAssignment(catalog, shard_bits=4, node=lambda: leases[-1])
            (assignment,) = await client.assign(["a"])
            assert parse_name(assignment.id).node_id == leases[-1].node_id == 2
            await catalog.release_node_id(leases[-1])
            with pytest.raises(NodeIdLost):
                await client.assign(["a"])

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"shard_bits": 0}, "shard_bits: found 0"),
        ({"shard_bits": 33}, "shard_bits: found 33"),
        ({"timezone": "Mars/Olympus"}, "timezone: found 'Mars/Olympus'"),
        ({"timezone": "../etc/passwd"}, "timezone"),
        ({"node_id": 256}, "node_id: found 256"),
        ({"prefix": "a b"}, "prefix: found 'a b'"),
    ],
)
def test_settings_out_of_range_are_refused_before_the_catalog_is_made(
    tmp_path: Path, setting: dict[str, object], reason: str
) -> None:
    arguments = {"shard_bits": 4, **setting}
    with pytest.raises(InvalidRequest, match=reason):
        asyncio.run(open_embedded(tmp_path / "catalog.sqlite", **arguments))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
