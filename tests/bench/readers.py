"""Readers that open, read and close files, as `python -m tests.bench.readers ROOT PROCESSES`, with the files' names as
lines on the input. Prints the seconds from their common start to the end of the last."""

from __future__ import annotations

import os
import sys
import time

_CHUNK = 1024 * 1024


def _read(root: int, names: list[str]) -> None:
    for name in names:
        descriptor = os.open(name, os.O_RDONLY, dir_fd=root)
        while os.read(descriptor, _CHUNK):
            pass
        os.close(descriptor)


def main(folder: str, processes: int, names: list[str]) -> int:
    """Deal the names to so many processes, and let them go at once; 1 if one of them failed."""
    start_reader, start_writer = os.pipe()
    # Opened before the clock runs, which asks the mount no more than its root.
    root = os.open(os.path.dirname(folder), os.O_RDONLY)
    base = os.path.basename(folder)
    pids = []
    for number in range(processes):
        pid = os.fork()
        if pid == 0:
            os.close(start_writer)
            os.read(start_reader, 1)  # the end of the pipe: all are there
            status = 1
            try:
                _read(root, [f"{base}/{name}" for name in names[number::processes]])
                status = 0
            finally:
                os._exit(status)
        pids.append(pid)
    os.close(start_reader)
    began = time.perf_counter()
    os.close(start_writer)
    failed = [status for status in (os.waitpid(pid, 0)[1] for pid in pids) if status]
    print(time.perf_counter() - began)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1].rstrip("/"), int(sys.argv[2]), sys.stdin.read().splitlines()))
