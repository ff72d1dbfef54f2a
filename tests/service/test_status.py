"""`desfs status` of mounts, spools and stores."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from desfs.cli.status_lines import Line, mount_lines, spool_lines, store_lines
from desfs.errors import DesfsError, UsageError
from desfs.spool import Spool
from desfs.spool_workers import WorkerPlace
from desfs.status import (
    MountStatus,
    SpoolStatus,
    build_store_status,
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
EXPECTED_S = 100.0  # 30 s of max_age, 10 s of rescan_interval, 60 s of deadline


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


def shown(lines: list[Line]) -> str:
    """What people read."""
    return "\n".join(f"{line.name} {line.text}" for line in lines)


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
    assert found["rates"]["since"] == "start"
    assert found["rates"]["kernel_requests"] > 0
    assert found["rates"]["received"] > 0
    assert found["bytes"]["read"] + found["bytes"]["pushed"] >= 7 * len(b"content")
    assert found["rates"]["hits"].keys() == found["caches"].keys()
    assert found["requests"]["open"] == 0
    assert found["warnings"] == []
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
    assert {key: found["claimed"][key] for key in ("files", "bytes", "batches")} == {
        "files": 1,
        "bytes": 40,
        "batches": 1,
    }
    assert 0 <= found["claimed"]["oldest_seconds"] < 600
    assert found["rejected"]["count"] == 2
    reasons = {each["file"]: each["reason"] for each in found["rejected"]["first"]}
    assert reasons == {"odd: name": "a socket: no", "e": "too large"}
    assert found["packer"] == {"running": False, "pid": None}
    assert [(each["running"], each["pid"], each["batches"]) for each in found["packers"]] == [(False, None, 1)]
    assert found["warnings"] == []
    assert found["rates"] is None
    assert sorted(tmp_path.rglob("*")) == before
    text = shown(spool_lines(SpoolStatus(**found)))
    for said in (
        "3 files, 60 B",
        "1 file, 40 B, in 1 batch",
        "none at work",
        "1 ended with batches left",
        "odd: name: a socket: no",
    ):
        assert said in text


def test_whether_a_packer_is_at_work_is_told_without_its_lock(
    spool: Spool, announced_logs: list[str], tmp_path: Path
) -> None:
    announced_logs.append("put aside")

    def packer() -> dict[str, Any]:
        return spool_status(str(spool.root), expected_s=EXPECTED_S).packer

    spool.join()
    try:
        assert packer() == {"running": True, "pid": os.getpid()}
    finally:
        spool.leave()
    assert packer() == {"running": False, "pid": None}
    spool.join()  # nobody took it
    spool.leave()


def test_each_packer_of_a_spool_is_named(tmp_path: Path) -> None:
    """Of several the one that ended is left out, unless it has left batches."""
    spool = Spool(tmp_path)
    first, second, third = (WorkerPlace.take(spool.internal, shared=True) for _ in range(3))
    (spool.internal / "claims" / f"20261120-{third.number}").mkdir()
    try:
        second.leave()
        third.leave()
        found = spool_status(str(tmp_path), expected_s=EXPECTED_S)
    finally:
        first.leave()
    assert found.packers == [
        {"number": first.number, "running": True, "pid": os.getpid(), "batches": 0},
        {"number": third.number, "running": False, "pid": None, "batches": 1},
    ]
    assert found.packer == {"running": True, "pid": os.getpid()}


def test_two_packers_of_a_spool_are_shown_with_their_processes(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    catalog = tmp_path / "catalog.sqlite"
    command: list[str | Path] = [
        PROGRAM,
        "packer",
        "--spool",
        spool,
        "--store",
        tmp_path / "store",
        "--catalog",
        str(catalog),
    ]
    with (
        servers.child_process(command, log=tmp_path / "one.log") as one,
        servers.child_process(command, log=tmp_path / "two.log") as two,
    ):

        def pids() -> set[int]:
            if not (spool / ".desfs/workers").is_dir():
                return set()
            return {each["pid"] for each in spool_status(str(spool), expected_s=EXPECTED_S).packers}

        wait_until(lambda: pids() == {one.pid, two.pid}, "two packers")
        found = status(spool)
        assert found["packer"] == {"running": True, "pid": None}
        text = shown(spool_lines(SpoolStatus(**found)))
        assert "packers 2 at work" in text
        assert f"(process {two.pid})" in text
        one.kill()
        wait_until(lambda: pids() == {two.pid}, "the end of one")
        assert status(spool)["packer"] == {"running": True, "pid": two.pid}


def test_the_age_of_a_file_is_the_time_since_it_was_touched(spool: Spool, announced_logs: list[str]) -> None:
    announced_logs.append("put aside")
    os.utime(spool.root / "b", (1, 1))
    touched = {name: (spool.root / name).stat().st_ctime for name in ("photos/a", "b", "c.tmp")}
    touched_s = min(touched.values())
    waiting = spool_status(str(spool.root), expected_s=EXPECTED_S, now_s=touched_s + 100).waiting
    assert waiting["oldest_seconds"] == 100.0
    assert touched[waiting["oldest_file"]] == touched_s
    for name in ("photos/a", "b", "c.tmp"):
        (spool.root / name).unlink()
    none = {"files": 0, "bytes": 0, "oldest_seconds": None, "oldest_file": None}
    assert spool_status(str(spool.root), expected_s=EXPECTED_S).waiting == none


def test_files_that_wait_longer_than_expected_are_warned_of(spool: Spool, announced_logs: list[str]) -> None:
    """Those with temporary names an hour later; those that are taken as well."""
    announced_logs.append("put aside")
    now_s = max(path.stat().st_ctime for path in spool.root.rglob("*"))

    def look(later_s: float) -> SpoolStatus:
        return spool_status(str(spool.root), expected_s=EXPECTED_S, now_s=now_s + later_s)

    assert look(50.0).warnings == []
    late = look(600.0)
    assert late.overdue == {"expected_seconds": 100.0, "waiting": 2, "claimed": 1}
    waiting, claimed, nobody = late.warnings
    assert re.fullmatch(r"2 files have been waiting longer than expected \(100 s\), (photos/a|b) for 10 min", waiting)
    assert claimed == "1 file has been claimed longer than expected (100 s), taken for 10 min"
    assert nobody == "no packer is at work"
    assert look(4000.0).overdue["waiting"] == 3
    spool.join()
    try:
        assert "no packer is at work" not in look(600.0).warnings
    finally:
        spool.leave()
    text = shown([line for line in spool_lines(late) if line.is_bad])
    assert "oldest file 10 min, 100 s expected at most: " in text


def test_the_packers_settings_say_how_long_a_file_may_wait(spool: Spool, tmp_path: Path, announced_logs: Any) -> None:
    """From the file and the variables that the packer has too; so do the names that are temporary."""
    announced_logs.append("put aside")
    (tmp_path / "desfs.toml").write_text("[packer]\nmax_age = 5\nrescan_interval = 2\n")
    env = {"DESFS_SETTLE": "7", "DESFS_TEMPORARY": "*.new"}
    found = status(spool.root, "--config", tmp_path / "desfs.toml", "--deadline", "3", env=env)
    assert found["overdue"]["expected_seconds"] == 12.0
    assert found["temporary"] == 0


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
        now_s=0.0,
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


def test_seconds_that_are_none_are_a_usage_error(tmp_path: Path) -> None:
    line, _ = failure(tmp_path, "--watch", "0", status=2)
    assert line == "desfs: --watch: '0' is no number of seconds, 0.1 and more"
