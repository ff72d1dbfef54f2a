"""The commands besides `mount`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from desfs import __version__
from desfs.cli.exits import EXIT_FAILURE, fail
from desfs.cli.store_options import takes_program_options, takes_store_options
from desfs.errors import DesfsError

app = typer.Typer(
    name="desfs",
    help="Small files packed into containers on S3-style storage, mounted back as plain directories.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # a default in brackets is no markup
)


StoreUrl = Annotated[
    str,
    typer.Argument(
        metavar="STORE", help="s3://bucket/prefix, file:///directory or a directory; or one container of it, NAME.des."
    ),
]
CatalogOption = Annotated[
    str | None, typer.Option("--catalog", metavar="URL", help="The catalog of the store's packers, a URL or a file.")
]
WaitOption = Annotated[
    float | None, typer.Option("--wait", help="Seconds to wait for a shard that others work on. [60]")
]
Json = Annotated[bool, typer.Option("--json", help="A JSON object a line, for programs.")]


@app.command()
@takes_store_options
def ls(
    store: StoreUrl,
    paths: Annotated[list[str] | None, typer.Argument(metavar="PATH", help="Such as 2026-11-20/photos. [all]")] = None,
    long: Annotated[bool, typer.Option("--long", "-l", help="Mode, size, time.")] = False,
    recursive: Annotated[bool, typer.Option("--recursive", "-R", help="What is below directories too.")] = False,
    directory: Annotated[bool, typer.Option("--directory", "-d", help="Directories themselves.")] = False,
    json: Json = False,
    *,
    options: dict[str, Any],
) -> None:
    """List files, without a mount."""
    from desfs.cli.browse import ls

    raise typer.Exit(ls(store, paths or [""], options, long=long, recursive=recursive, directory=directory, json=json))


@app.command()
@takes_store_options
def cat(
    store: StoreUrl,
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="Files, such as 2026-11-20/report.pdf.")],
    *,
    options: dict[str, Any],
) -> None:
    """Write files to standard output, without a mount."""
    from desfs.cli.browse import cat

    raise typer.Exit(cat(store, paths, options))


@app.command()
@takes_store_options
def stat(
    store: StoreUrl,
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="Files or directories.")],
    json: Json = False,
    *,
    options: dict[str, Any],
) -> None:
    """Show all that is known of files, without a mount."""
    from desfs.cli.browse import stat

    raise typer.Exit(stat(store, paths, options, json=json))


@app.command()
@takes_store_options
def extract(
    store: StoreUrl,
    paths: Annotated[list[str] | None, typer.Argument(metavar="PATH", help="Files or directories. [all]")] = None,
    to: Annotated[str, typer.Option("--to", "-C", metavar="DIR", help="Where to. [.]")] = ".",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    *,
    options: dict[str, Any],
) -> None:
    """Copy files out of a store, with their times and modes, without a mount."""
    from desfs.cli.extract import extract

    raise typer.Exit(extract(store, paths or [""], to, options, overwrite=overwrite))


@app.command("import")
@takes_store_options
def import_(
    store: Annotated[str, typer.Option(metavar="URL", help="s3://bucket/prefix, file:///directory or a directory.")],
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="Directories, tar files, zip files, files.")],
    day: Annotated[str | None, typer.Option(metavar="DAY", help="The day that gets them. [today]")] = None,
    day_from: Annotated[
        str | None, typer.Option(metavar="mtime", help="The day of each file: that of its modification time.")
    ] = None,
    timezone: Annotated[str | None, typer.Option(help="Where the day ends. [UTC]")] = None,
    shard_bits: Annotated[int | None, typer.Option(help="For a new store: 2^N containers a day. [4]")] = None,
    big_file_threshold: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Files of this size and more become objects of their own. [100M]")
    ] = None,
    max_container_bytes: Annotated[str | None, typer.Option(metavar="SIZE", help="Cut containers here. [256M]")] = None,
    max_container_files: Annotated[int | None, typer.Option(help="Cut containers here. [65536]")] = None,
    json: Annotated[bool, typer.Option("--json", help="The summary as a JSON object.")] = False,
    *,
    options: dict[str, Any],
) -> None:
    """Pack a directory, a tar or a zip file into a store, without a spool. The sources stay as they are."""
    from desfs.cli.imports import run

    own = {
        "timezone": timezone,
        "shard_bits": shard_bits,
        "big_file_threshold": big_file_threshold,
        "max_container_bytes": max_container_bytes,
        "max_container_files": max_container_files,
    }
    raise typer.Exit(run(store, paths, options | _given(own), day=day, day_from=day_from, json=json))


@app.command()
@takes_store_options
def verify(
    store: StoreUrl,
    catalog: CatalogOption = None,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Adopt containers that the catalog lacks, delete what nobody will ever need."),
    ] = False,
    grace: Annotated[
        float | None,
        typer.Option(help="Seconds after which a failed upload, or a merged container, is left over. [3600]"),
    ] = None,
    external_grace: Annotated[
        float | None, typer.Option(help="The same for external objects that no container names. [86400]")
    ] = None,
    wait: WaitOption = None,
    json: Json = False,
    *,
    options: dict[str, Any],
) -> None:
    """Read every byte of a store and compare it with what its containers say. Exit status 3: damage was found.

    With --catalog or --repair no payload is read: catalog, containers and external objects are compared.
    """
    from desfs.cli.verify import run

    own = {"catalog": catalog, "grace": grace, "external_grace": external_grace, "wait": wait}
    raise typer.Exit(run(store, options | _given(own), repair=repair, json=json))


@app.command()
@takes_store_options
def rm(
    store: Annotated[
        str, typer.Argument(metavar="STORE", help="s3://bucket/prefix, file:///directory or a directory.")
    ],
    paths: Annotated[list[str], typer.Argument(metavar="DAY/PATH", help="Files, such as 2026-11-20/photos/1.jpg.")],
    catalog: CatalogOption = None,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Directories, with what is in them.")] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="A path that is not there is no error.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only say what would be removed.")] = False,
    wait: WaitOption = None,
    json: Annotated[bool, typer.Option("--json", help="The summary as a JSON object.")] = False,
    *,
    options: dict[str, Any],
) -> None:
    """Remove files from a store: mounts show them no more. Their bytes go when the day is sealed."""
    from desfs.cli.rm import run

    own = {"catalog": catalog, "wait": wait}
    raise typer.Exit(
        run(store, paths, options | _given(own), recursive=recursive, force=force, dry_run=dry_run, json=json)
    )


@app.command()
@takes_store_options
def expire(
    store: Annotated[
        str, typer.Argument(metavar="STORE", help="s3://bucket/prefix, file:///directory or a directory.")
    ],
    older_than: Annotated[str, typer.Option(metavar="AGE", help="Days or weeks, such as 90d or 12w.")],
    catalog: CatalogOption = None,
    timezone: Annotated[str | None, typer.Option(help="Where the day ends. [UTC]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only say what would be deleted.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    wait: WaitOption = None,
    json: Annotated[bool, typer.Option("--json", help="The summary as a JSON object.")] = False,
    *,
    options: dict[str, Any],
) -> None:
    """Delete whole days from a store, for good, the oldest first."""
    from desfs.cli.expire import run

    own = {"catalog": catalog, "older_than": older_than, "timezone": timezone, "wait": wait}
    raise typer.Exit(run(store, options | _given(own), dry_run=dry_run, yes=yes, json=json))


@app.command()
@takes_store_options
def seal(
    store: Annotated[str, typer.Option(metavar="URL", help="s3://bucket/prefix, file:///directory or a directory.")],
    catalog: CatalogOption = None,
    day: Annotated[str | None, typer.Option(metavar="DAY", help="This one alone. [all that are over]")] = None,
    timezone: Annotated[str | None, typer.Option(help="Where the day ends. [UTC]")] = None,
    json: Annotated[bool, typer.Option("--json", help="The summary as a JSON object.")] = False,
    *,
    options: dict[str, Any],
) -> None:
    """Merge the containers of days that are over into one a shard. To be run again and again: by a timer."""
    from desfs.cli.seal import run

    raise typer.Exit(run(store, options | _given({"catalog": catalog, "timezone": timezone}), day=day, json=json))


class _StatusCommand(TyperCommand):
    """One whose `--watch` may stand without its seconds."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        from desfs.cli.status_words import with_seconds

        return super().parse_args(ctx, with_seconds(args))


