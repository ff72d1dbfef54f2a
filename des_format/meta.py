"""The metadata of all entries as columns: what a directory listing and a verified read need, nothing else."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation

import msgspec
import numpy as np
import numpy.typing as npt

from des_format.blocks import BLOCK, BlockChecksums, parse_blocks
from des_format.checksum import crc32c as crc32c_of
from des_format.codec import Buffer
from des_format.errors import CorruptEntry
from des_format.index import BAD_META, Index
from des_format.layout import EXTERNAL
from des_format.packed_meta import decode_packed

NO_TIME = np.iinfo(np.int64).min
NO_MODE = 0xFFFF
_MAX_TIME_S = (2**63 - 1) // 1_000_000_000  # whole seconds: a fraction must fit behind them
_PERMISSIONS = 0o7777
# Checksums of blocks of one container, and what Python needs to hold them: those of some 60 TiB. A container that has
# more is out for memory.
_MAX_BLOCK_BYTES = 64 * 1024 * 1024
_OBJECT_BYTES = 256  # of a BlockChecksums, its bytes and its place in the dict


class _Keys(msgspec.Struct):
    """The keys that this project gives a meaning (DES v1, Metadata). Raw: an application may use the same key for
    something else, and a float would lose the nanoseconds of `mtime`."""

    size: msgspec.Raw = msgspec.Raw()
    mtime: msgspec.Raw = msgspec.Raw()
    mode: msgspec.Raw = msgspec.Raw()
    crc32c: msgspec.Raw = msgspec.Raw()
    sha256: msgspec.Raw = msgspec.Raw()
    external_key: msgspec.Raw = msgspec.Raw()
    crc32c_blocks: msgspec.Raw = msgspec.Raw()


class _External:
    """What the keys say that only external rows have. Derived once for all rows that share their metadata."""

    __slots__ = ("blocks", "broken", "key")

    def __init__(self, keys: _Keys) -> None:
        self.key = _text(bytes(keys.external_key)) if keys.external_key else None
        self.blocks: BlockChecksums | None = None
        self.broken = False
        try:
            if keys.crc32c_blocks:
                self.blocks = parse_blocks(bytes(keys.crc32c_blocks))
        except ValueError:
            self.broken = True


_decoder = msgspec.json.Decoder(_Keys)


class MetaColumns:
    """Metadata of the rows of an index.

    `mtime_ns: i64[rows]` (NO_TIME: not given), `mode: u16[rows]` permission bits (NO_MODE: not given),
    `crc32c: u32[rows]` valid where `has_crc32c`, `damaged: bool[rows]` (no JSON object, or at odds with the index);
    `sha256` holds the digests of the rows that have one and no crc32c, `external_key` the recorded keys of external
    rows, `external_blocks` the checksums of their blocks where they have them.
    """

    __slots__ = (
        "_block_bytes",
        "crc32c",
        "damaged",
        "external_blocks",
        "external_key",
        "has_crc32c",
        "mode",
        "mtime_ns",
        "sha256",
    )

    def __init__(self, rows: int) -> None:
        self.mtime_ns: npt.NDArray[np.int64] = np.full(rows, NO_TIME, np.int64)
        self.mode: npt.NDArray[np.uint16] = np.full(rows, NO_MODE, np.uint16)
        self.crc32c: npt.NDArray[np.uint32] = np.zeros(rows, np.uint32)
        self.has_crc32c: npt.NDArray[np.bool_] = np.zeros(rows, np.bool_)
        self.damaged: npt.NDArray[np.bool_] = np.zeros(rows, np.bool_)
        self.sha256: dict[int, str] = {}
        self.external_key: dict[int, str] = {}
        self.external_blocks: dict[int, BlockChecksums] = {}
        self._block_bytes = 0  # held in `external_blocks`

    def fill(self, index: Index, raw: Buffer, start: int) -> None:
        """Decode the rows whose META lies in `raw`, which begins at byte `start` of the container."""
        view = memoryview(raw)
        stop = start + len(view)
        lengths = index.meta_length
        offsets = index.meta_offset
        inside = (lengths > 0) & (offsets >= np.uint64(start)) & (offsets + lengths <= np.uint64(stop))
        self.damaged |= (index.state & BAD_META) != 0
        rows = np.flatnonzero(inside)
        # msgspec does not look at the bytes of strings that it skips.
        sound = isinstance(raw, bytes) and raw.isascii()
        rows = rows[: self._affordable(offsets[rows], lengths[rows], len(view))]
        self.damaged |= inside
        self.damaged[rows] = False
        rows = self._take_packed(index, rows, view, start)
        if not len(rows):
            return
        mtimes, modes, crcs = array("q"), array("H"), array("q")
        decoded: tuple[int, int] | None = None
        keys: _Keys | None = None
        # What follows is derived once for all rows that share their metadata: they may be a million, and it 10 MiB.
        mtime_ns, mode, crc = NO_TIME, NO_MODE, -1
        own_size, sha256 = b"", ""
        external: _External | None = None
        for row, offset, length, size in zip(
            rows.tolist(),
            (offsets[rows] - np.uint64(start)).tolist(),
            lengths[rows].tolist(),
            index.data_length[rows].tolist(),
            strict=True,
        ):
            if decoded != (offset, length):
                decoded = (offset, length)
                mtime_ns, mode, crc = NO_TIME, NO_MODE, -1
                sha256, external = "", None
                try:
                    if not sound:
                        str(view[offset : offset + length], "utf-8")
                    keys = _decoder.decode(view[offset : offset + length])
                except (msgspec.MsgspecError, ValueError, RecursionError):
                    keys = None
                else:
                    own_size = bytes(keys.size)
                    if keys.mtime:
                        mtime_ns = _nanoseconds(bytes(keys.mtime))
                    if keys.mode and bytes(keys.mode).isdigit():
                        mode = int(bytes(keys.mode)[:12]) & _PERMISSIONS
                    if keys.crc32c:
                        crc = _hex_value(bytes(keys.crc32c), 8)
                    if crc < 0 and keys.sha256 and _hex_value(bytes(keys.sha256), 64) >= 0:
                        sha256 = bytes(keys.sha256)[1:-1].decode("ascii")
            if keys is None or (own_size and own_size != b"%d" % size):
                self.damaged[row] = True
                mtimes.append(NO_TIME)
                modes.append(NO_MODE)
                crcs.append(-1)
                continue
            mtimes.append(mtime_ns)
            modes.append(mode)
            crcs.append(crc)
            if sha256:
                self.sha256[row] = sha256
            if (keys.external_key or keys.crc32c_blocks) and index.flags[row] & EXTERNAL:
                if external is None:
                    external = _External(keys)
                self._take_external(row, size, external)
        self.mtime_ns[rows] = np.frombuffer(mtimes, np.int64)
        self.mode[rows] = np.frombuffer(modes, np.uint16)
        found = np.frombuffer(crcs, np.int64)
        self.has_crc32c[rows] = found >= 0
        self.crc32c[rows] = found.astype(np.uint32)

    def _take_packed(
        self, index: Index, rows: npt.NDArray[np.int64], view: memoryview, start: int
    ) -> npt.NDArray[np.int64]:
        """Decode the rows that have the packer's own form; those that have not."""
        starts = index.meta_offset[rows].astype(np.int64) - start
        packed = decode_packed(np.frombuffer(view, np.uint8), starts, starts + index.meta_length[rows])
        right = packed.size == index.data_length[rows[packed.places]].astype(np.int64)
        done = rows[packed.places[right]]
        self.mtime_ns[done] = packed.mtime_ns[right]
        self.mode[done] = packed.mode[right] & _PERMISSIONS
        self.crc32c[done] = packed.crc32c[right]
        self.has_crc32c[done] = True
        return rows[:0] if len(done) == len(rows) else np.delete(rows, packed.places[right])

    def _take_external(self, row: int, size: int, external: _External) -> None:
        if external.key is not None:
            self.external_key[row] = external.key
        if external.blocks is not None and external.blocks.fits(size) and self._block_bytes <= _MAX_BLOCK_BYTES:
            self.external_blocks[row] = external.blocks
            self._block_bytes += len(external.blocks.crc32c) + _OBJECT_BYTES
        elif external.blocks is not None or external.broken:
            self.damaged[row] = True

    @staticmethod
    def _affordable(offsets: npt.NDArray[np.uint64], lengths: npt.NDArray[np.uint32], region: int) -> int:
        """How many of the rows to decode. Entries may share their metadata, but a container whose META ranges overlap
        without end would cost any amount of time: what goes beyond twice the region is taken for damaged."""
        if not len(offsets):
            return 0
        repeats = np.zeros(len(offsets), np.bool_)
        repeats[1:] = (offsets[1:] == offsets[:-1]) & (lengths[1:] == lengths[:-1])
        work = np.cumsum(np.where(repeats, 0, lengths.astype(np.int64)))
        return int(np.searchsorted(work, 2 * region, "right"))

    def verifier(self, index: Index, row: int) -> PayloadVerifier | None:
        """What checks a payload against the checksum that META has for it; None if it has none."""
        if self.has_crc32c[row]:
            return PayloadVerifier(index, row, crc32c=f"{int(self.crc32c[row]):08x}")
        return PayloadVerifier(index, row, sha256=self.sha256[row]) if row in self.sha256 else None

    def block_checksums(self, index: Index, row: int) -> BlockChecksums | None:
        """What checks the blocks of an external payload, each by itself; None if META has nothing for that. A payload
        that is no longer than a block needs no more than its own checksum."""
        blocks = self.external_blocks.get(row)
        if blocks is None and self.has_crc32c[row] and index.flags[row] & EXTERNAL and index.data_length[row] <= BLOCK:
            blocks = BlockChecksums(BLOCK, int(self.crc32c[row]).to_bytes(4, "little"))
        return blocks

    def verify(self, index: Index, row: int, payload: Buffer) -> None:
        """Compare a payload with the checksum that META has for it, if any. Raises: CorruptEntry."""
        _verify(self.verifier(index, row), payload)


