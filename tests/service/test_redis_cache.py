"""The index cache in a real Redis."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
import redis as redis_py

from des_format import CacheKey, InMemoryIndexCache, RedisIndexCache
from des_format.reader import BaseReader
from tests.servers import RedisServer, free_ports
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
