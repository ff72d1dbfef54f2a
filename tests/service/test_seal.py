"""`desfs seal` as a user or a timer runs it, and what of it an S3 server sees."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import pytest

from assignment.catalog import Catalog, Lease
from desfs.store.base import S3Options
from desfs.store.retrying import Retrying
from tests import servers
from tests.fakes.counting_proxy import CountingProxy
from tests.merging import DAY, World, build_part
from tests.mount.mounting import desfs


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def seal(world: World, *options: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    """One run of the program: its status, its output, its messages."""
    command = ("seal", "--store", world.store_url, "--catalog", world.catalog_url, *options)
    done = desfs(*command, env=env)
    return done.returncode, done.stdout, done.stderr


def fill(world: World, shards: str = "01") -> None:
    for shard in shards:
        for n in range(3):
            world.put(shard, {f"{shard}/{n}": b"%d" % n})


def test_it_seals_what_is_over_and_then_deletes_the_parts(world: World) -> None:
    """One line says what was done; a run that finds nothing to do says so, and is no failure."""
    fill(world)
    today = datetime.now(UTC).date()
    world.put("0", {"new": b"today's"}, day=today)
    sizes = sum(len(build_part({f"{shard}/{n}": b"%d" % n for n in range(3)})) for shard in "01")
    assert seal(world) == (0, f"looked at 1 day: sealed 6 containers into 2 ({sizes} B)\n", "")
    assert sorted(world.objects()) == sorted(
        [f"{today}/0-000001.des"]
        + [f"{DAY}/{shard}{part}.des" for shard in "01" for part in ("", "-000001", "-000002", "-000003")]
    )
    assert seal(world) == (0, "looked at 1 day: sealed 0 containers into 0 (0 B)\n", "")
    nothing_left = {"DESFS_DELETE_GRACE": "0"}
    line = "looked at 1 day: sealed 0 containers into 0 (0 B); deleted 6 objects merged before\n"
    assert seal(world, env=nothing_left) == (0, line, "")
    assert world.objects() == [f"{DAY}/0.des", f"{DAY}/1.des", f"{today}/0-000001.des"]


def test_one_day_alone_and_the_summary_for_programs(world: World) -> None:
    fill(world, "0")
    other = DAY + timedelta(days=1)
    world.put("0", {"a": b"1"}, day=other)
    status, output, messages = seal(world, "--day", str(DAY), "--json")
    assert (status, messages) == (0, "")
    assert json.loads(output) == {
        "days": [str(DAY)],
        "sealed": 1,
        "inputs": 3,
        "files": 3,
        "bytes": world.rows()[f"{DAY}/0.des"].size,
        "copied": 0,
        "deleted": 0,
        "failures": [],
    }
    assert f"{other}/0.des" not in world.objects()


def test_a_shard_that_others_work_on_is_named(world: World) -> None:
    """Exit status 1, a line for it, and the other shards are sealed."""
    fill(world)

    async def others(store: Retrying, catalog: Catalog, lease: Lease) -> None:
        status, output, messages = seal(world)
        assert status == 1
        assert output.endswith("; 1 left for the next run\n")
        assert messages == f"desfs: shard 1 of {DAY}: somebody else works on it: left for the next run\n"

    world.under_lease("1", others)
    assert f"{DAY}/0.des" in world.objects()
    assert f"{DAY}/1.des" not in world.objects()


def test_the_end_of_a_day_is_that_of_the_time_zone(world: World) -> None:
    """And a day that is not over is refused."""
    now = datetime.now(UTC)
    day = now.date()
    world.put("0", {"a": b"1"}, day=day)
    grace = {"DESFS_SEAL_GRACE": "0"}
    # 14 hours ahead of UTC the day is over, or will be when a run begins now; 12 behind it is not.
    if now.hour >= 10:
        assert seal(world, "--day", str(day), "--timezone", "Pacific/Kiritimati", env=grace)[0] == 0
    else:
        before = day - timedelta(days=1)
        assert seal(world, "--day", str(before), "--timezone", "Pacific/Kiritimati", env=grace)[0] == 0
    status, output, messages = seal(world, "--day", str(day), "--timezone", "Etc/GMT+12", env=grace)
    assert (status, output) == (2, "")
    assert messages.startswith(f"desfs: {day} is not over yet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--day", "yesterday"), "--day 'yesterday': want a date, such as 2026-11-20"),
        (("--timezone", "Nowhere"), "--timezone: 'Nowhere' is no name of the time zone database"),
        (("--catalog", "no/such/file"), "--catalog no/such/file: no such file"),
    ],
)
def test_what_makes_no_sense_is_refused(world: World, options: tuple[str, ...], message: str) -> None:
    fill(world, "0")
    assert seal(world, *options) == (2, "", f"desfs: {message}\n")


def test_a_store_that_is_not_there(world: World) -> None:
    fill(world, "0")
    store = world.folder / "store"
    store.rename(world.folder / "elsewhere")
    status, output, messages = seal(world)
    assert (status, output) == (1, "")
    assert messages.startswith("desfs: ")
    assert "store" in messages
    assert messages.count("\n") == 1


@pytest.mark.s3
def test_the_server_copies_large_parts_by_itself(
    s3: servers.S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of 5 MiB and more: what seal downloads is less than 5 % of the day, counted at the server; what it uploads
    too."""
    for name, value in s3.environ().items():
        monkeypatch.setenv(name, value)
    world = World(tmp_path, f"s3://{bucket}/some/prefix", S3Options(endpoint_url=s3.endpoint_url))
    dice = Random(6)
    expected: dict[str, bytes] = {}
    size = 0
    for shard in "37":
        parts = [{f"{shard}/{n}-{k}": dice.randbytes(64 * 1024) for k in range(88)} for n in range(6)]
        raws = [build_part(files) for files in parts]
        assert min(map(len, raws)) >= 5 << 20
        world.put_parts(shard, *raws)
        size += sum(map(len, raws))
        for files in parts:
            expected |= files
    with CountingProxy(s3.host, s3.port) as proxy:
        status, output, messages = seal(world, "--endpoint-url", proxy.url)
        assert (status, messages) == (0, "")
        assert output.startswith("looked at 1 day: sealed 12 containers into 2 (")
        assert output.endswith("); 2 of them copied by the store\n")
        requests = proxy.requests
    assert sum(request.response_length for request in requests) < size / 20
    assert sum(request.request_length for request in requests) < size / 20
    assert sum("x-amz-copy-source" in request.headers for request in requests) >= 12
    assert world.shown().contents == expected
    assert seal(world, env=os.environ | {"DESFS_DELETE_GRACE": "0"})[0] == 0
    assert world.objects() == [f"{DAY}/3.des", f"{DAY}/7.des"]
    assert world.shown().contents == expected
