"""Metadata as columns: what a directory listing and a verified read need."""

from __future__ import annotations

from decimal import Decimal
from hashlib import sha256
from typing import Any

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from des_format import CorruptEntry, CorruptMeta, Index
from des_format.codec import decode_meta, encode_meta
from des_format.meta import NO_MODE, NO_TIME, MetaColumns, verify_payload
from tests.unit.containers import Item, build, footer_of


def columns_of(*items: Item) -> tuple[Index, MetaColumns]:
    """The columns of a container, filled in one piece."""
    raw = build(items)
    footer = footer_of(raw)
    index = Index(raw[footer.index_start :][: footer.index_length], footer, "f.des")
    columns = MetaColumns(index.rows)
    columns.fill(index, raw[footer.meta_start :][: footer.meta_length], footer.meta_start)
    return index, columns


def column(meta: bytes, data: bytes = b"abc") -> MetaColumns:
    return columns_of(Item(b"a", data, meta))[1]


@given(st.integers(0, 4_102_444_800), st.integers(0, 999_999_999))
def test_mtime_keeps_every_nanosecond(seconds: int, nanoseconds: int) -> None:
    """Metadata: `mtime`, seconds since the epoch, as a decimal number with up to 9 fractional digits."""
    mtime = Decimal(seconds) + Decimal(nanoseconds).scaleb(-9)
    assert column(encode_meta({"mtime": mtime}, 3)).mtime_ns[0] == seconds * 10**9 + nanoseconds


@pytest.mark.parametrize(
    ("text", "mtime_ns"),
    [
        ("0", 0),
        ("1.5", 1_500_000_000),
        ("1763000000.1234567899", 1_763_000_000_123_456_789),
        ("-1.5", -1_500_000_000),
        ("1.763e9", 1_763_000_000_000_000_000),
        ("1e400", NO_TIME),
        ("1e999999999", NO_TIME),
        ("-1e999999999", NO_TIME),
        ("1e-999999999", 0),
        ("99999999999999999999", NO_TIME),
        ("9223372035.999999999", 9_223_372_035_999_999_999),
        ("9999999999", NO_TIME),
        ("9223372036.999999999", NO_TIME),
        ('"1763000000"', NO_TIME),
        ("null", NO_TIME),
        ("true", NO_TIME),
        ("[1]", NO_TIME),
        ("{}", NO_TIME),
    ],
)
def test_an_mtime_is_a_number_that_a_kernel_can_hold_or_none(text: str, mtime_ns: int) -> None:
    """Any other keys belong to the application: it may use the same key for something else."""
    columns = column(b'{"mtime":%b,"size":3}' % text.encode())
    assert columns.mtime_ns[0] == mtime_ns
    assert not columns.damaged[0]


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("420", 0o644),
        ("33188", 0o644),
        ("4095", 0o7777),
        ("-1", NO_MODE),
        ("1.5", NO_MODE),
        ('"0644"', NO_MODE),
        ("null", NO_MODE),
    ],
)
def test_modes(text: str, mode: int) -> None:
    """Metadata: `mode`, permission bits of the source file (integer)."""
    assert column(b'{"mode":%b,"size":3}' % text.encode()).mode[0] == mode


