"""The options of every command that reaches a store, said once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from desfs.options import FLAGS, OPTION_HELP

_METAVARS = {
    "endpoint_url": "URL",
    "region": "NAME",
    "profile": "NAME",
    "addressing_style": "path|virtual|auto",
    "ca_bundle": "FILE",
    "deadline": "SECONDS",
    "config": "FILE",
    "log_level": "debug|info|warning|error",
    "log_format": "text|json",
    "log_file": "FILE",
}
STORE_OPTIONS = (*_METAVARS, "no_sign_request")
PROGRAM_OPTIONS = ("config", "log_level", "log_format", "log_file")


def takes_store_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options. It gets those that were given in a dict, as its parameter `options`."""
    return _taking(STORE_OPTIONS, "Store", command)


def takes_program_options(command: Callable[..., None]) -> Callable[..., None]:
    """The same with those of a program that has no store."""
    return _taking(PROGRAM_OPTIONS, "Program", command)


def _taking(names: tuple[str, ...], panel: str, command: Callable[..., None]) -> Callable[..., None]:
    own = [
        parameter
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items()
        if name != "options"
    ]
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if name in FLAGS else None,
            annotation=Annotated[
                bool if name in FLAGS else str | None,
                typer.Option(
                    f"--{name.replace('_', '-')}",
                    help=OPTION_HELP[name],
                    metavar=_METAVARS.get(name),
                    rich_help_panel=panel,
                ),
            ],
        )
        for name in names
    ]

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        options = {name: given.pop(name) for name in names}
        command(**given, options={name: value for name, value in options.items() if value not in (None, False)})

    parameters = [*own, *added]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper
