"""Benchmarks: what the project promises in figures, measured on this machine. Never run by pytest.

A benchmark is a function that returns its `Figure`s and is listed in `__main__`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value. `bar` is what it has to reach, or must not exceed without `at_least`; None: no promise."""

    what: str
    value: float
    unit: str
    bar: float | None = None
    at_least: bool = True

    @property
    def bar_text(self) -> str:
        return "" if self.bar is None else f"{'≥' if self.at_least else '≤'} {number(self.bar)}"

    @property
    def verdict(self) -> str:
        return "" if self.bar is None else "ok" if self.holds else "MISSED"

    @property
    def holds(self) -> bool:
        if self.bar is None:
            return True
        return self.value >= self.bar if self.at_least else self.value <= self.bar


def number(value: float) -> str:
    """A value with the digits that matter."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"
