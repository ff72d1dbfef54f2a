"""The options of `-o`, as mount(8) gives them. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from desfs.errors import UsageError

# Words of mount(8), fstab and systemd that say nothing to us: how a line is handled, or what is so in any case. rw is
# what mount(8) sends when nothing was said.
_NO_MEANING = frozenset(
    {
        "defaults",
        "ro",
        "rw",
        "dev",
        "nodev",
        "suid",
        "nosuid",
        "exec",
        "async",
        "sync",
        "atime",
        "noatime",
        "diratime",
        "nodiratime",
        "relatime",
        "norelatime",
        "strictatime",
        "lazytime",
        "nolazytime",
        "auto",
        "noauto",
        "user",
        "nouser",
        "users",
        "group",
        "owner",
        "_netdev",
        "nofail",
        "default_permissions",
        "nonempty",
    }
)
# Who mounts, as mount(8) writes it for `user` mounts; SELinux labels and the type, which libfuse is not asked for.
_NO_MEANING_WITH_VALUE = frozenset(
    ("context", "fscontext", "defcontext", "rootcontext", "subtype", "user", "helper", "uhelper", "comment")
)
FLAGS = frozenset(("allow_other", "auto_unmount", "noexec", "no_sign_request", "strict"))


# What `desfs mount --help` says of each setting of a mount.
OPTION_HELP = {
    "endpoint_url": "S3 endpoint; a custom one is addressed by path",
    "region": "S3 region",
    "profile": "AWS profile",
    "addressing_style": "path, virtual or auto",
    "no_sign_request": "do not sign requests: public buckets",
    "ca_bundle": "file of certificates to trust",
    "deadline": "seconds of tries for a request to the store (60)",
    "allow_other": "let other users use the mount",
    "auto_unmount": "when the daemon dies, show the empty directory below instead of an error",
    "noexec": "no programs from the mount",
    "uid": "owner shown (who mounts)",
    "gid": "group shown (who mounts)",
    "umask": "permission bits taken away, octal (0)",
    "memory": "bytes of file contents kept, like 512M (256M)",
    "max_gap": "bytes nobody wants that a GET may bring to save another (1M)",
    "max_prefetch": "bytes fetched ahead of a reader (64M)",
    "cache_dir": "directory for a cache on disk, of file contents and indexes (none)",
    "cache_size": "bytes that it may take (10G)",
    "redis": "redis:// URL of a cache of indexes for several hosts; with a password, set DESFS_REDIS instead (none)",
    "refresh": "seconds between listings of the open days (10)",
    "strict": "a day with a damaged container answers EIO",
    "metrics": "HOST:PORT to answer /metrics at, for Prometheus (none)",
    "fsname": "source shown by findmnt (SOURCE)",
    "levers": "auto, or off: the kernel asks for every open (auto)",
    "config": "TOML file of settings; options and DESFS_* variables win (none)",
    "log_level": "debug, info, warning or error (info)",
    "log_format": "text or json (text)",
    "log_file": "file to log to (stderr with -f, else syslog)",
}


def split_options(text: str) -> list[str]:
    """The options of a comma-separated list; a backslash takes the next character as it is."""
    options, current, escaped = [], "", False
    for character in text:
        if escaped:
            current, escaped = current + character, False
        elif character == "\\":
            escaped = True
        elif character == ",":
            options.append(current)
            current = ""
        else:
            current += character
    if escaped:
        raise UsageError(f"option list {text!r} ends in a backslash")
    return [option for option in [*options, current] if option]


def parse_options(lists: list[str], known: frozenset[str], *, sloppy: bool = False) -> tuple[dict[str, str], list[str]]:
    """The settings out of several `-o` lists, the last of a name winning; `known` are the settings' names. Also the
    options that are not known, which `sloppy` lets pass (mount(8), -s).

    Raises: UsageError for an unknown option (with the nearest known one), a flag with a value, a setting without one.
    """
    settings: dict[str, str] = {}
    unknown: list[str] = []
    for option in (option for text in lists for option in split_options(text)):
        name, equals, value = option.partition("=")
        if name.lower().startswith("x-") or (not equals and name in _NO_MEANING) or name in _NO_MEANING_WITH_VALUE:
            continue
        if name not in known and sloppy:
            unknown.append(name)
        elif name not in known:
            raise UsageError(f"unknown mount option {name!r}{did_you_mean(name, known | _NO_MEANING)}")
        elif name in FLAGS:
            if equals and value not in ("true", "false", "0", "1"):
                raise UsageError(f"mount option {name}: found {value!r}, want nothing, true or false")
            settings[name] = value or "true"
        elif not equals:
            raise UsageError(f"mount option {name} needs a value: {name}=…")
        else:
            settings[name] = value
    return settings, unknown


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """What to add to the message that a name is not known: the nearest one, behind a prefix, or nothing."""
    nearest = difflib.get_close_matches(name, sorted(known), 1)
    return f"; did you mean {prefix}{nearest[0]}?" if nearest else ""
