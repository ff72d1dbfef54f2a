"""What has to be known of a container besides its row. Blocking."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from des_format.names import external_keys
from desfs.container import load_container
from desfs.store.base import ObjectInfo, Store
from desfs.verify_index import external_rows, overridden_external_rows


@dataclass(frozen=True, slots=True)
class External:
    """An entry whose payload is an object of its own: under one of these keys, in the order to try."""

    name: str
    size: int
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Contents:
    """`files` counts entries, tombstones too; `external` are those that a reader reads, `named` all keys that the
    container names."""

    info: ObjectInfo
    files: int
    external: tuple[External, ...]
    named: frozenset[str]


def read_contents(store: Store, info: ObjectInfo) -> Contents:
    """Raises: NotAContainer; NoSuchObject, ObjectReplaced when it is not there any more; StoreError."""
    loaded = load_container(store, info)
    index, recorded = loaded.index, loaded.meta.external_key

    def keys(row: int) -> tuple[str, ...]:
        return tuple(external_keys(info.key, index.name(row).decode(), recorded.get(row)))

    rows = external_rows(index).tolist()
    external = tuple(External(index.name(row).decode(), int(index.data_length[row]), keys(row)) for row in rows)
    named = {key for each in external for key in each.keys}
    named.update(key for row in overridden_external_rows(index).tolist() for key in keys(row))
    return Contents(info, index.rows, external, frozenset(named))


def first_there(external: External, sizes: Mapping[str, int]) -> str | None:
    """The key that a reader finds the payload under, by a listing."""
    return next((key for key in external.keys if key in sizes), None)


def unnamed(sizes: Iterable[str], contents: Iterable[Contents]) -> list[str]:
    """The external objects that no container names, ascending."""
    named = set().union(*(each.named for each in contents))
    return sorted(set(sizes) - named)