@app.command(cls=_StatusCommand)
@takes_store_options
def status(
    place: Annotated[str, typer.Argument(metavar="DIR|URL", help="A mount, a spool or a store.")],
    watch: Annotated[
        str | None,
        typer.Option(
            "--watch", "-w", metavar="[SECONDS]", help="Again and again, until interrupted. [2, of a store 60]"
        ),
    ] = None,
    json: Json = False,
    *,
    options: dict[str, Any],
) -> None:
    """Show the state of a mount, a spool or a store. Rates are averages since the start, or between two looks."""
    from desfs.cli.status import run

    raise typer.Exit(run(place, options, json=json, watch=watch))


@app.command()
@takes_store_options
def doctor(
    source: Annotated[str | None, typer.Argument(metavar="SOURCE", help="A store to look at too.")] = None,
    directory: Annotated[str | None, typer.Argument(metavar="DIR", help="Where it is to be mounted.")] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Try what a packer needs: puts and deletes an object.")
    ] = False,
    json: Json = False,
    *,
    options: dict[str, Any],
) -> None:
    """Find out what keeps a mount or a packer from working, and what to do about it."""
    from desfs.cli.doctor import run

    raise typer.Exit(run(source, directory, options, write=write, json=json))


@app.command()
def umount(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Where it is mounted.")],
    lazy: Annotated[
        bool, typer.Option("--lazy", "-l", help="Also when it is busy: it goes when nobody uses it.")
    ] = False,
) -> None:
    """Unmount a directory."""
    from desfs.mountpoint import cut_orphan, mounted_at, real_place, unmount

    try:
        if not cut_orphan(directory) or mounted_at(real_place(directory)) is not None:
            unmount(directory, lazy=lazy)
    except DesfsError as error:
        hint = "" if lazy or "busy" not in str(error) else " (--lazy takes it away all the same)"
        raise typer.Exit(fail(f"{error}{hint}", EXIT_FAILURE)) from error


