"""Reading containers: the examples, every row of the table of damaged containers, and what a reader costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from hashlib import sha256
from pathlib import Path
from struct import pack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from des_format import (
    CorruptEntry,
    CorruptMeta,
    DesFormatError,
    DesReader,
    DesWriter,
    InMemoryIndexCache,
    NoSuchEntry,
    NoSuchObject,
    NotAContainer,
    ObjectReplaced,
    SourceError,
)
from des_format.cache import CacheKey
from des_format.codec import build_footer, build_header
from des_format.layout import DELETED, EXTERNAL, FOOTER, RECORD, Footer
from des_format.reader import BaseReader
from tests import fixtures
from tests.unit.containers import Item, MemorySource, build, footer_of, patched

TIME_S = 5.0  # docs/format.md, Damaged and odd containers
MEMORY = 512 * 1024 * 1024


def reader_of(raw: bytes, *, tail_length: int = 256 * 1024) -> BaseReader:
    return BaseReader(MemorySource(raw), None, tail_length)


# --- the examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", fixtures.FOLDERS, ids=lambda folder: folder.parent.name)
def test_every_example_gives_the_bytes_and_metadata_of_its_manifest(folder: Path) -> None:
    for key, row in fixtures.valid(folder)["containers"].items():
        assert sha256((folder / "valid" / key).read_bytes()).hexdigest() == row["sha256"]
    fixtures.check_valid(folder, lambda key: DesReader(folder / "valid" / key))


@pytest.mark.parametrize("folder", fixtures.FOLDERS, ids=lambda folder: folder.parent.name)
def test_every_damaged_example_has_its_outcome_in_time_and_memory(folder: Path, tmp_path: Path) -> None:
    paths = {}
    for case in fixtures.hostile(folder):
        paths[case.name] = tmp_path / f"{case.name}.des"
        paths[case.name].write_bytes(case.raw)
    results = bounded(*paths.values())
    for case in fixtures.hostile(folder):
        result = results[paths[case.name]]
        if case.outcome == "reject":
            assert result["refused"].startswith(f"{paths[case.name]}: "), case.name
            continue
        assert set(case.readable) <= result["readable"].keys(), case.name
        assert not set(case.damaged) & result["readable"].keys(), case.name
        for name in case.damaged:
            assert name not in result["shown"] or name in result["damaged"], case.name


def bounded(*paths: Path) -> dict[Path, dict[str, Any]]:
    """What a reader makes of each file, in a process of its own, held to the time and memory that it may cost."""
    command = [sys.executable, "-m", "tests.unit.bounded", *map(str, paths)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=100, cwd=Path(__file__).parents[2])
    results = {path: json.loads(line) for path, line in zip(paths, done.stdout.splitlines(), strict=True)}
    for path, result in results.items():
        assert "unexpected" not in result, (path.name, result["unexpected"])
        assert result["seconds"] <= TIME_S, path.name
        assert result["peak_rss"] <= MEMORY, (path.name, result["peak_rss"])
    return results


# --- containers that are out to cost time or memory ------------------------------------------------------------------

NOTHING = RECORD.pack(16, 0, 16, 0, 0)


def _write(path: Path, records: Iterator[bytes], meta: bytes = b"") -> None:
    length = count = 0
    with path.open("wb") as file:
        file.write(build_header() + meta)
        for record in records:
            file.write(record)
            length += len(record)
            count += 1
        file.write(build_footer(Footer(16, 0, 16, len(meta), 16 + len(meta), length, count)))


def _a_million_empty_entries(path: Path) -> None:
    _write(path, (pack("<H", 7) + b"%07x" % number + NOTHING for number in range(1_000_000)))


def _a_million_entries_of_one_name(path: Path) -> None:
    _write(path, (b"\x01\x00a" + NOTHING for _ in range(1_000_000)))


def _four_thousand_names_of_65535_bytes(path: Path) -> None:
    _write(path, (b"\xff\xff%05d" % number + b"n" * 65_530 + NOTHING for number in range(4000)))


def _two_thousand_names_of_two_byte_characters(path: Path) -> None:
    _write(path, (b"\xff\xff%05d" % number + "ż".encode() * 32_765 + NOTHING for number in range(2000)))


def _a_thousand_names_of_30000_levels(path: Path) -> None:
    _write(path, (pack("<H", 60_004) + b"%04d" % number + b"/a" * 30_000 + NOTHING for number in range(1000)))


def _a_thousand_names_of_slashes(path: Path) -> None:
    _write(path, (b"\xff\xff" + b"/" * 65_535 + NOTHING for _ in range(1000)))


def _metadata_of_100000_levels(path: Path) -> None:
    meta = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    _write(path, (b"\x01\x00%d" % n + RECORD.pack(16, 0, 16, len(meta), 0) for n in range(10)), meta)


def _an_index_that_claims_100_gb(path: Path) -> None:
    size = 100 * 2**30
    with path.open("wb") as file:
        file.write(build_header())
        file.truncate(size - FOOTER.size)
        file.seek(0, 2)
        file.write(build_footer(Footer(16, 0, 16, 0, 16, size - 16 - FOOTER.size, 2**31)))


def _metadata_that_claims_100_gb(path: Path) -> None:
    size = 100 * 2**30
    index = b"\x01\x00a" + NOTHING
    with path.open("wb") as file:
        file.write(build_header())
        file.truncate(size - FOOTER.size - len(index))
        file.seek(0, 2)
        start = size - FOOTER.size - len(index)
        file.write(index + build_footer(Footer(16, 0, 16, start - 16, start, len(index), 1)))


REFUSED = [_an_index_that_claims_100_gb]
OPENED: list[tuple[Callable[[Path], None], int]] = [
    (_a_million_empty_entries, 1_000_000),
    (_a_million_entries_of_one_name, 1),
    (_four_thousand_names_of_65535_bytes, 0),
    (_two_thousand_names_of_two_byte_characters, 0),
    (_a_thousand_names_of_30000_levels, 0),
    (_a_thousand_names_of_slashes, 0),
    (_metadata_of_100000_levels, 10),
    (_metadata_that_claims_100_gb, 1),
]


@pytest.mark.parametrize(("write", "shown"), OPENED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_container_is_never_trusted_with_memory_or_time(
    write: Callable[[Path], None], shown: int, tmp_path: Path
) -> None:
    """A million empty entries, names of 65,535 bytes or 30,000 levels of directories cost at most 512 MiB and 5 s."""
    path = tmp_path / "f.des"
    write(path)
    result = bounded(path)[path]
    path.unlink()
    assert result["count"] == shown


@pytest.mark.parametrize("write", REFUSED)
def test_a_claimed_size_is_checked_before_anything_is_allocated(write: Callable[[Path], None], tmp_path: Path) -> None:
    """The index's claimed size is checked against the object's before anything is allocated."""
    path = tmp_path / "f.des"
    write(path)
    refused = bounded(path)[path]["refused"]
    assert refused.startswith(f"{path}: INDEX in the footer at byte {100 * 2**30 - 72}: found {100 * 2**30 - 88} bytes")


# --- any damage ------------------------------------------------------------------------------------------------------

SEEDS = [
    build(
        [
            Item(b"a", b"A" * 30, b'{"crc32c":"deadbeef","size":30}'),
            Item(b"dir/b", b"B" * 20, b'{"mtime":1.5,"size":20}'),
            Item("ż".encode(), b"", b""),
            Item(b"big", flags=EXTERNAL, data_offset=0, data_length=5, meta=b'{"external_key":"x/_bigFiles/big"}'),
            Item(b"a", b"new"),
            Item(b"gone", flags=DELETED),
        ],
        gaps=(b"", b"\0", b"", b"\0\0"),
    ),
    build(),
    build([Item(b"a", b"1")]),
]
CHANGES = st.lists(
    st.tuples(
        st.integers(0, 10_000),
        st.sampled_from([b"\0", b"\x01", b"\xff", b"\x7f", b"\xff" * 8, b"\0" * 8, b"/", b"{", b"["])
        | st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=1000)
@given(st.sampled_from(SEEDS), CHANGES, st.integers(0, 3), st.sampled_from([72, 100, 4096]))
def test_whatever_is_damaged_a_reader_refuses_or_serves_or_says_which_entry(
    raw: bytes, changes: list[tuple[int, bytes]], cut: int, tail_length: int
) -> None:
    """Each outcome of the table is one of three: container refused, that entry is EIO, accepted."""
    for offset, new in changes:
        at = offset % len(raw)
        raw = patched(raw, at, new)[: len(raw)]
    raw = raw[: len(raw) - cut]
    source = MemorySource(raw, externals={"big": b"12345"})
    try:
        reader = BaseReader(source, None, tail_length)
    except NotAContainer as refused:
        _check_message(refused, "found", "want")
        return
    index = reader.get_index()
    reader.get_stats()
    for row in index.problem_rows().tolist():
        assert index.problem(row)
    data = range(index.footer.data_start, index.footer.data_start + index.footer.data_length)
    for name in reader.list_files():
        entry = index.entry(index.find_shown(name))
        try:
            reader.get_meta(name)
        except CorruptMeta as damaged:
            _check_message(damaged)
        try:
            payload = reader.get_file(name)
        except CorruptEntry as damaged:
            _check_message(damaged)
            continue
        assert len(payload) == entry.data_length
        if payload and not entry.is_external:
            assert entry.data_offset in data
            assert entry.data_offset + len(payload) <= data.stop
            assert payload == raw[entry.data_offset :][: len(payload)]


def _check_message(error: Exception, *parts: str) -> None:
    assert str(error).startswith("day/f.des: ")
    for part in parts:
        assert part in str(error)


# --- opening and reading ---------------------------------------------------------------------------------------------


def test_a_gap_and_reserved_bytes_are_accepted(tmp_path: Path) -> None:
    """A gap between regions, reserved bytes that are not zero: accepted."""
    raw = build([Item(b"a", b"payload")], gaps=(b"x" * 3, b"yy", b"z" * 5000, b"w" * 100))
    raw = patched(patched(raw, 9, b"\xff" * 7), len(raw) - 72 + 9, b"\xff" * 7)
    path = tmp_path / "f.des"
    path.write_bytes(raw)
    with DesReader(path) as reader:
        assert reader.get_file("a") == b"payload"
        assert reader.get_meta("a") == {"size": 7}
    assert reader_of(raw, tail_length=72).get_file("a") == b"payload"


def test_a_header_is_checked_where_it_is_there_and_never_fetched_for_that() -> None:
    """Wrong HEADER magic or version, where the header has been read (never fetch it just for that): refused."""
    raw = build([Item(b"a", b"x" * 1000)], header=b"XXXXXXXX" + bytes(8))
    source = MemorySource(raw)
    assert BaseReader(source, None, 500).get_file("a") == b"x" * 1000
    assert source.reads == [(16, 1016)]
    with pytest.raises(NotAContainer, match=r"day/f.des: header at byte 0: found b'XXXXXXXX' v0, want b'DESHEAD1' v1"):
        reader_of(raw)


def test_a_local_header_is_always_read(tmp_path: Path) -> None:
    path = tmp_path / "f.des"
    path.write_bytes(build([Item(b"a", b"x" * 1_000_000)], header=b"DESHEAD1\x02" + bytes(7)))
    with pytest.raises(NotAContainer, match=r"header at byte 0: found b'DESHEAD1' v2, want b'DESHEAD1' v1"):
        DesReader(path)


RAW = build([Item(b"%03d" % number, b"%03d" % number * 10) for number in range(100)])


@pytest.mark.parametrize("tail_length", [1, 72, 100, 2000, 5000])
def test_a_tail_that_is_too_short_makes_one_more_read(tail_length: int) -> None:
    """A container is opened with a ranged GET of the tail, a second one only if the tail was too short."""
    source = MemorySource(RAW)
    reader = BaseReader(source, None, tail_length)
    assert (source.tails, len(source.reads)) == (1, 1)
    start, stop = source.reads[0]
    assert start == footer_of(RAW).meta_start
    assert stop == len(RAW) - max(tail_length, 72)
    assert reader.get_file("007") == b"007" * 10


def test_adjacent_entries_are_read_at_once_and_distant_ones_apart() -> None:
    """Adjacent entries are read with one Range GET when the gap between them is at most `max_gap`."""
    source = MemorySource(RAW)
    reader = BaseReader(source, None, 256 * 1024)
    names = reader.list_files()
    assert list(reader.get_files_batch(reversed(names))) == names[::-1]
    assert source.reads == [(16, 3016)]
    source.reads.clear()
    reader.get_files_batch(["000", "002", "005"], max_gap=30)
    assert source.reads == [(16, 106), (166, 196)]
    source.reads.clear()
    reader.get_files_batch(["000", "002", "005"], max_gap=29)
    assert source.reads == [(16, 46), (76, 106), (166, 196)]


def test_names_that_are_not_there() -> None:
    """Names that are not in the container are left out of a batch's result; a single read of one is an error."""
    reader = reader_of(RAW)
    assert reader.get_files_batch(["x", "001", "001", "\ud800", ""]) == {"001": b"001" * 10}
    for name in ("x", "\ud800", ""):
        with pytest.raises(NoSuchEntry, match=r"day/f.des: no entry"):
            reader.get_file(name)
        with pytest.raises(NoSuchEntry, match=r"day/f.des: no entry"):
            reader.get_meta(name)
        assert name not in reader
    assert 7 not in reader


