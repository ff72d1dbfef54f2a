"""desfs/packer: what a packer makes of a spool, what it does when its store fails, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import pty
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from hashlib import sha256
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

from assignment.client import open_embedded
from des_format import DesReader, DesWriter
from des_format.assigned_names import parse_name
from des_format.shards import placement_shard, shard_hex
from desfs.errors import StoreError, UsageError
from desfs.packer.build import Checksums, FileUnreadable
from desfs.packer.layout import settle_layout
from desfs.packer.run import run_packer
from desfs.packer.summary import Summary
from desfs.packer.worker import Packer
from desfs.settings import PackerSettings
from desfs.spool import Spool
from desfs.store import open_store
from desfs.store.file import FileStore
from desfs.store.retrying import Retrying
from tests.crash import PROGRAM, Shown, catalog_rows, packer_forks, rejected, spool_files, unfinished
from tests.fakes.faulty_store import FaultyStore

PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def what_the_packer_says(announced_logs: list[str]) -> None:
    announced_logs += ["put aside", "left for later"]


@pytest.fixture(autouse=True)
def signals_stay() -> Iterator[None]:
    before = signal.getsignal(signal.SIGIO)
    yield
    signal.signal(signal.SIGIO, before)


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    (tmp_path / "spool").mkdir()
    return tmp_path / "spool"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def write(path: Path, content: bytes = b"content") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def pack(spool: Path, store: Path, *, effect: Callable[[str], None] = lambda name: None, **settings: Any) -> Summary:
    """`packer --once`, in this process."""
    parsed = PackerSettings(**{"settle": 0, **settings})
    return run_packer(str(spool), str(store), parsed, once=True, effect=effect)


def packer_on(spool: Path, store: FaultyStore, *, deadline_s: float = 30.0, **settings: Any) -> Summary:
    """`packer --once` on a store that fails by script."""
    parsed = PackerSettings(**{"settle": 0, **settings})
    retrying = Retrying(store, deadline_s)

    async def run() -> Summary:
        opened = Spool(spool, settle_s=parsed.settle)
        opened.join()
        try:
            layout = settle_layout(retrying, parsed.shard_bits, parsed.naming)
            catalog = opened.internal / "catalog.sqlite"
            async with await open_embedded(catalog, shard_bits=layout.shard_bits, node_id=parsed.node_id) as client:
                return await Packer(opened, retrying, client, layout, parsed).run_once()
        finally:
            opened.leave()

    return asyncio.run(run())


def shown(store: Path) -> Shown:
    return Shown.of(open_store(str(store)))


def desfs(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(PROGRAM), *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        **options,
    )


def once(spool: Path, store: object, *options: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """`desfs packer --once`, as users run it."""
    command = ("packer", "--once", "--spool", spool, "--store", store, "--settle", "0", *options)
    return desfs(*command, **more)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- what is stored ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("naming", ["path", "assigned"])
@pytest.mark.parametrize("threshold", [1000, 100], ids=["inside", "external"])
def test_metadata(spool: Path, store: Path, naming: str, threshold: int) -> None:
    """DES_V1: META has mtime to the nanosecond, mode, sha256, crc32c and id; original_name where names are assigned."""
    times = [1_700_000_000_000_000_000, 1_763_000_000_123_456_789, 0, -1_500_000_000, 2**33 * 10**9 + 1]
    for number, mtime_ns in enumerate(times):
        path = write(spool / f"d/{number}.bin", bytes([number]) * 200)
        path.chmod([0o644, 0o600, 0o4755, 0o000, 0o777][number])
        os.utime(path, ns=(0, mtime_ns))
    summary = pack(spool, store, naming=naming, big_file_threshold=threshold)
    assert (summary.files, summary.bytes) == (5, 1000)
    files = shown(store).files
    assert len(files) == 5
    for name, file in files.items():
        original = file.meta["original_name"] if naming == "assigned" else name
        number = int(original.removeprefix("d/").removesuffix(".bin"))
        assert file.data == bytes([number]) * 200
        assert Decimal(str(file.meta["mtime"])) * 10**9 == times[number] or isinstance(file.meta["mtime"], float)
        assert file.meta["mode"] == [0o644, 0o600, 0o4755, 0o000, 0o777][number]
        assert file.meta["sha256"] == sha256(file.data).hexdigest()
        assert file.meta["crc32c"] == f"{google_crc32c.value(file.data):08x}"
        assert parse_name(file.meta["id"]).extension == ""
        assert file.meta["size"] == 200
        assert file.meta.get("is_external", False) is (threshold == 100)
        if naming == "assigned":
            assert name == file.meta["id"] + ".bin"
            assert parse_name(name).extension == ".bin"
        else:
            assert "original_name" not in file.meta
    raw = b"".join((store / key).read_bytes() for key in shown(store).containers)
    for text in (b"1700000000", b"1763000000.123456789", b"0", b"-1.5", b"8589934592.000000001"):
        assert b'"mtime":' + text + b"," in raw


def test_an_extension_that_is_too_long_for_a_name_is_left_out(spool: Path, store: Path) -> None:
    """An assigned name keeps the extension where it fits into a name of 255 bytes."""
    write(spool / ("a." + "x" * 250), b"long")
    write(spool / "b.ä b", b"odd")
    write(spool / ".hidden", b"none")
    assert pack(spool, store, naming="assigned").failures == type(Summary().failures)()
    found = {file.data: (name, file.meta) for name, file in shown(store).files.items()}
    assert found[b"long"][0] == found[b"long"][1]["id"]
    assert found[b"long"][1]["original_name"] == "a." + "x" * 250
    assert found[b"odd"][0] == found[b"odd"][1]["id"] + ".ä b"
    assert found[b"none"][0] == found[b"none"][1]["id"]


def test_placement_and_order(spool: Path, store: Path) -> None:
    """DESIGN: a flat name is placed by its hash, one with directories by its directory's; a container's entries are in
    path order, the files of one directory side by side."""
    paths = [f"{folder}/{number}" for folder in ("x", "x/y", "x.z", "photos/2026") for number in range(5)]
    paths += [f"flat-{number}" for number in range(20)]
    for path in paths:
        write(spool / path, path.encode())
    assert pack(spool, store, shard_bits=2).files == len(paths)
    found = shown(store)
    assert found.contents == {path: path.encode() for path in paths}
    for path, file in found.files.items():
        shard = shard_hex(placement_shard(path, 2), 2)
        assert file.container.rpartition("/")[2] == f"{shard}-000001.des"
    for names in found.entries.values():
        assert names == sorted(names, key=lambda name: (name.rpartition("/")[0], name))


def test_empty_files_and_hard_links(spool: Path, store: Path) -> None:
    """An empty file is a file; each name of a file is one."""
    write(spool / "empty", b"")
    os.link(write(spool / "one", b"same"), spool / "d-two")
    assert pack(spool, store).files == 3
    assert shown(store).contents == {"empty": b"", "one": b"same", "d-two": b"same"}
    assert spool_files(spool) == []


def test_containers_are_cut(spool: Path, store: Path) -> None:
    """`--max-container-files`: one shard's files make several containers, of ascending generations."""
    for number in range(10):
        write(spool / f"d/{number}")
    summary = pack(spool, store, max_container_files=4)
    assert (summary.files, summary.containers) == (10, 3)
    assert sorted(map(len, shown(store).entries.values())) == [2, 4, 4]
    assert len(shown(store).contents) == 10