@app.command()
@takes_store_options
def packer(
    spool: Annotated[str, typer.Option(metavar="DIR", help="The directory that programs write into.")],
    store: Annotated[str, typer.Option(metavar="URL", help="s3://bucket/prefix, file:///directory or a directory.")],
    once: Annotated[bool, typer.Option("--once", help="Pack what is there, then end.")] = False,
    settle: Annotated[float | None, typer.Option(help="Seconds without a change before a file is taken. [2]")] = None,
    scan_interval: Annotated[float | None, typer.Option(help="Seconds between looks at the spool. [1]")] = None,
    max_age: Annotated[float | None, typer.Option(help="Seconds that a settled file waits for others. [30]")] = None,
    max_container_bytes: Annotated[str | None, typer.Option(metavar="SIZE", help="Cut containers here. [256M]")] = None,
    max_container_files: Annotated[int | None, typer.Option(help="Cut containers here. [65536]")] = None,
    max_batch_files: Annotated[int | None, typer.Option(help="Files taken at a time. [50000]")] = None,
    max_file_size: Annotated[str | None, typer.Option(metavar="SIZE", help="Larger files are put aside. [5T]")] = None,
    temporary: Annotated[
        str | None, typer.Option(metavar="PATTERNS", help="Names whose owner will rename them. [*.tmp,*.part]")
    ] = None,
    big_file_threshold: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Files of this size and more become objects of their own. [100M]")
    ] = None,
    shard_bits: Annotated[int | None, typer.Option(help="For a new store: 2^N containers a day. [4]")] = None,
    naming: Annotated[str | None, typer.Option(metavar="path|assigned", help="For a new store. [path]")] = None,
    timezone: Annotated[str | None, typer.Option(help="Where the day ends. [UTC]")] = None,
    node_id: Annotated[
        int | None, typer.Option(help="Without --catalog: 0 to 255, another for each spool of one store. [0]")
    ] = None,
    catalog: Annotated[
        str | None, typer.Option(metavar="URL", help="The catalog, shared by packers. [one in the spool]")
    ] = None,
    assignment: Annotated[
        str | None, typer.Option(metavar="URL", help="The assignment service; needs --catalog. [in this process]")
    ] = None,
    assignment_token_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="The service's token, on its first line. [none]")
    ] = None,
    lease_ttl: Annotated[
        float | None, typer.Option(help="Seconds after which others take over the work of a packer that died. [60]")
    ] = None,
    rescan_interval: Annotated[
        float | None, typer.Option(help="Seconds between looks at a spool in which nothing happens. [10]")
    ] = None,
    redis: Annotated[
        str | None, typer.Option(metavar="URL", help="Tell mounts of new containers through this Redis. [none]")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Answer /metrics there, for Prometheus. [none]")
    ] = None,
    max_parts: Annotated[
        int | None, typer.Option(help="More containers of a shard than these are merged. [16]")
    ] = None,
    delete_grace: Annotated[
        float | None, typer.Option(help="Seconds after which a merged container goes. [30]")
    ] = None,
    *,
    options: dict[str, Any],
) -> None:
    """Pack the files of a spool into containers.

    Each option but --spool, --store and --once may also stand in the environment: DESFS_SETTLE for --settle, and so on.
    """
    own = {
        "settle": settle,
        "scan_interval": scan_interval,
        "max_age": max_age,
        "max_container_bytes": max_container_bytes,
        "max_container_files": max_container_files,
        "max_batch_files": max_batch_files,
        "max_file_size": max_file_size,
        "temporary": temporary,
        "big_file_threshold": big_file_threshold,
        "shard_bits": shard_bits,
        "naming": naming,
        "timezone": timezone,
        "node_id": node_id,
        "catalog": catalog,
        "assignment": assignment,
        "assignment_token_file": assignment_token_file,
        "lease_ttl": lease_ttl,
        "rescan_interval": rescan_interval,
        "redis": redis,
        "metrics": metrics,
        "max_parts": max_parts,
        "delete_grace": delete_grace,
    }
    from desfs.cli.packer import run

    raise typer.Exit(run(spool, store, once, options | _given(own)))


