"""The mount against the floor, the local disk and the other programs: the same files, the same S3 server 20 ms away.

    python -m tests.bench mount --quick                      desfs, floor and local disk: some five minutes
    python -m tests.bench mount --quick --sessions tar,cp    of ready ls cat tar cp random all pack external large
                                                             million
    python -m tests.bench mount --systems desfs,s3fs         of desfs, desfs levers=off, desfs cache_dir, the peers
    python -m tests.bench mount --output DIR                 everything; DIR gets table.md, plot.svg and results.json

Needs root, and a machine that does nothing else. Every figure is a median; what is cold has a fresh mount, and the
kernel's caches dropped before it, but for the server's data and the programs, which everybody finds warm. The floor of
a cold scan is the raw download of the same containers with parallel ranges, plus the local disk's warm time for the
same command, plus four round trips.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console

from tests import servers
from tests.bench import Figure, number, peers
from tests.bench import workloads as names
from tests.bench.acceptance import verdicts
from tests.bench.corpus import Corpus, fill_spool, pack
from tests.bench.large import EXTERNAL_NAME, LARGE_FILES, External, Large, make_external, measure_million
from tests.bench.machine import describe_machine, fstype_of, timed
from tests.bench.report import Results, Row, markdown_line, plot
from tests.bench.systems import Desfs, LocalDisk, has_option
from tests.bench.workloads import Bench
from tests.bench.world import DELAY_S, NotMeasurable, Store, World, open_world

FILES = 10_000
ROUND_TRIPS = 4
CAP_S = 300.0
OPEN_DAY = "desfs open day"
SMALL_SESSIONS = ("ready", "ls", "cat", "tar", "cp", "random", "all")
LARGE_SESSIONS = ("external", "large", "million")
PLOTTED = (
    *(names.LS_COLD, names.TAR_COLD, names.CP_COLD, names.TAR_WARM, names.CP_WARM),
    *(names.RANDOM_1, names.RANDOM_16, names.ALL_32, names.EXTERNAL, names.TAR_LARGE),
)


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure. Empty `sessions` and `systems` mean all."""

    quick: bool = False
    runs: int = 3
    cap_s: float = CAP_S
    files: int = FILES
    large_files: int = LARGE_FILES
    sessions: frozenset[str] = frozenset()
    systems: frozenset[str] = frozenset()
    output: Path | None = None
    folder: Path | None = None

    def wants_session(self, name: str) -> bool:
        return name in self.sessions if self.sessions else not self.quick or name not in LARGE_SESSIONS

    def wants_system(self, name: str) -> bool:
        return name in self.systems if self.systems else not self.quick or name.startswith("desfs")


def measure_mount(options: Options) -> list[Figure]:
    """Measure, print the table, write the output; the figures that the project promises."""
    results = Results()
    began = time.monotonic()
    console = Console(stderr=True)

    def say(what: str) -> None:
        console.print(f"[{time.monotonic() - began:6.0f} s] {what}", markup=False, highlight=False, soft_wrap=True)

    figures: list[Figure] = []
    try:
        with open_world(say, options.folder) as world:
            figures = _measure(world, options, results)
    except NotMeasurable as error:
        print(f"not measured: {error}", file=sys.stderr)
        return [Figure("mount benchmark ran", 0, "", 1)]
    finally:
        results.rows.sort(key=lambda row: names.ORDER.index(row.workload))
        if results.rows:
            Console(width=None if sys.stdout.isatty() else 160).print(results.table())
            for note in results.notes:
                print(f"* {note}")
    if options.output is not None:
        _write(options.output, results, figures)
    return figures


