"""`.desfs.json`: how the packers of a store place and name files. Written once, by the first of them. Pure, but for
reading it."""

from __future__ import annotations

import msgspec

from des_format.shards import MAX_SHARD_BITS, hex_group, placement_shard, shard_hex
from desfs.errors import NoSuchObject
from desfs.store.base import Store

CONTROL_NAME = ".desfs"  # of a mount's control directory: a container of that name is not shown
LAYOUT_KEY = ".desfs.json"
LAYOUT_LIMIT = 64 * 1024  # bytes; it has a few dozen

BY_DIRECTORY = "directory"  # the one rule of placement that this program knows


class Layout(msgspec.Struct, frozen=True):
    """What the file says. What is missing or unknown is not relied on. `id` is the store's, made with the file."""

    shard_bits: int = 0
    placement: str = ""
    naming: str = ""
    id: str = ""

    @property
    def is_known(self) -> bool:
        """True if this program can place a name as the store's packers do."""
        return self.placement == BY_DIRECTORY and 1 <= self.shard_bits <= MAX_SHARD_BITS

    def group_of(self, path: str) -> str | None:
        """The shard group that holds a path, or None when this layout does not tell."""
        if not self.is_known:
            return None
        return hex_group(shard_hex(placement_shard(path, self.shard_bits), self.shard_bits))


def read_layout(store: Store) -> Layout:
    """What the store says of its names; nothing where it says nothing, or nothing that is understood. Blocking.

    Raises: StoreError.
    """
    try:
        return msgspec.json.decode(store.get_tail(LAYOUT_KEY, LAYOUT_LIMIT).data, type=Layout)
    except (NoSuchObject, msgspec.MsgspecError, RecursionError):
        return Layout()