@app.command()
@takes_program_options
def assignment(
    catalog: Annotated[
        str | None, typer.Option(metavar="URL", help="postgresql://user@host/database, or a SQLite file. Needed.")
    ] = None,
    listen: Annotated[str | None, typer.Option(metavar="ADDR:PORT", help="Where to listen. [127.0.0.1:8000]")] = None,
    token_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Valid tokens, one a line; read again when it changes. [none]")
    ] = None,
    tls_cert: Annotated[str | None, typer.Option(metavar="FILE", help="Speak TLS with this certificate. [no]")] = None,
    tls_key: Annotated[str | None, typer.Option(metavar="FILE", help="Its key. [in the same file]")] = None,
    timezone: Annotated[str | None, typer.Option(help="Where the day ends. [UTC]")] = None,
    shard_bits: Annotated[int | None, typer.Option(help="As the store has it: 2^N containers a day. [4]")] = None,
    prefix: Annotated[str | None, typer.Option(help="What ids begin with: letters and digits. [DES]")] = None,
    holder: Annotated[str | None, typer.Option(metavar="NAME", help="This replica, for people. [host:pid]")] = None,
    node_ttl: Annotated[
        float | None, typer.Option(help="Seconds after which others may have the node id of one that died. [30]")
    ] = None,
    max_body: Annotated[str | None, typer.Option(metavar="SIZE", help="Larger requests are refused. [8M]")] = None,
    max_requests: Annotated[int | None, typer.Option(help="More at once are told to come back. [64]")] = None,
    request_timeout: Annotated[float | None, typer.Option(help="Seconds that a request may take. [30]")] = None,
    open_metrics: Annotated[
        bool, typer.Option("--open-metrics", help="Whoever asks for /metrics needs no token.")
    ] = False,
    *,
    options: dict[str, Any],
) -> None:
    """Serve names, days and shards to packers, over HTTP. Several replicas may share a catalog.

    Tokens may also stand in the environment, in DESFS_TOKENS; without any it listens on loopback alone.
    """
    from desfs.cli.assignment import run

    own = {
        "catalog": catalog,
        "listen": listen,
        "token_file": token_file,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "timezone": timezone,
        "shard_bits": shard_bits,
        "prefix": prefix,
        "holder": holder,
        "node_ttl": node_ttl,
        "max_body": max_body,
        "max_requests": max_requests,
        "request_timeout": request_timeout,
        "open_metrics": open_metrics or None,
    }
    raise typer.Exit(run(options | _given(own)))


catalog_app = typer.Typer(help="Bring a catalog up to date, or move it.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(catalog_app, name="catalog")


@catalog_app.command("migrate")
@takes_program_options
def catalog_migrate(
    catalog: Annotated[
        str | None, typer.Option(metavar="URL", help="postgresql://user@host/database, or a SQLite file. Needed.")
    ] = None,
    *,
    options: dict[str, Any],
) -> None:
    """Make the tables of a catalog, or bring them up to date."""
    from desfs.cli.catalog import migrate

    raise typer.Exit(migrate(options | _given({"catalog": catalog})))


@catalog_app.command("copy")
@takes_program_options
def catalog_copy(
    source: Annotated[str, typer.Argument(metavar="FROM", help="A catalog that nobody works with.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="An empty one, which `migrate` has made.")],
    *,
    options: dict[str, Any],
) -> None:
    """Copy a catalog into an empty one: how a store that began on one machine moves to Postgres."""
    from desfs.cli.catalog import copy

    raise typer.Exit(copy(source, target, options))


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"desfs {__version__}")
        raise typer.Exit


@app.command("mount", add_help_option=False, context_settings={"ignore_unknown_options": True})
def mount_help(
    arguments: Annotated[list[str], typer.Argument(metavar="SOURCE DIR [-o OPT,…] [-f]")],
) -> None:
    """Mount a store. `desfs mount --help` has the options."""
    from desfs.cli.mount import main

    raise typer.Exit(main(arguments))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
