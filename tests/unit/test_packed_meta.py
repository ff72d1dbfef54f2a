"""META in the packer's own form is decoded as a real decoder does it: des_format/packed_meta.py."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from decimal import Decimal
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from des_format.codec import encode_meta
from des_format.index import Index
from des_format.layout import EXTERNAL
from des_format.meta import MetaColumns
from des_format.packed_meta import decode_packed
from des_format.source import open_container
from tests.unit.containers import Item, MemorySource, build, footer_of

SHA = "404e92851eda594f89aad19b4e8ac15037aad0e3bec6eba104497bb71ffb0c2a"
USUAL = {"mtime": Decimal("1793495864.046636"), "mode": 420, "sha256": SHA, "crc32c": "d88b6590", "id": "0d2f0000"}


class DecodedOneByOne(MetaColumns):
    """The columns as the decoder alone fills them."""

    def _take_packed(
        self, index: Index, rows: npt.NDArray[np.int64], view: memoryview, start: int
    ) -> npt.NDArray[np.int64]:
        return rows


def columns(metas: list[bytes], size: int, columns: type[MetaColumns]) -> dict[str, object]:
    return filled([Item(b"f%d" % number, b"x" * size, meta=meta) for number, meta in enumerate(metas)], columns)


def filled(items: list[Item], columns: type[MetaColumns]) -> dict[str, object]:
    opened = open_container(MemorySource(build(items)), tail_length=1 << 26)
    assert opened.meta is not None
    meta = columns(opened.index.rows)
    meta.fill(opened.index, opened.meta, opened.index.footer.meta_start)
    found = {name: getattr(meta, name) for name in MetaColumns.__slots__}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in found.items()}


def packed(metas: list[bytes]) -> list[int]:
    """Which of them have the packer's form."""
    stops = np.cumsum([len(meta) for meta in metas])
    raw = np.frombuffer(b"".join(metas), np.uint8)
    places: list[int] = decode_packed(raw, stops - [len(meta) for meta in metas], stops).places.tolist()
    return places


TIMES = st.one_of(
    st.integers(10**18, 2**63 - 1).map(lambda ns: Decimal(ns).scaleb(-9).normalize()),
    st.decimals(-(10**12), 10**12, places=3),
    st.sampled_from([0, 5, "text", None, 1793495864, 1793495864.5, Decimal("9999999999.999999999")]),
    st.sampled_from([Decimal("1793495864.1234567891"), Decimal("9223372036.854775807"), Decimal(9223372035)]),
)
MODES = st.one_of(st.integers(0, 0o7777), st.sampled_from([0o100644, -1, 10**8, 99_999_999, 1.5, "644", None]))
TEXTS = st.one_of(
    st.text(max_size=12), st.text("abc/.", max_size=30), st.sampled_from(['"', "\\", "}{", '","size":1}'])
)
CHECKSUMS = st.one_of(
    st.integers(0, 2**32 - 1).map("{:08x}".format), st.sampled_from(["D88B6590", "d88b659", "d88b65900", "", 7])
)
SIZES = st.sampled_from([0, 1, 9, 10, 123_456])
METAS = st.fixed_dictionaries(
    {"mtime": TIMES, "mode": MODES, "sha256": st.one_of(st.just(SHA), TEXTS), "crc32c": CHECKSUMS},
    optional={"id": TEXTS, "original_name": TEXTS, "mime": TEXTS},
)
IMPORTED = {key: value for key, value in USUAL.items() if key != "id"}
USUAL_METAS = st.builds(
    lambda ns, mode, crc32c, key: (
        IMPORTED
        | {"mtime": Decimal(ns).scaleb(-9).normalize(), "mode": mode, "crc32c": crc32c}
        | ({} if key is None else {"id": key})
    ),
    st.integers(10**18, 2**63 - 10**9),
    st.integers(0, 0o7777),
    st.integers(0, 2**32 - 1).map("{:08x}".format),
    st.one_of(st.text("0123456789abcdef", max_size=16), st.none()),  # none: what was imported has no id
)


