"""`desfs import`. With `--json` it prints one object: `files` and `bytes` that are stored, `containers` they are in,
`puts` (all requests that stored something, each try counted), `external` (of the files, those that are objects of their
own), `days`, `skipped` (what has no content, by kind), `replaced` (files in whose stead a later one of the same name is
imported), `refused` (what should have been imported and was not), `failures` (the first messages about these, or about
what ended the import)."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from desfs.cli.exits import EXIT_FAILURE, EXIT_USAGE, fail, one_line
from desfs.errors import DesfsError, UsageError

if TYPE_CHECKING:
    from desfs.imports.run import Progress, Summary


def run(
    store: str, paths: list[str], options: dict[str, Any], *, day: str | None, day_from: str | None, json: bool
) -> int:
    """Import the paths into the store; the exit status."""
    from des_format.errors import DesFormatError
    from desfs.cli.setup import option_name
    from desfs.imports.run import Summary, choose_day, run_import
    from desfs.logs import configure_logs
    from desfs.settings import ImportSettings, load_settings

    summary = Summary()
    failure: str | None = None
    try:
        settings = load_settings(ImportSettings, options, option_name)
        days = choose_day(day, day_from, settings.timezone)
        configure_logs(settings)
        with _progress(sys.stderr.isatty()) as progress:
            run_import(paths, store, settings, days, summary, progress=progress)
    except UsageError as error:
        return fail(error, EXIT_USAGE)
    except KeyboardInterrupt:
        failure = "interrupted: what is in the store is whole; import again for the rest"
    except (DesfsError, DesFormatError, OSError) as error:
        failure = one_line(str(error))
    print(json_module.dumps(as_object(summary, failure)) if json else describe(summary))
    sys.stdout.flush()
    report = summary.report
    for line in (*report.notes, *report.failures):
        fail(line, EXIT_FAILURE)
    for kept, count, what in (
        (report.notes, report.replaced, "replaced"),
        (report.failures, report.refused, "refused"),
    ):
        if count > len(kept):
            fail(f"and {count - len(kept)} more {what}", EXIT_FAILURE)
    if failure is not None:
        return fail(failure, EXIT_FAILURE)
    return EXIT_FAILURE if report.refused else 0


def describe(summary: Summary) -> str:
    """One line about what an import has done."""
    from desfs import metrics

    imported = f"imported {summary.files} files ({summary.bytes} bytes)"
    parts = [f"{imported} into {summary.containers} containers with {metrics.puts()} PUTs"]
    report = summary.report
    if summary.external:
        parts.append(f"{summary.external} of them stored as objects of their own")
    if report.skipped:
        kinds = (f"{count} {kind.value if count == 1 else kind.plural}" for kind, count in report.skipped.items())
        parts.append(f"skipped {', '.join(kinds)}")
    if report.replaced:
        parts.append(f"{report.replaced} replaced by later ones of the same name")
    if report.refused:
        parts.append(f"{report.refused} refused")
    return "; ".join(parts)


def as_object(summary: Summary, failure: str | None = None) -> dict[str, Any]:
    """The same for programs."""
    report = summary.report
    from desfs import metrics

    return {
        "files": summary.files,
        "bytes": summary.bytes,
        "containers": summary.containers,
        "puts": metrics.puts(),
        "external": summary.external,
        "days": [day.isoformat() for day in sorted(summary.days)],
        "skipped": {kind.plural: count for kind, count in report.skipped.items()},
        "replaced": report.replaced,
        "refused": report.refused,
        "failures": [*map(one_line, report.failures), *([] if failure is None else [failure])],
    }


@contextmanager
def _progress(shown: bool) -> Iterator[Progress]:
    """A bar on a terminal, nothing elsewhere."""
    if not shown:
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("files"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("finding", total=None)

        def show(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total, description="finding" if total is None else "importing")

        yield show
