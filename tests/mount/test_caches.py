"""The disk cache and Redis behind real mounts: what they save, and that no damage of theirs is ever seen."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from desfs.cache_folder import BLOCKS, INDEX, LAYOUT
from tests.fakes.counting_proxy import CountingProxy
from tests.mount.mounting import daemon_of, desfs, mount, mounted
from tests.mount.stores import put_container, put_sharded, upload
from tests.servers import MountPoint, RedisServer, S3Server, mount_point, redis_server

pytestmark = pytest.mark.fuse

DAY = "2026-11-20"
FILES = {f"d{n % 40}/f{n}": random.Random(n).randbytes(n * 20) for n in range(400)}
SECRET = "s3cret-word"


@pytest.fixture(scope="module")
def day(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket with a day of 256 shards, none of them missing."""
    folder = tmp_path_factory.mktemp("caches")
    put_sharded(folder, DAY, FILES, all_shards=True)
    bucket = s3.new_bucket("caches")
    try:
        upload(s3, bucket, folder)
        yield bucket
    finally:
        s3.delete_bucket(bucket)


@contextmanager
def counted(s3: S3Server, bucket: str, where: Path, *options: str) -> Iterator[tuple[Path, CountingProxy]]:
    with (
        CountingProxy(s3.host, s3.port) as proxy,
        mounted(f"s3://{bucket}", where, "refresh=600", *options, env=s3.environ(endpoint_url=proxy.url)) as place,
    ):
        yield place, proxy


def gets(proxy: CountingProxy) -> list[str]:
    """The keys of containers that were asked for."""
    return [request.path for request in proxy.requests if request.path.endswith(".des")]


def read_all(place: Path) -> None:
    for name, data in FILES.items():
        assert (place / DAY / name).read_bytes() == data, name


def list_all(place: Path) -> None:
    found = {path.relative_to(place / DAY).as_posix() for path in (place / DAY).rglob("*") if path.is_file()}
    assert found == FILES.keys()


def cache_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".idx", ".data", ".rec"))


def stats(place: Path) -> dict[str, dict[str, float]]:
    loaded: dict[str, dict[str, float]] = json.loads((place / ".desfs" / "stats").read_bytes())
    return loaded


def test_a_second_mount_needs_no_index_and_no_payload(s3: S3Server, day: str, tmp_path: Path) -> None:
    """docs/operations.md: A mount with the disk cache of an earlier one asks the store for listings alone."""
    option = f"cache_dir={tmp_path}/cache"
    with counted(s3, day, tmp_path / "one", option) as (place, proxy):
        list_all(place)
        assert len(gets(proxy)) == 256
        read_all(place)
    with counted(s3, day, tmp_path / "two", option) as (place, proxy):
        list_all(place)
        assert gets(proxy) == []
        read_all(place)
        assert gets(proxy) == []
        shown = stats(place)
        assert shown["metrics"]["desfs_cache_requests_total.disk.index.hit"] == 256
        assert shown["metrics"]["desfs_cache_requests_total.disk.block.hit"] > 0
        assert shown["caches"]["disk"]["fault"] is None  # type: ignore[index]
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("ending", [".idx", ".data", ".rec"])
def test_wrong_bytes_in_the_disk_cache_are_never_seen(ending: str, s3: S3Server, day: str, tmp_path: Path) -> None:
    """docs/semantics.md: A wrong byte in a cache is never seen: it is a miss."""
    option = f"cache_dir={tmp_path}/cache"
    with counted(s3, day, tmp_path / "one", option) as (place, _):
        list_all(place)
        read_all(place)
    dice = random.Random(ending)
    for path in cache_files(tmp_path / "cache"):
        if path.suffix == ending:
            good = path.read_bytes()
            at = dice.randrange(len(good))
            path.write_bytes(good[:at] + bytes([good[at] ^ dice.randrange(1, 256)]) + good[at + 1 :])
    for where in ("two", "three"):
        with counted(s3, day, tmp_path / where, option) as (place, proxy):
            list_all(place)
            read_all(place)
            assert bool(gets(proxy)) == (where == "two"), "what was damaged has been written anew"


