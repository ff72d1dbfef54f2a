"""What every catalog does: one suite for all. Expiry is by the database's clock, so time passes by ttl_s <= 0."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from assignment.catalog import Catalog, ContainerRecord, ContainerState, Lease
from assignment.errors import CatalogUnavailable, ContainerExists, InvalidRequest, LeaseLost

DAY = date(2026, 11, 20)
NEXT_DAY = date(2026, 11, 21)
NOW_MS = 1_795_000_000_000
HOUR_S = 3600.0

Scenario = Callable[[Catalog], Awaitable[None]]
Run = Callable[[Scenario], None]
ScenarioOfMany = Callable[[list[Catalog]], Awaitable[None]]
RunMany = Callable[[int, ScenarioOfMany], None]


def record(generation: int = 1, *, shard: str = "3f", day: date = DAY, key: str | None = None) -> ContainerRecord:
    return ContainerRecord(
        object_key=key or f"{day}/{shard}-{generation:06d}.des",
        day=day,
        shard=shard,
        generation=generation,
        size=1000 + generation,
        files=10,
        etag=f'"etag{generation}"',
    )


async def acquired(catalog: Catalog, holder: str = "a", ttl_s: float = HOUR_S, *, shard: str = "3f") -> Lease:
    lease = await catalog.acquire(DAY, shard, holder, ttl_s)
    assert lease is not None
    return lease


class CatalogContract:
    """Subclasses say how a catalog is made; two made with the same directory are two openings of one catalog."""

    @staticmethod
    def make_catalog(tmp_path: Path) -> AbstractAsyncContextManager[Catalog]:
        raise NotImplementedError

    @pytest.fixture
    def run(self, tmp_path: Path) -> Run:
        async def opened(scenario: Scenario) -> None:
            async with self.make_catalog(tmp_path) as catalog:
                await scenario(catalog)

        return lambda scenario: asyncio.run(opened(scenario))

    @pytest.fixture
    def run_many(self, tmp_path: Path) -> RunMany:
        async def opened(count: int, scenario: ScenarioOfMany) -> None:
            async with AsyncExitStack() as stack:
                await scenario([await stack.enter_async_context(self.make_catalog(tmp_path)) for _ in range(count)])

        return lambda count, scenario: asyncio.run(opened(count, scenario))

    # Leases

    def test_the_first_lease_of_a_shard(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            lease = await acquired(catalog, "a", 60)
            assert (lease.day, lease.shard, lease.holder, lease.token) == (DAY, "3f", "a", 1)
            assert (lease.previous_token, lease.previous_holder) == (None, None)
            ahead = lease.expires_at - datetime.now(UTC)
            assert timedelta(seconds=50) < ahead < timedelta(seconds=61)

        run(scenario)

    def test_another_holder_waits_for_the_expiry_by_the_databases_clock(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            first = await acquired(catalog, "a")
            assert await catalog.acquire(DAY, "3f", "b", HOUR_S) is None
            assert await catalog.renew(first, 0) is not None
            second = await acquired(catalog, "b")
            assert second.token == first.token + 1
            assert (second.previous_token, second.previous_holder) == (first.token, "a")
            assert await catalog.acquire(DAY, "3f", "a", HOUR_S) is None

        run(scenario)

    def test_a_short_lease_passes_by_itself(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            lease = await acquired(catalog, "a", 0.02)
            while await catalog.acquire(DAY, "3f", "b", HOUR_S) is None:
                pass
            assert await catalog.renew(lease, HOUR_S) is None

        run(scenario)

    def test_shards_and_days_are_leased_apart(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            await acquired(catalog, "a")
            assert await catalog.acquire(DAY, "40", "b", HOUR_S) is not None
            assert await catalog.acquire(NEXT_DAY, "3f", "c", HOUR_S) is not None

        run(scenario)

    def test_a_restarted_holder_gets_a_new_token_and_knows_that_nobody_came_between(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            before = await acquired(catalog, "a")
            after = await acquired(catalog, "a")
            assert after.token == before.token + 1
            assert (after.previous_token, after.previous_holder) == (before.token, "a")
            assert await catalog.renew(before, HOUR_S) is None
            with pytest.raises(LeaseLost):
                await catalog.commit_container(before, record())
            await catalog.release(before)
            assert await catalog.renew(after, HOUR_S) is not None

        run(scenario)

    def test_a_renewed_lease_is_the_same_and_expires_later(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            await acquired(catalog, "a")
            lease = await acquired(catalog, "a", 60)
            renewed = await catalog.renew(lease, HOUR_S)
            assert renewed is not None
            assert renewed.expires_at > lease.expires_at
            assert replace(renewed, expires_at=lease.expires_at) == lease

        run(scenario)

    def test_an_expired_lease_is_not_renewed_even_if_nobody_else_came(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            for ttl_s in (0.0, -5.0):
                assert await catalog.renew(await acquired(catalog, "a", ttl_s), HOUR_S) is None

        run(scenario)

    def test_a_released_shard_is_free_at_once_and_its_tokens_go_on(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            first = await acquired(catalog, "a")
            await catalog.release(first)
            await catalog.release(first)
            assert await catalog.renew(first, HOUR_S) is None
            assert (await acquired(catalog, "b")).token == first.token + 1

        run(scenario)

    def test_release_needs_proof_of_ownership(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            stale = await acquired(catalog, "a", 0)
            current = await acquired(catalog, "b")
            await catalog.release(stale)
            await catalog.release(replace(stale, holder="b"))
            assert await catalog.renew(current, HOUR_S) is not None

        run(scenario)

    def test_of_many_who_try_at_once_exactly_one_gets_the_shard(self, run_many: RunMany) -> None:
        async def scenario(catalogs: list[Catalog]) -> None:
            tries = [
                catalog.acquire(DAY, "3f", f"{task}/{number}", HOUR_S)
                for number, catalog in enumerate(catalogs)
                for task in range(10)
            ]
            leases = [lease for lease in await asyncio.gather(*tries) if lease is not None]
            assert [lease.token for lease in leases] == [1]

        run_many(3, scenario)

    # Generations

    def test_generations_start_where_asked_and_never_come_again(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            lease = await acquired(catalog)
            assert [await catalog.next_generation(lease) for _ in range(3)] == [1, 2, 3]
            assert await catalog.next_generation(lease, at_least=10) == 10
            assert await catalog.next_generation(lease, at_least=5) == 11
            await catalog.release(lease)
            assert await catalog.next_generation(await acquired(catalog, "b")) == 12

        run(scenario)

    def test_the_first_generation_is_the_least_of_the_shard(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            for first_generation, wanted in [(7, 7), (3, 8), (20, 20)]:
                lease = await catalog.acquire(DAY, "3f", "a", HOUR_S, first_generation=first_generation)
                assert lease is not None
                assert await catalog.next_generation(lease) == wanted

        run(scenario)

    def test_no_generation_without_a_lease_that_holds(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            lease = await acquired(catalog, "a", 0)
            with pytest.raises(LeaseLost, match="token 1"):
                await catalog.next_generation(lease)
            assert await catalog.next_generation(await acquired(catalog, "b")) == 1

        run(scenario)

    def test_generations_are_allocated_once_under_concurrency(self, run_many: RunMany) -> None:
        async def scenario(catalogs: list[Catalog]) -> None:
            lease = await acquired(catalogs[0])
            numbers = await asyncio.gather(*(catalog.next_generation(lease) for catalog in catalogs for _ in range(20)))
            assert sorted(numbers) == list(range(1, 61))

        run_many(3, scenario)

    # Containers

    def test_a_committed_container_is_found_as_it_was_written(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            await acquired(catalog)
            lease = await acquired(catalog)
            await catalog.commit_container(lease, record(token := 5, key="2026-11-20/3f-000005.des"))
            found = await catalog.find_container("2026-11-20/3f-000005.des")
            assert found is not None
            assert found.created_at is not None
            assert abs(found.created_at - datetime.now(UTC)) < timedelta(seconds=30)
            assert replace(found, created_at=None) == replace(record(token), token=lease.token)
            assert found.state is ContainerState.COMMITTED
            assert await catalog.find_container("2026-11-20/3f-000006.des") is None

        run(scenario)

    def test_a_large_container_is_recorded_exactly(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            large = replace(record(10**9), size=5 * 2**40, files=2**33, etag='"' + "f" * 64 + '-10000"')
            await catalog.commit_container(await acquired(catalog), large)
            found = await catalog.find_container(large.object_key)
            assert found is not None
            assert (found.size, found.files, found.etag) == (large.size, large.files, large.etag)

        run(scenario)

    def test_a_holder_whose_lease_has_passed_cannot_commit(self, run: Run) -> None:
        """A packer that was paused past its lease cannot commit."""

        async def scenario(catalog: Catalog) -> None:
            paused = await acquired(catalog, "a", 0)
            successor = await acquired(catalog, "b")
            await catalog.commit_container(successor, record(2))
            with pytest.raises(LeaseLost):
                await catalog.commit_container(paused, record(1))
            assert await catalog.renew(paused, HOUR_S) is None
            assert [c.generation for c in await catalog.list_containers(DAY)] == [2]
            assert await catalog.find_container(record(1).object_key) is None

        run(scenario)

    def test_an_expired_lease_does_not_commit_even_if_nobody_else_came(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            with pytest.raises(LeaseLost):
                await catalog.commit_container(await acquired(catalog, "a", 0), record())
            assert await catalog.list_containers() == []

        run(scenario)

    def test_a_key_is_committed_once(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            lease = await acquired(catalog)
            await catalog.commit_container(lease, record())
            with pytest.raises(ContainerExists):
                await catalog.commit_container(lease, replace(record(), size=1))
            found = await catalog.find_container(record().object_key)
            assert found is not None
            assert found.size == record().size
            await catalog.release(lease)
            with pytest.raises(LeaseLost):
                await catalog.commit_container(lease, record())

        run(scenario)

    def test_of_many_commits_of_one_key_one_is_written(self, run_many: RunMany) -> None:
        async def scenario(catalogs: list[Catalog]) -> None:
            lease = await acquired(catalogs[0])
            outcomes = await asyncio.gather(
                *(catalog.commit_container(lease, record()) for catalog in catalogs for _ in range(5)),
                return_exceptions=True,
            )
            assert sorted(map(repr, map(type, outcomes))) == sorted(
                [repr(type(None)), *[repr(ContainerExists)] * (len(outcomes) - 1)]
            )

        run_many(3, scenario)

    @pytest.mark.parametrize("wrong", [record(shard="40"), record(day=NEXT_DAY)])
    def test_a_lease_commits_containers_of_its_own_shard_only(self, run: Run, wrong: ContainerRecord) -> None:
        async def scenario(catalog: Catalog) -> None:
            with pytest.raises(InvalidRequest):
                await catalog.commit_container(await acquired(catalog), wrong)
            assert await catalog.list_containers() == []

        run(scenario)

    @pytest.mark.parametrize("wrong", [replace(record(), size=-1), replace(record(), files=-1)])
    def test_a_record_that_cannot_be_is_refused(self, run: Run, wrong: ContainerRecord) -> None:
        async def scenario(catalog: Catalog) -> None:
            with pytest.raises(InvalidRequest):
                await catalog.commit_container(await acquired(catalog), wrong)

        run(scenario)

    def test_containers_are_listed_by_day_in_order(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            for day, shard, generation in [
                (NEXT_DAY, "00", 1), (DAY, "3f", 10), (DAY, "3f", 9), (DAY, "0a", 11),
            ]:  # fmt: skip
                lease = await catalog.acquire(day, shard, "a", HOUR_S)
                assert lease is not None
                await catalog.commit_container(lease, record(generation, shard=shard, day=day))
            listed = [(c.day, c.shard, c.generation) for c in await catalog.list_containers()]
            assert listed == [(DAY, "0a", 11), (DAY, "3f", 9), (DAY, "3f", 10), (NEXT_DAY, "00", 1)]
            assert [c.shard for c in await catalog.list_containers(NEXT_DAY)] == ["00"]
            assert await catalog.list_containers(date(2020, 1, 1)) == []

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

    def test_ids_go_on_after_reopening_whatever_the_clock_says(self, tmp_path: Path) -> None:
        async def reserved(now_ms: int) -> list[str]:
            async with self.make_catalog(tmp_path) as catalog:
                return list((await catalog.reserve_ids(0, DAY, 200, now_ms)).names("DES"))

        names = [name for now_ms in (NOW_MS, NOW_MS, NOW_MS - 5, 0) for name in asyncio.run(reserved(now_ms))]
        assert len(set(names)) == 800

    def test_no_ids_cannot_be_reserved(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            with pytest.raises(InvalidRequest):
                await catalog.reserve_ids(0, DAY, 0, NOW_MS)

        run(scenario)

    # The catalog as a whole

    def test_everything_is_there_after_reopening(self, tmp_path: Path) -> None:
        async def first() -> Lease:
            async with self.make_catalog(tmp_path) as catalog:
                lease = await acquired(catalog)
                assert await catalog.next_generation(lease) == 1
                await catalog.commit_container(lease, record(1))
                return lease

        async def second(lease: Lease) -> None:
            async with self.make_catalog(tmp_path) as catalog:
                assert await catalog.acquire(DAY, "3f", "b", HOUR_S) is None
                assert await catalog.next_generation(lease) == 2
                await catalog.commit_container(lease, record(2))
                assert [c.generation for c in await catalog.list_containers(DAY)] == [1, 2]

        asyncio.run(second(asyncio.run(first())))

    def test_a_cancelled_call_leaves_the_catalog_usable(self, run_many: RunMany) -> None:
        async def scenario(catalogs: list[Catalog]) -> None:
            lease = await acquired(catalogs[0])
            for turn in range(30):
                calls = [asyncio.ensure_future(catalog.next_generation(lease)) for catalog in catalogs]
                for _ in range(turn):
                    await asyncio.sleep(0)
                calls[0].cancel()
                outcomes = await asyncio.gather(*calls, return_exceptions=True)
                assert all(isinstance(outcome, int | asyncio.CancelledError) for outcome in outcomes)
            numbers = await asyncio.gather(*(catalog.next_generation(lease) for catalog in catalogs))
            assert len(set(numbers)) == 2

        run_many(2, scenario)

    def test_closing_waits_for_the_calls_that_were_made_before(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            lease = await acquired(catalog)
            calls = [asyncio.ensure_future(catalog.next_generation(lease)) for _ in range(10)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await catalog.close()
            assert await asyncio.gather(*calls) == list(range(1, 11))

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
