"""docs/metrics.md and what the daemons answer at /metrics, against the truth of a scripted run."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from random import Random

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests import metrics_page, servers
from tests.crash import PROGRAM
from tests.fakes.counting_proxy import CountingProxy
from tests.fakes.s3_front import Reply, Request, S3Front, refusal
from tests.mount.mounting import desfs, mount, mounted, wait_until
from tests.mount.stores import put_container, put_sharded, upload
from tests.servers import MountPoint, S3Server

DAY = "2026-11-20"
FILES = {f"d{n % 7}/f{n:03}": Random(n).randbytes(n * 20 + 1) for n in range(300)}

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(address: str) -> Series:
    """What /metrics answers: values by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text_of(address))
        for sample in family.samples
    }


def text_of(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as answer:
        text: str = answer.read().decode()
        return text


def total(series: Series, name: str, **labels: str) -> float:
    """The sum of the series with these labels among theirs."""
    return sum(
        value for (each, found), value in series.items() if each == name and labels.items() <= dict(found).items()
    )


@pytest.fixture
def address() -> str:
    (port,) = servers.free_ports(1)
    return f"{servers.HOST}:{port}"


@contextmanager
def running_packer(spool: Path, store: str, *options: object, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    command = [PROGRAM, "packer", "--spool", spool, "--store", store, *options]
    with subprocess.Popen(list(map(str, command)), env=os.environ | env, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_page_says_what_there_is() -> None:
    """docs/metrics.md: This page is made from the programs."""
    assert metrics_page.PAGE.read_text() == metrics_page.page()


def test_what_a_mount_counts_is_true(
    s3: S3Server, bucket: str, tmp_path: Path, mount_dir: MountPoint, address: str
) -> None:
    """Requests, bytes, files and indexes, against what a proxy before the server saw."""
    put_sharded(tmp_path / "store", DAY, FILES)
    upload(s3, bucket, tmp_path / "store")
    with CountingProxy(s3.host, s3.port) as proxy:
        mount(f"s3://{bucket}", mount_dir.path, f"metrics={address}", env=s3.environ(endpoint_url=proxy.url))
        for name, content in FILES.items():
            assert (mount_dir.path / DAY / name).read_bytes() == content
        wait_until(lambda: all(request.status for request in proxy.requests), "the last answer")
        found = scrape(address)
        gets = [request for request in proxy.requests if request.method == "GET" and "list-type" not in request.query]
        lists = [request for request in proxy.requests if "list-type" in request.query]
        assert total(found, "desfs_store_requests_total", operation="get") == len(gets)
        assert total(found, "desfs_store_requests_total", operation="list") == len(lists)
        assert total(found, "desfs_store_bytes_total", direction="received") == sum(
            request.response_length for request in gets
        )
        assert total(found, "desfs_store_first_byte_seconds_count") == len(gets)
        # Each file is pushed, or read, or on its way to be pushed while it is read.
        useful = total(found, "desfs_read_bytes_total")
        assert sum(map(len, FILES.values())) <= useful <= 2 * sum(map(len, FILES.values()))
        assert total(found, "desfs_index_loads_total", source="store") == total(found, "desfs_open_containers")
        assert total(found, "desfs_store_files_per_get_sum") >= len(FILES)
        for operation in ("lookup", "read"):
            assert total(found, "desfs_fuse_requests_total", operation=operation) == total(
                found, "desfs_fuse_request_seconds_count", operation=operation
            )
        assert total(found, "desfs_cache_limit_bytes", level="memory") == 256 * 1024 * 1024
        assert total(found, "desfs_fuse_open_requests") == total(found, "desfs_fuse_oldest_request_seconds") == 0
        assert total(found, "desfs_event_loop_silence_seconds") < 30
        assert total(found, "desfs_build_info", role="mount") == 1
        assert not [name for name, _ in found if name.startswith(("desfs_spool", "desfs_packed")) or "_created" in name]


def test_a_request_that_waits_is_seen(
    s3: S3Server, bucket: str, tmp_path: Path, mount_dir: MountPoint, address: str
) -> None:
    put_container(tmp_path / "store" / DAY / "0.des", {"f": b"content"})
    upload(s3, bucket, tmp_path / "store")
    with CountingProxy(s3.host, s3.port) as proxy:
        mount(f"s3://{bucket}", mount_dir.path, f"metrics={address}", env=s3.environ(endpoint_url=proxy.url))
        assert (mount_dir.path / DAY / "f").stat().st_size == 7
        proxy.delay_s = 3.0
        with subprocess.Popen(["cat", mount_dir.path / DAY / "f"], stdout=subprocess.DEVNULL) as reader:
            wait_until(lambda: total(scrape(address), "desfs_fuse_oldest_request_seconds") > 0.5, "the waiting request")
            assert total(scrape(address), "desfs_fuse_open_requests") >= 1
            assert reader.wait(60) == 0
        wait_until(lambda: total(scrape(address), "desfs_fuse_open_requests") == 0, "the answer to be counted")


def test_no_label_grows_with_days_shards_or_files(tmp_path: Path, mount_dir: MountPoint, address: str) -> None:
    """docs/metrics.md: No label has values that grow with days, shards, files or stores."""
    store = tmp_path / "store"
    days = [(date(2020, 1, 1) + timedelta(days=number)).isoformat() for number in range(1000)]
    for day in days:
        put_container(store / day / "a-000001-000001.des", {f"d/{day}": b"1"})
    put_sharded(store, DAY, {f"d{n}/f": b"2" for n in range(600)})
    mount(store, mount_dir.path, f"metrics={address}")

    def series_after(some: list[str]) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
        for day in some:
            for path in (mount_dir.path / day).rglob("*"):
                if path.is_file():
                    path.read_bytes()
        return set(scrape(address))

    few = series_after(days[:3])
    assert series_after([*days, DAY]) == few
    assert total(scrape(address), "desfs_open_containers") >= 1000


def test_what_a_packer_counts_is_true(s3: S3Server, bucket: str, tmp_path: Path, address: str) -> None:
    """Files, bytes, containers and what was put aside; and an age that grows while the store is away."""
    spool = tmp_path / "spool"
    for name, content in FILES.items():
        (spool / name).parent.mkdir(parents=True, exist_ok=True)
        (spool / name).write_bytes(content)
    (spool / "pipe").symlink_to("nowhere")
    is_away = threading.Event()

    def weather(request: Request, answer: Callable[[], Reply]) -> Reply:
        return refusal(503, "ServiceUnavailable") if is_away.is_set() else answer()

    options = ("--metrics", address, "--settle", "0.2", "--max-age", "0.2", "--scan-interval", "0.1")
    with (
        S3Front(s3.host, s3.port, weather) as front,
        running_packer(
            spool, f"s3://{bucket}", *options, "--deadline", "1", env=s3.environ(endpoint_url=front.url)
        ) as packer,
    ):
        wait_until(lambda: answers(address), "the packer")
        wait_until(lambda: total(scrape(address), "desfs_packed_files_total") == len(FILES), "the files")
        wait_until(lambda: total(scrape(address), "desfs_spool_files") == 0, "the empty spool")
        found = scrape(address)
        assert total(found, "desfs_packed_bytes_total") == sum(map(len, FILES.values()))
        objects = s3.client().list_objects_v2(Bucket=bucket)["Contents"]
        containers = [each for each in objects if each["Key"].endswith(".des")]
        assert total(found, "desfs_packed_containers_total") == len(containers)
        assert total(found, "desfs_store_bytes_total", direction="sent") == sum(each["Size"] for each in objects)
        assert total(found, "desfs_rejected_files_total") == 1
        assert total(found, "desfs_shard_leases_total", outcome="acquired") >= 1
        assert total(found, "desfs_publish_seconds_count") >= 1
        assert total(found, "desfs_last_publish_timestamp_seconds") > 1.7e9
        assert total(found, "desfs_spool_oldest_file_seconds") == 0
        assert total(found, "desfs_build_info", role="packer") == 1
        assert not [name for name, _ in found if name.startswith("desfs_fuse")]
        is_away.set()
        (spool / "late").write_bytes(b"late")
        wait_until(lambda: total(scrape(address), "desfs_publish_failures_total", reason="store") > 0, "the failure")
        assert total(scrape(address), "desfs_spool_oldest_file_seconds") > 1
        assert total(scrape(address), "desfs_spool_files") == 1
        is_away.clear()
        wait_until(lambda: total(scrape(address), "desfs_packed_files_total") == len(FILES) + 1, "the late file")
        packer.send_signal(signal.SIGTERM)
        assert packer.wait(60) == 0


def answers(address: str) -> bool:
    try:
        return bool(text_of(address))
    except OSError:
        return False


def test_an_address_that_is_taken_or_none_is_named(tmp_path: Path, mount_dir: MountPoint, address: str) -> None:
    put_container(tmp_path / "store" / DAY / "0.des", {"f": b"content"})
    with mounted(tmp_path / "store", tmp_path / "other", f"metrics={address}"):
        done = desfs("mount", tmp_path / "store", mount_dir.path, "-o", f"metrics={address}")
        assert done.returncode == 32
        assert done.stderr == f"desfs: cannot listen on {address} for metrics: Address already in use\n"
    done = desfs("mount", tmp_path / "store", mount_dir.path, "-o", "metrics=here")
    assert done.returncode == 2
    assert "mount option metrics: 'here' is no address: want HOST:PORT" in done.stderr


def test_promtool_finds_nothing_to_say(tmp_path: Path, mount_dir: MountPoint, address: str) -> None:
    """The conventions of Prometheus, by its own tool."""
    put_container(tmp_path / "store" / DAY / "0.des", {"f": b"content"})
    mount(tmp_path / "store", mount_dir.path, f"metrics={address}")
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=text_of(address),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_waits_is_known_while_the_catalog_is_away(
    postgres_session: servers.PostgresServer, tmp_path: Path, address: str
) -> None:
    """Files that come while the database is down are counted, and their age grows: the alarms depend on it."""
    spool = tmp_path / "spool"
    spool.mkdir()
    database = postgres_session.new_database("catalog")
    options = ("--metrics", address, "--settle", "0", "--max-age", "0", "--scan-interval", "0.1", "--lease-ttl", "5")
    try:
        with running_packer(
            spool, str(tmp_path / "store"), *options, env={"DESFS_CATALOG": postgres_session.url(database)}
        ):
            wait_until(lambda: answers(address), "the packer")
            (spool / "first").write_bytes(b"1")
            wait_until(lambda: total(scrape(address), "desfs_publish_seconds_count") == 1, "the first batch")
            published = total(scrape(address), "desfs_last_publish_timestamp_seconds")
            postgres_session.stop()
            try:
                for name in ("a", "b", "c"):
                    (spool / name).write_bytes(b"22")
                wait_until(lambda: total(scrape(address), "desfs_spool_files") == 3, "the files that wait")
                wait_until(
                    lambda: total(scrape(address), "desfs_publish_failures_total", reason="catalog"), "a failure"
                )
                assert total(scrape(address), "desfs_spool_bytes") == 6
                wait_until(lambda: total(scrape(address), "desfs_spool_oldest_file_seconds") > 1, "their age")
                assert total(scrape(address), "desfs_last_publish_timestamp_seconds") == published
            finally:
                postgres_session.start()
            wait_until(lambda: total(scrape(address), "desfs_last_publish_timestamp_seconds") > published, "a batch")
            wait_until(lambda: total(scrape(address), "desfs_packed_files_total") == 4, "the files")
    finally:
        postgres_session.drop_database(database)