def test_batches(spool: Path, store: Path) -> None:
    """`--max-batch-files`: a large spool is packed in several goes."""
    for number in range(7):
        write(spool / f"d/{number}", b"%d" % number)
    assert pack(spool, store, max_batch_files=3).files == 7
    assert shown(store).contents == {f"d/{number}": b"%d" % number for number in range(7)}
    assert unfinished(spool) == []


# --- the store's layout ------------------------------------------------------------------------------------------


def test_the_layout_is_written_once_and_honoured(spool: Path, store: Path) -> None:
    """`.desfs.json` says how the names of a store are placed; later packers go by it."""
    write(spool / "a")
    pack(spool, store, shard_bits=6, naming="assigned")
    layout = store / ".desfs.json"
    found = json.loads(layout.read_bytes())
    assert re.fullmatch("[0-9a-f]{16}", found.pop("id"))
    assert found == {"shard_bits": 6, "placement": "directory", "naming": "assigned"}
    before = layout.stat()
    write(spool / "b")
    pack(spool, store)
    assert layout.stat() == before
    assert all(parse_name(name) for name in shown(store).files)
    assert {len(key.rpartition("/")[2].partition("-")[0]) for key in shown(store).containers} == {2}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--shard-bits", "5"), "has 4 shard bits, not 5"),
        (("--naming", "assigned"), "names its files by 'path', not by 'assigned'"),
    ],
)
def test_options_that_the_store_contradicts_are_refused(
    spool: Path, store: Path, option: tuple[str, str], message: str
) -> None:
    """A store has one layout: other options are a usage error, and nothing is packed."""
    pack(spool, store)
    write(spool / "a")
    done = once(spool, store, *option)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert spool_files(spool) == ["a"]


@pytest.mark.parametrize("key", ["2026-01-01/3f.des", "2026-01-01/shard_10.des", "2026-01-01.des", "old.des"])
def test_a_store_of_others_is_not_given_a_layout(spool: Path, store: Path, key: str) -> None:
    """What others have written follows rules that this packer does not know: without `.desfs.json`, readers ask every
    index."""
    write(store / key, b"a container of others")
    write(spool / "a", b"ours")
    assert pack(spool, store).files == 1
    assert not (store / ".desfs.json").exists()
    assert (store / key).read_bytes() == b"a container of others"


def test_a_layout_that_is_not_understood_is_refused(spool: Path, store: Path) -> None:
    """A packer does not guess where names go."""
    write(store / ".desfs.json", b'{"shard_bits": 4, "placement": "by colour", "naming": "path"}')
    done = once(spool, store)
    assert done.returncode == 2
    assert "a layout that this packer does not know" in done.stderr


# --- versions ----------------------------------------------------------------------------------------------------


def test_a_newer_version_wins(spool: Path, store: Path) -> None:
    """docs/semantics.md: Same name in several containers: the newest wins.

    Also for external files, of which both objects stay."""
    for version in (b"first", b"second", b"third"):
        write(spool / "d/file", version)
        write(spool / "d/big", version * 100)
        pack(spool, store, big_file_threshold=200)
    assert shown(store).contents == {"d/file": b"third", "d/big": b"third" * 100}
    assert len(shown(store).external) == 3