def test_an_empty_payload_needs_no_read() -> None:
    """An empty payload needs no GET (an HTTP range cannot be empty)."""
    source = MemorySource(build([Item(b"a"), Item(b"b", b"x")]))
    reader = BaseReader(source, None, 256 * 1024)
    assert reader.get_files_batch(["a"]) == {"a": b""}
    assert source.reads == []


def test_damaged_metadata_leaves_the_bytes() -> None:
    """META that is no JSON object ... or disagrees on `size`: the index and the bytes are served."""
    reader = reader_of(
        build(
            [
                Item(b"json", b"1", b"{not"),
                Item(b"size", b"2", b'{"size":9}'),
                Item(b"range", b"3", meta_offset=2**63),
                Item(b"list", b"4", b"[]"),
                Item(b"none", b"5", b""),
            ]
        )
    )
    assert b"".join(reader.get_files_batch(reader.list_files()).values()) == b"12345"
    for name in ("json", "size", "range", "list"):
        with pytest.raises(CorruptMeta, match=f"day/f.des: .*'{name}'.*"):
            reader.get_meta(name)
    assert reader.get_meta("none") == {}


def test_a_payload_that_does_not_match_its_checksum_is_read_once_more() -> None:
    """When META has a checksum, the bytes are verified before anybody sees them; a mismatch is fetched once more."""
    raw = build([Item(b"a", b"abc", b'{"crc32c":"00000000","size":3}'), Item(b"b", b"x")])
    source = MemorySource(raw)
    reader = BaseReader(source, None, 256 * 1024)
    with pytest.raises(CorruptEntry, match=r"day/f.des: 'a': payload at byte 16: found a checksum of"):
        reader.get_file("a")
    assert source.reads == [(16, 19), (16, 19)]
    assert reader.get_file("b") == b"x"


