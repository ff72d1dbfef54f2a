"""What every catalog does for merged, deleted and listed containers: a part of the suite in `catalog_contract`."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

import pytest

from assignment.catalog import LIVE, Catalog, ContainerRecord, ContainerState, DaySummary, Lease
from assignment.errors import (
    CatalogUnavailable,
    ContainersChanged,
    InvalidRequest,
    LeaseLost,
)
from tests.contract.catalog_contract import (
    DAY,
    HOUR_S,
    NEXT_DAY,
    CatalogScenarios,
    Run,
    RunMany,
    acquired,
    begun,
    committed,
    record,
    states,
)


class ContainersContract(CatalogScenarios):
    """Merges, deletions, lists, and the life of a catalog."""

    def test_a_merge_is_committed_together_with_the_end_of_its_parts(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            lease = await acquired(catalog)
            await committed(catalog, lease, record(1), replace(record(2), state=ContainerState.SEALED), record(3))
            before = await catalog.find_container(record(3).object_key)
            merged = record(2, key="2026-11-20/3f-000001-000002.des")
            await begun(catalog, lease, merged)
            keys = [record(1).object_key, record(2).object_key, record(1).object_key]
            await catalog.commit_container(lease, merged, supersedes=keys)
            assert {c.shard for c in await catalog.list_containers(DAY, shard="3f")} <= {"3f"}
            assert await catalog.list_containers(shard="ee") == []
            assert [(c.object_key, c.state) for c in await catalog.list_containers(states=LIVE)] == [
                (merged.object_key, ContainerState.COMMITTED),
                (record(3).object_key, ContainerState.COMMITTED),
            ]
            superseded = await catalog.list_containers(states=[ContainerState.SUPERSEDED])
            assert [c.object_key for c in superseded] == keys[:2]
            assert await catalog.find_container(record(3).object_key) == before

        run(scenario)

    @pytest.mark.parametrize("state", [None, *sorted(set(ContainerState) - LIVE)])
    def test_when_one_of_the_parts_is_not_live_nothing_is_written(self, run: Run, state: ContainerState | None) -> None:
        async def scenario(catalog: Catalog) -> None:
            lease = await acquired(catalog)
            await committed(catalog, lease, record(1))
            if state is not None:
                await catalog.adopt_containers(lease, [replace(record(2), state=state)])
            await begun(catalog, lease, record(3))
            before = await catalog.list_containers()
            with pytest.raises(ContainersChanged, match="1 of 2"):
                await catalog.commit_container(
                    lease, record(3), supersedes=[record(1).object_key, record(2).object_key]
                )
            assert await catalog.list_containers() == before
            await catalog.commit_container(lease, record(3), supersedes=[record(1).object_key])

        run(scenario)

    def test_a_container_of_another_shard_is_not_superseded(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            other = record(1, shard="40")
            await committed(catalog, await acquired(catalog, shard="40"), other)
            lease = await acquired(catalog)
            await begun(catalog, lease, record(1))
            with pytest.raises(ContainersChanged):
                await catalog.commit_container(lease, record(1), supersedes=[other.object_key])
            with pytest.raises(InvalidRequest):
                await catalog.commit_container(lease, record(1), supersedes=[record(1).object_key])
            assert {c.shard: c.state for c in await catalog.list_containers()} == {
                "3f": ContainerState.UPLOADING,
                "40": ContainerState.COMMITTED,
            }

        run(scenario)

    def test_of_two_merges_of_the_same_parts_one_is_committed(self, run_many: RunMany) -> None:
        async def scenario(catalogs: list[Catalog]) -> None:
            lease = await acquired(catalogs[0])
            await committed(catalogs[0], lease, record(1), record(2))
            merges = [record(2, key=f"2026-11-20/3f-{first:06d}-000002.des") for first in (0, 1)]
            for merged in merges:
                await begun(catalogs[0], lease, merged)
            parts = [record(1).object_key, record(2).object_key]
            outcomes = await asyncio.gather(
                *(
                    catalog.commit_container(lease, merged, supersedes=parts)
                    for catalog, merged in zip(catalogs, merges, strict=True)
                ),
                return_exceptions=True,
            )
            assert sorted(str(type(outcome).__name__) for outcome in outcomes) == ["ContainersChanged", "NoneType"]
            assert len(await catalogs[0].list_containers(states=LIVE)) == 1

        run_many(2, scenario)

    def test_more_containers_than_a_statement_takes(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            lease = await acquired(catalog)
            records = [record(generation) for generation in range(1, 1202)]
            await catalog.adopt_containers(lease, records)
            keys = [adopted.object_key for adopted in records]
            await begun(catalog, lease, record(0, key="2026-11-20/3f.des"))
            await catalog.commit_container(lease, record(0, key="2026-11-20/3f.des"), supersedes=keys)
            assert len(await catalog.list_containers(states=[ContainerState.SUPERSEDED])) == 1201
            await catalog.delete_containers(lease, keys)
            assert await catalog.forget_deleted(0) == 1201

        run(scenario)

    # Deleting, adopting, listing

    def test_rows_of_the_leases_shard_are_deleted_whatever_they_were(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            await committed(catalog, await acquired(catalog, shard="40"), record(9, shard="40"))
            lease = await acquired(catalog)
            rows = [replace(record(n), state=state) for n, state in enumerate(ContainerState, start=1)]
            await catalog.adopt_containers(lease, [*rows, record(6)])
            deleted_before = await catalog.find_container(rows[-1].object_key)
            keys = [*(row.object_key for row in rows), record(9, shard="40").object_key, record(99).object_key]
            await catalog.delete_containers(lease, keys)
            await catalog.delete_containers(lease, [])
            wanted = dict.fromkeys(range(1, 6), ContainerState.DELETED)
            assert await states(catalog) == {**wanted, 6: ContainerState.COMMITTED, 9: ContainerState.COMMITTED}
            assert await catalog.find_container(rows[-1].object_key) == deleted_before
            assert await catalog.find_container(record(99).object_key) is None

        run(scenario)

    def test_without_a_lease_that_holds_nothing_is_deleted_or_adopted(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            lost = await acquired(catalog, "a")
            await committed(catalog, lost, record(1))
            await catalog.release(lost)
            for lease in (lost, replace(lost, token=7)):
                with pytest.raises(LeaseLost):
                    await catalog.delete_containers(lease, [record(1).object_key])
                with pytest.raises(LeaseLost):
                    await catalog.delete_containers(lease, [])
                with pytest.raises(LeaseLost):
                    await catalog.adopt_containers(lease, [record(2)])
            assert await states(catalog) == {1: ContainerState.COMMITTED}

        run(scenario)

    def test_adopted_containers_replace_what_is_not_content(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            lease = await acquired(catalog)
            await catalog.adopt_containers(lease, [])
            rows = [replace(record(n), state=state) for n, state in enumerate(ContainerState, start=1)]
            await catalog.adopt_containers(lease, rows)
            kept = {c.generation: c for c in await catalog.list_containers()}
            assert {n: c.state for n, c in kept.items()} == dict(enumerate(ContainerState, start=1))
            lease = await acquired(catalog)
            foreign = replace(record(30), etag='"new"', object_key="2026-11-20/3f-30.des", token=99)
            await catalog.adopt_containers(
                lease, [*(replace(record(n), size=7, state=ContainerState.SEALED) for n in range(1, 6)), foreign]
            )
            found = {c.generation: c for c in await catalog.list_containers()}
            for n in (2, 3, 4):  # committed, sealed, superseded
                assert found[n] == kept[n]
            for n in (1, 5):  # uploading, deleted
                assert (found[n].size, found[n].state, found[n].token) == (7, ContainerState.SEALED, lease.token)
            assert (found[30].etag, found[30].token) == ('"new"', lease.token)
            assert (await catalog.begin_part(lease)).generation == 31

        run(scenario)

    def test_containers_are_listed_by_day_and_state_in_order(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            for day, shard, generation in [
                (NEXT_DAY, "00", 1), (DAY, "3f", 10), (DAY, "3f", 9), (DAY, "0a", 11),
            ]:  # fmt: skip
                lease = await catalog.acquire(day, shard, "a", HOUR_S)
                assert lease is not None
                await committed(catalog, lease, record(generation, shard=shard, day=day))
            lease = await acquired(catalog)
            await begun(catalog, lease, record(9, key="2026-11-20/3f-000001-000009.des"))
            listed = [(c.day, c.shard, c.object_key[11:]) for c in await catalog.list_containers()]
            assert listed == [
                (DAY, "0a", "0a-000011.des"),
                (DAY, "3f", "3f-000001-000009.des"),
                (DAY, "3f", "3f-000009.des"),
                (DAY, "3f", "3f-000010.des"),
                (NEXT_DAY, "00", "00-000001.des"),
            ]
            assert [c.shard for c in await catalog.list_containers(NEXT_DAY)] == ["00"]
            assert await catalog.list_containers(date(2020, 1, 1)) == []
            assert [c.generation for c in await catalog.list_containers(DAY, states=LIVE)] == [11, 9, 10]
            assert len(await catalog.list_containers(states={ContainerState.UPLOADING})) == 1
            assert await catalog.list_containers(states=[]) == []

        run(scenario)

    def test_days_have_containers_that_are_not_deleted(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            assert await catalog.list_days() == []
            lease = await catalog.acquire(NEXT_DAY, "00", "a", HOUR_S)
            assert lease is not None
            part = await catalog.begin_part(lease)
            await committed(catalog, await acquired(catalog), record(1), record(2))
            assert await catalog.list_days() == [DAY, NEXT_DAY]
            await catalog.delete_containers(lease, [part.object_key])
            assert await catalog.list_days() == [DAY]

        run(scenario)

    def test_days_are_summed_up_by_state(self, run: Run) -> None:
        """Files and bytes are those of the content; the latest days alone, whatever is older."""

        async def scenario(catalog: Catalog) -> None:
            assert await catalog.summarize_days(5) == []
            lease = await acquired(catalog)
            large = replace(record(6), size=2**61, files=2**40)
            rows = [replace(record(n), state=state) for n, state in enumerate(ContainerState, start=1)]
            await catalog.adopt_containers(lease, [*rows, large, replace(record(7), size=2**61)])
            other = await acquired(catalog, shard="40")
            await catalog.adopt_containers(other, [record(1, shard="40")])
            wanted = [
                DaySummary(
                    DAY,
                    {
                        ContainerState.UPLOADING: 1,
                        ContainerState.COMMITTED: 4,
                        ContainerState.SEALED: 1,
                        ContainerState.SUPERSEDED: 1,
                    },
                    files=2**40 + 40,
                    size=2 * 2**61 + 1002 + 1003 + 1001,
                )
            ]
            assert await catalog.summarize_days(5) == wanted
            for days, state in (
                (-3, ContainerState.SEALED),
                (-2, ContainerState.DELETED),
                (4, ContainerState.UPLOADING),
            ):
                day = DAY + timedelta(days=days)
                lease_then = await catalog.acquire(day, "00", "a", HOUR_S)
                assert lease_then is not None
                await catalog.adopt_containers(lease_then, [replace(record(1, shard="00", day=day), state=state)])
            oldest = DaySummary(DAY - timedelta(days=3), {ContainerState.SEALED: 1}, 10, 1001)
            newest = DaySummary(DAY + timedelta(days=4), {ContainerState.UPLOADING: 1}, 0, 0)
            every = [oldest, *wanted, newest]
            for latest in (1, 2, 3, 4, 100):
                assert await catalog.summarize_days(latest) == every[-latest:]
                assert await catalog.list_days(latest=latest) == [each.day for each in every[-latest:]]

        run(scenario)

    def test_deleted_rows_are_forgotten_after_their_time(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            lease = await acquired(catalog)
            await committed(catalog, lease, record(1), record(2))
            await catalog.delete_containers(lease, [record(1).object_key])
            assert await catalog.forget_deleted(HOUR_S) == 0
            assert await catalog.forget_deleted(0) == 1
            assert await catalog.forget_deleted(0) == 0
            assert await states(catalog) == {2: ContainerState.COMMITTED}

        run(scenario)

    def test_the_databases_clock_goes_forward(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            first = await catalog.now()
            assert abs(first - datetime.now(UTC)) < timedelta(seconds=30)
            while await catalog.now() == first:
                pass
            assert await catalog.now() > first

        run(scenario)

    # The catalog as a whole

    def test_a_catalog_is_one_stores_once_and_for_all(self, run_many: RunMany) -> None:
        async def scenario(catalogs: list[Catalog]) -> None:
            bound = await asyncio.gather(*(catalog.bind_store(f"{n}") for n, catalog in enumerate(catalogs)))
            assert len(set(bound)) == 1
            assert await catalogs[0].bind_store("another") == bound[0]

        run_many(3, scenario)

    def test_everything_is_there_after_reopening(self, run: Run) -> None:
        leases: list[Lease] = []

        async def first(catalog: Catalog) -> None:
            leases.append(await acquired(catalog))
            assert (await catalog.begin_part(leases[0])).generation == 1
            await catalog.commit_container(leases[0], record(1))

        async def second(catalog: Catalog) -> None:
            assert await catalog.acquire(DAY, "3f", "b", HOUR_S) is None
            assert (await catalog.begin_part(leases[0])).generation == 2
            await catalog.commit_container(leases[0], record(2))
            assert [c.generation for c in await catalog.list_containers(DAY)] == [1, 2]

        run(first)
        run(second)

    def test_a_cancelled_call_leaves_the_catalog_usable(self, run_many: RunMany) -> None:
        async def scenario(catalogs: list[Catalog]) -> None:
            lease = await acquired(catalogs[0])
            for turn in range(30):
                calls = [asyncio.ensure_future(catalog.begin_part(lease)) for catalog in catalogs]
                for _ in range(turn):
                    await asyncio.sleep(0)
                calls[0].cancel()
                outcomes = await asyncio.gather(*calls, return_exceptions=True)
                assert all(isinstance(outcome, ContainerRecord | asyncio.CancelledError) for outcome in outcomes)
            parts = await asyncio.gather(*(catalog.begin_part(lease) for catalog in catalogs))
            assert len({part.generation for part in parts}) == 2

        run_many(2, scenario)

    def test_closing_waits_for_the_calls_that_were_made_before(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            lease = await acquired(catalog)
            calls = [asyncio.ensure_future(catalog.begin_part(lease)) for _ in range(10)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await catalog.close()
            assert sorted(part.generation for part in await asyncio.gather(*calls)) == list(range(1, 11))

        run(scenario)

    def test_a_closed_catalog_says_so(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            lease = await acquired(catalog)
            await catalog.close()
            await catalog.close()
            for call in (catalog.list_containers(), catalog.renew(lease, 1), catalog.acquire(DAY, "00", "a", 1)):
                with pytest.raises(CatalogUnavailable):
                    await call

        run(scenario)