def test_external_files_where_a_folder_or_a_file_had_the_name(spool: Path, store: Path) -> None:
    """A directory cannot hold an object below another one's key: the later one gets a folder of its own."""
    write(spool / "a", b"a file" * 100)
    write(spool / "b/c", b"in a folder" * 100)
    pack(spool, store, big_file_threshold=200)
    write(spool / "a/b", b"below it" * 100)
    write(spool / "b", b"instead of it" * 100)
    assert not pack(spool, store, big_file_threshold=200).failures
    assert spool_files(spool) == unfinished(spool) == []
    assert len(shown(store).external) == 4
    # Where a file and a directory collide, the directory wins.
    assert shown(store).contents == {"a/b": b"below it" * 100, "b/c": b"in a folder" * 100}


def test_a_newer_version_that_comes_while_the_older_is_claimed(spool: Path, store: Path) -> None:
    """Both are packed, in their order, and the newer one is shown."""

    def effect(name: str) -> None:
        if name.startswith("build") and not done:
            done.append(name)
            write(spool / "d/file", b"newer")

    done: list[str] = []
    write(spool / "d/file", b"older")
    assert pack(spool, store, effect=effect).files == 2
    found = shown(store)
    assert found.contents == {"d/file": b"newer"}
    assert len([names for names in found.entries.values() if "d/file" in names]) == 2


def test_what_is_written_to_after_it_was_packed_is_packed_again(spool: Path, store: Path) -> None:
    """What a program writes to a claimed file, past all care, before it is deleted: the file goes back and is packed
    again."""

    def effect(name: str) -> None:
        if name.startswith("commit") and not done:
            done.append(name)
            (path,) = (spool / ".desfs/claims").glob("*/files/d/file")
            with open(path, "ab") as file:
                file.write(b" and more")

    done: list[str] = []
    write(spool / "d/file", b"some")
    assert not pack(spool, store, effect=effect).failures
    assert shown(store).contents["d/file"] == b"some and more"
    assert spool_files(spool) == unfinished(spool) == []


def test_a_file_that_changes_while_it_is_read_goes_back(spool: Path, store: Path) -> None:
    """docs/semantics.md: One that is written to while it is being packed goes back, and is packed again.

    It is packed whole in the next round; the others of its container are not held up."""

    def effect(name: str) -> None:
        if name.startswith("build") and not done:
            done.append(name)
            (path,) = (spool / ".desfs/claims").glob("*/files/d/changing")
            with open(path, "ab") as file:
                file.write(b", and more")

    done: list[str] = []
    write(spool / "d/changing", b"some")
    write(spool / "d/still", b"still")
    assert not pack(spool, store, effect=effect).failures
    found = shown(store)
    assert found.contents == {"d/changing": b"some, and more", "d/still": b"still"}
    assert sum("d/changing" in names for names in found.entries.values()) == 1
    assert spool_files(spool) == []
    assert {key: row.files for key, row in catalog_rows(spool).items()} == {
        key: len(names) for key, names in found.entries.items()
    }


def test_a_file_is_deleted_when_it_is_stored_and_committed_and_not_before(spool: Path, store: Path) -> None:
    """docs/semantics.md: A file is deleted only after its container is in the store and committed in the catalog."""
    deleted: list[str] = []

    def effect(name: str) -> None:
        if name.startswith("unlink "):
            path = name.removeprefix("unlink ")
            file = shown(store).files[path]
            assert file.data == path.encode() * 30
            assert file.container in catalog_rows(spool)
            deleted.append(path)

    paths = ["a", "d/b", "d/e/big one", "f/g"]
    for path in paths:
        write(spool / path, path.encode() * 30)
    assert not pack(spool, store, effect=effect, shard_bits=2, big_file_threshold=300).failures
    assert sorted(deleted) == paths
    assert spool_files(spool) == unfinished(spool) == []


# --- what the store does -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["503", "reset", "stall", "lost-answer"])
def test_a_store_that_fails_for_a_while(spool: Path, store: Path, word: str) -> None:
    """Throttled, reset, not answered: tried again, and each file is there once, in a container with its row."""
    for number in range(6):
        write(spool / f"d{number}/file", b"%d" % number)
    write(spool / "big", b"x" * 5000)
    faulty = FaultyStore(FileStore(store, create=True), "ok ok ok " + f"{word} ok " * 8 + "ok")
    summary = packer_on(spool, faulty, big_file_threshold=4096)
    assert not summary.failures
    assert sum(each == word for _, _, each in faulty.calls) >= 3
    found = shown(store)
    assert found.contents == {**{f"d{number}/file": b"%d" % number for number in range(6)}, "big": b"x" * 5000}
    assert set(catalog_rows(spool)) == set(found.containers)
    assert len(found.external) == 1
    assert spool_files(spool) == unfinished(spool) == []


@pytest.mark.parametrize("word", ["503", "lost-answer"])
def test_a_store_that_is_down_keeps_the_files_in_the_spool(spool: Path, store: Path, word: str) -> None:
    """After the deadline the packer says so; nothing is lost, and the next one packs it, once."""
    for number in range(3):
        write(spool / f"d{number}/file", b"%d" % number)
    faulty = FaultyStore(FileStore(store, create=True), f"ok ok ok {word}")
    with pytest.raises(Exception, match="scripted fault"):
        packer_on(spool, faulty, deadline_s=0.2)
    faulty.script = "ok"
    packer_on(spool, faulty)
    assert shown(store).contents == {f"d{number}/file": b"%d" % number for number in range(3)}
    assert spool_files(spool) == unfinished(spool) == []
    assert set(catalog_rows(spool)) == set(shown(store).containers)


