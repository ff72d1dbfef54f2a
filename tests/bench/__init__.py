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
    def holds(self) -> bool:
        if self.bar is None:
            return True
        return self.value >= self.bar if self.at_least else self.value <= self.bar
