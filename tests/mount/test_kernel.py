"""System calls on a mount: docs/mount.md, What a mount answers."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from random import Random

import pytest

from des_format import DesWriter
from desfs.settings import MountSettings
from tests.fakes.counting_proxy import CountingProxy
from tests.mount.mounting import LIBC, WAYS, Directory, mount, mounted, outcome, run, source_of
from tests.mount.stores import meta_of, put_container
from tests.servers import S3Server, mount_point

pytestmark = pytest.mark.fuse

DAY = "2026-11-20"
LARGE = Random(5).randbytes(3_000_017)
MANY = 20_000


def build_store(root: Path) -> None:
    folder = root / DAY
    folder.mkdir(parents=True)
    with DesWriter(folder / "0.des") as writer:
        writer.add_file("large.bin", LARGE, meta_of(LARGE))
        writer.add_file("d/small.txt", b"small", {"mtime": Decimal("1700000000.123456789"), "mode": 0o640, "id": "I"})
        writer.add_file("empty", b"")
        writer.add_file("old", b"x", {"mtime": Decimal("-1.5")})
        writer.add_file("late", b"x", {"mtime": Decimal("9000000000.5")})
        writer.add_file("much-metadata", b"x", {"much": "m" * 70_000})
    many = {f"{n:05d}-{'n' * (n % 60)}": b"%d" % n for n in range(MANY)}
    for part in range(4):
        names = [name for place, name in enumerate(many) if place % 4 == part]
        put_container(root / "2026-11-19" / f"{part}.des", {name: many[name] for name in names})


@dataclass(frozen=True, slots=True)
class Mount:
    root: Path

    @property
    def day(self) -> Path:
        return self.root / DAY


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kernel-store")
    build_store(root)
    return root


@pytest.fixture(scope="module", params=WAYS, ids="-".join)
def at(request: pytest.FixtureRequest, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    kind, levers = request.param
    with (
        source_of(kind, store, request) as source,
        mounted(source.url, tmp_path_factory.mktemp("kernel") / "mnt", f"levers={levers}", env=source.env) as where,
    ):
        yield Mount(where)


@pytest.fixture(scope="module")
def here(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A mount of the directory alone, where the store makes no difference."""
    with mounted(store, tmp_path_factory.mktemp("kernel") / "mnt", "noexec,fsname=a\\,b c") as where:
        yield Mount(where)


# --- reading -----------------------------------------------------------------------------------------------------


def test_reads_at_any_offset_give_those_bytes(at: Mount) -> None:
    random = Random(1)
    with (at.day / "large.bin").open("rb", buffering=0) as file:
        for _ in range(50):
            offset, size = random.randrange(len(LARGE) + 10), random.choice([1, 511, 4096, 131_073, 1_000_000])
            assert os.pread(file.fileno(), size, offset) == LARGE[offset : offset + size]
    assert (at.day / "large.bin").read_bytes() == LARGE
    assert (at.day / "empty").read_bytes() == b""


def test_a_file_can_be_mapped(at: Mount) -> None:
    with (at.day / "large.bin").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[len(LARGE) - 5 :] == LARGE[-5:]
        assert mapped[1_000_000:1_000_100] == LARGE[1_000_000:1_000_100]
        assert mapped.find(LARGE[2_000_000:2_000_040]) == 2_000_000


def test_direct_reads_work(at: Mount) -> None:
    """O_DIRECT goes past the page cache, the last piece is as short as the file's end has it."""
    descriptor = os.open(at.day / "large.bin", os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 1 << 20) as buffer:
            found = b""
            while count := os.preadv(descriptor, [buffer], len(found)):
                found += buffer[:count]
        assert found == LARGE
    finally:
        os.close(descriptor)


def test_sendfile_and_splice_work(here: Mount, tmp_path: Path) -> None:
    with (here.day / "large.bin").open("rb") as source, (tmp_path / "copy").open("wb") as target:
        at = 0
        while sent := os.sendfile(target.fileno(), source.fileno(), at, 1 << 20):
            at += sent
    assert (tmp_path / "copy").read_bytes() == LARGE


