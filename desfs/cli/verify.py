"""`desfs verify`.

A line for each finding on standard output, and a last one that sums up:

    2026-11-20/3f.des: entry 'photos/1.jpg': payload at byte 16: found a crc32c of 0badf00d, want 8a9136aa
    2026-11-20/a0.des: warning: …             readers cope with it, or do not look at it
    2026-11-20/a1.des: not verified: …        it could not be read; nothing is known of it
    verified 16 containers, 10,000 files, 118.2 MiB: 1 damaged entry in 1 container

With `--json` an object a line, with these keys; more may come, these stay:

    kind       "damage", "warning" or "unverified"
    container  the object's key; "" for the store as a whole
    entry      the name of the entry that it is about, or null; bytes of it that are no UTF-8 as \\xNN
    offset     the byte of the container, or of the external object that the problem names, or null
    problem    what is wrong: what was found, and what should be there

and a last one, `{"kind": "summary", …}`, with `containers`, `files` and `bytes` that were read, `damaged_containers`
(those that are none, or whose header is damaged), `damaged_entries`, `containers_with_damaged_entries`,
`damaged_layout` (true or false: `.desfs.json`), `without_checksum` (entries), `warnings` and `unverified`.

Of one container 10,000 findings of damage are shown at most, and 100 warnings; a last line says how many more there
are.

With a catalog on the command line (`--catalog`), or with `--repair`, no payload is read. Catalog, containers, their
indexes and external objects are compared with each other, with lines and objects of the same form, and a summary with
`containers` (of the catalog), `files`, `external`, `damage`, `warnings` and `unverified`. With `--repair` that is what
is left after the repair, and the summary has `adopted` (containers that had no row), `deleted` and `deleted_external`
(objects) and `forgotten` (rows) besides.

Exit status: 0 no damage, 1 not all could be verified, 2 usage, 3 damage, whether or not all could be verified.
"""

from __future__ import annotations

import json as jsons
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from desfs.amounts import counted, format_size
from desfs.cli.exits import EXIT_DAMAGE, EXIT_FAILURE, EXIT_USAGE, fail, printable
from desfs.cli.setup import set_up
from desfs.errors import DesfsError, UsageError
from desfs.settings import VerifySettings
from desfs.store.url import open_store, split_place
from desfs.verify import Finding, Summary, Verification

_PREFIXES = {"damage": "", "warning": "warning: ", "unverified": "not verified: "}


def run(store: str, options: dict[str, Any], *, repair: bool = False, json: bool) -> int:
    """Verify a store or a container, or compare a store with its catalog; the exit status."""
    unread: list[Finding] = []
    try:
        settings = set_up(VerifySettings, options)
        root, key = split_place(store)
        # One that the environment or a settings file has for all commands does not keep payloads from being read.
        if repair or "catalog" in options:
            return _run_catalog(store, settings, repair=repair, json=json)
        with closing(open_store(root, settings.s3_options(), deadline_s=settings.deadline)) as opened:
            with _display(sys.stderr.isatty()) as display:

                def found(finding: Finding) -> None:
                    if finding.kind == "unverified":
                        unread.append(finding)
                    display.line(_line_of(finding) if json else format_finding(finding))

                verification = Verification(opened, found, expect=display.expect, advance=display.advance)
                summary = verification.store() if key is None else verification.container(key)
            print(jsons.dumps(_record(summary)) if json else describe(summary))
            sys.stdout.flush()
    except UsageError as error:
        return fail(error, EXIT_USAGE)
    except DesfsError as error:
        return fail(error, EXIT_FAILURE)
    if unread:
        fail(f"not all could be verified: {format_finding(unread[0])}", EXIT_FAILURE)
    return EXIT_DAMAGE if summary.is_damaged else EXIT_FAILURE if summary.unverified else 0


def _run_catalog(store: str, settings: VerifySettings, *, repair: bool, json: bool) -> int:
    """Raises: UsageError; DesfsError."""
    from desfs.cli.verify_catalog import run

    return run(
        store,
        settings,
        repair=repair,
        show=lambda finding: print(_line_of(finding) if json else format_finding(finding)),
        json=json,
    )


def describe(summary: Summary) -> str:
    """One line about what was verified."""
    damage = []
    if summary.damaged_containers:
        damage.append(counted(summary.damaged_containers, "damaged container"))
    if summary.damaged_entries:
        where = counted(summary.containers_with_damaged_entries, "container")
        damage.append(f"{counted(summary.damaged_entries, 'damaged entry', 'damaged entries')} in {where}")
    if summary.damaged_layout:
        damage.append("a damaged layout")
    what = f"{counted(summary.containers, 'container')}, {counted(summary.files, 'file')}, {format_size(summary.size)}"
    parts = [f"verified {what}: {', '.join(damage) or 'no damage'}"]
    if summary.without_checksum:
        verb = "has" if summary.without_checksum == 1 else "have"
        parts.append(f"{counted(summary.without_checksum, 'entry', 'entries')} {verb} no checksum")
    if summary.warnings:
        parts.append(counted(summary.warnings, "warning"))
    if summary.unverified:
        parts.append("not all could be verified")
    return "; ".join(parts)


def format_finding(finding: Finding) -> str:
    """One line about a finding, printable whatever is in its names."""
    parts = [_PREFIXES[finding.kind] + finding.problem]
    if finding.entry is not None:
        parts.insert(0, f"entry {finding.entry!r}")
    if finding.container:
        parts.insert(0, finding.container)
    line = ": ".join(parts)
    return printable(line)


def _line_of(finding: Finding) -> str:
    record = {
        "kind": finding.kind,
        "container": _text(finding.container),
        "entry": finding.entry,
        "offset": finding.offset,
        "problem": _text(finding.problem),
    }
    return jsons.dumps(record, ensure_ascii=False)


def _text(text: str) -> str:
    """The key of a file whose name is no UTF-8, as text that can be written."""
    return text.encode("utf-8", "backslashreplace").decode()


def _record(summary: Summary) -> dict[str, object]:
    return {
        "kind": "summary",
        "containers": summary.containers,
        "files": summary.files,
        "bytes": summary.size,
        "damaged_containers": summary.damaged_containers,
        "damaged_entries": summary.damaged_entries,
        "containers_with_damaged_entries": summary.containers_with_damaged_entries,
        "damaged_layout": summary.damaged_layout,
        "without_checksum": summary.without_checksum,
        "warnings": summary.warnings,
        "unverified": summary.unverified,
    }


@dataclass(frozen=True, slots=True)
class _Display:
    """Where lines go, and what is told of bytes to come and of those that came."""

    line: Callable[[str], None] = print
    expect: Callable[[int], None] = lambda size: None
    advance: Callable[[int], None] = lambda size: None


@contextmanager
def _display(bar_shown: bool) -> Iterator[_Display]:
    """A bar on a terminal, nothing elsewhere."""
    if not bar_shown:
        yield _Display()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("verifying", total=None)
        total = 0

        def expect(size: int) -> None:
            nonlocal total
            total += size
            bar.update(task, total=total)

        # What goes to the same terminal has to stand above the bar; what goes elsewhere has nothing to do with it.
        line = console.print if sys.stdout.isatty() else print
        yield _Display(line, expect, lambda size: bar.advance(task, size))