def test_two_spools_with_catalogs_of_their_own_take_turns_with_keys(tmp_path: Path, store: Path) -> None:
    """A key that another spool's packer has taken is left to it: the next generation is used; nothing is lost or
    written over."""
    spools = [tmp_path / "one", tmp_path / "two"]
    for number in range(3):
        for name, spool in enumerate(spools):
            write(spool / f"d/{name}-{number}", b"%d %d" % (name, number))
            assert not pack(spool, store, shard_bits=1, node_id=name).failures
    found = shown(store)
    assert found.contents == {f"d/{name}-{number}": b"%d %d" % (name, number) for name in (0, 1) for number in range(3)}
    assert len(found.containers) == 6


@pytest.mark.parametrize("dies", [False, True])
def test_a_key_that_another_spool_takes_meanwhile(tmp_path: Path, store: Path, dies: bool) -> None:
    """Between plan and PUT another spool's packer puts a container under the same key. Also when this one dies there:
    its restart does not take the other's object for its own."""

    class Died(BaseException):
        pass

    def effect(name: str) -> None:
        if name.startswith("put") and not done:
            done.append(name)
            assert once(tmp_path / "two", store, "--node-id", "1").returncode == 0
            if dies:
                raise Died

    done: list[str] = []
    write(tmp_path / "one/d/ours", b"ours")
    write(tmp_path / "two/d/theirs", b"theirs")
    with contextlib.suppress(Died):
        pack(tmp_path / "one", store, effect=effect)
    assert done
    pack(tmp_path / "one", store)
    found = shown(store)
    assert found.contents == {"d/ours": b"ours", "d/theirs": b"theirs"}
    assert len(found.containers) == 2
    assert set(catalog_rows(tmp_path / "one")) | set(catalog_rows(tmp_path / "two")) == set(found.containers)
    assert unfinished(tmp_path / "one") == []


def test_a_file_that_was_left_out_is_not_deleted_with_the_others(spool: Path, store: Path) -> None:
    """A packer that dies after the PUT of a container without a file that somebody had opened for writing: the file
    is not in it, and is not deleted with those that are."""

    class Died(BaseException):
        pass

    held: list[int] = []

    def effect(name: str) -> None:
        if name.startswith("build"):
            (path,) = (spool / ".desfs/claims").glob("*/files/d/opened")
            held.append(os.open(path, os.O_WRONLY))  # opened, not changed
        if name.startswith("commit"):
            raise Died

    write(spool / "d/opened", b"opened")
    write(spool / "d/other", b"other")
    with pytest.raises(Died):
        pack(spool, store, effect=effect)
    os.close(held[0])
    pack(spool, store)
    assert shown(store).contents == {"d/opened": b"opened", "d/other": b"other"}
    assert spool_files(spool) == unfinished(spool) == []


@pytest.mark.parametrize("script", ["ok ok ok 503", "ok ok 503"], ids=["at a PUT", "before it"])
def test_failed_rounds_do_not_fill_the_disk(spool: Path, store: Path, script: str) -> None:
    """Containers that could not be put are built anew in the next round: none is kept."""
    for number in range(3):
        write(spool / f"d{number}/file", b"%d" % number)
    write(spool / "big", b"x" * 5000)
    faulty = FaultyStore(FileStore(store, create=True))
    for _ in range(3):
        faulty.script = script
        with pytest.raises(StoreError, match="scripted fault"):
            packer_on(spool, faulty, deadline_s=0.1, big_file_threshold=4096)
        assert not [name for name in unfinished(spool) if "/.desfs/work/" in name]
    faulty.script = "ok"
    assert packer_on(spool, faulty, big_file_threshold=4096).files == 4
    assert len(shown(store).contents) == 4
    assert spool_files(spool) == unfinished(spool) == []


def test_a_damaged_journal_stops_its_own_batch_alone(spool: Path, store: Path) -> None:
    """What a disk has damaged stays where it is, and is named; other batches, and new files, are packed."""
    for batch in ("1-damaged", "2-sound"):
        write(spool / ".desfs/claims" / batch / f"files/d/{batch}", batch.encode())
    damaged = write(spool / ".desfs/claims/1-damaged/journal.json", b'{"version":1,"containers":[{"key')
    write(spool / "d/new", b"new")
    done = once(spool, store)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "1-damaged stays in .desfs" in done.stderr
    assert str(damaged) in done.stderr
    assert shown(store).contents == {"d/2-sound": b"2-sound", "d/new": b"new"}
    assert (spool / ".desfs/claims/1-damaged/files/d/1-damaged").read_bytes() == b"1-damaged"
    assert damaged.exists()
    damaged.unlink()
    assert not pack(spool, store).failures
    assert shown(store).contents["d/1-damaged"] == b"1-damaged"


# --- what cannot be read -----------------------------------------------------------------------------------------


