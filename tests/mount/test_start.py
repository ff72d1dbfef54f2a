"""Mounts that fail, and how a mount begins and ends: docs/mount.md, Exit codes."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import servers
from tests.fakes.counting_proxy import CountingProxy
from tests.mount.mounting import PATIENCE_S, PROGRAM, daemon_of, desfs, mount, mounted, outcome, wait_until
from tests.mount.stores import put_container, put_sharded, upload
from tests.servers import MountPoint, S3Server

pytestmark = pytest.mark.fuse

DAY = "2026-11-20"
LIMIT_S = 30.0  # 15 when nobody else needs the machine
STALL_S = 6.0  # well over what a daemon gives its requests at its end


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("start")
    put_container(root / DAY / "0.des", {"f": b"content", "large": os.urandom(2_000_000)})
    return root


def failure(*arguments: object, status: int = 32, env: Mapping[str, str] | None = None) -> str:
    """The one line of a mount that fails, with its exit status, in time; nothing is mounted."""
    began = time.monotonic()
    done = desfs(*arguments, env=env)
    assert time.monotonic() - began < LIMIT_S
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("desfs: ")
    assert not any(isinstance(argument, Path) and servers.is_mounted(argument) for argument in arguments)
    return line


# --- failing mounts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreground", [False, True])
def test_a_missing_bucket_is_named(s3: S3Server, mount_dir: MountPoint, foreground: bool) -> None:
    more = ["-f"] if foreground else []
    line = failure("mount", "s3://no-such-bucket-here/p", mount_dir.path, *more, env=s3.environ())
    assert "no-such-bucket-here" in line


def test_wrong_credentials_are_named_and_not_printed(s3: S3Server, bucket: str, mount_dir: MountPoint) -> None:
    secret = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "hunter2hunter2"}
    line = failure("mount", f"s3://{bucket}", mount_dir.path, env=s3.environ() | secret)
    assert bucket in line
    assert any(word in line.lower() for word in ("denied", "credentials", "key", "refuse"))
    assert "hunter2" not in line


def test_no_credentials_at_all_is_said(s3: S3Server, bucket: str, mount_dir: MountPoint, tmp_path: Path) -> None:
    environ = s3.environ() | {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "HOME": str(tmp_path)}
    line = failure("mount", f"s3://{bucket}", mount_dir.path, env=environ)
    assert "credentials" in line.lower()


def test_endpoints_that_do_not_answer_are_named_in_time(s3: S3Server, tmp_path: Path) -> None:
    """Connections that are refused, accepted and never answered, and a name that does not resolve."""
    with socket.create_server((servers.HOST, 0)) as probe:
        down = probe.getsockname()[1]
    with socket.create_server((servers.HOST, 0), backlog=64) as silent, ThreadPoolExecutor(3) as pool:
        endpoints = {
            f"http://{servers.HOST}:{down}": str(down),
            f"http://{servers.HOST}:{silent.getsockname()[1]}": "s3://bucket/p",
            "http://no-such-host.invalid": "no-such-host.invalid",
        }

        def try_one(endpoint: str) -> str:
            where = tmp_path / str(list(endpoints).index(endpoint))
            where.mkdir()
            return failure("mount", "s3://bucket/p", where, env=s3.environ(endpoint_url=endpoint))

        for line, named in zip(pool.map(try_one, endpoints), endpoints.values(), strict=True):
            assert named in line


def test_sources_that_are_none_are_named(store: Path, mount_dir: MountPoint) -> None:
    container = store / DAY / "0.des"
    named = {
        str(store / "missing"): str(store / "missing"),
        (store / "missing").as_uri(): str(store / "missing"),
        str(container): "0.des",
        "gopher://host/x": "gopher",
        "s3://": "s3://",
        "s3://key:secret@bucket": "credentials",
        "file://host/x": "file:",
    }
    with ThreadPoolExecutor(3) as pool:
        lines = pool.map(lambda source: failure("mount", source, mount_dir.path), named)
        for line, cause in zip(lines, named.values(), strict=True):
            assert cause in line
            assert "secret@" not in line


def test_mount_points_that_are_none_are_named(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "does not exist" in failure("mount", store, tmp_path / "missing")
    assert "no directory" in failure("mount", store, tmp_path / "file")


def test_a_busy_mount_point_is_left_alone(store: Path, mount_dir: MountPoint) -> None:
    mount(store, mount_dir.path)
    done = desfs("mount", store, mount_dir.path)
    assert done.returncode == 32
    (line,) = done.stderr.splitlines()
    assert "busy" in line
    assert str(store) in line
    assert (mount_dir.path / DAY / "f").read_bytes() == b"content"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("refesh=5", "refresh"),
        ("refresh=soon", "refresh"),
        ("refresh=0", "refresh"),
        ("refresh", "refresh"),
        ("umask=999", "umask"),
        ("memory=much", "memory"),
        ("uid=root", "uid"),
        ("log_level=loud", "log_level"),
        ("a\\", "backslash"),
    ],
)
def test_options_that_make_no_sense_are_a_usage_error(
    store: Path, mount_dir: MountPoint, options: str, named: str
) -> None:
    """Unknown option: exit 2, with the nearest one suggested."""
    assert named in failure("mount", store, mount_dir.path, "-o", options, status=2)


def test_a_variable_that_makes_no_sense_is_a_usage_error(store: Path, mount_dir: MountPoint) -> None:
    """A setting of the environment is named as such: nobody gave an option."""
    line = failure("mount", store, mount_dir.path, status=2, env={"DESFS_REFRESH": "soon"})
    assert line.startswith("desfs: DESFS_REFRESH in the environment: ")
    line = failure("mount", store, mount_dir.path, "-o", "refresh=never", status=2, env={"DESFS_REFRESH": "soon"})
    assert line.startswith("desfs: mount option refresh: ")


def test_arguments_the_wrong_way_round_are_refused(store: Path, tmp_path: Path, mount_dir: MountPoint) -> None:
    """A mount hides what is below it: not its own store, nor another one."""
    assert "would be hidden" in failure("mount", store, store)
    assert "would be hidden" in failure("mount", store / DAY, store)
    assert "the source comes first" in failure("mount", mount_dir.path, store)


def test_an_empty_argument_is_a_usage_error(store: Path, mount_dir: MountPoint) -> None:
    """It would be the working directory: a variable that is not set must not mount that, nor be covered."""
    assert "the source is empty" in failure("mount", "", mount_dir.path, status=2)
    assert "the mount point is empty" in failure("mount", store, "", status=2)


def test_of_several_who_mount_at_a_place_one_wins(store: Path, mount_dir: MountPoint) -> None:
    """Exit 32 for the others: the mount point is busy."""
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: desfs("mount", store, mount_dir.path), range(4)))
    assert sorted(each.returncode for each in done) == [0, 32, 32, 32]
    assert all("busy" in each.stderr for each in done if each.returncode)
    assert desfs("umount", mount_dir.path).returncode == 0
    assert not servers.is_mounted(mount_dir.path)


@pytest.mark.parametrize("name", ["höre", "odd\xa0blank", "cr\rlf", "\udcff"])
def test_names_that_are_not_ascii(store: Path, tmp_path: Path, name: str) -> None:
    """Of the source, which findmnt shows, and of the mount point."""
    shutil.copytree(store, tmp_path / "stores" / name)
    with mounted(tmp_path / "stores" / name, tmp_path / f"mnt {name}") as where:
        assert (where / DAY / "f").read_bytes() == b"content"
        assert desfs("umount", where).returncode == 0
        assert not servers.is_mounted(where)


def test_a_mount_whose_place_was_renamed_ends_as_well(store: Path, tmp_path: Path) -> None:
    with servers.mount_point(tmp_path / "a" / "mnt") as point:
        mount(store, point.path)
        pid = daemon_of(point.path)
        (tmp_path / "a").rename(tmp_path / "b")
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not servers.is_running(pid), "the daemon's end")
        assert not servers.is_mounted(tmp_path / "b" / "mnt")
        assert os.listdir(tmp_path / "b" / "mnt") == []


def test_a_link_to_a_mount_unmounts_it(store: Path, mount_dir: MountPoint, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(mount_dir.path)
    mount(store, tmp_path / "link")
    assert servers.is_mounted(mount_dir.path)
    assert desfs("umount", tmp_path / "link").returncode == 0
    assert not servers.is_mounted(mount_dir.path)


def test_missing_arguments_are_a_usage_error(store: Path) -> None:
    for arguments in (["mount"], ["mount", store], ["mount", store, "/", "-q"]):
        done = desfs(*arguments)
        assert done.returncode == 2
        assert "usage: desfs mount" in done.stderr


def test_a_log_file_that_cannot_be_written_fails_the_mount(store: Path, mount_dir: MountPoint, tmp_path: Path) -> None:
    line = failure("mount", store, mount_dir.path, "-o", f"log_file={tmp_path}/missing/log")
    assert "missing/log" in line


# --- beginning ---------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_the_root_answers_when_the_command_returns(s3: S3Server, bucket: str, store: Path, tmp_path: Path) -> None:
    """`desfs mount` returns only when the root answers: forty times, with a store that is slow to answer."""
    upload(s3, bucket, store)
    with CountingProxy(s3.host, s3.port, delay_s=0.1) as proxy:
        env = s3.environ(endpoint_url=proxy.url)

        def mount_many(number: int) -> None:
            with servers.mount_point(tmp_path / str(number)) as point:
                for _ in range(10):
                    mount(f"s3://{bucket}", point.path, env=env)
                    assert os.stat(point.path).st_dev != os.stat(tmp_path).st_dev
                    assert os.listdir(point.path) == [DAY]
                    subprocess.run(["umount", point.path], check=True, timeout=PATIENCE_S)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(mount_many, range(4)))


def test_a_daemon_serves_when_its_command_was_killed(s3: S3Server, bucket: str, store: Path, tmp_path: Path) -> None:
    """A `desfs mount` that is killed while the store is slow leaves a mount that works, never a dead one."""
    upload(s3, bucket, store)
    with CountingProxy(s3.host, s3.port, delay_s=1.0) as proxy, servers.mount_point(tmp_path / "mnt") as point:
        command = subprocess.Popen(
            [PROGRAM, "mount", f"s3://{bucket}", point.path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | s3.environ(endpoint_url=proxy.url),
        )
        with command:
            wait_until(lambda: proxy.requests, "the daemon's first request")
            assert not servers.is_mounted(point.path)
            (word,) = pipes_of(command.pid)  # where it waits for the daemon's
            command.kill()
        wait_until(lambda: servers.is_mounted(point.path), "the mount")
        pid = daemon_of(point.path)
        wait_until(lambda: not servers.is_running(pid) or word not in pipes_of(pid), "the daemon's word")
        assert servers.is_running(pid)
        proxy.delay_s = 0
        assert os.listdir(point.path) == [DAY]
        assert (point.path / DAY / "f").read_bytes() == b"content"


def pipes_of(pid: int) -> list[str]:
    """The pipes that a process has open."""
    found = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(descriptor))
    return [target for target in found if target.startswith("pipe:")]


def test_mount_8_runs_it_in_its_own_order(store: Path, mount_dir: MountPoint) -> None:
    """`desfs SOURCE DIR -o OPT,…` is what mount(8) runs; `rw` means nothing, with a note."""
    done = desfs(store, mount_dir.path, "-o", "rw,nosuid,_netdev,x-systemd.automount", "-s", "-n", "-t", "fuse.desfs")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"desfs: {store} is mounted read-only\n"
    assert (mount_dir.path / DAY / "f").read_bytes() == b"content"


def test_relative_paths_are_those_of_the_caller(store: Path, tmp_path: Path) -> None:
    with servers.mount_point(tmp_path / "a b"):
        done = desfs("mount", os.path.relpath(store, tmp_path), "a b", "-o", "log_file=the.log", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / "a b" / DAY / "f").read_bytes() == b"content"
        assert (tmp_path / "the.log").exists()


def test_a_daemon_holds_nothing_of_its_caller(store: Path, mount_dir: MountPoint) -> None:
    """Its working directory is the root, its standard streams are closed, and it is in a session of its own."""
    mount(store, mount_dir.path)
    pid = daemon_of(mount_dir.path)
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert {os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)} == {os.devnull}
    assert os.getsid(pid) == pid


def test_two_stores_can_be_mounted_side_by_side(store: Path, tmp_path: Path) -> None:
    put_sharded(tmp_path / "other", DAY, {"g": b"other"})
    with mounted(store, tmp_path / "one") as one, mounted(tmp_path / "other", tmp_path / "two") as two:
        assert (one / DAY / "f").read_bytes() == b"content"
        assert (two / DAY / "g").read_bytes() == b"other"


# --- ending ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_foreground(source: object, where: Path, **environ: str) -> Iterator[subprocess.Popen[str]]:
    with servers.mount_point(where):
        process = subprocess.Popen(
            [PROGRAM, "mount", str(source), where, "-f"],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environ,
        )
        try:
            wait_until(lambda: servers.is_mounted(where) or process.poll() is not None, "the mount")
            os.stat(where)
            yield process
        finally:
            process.kill()
            process.communicate(timeout=PATIENCE_S)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "umount", "fusermount3", "desfs umount"])
def test_in_the_foreground_it_ends_cleanly(store: Path, tmp_path: Path, how: str) -> None:
    """`-f` stays in the foreground; SIGTERM, SIGINT and an unmount end it with exit 0, and nothing is mounted then."""
    where = tmp_path / "mnt"
    with in_foreground(store, where) as process:
        assert (where / DAY / "f").read_bytes() == b"content"
        if how.startswith("SIG"):
            process.send_signal(getattr(signal, how))
        elif how == "desfs umount":
            assert desfs("umount", where).returncode == 0
        else:
            subprocess.run([how, *(["-u"] if how == "fusermount3" else []), where], check=True, timeout=PATIENCE_S)
        assert process.wait(PATIENCE_S) == 0
        assert not servers.is_mounted(where)
        assert process.stderr is not None
        text = process.stderr.read()
        assert "Traceback" not in text
        assert "error" not in text.lower()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_daemon_ends_on_a_signal(store: Path, mount_dir: MountPoint, number: int) -> None:
    mount(store, mount_dir.path)
    pid = daemon_of(mount_dir.path)
    os.kill(pid, number)
    wait_until(lambda: not servers.is_running(pid), "the daemon's end")
    assert not servers.is_mounted(mount_dir.path)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """An open file; closing it may fail, when its daemon has gone."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_while_a_file_is_open(store: Path, mount_dir: MountPoint, number: int) -> None:
    """docs/semantics.md: SIGTERM and SIGINT unmount and end the daemon, though files are open or reads wait for the
    store.

    The mount is gone from the tree."""
    mount(store, mount_dir.path)
    pid = daemon_of(mount_dir.path)
    with opened(mount_dir.path / DAY / "large") as file:
        assert os.read(file, 10)
        os.kill(pid, number)
        wait_until(lambda: not servers.is_running(pid), "the daemon's end")
        assert not servers.is_mounted(mount_dir.path)