def _measure(world: World, options: Options, results: Results) -> list[Figure]:
    results.notes.append(describe_machine())
    results.notes.append(f"local disk: {fstype_of(world.work)}; copies go to {fstype_of(world.copies)}")
    rate = world.check_proxy(strict=not options.quick)
    results.notes.append(f"the proxy lets {rate:,.0f} MB/s through; desfs {_revision()}")
    bench = Bench(world, results, options.runs, options.cap_s, options.wants_session)
    corpus = world.corpus(options.files)
    store = world.pack_closed_day(corpus, "desfs")
    results.notes.append(
        f"{len(corpus.names):,} files, {corpus.size / 1e6:.0f} MB, in {store.packed.containers} containers"
    )
    local = LocalDisk(corpus.root)
    bench.measure_local(local, corpus)
    _measure_floor(world, options, results, store, local.name)
    for system in _variants(world, store):
        if options.wants_system(system.name):
            bench.measure(system, corpus)
    today = store.open_day
    if today is not None and options.wants_system(OPEN_DAY) and not options.quick:
        system = Desfs(today.url, world.env, today.tree, OPEN_DAY)
        bench.measure(system, corpus, only=frozenset(("ls", "tar")))
    if options.wants_session("pack"):
        _measure_packing(world, options, results, corpus)
    external, large = _measure_large(bench, options)
    small = any(map(options.wants_session, SMALL_SESSIONS))
    _measure_peers(bench, options, corpus if small else None, external, large)
    return verdicts(results, corpus, store)


def _measure_large(bench: Bench, options: Options) -> tuple[External | None, Large | None]:
    """What is larger than the corpus, by desfs; the peers read the same."""
    world = bench.world
    external = large = None
    if options.wants_session("external"):
        with bench.guard("1 GiB"):
            external = External(bench, make_external(world))
            external.measure_local()
            if options.wants_system("desfs"):
                external.measure_desfs()
    if options.wants_session("large"):
        with bench.guard("100,000 files"):
            large = Large(bench, world.corpus(options.large_files))
            if options.wants_system("desfs"):
                large.measure_desfs()
    if options.wants_session("million") and options.wants_system("desfs"):
        with bench.guard("1,000,000 files"):
            measure_million(bench, cached=has_option("cache_dir"))
    return external, large


def _measure_peers(
    bench: Bench, options: Options, corpus: Corpus | None, external: External | None, large: Large | None
) -> None:
    """The other programs. None for a corpus that is not to be read."""
    wanted = [name for name in peers.NAMES if options.wants_system(name)]
    if not wanted:
        return
    world = bench.world
    bench.note(peers.versions())
    for name in [name for name in wanted if not peers.is_installed(name)]:
        bench.note(f"{name} is not installed: make bench installs it")
        wanted.remove(name)
    bucket = world.server.new_bucket("peers")
    if "ratarmount" in wanted:
        with bench.guard("ratarmount"):
            _measure_ratarmount(bench, bucket, corpus, large)
    if "JuiceFS" in wanted:
        with bench.guard("JuiceFS"), servers.redis_server(world.work) as redis:
            volume = peers.JuiceFS(world, world.server.new_bucket("juicefs"), redis)
            if corpus is not None:
                volume.load(corpus.root, "tree")
                bench.measure(volume, corpus, is_peer=True)
            if external is not None:
                volume.load(external.corpus.root, "external")
                volume.tree = "external"
                external.measure(volume)
    if "rclone" in wanted or "s3fs" in wanted:
        with bench.guard("objects for rclone and s3fs"):
            if corpus is not None:
                world.say("putting an object for each file")
                peers.load_objects(world, corpus, bucket)
            if external is not None:
                peers.put_file(world, bucket, f"external/{EXTERNAL_NAME}", external.corpus.root / EXTERNAL_NAME)
    if "rclone" in wanted:
        if corpus is not None:
            bench.measure(peers.Rclone(world, bucket), corpus, is_peer=True)
        if external is not None:
            external.measure(peers.Rclone(world, bucket, "external", peers.RCLONE_STREAMING))
    if "s3fs" in wanted:
        if corpus is not None:
            bench.measure(peers.S3fs(world, bucket), corpus, is_peer=True)
        if external is not None:
            external.measure(peers.S3fs(world, bucket, "external"))