def tampered(spool: Path, store: Path, path: str, inject: str) -> subprocess.CompletedProcess[str]:
    """`packer --once` over a batch that is claimed already, of which read(2) of one file answers otherwise."""
    claimed = spool / ".desfs/claims/1-earlier/files" / path
    command = ["strace", "-f", "-qq", "-o", os.devnull, "-P", claimed, "-e", f"inject=read:{inject}"]
    packer = [PROGRAM, "packer", "--once", "--spool", spool, "--store", store, "--settle", "0", "--shard-bits", "1"]
    return subprocess.run(
        [*map(str, command), *map(str, packer)], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


SIZES = pytest.mark.parametrize("size", [1000, 6 * 1024 * 1024], ids=["in memory", "streamed"])


@SIZES
def test_a_file_that_cannot_be_read_is_put_aside_and_the_others_go_on(spool: Path, store: Path, size: int) -> None:
    """A disk's EIO in one file: it is put aside with the reason, nothing of it is in the container."""
    for name in ("a", "bad", "z"):
        write(spool / f".desfs/claims/1-earlier/files/d/{name}", name.encode() * size)
    done = tampered(spool, store, "d/bad", f"error=EIO:when={2 if size > 1000 else 1}+")
    assert done.returncode == 0, done.stderr
    assert "1 put aside in .desfs/rejected" in done.stdout
    assert rejected(spool) == {"bad": f"d/bad: cannot be read: {os.strerror(errno.EIO)}\n"}
    assert shown(store).contents == {"d/a": b"a" * size, "d/z": b"z" * size}
    assert spool_files(spool) == unfinished(spool) == []


@SIZES
def test_a_file_that_gets_shorter_while_it_is_read_is_packed_in_the_next_round(
    spool: Path, store: Path, size: int
) -> None:
    """Where the file system has no leases, nothing keeps a program from truncating a file while it is streamed."""
    for name in ("a", "short", "z"):
        write(spool / f".desfs/claims/1-earlier/files/d/{name}", name.encode() * size)
    done = tampered(spool, store, "d/short", f"retval=0:when={2 if size > 1000 else 1}+")
    assert (done.returncode, done.stderr) == (0, "")
    found = shown(store)
    assert found.contents == {f"d/{name}": name.encode() * size for name in ("a", "short", "z")}
    assert sorted(map(len, found.entries.values())) == [1, 2]
    assert rejected(spool) == {}
    assert spool_files(spool) == unfinished(spool) == []


@pytest.mark.parametrize("others", [True, False])
def test_a_claimed_file_that_went_away_does_not_stop_the_others(spool: Path, store: Path, others: bool) -> None:
    def effect(name: str) -> None:
        if name.startswith("build"):
            for path in (spool / ".desfs/claims").glob("*/files/d/gone"):
                path.unlink()

    for name in ("a", "gone", "z") if others else ("gone",):
        write(spool / "d" / name, name.encode())
    assert not pack(spool, store, effect=effect).failures
    assert shown(store).contents == ({"d/a": b"a", "d/z": b"z"} if others else {})
    assert spool_files(spool) == unfinished(spool) == []


class Failing:
    """A source that gives some bytes and then an error."""

    def __init__(self, good: int) -> None:
        self._left = good

    def read(self, size: int) -> bytes:
        if not self._left:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._left -= min(size, self._left)
        return b"x" * size


def test_what_cannot_be_read_is_told_from_what_cannot_be_written(tmp_path: Path) -> None:
    """The container goes on without a file that fails in the middle; a full disk would end it."""
    with DesWriter(tmp_path / "c.des") as writer:
        writer.add_file("before", b"before")
        with pytest.raises(FileUnreadable, match=os.strerror(errno.EIO)):
            writer.add_stream("bad", Checksums(Failing(2_000_000)), 3_000_000)
        writer.add_file("after", b"after")
    with DesReader(tmp_path / "c.des") as reader:
        assert reader.get_files_batch(reader.list_files()) == {"before": b"before", "after": b"after"}


# --- what cannot be stored ---------------------------------------------------------------------------------------


def test_what_cannot_be_stored_is_put_aside_and_the_others_go_on(spool: Path, store: Path) -> None:
    """docs/semantics.md: Symbolic links, FIFOs, sockets, devices, and files whose name or size cannot be stored are put
    aside into `.desfs/rejected/`, each with its reason.

    Also what lies below a name that is not UTF-8."""
    write(spool / "good/a", b"a")
    bad = Path(os.fsdecode(os.fsencode(spool) + b"/bad-\xff"))
    write(bad / "inside", b"below a name that is not UTF-8")
    write(spool / "good/large", b"x" * 11)
    (spool / "good/link").symlink_to("a")
    os.mkfifo(spool / "fifo")
    os.mknod(spool / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(spool / "socket"))
    done = once(spool, store, "--max-file-size", "10")
    assert done.returncode == 0, done.stderr
    assert "6 put aside in .desfs/rejected" in done.stdout
    reasons = rejected(spool)
    said = {
        "inside": "not UTF-8",
        "large": "11 bytes, more than the 10",
        "link": "a symbolic link",
        "fifo": "a FIFO",
        "socket": "a socket",
        "null": "a character device",
    }
    assert reasons.keys() == said.keys()
    assert [name for name, reason in said.items() if reason not in reasons[name]] == []
    assert shown(store).contents == {"good/a": b"a"}
    assert spool_files(spool) == []


def test_a_packer_that_is_not_root() -> None:
    """docs/semantics.md: So are files that the packer may not read.

    One of another user, whose writers it cannot see, and a folder of others that it can change nothing in are named,
    and the exit status says so; the others go on."""
    nobody = 65534
    # Not below tmp_path, which is root's alone; forked, because a user may not be able to run what root has installed.
    with tempfile.TemporaryDirectory() as folder, packer_forks() as forks:
        os.chmod(folder, 0o755)
        spool, store = Path(folder) / "spool", Path(folder) / "store"
        spool.mkdir()
        store.mkdir()
        write(spool / "good", b"good")
        write(spool / "mine", b"mine").chmod(0o000)
        write(spool / "roots", b"root's, and readable")
        for path in (spool, store, spool / "good", spool / "mine"):
            os.chown(path, nobody, nobody)
        done = forks.run(spool, str(store), uid=nobody, settle=0, log_level="error")
        assert done.status == 1
        assert "roots: whether a writer holds it open cannot be told" in done.message
        assert (spool / "roots").read_bytes() == b"root's, and readable"
        assert rejected(spool) == {"mine": "mine: cannot be taken: Permission denied\n"}
        assert shown(store).contents == {"good": b"good"}
        (spool / "closed").mkdir(mode=0o700)
        write(spool / "roots folder/a", b"a")
        os.chown(write(spool / "later", b"later"), nobody, nobody)
        done = forks.run(spool, str(store), uid=nobody, settle=0, log_level="error")
        assert done.status == 1
        assert "roots folder/a: whether a writer holds it open cannot be told" in done.message
        assert "closed: cannot be read: Permission denied" in done.message
        assert shown(store).contents["later"] == b"later"


def test_a_path_that_is_too_long_does_not_stop_the_others(spool: Path, store: Path) -> None:
    """A path that no container can hold is put aside from where it gets too long."""
    descriptor = os.open(spool, os.O_RDONLY)
    for _ in range(25):
        os.mkdir("d" * 200, dir_fd=descriptor)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
    os.close(descriptor)
    write(spool / "good", b"good")
    try:
        summary = pack(spool, store)
        assert summary.rejected == 1
        assert not summary.failures
        assert shown(store).contents == {"good": b"good"}
        assert spool_files(spool) == []
    finally:
        subprocess.run(["rm", "-rf", spool], check=True)  # Python's own rmtree stops at the length of a path


# --- the command -------------------------------------------------------------------------------------------------


def test_the_summary_line_of_once(spool: Path, store: Path) -> None:
    """`--once` ends with one line that says what was done, and what was left and why; without a terminal there is no
    progress bar."""
    write(spool / "a", b"12345")
    write(spool / "b.tmp", b"")
    write(spool / "big", b"x" * 2000)
    with open(write(spool / "open", b""), "ab"):
        done = once(spool, store, "--big-file-threshold", "1K", "--shard-bits", "1")
    assert done.returncode == 0
    containers = len(shown(store).containers)
    assert done.stdout == (
        f"packed 2 files (2005 bytes) into {containers} containers with {containers + 2} PUTs; "
        "1 of them stored as objects of their own; 1 left: with a temporary name; "
        "1 left: held open by a writer, or not ours to take\n"
    )
    assert done.stderr == ""
    assert sorted(spool_files(spool)) == ["b.tmp", "open"]


def test_a_terminal_shows_progress(spool: Path, store: Path) -> None:
    """Progress is shown on a terminal."""
    write(spool / "a")
    leader, follower = pty.openpty()
    try:
        command = [str(PROGRAM), "packer", "--once", "--spool", str(spool), "--store", str(store), "--settle", "0"]
        environ = {**os.environ, "TERM": "xterm"}
        process = subprocess.run(
            command, stderr=follower, stdout=subprocess.PIPE, env=environ, timeout=PATIENCE_S, check=False
        )
        os.close(follower)
        follower = -1
        written = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while piece := os.read(leader, 65536):
                written += piece
    finally:
        os.close(leader)
        if follower >= 0:
            os.close(follower)
    assert process.returncode == 0
    assert process.stdout.startswith(b"packed 1 files")
    assert b"packing" in written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--settle", "-1"), "--settle: "),
        (("--naming", "colour"), "--naming: "),
        (("--shard-bits", "33"), "--shard-bits: "),
        (("--max-container-bytes", "many"), "--max-container-bytes: "),
    ],
)
def test_options_that_make_no_sense(spool: Path, store: Path, options: tuple[str, str], message: str) -> None:
    """Exit status 2 and one line that names the option."""
    done = once(spool, store, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_variable_that_makes_no_sense_is_named(spool: Path, store: Path) -> None:
    """A setting of the environment is named as such: nobody gave an option."""
    for name, value in (("DESFS_SETTLE", "soon"), ("DESFS_MAX_CONTAINER_FILES", "0")):
        done = desfs("packer", "--once", "--spool", spool, "--store", store, env={**os.environ, name: value})
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"desfs: {name} in the environment: ")
        assert len(done.stderr.splitlines()) == 1


