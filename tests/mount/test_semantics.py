"""docs/semantics.md through the kernel, as far as no other test has it: odd stores, and the end of a mount."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from des_format import DesReader, DesWriter
from des_format.blocks import BlockSummer
from tests import servers
from tests.mount.mounting import PROGRAM, daemon_of, mount, mounted, outcome, run, wait_until
from tests.mount.stores import meta_of, put_container
from tests.servers import MountPoint
from tests.unit.containers import Item, build

pytestmark = pytest.mark.fuse

DAY = "2026-11-20"
ODD, DAMAGED = f"{DAY}/0.des", f"{DAY}/1.des"
MIB = 1 << 20
UNSHOWABLE = [
    b"",
    b"/absolute",
    b"with\0nul",
    b"empty//component",
    b"./dot",
    b"dot/../dot",
    b"component/" + b"c" * 256,
    b"/".join([b"p" * 200] * 21),
    b"no-utf-8-\xff",
]


def put_store(root: Path) -> Path:
    """A day with a container of odd entries, one that is none, and one that is as it should be."""
    (root / DAY).mkdir(parents=True)
    items = [Item(name, b"hidden") for name in UNSHOWABLE]
    items += [Item(b"name", b"hidden"), Item(b"name/inside", b"inside"), Item(b"sub/folder/file", b"file")]
    unfinished = b'{"crc32c":"00000000","mode":511,"mtime":5'  # of other bytes, if anybody could read it
    items += [Item(b"no-json", b"bytes", meta=unfinished), Item(b"no-object", b"bytes", meta=b"[1]")]
    (root / ODD).write_bytes(build(items))
    (root / DAMAGED).write_bytes(b"no container " * 100)
    put_container(root / DAY / "2.des", {"sound": b"sound"})
    put_container(root / "2026-11-19" / "0.des", {"of/another": b"day"})
    return root


def put_object(path: Path, data: bytes) -> None:
    """Put an object in its place, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name("fresh").write_bytes(data)
    path.with_name("fresh").rename(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put_store(tmp_path_factory.mktemp("odd") / "store")


@pytest.fixture(scope="module")
def odd(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted(store, tmp_path_factory.mktemp("odd") / "mnt") as where:
        os.listdir(where / DAY)
        yield where


def problems(where: Path) -> list[str]:
    return (where / ".desfs/problems").read_text().splitlines()


# --- names and attributes ----------------------------------------------------------------------------------------


def test_names_that_cannot_be_shown(odd: Path) -> None:
    """docs/semantics.md: Names that cannot be shown (empty, absolute, with NUL, with components that are empty, `.`,
    `..` or over 255 bytes, over 4,095 bytes, or no UTF-8) are not shown, and reported in `/.desfs/problems`."""
    names = {path.relative_to(odd / DAY).as_posix() for path in (odd / DAY).rglob("*")}
    files = {"name/inside", "sub/folder/file", "no-json", "no-object", "sound"}
    assert names == {*files, "name", "sub", "sub/folder"}
    lines = [line for line in problems(odd) if line.startswith(f"{ODD}: ") and "not shown" in line]
    assert len(lines) == len(UNSHOWABLE)


def test_a_file_with_the_name_of_a_directory(odd: Path) -> None:
    """docs/semantics.md: Where a file and a directory have one name, the directory is shown and the file reported."""
    assert stat.S_ISDIR((odd / DAY / "name").stat().st_mode)
    assert sorted(os.listdir(odd / DAY)).count("name") == 1
    assert f"{ODD}: file 'name' is hidden by a directory of that name" in problems(odd)


def test_directories_have_one_mode_and_one_link(odd: Path) -> None:
    """docs/semantics.md: Directories are not stored: they have mode 0755."""
    for path in (odd, odd / DAY, odd / DAY / "sub", odd / DAY / "sub/folder", odd / "2026-11-19/of"):
        assert path.stat().st_mode == stat.S_IFDIR | 0o755


def test_the_link_count_is_one(odd: Path) -> None:
    """docs/semantics.md: The link count is 1, for directories too: it says nothing."""
    for path in (odd, odd / DAY, odd / DAY / "sub", odd / DAY / "sub/folder", odd / DAY / "sub/folder/file"):
        assert path.stat().st_nlink == 1


def test_df(tmp_path: Path) -> None:
    """docs/semantics.md: The size that `df` shows is the bytes of all objects in the store's days and other folders,
    and of the containers beside them, as far as they could be listed in two seconds. Nothing is free. The number that
    `df -i` shows is that of the files in those containers whose indexes have been read."""
    root = tmp_path / "store"
    put_container(root / DAY / "0.des", {f"f{n}": b"x" * 1000 for n in range(30)})
    put_container(root / "2026-11-19" / "0.des", {"g": b"y", "h": b"z"})
    put_container(root / "2026-11-18.des", {"i": b"y"})
    put_object(root / "archive/_bigFiles/large", b"z" * 50_000)
    total = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())

    def shown() -> list[int]:
        columns = "--output=size,used,avail,itotal,iavail"
        return [int(word) for word in run(["df", "-B1", columns, tmp_path / "mnt"]).split()[-5:]]

    with mounted(root, tmp_path / "mnt") as where:
        blocks = -(-total // 4096) * 4096
        assert shown() == [blocks, blocks, 0, 0, 0]
        assert len(os.listdir(where / DAY)) == 30
        assert shown() == [blocks, blocks, 0, 30, 0]
        assert sorted(os.listdir(where / "2026-11-19")) == ["g", "h"]
        assert shown() == [blocks, blocks, 0, 32, 0]


# --- reading -----------------------------------------------------------------------------------------------------


def test_an_external_object_that_is_replaced(tmp_path: Path) -> None:
    """docs/semantics.md: An external object without a checksum that is replaced while its container stays is noticed
    when more of it is fetched: until then its readers see the old version. Then they get ESTALE once or twice, and
    after that the new content."""
    old, new = Random(1).randbytes(13 * MIB), Random(2).randbytes(13 * MIB)
    external = tmp_path / "store" / DAY / "_bigFiles" / "large"
    put_object(external, old)
    with DesWriter(tmp_path / "store" / ODD, external_prefix=f"{DAY}/") as writer:
        writer.add_external("large", len(old))
    with mounted(tmp_path / "store", tmp_path / "mnt", "refresh=600") as where:
        path = where / DAY / "large"
        with path.open("rb", 0) as file:
            assert file.read(5000) == old[:5000]
            put_object(external, new)
            assert os.pread(file.fileno(), 5000, 0) == old[:5000]
            seen: list[str] = []
            while len(seen) < 3 and (answer := outcome(path.read_bytes)) != "no error":
                seen.append(answer)
            assert seen in (["ESTALE"], ["ESTALE", "ESTALE"])
            assert path.read_bytes() == new
            assert outcome(lambda: os.pread(file.fileno(), 5000, 12 * MIB)) == "ESTALE"


@pytest.mark.parametrize("kind", ["whole", "blocks"])
def test_an_external_object_that_is_not_what_its_checksum_says(tmp_path: Path, kind: str) -> None:
    """docs/semantics.md: One with a checksum answers EIO when what has taken its place does not match it."""
    old, new = Random(1).randbytes(5 * MIB), Random(2).randbytes(5 * MIB)
    external = tmp_path / "store" / DAY / "_bigFiles" / "large"
    put_object(external, old)
    summer = BlockSummer(len(old))
    summer.update(old)
    with DesWriter(tmp_path / "store" / ODD, external_prefix=f"{DAY}/") as writer:
        writer.add_external("large", len(old), meta_of(old, **(summer.meta() if kind == "blocks" else {})))
    with mounted(tmp_path / "store", tmp_path / "mnt", "refresh=600,memory=1M") as where:
        path = where / DAY / "large"
        assert path.read_bytes() == old
        put_object(external, new)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)  # past the pages that the kernel has of the old one
        try:
            assert outcome(lambda: os.pread(descriptor, 4096, 0)) == "EIO"
        finally:
            os.close(descriptor)
        assert any("large" in line for line in problems(where))


# --- damage ------------------------------------------------------------------------------------------------------


def test_a_container_that_is_none(odd: Path) -> None:
    """docs/semantics.md: A container that is none is left out and reported; the day's other containers are shown."""
    assert (odd / DAY / "sound").read_bytes() == b"sound"
    assert (odd / DAY / "sub/folder/file").read_bytes() == b"file"
    assert len([line for line in problems(odd) if line.startswith(f"{DAMAGED}: ")]) == 1


def test_a_container_that_is_none_in_a_strict_mount(store: Path, mount_dir: MountPoint) -> None:
    """docs/semantics.md: With `-o strict` the day of such a container answers EIO."""
    mount(store, mount_dir.path, "strict")
    day = mount_dir.path / DAY
    assert outcome(lambda: os.listdir(day)) == "EIO"
    assert outcome((day / "sound").read_bytes) == "EIO"
    assert (mount_dir.path / "2026-11-19/of/another").read_bytes() == b"day"


def test_damaged_metadata(odd: Path, store: Path) -> None:
    """docs/semantics.md: Damaged metadata costs the times, the mode and the attributes, not the bytes; but what had a
    checksum cannot be compared any more.

    What tells where a file lies does not come from its metadata."""
    for name in ("no-json", "no-object"):
        path = odd / DAY / name
        assert path.read_bytes() == b"bytes"
        assert path.stat().st_mode == stat.S_IFREG | 0o644
        assert path.stat().st_mtime_ns == (store / ODD).stat().st_mtime_ns
        assert os.listxattr(path) == ["user.des.container"]
        assert [line for line in problems(odd) if name in line and "damaged metadata" in line]


# --- from the spool to the mount ---------------------------------------------------------------------------------


@contextlib.contextmanager
def packer(spool: Path, store: Path, max_age_s: float) -> Iterator[None]:
    """A packer that runs. Nothing but the age of what it finds makes it pack."""
    options = ("--settle", "0.05", "--scan-interval", "0.05", "--max-age", max_age_s, "--log-level", "error")
    command = [PROGRAM, "packer", "--spool", spool, "--store", store, *options]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield
        finally:
            process.terminate()
            _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


def test_a_file_of_the_spool_becomes_visible(tmp_path: Path) -> None:
    """docs/semantics.md: A file is visible `max_age` plus `refresh` seconds after it was written, at most, and the time
    that a look at the spool (`scan_interval`) and the upload take; `settle` plus `refresh`, where that is longer.

    A packer that may wait for an hour, and has had a file for longer, has not packed it yet."""
    spools = tmp_path / "patient", tmp_path / "prompt"
    for spool in spools:
        spool.mkdir()
    store = tmp_path / "store"
    put_container(store / "archive/0.des", {"there": b"already"})
    with (
        packer(spools[0], store, 3600),
        packer(spools[1], store, 0.3),
        mounted(store, tmp_path / "mnt", "refresh=0.2") as where,
    ):
        assert os.listdir(where) == ["archive"]
        (spools[0] / "left").write_bytes(b"for an hour")
        for name in ("first", "second"):  # the day appears with the one, and grows with the other
            (spools[1] / name).write_bytes(name.encode())

            def shown(name: str = name) -> bool:
                return any((where / day / name).exists() for day in os.listdir(where))

            wait_until(shown, f"{name}, which is packed and listed by itself")
        contents = {path.name: path.read_bytes() for path in where.rglob("*") if path.is_file()}
        assert contents == {"there": b"already", "first": b"first", "second": b"second"}
        assert (spools[0] / "left").read_bytes() == b"for an hour"


# --- the end of a mount ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_use(store: Path, where: Path) -> Iterator[int]:
    """A mount with a file that somebody has open, and has read nothing of."""
    mount(store, where)
    descriptor = os.open(where / DAY / "large", os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plain")
    put_container(root / DAY / "0.des", {"large": Random(3).randbytes(2 * MIB), "small": b"small"})
    return root


@pytest.mark.parametrize("command", [["umount"], [PROGRAM, "umount"]], ids=["umount", "desfs umount"])
def test_a_mount_in_use_is_not_unmounted(plain: Path, mount_dir: MountPoint, command: list[str | Path]) -> None:
    """docs/semantics.md: A mount that is in use is not unmounted: `umount` fails, and the mount stays as it is."""
    with in_use(plain, mount_dir.path) as file:
        done = subprocess.run([*command, mount_dir.path], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode != 0
        assert "busy" in done.stderr
        assert servers.is_mounted(mount_dir.path)
        assert (mount_dir.path / DAY / "small").read_bytes() == b"small"
        assert len(os.pread(file, 4 * MIB, 0)) == 2 * MIB


@pytest.mark.parametrize("command", [["umount", "-l"], [PROGRAM, "umount", "--lazy"]], ids=["umount", "desfs umount"])
def test_a_mount_in_use_is_unmounted_lazily(plain: Path, mount_dir: MountPoint, command: list[str | Path]) -> None:
    """docs/semantics.md: Unmounted lazily (`umount -l`, `desfs umount --lazy`) it is gone from the tree at once, and
    ends when the last of its files is closed. Until then an open file can be read."""
    where = mount_dir.path
    (where / "underneath").touch()
    with in_use(plain, where) as file:
        daemon = daemon_of(where)
        mount_dir.daemons.append(daemon)
        subprocess.run([*command, where], check=True, timeout=60)
        assert not servers.is_mounted(where)
        assert os.listdir(where) == ["underneath"]
        with DesReader(plain / DAY / "0.des") as reader:
            assert os.pread(file, 4 * MIB, 0) == reader.get_file("large")
        assert servers.is_running(daemon)
    wait_until(lambda: not servers.is_running(daemon), "the daemon's end")
