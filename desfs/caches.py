"""What a mount keeps outside of its memory: the disk cache and Redis, as its settings say."""

from __future__ import annotations

from typing import Any

from des_format.cache import CacheKey, IndexCache, RedisIndexCache
from desfs import metrics
from desfs.compiled import CompiledIndexes
from desfs.container import LoadedContainer, load_container
from desfs.disk_cache import DiskCache
from desfs.problems import Problems
from desfs.settings import MountSettings
from desfs.store.base import ObjectInfo, Store


class Caches:
    """The caches behind a mount's memory; each may be missing. Blocking; any thread.

    Attributes: `disk` has blocks, `compiled` parsed indexes in the same folder, `tails` raw ones in Redis.
    """

    def __init__(self, settings: MountSettings, problems: Problems) -> None:
        """Raises: UsageError for a folder that cannot be used."""
        self.disk: DiskCache | None = None
        self.compiled: CompiledIndexes | None = None
        self.tails: IndexCache | None = None
        if settings.cache_dir:
            self.disk = DiskCache(settings.cache_dir, settings.cache_size, problems=problems)
            self.compiled = CompiledIndexes(self.disk.folder)
        if settings.redis is not None:
            self.tails = _Counted(RedisIndexCache(settings.redis.get_secret_value()))

    def load(self, store: Store, info: ObjectInfo) -> LoadedContainer:
        """Open a container, from a cache if one has it. Raises: as load_container."""
        return load_container(store, info, compiled=self.compiled, tails=self.tails)

    def state(self) -> dict[str, Any]:
        """For the statistics."""
        return {"disk": None if self.disk is None else self.disk.state(), "redis": self.tails is not None}


class _Counted:
    """An index cache whose answers are counted."""

    def __init__(self, inner: IndexCache) -> None:
        self._inner = inner

    def get(self, key: CacheKey) -> bytes | None:
        value = self._inner.get(key)
        metrics.CACHE_REQUESTS.labels("redis", "tail", "miss" if value is None else "hit").inc()
        return value

    def put(self, key: CacheKey, value: bytes) -> None:
        self._inner.put(key, value)
