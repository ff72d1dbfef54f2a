"""`desfs.verify`: what is damage in a container and in its external objects, and what is not."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import google_crc32c
import pytest

from des_format import DesWriter
from des_format.blocks import BLOCK, BlockChecksums
from des_format.layout import DELETED, EXTERNAL, FOOTER, HEADER, MAX_META, RECORD
from desfs.cli.verify import describe
from desfs.store.base import Answer, Store
from desfs.store.file import FileStore
from desfs.verify_container import WINDOW
from tests import fixtures
from tests.mount.stores import WatchedStore, put_sharded
from tests.unit.containers import Item, build, footer_of, patched
from tests.unit.verifying import (
    DAY,
    DICE,
    EXTERNALS,
    KEY,
    LARGE,
    MIB,
    check,
    damage,
    flip,
    packed_meta,
    put,
    put_raw,
    verify,
)

# --- the example containers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", fixtures.FOLDERS, ids=lambda folder: folder.parent.name)
def test_the_valid_containers_are_not_damaged(folder: Path) -> None:
    """Foreign objects and names that are never shown are warnings; gaps, tombstones and duplicates are nothing."""
    manifest = fixtures.valid(folder)
    found, summary = verify(folder / "valid")
    assert not summary.is_damaged
    assert (summary.containers, summary.unverified) == (len(manifest["containers"]), 0)
    assert {(each.container, each.entry) for each in found} == {
        ("2025-01-02.des.tmp", None),
        ("2025-01-05/README.txt", None),
        ("notes.txt", None),
        *(("2025-01-06/0.des", name) for name in manifest["not_shown"]["2025-01-06/0.des"]),
    }
    objects = [path for path in (folder / "valid").rglob("*") if path.is_file()]
    wanted = sum(path.stat().st_size for path in objects if path.suffix == ".des" or "_bigFiles" in path.parts)
    assert summary.size == wanted


@pytest.mark.parametrize("folder", fixtures.FOLDERS, ids=lambda folder: folder.parent.name)
def test_the_hostile_containers_have_the_damage_of_their_manifest(folder: Path, tmp_path: Path) -> None:
    """A container that is refused is damaged as a whole, an entry that is refused by itself; metadata without a
    checksum that is broken is a warning."""
    cases = {case.key: case for case in fixtures.hostile(folder)}
    for case in cases.values():
        put_raw(tmp_path, case.raw, case.key)
    found, summary = verify(tmp_path)
    wanted: set[tuple[str, str | None]] = set()
    for case in cases.values():
        if case.outcome == "reject":
            wanted.add((case.key, None))
        elif case.name == "name-not-utf8":
            wanted.add((case.key, "\\xff"))
        else:
            wanted |= {(case.key, name) for name in case.damaged}
    assert {(each.container, each.entry) for each in found if each.kind == "damage"} == wanted
    safe = {case.key for case in cases.values() if case.outcome == "safe"}
    assert {each.container for each in found if each.kind == "warning"} == safe
    assert {each.entry for each in found if each.container in safe} == {"a", "b", "c"}
    assert summary.damaged_containers == sum(case.outcome == "reject" for case in cases.values())
    entries = len(wanted) - summary.damaged_containers
    assert summary.damaged_entries == summary.containers_with_damaged_entries == entries
    assert summary.unverified == 0


# --- flipped bytes ---------------------------------------------------------------------------------------------------

SMALL = {"a/first": b"first payload", "empty": b"", "b/second": DICE.randbytes(30), "third": DICE.randbytes(21)}


def test_wherever_a_bit_is_flipped_it_is_found_if_anything_tells(tmp_path: Path, gets: ThreadPoolExecutor) -> None:
    """Every byte of a container, one bit each. Header, payloads and footer: always; the index but for names, which
    nothing tells, and the flag DELETED, which means something; metadata where it is no JSON any more, or says
    another size or checksum."""
    path = put(tmp_path / KEY, SMALL)
    raw = path.read_bytes()
    footer = footer_of(raw)
    owner: dict[int, str] = {}
    at = HEADER.size
    for name, data in SMALL.items():
        owner |= dict.fromkeys(range(at, at + len(data)), name)
        at += len(data)
    assert at == footer.meta_start
    silent = set()
    for at in range(len(raw)):
        changed = bytes([raw[at] ^ 1 << at % 8])
        path.write_bytes(patched(raw, at, changed))
        report = check(tmp_path, gets)
        damaged = {(each.entry, each.offset) for each in report.findings if each.kind == "damage"}
        if not damaged:
            silent.add(at)
        if at < HEADER.size:
            assert damaged == ({(None, 0)} if at < 9 else set()), at
        elif at < footer.meta_start:
            start = min(each for each in owner if owner[each] == owner[at])
            assert damaged == {(owner[at], start)}, at
        elif at < footer.index_start:
            assert bool(damaged) == _tells(raw, at, changed), (at, damaged)
    assert silent & set(range(footer.index_start, footer.index_start + footer.index_length)) == _untold(raw)
    reserved = set(range(len(raw) - FOOTER.size + 9, len(raw) - FOOTER.size + 16))
    assert silent & set(range(len(raw) - FOOTER.size, len(raw))) == reserved


def _records(raw: bytes) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Position and length of each name, and data length, META offset and length, and position of the flags."""
    footer = footer_of(raw)
    at = footer.index_start
    for _ in range(footer.file_count):
        (length,) = struct.unpack_from("<H", raw, at)
        _, size, meta_offset, meta_length, _ = RECORD.unpack_from(raw, at + 2 + length)
        yield at + 2, length, size, meta_offset, meta_length, at + 2 + length + RECORD.size - 4
        at += 2 + length + RECORD.size


