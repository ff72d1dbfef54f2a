"""`desfs import`: a directory, a tar or a zip file into a store, and out of it again."""

from __future__ import annotations

import io
import itertools
import json
import os
import pty
import random
import signal
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from hashlib import sha256
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

from desfs.cli.imports import describe, run
from desfs.errors import UsageError
from desfs.imports.run import Summary, choose_day, run_import
from desfs.settings import ImportSettings
from desfs.store import Store, open_store
from tests import servers
from tests.crash import PROGRAM, Shown
from tests.mount.mounting import desfs, mounted

MIB = 1024 * 1024
DAY = "2026-11-20"
# Whole, even seconds: what a zip file can hold of a time.
SECONDS = 1_772_600_768


@dataclass(frozen=True)
class Sent:
    """A store in use: its URL and the variables that a program needs to reach it."""

    url: str
    env: dict[str, str]

    def open(self) -> Store:
        return open_store(self.url)

    def shown(self) -> Shown:
        store = self.open()
        try:
            return Shown.of(store)
        finally:
            store.close()


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.s3)])
def sent(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sent]:
    """An empty store of either kind, which this process reaches too."""
    if request.param == "file":
        yield Sent((tmp_path / "store").as_uri(), {})
        return
    server: servers.S3Server = request.getfixturevalue("s3")
    for name, value in server.environ().items():
        monkeypatch.setenv(name, value)
    bucket = server.new_bucket("import")
    try:
        yield Sent(f"s3://{bucket}/some/prefix", server.environ())
    finally:
        server.delete_bucket(bucket)


@pytest.fixture
def store(tmp_path: Path) -> Sent:
    """An empty store in a directory."""
    return Sent((tmp_path / "store").as_uri(), {})


def put_in(
    sent: Sent, *paths: Path, day: str | None = DAY, day_from: str | None = None, effect: Any = None, **settings: Any
) -> Summary:
    """Import within this process."""
    summary = Summary()
    days = choose_day(day if day_from is None else None, day_from, settings.get("timezone", "UTC"))
    run_import(
        [str(path) for path in paths],
        sent.url,
        ImportSettings(**settings),
        days,
        summary,
        effect=effect or (lambda name: None),
    )
    return summary


def tree_of(root: Path, seed: int = 1) -> dict[str, bytes]:
    """A tree with files of many sizes, names, times and modes."""
    seeded = random.Random(seed)
    contents = {}
    for index in range(60):
        names = [f"folder {index % 5}", f"ä{index % 3}", f".{index}" if index % 3 == 0 else f"{index} & more.txt"]
        path = root.joinpath(*names[index % 3 :])
        path.parent.mkdir(parents=True, exist_ok=True)
        content = seeded.randbytes(seeded.choice([0, 1, 100, 5000, 70_000]))
        path.write_bytes(content)
        os.utime(path, ns=(0, (SECONDS + 2 * index) * 10**9))
        path.chmod(seeded.choice([0o644, 0o600, 0o755, 0o444]))
        contents[str(path.relative_to(root))] = content
    return contents


def snapshot(root: Path) -> dict[str, tuple[bytes, int, int]]:
    """Contents, times and permission bits of the files below a directory."""
    return {
        str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns, stat.S_IMODE(path.stat().st_mode))
        for path in root.rglob("*")
        if path.is_file()
    }