@pytest.mark.parametrize("program", ["cat", "ls"])
def test_a_signal_ends_it_while_a_read_waits_for_the_store(
    s3: S3Server, bucket: str, store: Path, tmp_path: Path, program: str
) -> None:
    """docs/semantics.md: SIGTERM and SIGINT unmount and end the daemon, though files are open or reads wait for the
    store. Who still waits gets an error (`Transport endpoint is not connected`), and so does who asks for anything
    new."""
    upload(s3, bucket, store)
    with CountingProxy(s3.host, s3.port) as proxy, servers.mount_point(tmp_path / "mnt") as point:
        mount(f"s3://{bucket}", point.path, env=s3.environ(endpoint_url=proxy.url))
        pid = daemon_of(point.path)
        wanted = point.path / DAY
        if program == "cat":
            wanted /= "f"
            assert wanted.stat().st_size == 7
        proxy.delay_s = STALL_S
        reader = subprocess.Popen([program, wanted], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            count = len(proxy.requests)
            wait_until(lambda: len(proxy.requests) > count, "the read")
            os.kill(pid, signal.SIGTERM)
            began = time.monotonic()
            wait_until(lambda: not servers.is_running(pid), "the daemon's end")
            assert time.monotonic() - began < STALL_S
            assert reader.wait(PATIENCE_S) != 0
            assert reader.stderr is not None
            assert b"Transport endpoint is not connected" in reader.stderr.read()
        finally:
            reader.kill()
            reader.communicate()


@pytest.mark.parametrize("command", ["mount", "umount"])
def test_a_mount_that_hangs_because_its_daemon_cannot_end_is_cleared(
    store: Path, mount_dir: MountPoint, command: str
) -> None:
    """docs/semantics.md: A daemon that is killed (SIGKILL, out of memory) while the kernel takes pages from it cannot
    end, and its mount hangs instead of being dead. `desfs mount` and `desfs umount` find that out, abort the
    connection, and readers get an error; by hand it is `umount --force`."""
    daemon = subprocess.Popen([sys.executable, "-m", "tests.mount.stuck", mount_dir.path])
    reader: subprocess.Popen[bytes] | None = None
    minors: set[int] = set()
    try:
        wait_until(lambda: servers.is_mounted(mount_dir.path), "the mount")
        minors = {entry.minor for entry in servers.mount_table() if entry.path == mount_dir.path}
        reader = subprocess.Popen(["cat", mount_dir.path / "file"], stderr=subprocess.DEVNULL)
        wait_until(lambda: not servers.is_running(daemon.pid), "the daemon's death")
        assert daemon.poll() is None  # one of its threads is still there
        assert reader.poll() is None
        if command == "mount":
            mount(store, mount_dir.path)
            assert (mount_dir.path / DAY / "f").stat().st_size == 7
        else:
            assert desfs("umount", "--lazy", mount_dir.path).returncode == 0
            assert not servers.is_mounted(mount_dir.path)
        assert reader.wait(PATIENCE_S) == 1
        assert daemon.wait(PATIENCE_S) == -signal.SIGKILL
    except BaseException:
        servers.abort_connections(minors)
        raise
    finally:
        for process in filter(None, (daemon, reader)):
            process.kill()
            process.wait(PATIENCE_S)


def test_after_a_kill_the_next_mount_takes_the_place(store: Path, mount_dir: MountPoint) -> None:
    """docs/semantics.md: When the daemon has died, the mount answers `Transport endpoint is not connected` to all that
    the kernel does not remember, and never shows the directory underneath. The next `desfs mount` takes its place."""
    (mount_dir.path / "underneath").touch()
    mount(store, mount_dir.path)
    pid = daemon_of(mount_dir.path)

    def is_dead() -> bool:
        assert outcome(lambda: os.stat(mount_dir.path / "underneath")) != "no error"
        return outcome(lambda: os.statvfs(mount_dir.path)) == "ENOTCONN"  # which the kernel does not remember

    assert not is_dead()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not servers.is_running(pid), "the daemon's end")
    wait_until(is_dead, "the dead mount")  # ECONNABORTED at first: the last of its threads may still be ending
    assert os.strerror(errno.ENOTCONN) == "Transport endpoint is not connected"
    mount(store, mount_dir.path)
    assert (mount_dir.path / DAY / "f").read_bytes() == b"content"
    assert desfs("umount", mount_dir.path).returncode == 0
    assert os.listdir(mount_dir.path) == ["underneath"]


