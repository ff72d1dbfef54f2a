"""docs/operations.md, Mount: real mount(8), fstab, ordinary users, an empty environment."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.namespace import NOBODY, ROOT, Namespace, namespace
from tests.mount.stores import put_sharded, upload
from tests.servers import S3Server

pytestmark = pytest.mark.fuse

DAY = "2026-11-20"
FILES = {"f": b"content", "d/g": b"below"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that anybody can read, with a comma and a space in the name of one of its copies."""
    folder = tmp_path_factory.mktemp("store")
    folder.chmod(0o755)
    for name in ("plain", "with, space\\"):
        put_sharded(folder / name, DAY, FILES)
    return folder


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[Namespace]:
    with namespace(tmp_path_factory.mktemp("inside"), store) as made:
        yield made


def shown(inside: Namespace, where: str, user: int = 0) -> tuple[str, str, set[str]]:
    """(source, type, options) of a mount, as findmnt shows them."""
    done = inside.run("findmnt", "--noheadings", "--raw", "--output", "SOURCE,FSTYPE,OPTIONS", "--mountpoint", where)
    assert done.returncode == 0, f"{where} is not mounted"
    source, kind, options = done.stdout.rstrip("\n").split(" ")
    return source, kind, set(options.split(","))


def mounts_of(inside: Namespace, where: str) -> list[str]:
    """The sources of what is mounted at a place, as /proc/mounts has them. Mounts of other tests are there too."""
    fields = [line.split(" ") for line in inside.run("cat", "/proc/self/mounts").stdout.splitlines()]
    return [source for source, place, *_ in fields if place == where.replace(" ", "\\040")]


def check(inside: Namespace, where: str, source: str, *, user: int = 0) -> None:
    """The mount shows the files, and findmnt and /proc/mounts the right line; then it is unmounted."""
    assert inside.run("cat", f"{where}/{DAY}/f", f"{where}/{DAY}/d/g", user=user).stdout == "contentbelow"
    found = shown(inside, where)
    assert found[:2] == (source, "fuse.desfs")
    assert {"ro", "nosuid", "nodev", "default_permissions", f"user_id={user}"} <= found[2]
    assert mounts_of(inside, where) == [source]
    done = inside.run(*(["umount"] if not user else ["fusermount3", "-u"]), where, user=user)
    assert (done.returncode, done.stderr) == (0, "")
    assert inside.run("findmnt", "--mountpoint", where).returncode == 1