def test_stats() -> None:
    items = [
        Item(b"a", b"old!"),
        Item(b"a", b"new"),
        Item(b"big", flags=EXTERNAL, data_length=1000),
        Item(b"gone", b"12", flags=DELETED),
    ]
    raw = build(items)
    stats = reader_of(raw).get_stats()
    footer = footer_of(raw)
    assert (stats.files, stats.external_files) == (2, 1)
    assert (stats.payload_bytes, stats.external_bytes, stats.dead_bytes) == (3, 1000, 6)
    assert stats.container_bytes == len(raw)
    assert (stats.data_bytes, stats.meta_bytes, stats.index_bytes) == (9, footer.meta_length, footer.index_length)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(NoSuchObject, match=r"missing\.des: no such file"):
        DesReader(tmp_path / "missing.des")
    with pytest.raises(SourceError, match=str(tmp_path)):
        DesReader(tmp_path)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(DesFormatError, match="fifo"):
        DesReader(fifo)


def test_a_file_that_is_changed_under_a_reader_is_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "f.des"
    path.write_bytes(build([Item(b"a", b"old")]))
    with DesReader(path) as reader:
        path.write_bytes(build([Item(b"b", b"something else"), Item(b"a", b"new")]))
        with pytest.raises(ObjectReplaced):
            reader.get_file("a")
    with DesReader(path) as reader:
        with DesWriter(path) as writer:
            writer.add_file("a", b"third")
        assert reader.get_file("a") == b"new", "a renamed file leaves the open one as it was"


