"""Times as people read them. Pure."""

from __future__ import annotations


def format_duration(seconds: float) -> str:
    """`1.5 s`, `40 s`, `5 min`, `3.2 h`, `2.5 days`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
