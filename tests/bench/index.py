"""How fast the index of a large container opens, and how much memory it costs.

Each measurement is made in a fresh process, which `python -m tests.bench.index CONTAINER` is: it opens the container
once, drops the bytes it was read from, and prints what that cost.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from des_format.codec import build_footer, build_header, build_record, encode_meta
from des_format.layout import HEADER, Footer
from des_format.source import FileSource, open_container
from tests.bench import Figure

ENTRIES = 1_000_000
PAYLOAD = 1000  # bytes each, as a hole in the file
RUNS = 3


def measure_index() -> list[Figure]:
    """A container of a million entries with assigned names and the usual metadata."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f.des"
        _write(path)
        runs = [_measure(path) for _ in range(RUNS)]
    seconds, resident, held, peak = (median(run[key] for run in runs) for key in ("seconds", "index", "held", "peak"))
    return [
        Figure("entries opened a second", ENTRIES / seconds, "/s", 500_000),
        Figure("RSS of the index, an entry", resident / ENTRIES, "bytes", 150, at_least=False),
        Figure("RSS of index and META, an entry", held / ENTRIES, "bytes"),
        Figure("highest RSS while opening", peak / 2**20, "MiB"),
    ]


def _write(path: Path) -> None:
    meta = encode_meta({"mime": "text/plain"}, PAYLOAD)
    meta_start = HEADER.size + ENTRIES * PAYLOAD
    index_length = 0
    with path.open("wb") as file:
        file.write(build_header())
        file.seek(meta_start)
        file.write(meta * ENTRIES)
        for number in range(ENTRIES):
            name = b"DES_20251125_(%012X_%02X).txt" % (number << 8, number % 256)
            offset = HEADER.size + number * PAYLOAD
            index_length += file.write(
                build_record(name, offset, PAYLOAD, meta_start + number * len(meta), len(meta), 0)
            )
        meta_length = ENTRIES * len(meta)
        file.write(
            build_footer(
                Footer(
                    HEADER.size,
                    ENTRIES * PAYLOAD,
                    meta_start,
                    meta_length,
                    meta_start + meta_length,
                    index_length,
                    ENTRIES,
                )
            )
        )


def _measure(path: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.index", path],
        check=True,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _resident() -> int:
    gc.collect()
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGESIZE")


def main(path: str) -> None:
    before = _resident()
    started = time.perf_counter()
    source = FileSource(path)
    opened = open_container(source)
    seconds = time.perf_counter() - started
    held = _resident() - before
    index = opened.index
    assert len(index) == ENTRIES
    del opened
    figures = {
        "seconds": seconds,
        "held": held,
        "index": _resident() - before,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1])
