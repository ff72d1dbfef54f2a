"""The man pages say all that there is, and all that they say has a test that uses it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from desfs.cli import COMMANDS
from desfs.cli.commands import app
from desfs.cli.man import desfs_page, mount_page
from desfs.cli.reference import ENVIRONMENT, EXIT_CODES, FILES, SIGNALS
from desfs.cli.store_options import STORE_OPTIONS
from desfs.options import FLAGS, OPTION_HELP
from desfs.settings import MountSettings

TESTS = Path(__file__).parents[1]
GROUP: Any = typer.main.get_command(app)


def options() -> Iterator[tuple[str, str]]:
    """(command, the longest name of an option) of all commands but mount; those of the store once."""
    for name, command in sorted(GROUP.commands.items()):
        for each in command.params:
            if name != "mount" and each.param_type_name == "option" and each.name not in STORE_OPTIONS:
                yield name, max(each.opts, key=len)
    for name in STORE_OPTIONS:
        yield "", f"--{name.replace('_', '-')}"


def plain(page: str) -> str:
    """The page without roff's escapes."""
    return page.replace("\\-", "-").replace("\\e", "\\").replace("\\&", "").replace("\\(aq", "'")


@cache
def sources() -> dict[Path, tuple[str, frozenset[str]]]:
    """The tests' text, and the strings in it."""
    found = {}
    for path in sorted(TESTS.rglob("*.py")):
        if path.name != Path(__file__).name:
            text = path.read_text()
            strings = {
                node.value
                for node in ast.walk(ast.parse(text))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            }
            found[path] = text, frozenset(strings)
    return found


def test_the_pages_have_every_command_option_signal_and_exit_code() -> None:
    page, mount = plain(desfs_page()), plain(mount_page())
    assert set(GROUP.commands) == COMMANDS | {"mount"}
    for name in GROUP.commands:
        assert f".SS desfs {name}" in page
    for _, option in options():
        assert option in page
    assert OPTION_HELP.keys() == MountSettings.model_fields.keys()
    for name, text in OPTION_HELP.items():
        assert f".B {name if name in FLAGS else name + '='}\n{text}" in mount
    for table in (EXIT_CODES, SIGNALS, FILES, ENVIRONMENT):
        for name in table:
            assert f".B {name}".replace("…", "...") in page


def test_no_line_of_a_page_is_a_request_by_accident() -> None:
    """roff(7): a line that begins with a dot or an apostrophe is a request."""
    known = (".TH", ".SH", ".SS", ".TP", ".B ", ".PP", ".br", ".nf", ".fi")
    for page in (desfs_page(), mount_page()):
        for line in page.splitlines():
            assert line
            assert line[0] not in ".'" or line.startswith(known), line


@pytest.mark.parametrize(("command", "option"), list(options()), ids=lambda value: value or "store")
def test_every_option_of_a_command_is_used_by_a_test(command: str, option: str) -> None:
    """The man page promises it, so a test uses it."""
    wanted = re.compile(rf"(?<![\w-]){re.escape(option)}(?![\w-])")
    assert any(
        any(wanted.search(each) for each in strings) and (not command or command in strings)
        for _, strings in sources().values()
    )


@pytest.mark.parametrize("name", sorted(OPTION_HELP))
def test_every_mount_option_is_used_by_a_test_with_a_mount(name: str) -> None:
    wanted = re.compile(rf"(?:^|,){name}{'(?:,|$)' if name in FLAGS else '='}")
    assert any(
        any(wanted.search(each) for each in strings)
        for path, (_, strings) in sources().items()
        if path.parent.name in ("mount", "service")
    )


@pytest.mark.parametrize("name", [name for names in SIGNALS for name in names.split(", ")])
def test_every_signal_is_sent_by_a_test(name: str) -> None:
    assert any(re.search(rf"signal\.{name}\b|\"{name}\"", text) for text, _ in sources().values())


@pytest.mark.parametrize("code", EXIT_CODES)
def test_every_exit_code_is_seen_by_a_test(code: str) -> None:
    wanted = re.compile(rf"(?:returncode|status)(?:, [\w.]+)*\)? == \(?{code}\b|status={code}\b")
    assert any(wanted.search(text) for text, _ in sources().values())
