"""Memory over time: a mount with small limits is read over and over, and its RSS must not grow.

    python -m tests.bench soak --minutes 30

Each round drops the kernel's caches and reads the whole day in order, then a tenth of it at random: with limits of 64
MiB for memory and 64 MiB for the disk cache, a day of 124 MB passes through all of them every time.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from tests.bench import Figure
from tests.bench.machine import drop_caches, timed
from tests.bench.systems import Desfs
from tests.bench.world import open_world

MEMORY = 64 * 1024 * 1024
FILES = 10_000
_ROUND_S = 120.0
_READERS = 16
_WARM_UP = 0.25  # of the time: until then the caches fill, and the allocator finds its size
_SLOPE = 0.1  # MiB a minute: 6 MiB an hour would show after a day, and is about what 30 minutes can tell apart
_ALLOWANCE = 100 * 1024 * 1024


def measure_soak(minutes: float, folder: Path | None = None) -> list[Figure]:
    """Read for so many minutes; the slope of the RSS after warming up, and its highest value."""
    console = Console(stderr=True)

    def say(what: str) -> None:
        console.print(what, markup=False, highlight=False)

    times: list[float] = []
    sizes: list[float] = []
    with open_world(say, folder) as world:
        corpus = world.corpus(FILES)
        store = world.pack_closed_day(corpus, "soak")
        options = (f"memory={MEMORY}", f"cache_dir={world.work / 'cache'}", f"cache_size={MEMORY}")
        system = Desfs(store.url, world.env, store.tree, "desfs", options)
        with system.mount(world.work / "mnt") as mounted:
            (pid,) = mounted.pids
            began = time.monotonic()
            rounds = 0
            while time.monotonic() - began < minutes * 60:
                drop_caches()
                timed(["bash", "-o", "pipefail", "-c", 'tar cf - "$0" | cat >/dev/null', mounted.tree], _ROUND_S)
                _read(mounted.tree, corpus.pick(len(corpus.names) // 10, rounds))
                rounds += 1
                times.append((time.monotonic() - began) / 60)
                sizes.append(_rss(pid) / 2**20)
                if rounds % 20 == 1:
                    say(f"[{times[-1]:5.1f} min] round {rounds}: RSS {sizes[-1]:.1f} MiB")
            peak = mounted.peak_rss()
    kept = np.array(times) > minutes * _WARM_UP
    slope = float(np.polyfit(np.array(times)[kept], np.array(sizes)[kept], 1)[0]) if kept.sum() > 1 else 0.0
    say(f"{rounds} rounds; RSS {sizes[0]:.0f} MiB after the first, {sizes[-1]:.0f} MiB after the last")
    return [
        Figure("slope of the RSS (MiB a minute)", slope, "MiB", _SLOPE, at_least=False),
        Figure("highest RSS", peak / 2**20, "MiB", (MEMORY + _ALLOWANCE) / 2**20, at_least=False),
        Figure("rounds", rounds, "", None),
    ]


def _read(tree: Path, names: list[str]) -> None:
    subprocess.run(
        [sys.executable, "-m", "tests.bench.readers", tree, str(_READERS)],
        input="\n".join(names),
        stdout=subprocess.DEVNULL,
        text=True,
        timeout=_ROUND_S,
        check=True,
        cwd=Path(__file__).parents[2],
    )


def _rss(pid: int) -> int:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * 4096
