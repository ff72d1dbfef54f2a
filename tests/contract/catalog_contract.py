"""What every catalog does: one suite for all. Expiry is by the database's clock, so time passes by ttl_s <= 0."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

import pytest

from assignment.catalog import LIVE, Catalog, ContainerRecord, ContainerState, Lease, ShardHolder
from assignment.errors import (
    ContainerExists,
    InvalidRequest,
    LeaseLost,
)
from assignment.opening import open_catalog

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


async def begun(catalog: Catalog, lease: Lease, wanted: ContainerRecord) -> ContainerRecord:
    return await catalog.begin_container(lease, wanted.object_key, wanted.generation)


async def committed(catalog: Catalog, lease: Lease, *records: ContainerRecord) -> None:
    for wanted in records:
        await begun(catalog, lease, wanted)
        await catalog.commit_container(lease, wanted)


async def states(catalog: Catalog) -> dict[int, ContainerState]:
    """By generation."""
    return {c.generation: c.state for c in await catalog.list_containers()}


class CatalogScenarios:
    """Subclasses say where an empty catalog is; opened twice, it is one catalog still."""

    @pytest.fixture
    def url(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def run(self, run_many: RunMany) -> Run:
        return lambda scenario: run_many(1, lambda catalogs: scenario(catalogs[0]))

    @pytest.fixture
    def run_many(self, url: str) -> RunMany:
        async def opened(count: int, scenario: ScenarioOfMany) -> None:
            async with AsyncExitStack() as stack:
                catalogs = []
                for _ in range(count):
                    catalogs.append(await open_catalog(url))
                    stack.push_async_callback(catalogs[-1].close)
                await scenario(catalogs)

        return lambda count, scenario: asyncio.run(opened(count, scenario))


class CatalogContract(CatalogScenarios):
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
                await catalog.begin_part(before)
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

    def test_holders_are_listed_for_people(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            assert await catalog.list_holders() == []
            await acquired(catalog, "a", 0)
            held = await acquired(catalog, "b")
            free = await acquired(catalog, "c", 0, shard="0a")
            other_day = await catalog.acquire(NEXT_DAY, "00", "d", HOUR_S)
            assert other_day is not None
            rows = [
                ShardHolder(lease.day, lease.shard, lease.holder, lease.token, lease.expires_at, holds)
                for lease, holds in [(free, False), (held, True), (other_day, True)]
            ]
            assert await catalog.list_holders() == rows
            assert await catalog.list_holders(DAY) == rows[:2]
            assert await catalog.list_holders(DAY, latest=1) == rows[1:2]
            assert await catalog.list_holders(latest=9) == rows

        run(scenario)

    # Parts and their generations

    def test_generations_start_where_asked_and_never_come_again(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            lease = await acquired(catalog)

            async def next_generation(at_least: int = 1) -> int:
                return (await catalog.begin_part(lease, at_least=at_least)).generation

            assert [await next_generation() for _ in range(3)] == [1, 2, 3]
            assert await next_generation(10) == 10
            assert await next_generation(5) == 11
            await catalog.release(lease)
            lease = await acquired(catalog, "b")
            assert await next_generation() == 12
            await catalog.delete_containers(lease, [c.object_key for c in await catalog.list_containers()])
            assert await catalog.forget_deleted(0) == 6
            assert await next_generation() == 13
            await begun(catalog, lease, record(20))
            assert await next_generation() == 21
            await begun(catalog, lease, record(19, key="2026-11-20/3f-000001-000019.des"))
            assert await next_generation() == 22
            await begun(catalog, lease, record(0, key="2026-11-20/3f.des"))
            assert await next_generation() == 23

        run(scenario)

    def test_the_first_generation_is_the_least_of_the_shard(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            for first_generation, wanted in [(7, 7), (3, 8), (20, 20)]:
                lease = await catalog.acquire(DAY, "3f", "a", HOUR_S, first_generation=first_generation)
                assert lease is not None
                assert (await catalog.begin_part(lease)).generation == wanted

        run(scenario)

    def test_a_part_that_is_begun_has_its_row_under_the_leases_token(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            await acquired(catalog)
            lease = await acquired(catalog)
            part = await catalog.begin_part(lease, at_least=7)
            assert part.changed_at is not None
            assert abs(part.changed_at - await catalog.now()) < timedelta(seconds=30)
            assert replace(part, changed_at=None) == ContainerRecord(
                object_key="2026-11-20/3f-000007.des",
                day=DAY,
                shard="3f",
                generation=7,
                state=ContainerState.UPLOADING,
                token=2,
            )
            assert await catalog.find_container(part.object_key) == part

        run(scenario)

    def test_nothing_is_begun_without_a_lease_that_holds(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            lease = await acquired(catalog, "a", 0)
            with pytest.raises(LeaseLost, match="token 1"):
                await catalog.begin_part(lease)
            with pytest.raises(LeaseLost, match="token 1"):
                await begun(catalog, lease, record(9))
            assert await catalog.list_containers() == []
            assert (await catalog.begin_part(await acquired(catalog, "b"))).generation == 1

        run(scenario)

    def test_generations_are_allocated_once_under_concurrency(self, run_many: RunMany) -> None:
        async def scenario(catalogs: list[Catalog]) -> None:
            lease = await acquired(catalogs[0])
            parts = await asyncio.gather(*(catalog.begin_part(lease) for catalog in catalogs for _ in range(20)))
            assert sorted(part.generation for part in parts) == list(range(1, 61))

        run_many(3, scenario)

    # Containers

    def test_a_committed_container_is_found_as_it_was_written(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            await acquired(catalog)
            lease = await acquired(catalog)
            await committed(catalog, lease, record(5, key="2026-11-20/3f-000005.des"))
            found = await catalog.find_container("2026-11-20/3f-000005.des")
            assert found is not None
            assert found.changed_at is not None
            assert abs(found.changed_at - datetime.now(UTC)) < timedelta(seconds=30)
            assert replace(found, changed_at=None) == replace(record(5), token=lease.token)
            assert found.state is ContainerState.COMMITTED
            assert await catalog.find_container("2026-11-20/3f-000006.des") is None

        run(scenario)

    def test_a_large_container_is_recorded_exactly(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            large = replace(record(10**9), size=5 * 2**40, files=2**33, etag='"' + "f" * 64 + '-10000"')
            await committed(catalog, await acquired(catalog), large)
            found = await catalog.find_container(large.object_key)
            assert found is not None
            assert (found.generation, found.size, found.files, found.etag) == (
                10**9,
                large.size,
                large.files,
                large.etag,
            )

        run(scenario)

    def test_a_holder_that_was_paused_before_its_commit_cannot_commit(self, run: Run) -> None:
        """A packer that was paused past its lease cannot commit; who holds the shard may take over what it began."""

        async def scenario(catalog: Catalog) -> None:
            paused = await acquired(catalog, "a")
            part = await catalog.begin_part(paused)
            await catalog.renew(paused, 0)
            successor = await acquired(catalog, "b")
            with pytest.raises(LeaseLost):
                await catalog.commit_container(paused, record(1))
            assert await catalog.find_container(part.object_key) == part
            await committed(catalog, successor, record(2))
            with pytest.raises(LeaseLost):
                await catalog.commit_container(paused, record(1), supersedes=[record(2).object_key])
            taken = await catalog.begin_container(successor, part.object_key, 1)
            assert (taken.state, taken.token) == (ContainerState.UPLOADING, successor.token)
            with pytest.raises(LeaseLost):
                await catalog.commit_container(paused, record(1))
            await catalog.commit_container(successor, record(1))
            assert await states(catalog) == {1: ContainerState.COMMITTED, 2: ContainerState.COMMITTED}

        run(scenario)

    def test_what_was_begun_under_an_earlier_token_is_not_committed(self, run: Run) -> None:
        """What has an uploading row under a token that is not the shard's any more can never be committed."""

        async def scenario(catalog: Catalog) -> None:
            await begun(catalog, await acquired(catalog, "a"), record(1))
            restarted = await acquired(catalog, "a")
            with pytest.raises(InvalidRequest, match="token 1"):
                await catalog.commit_container(restarted, record(1))
            await committed(catalog, restarted, record(1))

        run(scenario)

    def test_an_expired_lease_does_not_commit_even_if_nobody_else_came(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            lease = await acquired(catalog)
            await begun(catalog, lease, record())
            assert await catalog.renew(lease, 0) is not None
            with pytest.raises(LeaseLost):
                await catalog.commit_container(lease, record())
            assert await states(catalog) == {1: ContainerState.UPLOADING}

        run(scenario)

    def test_a_key_is_committed_once(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            lease = await acquired(catalog)
            await committed(catalog, lease, record())
            with pytest.raises(ContainerExists):
                await catalog.commit_container(lease, replace(record(), size=1))
            found = await catalog.find_container(record().object_key)
            assert found is not None
            assert found.size == record().size
            await catalog.release(lease)
            with pytest.raises(LeaseLost):
                await catalog.commit_container(lease, record())

        run(scenario)

    @pytest.mark.parametrize("state", [*sorted(LIVE), ContainerState.SUPERSEDED])
    def test_a_container_that_was_live_is_never_begun_or_committed_again(self, run: Run, state: ContainerState) -> None:
        async def scenario(catalog: Catalog) -> None:
            lease = await acquired(catalog)
            await catalog.adopt_containers(lease, [replace(record(), state=state)])
            with pytest.raises(ContainerExists):
                await begun(catalog, lease, record())
            with pytest.raises(ContainerExists):
                await catalog.commit_container(lease, record())
            assert await states(catalog) == {1: state}

        run(scenario)

    def test_what_was_not_begun_is_not_committed(self, run: Run) -> None:
        async def scenario(catalog: Catalog) -> None:
            lease = await acquired(catalog)
            with pytest.raises(InvalidRequest, match="not begun"):
                await catalog.commit_container(lease, record())
            await begun(catalog, lease, record())
            await catalog.delete_containers(lease, [record().object_key])
            with pytest.raises(InvalidRequest, match="not begun"):
                await catalog.commit_container(lease, record())
            await committed(catalog, lease, record())

        run(scenario)

    @pytest.mark.parametrize("state", sorted(set(ContainerState) - LIVE))
    def test_a_commit_makes_a_container_live(self, run: Run, state: ContainerState) -> None:
        async def scenario(catalog: Catalog) -> None:
            lease = await acquired(catalog)
            await begun(catalog, lease, record())
            with pytest.raises(InvalidRequest, match=state):
                await catalog.commit_container(lease, replace(record(), state=state))
            await catalog.commit_container(lease, replace(record(), state=ContainerState.SEALED))
            assert await states(catalog) == {1: ContainerState.SEALED}

        run(scenario)

    def test_of_many_commits_of_one_key_one_is_written(self, run_many: RunMany) -> None:
        async def scenario(catalogs: list[Catalog]) -> None:
            lease = await acquired(catalogs[0])
            await begun(catalogs[0], lease, record())
            outcomes = await asyncio.gather(
                *(catalog.commit_container(lease, record()) for catalog in catalogs for _ in range(5)),
                return_exceptions=True,
            )
            assert sorted(map(repr, map(type, outcomes))) == sorted(
                [repr(type(None)), *[repr(ContainerExists)] * (len(outcomes) - 1)]
            )

        run_many(3, scenario)

    @pytest.mark.parametrize("wrong", [record(shard="40"), record(day=NEXT_DAY)])
    def test_a_lease_is_for_containers_of_its_own_shard_only(self, run: Run, wrong: ContainerRecord) -> None:
        async def scenario(catalog: Catalog) -> None:
            lease = await acquired(catalog)
            for call in (
                begun(catalog, lease, wrong),
                catalog.commit_container(lease, wrong),
                catalog.adopt_containers(lease, [record(), wrong]),
            ):
                with pytest.raises(InvalidRequest, match=wrong.object_key):
                    await call
            assert await catalog.list_containers() == []

        run(scenario)

    @pytest.mark.parametrize(
        "key", ["3f-000001.des", "2026-11-20/3f-000001", "2026-11-20/x.des", "2026-11-20/a/3f.des"]
    )
    def test_a_key_that_is_none_of_a_shard_is_refused(self, run: Run, key: str) -> None:
        async def scenario(catalog: Catalog) -> None:
            with pytest.raises(InvalidRequest, match=key):
                await catalog.begin_container(await acquired(catalog), key, 1)

        run(scenario)

    @pytest.mark.parametrize("wrong", [replace(record(), size=-1), replace(record(), files=-1)])
    def test_a_record_that_cannot_be_is_refused(self, run: Run, wrong: ContainerRecord) -> None:
        async def scenario(catalog: Catalog) -> None:
            lease = await acquired(catalog)
            await begun(catalog, lease, wrong)
            with pytest.raises(InvalidRequest):
                await catalog.commit_container(lease, wrong)
            assert await states(catalog) == {1: ContainerState.UPLOADING}

        run(scenario)

    # Superseding
