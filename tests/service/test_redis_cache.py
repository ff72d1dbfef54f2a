"""The index cache in a real Redis."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from redis.backoff import NoBackoff
from redis.retry import Retry

from des_format import CacheKey, InMemoryIndexCache, RedisIndexCache
from des_format.reader import BaseReader
from tests.servers import RedisServer, free_ports, redis_server
from tests.unit.containers import Item, MemorySource, build

KEY = CacheKey("s3://bucket", "day/f.des", "etag")
OTHERS = [
    CacheKey("s3://bucket", "day/f.des", "etag2"),
    CacheKey("s3://bucket", "day/g.des", "etag"),
    CacheKey("s3://bucket2", "day/f.des", "etag"),
    CacheKey("s3://bucket", "day/f.des", ""),
]
FAILS = r"index cache in Redis: cannot (read|write)"


@pytest.fixture
def client(redis: RedisServer) -> Iterator[redis_py.Redis]:
    with redis.client() as client:
        yield client


def test_what_was_put_under_exactly_this_key(redis: RedisServer, client: redis_py.Redis) -> None:
    for cache in (RedisIndexCache(client), RedisIndexCache(redis.url)):
        client.flushall()
        assert cache.get(KEY) is None
        for number, each in enumerate([KEY, *OTHERS]):
            cache.put(each, b"%d" % number)
        assert [cache.get(each) for each in [KEY, *OTHERS]] == [b"%d" % number for number in range(5)]
        for value in (b"", b"\0" * 3_000_000, b"newer"):
            cache.put(KEY, value)
            assert cache.get(KEY) == value


def test_values_are_compressed_and_expire(client: redis_py.Redis) -> None:
    cache = RedisIndexCache(client, ttl_s=1000, prefix="mine:")
    cache.put(KEY, b"a name like others " * 10_000)
    name: Any = client.keys("*")[0]
    assert bytes(name).startswith(b"mine:")
    assert 990 <= client.ttl(name) <= 1000
    assert client.strlen(name) < 5000


def test_hosts_share_a_cache_and_prefixes_do_not(redis: RedisServer, client: redis_py.Redis) -> None:
    RedisIndexCache(redis.url).put(KEY, b"value")
    assert RedisIndexCache(client).get(KEY) == b"value"
    assert RedisIndexCache(client, prefix="other:").get(KEY) is None


def test_any_damage_is_a_miss(client: redis_py.Redis, announced_logs: list[str]) -> None:
    """A torn, tampered or foreign value is a miss."""
    announced_logs.append("a value is damaged")
    cache = RedisIndexCache(client)
    cache.put(KEY, b"the value of an index")
    (name,) = client.keys("*")
    good = client.get(name)
    assert isinstance(good, bytes)
    for at in range(len(good)):
        for flip in (0x01, 0x80, 0xFF):
            client.set(name, good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :])
            assert cache.get(KEY) in (None, b"the value of an index"), at
    for torn in (b"", b"x", good[:-1], good[:10], good + b"x", b"plain text" * 100):
        client.set(name, torn)
        assert cache.get(KEY) in (None, b"the value of an index")
    client.delete(name)
    client.rpush(name, "a list")
    announced_logs.append(FAILS)
    assert cache.get(KEY) is None


def test_a_foreign_value_is_a_miss(client: redis_py.Redis) -> None:
    cache = RedisIndexCache(client)
    cache.put(KEY, b"mine")
    (mine,) = client.keys("*")
    for other in OTHERS:
        cache.put(other, b"theirs")
        (theirs,) = set(client.keys("*")) - {mine}
        client.rename(theirs, mine)
        assert cache.get(KEY) is None
        cache.put(KEY, b"mine")


def test_a_value_that_claims_to_be_huge_is_a_miss(client: redis_py.Redis, announced_logs: list[str]) -> None:
    announced_logs.append("a value is damaged")
    cache = RedisIndexCache(client)
    cache.put(KEY, b"x" * 100)
    (name,) = client.keys("*")
    for size in (2**62, 2**32, 2**29 + 1, 2**28):
        header = bytes.fromhex("28b52ffd") + b"\xe0" + size.to_bytes(8, "little")  # magic, flags, size
        client.set(name, header + b"\0" * 20)
        assert cache.get(KEY) is None


def test_a_dead_redis_is_a_miss(announced_logs: list[str]) -> None:
    """A Redis that fails is a miss."""
    announced_logs.append(FAILS)
    (port,) = free_ports(1)
    cache = RedisIndexCache(f"redis://127.0.0.1:{port}/0")
    cache.put(KEY, b"value")
    assert cache.get(KEY) is None


def test_a_redis_that_does_not_answer_is_a_miss(announced_logs: list[str]) -> None:
    announced_logs.append(FAILS)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        cache = RedisIndexCache(f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
        assert cache.get(KEY) is None


def test_a_full_redis_is_a_miss(client: redis_py.Redis, announced_logs: list[str]) -> None:
    announced_logs.append(FAILS)
    cache = RedisIndexCache(client)
    cache.put(KEY, b"value")
    client.config_set("maxmemory", "1")
    try:
        cache.put(OTHERS[0], b"value")
        assert cache.get(OTHERS[0]) is None
    finally:
        client.config_set("maxmemory", "0")
    assert cache.get(KEY) == b"value"


def test_a_container_opened_through_redis(client: redis_py.Redis) -> None:
    cache = RedisIndexCache(client)
    source = MemorySource(build([Item(b"a", b"1"), Item(b"b", b"2")]))
    assert BaseReader(source, cache, 4096).get_file("b") == b"2"
    again = BaseReader(source, cache, 4096)
    assert (again.get_file("a"), source.tails) == (b"1", 1)
    assert BaseReader(source, InMemoryIndexCache(), 4096).list_files() == ["a", "b"]
    assert source.tails == 2


# --- a Redis that fails is left alone ---------------------------------------------------------------------------------


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_redis_that_failed_is_asked_again_after_a_while(
    redis: RedisServer, caplog: pytest.LogCaptureFixture, announced_logs: list[str]
) -> None:
    """docs/operations.md: A Redis that fails is left alone for 30 seconds."""
    announced_logs.append(FAILS)
    (port,) = free_ports(1)
    clock = Clock()
    client = redis_py.Redis(host=redis.host, port=port, retry=Retry(NoBackoff(), 0))
    cache = RedisIndexCache(client, clock=clock)
    with caplog.at_level(logging.INFO):
        assert cache.get(KEY) is None
        pool = client.connection_pool
        client.connection_pool = redis_py.ConnectionPool(host=redis.host, port=redis.port)
        cache.put(KEY, b"value")
        assert cache.get(KEY) is None
        clock.now_s = 29.0
        assert cache.get(KEY) is None
        client.connection_pool = pool
        clock.now_s = 31.0
        assert cache.get(KEY) is None, "still down"
        client.connection_pool = redis_py.ConnectionPool(host=redis.host, port=redis.port)
        clock.now_s = 59.0
        cache.put(KEY, b"value")
        assert cache.get(KEY) is None
        clock.now_s = 62.0
        cache.put(KEY, b"value")
        assert cache.get(KEY) == b"value"
    said = [record.getMessage() for record in caplog.records if record.name == "des_format.cache"]
    assert [line.partition(";")[2].strip() or line for line in said] == [
        "it is left alone for a while",
        "index cache in Redis: in use again",
    ]
    client.connection_pool.disconnect()
    pool.disconnect()


def test_a_wedged_redis_costs_one_time_out(tmp_path: Path, announced_logs: list[str]) -> None:
    """docs/semantics.md: It costs one time-out (2 s), and not one for each container.

    docs/operations.md: A Redis that fails is left alone for 30 seconds."""
    announced_logs.append(FAILS)
    with redis_server(tmp_path) as server:
        cache = RedisIndexCache(server.url)
        assert cache._client.connection_pool.connection_kwargs["socket_timeout"] == 2
        cache.put(KEY, b"value")
        assert cache.get(KEY) == b"value"
        os.kill(server.pid, signal.SIGSTOP)
        try:
            for _ in range(100):  # 200 time-outs of 2 s would be more than a test has
                assert cache.get(KEY) is None
                cache.put(KEY, b"other")
        finally:
            os.kill(server.pid, signal.SIGCONT)


def test_a_stopped_redis_is_a_miss_and_comes_back(tmp_path: Path, announced_logs: list[str]) -> None:
    announced_logs.append(FAILS)
    clock = Clock()
    with redis_server(tmp_path) as server:
        cache = RedisIndexCache(server.url, clock=clock)
        cache.put(KEY, b"value")
        with server.client() as client:
            client.shutdown(nosave=True)
        assert cache.get(KEY) is None
        cache.put(KEY, b"value")
        clock.now_s = 31.0
        assert cache.get(KEY) is None


def test_only_one_tries_while_it_may_be_down(announced_logs: list[str]) -> None:
    announced_logs.append(FAILS)
    clock = Clock()
    tried: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = redis_py.Redis(port=silent.getsockname()[1], socket_timeout=0.5, retry=Retry(NoBackoff(), 0))
        cache = RedisIndexCache(client, clock=clock)
        assert cache.get(KEY) is None
        clock.now_s = 31.0
        client.connection_pool.disconnect()
        silent.settimeout(0.0)
        threads = [threading.Thread(target=cache.get, args=(KEY,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = silent.accept()
                connection.close()
                tried.append(1)
        client.connection_pool.disconnect()
    assert len(tried) == 2, "the first, and one of the eight"


def test_a_slow_redis_is_left_alone(client: redis_py.Redis, announced_logs: list[str]) -> None:
    announced_logs.append("cannot read in time")
    clock = Clock()
    cache = RedisIndexCache(client, clock=clock)
    cache.put(KEY, b"value")
    took_s = 0.9
    calls = 0

    class Slow:
        """Redis, as far away as a test says."""

        def get(self, name: str) -> object:
            nonlocal calls
            calls += 1
            clock.now_s += took_s
            return client.get(name)

    cache._client = Slow()  # type: ignore[assignment]
    assert cache.get(KEY) == b"value"
    assert cache.get(KEY) == b"value"
    took_s = 1.5
    assert cache.get(KEY) == b"value", "it has come"
    assert cache.get(KEY) is None
    assert calls == 3


def test_values_above_the_limit_are_not_kept(client: redis_py.Redis) -> None:
    """docs/operations.md: Tails above 64 MiB are not kept in Redis."""
    cache = RedisIndexCache(client, max_value=1000)
    cache.put(KEY, bytes(1001))
    assert client.keys("*") == []
    cache.put(KEY, bytes(1000))
    assert cache.get(KEY) == bytes(1000)
    RedisIndexCache(client).put(KEY, bytes(5000))
    assert cache.get(KEY) is None


def test_no_url_of_redis() -> None:
    for url in ("http://host", "host:6379", ""):
        with pytest.raises(ValueError, match="scheme"):
            RedisIndexCache(url)
