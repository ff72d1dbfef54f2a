"""What is removed goes away in a mount that is running."""

from __future__ import annotations

import errno
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.mount.mounting import desfs, mounted, outcome, wait_until
from tests.removing import World, put_day

pytestmark = pytest.mark.fuse


def test_a_removed_file_goes_away_in_a_running_mount(tmp_path: Path) -> None:
    """docs/semantics.md: What desfs rm removes is shown until its day is listed again.

    The names beside it stay, and can be read all the while; a directory goes with its last file; what comes again under
    the name is shown."""
    day = datetime.now(UTC).date()  # open: it is listed again soon
    files = {"a": b"1", "b": b"2", "d/only": b"3", "e/1": b"4", "e/2": b"5"}
    world = World(tmp_path)
    put_day(world.root, files, day)
    world.repair()
    with mounted(world.root, tmp_path / "mnt", "refresh=0.2") as mount:
        top = mount / str(day)
        assert {str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()} == set(files)
        with (top / "a").open("rb") as held:
            done = desfs("rm", "-r", world.root, f"{day}/a", f"{day}/d", f"{day}/e/1", "--catalog", world.url)
            assert done.returncode == 0, done.stderr
            wait_until(lambda: "a" not in os.listdir(top), "the removed file to go")
            assert outcome(lambda: os.stat(top / "a")) == errno.errorcode[errno.ENOENT]
            assert held.read() == b"1"
        wait_until(lambda: not (top / "d").exists(), "the empty directory to go")
        wait_until(lambda: os.listdir(top / "e") == ["2"], "the other file to go")
        assert sorted(os.listdir(top)) == ["b", "e"]
        assert ((top / "b").read_bytes(), (top / "e/2").read_bytes()) == (b"2", b"5")
        put_day(world.root, {"a": b"again"}, day, generation=9)
        wait_until((top / "a").exists, "the new file of that name")
        assert (top / "a").read_bytes() == b"again"


def test_a_removed_file_is_not_in_a_fresh_mount(tmp_path: Path) -> None:
    """Neither by a lookup, which asks one shard alone, nor in a listing."""
    world = World(tmp_path)
    put_day(world.root, {"a": b"1", "b": b"2"})
    world.repair()
    world.remove("2020-11-20/a")
    with mounted(world.root, tmp_path / "mnt") as mount:
        assert outcome(lambda: os.stat(mount / "2020-11-20/a")) == "ENOENT"
        assert os.listdir(mount / "2020-11-20") == ["b"]
