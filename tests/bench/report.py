"""What a benchmark of mounts found: rows, and how they are shown as a table, as Markdown and as a plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from statistics import median

from rich import box
from rich.table import Table

HEADINGS = (
    "workload",
    "system",
    "time",
    "of floor",
    "of best peer",
    "S3 requests",
    "bytes",
    "peak RSS",
    "runs",
    "FUSE",
)

# Of the kernel's requests, those that cost a reader something.
COUNTED = ("lookup", "getattr", "open", "opendir", "readdir", "read", "getxattr")


@dataclass(slots=True)
class Row:
    """One system under one workload. `capped`: it was stopped after that many seconds."""

    workload: str
    system: str
    seconds: list[float]
    capped: bool = False
    requests: int | None = None
    received: int | None = None
    rss: int | None = None
    container_gets: int = 0
    fuse: dict[str, int] = field(default_factory=dict)
    is_peer: bool = False
    one_object: bool = False

    @property
    def median(self) -> float:
        return median(self.seconds)


@dataclass(slots=True)
class Results:
    """All rows, and the floor of each workload that has one."""

    rows: list[Row] = field(default_factory=list)
    floors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def of(self, workload: str, system: str) -> Row | None:
        return next((row for row in self.rows if (row.workload, row.system) == (workload, system)), None)

    def best_peer(self, workload: str, *, one_object: bool | None = None) -> Row | None:
        """The fastest other program; `one_object` asks for those that keep an object for each file, or that do not."""
        peers = [
            row
            for row in self.rows
            if row.workload == workload and row.is_peer and one_object in (None, row.one_object)
        ]
        return min(peers, key=lambda row: row.median, default=None)

    def workloads(self) -> list[str]:
        return list(dict.fromkeys(row.workload for row in self.rows))

    def lines(self) -> list[tuple[str, ...]]:
        """The table, without its headings."""
        lines = []
        for workload in self.workloads():
            floor, peer = self.floors.get(workload), self.best_peer(workload)
            if floor is not None:
                lines.append((workload, "floor", _seconds(floor), *[""] * 7))
            for row in self.rows:
                if row.workload != workload:
                    continue
                lines.append(_line(row, floor, peer))
        return lines

    def table(self) -> Table:
        table = Table(box=box.SIMPLE, title="Mounts of the same files")
        for place, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if 2 <= place <= 8 else "left", overflow="fold")
        before = ""
        for line in self.lines():
            if before not in ("", line[0]):
                table.add_section()
            table.add_row("" if line[0] == before else line[0], *line[1:])
            before = line[0]
        return table

    def markdown(self) -> str:
        align = ["---", "---", *["---:"] * 7, "---"]
        rows = [HEADINGS, tuple(align), *self.lines()]
        return "".join(markdown_line(row) for row in rows)


def markdown_line(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |\n"


def _line(row: Row, floor: float | None, peer: Row | None) -> tuple[str, ...]:
    return (
        row.workload,
        row.system,
        f"{'> ' if row.capped else ''}{_seconds(row.median)}",
        _ratio(row.median, floor),
        "" if peer is None or peer is row else _ratio(row.median, peer.median),
        "" if row.requests is None else f"{row.requests:,}",
        "" if row.received is None else _size(row.received),
        "" if not row.rss else _size(row.rss),
        str(len(row.seconds)),
        " ".join(f"{name}:{row.fuse[name]}" for name in COUNTED if row.fuse.get(name)),
    )


def _seconds(value: float) -> str:
    if value < 0.1:
        return f"{value * 1000:.1f} ms"
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s" if value < 100 else f"{value:,.0f} s"


def _ratio(value: float, base: float | None) -> str:
    if not base:
        return ""
    ratio = value / base
    return f"{ratio:.3f}" if ratio < 0.1 else f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"


def _size(value: float) -> str:
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= power:
            return f"{value / power:.3g} {unit}" if value / power < 1000 else f"{value / power:,.0f} {unit}"
    return f"{value:.0f} B"


# --- the plot ----------------------------------------------------------------------------------------------------

_COLOURS = ("#9a9a9a", "#1b6ca8", "#7fb3d5", "#0b3954", "#c0392b", "#e67e22", "#f1c40f", "#8e44ad", "#16a085")
_BAR, _GAP, _LEFT, _WIDTH, _TOP = 11, 14, 210, 620, 70


def plot(results: Results, workloads: Sequence[str]) -> str:
    """Bars of the seconds on a logarithmic axis, one group a workload, as SVG."""
    groups = [(name, [row for row in results.rows if row.workload == name]) for name in workloads]
    groups = [(name, rows) for name, rows in groups if rows]
    systems = list(dict.fromkeys(row.system for _, rows in groups for row in rows))
    colour = {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(systems)}
    values = [max(row.median, 1e-4) for _, rows in groups for row in rows] or [1.0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def x_of(value: float) -> float:
        return _LEFT + _WIDTH * (math.log10(max(value, 10.0**low)) - low) / (high - low)

    parts: list[str] = []
    y = float(_TOP)
    for name, rows in groups:
        top = y
        for row in rows:
            label = f"{'> ' if row.capped else ''}{_seconds(row.median)}"
            parts.append(
                f'<rect x="{_LEFT}" y="{y:.0f}" width="{max(x_of(row.median) - _LEFT, 1):.1f}" height="{_BAR - 2}" '
                f'fill="{colour[row.system]}"/>'
                f'<text x="{x_of(row.median) + 4:.1f}" y="{y + 8:.0f}" font-size="9">{escape(label)}</text>'
            )
            y += _BAR
        parts.append(
            f'<text x="{_LEFT - 8}" y="{(top + y) / 2 + 3:.0f}" text-anchor="end" font-size="11">{escape(name)}</text>'
        )
        floor = results.floors.get(name)
        if floor is not None:
            x = x_of(floor)
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 3:.0f}" y2="{y + 1:.0f}" stroke="#000"/>')
        y += _GAP
    axis = "".join(_axis_line(10.0**power, x_of(10.0**power), y) for power in range(low, high + 1))
    legend = _legend((name, colour[name]) for name in systems)
    height = y + 30
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 80}" height="{height:.0f}" '
        'font-family="sans-serif"><rect width="100%" height="100%" fill="#fff"/>'
        f"{legend}{axis}{''.join(parts)}</svg>\n"
    )


def _axis_line(value: float, x: float, bottom: float) -> str:
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{bottom:.0f}" stroke="#ddd"/>'
        f'<text x="{x:.1f}" y="{bottom + 14:.0f}" text-anchor="middle" font-size="10">{value:g} s</text>'
    )


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    parts = []
    x, y = 10, 14
    for name, colour in entries:
        width = 24 + 7 * len(name)
        if x + width > _LEFT + _WIDTH:
            x, y = 10, y + 16
        parts.append(
            f'<rect x="{x}" y="{y - 8}" width="10" height="10" fill="{colour}"/>'
            f'<text x="{x + 14}" y="{y + 1}" font-size="11">{escape(name)}</text>'
        )
        x += width
    parts.append(f'<text x="10" y="{y + 20}" font-size="10">seconds, logarithmic; black line: the floor</text>')
    return "".join(parts)