@given(st.lists(st.one_of(METAS, USUAL_METAS), max_size=12), SIZES, st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_all_at_once_is_as_one_by_one(metas: list[dict[str, object]], size: int, off: int) -> None:
    """Whatever the values are; `off`: some entries have metadata of another size than their index says."""
    encoded = [encode_meta(meta, size + (number % 4 == off == 3)) for number, meta in enumerate(metas)]
    assert columns(encoded, size, MetaColumns) == columns(encoded, size, DecodedOneByOne)


@given(
    USUAL_METAS, st.lists(st.tuples(st.integers(0, 300), st.sampled_from(b'"\\{},:.0 9ae-\n\0\x7f\xffxE')), max_size=3)
)
@settings(max_examples=500, deadline=None)
@example(USUAL, [(9, ord("0"))])
@example(USUAL, [(19, ord("e"))])
@example(USUAL, [(1, ord(" "))])
def test_damaged_bytes_are_decoded_alike(meta: dict[str, object], damage: list[tuple[int, int]]) -> None:
    raw = bytearray(encode_meta(meta, 7))
    for place, byte in damage:
        raw[place % len(raw)] = byte
    metas = [encode_meta(USUAL, 7), bytes(raw), encode_meta(USUAL | {"original_name": "a/b"}, 7)]
    assert columns(metas, 7, MetaColumns) == columns(metas, 7, DecodedOneByOne)


@given(st.lists(USUAL_METAS, min_size=1, max_size=12), st.booleans())
@settings(deadline=None)
def test_the_packers_own_form_is_recognised(metas: list[dict[str, object]], assigned: bool) -> None:
    more = {"original_name": "some/where.txt"} if assigned else {}
    encoded = [encode_meta(meta | (more if "id" in meta else {}), 12) for meta in metas]
    assert packed(encoded) == list(range(len(metas)))


@pytest.mark.parametrize(
    "meta",
    [
        b"{}",
        encode_meta({"mime": "text/plain"}, 5),
        encode_meta(USUAL, 123_456_789),
        encode_meta(USUAL, 5, "d/_bigFiles/x"),
        encode_meta(USUAL, 5).replace(b'"mode"', b' "mode"'),
        encode_meta(USUAL, 5).replace(b"420", b"042"),
        encode_meta(USUAL | {"id": "\u017c"}, 5),
        encode_meta(IMPORTED | {"name": "a"}, 5),
        encode_meta(IMPORTED | {"original_name": "a"}, 5),
        encode_meta(IMPORTED, 123_456_789),
    ],
)
def test_other_forms_are_left_alone(meta: bytes) -> None:
    assert packed([encode_meta(USUAL, 5), meta, encode_meta(USUAL, 5)]) == [0, 2]


def test_many_rows_with_one_metadata_and_rows_far_apart() -> None:
    usual = encode_meta(USUAL, 1)
    raw = np.frombuffer(usual + b" " * 100_000 + usual, np.uint8)
    many = np.zeros(5000, np.int64)
    found = decode_packed(raw, many, many + len(usual))
    assert found.places.tolist() == list(range(5000))
    assert set(found.mtime_ns.tolist()) == {1793495864046636000}
    far = np.array([0, len(raw) - len(usual)])
    assert decode_packed(raw, far, far + len(usual)).places.tolist() == []  # not worth looking through what is between
    assert decode_packed(raw, far[:0], far[:0]).places.tolist() == []


def test_long_metadata_that_many_rows_share_is_not_looked_through_for_each() -> None:
    """A container is never trusted with memory or time: 20,000 times 1 MB would be more than either."""
    meta = encode_meta(USUAL | {"id": '"' * 500_000}, 1)
    assert packed([encode_meta(USUAL | {"id": "i" * 2000}, 1)]) == []
    many = [Item(b"%d" % number, b"x", b"" if number else meta, meta_offset=20_016) for number in range(20_000)]
    items = [replace(item, meta_length=len(meta)) for item in many]
    opened = open_container(MemorySource(build(items)), tail_length=1 << 26)
    assert opened.meta == meta
    found = MetaColumns(opened.index.rows)
    tracemalloc.start()
    try:
        found.fill(opened.index, opened.meta, opened.index.footer.meta_start)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2**20
    assert set(found.crc32c.tolist()) == {0xD88B6590}


@given(
    st.lists(st.one_of(USUAL_METAS.map(lambda meta: encode_meta(meta, 1)), st.binary(max_size=20)), min_size=1),
    st.data(),
)
@settings(max_examples=300, deadline=None)
def test_ranges_that_overlap_or_are_shared_are_decoded_alike(metas: list[bytes], data: st.DataObject) -> None:
    """Entries may have any range of META: the same as others, parts of it, several at once, out of order."""
    bounds = [0, *accumulate(map(len, metas))]
    places = st.one_of(st.sampled_from(bounds), st.integers(0, bounds[-1]))
    ranges = data.draw(st.lists(st.tuples(places, places), max_size=30).map(lambda pairs: [sorted(p) for p in pairs]))
    start = footer_of(build([Item(b"f", b"x", meta) for meta in metas])).meta_start
    items = [Item(b"m%d" % number, b"x", meta) for number, meta in enumerate(metas)]
    items += [
        Item(
            b"r%d" % number,
            data=b"",
            meta=b"",
            flags=EXTERNAL * (low % 2),
            data_length=low % 3,
            meta_offset=start + low,
            meta_length=high - low,
        )
        for number, (low, high) in enumerate(ranges)
    ]
    assert filled(items, MetaColumns) == filled(items, DecodedOneByOne)


def test_external_rows_keep_what_only_they_have() -> None:
    metas = [encode_meta(USUAL, 3), encode_meta(USUAL, 3, "d/_bigFiles/x")]
    items = [Item(b"a", b"xxx", meta=metas[0]), Item(b"b", b"", meta=metas[1], flags=EXTERNAL, data_length=3)]
    opened = open_container(MemorySource(build(items)), tail_length=1 << 26)
    assert opened.meta is not None
    meta = MetaColumns(2)
    meta.fill(opened.index, opened.meta, opened.index.footer.meta_start)
    assert meta.external_key == {1: "d/_bigFiles/x"}
    assert meta.has_crc32c.tolist() == [True, True]
    assert not meta.damaged.any()
