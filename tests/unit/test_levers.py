"""desfs._levers without a mount; with one: tests/mount/test_levers.py."""

from __future__ import annotations

import pyfuse3  # noqa: F401 - has to be loaded first here

from desfs import _levers
from desfs.levers import Levers


def test_the_extension_is_built_by_the_normal_install() -> None:
    """Built by the normal install; until a session is made nothing is in force."""
    assert _levers.state()["bound"] is False
    assert _levers.state()["no_open"] is False


def test_what_is_not_wanted_or_too_late_is_said() -> None:
    levers = Levers()
    assert levers.report()["why_not"] == "not asked for"
    levers.load("off")
    assert levers.report()["why_not"] == "switched off"
    levers.load("auto")
    assert levers.report() == {
        "loaded": False,
        "in_force": False,
        "why_not": "pyfuse3 was loaded before it",
        "max_background": None,
        "max_write": None,
        "read_ahead_kb": None,
    }


def test_a_read_ahead_that_cannot_be_set_is_left_alone() -> None:
    levers = Levers()
    levers.raise_read_ahead("999999:1")
    assert levers.report()["read_ahead_kb"] is None
