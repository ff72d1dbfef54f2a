"""From a name to its shard, and from an object's key to what the container in it is. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date
from hashlib import sha256
from typing import NewType

Shard = NewType("Shard", int)

MAX_SHARD_BITS = 32
CONTAINER_SUFFIX = ".des"
SEALED = -1  # the generation of a container without one: older than every part


def _check_bits(shard_bits: int) -> None:
    if not 1 <= shard_bits <= MAX_SHARD_BITS:
        raise ValueError(f"shard_bits is {shard_bits}, want 1 to {MAX_SHARD_BITS}")


def shard_of(name: str, shard_bits: int = 8) -> Shard:
    """The first `shard_bits` bits of SHA-256(name as UTF-8): the shard of a flat name (DES v1, Shards and days)."""
    _check_bits(shard_bits)
    return Shard(int.from_bytes(sha256(name.encode("utf-8")).digest()[:4], "big") >> (32 - shard_bits))


def shard_hex(shard: int, shard_bits: int = 8) -> str:
    """The shard as a key spells it: `ceil(shard_bits / 4)` lower-case hex digits."""
    _check_bits(shard_bits)
    if not 0 <= shard < 1 << shard_bits:
        raise ValueError(f"shard {shard} is not below 2^{shard_bits}")
    return f"{shard:0{(shard_bits + 3) // 4}x}"


def placement_shard(name: str, shard_bits: int) -> Shard:
    """Where this project's packer puts a name: a flat one by its own hash, one with directories by its directory's, so
    that the files of one directory are neighbours in one shard."""
    folder, slash, _ = name.rpartition("/")
    return shard_of(folder if slash else name, shard_bits)


def is_day(text: str) -> bool:
    """True for a calendar date written `YYYY-MM-DD`."""
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII):
        return False
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class ContainerKey:
    """What the file name of a container says.

    `group` names the shard whose containers override one another by generation: `x3f` for the hex shard 3f, `d10` for
    `shard_10`, and the whole stem for names that are no shard's. A sealed container has generations (-1, -1), a part
    (n, n), a merged part (first, last).
    """

    group: str
    first: int
    last: int

    @property
    def order(self) -> tuple[int, int]:
        """Ascending within a group, the newest last: by the last generation; a merged part is newer than the last part
        that it holds."""
        return (self.last, -self.first)


_HEX_SHARD = re.compile(r"([0-9a-f]{1,8})(?:-(\d+)(?:-(\d+))?)?", re.ASCII)
_DECIMAL_SHARD = re.compile(r"shard_(\d+)", re.ASCII)


def parse_container_name(file_name: str) -> ContainerKey | None:
    """The meaning of a file name like `3f.des`, `3f-000001.des`, `3f-000001-000004.des` or `shard_10.des`; None when it
    does not end in `.des` or has nothing before that."""
    stem = file_name.removesuffix(CONTAINER_SUFFIX)
    if stem == file_name or not stem:
        return None
    if match := _HEX_SHARD.fullmatch(stem):
        shard, first, last = match.groups()
        if first is None:
            return ContainerKey("x" + shard, SEALED, SEALED)
        if last is None:
            return ContainerKey("x" + shard, int(first), int(first))
        if int(first) <= int(last):
            return ContainerKey("x" + shard, int(first), int(last))
    if match := _DECIMAL_SHARD.fullmatch(stem):
        return ContainerKey(f"d{int(match[1])}", SEALED, SEALED)
    return ContainerKey(stem, SEALED, SEALED)


def guess_root(container_key: str) -> str:
    """The store's root, "" or ending in `/`, as far as a container's key tells it: above its day's folder, if it stands
    in one, else its own folder."""
    folder, slash, _ = container_key.rpartition("/")
    above, above_slash, last = folder.rpartition("/")
    return above + above_slash if is_day(last) else folder + slash


def hex_group(shard: str) -> str:
    """The `ContainerKey.group` of a shard in hex digits."""
    return "x" + shard


def part_name(shard: str, generation: int) -> str:
    """`{shard}-{generation}.des`, the generation with six digits or more."""
    return f"{shard}-{generation:06d}{CONTAINER_SUFFIX}"