def fine(inside: Namespace, *command: object, user: int = 0, env: dict[str, str] | None = None) -> None:
    done = inside.run(*command, user=user, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("env", [None, {}], ids=["environment", "no environment"])
@pytest.mark.parametrize("kind", ["fuse.desfs", "desfs"])
def test_mount_8(inside: Namespace, kind: str, env: dict[str, str] | None) -> None:
    """docs/operations.md: `mount -t fuse.desfs` and `mount -t desfs` mount a store."""
    fine(inside, "/usr/bin/mount", "-t", kind, "/opt/store/plain", "/mnt/des", "-o", "ro,allow_other", env=env)
    assert "allow_other" in shown(inside, "/mnt/des")[2]
    check(inside, "/mnt/des", "/opt/store/plain")


@pytest.mark.parametrize("env", [None, {}], ids=["environment", "no environment"])
def test_the_helper_by_itself(inside: Namespace, env: dict[str, str] | None) -> None:
    """docs/operations.md: `mount.desfs` takes the flags that mount(8) gives a helper: -s, -f, -n, -v, -t."""
    helper = ("/sbin/mount.desfs", "/opt/store/plain", "/mnt/des")
    done = inside.run(*helper, "-f", "-n", "-v", "-t", "fuse.desfs", env=env)
    assert (done.returncode, done.stdout) == (0, "desfs: /opt/store/plain would be mounted on /mnt/des\n")
    assert inside.run("findmnt", "--mountpoint", "/mnt/des").returncode == 1
    done = inside.run(*helper, "-o", "nonsense=1,ro", env=env)
    assert (done.returncode, done.stderr) == (1, "desfs: unknown mount option 'nonsense'\n")
    done = inside.run(*helper, "-s", "-v", "-n", "-o", "nonsense=1,ro", env=env)
    assert (done.returncode, done.stderr) == (0, "desfs: unknown mount option 'nonsense' is ignored\n")
    assert done.stdout == "desfs: /opt/store/plain is mounted on /mnt/des\n"
    check(inside, "/mnt/des", "/opt/store/plain")


def test_the_line_of_the_readme_in_an_fstab(inside: Namespace, s3: S3Server, bucket: str, store: Path) -> None:
    """README.md, Everyday use: the line for /etc/fstab."""
    (line,) = re.findall(r"^ +(\S+ +/mnt/des +fuse\.desfs .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    upload(s3, bucket, store / "plain")
    _, where, kind, options, *numbers = line.split()
    s3_env = s3.environ()
    options += f",endpoint_url={s3_env['AWS_ENDPOINT_URL']}"
    line = " ".join([f"s3://{bucket}", where, kind, options, *numbers])
    fstab = inside.write("fstab", f"# a comment\n{line}\n")
    fine(inside, "mount", "-T", fstab, "/mnt/des", env={"PATH": "/usr/bin:/usr/sbin", **s3_env})
    check(inside, "/mnt/des", f"s3://{bucket}")


def test_mount_a_mounts_each_line_once(inside: Namespace) -> None:
    """docs/operations.md: `mount -a` leaves alone what is mounted."""
    lines = ["/opt/store/plain /mnt/des fuse.desfs ro,_netdev,nofail,x-systemd.automount 0 0"]
    lines.append("file:///opt/store/plain /mnt/two desfs ro,noauto 0 0")
    fstab = inside.write("fstab-all", "\n".join(lines) + "\n")
    inside.run("mkdir", "-p", "/mnt/two")
    environments: tuple[dict[str, str] | None, ...] = ({}, None)  # as at boot, and from a shell
    for env in environments:
        fine(inside, "/usr/bin/mount", "-a", "-T", fstab, env=env)
        assert inside.run("findmnt", "--mountpoint", "/mnt/two").returncode == 1  # noauto
    assert len(mounts_of(inside, "/mnt/des")) == 1
    check(inside, "/mnt/des", "/opt/store/plain")


def test_spaces_commas_and_backslashes(inside: Namespace) -> None:
    """docs/operations.md: In fstab a space is `\\040`; a backslash before a comma keeps it in a value."""
    source, where = "/opt/store/with, space\\", "/mnt/a place"
    inside.run("mkdir", "-p", where)
    fine(inside, "mount", "-t", "desfs", source, where, "-o", r"ro,fsname=one\,two\\three four")
    assert inside.run("cat", f"{where}/{DAY}/f").stdout == "content"
    assert mounts_of(inside, where) == [r"one,two\134three\040four"]
    fine(inside, "umount", where)
    escaped = [text.replace("\\", "\\134").replace(" ", "\\040") for text in (source, where)]
    fstab = inside.write("fstab-space", " ".join([*escaped, "fuse.desfs ro 0 0\n"]))
    fine(inside, "mount", "-T", fstab, where)
    assert inside.run("cat", f"{where}/{DAY}/f").stdout == "content"
    fine(inside, "umount", where)


def test_a_remount_is_refused(inside: Namespace) -> None:
    """docs/operations.md: A mount cannot be changed by remount."""
    fine(inside, "mount", "-t", "desfs", "/opt/store/plain", "/mnt/des", "-o", "ro")
    done = inside.run("mount", "-o", "remount,ro", "/mnt/des")
    assert done.returncode == 32
    assert "cannot be changed by remount" in done.stderr
    check(inside, "/mnt/des", "/opt/store/plain")


def test_a_busy_mount_is_unmounted_lazily_or_not_at_all(inside: Namespace) -> None:
    """docs/operations.md: `umount` of a busy mount fails and leaves it; `umount -l` takes it away at once."""
    fine(inside, "mount", "-t", "desfs", "/opt/store/plain", "/mnt/des", "-o", "ro")
    reader = "exec 3< /mnt/des/{day}/f; umount /mnt/des && exit 9; desfs umount /mnt/des && exit 8; cat <&3; {end}"
    script = reader.format(day=DAY, end="desfs umount --lazy /mnt/des; findmnt --mountpoint /mnt/des && exit 7; exit 0")
    done = inside.run("sh", "-c", script)
    assert (done.returncode, done.stdout) == (0, "content")
    assert done.stderr.count("busy") == 2


@pytest.mark.parametrize("env", [None, {}], ids=["environment", "no environment"])
def test_an_ordinary_user(inside: Namespace, env: dict[str, str] | None) -> None:
    """docs/operations.md: An ordinary user mounts for itself; with allow_other if fuse.conf says so."""
    where = "/mnt/own"
    inside.run("mkdir", "-p", where)
    inside.run("chown", str(NOBODY), where)
    desfs = "/usr/bin/desfs"
    inside.allow_users(allowed=False)
    fine(inside, desfs, "mount", "/opt/store/plain", where, user=NOBODY, env=env)
    assert inside.run("ls", where).returncode == 2  # not even root
    check(inside, where, "/opt/store/plain", user=NOBODY)
    done = inside.run(desfs, "mount", "/opt/store/plain", where, "-o", "allow_other", user=NOBODY, env=env)
    assert done.returncode == 32
    assert "/etc/fuse.conf" in done.stderr
    assert "user_allow_other" in done.stderr
    inside.allow_users(allowed=True)
    fine(inside, desfs, "/opt/store/plain", where, "-o", "allow_other", user=NOBODY, env=env)
    assert inside.run("ls", where).stdout == f"{DAY}\n"
    check(inside, where, "/opt/store/plain", user=NOBODY)


def test_an_ordinary_user_by_fstab(inside: Namespace) -> None:
    """docs/operations.md: A line with `user` lets anybody mount it; the mount is that user's."""
    where = "/mnt/user"
    inside.run("mkdir", "-p", where)
    inside.run("chown", str(NOBODY), where)
    fstab = f"/opt/store/plain {where} fuse.desfs ro,user,noauto 0 0\n"
    script = f"printf %s {shlex.quote(fstab)} > /opt/fstab; mount --bind /opt/fstab /etc/fstab"
    fine(inside, "sh", "-c", script)
    fine(inside, "mount", where, user=NOBODY)
    check(inside, where, "/opt/store/plain", user=NOBODY)
