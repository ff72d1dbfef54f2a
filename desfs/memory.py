"""What the C library keeps of freed memory. A no-op where it is not glibc.

Each thread that opens containers takes an arena of its own, and what is free in one is of no use to the others. For a
day of a million files in 256 containers the daemon had 280 MB at its peak and kept 193; with two arenas, sixteen
containers at a time, and what is free given back: 207 and 169 (measured).
"""

from __future__ import annotations

import ctypes

_M_ARENA_MAX = -8  # malloc.h
_ARENAS = 2
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_BUFFER = 64 * 1024
_LARGE_BUFFER = 1024 * 1024
_KEPT_FREE = 1024 * 1024

_libc = ctypes.CDLL(None)


def limit_arenas() -> None:
    """Few arenas, and large buffers returned to the system. Before the first thread is started."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_ARENA_MAX, _ARENAS)
        # By itself glibc keeps freed buffers of up to 32 MiB once it has seen such: a scan of 1.2 GB with pieces of up
        # to 8 MiB then had 343 to 459 MB, with this 310 each time, and took 5 % longer (measured).
        _libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BUFFER)


def keep_small() -> None:
    """Have each buffer that is larger than a few pages returned to the system when it is freed. With a small limit for
    payloads, the space between those that glibc keeps would be as much again (seen: 60 MiB with a limit of 64); now
    each costs its page faults, a quarter of a millisecond a MiB. Before the first thread is started."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_MMAP_THRESHOLD, _BUFFER)
        _libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE)


def give_back() -> None:
    """Return what is free to the system; takes some milliseconds. Any thread."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(ctypes.c_size_t(0))
