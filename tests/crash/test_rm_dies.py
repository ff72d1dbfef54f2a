"""The tables of desfs/removal/rm.py, desfs/removal/expire.py and desfs/catalog_check/repair.py: wherever one of them
dies, the next one completes it."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest

from assignment.catalog import Catalog, ContainerState, Lease
from des_format.shards import part_name
from tests.crash.forking import Report, forked
from tests.removing import BIG, DAY, World, put_day, put_part, shard_of

Work = Callable[[Callable[[str], None]], object]

FILES = {name: name.encode() for name in ("a", "b", "c", "d/1", "d/2", "e/3", "f")} | {"big": b"x" * BIG}
REMOVED = ["a", "c", "d/1", "big"]
KEPT = {name: data for name, data in FILES.items() if name not in REMOVED}


def killed_at(n: int, work: Work) -> Report:
    """Do something in a fork that is killed before its n-th effect; the effects that it began."""

    def child(writer: int) -> NoReturn:
        count = 0

        def effect(name: str) -> None:
            nonlocal count
            count += 1
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(writer, f"{name}\n".encode())

        try:
            work(effect)
        except BaseException as error:
            os.write(writer, f"\0{error!r}".encode())
            os._exit(1)
        os._exit(0)

    return forked(child)


def survived(report: Report) -> bool:
    assert report.status in (0, -signal.SIGKILL), report
    return report.status == 0


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[], World]:
    """Makes worlds, each of a day whose containers the catalog knows. None is a copy: ETags are those of the files."""
    numbers = itertools.count()

    def make() -> World:
        world = World(tmp_path / str(next(numbers)))
        put_day(world.root, FILES)
        world.repair()
        world.assert_agrees()
        return world

    return make


def paths() -> list[str]:
    return [f"{DAY}/{name}" for name in REMOVED]


def _remove(world: World, effect: Callable[[str], None]) -> None:
    world.remove(*paths(), effect=effect)


def _expire(world: World, effect: Callable[[str], None]) -> None:
    world.expire(0, effect=effect)


def _repair(world: World, effect: Callable[[str], None]) -> None:
    world.repair(effect=effect, grace=0, external_grace=0)


def test_wherever_rm_dies_it_is_completed_by_the_next(fresh: Callable[[], World]) -> None:
    """docs/semantics.md: Killed at any moment and started again, it removes what it was told to, and nothing else.

    desfs/removal/rm.py, its table: what the collector then finds left over does not bring anything back."""
    assert len(set(map(shard_of, REMOVED))) > 1
    for n in itertools.count(1):
        world = fresh()
        done = survived(killed_at(n, partial(_remove, world)))
        world.end_leases()
        between = world.shown()
        assert KEPT.items() <= between.items() <= FILES.items()
        world.remove(*paths())
        assert world.shown() == KEPT
        world.end_leases()
        world.repair(grace=0)
        world.assert_agrees(grace=0)
        assert world.shown() == KEPT
        assert world.remove(*paths()).gone == paths()
        if done:
            assert between == KEPT
            assert n > 8
            return


def test_what_a_dead_rm_has_done_holds_when_nobody_repeats_it(fresh: Callable[[], World]) -> None:
    """docs/semantics.md: When it is not started again, what it had hidden stays hidden.

    Each shard is then as it was, or as it was to be."""
    for n in itertools.count(1):
        world = fresh()
        done = survived(killed_at(n, partial(_remove, world)))
        between = world.shown()
        world.end_leases()
        world.repair(grace=0)
        world.assert_agrees(grace=0)
        after = world.shown()
        for shard in set(map(shard_of, FILES)):
            own = {name for name in after if shard_of(name) == shard}
            assert own in ({name for name in names if shard_of(name) == shard} for names in (FILES, KEPT))
        assert after == between
        world.remove(*paths())
        assert world.shown() == KEPT
        if done:
            assert after == KEPT
            return


def test_wherever_expire_dies_it_is_completed_by_the_next(fresh: Callable[[], World]) -> None:
    """desfs/removal/expire.py, its table: the day is gone in the end, with its rows and external objects; what is shown
    meanwhile is whole, and was shown before; the other day stays."""
    for n in itertools.count(1):
        world = fresh()
        world.remove(f"{DAY}/a")
        put_day(world.root, {"young": b"1"}, date(2999, 1, 1))
        world.repair()
        before = world.shown()
        done = survived(killed_at(n, partial(_expire, world)))
        world.end_leases()
        assert world.shown().items() <= before.items()
        assert world.compare(grace=0).counts["damage"] == 0
        world.expire(0)
        assert world.shown() == {"young": b"1"}
        assert all(key.startswith("2999-01-01/") for key in world.objects())
        world.assert_agrees(grace=0)
        if done:
            assert n > 6
            return


def test_wherever_a_repair_dies_it_is_completed_by_the_next(fresh: Callable[[], World]) -> None:
    """desfs/catalog_check/repair.py: at no moment is anything missing that a mount has shown."""
    for n in itertools.count(1):
        world = fresh()
        _leave_a_mess(world)
        before = world.shown()
        done = survived(killed_at(n, partial(_repair, world)))
        world.end_leases()
        assert world.shown() == before
        world.repair(grace=0, external_grace=0)
        assert world.left == []
        world.assert_agrees(grace=0, external_grace=0)
        assert world.shown() == before
        if done:
            assert n > 6
            return


def _leave_a_mess(world: World) -> None:
    """Of one shard a container that was merged into another, one that was deleted and came late, and one whose upload
    was not committed, all with the same files; of another one what an import has put; and a payload that nobody
    names."""
    shard = shard_of("a")
    own = {name: data for name, data in FILES.items() if shard_of(name) == shard}

    async def leave(catalog: Catalog, lease: Lease) -> None:
        late, merged, orphan = [await catalog.begin_part(lease, at_least=2) for _ in range(3)]
        for record in (late, merged, orphan):
            put_part(world.root, record.object_key, own, packed=True)
        await catalog.delete_containers(lease, [late.object_key])
        info = world.objects()[merged.object_key]
        committed = replace(merged, size=info.size, etag=info.etag, files=len(own), state=ContainerState.COMMITTED)
        await catalog.commit_container(lease, committed, supersedes=[f"{DAY}/{part_name(shard, 1)}"])

    world.with_lease(shard, leave)
    other = next(name for name in FILES if shard_of(name) != shard)
    put_part(world.root, f"{DAY}/{part_name(shard_of(other), 7)}", {other: FILES[other]})
    (world.root / f"{DAY}/_bigFiles/unnamed").write_bytes(b"1")
