"""Checksums of the blocks of an external payload, for those who read a part of it and verify that part. Pure.

META holds them as `"crc32c_blocks":{"size":4194304,"values":"…"}`: the CRC-32C of each block in the payload's order,
u32 little-endian, in Base64. All blocks have `size` bytes, the last one what is left.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any

import msgspec

from des_format.checksum import crc32c
from des_format.codec import Buffer
from des_format.errors import CorruptEntry, SizeMismatch
from des_format.layout import MAX_META

META_KEY = "crc32c_blocks"
BLOCK = 4 * 1024 * 1024  # bytes: what a mount fetches at a time; every block size is a multiple of it
MAX_BLOCK = 16 * BLOCK  # bytes: who verifies a block holds all of it
_VALUE = 4  # bytes of a checksum
_BASE64_BITS = 6  # that a character holds
# Four fifths of an entry's metadata; the rest is for its other keys. Blocks of 4 MiB for up to 6 TiB.
_MAX_BLOCKS = MAX_META * 4 // 5 * _BASE64_BITS // (8 * _VALUE)


@dataclass(frozen=True, slots=True)
class BlockChecksums:
    """The checksums of one payload's blocks. `block_size` in bytes; `crc32c`: u32 little-endian [blocks], a view where
    its owner has one."""

    block_size: int
    crc32c: Buffer

    def fits(self, size: int) -> bool:
        """Whether these can be the checksums of a payload of `size` bytes."""
        return len(self.crc32c) == _VALUE * block_count(size, self.block_size)

    def check(self, number: int, data: Buffer, what: str = "payload") -> None:
        """Compare a whole block with its checksum; `what` names the payload in the error.

        Raises: CorruptEntry; IndexError if there is no such block.
        """
        value = self.crc32c[number * _VALUE : (number + 1) * _VALUE] if number >= 0 else b""
        if len(value) != _VALUE:
            raise IndexError(f"block {number} of {len(self.crc32c) // _VALUE}")
        wanted = int.from_bytes(value, "little")
        found = crc32c(data)
        if found != wanted:
            raise CorruptEntry(
                f"{what}: block {number} at byte {number * self.block_size}: "
                f"found a checksum of {found:08x}, want {wanted:08x}"
            )

    def meta(self) -> dict[str, Any]:
        """The value of the key in META."""
        return {"size": self.block_size, "values": base64.b64encode(self.crc32c).decode("ascii")}


class BlockSummer:
    """Takes the checksums of the blocks of a payload of `size` bytes as it passes, in pieces of any length."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._block_size = block_size_for(size)
        self._finished = bytearray()
        self._current = 0
        self._taken = 0

    def update(self, piece: Buffer) -> None:
        """Take the next bytes."""
        at = 0
        while at < len(piece):
            room = self._block_size - self._taken % self._block_size
            part = piece[at : at + room]
            self._current = crc32c(part, self._current)
            self._taken += len(part)
            at += len(part)
            if len(part) == room:
                self._finish()

    def checksums(self) -> BlockChecksums:
        """After the last piece. Raises: SizeMismatch when the pieces were not `size` bytes."""
        if self._taken != self._size:
            raise SizeMismatch(f"the source had {self._taken} bytes, want {self._size}")
        values = bytes(self._finished)
        if self._taken % self._block_size:
            values += self._current.to_bytes(_VALUE, "little")
        return BlockChecksums(self._block_size, values)

    def meta(self) -> dict[str, Any]:
        """The key of META for the payload: none for one of a single block, whose checksum is that of the whole, and
        none for one that would need longer blocks than a reader takes. Raises: as checksums."""
        checksums = self.checksums()
        if self._size <= BLOCK or self._block_size > MAX_BLOCK:
            return {}
        return {META_KEY: checksums.meta()}

    def _finish(self) -> None:
        self._finished += self._current.to_bytes(_VALUE, "little")
        self._current = 0


def block_size_for(size: int) -> int:
    """The block size with which a payload of `size` bytes is written: a multiple of BLOCK such that the checksums leave
    room in META."""
    return BLOCK * max(-(-size // (BLOCK * _MAX_BLOCKS)), 1)


def block_count(size: int, block_size: int) -> int:
    """How many blocks a payload of `size` bytes has."""
    return -(-size // block_size)


def block_bounds(size: int, block_size: int, number: int) -> tuple[int, int]:
    """The range of a block within a payload of `size` bytes. Raises: IndexError if it has no such block."""
    if not 0 <= number < block_count(size, block_size):
        raise IndexError(f"block {number} of {block_count(size, block_size)}")
    start = number * block_size
    return start, min(start + block_size, size)


class _Value(msgspec.Struct):
    size: int
    values: str


_decoder = msgspec.json.Decoder(_Value)


def parse_blocks(value: Buffer) -> BlockChecksums | None:
    """The value of the key in META, as JSON; None for what is of another form: the key is an application's own then.
    Whether it fits the payload's size is for the caller to ask.

    Raises: ValueError for a block size that no payload has, and for what is no Base64 of u32.
    """
    try:
        found = _decoder.decode(value)
    except (msgspec.MsgspecError, RecursionError):
        return None
    if not 0 < found.size <= MAX_BLOCK or found.size % BLOCK:
        raise ValueError(
            f"{META_KEY}: found a block size of {found.size}, want a multiple of {BLOCK} up to {MAX_BLOCK}"
        )
    try:
        crc32c = base64.b64decode(found.values, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{META_KEY}: {error}") from error
    if len(crc32c) % _VALUE:
        raise ValueError(f"{META_KEY}: found {len(crc32c)} bytes of values, want a multiple of {_VALUE}")
    return BlockChecksums(found.size, crc32c)
