"""`desfs packer`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from desfs.cli.exits import EXIT_FAILURE, EXIT_USAGE, fail
from desfs.errors import DesfsError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from desfs.packer.summary import Summary


def run(spool: str, store: str, once: bool, options: dict[str, Any]) -> int:
    """Run a packer; the exit status."""
    from assignment.client import AssignmentError, InvalidRequest
    from des_format.errors import DesFormatError
    from desfs.cli.setup import option_name
    from desfs.logs import configure_logs
    from desfs.packer.run import run_packer
    from desfs.settings import PackerSettings, load_settings

    try:
        settings = load_settings(PackerSettings, options, option_name)
    except UsageError as error:
        return fail(error, EXIT_USAGE)
    try:
        configure_logs(settings)
        with _progress(once and sys.stderr.isatty()) as progress:
            summary = run_packer(spool, store, settings, once=once, progress=progress)
    except (UsageError, InvalidRequest) as error:
        return fail(error, EXIT_USAGE)
    except (DesfsError, DesFormatError, AssignmentError, OSError) as error:
        return fail(error, EXIT_FAILURE)
    print(describe(summary))
    for failure in summary.failures:
        print(f"desfs: {failure}", file=sys.stderr)
    return EXIT_FAILURE if summary.failures else 0


def describe(summary: Summary) -> str:
    """One line about what a packer has done."""
    from desfs import metrics

    packed = f"packed {summary.files} files ({summary.bytes} bytes)"
    parts = [f"{packed} into {summary.containers} containers with {metrics.puts()} PUTs"]
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
