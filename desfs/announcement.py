"""How a packer tells mounts of a new container: a message on a Redis channel. Whoever misses one sees the container at
the next refresh: nothing depends on it."""

from __future__ import annotations

from hashlib import sha256


def channel_of(store_url: str) -> str:
    """The channel of a store, for `store.url`; a message on it is the name of the day (UTF-8) that has a new
    container."""
    return "desfs:new:" + sha256(store_url.encode("utf-8", "surrogateescape")).hexdigest()[:32]
