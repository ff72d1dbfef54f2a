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
