"""What a mount needs of the machine: the kernel's device, libfuse and its helper, the permission to mount, memory."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from desfs.amounts import format_size
from desfs.doctor.finding import Finding, State, error, ok, skipped, warning
from desfs.errors import DesfsError
from desfs.fuse_options import fuse_options
from desfs.mountpoint import FUSE_CONF, mounted_at, unmount, user_allow_other
from desfs.settings import MountSettings, unknown_variables

_DEVICE = "/dev/fuse"
_DEVICE_NUMBERS = (10, 229)  # Linux, Documentation/admin-guide/devices.txt
_HELPER = "fusermount3"
_CAP_SYS_ADMIN = 1 << 21  # linux/capability.h
# What a daemon takes before it holds anything: Python, numpy, boto3, obstore. Measured: 95 MiB.
_BASE_MEMORY = 96 * 1024 * 1024
# The disk cache has up to 256 descriptors open, connections to the store and Redis about 100.
_OPEN_FILES = 512
# Since Linux 5.1 the kernel opens directories by itself (FUSE_NO_OPENDIR_SUPPORT), files since 3.16.
_KERNEL = (5, 1)
# It waits for nothing, but starts Python and loads pyfuse3: half a second of a CPU that may be busy with other things.
_TRIAL_S = 12.0
_SHOWN_PACKAGES = ("pyfuse3", "trio", "boto3", "obstore", "numpy")
_IN_CONTAINER = ("/.dockerenv", "/run/.containerenv")

_INSTALL_FUSE = "apt-get install fuse3 (Debian, Ubuntu), dnf install fuse3 (Fedora)"
_CONTAINER_MAY_MOUNT = (
    "give the container the right: docker run --device /dev/fuse --cap-add SYS_ADMIN "
    "--security-opt apparmor=unconfined …"
)
_WITHOUT_LEVERS = "mounts work, but the kernel asks for every open: a warm walk takes some ten times as long"


def check_machine(settings: MountSettings | None) -> Iterator[Finding]:
    """All of it, which takes no longer than a trial may. Without settings the defaults hold."""
    is_root = os.geteuid() == 0
    yield check_system(platform.release())
    yield check_packages()
    device = check_device(_DEVICE)
    yield device
    yield check_helper(shutil.which(_HELPER), is_root=is_root)
    yield from check_trial(device, settings)
    yield check_allow_other(settings is not None and settings.allow_other, is_root=is_root)
    if settings is not None:
        yield check_memory(settings.memory)
    yield check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    unknown = unknown_variables()
    yield from (warning("variables", each, "correct its name, or unset it") for each in unknown)
    if not unknown:
        yield ok("variables", "none that begins with DESFS_ is unknown")


def check_system(release: str) -> Finding:
    """The versions of Python and of the kernel, whose `release` is as uname(1) has it."""
    numbers = tuple(int(each) for each in re.findall(r"\d+", release)[:2])
    found = f"Python {platform.python_version()}, Linux {release} ({platform.machine()})"
    if numbers < _KERNEL:
        wanted = ".".join(map(str, _KERNEL))
        return warning(
            "system", f"{found}: a kernel before {wanted} lists directories anew each time", f"Linux {wanted} or newer"
        )
    return ok("system", found)


def check_packages() -> Finding:
    """Whether all packages are installed that this one needs."""
    try:
        required = importlib.metadata.requires("desfs") or []
        version = importlib.metadata.version("desfs")
    except importlib.metadata.PackageNotFoundError:
        return warning("packages", "desfs runs from its source and is not installed", "pip install .")
    names = [match[0] for each in required if "extra ==" not in each and (match := re.match(r"[\w.-]+", each))]
    missing = [name for name in names if not _version(name)]
    if missing:
        return error("packages", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    shown = ", ".join(f"{name} {_version(name)}" for name in _SHOWN_PACKAGES)
    return ok("packages", f"desfs {version} with {shown}")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def check_device(path: str) -> Finding:
    """Whether this user can open the kernel's device, as libfuse does before anything else, root or not."""
    in_container = any(map(os.path.exists, _IN_CONTAINER))
    try:
        status = os.stat(path)
    except OSError as failure:
        remedy = "modprobe fuse; in a container: docker run --device /dev/fuse …"
        if failure.errno == errno.ENOENT:
            return error("fuse device", f"there is no {path}", remedy)
        return error("fuse device", f"{path}: {failure.strerror}", remedy)
    if not stat.S_ISCHR(status.st_mode) or (os.major(status.st_rdev), os.minor(status.st_rdev)) != _DEVICE_NUMBERS:
        numbers = ":".join(map(str, _DEVICE_NUMBERS))
        return error(
            "fuse device",
            f"{path} is not the character device {numbers}",
            f"rm {path}; mknod -m 666 {path} c 10 229; in a container: docker run --device /dev/fuse …",
        )
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as failure:
        match failure.errno:
            case errno.EACCES:
                return error(
                    "fuse device",
                    f"{path} may not be opened by uid {os.geteuid()}: "
                    f"it belongs to uid {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}",
                    f"as root: chmod 666 {path} (Debian's udev does that by itself)",
                )
            case errno.EPERM:
                return error("fuse device", f"this container may not use {path}", _CONTAINER_MAY_MOUNT)
            case errno.ENODEV | errno.ENXIO:
                return error("fuse device", f"{path} is there, but the kernel has no FUSE", "as root: modprobe fuse")
        return error("fuse device", f"{path}: {failure.strerror}", "as root: modprobe fuse")
    return ok("fuse device", f"{path} can be opened{', in a container' if in_container else ''}")


