"""The kernel opens files and directories by itself: docs/architecture.md, and what that must not change."""

from __future__ import annotations

import contextlib
import ctypes.util
import json
import mmap
import os
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.mount.mounting import Directory, mounted, outcome, run, wait_until
from tests.mount.stores import put_container, put_sharded

pytestmark = pytest.mark.fuse

DAY = "archive"  # no calendar day, so it never closes
LARGE = Random(7).randbytes(8 << 20)
FILES = {f"d{n % 10}/e/f{n:03d}": b"%d" % n * 300 for n in range(400)}


def stats(where: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((where / ".desfs/stats").read_bytes())
    return found


def requests(where: Path) -> Counter[str]:
    """How often the kernel has asked for each operation, without what this question costs."""
    metrics = stats(where)["metrics"]
    assert isinstance(metrics, dict)
    counted: Counter[str] = Counter()
    for name, count in metrics.items():
        if name.startswith("desfs_fuse_requests_total."):
            counted[name.split(".")[1]] += int(count)
    return counted


def asked_during(where: Path, action: Callable[[], object]) -> Counter[str]:
    requests(where)  # the first close of a mount asks for a flush
    before = requests(where)
    action()
    asked = requests(where) - before
    asked["read"] -= 1  # of the statistics, after they were made
    return +asked


def asked_when_warm(where: Path, walk: list[str]) -> Counter[str]:
    """What a walk asks for after another one. Whoever drops the machine's caches meanwhile costs a further try."""
    run([word.format("cold") for word in walk])
    for attempt in range(3):
        asked = asked_during(where, lambda: run([word.format(f"warm{attempt}") for word in walk]))  # noqa: B023
        if asked["read"] == asked["readdir"] == 0:
            break
    return asked


def in_force(where: Path) -> tuple[object, object]:
    found = stats(where)["levers"]
    assert isinstance(found, dict)
    return found["in_force"], found["why_not"]


# --- what it saves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["tar -cf {to}.tar -C {day} .", "cp -r {day} {to}", "ls -lR {day}"])
def test_a_warm_walk_asks_for_no_byte_no_name_and_no_open(tmp_path: Path, command: str) -> None:
    """Warm `tar` and `cp -r`: no FUSE READ, OPEN or READDIR."""
    put_sharded(tmp_path / "store", DAY, FILES)
    with mounted(tmp_path / "store", tmp_path / "mnt", "refresh=600") as where:
        asked = asked_when_warm(where, command.format(day=where / DAY, to=tmp_path / "{}").split())
        # The names of directories are believed for `refresh` seconds only; `ls` asks once for labels and ACLs.
        assert set(asked) <= {"lookup", "getattr", "getxattr"}
        assert sum(asked.values()) < 50


def test_without_them_the_kernel_asks_for_every_open(tmp_path: Path) -> None:
    put_sharded(tmp_path / "store", DAY, FILES)
    with mounted(tmp_path / "store", tmp_path / "mnt", "refresh=600,levers=off") as where:
        run(["cp", "-r", where / DAY, tmp_path / "cold"])
        asked = asked_during(where, lambda: run(["cp", "-r", where / DAY, tmp_path / "again"]))
        assert asked["open"] >= len(FILES)
        assert asked["flush"] == 0
    run(["diff", "-r", tmp_path / "cold", tmp_path / "again"])


def test_a_large_file_is_read_in_large_requests(tmp_path: Path) -> None:
    """8 MiB from front to back are a dozen requests, not 64."""
    put_container(tmp_path / "store" / DAY / "0.des", {"large": LARGE})
    with mounted(tmp_path / "store", tmp_path / "mnt") as where:

        def read() -> None:
            assert (where / DAY / "large").read_bytes() == LARGE

        assert asked_during(where, read)["read"] <= 16


# --- whether it is in force --------------------------------------------------------------------------------------

SITUATIONS = {
    "installed": ("", {}, None),
    "bound-late": ("import os, sys; sys.setdlopenflags(os.RTLD_LAZY)", {}, None),
    "missing": ("import sys; sys.modules['desfs._levers'] = None", {}, "not installed: "),
    "too-late": ("import pyfuse3", {}, "pyfuse3 was loaded before it"),
    "not-bound": ("", {"LD_PRELOAD": ctypes.util.find_library("fuse3") or ""}, "pyfuse3 calls libfuse directly"),
}


@pytest.mark.parametrize(("code", "env", "why_not"), SITUATIONS.values(), ids=SITUATIONS)
def test_the_mount_works_and_says_whether_they_are_in_force(
    tmp_path: Path, code: str, env: dict[str, str], why_not: str | None
) -> None:
    """When the extension is missing or not bound the mount works, slower; log and `/.desfs/stats` say so."""
    put_container(tmp_path / "store" / DAY / "0.des", {"d/a": b"x"})
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(code)
    log = tmp_path / "log"
    env = env | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])}
    with mounted(tmp_path / "store", tmp_path / "mnt", f"log_format=json,log_file={log}", env=env) as where:
        assert (where / DAY / "d/a").read_bytes() == b"x"
        assert os.listdir(where / DAY / "d") == ["a"]
        is_in_force, reason = in_force(where)
        assert is_in_force == (why_not is None)
        assert reason == why_not or str(reason).startswith(f"{why_not}")
        (line,) = [entry for entry in map(json.loads, log.read_text().splitlines()) if entry["event"] == "mounted"]
        assert line["levers"]["why_not"] == reason
        assert (requests(where)["open"] == 0) == (why_not is None)


