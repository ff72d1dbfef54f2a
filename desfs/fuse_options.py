"""What libfuse is told of a mount. Pure."""

from __future__ import annotations

from desfs.settings import MountSettings


class _Option(str):
    """An option of libfuse's, which takes any bytes; pyfuse3 3.5.0 wants it in ASCII (internal.pxi, make_fuse_args)."""

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return super().encode("utf-8", "surrogateescape")


def fuse_options(source: str, settings: MountSettings) -> set[str]:
    """The options for libfuse. A mount is always read-only, without devices and set-uid programs, and the kernel checks
    permissions."""
    name = (settings.fsname or source).replace("\\", "\\\\").replace(",", "\\,")
    options = {"ro", "nosuid", "nodev", "default_permissions", _Option(f"fsname={name}"), "subtype=desfs"}
    if settings.allow_other:
        options.add("allow_other")
    if settings.auto_unmount:  # fusermount3 then waits beside the daemon
        options.add("auto_unmount")
    if settings.noexec:
        options.add("noexec")
    return options