def _tells(raw: bytes, at: int, changed: bytes) -> bool:
    """Whether metadata with a byte changed is known to be wrong."""
    for _, _, size, start, length, _ in _records(raw):
        if start <= at < start + length:
            good = json.loads(raw[start : start + length])
            try:
                meta = json.loads(patched(raw, at, changed)[start : start + length].decode())
            except ValueError:
                return True
            sums = {key: meta[key] for key in ("crc32c", "sha256") if key in meta}
            hexes = {key: value for key, value in sums.items() if not value.strip("0123456789abcdef")}
            return meta.get("size", size) != size or any(good[key] != value for key, value in hexes.items())
    raise AssertionError(f"byte {at} is in no metadata")


def _untold(raw: bytes) -> set[int]:
    """Bytes of the index where a bit makes another sound container."""
    names = {at + each for at, length, *_ in _records(raw) for each in range(length)}
    # That of an empty payload may lie anywhere.
    empty = {flags - 32 + each for *_, flags in _records(raw) for each in range(8)} & {
        flags - 32 + each for _, _, size, _, _, flags in _records(raw) if size == 0 for each in range(8)
    }
    deleted = {flags for *_, flags in _records(raw) if flags % 8 == DELETED.bit_length() - 1}
    return {at for at in names if _is_shown_name(raw, at)} | empty | deleted


def _is_shown_name(raw: bytes, at: int) -> bool:
    """Whether the name at `at` is UTF-8 with a bit of it changed."""
    for start, length, *_ in _records(raw):
        if start <= at < start + length:
            name = patched(raw, at, bytes([raw[at] ^ 1 << at % 8]))[start : start + length]
            try:
                name.decode()
            except UnicodeDecodeError:
                return False
            return True
    raise AssertionError(f"byte {at} is in no name")


def test_payloads_of_many_windows(tmp_path: Path, gets: ThreadPoolExecutor) -> None:
    """A payload that is longer than what is read at a time is compared all the same, and no request is longer."""
    files = {"one": b"1", "long": DICE.randbytes(2 * WINDOW + 5), "two": DICE.randbytes(70_000), "more": b"more"}
    path = put(tmp_path / KEY, files)
    store = Ranges(FileStore(tmp_path))
    found, summary = verify(store)
    assert (found, summary.files, summary.size) == ([], 4, path.stat().st_size)
    assert max(stop - start for _, start, stop in store.ranges) == WINDOW
    assert sum(stop - start for _, start, stop in store.ranges) < path.stat().st_size + 2 * MIB
    for at, name in ((HEADER.size, "one"), (HEADER.size + 1 + WINDOW, "long"), (HEADER.size + 2 * WINDOW + 5, "long")):
        flip(path, at)
        start = HEADER.size + (0 if name == "one" else 1)
        assert damage(check(tmp_path, gets).findings) == [(KEY, name, start)]
        flip(path, at)
    flip(path, 0)  # of a large container the header is not read with the index: the rest is compared all the same
    flip(path, HEADER.size + 3 * MIB)
    report = check(tmp_path, gets)
    assert damage(report.findings) == [(KEY, None, 0), (KEY, "long", HEADER.size + 1)]
    assert (report.damaged, report.damaged_entries) == (True, 1)


