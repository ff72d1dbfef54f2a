"""What a catalog can know of a bucket's containers. Pure."""

from __future__ import annotations

import re
from datetime import date

from assignment.catalog import ContainerRecord, ContainerState
from des_format.shards import SEALED, ContainerKey, is_day, parse_container_name
from desfs.store.base import ObjectInfo

Place = tuple[date, str]  # day and shard

_SHARD = re.compile(r"([0-9a-f]{1,8})[-.]", re.ASCII)
_MAX_GENERATION = (1 << 53) - 1  # a number that no database holds is no packer's


def managed(key: str) -> tuple[Place, ContainerKey] | None:
    """The place of a container that has, or can get, a row in a catalog, and what its name says: `{day}/{shard}.des`
    and parts. None for all other keys, containers of another layout among them."""
    folder, _, file_name = key.rpartition("/")
    name, shard = parse_container_name(file_name), _SHARD.match(file_name)
    if name is None or shard is None or not is_day(folder):
        return None
    if name.group != f"x{shard[1]}" or name.last > _MAX_GENERATION:
        return None
    return (date.fromisoformat(folder), shard[1]), name


def record_of(info: ObjectInfo, files: int) -> ContainerRecord:
    """The row of a container that is content, by its object. Raises: ValueError for one that can have none."""
    found = managed(info.key)
    if found is None:
        raise ValueError(f"{info.key} is no container of a shard")
    (day, shard), name = found
    is_sealed = name.last == SEALED
    return ContainerRecord(
        object_key=info.key,
        day=day,
        shard=shard,
        generation=0 if is_sealed else name.last,
        size=info.size,
        files=files,
        etag=info.etag,
        state=ContainerState.SEALED if is_sealed else ContainerState.COMMITTED,
    )
