"""What every catalog does for workers, node ids and ids: the other half of the suite in `catalog_contract`."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from assignment.catalog import Catalog, NodeLease
from assignment.errors import InvalidRequest, NodeIdLost
from tests.contract.catalog_contract import DAY, HOUR_S, NEXT_DAY, NOW_MS, CatalogScenarios, Run, RunMany

DETAILS = {"host": "é", "files": 3, "oldest_s": 1.5, "more": [None, {"a": "\u0000"}]}


async def leased(catalog: Catalog, holder: str = "a", ttl_s: float = HOUR_S) -> NodeLease:
    lease = await catalog.lease_node_id(holder, ttl_s)
    assert lease is not None
    return lease


class IdsContract(CatalogScenarios):
    # Workers

    def test_a_worker_lives_for_its_time_by_the_databases_clock(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            assert await catalog.list_workers() == []
            await catalog.heartbeat("b", "spool 1", DETAILS, HOUR_S)
            await catalog.heartbeat("a", "spool 1", {}, 0)
            dead, alive = await catalog.list_workers()
            assert (dead.name, dead.alive, dead.details) == ("a", False, {})
            assert (alive.name, alive.alive, alive.spool, alive.details) == ("b", True, "spool 1", DETAILS)
            assert abs(alive.started_at - await catalog.now()) < timedelta(seconds=30)
            ahead = alive.expires_at - await catalog.now()
            assert timedelta(seconds=HOUR_S - 30) < ahead <= timedelta(seconds=HOUR_S)

        run(scenario)

    def test_a_heartbeat_keeps_the_start_of_a_worker_that_lives(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            await catalog.heartbeat("a", "spool 1", {"files": 1}, HOUR_S)
            (before,) = await catalog.list_workers()
            while await catalog.now() == before.started_at:
                pass
            await catalog.heartbeat("a", "spool 2", {"files": 2}, 0)
            (after,) = await catalog.list_workers()
            assert (after.spool, after.details, after.alive) == ("spool 2", {"files": 2}, False)
            assert after.started_at == before.started_at
            await catalog.heartbeat("a", "spool 2", {}, HOUR_S)
            (again,) = await catalog.list_workers()
            assert again.started_at > before.started_at

        run(scenario)

    def test_the_dead_are_forgotten_after_a_while(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            await catalog.heartbeat("long dead", "s", {}, -HOUR_S)
            await catalog.heartbeat("dead", "s", {}, 0)
            await catalog.heartbeat("alive", "s", {}, HOUR_S)
            workers = await catalog.list_workers(forget_after_s=HOUR_S / 2)
            assert [worker.name for worker in workers] == ["alive", "dead"]
            assert [worker.name for worker in await catalog.list_workers()] == ["alive", "dead"]

        run(scenario)

    def test_a_worker_that_ends_is_removed(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            await catalog.heartbeat("a", "s", {}, HOUR_S)
            await catalog.heartbeat("b", "s", {}, HOUR_S)
            await catalog.remove_worker("a")
            await catalog.remove_worker("a")
            assert [worker.name for worker in await catalog.list_workers()] == ["b"]

        run(scenario)

    def test_details_are_json_values(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            with pytest.raises(InvalidRequest, match="worker 'a'"):
                await catalog.heartbeat("a", "s", {"when": object()}, HOUR_S)

        run(scenario)

    def test_many_heartbeats_at_once(self, run_many: RunMany) -> None:
        async def scenario(catalogs: list[Catalog]) -> None:
            calls = [
                catalog.heartbeat(name, "s", {}, ttl_s)
                for catalog in catalogs
                for name in "abc"
                for ttl_s in (-HOUR_S, HOUR_S)
            ]
            lists = [catalog.list_workers(forget_after_s=1) for catalog in catalogs for _ in range(5)]
            await asyncio.gather(*calls, *lists)
            await asyncio.gather(*(catalogs[0].heartbeat(name, "s", {}, HOUR_S) for name in "abc"))
            assert [worker.name for worker in await catalogs[1].list_workers()] == ["a", "b", "c"]

        run_many(3, scenario)

    # Node ids

    def test_every_lease_is_of_another_node_until_none_is_left(self, run_many: RunMany) -> None:
        async def scenario(catalogs: list[Catalog]) -> None:
            calls = [catalogs[n % 3].lease_node_id(f"replica {n}", HOUR_S) for n in range(256)]
            leases = [lease for lease in await asyncio.gather(*calls) if lease is not None]
            assert sorted(lease.node_id for lease in leases) == list(range(256))
            assert {lease.token for lease in leases} == {1}
            assert await catalogs[0].lease_node_id("late", HOUR_S) is None
            await catalogs[1].release_node_id(leases[77])
            again = await leased(catalogs[2], "late")
            assert (again.node_id, again.holder, again.token) == (leases[77].node_id, "late", 2)
            assert await catalogs[0].lease_node_id("later", HOUR_S) is None

        run_many(3, scenario)

    def test_the_node_that_was_free_longest_comes_first(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            first = await leased(catalog, "a")
            second = await leased(catalog, "a")
            await catalog.release_node_id(second)
            rest = [await leased(catalog, "b") for _ in range(254)]
            assert {lease.node_id for lease in rest}.isdisjoint({first.node_id, second.node_id})
            await catalog.release_node_id(first)
            assert [(await leased(catalog, "c")).node_id for _ in range(2)] == [second.node_id, first.node_id]

        run(scenario)

    def test_a_renewed_node_lease_is_the_same_and_expires_later(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            lease = await leased(catalog, "a", 60)
            renewed = await catalog.renew_node_id(lease, HOUR_S)
            assert renewed is not None
            assert renewed.expires_at > lease.expires_at
            assert replace(renewed, expires_at=lease.expires_at) == lease

        run(scenario)

    def test_a_node_lease_that_has_passed_is_lost(self, run: Run) -> None:
        """A replica that loses its node id stops answering before another can have it."""

        async def scenario(catalog: Catalog) -> None:
            lost = await leased(catalog, "a")
            assert await catalog.renew_node_id(lost, 0) is not None
            assert await catalog.renew_node_id(lost, HOUR_S) is None
            with pytest.raises(NodeIdLost):
                await catalog.reserve_ids(lost, DAY, 1, NOW_MS)
            leases = [await leased(catalog, "b") for _ in range(256)]
            (successor,) = (lease for lease in leases if lease.node_id == lost.node_id)
            assert successor.token == lost.token + 1
            await catalog.release_node_id(lost)
            assert await catalog.renew_node_id(lost, HOUR_S) is None
            with pytest.raises(NodeIdLost, match="token 1"):
                await catalog.reserve_ids(lost, DAY, 1, NOW_MS)
            assert await catalog.renew_node_id(successor, HOUR_S) is not None

        run(scenario)

    def test_the_ids_of_a_node_go_on_under_its_next_lease(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            first = await leased(catalog, "a")
            block = await catalog.reserve_ids(first, DAY, 300, NOW_MS)
            assert (block.node_id, block.first_ms, block.first_sequence) == (first.node_id, NOW_MS, 0)
            await catalog.release_node_id(first)
            leases = [await leased(catalog, "b") for _ in range(256)]
            (successor,) = (lease for lease in leases if lease.node_id == first.node_id)
            block = await catalog.reserve_ids(successor, DAY, 1, NOW_MS - 5)
            assert (block.first_ms, block.first_sequence) == (NOW_MS + 1, 44)

        run(scenario)

    # Ids

    def test_ids_of_reserved_blocks_never_repeat(self, run_many: RunMany) -> None:
        async def scenario(catalogs: list[Catalog]) -> None:
            blocks = await asyncio.gather(
                *(
                    catalog.reserve_ids(node_id, DAY, count, NOW_MS + step_ms)
                    for catalog in catalogs
                    for node_id in (0, 255)
                    for count, step_ms in [(1, 0), (300, -3_600_000), (10_000, 2), (5, 10**10)]
                )
            )
            names = [name for block in blocks for name in block.names("DES")]
            assert len(names) == len(set(names)) == 6 * 10_306

        run_many(3, scenario)

    def test_ids_under_a_node_lease_never_repeat(self, run_many: RunMany) -> None:
        async def scenario(catalogs: list[Catalog]) -> None:
            node = await leased(catalogs[0])
            blocks = await asyncio.gather(
                *(
                    catalog.reserve_ids(node, day, 100, NOW_MS)
                    for catalog in catalogs
                    for day in (DAY, NEXT_DAY)
                    for _ in range(5)
                )
            )
            names = [name for block in blocks for name in block.names("DES")]
            assert len(names) == len(set(names)) == 3000

        run_many(3, scenario)

    def test_ids_go_on_after_reopening_whatever_the_clock_says(self, run: Run) -> None:
        names: list[str] = []
        for now_ms in (NOW_MS, NOW_MS, NOW_MS - 5, 0):

            async def scenario(catalog: Catalog, now_ms: int = now_ms) -> None:
                names.extend((await catalog.reserve_ids(0, DAY, 200, now_ms)).names("DES"))

            run(scenario)
        assert len(set(names)) == 800

    def test_no_ids_cannot_be_reserved_nor_those_of_a_node_that_cannot_be(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            for node_id, count in [(0, 0), (0, -1), (256, 1)]:
                with pytest.raises(InvalidRequest):
                    await catalog.reserve_ids(node_id, DAY, count, NOW_MS)
            assert (await catalog.reserve_ids(0, DAY, 1, NOW_MS)).first_ms == NOW_MS

        run(scenario)
