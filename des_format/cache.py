"""Caches for the raw tail of a container (META, INDEX and FOOTER), so that opening it again costs no request.

Everything that is kept is sealed with a checksum and the key it was stored under, and is never unpickled: a torn,
tampered or foreign value is a miss, and so is a cache that fails. Keys hold the ETag, so a value is never out of date.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple, Protocol

import google_crc32c

if TYPE_CHECKING:
    import redis

log = logging.getLogger(__name__)

_SEAL = Struct("<8sII")  # magic, crc32c of all that follows, length of the key
_MAGIC = b"DESCACH1"


class CacheKey(NamedTuple):
    """A version of a container: the store's URL, the container's key in it, and its ETag ("" for the note that says
    which version was seen last)."""

    store: str
    key: str
    etag: str

    def digest(self) -> str:
        """A name for this key that fits file names and Redis keys: 64 hex digits."""
        return sha256("\0".join(self).encode("utf-8", "surrogatepass")).hexdigest()


class IndexCache(Protocol):
    """Bytes by key. Methods may be called from any thread, and never raise for a fault of the cache itself."""

    def get(self, key: CacheKey) -> bytes | None:
        """What was put under exactly this key, or None."""
        ...

    def put(self, key: CacheKey, value: bytes) -> None:
        """Keep a value, if the cache can; older ones make room."""
        ...


def seal(key: CacheKey, value: bytes) -> bytes:
    """The value with its key and a checksum over both."""
    name = "\0".join(key).encode("utf-8", "surrogatepass")
    body = name + value
    return _SEAL.pack(_MAGIC, google_crc32c.value(body), len(name)) + body


def unseal(key: CacheKey, sealed: bytes) -> bytes | None:
    """The value, or None if it is not whole or belongs to another key."""
    if len(sealed) < _SEAL.size:
        return None
    magic, checksum, name_length = _SEAL.unpack_from(sealed)
    body = sealed[_SEAL.size :]
    name = "\0".join(key).encode("utf-8", "surrogatepass")
    if (
        magic != _MAGIC
        or name_length != len(name)
        or body[:name_length] != name
        or google_crc32c.value(body) != checksum
    ):
        return None
    return body[name_length:]


_ENTRY_OVERHEAD = 500  # bytes: what Python needs for a key of three strings and its place in a dict, measured


class InMemoryIndexCache:
    """Keeps up to `max_bytes`, keys included, in this process, least recently used first to go."""

    def __init__(self, max_bytes: int = 256 * 1024 * 1024) -> None:
        self._max_bytes = max_bytes
        self._values: OrderedDict[CacheKey, bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: CacheKey) -> bytes | None:
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def put(self, key: CacheKey, value: bytes) -> None:
        with self._lock:
            older = self._values.pop(key, None)
            if older is not None:
                self._bytes -= self._cost(key, older)
            if self._cost(key, value) > self._max_bytes:
                return
            self._values[key] = value
            self._bytes += self._cost(key, value)
            while self._bytes > self._max_bytes:
                self._bytes -= self._cost(*self._values.popitem(last=False))

    @staticmethod
    def _cost(key: CacheKey, value: bytes) -> int:
        return len(value) + sum(map(len, key)) + _ENTRY_OVERHEAD


class DiskIndexCache:
    """Keeps up to `max_bytes` in files below a folder, least recently used first to go; survives restarts, and may be
    shared by processes. A disk that is full or refuses is a miss."""

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int = 1024 * 1024 * 1024) -> None:
        self._folder = Path(folder)
        self._max_bytes = max_bytes
        self._lock = threading.Lock()

    def get(self, key: CacheKey) -> bytes | None:
        path = self._path(key)
        try:
            sealed = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("index cache %s: cannot read: %s", self._folder, error)
            return None
        value = unseal(key, sealed)
        if value is not None:
            with contextlib.suppress(OSError):  # evicted meanwhile, or a disk that can only be read
                os.utime(path)  # the time of use: what eviction goes by
        else:
            log.warning("index cache %s: %s is damaged and is dropped", self._folder, path.name)
            self._drop(path)
        return value

    def put(self, key: CacheKey, value: bytes) -> None:
        sealed = seal(key, value)
        if len(sealed) > self._max_bytes:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # No fsync: the checksum finds what a crash tears.
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
                try:
                    file.write(sealed)
                    file.flush()
                    os.replace(file.name, path)
                except BaseException:
                    self._drop(Path(file.name))
                    raise
            self._evict()
        except OSError as error:
            log.warning("index cache %s: cannot write: %s", self._folder, error)

    def _path(self, key: CacheKey) -> Path:
        digest = key.digest()
        return self._folder / digest[:2] / digest

    def _drop(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("index cache %s: cannot remove %s: %s", self._folder, path.name, error)

    def _evict(self) -> None:
        with self._lock:
            files = []
            for path in self._folder.glob("??/*"):
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue  # another process evicted it
                files.append((status.st_mtime_ns, status.st_size, path))
            excess = sum(size for _, size, _ in files) - self._max_bytes
            for _, size, path in sorted(files):
                if excess <= 0:
                    return
                self._drop(path)
                excess -= size


class _Rest:
    """Leaves a server alone for a while after it failed: then one caller tries it, and the others go on without it
    until he has succeeded. Any thread."""

    def __init__(self, rest_s: float, clock: Callable[[], float]) -> None:
        self._rest_s = rest_s
        self._clock = clock
        self._lock = threading.Lock()
        self._until: float | None = None  # None: the server is well

    def may_try(self) -> bool:
        """Whether this caller should ask the server; he says afterwards what came of it."""
        if self._until is None:
            return True
        with self._lock:
            now = self._clock()
            if self._until is not None and now < self._until:
                return False
            if self._until is not None:
                self._until = now + self._rest_s  # for the others
            return True

    def failed(self) -> bool:
        """True for the first failure since it was well."""
        with self._lock:
            first = self._until is None
            self._until = self._clock() + self._rest_s
            return first

    def succeeded(self) -> bool:
        """True for the first success since it failed."""
        if self._until is None:
            return False
        with self._lock:
            first, self._until = self._until is not None, None
            return first


class RedisIndexCache:
    """Shares values between hosts through Redis, compressed, for `ttl_s` seconds. A Redis that fails, or is slow, is a
    miss; it is left alone for `rest_s` seconds then, so that it costs one time-out and not one for every value."""

    SLOW_S = 1.0  # and a second for each of so many bytes: a cache that is slower than the store is no use
    SLOW_BYTES = 16 * 1024 * 1024

    def __init__(
        self,
        client: redis.Redis | str,
        ttl_s: int = 7 * 24 * 3600,
        prefix: str = "desfs:index:",
        *,
        max_value: int = 64 * 1024 * 1024,
        rest_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`client` is a connected `redis.Redis` (bytes, no decode_responses) or a `redis://` URL. Values above
        `max_value` bytes are not kept: Redis does nothing else while it moves one.

        Raises: ImportError without the packages redis and zstandard (the extra `redis`); ValueError for no such URL.
        """
        import redis
        import zstandard
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        # Short time-outs, and no second try: redis-py would make several, with waits between them.
        self._client = (
            redis.Redis.from_url(
                client, socket_timeout=2.0, socket_connect_timeout=1.0, retry=Retry(NoBackoff(), 0), retry_on_error=[]
            )
            if isinstance(client, str)
            else client
        )
        self._failures: tuple[type[Exception], ...] = (redis.RedisError, OSError)
        self._refusal = redis.ResponseError  # of one command: the server is well
        self._zstd = zstandard
        self._ttl_s = ttl_s
        self._prefix = prefix
        self._max_value = max_value
        self._clock = clock
        self._rest = _Rest(rest_s, clock)
        self._refused = False

    def get(self, key: CacheKey) -> bytes | None:
        if not self._rest.may_try():
            return None
        packed = self._call("read", 0, lambda: self._client.get(self._prefix + key.digest()))
        if not isinstance(packed, bytes):
            return None
        try:
            if not 0 <= self._zstd.frame_content_size(packed) <= self._max_sealed(key):
                return None
            sealed = self._zstd.ZstdDecompressor().decompress(packed)
        except self._zstd.ZstdError as error:
            log.warning("index cache in Redis: a value is damaged: %s", error)
            return None
        return unseal(key, sealed)

    def put(self, key: CacheKey, value: bytes) -> None:
        if len(value) > self._max_value or not self._rest.may_try():
            return
        packed = self._zstd.ZstdCompressor(level=3).compress(seal(key, value))
        self._call("write", len(packed), lambda: self._client.set(self._prefix + key.digest(), packed, ex=self._ttl_s))

    def _max_sealed(self, key: CacheKey) -> int:
        return self._max_value + len(seal(key, b""))

    def _call(self, doing: str, size: int, command: Callable[[], object]) -> object:
        """What Redis answers, None for a failure. `size`: bytes that are sent."""
        began_s = self._clock()
        try:
            answer = command()
        except self._refusal as error:
            if not self._refused:
                log.warning("index cache in Redis: cannot %s: %s", doing, error)
            self._refused = True
            return None
        except self._failures as error:
            self._fail(f"cannot {doing}: {error}")
            return None
        size += len(answer) if isinstance(answer, bytes) else 0
        took_s = self._clock() - began_s
        if took_s > self.SLOW_S + size / self.SLOW_BYTES:
            self._fail(f"cannot {doing} in time: {size} bytes took {took_s:.1f} s")
        elif self._rest.succeeded():
            log.info("index cache in Redis: in use again")
        self._refused = False
        return answer

    def _fail(self, why: str) -> None:
        if self._rest.failed():
            log.warning("index cache in Redis: %s; it is left alone for a while", why)
