"""The packer and the S3 server: requests counted there, and what it stores read from there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from desfs.store import open_store
from desfs.store.base import S3Options
from tests import servers
from tests.crash import PROGRAM, Shown, catalog_rows, spool_files, unfinished
from tests.fakes.counting_proxy import CountingProxy

pytestmark = pytest.mark.s3


def once(spool: Path, url: str, environ: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(PROGRAM), "packer", "--once", "--spool", str(spool), "--store", url, "--settle", "0", *options]
    return subprocess.run(
        command,
        env=os.environ | environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def shown(url: str, server: servers.S3Server, monkeypatch: pytest.MonkeyPatch) -> Shown:
    for name, value in server.environ().items():
        monkeypatch.setenv(name, value)
    store = open_store(url, S3Options(endpoint_url=server.endpoint_url))
    try:
        return Shown.of(store)
    finally:
        store.close()


def test_ten_thousand_files_in_sixteen_shards(
    s3: servers.S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10,000 files into S3 with 16 shards take at most 16 + 5 PUTs, counted at the server; all are there,
    and the spool is empty."""
    spool = tmp_path / "spool"
    written = {f"folder {index % 100}/{index}": b"%d" % index * (index % 50) for index in range(10_000)}
    for number in range(100):
        (spool / f"folder {number}").mkdir(parents=True)
    for path, content in written.items():
        (spool / path).write_bytes(content)
    url = f"s3://{bucket}/some/prefix"
    with CountingProxy(s3.host, s3.port) as proxy:
        done = once(spool, url, s3.environ(endpoint_url=proxy.url), "--shard-bits", "4")
        assert done.returncode == 0, done.stderr
        puts = proxy.count(method="PUT") + proxy.count(method="POST")
        assert puts <= 16 + 5
        assert len(proxy.requests) <= 16 + 10  # the rest lists
    assert done.stdout == (
        f"packed 10000 files ({sum(map(len, written.values()))} bytes) into 16 containers with {puts} PUTs\n"
    )
    found = shown(url, s3, monkeypatch)
    assert found.contents == written
    rows = catalog_rows(spool)
    assert {key: (info.size, info.etag) for key, info in found.containers.items()} == {
        key: (row.size, row.etag) for key, row in rows.items()
    }
    assert spool_files(spool) == unfinished(spool) == []


def test_a_second_packer_run_goes_on_where_the_first_ended(
    s3: servers.S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newer versions win, other files stay, external ones too; two spools on one bucket share its layout and do not
    write over each other."""
    url = f"s3://{bucket}"
    for round_ in range(2):
        for name in ("one", "two"):
            spool = tmp_path / name
            spool.mkdir(exist_ok=True)
            (spool / "d").mkdir()
            (spool / f"d/{name}").write_bytes(b"%d" % round_)
            (spool / f"d/{name}-{round_}").write_bytes(b"small")
            (spool / f"d/{name}-big").write_bytes(b"%d" % round_ * 6_000)
            options = ("--big-file-threshold", "4K", "--node-id", str(len(name) + (name == "two")))
            done = once(spool, url, s3.environ(), *options)
            assert done.returncode == 0, done.stderr
            assert spool_files(spool) == unfinished(spool) == []
    expected: dict[str, bytes] = {}
    for name in ("one", "two"):
        expected |= {f"d/{name}": b"1", f"d/{name}-0": b"small", f"d/{name}-1": b"small", f"d/{name}-big": b"1" * 6_000}
    found = shown(url, s3, monkeypatch)
    assert found.contents == expected
    assert len(found.containers) == 4
    assert len(found.external) == 4


@pytest.mark.parametrize(
    ("bucket_name", "environ", "message"),
    [
        ("no-such-bucket-here", {}, "no-such-bucket-here"),
        (None, {"AWS_SECRET_ACCESS_KEY": "wrong"}, "refused"),
        (None, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "127.0.0.1:9"),
    ],
    ids=["missing bucket", "wrong credentials", "nobody listens"],
)
def test_a_store_that_cannot_be_reached(
    s3: servers.S3Server,
    bucket: str,
    tmp_path: Path,
    bucket_name: str | None,
    environ: dict[str, str],
    message: str,
) -> None:
    """Exit status 1 and a line that names the cause; the files stay in the spool."""
    spool = tmp_path / "spool"
    spool.mkdir()
    (spool / "a").write_bytes(b"a")
    url = f"s3://{bucket_name or bucket}"
    done = once(spool, url, s3.environ() | environ, "--deadline", "1")
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("desfs: ")
    if message != "refused":
        assert message in last
    assert "Traceback" not in done.stderr
    assert spool_files(spool) == ["a"]