def packed_as(kind: str, root: Path, target: Path) -> Path:
    """A source made of a tree: the tree itself, or an archive of it, made by the usual program."""
    if kind == "directory":
        return root
    if kind == "zip":
        with zipfile.ZipFile(target / "x.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
            for path in sorted(root.rglob("*")):
                zipped.write(path, path.relative_to(root))
        return target / "x.zip"
    flags = {"tar": "", "tar.gz": "z", "tar.xz": "J", "tar.bz2": "j"}
    command = ["tar", f"-c{flags[kind]}f", target / f"x.{kind}", "--format=posix", "-C", root, "."]
    subprocess.run([str(word) for word in command], check=True)
    return target / f"x.{kind}"


# --- in and out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["directory", "tar", "zip"])
@pytest.mark.parametrize("sent", [pytest.param("s3", marks=pytest.mark.s3)], indirect=True)
def test_what_is_imported_is_extracted(kind: str, sent: Sent, tmp_path: Path) -> None:
    """`desfs import`, then `desfs extract`, gives the source back: contents, times and modes."""
    contents = tree_of(tmp_path / "tree")
    source = packed_as(kind, tmp_path / "tree", tmp_path)
    done = desfs("import", "--store", sent.url, "--day", DAY, "--big-file-threshold", "64K", source, env=sent.env)
    assert (done.returncode, done.stderr) == (0, "")
    size = sum(map(len, contents.values()))
    big = sum(len(content) >= 65_536 for content in contents.values())
    assert done.stdout.startswith(f"imported 60 files ({size} bytes) into ")
    assert f"; {big} of them stored as objects of their own" in done.stdout
    out = desfs("extract", "--to", tmp_path / "out", sent.url, env=sent.env)
    assert (out.returncode, out.stderr) == (0, "")
    assert snapshot(tmp_path / "out" / DAY) == snapshot(tmp_path / "tree")


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.xz", "tar.bz2"])
def test_compressions(kind: str, store: Sent, tmp_path: Path) -> None:
    """However a tar is compressed, its members and their times come out."""
    contents = tree_of(tmp_path / "tree")
    os.utime(tmp_path / "tree/folder 0/ä0/.0", ns=(0, SECONDS * 10**9 + 123_456_789))
    summary = put_in(store, packed_as(kind, tmp_path / "tree", tmp_path), big_file_threshold=65_536)
    assert summary.report.refused == 0
    shown = store.shown()
    assert shown.contents == contents
    assert shown.files["folder 0/ä0/.0"].meta["mtime"] == pytest.approx(SECONDS + 0.123456789)


@pytest.mark.fuse
def test_through_a_mount(store: Sent, tmp_path: Path) -> None:
    """`diff -r` and `rsync` find no difference between a directory and the mount of what was imported."""
    tree_of(tmp_path / "tree")
    os.utime(tmp_path / "tree/folder 0/ä0/.0", ns=(0, SECONDS * 10**9 + 123_456_789))
    put_in(store, tmp_path / "tree", big_file_threshold=65_536, max_container_files=7)
    with mounted(store.url, tmp_path / "mnt") as mount:
        day = mount / DAY
        subprocess.run(["diff", "-r", tmp_path / "tree", day], check=True)
        rsync = ["rsync", "-rnt", "--itemize-changes", "--omit-dir-times", f"{tmp_path}/tree/", f"{day}/"]
        assert subprocess.run(rsync, capture_output=True, check=True).stdout == b""
        assert snapshot(day) == snapshot(tmp_path / "tree")


def test_metadata_is_the_packers(store: Sent, tmp_path: Path) -> None:
    """DES_V1.md, Metadata: time with all its digits, permission bits, both checksums, in the packer's order; an
    imported file has no assigned name."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/a").write_bytes(b"content")
    (tmp_path / "tree/a").chmod(0o4750)
    os.utime(tmp_path / "tree/a", ns=(0, SECONDS * 10**9 + 123_456_789))
    put_in(store, tmp_path / "tree", shard_bits=1)
    crc32c = google_crc32c.value(b"content")
    (container,) = (tmp_path / "store" / DAY).glob("*.des")
    expected = (
        f'{{"mtime":{Decimal(SECONDS * 10**9 + 123_456_789).scaleb(-9)},"mode":{0o4750},'
        f'"sha256":"{sha256(b"content").hexdigest()}","crc32c":"{crc32c:08x}","size":7}}'
    )
    assert expected.encode() in container.read_bytes()


def test_a_store_gets_a_layout_and_keeps_it(store: Sent, tmp_path: Path) -> None:
    """A new store is laid out as a packer would; an import into an old one follows what is there."""
    tree_of(tmp_path / "tree")
    put_in(store, tmp_path / "tree", shard_bits=2)
    layout = json.loads((tmp_path / "store/.desfs.json").read_text())
    assert len(layout.pop("id")) == 16
    assert layout == {"shard_bits": 2, "placement": "directory", "naming": "path"}
    put_in(store, tmp_path / "tree")
    assert {path.name[:2] for path in (tmp_path / "store" / DAY).glob("*.des")} <= {"0-", "1-", "2-", "3-"}
    with pytest.raises(UsageError, match="2 shard bits, not 3"):
        put_in(store, tmp_path / "tree", shard_bits=3)


def test_files_lie_in_path_order_and_containers_are_cut(store: Sent, tmp_path: Path) -> None:
    """`--max-container-files` and `--max-container-bytes` say where a container ends; the files of a directory stand
    side by side."""
    tree = tmp_path / "tree"
    for number in range(10):
        (tree / f"{number % 2}").mkdir(parents=True, exist_ok=True)
        (tree / f"{number % 2}/{number}").write_bytes(b"x" * 10)
    summary = put_in(store, tree, shard_bits=1, max_container_files=4)
    shown = store.shown()
    assert all(names == sorted(names) and len(names) <= 4 for names in shown.entries.values())
    assert sorted(itertools.chain(*shown.entries.values())) == sorted(f"{n % 2}/{n}" for n in range(10))
    assert summary.containers == len(shown.containers)
    put_in(store, tree, max_container_bytes=30)
    added = store.shown().entries.keys() - shown.entries.keys()
    assert all(len(store.shown().entries[key]) <= 3 for key in added)


# --- days ------------------------------------------------------------------------------------------------------------


def test_the_day_of_each_files_time(store: Sent, tmp_path: Path) -> None:
    """`--day-from mtime`: the day is that of the time in `timezone`; a file of one name in two days is two files."""
    tree, other = tmp_path / "tree", tmp_path / "other"
    for root, moment in ((tree, datetime(2026, 3, 4, 23, 30, tzinfo=UTC)), (other, datetime(2026, 3, 6, tzinfo=UTC))):
        root.mkdir()
        (root / "same").write_bytes(root.name.encode())
        os.utime(root / "same", ns=(0, int(moment.timestamp()) * 10**9))
    summary = put_in(store, tree, other, day_from="mtime", timezone="Europe/Berlin")
    assert sorted(map(str, summary.days)) == ["2026-03-05", "2026-03-06"]
    assert summary.report.replaced == 0
    days = {key.partition("/")[0] for key in (info.key for info in store.open().list("2026").objects)}
    assert days == {"2026-03-05", "2026-03-06"}


def test_a_time_without_a_day(store: Sent, tmp_path: Path) -> None:
    """Of a time that no calendar has, there is no day: the file is refused, and without `--day-from` imported."""
    path = tmp_path / "x.tar"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, mtime in (("never", "nan"), ("once", f"{SECONDS}.5")):
            info = tarfile.TarInfo(name)
            info.pax_headers = {"mtime": mtime}
            tar.addfile(info)
    path.write_bytes(buffer.getvalue())
    summary = put_in(store, path, day_from="mtime")
    assert (summary.files, summary.report.refused) == (1, 1)
    assert "'never': its modification time is not known" in summary.report.failures[0]
    assert put_in(store, path).files == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"day": "2026-11-31"}, "--day: found '2026-11-31', want a date such as 2026-11-20"),
        ({"day": "yesterday"}, "--day: found 'yesterday'"),
        ({"day_from": "ctime"}, "--day-from: found 'ctime', want mtime"),
        ({"day": DAY, "day_from": "mtime"}, "--day and --day-from exclude each other"),
        ({"timezone": "Mars/Olympus"}, "--timezone: 'Mars/Olympus' is no name of the time zone database"),
        ({"big_file_threshold": "0"}, "--big-file-threshold: "),
        ({"max_container_bytes": "many"}, "--max-container-bytes: 'many' is no size"),
    ],
)
def test_options_that_make_no_sense(
    options: dict[str, str], message: str, store: Sent, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names the option, exit status 2, and nothing is made."""
    days = {"day": None, "day_from": None} | {name: options[name] for name in options.keys() & {"day", "day_from"}}
    given = {name: value for name, value in options.items() if name not in days}
    assert run(store.url, [f"{tmp_path}"], given, **days, json=False) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"desfs: {message}")
    assert said.err.count("\n") == 1
    assert not (tmp_path / "store").exists()


