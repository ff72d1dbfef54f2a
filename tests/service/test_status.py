"""`desfs status` of mounts, spools and stores."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from desfs.cli.status import mount_lines, spool_lines, store_lines
from desfs.errors import DesfsError, UsageError
from desfs.spool import Spool
from desfs.status import (
    MountStatus,
    SpoolStatus,
    build_mount_status,
    build_store_status,
    lock_holder,
    place_of,
    spool_status,
    store_status,
)
from desfs.store import ObjectInfo, open_store
from tests import servers
from tests.mount.mounting import PROGRAM, daemon_of, desfs, mount, wait_until
from tests.mount.stores import LAYOUT, put_container, put_layout, put_sharded, upload
from tests.servers import MountPoint, S3Server

DAY = "2026-11-20"
LIMIT_S = 5.0


def status(*arguments: object, **more: Any) -> dict[str, Any]:
    """What `desfs status --json` prints."""
    done = desfs("status", "--json", *arguments, **more)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    (line,) = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def failure(*arguments: object, status: int, **more: Any) -> tuple[str, str]:
    """The one line of a command that fails, and what it prints besides."""
    done = desfs("status", *arguments, **more)
    assert done.returncode == status, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("desfs: ")
    return line, done.stdout


def shown(pairs: list[tuple[str, str]]) -> str:
    """What people read."""
    return "\n".join(f"{name} {text}" for name, text in pairs)


# --- a mount -----------------------------------------------------------------------------------------------------


@pytest.mark.fuse
def test_a_mount_says_what_it_has_done(tmp_path: Path, mount_dir: MountPoint) -> None:
    """Days, files, requests, caches, bytes, the link and the problems, for programs and for people."""
    store = tmp_path / "store"
    put_sharded(store, DAY, {f"d/f{number}": b"content" for number in range(7)})
    (store / DAY / "ff.des").write_bytes(b"no container")
    mount(store, mount_dir.path, f"cache_dir={tmp_path / 'cache'}")
    (tmp_path / "link").symlink_to(mount_dir.path)
    assert len(os.listdir(mount_dir.path / DAY / "d")) == 7
    for number in range(7):
        assert (mount_dir.path / DAY / f"d/f{number}").read_bytes() == b"content"
    found = status(tmp_path / "link")
    assert (found["kind"], found["state"], found["place"]) == ("mount", "served", str(mount_dir.path))
    assert found["source"] == store.as_uri()
    assert found["days"] == {DAY: 7}
    assert found["uptime_seconds"] > 0
    assert found["kernel_requests"]["lookup"] > 0
    assert found["store_requests"]["get"] > 0
    assert found["bytes"]["received"] > 0
    assert found["caches"].keys() == {"memory", "disk_blocks", "disk_indexes"}
    assert found["caches"]["disk_indexes"]["misses"] > 0
    assert found["disk_cache"]["folder"] == str(tmp_path / "cache")
    assert found["link"]["latency_s"] > 0
    assert found["levers"]["in_force"]
    assert found["problems"]["count"] == 1
    assert "ff.des" in found["problems"]["first"][0]
    text = shown(mount_lines(MountStatus(**found)))
    for said in (store.as_uri(), "7 files", "in force", "ff.des", str(tmp_path / "cache")):
        assert said in text


@pytest.mark.fuse
def test_a_hung_mount_hangs_nobody_and_a_dead_one_is_said(tmp_path: Path, mount_dir: MountPoint) -> None:
    put_container(tmp_path / "store" / DAY / "0.des", {"f": b"x"})
    mount(tmp_path / "store", mount_dir.path)
    daemon = daemon_of(mount_dir.path)
    os.kill(daemon, signal.SIGSTOP)
    try:
        line, found = failure("--json", mount_dir.path, "--deadline", "1", status=1)
        assert f"{mount_dir.path}: the mount of {tmp_path / 'store'} does not answer within 1 s" in line
        assert json.loads(found) == {"kind": "mount", "place": str(mount_dir.path), "state": "hung"}
    finally:
        os.kill(daemon, signal.SIGCONT)
    os.kill(daemon, signal.SIGKILL)
    wait_until(lambda: not servers.is_running(daemon), "the end of the daemon")
    line, found = failure("--json", mount_dir.path, status=1)
    assert "is dead, its daemon has ended" in line
    assert json.loads(found) == {"kind": "mount", "place": str(mount_dir.path), "state": "dead"}


def test_statistics_are_summed_up_by_their_labels() -> None:
    stats = {
        "source": "file:///x",
        "uptime_seconds": 3.5,
        "open_containers": {"bytes": 5, "files": 6},
        "days": {"b": {"files": None}, "a": {"files": 2}},
        "caches": {"disk": None, "redis": True},
        "link": {"latency_s": 0.1, "bandwidth": 5.0},
        "levers": {"in_force": True},
        "metrics": {
            "desfs_fuse_requests_total.read.OK": 5.0,
            "desfs_fuse_requests_total.read.EIO": 2.0,
            "desfs_fuse_requests_total.lookup.ENOENT": 9.0,
            "desfs_store_requests_total.get.206": 7.0,
            "desfs_store_requests_total.get.503": 1.0,
            "desfs_store_requests_total.list.ConnectTimeoutError": 1.0,
            "desfs_store_retries_total.get": 1.0,
            "desfs_store_bytes_total.received": 12.0,
            "desfs_redis_requests_total.hit": 4.0,
            "desfs_pages_pushed_total.stored": 3.0,
            "desfs_pages_pushed_total.dropped": 2.0,
        },
    }
    found = build_mount_status("/mnt", stats, [f"problem {number}" for number in range(50)])
    assert found.days == {"a": 2, "b": None}
    assert found.requests is None
    assert found.kernel_requests == {"lookup": 9, "read": 7}
    assert found.kernel_errors == {"EIO": 2}
    assert found.store_requests == {"get": 8, "list": 1}
    assert (found.store_failures, found.store_retries) == (2, 1)
    assert found.bytes == {"received": 12, "sent": 0}
    assert found.caches == {"memory": {"hits": 0, "misses": 0}, "redis": {"hits": 4, "misses": 0}}
    assert found.prefetch == {"pushed": 3, "pushed_in_vain": 2, "containers_bought": 0}
    assert found.problems["count"] == 50
    assert found.problems["first"][0] == "problem 0"
    assert len(found.problems["first"]) == 10
    waiting = build_mount_status("/mnt", stats | {"requests": {"open": 3, "oldest_seconds": 1.5}}, [])
    assert waiting.requests == {"open": 3, "oldest_seconds": 1.5}


# --- a spool -----------------------------------------------------------------------------------------------------


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    """One with files that wait, files that are taken, and files that were put aside."""
    root = tmp_path / "spool"
    (root / "photos").mkdir(parents=True)
    spool = Spool(root)
    for name, size in {"photos/a": 10, "b": 20, "c.tmp": 30, "taken": 40, "odd: name": 50, "e": 1}.items():
        (root / name).write_bytes(bytes(size))
    spool.join()
    batch = spool.new_batch()
    assert spool.claim(["taken"], batch)
    spool.journal_path(batch).write_text("{}")
    spool.reject("odd: name", "a socket: no")
    spool.reject("e", "too large")
    spool.leave()
    (root / "photos/.desfs").mkdir()
    return spool


def test_a_spool_says_what_waits_and_what_was_put_aside(
    spool: Spool, announced_logs: list[str], tmp_path: Path
) -> None:
    announced_logs.append("put aside")
    before = sorted(tmp_path.rglob("*"))
    found = status(spool.root)
    assert (found["kind"], found["place"]) == ("spool", str(spool.root))
    assert (found["waiting"]["files"], found["waiting"]["bytes"], found["temporary"]) == (3, 60, 1)
    assert 0 <= found["waiting"]["oldest_seconds"] < 600
    assert found["claimed"] == {"files": 1, "bytes": 40, "batches": 1}
    assert found["rejected"]["count"] == 2
    reasons = {each["file"]: each["reason"] for each in found["rejected"]["first"]}
    assert reasons == {"odd: name": "a socket: no", "e": "too large"}
    assert found["packer"] == {"running": False, "pid": None}
    assert sorted(tmp_path.rglob("*")) == before
    text = shown(spool_lines(SpoolStatus(**found)))
    for said in ("3 files, 60 B", "1 file, 40 B, in 1 batch", "none at work", "odd: name: a socket: no"):
        assert said in text


def test_whether_a_packer_is_at_work_is_told_without_its_lock(
    spool: Spool, announced_logs: list[str], tmp_path: Path
) -> None:
    announced_logs.append("put aside")
    spool.join()
    try:
        assert spool_status(str(spool.root)).packer == {"running": True, "pid": os.getpid()}
    finally:
        spool.leave()
    assert spool_status(str(spool.root)).packer == {"running": False, "pid": None}
    spool.join()  # nobody took it
    spool.leave()


def test_the_age_of_a_file_is_the_time_since_it_was_touched(spool: Spool, announced_logs: list[str]) -> None:
    announced_logs.append("put aside")
    touched_s = min((spool.root / name).stat().st_ctime for name in ("photos/a", "b", "c.tmp"))
    os.utime(spool.root / "b", (1, 1))
    assert spool_status(str(spool.root), now_s=touched_s + 100).waiting["oldest_seconds"] == 100.0
    for name in ("photos/a", "b", "c.tmp"):
        (spool.root / name).unlink()
    assert spool_status(str(spool.root)).waiting == {"files": 0, "bytes": 0, "oldest_seconds": None}


def test_only_a_lock_on_that_very_file_counts(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    file = (tmp_path / "lock").stat()
    device = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}"
    others = [
        f"1: POSIX  ADVISORY  WRITE 11 {device}:{file.st_ino} 0 EOF",
        f"2: FLOCK  ADVISORY  WRITE 12 ff:ff:{file.st_ino} 0 EOF",
        f"3: FLOCK  ADVISORY  WRITE 13 {device}:{file.st_ino}1 0 EOF",
        f"3: -> FLOCK  ADVISORY  WRITE 14 {device}:{file.st_ino} 0 EOF",
    ]
    assert lock_holder(others, file) is None
    mine = f"4: FLOCK  ADVISORY  WRITE 15 {device}:{file.st_ino} 0 EOF"
    assert lock_holder([*others, mine], file) == 15


# --- a store -----------------------------------------------------------------------------------------------------


def info(key: str, size: int = 1, seconds: float = 1.0) -> ObjectInfo:
    return ObjectInfo(key, size, "etag", int(seconds * 1e9))


def test_objects_are_counted_by_day_and_kind() -> None:
    found = build_store_status(
        "s3://b/",
        [
            info(".desfs.json", 100),
            info("2026-11-19/00.des", 10, 5.0),
            info("2026-11-19/00-000001.des", 20, 9.0),
            info("2026-11-19/00-000002-000004.des", 30, 7.0),
            info("2026-11-20/shard_1.des", 40),
            info("2026-11-20/_bigFiles/movie.mkv", 1000, 99.0),
            info("2026-11-20/deep/x.des", 7),
            info("2026-11-20/readme.txt", 8),
            info("notes.txt", 9),
            info("_bigFiles/x", 2),
            info("archive.des", 50),
            info("archive/more.des", 60),
        ],
        None,
        None,
    )
    assert [day.day for day in found.days] == ["2026-11-20", "2026-11-19", "_bigFiles", "archive"]
    newest, older, _, archive = found.days
    assert (older.containers, older.sealed, older.parts, older.bytes, older.newest) == (3, 1, 2, 60, 9.0)
    assert (newest.containers, newest.external, newest.external_bytes, newest.newest) == (1, 1, 1000, 99.0)
    assert (archive.containers, archive.bytes) == (2, 110)
    assert found.foreign == {
        "count": 3,
        "bytes": 24,
        "first": ["2026-11-20/deep/x.des", "2026-11-20/readme.txt", "notes.txt"],
    }
    assert (found.total.containers, found.total.bytes, found.total.external) == (6, 210, 2)


@pytest.mark.parametrize("kind", ["path", "s3"])
def test_a_store_says_what_it_holds(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    for day in ("2026-11-18", DAY):
        put_container(tmp_path / day / "0.des", {"f": b"x"})
    put_layout(tmp_path, LAYOUT)
    (tmp_path / "readme.txt").write_bytes(b"foreign")
    url, env = str(tmp_path), {}
    if kind == "s3":
        server: S3Server = request.getfixturevalue("s3")
        bucket: str = request.getfixturevalue("bucket")
        upload(server, bucket, tmp_path, "some/prefix/")
        url, env = f"s3://{bucket}/some/prefix", server.environ()
    found = status(url, env=env)
    assert found["kind"] == "store"
    assert found["layout"] == {"shard_bits": 8, "placement": "directory", "naming": "path", "id": ""}
    assert [day["day"] for day in found["days"]] == [DAY, "2026-11-18"]
    assert all(day["containers"] == 1 and day["bytes"] > 0 for day in found["days"])
    assert found["foreign"] == {"count": 1, "bytes": 7, "first": ["readme.txt"]}
    if kind == "path":
        text = desfs("status", tmp_path.as_uri()).stdout
        assert "256 shards a day" in text
        assert text.index(DAY) < text.index("2026-11-18") < text.index("total")
        assert "readme.txt" in text


def test_a_store_that_cannot_be_listed_is_said(s3: S3Server) -> None:
    line, _ = failure("s3://no-such-bucket-here/p", status=1, env=s3.environ())
    assert "no-such-bucket-here" in line


def test_a_layout_that_is_not_understood_is_said(tmp_path: Path) -> None:
    put_layout(tmp_path, b"{")
    found = store_status(open_store(str(tmp_path)))
    assert found.layout is None
    assert "not understood" in shown(store_lines(found))
    put_layout(tmp_path, b'{"shard_bits": 4, "placement": "by colour"}')
    found = store_status(open_store(str(tmp_path)))
    assert found.layout == {"shard_bits": 4, "placement": "by colour", "naming": "", "id": ""}
    assert "does not know" in shown(store_lines(found))


# --- which of them it is -----------------------------------------------------------------------------------------


def test_places_that_are_none_or_two_are_usage_errors(tmp_path: Path) -> None:
    for name in ("empty", "both", "half/.desfs/claims"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").touch()
    Spool(tmp_path / "both")
    put_layout(tmp_path / "both")
    named = {
        "missing": "no such directory",
        "file": "is no directory",
        "empty": "nothing of desfs is mounted there",
        "half": "nothing of desfs is mounted there",
        "both": f"write {(tmp_path / 'both').as_uri()}",
    }
    for name, said in named.items():
        with pytest.raises(UsageError, match=said):
            place_of(str(tmp_path / name), limit_s=LIMIT_S)
    assert "nothing of desfs is mounted there" in failure(tmp_path / "empty", status=2)[0]
    assert place_of((tmp_path / "both").as_uri(), limit_s=LIMIT_S).kind == "store"


def test_a_place_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(DesfsError, match="no answer in time"):
        place_of(str(tmp_path), limit_s=0.0)


def test_a_day_in_a_spool_makes_it_no_store(tmp_path: Path) -> None:
    """Programs may write what they like into a spool."""
    Spool(tmp_path)
    (tmp_path / DAY).mkdir()
    (tmp_path / "x.des").touch()
    assert place_of(str(tmp_path), limit_s=LIMIT_S).kind == "spool"


def test_a_terminal_gets_tables(tmp_path: Path) -> None:
    """On a terminal the days are a table of rich's; nothing is cut off or taken for markup."""
    put_container(tmp_path / "[bold]x.des", {"f": b"x"})
    put_container(tmp_path / DAY / "0.des", {"f": b"x"})
    terminal, end = pty.openpty()
    env = os.environ | {"COLUMNS": "120", "TERM": "xterm"}
    with subprocess.Popen([PROGRAM, "status", tmp_path], stdin=end, stdout=end, stderr=end, env=env) as program:
        os.close(end)
        text = b""
        with contextlib.suppress(OSError):  # EIO: the program has ended
            while piece := os.read(terminal, 4096):
                text += piece
    os.close(terminal)
    assert program.returncode == 0
    assert DAY in text.decode()
    assert "[bold]x" in text.decode()
    assert b"\x1b[1m" in text
