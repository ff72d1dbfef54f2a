"""Numbers as people read them. Pure."""

from __future__ import annotations

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def format_size(size: int) -> str:
    """Bytes in the units that settings are written in, powers of 1024: `999 B`, `1.5 KiB`, `10.0 GiB`."""
    if size < 1024:
        return f"{size} B"
    amount = float(size)
    for unit in _UNITS:
        amount /= 1024
        if amount < 1024 or unit == _UNITS[-1]:
            break
    return f"{amount:,.1f} {unit}"


def counted(count: int, one: str, many: str = "") -> str:
    """`1 file`, `10,000 files`, `2 entries`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