@pytest.mark.parametrize(
    ("meta", "damaged"),
    [
        (b'{"size":3}', False),
        (b'{"k":1}', False),
        (b' { "size" : 3 , "k" : [1, {"size": 9}] } ', False),
        (b"", False),
        (b'{"size":4}', True),
        (b'{"size":"3"}', True),
        (b'{"size":true}', True),
        (b'{"k":NaN}', True),
        (b"[]", True),
        (b"null", True),
        (b"{not json", True),
        (b'{"k":"\xff","size":3}', True),
        (b'{"size":3}x', True),
        (b"[" * 100_000, True),
        (b'{"k":' + b"[" * 100_000 + b"]" * 100_000 + b"}", True),
        ('{"size":3}'.encode("utf-16"), True),
        (b"\xef\xbb\xbf{}", True),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_columns_and_the_single_reader_agree_on_what_is_damaged(meta: bytes, damaged: bool) -> None:
    """META that is no JSON object, or nests absurdly, or disagrees on `size`: reported as damaged."""
    assert bool(column(meta).damaged[0]) is damaged
    if damaged:
        with pytest.raises(CorruptMeta):
            decode_meta(meta, 3, "f.des: 'a'")
    else:
        decode_meta(meta, 3, "f.des: 'a'")


def test_a_meta_range_that_is_not_inside_meta_is_damaged_and_the_others_are_not() -> None:
    """An entry whose META range is not inside META: the index and the bytes are served."""
    _, columns = columns_of(
        Item(b"a", b"1", meta_offset=0),
        Item(b"b", b"2"),
        Item(b"c", b"3", meta_length=2**64 - 1),
        Item(b"d", b"4", meta_offset=2**64 - 1),
    )
    assert columns.damaged.tolist() == [True, False, True, True]


def test_meta_in_pieces() -> None:
    """A META region that is not held is filled piece by piece; a row by the piece that has all of it."""
    items = [Item(b"%d" % n, b"x", encode_meta({"mtime": Decimal(n)}, 1)) for n in range(50)]
    raw = build(items)
    footer = footer_of(raw)
    index = Index(raw[footer.index_start :][: footer.index_length], footer, "f.des")
    columns = MetaColumns(index.rows)
    whole = raw[footer.meta_start :][: footer.meta_length]
    for start in range(0, len(whole), 100):
        columns.fill(index, whole[start : start + 160], footer.meta_start + start)
    assert columns.mtime_ns.tolist() == [n * 10**9 for n in range(50)]


def sums(payload: bytes) -> dict[str, str]:
    return {"crc32c": f"{google_crc32c.value(payload):08x}", "sha256": sha256(payload).hexdigest()}


@pytest.mark.parametrize("keys", [["crc32c"], ["sha256"], ["crc32c", "sha256"], []])
def test_a_payload_is_held_to_its_checksum(keys: list[str]) -> None:
    """When META has a checksum, the bytes are verified before anybody sees them."""
    meta: dict[str, Any] = {key: sums(b"abc")[key] for key in keys}
    index, columns = columns_of(Item(b"a", b"abc", encode_meta(meta, 3)))
    columns.verify(index, 0, b"abc")
    verify_payload(meta, b"abc", index, 0)
    if keys:
        with pytest.raises(CorruptEntry, match=r"'a'.*found a checksum of .* want"):
            columns.verify(index, 0, b"abd")
        with pytest.raises(CorruptEntry, match=r"'a'.*found a checksum of .* want"):
            verify_payload(meta, b"abd", index, 0)


@pytest.mark.parametrize(
    "meta",
    [
        {"crc32c": "not hex!"},
        {"crc32c": "12 45 78"},
        {"crc32c": "ABCDEF01"},
        {"crc32c": "1234567"},
        {"crc32c": 12345678},
        {"crc32c": None},
        {"crc32c": "żółćżółć"},
        {"sha256": "x" * 64},
        {"sha256": "A" * 64},
        {"sha256": "é" * 64},
        {"sha256": 7},
    ],
    ids=ascii,
)
def test_what_is_no_checksum_is_an_applications_own(meta: dict[str, Any]) -> None:
    """Metadata: `sha256`, lower-case hex; `crc32c`, 8 lower-case hex digits. Other keys belong to the application."""
    index, columns = columns_of(Item(b"a", b"abc", encode_meta(meta, 3)))
    assert not columns.damaged[0]
    columns.verify(index, 0, b"abc")
    verify_payload(meta, b"abc", index, 0)


JSON_BYTES = st.one_of(
    st.binary(max_size=30),
    st.builds(
        lambda key, value: b'{"%b":%b}' % (key, value),
        st.sampled_from([b"size", b"mtime", b"mode", b"crc32c", b"sha256", b"k"]),
        st.one_of(
            st.binary(max_size=12),
            st.sampled_from([b"3", b"-0", b"1e5", b"0.1", b"[[]]", b'"\\u0000"', b'""', b"1E-400", b'"00000000"']),
        ),
    ),
)  # fmt: skip


@given(st.lists(JSON_BYTES, min_size=1, max_size=4))
def test_no_metadata_makes_the_columns_fail(metas: list[bytes]) -> None:
    index, columns = columns_of(*(Item(b"%d" % n, b"abc", meta) for n, meta in enumerate(metas)))
    for row in range(index.rows):
        try:
            columns.verify(index, row, b"abc")
        except CorruptEntry:
            pass
