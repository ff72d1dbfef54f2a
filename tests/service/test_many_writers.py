"""Four packers, two spools, two replicas of the service, and all that can happen to them: `tests.service.cluster`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import servers
from tests.service.cluster import run


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [1, 2])
def test_every_file_is_readable_exactly_once(seed: int, s3: servers.S3Server, tmp_path: Path) -> None:
    """docs/semantics.md: Several then share its files; each is packed by one of them.

    Killed, paused past their leases, cut off from Postgres, Redis, the service and S3: in the end a mount shows each
    file once, with its bytes, the spools are empty, and catalog and bucket agree. The long form of it, 20,000 files in
    ten minutes, is `python -m tests.service.cluster`."""
    report = run(tmp_path, s3, seed, files=300, seconds=15, pause_s=0.6)
    assert report.files == 300
    assert len(report.events) == 6, report
    assert report.looks > 20
    assert report.hands > 0