def test_mounts_share_a_folder_and_one_is_killed(s3: S3Server, day: str, tmp_path: Path) -> None:
    """docs/operations.md: Several mounts may share a cache_dir."""
    option = f"cache_dir={tmp_path}/cache"
    with (
        counted(s3, day, tmp_path / "one", option, "cache_size=1M") as (one, _),
        counted(s3, day, tmp_path / "two", option, "cache_size=1M") as (two, _),
        mount_point(tmp_path / "three"),
    ):
        third = tmp_path / "three"
        mount(f"s3://{day}", third, option, "cache_size=1M", "refresh=600", env=s3.environ())
        victim = daemon_of(third)
        names = list(FILES)
        for step, name in enumerate(names):
            if step == 100:
                os.kill(victim, signal.SIGKILL)
            for place in (one, two) if step >= 100 else (one, two, third):
                assert (place / DAY / name).read_bytes() == FILES[name]
        list_all(one)
        list_all(two)


def test_a_cache_that_vanishes_while_it_is_used(s3: S3Server, day: str, tmp_path: Path) -> None:
    """docs/semantics.md: A disk cache that fails or vanishes is none either."""
    with counted(s3, day, tmp_path / "one", f"cache_dir={tmp_path}/cache") as (place, _):
        list_all(place)
        subprocess.run(["rm", "-r", tmp_path / "cache"], check=True)
        list_all(place)
        read_all(place)


def test_a_cache_that_fails_while_it_is_used(s3: S3Server, day: str, tmp_path: Path) -> None:
    """docs/semantics.md: A disk cache that fails or vanishes is none either."""
    with counted(s3, day, tmp_path / "one", f"cache_dir={tmp_path}/cache") as (place, _):
        first = next(iter(FILES))
        assert (place / DAY / first).read_bytes() == FILES[first]
        for kind in (BLOCKS, INDEX):
            folder = tmp_path / "cache" / LAYOUT / kind
            subprocess.run(["rm", "-rf", folder], check=True)
            folder.write_bytes(b"whoever opens a file in it hears ENOTDIR")
        list_all(place)
        read_all(place)
        assert "cache_dir" in (place / ".desfs" / "problems").read_text()


