"""Levers on the kernel that pyfuse3 does not have: `desfs._levers`, and the read-ahead of the mount. All optional: a
mount is right without them, and slower.

The extension exports `fuse_session_new`, so it has to be loaded, for all to see, before pyfuse3 binds that name. With
it the kernel opens files and directories by itself, keeps their pages and listings, and asks for nothing twice. One
process has one mount: what is here is the state of the process. Any thread.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, Literal

# The kernel's default of 12 is less than one reader's read-ahead in pieces; this is 16 readers with 2 MiB each in
# pieces of 128 KiB. Who mounts without being root gets what the kernel's max_user_bgreq allows.
_MAX_BACKGROUND = 256
# As much as the kernel puts into one request (libfuse: 256 pages). Its default of 128 makes eight round trips of them.
_READ_AHEAD_KB = 1024
_BDI = "/sys/class/bdi"


class Levers:
    """The extension, if it is loaded, and what came of it."""

    def __init__(self) -> None:
        self._extension: Any = None
        self._why_not: str | None = "not asked for"
        self._read_ahead_kb: int | None = None

    def load(self, wanted: Literal["auto", "off"]) -> None:
        """Load the extension, if that is wanted and possible. Before pyfuse3 is imported: later is too late."""
        if wanted == "off":
            self._why_not = "switched off"
        elif "pyfuse3" in sys.modules:
            self._why_not = "pyfuse3 was loaded before it"
        else:
            flags = sys.getdlopenflags()
            sys.setdlopenflags(flags | os.RTLD_GLOBAL)
            try:
                from desfs import _levers
            except ImportError as error:
                self._why_not = f"not installed: {error}"
            else:
                _levers.enable(_MAX_BACKGROUND)
                self._extension, self._why_not = _levers, None
            finally:
                sys.setdlopenflags(flags)

    @property
    def extension(self) -> Any:
        """The extension where pyfuse3's calls go through it, None elsewhere; known when a session has been made."""
        return self._extension if self._extension is not None and self._extension.state()["bound"] else None

    def raise_read_ahead(self, device: str) -> None:
        """Let the kernel read ahead as much as fits into one request; where that is not permitted (sysfs belongs to
        root) it stays as it is. `device` is the mount's, as in mountinfo. To be called when the mount has answered: at
        its start the kernel takes the limit down again."""
        path = f"{_BDI}/{device}/read_ahead_kb"
        with contextlib.suppress(OSError):
            with open(path, encoding="ascii") as file:
                self._read_ahead_kb = int(file.read())
            if self._extension is not None and self._read_ahead_kb < _READ_AHEAD_KB:
                with open(path, "w", encoding="ascii") as file:
                    file.write(str(_READ_AHEAD_KB))
                self._read_ahead_kb = _READ_AHEAD_KB

    def report(self) -> dict[str, object]:
        """What is in force, as JSON has it; known when the mount has answered its first request. `why_not` is None when
        all is."""
        state = None if self._extension is None else self._extension.state()
        why_not = self._why_not
        if state is not None and not state["bound"]:
            why_not = "pyfuse3 calls libfuse directly"
        elif state is not None and not (state["no_open"] and state["no_opendir"]):
            why_not = "the kernel does not open files by itself"
        return {
            "loaded": state is not None,
            "in_force": why_not is None,
            "why_not": why_not,
            "max_background": state and state["max_background"],
            "max_write": state and state["max_write"],
            "read_ahead_kb": self._read_ahead_kb,
        }


LEVERS = Levers()