def test_a_late_end_does_not_take_down_a_successor(store: Path, tmp_path: Path) -> None:
    """docs/semantics.md: A daemon that ends late leaves the mount alone that has taken its place.

    A daemon unmounts only a mount that is still its own."""
    with servers.mount_point(tmp_path / "mnt") as point:
        mount(store, point.path)
        first = daemon_of(point.path)
        point.daemons.append(first)
        with opened(point.path / DAY / "large") as file:  # keeps the first alive
            subprocess.run(["fusermount3", "-uz", point.path], check=True, timeout=PATIENCE_S)
            mount(store, point.path)
            (second,) = set(servers.mount_daemons(point.path)) - {first}
            assert os.read(file, 5)
            os.kill(first, signal.SIGTERM)
            wait_until(lambda: not servers.is_running(first), "the first daemon's end")
        assert servers.is_running(second)
        assert (point.path / DAY / "f").read_bytes() == b"content"


def test_unmounting_twice_says_that_nothing_is_mounted(store: Path, mount_dir: MountPoint) -> None:
    mount(store, mount_dir.path)
    assert desfs("umount", mount_dir.path).returncode == 0
    done = desfs("umount", mount_dir.path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"desfs: {mount_dir.path}: nothing is mounted there\n"


# --- metadata never waits for data -------------------------------------------------------------------------------


def test_metadata_is_answered_while_a_hundred_reads_wait(
    s3: S3Server, bucket: str, store: Path, tmp_path: Path
) -> None:
    """`pyfuse3.main` runs at most 99 tasks by default: with 120 stalled reads a `stat` waited 6.5 s. Metadata never
    waits for data."""
    put_container(tmp_path / "store" / DAY / "0.des", {f"f{n:03d}": os.urandom(200_000) for n in range(120)})
    upload(s3, bucket, tmp_path / "store")
    with (
        CountingProxy(s3.host, s3.port) as proxy,
        mounted(f"s3://{bucket}", tmp_path / "mnt", "refresh=600", env=s3.environ(endpoint_url=proxy.url)) as where,
    ):
        names = sorted(os.listdir(where / DAY))
        proxy.delay_s = 3
        threads = [threading.Thread(target=(where / DAY / name).read_bytes) for name in names]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        for _ in range(10):
            assert (where / DAY / names[-1]).stat().st_size == 200_000
            assert len(os.listdir(where / DAY)) == 120
        assert time.monotonic() - began < proxy.delay_s
        proxy.delay_s = 0
        for thread in threads:
            thread.join()
