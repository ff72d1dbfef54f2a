"""From a spool through packer, store and mount: what was written is what is read, through the kernel."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from tests import servers
from tests.crash import PROGRAM, spool_files
from tests.mount.mounting import mounted

pytestmark = pytest.mark.fuse

MIB = 1024 * 1024
# Its own child's peak: that of a child of the test would begin with the test's own memory (getrusage(2): what a process
# had before execve counts).
MEASURED = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


@contextlib.contextmanager
def store_of(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, str]]]:
    """An empty store: its URL, and the variables that a program needs to reach it."""
    if kind == "file":
        yield (tmp_path / "store").as_uri(), {}
        return
    server: servers.S3Server = request.getfixturevalue("s3")
    bucket = server.new_bucket("packed")
    try:
        yield f"s3://{bucket}", server.environ()
    finally:
        server.delete_bucket(bucket)


def pack(spool: Path, url: str, environ: dict[str, str], *options: str) -> int:
    """`packer --once`; the most memory that it had, in bytes."""
    command = [str(PROGRAM), "packer", "--once", "--spool", str(spool), "--store", url, "--settle", "0", *options]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert spool_files(spool) == []
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.parametrize("kind", ["file", pytest.param("s3", marks=pytest.mark.s3)])
def test_a_file_of_300_mib(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A 300 MiB file through the spool is stored external without its bytes ever being in memory whole (peak
    below 200 MiB), and reads back through the mount, whole and at random offsets."""
    spool = tmp_path / "spool"
    (spool / "films").mkdir(parents=True)
    seeded = random.Random(300)
    digest = sha256()
    pieces = [seeded.randbytes(MIB) for _ in range(8)]
    with open(spool / "films/large.bin", "wb") as file:
        for number in range(300):
            piece = number.to_bytes(8, "big") + pieces[number % 8][8:]
            digest.update(piece)
            file.write(piece)
    (spool / "films/small.txt").write_bytes(b"beside it")
    with store_of(kind, tmp_path, request) as (url, environ):
        assert pack(spool, url, environ) < 200 * MIB
        if kind == "file":
            (external,) = (tmp_path / "store").glob("*/_bigFiles/films/large.bin")
            assert external.stat().st_size == 300 * MIB
        with mounted(url, tmp_path / "mnt", env=environ) as mount:
            (day,) = mount.iterdir()
            assert (day / "films/small.txt").read_bytes() == b"beside it"
            path = day / "films/large.bin"
            assert path.stat().st_size == 300 * MIB
            descriptor = os.open(path, os.O_RDONLY)
            try:
                for _ in range(10):
                    offset = seeded.randrange(300 * MIB - 5000)
                    number, inside = divmod(offset, MIB)
                    expected = b"".join(
                        each.to_bytes(8, "big") + pieces[each % 8][8:] for each in (number, min(number + 1, 299))
                    )
                    length = min(5000, len(expected) - inside)
                    assert os.pread(descriptor, length, offset) == expected[inside : inside + length]
                assert os.pread(descriptor, 100, 300 * MIB - 10) == pieces[299 % 8][-10:]
            finally:
                os.close(descriptor)
            found = sha256()
            with open(path, "rb") as file:
                while piece := file.read(4 * MIB):
                    found.update(piece)
            assert found.digest() == digest.digest()


@pytest.mark.parametrize("kind", ["file", pytest.param("s3", marks=pytest.mark.s3)])
def test_a_tree_of_files(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """docs/semantics.md: Size, modification time and permission bits are those of the source file, the time to the
    nanosecond.

    Files go into a spool and come out of a mount byte for byte, with their times and modes: `diff -r` and `rsync` find
    no difference; what came in later is there as well, and a newer version is the one that is shown."""
    source, spool = tmp_path / "source", tmp_path / "spool"
    spool.mkdir()
    seeded = random.Random(1)
    for index in range(300):
        names = [f"folder {index % 7}", f"ä{index % 5}", f".{index}" if index % 3 == 0 else f"{index} & more.txt"]
        path = source.joinpath(*names[index % 3 :])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(seeded.randbytes(seeded.choice([0, 1, 100, 5000, 70_000])))
        os.utime(path, ns=(0, 1_600_000_000_123_456_789 + index))
        path.chmod(seeded.choice([0o644, 0o600, 0o755]))
    newer = next(path for path in sorted(source.rglob("*")) if path.is_file())
    content = newer.read_bytes()
    newer.write_bytes(b"an older version")
    with store_of(kind, tmp_path, request) as (url, environ):
        options = ("--shard-bits", "3", "--big-file-threshold", "64K", "--max-container-files", "100")
        subprocess.run(["cp", "-rp", f"{source}/.", spool], check=True)
        pack(spool, url, environ, *options)
        newer.write_bytes(content)
        (source / "later").write_bytes(b"came later")
        subprocess.run(["cp", "-p", "--parents", newer.relative_to(source), "later", spool], check=True, cwd=source)
        pack(spool, url, environ, *options)
        with mounted(url, tmp_path / "mnt", env=environ) as mount:
            (day,) = mount.iterdir()
            subprocess.run(["diff", "-r", source, day], check=True)
            rsync = ["rsync", "-rnt", "--itemize-changes", "--omit-dir-times", f"{source}/", f"{day}/"]
            assert subprocess.run(rsync, capture_output=True, check=True).stdout == b""
            for path in source.rglob("*"):
                if path.is_file():
                    there = (day / path.relative_to(source)).stat()
                    assert (there.st_mtime_ns, there.st_mode) == (path.stat().st_mtime_ns, path.stat().st_mode), path
