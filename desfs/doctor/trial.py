"""A mount on trial, as `desfs mount` would make it, that nobody serves and that is gone a moment later.

Run as a program: `python -P -m desfs.doctor.trial DIRECTORY auto|off OPTION…`. It prints a JSON object a line, each
with what is known by then; what libfuse says goes to stderr.
"""

from __future__ import annotations

import ctypes
import json
import sys

_CLONE_NEWNS = 0x20000  # sched.h
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000  # sys/mount.h
_LIBFUSE = "libfuse3.so"


def main(directory: str, levers: str, options: list[str]) -> None:
    """Load what a mount loads, make the session, mount, unmount."""
    from desfs.levers import LEVERS

    LEVERS.load("off" if levers == "off" else "auto")
    report = LEVERS.report()
    try:
        import pyfuse3
    except ImportError as error:
        _say(import_error=str(error))
        return
    _say(pyfuse3=pyfuse3.__version__, libfuse=_libfuse_version(), loaded=report["loaded"], why_not=report["why_not"])
    is_private = _leave_mounts()
    try:
        pyfuse3.init(pyfuse3.Operations(), directory, set(options))
    except RuntimeError as error:
        _say(bound=LEVERS.extension is not None, mounted=False, error=str(error))
        return
    _say(bound=LEVERS.extension is not None, mounted=True, private=is_private)
    pyfuse3.close(unmount=True)
    _say(unmounted=True)


def _leave_mounts() -> bool:
    """Have mounts of one's own, that nobody else sees and that end with this process; False where that is not
    permitted: ordinary users mount in sight, by fusermount3."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        return False
    return bool(libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None) == 0)


def _libfuse_version() -> str | None:
    """The version of the libfuse that pyfuse3 has brought along; None if it cannot be told."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
        paths = {line.split(maxsplit=5)[5].strip() for line in lines if _LIBFUSE in line}
    for path in paths:
        try:
            version = ctypes.CDLL(path).fuse_pkgversion
        except (OSError, AttributeError):
            continue
        version.restype = ctypes.c_char_p
        return str((version() or b"").decode())
    return None


def _say(**known: object) -> None:
    print(json.dumps(known), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
