"""`.desfs.json`: how the names of a store are placed. Written once, by the first packer. Blocking."""

from __future__ import annotations

from typing import Literal

import msgspec

from des_format.shards import CONTAINER_SUFFIX, is_day
from desfs.errors import ObjectExists, UsageError
from desfs.store.base import Store

LAYOUT_KEY = ".desfs.json"
NEW_SHARD_BITS = 4  # containers should be large; 256 shards are for those with millions of files a day
_LIMIT = 64 * 1024

Naming = Literal["path", "assigned"]


class StoreLayout(msgspec.Struct, frozen=True):
    """What packers agree on. `placement` is always by directory: what other rules mean, this packer does not know."""

    shard_bits: int
    placement: Literal["directory"]
    naming: Naming


def settle_layout(store: Store, shard_bits: int | None, naming: Naming | None) -> StoreLayout:
    """The layout of a store, written now if the store is new. What the user asks for must agree with what is there.

    A store that has containers and no layout was written by others: it gets none, and every index of it is read.
    Raises: UsageError when it does not agree, or is not understood; StoreError.
    """
    wanted = StoreLayout(shard_bits or NEW_SHARD_BITS, "directory", naming or "path")
    listing = store.list("", delimiter=True)
    if all(info.key != LAYOUT_KEY for info in listing.objects):
        if any(is_day(prefix.rstrip("/")) for prefix in listing.prefixes) or any(
            info.key.endswith(CONTAINER_SUFFIX) for info in listing.objects
        ):
            return wanted
        try:
            store.put(LAYOUT_KEY, msgspec.json.format(msgspec.json.encode(wanted)) + b"\n")
            return wanted
        except ObjectExists:
            pass  # another packer was faster: what it wrote holds
    try:
        found = msgspec.json.decode(store.get_tail(LAYOUT_KEY, _LIMIT).data, type=StoreLayout)
    except msgspec.MsgspecError as error:
        raise UsageError(f"{store.url}/{LAYOUT_KEY}: a layout that this packer does not know: {error}") from error
    if shard_bits not in (None, found.shard_bits):
        raise UsageError(f"{store.url} has {found.shard_bits} shard bits, not {shard_bits}")
    if naming not in (None, found.naming):
        raise UsageError(f"{store.url} names its files by {found.naming!r}, not by {naming!r}")
    return found
