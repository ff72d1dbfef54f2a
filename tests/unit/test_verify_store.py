"""`desfs.verify`: stores that change meanwhile or fail, what is in them besides, and what is printed."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from des_format.layout import HEADER
from desfs.cli.verify import describe, format_finding
from desfs.errors import NoSuchObject, StoreError, StoreUnavailable
from desfs.layout import LAYOUT_KEY, Layout
from desfs.store.base import ObjectInfo
from desfs.store.file import FileStore
from desfs.store.retrying import Retrying
from desfs.store.url import split_place
from desfs.verify import Finding, Summary, Verification, sort_objects
from desfs.verify_container import WINDOW, ContainerCheck, Stopped
from tests.fakes.faulty_store import FaultyStore
from tests.mount.stores import WatchedStore, put_container, put_layout
from tests.unit.containers import patched
from tests.unit.verifying import (
    DAY,
    DICE,
    EXTERNALS,
    KEY,
    LARGE,
    damage,
    flip,
    put,
    put_raw,
    verify,
)

# --- what changes meanwhile ------------------------------------------------------------------------------------------


def once(store: WatchedStore, method: str, key: str, do: Callable[[], object], *, number: int = 1) -> None:
    """Do something before the `number`-th call of a method with a key."""
    calls = itertools.count(1)
    lock = threading.Lock()

    def before(called: str, with_key: str) -> None:
        with lock:
            if (called, with_key) == (method, key) and next(calls) == number:
                do()

    store.before = before


def test_a_container_that_is_replaced_is_looked_at_again(tmp_path: Path) -> None:
    """Bytes of two versions are never compared with each other."""
    put(tmp_path / KEY, {"f": DICE.randbytes(3 * WINDOW)})
    new = put(tmp_path / "new", {"g": b"new", "h": b"other"})
    store = WatchedStore(FileStore(tmp_path))
    for number in (1, 2, 3):
        saved = (tmp_path / KEY).read_bytes()
        once(store, "get", KEY, lambda: shutil.move(shutil.copy(new, tmp_path / "copy"), tmp_path / KEY), number=number)
        found, summary = verify(store)
        assert [each.container for each in found] == ["new"]
        assert (summary.containers, summary.files, summary.is_damaged) == (1, 2, False)
        (tmp_path / KEY).write_bytes(saved)


def test_containers_that_are_merged_are_followed(tmp_path: Path) -> None:
    """What was deleted is no damage, nor are its external objects; what came instead is verified."""
    put(tmp_path / DAY / "0-000001.des", {"one": b"one", "big": LARGE[:100]}, ("big",))
    put(tmp_path / DAY / "0-000002.des", {"two": b"two"})
    store = WatchedStore(FileStore(tmp_path))

    def merge() -> None:
        put(tmp_path / KEY, {"one": b"one", "two": b"two", "three": b"3"})
        flip(tmp_path / KEY, HEADER.size)
        for name in ("0-000001.des", "0-000002.des", "_bigFiles/big"):
            (tmp_path / DAY / name).unlink()

    once(store, "get", f"{DAY}/_bigFiles/big", merge)
    found, summary = verify(store)
    assert damage(found) == [(KEY, "one", HEADER.size)]
    assert summary.unverified == 0


def test_a_container_that_keeps_changing_is_not_verified(tmp_path: Path) -> None:
    path = put(tmp_path / KEY, {"f": DICE.randbytes(2 * WINDOW)})
    store = WatchedStore(FileStore(tmp_path))
    times = itertools.count(1)

    def touch(method: str, key: str) -> None:
        if method == "get":
            path.write_bytes(path.read_bytes() + b"x" * next(times))

    store.before = touch
    found, summary = verify(store)
    assert [(each.kind, each.container) for each in found] == [("unverified", KEY)]
    assert found[0].problem == "changed 3 times while it was read"
    assert not summary.is_damaged


def test_an_external_object_that_is_replaced_is_read_again(with_externals: Path) -> None:
    path = with_externals / DAY / "_bigFiles/large"
    store = WatchedStore(FileStore(with_externals))
    other = with_externals / "other"
    other.write_bytes(LARGE)
    once(store, "get", f"{DAY}/_bigFiles/large", lambda: shutil.move(other, path), number=2)
    found, summary = verify(store)
    assert [(each.kind, each.container) for each in found] == [("warning", "other")]  # of the listing
    assert summary.size == sum(map(len, EXTERNALS.values())) + (with_externals / KEY).stat().st_size


def test_what_is_wrong_once_is_no_damage(with_externals: Path) -> None:
    """A byte that changed on its way is read again, and said."""
    store = WatchedStore(FileStore(with_externals))
    for key, entry in ((KEY, "inside"), (f"{DAY}/_bigFiles/d/small", "d/small"), (f"{DAY}/_bigFiles/large", "large")):
        left = [key]

        def change(method: str, read: str, data: bytes, left: list[str] = left) -> bytes:
            if read in left:
                left.clear()
                # Of the container, whose every byte comes at once, its first payload.
                at = HEADER.size if read == KEY else len(data) // 2
                return patched(data, at, bytes([data[at] ^ 1]))
            return data

        store.change = change
        found, summary = verify(store)
        assert [(each.kind, each.entry) for each in found] == [("warning", entry)]
        assert "but not the second time" in found[0].problem
        assert not summary.is_damaged


# --- stores that fail ------------------------------------------------------------------------------------------------


def test_wherever_the_store_fails_nothing_is_called_damage(with_externals: Path) -> None:
    """A request that fails, whichever, leaves something that was not verified, with its cause; damage that was found
    stays."""
    put_layout(with_externals, b'{"shard_bits": 8, "placement": "directory", "naming": "path"}')
    put(with_externals / DAY / "1.des", {"x": b"damaged"})
    flip(with_externals / DAY / "1.des", HEADER.size)
    verified = []
    for number in itertools.count(1):
        store = FaultyStore(FileStore(with_externals), " ".join(["ok"] * number + ["503", "ok"]))
        found, summary = verify(store)
        assert set(damage(found)) <= {(f"{DAY}/1.des", "x", HEADER.size)}
        if "503" not in [word for *_, word in store.calls]:
            assert (summary.unverified, summary.damaged_entries) == (0, 1)
            break
        assert summary.unverified == 1
        (finding,) = [each for each in found if each.kind == "unverified"]
        assert "scripted fault '503'" in finding.problem
        verified.append(finding.container)
    assert set(verified) == {KEY, f"{DAY}/1.des", LAYOUT_KEY}


def test_a_store_that_cannot_be_listed(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable):
        verify(FaultyStore(FileStore(tmp_path), "reset"))


def test_a_store_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    """Not every container takes its whole deadline."""
    for number in range(40):
        put_container(tmp_path / DAY / f"{number:02x}.des", {"f": b"data"})
    store = FaultyStore(FileStore(tmp_path), "ok reset")
    found, summary = verify(Retrying(store, deadline_s=0.001))
    tried = {key for _, key, word in store.calls if word == "reset"}
    assert len(tried) < 20
    (given_up,) = [each for each in found if not each.container]
    assert given_up.problem == f"{40 - len(tried)} containers were not tried: the store does not answer"
    assert {each.kind for each in found} == {"unverified"}
    assert not summary.is_damaged


def test_external_objects_that_do_not_come(with_externals: Path) -> None:
    """After a deadline the others are not tried; a refusal is of one object alone."""
    store = WatchedStore(FileStore(with_externals))

    def fail(method: str, key: str) -> None:
        if "_bigFiles" in key:
            raise StoreError("no")

    store.before = fail
    found, summary = verify(store)
    assert {(each.kind, each.entry) for each in found} == {("unverified", name) for name in EXTERNALS}
    retrying = Retrying(FaultyStore(FileStore(with_externals), "ok ok reset"), deadline_s=0.001)
    found, summary = verify(retrying)
    assert [each.kind for each in found] == ["unverified"] * 2
    assert found[1].problem == "2 more external objects were not read"
    assert not summary.is_damaged


def test_a_check_that_is_stopped(tmp_path: Path, gets: ThreadPoolExecutor) -> None:
    put(tmp_path / KEY, {"f": b"1"})
    store = FileStore(tmp_path)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        ContainerCheck(store, store.list().objects[0], Layout(), gets, stop=stop).run()


# --- the store around the containers ---------------------------------------------------------------------------------


def test_the_layout_has_to_be_understood(tmp_path: Path) -> None:
    """One that is no JSON is damage; one of another version is a warning, and no name is checked by it."""
    put(tmp_path / KEY, {"f": b"1"})
    put_layout(tmp_path, b'{"shard_bits": 8, "placement"')
    (finding,), summary = verify(tmp_path)
    assert (finding.kind, finding.container, summary.damaged_layout) == ("damage", LAYOUT_KEY, True)
    assert summary.is_damaged
    put_layout(tmp_path, b'{"shard_bits": 8, "placement": "by moon", "naming": "path"}')
    (finding,), summary = verify(tmp_path)
    assert (finding.kind, finding.container, summary.is_damaged) == ("warning", LAYOUT_KEY, False)
    assert "by moon" in finding.problem


def test_which_objects_are_containers() -> None:
    """As a mount sees it: NAME.des, and NAME.des in a folder of the root."""
    keys = {
        "2026-11-20.des": True,
        "2026-11-20/3f.des": True,
        "photos/3f-000001.des": True,
        "2026-11-20/_bigFiles/x.des": False,
        "_bigFiles/x": False,
        "a/b/c.des": False,
        ".des": False,
        "2026-11-20/README": False,
        ".desfs.json": False,
        "2026-02-30/0.des": True,
        "2026-13-01.des": True,
        ".desfs/0.des": True,
        "odd\udcff/0.des": False,
    }
    contents = sort_objects(ObjectInfo(key, 1, "e", 0) for key in keys)
    assert [info.key for info in contents.containers] == [key for key, is_one in keys.items() if is_one]
    assert set(contents.externals) == {"2026-11-20/_bigFiles/x.des", "_bigFiles/x"}
    assert contents.has_layout
    problems = {each.container: each.problem for each in contents.findings}
    foreign = {"a/b/c.des", ".des", "2026-11-20/README"}
    assert problems.keys() == foreign | {"2026-02-30/0.des", "2026-13-01.des", ".desfs/0.des", "odd\udcff/0.des"}
    assert problems["2026-02-30/0.des"] == "is of the day 2026-02-30, which is no date"
    assert {each.kind for each in contents.findings} == {"warning"}
    many = sort_objects(ObjectInfo(f"x{n}", 1, "e", 0) for n in range(250)).findings
    assert (len(many), many[-1].problem) == (101, "150 more objects: each is no container")


def test_one_container_alone(with_externals: Path) -> None:
    """Nothing is said of what else is in the store."""
    put(with_externals / DAY / "1.des", {"x": b"damaged"})
    flip(with_externals / DAY / "1.des", HEADER.size)
    (with_externals / "stray").write_bytes(b"1")
    found, summary = verify(with_externals, KEY)
    assert (found, summary.containers, summary.files) == ([], 1, 4)
    assert damage(verify(with_externals, f"{DAY}/1.des")[0]) == [(f"{DAY}/1.des", "x", HEADER.size)]
    with pytest.raises(NoSuchObject):
        verify(with_externals, f"{DAY}/2.des")


def test_where_a_container_is(tmp_path: Path) -> None:
    (tmp_path / "folder.des").mkdir()
    put(tmp_path / KEY, {"f": b"1"})
    (tmp_path / "link").symlink_to(tmp_path / DAY)
    places = {
        str(tmp_path): (str(tmp_path), None),
        str(tmp_path / "folder.des"): (str(tmp_path / "folder.des"), None),
        str(tmp_path / KEY): (str(tmp_path), KEY),
        (tmp_path / KEY).as_uri(): (str(tmp_path), KEY),
        str(tmp_path / "link/0.des"): (str(tmp_path), KEY),
        str(tmp_path / "2026-11-20.des"): (str(tmp_path), "2026-11-20.des"),
        "/0.des": ("/", "0.des"),
        "s3://bucket/a/b": ("s3://bucket/a/b", None),
        "s3://bucket.des": ("s3://bucket.des", None),
        "s3://bucket/a.des/": ("s3://bucket/a.des/", None),
        "s3://bucket/a/2026-11-20/3f.des": ("s3://bucket/a", "2026-11-20/3f.des"),
        "s3://bucket/2026-11-20/3f.des": ("s3://bucket", "2026-11-20/3f.des"),
        "s3://bucket/a/photos/3f.des": ("s3://bucket/a/photos", "3f.des"),
        "s3://bucket/3f.des": ("s3://bucket", "3f.des"),
    }
    assert {place: split_place(place) for place in places} == places


def test_the_bytes_that_are_announced_are_read(with_externals: Path) -> None:
    """Progress ends where it should."""
    put(with_externals / DAY / "1.des", {"x": DICE.randbytes(3 * WINDOW)})
    put_raw(with_externals, b"no container", f"{DAY}/2.des")
    expected: list[int] = []
    advanced: list[int] = []
    Verification(
        FileStore(with_externals), lambda finding: None, expect=expected.append, advance=advanced.append
    ).store()
    sizes = [path.stat().st_size for path in with_externals.rglob("*") if path.is_file()]
    assert sum(expected) == sum(advanced) == sum(sizes)


# --- what is printed -------------------------------------------------------------------------------------------------


def test_findings_are_one_printable_line() -> None:
    finding = Finding("damage", "k\n\udcff", "na'me\x1b[0m", 5, "wrong\nthings")
    assert format_finding(finding) == 'k\\n\\udcff: entry "na\'me\\x1b[0m": wrong\\nthings'
    assert format_finding(Finding("warning", "k", None, None, "odd")) == "k: warning: odd"
    assert format_finding(Finding("unverified", "", None, None, "gone")) == "not verified: gone"


def test_what_a_summary_says() -> None:
    whole = Summary(containers=16, files=10_000, size=123_900_000)
    assert describe(whole) == "verified 16 containers, 10,000 files, 118.2 MiB: no damage"
    whole.damaged_entries, whole.containers_with_damaged_entries = 3, 2
    assert describe(whole).endswith(": 3 damaged entries in 2 containers")
    whole.damaged_containers, whole.damaged_layout, whole.warnings, whole.unverified = 1, True, 1, 4
    damaged = "1 damaged container, 3 damaged entries in 2 containers, a damaged layout"
    assert describe(whole).endswith(f": {damaged}; 1 warning; not all could be verified")
    assert describe(Summary(1, 1, 5, without_checksum=1)) == (
        "verified 1 container, 1 file, 5 B: no damage; 1 entry has no checksum"
    )