def test_they_can_be_switched_off(tmp_path: Path) -> None:
    put_container(tmp_path / "store" / DAY / "0.des", {"a": b"x"})
    with mounted(tmp_path / "store", tmp_path / "mnt", "levers=off") as where:
        assert in_force(where) == (False, "switched off")


# --- what the kernel keeps has to be true ------------------------------------------------------------------------


@pytest.mark.parametrize("levers", ["auto", "off"])
def test_a_kept_listing_goes_when_something_comes_or_goes(tmp_path: Path, levers: str) -> None:
    """The root, a day and a directory in it: listed again only when they have changed, and then they are."""
    folder = tmp_path / "store" / DAY
    put_container(folder / "0.des", {"top": b"x", "d/e/one": b"x", "other/f": b"x"})
    with mounted(tmp_path / "store", tmp_path / "mnt", f"refresh=0.2,levers={levers}") as where:
        day = where / DAY

        def listed() -> list[list[str]]:
            return [sorted(os.listdir(path)) for path in (where, day, day / "d", day / "d/e")]

        first = [[DAY], ["d", "other", "top"], ["e"], ["one"]]
        assert listed() == first
        if levers == "auto":
            # The first listing of the root finds out that the folder has containers, which counts as a change.
            wait_until(lambda: asked_during(where, listed)["readdir"] == 0, "listings that are kept")
        for name in ("1.des", "2.des"):
            put_container(folder / name, {"new": b"y", "d/g": b"y", "d/e/two": b"y", "d/e/h/i": b"y"})
            # No newer than what is there: the time of a container is no measure of change.
            os.utime(folder / name, (1, 1))
            wait_until(
                lambda: listed() == [[DAY], ["d", "new", "other", "top"], ["e", "g"], ["h", "one", "two"]],
                "what came",
            )
            assert sorted(os.listdir(day / "d/e/h")) == ["i"]
            (folder / name).unlink()
            wait_until(lambda: listed() == first, "what went")
        put_container(tmp_path / "store/2026-11-20/0.des", {"a": b"z"})
        wait_until(lambda: sorted(os.listdir(where)) == ["2026-11-20", DAY], "the new day")
        (tmp_path / "store/2026-11-20/0.des").unlink()
        (tmp_path / "store/2026-11-20").rmdir()
        wait_until(lambda: os.listdir(where) == [DAY], "the end of the new day")