# --- external files --------------------------------------------------------------------------------------------------


def external_container(folder: Path, meta: bytes, size: int = 5) -> Path:
    path = folder / "2025-01-10" / "f.des"
    path.parent.mkdir(parents=True)
    item = Item(b"d/v", flags=EXTERNAL, data_offset=0, data_length=size, meta=meta)
    path.write_bytes(build([item, Item(b"in", b"side")]))
    return path


def put(folder: Path, key: str, payload: bytes) -> None:
    path = folder / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(payload)


@pytest.mark.parametrize(
    ("recorded", "keys"),
    [
        (None, ["2025-01-10/_bigFiles/d/v"]),
        ("2025-01-10/_bigFiles/d/v", ["2025-01-10/_bigFiles/d/v"]),
        ("other/_bigFiles/d/v", ["other/_bigFiles/d/v"]),
        ("other/_bigFiles/d/v", ["2025-01-10/_bigFiles/d/v"]),  # a store that was copied elsewhere
        ("2025-01-10/elsewhere/d/v", ["2025-01-10/_bigFiles/d/v", "2025-01-10/elsewhere/d/v"]),
        ("other/_bigFiles/w", ["2025-01-10/_bigFiles/d/v", "other/_bigFiles/w"]),
        ("../outside/_bigFiles/d/v", ["2025-01-10/_bigFiles/d/v", "../outside/_bigFiles/d/v"]),
    ],
)
def test_external_files_are_read_by_the_single_and_the_batch_call(
    recorded: str | None, keys: list[str], tmp_path: Path
) -> None:
    """External files: a recorded `external_key` is used only if it lies in a `_bigFiles/` folder of the store and ends
    in the entry's name; else `{directory of the container's key}/_bigFiles/{entry name}`."""
    store = tmp_path / "store"
    meta = {"size": 5} | ({"is_external": True, "external_key": recorded} if recorded else {})
    path = external_container(store, json.dumps(meta).encode())
    put(store, keys[0], b"right")
    for key in keys[1:]:
        put(store, key, b"wrong")
    with DesReader(path) as reader:
        assert reader.get_file("d/v") == b"right"
        assert reader.get_files_batch(["in", "d/v"]) == {"in": b"side", "d/v": b"right"}
        assert reader.get_stats().external_bytes == 5


