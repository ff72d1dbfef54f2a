"""docs/operations.md, Signals, and what a service manager hears: a real notify socket, real signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import servers
from tests.fakes.counting_proxy import CountingProxy, _Stream
from tests.mount.mounting import PATIENCE_S, PROGRAM, daemon_of, desfs, mount, mounted, outcome, wait_until
from tests.mount.stores import put_sharded, upload
from tests.servers import MountPoint, S3Server

pytestmark = pytest.mark.fuse

DAY = "2026-11-20"
FILES = {f"d{n % 5}/f{n:03}": bytes([n]) * (n * 100 + 1) for n in range(200)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    put_sharded(folder, DAY, FILES)
    return folder


class Manager:
    """What a service manager is: a socket, and what came through it."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.settimeout(PATIENCE_S)

    def next(self) -> dict[str, str]:
        """The next message but for those of the watchdog."""
        while True:
            found = self.any()
            if found != {"WATCHDOG": "1"}:
                return found

    def any(self) -> dict[str, str]:
        lines = self.socket.recv(4096).decode().splitlines()
        return {name: value for name, _, value in (line.partition("=") for line in lines)}


@contextlib.contextmanager
def service(
    source: object, where: Path, address: str, *options: str, **environ: str
) -> Iterator[tuple[Manager, subprocess.Popen[str]]]:
    """`desfs mount -f` under a manager."""
    manager = Manager(address)
    with manager.socket, servers.mount_point(where):
        process = subprocess.Popen(
            [PROGRAM, "mount", str(source), where, "-f", *(word for option in options for word in ("-o", option))],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"NOTIFY_SOCKET": address} | environ,
        )
        try:
            yield manager, process
        finally:
            process.kill()
            process.communicate(timeout=PATIENCE_S)


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_ready_reload_and_stop(store: Path, tmp_path: Path, kind: str) -> None:
    """docs/operations.md: With -f it says when it is ready, that it reloads, and that it ends."""
    address = str(tmp_path / "notify") if kind == "path" else f"@desfs-{tmp_path}"
    where = tmp_path / "mnt"
    with service(store, where, address) as (manager, process):
        ready = manager.next()
        assert (ready["READY"], ready["MAINPID"]) == ("1", str(process.pid))
        assert str(where) in ready["STATUS"]
        assert os.listdir(where) == [DAY]
        process.send_signal(signal.SIGHUP)
        reloading = manager.next()
        assert reloading["RELOADING"] == "1"
        assert int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
        assert manager.next()["READY"] == "1"
        process.send_signal(signal.SIGTERM)
        assert manager.next()["STOPPING"] == "1"
        assert process.wait(PATIENCE_S) == 0
        assert not servers.is_mounted(where)


def test_ready_is_never_early(s3: S3Server, bucket: str, store: Path, tmp_path: Path) -> None:
    """docs/operations.md: It says ready when the root answers, not before."""
    upload(s3, bucket, store)
    with CountingProxy(s3.host, s3.port, delay_s=0.5) as proxy:
        where = tmp_path / "mnt"
        environ = s3.environ(endpoint_url=proxy.url)
        with service(f"s3://{bucket}", where, str(tmp_path / "notify"), **environ) as (manager, _):
            wait_until(lambda: proxy.requests, "the first request")
            manager.socket.setblocking(False)
            assert not servers.is_mounted(where)
            assert outcome(lambda: manager.socket.recv(1)) == "EAGAIN"
            manager.socket.settimeout(PATIENCE_S)
            assert manager.next()["READY"] == "1"
            assert os.listdir(where) == [DAY]


def test_the_watchdog_is_fed_by_the_event_loop(store: Path, tmp_path: Path) -> None:
    """docs/operations.md: The watchdog hears from the event loop, and nothing from one that stands still."""
    with service(store, tmp_path / "mnt", str(tmp_path / "notify"), WATCHDOG_USEC="300000") as (manager, process):
        assert manager.next()["READY"] == "1"
        for _ in range(5):
            assert manager.any() == {"WATCHDOG": "1"}
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: servers.state_of(process.pid) == "T", "the stop")
        manager.socket.setblocking(False)
        while outcome(manager.any) != "EAGAIN":
            pass
        manager.socket.settimeout(1.0)
        with pytest.raises(TimeoutError):
            manager.any()
        process.send_signal(signal.SIGCONT)
        manager.socket.settimeout(PATIENCE_S)
        assert manager.any() == {"WATCHDOG": "1"}


def test_a_watchdog_of_another_process_is_not_fed(store: Path, tmp_path: Path) -> None:
    """sd_watchdog_enabled(3): WATCHDOG_PID says who is meant. Without a watchdog it hears little."""
    environ = {"WATCHDOG_USEC": "300000", "WATCHDOG_PID": "1"}
    with service(store, tmp_path / "mnt", str(tmp_path / "notify"), **environ) as (manager, _):
        assert manager.next()["READY"] == "1"
        manager.any()
        manager.socket.settimeout(1.0)
        with pytest.raises(TimeoutError):
            manager.any()


