"""What the metrics cost: desfs with them and without, in turns.

python -m tests.bench instruments
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

from rich.console import Console

from tests.bench import Figure
from tests.bench.corpus import Corpus
from tests.bench.machine import timed
from tests.bench.systems import Desfs
from tests.bench.workloads import read_by, tar
from tests.bench.world import World, open_world

TURNS = 9
WARM_BAR, RANDOM_BAR = 1.02, 1.05
_FILES = 10_000
_RANDOM = 200
_SEED = 11
_LIMIT_S = 120.0
_WITHOUT = (sys.executable, "-m", "tests.bench.uninstrumented")


def measure_instruments(folder: Path | None = None) -> list[Figure]:
    """A warm scan and random reads, with the metrics and their HTTP server, as ratios to those without."""
    console = Console(stderr=True)
    with open_world(lambda what: console.print(what, markup=False, highlight=False), folder) as world:
        corpus = world.corpus(_FILES)
        store = world.pack_closed_day(corpus, "desfs")
        systems = {
            "with": Desfs(store.url, world.env, store.tree, options=("metrics=127.0.0.1:29101",)),
            "without": Desfs(store.url, world.env, store.tree, program=_WITHOUT),
        }
        scans: dict[str, list[float]] = {name: [] for name in systems}
        reads: dict[str, list[float]] = {name: [] for name in systems}
        for turn in range(TURNS):
            world.say(f"in turns, {turn + 1} of {TURNS}")
            # Whoever comes second finds other caches of the processor: each is the first in every other turn.
            for name in sorted(systems, reverse=bool(turn % 2)):
                seconds = _measure(world, systems[name], corpus, turn)
                scans[name].append(seconds[0])
                reads[name].append(seconds[1])
    ratios = [median(each["with"]) / median(each["without"]) for each in (scans, reads)]
    return [
        Figure("metrics, warm tar: times without", ratios[0], "", WARM_BAR, at_least=False),
        Figure("metrics, 200 random files: times without", ratios[1], "", RANDOM_BAR, at_least=False),
    ]


def _measure(world: World, system: Desfs, corpus: Corpus, turn: int) -> tuple[float, float]:
    """Seconds of a warm scan, and of random reads of a cold mount."""
    names = corpus.pick(_RANDOM, _SEED + turn)
    world.make_cold()
    with system.mount(world.work / "mnt") as mounted:
        random_s = read_by(1, mounted.tree, names, _LIMIT_S)
        timed(tar(mounted.tree), _LIMIT_S)
        scans = [timed(tar(mounted.tree), _LIMIT_S) for _ in range(3)]
    return median(scans), random_s