def test_a_store_of_assigned_names_is_refused(store: Sent, tmp_path: Path) -> None:
    """Ids come from the assignment service, which imports do not have."""
    layout = {"shard_bits": 4, "placement": "directory", "naming": "assigned"}
    store_dir = tmp_path / "store"
    store_dir.mkdir()
    (store_dir / ".desfs.json").write_text(json.dumps(layout))
    (tmp_path / "a").write_bytes(b"a")
    with pytest.raises(UsageError, match="names its files by assigned ids"):
        put_in(store, tmp_path / "a")


def test_a_store_inside_of_its_source_is_refused(store: Sent, tmp_path: Path) -> None:
    """Its containers would be imported, and those of the next import again."""
    with pytest.raises(UsageError, match="is inside"):
        put_in(store, tmp_path)


# --- what is there already -------------------------------------------------------------------------------------------


def test_the_newest_import_is_shown(sent: Sent, tmp_path: Path) -> None:
    """Imported again, files of the same names are newer versions; external payloads that are there already are kept,
    others of the same name get a place of their own."""
    tree = tmp_path / "tree"
    tree.mkdir()
    contents = {"small": b"1", "same": b"s" * 5000, "big": b"1" * 5000}
    for round_ in range(3):
        for name, content in contents.items():
            (tree / name).write_bytes(content)
        assert put_in(sent, tree, big_file_threshold=4096, shard_bits=1).report.refused == 0
        shown = sent.shown()
        assert shown.contents == contents
        assert len(shown.external) == 2 + (round_ >= 1)
        if round_ == 0:
            contents = contents | {"small": b"2", "big": b"2" * 5000}
    assert shown.files["big"].meta["external_key"].endswith(f"/_bigFiles/{sha256(b'2' * 5000).hexdigest()}/big")
    assert {key.rpartition("-")[2] for key in shown.containers} == {"000001.des", "000002.des", "000003.des"}


