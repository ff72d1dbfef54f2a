"""docs/operations.md, Mount: each option, through the command line, at a real S3 server."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.counting_proxy import CountingProxy
from tests.fakes.s3_front import S3Front, in_region
from tests.mount.mounting import desfs, mounted
from tests.mount.stores import put_sharded, upload
from tests.servers import REGION, MountPoint, S3Server

pytestmark = pytest.mark.fuse

DAY = "2026-11-20"
FILES = {f"d{n % 3}/f{n:03}": bytes([n]) * 5000 for n in range(60)}


@pytest.fixture(scope="module")
def store(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("store")
    put_sharded(folder, DAY, FILES)
    bucket = s3.new_bucket("options")
    try:
        upload(s3, bucket, folder)
        yield f"s3://{bucket}"
    finally:
        s3.delete_bucket(bucket)


def read_all(place: Path) -> None:
    for name, data in FILES.items():
        assert (place / DAY / name).read_bytes() == data


def test_a_profile(s3: S3Server, store: str, tmp_path: Path) -> None:
    """`profile=`: the credentials and the endpoint of a profile of the AWS files."""
    (tmp_path / "credentials").write_text(
        f"[other]\naws_access_key_id = {s3.access_key}\naws_secret_access_key = {s3.secret_key}\n"
    )
    env = {
        name: value
        for name, value in s3.environ().items()
        if name not in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    }
    env |= {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials")}
    with mounted(store, tmp_path / "mnt", "profile=other", env=env) as place:
        read_all(place)
    assert desfs("ls", store, "--profile", "other", env=env).stdout == f"{DAY}\n"
    done = desfs("ls", store, "--profile", "missing", env=env)
    assert done.returncode != 0
    assert "missing" in done.stderr


def test_endpoint_region_and_style(s3: S3Server, store: str, tmp_path: Path) -> None:
    """`endpoint_url=`, `region=` and `addressing_style=` win over the environment."""
    env = {**s3.environ(), "AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_REGION": "mars-1"}
    options = f"endpoint_url={s3.endpoint_url},region={REGION},addressing_style=path"
    with mounted(store, tmp_path / "mnt", options, env=env) as place:
        read_all(place)
    words = ("--endpoint-url", s3.endpoint_url, "--region", REGION, "--addressing-style", "path")
    assert desfs("ls", store, *words, env=env).stdout == f"{DAY}\n"
    done = desfs("ls", store, *words[:-1], "diagonal", env=env)
    assert done.returncode == 2
    assert "--addressing-style" in done.stderr


def test_a_redirect_to_nowhere_is_an_error_and_no_endless_question(
    s3: S3Server, store: str, mount_dir: MountPoint
) -> None:
    """A server that says "elsewhere" and not where: botocore asks it again and again (seen with 1.44)."""
    with S3Front(s3.host, s3.port, in_region("eu-west-7", status=301, names_it=False)) as front:
        done = desfs("mount", store, mount_dir.path, env=s3.environ(endpoint_url=front.url))
        assert done.returncode == 32
        assert "redirected, without a word where to" in done.stderr


def test_a_certificate_of_our_own(s3: S3Server, store: str, certificate: Path, tmp_path: Path) -> None:
    """`ca_bundle=`: a file of certificates to trust."""
    bundle = certificate.with_name("ca")
    with S3Front(s3.host, s3.port, certificate=certificate) as front:
        env = s3.environ(endpoint_url=front.url)
        with mounted(store, tmp_path / "mnt", f"ca_bundle={bundle}", env=env) as place:
            read_all(place)
        assert desfs("ls", store, "--ca-bundle", bundle, env=env).stdout == f"{DAY}\n"
        done = desfs("ls", store, "--deadline", "1", env=env)
        assert done.returncode == 1
        assert "certificate" in done.stderr.lower()


def test_unsigned_requests(s3: S3Server, store: str, mount_dir: MountPoint) -> None:
    """`no_sign_request`: no credentials are looked for, and none are sent. This server has no public buckets."""
    with CountingProxy(s3.host, s3.port) as proxy:
        env = s3.environ(endpoint_url=proxy.url)
        done = desfs("mount", store, mount_dir.path, "-o", "no_sign_request,deadline=2", env=env)
        assert done.returncode == 32
        assert proxy.requests
        assert not [request for request in proxy.requests if "authorization" in request.headers]
        assert desfs("ls", store, "--no-sign-request", "--deadline", "2", env=env).returncode == 1
        assert not [request for request in proxy.requests if "authorization" in request.headers]


def test_what_is_fetched_besides(s3: S3Server, store: str, tmp_path: Path) -> None:
    """`max_gap=` and `max_prefetch=`: what nobody wants, and what nobody wants yet."""
    with mounted(store, tmp_path / "mnt", "max_gap=0,max_prefetch=0", env=s3.environ()) as place:
        shown = json.loads((place / ".desfs" / "config").read_bytes())
        assert (shown["max_gap"], shown["max_prefetch"]) == (0, 0)
        read_all(place)


def test_log_lines_of_a_command(s3: S3Server, store: str, tmp_path: Path) -> None:
    """`--log-level`, `--log-format` and `--log-file`: where the log goes, and how it looks."""
    log = tmp_path / "the.log"
    words = ("--log-level", "debug", "--log-format", "json", "--log-file", log)
    done = desfs("cat", store, f"{DAY}/{next(iter(FILES))}", *words, env=s3.environ() | {"DESFS_REFESH": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    for line in log.read_text().splitlines():
        assert "event" in json.loads(line)
    done = desfs("ls", store, "--log-file", tmp_path / "missing" / "log", env=s3.environ())
    assert done.returncode == 2
    assert os.fspath(tmp_path / "missing" / "log") in done.stderr


def test_completion_knows_commands_and_options() -> None:
    """README.md: shell completion. The script asks the program."""
    script = desfs(env={"_DESFS_COMPLETE": "source_bash"}).stdout
    assert "_DESFS_COMPLETE=complete_bash" in script
    env = {"_DESFS_COMPLETE": "complete_bash", "COMP_WORDS": "desfs st", "COMP_CWORD": "1"}
    assert desfs(env=env).stdout.split() == ["stat", "status"]
    env |= {"COMP_WORDS": "desfs ls --re", "COMP_CWORD": "2"}
    assert desfs(env=env).stdout.split() == ["--recursive", "--region"]