def _measure_ratarmount(bench: Bench, bucket: str, corpus: Corpus | None, large: Large | None) -> None:
    if corpus is not None:
        archive = peers.Ratarmount(bench.world, bucket, "corpus.tar", "tree")
        archive.load(corpus)
        bench.measure(archive, corpus, is_peer=True)
    if large is not None:
        archive = peers.Ratarmount(bench.world, bucket, "large.tar", "tree")
        archive.load(large.corpus)
        large.measure(archive)


def _variants(world: World, store: Store) -> list[Desfs]:
    """desfs as it comes, without its C extension, and with a disk cache that an earlier mount has filled."""
    found = [Desfs(store.url, world.env, store.tree)]
    if has_option("levers"):
        found.append(Desfs(store.url, world.env, store.tree, "desfs levers=off", ("levers=off",)))
    if has_option("cache_dir"):
        cache = world.work / "cache"
        found.append(Desfs(store.url, world.env, store.tree, "desfs cache_dir", (f"cache_dir={cache}",), cache))
    return found


def _measure_floor(world: World, options: Options, results: Results, store: Store, local: str) -> None:
    world.say("raw download")
    objects = world.raw.signed(world.server, store.bucket, f"{store.prefix}{store.tree}/")
    world.raw.download(objects, 8 * 1024 * 1024)
    raw = world.raw.fastest(objects, 2 * options.runs + 1)
    trip = world.raw.round_trip(objects[0], 8192)
    results.floors[names.CAT_ONE] = trip
    for cold, warm in ((names.TAR_COLD, names.TAR_WARM), (names.CP_COLD, names.CP_WARM)):
        row = results.of(warm, local)
        assert row is not None
        results.floors[cold] = raw + row.median + ROUND_TRIPS * DELAY_S
        results.floors[warm] = row.median
    results.notes.append(f"raw download of the containers {raw:.3f} s; a small GET {trip * 1000:.1f} ms")


def _measure_packing(world: World, options: Options, results: Results, corpus: Corpus) -> None:
    spool = world.work / "spool"
    spool.mkdir()
    packed, tarred = [], []
    for run in range(options.runs):
        world.say(f"packing, {run + 1} of {options.runs}")
        bucket = world.server.new_bucket("packing")
        fill_spool(corpus, spool)
        world.proxy.take()
        packed.append(pack(spool, world.server, f"s3://{bucket}/store", world.proxy.url).seconds)
        traffic = world.proxy.take()
        world.server.delete_bucket(bucket)
        archive = world.work / "archive.tar"
        tarred.append(timed(["tar", "cf", archive, "-C", corpus.root.parent, corpus.root.name], options.cap_s))
        archive.unlink()
    results.rows.append(Row(names.PACKING, "desfs", packed, requests=len(traffic.requests)))
    results.rows.append(Row(names.PACKING, "tar to a local file", tarred))
    results.floors[names.PACKING] = median(tarred)


def _revision() -> str:
    root = Path(__file__).parents[2]
    command: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run
    done = command(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False, timeout=60
    )
    return done.stdout.strip() or "of no repository"


def _write(folder: Path, results: Results, figures: list[Figure]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    notes = "".join(f"- {' '.join(note.split())}\n" for note in results.notes)
    promises = "| promise | measured | bar | |\n|---|---:|---:|---|\n" + "".join(
        markdown_line((each.what, f"{number(each.value)} {each.unit}", each.bar_text, each.verdict)) for each in figures
    )
    (folder / "table.md").write_text(
        f"# The mount benchmark\n\n{notes}\n![Seconds of each system](plot.svg)\n\n## Promises\n\n{promises}\n"
        f"## All rows\n\n{results.markdown()}"
    )
    (folder / "plot.svg").write_text(plot(results, PLOTTED))
    found = {
        "rows": [asdict(row) for row in results.rows],
        "floors": results.floors,
        "notes": results.notes,
        "figures": [asdict(figure) | {"holds": figure.holds} for figure in figures],
    }
    (folder / "results.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
