"""docs/operations.md: sizes are shown in the units of the settings, powers of 1024."""

from __future__ import annotations

from desfs.amounts import format_size


def test_sizes_are_short() -> None:
    sizes = {0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 10 << 30: "10.0 GiB", 1 << 70: "1,024.0 EiB"}
    assert {size: format_size(size) for size in sizes} == sizes