def check_helper(path: str | None, *, is_root: bool) -> Finding:
    """Whether fusermount3 is there and has root's rights: users mount and everybody unmounts with it."""
    if path is None:
        if is_root:
            return warning(_HELPER, "not installed: root mounts without, `desfs umount` needs it", _INSTALL_FUSE)
        return error(_HELPER, "not installed: only root mounts without it", _INSTALL_FUSE)
    status = os.stat(path)
    by_root = status.st_mode & stat.S_ISUID and status.st_uid == 0
    if is_root:
        return ok(_HELPER, path + (", set-uid root" if by_root else ", not set-uid: of use to root alone"))
    if not by_root:
        return error(
            _HELPER, f"{path} is not set-uid root: it cannot mount", f"as root: chown root {path} && chmod 4755 {path}"
        )
    if os.statvfs(path).f_flag & os.ST_NOSUID:
        return error(_HELPER, f"{path} is on a file system that is mounted nosuid", "remount that without nosuid")
    if _process_status("NoNewPrivs") == "1":
        return error(
            _HELPER,
            "this process may gain no rights (no_new_privs), which fusermount3 has to",
            "start it without that: NoNewPrivileges=no (systemd), allowPrivilegeEscalation: true (Kubernetes)",
        )
    return ok(_HELPER, f"{path}, set-uid root")


def check_trial(device: Finding, settings: MountSettings | None) -> Iterator[Finding]:
    """Mount for a moment what nobody sees, or in a new directory: libfuse, the levers, and whether it works at all."""
    levers = "auto" if settings is None else settings.levers
    changes = {"fsname": "desfs-doctor", "auto_unmount": False}  # it unmounts itself
    options = {"ro"} if settings is None else fuse_options("", settings.model_copy(update=changes))
    directory = tempfile.mkdtemp(prefix="desfs-doctor-")
    try:
        known, said = _try(directory, levers, options, _TRIAL_S)
    finally:
        with contextlib.suppress(DesfsError):
            if mounted_at(directory) is not None:
                unmount(directory, lazy=True, limit_s=1.0)
        with contextlib.suppress(OSError):
            os.rmdir(directory)
    if "pyfuse3" not in known:
        reason = known.get("import_error") or said or "no answer in time"
        remedy = "apt-get install libfuse3-3; pip install --force-reinstall pyfuse3"
        yield error("libfuse", f"pyfuse3 cannot be loaded: {reason}", remedy)
        yield skipped("levers", "pyfuse3 cannot be loaded")
        yield skipped("trial mount", "pyfuse3 cannot be loaded")
        return
    yield ok("libfuse", f"{known['libfuse'] or 'a version that cannot be told'}, through pyfuse3 {known['pyfuse3']}")
    yield judge_levers(known, levers)
    if device.state is State.ERROR:
        yield skipped("trial mount", "no mount without the FUSE device")
    else:
        yield judge_trial(known, said)


def _try(directory: str, levers: str, options: set[str], limit_s: float) -> tuple[dict[str, Any], str]:
    """What `desfs.doctor.trial` said on stdout, taken together, and on stderr, in one line."""
    # -P: no file in the current directory is taken for a module.
    command = [sys.executable, "-P", "-m", "desfs.doctor.trial", directory, levers, *sorted(options)]
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        try:
            subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, timeout=limit_s, check=False
            )
        except subprocess.TimeoutExpired:
            late = f"no answer within {limit_s:.2g} s"
        else:
            late = ""
        stdout.seek(0)
        stderr.seek(0)
        known: dict[str, Any] = {}
        for line in stdout:
            known |= json.loads(line)
        lines = [line.strip() for line in stderr if line.strip()]
    return known, late or "; ".join(lines[-3:])  # of a traceback, the end


