"""desfs/merging/merge.py, its table: wherever a seal dies, every file is shown all the while, and the next run goes
on."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from assignment.catalog import Catalog, Lease
from desfs.store.base import S3Options
from desfs.store.retrying import Retrying
from tests import servers
from tests.crash import Forks, Run, forks_of
from tests.merging import BIG, DAY, World, build_part

GRACES = {"delete_grace": 0, "orphan_grace": 0}
BIG_FILE = b"0123456789abcdef" * (BIG // 16)
# What the day shows, before, meanwhile and afterwards.
SHOWN = {"a": b"2", "b": b"1", "c": b"late", "big": BIG_FILE, "f/1": b"1", "f/2": b"2", "i/1": b"1", "i/2": b"newer"}


class SealForks:
    """The process that seals are forked from; see `seal_forks`."""

    def __init__(self, forks: Forks) -> None:
        self._forks = forks

    def run(self, world: World, *, die_at: int | None = None, **settings: Any) -> Run:
        """A run over the day, killed before its `die_at`-th effect, counted from 1."""
        endpoint = {"endpoint_url": world.options.endpoint_url} if world.options.endpoint_url else {}
        order = {
            "store": world.store_url,
            "catalog": world.catalog_url,
            "day": str(DAY),
            "die_at": die_at,
            "settings": GRACES | endpoint | settings,
        }
        return self._forks.order(order)


@contextmanager
def seal_forks(environ: dict[str, str] | None = None) -> Iterator[SealForks]:
    """Start the process that seals are forked from; it ends with the block."""
    with forks_of("tests.crash.sealing", environ) as forks:
        yield SealForks(forks)


@pytest.fixture(scope="module")
def forks() -> Iterator[SealForks]:
    with seal_forks() as started:
        yield started


def make_day(world: World) -> World:
    """A day in which a run has something of everything to do: superseded parts to delete, late parts, a dead upload,
    a container of others, an external object that nothing names, a shard that was never sealed."""
    world.put_layout()
    world.put("0", {"a": b"1", "b": b"1", "gone": b"1", "big": BIG_FILE, "old-big": BIG_FILE})
    world.put("0", {"a": b"2"}, deleted=["gone", "old-big"])
    world.seal()
    world.put("0", {"c": b"late"})

    async def dies(store: Retrying, catalog: Catalog, lease: Lease) -> None:
        store.put((await catalog.begin_part(lease)).object_key, build_part({"f/1": b"1"}))

    world.under_lease("f", dies)
    for n in (1, 2):
        world.put("f", {f"f/{n}": b"%d" % n})
    world.put("1", {"i/1": b"1", "i/2": b"2"})
    store = world.store()
    store.put(f"{DAY}/1-000007.des", build_part({"i/2": b"newer"}))
    store.close()
    return world


def check(world: World) -> None:
    """What is left when all is done."""
    assert world.objects() == [
        f"{DAY}/0-000000-000003.des",
        f"{DAY}/1.des",
        f"{DAY}/_bigFiles/big",
        f"{DAY}/f.des",
    ]
    assert world.shown().contents == SHOWN
    states = world.states()
    assert {name for name, state in states.items() if state == "sealed"} == {
        "0-000000-000003.des",
        "1.des",
        "f.des",
    }
    assert set(states.values()) == {"sealed", "deleted"}
    for key, row in world.rows().items():
        if row.state == "sealed":
            info = world.shown().containers[key]
            assert (row.size, row.etag) == (info.size, info.etag)


def finish(forks: SealForks, world: World) -> None:
    """The runs that follow: one that goes on, one that deletes, one that deletes what only superseded ones named."""
    for _ in range(3):
        done = forks.run(world)
        assert (done.status, done.message) == (0, ""), done
        assert world.shown().contents == SHOWN
    check(world)
    assert forks.run(world).effects == ()


def test_wherever_a_seal_dies_the_next_one_goes_on(forks: SealForks, tmp_path: Path) -> None:
    """Before each of its effects: adopting, deleting, forgetting, begin, PUT, commit. The day shows the same files at
    every moment."""
    kinds: set[str] = set()
    for n in itertools.count(1):
        (folder := tmp_path / f"{n}").mkdir()
        world = make_day(World(folder))
        assert world.shown().contents == SHOWN
        run = forks.run(world, die_at=n)
        assert run.status in (0, -signal.SIGKILL), run
        assert world.shown().contents == SHOWN
        if run.survived:
            kinds.update(effect.split()[0] for effect in run.effects)
        finish(forks, world)
        if run.survived:
            assert n > 15
            assert kinds == {"adopt", "begin", "commit", "delete", "forget", "put"}
            return


def test_a_second_run_that_dies_is_like_the_first(forks: SealForks, tmp_path: Path) -> None:
    """The run that deletes what was merged, and external objects with it; and one that goes on after a death."""
    for n in itertools.count(1):
        (folder := tmp_path / f"{n}").mkdir()
        world = make_day(World(folder))
        assert not forks.run(world, die_at=11).survived
        run = forks.run(world, die_at=n)
        assert world.shown().contents == SHOWN
        third = forks.run(world, die_at=n)
        assert world.shown().contents == SHOWN
        finish(forks, world)
        if run.survived and third.survived:
            return


def test_a_seal_that_dies_over_s3_is_gone_on_with(s3: servers.S3Server, bucket: str, tmp_path: Path) -> None:
    """The same in S3, for the effects that the store sees or that follow one, with containers that it copies by
    itself."""
    with pytest.MonkeyPatch.context() as patch, seal_forks(s3.environ()) as forks:
        for name, value in s3.environ().items():
            patch.setenv(name, value)

        def fresh(name: str) -> World:
            (folder := tmp_path / name).mkdir()
            world = World(folder, f"s3://{bucket}/{name}", S3Options(endpoint_url=s3.endpoint_url))
            world.put_parts("0", *(build_part({f"{n}": bytes([n]) * (5 << 20)}) for n in range(3)))
            world.put("1", {"small": b"1"})
            return world

        shown = fresh("whole").shown().contents
        effects = forks.run(fresh("effects")).effects
        assert [effect.split()[0] for effect in effects] == ["begin", "put", "commit"] * 2
        for n in (2, 3, 6):
            world = fresh(f"died-at-{n}")
            assert not forks.run(world, die_at=n).survived
            assert world.shown().contents == shown
            for _ in range(2):
                assert forks.run(world).status == 0
                assert world.shown().contents == shown
            assert world.objects() == [f"{DAY}/0.des", f"{DAY}/1.des"]
