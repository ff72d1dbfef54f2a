"""A mount namespace of its own in which desfs is installed as by `make install`: mount(8) finds it, ordinary users
reach it, and nothing outside changes."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.servers import DROP_COPIED_MOUNTS, child_process, is_running

NOBODY = 65534
ROOT = Path(__file__).parents[2]
# Run from a copy of everything below /opt, since the project and the interpreter may stand where only root can go.
_PROGRAM = """#!/bin/sh
export PYTHONHOME=/opt/python PYTHONPATH=/opt/desfs:/opt/packages LD_LIBRARY_PATH=/opt/python/lib
exec /opt/python/bin/{python} -B -c 'import sys; sys.argv[0] = "{name}"; {call}' "$@"
"""
# /dev/fuse is anybody's, as udev makes it (Linux, Documentation/filesystems/fuse); some containers have it otherwise.
_SETUP = """
set -e
mount -t overlay overlay -o lowerdir={here}/bin:/usr/bin /usr/bin
mount -t overlay overlay -o lowerdir={here}/sbin:/usr/sbin /usr/sbin
mount --bind {here}/fuse.conf /etc/fuse.conf
mount -t tmpfs tmpfs /opt
mount -t tmpfs -o mode=0777 tmpfs /mnt
mknod -m 0666 /opt/fuse c 10 229
mount --bind /opt/fuse /dev/fuse
mkdir /opt/python /opt/desfs /opt/packages /opt/store /mnt/des
mount --bind {python} /opt/python
mount --bind {project} /opt/desfs
mount --bind {packages} /opt/packages
mount --bind {store} /opt/store
chmod 0777 /mnt/des
"""
_END_S = 10.0


class Namespace:
    """Commands run in it; the store is /opt/store, /mnt is empty and anybody's, /mnt/des is there."""

    def __init__(self, holder: int, folder: Path) -> None:
        self._holder = holder
        self._folder = folder

    def run(
        self,
        *command: object,
        user: int = 0,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end. `env` is all of its environment; without one it has the test's."""
        as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--"] if user else []
        whole = [] if env is None else ["env", "-i", *(f"{name}={value}" for name, value in env.items())]
        return subprocess.run(
            ["nsenter", f"--mount=/proc/{self._holder}/ns/mnt", "--", *whole, *as_user, *map(str, command)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def write(self, name: str, text: str) -> Path:
        """A file that can be seen inside."""
        path = self._folder / name
        path.write_text(text)
        return path

    def allow_users(self, *, allowed: bool) -> None:
        """What /etc/fuse.conf says."""
        (self._folder / "fuse.conf").write_text("user_allow_other\n" if allowed else "#user_allow_other\n")

    def processes(self) -> list[int]:
        """Those that run in it, but for the one that holds it."""
        wanted = os.readlink(f"/proc/{self._holder}/ns/mnt")
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and int(folder.name) != self._holder:
                with contextlib.suppress(OSError):
                    if os.readlink(folder / "ns" / "mnt") == wanted:
                        found.append(int(folder.name))
        return found


@contextlib.contextmanager
def namespace(folder: Path, store: Path) -> Iterator[Namespace]:
    """Make one; at its end its processes are killed, and its mounts are gone with them."""
    for name, place, call in (
        ("desfs", "bin", "from desfs.cli import main; main()"),
        ("mount.desfs", "sbin", "from desfs.cli.mount import helper; helper()"),
    ):
        (folder / place).mkdir(parents=True)
        path = folder / place / name
        python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        path.write_text(_PROGRAM.format(python=python, name=name, call=call))
        path.chmod(0o755)
    (folder / "fuse.conf").write_text("")
    parts = {
        "here": folder,
        "python": sys.base_prefix,
        "project": ROOT,
        "packages": sysconfig.get_paths()["purelib"],
        "store": store,
    }
    setup = _SETUP.format(**{name: shlex.quote(str(value)) for name, value in parts.items()})
    ready = folder / "ready"
    script = f"{DROP_COPIED_MOUNTS}\n{setup}\ntouch {shlex.quote(str(ready))}\nexec sleep infinity"
    log = folder / "holder.log"
    with child_process(["unshare", "--mount", "--propagation", "private", "sh", "-c", script], log=log) as holder:
        while not ready.exists():
            assert holder.poll() is None, log.read_text()
            time.sleep(0.01)
        inside = Namespace(holder.pid, folder)
        try:
            yield inside
        finally:
            _end(inside)


def _end(inside: Namespace) -> None:
    inside.run("umount", "--all-targets", "--recursive", "--lazy", "/mnt", timeout_s=_END_S)
    deadline = time.monotonic() + _END_S
    while inside.processes() and time.monotonic() < deadline:
        time.sleep(0.01)
    left = inside.processes()
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not [pid for pid in left if is_running(pid)], "still running after everything was unmounted, and killed"
