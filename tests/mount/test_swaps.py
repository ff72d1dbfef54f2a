"""Objects are swapped while everybody reads: docs/semantics.md, Reading and Visibility."""

from __future__ import annotations

import errno
import mmap
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from random import Random

import pytest

from tests.mount.mounting import mounted, wait_until
from tests.mount.stores import put_container
from tests.mount.swapping import (
    DAY,
    DIRECTORIES,
    LAYOUT,
    PASSING,
    STEADY,
    FileObjects,
    S3Objects,
    Swapper,
    content,
    size_of,
    version_of,
)
from tests.servers import S3Server

pytestmark = pytest.mark.fuse

STEPS = 16
# Reads that have to be done between two steps: the readers see most of what there is.
PACE = 30
KINDS = 7  # of steps, one after the other
LIMIT_S = 6.0  # for all steps: a busy machine makes fewer of them, but one of each kind
_AT_ONCE = 100_000  # bytes of a read: an odd number of pages
REASONS = re.compile(
    r"Stale file handle|No such file or directory|[Ff]ile removed before we read it|changed as we read it|"
    r"File shrank by \d+ bytes; padding with zeros|Exiting with failure status due to previous errors|"
    r"it was replaced while being copied"
)


class Readers:
    """Threads that read until they are told to end; what they saw, and what went wrong."""

    def __init__(self, day: Path, swapper: Swapper) -> None:
        self.day = day
        self.swapper = swapper
        self.ended = threading.Event()
        self.failures: list[BaseException] = []
        self.done: Counter[str] = Counter()
        self.stale: Counter[str] = Counter()
        self.seen: set[tuple[str, int]] = set()
        self.progress = threading.Condition()
        self.opened: dict[str, tuple[int, int | None]] = {}

    def count(self, who: str, name: str, version: int) -> None:
        with self.progress:
            assert 0 <= version <= self.swapper.started, f"{name}: version {version} never was"
            if name.startswith(DIRECTORIES["moved"]):
                assert version == 0, name
            self.done[who] += 1
            self.seen.add((name, version))
            self.progress.notify_all()

    def allow(self, name: str, code: int | None) -> None:
        """An error that a reader may see. AssertionError for any other."""
        assert code in (errno.ESTALE, errno.ENOENT), f"{name}: {errno.errorcode.get(code or 0)}"
        assert not name.startswith(STEADY), f"{name}: {errno.errorcode[code]}, and nothing of it has changed"
        assert code == errno.ESTALE or name.startswith(PASSING), f"{name}: ENOENT"
        self.stale[errno.errorcode[code]] += 1

    def try_until_read(self, name: str, read: Callable[[Path], int]) -> int | None:
        """The version that a reader gets of a file, who tries again when he is told that it is stale. While nothing
        changes, once is enough."""
        stale_at: int | None = None
        while not self.ended.is_set():
            before = self.swapper.quiet()
            try:
                return read(self.day / name)
            except OSError as error:
                self.allow(name, error.errno)
                if error.errno == errno.ENOENT:
                    return None
            if before is not None and before == self.swapper.quiet():
                assert stale_at != before, f"{name} is stale after it was opened again"
                stale_at = before
        return None

    @contextmanager
    def running(self, *loops: Callable[[], None]) -> Iterator[None]:
        def run(loop: Callable[[], None]) -> None:
            try:
                while not self.ended.is_set() and not self.failures:
                    loop()
            except BaseException as error:
                self.failures.append(error)
                with self.progress:
                    self.progress.notify_all()

        threads = [threading.Thread(target=run, args=(loop,), name=f"reader {n}") for n, loop in enumerate(loops)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.ended.set()
            for thread in threads:
                thread.join()
            for file, _ in self.opened.values():
                os.close(file)

    # --- readers ---

    def random_reader(self, seed: int, *, direct: bool = False) -> Callable[[], None]:
        """Reads some of a file, or all of it, in pieces of odd sizes."""
        dice = Random(seed)
        names = [name for role in DIRECTORIES for name in self.swapper.names(role)]
        page = mmap.mmap(-1, 64 * 1024)

        def read(path: Path) -> int:
            name = f"{path.parent.name}/{path.name}"
            file = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
            try:
                size = os.fstat(file).st_size
                if direct:
                    at = dice.randrange(size) // 4096 * 4096
                    length = os.preadv(file, [page], at)
                    assert length == min(len(page), size - at), name
                    version = version_of(name, page[:length], at) if length >= 64 else -1
                elif size > 1 << 20:
                    version = -1
                    for _ in range(4):  # of one open file: all of one version
                        at = dice.randrange(size - 64)
                        found = version_of(name, read_at(file, _AT_ONCE, at), at)
                        assert version in (-1, found), f"{name}: versions {version} and {found} in an open file"
                        version = found
                else:
                    pieces = []
                    while piece := os.read(file, dice.choice([1000, 4096, 5003, _AT_ONCE])):
                        pieces.append(piece)
                    version = version_of(name, b"".join(pieces))
                assert version < 0 or size == size_of(name, version), f"{name}: size {size}, version {version}"
                return version
            finally:
                os.close(file)

        def loop() -> None:
            name = dice.choice([*names, *(name for name in names if "ext-" in name or name.endswith("large"))])
            version = self.try_until_read(name, read)
            if version is not None and version >= 0:
                self.count("direct" if direct else "random", name, version)

        return loop

    def patient_reader(self, seed: int) -> Callable[[], None]:
        """Keeps files open, and reads a little of each now and then."""
        dice = Random(seed)
        opened = self.opened
        names = [name for role in DIRECTORIES for name in self.swapper.names(role)[-8:]]

        def loop() -> None:
            name = dice.choice(names)
            if name not in opened:
                try:
                    opened[name] = (os.open(self.day / name, os.O_RDONLY), None)
                except OSError as error:
                    self.allow(name, error.errno)
                    return
            file, version = opened[name]
            at = dice.randrange(size_of(name, 0) - 64)
            try:
                found = version_of(name, read_at(file, 20_000, at), at)
            except OSError as error:
                self.allow(name, error.errno)
                os.close(opened.pop(name)[0])
                return
            assert version in (None, found), f"{name}: version {version}, then {found} of an open file"
            opened[name] = (file, found)
            self.count("patient", name, found)

        return loop

    def mapping_reader(self, seed: int) -> Callable[[], None]:
        """Maps files, in a program of its own: it dies of pages that are stale."""

        def loop() -> None:
            command = [sys.executable, "-m", "tests.mount.swapping", str(self.day), str(seed)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
                assert program.stdout is not None
                assert program.stderr is not None
                name = ""
                try:
                    while not self.ended.is_set() and (line := program.stdout.readline().rstrip()):
                        if "/" in line:
                            name = line
                        elif line.isdecimal():
                            self.count("mapped", name, int(line))
                        else:
                            self.allow(name, {"Stale file handle": errno.ESTALE}.get(line, errno.ENOENT))
                finally:
                    if not line:
                        program.wait()
                        if program.returncode == -7:  # SIGBUS
                            self.allow(name, errno.ESTALE)
                        else:
                            raise AssertionError(f"{name}: {program.returncode}, {program.stderr.read()}")
                    program.kill()

        return loop

    def tar(self) -> None:
        """Reads everything, as an archive. What it complains of is filled with zeros there."""
        done = _run(["tar", "cf", "-", "."], self.day)
        with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
            files = {member.name.removeprefix("./"): member for member in archive if member.isfile()}
            failed = self._complaints(r"tar: \./(.*?): ", done.stderr.decode(), "tar: Exiting with failure")
            for name in files.keys() - failed:
                extracted = archive.extractfile(files[name])
                assert extracted is not None
                self.count("tar", name, version_of(name, extracted.read()))
        missing = {name for role in DIRECTORIES for name in self.swapper.names(role)} - files.keys() - failed
        assert all(name.startswith(PASSING) for name in missing), missing

    def cp(self, target: Path) -> None:
        """Copies everything."""
        done = _run(["cp", "-r", self.day, target], self.day.parent)
        failed = self._complaints(r"cp: .*'.*?/" + DAY + "/(.*?)'", done.stderr.decode(), "cp: -")
        for path in [path for path in target.rglob("*") if path.is_file()]:
            name = str(path.relative_to(target))
            if name not in failed:
                self.count("cp", name, version_of(name, path.read_bytes()))
        shutil.rmtree(target)

    def _complaints(self, pattern: str, stderr: str, closing: str) -> set[str]:
        names = set()
        for line in stderr.splitlines():
            if re.search(r"cannot create directory .* File exists|will not overwrite just-created", line):
                continue  # listed twice, once in the container that is new
            assert REASONS.search(line), line
            if line.startswith(closing) or re.fullmatch(r"tar: \.(/\w+)?: file changed as we read it", line):
                continue  # a directory's time: never a file's
            found = re.match(pattern, line)
            assert found is not None, line
            if "it was replaced while being copied" in line:
                pass  # cp compares inode numbers, and that of a file goes with its container
            elif "/" in found[1]:  # else a directory that has gone
                self.allow(found[1], errno.ENOENT if "No such" in line or "removed" in line else errno.ESTALE)
            else:
                assert found[1] == DIRECTORIES["gone"], line
            names.add(found[1])
        return names


def read_at(file: int, length: int, at: int) -> bytes:
    """Up to `length` bytes, fewer only at the end of the file. OSError if there is one behind the first of them.

    A read that fails behind its first page answers with what was before (Linux mm/filemap.c); the next one fails."""
    pieces = []
    while length and (piece := os.pread(file, length, at)):
        pieces.append(piece)
        length, at = length - len(piece), at + len(piece)
    return b"".join(pieces)


def _run(command: list[object], folder: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        capture_output=True,
        timeout=60,
        check=False,
        env=os.environ | {"LC_ALL": "C.UTF-8"},
    )


def swap_while_read(swapper: Swapper, readers: Readers) -> None:
    """All steps, each when the readers have gone on a little since the one before."""
    until = time.monotonic() + LIMIT_S

    def goes_on() -> bool:
        return not readers.failures and (swapper.ended < KINDS or time.monotonic() < until)

    while swapper.ended < STEPS and goes_on():
        goal = readers.done.total() + PACE
        with readers.progress:
            while readers.done.total() < goal and goes_on():
                readers.progress.wait(1.0)
        swapper.step()


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("file", "levers=auto"),
        ("file", "levers=off,memory=8M,cache_dir={cache}"),
        ("s3", "levers=auto,memory=8M"),
        ("s3", "levers=off,cache_dir={cache}"),
    ],
)
def test_objects_are_swapped_under_load(
    kind: str, options: str, sharded: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """docs/semantics.md: Old and new bytes are never mixed. No read returns bytes of two versions.

    A reader is told of a change by ESTALE, and has the new version when it opens the file again; a merge is noticed by
    nobody.

    docs/semantics.md: A file whose container was merged or replaced has another inode number from then on: `cp` skips
    one that this happens to between its look and its open, and says so."""
    if kind == "file":
        (tmp_path / "store").mkdir()
        objects: FileObjects | S3Objects = FileObjects(tmp_path / "store")
        source, env = (tmp_path / "store").as_uri(), {}
    else:
        server: S3Server = request.getfixturevalue("s3")
        bucket: str = request.getfixturevalue("bucket")
        objects = S3Objects(server, bucket)
        source, env = f"s3://{bucket}", server.environ()
    swapper = Swapper(objects, seed=7)
    if sharded:
        objects.put(".desfs.json", LAYOUT)
    swapper.fill()
    log = tmp_path / "log"
    more = f"refresh=0.2,deadline=20,log_file={log}"
    with mounted(source, tmp_path / "mnt", options.format(cache=tmp_path / "cache"), more, env=env) as mount:
        day = mount / DAY
        readers = Readers(day, swapper)
        with readers.running(
            readers.tar,
            lambda: readers.cp(tmp_path / "copy"),
            readers.random_reader(1),
            readers.random_reader(2),
            readers.random_reader(3, direct=True),
            readers.patient_reader(4),
            readers.mapping_reader(5),
        ):
            swap_while_read(swapper, readers)
        if readers.failures:
            raise readers.failures[0]
        assert swapper.ended >= KINDS
        assert len({version for _, version in readers.seen}) > 2
        assert all(readers.done[who] for who in ("tar", "cp", "random", "direct", "patient", "mapped"))
        objects.put(f"{DAY}/zz.des", _marker(tmp_path))
        wait_until((day / "marker").exists, "the last refresh")
        for name, version in swapper.current.items():
            if not name.endswith("ext-none"):
                with suppress(OSError):
                    (day / name).read_bytes()
                assert (day / name).read_bytes() == content(name, version), name
        shown = {
            f"{folder.name}/{file.name}" for folder in day.iterdir() if folder.is_dir() for file in folder.iterdir()
        }
        assert shown == swapper.current.keys()
    assert "unexpected" not in log.read_text()


def _marker(folder: Path) -> bytes:
    return put_container(folder / "marker.des", {"marker": b"last"}).read_bytes()
