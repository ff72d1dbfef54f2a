"""How `desfs status` shows what it found: to programs, in a file, on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from desfs.cli.exits import printable
from desfs.cli.status_lines import Line, Report, day_table, days_left_out

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group, RenderResult

Show = Callable[[Report], None]


def show_json(report: Report) -> None:
    """One object on a line of its own."""
    print(json.dumps(report.record, ensure_ascii=False), flush=True)


def show_plain(report: Report) -> None:
    """Lines as long as they have to be, without control codes."""
    width = max(len(line.name) for line in report.lines)
    for line in report.lines:
        print(f"{line.name:{width}}  {printable(line.text)}".rstrip())
    if report.store is not None and report.store.days:
        print()
        columns, rows = day_table(report.store, None)
        widths = [max(map(len, each)) for each in zip(columns, *rows, strict=True)]
        for row in (columns, *rows):
            texts = zip(row, widths, strict=True)
            print(
                "  ".join(f"{text:{'>' if place else '<'}{size}}" for place, (text, size) in enumerate(texts)).rstrip()
            )
        if left := days_left_out(report.store):
            print(f"and {left:,} more; --json has all")
    sys.stdout.flush()


def show_blocks() -> Show:
    """One look after another, an empty line between two."""
    shown = 0

    def show(report: Report) -> None:
        nonlocal shown
        if shown:
            print()
        shown += 1
        show_plain(report)

    return show


def show_on_terminal(report: Report) -> None:
    """As wide as the terminal is; what does not fit on a line goes on below itself."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(as_table(report, console.width))


@contextmanager
def live() -> Iterator[Show]:
    """One look in the place of the one before, on a terminal. What it has no lines for is counted."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop", redirect_stderr=False) as display:
        # The terminal may have another size each time.
        yield lambda report: display.update(Cut(as_table(report, console.width)), refresh=True)


def as_table(report: Report, width: int) -> Group:
    """What is shown on a terminal of so many columns."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    lines = Table(box=None, show_header=False, pad_edge=False)
    lines.add_column(style="bold", no_wrap=True)
    lines.add_column(overflow="fold")
    for line in report.lines:
        # Text: names have brackets, which are no markup.
        lines.add_row(line.name, Text(printable(line.text), style=_style(line)))
    if report.store is None or not report.store.days:
        return Group(lines)
    columns, rows = day_table(report.store, width)
    days = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, name in enumerate(columns):
        # A name of the root may be longer than a line.
        days.add_column(name, justify="right" if place else "left", no_wrap=place > 0, overflow="fold")
    for number, row in enumerate(rows, 1):
        days.add_row(*map(Text, row), style="bold" if number == len(rows) else None)
    left = days_left_out(report.store)
    return Group(lines, Text(""), days, *([Text(f"and {left:,} more; --json has all")] if left else []))


def _style(line: Line) -> str:
    if line.name == "warning":
        return "bold red"
    return "yellow" if line.is_bad else ""


class Cut:
    """As many lines as the terminal has; the last one then says how many there are besides."""

    def __init__(self, shown: Group) -> None:
        self._shown = shown

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.segment import Segment

        lines = console.render_lines(self._shown, options.update(height=None), pad=False)
        # One is left free: behind the last line the terminal would scroll when the program ends.
        room = max(2, console.height - 1)
        if len(lines) > room:
            left = len(lines) - room + 1
            lines = [*lines[: room - 1], [Segment(f"… {left} more; without --watch all are shown")]]
        for place, line in enumerate(lines):
            if place:
                yield Segment.line()
            yield from line