class Ranges(WatchedStore):
    """Writes down what was read."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.ranges: list[tuple[str, int, int]] = []

    def get_range(self, key: str, start: int, stop: int, *, if_match: str | None = None) -> Answer:
        self.ranges.append((key, start, stop))
        return super().get_range(key, start, stop, if_match=if_match)


@pytest.mark.parametrize("wrong", ["crc32c", "sha256"])
def test_each_checksum_is_compared(wrong: str, tmp_path: Path, gets: ThreadPoolExecutor) -> None:
    """SHA-256 as well as CRC-32C, also of empty payloads: one that is wrong is damage."""
    for data in (b"data", b""):
        meta = packed_meta(data)
        meta[wrong] = str(meta[wrong])[:-1] + ("0" if str(meta[wrong])[-1] != "0" else "1")
        (tmp_path / DAY).mkdir(exist_ok=True)
        with DesWriter(tmp_path / KEY) as writer:
            writer.add_file("f", data, meta)
        (finding,) = check(tmp_path, gets).findings
        assert (finding.kind, finding.entry, finding.offset) == ("damage", "f", HEADER.size)
        assert f"found a {wrong} of" in finding.problem
        assert f"want {meta[wrong]}" in finding.problem


def test_entries_without_a_checksum_are_counted(tmp_path: Path) -> None:
    """A checksum of another form is an application's own."""
    (tmp_path / DAY).mkdir()
    with DesWriter(tmp_path / KEY) as writer:
        writer.add_file("none", b"1")
        writer.add_file("other", b"2", {"sha256": "short", "crc32c": 7})
        writer.add_file("crc", b"3", {"crc32c": f"{google_crc32c.value(b'3'):08x}"})
        writer.add_file("sha", b"4", {"sha256": sha256(b"4").hexdigest()})
    found, summary = verify(tmp_path)
    assert (found, summary.without_checksum, summary.files) == ([], 2, 4)
    assert describe(summary).endswith("no damage; 2 entries have no checksum")


# --- index and metadata ----------------------------------------------------------------------------------------------


def sound(name: bytes, data: bytes) -> Item:
    return Item(name, data, b'{"crc32c":"%08x","size":%d}' % (google_crc32c.value(data), len(data)))


def test_payloads_may_be_shared_but_not_in_part(tmp_path: Path, gets: ThreadPoolExecutor) -> None:
    """Entries with the same bytes are sound; such with a part of another's are compared, and warned about."""
    first = sound(b"a", b"0123456789")
    again = sound(b"b", b"0123456789")
    part = sound(b"c", b"56789")
    same = replace(again, data=b"", data_offset=HEADER.size, data_length=10)
    inside = replace(part, data=b"", data_offset=HEADER.size + 5, data_length=5)
    put_raw(tmp_path, build([first, same, inside]))
    report = check(tmp_path, gets)
    assert [(each.kind, each.entry, each.offset) for each in report.findings] == [("warning", "c", HEADER.size + 5)]
    put_raw(tmp_path, build([replace(first, data=b"0123456780"), same, inside]))
    assert {entry for _, entry, _ in damage(check(tmp_path, gets).findings)} == {"a", "b", "c"}


def test_payloads_that_overlap_without_end_are_not_compared(tmp_path: Path, gets: ThreadPoolExecutor) -> None:
    data = DICE.randbytes(200_000)
    bulk = sound(b"bulk", data)
    windows = [
        replace(sound(b"%06d" % at, data[at:]), data=b"", data_offset=HEADER.size + at, data_length=len(data) - at)
        for at in range(1, 20)
    ]
    put_raw(tmp_path, build([bulk, *windows]))
    report = check(tmp_path, gets)
    assert [each.problem for each in report.findings if each.kind == "unverified"] == [
        "16 payloads share their bytes without end"
    ]
    assert not damage(report.findings)


def test_metadata_is_damage_only_where_it_had_a_checksum(tmp_path: Path, gets: ThreadPoolExecutor) -> None:
    """docs/semantics.md: Damaged metadata costs the times, the mode and the attributes, not the bytes; but what had a
    checksum cannot be compared any more."""
    metas = {
        b"json": b"{broken",
        b"list": b"[1]",
        b"size": b'{"size":9}',
        b"deep": b"[" * 100_000,
        b"lost": b'{"crc32c":"00000000",}',
        b"lost size": b'{"sha256":"%s","size":9}' % (b"0" * 64),
    }
    tombstone = Item(b"gone", meta=b"{broken", flags=DELETED)
    put_raw(tmp_path, build([*(Item(name, b"x", meta) for name, meta in metas.items()), tombstone]))
    report = check(tmp_path, gets)
    assert {(each.kind, each.entry) for each in report.findings} == {
        *(("warning", name) for name in ("json", "list", "size", "deep")),
        *(("damage", name) for name in ("lost", "lost size")),
    }
    meta_start = footer_of((tmp_path / KEY).read_bytes()).meta_start
    assert min(each.offset or 0 for each in report.findings) == meta_start
    assert any("found size 9, want 1 as in the index" in each.problem for each in report.findings)
    assert report.without_checksum == 0


