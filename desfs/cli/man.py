"""The man pages, made from what the commands say of themselves: `python -m desfs.cli.man DIR` writes them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from desfs import __version__
from desfs.cli.reference import ENVIRONMENT, ESCAPES, EXIT_CODES, FILES, SIGNALS
from desfs.cli.store_options import STORE_OPTIONS
from desfs.options import FLAGS, OPTION_HELP


def desfs_page() -> str:
    """desfs(1)."""
    import typer.main

    from desfs.cli.commands import app

    group: Any = typer.main.get_command(app)
    lines = [
        f'.TH DESFS 1 "" "desfs {__version__}" "User Commands"',
        ".SH NAME",
        "desfs \\- " + _text("small files packed into containers on S3-style storage, mounted back as directories"),
        ".SH SYNOPSIS",
        *_synopsis(group),
        ".SH DESCRIPTION",
        _text(
            "desfs packs small files into daily containers on S3-style storage and mounts them back as plain read-only "
            "directories. A STORE is s3://bucket/prefix, file:///directory or a directory; a PATH in it begins with "
            "the day: 2026-11-20/report.pdf."
        ),
        ".SH COMMANDS",
    ]
    for name, command in _commands(group):
        if name == "mount":
            lines += _mount_command()
            continue
        lines += [f".SS {_text('desfs ' + name + ' ' + _usage(command))}", *_paragraphs(command.help or "")]
        lines += _described((_names(option), option.help or "") for option in _options(command, of_store=False))
    lines += [".SH STORE OPTIONS", _text("Of every command that reaches a store:")]
    lines += _described((_names(option), option.help or "") for option in _options(group.commands["ls"], of_store=True))
    lines += _tail()
    lines += [".SH SEE ALSO", "mount.desfs(8), mount(8), fusermount3(1), systemd.mount(5)"]
    return "\n".join(lines) + "\n"


def mount_page() -> str:
    """mount.desfs(8)."""
    lines = [
        f'.TH MOUNT.DESFS 8 "" "desfs {__version__}" "System Administration"',
        ".SH NAME",
        "mount.desfs \\- " + _text("mount the containers of a store, read-only"),
        ".SH SYNOPSIS",
        ".B mount \\-t desfs",
        _text("SOURCE DIR [-o OPT,…]"),
        ".br",
        ".B mount \\-t fuse.desfs",
        _text("SOURCE DIR [-o OPT,…]"),
        ".br",
        ".B mount.desfs",
        _text("SOURCE DIR [-fnsv] [-o OPT,…] [-t TYPE]"),
        ".SH DESCRIPTION",
        _text(
            "It returns when the root of the mount answers. The mount is read-only, nosuid and nodev, and the kernel "
            "checks permissions; options of mount(8) that would say otherwise mean nothing."
        ),
        ".SH OPTIONS",
        *_described([("-f", "Check options and mount point, mount nothing."), *_flags_of_mount()]),
        ".SH MOUNT OPTIONS",
        _text(ESCAPES),
        *_mount_options(),
        ".SH FSTAB",
        ".nf",
        _text("s3://my-bucket/archive /mnt/des fuse.desfs ro,_netdev,allow_other,region=eu-central-1 0 0"),
        ".fi",
        *_tail(),
        ".SH SEE ALSO",
        "desfs(1), mount(8), fstab(5), fuse(8)",
    ]
    return "\n".join(lines) + "\n"


def _tail() -> list[str]:
    sections = {"EXIT STATUS": EXIT_CODES, "SIGNALS": SIGNALS, "FILES": FILES, "ENVIRONMENT": ENVIRONMENT}
    return [line for title, table in sections.items() for line in (f".SH {title}", *_described(table.items()))]


def _commands(group: Any) -> Iterator[tuple[str, Any]]:
    """Names and commands, in the order of the names; of a group of commands those in it, as `catalog migrate`."""
    for name, command in sorted(group.commands.items()):
        if hasattr(command, "commands"):
            yield from ((f"{name} {each}", inner) for each, inner in _commands(command))
        else:
            yield name, command


def _synopsis(group: Any) -> Iterator[str]:
    for place, (name, command) in enumerate(_commands(group)):
        if place:
            yield ".br"
        usage = "SOURCE DIR [-o OPT,…] [-f]" if name == "mount" else _usage(command)
        yield f".B desfs {name}"
        yield _text(usage)


def _usage(command: Any) -> str:
    """The arguments, and the options that have to be there."""
    parts = ["[OPTIONS]"]
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            shown = parameter.metavar or parameter.name.upper()
            if parameter.nargs == -1 and not shown.endswith("…"):
                shown += "…"
            parts.append(shown if parameter.required else f"[{shown}]")
        elif parameter.required:
            parts.append(_names(parameter))
    return " ".join(parts)


def _options(command: Any, *, of_store: bool) -> Iterator[Any]:
    for each in command.params:
        if each.param_type_name == "option" and not each.hidden and (each.name in STORE_OPTIONS) == of_store:
            yield each


def _names(option: Any) -> str:
    names = ", ".join(sorted(option.opts, key=len))
    return f"{names} {option.metavar}" if option.metavar else names


def _mount_command() -> list[str]:
    return [
        ".SS " + _text("desfs mount SOURCE DIR [-o OPT,…] [-f]"),
        _text("Mount a store. It returns when the root answers; mount.desfs(8) has the mount options."),
        *_described([("-f", "Stay in the foreground, log to standard error, speak sd_notify(3)."), *_flags_of_mount()]),
    ]


def _flags_of_mount() -> list[tuple[str, str]]:
    return [
        ("-o OPT,…", "Mount options."),
        ("-v", "Say what was mounted."),
        ("-s", "Ignore options that are not known; each is said."),
        ("-n, -t TYPE", "Accepted, since mount(8) hands them to a helper: there is no mtab to write."),
    ]


def _mount_options() -> list[str]:
    return _described((name if name in FLAGS else f"{name}=", text) for name, text in sorted(OPTION_HELP.items()))


def _described(rows: Iterable[tuple[str, str]] | Mapping[str, str]) -> list[str]:
    pairs = rows.items() if isinstance(rows, Mapping) else rows
    return [line for name, text in pairs for line in (".TP", f".B {_text(name)}", _text(text))]


def _paragraphs(text: str) -> Iterator[str]:
    for place, paragraph in enumerate(text.strip().split("\n\n")):
        if place:
            yield ".PP"
        yield _text(" ".join(paragraph.split()))


def _text(text: str) -> str:
    """Plain text for roff(7): no escape and no request in it means anything."""
    plain = text.replace("\\", "\\e").replace("-", "\\-").replace("…", "...").replace("'", "\\(aq")
    return f"\\&{plain}" if plain.startswith(".") else plain


def main() -> int:
    """Write the pages into a directory."""
    parser = argparse.ArgumentParser(prog="desfs.cli.man", description=main.__doc__)
    parser.add_argument("directory", metavar="DIR", type=Path)
    directory: Path = parser.parse_args().directory
    for name, page in (("desfs.1", desfs_page()), ("mount.desfs.8", mount_page())):
        folder = directory / f"man{name[-1]}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