def test_temporary_names_are_a_setting(spool: Path, store: Path) -> None:
    """`--temporary`: patterns of names whose owner will rename them, instead of the usual ones."""
    for name in ("a.wip", "~b", "c.tmp", "d"):
        write(spool / name, name.encode())
    done = once(spool, store, "--temporary", "*.wip, ~*,")
    assert done.returncode == 0, done.stderr
    assert "2 left: with a temporary name" in done.stdout
    assert shown(store).contents == {"c.tmp": b"c.tmp", "d": b"d"}
    assert pack(spool, store, temporary="").files == 2


def test_a_name_that_is_not_utf_8_can_be_logged(spool: Path, store: Path, tmp_path: Path) -> None:
    """The log says what became of it, and nothing else is printed."""
    write(Path(os.fsdecode(os.fsencode(spool) + b"/bad-\xff")))
    log = tmp_path / "the.log"
    done = once(spool, store, env={**os.environ, "DESFS_LOG_FILE": str(log)})
    assert (done.returncode, done.stderr) == (0, "")
    assert "bad-\\udcff" in log.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "given", ["{spool}", "{spool}/store", "{spool}/.desfs/store", "{link}/store", "file://{spool}/a"]
)
def test_a_store_inside_the_spool_is_refused(spool: Path, tmp_path: Path, given: str) -> None:
    """Its containers would be packed into containers, without end: also behind a symbolic link."""
    write(spool / "a/file")
    (tmp_path / "link").symlink_to(spool / "a")
    url = given.format(spool=spool, link=tmp_path / "link")
    with pytest.raises(UsageError, match="is inside the spool"):
        run_packer(str(spool), url, PackerSettings(settle=0), once=True)
    assert spool_files(spool) == ["a", "a/file"]