def test_stat_has_times_in_nanoseconds_modes_and_sizes(at: Mount) -> None:
    found = (at.day / "d/small.txt").stat()
    assert (found.st_mode, found.st_size, found.st_nlink) == (stat.S_IFREG | 0o640, 5, 1)
    assert found.st_mtime_ns == found.st_ctime_ns == found.st_atime_ns == 1_700_000_000_123_456_789
    assert (found.st_uid, found.st_gid) == (os.getuid(), os.getgid())
    assert found.st_blocks == 1
    assert stat.S_ISDIR((at.day / "d").stat().st_mode)
    assert (at.day / "old").stat().st_mtime_ns == -1_500_000_000
    assert (at.day / "late").stat().st_mtime_ns == 9_000_000_000_500_000_000


def test_reading_leaves_the_access_time_alone(here: Mount) -> None:
    before = (here.day / "large.bin").stat().st_atime_ns
    (here.day / "large.bin").read_bytes()
    assert (here.day / "large.bin").stat().st_atime_ns == before


# --- nothing can be changed --------------------------------------------------------------------------------------


def libc_renameat2(old: Path, new: Path) -> None:
    if LIBC.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), 2) != 0:
        raise OSError(ctypes.get_errno(), "renameat2")


MUTATIONS: dict[str, Callable[[Path], object]] = {
    "open-write": lambda day: os.open(day / "d/small.txt", os.O_WRONLY),
    "open-read-write": lambda day: os.open(day / "d/small.txt", os.O_RDWR),
    "open-append": lambda day: os.open(day / "d/small.txt", os.O_WRONLY | os.O_APPEND),
    "open-truncate": lambda day: os.open(day / "d/small.txt", os.O_RDONLY | os.O_TRUNC),
    "create": lambda day: os.open(day / "new", os.O_CREAT | os.O_WRONLY, 0o644),
    "create-exclusive": lambda day: os.open(day / "new", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644),
    "create-in-root": lambda day: os.open(day.parent / "new", os.O_CREAT | os.O_WRONLY, 0o644),
    "write-control": lambda day: os.open(day.parent / ".desfs/stats", os.O_WRONLY),
    "temporary-file": lambda day: os.open(day, os.O_TMPFILE | os.O_WRONLY),
    "mkdir": lambda day: (day / "new").mkdir(),
    "mkdir-in-root": lambda day: (day.parent / "2026-11-21").mkdir(),
    "unlink": lambda day: (day / "d/small.txt").unlink(),
    "rmdir": lambda day: (day / "d").rmdir(),
    "rename": lambda day: (day / "empty").rename(day / "other"),
    "rename-over": lambda day: (day / "empty").rename(day / "old"),
    "rename-exchange": lambda day: libc_renameat2(day / "empty", day / "old"),
    "link": lambda day: os.link(day / "empty", day / "other"),
    "symlink": lambda day: (day / "other").symlink_to("empty"),
    "mknod-file": lambda day: os.mknod(day / "other", stat.S_IFREG | 0o644),
    "mknod-device": lambda day: os.mknod(day / "other", stat.S_IFCHR | 0o644, os.makedev(1, 3)),
    "mkfifo": lambda day: os.mkfifo(day / "other"),
    "chmod": lambda day: (day / "d/small.txt").chmod(0o777),
    "chmod-directory": lambda day: (day / "d").chmod(0o777),
    "chown": lambda day: os.chown(day / "d/small.txt", 1, 1),
    "utimens": lambda day: os.utime(day / "d/small.txt"),
    "utimens-ns": lambda day: os.utime(day / "d/small.txt", ns=(1, 1)),
    "truncate": lambda day: os.truncate(day / "d/small.txt", 0),
    "setxattr": lambda day: os.setxattr(day / "d/small.txt", "user.des.id", b"x"),
    "setxattr-new": lambda day: os.setxattr(day / "d/small.txt", "user.new", b"x"),
    "removexattr": lambda day: os.removexattr(day / "d/small.txt", "user.des.id"),
}


