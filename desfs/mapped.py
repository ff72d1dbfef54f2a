"""Files as read-only memory, without a descriptor for each. Linux.

Python's `mmap` keeps a descriptor of its own until the map is closed, and a mount may have thousands of indexes open.

Who reads a mapped page that its file does not have any more, or that the disk cannot give, dies of SIGBUS: map only
files that nobody cuts or writes to. They may be renamed and unlinked.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

import numpy as np
import numpy.typing as npt

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_FAILED = ctypes.c_void_p(-1).value


def map_file(descriptor: int, size: int) -> npt.NDArray[np.uint8]:
    """The first `size` bytes (> 0) of a file, read-only; unmapped when no array has a part of it any more. The
    descriptor may be closed. Raises: OSError."""
    address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED | mmap.MAP_POPULATE, descriptor, 0)
    if address == _FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    memory = (ctypes.c_ubyte * size).from_address(address)
    # Not at the end of the process: its threads may be at it still.
    weakref.finalize(memory, _LIBC.munmap, address, size).atexit = False
    mapped: npt.NDArray[np.uint8] = np.frombuffer(memoryview(memory), np.uint8)
    mapped.flags.writeable = False  # a write would be SIGSEGV
    return mapped


def release_pages(mapped: npt.NDArray[np.uint8]) -> None:
    """Take the pages of a whole map out of this process until they are used again; they stay in the kernel's cache."""
    _LIBC.madvise(mapped.ctypes.data, len(mapped), mmap.MADV_DONTNEED)
