"""Compiled indexes: what comes back is what was put, whatever the container; any damage is a miss."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from des_format.index import Index
from des_format.layout import DELETED, EXTERNAL
from des_format.meta import MetaColumns
from des_format.shards import parse_container_name
from desfs import compiled as module
from desfs import metrics
from desfs.cache_folder import CacheFolder
from desfs.compiled import Compiled, CompiledIndexes
from desfs.disk_cache import ObjectVersion
from desfs.folders import Folders
from desfs.tree import DayTree, Member
from tests.unit.containers import Item, build, footer_of

VERSION = ObjectVersion("s3://bucket", "day/f.des", "etag")
MB = 1024 * 1024
BLOCKS = (
    b'{"size":9000000,"crc32c_blocks":{"size":4194304,"values":"AAAAAQAAAAIAAAAD"},"external_key":"day/_bigFiles/x"}'
)

ODD = [
    Item(b"a", b"12", b'{"size":2,"mtime":1.5,"mode":420,"crc32c":"0000abcd"}'),
    Item("ż/ó".encode(), b"345", b""),
    Item(b"d/e/f", b"x" * 10, b'{"size":10,"sha256":"' + b"ab" * 32 + b'"}'),
    Item(b"d/e/g", b"", b"no JSON"),
    Item(b"a", b"99"),
    Item(b"gone", flags=DELETED),
    Item(b"../escape", b"1"),
    Item(b"", b"2"),
    Item(b"\xff\xfe", b"3"),
    Item(b"big", b"", BLOCKS, EXTERNAL, 0, 9_000_000),
    Item(b"bigger", b"", BLOCKS, EXTERNAL, 0, 9_000_000),
    Item(b"outside", b"4", data_offset=10**12),
    Item(b"flag", b"5", flags=2),
]


def parsed(items: Sequence[Item], problems: tuple[str, ...] = ()) -> Compiled:
    raw = build(items)
    footer = footer_of(raw)
    index = Index(raw[footer.index_start :][: footer.index_length], footer, VERSION.key)
    meta = MetaColumns(index.rows)
    meta.fill(index, raw[footer.meta_start :][: footer.meta_length], footer.meta_start)
    return Compiled(index, meta, Folders(index), problems)


def many(count: int) -> list[Item]:
    return [Item(b"folder%03d/file%06d" % (number % 50, number), b"12345") for number in range(count)]


def assert_same(found: Compiled | None, wanted: Compiled) -> None:
    """All that a mount asks of a container."""
    assert found is not None
    index, other = found.index, wanted.index
    assert (index.rows, len(index), index.footer, index.container) == (
        other.rows,
        len(other),
        other.footer,
        other.container,
    )
    assert list(index) == list(other)
    for name in ("state", "data_offset", "data_length", "meta_offset", "meta_length", "flags", "name_offset"):
        assert np.array_equal(getattr(index, name), getattr(other, name))
    for row in range(other.rows):
        stored = index.name(row)
        assert type(stored) is bytes
        assert stored == other.name(row)
        assert index.find(stored) == other.find(stored)
        assert index.problem(row) == other.problem(row)
    assert index.find(b"no such name") is None
    assert [hashes.tolist() for hashes in index.hashes] == [hashes.tolist() for hashes in other.hashes]
    for name in ("mtime_ns", "mode", "crc32c", "has_crc32c", "damaged"):
        assert np.array_equal(getattr(found.meta, name), getattr(wanted.meta, name))
    assert (found.meta.sha256, found.meta.external_key) == (wanted.meta.sha256, wanted.meta.external_key)
    assert {row: (each.block_size, bytes(each.crc32c)) for row, each in found.meta.external_blocks.items()} == {
        row: (each.block_size, bytes(each.crc32c)) for row, each in wanted.meta.external_blocks.items()
    }
    assert sorted(found.folders.paths()) == sorted(wanted.folders.paths())
    for path in [*wanted.folders.paths(), b"nowhere"]:
        assert found.folders.rows(path).tolist() == wanted.folders.rows(path).tolist()
        assert found.folders.sorted.children(path) == wanted.folders.sorted.children(path)
        assert (path in found.folders.sorted) == (path in wanted.folders.sorted)
    assert found.problems == wanted.problems


def indexes(folder: Path, max_bytes: int = 100 * MB) -> CompiledIndexes:
    return CompiledIndexes(CacheFolder(folder, max_bytes))


def the_file(folder: Path) -> Path:
    (path,) = folder.rglob("*.idx")
    return path


@pytest.mark.parametrize("items", [[], ODD, many(300), many(3000)], ids=["empty", "odd", "300", "3000"])
def test_what_was_put_comes_back(items: list[Item], tmp_path: Path) -> None:
    wanted = parsed(items, ("a problem", "of ż\udc80".encode("utf-8", "backslashreplace").decode()))
    cache = indexes(tmp_path)
    assert cache.get(VERSION) is None
    cache.put(VERSION, wanted)
    for each in (cache, indexes(tmp_path)):
        assert_same(each.get(VERSION), wanted)
        for other in (
            VERSION._replace(etag="2"),
            VERSION._replace(key="day/g.des"),
            VERSION._replace(store_url="s3://b"),
        ):
            assert each.get(other) is None
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file() and path.name != "CACHEDIR.TAG"] == [".idx"]


def test_small_and_large_files_are_read_in_their_ways(tmp_path: Path) -> None:
    cache = indexes(tmp_path)
    for count, is_mapped in ((10, False), (3000, True)):
        cache.put(VERSION, parsed(many(count)))
        size = the_file(tmp_path).stat().st_size
        assert (size >= module._MAPPED) == is_mapped
        found = cache.get(VERSION)
        assert_same(found, parsed(many(count)))
        assert (str(the_file(tmp_path)) in Path("/proc/self/maps").read_text()) == is_mapped


def test_a_map_ends_with_its_last_array_and_needs_no_descriptor(tmp_path: Path) -> None:
    cache = indexes(tmp_path)
    wanted = parsed(many(3000))
    cache.put(VERSION, wanted)
    before = len(os.listdir("/proc/self/fd"))
    found = [cache.get(VERSION) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before
    place = str(the_file(tmp_path))
    assert Path("/proc/self/maps").read_text().count(place) == 5
    the_file(tmp_path).unlink()  # evicted: who has it goes on
    assert_same(found[0], wanted)
    assert found[0] is not None
    last = found[0].meta.mtime_ns[5:10]
    found.clear()
    gc.collect()
    assert Path("/proc/self/maps").read_text().count(place) == 1
    assert last.tolist() == wanted.meta.mtime_ns[5:10].tolist()
    del last
    gc.collect()
    assert place not in Path("/proc/self/maps").read_text()


def test_columns_cannot_be_written_to(tmp_path: Path) -> None:
    cache = indexes(tmp_path)
    for count in (10, 3000):
        cache.put(VERSION, parsed(many(count)))
        found = cache.get(VERSION)
        assert found is not None
        for column in (*found.index.columns().values(), found.meta.mode, found.meta.mtime_ns):
            assert not column.flags.writeable


@given(
    st.lists(
        st.builds(
            Item,
            st.lists(st.sampled_from([b"a", b"b", b"/", b"..", b"\xff", "ż".encode()]), max_size=5).map(b"".join),
            st.binary(max_size=5),
            st.sampled_from([None, b"", b"{}", b'{"mtime":1,"mode":7}', b'{"sha256":"' + b"0" * 64 + b'"}', BLOCKS]),
            st.sampled_from([0, 0, 0, DELETED, EXTERNAL, 2]),
        ),
        max_size=8,
    )
)
def test_any_container_comes_back(items: list[Item]) -> None:
    wanted = parsed(items)
    table, columns = module._take_apart(wanted)
    pieces = module._pieces(VERSION, msgspec.json.encode(table), columns)
    raw = np.frombuffer(b"".join(pieces), np.uint8)
    assert_same(module._put_together(VERSION, raw), wanted)


def test_a_day_of_compiled_indexes_is_that_of_parsed_ones(tmp_path: Path) -> None:
    cache = indexes(tmp_path)
    name = parse_container_name("f.des")
    assert name is not None
    wanted = parsed(ODD)
    cache.put(VERSION, wanted)
    found = cache.get(VERSION)
    assert found is not None
    trees = [
        DayTree([Member(1, 7, each.index, VERSION.key, name, 5, each.folders)])
        for each in (wanted, found, Compiled(found.index, found.meta, Folders(found.index), ()))
    ]
    for path in (b"", b"d", b"d/e", "ż".encode()):
        assert len({str([(page.names, page.cookies) for page in tree.pages(path)]) for tree in trees}) == 1


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 2000])
def test_a_flipped_byte_anywhere_is_a_miss(count: int, tmp_path: Path) -> None:
    """docs/semantics.md: A wrong byte in a cache is never seen: it is a miss."""
    cache = indexes(tmp_path)
    cache.put(VERSION, parsed(many(count)))
    path = the_file(tmp_path)
    good = path.read_bytes()
    assert (len(good) >= module._MAPPED) == (count == 2000)
    dice = random.Random(1)
    places = {*range(40), len(good) - 1, *(dice.randrange(len(good)) for _ in range(300))}
    damaged = metrics.snapshot().get("desfs_disk_cache_errors_total.damaged", 0)
    for at in places:
        path.write_bytes(good[:at] + bytes([good[at] ^ dice.choice([1, 0x80, 0xFF])]) + good[at + 1 :])
        assert cache.get(VERSION) is None, at
        assert not path.exists(), "and it is removed"
    assert metrics.snapshot()["desfs_disk_cache_errors_total.damaged"] - damaged == len(places)
    for length in (0, 1, 23, 24, 31, 32, 33, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        assert cache.get(VERSION) is None, length
    path.write_bytes(good + b"\0")
    assert cache.get(VERSION) is None
    path.write_bytes(good)
    assert_same(cache.get(VERSION), parsed(many(count)))


def test_a_file_of_another_version_is_a_miss(tmp_path: Path) -> None:
    cache = indexes(tmp_path)
    cache.put(VERSION, parsed(many(3)))
    mine = the_file(tmp_path)
    for other in (VERSION._replace(etag="2"), VERSION._replace(key="x"), VERSION._replace(store_url="y")):
        mine.unlink(missing_ok=True)
        cache.put(other, parsed(many(3)))
        the_file(tmp_path).rename(mine)
        assert cache.get(VERSION) is None


def test_a_file_with_other_columns_is_a_miss(tmp_path: Path) -> None:
    """As another version of the program would write it, with the right checksum."""
    wanted = parsed(many(3))
    for change in ("remove", "type", "length", "table"):
        table, columns = module._take_apart(wanted)
        if change == "remove":
            del table.columns["index.flags"]
        elif change == "type":
            table.columns["index.state"] = table.columns["index.state"]._replace(type="<u2")
        elif change == "length":
            table.columns["index.flags"] = table.columns["index.flags"]._replace(length=2)
        encoded = msgspec.json.encode(table) if change != "table" else b'{"footer":[]}'
        raw = np.frombuffer(b"".join(module._pieces(VERSION, encoded, columns)), np.uint8)
        assert module._put_together(VERSION, raw) is None


# --- room ------------------------------------------------------------------------------------------------------------


def test_indexes_make_room_for_each_other_and_count(tmp_path: Path) -> None:
    cache = indexes(tmp_path, 2 * MB)
    for number in range(30):
        cache.put(VERSION._replace(etag=str(number)), parsed(many(2000)))
        cache._folder.wait_idle()
    for _ in range(2):  # a put that finds no room is let go, and room is made for the next
        cache.put(VERSION._replace(etag="last"), parsed(many(2000)))
        cache._folder.wait_idle()
    usage = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*.idx"))
    assert MB < usage <= 2 * MB
    assert cache.get(VERSION._replace(etag="0")) is None
    assert_same(cache.get(VERSION._replace(etag="last")), parsed(many(2000)))


def test_an_index_that_is_in_use_stays(tmp_path: Path) -> None:
    """docs/operations.md: What was used longest ago goes first; what a mount has open is in use."""
    cache = indexes(tmp_path, 2 * MB)
    cache.put(VERSION, parsed(many(2000)))
    held, dropped = cache.get(VERSION), VERSION._replace(etag="dropped")
    cache.put(dropped, parsed(many(2000)))
    for path in tmp_path.rglob("*.idx"):
        os.utime(path, (1, 1))
    for number in range(30):
        cache.put(VERSION._replace(etag=str(number)), parsed(many(2000)))
        cache._folder.wait_idle()
    assert cache.get(dropped) is None
    assert_same(cache.get(VERSION), parsed(many(2000)))
    assert held is not None


def test_a_text_that_cannot_be_kept(tmp_path: Path) -> None:
    cache = indexes(tmp_path)
    cache.put(VERSION, parsed(many(3), ("\udc80",)))
    assert cache.get(VERSION) is None
