"""The example containers through a mount: docs/format.md, Damaged and odd containers."""

from __future__ import annotations

import errno
import itertools
import json
import os
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import fixtures
from tests.mount.mounting import KINDS, daemon_of, mounted, source_of
from tests.unit.containers import Item, build

pytestmark = pytest.mark.fuse

SMALL = 512 * 1024 * 1024  # bytes of RSS
DAMAGED_S = 5.0


@pytest.fixture(scope="module", params=fixtures.FOLDERS, ids=lambda folder: folder.parent.name)
def folder(request: pytest.FixtureRequest) -> Path:
    chosen: Path = request.param
    return chosen


@pytest.fixture(scope="module", params=KINDS)
def valid(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    base = tmp_path_factory.mktemp("valid")
    with (
        source_of(request.param, folder / "valid", request) as source,
        mounted(source.url, base / "mnt", env=source.env) as mount,
    ):
        yield mount


@pytest.fixture(scope="module", params=KINDS)
def hostile(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every damaged container in the day that its manifest names, with a good one beside it."""
    base = tmp_path_factory.mktemp("hostile")
    good = fixtures.valid(folder)
    assert good["days"]["2025-01-02"]
    for case in fixtures.hostile(folder):
        path = base / "store" / case.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(case.raw)
        (path.parent / "e.des").write_bytes((folder / "valid/2025-01-02.des").read_bytes())
    with (
        source_of(request.param, base / "store", request) as source,
        mounted(source.url, base / "mnt", env=source.env) as mount,
    ):
        yield mount


def files_below(root: Path) -> dict[str, Path]:
    return {
        os.path.relpath(os.path.join(folder, name), root): Path(folder, name)
        for folder, _, names in os.walk(root, onerror=_raise)
        for name in names
    }


def _raise(error: OSError) -> None:
    raise error


def problems_of(mount: Path) -> list[str]:
    return (mount / ".desfs/problems").read_text().splitlines()


def peak_rss(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def test_every_file_has_the_bytes_and_metadata_of_the_manifest(valid: Path, folder: Path) -> None:
    """Every container gives its manifest's bytes and metadata through a mount, and nothing else is shown."""
    days: dict[str, dict[str, dict[str, Any]]] = fixtures.valid(folder)["days"]
    assert sorted(os.listdir(valid)) == sorted(days)
    for day, expected in days.items():
        found = files_below(valid / day)
        assert sorted(found) == sorted(expected)
        for name, entry in expected.items():
            data = found[name].read_bytes()
            assert (len(data), sha256(data).hexdigest()) == (entry["size"], entry["sha256"]), name
            assert found[name].stat().st_size == entry["size"]
            if "meta" in entry:
                meta = json.loads(os.getxattr(found[name], "user.des.meta"))
                assert {key: meta[key] for key in entry["meta"]} == entry["meta"], name


def test_what_is_not_shown_is_reported(valid: Path, folder: Path) -> None:
    """Names that cannot be shown are reported; foreign objects, `_bigFiles/` and tombstones are no problems."""
    files_below(valid)
    lines = problems_of(valid)
    unshowable: list[str] = fixtures.valid(folder)["not_shown"]["2025-01-06/0.des"]
    assert len(lines) == len(unshowable)
    assert all(line.startswith("2025-01-06/0.des: ") and "not shown" in line for line in lines)


def test_every_damaged_container_has_the_outcome_of_its_manifest(hostile: Path, folder: Path) -> None:
    """Each outcome within 5 s and 512 MiB, and the day's good containers stay readable."""
    for case in fixtures.hostile(folder):
        day = hostile / case.key.partition("/")[0]
        began = time.monotonic()
        shown = files_below(day)
        assert shown.pop("hello.txt").read_bytes() == b"hello world"
        if case.outcome == "reject":
            assert not shown, case.name
        for name in case.readable:
            assert len(shown[name].read_bytes()) == shown[name].stat().st_size, case.name
        for name in case.damaged:
            if name in shown:
                with pytest.raises(OSError, match="error") as caught:
                    shown[name].read_bytes()
                assert caught.value.errno == errno.EIO, case.name
        if case.outcome != "safe":
            assert any(case.key in line for line in problems_of(hostile)), case.name
        assert time.monotonic() - began < DAMAGED_S, case.name
    assert psutil.pid_exists(daemon_of(hostile))
    assert peak_rss(daemon_of(hostile)) < SMALL


def test_claims_beyond_all_measure_cost_neither_memory_nor_time(tmp_path: Path) -> None:
    """A million empty entries, names of 65,535 bytes or 30,000 levels of directories cost no more than 512 MiB and
    5 s."""
    store = tmp_path / "store"
    levels = b"/".join([b"d"] * 2000)
    monsters = {
        "2025-03-01": build(Item(b"%07d" % n, meta=b"") for n in range(1_000_000)),
        "2025-03-02": build([*(Item(b"x" * 65_000 + b"%05d" % n) for n in range(300)), Item(b"ok", b"fine")]),
        "2025-03-03": build([Item(b"/".join([b"d"] * 30_000)), Item(levels, b"deep"), Item(b"ok", b"fine")]),
    }
    for day, raw in monsters.items():
        (store / day).mkdir(parents=True)
        (store / day / "0.des").write_bytes(raw)
    with mounted(store, tmp_path / "mnt") as mount:
        began = time.monotonic()
        assert (mount / "2025-03-01/0123456").stat().st_size == 0
        with os.scandir(mount / "2025-03-01") as entries:
            assert len({entry.name for entry in itertools.islice(entries, 5000)}) == 5000
        assert os.listdir(mount / "2025-03-02") == ["ok"]
        assert (mount / "2025-03-02/ok").read_text() == "fine"
        assert sorted(os.listdir(mount / "2025-03-03")) == ["d", "ok"]
        assert (mount / "2025-03-03" / os.fsdecode(levels)).read_text() == "deep"
        assert time.monotonic() - began < 3 * DAMAGED_S  # of three containers
        assert peak_rss(daemon_of(mount)) < SMALL
