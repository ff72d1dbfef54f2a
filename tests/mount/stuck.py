"""A mount that dies as a daemon may: killed while the kernel takes a page from it that a READ has locked.

    python -m tests.mount.stuck DIR

Whoever reads DIR/file never gets an answer; the program kills itself when that has begun.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
from pathlib import Path

import pyfuse3
import trio

FILE = pyfuse3.InodeT(2)
PAGE = 4096


class Stuck(pyfuse3.Operations):
    """A root with one file of one page."""

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | 0o444 if inode == FILE else stat.S_IFDIR | 0o555)
        entry.st_size = PAGE if inode == FILE else 0
        return entry

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return await self.getattr(FILE, ctx)

    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode))

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        pusher = threading.Thread(target=pyfuse3.notify_store, args=(FILE, 0, bytes(PAGE)), daemon=True)
        pusher.start()
        threading.Thread(target=kill_when_it_waits, args=(pusher,), daemon=True).start()
        await trio.sleep_forever()


def kill_when_it_waits(thread: threading.Thread) -> None:
    """End this process as soon as the kernel keeps the thread."""
    state = Path(f"/proc/self/task/{thread.native_id}/stat")
    while state.read_text().rpartition(")")[2].split()[0] != "D":
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


async def main() -> None:
    """Mount, and serve until the end."""
    pyfuse3.init(Stuck(), sys.argv[1], {"fsname=stuck", "subtype=desfs", "ro"})
    await pyfuse3.main()


if __name__ == "__main__":
    trio.run(main)
