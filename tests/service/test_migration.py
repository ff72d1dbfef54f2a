"""docs/migration.md: its commands, in their order, on a bucket of containers that others have written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests import servers
from tests.mount.stores import upload

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/migration.md").read_text(encoding="utf-8")
VALID = ROOT / "tests/fixtures/valid"
STORE = "s3://old-bucket/archive"
# What the page takes from another program.
AWS = (
    'aws() { python -c \'import boto3, sys; bucket, key = sys.argv[2][5:].split("/", 1); '
    'boto3.client("s3").upload_file(sys.argv[1], bucket, key)\' "$3" "$4"; }'
)


def commands() -> list[str]:
    """Of all blocks of the page, a line each."""
    return [line.strip() for line in PAGE.splitlines() if line.startswith("    ")]


@pytest.mark.fuse
def test_the_commands_of_the_page_in_their_order(s3: servers.S3Server, bucket: str, tmp_path: Path) -> None:
    upload(s3, bucket, VALID, "archive/")
    for name in ("old/a", "photos", "spool", "lib"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "spool/new.txt").write_text("new")
    (tmp_path / "photos/1.jpg").write_text("jpg")
    (tmp_path / "old/a/1").write_text("1")
    os.utime(tmp_path / "old/a/1", (1_709_553_600, 1_709_553_600))  # 2024-03-04T12:00:00Z
    with tarfile.open(tmp_path / "old.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "old", ".")
    with zipfile.ZipFile(tmp_path / "old.zip", "w") as archive:
        archive.write(tmp_path / "old/a/1", "a/1")
    (layout,) = re.findall(r"^```json\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / "desfs.json").write_text(layout)
    days = sorted(json.loads((VALID.parent / "valid.json").read_text())["days"])
    environ = os.environ | s3.environ()
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
    output: dict[str, list[str]] = {}
    with servers.mount_point(tmp_path / "mnt"):
        for command in commands():
            here = command.replace(STORE, f"s3://{bucket}/archive")
            here = here.replace("/mnt/des", "mnt").replace("/var/spool/desfs", "spool").replace("/var/lib/desfs", "lib")
            done = subprocess.run(
                ["bash", "-c", f"{AWS}\n{here}"],
                cwd=tmp_path,
                env=environ,
                capture_output=True,
                text=True,
                timeout=100,
                check=False,
            )
            assert done.returncode == 0, (command, done.stdout, done.stderr)
            output.setdefault(command, []).append(done.stdout)
    before, after = output[f"desfs doctor {STORE}"]
    assert "no .desfs.json" in before
    assert "16 shards a day, placed by directory" in after
    listed, packed = output[f"desfs ls {STORE}"]
    assert listed.split() == output["ls /mnt/des"][0].split() == days
    assert packed.split()[: len(days)] == days
    assert len(packed.split()) == len(days) + 1
    assert "entries have no checksum" in output[f"desfs verify {STORE}"][0]
    assert output[f"desfs ls -R {STORE} 2024-03-05"][0].split() == [
        f"2024-03-05/{name}" for name in ("1.jpg", "a", "a/1")
    ]
    adopted, imported = output[f"desfs verify {STORE} --catalog /var/lib/desfs/catalog.sqlite --repair"]
    assert adopted.startswith("repaired: 25 containers adopted, 0 objects deleted")
    assert "0 objects deleted" in imported
    (agree,) = output[f"desfs verify {STORE} --catalog /var/lib/desfs/catalog.sqlite"]
    assert agree.endswith("no damage\n")