def test_a_key_that_somebody_else_takes(sent: Sent, tmp_path: Path) -> None:
    """Two that work on one shard: who comes second takes the next generation, and nothing is written over."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/a").write_bytes(b"mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a").write_bytes(b"theirs")
    once = iter([True])

    def effect(name: str) -> None:
        if name.startswith("put ") and next(once, False):
            put_in(sent, tmp_path / "other", shard_bits=1)
            put_in(sent, tmp_path / "other", shard_bits=1)

    put_in(sent, tmp_path / "tree", shard_bits=1, effect=effect)
    shown = sent.shown()
    assert shown.contents == {"a": b"mine"}
    assert len(shown.containers) == 3
    assert max(shown.containers).endswith("-000003.des")


def test_a_packer_beside_it(store: Sent, tmp_path: Path) -> None:
    """A packer with a catalog of its own and imports work on one day: the newest of a name is shown."""
    spool, tree = tmp_path / "spool", tmp_path / "tree"
    spool.mkdir()
    tree.mkdir()

    def pack(content: bytes) -> None:
        (spool / "file").write_bytes(content)
        done = desfs("packer", "--once", "--spool", spool, "--store", store.url, "--settle", "0")
        assert (done.returncode, done.stderr) == (0, "")

    def newest() -> bytes:
        days = [path for path in (tmp_path / "store").iterdir() if path.is_dir()]
        return Shown.of(store.open()).files["file"].data if len(days) == 1 else b"a day ended"

    pack(b"1")
    (day,) = (path.name for path in (tmp_path / "store").iterdir() if path.is_dir())
    (tree / "file").write_bytes(b"2")
    put_in(store, tree, day=day)
    assert newest() == b"2"
    pack(b"3")
    assert newest() in (b"3", b"a day ended")


def test_names_that_collide(store: Sent, tmp_path: Path) -> None:
    """The last of a name wins, and it is said; a file that a directory of another source would hide is refused."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same").write_bytes(name.encode())
    (tmp_path / "one/hidden").write_bytes(b"hidden")
    (tmp_path / "two/hidden").mkdir()
    (tmp_path / "two/hidden/inside").write_bytes(b"inside")
    (tmp_path / "file").write_bytes(b"a plain file")
    summary = put_in(store, *(tmp_path / name for name in ("one", "two", "file")))
    assert store.shown().contents == {"same": b"two", "hidden/inside": b"inside", "file": b"a plain file"}
    assert summary.report.notes == [
        f"'{tmp_path}/one/same': '{tmp_path}/two/same' has the same name and is the one that is imported"
    ]
    assert summary.report.failures == [f"'{tmp_path}/one/hidden': a directory of the same name would hide it"]
    assert describe(summary).endswith("; 1 replaced by later ones of the same name; 1 refused")