def test_a_stream_goes_on_and_a_rewound_one_shows_what_came(tmp_path: Path) -> None:
    """A directory that is open while it grows: nothing twice, nothing left out; rewinddir shows the rest."""
    folder = tmp_path / "store" / DAY
    names = [f"{n:04d}-{'x' * 100}" for n in range(3000)]
    put_container(folder / "0.des", dict.fromkeys(names, b"x"))
    with mounted(tmp_path / "store", tmp_path / "mnt", "refresh=0.2") as where:
        for _ in range(2):  # the second is from the kernel's cache
            with contextlib.closing(Directory(where / DAY)) as directory:
                first = [directory.read() for _ in range(1000)]
                place = directory.tell()
                new = f"new{len(os.listdir(folder))}"
                put_container(folder / f"{new}.des", {new: b"y"})
                wait_until((where / DAY / new).exists, "the new file")
                rest = list(iter(directory.read, None))
                found = [entry[0] for entry in [*first, *rest] if entry]
                assert sorted(name for name in found if name in set(names)) == names
                assert len(found) == len(set(found))
                directory.seek(place)
                assert directory.read() == rest[0]

                def rewound() -> set[str]:
                    directory.rewind()
                    return {entry[0] for entry in iter(directory.read, None) if entry}

                wait_until(lambda: new in rewound(), "the new name after rewinding")  # noqa: B023


@pytest.mark.parametrize("levers", ["auto", "off"])
def test_control_files_are_made_anew_for_every_open(tmp_path: Path, levers: str) -> None:
    """`/.desfs/containers` grows and shrinks with the day: never an old, cut or padded page, however it is read."""
    folder = tmp_path / "store" / DAY

    def ways() -> list[bytes]:
        path = where / ".desfs/containers"
        with path.open("rb", buffering=0) as file:
            pieces = b"".join(iter(lambda: file.read(97), b""))
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, 1 << 16) as buffer:
                direct = buffer[: os.preadv(descriptor, [buffer], 0)]
        finally:
            os.close(descriptor)
        return [path.read_bytes(), run(["cat", path]), pieces, direct]

    def states(text: bytes) -> list[str]:
        return sorted(row["key"] for row in json.loads(text))

    put_container(folder / "00.des", {"stays": b"x"})
    with mounted(tmp_path / "store", tmp_path / "mnt", f"refresh=0.2,levers={levers}") as where:
        assert os.listdir(where / DAY) == ["stays"]
        present = {f"{DAY}/00.des"}
        for step in [*range(1, 30), *range(-29, -1)]:
            name = f"{abs(step):02d}{'n' * abs(step)}"
            if step > 0:
                put_container(folder / f"{name}.des", {name: b"x"})
                present.add(f"{DAY}/{name}.des")
            else:
                (folder / f"{name}.des").unlink()
                present.discard(f"{DAY}/{name}.des")
            if step % 3:  # several at once
                continue
            wait_until(
                lambda: (where / DAY / name).exists() == (step > 0),  # noqa: B023
                "the day's refresh",
            )
            assert [states(text) for text in ways()] == [sorted(present)] * 4


# --- nothing can be changed --------------------------------------------------------------------------------------


def test_writes_are_refused_after_a_remount_too(tmp_path: Path) -> None:
    """docs/semantics.md: Who remounts for writing may open a file for writing, since the kernel opens by itself
    (`levers=`), but not write, truncate or change it.

    Pages that were changed through a shared mapping go."""
    put_container(tmp_path / "store" / DAY / "0.des", {"f": LARGE[:10_000], "g": b"x"})
    with mounted(tmp_path / "store", tmp_path / "mnt") as where:
        path = where / DAY / "f"
        assert outcome(lambda: os.open(path, os.O_RDWR)) == "EROFS"
        assert path.read_bytes() == LARGE[:10_000]
        subprocess.run(["mount", "-i", "-o", "remount,rw", where], check=True, timeout=30)
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
            assert outcome(lambda: os.open(path, flags | os.O_TRUNC)) == "EROFS"  # noqa: B023
        descriptor = os.open(path, os.O_RDWR)
        try:
            assert outcome(lambda: os.write(descriptor, b"changed")) == "EROFS"
            assert outcome(lambda: os.pwrite(descriptor, b"changed", 20_000)) == "EROFS"
            assert outcome(lambda: os.ftruncate(descriptor, 0)) == "EROFS"
            assert outcome(lambda: os.fchmod(descriptor, 0o777)) == "EROFS"
            assert os.pread(descriptor, 20_000, 0) == LARGE[:10_000]
            with mmap.mmap(descriptor, 0) as mapped:
                mapped[:7] = b"changed"
                assert outcome(mapped.flush) == "EROFS"
        finally:
            os.close(descriptor)
        wait_until(lambda: path.read_bytes() == LARGE[:10_000], "the kernel's pages")
        assert path.stat().st_size == 10_000
