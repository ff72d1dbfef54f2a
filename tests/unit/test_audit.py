"""What is made of pip-audit's answers."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from tests import servers
from tests.audit import OWN, NotAudited, installed, judge

CLEAN: dict[str, Any] = {"name": "good", "version": "1.0", "vulns": []}
SKIPPED = {"name": "odd", "skip_reason": "Dependency not found on PyPI"}
BAD = {"name": "bad", "version": "2.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1", "3.0"]}]}
WORSE = {"name": "worse", "version": "1", "vulns": [{"id": "PYSEC-2", "fix_versions": []}]}


def test_nothing_is_known() -> None:
    assert judge({"dependencies": [CLEAN, CLEAN]}) == []


def test_each_vulnerability_is_a_line_whatever_could_not_be_asked() -> None:
    assert judge({"dependencies": [CLEAN, BAD, SKIPPED, WORSE]}) == [
        "bad 2.0: PYSEC-1, mended in 2.1, 3.0",
        "worse 1: PYSEC-2, mended in no version",
    ]


def test_a_package_that_was_left_out_was_not_audited() -> None:
    with pytest.raises(NotAudited, match="1 of 2 packages: Dependency not found"):
        judge({"dependencies": [CLEAN, SKIPPED]})


def test_what_is_installed_has_its_version() -> None:
    found = dict(each.split("==") for each in installed())
    assert "pytest" in found
    assert found["pytest"] == pytest.__version__
    assert OWN not in found


@pytest.mark.parametrize(("options", "status"), [((), 1), (("--if-possible",), 0)])
def test_where_nobody_answers_that_is_said(options: tuple[str, ...], status: int) -> None:
    """Both say so; only one fails."""
    (port,) = servers.free_ports(1)
    proxies = dict.fromkeys(("HTTPS_PROXY", "https_proxy"), f"http://{servers.HOST}:{port}")
    command = [sys.executable, "-m", "tests.audit", *options]
    done = subprocess.run(command, env=os.environ | proxies, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("make: dependencies are NOT audited: ")