# --- what cannot be imported -----------------------------------------------------------------------------------------


def test_what_is_left_out_is_said(store: Sent, tmp_path: Path) -> None:
    """Links, devices and empty directories are counted; what could not be imported is named, and the rest is: exit
    status 1. `--json` says the same."""
    tree = tmp_path / "tree"
    (tree / "empty").mkdir(parents=True)
    (tree / "good").write_bytes(b"good")
    for number in range(3):
        (tree / f"link{number}").symlink_to("/etc/passwd")
    os.mkfifo(tree / "fifo")
    summary = put_in(store, tree)
    assert (summary.report.refused, summary.report.failures) == (0, [])
    said = describe(summary)
    assert said.startswith("imported 1 files (4 bytes) into 1 containers with ")
    for part in ("; skipped ", "3 symbolic links", "1 FIFO", "1 empty directory"):
        assert part in said
    (tmp_path / "bad.tar").write_bytes(b"no tar")
    missing = tmp_path / "missing"
    done = desfs("import", "--store", store.url, "--day", DAY, "--json", tmp_path / "bad.tar", missing, tree)
    answer = json.loads(done.stdout)
    assert done.returncode == 1
    assert answer["failures"] == [line.removeprefix("desfs: ") for line in done.stderr.splitlines()]
    assert answer["failures"][0].startswith(f"{tmp_path}/bad.tar: damaged at byte 0: ")
    assert answer["failures"][1] == f"{missing}: No such file or directory"
    del answer["failures"], answer["puts"]
    assert answer == {
        "files": 1,
        "bytes": 4,
        "containers": 1,
        "external": 0,
        "days": [DAY],
        "skipped": {"symbolic links": 3, "FIFOs": 1, "empty directories": 1},
        "replaced": 0,
        "refused": 2,
    }


@pytest.mark.parametrize("big", [False, True])
def test_a_file_that_changes_while_it_is_imported(store: Sent, tmp_path: Path, big: bool) -> None:
    """It is not stored half: it is named, and the others are imported."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("a", "growing", "z"):
        (tree / name).write_bytes(b"x" * 5000)

    def effect(name: str) -> None:
        if name.startswith("put " if big else "build ") and (not big or name.endswith("growing")):
            with open(tree / "growing", "ab") as writer:
                writer.write(b"more")

    summary = put_in(store, tree, effect=effect, shard_bits=1, big_file_threshold=4096 if big else 100_000)
    assert summary.report.refused == 1
    assert "/growing': changed" in summary.report.failures[0]
    assert store.shown().contents == {"a": b"x" * 5000, "z": b"x" * 5000}


def test_damaged_members_are_left_out(store: Sent, tmp_path: Path) -> None:
    """A member of a zip file with a wrong checksum is not stored, small or large, and the others are."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as zipped:
        for name, size in (("a", 10), ("bad", 1000), ("bad-big", 50_000), ("z", 20)):
            zipped.writestr(name, name[:1].encode() * size)
    raw = bytearray((tmp_path / "x.zip").read_bytes())
    raw[raw.index(b"b" * 1000)] ^= 1
    raw[raw.rindex(b"b" * 1000)] ^= 1
    (tmp_path / "x.zip").write_bytes(raw)
    summary = put_in(store, tmp_path / "x.zip", shard_bits=1, big_file_threshold=40_000)
    assert summary.report.refused == 2
    assert all("found a checksum of" in failure for failure in summary.report.failures)
    shown = store.shown()
    assert shown.contents == {"a": b"a" * 10, "z": b"z" * 20}
    assert shown.external == []


