"""`desfs packer`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from desfs.errors import DesfsError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from desfs.packer.worker import Summary

EXIT_FAILURE = 1
EXIT_USAGE = 2


def run(spool: str, store: str, once: bool, options: dict[str, Any]) -> int:
    """Run a packer; the exit status."""
    from pydantic import ValidationError

    from assignment.client import AssignmentError, InvalidRequest
    from des_format.errors import DesFormatError
    from desfs.logs import configure_logs
    from desfs.packer.run import run_packer
    from desfs.settings import PackerSettings

    try:
        settings = PackerSettings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        given = options.get(name) is not None
        origin = f"--{name.replace('_', '-')}" if given else f"DESFS_{name.upper()} in the environment"
        return _fail(f"{origin}: {first['msg'].removeprefix('Value error, ')}", EXIT_USAGE)
    try:
        configure_logs(settings)
        with _progress(once and sys.stderr.isatty()) as progress:
            summary = run_packer(spool, store, settings, once=once, progress=progress)
    except (UsageError, InvalidRequest) as error:
        return _fail(str(error), EXIT_USAGE)
    except (DesfsError, DesFormatError, AssignmentError, OSError) as error:
        return _fail(str(error), EXIT_FAILURE)
    print(describe(summary))
    for failure in summary.failures:
        print(f"desfs: {failure}", file=sys.stderr)
    return EXIT_FAILURE if summary.failures else 0


def describe(summary: Summary) -> str:
    """One line about what a packer has done."""
    from desfs import metrics

    counters = metrics.snapshot()
    puts = sum(
        value
        for name, value in counters.items()
        if name.startswith("desfs_store_requests_total.") and name.split(".")[1] in ("put", "put_part")
    )
    packed = f"packed {summary.files} files ({summary.bytes} bytes)"
    parts = [f"{packed} into {summary.containers} containers with {puts:.0f} PUTs"]
    if summary.external:
        parts.append(f"{summary.external} of them stored as objects of their own")
    if summary.rejected:
        parts.append(f"{summary.rejected} put aside in .desfs/rejected")
    parts += [f"{count} left: {reason}" for reason, count in summary.left.items()]
    return "; ".join(parts)


@contextmanager
def _progress(shown: bool) -> Iterator[Callable[[Summary, int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    if not shown:
        yield lambda summary, waiting: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("files"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("packing", total=None)

        def show(summary: Summary, waiting: int) -> None:
            if waiting >= 0:
                bar.update(task, total=summary.files + waiting)
            bar.update(task, completed=summary.files)

        yield show


def _fail(message: str, status: int) -> int:
    print(f"desfs: {' '.join(message.split())}", file=sys.stderr)
    return status
