"""A packer tells mounts of new containers through Redis."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import servers
from tests.mount.mounting import PATIENCE_S, PROGRAM, mounted, wait_until

pytestmark = [pytest.mark.fuse, pytest.mark.redis]
LONG_S = 600  # a refresh that does not come while a test runs


def pack(spool: Path, store: Path, redis_url: str) -> None:
    options = ("--settle", "0", "--redis", redis_url, "--log-level", "error")
    command = [PROGRAM, "packer", "--once", "--spool", spool, "--store", store, *options]
    subprocess.run(list(map(str, command)), check=True, timeout=PATIENCE_S, stdout=subprocess.DEVNULL)


@contextmanager
def mounted_with(store: Path, where: Path, redis_url: str) -> Iterator[Path]:
    with mounted(store, where, f"refresh={LONG_S},redis={redis_url},log_file={where.parent / 'log'}") as mount:
        yield mount


def test_a_mount_shows_what_is_announced_at_once(tmp_path: Path, redis: servers.RedisServer) -> None:
    """docs/semantics.md: Where packer and mount share a Redis, `refresh` is not waited for.

    A day that is new, one that somebody has listed before, and a name in it that was looked for in vain."""
    spool, store = tmp_path / "spool", tmp_path / "store"
    spool.mkdir()
    store.mkdir()
    with redis.client() as client, mounted_with(store, tmp_path / "mnt", redis.url) as mount:
        wait_until(lambda: client.pubsub_channels("desfs:new:*") != [], "the mount listens")
        assert os.listdir(mount) == []
        (spool / "first").write_bytes(b"1")
        pack(spool, store, redis.url)
        wait_until(lambda: os.listdir(mount) != [], "the new day is shown")
        (day,) = mount.iterdir()
        assert (day / "first").read_bytes() == b"1"
        assert not (day / "second").exists()
        (spool / "second").write_bytes(b"2")
        pack(spool, store, redis.url)
        wait_until((day / "second").exists, "the new name is shown")
        assert sorted(os.listdir(day)) == ["first", "second"]


def test_a_redis_that_goes_away_costs_the_wait_and_nothing_else(tmp_path: Path) -> None:
    spool, store = tmp_path / "spool", tmp_path / "store"
    spool.mkdir()
    store.mkdir()
    with (
        servers.redis_server(tmp_path) as redis,
        mounted_with(store, tmp_path / "mnt", redis.url) as mount,
        redis.client() as client,
    ):
        wait_until(lambda: client.pubsub_channels("desfs:new:*") != [], "the mount listens")
        os.kill(redis.pid, 9)
        began = time.monotonic()
        assert os.listdir(mount) == []
        (spool / "first").write_bytes(b"1")
        done = subprocess.run(
            [
                PROGRAM,
                "packer",
                "--once",
                "--spool",
                spool,
                "--store",
                store,
                "--settle",
                "0",
                "--redis",
                redis.url,
            ],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "a new container was not announced" in done.stderr
        assert time.monotonic() - began < LONG_S / 10
        wait_until(lambda: "not announced" in (tmp_path / "log").read_text(), "the mount says so")
        with servers.redis_server(tmp_path, port=redis.port) as again, again.client() as other:
            wait_until(lambda: other.pubsub_channels("desfs:new:*") != [], "it listens again")
            (spool / "second").write_bytes(b"2")
            pack(spool, store, again.url)
            wait_until(lambda: os.listdir(mount) != [], "what is announced now is shown")
            (day,) = mount.iterdir()
            assert sorted(os.listdir(day)) == ["first", "second"]
