"""A node id is held by the clock of who holds it, and another one is leased when it was lost."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from assignment.catalog import Catalog
from assignment.errors import CatalogUnavailable, NodeIdLost
from assignment.node_id import NodeIdKeeper
from assignment.opening import open_catalog
from tests.fakes.watched_catalog import WatchedCatalog

TTL_S = 60.0
LIMIT_S = 20.0


class Turns:
    """A clock that a test sets, and a sleep that lasts until the test wakes the sleeper."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.sleeps: asyncio.Queue[float] = asyncio.Queue()
        self._wake = asyncio.Event()

    def clock(self) -> float:
        return self.now

    async def sleep(self, wait_s: float) -> None:
        self.sleeps.put_nowait(wait_s)
        await self._wake.wait()
        self._wake.clear()

    async def asleep(self) -> float:
        """Wait for the keeper to sleep; for how long it wants to."""
        async with asyncio.timeout(LIMIT_S):
            return await self.sleeps.get()

    async def turn(self) -> float:
        """Wake the keeper, and wait for it to sleep again."""
        self._wake.set()
        return await self.asleep()


def run(path: Path, test: Any) -> None:
    """A test with a catalog of its own, as the packer has one, and a keeper's clock."""

    async def main() -> None:
        catalog = await open_catalog(str(path / "catalog.sqlite"))
        try:
            await test(catalog, Turns())
        finally:
            await catalog.close()

    work: Coroutine[Any, Any, None] = main()
    asyncio.run(work)


def keeper_of(catalog: Catalog, turns: Turns) -> NodeIdKeeper:
    return NodeIdKeeper(catalog, "replica", TTL_S, clock=turns.clock, sleep=turns.sleep)


def test_it_is_renewed_at_a_third_of_its_time(tmp_path: Path) -> None:
    async def test(catalog: Catalog, turns: Turns) -> None:
        async with keeper_of(catalog, turns) as keeper:
            assert await turns.asleep() == TTL_S / 3
            first = keeper.lease()
            turns.now += TTL_S - 1
            assert await turns.turn() == TTL_S / 3
            turns.now += TTL_S - 1
            assert (keeper.lease().node_id, keeper.lease().token) == (first.node_id, first.token)

    run(tmp_path, test)


def test_by_its_own_clock_it_is_lost_when_its_time_has_passed(tmp_path: Path) -> None:
    """Whatever the catalog would say: nobody is asked. It counts from before the request was sent."""

    async def test(catalog: Catalog, turns: Turns) -> None:
        watched = WatchedCatalog(catalog)
        watched.gates["lease_node_id"] = asyncio.Event()
        async with keeper_of(watched.watched(), turns) as keeper:
            with pytest.raises(NodeIdLost, match="none was leased yet"):
                keeper.lease()
            async with asyncio.timeout(LIMIT_S):
                await watched.waiting.get()
            turns.now += TTL_S - 1  # the answer takes nearly all of the time
            watched.gates["lease_node_id"].set()
            await turns.asleep()
            keeper.lease()
            calls = len(watched.calls)
            turns.now += 1
            with pytest.raises(NodeIdLost, match="was not renewed for 60 s"):
                keeper.lease()
            assert len(watched.calls) == calls

    run(tmp_path, test)


def test_another_one_is_leased_when_it_was_lost(tmp_path: Path, announced_logs: list[str]) -> None:
    announced_logs.append("the node id was lost")

    async def test(catalog: Catalog, turns: Turns) -> None:
        async with keeper_of(catalog, turns) as keeper:
            await turns.asleep()
            first = keeper.lease()
            await catalog.release_node_id(first)
            assert await turns.turn() == TTL_S / 3
            assert keeper.lease().node_id != first.node_id

    run(tmp_path, test)


def test_a_catalog_that_fails_is_asked_again_and_ever_less_often(tmp_path: Path, announced_logs: list[str]) -> None:
    announced_logs.append("the node id was not renewed")

    async def test(catalog: Catalog, turns: Turns) -> None:
        watched = WatchedCatalog(catalog)
        async with keeper_of(watched.watched(), turns) as keeper:
            await turns.asleep()
            held = keeper.lease()
            watched.failure = CatalogUnavailable("down")
            waits = [await turns.turn() for _ in range(12)]
            assert waits == sorted(waits)
            assert waits[0] > 0
            assert waits[-1] == TTL_S / 3
            assert keeper.lease() == held  # its time has not passed
            watched.failure = None
            assert await turns.turn() == TTL_S / 3
            assert keeper.lease().token == held.token

    run(tmp_path, test)


def test_without_a_free_node_id_there_is_none(tmp_path: Path, announced_logs: list[str]) -> None:
    announced_logs.append("others hold all of them")

    async def test(catalog: Catalog, turns: Turns) -> None:
        leases = [await catalog.lease_node_id("another", 3600) for _ in range(256)]
        async with keeper_of(catalog, turns) as keeper:
            assert await turns.asleep() < TTL_S / 3
            with pytest.raises(NodeIdLost, match="others hold all of them"):
                keeper.lease()
            freed = leases[7]
            assert freed is not None
            await catalog.release_node_id(freed)
            await turns.turn()
            assert keeper.lease().node_id == freed.node_id

    run(tmp_path, test)


def test_it_is_released_at_the_end(tmp_path: Path) -> None:
    async def test(catalog: Catalog, turns: Turns) -> None:
        for _ in range(255):
            assert await catalog.lease_node_id("another", 3600) is not None
        async with keeper_of(catalog, turns) as keeper:
            await turns.asleep()
            held = keeper.lease()
        with pytest.raises(NodeIdLost):
            keeper.lease()
        following = await catalog.lease_node_id("another", 3600)
        assert following is not None
        assert following.node_id == held.node_id

    run(tmp_path, test)
