"""`make demo`: real files of this machine through the spool into containers, mounted, listed, copied and compared.

Everything runs on embedded defaults, in a temporary folder: a directory is the object store, SQLite the catalog.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOTS = tuple(map(Path, ("/usr/share", "/usr/include", "/usr/lib")))
WANTED_FILES = 4_000
FEWEST_FILES = 3_000
MAX_FILE = 1024 * 1024  # bytes: small files are what it is about
DESFS = Path(sys.executable).with_name("desfs")


def main() -> int:
    """Run the demonstration; 0 if every file came back as it was."""
    work = Path(tempfile.mkdtemp(prefix="desfs-demo-"))
    mountpoint = work / "mnt"
    try:
        return _demonstrate(work, mountpoint)
    finally:
        if os.path.ismount(mountpoint):
            subprocess.run([DESFS, "umount", mountpoint], check=False)
        shutil.rmtree(work)


def _demonstrate(work: Path, mountpoint: Path) -> int:
    source, spool, store, copy = (work / name for name in ("source", "spool", "store", "copy"))
    for folder in (source, spool, mountpoint):
        folder.mkdir()
    files, size = _gather(source)
    if files < FEWEST_FILES:
        print(f"This machine has only {files} small files in {', '.join(map(str, ROOTS))}; want {FEWEST_FILES}.")
        return 1
    print(f"{files} real files of this machine, {size / 1e6:.0f} MB, go into the spool with cp:")
    _run("cp", "-rp", f"{source}/.", str(spool))
    print("\nA packer puts them into containers (here in a directory; s3://bucket/prefix works the same):")
    packed = _run(str(DESFS), "packer", "--spool", str(spool), "--store", str(store), "--once")
    containers = sorted(store.glob("*/*.des"))
    left = [path for path in spool.iterdir() if path.name != ".desfs"]
    print("\nThe containers, mounted:")
    _run(str(DESFS), "mount", str(store), str(mountpoint))
    day = mountpoint / containers[0].parent.name
    _run("ls", str(mountpoint))
    _run("ls", str(day))
    print("\nEvery file is there as it was:")
    _run("cp", "-rp", str(day), str(copy))
    _run("diff", "-r", str(source), str(day))
    _run("diff", "-r", str(source), str(copy))
    different = _different_attributes(source, copy)
    stats = json.loads((mountpoint / ".desfs" / "stats").read_text())["metrics"]
    _run(str(DESFS), "umount", str(mountpoint))
    gets = _requests(stats, "get")
    puts = re.search(r"with (\d+) PUTs", packed)
    print(
        f"\n{files} files came back with the same bytes, times and modes: {len(containers)} containers,\n"
        f"{puts[1] if puts else '?'} PUTs to write them, {gets} GETs and {_requests(stats, 'list')} LISTs to list, "
        f"copy and compare them.\nOne object per file would have taken {files} PUTs and {files} GETs."
    )
    for path in different:
        print(f"time or mode differs: {path}")
    for path in left:
        print(f"left in the spool: {path}")
    return 1 if different or left else 0


def _gather(target: Path) -> tuple[int, int]:
    """Copy small regular files into `target`, with their times and modes; how many, and their bytes."""
    count = size = 0
    for root, path, status in _small_files():
        below = target if root == ROOTS[0] else target / root.name
        copied = below / path.relative_to(root)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copied)
        count, size = count + 1, size + status.st_size
        if count == WANTED_FILES:
            break
    return count, size


def _small_files() -> Iterator[tuple[Path, Path, os.stat_result]]:
    for root in ROOTS:
        for folder, folders, names in os.walk(root):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                status = path.lstat()
                if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_FILE and os.access(path, os.R_OK):
                    yield root, path, status


def _run(*command: str) -> str:
    """Run and show a command; what it printed."""
    shown = " ".join(Path(word).name if word == str(DESFS) else word for word in command)
    began = time.monotonic()
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    print(f"$ {shown}   ({time.monotonic() - began:.1f} s)")
    lines = done.stdout.splitlines()
    print("".join(f"  {line}\n" for line in lines[:10]), end="")
    if len(lines) > 10:
        print(f"  … {len(lines) - 10} more lines")
    if done.returncode != 0:
        raise SystemExit(f"{shown} ended with {done.returncode}")
    return done.stdout


def _different_attributes(source: Path, copy: Path) -> list[Path]:
    different = []
    for folder, _, names in os.walk(source):
        for name in names:
            path = Path(folder, name)
            was, now = path.lstat(), (copy / path.relative_to(source)).lstat()
            if (was.st_mtime_ns, was.st_mode) != (now.st_mtime_ns, now.st_mode):
                different.append(path)
    return different


def _requests(stats: dict[str, float], operation: str) -> int:
    prefix = f"desfs_store_requests_total.{operation}."
    return int(sum(value for name, value in stats.items() if name.startswith(prefix)))


if __name__ == "__main__":
    sys.exit(main())
