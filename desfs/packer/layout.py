"""Agreeing on a store's layout with the packers that were there before. Blocking."""

from __future__ import annotations

import secrets
from typing import Literal, get_args

import msgspec

from des_format.shards import CONTAINER_SUFFIX, is_day
from desfs.errors import ObjectExists, UsageError
from desfs.layout import BY_DIRECTORY, LAYOUT_KEY, LAYOUT_LIMIT, Layout
from desfs.store.base import Store

NEW_SHARD_BITS = 4  # containers should be large; 256 shards are for those with millions of files a day

Naming = Literal["path", "assigned"]


def settle_layout(store: Store, shard_bits: int | None, naming: Naming | None) -> Layout:
    """The layout of a store, written now if the store is new. What the user asks for must agree with what is there.

    A store that has containers and no layout was written by others: it gets none, and every index of it is read.
    Raises: UsageError when it does not agree, or is not understood; StoreError.
    """
    wanted = Layout(shard_bits or NEW_SHARD_BITS, BY_DIRECTORY, naming or "path", secrets.token_hex(8))
    listing = store.list("", delimiter=True)
    if all(info.key != LAYOUT_KEY for info in listing.objects):
        if any(is_day(prefix.rstrip("/")) for prefix in listing.prefixes) or any(
            info.key.endswith(CONTAINER_SUFFIX) for info in listing.objects
        ):
            return msgspec.structs.replace(wanted, id="")
        try:
            store.put(LAYOUT_KEY, msgspec.json.format(msgspec.json.encode(wanted)) + b"\n")
            return wanted
        except ObjectExists:
            pass  # another packer was faster: what it wrote holds
    try:
        found = msgspec.json.decode(store.get_tail(LAYOUT_KEY, LAYOUT_LIMIT).data, type=Layout)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise UsageError(f"{store.url}/{LAYOUT_KEY} is not understood: {error}") from error
    if not found.is_known or found.naming not in get_args(Naming):
        raise UsageError(f"{store.url}/{LAYOUT_KEY}: a layout that this packer does not know: {found}")
    if shard_bits not in (None, found.shard_bits):
        raise UsageError(f"{store.url} has {found.shard_bits} shard bits, not {shard_bits}")
    if naming not in (None, found.naming):
        raise UsageError(f"{store.url} names its files by {found.naming!r}, not by {naming!r}")
    return found
