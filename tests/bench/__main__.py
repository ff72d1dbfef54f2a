"""`python -m tests.bench [name…]`: run the benchmarks, print their figures beside the bars; exit 1 if one is missed."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table

from tests.bench import Figure
from tests.bench.index import measure_index

BENCHMARKS: dict[str, Callable[[], list[Figure]]] = {
    "index": measure_index,
}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    table = Table("benchmark", "figure", box=box.SIMPLE)
    for heading in ("measured", "bar"):
        table.add_column(heading, justify="right")
    table.add_column("")
    missed = False
    for name in names or BENCHMARKS:
        for figure in BENCHMARKS[name]():
            bar = "" if figure.bar is None else f"{'≥' if figure.at_least else '≤'} {figure.bar:,.0f}"
            verdict = "" if figure.bar is None else "ok" if figure.holds else "MISSED"
            table.add_row(name, figure.what, f"{figure.value:,.0f} {figure.unit}", bar, verdict)
            missed |= not figure.holds
    Console(width=110).print(table)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
