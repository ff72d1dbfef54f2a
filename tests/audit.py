"""`make audit`: what is known of the vulnerabilities of the packages that are installed here, by pip-audit.

PyPI is told their names and versions. It is asked for one package first: where there is no way to it, or a mirror
stands in its place that does not know such things, nobody waits for a hundred answers that say nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Of this project itself nothing is known there.
OWN = "desfs"
# Vulnerabilities that have been looked at and do not concern us: the id, and why not.
IGNORED: dict[str, str] = {}
# What a hundred and fifty packages take is 12 s.
LIMIT_S = 60.0


class NotAudited(Exception):
    """The question had no answer; the message says why."""


def installed() -> list[str]:
    """Requirements that pin what is installed beside this Python, in the order of names."""
    found = {each.metadata["Name"].lower(): each.version for each in importlib.metadata.distributions()}
    return [f"{name}=={version}" for name, version in sorted(found.items()) if name != OWN]


def ask(requirements: Sequence[str]) -> dict[str, Any]:
    """What pip-audit reports of them. Raises: NotAudited."""
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "requirements.txt"
        listed.write_text("\n".join(requirements), encoding="utf-8")
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(listed), "--no-deps", "--disable-pip"]
        command += ["--format", "json", "--progress-spinner", "off", "--desc", "off"]
        command += [word for name in IGNORED for word in ("--ignore-vuln", name)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise NotAudited(f"no answer within {LIMIT_S:g} s") from error
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        raise NotAudited((done.stderr.strip().splitlines() or ["pip-audit says nothing"])[-1]) from error
    return report


def judge(report: dict[str, Any]) -> list[str]:
    """A line for each vulnerability. Raises: NotAudited when there are packages of which nothing could be learned, and
    no vulnerability of the others."""
    found = [
        f"{each['name']} {each['version']}: {known['id']}, mended in {', '.join(known['fix_versions']) or 'no version'}"
        for each in report["dependencies"]
        for known in each.get("vulns", ())
    ]
    skipped = [each for each in report["dependencies"] if "skip_reason" in each]
    if skipped and not found:
        raise NotAudited(f"{len(skipped)} of {len(report['dependencies'])} packages: {skipped[0]['skip_reason']}")
    return found


def main() -> int:
    """0: nothing is known. 1: vulnerabilities, a line for each; or no answer, unless that is allowed."""
    parser = argparse.ArgumentParser(prog="python -m tests.audit", description="Known vulnerabilities of what is here.")
    parser.add_argument("--if-possible", action="store_true", help="say that there was no answer, and do not fail")
    arguments = parser.parse_args()
    packages = installed()
    try:
        found = judge(ask(packages[:1])) + judge(ask(packages))
    except NotAudited as error:
        print(f"make: dependencies are NOT audited: {error}", file=sys.stderr)
        return 0 if arguments.if_possible else 1
    for line in dict.fromkeys(found):
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