@pytest.mark.parametrize("call", MUTATIONS.values(), ids=MUTATIONS)
def test_every_mutating_call_answers_erofs(at: Mount, call: Callable[[Path], object]) -> None:
    """docs/semantics.md: Everything is read-only: every call that would change something answers EROFS."""
    before = sorted(os.listdir(at.day))
    assert outcome(lambda: call(at.day)) == "EROFS"
    assert sorted(os.listdir(at.day)) == before
    assert (at.day / "d/small.txt").read_bytes() == b"small"


def test_a_mount_that_is_remounted_for_writing_still_answers_erofs(store: Path, tmp_path: Path) -> None:
    """The kernel refuses by itself on a mount that is `ro`; whoever remounts it otherwise hears the same from us. (How
    it is when the kernel opens files by itself: test_levers.py.)"""
    with mounted(store, tmp_path / "mnt", "levers=off") as where:
        subprocess.run(["mount", "-i", "-o", "remount,rw", where], check=True, timeout=30)
        calls = {name: call for name, call in MUTATIONS.items() if name not in ("temporary-file", "mknod-device")}
        assert {name: outcome(partial(call, where / DAY)) for name, call in calls.items()} == dict.fromkeys(
            calls, "EROFS"
        )
        assert (where / DAY / "d/small.txt").read_bytes() == b"small"


def test_a_shared_writable_mapping_is_refused(here: Mount) -> None:
    with (here.day / "large.bin").open("rb") as file:
        wanted = mmap.PROT_READ | mmap.PROT_WRITE
        assert outcome(lambda: mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=wanted)) == "EACCES"


def test_access_says_what_can_be_done(here: Mount) -> None:
    assert os.access(here.day / "d/small.txt", os.R_OK)
    assert not os.access(here.day / "d/small.txt", os.W_OK)
    assert not os.access(here.day, os.W_OK)
    assert not os.access(here.day / "d/small.txt", os.X_OK)


# --- directories -------------------------------------------------------------------------------------------------


