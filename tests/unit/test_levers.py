"""desfs._levers without a mount; with one: tests/mount/test_levers.py."""

from __future__ import annotations

import numpy as np
import pyfuse3  # noqa: F401 - has to be loaded first here
import pytest

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


def test_without_a_session_nothing_is_listed_or_pushed() -> None:
    """What belongs to a session is refused as long as there is none, and what is not inside its buffers always."""
    assert _levers.asked_listing() is None
    columns = np.zeros((5, 1), np.int64)
    with pytest.raises(ValueError, match="no listing was begun"):
        _levers.add_entries([b"name"], columns, 0, 0, 4096, 1.0)
    with pytest.raises(ValueError, match="there is no session"):
        _levers.queue_pages(b"payload", np.array([[7, 0, 7, 0]], np.uint64), bytearray(1))


def test_columns_have_to_fit_the_names() -> None:
    _levers.begin_entries(0, 4096)
    try:
        for columns in (np.zeros((5, 2), np.int64), np.zeros((4, 1), np.int64)):
            with pytest.raises(ValueError, match="columns of another length"):
                _levers.add_entries([b"name"], columns, 0, 0, 4096, 1.0)
        with pytest.raises(TypeError):
            _levers.add_entries(["text"], np.zeros((5, 1), np.int64), 0, 0, 4096, 1.0)  # type: ignore[list-item]
    finally:
        _levers.drop_entries()