def test_a_store_inside_a_spool_that_is_a_link_is_a_usage_error(spool: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(spool)
    write(spool / "file")
    done = once(tmp_path / "link", spool / "store")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"desfs: the store {spool}/store is inside the spool {tmp_path}/link: ")
    assert spool_files(spool) == ["file"]


def test_a_spool_inside_a_store_is_nobodys_harm(store: Path) -> None:
    """Only the other way round is without end."""
    write(store / "incoming/file", b"content")
    assert not pack(store / "incoming", store).failures
    assert shown(store).contents == {"file": b"content"}


def test_a_spool_that_is_not_there(tmp_path: Path, store: Path) -> None:
    """Exit status 2, and the store is not touched."""
    done = once(tmp_path / "missing", store)
    assert done.returncode == 2
    assert "is no directory" in done.stderr
    assert not store.exists()


def test_a_second_packer_ends_and_says_why(spool: Path, store: Path) -> None:
    """docs/semantics.md: One packer works in a spool at a time, unless all that do share a catalog (`--catalog`).

    The second ends with status 2 and names the cause."""
    with spool_lock(spool):
        done = once(spool, store)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"desfs: spool {spool}: another packer is at work in it\n"
    assert once(spool, store).returncode == 0


@contextlib.contextmanager
def spool_lock(spool: Path) -> Iterator[None]:
    opened = Spool(spool)
    opened.join()
    try:
        yield
    finally:
        opened.leave()