class PayloadVerifier:
    """Takes the checksum of one payload, piece by piece, by CRC-32C or else by SHA-256. One thread at a time."""

    def __init__(self, index: Index, row: int, *, crc32c: str | None = None, sha256: str = "") -> None:
        self._index = index
        self._row = row
        self._wanted = sha256 if crc32c is None else crc32c
        self._crc32c = 0
        self._sha256 = hashlib.sha256() if crc32c is None else None

    def update(self, piece: Buffer) -> None:
        """Take the next bytes."""
        if self._sha256 is not None:
            self._sha256.update(piece)
        else:
            self._crc32c = crc32c_of(piece, self._crc32c)

    def check(self) -> None:
        """After the last piece. Raises: CorruptEntry."""
        found = f"{self._crc32c:08x}" if self._sha256 is None else self._sha256.hexdigest()
        if found != self._wanted:
            raise CorruptEntry(
                f"{self._index.container}: {self._index.entry(self._row).name!r}: payload at byte "
                f"{int(self._index.data_offset[self._row])}: found a checksum of {found}, want {self._wanted}"
            )


def _verify(verifier: PayloadVerifier | None, payload: Buffer) -> None:
    if verifier is not None:
        verifier.update(payload)
        verifier.check()


def verify_payload(meta: Mapping[str, object], payload: Buffer, index: Index, row: int) -> None:
    """Compare a payload with the `crc32c`, else the `sha256` of its metadata. Raises: CorruptEntry."""
    for key, digits in (("crc32c", 8), ("sha256", 64)):
        wanted = meta.get(key)
        if isinstance(wanted, str) and _is_hex(wanted.encode("utf-8", "surrogatepass"), digits):
            _verify(PayloadVerifier(index, row, **{key: wanted}), payload)
            return


