"""docs/mount.md, The mount point. Dead mounts and busy ones are in tests/mount."""

from __future__ import annotations

from pathlib import Path

import pytest

from desfs.errors import DesfsError, UsageError
from desfs.mountpoint import check_mountpoint, mounted_at, unmount


def test_a_directory_is_given_as_its_real_path(tmp_path: Path) -> None:
    (tmp_path / "real dir").mkdir()
    (tmp_path / "link").symlink_to("real dir")
    assert check_mountpoint(str(tmp_path / "link")) == str(tmp_path / "real dir")
    assert check_mountpoint(f"{tmp_path}/link/../real dir/") == str(tmp_path / "real dir")


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert check_mountpoint("m") == str(tmp_path / "m")


def test_what_is_missing_or_no_directory_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"missing does not exist$"):
        check_mountpoint(str(tmp_path / "missing"))
    with pytest.raises(UsageError, match=r"file is no directory$"):
        check_mountpoint(str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"Not a directory$"):
        check_mountpoint(str(tmp_path / "file" / "below"))


def test_mounts_are_found_without_touching_them(tmp_path: Path) -> None:
    proc = mounted_at("/proc")
    assert proc is not None
    assert proc.fs_type == "proc"
    assert mounted_at(str(tmp_path)) is None


def test_unmounting_what_is_not_mounted_says_so(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (tmp_path, tmp_path / "link/missing"):
        with pytest.raises(DesfsError, match=f"^{path}: nothing is mounted there$"):
            unmount(str(path))