@contextlib.contextmanager
def running_packer(spool: Path, store: object, *options: object) -> Iterator[subprocess.Popen[str]]:
    """`desfs packer` without --once; killed at the end if it is still there."""
    command = ["packer", "--spool", spool, "--store", store, *options]
    with subprocess.Popen(
        [str(PROGRAM), *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_running_packer_after_its_batch(spool: Path, store: Path, number: signal.Signals) -> None:
    """SIGTERM and SIGINT end a packer when the batch at hand is done: status 0, and nothing half done is left."""
    for index in range(300):
        write(spool / f"{index % 5}/{index}", b"%d" % index)
    options = ("--settle", "0", "--max-age", "0", "--scan-interval", "0.05", "--max-batch-files", "100")
    with running_packer(spool, store, *options) as packer:
        wait_until(lambda: any((spool / ".desfs/claims").glob("*/*")))
        packer.send_signal(number)
        output, errors = packer.communicate(timeout=PATIENCE_S)
    assert packer.returncode == 0, errors
    assert output.startswith("packed ")
    assert unfinished(spool) == []
    files = shown(store).contents if store.exists() else {}
    left = {path for path in spool_files(spool) if (spool / path).is_file()}
    assert {*files, *left} == {f"{index % 5}/{index}" for index in range(300)}
    assert not left & set(files)


STUCK = """
import sys, threading
from desfs.packer.run import run_packer
from desfs.settings import PackerSettings

def effect(name):
    if name.startswith("build"):
        print(name, flush=True)
        threading.Event().wait()

run_packer(*sys.argv[1:], PackerSettings(settle=0), once=True, effect=effect)
"""


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_packer_at_once(
    spool: Path, store: Path, first: signal.Signals, second: signal.Signals
) -> None:
    """A packer whose batch does not come to its end, because a disk or a store hangs, ends at the second signal; the
    next one does what was left."""
    for number in range(3):
        write(spool / f"d{number}/file", b"%d" % number)
    process = subprocess.Popen([sys.executable, "-c", STUCK, spool, store], stdout=subprocess.PIPE, text=True)
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("build")
            process.send_signal(first)
            wait_until(lambda: not handles(process.pid, first))
            assert process.poll() is None  # the first lets it end its batch
            process.send_signal(second)
            assert process.wait(PATIENCE_S) == -second
        finally:
            process.kill()
    assert len(unfinished(spool)) >= 3
    assert not pack(spool, store).failures
    assert shown(store).contents == {f"d{number}/file": b"%d" % number for number in range(3)}
    assert spool_files(spool) == unfinished(spool) == []


def handles(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal: proc(5), SigCgt."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.findall(r"^SigCgt:\t(\w+)$", status, re.MULTILINE)[0], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("program", ["rsync", "cp"])
def test_programs_that_copy_into_a_live_spool(spool: Path, store: Path, tmp_path: Path, program: str) -> None:
    """README: any program writes into the spool with ordinary calls, while the packer works: each file is there once,
    with its bytes, its mode and its time."""
    source = tmp_path / "tree"
    for index in range(400):
        folder = f"{index % 3}/deeper {index % 7}" if index % 4 == 0 else f"{index % 5}"
        path = write(source / folder / f"{'.' * (index % 9 == 0)}{index}", os.urandom(index * 13))
        os.utime(path, (0, 1_600_000_000 + index))
        path.chmod(0o640)
    for made in source.rglob("*"):
        if made.is_dir():
            os.utime(made, (0, 1_500_000_000))
    commands = {
        "rsync": ["rsync", "-a", "--bwlimit=400", f"{source}/", f"{spool}/tree"],
        "cp": ["cp", "-rp", f"{source}", f"{spool}/tree"],
    }
    options = ("--settle", "0.2", "--max-age", "0.5", "--scan-interval", "0.05")
    with running_packer(spool, store, *options) as packer:
        wait_until((spool / ".desfs/catalog.sqlite").exists)
        copied = subprocess.run(commands[program], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert copied.returncode == 0, copied.stderr
        wait_until(lambda: spool_files(spool) == [] and unfinished(spool) == [])
        packer.terminate()
        _, errors = packer.communicate(timeout=PATIENCE_S)
    assert packer.returncode == 0
    assert all("[info " in line for line in errors.splitlines()), errors
    expected = {path for path in source.rglob("*") if path.is_file()}
    found = shown(store).files
    assert {name: file.data for name, file in found.items()} == {
        f"tree/{path.relative_to(source)}": path.read_bytes() for path in expected
    }
    for path in expected:
        meta = found[f"tree/{path.relative_to(source)}"].meta
        assert (meta["mode"], meta["mtime"]) == (0o640, int(path.stat().st_mtime))


def test_a_writer_that_holds_its_file_open_for_long(spool: Path, store: Path) -> None:
    """docs/semantics.md: As long as somebody has it open for writing, it is not.

    A running packer leaves a file alone while a program has it open, and takes it whole when it is closed."""
    options = ("--settle", "0.05", "--max-age", "0", "--scan-interval", "0.05")
    with running_packer(spool, store, *options) as packer, open(spool / "open", "wb") as writer:
        writer.write(b"first half, ")
        writer.flush()
        write(spool / "other", b"other")
        wait_until(lambda: store.exists() and "other" in shown(store).contents)
        assert "open" not in shown(store).contents
        writer.write(b"second half")
        writer.close()
        wait_until(lambda: "open" in shown(store).contents)
        packer.terminate()
        packer.communicate(timeout=PATIENCE_S)
    assert shown(store).contents["open"] == b"first half, second half"


def test_folders_that_the_packer_did_not_empty_stay(spool: Path, store: Path) -> None:
    """docs/semantics.md: Empty directories of others stay.

    What a program has made and not used yet is there when it comes back to it."""
    (spool / "made/for/later").mkdir(parents=True)
    write(spool / "used/a/file")
    (spool / "used/b").mkdir()
    pack(spool, store)
    assert spool_files(spool) == ["made", "made/for", "made/for/later", "used", "used/b"]


# --- a full disk -------------------------------------------------------------------------------------------------


@pytest.mark.fuse  # needs root, to mount
def test_a_full_disk_under_the_spool(tmp_path: Path) -> None:
    """The spool's disk is full while containers are built: a clear error, nothing lost; with room it works."""
    disk, store = tmp_path / "disk", tmp_path / "store"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True)
    try:
        spool = disk / "spool"
        spool.mkdir()
        written = {f"{index}": os.urandom(1_000_000) for index in range(4)}
        for path, content in written.items():
            write(spool / path, content)
        (disk / "ballast").write_bytes(bytes(3_500_000))
        done = once(spool, store, "--shard-bits", "1")
        assert done.returncode == 1, done.stdout
        assert os.strerror(errno.ENOSPC) in done.stderr
        assert "Traceback" not in done.stderr
        (disk / "ballast").unlink()
        done = once(spool, store)
        assert done.returncode == 0, done.stderr
        assert shown(store).contents == written
        assert spool_files(spool) == unfinished(spool) == []
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_the_catalog_of_a_spool_is_private_to_it(spool: Path, store: Path) -> None:
    """What lies in `.desfs` is not packed, and a spool can be moved."""
    write(spool / "a", b"one")
    pack(spool, store)
    moved = Path(shutil.move(spool, spool.with_name("moved")))
    write(moved / "b", b"two")
    pack(moved, store)
    assert shown(store).contents == {"a": b"one", "b": b"two"}
    assert stat.S_ISREG((moved / ".desfs/catalog.sqlite").stat().st_mode)
