"""A store that is another one, but for what a subclass does otherwise. Blocking; any thread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from desfs.store.base import Answer, CopyRange, Listing, Store


class Delegating:
    """Every method of `Store` is the one of the store inside."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def url(self) -> str:
        return self._store.url

    def list(self, prefix: str = "", *, delimiter: bool = False) -> Listing:
        return self._store.list(prefix, delimiter=delimiter)

    def get_range(self, key: str, start: int, stop: int, *, if_match: str | None = None) -> Answer:
        return self._store.get_range(key, start, stop, if_match=if_match)

    def get_tail(self, key: str, length: int) -> Answer:
        return self._store.get_tail(key, length)

    def put(self, key: str, source: bytes | Path, *, if_absent: bool = True) -> str:
        return self._store.put(key, source, if_absent=if_absent)

    def delete(self, key: str) -> None:
        self._store.delete(key)

    def copy_ranges(self, key: str, pieces: Sequence[bytes | CopyRange], *, if_absent: bool = True) -> str:
        return self._store.copy_ranges(key, pieces, if_absent=if_absent)

    def close(self) -> None:
        self._store.close()
