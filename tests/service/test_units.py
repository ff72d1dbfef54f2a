"""The units of systemd/: docs/operations.md, systemd. Read by systemd's own tools, and started by a systemd."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import merging, servers
from tests.crash import spool_files
from tests.mount.mounting import PATIENCE_S, wait_until
from tests.mount.stores import pack_tree, upload
from tests.service.private_systemd import ROOT, Machine, private_systemd

pytestmark = pytest.mark.fuse

DAY = "2026-11-20"
TOKEN = "t0ken-of-the-units"
TOKENS = "/etc/desfs/assignment.tokens"
SERVICES = ("desfs-mount@.service", "desfs-packer@.service", "desfs-assignment@.service", "desfs-seal@.service")
# What gives a service a mount namespace of its own: systemd.exec(5), and exec_needs_mount_namespace() in systemd 252
# (src/core/execute.c) and 258 (src/core/exec-invoke.c).
NAMESPACING = [
    "BindLogSockets",
    "BindPaths",
    "BindReadOnlyPaths",
    "DynamicUser",
    "ExecPaths",
    "ExtensionDirectories",
    "ExtensionImages",
    "IPCNamespacePath",
    "InaccessiblePaths",
    "MountFlags",
    "MountImages",
    "NetworkNamespacePath",
    "NoExecPaths",
    "PrivateBPF",
    "PrivateDevices",
    "PrivateIPC",
    "PrivateMounts",
    "PrivateNetwork",
    "PrivatePIDs",
    "PrivateTmp",
    "PrivateUsers",
    "ProcSubset",
    "ProtectControlGroups",
    "ProtectHome",
    "ProtectKernelLogs",
    "ProtectKernelModules",
    "ProtectKernelTunables",
    "ProtectProc",
    "ProtectSystem",
    "ReadOnlyPaths",
    "ReadWritePaths",
    "RootDirectory",
    "RootImage",
    "TemporaryFileSystem",
]


# --- read ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all units, as they are installed, but for the program: one that is there."""
    target = tmp_path_factory.mktemp("units")
    programs = target / "bin"
    programs.mkdir()
    (programs / "desfs").symlink_to("/bin/true")
    command = ["make", "--no-print-directory", "install-units", f"DESTDIR={target}", f"BINDIR={programs}"]
    subprocess.run([*command, "SYSTEMD_UNIT_DIR=/units"], cwd=ROOT, check=True, timeout=PATIENCE_S)
    for example in ("mnt-des.mount", "mnt-des.automount"):
        (target / "units" / example).write_text((ROOT / "systemd" / example).read_text())
    return target / "units"