def test_a_name_that_the_store_cannot_have(store: Sent, tmp_path: Path) -> None:
    """It concerns a large file alone, whose name becomes a key; the others are imported."""
    (tmp_path / "tree").mkdir()
    for name, size in ((".desfs-put.x", 5000), (".desfs-put.y", 5), ("z", 5000)):
        (tmp_path / "tree" / name).write_bytes(b"x" * size)
    summary = put_in(store, tmp_path / "tree", shard_bits=1, big_file_threshold=4096)
    assert summary.report.refused == 1
    assert "/.desfs-put.x': '.desfs-put.x' cannot be stored as an object of its own" in summary.report.failures[0]
    assert store.shown().contents == {".desfs-put.y": b"x" * 5, "z": b"x" * 5000}


def test_nothing_that_can_be_read(store: Sent, tmp_path: Path) -> None:
    """No container is made of nothing."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/a").write_bytes(b"a")
    summary = put_in(store, tmp_path / "tree", effect=lambda name: (tmp_path / "tree/a").unlink())
    assert (summary.containers, summary.report.refused) == (0, 1)
    assert store.shown().containers == {}


@pytest.mark.s3
@pytest.mark.parametrize(
    ("bucket_name", "environ"),
    [("no-such-bucket-here", {}), (None, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"})],
    ids=["missing bucket", "nobody listens"],
)
def test_a_store_that_cannot_be_reached(
    s3: servers.S3Server, bucket: str, tmp_path: Path, bucket_name: str | None, environ: dict[str, str]
) -> None:
    """Exit status 1 and a line that names the cause."""
    (tmp_path / "a").write_bytes(b"a")
    url = f"s3://{bucket_name or bucket}"
    done = desfs("import", "--store", url, "--deadline", "0.2", tmp_path / "a", env=s3.environ() | environ)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("desfs: ")
    assert (bucket_name or "127.0.0.1:9") in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


# --- interruptions ---------------------------------------------------------------------------------------------------


class Forks:
    """Starts imports in processes of their own: see tests/service/importing.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, store: Sent, *paths: Path, tmp: Path, at: int = 0, signals: tuple[int, ...] = ()) -> dict[str, Any]:
        """An import that gets signals before its `at`-th effect: how it ended, its effects and its summary."""
        tmp.mkdir(exist_ok=True)
        order = {
            "store": store.url,
            "paths": list(map(str, paths)),
            "day": DAY,
            "tmp": str(tmp),
            "at": at,
            "signals": signals,
            "settings": {"shard_bits": 1, "big_file_threshold": 4096, "max_container_files": 3},
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    command = [sys.executable, "-m", "tests.service.importing"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Forks(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(30)


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """A compressed tar with small and large files."""
    contents = {f"d{number % 3}/{number}": b"%d" % number * 10 for number in range(12)}
    contents |= {"large/1": b"1" * 10_000, "large/2": b"2" * 10_000}
    for name, content in contents.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(content)
    return packed_as("tar.gz", tmp_path / "tree", tmp_path), contents


def test_wherever_an_import_dies_the_store_is_readable(
    forks: Forks, mixed: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    """desfs/imports/run.py: what is stored is whole; done again, all is there, and external payloads once."""
    source, contents = mixed
    for at in itertools.count(1):
        store = Sent((tmp_path / f"store{at}").as_uri(), {})
        done = forks.run(store, source, tmp=tmp_path / "tmp", at=at, signals=(signal.SIGKILL,))
        if done["status"] == 0:
            assert at > 12
            break
        assert done["status"] == -signal.SIGKILL
        found = store.shown().contents
        assert found.items() <= contents.items()
        assert forks.run(store, source, tmp=tmp_path / "tmp")["answer"]["end"] == "done"
        shown = store.shown()
        assert shown.contents == contents
        assert len(shown.external) == 2
    assert done["answer"]["files"] == len(contents)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_import_leaves_no_temporary_files(
    number: int, forks: Forks, store: Sent, tmp_path: Path
) -> None:
    """The first signal ends it when the requests under way are done: what it has stored is whole."""
    source = tmp_path / "many"
    source.mkdir()
    contents = {f"{number}": b"%d" % number for number in range(300)}  # many containers: it cannot be done before
    for name, content in contents.items():
        (source / name).write_bytes(content)
    done = forks.run(store, source, tmp=tmp_path / "tmp", at=5, signals=(number,))
    assert done["answer"]["end"] == "interrupted"
    assert list((tmp_path / "tmp").iterdir()) == []
    shown = store.shown()
    assert shown.contents.items() <= contents.items()
    assert done["answer"]["files"] == len(shown.contents) < len(contents)
    assert list((tmp_path / "store").rglob(".desfs-put*")) == []


def test_a_second_signal_ends_it_at_once(
    forks: Forks, mixed: tuple[Path, dict[str, bytes]], store: Sent, tmp_path: Path
) -> None:
    """It dies of the second signal, without its temporary files."""
    done = forks.run(store, mixed[0], tmp=tmp_path / "tmp", at=5, signals=(signal.SIGINT, signal.SIGTERM))
    assert done["status"] == -signal.SIGTERM
    assert list((tmp_path / "tmp").iterdir()) == []
    assert store.shown().contents.items() <= mixed[1].items()


# --- large files -----------------------------------------------------------------------------------------------------

# Its own child's peak: see tests/mount/test_packed.py.
MEASURED = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def test_large_members_are_never_in_memory(store: Sent, tmp_path: Path) -> None:
    """A member of 110 MiB, from a zip file of 200 KiB, becomes an object of its own, one of 90 MiB part of a container;
    the process, which takes 70 MiB by itself, stays below 130 MiB, and nothing is left in TMPDIR."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, size in (("external", 110), ("internal", 90)):
            with zipped.open(name, "w") as writer:
                for _ in range(size):
                    writer.write(bytes(MIB))
    (tmp_path / "tmp").mkdir()
    command = [PROGRAM, "import", "--store", store.url, "--day", DAY, tmp_path / "x.zip"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, command)],
        env=os.environ | {"TMPDIR": str(tmp_path / "tmp")},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout.split()[-1]) * 1024 < 130 * MIB
    assert list((tmp_path / "tmp").iterdir()) == []
    external = tmp_path / "store" / DAY / "_bigFiles/external"
    assert external.stat().st_size == 110 * MIB
    (container,) = (tmp_path / "store" / DAY).glob("*-000001.des")
    assert container.stat().st_size > 90 * MIB


def test_a_directory_for_temporary_files_that_is_full(
    store: Sent, tmp_path: Path, small_tmp: Callable[[], Path]
) -> None:
    """The message names the directory and what to do; what fits is imported."""
    tmp = small_tmp()
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("large", bytes(8 * MIB))
        zipped.writestr("small", b"small")
    options = ("--store", store.url, "--day", DAY, "--shard-bits", "1")
    env = {"TMPDIR": str(tmp)}
    done = desfs("import", *options, "--big-file-threshold", "1M", tmp_path / "x.zip", env=env)
    assert done.returncode == 1
    assert f"needs {8 * MIB} bytes in the directory for temporary files, {tmp}, which has " in done.stderr
    assert store.shown().contents == {"small": b"small"}
    done = desfs("import", *options, tmp_path / "x.zip", env=env)
    assert done.returncode == 1
    assert done.stderr == (
        f"desfs: temporary files in {tmp}: No space left on device: set TMPDIR to a directory with more room\n"
    )
    assert list(tmp.iterdir()) == []


@pytest.fixture
def small_tmp(tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """A file system of 4 MiB."""
    place = tmp_path / "small"

    def make() -> Path:
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], check=True)
        return place

    try:
        yield make
    finally:
        if place.is_mount():
            subprocess.run(["umount", place], check=True)


# --- a terminal ------------------------------------------------------------------------------------------------------


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    ends = pty.openpty()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def test_a_progress_bar_on_a_terminal(store: Sent, tmp_path: Path) -> None:
    """On stderr if that is a terminal; stdout has the summary alone."""
    tree_of(tmp_path / "tree")
    with terminal() as (ours, theirs):
        command = [f"{PROGRAM}", "import", "--store", store.url, "--day", DAY, f"{tmp_path}/tree"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=True, timeout=60)
        os.set_blocking(ours, False)
        seen = os.read(ours, 100_000).decode()
    assert "60/60" in seen
    assert "importing" in seen
    assert done.stdout.startswith(b"imported 60 files ")
