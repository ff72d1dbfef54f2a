"""A systemd of its own, with namespaces of its own: it starts units as that of a machine does, and ends with the test.

Its root is the machine's, but for /etc (a copy), /run, /mnt, /srv, /usr/local/sbin, /var/cache and /var/spool, and for
the units: it sees no others than those that it is given, so that nothing else starts. The program is in /srv, with the
interpreter and the modules that run the tests: these may be in root's home, where a unit with ProtectHome= finds
nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests import servers
from tests.mount.mounting import PATIENCE_S, wait_until

ROOT = Path(__file__).parents[2]
PATH = "/srv/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Those that units of ours name, and those that each unit belongs to: systemd.special(7).
_TARGETS = (
    "basic.target",
    "default.target",
    "local-fs.target",
    "multi-user.target",
    "network-online.target",
    "network.target",
    "nss-lookup.target",
    "remote-fs-pre.target",
    "remote-fs.target",
    "shutdown.target",
    "sysinit.target",
    "umount.target",
)
_LAUNCHER = """\
#!/srv/python/bin/python{version} -I
import sys
sys.path[:0] = ["/srv/project", "/srv/packages"]
from desfs.cli import main
main()
"""
# A control group that systemd can take for the root of all; then it alone in its namespaces.
_OUTSIDE = f"""\
set -e
{servers.DROP_COPIED_MOUNTS}
mount -t cgroup2 cgroup2 "$1/cgroups"
mkdir "$1/cgroups/$2"
echo $$ >"$1/cgroups/$2/cgroup.procs"
exec unshare --cgroup --pid --fork --kill-child --mount-proc sh -c "$3" sh "$1" "$4" "$5" "$6"
"""
_INSIDE = """\
set -e
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount --bind "$2" "$1/srv/python"
mount --bind "$3" "$1/srv/packages"
mount --bind "$4" "$1/srv/project"
mount -o remount,bind,ro "$1/srv/project"
for folder in etc mnt run var/cache var/spool; do mount --bind "$1/$folder" "/$folder"; done
mount --rbind "$1/srv" /srv
mount --bind /srv/bin /usr/local/sbin
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount --bind "$1/console" /dev/console
mount --make-rshared /
export container=test SYSTEMD_UNIT_PATH=/run/systemd/system SYSTEMD_GENERATOR_PATH=/run/none
for systemd in /usr/lib/systemd/systemd /lib/systemd/systemd; do
    test ! -x $systemd || exec $systemd --system --show-status=no --log-target=console
done
"""
# Processes that were killed may be in their groups a moment longer.
_CLEAN = """\
mount -t cgroup2 cgroup2 "$1/cgroups"
find "$1/cgroups/$2" -depth -type d -exec rmdir {} + 2>/dev/null
test ! -e "$1/cgroups/$2"
"""


@dataclass(frozen=True, slots=True)
class Machine:
    """A running systemd. `folder` has its /etc, /run and so on."""

    folder: Path
    pid: int

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        """Run a program as from a shell of the machine: with the mounts that systemd itself sees."""
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--uts", "--cgroup", "--"]
        return subprocess.run(
            [*enter, *map(str, command)],
            env={"PATH": PATH, "LC_ALL": "C.UTF-8"},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def output(self, *command: object) -> str:
        """The output of a program that must succeed."""
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}\n{self.log()}"
        return done.stdout

    def systemctl(self, *arguments: object) -> str:
        """The output of systemctl, which must succeed."""
        return self.output("systemctl", *arguments)

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.systemctl("show", "--value", f"--property={name}", "--", unit).strip()

    def write(self, path: str, text: str) -> None:
        """A file of the machine, for its owner alone."""
        target = self.folder / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(0o600)

    def drop_in(self, unit: str, text: str) -> None:
        """Lines that are added to a unit, as by `systemctl edit --runtime`."""
        self.write(f"/run/systemd/system/{unit}.d/test.conf", text)
        self.systemctl("daemon-reload")

    def log(self) -> str:
        """What systemd and its services have written."""
        return "".join((self.folder / name).read_text(errors="replace") for name in ("console", "run/services.log"))


@contextlib.contextmanager
def private_systemd(folder: Path) -> Iterator[Machine]:
    """Start it below an empty folder, which others may search; at the end everything in it is killed."""
    _prepare(folder)
    name = f"desfs-test-{uuid.uuid4().hex[:12]}"
    places = (sys.base_prefix, sysconfig.get_path("purelib"), str(ROOT))
    argv = ["unshare", "--mount", "--uts", "--ipc", "sh", "-c", _OUTSIDE, "sh", str(folder), name, _INSIDE, *places]
    env = {"PATH": PATH, servers.RUN_VARIABLE: os.environ[servers.RUN_VARIABLE]}
    try:
        with servers.child_process(argv, log=folder / "start.log", env=env, stop_s=0) as process:
            wait_until(
                lambda: process.poll() is not None or (folder / "run/systemd/private").exists(), "systemd to start"
            )
            assert process.poll() is None, (folder / "start.log").read_text() + (folder / "console").read_text()
            (child,) = psutil.Process(process.pid).children()
            machine = Machine(folder, child.pid)
            machine.systemctl("is-system-running", "--wait")
            yield machine
    finally:
        clean = ["unshare", "--mount", "sh", "-c", _CLEAN, "sh", str(folder), name]
        wait_until(lambda: subprocess.run(clean, check=False, timeout=PATIENCE_S).returncode == 0, "the control groups")


def _prepare(folder: Path) -> None:
    for path in ("cgroups", "mnt", "run", "srv/python", "srv/packages", "srv/project", "var/cache", "var/spool"):
        (folder / path).mkdir(parents=True)
    shutil.copytree("/etc", folder / "etc", symlinks=True)
    (folder / "console").touch()
    launcher = folder / "srv/bin/desfs"
    launcher.parent.mkdir()
    launcher.write_text(_LAUNCHER.format(version=f"{sys.version_info.major}.{sys.version_info.minor}"))
    launcher.chmod(0o755)
    subprocess.run(
        ["make", "--no-print-directory", "install-units", f"DESTDIR={folder}/package", "BINDIR=/srv/bin"],
        cwd=ROOT,
        check=True,
        timeout=PATIENCE_S,
    )
    units = folder / "run/systemd/system"
    shutil.copytree(folder / "package/usr/local/lib/systemd/system", units)
    for example in ("mnt-des.mount", "mnt-des.automount"):
        shutil.copy(ROOT / "systemd" / example, units)
    for target in _TARGETS:
        (units / target).write_text("[Unit]\nDescription=Of the test\n")
    # There is no journal; and the interpreter's library may be in a place that other users cannot read.
    for kind, section in (("service", "Service"), ("mount", "Mount")):
        (units / f"{kind}.d").mkdir()
        (units / f"{kind}.d/all.conf").write_text(
            f"[{section}]\nStandardOutput=append:/run/services.log\nStandardError=inherit\n"
            "Environment=LD_LIBRARY_PATH=/srv/python/lib\n"
        )
    (folder / "run/services.log").touch()
