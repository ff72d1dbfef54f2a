"""docs/format.md, Structures and Metadata; the refusals of its table of damaged containers."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from des_format import CorruptMeta, InvalidMeta, NotAContainer
from des_format.codec import (
    build_footer,
    build_header,
    build_record,
    check_size,
    decode_meta,
    encode_meta,
    parse_footer,
    parse_header,
)
from des_format.layout import FOOTER, HEADER, MAX_META, MIN_CONTAINER, MIN_RECORD, RECORD, Footer
from tests.unit.containers import Item, build, footer_of, patched

U64 = st.integers(0, 2**64 - 1)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def test_sizes() -> None:
    """HEADER 16 B, INDEX record 2 + n + 36 B, FOOTER 72 B; the smallest valid container has 88 bytes."""
    assert (HEADER.size, RECORD.size, FOOTER.size, MIN_CONTAINER, MIN_RECORD) == (16, 36, 72, 88, 39)


def test_the_bytes_of_the_structures() -> None:
    """All integers are little-endian, reserved bytes are written as zero."""
    assert build_header() == b"DESHEAD1\x01" + bytes(7)
    assert (
        build_record(b"ab", 1, 2, 3, 4, 5).hex()
        == "02006162" + "".join(f"{n:02x}" + "00" * 7 for n in (1, 2, 3, 4)) + "05000000"
    )
    footer = build_footer(Footer(16, 1, 17, 2, 19, 39, 1))
    assert footer[:16] == b"DESFOOT1\x01" + bytes(7)
    assert footer[16:].hex() == "".join(f"{n:02x}" + "00" * 7 for n in (16, 1, 17, 2, 19, 39, 1))


@given(st.binary(min_size=1, max_size=100), st.tuples(U64, U64, U64, U64, st.integers(0, 2**32 - 1)))
def test_a_record_reads_back(name: bytes, fields: tuple[int, int, int, int, int]) -> None:
    raw = build_record(name, *fields)
    assert int.from_bytes(raw[:2], "little") == len(name)
    assert raw[2 : 2 + len(name)] == name
    assert RECORD.unpack(raw[2 + len(name) :]) == fields


SOUND = build([Item(b"a", b"12345"), Item(b"b", b"678")])


def _lie(**fields: int) -> Callable[[Footer], Footer]:
    return lambda footer: Footer(**(footer._asdict() | fields))


def _refusal(raw: bytes) -> str:
    try:
        check_size(len(raw), "day/f.des")
        parse_header(raw[:16], "day/f.des")
        parse_footer(raw[-FOOTER.size :], len(raw), "day/f.des")
    except NotAContainer as refused:
        return str(refused)
    raise AssertionError("not refused")


END = len(SOUND) - FOOTER.size
AT = footer_of(SOUND)


@pytest.mark.parametrize(
    ("raw", "position", "found", "wanted"),
    [
        (b"", "object size", "0 bytes", "at least 88"),
        (SOUND[:87], "object size", "87 bytes", "at least 88"),
        (patched(SOUND, 7, b"2"), "byte 0", "b'DESHEAD2'", "b'DESHEAD1'"),
        (patched(SOUND, 8, b"\0"), "byte 0", "v0", "v1"),
        (patched(SOUND, END, b"d"), f"byte {END}", "b'dESFOOT1'", "b'DESFOOT1'"),
        (patched(SOUND, END + 8, b"\xff"), f"byte {END}", "v255", "v1"),
        (SOUND + b"\0", f"byte {END + 1}", "found", "b'DESFOOT1'"),
        (SOUND[:-1], f"byte {END - 1}", "found", "b'DESFOOT1'"),
        (SOUND[1:], "byte 0", "ESHEAD1", "b'DESHEAD1'"),
        (build([Item(b"a")], change=_lie(data_start=15)), "DATA", "bytes 15", "(16)"),
        (build([Item(b"a")], change=_lie(data_start=0, data_length=0)), "DATA", "bytes 0", "(16)"),
        (build([Item(b"a")], change=_lie(meta_start=2**64 - 1)), "META", "18446744073709551615", "want"),
        (build([Item(b"a")], change=_lie(meta_length=2**64 - 16)), "META", "18446744073709551616", "want"),
        (build([Item(b"a")], change=_lie(index_length=40)), "INDEX", "found bytes", "footer"),
        (build([Item(b"a", b"12")], change=_lie(data_length=3)), "META", "found it at byte 18", "ends at 19"),
        (build([Item(b"a", b"12")], change=_lie(meta_start=17)), "META", "byte 17", "DATA, which ends at 18"),
        (build([Item(b"a", b"12")], change=_lie(index_start=16)), "INDEX", "byte 16", "DATA, which ends at 18"),
        (build([Item(b"a")], change=_lie(file_count=2)), "file_count", "found 2", "at most 1"),
        (build([], change=_lie(file_count=1)), "file_count", "found 1", "at most 0"),
        (build([Item(b"a")], change=_lie(file_count=2**64 - 1)), "file_count", "18446744073709551615", "at most 1"),
    ],
)  # fmt: skip
def test_a_refusal_names_container_position_found_and_wanted(
    raw: bytes, position: str, found: str, wanted: str
) -> None:
    """Damaged containers: a refusal names the container, the position, what was found and what was wanted."""
    message = _refusal(raw)
    assert message.startswith("day/f.des: ")
    for part in (position, found, wanted):
        assert part in message


def test_gaps_reserved_bytes_and_another_order_of_regions_are_accepted() -> None:
    """A gap between regions, reserved bytes that are not zero: accepted."""
    raw = build([Item(b"a", b"12345")], gaps=(b"x", b"yy", b"z" * 3, b"w" * 100))
    raw = patched(patched(raw, 9, b"\xff" * 7), len(raw) - FOOTER.size + 9, b"\xff" * 7)
    parse_header(raw, "f.des")
    footer = parse_footer(raw[-FOOTER.size :], len(raw), "f.des")
    assert footer == footer_of(raw)
    assert footer.data_start == 17
    swapped = Footer(120, 10, 16, 20, 40, 39, 1)
    assert parse_footer(build_footer(swapped), 1000, "f.des") == swapped


@given(st.tuples(U64, U64, U64, U64, U64, U64, U64), st.integers(88, 2**40))
def test_a_footer_that_passes_holds_its_promises(fields: tuple[int, int, int, int, int, int, int], size: int) -> None:
    _check_footer(Footer(*fields), size)


SMALL = st.integers(0, 250)


@given(st.tuples(SMALL, SMALL, SMALL, SMALL, SMALL, SMALL, st.integers(0, 4)), st.integers(88, 400))
def test_a_small_footer_that_passes_holds_its_promises(
    fields: tuple[int, int, int, int, int, int, int], size: int
) -> None:
    _check_footer(Footer(*fields), size)


def _check_footer(claimed: Footer, size: int) -> None:
    """Regions that overlap, run past the FOOTER, or overflow 64 bits are refused, and nothing else is."""
    extents = [
        (claimed.data_start, claimed.data_length),
        (claimed.meta_start, claimed.meta_length),
        (claimed.index_start, claimed.index_length),
    ]
    inside = all(start >= 16 and start + length <= size - 72 for start, length in extents)
    apart = all(
        first[0] + first[1] <= second[0] or second[0] + second[1] <= first[0]
        for first in extents
        for second in extents
        if first is not second and first[1] and second[1]
    )
    enough = claimed.file_count * 39 <= claimed.index_length
    if inside and apart and enough:
        assert parse_footer(build_footer(claimed), size, "f.des") == claimed
    else:
        with pytest.raises(NotAContainer):
            parse_footer(build_footer(claimed), size, "f.des")


# --- metadata --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("meta", "size", "key", "encoded"),
    [
        (None, 0, None, '{"size":0}'),
        ({}, 7, None, '{"size":7}'),
        ({"mime": "text/plain"}, 3, None, '{"mime":"text/plain","size":3}'),
        ({"z": 1, "a": 2}, 3, None, '{"z":1,"a":2,"size":3}'),
        ({"a": 1, "size": 99, "b": 2}, 3, None, '{"a":1,"size":3,"b":2}'),
        ({"ż": "ół\U0001f600"}, 1, None, '{"\\u017c":"\\u00f3\\u0142\\ud83d\\ude00","size":1}'),
        ({"a": [1, {"b": None}], "t": True}, 1, None, '{"a":[1,{"b":null}],"t":true,"size":1}'),
        ({"k": 1}, 5, "d/_bigFiles/x", '{"k":1,"size":5,"is_external":true,"external_key":"d/_bigFiles/x"}'),
        ({"external_key": "mine", "is_external": False, "k": 1}, 5, None, '{"k":1,"size":5}'),
        ({"mtime": Decimal("1763000000.123456789")}, 1, None, '{"mtime":1763000000.123456789,"size":1}'),
        ({"mtime": Decimal("1E+3")}, 1, None, '{"mtime":1000,"size":1}'),
        ({"mtime": Decimal("-0.000000001")}, 1, None, '{"mtime":-0.000000001,"size":1}'),
    ],
)
def test_metadata_has_one_encoding(meta: dict[str, Any] | None, size: int, key: str | None, encoded: str) -> None:
    """Writers encode it in one way: separators without spaces, non-ASCII as \\uXXXX, the application's keys in its
    order, then `size` (in place, if the application gave one), then `is_external` and `external_key`."""
    assert encode_meta(meta, size, key) == encoded.encode()


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        ({"k": float("nan")}, "'k'"),
        ({"k": [float("inf")]}, "'k'"),
        ({"k": Ellipsis}, "'k'"),
        ({"k": b"bytes"}, "'k'"),
        ({"k": {1, 2}}, "'k'"),
        ({"k": {(1, 2): 3}}, "'k'"),
        ({"k": Decimal("NaN")}, "'k'"),
        ({"k": Decimal("Infinity")}, "'k'"),
        ({"k": [Decimal(1)]}, "'k'"),
        ({1: "v"}, "key 1: found int"),
        ({None: "v"}, "key None"),
        ({"k": "x" * MAX_META}, f"more than {MAX_META}"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_metadata_that_cannot_be_written(meta: dict[Any, Any], reason: str) -> None:
    """A JSON object per entry, at most 10 MiB."""
    with pytest.raises(InvalidMeta) as refused:
        encode_meta(meta, 1)
    assert reason in str(refused.value)
    assert len(str(refused.value)) < 500


def test_metadata_that_refers_to_itself_or_nests_without_end() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(InvalidMeta, match="'k'"):
        encode_meta({"k": cycle}, 1)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InvalidMeta, match="'k'"):
        encode_meta({"k": deep}, 1)


def test_a_number_with_a_great_exponent_is_no_denial_of_service() -> None:
    """At most 10 MiB per entry, and never more memory than that to find it out."""
    with pytest.raises(InvalidMeta):
        encode_meta({"k": Decimal("1E+999999999")}, 1)


@given(st.dictionaries(st.text(), JSON, max_size=5), st.integers(0, 2**63 - 1))
def test_metadata_reads_back(meta: dict[str, Any], size: int) -> None:
    raw = encode_meta(meta, size)
    raw.decode("ascii")
    wanted = {key: value for key, value in meta.items() if key not in ("is_external", "external_key")} | {"size": size}
    assert decode_meta(raw, size, "f.des: 'a'") == wanted
    assert list(json.loads(raw)) == list(wanted)
    assert encode_meta(wanted, size) == raw, "equal inputs give equal bytes"


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{", "no JSON"),
        (b'{"k":NaN}', "no JSON"),
        (b'{"size":-Infinity}', "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"not json", "no JSON"),
        (b'{"size":3}x', "no JSON"),
        (b'{"k":"\xff","size":3}', "no JSON"),
        (b"\xef\xbb\xbf{}", "no JSON"),
        ('{"size":3}'.encode("utf-16"), "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "no JSON"),
        (b"[]", "found a JSON list"),
        (b"3", "found a JSON int"),
        (b"null", "found a JSON NoneType"),
        (b'"size"', "found a JSON str"),
        (b'{"size":4}', "found size 4, want 3"),
        (b'{"size":-3}', "found size -3, want 3"),
        (b'{"size":"3"}', "found size 3, want 3"),
        (b'{"size":true}', "found size True, want 3"),
        (b'{"size":null}', "found size None, want 3"),
        (b'{"size":1e999}', "found size inf, want 3"),
        (b'{"size":[' + b"[" * 900 + b"]" * 900 + b"]}", ""),
        (b'{"size":[' + b"[" * 600 + b"]" * 600 + b"]}", ""),
        (b'{"size":{"a":3}}', "found size a dict, want 3"),
        (b'{"size":' + b"9" * 4000 + b"}", "found size 999"),
        (b'{"size":' + b"9" * 1_000_000 + b"}", "no JSON"),
        (b'{"size":"' + b"s" * 1_000_000 + b'"}', "found size sss"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_damaged_metadata_is_reported(raw: bytes, reason: str) -> None:
    """META that is no JSON object, or nests absurdly, or disagrees on `size`: the metadata is reported as damaged."""
    with pytest.raises(CorruptMeta) as damaged:
        decode_meta(raw, 3, "f.des: 'a'")
    message = str(damaged.value)
    assert message.startswith("f.des: 'a': META")
    assert reason in message
    assert len(message) < 500


@pytest.mark.parametrize("raw", [b'{"k":1}', b' {"size": 3, "k": 1}\n', b'{"k":"\xc5\xbc"}', b'{"size":3,"size":3}'])
def test_metadata_of_other_writers_is_read(raw: bytes) -> None:
    """All keys are optional for a reader."""
    assert decode_meta(raw, 3, "f.des: 'a'") == json.loads(raw)


def test_no_bytes_are_no_metadata() -> None:
    """`meta_length` 0 means no metadata."""
    assert decode_meta(b"", 3, "f.des: 'a'") == {}


@given(st.binary(max_size=40))
def test_any_bytes_are_metadata_or_damaged(raw: bytes) -> None:
    try:
        meta = decode_meta(raw, 3, "f.des: 'a'")
    except CorruptMeta:
        return
    assert isinstance(meta, dict)
