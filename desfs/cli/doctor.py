"""`desfs doctor`: one line for each check, and what to do where something is wrong.

With `--json` each check is an object on a line of its own; more keys may come, these stay:

    check   the name of the check: "fuse device", "credentials", "list", …
    state   "ok"; "warning": it works, but less well, or not for everybody; "error": a mount or a packer fails on it;
            "skipped": it could not be looked at
    found   what was found, or why it was skipped
    remedy  what to do, "" where nothing has to be done

Exit status: 0 when there is no error, 1 when there is one, 2 when the command itself makes no sense.
"""

from __future__ import annotations

import io
import json as jsons
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from desfs.amounts import counted
from desfs.cli.exits import EXIT_FAILURE, EXIT_USAGE, fail, one_line, printable
from desfs.cli.setup import set_up
from desfs.doctor import EACH_S, Finding, State, examine
from desfs.errors import UsageError
from desfs.settings import MountSettings

_NAME_WIDTH = 14
_STATE_WIDTH = len(State.WARNING.value)
_STYLES = {State.OK: "green", State.WARNING: "yellow", State.ERROR: "bold red", State.SKIPPED: "dim"}


def run(source: str | None, directory: str | None, options: dict[str, Any], *, write: bool, json: bool) -> int:
    """Look, and print what is found as it comes; the exit status."""
    if write and source is None:
        return fail("--write needs a SOURCE to write to", EXIT_USAGE)
    findings: Iterator[Finding]
    try:
        settings = set_up(MountSettings, options)
    except UsageError as error:
        if str(error).startswith("--"):
            return fail(error, EXIT_USAGE)
        # Of the environment or of the settings file: a mount fails on it, which is what this command is to find.
        findings = _without_settings(str(error), source, directory)
    else:
        findings = examine(source, directory, settings, write=write, each_s=min(EACH_S, settings.deadline))
    return EXIT_FAILURE if _show(findings, json)[State.ERROR] else 0


def _without_settings(reason: str, source: str | None, directory: str | None) -> Iterator[Finding]:
    yield Finding("settings", State.ERROR, reason, "correct it, or unset it")
    yield from examine(None, None, None)
    for name, wanted in (("store", source), ("mount point", directory)):
        if wanted is not None:
            yield Finding(name, State.SKIPPED, "the settings cannot be read")


def _show(findings: Iterator[Finding], json: bool) -> Counter[State]:
    show = _printer(json)
    states: Counter[State] = Counter()
    for finding in findings:
        show(finding)
        states[finding.state] += 1
    if not json:
        parts = [counted(states[State.ERROR], "error"), counted(states[State.WARNING], "warning")]
        if states[State.SKIPPED]:
            parts.append(f"{states[State.SKIPPED]} skipped")
        print(", ".join(parts))
    return states


def _printer(json: bool) -> Callable[[Finding], None]:
    if json:
        return lambda finding: print(jsons.dumps(record(finding), ensure_ascii=False), flush=True)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that are no UTF-8
    if not sys.stdout.isatty():
        return lambda finding: print("\n".join(lines(finding)), flush=True)
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)

    def show(finding: Finding) -> None:
        for number, line in enumerate(lines(finding)):
            text = Text(line)
            if number == 0:
                text.stylize(_STYLES[finding.state], 0, _STATE_WIDTH)
            console.print(text, soft_wrap=True)  # a remedy is to be copied

    return show


def record(finding: Finding) -> dict[str, str]:
    """A finding as `--json` has it."""
    return {
        "check": finding.check,
        "state": finding.state.value,
        "found": printable(one_line(finding.found)),
        "remedy": printable(one_line(finding.remedy)),
    }


def lines(finding: Finding) -> list[str]:
    """A finding as people read it: what was found, and below it what to do."""
    found = printable(one_line(finding.found))
    shown = [f"{finding.state.value:{_STATE_WIDTH}}  {finding.check:{_NAME_WIDTH}}  {found}"]
    if finding.remedy:
        shown.append(f"{'':{_STATE_WIDTH}}  {'':{_NAME_WIDTH}}  -> {printable(one_line(finding.remedy))}")
    return shown
