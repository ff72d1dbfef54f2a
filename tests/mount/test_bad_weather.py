"""A store that stalls, resets, throttles and cuts while it is read; readers that are killed, that are many, that read
oddly: docs/semantics.md, Reading."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from des_format import DesWriter
from tests.fakes.counting_proxy import CountingProxy, _body, _headers, _Stream
from tests.mount.mounting import daemon_of, mounted, outcome, wait_until
from tests.mount.stores import meta_of, upload
from tests.servers import S3Server, is_running

pytestmark = pytest.mark.fuse

DAY = "2026-11-20"
MIB = 1 << 20
FILES = {f"d{n % 7}/f{n:04}": Random(n).randbytes(1000 + n * 13 % 30_000) for n in range(2000)}
LARGE = Random(1).randbytes(40 * MIB + 4097)
UNAVAILABLE = b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>"


class Weather(CountingProxy):
    """A proxy that does to each GET of bytes what `word_of` says of its path and first byte: ok, 503, reset, cut (in
    the middle of the body) or stall (until `clear_up` is set)."""

    word_of: Callable[[str, int], str] = staticmethod(lambda path, start: "ok")

    def __init__(self, server: S3Server) -> None:
        super().__init__(server.host, server.port)
        self.clear_up = threading.Event()
        self.stalled = 0

    def __exit__(self, *arguments: object) -> None:
        self.clear_up.set()
        super().__exit__(*arguments)  # type: ignore[arg-type]

    def _exchange(self, client: _Stream, upstream: _Stream) -> bool:
        head = client.read_head()
        start = _headers(head).get("range", "").removeprefix("bytes=").partition("-")[0]
        word = self.word_of(head.split(b" ", 2)[1].decode(), int(start)) if start else "ok"
        if word == "503":
            client.socket.sendall(
                b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n%s"
                % (len(UNAVAILABLE), UNAVAILABLE)
            )
            return True
        if word == "reset":
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        if word == "cut":
            upstream.socket.sendall(head)
            answer = upstream.read_head()
            client.socket.sendall(answer)
            left = int(_headers(answer).get("content-length", "0")) // 2
            for piece in _body(upstream, _headers(answer)):
                client.socket.sendall(piece[:left])
                left -= len(piece)
                if left <= 0:
                    break
            return False
        if word == "stall":
            self.stalled += 1
            self.clear_up.wait()
        client._ahead = head + client._ahead
        return super()._exchange(client, upstream)


@pytest.fixture(scope="module")
def day(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket with four containers of small files, a large file in one of them, and an external one."""
    folder = tmp_path_factory.mktemp("weather")
    (folder / DAY / "_bigFiles").mkdir(parents=True)
    (folder / DAY / "_bigFiles" / "external").write_bytes(LARGE)
    for shard in range(4):
        with DesWriter(folder / DAY / f"{shard}.des", external_prefix=f"{DAY}/") as writer:
            for name in sorted(FILES)[shard::4]:
                writer.add_file(name, FILES[name], meta_of(FILES[name]))
            if shard == 3:
                writer.add_file("large", LARGE, meta_of(LARGE))
                writer.add_external("external", len(LARGE))
    bucket = s3.new_bucket("weather")
    try:
        upload(s3, bucket, folder)
        yield bucket
    finally:
        s3.delete_bucket(bucket)


@contextmanager
def mounted_in(s3: S3Server, bucket: str, where: Path, *options: str) -> Iterator[tuple[Path, Weather]]:
    """The day behind a proxy. The weather is fine until somebody changes it."""
    with (
        Weather(s3) as weather,
        mounted(f"s3://{bucket}", where, "refresh=600", *options, env=s3.environ(endpoint_url=weather.url)) as mount,
    ):
        try:
            yield mount / DAY, weather
        finally:
            weather.clear_up.set()


def copy(source: Path, target: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["cp", "-r", source, target], capture_output=True, check=False, timeout=90)