def test_a_full_disk_is_no_error_for_a_reader(s3: S3Server, day: str, tmp_path: Path) -> None:
    """docs/semantics.md: A full disk is never an error for a reader."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], check=True, timeout=30)
    try:
        with counted(s3, day, tmp_path / "one", f"cache_dir={disk}/cache") as (place, _):
            with contextlib.suppress(OSError), (disk / "others").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            list_all(place)
            read_all(place)
            assert "cache_dir" in (place / ".desfs" / "problems").read_text()
            assert "free" in str(stats(place)["caches"]["disk"])
    finally:
        subprocess.run(["umount", "-l", disk], check=True, timeout=30)


@pytest.mark.parametrize("cache", ["disk", "redis"])
def test_a_changed_container_is_not_read_from_the_cache(
    cache: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """docs/semantics.md: What the disk cache and Redis keep of an object is used for that version of it alone. Old and
    new bytes are never mixed."""
    store, option = tmp_path / "store", f"cache_dir={tmp_path}/cache"
    if cache == "redis":
        server: RedisServer = request.getfixturevalue("redis")
        option = f"redis={server.url}"
    for number in range(3):
        files = {f"f{n}": b"%d of %d " % (n, number) * 1000 for n in range(20 + number)}
        put_container(store / DAY / "0.des", files)
        for _ in range(2):
            with mounted(store, tmp_path / "mnt", option) as place:
                assert {path.name: path.read_bytes() for path in (place / DAY).iterdir()} == files


# --- Redis -----------------------------------------------------------------------------------------------------------


def test_hosts_share_indexes_through_redis(s3: S3Server, day: str, redis: RedisServer, tmp_path: Path) -> None:
    """docs/operations.md: With redis=, an index that one host has read is no request for the others."""
    with counted(s3, day, tmp_path / "one", f"redis={redis.url}") as (place, proxy):
        list_all(place)
        assert len(gets(proxy)) == 256
    with counted(s3, day, tmp_path / "two", f"redis={redis.url}", f"cache_dir={tmp_path}/cache") as (place, proxy):
        list_all(place)
        assert gets(proxy) == []
        assert stats(place)["metrics"]["desfs_cache_requests_total.redis.tail.hit"] == 256
        read_all(place)
    with redis.client() as client:
        client.flushall()
    with counted(s3, day, tmp_path / "three", f"redis={redis.url}", f"cache_dir={tmp_path}/cache") as (place, proxy):
        list_all(place)
        assert gets(proxy) == [], "the disk is asked first"


def test_wrong_bytes_in_redis_are_never_seen(s3: S3Server, day: str, redis: RedisServer, tmp_path: Path) -> None:
    """docs/semantics.md: A wrong byte in a cache is never seen: it is a miss."""
    with counted(s3, day, tmp_path / "one", f"redis={redis.url}") as (place, _):
        list_all(place)
    dice = random.Random(1)
    with redis.client() as client:
        for key in client.keys("*"):
            good = client.get(key)
            assert isinstance(good, bytes)
            at = dice.randrange(len(good))
            client.set(key, good[:at] + bytes([good[at] ^ dice.randrange(1, 256)]) + good[at + 1 :])
    with counted(s3, day, tmp_path / "two", f"redis={redis.url}") as (place, _):
        list_all(place)
        read_all(place)


@pytest.mark.parametrize("how", ["stopped", "wedged"])
def test_a_redis_that_fails_is_only_slower(how: str, s3: S3Server, day: str, tmp_path: Path) -> None:
    """docs/semantics.md: A Redis that fails is never an error."""
    with redis_server(tmp_path) as server, counted(s3, day, tmp_path / "one", f"redis={server.url}") as (place, _):
        first = next(iter(FILES))
        assert (place / DAY / first).read_bytes() == FILES[first]
        if how == "wedged":
            os.kill(server.pid, signal.SIGSTOP)
        else:
            with server.client() as client:
                client.shutdown(nosave=True)
        try:
            list_all(place)
            read_all(place)
        finally:
            if how == "wedged":
                os.kill(server.pid, signal.SIGCONT)


def test_the_password_of_redis_is_never_shown(tmp_path: Path, mount_dir: MountPoint) -> None:
    """docs/operations.md: The password in a redis URL is never shown."""
    store, log = tmp_path / "store", tmp_path / "log"
    put_container(store / DAY / "0.des", {"a": b"x"})
    with redis_server(tmp_path) as redis, redis.client() as client:
        client.config_set("requirepass", "another-word")
        url = f"redis://:{SECRET}@{redis.host}:{redis.port}/0"
        mount(store, mount_dir.path, f"log_file={log}", "log_level=debug", env={"DESFS_REDIS": url})
        assert (mount_dir.path / DAY / "a").read_bytes() == b"x"
    control = mount_dir.path / ".desfs"
    shown = [(control / name).read_text() for name in ("config", "stats", "problems", "containers")]
    assert json.loads(shown[0])["redis"] == "**********"
    shown += [log.read_text(), Path(f"/proc/{daemon_of(mount_dir.path)}/cmdline").read_text()]
    assert "index cache in Redis: cannot read: invalid username-password pair" in log.read_text()
    assert not any(SECRET in text for text in shown)
    done = desfs("mount", store, tmp_path, "-o", f"redis=http://:{SECRET}@host")
    assert (done.returncode, SECRET in done.stderr) == (2, False)
    assert "mount option redis: everybody sees a password on a command line" in done.stderr
    done = desfs("mount", store, tmp_path, env={"DESFS_REDIS": f"http://:{SECRET}@host"})
    assert (done.returncode, SECRET in done.stderr) == (2, False)
    assert "no URL of Redis" in done.stderr


# --- usage -----------------------------------------------------------------------------------------------------------


def test_folders_that_cannot_be_a_cache_are_named(tmp_path: Path, mount_dir: MountPoint) -> None:
    """docs/operations.md: A cache_dir that is another user's, or that everybody may write to, is refused."""
    store, cache = tmp_path / "store", tmp_path / "cache"
    put_container(store / DAY / "0.des", {"a": b"x"})
    cache.mkdir()
    cache.chmod(0o777)
    done = desfs("mount", store, mount_dir.path, "-o", f"cache_dir={cache}")
    assert (done.returncode, str(cache) in done.stderr, "everybody" in done.stderr) == (2, True, True)
    cache.chmod(0o755)
    os.chown(cache, 12345, 12345)
    done = desfs("mount", store, mount_dir.path, "-o", f"cache_dir={cache}")
    assert (done.returncode, "another user" in done.stderr) == (2, True)
    done = desfs("mount", store, mount_dir.path, "-o", f"cache_dir={store / DAY / '0.des'}")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_a_relative_folder_is_that_of_the_caller(tmp_path: Path, mount_dir: MountPoint) -> None:
    put_container(tmp_path / "store" / DAY / "0.des", {"a": b"x"})
    done = desfs("mount", "store", mount_dir.path, "-o", "cache_dir=here/cache", cwd=tmp_path)
    assert done.returncode == 0
    assert (mount_dir.path / DAY / "a").read_bytes() == b"x"
    assert cache_files(tmp_path / "here" / "cache")