@pytest.mark.parametrize("payload", [None, b"", b"1234", b"123456"])
def test_an_external_file_that_is_missing_or_has_another_size(payload: bytes | None, tmp_path: Path) -> None:
    """An external object that is missing, or whose size differs from the index: EIO, reported."""
    path = external_container(tmp_path, b'{"size":5}')
    if payload is not None:
        put(tmp_path, "2025-01-10/_bigFiles/d/v", payload)
    with DesReader(path) as reader:
        with pytest.raises(CorruptEntry, match=r"f.des: 'd/v': external file .*2025-01-10/_bigFiles/d/v"):
            reader.get_file("d/v")
        with pytest.raises(CorruptEntry, match=r"'d/v'"):
            reader.get_files_batch(["in", "d/v"])
        assert reader.get_file("in") == b"side"


def test_an_external_file_that_is_empty(tmp_path: Path) -> None:
    path = external_container(tmp_path, b'{"size":0}', size=0)
    put(tmp_path, "2025-01-10/_bigFiles/d/v", b"")
    with DesReader(path) as reader:
        assert reader.get_file("d/v") == b""
        put(tmp_path, "2025-01-10/_bigFiles/d/v", b"x")
        with pytest.raises(CorruptEntry):
            reader.get_file("d/v")


# --- a cache that has seen the container -----------------------------------------------------------------------------

