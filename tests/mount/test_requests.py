"""Counted at the server: docs/architecture.md, The read path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fakes.counting_proxy import CountingProxy, ProxiedRequest
from tests.mount.mounting import mounted
from tests.mount.stores import put_sharded, upload
from tests.servers import S3Server

pytestmark = pytest.mark.fuse

DAY = "2026-11-20"
OLD_DAY = "2020-02-29"
FILES = {f"d{n % 40}/f{n}": b"%d" % n * 50 for n in range(400)}


@pytest.fixture(scope="module")
def day(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket with a day of 256 shards, none of them missing, and an old one."""
    folder = tmp_path_factory.mktemp("requests")
    put_sharded(folder, DAY, FILES, all_shards=True)
    put_sharded(folder, OLD_DAY, {"a": b"x", "b": b"y"})
    bucket = s3.new_bucket("requests")
    try:
        upload(s3, bucket, folder)
        yield bucket
    finally:
        s3.delete_bucket(bucket)


@contextmanager
def counted(s3: S3Server, bucket: str, where: Path) -> Iterator[tuple[Path, CountingProxy]]:
    with (
        CountingProxy(s3.host, s3.port) as proxy,
        mounted(f"s3://{bucket}", where, "refresh=600", env=s3.environ(endpoint_url=proxy.url)) as mount,
    ):
        yield mount, proxy


def told(requests: list[ProxiedRequest]) -> list[str]:
    """What was asked: LIST with its prefix, or GET with the key and whether it is a range."""
    return [
        f"LIST {request.query.get('prefix', '')}"
        if "list-type" in request.query
        else f"{request.method} {request.path.split('/', 2)[2]}" + (" range" if "range" in request.headers else "")
        for request in requests
    ]


@pytest.mark.parametrize("day_name", [DAY, OLD_DAY])
def test_one_file_of_a_day_costs_a_list_a_tail_and_its_data(
    s3: S3Server, day: str, tmp_path: Path, day_name: str
) -> None:
    """`cat` of one file in a fresh mount of a day with 256 shards: one LIST for the day, one tail, one data GET (plus
    one for the root and one for `.desfs.json`); never a HEAD."""
    name, data = ("d7/f47", FILES["d7/f47"]) if day_name == DAY else ("a", b"x")
    with counted(s3, day, tmp_path / "mnt") as (mount, proxy):
        assert told(proxy.requests) == ["LIST ", "GET .desfs.json range"]
        proxy.clear()
        assert (mount / day_name / name).read_bytes() == data
        asked = told(proxy.requests)
        assert asked[0] == f"LIST {day_name}/"
        assert len(asked) == 3
        assert asked[1] == asked[2]
        assert asked[1].startswith(f"GET {day_name}/")
        assert all(request.status in (200, 206) for request in proxy.requests)
        proxy.clear()
        assert (mount / day_name / name).read_bytes() == data
        assert proxy.requests == []


def test_neighbours_of_a_file_come_with_it(s3: S3Server, day: str, tmp_path: Path) -> None:
    """The files of one directory are adjacent in one shard: reading them all is one GET more than the index."""
    with counted(s3, day, tmp_path / "mnt") as (mount, proxy):
        proxy.clear()
        for name in sorted(name for name in FILES if name.startswith("d7/")):  # as the packer lays them out
            assert (mount / DAY / name).read_bytes() == FILES[name]
        assert len(proxy.requests) == 3


def test_the_whole_day_costs_a_list_and_a_tail_of_each_container(s3: S3Server, day: str, tmp_path: Path) -> None:
    """A listing of the day loads all indexes, one request each; `ls -l` needs no other."""
    with counted(s3, day, tmp_path / "mnt") as (mount, proxy):
        proxy.clear()
        assert len(os.listdir(mount / DAY)) == 40
        for name, data in FILES.items():
            assert (mount / DAY / name).stat().st_size == len(data)
        assert proxy.count(method="HEAD") == 0
        assert sorted(told(proxy.requests)) == sorted(
            [f"LIST {DAY}/", *(f"GET {DAY}/{n:02x}.des range" for n in range(256))]
        )


def test_every_get_of_a_container_names_the_version_that_was_listed(s3: S3Server, day: str, tmp_path: Path) -> None:
    """docs/semantics.md: Every request for bytes of a container names the version that its index came from."""
    listing = s3.client().list_objects_v2(Bucket=day, Prefix=f"{DAY}/")
    etags = {item["Key"]: item["ETag"].strip('"') for item in listing["Contents"]}
    with counted(s3, day, tmp_path / "mnt") as (mount, proxy):
        name, *others = (name for name in FILES if name.startswith("d7/"))
        assert (mount / DAY / name).read_bytes() == FILES[name]
        assert len(os.listdir(mount / DAY)) == 40
        for other in others:
            assert (mount / DAY / other).read_bytes() == FILES[other]
            assert os.getxattr(mount / DAY / other, "user.des.meta")
        asked = [request for request in proxy.requests if request.path.endswith(".des")]
        assert len(asked) > 256
        named = [(request.path.split("/", 2)[2], request.headers["if-match"].strip('"')) for request in asked]
        assert set(named) == set(etags.items())


def test_what_is_not_there_is_asked_for_once(s3: S3Server, day: str, tmp_path: Path) -> None:
    """Before ENOENT all indexes are asked; after that, none again."""
    with counted(s3, day, tmp_path / "mnt") as (mount, proxy):
        proxy.clear()
        for name in ("nothing", "d7/nothing", "nowhere/nothing"):
            assert not (mount / DAY / name).exists()
        assert len(proxy.requests) == 257
        assert not (mount / "2026-11-21").exists()
        assert len(proxy.requests) == 257
