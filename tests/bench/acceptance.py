"""The promises about the mount, as figures with bars, from the rows that were measured."""

from __future__ import annotations

import math

from desfs.settings import MountSettings
from tests.bench import Figure
from tests.bench import workloads as names
from tests.bench.corpus import Corpus
from tests.bench.report import Results, Row
from tests.bench.world import DELAY_S, Store

DESFS = "desfs"
LOCAL = "local disk"
SLACK = 100_000_000  # bytes of RSS besides what the limits count
_ANSWERED_BY_THE_KERNEL = ("read", "open", "opendir", "readdir")


def verdicts(results: Results, corpus: Corpus, store: Store) -> list[Figure]:
    """One figure a promise, for those whose workloads were measured."""
    return [
        *_scans(results),
        *_requests(results, corpus, store),
        *_random(results),
        *_large(results),
        *_memory(results),
    ]


def _row(results: Results, workload: str, system: str = DESFS) -> Row | None:
    return results.of(workload, system)


def _against_floor(results: Results, workload: str, bar: float | None) -> list[Figure]:
    row, floor = _row(results, workload), results.floors.get(workload)
    if row is None or floor is None:
        return []
    return [Figure(f"{workload}: times the floor", row.median / floor, "", bar, at_least=False)]


def _scans(results: Results) -> list[Figure]:
    figures = []
    for cold, warm in ((names.TAR_COLD, names.TAR_WARM), (names.CP_COLD, names.CP_WARM)):
        figures += _against_floor(results, cold, 1.5)
        row = _row(results, cold)
        for kept, bar, what in ((True, 200, "one object per file"), (False, 5, "an archive")):
            peer = results.best_peer(cold, one_object=kept)
            if row is not None and peer is not None:
                label = f"{cold}: times faster than {peer.system}, the best with {what}"
                figures.append(Figure(label, peer.median / row.median, "", bar))
        row = _row(results, warm)
        local = results.of(warm, LOCAL)
        if row is not None and local is not None:
            label = f"{warm}: times the local disk"
            figures.append(Figure(label, row.median / local.median, "", 1.25, at_least=False))
            asked = sum(row.fuse.get(name, 0) for name in _ANSWERED_BY_THE_KERNEL)
            figures.append(Figure(f"{warm}: READ, OPEN and READDIR", asked, "", 0, at_least=False))
    return figures


def _requests(results: Results, corpus: Corpus, store: Store) -> list[Figure]:
    figures = []
    row = _row(results, names.CP_FOLDER)
    if row is not None:
        figures.append(Figure(f"{names.CP_FOLDER}: GETs", row.container_gets, "", 4, at_least=False))
    row = _row(results, names.TAR_COLD)
    if row is not None and row.requests is not None and row.received is not None:
        most = 3 * store.packed.containers + math.ceil(corpus.size / (8 * 1024 * 1024))
        figures.append(Figure(f"{names.TAR_COLD}: requests", row.requests, "", most, at_least=False))
        share = row.received / corpus.size
        figures.append(Figure(f"{names.TAR_COLD}: bytes fetched, of the day's", share, "", 1.1, at_least=False))
    row = _row(results, names.LS_COLD)
    if row is not None:
        bar = 3 * DELAY_S + 0.2
        figures.append(Figure(names.LS_COLD, row.median, "s", bar, at_least=False))
    row, tar = _row(results, names.PACKING), results.of(names.PACKING, "tar to a local file")
    if row is not None and tar is not None:
        figures.append(Figure("packing: speed, of tar's", tar.median / row.median, "", 0.5))
        figures.append(Figure("packing: files for a PUT", len(corpus.names) / store.packed.puts, "", 100))
    return figures


def _random(results: Results) -> list[Figure]:
    figures = []
    for workload in (names.RANDOM_1, names.RANDOM_16):
        row, peer = _row(results, workload), results.best_peer(workload)
        if row is not None and peer is not None:
            label = f"{workload}: times faster than {peer.system}, the best peer"
            figures.append(Figure(label, peer.median / row.median, "", 1.0))
    return [*figures, *_against_floor(results, names.CAT_ONE, 1.3)]


def _large(results: Results) -> list[Figure]:
    figures = _against_floor(results, names.EXTERNAL, 1.5)
    row = _row(results, names.EXTERNAL)
    if row is not None and row.rss is not None:
        figures.append(Figure(f"{names.EXTERNAL}: peak RSS", row.rss / 1e6, "MB", 300, at_least=False))
    figures += _against_floor(results, names.TAR_LARGE, None)
    for workload, bar in ((names.MILLION_LS_F, 10), (names.MILLION_LS_L, 20)):
        row = _row(results, workload)
        if row is not None:
            figures.append(Figure(workload, row.median, "s", bar, at_least=False))
            if row.rss is not None:
                label = f"{workload}: peak RSS"
                figures.append(Figure(label, row.rss / 1e6, "MB", 150 + SLACK / 1e6, at_least=False))
    row = _row(results, names.MILLION_AGAIN, "desfs cache_dir")
    if row is not None:
        label = f"{names.MILLION_AGAIN}: GETs of containers"
        figures.append(Figure(label, row.container_gets, "", 0, at_least=False))
    return figures


def _memory(results: Results) -> list[Figure]:
    highest = max((row.rss for row in results.rows if row.system.startswith(DESFS) and row.rss), default=None)
    if highest is None:
        return []
    limit = MountSettings.model_fields["memory"].default + SLACK
    return [Figure("highest RSS of any desfs mount", highest / 1e6, "MB", limit / 1e6, at_least=False)]