def analyze(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@pytest.mark.parametrize("name", [*SERVICES, "desfs-seal@.timer", "mnt-des.mount", "mnt-des.automount"])
def test_systemd_has_nothing_to_say_about_a_unit(units: Path, name: str) -> None:
    done = analyze("verify", "--man=no", units / name)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_exposed_as_little_as_the_documentation_says(units: Path, name: str) -> None:
    """By systemd's own estimate, of which 5.0 is the most that will do. Its versions differ by a few tenths."""
    done = analyze("security", "--offline=true", "--threshold=50", units / name)
    assert done.returncode == 0, done.stdout
    (found,) = re.findall(r"Overall exposure level for .*: (\d+\.\d)", done.stdout)
    text = (ROOT / "docs/operations.md").read_text()
    (documented,) = re.findall(rf"^\| `{re.escape(name)}` \|.*\| (\d+\.\d) \|$", text, re.MULTILINE)
    assert abs(float(found) - float(documented)) < 0.5


def test_a_mount_is_made_in_the_namespace_of_the_machine() -> None:
    names = re.findall(r"^(\w+)=", (ROOT / "systemd/desfs-mount@.service").read_text(), re.MULTILINE)
    assert "CapabilityBoundingSet" in names
    assert not set(names) & set(NAMESPACING)


# --- started -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class World:
    """A systemd, and a store for its services in a bucket."""

    machine: Machine
    url: str
    server: servers.S3Server
    bucket: str

    @property
    def credentials(self) -> str:
        """Lines for an environment file."""
        return "".join(f"{name}={value}\n" for name, value in self.server.environ().items())


@pytest.fixture(scope="module")
def world(s3: servers.S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    base = tmp_path_factory.mktemp("world")
    (base / "source").mkdir()
    (base / "source/hello.txt").write_text("hello\n")
    pack_tree(base / "source", base / "store", DAY)
    bucket = s3.new_bucket("units")
    try:
        upload(s3, bucket, base / "store", "archive/")
        with private_systemd(base / "machine") as machine:
            installed = machine.folder / "package/usr/local/lib"
            machine.output("systemd-sysusers", installed / "sysusers.d/desfs.conf")
            machine.output("systemd-tmpfiles", "--create", installed / "tmpfiles.d/desfs.conf")
            yield World(machine, f"s3://{bucket}/archive", s3, bucket)
    finally:
        s3.delete_bucket(bucket)


def main_pid(machine: Machine, unit: str) -> int:
    return int(machine.show(unit, "MainPID"))


def read(machine: Machine, where: str) -> str:
    return machine.output("cat", f"{where}/{DAY}/hello.txt")


def is_mounted(machine: Machine, where: str) -> bool:
    return machine.run("findmnt", "--types", "fuse.desfs", "--mountpoint", where).returncode == 0


def prepare_mount(world: World, name: str, where: str, *, settings: str = "", variables: str = "") -> str:
    """What an administrator writes for an instance; its unit. The name of an environment file is a pattern, in which a
    backslash takes the next character as it is: systemd.exec(5), glob(7)."""
    world.machine.output("mkdir", "-p", where)
    environment = name.replace("\\", "")
    world.machine.write(f"/etc/desfs/{environment}.env", f"SOURCE={world.url}\n{variables}{world.credentials}")
    world.machine.write(f"/etc/desfs/{name}.toml", f"[mount]\nallow_other = true\n{settings}")
    return f"desfs-mount@{name}.service"


def write_for_group(machine: Machine, path: str, text: str) -> None:
    """A file that services of the user desfs may read."""
    machine.write(path, text)
    machine.output("chown", "root:desfs", path)
    machine.output("chmod", "640", path)


def _host_pid(machine: Machine, unit: str) -> int:
    """The main process as the tests see it, outside of the machine's namespace of processes."""
    inside = str(main_pid(machine, unit))
    (found,) = (
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit()
        and (text := _status_of(entry))
        and re.search(rf"^NSpid:\t{entry.name}\t{inside}$", text, re.MULTILINE)
        and os.readlink(f"/proc/{entry.name}/ns/pid") == os.readlink(f"/proc/{machine.pid}/ns/pid")
    )
    return found


def _status_of(process: Path) -> str:
    try:
        return (process / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.fixture(scope="module")
def running(world: World) -> Iterator[str]:
    """A mount service at /mnt/archive."""
    unit = prepare_mount(world, "mnt-archive", "/mnt/archive")
    world.machine.systemctl("start", unit)
    yield unit
    world.machine.systemctl("stop", unit)


def test_a_mount_service_has_started_when_every_user_can_read(world: World, running: str) -> None:
    machine = world.machine
    user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    assert machine.output(*user, "cat", f"/mnt/archive/{DAY}/hello.txt") == "hello\n"
    assert machine.show(running, "StatusText") == f"{world.url}/ is mounted at /mnt/archive"


def test_a_mount_service_is_confined_and_lacks_nothing(world: World, running: str) -> None:
    """Capabilities, system calls, memory, devices, sockets: what the unit takes away, the daemon does not miss."""
    machine = world.machine
    status = Path(f"/proc/{_host_pid(machine, running)}/status").read_text()
    assert re.search(r"^CapBnd:\t0000000000200000$", status, re.MULTILINE), status  # CAP_SYS_ADMIN
    assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE)
    assert re.search(r"^Seccomp:\t2$", status, re.MULTILINE)
    assert json.loads(machine.output("cat", "/mnt/archive/.desfs/stats"))["levers"]["in_force"] is True
    assert machine.output("cat", "/mnt/archive/.desfs/problems") == ""


def test_a_reload_takes_over_the_settings(world: World, running: str) -> None:
    machine = world.machine
    before = main_pid(machine, running)
    machine.write("/etc/desfs/mnt-archive.toml", "[mount]\nallow_other = true\nrefresh = 7\n")
    machine.systemctl("reload", running)
    wait_until(
        lambda: json.loads(machine.output("cat", "/mnt/archive/.desfs/config"))["refresh"] == 7, "the new setting"
    )
    assert main_pid(machine, running) == before


def test_a_start_that_fails_leaves_the_mount_that_is_there(world: World, running: str) -> None:
    """ExecStopPost= takes away dead mounts alone: not one that somebody else has made."""
    machine = world.machine
    unit = prepare_mount(world, "second", "/mnt/archive", variables="MOUNTPOINT=/mnt/archive\n")
    machine.drop_in(unit, "[Service]\nRestart=no\n")
    assert machine.run("systemctl", "start", unit).returncode != 0
    assert "mount point /mnt/archive is busy" in machine.log()
    assert read(machine, "/mnt/archive") == "hello\n"


def test_an_instance_may_be_named_after_a_mount_point_of_any_name(world: World) -> None:
    """Its stop unmounts, and what has come is in the disk cache then."""
    machine = world.machine
    where = "/mnt/my archive-2_%d"
    name = machine.output("systemd-escape", "--path", where).strip()
    assert name == r"mnt-my\x20archive\x2d2_\x25d"
    unit = prepare_mount(world, name, where, settings='cache_dir = "/var/cache/desfs"\n')
    machine.systemctl("start", unit)
    assert read(machine, where) == "hello\n"
    machine.systemctl("stop", unit)
    assert machine.show(unit, "Result") == "success"
    assert not is_mounted(machine, where)
    assert list((machine.folder / "var/cache/desfs").rglob("*.idx")), "nothing was cached"


def test_a_daemon_whose_event_loop_does_not_turn_is_killed_and_another_mounts(world: World) -> None:
    """At a mount point that the environment file names, spaces and all."""
    machine = world.machine
    where = "/mnt/more than one"
    unit = prepare_mount(world, "stuck", where, variables=f"MOUNTPOINT={where}\n")
    # A process that is stopped ends by no other signal.
    machine.drop_in(unit, "[Service]\nRestartSec=0\nWatchdogSec=3\nWatchdogSignal=SIGKILL\n")
    machine.systemctl("start", unit)
    before = main_pid(machine, unit)
    os.kill(_host_pid(machine, unit), signal.SIGSTOP)
    wait_until(lambda: main_pid(machine, unit) not in (0, before), "another daemon")
    wait_until(lambda: machine.show(unit, "ActiveState") == "active", "the mount")
    assert read(machine, where) == "hello\n"
    machine.systemctl("stop", unit)
    assert not is_mounted(machine, where)


def test_a_dead_mount_is_cleared_when_nobody_starts_the_service_again(world: World) -> None:
    machine = world.machine
    unit = prepare_mount(world, "dead", "/mnt/dead", variables="MOUNTPOINT=/mnt/dead\n")
    machine.drop_in(unit, "[Service]\nRestart=no\n")
    machine.systemctl("start", unit)
    machine.systemctl("kill", "--kill-whom=main", "--signal=KILL", unit)
    wait_until(lambda: machine.show(unit, "ActiveState") == "failed", "the end of the service")
    assert not is_mounted(machine, "/mnt/dead")
    assert machine.output("ls", "-A", "/mnt/dead") == ""


def test_settings_that_make_no_sense_are_not_tried_again(world: World) -> None:
    machine = world.machine
    unit = prepare_mount(world, "wrong", "/mnt/wrong", settings="refersh = 1\n", variables="MOUNTPOINT=/mnt/wrong\n")
    assert machine.run("systemctl", "start", unit).returncode != 0
    assert machine.show(unit, "ActiveState") == "failed"
    assert "/etc/desfs/wrong.toml: [mount] refersh is no setting; did you mean refresh?" in machine.log()


def test_the_automount_mounts_when_somebody_looks(world: World) -> None:
    """The example, with a bucket that is there."""
    machine = world.machine
    machine.drop_in("mnt-des.mount", f"[Mount]\nWhat={world.url}\n")
    machine.write("/etc/desfs/mnt-des.env", world.credentials)
    machine.systemctl("start", "mnt-des.automount")
    assert machine.show("mnt-des.mount", "ActiveState") == "inactive"
    assert read(machine, "/mnt/des") == "hello\n"
    assert machine.show("mnt-des.mount", "ActiveState") == "active"
    machine.systemctl("stop", "mnt-des.automount", "mnt-des.mount")
    assert not is_mounted(machine, "/mnt/des")


def test_a_packer_service_packs_what_members_of_the_group_write(world: World) -> None:
    """As the user desfs, with a capability for nothing but leases, the spool the only place where it may write."""
    machine = world.machine
    variables = f"STORE=s3://{world.bucket}/packed\nDESFS_SETTLE=0\nDESFS_MAX_AGE=0\nDESFS_SCAN_INTERVAL=0.1\n"
    machine.write("/etc/desfs/packer-test.env", variables + world.credentials)
    write_for_group(machine, "/etc/desfs/packer-test.toml", '[packer]\ntimezone = "UTC"\n')
    machine.systemctl("start", "desfs-packer@test.service")
    # A user of the group, who is not the packer's and whose umask lets the group read.
    group = machine.output("getent", "group", "desfs").split(":")[2]
    write = "umask 027; echo packed >/var/spool/desfs/new.txt"
    machine.output("setpriv", "--reuid=65534", f"--regid={group}", "--clear-groups", "sh", "-c", write)
    wait_until(lambda: not (machine.folder / "var/spool/desfs/new.txt").exists(), "the packer")
    wait_until(lambda: _keys(world, "packed/"), "a container")
    machine.systemctl("stop", "desfs-packer@test.service")
    assert machine.show("desfs-packer@test.service", "Result") == "success", machine.log()
    status = machine.output("stat", "--format=%U %a", "/var/spool/desfs/.desfs")
    assert status == "desfs 2700\n"


@pytest.fixture
def assignment(world: World, postgres: str) -> Iterator[str]:
    """The URL of an assignment service that is running, with its catalog in Postgres and its token in a file."""
    (port,) = servers.free_ports(1)
    url = f"http://{servers.HOST}:{port}"
    world.machine.write("/etc/desfs/assignment-test.env", f"DESFS_CATALOG={postgres}\n")
    write_for_group(world.machine, TOKENS, f"{TOKEN}\n")
    settings = f'[assignment]\nlisten = "{servers.HOST}:{port}"\ntoken_file = "{TOKENS}"\n'
    write_for_group(world.machine, "/etc/desfs/assignment-test.toml", settings)
    # A process that is stopped ends by no other signal.
    drop_in = "[Service]\nRestartSec=0\nWatchdogSec=3\nWatchdogSignal=SIGKILL\n"
    world.machine.drop_in("desfs-assignment@test.service", drop_in)
    world.machine.systemctl("start", "desfs-assignment@test.service")
    yield url
    world.machine.systemctl("stop", "desfs-assignment@test.service")


def workers_of(url: str) -> list[dict[str, Any]]:
    """The packers that live, as an assignment service says."""
    found = httpx.get(f"{url}/v1/workers", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=PATIENCE_S)
    assert found.status_code == 200, found.text
    return [worker for worker in found.json()["workers"] if worker["alive"]]


def test_two_packers_share_a_spool_a_catalog_and_an_assignment_service(
    world: World, postgres: str, assignment: str
) -> None:
    """With catalog and service in their settings files."""
    machine = world.machine
    machine.output("mkdir", "/var/spool/desfs/shared")
    machine.output("chown", "desfs:desfs", "/var/spool/desfs/shared")
    packers = ("desfs-packer@one.service", "desfs-packer@two.service")
    for name in ("one", "two"):
        variables = f"STORE=s3://{world.bucket}/shared\nSPOOL=/var/spool/desfs/shared\n"
        machine.write(f"/etc/desfs/packer-{name}.env", variables + world.credentials)
        settings = (
            f'catalog = "{postgres}"\nsettle = 0\nmax_age = 0\nscan_interval = 0.1\nlease_ttl = 10\n'
            f'[packer]\nassignment = "{assignment}"\nassignment_token_file = "{TOKENS}"\n'
        )
        write_for_group(machine, f"/etc/desfs/packer-{name}.toml", settings)
    machine.systemctl("start", *packers)
    wait_until(lambda: len(workers_of(assignment)) == 2, "two packers")
    assert len({worker["spool"] for worker in workers_of(assignment)}) == 1
    spool = machine.folder / "var/spool/desfs/shared"
    # As the packers' user, folder by folder: of shards of both.
    write = "for n in 0 1 2 3 4 5 6 7; do mkdir $n && echo packed >$n/new.txt || exit 1; done"
    as_desfs = ("setpriv", "--reuid=desfs", "--regid=desfs", "--clear-groups", "sh", "-c")
    machine.output(*as_desfs, f"cd /var/spool/desfs/shared; {write}")
    wait_until(lambda: not spool_files(spool), "the packers")
    wait_until(lambda: sum(worker["details"]["packed_files"] for worker in workers_of(assignment)) == 8, "their word")
    machine.systemctl("stop", *packers)
    for unit in packers:
        assert machine.show(unit, "Result") == "success", machine.log()
    assert workers_of(assignment) == []
    assert len(_keys(world, "shared/")) >= 2


def test_an_assignment_service_is_ready_watched_and_ends_in_order(world: World, assignment: str) -> None:
    """As the user desfs, without any capability; it gives its node id back."""
    machine, unit = world.machine, "desfs-assignment@test.service"
    assert machine.show(unit, "StatusText") == f"serving {assignment}"
    status = Path(f"/proc/{_host_pid(machine, unit)}/status").read_text()
    assert re.search(r"^CapBnd:\t0000000000000000$", status, re.MULTILINE), status
    assert not re.search(r"^Uid:\t0\t", status, re.MULTILINE)
    assert httpx.get(f"{assignment}/v1/workers").status_code == 401
    before = main_pid(machine, unit)
    os.kill(_host_pid(machine, unit), signal.SIGSTOP)
    wait_until(lambda: main_pid(machine, unit) not in (0, before), "another one")
    wait_until(lambda: machine.show(unit, "ActiveState") == "active", "its start")
    wait_until(lambda: httpx.get(f"{assignment}/readyz").status_code == 200, "a node id")
    machine.systemctl("stop", unit)
    assert machine.show(unit, "Result") == "success", machine.log()


def test_a_seal_service_seals_what_is_over(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the user desfs without any capability, with the catalog of a spool; and the timer waits for the next hour."""
    machine = world.machine
    for name, value in world.server.environ().items():
        monkeypatch.setenv(name, value)
    sealed = merging.World(tmp_path, f"s3://{world.bucket}/sealed")
    for n in range(2):
        sealed.put("0", {f"{n}": b"%d" % n})
    catalog = machine.folder / "var/spool/desfs/catalog.sqlite"
    shutil.copy(sealed.catalog_url, catalog)
    machine.output("chown", "desfs:desfs", "/var/spool/desfs/catalog.sqlite")
    variables = f"STORE={sealed.store_url}\nDESFS_CATALOG=/var/spool/desfs/catalog.sqlite\n"
    machine.write("/etc/desfs/seal-test.env", variables + world.credentials)
    write_for_group(machine, "/etc/desfs/seal-test.toml", '[seal]\ntimezone = "UTC"\n')
    machine.systemctl("start", "desfs-seal@test.service")
    assert "looked at 1 day: sealed 2 containers into 1 (" in machine.log()
    assert f"sealed/{merging.DAY}/0.des" in _keys(world, "sealed/")
    machine.systemctl("start", "desfs-seal@test.timer")
    assert machine.show("desfs-seal@test.timer", "SubState") == "waiting"
    machine.systemctl("stop", "desfs-seal@test.timer")


def _keys(world: World, prefix: str) -> list[str]:
    listed = world.server.client().list_objects_v2(Bucket=world.bucket, Prefix=prefix)
    return [found["Key"] for found in listed.get("Contents", ()) if found["Key"].endswith(".des")]
