"""desfs/merging/seal.py: a day is sealed while it is read through a mount."""

from __future__ import annotations

import hashlib
import mmap
import os
import subprocess
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from random import Random

import pytest

from assignment.catalog import Catalog, Lease
from des_format.shards import placement_shard, shard_hex
from desfs.store.base import S3Options
from desfs.store.retrying import Retrying
from tests.merging import DAY, World, build_part, commit_part
from tests.mount.mounting import desfs, mounted, wait_until
from tests.servers import S3Server

pytestmark = pytest.mark.fuse

SHARDS = 16
PARTS = 20
FOLDERS = 64
GRACE_S = 2
MORE = 2  # times that each reader has to get through the whole day after each step


def files_of(version: int) -> dict[str, dict[str, bytes]]:
    """The files of one part of each shard: names of their own, and one in each folder that every part has again."""
    dice = Random(version)
    shards: dict[str, dict[str, bytes]] = {}
    for folder in range(FOLDERS):
        files = shards.setdefault(shard_hex(placement_shard(f"d{folder}/x", 4), 4), {})
        files[f"d{folder}/f{version:02}"] = dice.randbytes(dice.choice([0, 1, 900, 5000]))
        files[f"d{folder}/again"] = b"version %d of %d" % (version, folder) * 50
    return shards


def fill(world: World) -> dict[str, bytes]:
    """16 shards of 20 parts; what the day shows."""
    world.put_layout()
    expected: dict[str, bytes] = {}
    versions = [files_of(version) for version in range(PARTS)]
    assert len(versions[0]) == SHARDS
    for shard in versions[0]:

        async def work(store: Retrying, catalog: Catalog, lease: Lease) -> None:
            for version in versions:
                await commit_part(store, catalog, lease, build_part(version[lease.shard]))
                expected.update(version[lease.shard])

        world.under_lease(shard, work)
    return expected


class Readers:
    """Loops that read the whole day until they are told to end. The first error of any ends it."""

    def __init__(self, day: Path, expected: dict[str, bytes], sums: Path) -> None:
        self.day = day
        self.expected = expected
        self.sums = sums
        self.passes: Counter[str] = Counter()
        self.errors: list[BaseException] = []
        self._ended = threading.Event()
        digests = sorted((hashlib.md5(data).hexdigest(), name) for name, data in expected.items())
        sums.write_text("".join(f"{digest}  {name}\n" for digest, name in digests))

    def tar(self) -> None:
        with tarfile.open(fileobj=BytesIO(self._run("tar", "cf", "-", "."))) as archive:
            found = {member.name[2:]: archive.extractfile(member) for member in archive if member.isfile()}
            assert {name: file.read() for name, file in found.items() if file is not None} == self.expected

    def md5sum(self) -> None:
        assert self._run("md5sum", "--quiet", "--check", str(self.sums)) == b""

    def direct(self) -> None:
        """Past the kernel's cache, so that the daemon is asked each time."""
        page = mmap.mmap(-1, 16 * 1024)
        for name, data in Random(len(self.passes)).sample(sorted(self.expected.items()), 300):
            file = os.open(self.day / name, os.O_RDONLY | os.O_DIRECT)
            try:
                length = os.preadv(file, [page], 0)
                assert page[:length] == data, name
            finally:
                os.close(file)

    def _run(self, *command: str) -> bytes:
        done = subprocess.run(
            command, cwd=self.day, capture_output=True, timeout=60, check=False, env=os.environ | {"LC_ALL": "C.UTF-8"}
        )
        assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode()
        return done.stdout

    @contextmanager
    def running(self) -> Iterator[None]:
        loops = (self.tar, self.md5sum, self.direct)
        threads = [threading.Thread(target=self._loop, args=(loop,)) for loop in loops]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            for thread in threads:
                thread.join()

    def _loop(self, read: Callable[[], None]) -> None:
        try:
            while not self._ended.is_set() and not self.errors:
                read()
                self.passes[read.__name__] += 1
        except BaseException as error:
            self.errors.append(error)

    def wait_passes(self) -> None:
        """Until each has got through the whole day again."""
        before = dict(self.passes)
        wait_until(
            lambda: (
                self.errors or all(self.passes[who] >= before.get(who, 0) + MORE for who in ("tar", "md5sum", "direct"))
            ),
            "the readers",
        )
        if self.errors:
            raise self.errors[0]


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_a_day_is_sealed_and_nobody_who_reads_it_notices(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 shards of 20 parts each, read by `tar`, by `md5sum` and past the kernel's cache all along: no error, no wrong
    byte; after the grace period 16 containers are what remains of the day."""
    world = World(tmp_path)
    env: dict[str, str] = {}
    if kind == "s3":
        server: S3Server = request.getfixturevalue("s3")
        bucket: str = request.getfixturevalue("bucket")
        env = server.environ()
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        world = World(tmp_path, f"s3://{bucket}/some/prefix", S3Options(endpoint_url=server.endpoint_url))
    expected = fill(world)
    assert len(world.objects()) == SHARDS * PARTS
    log = tmp_path / "log"

    def seal() -> str:
        done = desfs(
            "seal",
            "--store",
            world.store_url,
            "--catalog",
            world.catalog_url,
            env=env | {"DESFS_DELETE_GRACE": f"{GRACE_S}"},
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout

    with mounted(
        world.store_url, tmp_path / "mnt", f"refresh=0.5,memory=8M,deadline=20,log_file={log}", env=env
    ) as mount:
        readers = Readers(mount / str(DAY), expected, tmp_path / "sums")
        with readers.running():
            readers.wait_passes()
            line = seal()
            assert line.startswith(f"looked at 1 day: sealed {SHARDS * PARTS} containers into {SHARDS} (")
            assert len(world.objects()) == SHARDS * (PARTS + 1)
            readers.wait_passes()
            wait_until(lambda: "deleted" in seal() and len(world.objects()) == SHARDS, "the end of the grace period")
            readers.wait_passes()
    assert "unexpected" not in log.read_text()
    assert world.objects() == [f"{DAY}/{shard:x}.des" for shard in range(SHARDS)]
    with mounted(world.store_url, tmp_path / "fresh", env=env) as mount:
        found = {
            str(path.relative_to(mount / str(DAY))): path for path in (mount / str(DAY)).rglob("*") if path.is_file()
        }
        assert {name: path.read_bytes() for name, path in found.items()} == expected
