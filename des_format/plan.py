"""Which ranges to GET. Pure."""

from __future__ import annotations

from collections.abc import Iterable

Range = tuple[int, int]  # half-open, absolute, bytes

DEFAULT_MAX_GAP = 1024 * 1024  # DES v1, Batched reads
DEFAULT_MAX_REQUEST = 64 * 1024 * 1024  # one answer is held in memory as a whole


def plan_gets(
    wanted: Iterable[Range], *, max_gap: int = DEFAULT_MAX_GAP, max_request: int = DEFAULT_MAX_REQUEST
) -> list[Range]:
    """Ranges to GET so that all `wanted` bytes arrive, none twice.

    Half-open, bytes, ascending, each at most `max_request` long; two wanted ranges with at most `max_gap` bytes between
    them share a GET. Empty ranges are ignored: HTTP cannot ask for them.
    """
    if max_gap < 0 or max_request < 1:
        raise ValueError(f"max_gap is {max_gap}, want 0 or more; max_request is {max_request}, want 1 or more")
    merged: list[list[int]] = []
    for start, stop in sorted(r for r in wanted if r[0] < r[1]):
        if merged and start <= merged[-1][1] + max_gap:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    return [(at, min(at + max_request, stop)) for start, stop in merged for at in range(start, stop, max_request)]