OLD = build([Item(b"a", b"old bytes"), Item(b"empty"), Item(b"bad", b"x", data_offset=0)])
NEW = build([Item(b"new", b"#" * 500), Item(b"a", b"new"), Item(b"empty", b"no more"), Item(b"bad", b"good")])


@pytest.mark.parametrize(
    ("read", "wanted"),
    [
        (lambda reader: reader.get_file("a"), b"new"),
        (lambda reader: reader.get_file("empty"), b"no more"),
        (lambda reader: reader.get_file("bad"), b"good"),
        (lambda reader: reader.get_file("new"), b"#" * 500),
        (lambda reader: reader.get_files_batch(["empty", "a"]), {"empty": b"no more", "a": b"new"}),
        (lambda reader: reader.get_meta("a"), {"size": 3}),
        (lambda reader: reader.list_files(), ["new", "a", "empty", "bad"]),
        (len, 4),
        (lambda reader: "new" in reader, True),
        (lambda reader: reader.get_stats().files, 4),
    ],
)  # fmt: skip
def test_a_replaced_container_is_opened_afresh(read: Callable[[BaseReader], object], wanted: object) -> None:
    """With a cache that has seen the container: the first read shows whether it was replaced. Old index and new bytes
    never mix, nor is anything of the old index returned."""
    cache = InMemoryIndexCache()
    source = MemorySource(OLD)
    BaseReader(source, cache, 256 * 1024)
    source.replace(NEW)
    source.tails = 0
    reader = BaseReader(source, cache, 256 * 1024)
    assert (source.tails, source.reads) == (0, []), "opening costs no request"
    assert read(reader) == wanted
    assert source.tails == 1
    source.replace(OLD)
    with pytest.raises(ObjectReplaced):
        reader.get_file("a")


def test_a_warm_cache_costs_one_read() -> None:
    cache = InMemoryIndexCache()
    source = MemorySource(RAW)
    BaseReader(source, cache, 256 * 1024)
    source.tails = 0
    reader = BaseReader(source, cache, 256 * 1024)
    assert len(reader.get_files_batch([f"{number:03}" for number in range(100)])) == 100
    assert (source.tails, source.reads) == (0, [(16, 3016)])
    with pytest.raises(NoSuchEntry):
        reader.get_file("x")
    assert len(source.reads) == 1, "the version is known by now"


def test_a_name_that_an_old_index_has_not_is_looked_for_in_the_store() -> None:
    cache = InMemoryIndexCache()
    source = MemorySource(OLD)
    BaseReader(source, cache, 256 * 1024)
    reader = BaseReader(source, cache, 256 * 1024)
    with pytest.raises(NoSuchEntry):
        reader.get_file("new")
    assert source.reads == [(len(OLD) - 72, len(OLD))]


@pytest.mark.parametrize("garbage", [b"", b"x", b"\0" * 88, b"\xff" * 88, b"\xff" * 500, b"12345678" * 100])
def test_a_cached_value_that_is_no_index_is_a_miss(garbage: bytes) -> None:
    """A bad or failing cache is a miss."""
    cache = InMemoryIndexCache()
    source = MemorySource(OLD)
    BaseReader(source, cache, 256 * 1024)
    good = cache.get(CacheKey(source.store, source.key, "1"))
    assert good is not None
    for value in (garbage, good[:-1], good + b"\0", good[:40], patched(good, 16, b"x"), patched(good, 0, b"\0")):
        cache.put(CacheKey(source.store, source.key, "1"), value)
        assert BaseReader(source, cache, 256 * 1024).get_file("a") == b"old bytes"
        assert source.tails > 1
        source.tails = 1


def test_a_container_in_a_file_is_known_by_its_version(tmp_path: Path) -> None:
    cache = InMemoryIndexCache()
    path = tmp_path / "f.des"
    for content in (b"one", b"two!", b"three"):
        with DesWriter(path) as writer:
            writer.add_file("a", content, {"mtime": Decimal("1.000000001")})
        for _ in range(2):
            with DesReader(path, cache) as reader:
                assert reader.get_file("a") == content
