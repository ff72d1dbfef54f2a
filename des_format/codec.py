"""Bytes <-> values for everything in a container but the index columns. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from json.encoder import encode_basestring_ascii
from typing import Any, NoReturn

from des_format.errors import CorruptMeta, InvalidMeta, NotAContainer
from des_format.layout import (
    FOOTER,
    FOOTER_MAGIC,
    HEADER,
    HEADER_MAGIC,
    MAX_META,
    MIN_CONTAINER,
    MIN_RECORD,
    NAME_LENGTH,
    RECORD,
    VERSION,
    Footer,
)

Buffer = bytes | bytearray | memoryview

_MAX_EXPONENT = 400  # more than a double can hold


def build_header() -> bytes:
    """The 16 bytes that every container starts with."""
    return HEADER.pack(HEADER_MAGIC, VERSION)


def parse_header(raw: Buffer, container: str) -> None:
    """Check the first bytes of a container. Raises: NotAContainer."""
    if len(raw) < HEADER.size:
        raise NotAContainer(f"{container}: header at byte 0: found {len(raw)} bytes, want {HEADER.size}")
    magic, version = HEADER.unpack_from(raw)
    if (magic, version) != (HEADER_MAGIC, VERSION):
        raise NotAContainer(
            f"{container}: header at byte 0: found {magic!r} v{version}, want {HEADER_MAGIC!r} v{VERSION}"
        )


def build_record(
    name: bytes, data_offset: int, data_length: int, meta_offset: int, meta_length: int, flags: int
) -> bytes:
    """One index record; offsets are absolute."""
    return NAME_LENGTH.pack(len(name)) + name + RECORD.pack(data_offset, data_length, meta_offset, meta_length, flags)


def build_footer(footer: Footer) -> bytes:
    """The 72 bytes that every container ends with."""
    return FOOTER.pack(FOOTER_MAGIC, VERSION, *footer)


def check_size(size: int, container: str) -> None:
    """Refuse an object that is too short to be a container. Raises: NotAContainer."""
    if size < MIN_CONTAINER:
        raise NotAContainer(f"{container}: object size: found {size} bytes, want at least {MIN_CONTAINER}")


def parse_footer(raw: Buffer, size: int, container: str) -> Footer:
    """The regions of a container of `size` bytes, from its last 72: each inside the container, none overlapping
    another, and an index that can hold `file_count` records. Nothing is allocated from what the footer claims.

    Raises: NotAContainer with the field, the position, what was found and what was wanted.
    """
    check_size(size, container)
    at = size - FOOTER.size
    magic, version, *regions = FOOTER.unpack(raw)
    if (magic, version) != (FOOTER_MAGIC, VERSION):
        raise NotAContainer(
            f"{container}: footer at byte {at}: found {magic!r} v{version}, want {FOOTER_MAGIC!r} v{VERSION}"
        )
    footer = Footer(*regions)
    extents = (
        ("DATA", footer.data_start, footer.data_length),
        ("META", footer.meta_start, footer.meta_length),
        ("INDEX", footer.index_start, footer.index_length),
    )
    for region, start, length in extents:
        # Python's integers do not wrap: a sum that overflows 64 bits is simply past the footer.
        if start < HEADER.size or start + length > at:
            raise NotAContainer(
                f"{container}: {region} in the footer at byte {at}: found bytes {start} to {start + length}, "
                f"want them between the header ({HEADER.size}) and the footer ({at})"
            )
    stop_before, region_before = HEADER.size, "the header"
    for start, length, region in sorted((start, length, region) for region, start, length in extents if length):
        if start < stop_before:
            raise NotAContainer(
                f"{container}: {region} in the footer at byte {at}: found it at byte {start}, "
                f"want it behind {region_before}, which ends at {stop_before}"
            )
        stop_before, region_before = start + length, region
    if footer.file_count * MIN_RECORD > footer.index_length:
        raise NotAContainer(
            f"{container}: file_count in the footer at byte {at}: found {footer.file_count}, want at most "
            f"{footer.index_length // MIN_RECORD} in an index of {footer.index_length} bytes"
        )
    return footer


def _dumps(value: object) -> str:
    # ensure_ascii and these separators are the one encoding that the format allows a writer.
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def encode_meta(meta: Mapping[str, Any] | None, size: int, external_key: str | None = None) -> bytes:
    """The one encoding of an entry's metadata (DES v1, Metadata): the application's keys in its order, `size` in place
    or behind them, then `is_external` and `external_key`, which are the format's own: an application's are left out.

    A top-level `Decimal` is written with all its digits, as `mtime` needs it. Raises: InvalidMeta.
    """
    values: dict[str, Any] = {}
    for key, value in (meta or {}).items():
        if not isinstance(key, str):
            raise InvalidMeta(f"metadata key {key!r}: found {type(key).__name__}, want str")
        if key not in ("is_external", "external_key"):
            values[key] = value
    values["size"] = size
    if external_key is not None:
        values["is_external"] = True
        values["external_key"] = external_key
    pairs = []
    for key, value in values.items():
        if type(value) is str:  # most values are of these two types, and json.dumps takes ten times as long
            text = encode_basestring_ascii(value)
        elif type(value) is int:
            text = int.__repr__(value)
        elif isinstance(value, Decimal):
            # "f" writes an exponent out as zeros, which could be a billion.
            if not value.is_finite() or abs(value.adjusted()) > _MAX_EXPONENT:
                raise InvalidMeta(f"metadata value of {key!r}: {value} is no JSON number, or out of all proportion")
            text = format(value, "f")
        else:
            try:
                text = _dumps(value)
            except (TypeError, ValueError, RecursionError) as error:
                raise InvalidMeta(f"metadata value of {key!r}: {error}") from error
        pairs.append(f"{encode_basestring_ascii(key)}:{text}")
    encoded = ("{" + ",".join(pairs) + "}").encode("ascii")
    if len(encoded) > MAX_META:
        raise InvalidMeta(f"metadata has {len(encoded)} bytes, more than {MAX_META}")
    return encoded


def decode_meta(raw: Buffer, size: int, what: str) -> dict[str, Any]:
    """The metadata of an entry whose payload has `size` bytes; `what` names container and entry in errors.

    No bytes mean no metadata. Raises: CorruptMeta when it is no JSON object, nests absurdly, or disagrees on `size`.
    """
    if not raw:
        return {}
    try:
        # As text: from bytes, json.loads would take UTF-16 and a byte order mark as well.
        meta = json.loads(str(raw, "utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptMeta(f"{what}: META is no JSON: {str(error)[:200]}") from error
    if not isinstance(meta, dict):
        raise CorruptMeta(f"{what}: META: found a JSON {type(meta).__name__}, want an object")
    if "size" in meta and (isinstance(meta["size"], bool) or meta["size"] != size):
        found = meta["size"]
        # A list may nest too deep to be printed.
        shown = (
            str(found)[:80] if found is None or isinstance(found, int | float | str) else f"a {type(found).__name__}"
        )
        raise CorruptMeta(f"{what}: META: found size {shown}, want {size} as in the index")
    return meta


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")
