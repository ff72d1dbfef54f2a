"""The commands besides `mount`."""

from __future__ import annotations

from typing import Annotated

import typer

from desfs.errors import DesfsError

app = typer.Typer(
    name="desfs",
    help="Small files packed into containers on S3-style storage, mounted back as plain directories.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # a default in brackets is no markup
)


@app.command()
def umount(directory: Annotated[str, typer.Argument(metavar="DIR", help="Where it is mounted.")]) -> None:
    """Unmount a directory."""
    from desfs.mountpoint import unmount

    try:
        unmount(directory)
    except DesfsError as error:
        typer.echo(f"desfs: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
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
    node_id: Annotated[int | None, typer.Option(help="0 to 255, another for each spool of one store. [0]")] = None,
    endpoint_url: Annotated[str | None, typer.Option(metavar="URL", help="S3 endpoint.")] = None,
    region: Annotated[str | None, typer.Option(help="S3 region.")] = None,
    profile: Annotated[str | None, typer.Option(help="AWS profile.")] = None,
    addressing_style: Annotated[str | None, typer.Option(metavar="path|virtual|auto")] = None,
    ca_bundle: Annotated[str | None, typer.Option(metavar="FILE", help="Certificates to trust.")] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds of tries for a request to the store. [60]")] = None,
    log_level: Annotated[str | None, typer.Option(metavar="debug|info|warning|error")] = None,
    log_format: Annotated[str | None, typer.Option(metavar="text|json")] = None,
    log_file: Annotated[str | None, typer.Option(metavar="FILE")] = None,
) -> None:
    """Pack the files of a spool into containers.

    Each option but --spool, --store and --once may also stand in the environment: DESFS_SETTLE for --settle, and so on.
    """
    options = dict(locals())
    for name in ("spool", "store", "once"):
        del options[name]
    from desfs.cli.packer import run

    raise typer.Exit(run(spool, store, once, options))


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"desfs {installed('desfs')}")
        raise typer.Exit


@app.command("mount", add_help_option=False, context_settings={"ignore_unknown_options": True})
def mount_help(
    arguments: Annotated[list[str], typer.Argument(metavar="SOURCE DIR [-o OPT,…] [-f]")],
) -> None:
    """Mount a store. `desfs mount --help` has the options."""
    from desfs.cli.mount import main

    raise typer.Exit(main(arguments))