def check_copy(target: Path) -> None:
    found = {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert found == {**FILES, "large": LARGE, "external": LARGE}


@pytest.mark.parametrize("options", ["levers=auto", "levers=off,memory=8M", "memory=1M"])
def test_a_scan_through_faults(options: str, s3: S3Server, day: str, tmp_path: Path) -> None:
    """docs/semantics.md: Requests to the store are tried again, with growing waits, until `deadline=` (60 s)."""
    with mounted_in(s3, day, tmp_path / "mnt", options) as (place, weather):
        os.listdir(place)
        dice, lock = Random(5), threading.Lock()

        def word_of(path: str, start: int) -> str:
            with lock:
                return dice.choice(["ok"] * 20 + ["503", "reset", "cut"])

        weather.word_of = word_of
        done = copy(place, tmp_path / "copy")
        assert (done.returncode, done.stderr) == (0, b"")
        check_copy(tmp_path / "copy")


def test_what_nobody_asked_for_fails_in_silence(s3: S3Server, day: str, tmp_path: Path) -> None:
    """docs/semantics.md: Then the read answers EIO, and the next read tries afresh.

    Whoever reads the first files of a container does not hear that what is fetched ahead fails; who wants that gets
    EIO, and the file itself when the store is well again."""
    with mounted_in(s3, day, tmp_path / "mnt", "deadline=1") as (place, weather):
        names = sorted(path.name for path in (place / "d0").iterdir())
        first = next(name for name in sorted(FILES) if name.startswith("d0/"))
        weather.word_of = lambda path, start: "503" if start >= 512 * 1024 else "ok"
        assert (place / first).read_bytes() == FILES[first]
        failed = [name for name in names if outcome((place / "d0" / name).read_bytes) == "EIO"]
        assert len(failed) < len(names)
        with (place / "external").open("rb", 0) as file:
            assert outcome(lambda: os.pread(file.fileno(), 10, 20 * MIB)) == "EIO"
        weather.word_of = lambda path, start: "ok"
        assert {name: (place / "d0" / name).read_bytes() for name in names} == {
            name: FILES[f"d0/{name}"] for name in names
        }
        assert (place / "external").read_bytes() == LARGE


def test_a_stall_that_passes(s3: S3Server, day: str, tmp_path: Path) -> None:
    """Readers wait for a store that stalls, metadata do not, and who is killed meanwhile takes nothing from others."""
    with mounted_in(s3, day, tmp_path / "mnt") as (place, weather):
        os.listdir(place / "d1")
        weather.word_of = lambda path, start: "stall"
        victims = [
            subprocess.Popen(["cat", place / name], stdout=subprocess.DEVNULL) for name in ("external", "d1/f0001")
        ]
        wait_until(lambda: weather.stalled >= 2, "the stall")
        for victim in victims:
            os.kill(victim.pid, signal.SIGKILL)
        assert os.stat(place / "d1" / "f0008").st_size == len(FILES["d1/f0008"])
        with subprocess.Popen(["cp", "-r", place, tmp_path / "copy"], stderr=subprocess.PIPE) as reader:
            weather.word_of = lambda path, start: "ok"
            weather.clear_up.set()
            assert reader.stderr is not None
            assert reader.stderr.read() == b""
        for victim in victims:
            victim.wait(30)
        check_copy(tmp_path / "copy")


def test_the_end_of_a_mount_while_its_store_stalls(s3: S3Server, day: str, tmp_path: Path) -> None:
    """docs/operations.md: SIGTERM unmounts; requests under way are given up."""
    with mounted_in(s3, day, tmp_path / "mnt") as (place, weather):
        os.listdir(place / "d1")
        daemon = daemon_of(tmp_path / "mnt")
        weather.word_of = lambda path, start: "stall"
        readers = [
            subprocess.Popen(["cp", "-r", place, tmp_path / f"copy{n}"], stderr=subprocess.PIPE) for n in range(3)
        ]
        wait_until(lambda: weather.stalled >= 2, "the stall")
        os.kill(daemon, signal.SIGTERM)
        began = time.monotonic()
        wait_until(lambda: not is_running(daemon), "the daemon's end")
        assert time.monotonic() - began < 30, "within 10 s when nobody else needs the machine"
        for reader in readers:
            reader.communicate(timeout=30)
            assert reader.returncode != 0


def test_two_hundred_readers_of_one_file(s3: S3Server, day: str, tmp_path: Path) -> None:
    with mounted_in(s3, day, tmp_path / "mnt", "memory=16M") as (place, _):
        wrong: list[object] = []

        def read(number: int) -> None:
            dice = Random(number)
            try:
                for name in ("external", "large", "d0/f0007"):
                    data = FILES.get(name, LARGE)
                    with (place / name).open("rb", 0) as file:
                        for _ in range(3):
                            at = dice.randrange(len(data))
                            if os.pread(file.fileno(), 70_001, at) != data[at : at + 70_001]:
                                wrong.append((name, at))
            except OSError as error:
                wrong.append(error)

        threads = [threading.Thread(target=read, args=(number,)) for number in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


@pytest.mark.parametrize("flag", ["fullblock", "direct,fullblock"])
@pytest.mark.parametrize("size", [512 * 37, 1 * MIB + 512])
def test_odd_sizes(flag: str, size: int, s3: S3Server, day: str, tmp_path: Path) -> None:
    with mounted_in(s3, day, tmp_path / "mnt", "memory=16M") as (place, _):
        for name in ("large", "external"):
            command = ["dd", f"if={place / name}", f"bs={size}", f"iflag={flag}", "status=none"]
            assert subprocess.run(command, capture_output=True, timeout=60, check=True).stdout == LARGE
