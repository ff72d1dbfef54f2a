"""A day that changes while it is read: docs/architecture.md, Freshness."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from tests.fakes.counting_proxy import CountingProxy
from tests.mount.mounting import daemon_of, mounted, outcome, wait_until
from tests.mount.stores import put_container, put_layout
from tests.servers import S3Server, is_running

pytestmark = pytest.mark.fuse

DAY = "archive"  # no calendar day, so it never closes


@contextmanager
def looping(action: Callable[[], object]) -> Iterator[list[BaseException]]:
    """Run something again and again in a thread; its errors."""
    errors: list[BaseException] = []
    ended = threading.Event()

    def loop() -> None:
        while not ended.is_set() and not errors:
            try:
                action()
            except BaseException as error:
                errors.append(error)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield errors
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("sharded", [True, False])
def test_a_program_reads_on_while_files_arrive(tmp_path: Path, sharded: bool) -> None:
    """New containers join the day's view; files that stay are read without an error all the while, new ones appear,
    changed ones are seen."""
    folder = tmp_path / "store" / DAY
    stable = {f"d/s{n}": b"stays %d" % n for n in range(20)}
    put_container(folder / "0.des", stable)
    put_container(folder / "1.des", {"changing": b"version 0"})
    if sharded:
        put_layout(tmp_path / "store", b'{"shard_bits": 4, "placement": "directory"}')
    with mounted(tmp_path / "store", tmp_path / "mnt", "refresh=0.2") as mount:
        day = mount / DAY
        listed = threading.Event()

        def read() -> None:
            assert {name: (day / name).read_bytes() for name in stable} == stable
            assert (day / "changing").read_bytes().startswith(b"version ")
            if listed.is_set():
                names = os.listdir(day)
                assert len(names) == len(set(names))
                assert {"d", "changing"} <= set(names)
                assert sorted(os.listdir(day / "d")) == sorted(name[2:] for name in stable)

        with looping(read) as errors:
            for version in range(1, 8):
                if version == 4:
                    listed.set()
                text = b"version %d" % version
                put_container(
                    folder / f"1-{version:06d}.des", {"changing": text, f"new{version}": text, f"n/{version}": text}
                )
                for name in ("changing", f"new{version}", f"n/{version}"):
                    wait_until(lambda: errors or ((day / name).exists() and (day / name).read_bytes() == text), name)  # noqa: B023
            assert errors == []
            assert sorted(os.listdir(day)) == ["changing", "d", "n", *(f"new{version}" for version in range(1, 8))]


def test_what_goes_and_what_is_replaced_is_seen(tmp_path: Path) -> None:
    """docs/semantics.md: New files appear, replaced ones change, and the kernel forgets what it knew of the old ones.

    A container that is replaced or removed: a new lookup shows what is there."""
    folder = tmp_path / "store" / DAY
    put_container(folder / "0.des", {"a": b"a" * 100_000, "gone": b"x", "was-a-file": b"y"})
    put_container(folder / "1.des", {"dir/only": b"z", "stays": b"s"})
    with mounted(tmp_path / "store", tmp_path / "mnt", "refresh=0.2") as mount:
        day = mount / DAY
        assert sorted(os.listdir(day)) == ["a", "dir", "gone", "stays", "was-a-file"]
        assert (day / "dir/only").read_bytes() == b"z"
        number = (day / "a").stat().st_ino
        put_container(folder / "0.des", {"a": b"b" * 150_000, "was-a-file/below": b"new"})
        (folder / "1.des").unlink()
        wait_until(lambda: not (day / "gone").exists() and (day / "was-a-file").is_dir(), "the new view")
        wait_until(lambda: not (day / "dir").exists(), "the directory's end")
        assert (day / "a").read_bytes() == b"b" * 150_000
        assert (day / "a").stat().st_ino != number
        assert (day / "was-a-file/below").read_bytes() == b"new"
        assert sorted(os.listdir(day)) == ["a", "was-a-file"]
        assert outcome((day / "dir/only").read_bytes) == "ENOENT"


def test_a_file_that_is_replaced_all_the_time_is_never_mixed(tmp_path: Path) -> None:
    """docs/semantics.md: Old and new bytes are never mixed.

    A reader gets one version whole, or ESTALE."""
    folder = tmp_path / "store" / DAY
    put_container(folder / "0.des", {"f": b"0" * 400_000})
    with mounted(tmp_path / "store", tmp_path / "mnt", "refresh=0.2") as mount:
        kinds: list[str] = []

        def read() -> None:
            try:
                data = (mount / DAY / "f").read_bytes()
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
                return
            assert len(data) >= 400_000
            assert data == data[:1] * len(data)
            kinds.append(data[:1].decode())

        with looping(read) as errors:
            for version in range(1, 10):
                put_container(folder / "0.des", {"f": b"%d" % version * (400_000 + version)})
                wait_until(lambda: errors or str(version) in kinds, f"version {version}")  # noqa: B023
            assert errors == []


def test_new_days_appear_and_old_ones_go(tmp_path: Path) -> None:
    put_container(tmp_path / "store/2026-11-20/0.des", {"a": b"x"})
    with mounted(tmp_path / "store", tmp_path / "mnt", "refresh=0.2") as mount:
        assert (mount / "2026-11-20/a").read_bytes() == b"x"
        put_container(tmp_path / "store/2026-11-21.des", {"b": b"y"})
        (tmp_path / "store/2026-11-20/0.des").unlink()
        wait_until(lambda: os.listdir(mount) == ["2026-11-21"], "the new day")
        assert (mount / "2026-11-21/b").read_bytes() == b"y"
        wait_until(lambda: outcome(lambda: os.listdir(mount / "2026-11-20")) == "ENOENT", "the old day's end")


class Passing(CountingProxy):
    """A proxy whose connections can be cut."""

    def hang_up(self) -> None:
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


def test_a_store_that_is_away_for_a_while_leaves_the_last_view(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    """docs/semantics.md: A refresh that fails keeps the last good view and says so in the log.

    What was listed stays listed, what was read stays readable, and all goes on when the store is back."""
    path = put_container(tmp_path / "0.des", {"a": b"x", "b": b"y"})
    s3.client().put_object(Bucket=bucket, Key=f"{DAY}/0.des", Body=path.read_bytes())
    with Passing(s3.host, s3.port) as proxy:
        log = tmp_path / "log"
        options = f"refresh=0.2,deadline=1,log_file={log}"
        with mounted(f"s3://{bucket}", tmp_path / "mnt", options, env=s3.environ(endpoint_url=proxy.url)) as mount:
            day = mount / DAY
            assert (day / "a").read_bytes() == b"x"
            assert sorted(os.listdir(day)) == ["a", "b"]
            port, proxy.upstream_port = proxy.upstream_port, 1  # nobody listens there
            proxy.hang_up()
            other = put_container(tmp_path / "1.des", {"c": b"z"})
            s3.client().put_object(Bucket=bucket, Key=f"{DAY}/1.des", Body=other.read_bytes())

            def is_said() -> bool:
                assert sorted(os.listdir(day)) == ["a", "b"]
                assert (day / "a").read_bytes() == b"x"
                return log.read_text().count("refresh failed, the last view stays") >= 2

            wait_until(is_said, "two lines in the log")
            assert is_running(daemon_of(mount))
            proxy.upstream_port = port
            wait_until((day / "c").exists, "the store's return")
            assert (day / "c").read_bytes() == b"z"


@pytest.mark.parametrize("day_name", [DAY, "2020-02-29"])
def test_names_that_are_not_there_are_asked_for_once(tmp_path: Path, day_name: str) -> None:
    """The kernel remembers that a name is not there, in the root, in open and closed days, and in directories, until
    the refresh tells it that it has come."""
    store = tmp_path / "store"
    put_container(store / day_name / "0.des", {"d/f": b"x"})
    with mounted(store, tmp_path / "mnt", "refresh=0.1") as mount:
        paths = [mount / "new", mount / day_name / "new", mount / day_name / "d" / "new", mount / day_name / "n/n"]

        def lookups() -> int:
            metrics = json.loads((mount / ".desfs/stats").read_bytes())["metrics"]
            return sum(
                int(count) for name, count in metrics.items() if name.startswith("desfs_fuse_requests_total.lookup.")
            )

        def ask() -> int:
            before = lookups()
            for _ in range(100):
                assert not any(path.exists() for path in paths)
            return lookups() - before

        # Whoever drops the machine's caches meanwhile costs a few more.
        wait_until(lambda: ask() < 50, "lookups that the kernel answers")
        put_container(store / "new" / "0.des", {"f": b"x"})
        put_container(store / day_name / "1.des", {"new": b"1", "d/new": b"2", "n/n": b"3"})
        closed = day_name != DAY
        for path in paths[:1] if closed else paths:  # a closed day is listed again every 6 s here
            wait_until(path.exists, str(path))


def test_an_open_file_is_read_on_after_a_merge(tmp_path: Path) -> None:
    """docs/semantics.md: When a container is replaced or removed, files of it that are open are read on where the same
    content stands now, as after a merge or a seal; size, time and checksum tell.

    Parts are merged and deleted while a program reads a file of one: it reads on, without an error and without a wrong
    byte."""
    store = tmp_path / "store"
    data = Random(3).randbytes(3_000_000)
    put_container(store / DAY / "0-000001.des", {"large": data})
    put_container(store / DAY / "0-000002.des", {"small": b"x"})
    with (
        mounted(store, tmp_path / "mnt", "refresh=0.2,memory=1MiB") as mount,
        (mount / DAY / "large").open("rb", 0) as file,
    ):
        assert file.read(1000) == data[:1000]
        put_container(store / DAY / "0.des", {"large": data, "small": b"x"})
        for part in (1, 2):
            (store / DAY / f"0-{part:06d}.des").unlink()
        read = data[:1000]
        while piece := file.read(100_000):
            read += piece
        assert read == data
        wait_until(
            lambda: os.getxattr(mount / DAY / "large", "user.des.container") == f"{DAY}/0.des".encode(), "the merge"
        )
        assert (mount / DAY / "large").read_bytes() == data
