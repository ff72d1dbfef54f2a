"""CRC-32C of any buffer. Pure."""

from __future__ import annotations

import google_crc32c
import numpy as np

from des_format.codec import Buffer


def crc32c(data: Buffer, before: int = 0) -> int:
    """The checksum of `data`, going on from `before`, that of what stands in front of it.

    Nothing is copied: the library takes no memoryview, but an array over the same bytes (4 MiB: 0.27 ms, 0.54 with a
    copy).
    """
    if not len(data):
        return before
    return int(google_crc32c.extend(before, np.frombuffer(memoryview(data).toreadonly(), np.uint8)))