def test_twenty_thousand_names_are_listed_once_each(at: Mount) -> None:
    """readdir is right for 20,000 names across buffer borders; the numbers are unique, and those of stat."""
    folder = at.root / "2026-11-19"
    names = os.listdir(folder)
    assert sorted(names) == sorted(f"{n:05d}-{'n' * (n % 60)}" for n in range(MANY))
    with os.scandir(folder) as entries:
        inodes = {entry.name: entry.inode() for entry in entries}
    assert len(set(inodes.values())) == MANY
    for name in names[:: MANY // 200]:
        assert (folder / name).stat().st_ino == inodes[name]
        assert (folder / name).read_bytes() == b"%d" % int(name[:5])


def test_seekdir_goes_back_to_any_place(at: Mount) -> None:
    with contextlib.closing(Directory(at.root / "2026-11-19")) as directory:
        places: list[int] = []
        order: list[tuple[str, int]] = []
        while True:
            places.append(directory.tell())
            entry = directory.read()
            if entry is None:
                break
            order.append(entry)
        assert [name for name, _ in order[:2]] == [".", ".."]
        assert len(order) == MANY + 2
        assert len(set(places)) == len(places)
        for place in Random(3).sample(range(len(order)), 300):
            directory.seek(places[place])
            assert directory.read() == order[place]
            if place + 1 < len(order):
                assert directory.read() == order[place + 1]
        directory.seek(places[-1])
        assert directory.read() is None
        directory.rewind()
        assert directory.read() == order[0]


def test_dots_have_the_numbers_of_the_directories(at: Mount) -> None:
    for path in (at.root, at.day, at.day / "d"):
        with contextlib.closing(Directory(path)) as directory:
            found = dict(entry for entry in (directory.read(), directory.read()) if entry)
        assert found["."] == path.stat().st_ino
        if path != at.root:
            assert found[".."] == path.parent.stat().st_ino


def test_numbers_are_the_same_after_a_remount(store: Path, tmp_path: Path) -> None:
    """docs/semantics.md: Inode numbers are unique, and the same after a remount as long as the container is the same.

    Whatever was looked at first."""

    def numbers(where: Path) -> dict[str, int]:
        return {
            os.path.relpath(os.path.join(folder, entry.name), where): entry.inode()
            for folder, _, _ in os.walk(where)
            for entry in os.scandir(folder)
        }

    with mount_point(tmp_path / "mnt") as point:
        mount(store, point.path)
        first = numbers(point.path)
        subprocess.run(["umount", point.path], check=True, timeout=30)
        mount(store, point.path)
        (point.path / "2026-11-19" / "00003-nnn").stat()
        assert numbers(point.path) == first
    assert len(set(first.values())) == len(first) == MANY + 9


def test_a_directory_is_read_while_others_look_things_up(here: Mount) -> None:
    """Listing and lookups of the same names at once: names and numbers agree."""
    folder = here.root / "2026-11-19"
    errors: list[BaseException] = []

    def look_up() -> None:
        try:
            for n in range(0, MANY, 37):
                name = f"{n:05d}-{'n' * (n % 60)}"
                assert (folder / name).stat().st_size == len(str(n))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=look_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        assert len(os.listdir(folder)) == MANY
    for thread in threads:
        thread.join()
    assert errors == []


# --- extended attributes, statfs, control files ------------------------------------------------------------------


def test_extended_attributes_are_readable(at: Mount) -> None:
    small = at.day / "d/small.txt"
    assert sorted(os.listxattr(small)) == ["user.des.container", "user.des.id", "user.des.meta"]
    assert os.getxattr(small, "user.des.container") == f"{DAY}/0.des".encode()
    assert os.getxattr(small, "user.des.id") == b"I"
    meta = json.loads(os.getxattr(small, "user.des.meta"), parse_float=str)
    assert meta == {"mtime": "1700000000.123456789", "mode": 0o640, "id": "I", "size": 5}
    assert os.listxattr(at.day) == []
    for path, name in ((small, "user.sha256"), (small, b"user.des.\xff"), (at.day, "user.des.id")):
        assert outcome(partial(os.getxattr, path, name)) == "ENODATA"
    for path in (small, at.day):
        assert outcome(partial(os.getxattr, path, "security.capability")) == "ENOTSUP"


def test_a_long_listing_asks_for_no_attributes_of_single_files(here: Mount) -> None:
    """`ls -l` asks for SELinux labels and ACLs until it hears that there are none: once each, not once a file."""

    def asked() -> int:
        metrics = json.loads((here.root / ".desfs/stats").read_bytes())["metrics"]
        return sum(
            int(count) for name, count in metrics.items() if name.startswith("desfs_fuse_requests_total.getxattr.")
        )

    before = asked()
    for _ in range(2):
        assert len(run(["ls", "-l", here.root / "2026-11-19"]).splitlines()) == MANY + 1
    assert asked() - before <= 8


def test_metadata_that_is_too_long_for_an_attribute_is_left_out(here: Mount, tmp_path: Path) -> None:
    """docs/semantics.md: A value of more than 64 KiB is left out, since the kernel takes none.

    So that `cp -a` goes on."""
    assert os.listxattr(here.day / "much-metadata") == ["user.des.container"]
    assert outcome(lambda: os.getxattr(here.day / "much-metadata", "user.des.meta")) == "ENODATA"
    subprocess.run(["cp", "-a", here.day / "much-metadata", tmp_path / "copy"], check=True, timeout=30)


def test_statfs_says_what_is_open_and_that_nothing_is_free(here: Mount) -> None:
    os.listdir(here.day)
    found = os.statvfs(here.root)
    assert found.f_bfree == found.f_bavail == found.f_ffree == 0
    assert found.f_blocks * found.f_frsize >= len(LARGE)
    assert found.f_files >= 6
    assert found.f_namemax == 255
    assert found.f_flag & os.ST_RDONLY
    assert found.f_flag & os.ST_NOSUID
    assert found.f_flag & os.ST_NODEV
    assert found.f_flag & os.ST_NOEXEC


def test_the_mount_table_names_source_and_type(here: Mount) -> None:
    (line,) = [line for line in Path("/proc/mounts").read_text().splitlines() if f" {here.root} " in line]
    assert line.startswith(f"a,b\\040c {here.root} fuse.desfs ro,")


def test_control_files_are_whole_whenever_they_are_read(here: Mount) -> None:
    """docs/semantics.md: The control directory `/.desfs/` can be reached by name, and is not listed.

    `stats` is JSON and changes between reads; whoever reads one in pieces while others read it too sees one whole
    version."""
    assert ".desfs" not in os.listdir(here.root)
    assert sorted(os.listdir(here.root / ".desfs")) == ["config", "containers", "problems", "stats"]
    assert (here.root / ".desfs/problems").read_bytes() == b""
    assert json.loads((here.root / ".desfs/config").read_bytes())["noexec"] is True
    uptimes = []
    for n in range(100):
        (here.root / "2026-11-19" / f"{n:05d}-{'n' * (n % 60)}").stat()
        uptimes.append(json.loads((here.root / ".desfs/stats").read_bytes())["uptime_seconds"])
    assert uptimes == sorted(uptimes)
    assert len(set(uptimes)) > 10
    with (here.root / ".desfs/stats").open("rb", buffering=0) as file:
        text = b"".join(iter(lambda: file.read(100), b""))
    assert json.loads(text)["metrics"]
    assert json.loads(subprocess.run(["cat", here.root / ".desfs/stats"], capture_output=True, check=True).stdout)


def test_control_files_never_touch_the_store(s3: S3Server, bucket: str, store: Path, tmp_path: Path) -> None:
    """docs/semantics.md: Reading its files makes no request to the store."""
    s3.client().put_object(Bucket=bucket, Key=f"{DAY}/0.des", Body=(store / DAY / "0.des").read_bytes())
    with (
        CountingProxy(s3.host, s3.port) as proxy,
        mounted(f"s3://{bucket}", tmp_path / "mnt", "refresh=600", env=s3.environ(endpoint_url=proxy.url)) as where,
    ):
        os.listdir(where / DAY)
        proxy.clear()
        for _ in range(3):
            for name in sorted(os.listdir(where / ".desfs")):
                (where / ".desfs" / name).read_bytes()
        assert proxy.requests == []


def test_owner_group_and_mask_are_settings(here: Mount, store: Path, tmp_path: Path) -> None:
    """docs/semantics.md: Owner and group are those of the user who mounted, or `uid=` and `gid=`. The bits of `umask=`
    are taken away from the modes of files and directories."""
    for path in (here.root, here.day, here.day / "empty"):
        assert (path.stat().st_uid, path.stat().st_gid) == (os.getuid(), os.getgid())
    with mounted(store, tmp_path / "mnt", "uid=1234,gid=2345", "umask=0037,allow_other") as where:
        found = (where / DAY / "empty").stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 2345, 0o640)
        for path in (where, where / DAY, where / DAY / "d"):
            found = path.stat()
            assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 2345, 0o740)
        assert MountSettings.model_validate({"umask": "0037"}).umask == 0o037


def test_locks_work_between_processes_of_this_machine(here: Mount) -> None:
    """Programs that lock what they read (mail readers, SQLite) are served by the kernel."""
    with (here.day / "large.bin").open("rb") as one, (here.day / "large.bin").open("rb") as two:
        fcntl.flock(one, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