def _nanoseconds(number: bytes) -> int:
    """Seconds as a JSON number to ns, NO_TIME for what is no number or no time; digits past the ninth are cut."""
    seconds, _, fraction = number.partition(b".")
    if seconds.isdigit() and (fraction.isdigit() or not fraction) and len(seconds) <= 10:
        whole = int(seconds)
        return whole * 1_000_000_000 + int(fraction[:9].ljust(9, b"0")) if whole < _MAX_TIME_S else NO_TIME
    try:
        value = Decimal(number.decode("ascii"))
        return int(value.scaleb(9)) if abs(value) < _MAX_TIME_S else NO_TIME
    except (InvalidOperation, ValueError, ArithmeticError):
        return NO_TIME


def _text(quoted: bytes) -> str:
    """A JSON string's value, "" for another type."""
    try:
        return msgspec.json.decode(quoted, type=str)
    except msgspec.MsgspecError:
        return ""


def _hex_value(quoted: bytes, digits: int) -> int:
    """The value of a JSON string of exactly so many lower-case hex digits, -1 for anything else."""
    return int(quoted[1:-1], 16) if _is_hex(quoted[1:-1], digits) and quoted[:1] == b'"' else -1


def _is_hex(text: bytes, digits: int) -> bool:
    """Whether a checksum is what the format says it is; else the key is an application's own."""
    return len(text) == digits and not text.strip(b"0123456789abcdef")