def test_a_metadata_region_that_is_not_held(tmp_path: Path, gets: ThreadPoolExecutor) -> None:
    """Metadata of more than 16 MiB is read in pieces, and compared like any other."""
    filler = b"x" * (MAX_META // 2)
    items = [
        Item(b"%d" % n, b"%d" % n, b'{"crc32c":"%08x","x":"%s"}' % (google_crc32c.value(b"%d" % n), filler))
        for n in range(6)
    ]
    put_raw(tmp_path, build([*items, replace(items[3], name=b"wrong", data=b"!")]))
    report = check(tmp_path, gets)
    assert [entry for _, entry, _ in damage(report.findings)] == ["wrong"]
    assert report.without_checksum == 0


def test_a_million_damaged_rows_cost_little(tmp_path: Path, gets: ThreadPoolExecutor) -> None:
    """All are counted, and ten thousand named."""
    shared = b"{" + b" " * 1000
    index = footer_of(build([Item(b"0", b"", shared)])).meta_start
    rows = [Item(b"%07d" % n, meta=b"", meta_offset=index, meta_length=len(shared)) for n in range(200_000)]
    put_raw(tmp_path, build([Item(b"0", b"", shared), *rows, *(Item(b"%d\xff" % n) for n in range(20_000))]))
    report = check(tmp_path, gets)
    kinds = [each.kind for each in report.findings]
    assert (kinds.count("damage"), kinds.count("warning")) == (10_001, 101)
    assert report.counts["damage"] + report.counts["warning"] == 220_001
    assert report.findings[-2].problem.startswith("and ")
    assert report.damaged_entries == report.counts["damage"]


def test_names_are_looked_for_in_their_shard(tmp_path: Path) -> None:
    """A name that is not where the layout puts it is a warning: readers find it, late."""
    files = {f"d{n}/f": b"%d" % n for n in range(20)} | {f"flat{n}": b"x" for n in range(20)}
    where = put_sharded(tmp_path, DAY, files)
    assert verify(tmp_path)[0] == []
    there = where["d0/f"]
    wrong = there.with_name("ff.des" if there.name != "ff.des" else "fe.des")
    assert not wrong.exists()
    there.rename(wrong)
    found, summary = verify(tmp_path)
    assert {(each.kind, each.entry) for each in found} == {
        ("warning", name) for name, path in where.items() if path == there
    }
    assert {each.container for each in found} == {f"{DAY}/{wrong.name}"}
    assert f"but the layout has it in {there.stem}" in found[0].problem
    assert not summary.is_damaged
    named = there.with_name("no shard.des")
    wrong.rename(named)
    assert verify(tmp_path)[0] == []


# --- external objects ------------------------------------------------------------------------------------------------


def test_sound_external_objects(with_externals: Path) -> None:
    found, summary = verify(with_externals)
    assert found == []
    assert summary.files == 4
    assert summary.size == (with_externals / KEY).stat().st_size + sum(map(len, EXTERNALS.values()))
    assert summary.without_checksum == 0


def test_flipped_bytes_in_an_external_object(with_externals: Path) -> None:
    """The block is named where metadata has the checksums of blocks."""
    path = with_externals / DAY / "_bigFiles/large"
    for at in (0, BLOCK, WINDOW - 1, WINDOW, len(LARGE) - 1):
        flip(path, at)
        found, summary = verify(with_externals)
        assert damage(found) == [(KEY, "large", at // BLOCK * BLOCK)]
        assert f"external object '{DAY}/_bigFiles/large': block {at // BLOCK} at byte" in found[0].problem
        assert (summary.damaged_entries, summary.containers_with_damaged_entries) == (1, 1)
        flip(path, at)
    flip(with_externals / DAY / "_bigFiles/d/small", 2)
    assert damage(verify(with_externals)[0]) == [(KEY, "d/small", 0)]


def test_blocks_that_are_longer_than_what_is_read_at_a_time(tmp_path: Path) -> None:
    (tmp_path / DAY / "_bigFiles").mkdir(parents=True)
    (tmp_path / DAY / "_bigFiles/f").write_bytes(LARGE)
    values = b"".join(
        google_crc32c.value(LARGE[at : at + 3 * BLOCK]).to_bytes(4, "little") for at in range(0, len(LARGE), 3 * BLOCK)
    )
    with DesWriter(tmp_path / KEY) as writer:
        blocks = BlockChecksums(3 * BLOCK, values).meta()
        writer.add_external("f", len(LARGE), {"crc32c_blocks": blocks}, key=f"{DAY}/_bigFiles/f")
    found, summary = verify(tmp_path)
    assert (found, summary.without_checksum) == ([], 0)
    flip(tmp_path / DAY / "_bigFiles/f", 4 * BLOCK)
    assert damage(verify(tmp_path)[0]) == [(KEY, "f", 3 * BLOCK)]


@pytest.mark.parametrize("change", ["missing", "short", "long", "empty", "not empty"])
def test_external_objects_of_another_size(change: str, with_externals: Path) -> None:
    path = with_externals / DAY / "_bigFiles" / ("nothing" if change == "not empty" else "large")
    data = {"short": LARGE[:-1], "long": LARGE + b"1", "empty": b"", "not empty": b"1"}.get(change)
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    (finding,), summary = verify(with_externals)
    assert (finding.kind, finding.container, finding.entry) == ("damage", KEY, path.name)
    if data is None:
        assert finding.problem == f"external object '{DAY}/_bigFiles/large' is missing"
    else:
        assert f"found {len(data)} bytes, want {len(EXTERNALS[path.name])}" in finding.problem
    assert summary.damaged_entries == 1


def test_an_external_object_in_a_folder_of_its_own(tmp_path: Path) -> None:
    """The recorded key is followed; a checksum of the whole is compared where there are none of blocks, and size and
    presence in any case."""
    (tmp_path / DAY / "_bigFiles/id").mkdir(parents=True)
    data = LARGE[:100_000]
    (tmp_path / DAY / "_bigFiles/id/f").write_bytes(data)
    (tmp_path / DAY / "_bigFiles/g").write_bytes(data)
    with DesWriter(tmp_path / KEY) as writer:
        writer.add_external("f", len(data), packed_meta(data), key=f"{DAY}/_bigFiles/id/f")
        writer.add_external("g", len(data), key="elsewhere")
    found, summary = verify(tmp_path)
    assert (found, summary.without_checksum) == ([], 1)
    flip(tmp_path / DAY / "_bigFiles/id/f", 5)
    flip(tmp_path / DAY / "_bigFiles/g", 5)  # nobody can tell
    (finding,), _ = verify(tmp_path)
    assert (finding.entry, finding.offset) == ("f", 0)
    assert "found a crc32c of" in finding.problem


def test_objects_that_no_container_names(with_externals: Path) -> None:
    """Left-over external objects are warnings, and so are foreign ones; an entry that is overridden, or is damaged,
    names its object."""
    big = with_externals / DAY / "_bigFiles"
    (big / "orphan").write_bytes(b"1")
    (big / "large").unlink()
    (with_externals / DAY / "deep/er").mkdir(parents=True)
    (with_externals / DAY / "deep/er/0.des").write_bytes(b"1")
    (with_externals / "stray").write_bytes(b"1")
    found, _ = verify(with_externals)
    assert {(each.kind, each.container, each.entry) for each in found} == {
        ("warning", f"{DAY}/_bigFiles/orphan", None),
        ("warning", f"{DAY}/deep/er/0.des", None),
        ("warning", "stray", None),
        ("damage", KEY, "large"),
    }
    put_raw(with_externals, b"no container")
    texts = {each.container: each.problem for each in verify(with_externals)[0]}
    assert "no container that could be read" in texts[f"{DAY}/_bigFiles/d/small"]


def test_an_external_entry_that_is_overridden_is_not_read(tmp_path: Path) -> None:
    """Both entries of a name have the same place for their object; the last one's is there."""
    put_raw(tmp_path, b"new", f"{DAY}/_bigFiles/f")
    old = Item(b"f", meta=b'{"size":9}', flags=EXTERNAL, data_offset=0, data_length=9)
    new = Item(b"f", meta=b'{"size":3}', flags=EXTERNAL, data_offset=0, data_length=3)
    put_raw(tmp_path, build([old, new]))
    assert verify(tmp_path)[0] == []
    put_raw(tmp_path, build([old, Item(b"f", b"inside")]))
    assert verify(tmp_path)[0] == []
