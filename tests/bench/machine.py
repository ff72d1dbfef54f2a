"""The machine under a benchmark: its caches, its processes' memory, commands with deadlines, its description."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil

WARMED_PROGRAMS = ("bash", "tar", "cat", "cp", "ls")


class TooSlow(Exception):
    """A command did not end within its time."""


def clean_environ() -> dict[str, str]:
    """This process's variables without the user's own AWS settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}


def drop_caches() -> None:
    """Forget every page, dentry and inode that the kernel can: what was dirty is written first. Needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    for program in WARMED_PROGRAMS:
        subprocess.run([program, "--version"], check=True, stdout=subprocess.DEVNULL, timeout=60)


def read_all(folder: Path) -> None:
    """Have every file below a folder in the page cache. A file that goes meanwhile is none."""
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and not path.is_symlink():
                with path.open("rb", buffering=0) as file:
                    buffer = bytearray(4 * 1024 * 1024)
                    while file.readinto(buffer):
                        pass


def timed(command: Sequence[str | Path], deadline_s: float, env: Mapping[str, str] | None = None) -> float:
    """Seconds that a command takes; its output is thrown away. Raises: TooSlow, after it was killed; RuntimeError when
    it fails."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=env,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=deadline_s)
    except BaseException as error:
        # A process that waits for FUSE dies when its mount goes: nobody waits for it here.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if isinstance(error, subprocess.TimeoutExpired):
            raise TooSlow(f"{command}: more than {deadline_s:.0f} s") from error
        raise
    seconds = time.perf_counter() - began
    if process.returncode != 0:
        raise RuntimeError(f"{command} ended with {process.returncode}: {errors[-2000:].decode(errors='replace')}")
    return seconds


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    try:
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def peak_rss(pids: Iterable[int]) -> int:
    """The highest resident memory of each process so far, in bytes, added up."""
    total = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
            total += int(found[1]) * 1024 if found else 0
    return total


def fstype_of(path: Path) -> str:
    """The kind of file system that a path is on."""
    command = ["findmnt", "-n", "-o", "FSTYPE", "-T", str(path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    return printed.split()[-1]  # of several mounts at one place the last is on top


def describe_machine() -> str:
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    system = re.search(r'^PRETTY_NAME="(.+)"$', Path("/etc/os-release").read_text(), re.MULTILINE)
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{os.cpu_count()} cores ({cpu[1] if cpu else platform.machine()}), {memory:.0f} GiB, "
        f"{system[1] if system else platform.system()}, Linux {platform.release()}, Python {platform.python_version()}"
    )


def program_version(program: str, *arguments: str) -> str:
    """The number that a program gives for its version."""
    path = shutil.which(program)
    if path is None:
        return "?"
    done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"\d+(?:\.\d+)+", done.stdout + done.stderr)
    return found[0] if found else "?"
