"""What programs see of a mount: docs/mount.md. The tools that people use give the source back."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from random import Random

import pytest

from tests.mount.mounting import WAYS, mounted, run, source_of
from tests.mount.stores import pack_tree, source_tree

pytestmark = pytest.mark.fuse

DAY = "2026-11-20"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source_tree(tmp_path_factory.mktemp("source") / "tree")


@pytest.fixture(scope="module", params=WAYS, ids="-".join)
def day(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    base = tmp_path_factory.mktemp("tools")
    pack_tree(source, base / "store", DAY)
    kind, levers = request.param
    with (
        source_of(kind, base / "store", request) as store,
        mounted(store.url, base / "mnt", f"levers={levers}", env=store.env) as mount,
    ):
        yield mount / DAY


def picture(root: Path) -> dict[str, tuple[int, int, int, str]]:
    """Mode, size, time in ns and digest of every file below a directory; directories by name alone, since a mount's
    have no times of their own."""
    found: dict[str, tuple[int, int, int, str]] = {}
    for path in root.rglob("*"):
        status = path.lstat()
        name = os.fsencode(path.relative_to(root)).decode("utf-8", "backslashreplace")
        if stat.S_ISDIR(status.st_mode):
            found[name] = (0, 0, 0, "directory")
        else:
            digest = sha256(path.read_bytes()).hexdigest()
            found[name] = (status.st_mode, status.st_size, status.st_mtime_ns, digest)
    return found


def test_a_walk_finds_names_sizes_modes_times_and_bytes(source: Path, day: Path) -> None:
    assert picture(day) == picture(source)


def test_diff_finds_no_difference(source: Path, day: Path) -> None:
    assert run(["diff", "-r", source, day]) == b""


@pytest.mark.parametrize(
    "command",
    [
        ["find", ".", "-type", "f", "-printf", "%P %s %T@ %m\\0"],
        ["find", ".", "-type", "d", "-printf", "%P\\0"],
        ["find", ".", "-name", "*.txt", "-size", "+8k", "-print0"],
        ["grep", "-rlaZ", "needle", "."],
    ],
    ids=["find-files", "find-directories", "find-names", "grep"],
)
def test_find_and_grep_say_the_same_of_both(source: Path, day: Path, command: list[str]) -> None:
    found = [sorted(run(command, cwd=root).split(b"\0")) for root in (source, day)]
    assert len(found[0]) > 5
    assert found[0] == found[1]


def test_ls_shows_every_file_as_in_the_source(source: Path, day: Path) -> None:
    command = ["ls", "-lRn", "--time-style=full-iso", "--quoting-style=escape"]

    def lines(root: Path) -> list[bytes]:
        # Links, owners and blocks differ between any two file systems; directories have no times here.
        words = [line.split(None, 4) for line in run(command, cwd=root).splitlines() if line.startswith(b"-")]
        return sorted(word[0] + b" " + word[4] for word in words)

    assert lines(day) == lines(source)
    assert len(lines(day)) > 200


def test_stat_says_the_same(source: Path, day: Path) -> None:
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
    shown = [run(["stat", "--format=%a %s %.9Y %F", "--", *names], cwd=root) for root in (source, day)]
    assert shown[0] == shown[1]


def test_cp_keeps_times_and_modes(source: Path, day: Path, tmp_path: Path) -> None:
    run(["cp", "-rp", "--", f"{day}/.", tmp_path / "copy"])
    assert picture(tmp_path / "copy") == picture(source)


def test_cp_of_everything_that_a_file_has_works(source: Path, day: Path, tmp_path: Path) -> None:
    """`cp -a` copies extended attributes too."""
    run(["cp", "-a", "--", f"{day}/.", tmp_path / "copy"])
    assert picture(tmp_path / "copy") == picture(source)
    one = next(path for path in (tmp_path / "copy").rglob("*") if path.is_file())
    original = day / one.relative_to(tmp_path / "copy")
    assert os.getxattr(one, "user.des.meta") == os.getxattr(original, "user.des.meta")


def test_tar_packs_and_unpacks_to_the_source(source: Path, day: Path, tmp_path: Path) -> None:
    run(["tar", "-cf", tmp_path / "day.tar", "--format=posix", "-C", day, "."])
    (tmp_path / "unpacked").mkdir()
    run(["tar", "-xpf", tmp_path / "day.tar", "-C", tmp_path / "unpacked"])
    assert picture(tmp_path / "unpacked") == picture(source)


def test_rsync_copies_and_then_has_nothing_to_do(source: Path, day: Path, tmp_path: Path) -> None:
    run(["rsync", "-a", f"{day}/", f"{tmp_path}/copy/"])
    assert picture(tmp_path / "copy") == picture(source)
    again = run(["rsync", "-ai", f"{day}/", f"{tmp_path}/copy/"])
    assert b">f" not in again
    assert run(["rsync", "-anic", "--omit-dir-times", "--no-owner", "--no-group", f"{source}/", f"{day}/"]) == b""


def test_sixteen_readers_at_once_read_the_source(source: Path, day: Path) -> None:
    names = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
    expected = {name: sha256((source / name).read_bytes()).hexdigest() for name in names}

    def reader(seed: int) -> dict[str, str]:
        order = list(names)
        Random(seed).shuffle(order)
        return {name: sha256((day / name).read_bytes()).hexdigest() for name in order}

    with ThreadPoolExecutor(16) as pool:
        for found in pool.map(reader, range(16)):
            assert found == expected


def test_sixteen_processes_at_once_read_the_source(source: Path, day: Path) -> None:
    expected = run(["sh", "-c", "find . -type f -print0 | sort -z | xargs -0 cat | sha256sum"], cwd=source)
    command = ["sh", "-c", "find . -type f -print0 | sort -z | xargs -0 cat | sha256sum"]
    readers = [subprocess.Popen(command, cwd=day, stdout=subprocess.PIPE) for _ in range(16)]
    try:
        assert [reader.communicate(timeout=60)[0] for reader in readers] == [expected] * 16
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()
