"""Bars by day, and numbers as people read them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date

from assignment.catalog import DaySummary

PLOT_HEIGHT = 112
"""Pixels from the axis to the line at the top."""

_MIN_SLOTS = 7  # so that the bar of a store's first day is no wall
_LABELLED = 7  # so many days have a label each; of more, the first, one in the middle and the last
_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


@dataclass(frozen=True, slots=True)
class Measure:
    """What bars are high by: how an amount is written, in full and along the axis, and where an axis ends."""

    shown: Callable[[int], str]
    on_axis: Callable[[float], str]
    round_up: Callable[[int], int]


@dataclass(frozen=True, slots=True)
class Bar:
    """One day: its place and width in percent of the plot, its height in pixels, its label if it has room for one."""

    day: date
    amount: str
    x: float
    width: float
    height: float
    label: str
    label_x: float
    anchor: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars over an axis from 0 to `top`."""

    title: str
    total: str
    top: str
    middle: str
    bars: Sequence[Bar]


def build_chart(title: str, days: Sequence[DaySummary], amount: Callable[[DaySummary], int], measure: Measure) -> Chart:
    """A bar for each day, in their order."""
    amounts = [amount(each) for each in days]
    top = measure.round_up(max(amounts, default=0))
    slot = 100 / max(len(days), _MIN_SLOTS)
    last = len(days) - 1
    bars = []
    for place, (each, found) in enumerate(zip(days, amounts, strict=True)):
        label_x, anchor = (place + 0.5) * slot, "middle"
        if last >= _LABELLED and place in (0, last):  # these stand in the corners, and leave the middle its room
            label_x, anchor = (0.0, "start") if place == 0 else (100.0, "end")
        is_labelled = last < _LABELLED or place in (0, last // 2, last)
        # What is little is not nothing.
        height = max(found / top * PLOT_HEIGHT, 1.5) if found else 0.0
        label = f"{each.day:%m-%d}" if is_labelled else ""
        bars.append(
            Bar(each.day, measure.shown(found), (place + 0.12) * slot, 0.76 * slot, height, label, label_x, anchor)
        )
    return Chart(title, measure.shown(sum(amounts)), measure.on_axis(top), measure.on_axis(top / 2), bars)


def round_up_count(most: int) -> int:
    """The first of 2, 4, 10, 20, 40, 100 and so on that is not below: its half is a whole number too."""
    unit = 1
    while most > 10 * unit:
        unit *= 10
    return next(step * unit for step in (2, 4, 10) if most <= step * unit)


def round_up_size(most: int) -> int:
    """The first power of 2 that is not below, 2 at least."""
    return max(1 << (most - 1).bit_length(), 2) if most else 2


def format_size(size: float) -> str:
    """Bytes in powers of 1024: `999 B`, `1.5 KiB`, `10.0 GiB`."""
    if size < 1024:
        return f"{size:.0f} B"
    for unit in _UNITS:
        size /= 1024
        if size < 1024 or unit == _UNITS[-1]:
            break
    return f"{size:,.1f} {unit}"


def format_count(count: float) -> str:
    """A whole number with its thousands apart: `12,345`."""
    return f"{count:,.0f}"


def format_short_count(count: float) -> str:
    """A number for an axis: `950`, `12 k`, `1.5 M`."""
    for unit in ("", " k", " M", " G", " T"):
        if count < 1000 or unit == " T":
            break
        count /= 1000
    return f"{count:,.4g}{unit}"


def format_duration(seconds: float) -> str:
    """A time that has passed: `59 s`, `5 min`, `3.5 h`, `12.0 days`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"


def _size_on_axis(size: float) -> str:
    return format_size(size).replace(".0 ", " ")


COUNTS = Measure(format_count, format_short_count, round_up_count)
SIZES = Measure(format_size, _size_on_axis, round_up_size)
