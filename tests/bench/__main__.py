"""`python -m tests.bench [name…]`: run the benchmarks, print their figures beside the bars; exit 1 if one is missed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from tests.bench import Figure, number
from tests.bench.index import measure_index
from tests.bench.instruments import measure_instruments
from tests.bench.large import LARGE_FILES
from tests.bench.mount import CAP_S, FILES, Options, measure_mount
from tests.bench.soak import measure_soak
from tests.bench.store_client import measure_store_client
from tests.bench.visible import measure_visible


def _words(text: str) -> frozenset[str]:
    return frozenset(word.strip() for word in text.split(",") if word.strip())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help="which benchmarks; all without one")
    mount = parser.add_argument_group("the mount benchmark")
    mount.add_argument("--quick", action="store_true", help="desfs, floor and local disk alone, and nothing large")
    mount.add_argument("--runs", type=int, default=3, help="repetitions, of which the median counts [3]")
    mount.add_argument("--cap", type=float, default=CAP_S, help="seconds after which a command is stopped [300]")
    mount.add_argument("--files", type=int, default=FILES, help="files of the corpus [10000]")
    mount.add_argument("--large-files", type=int, default=LARGE_FILES, help="files of the larger one [100000]")
    mount.add_argument("--sessions", type=_words, default=frozenset(), help="only these, with commas between them")
    mount.add_argument("--systems", type=_words, default=frozenset(), help="only these, with commas between them")
    mount.add_argument("--output", type=Path, help="a directory for table.md, plot.svg and results.json")
    parser.add_argument(
        "--minutes",
        type=float,
        default=30.0,
        help="how long `soak` reads; it runs only when named [30]; `visible` writes for five at most",
    )
    mount.add_argument("--folder", type=Path, help="where to work: a directory on a disk [/var/tmp]")
    return parser


def main(arguments: list[str]) -> int:
    parsed = _parser().parse_args(arguments)
    options = Options(
        quick=parsed.quick,
        runs=parsed.runs,
        cap_s=parsed.cap,
        files=parsed.files,
        large_files=parsed.large_files,
        sessions=parsed.sessions,
        systems=parsed.systems,
        output=parsed.output,
        folder=parsed.folder,
    )
    benchmarks: dict[str, Callable[[], list[Figure]]] = {
        "index": measure_index,
        "store_client": measure_store_client,
        "mount": lambda: measure_mount(options),
        "instruments": lambda: measure_instruments(parsed.folder),
        "visible": lambda: measure_visible(min(parsed.minutes, 5.0), parsed.folder),
        "soak": lambda: measure_soak(parsed.minutes, parsed.folder),
    }
    unknown = [name for name in parsed.names if name not in benchmarks]
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are: {', '.join(benchmarks)}", file=sys.stderr)
        return 2
    table = Table("benchmark", "figure", box=box.SIMPLE)
    for heading in ("measured", "bar"):
        table.add_column(heading, justify="right")
    table.add_column("")
    missed = False
    try:
        for name in parsed.names or (each for each in benchmarks if each != "soak"):
            for figure in benchmarks[name]():
                measured = f"{number(figure.value)} {figure.unit}"
                table.add_row(name, figure.what, measured, figure.bar_text, figure.verdict)
                missed |= not figure.holds
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    Console(width=130).print(table)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