def test_a_manager_that_is_gone_is_no_reason_to_stop(store: Path, tmp_path: Path) -> None:
    with service(store, tmp_path / "mnt", str(tmp_path / "notify")) as (manager, process):
        assert manager.next()["READY"] == "1"
        manager.socket.close()
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGUSR1)
        assert (tmp_path / "mnt" / DAY / "d1" / "f001").read_bytes() == FILES["d1/f001"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0


# --- SIGHUP and SIGUSR1 --------------------------------------------------------------------------------------------


def stats(where: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((where / ".desfs" / "stats").read_bytes())
    return found


def config(where: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((where / ".desfs" / "config").read_bytes())
    return found


def test_sighup_takes_over_settings_and_shows_what_is_new(store: Path, mount_dir: MountPoint, tmp_path: Path) -> None:
    """docs/operations.md: SIGHUP reads the settings again and lists the days again that somebody has looked at."""
    own = tmp_path / "store"
    put_sharded(own, DAY, {"f": b"first"})
    settings, log = tmp_path / "desfs.toml", tmp_path / "the.log"
    settings.write_text('refresh = 600\ndeadline = 30\n[mount]\nmemory = "64M"\n')
    mount(own, mount_dir.path, f"config={settings},log_file={log}")
    pid = daemon_of(mount_dir.path)
    assert os.listdir(mount_dir.path / DAY) == ["f"]
    assert config(mount_dir.path) | {"refresh": 600.0, "deadline": 30.0, "memory": 64 << 20} == config(mount_dir.path)
    put_sharded(own, "2026-11-21", {"g": b"second"})
    settings.write_text('refresh = 500\ndeadline = 20\nlog_level = "debug"\n[mount]\nmemory = "32M"\n')
    os.rename(log, tmp_path / "the.log.1")
    os.kill(pid, signal.SIGHUP)
    wait_until(lambda: config(mount_dir.path)["refresh"] == 500.0, "the new settings")
    assert config(mount_dir.path)["memory"] == 64 << 20
    wait_until(lambda: len(os.listdir(mount_dir.path)) == 2, "the new day")
    wait_until(lambda: log.exists() and "memory" in log.read_text(), "what takes effect later")
    assert (mount_dir.path / "2026-11-21" / "g").read_bytes() == b"second"


def test_settings_that_make_no_sense_leave_the_old_ones(store: Path, mount_dir: MountPoint, tmp_path: Path) -> None:
    """docs/operations.md: A settings file that makes no sense is said in the log, and changes nothing."""
    settings, log = tmp_path / "desfs.toml", tmp_path / "the.log"
    settings.write_text("refresh = 600\n")
    mount(store, mount_dir.path, f"config={settings},log_file={log}")
    pid = daemon_of(mount_dir.path)
    for wrong, named in (
        ("refesh = 5\n", "did you mean refresh"),
        ("refresh = = 5\n", "line 1"),
        ("refresh = 0\n", "0"),
    ):
        settings.write_text(wrong)
        os.kill(pid, signal.SIGHUP)
        wait_until(lambda named=named: named in log.read_text(), named)  # type: ignore[misc]
    assert config(mount_dir.path)["refresh"] == 600.0
    assert (mount_dir.path / DAY / "d1" / "f001").read_bytes() == FILES["d1/f001"]


def test_sigusr1_writes_the_state_to_the_log(s3: S3Server, bucket: str, store: Path, tmp_path: Path) -> None:
    """docs/operations.md: SIGUSR1 writes open requests with their age, tasks and caches to the log."""
    upload(s3, bucket, store)
    log = tmp_path / "the.log"
    with (
        CountingProxy(s3.host, s3.port) as proxy,
        mounted(
            f"s3://{bucket}",
            tmp_path / "mnt",
            f"log_file={log},log_format=json",
            env=s3.environ(endpoint_url=proxy.url),
        ) as where,
    ):
        names = os.listdir(where / DAY / "d1")
        proxy.delay_s = 5
        reader = threading.Thread(target=(where / DAY / "d1" / names[0]).read_bytes)
        reader.start()
        wait_until(lambda: stats(where)["requests"]["open"] > 0, "an open request")  # type: ignore[index]
        os.kill(daemon_of(where), signal.SIGUSR1)
        wait_until(lambda: "state: problems" in log.read_text(), "the state")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        proxy.delay_s = 0
        reader.join()
    events = {line["event"]: line for line in lines}
    assert events["state: open request"]["operation"] == "read"
    assert 0 < events["state: open request"]["age_s"] < 60
    assert events["state: requests"]["open"] >= 1
    assert any("fetch" in line["waits_in"] for line in lines if line["event"] == "state: tasks")
    assert {"state: caches", "state: link"} <= events.keys()


# --- the end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levers", ["auto", "off"])
def test_sigterm_while_a_tar_runs(store: Path, mount_dir: MountPoint, tmp_path: Path, levers: str) -> None:
    """docs/operations.md: SIGTERM ends a busy mount within ten seconds, lazily, and says so. Some times: it may come
    while the kernel takes pages from the daemon that wait for a READ."""
    for number in range(4):
        log = tmp_path / f"{number}.log"
        mount(store, mount_dir.path, f"log_file={log},levers={levers}")
        end_while_a_tar_runs(mount_dir.path)
        assert "unmounting lazily" in log.read_text()
        assert "may not be able to end" not in log.read_text()


def end_while_a_tar_runs(mount_dir: Path) -> None:
    pid = daemon_of(mount_dir)
    # What the kernel has in its caches can be read from a dead mount as well: the loop need not end by itself.
    script = "while :; do tar -cf - . | cat > /dev/null; done"
    with subprocess.Popen(
        ["bash", "-c", script], stderr=subprocess.DEVNULL, cwd=mount_dir, start_new_session=True
    ) as tars:
        try:
            wait_until(lambda: stats(mount_dir)["metrics"].get("desfs_fuse_requests_total.read.OK"), "tar")  # type: ignore[attr-defined]
            began = time.monotonic()
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: not servers.is_running(pid), "the daemon's end")
            assert time.monotonic() - began < 30, "within 10 s when nobody else needs the machine"
            assert not servers.is_mounted(mount_dir)
        finally:
            os.killpg(tars.pid, signal.SIGKILL)


def test_an_idle_mount_is_not_unmounted_lazily(store: Path, mount_dir: MountPoint, tmp_path: Path) -> None:
    log = tmp_path / "the.log"
    mount(store, mount_dir.path, f"log_file={log}")
    pid = daemon_of(mount_dir.path)
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not servers.is_running(pid), "the daemon's end")
    assert "signal=SIGTERM" in log.read_text()
    assert "lazily" not in log.read_text()


class Silent(CountingProxy):
    """A proxy that can fall silent: it then accepts connections and reads requests, and never answers those."""

    def __init__(self, server: S3Server) -> None:
        super().__init__(server.host, server.port)
        self.is_silent = False
        self.over = threading.Event()

    def __exit__(self, *arguments: object) -> None:
        self.over.set()
        super().__exit__(*arguments)  # type: ignore[arg-type]

    def _exchange(self, client: _Stream, upstream: _Stream) -> bool:
        head = client.read_head()
        if self.is_silent:
            self.over.wait()
            return False
        client._ahead = head + client._ahead
        return super()._exchange(client, upstream)


def test_a_store_that_stops_answering(s3: S3Server, bucket: str, store: Path, tmp_path: Path) -> None:
    """docs/semantics.md: A read answers EIO by the deadline when the store sends nothing; what is known is listed, and
    the next read succeeds when the store is back."""
    upload(s3, bucket, store)
    with (
        Silent(s3) as proxy,
        mounted(
            f"s3://{bucket}", tmp_path / "mnt", "deadline=3,refresh=600", env=s3.environ(endpoint_url=proxy.url)
        ) as where,
    ):
        listed = sorted(os.listdir(where / DAY / "d1"))
        proxy.is_silent = True
        began = time.monotonic()
        assert outcome((where / DAY / "d1" / listed[0]).read_bytes) == "EIO"
        failed = time.monotonic()
        assert failed - began < 30, "3 s when nobody else needs the machine"
        assert sorted(os.listdir(where / DAY / "d1")) == listed
        assert os.stat(where / DAY / "d1" / listed[1]).st_size == len(FILES[f"d1/{listed[1]}"])
        proxy.is_silent = False
        # A kernel that does not ask for a second time leaves the answer to that to whoever comes within 50 ms.
        wait_until(lambda: time.monotonic() > failed + 0.1, "the moment after a failure")
        assert (where / DAY / "d1" / listed[0]).read_bytes() == FILES[f"d1/{listed[0]}"]
        proxy.is_silent = True
        assert desfs("umount", where).returncode == 0


def test_a_kill_and_the_same_command_again(store: Path, mount_dir: MountPoint) -> None:
    """docs/operations.md: After a crash the next `desfs mount` clears the dead mount."""
    command = ("mount", store, mount_dir.path)
    assert desfs(*command).returncode == 0
    for _ in range(3):
        pid = daemon_of(mount_dir.path)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: not servers.is_running(pid), "the daemon's end")  # type: ignore[misc]
        done = desfs(*command)
        assert (done.returncode, done.stderr) == (0, "")
        assert (mount_dir.path / DAY / "d1" / "f001").read_bytes() == FILES["d1/f001"]


def test_auto_unmount_is_for_those_who_ask_for_it(store: Path, mount_dir: MountPoint) -> None:
    """docs/operations.md: With `auto_unmount` fusermount3 unmounts when the daemon dies."""
    mount(store, mount_dir.path, "auto_unmount")
    pid = daemon_of(mount_dir.path)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not servers.is_mounted(mount_dir.path), "the unmount")
    assert os.listdir(mount_dir.path) == []