def judge_levers(known: dict[str, Any], wanted: str) -> Finding:
    """Whether `desfs._levers` is in the way from pyfuse3 to libfuse, where it belongs."""
    if wanted == "off":
        return ok("levers", "switched off by the setting levers=off: the kernel asks for every open")
    if not known["loaded"]:
        return warning(
            "levers",
            f"{known['why_not']}: {_WITHOUT_LEVERS}",
            "apt-get install gcc pkg-config python3-dev libfuse3-dev; then install desfs again",
        )
    if not known.get("bound"):
        return warning(
            "levers",
            f"pyfuse3 calls libfuse directly: {_WITHOUT_LEVERS}",
            "unset LD_PRELOAD; a pyfuse3 from PyPI's source: pip install --force-reinstall --no-binary pyfuse3 pyfuse3",
        )
    return ok("levers", "loaded and bound: the kernel opens files and keeps listings by itself")


def judge_trial(known: dict[str, Any], said: str) -> Finding:
    """Whether it could be mounted, and if not, why, as far as libfuse says."""
    if known.get("mounted"):
        return ok("trial mount", "mounted and unmounted" + ("" if known["private"] else f" by {_HELPER}"))
    reason = said or str(known.get("error", "no answer in time"))
    if "user_allow_other" in reason:
        remedy = f"as root: echo user_allow_other >> {FUSE_CONF}; or mount without allow_other"
    elif "too many FUSE" in reason:
        remedy = f"as root: raise mount_max in {FUSE_CONF}"
    elif not int(_process_status("CapBnd") or "0", 16) & _CAP_SYS_ADMIN or "not permitted" in reason:
        remedy = _CONTAINER_MAY_MOUNT
    else:
        remedy = "correct what is said above about the device, fusermount3 and fuse.conf"
    return error("trial mount", reason, remedy)


def check_allow_other(wanted: bool, *, is_root: bool) -> Finding:
    """Whether users may let others use their mounts."""
    if is_root:
        return ok("fuse.conf", "root may use allow_other without a line in it")
    if user_allow_other():
        return ok("fuse.conf", "user_allow_other: users may let others use their mounts")
    remedy = f"as root: echo user_allow_other >> {FUSE_CONF}"
    if wanted:
        return error(
            "fuse.conf", f"{FUSE_CONF} has no line user_allow_other, and the setting allow_other is on", remedy
        )
    return warning(
        "fuse.conf",
        f"{FUSE_CONF} has no line user_allow_other: a mount of this user is for this user alone, not even for root",
        remedy,
    )


def check_memory(setting: int) -> Finding:
    """Whether there is as much memory as a mount may take."""
    available, why = _memory()
    wanted = setting + _BASE_MEMORY
    found = f"{format_size(available)} {why}; a mount takes up to {format_size(wanted)}"
    if wanted <= available:
        return ok("memory", found)
    fitting = max(32, (available - _BASE_MEMORY) // (2 << 20))
    return warning("memory", found, f"-o memory={fitting}M, or DESFS_MEMORY={fitting}M")


def _memory() -> tuple[int, str]:
    """Bytes that a process may take, and what says so."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    available, why = (int(found[1]) * 1024, "available") if found else (sys.maxsize, "unknown")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            limit = _number(f"/sys/fs/cgroup{path}/memory.max")
        elif "memory" in controllers.split(","):
            limit = _number(f"/sys/fs/cgroup/memory{path}/memory.limit_in_bytes")
        else:
            continue
        if limit is not None and limit < available:
            available, why = limit, "allowed by the control group"
    return available, why


def _number(path: str) -> int | None:
    """The number in a file of a control group; None for `max` and where there is none."""
    try:
        text = Path(path).read_text()
    except OSError:  # the other version, or not shown in this container
        return None
    return int(text) if text.strip().isdecimal() else None


def check_open_files(limit: int) -> Finding:
    """Whether the soft limit on open files, which the daemon does not raise, is enough."""
    shown = "no limit" if limit == resource.RLIM_INFINITY else f"{limit} at a time"
    if limit != resource.RLIM_INFINITY and limit < _OPEN_FILES:
        return warning(
            "open files",
            f"{shown}; a mount with a disk cache wants {_OPEN_FILES}",
            f"ulimit -n {_OPEN_FILES}; LimitNOFILE={_OPEN_FILES} in a unit of systemd",
        )
    return ok("open files", shown)


def _process_status(name: str) -> str:
    """A field of /proc/self/status, "" where the kernel does not have it."""
    found = re.search(rf"^{name}:\s*(\S+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return found[1] if found else ""
