"""Properties are checked on the same examples in every run, and never by the clock."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings

from tests.unit.verifying import put_externals

settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")


@pytest.fixture(scope="module")
def gets() -> Iterator[ThreadPoolExecutor]:
    """Threads for the GETs of a verification."""
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def with_externals(tmp_path: Path) -> Path:
    """A store with external objects, as `tests.unit.verifying` makes it."""
    return put_externals(tmp_path)
