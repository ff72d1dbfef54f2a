"""`desfs doctor` on set-ups that are good and on such that are broken, each in its own way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from desfs.cli.doctor import run
from desfs.doctor.finding import Budget, Finding, State
from desfs.doctor.place import check_directory, check_directory_store, check_redis
from desfs.doctor.s3 import check_s3
from desfs.settings import MountSettings, StoreSettings
from tests import servers
from tests.fakes.s3_front import (
    Reply,
    Rule,
    S3Front,
    answering,
    clock_ahead,
    in_region,
    losing_puts,
    too_skewed,
    without_conditional_put,
    without_if_match,
    without_permission,
    without_ranges,
)
from tests.mount.mounting import PATIENCE_S, PROGRAM, daemon_of, desfs, mount, wait_until
from tests.mount.stores import put_container, put_layout, put_sharded, upload
from tests.servers import MountPoint, RedisServer, S3Server

DAY = "2026-11-20"
HOUR_S = 3600.0
EACH_S = 5.0
NOBODY = "redis://127.0.0.1:1"  # a port that no Redis listens on: it is root's
# No rights but to look into root's directories: Python itself may be in one.
AS_NOBODY = [
    *("setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search", "--"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("doctor")
    put_sharded(root, DAY, {f"f{number}": b"content" for number in range(3)})
    return root


@pytest.fixture
def aws(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The environment of somebody who uses the run's S3 server."""
    for name, value in s3.environ().items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.fixture(scope="module")
def shelf(s3: S3Server, folder: Path) -> Iterator[str]:
    """A bucket that is as the tests found it when they are over."""
    bucket = s3.new_bucket("doctor")
    upload(s3, bucket, folder, "some/prefix/")
    yield bucket
    s3.delete_bucket(bucket)


@pytest.fixture
def url(aws: S3Server, shelf: str) -> Iterator[str]:
    """The store in it. Nothing is left behind there."""
    yield f"s3://{shelf}/some/prefix"
    left = aws.client().list_objects_v2(Bucket=shelf, Prefix="some/prefix/.desfs-doctor-").get("Contents", [])
    assert left == []


def check(url: str, *, write: bool = False, each_s: float = EACH_S, **settings: Any) -> dict[str, Finding]:
    """What the store's checks find, by their names; none comes twice, and each that is not well says what to do."""
    found = list(check_s3(url, StoreSettings(**settings), Budget(each_s, 13.0), write=write))
    assert len({finding.check for finding in found}) == len(found)
    for finding in found:
        assert bool(finding.remedy) == (finding.state in (State.WARNING, State.ERROR)), finding
    return {finding.check: finding for finding in found}


@contextlib.contextmanager
def fronted(server: S3Server, *rules: Rule, **more: Any) -> Iterator[S3Front]:
    with S3Front(server.host, server.port, *rules, **more) as front:
        yield front


def states(found: Mapping[str, Finding], *names: str) -> set[State]:
    return {found[name].state for name in names or found}


def doctor(
    *arguments: object, before: str = "true", prefix: list[str] | None = None, env: Mapping[str, str] | None = None
) -> tuple[int, dict[str, dict[str, str]]]:
    """The status of the command, and its findings, with mounts of its own, which the shell commands `before` make."""
    command = [*(prefix or []), str(PROGRAM), "doctor", "--json", *map(str, arguments)]
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-euc", f'{before}; exec "$@"', "sh", *command],
        env=os.environ | (env or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.stderr == ""
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == any(each["state"] == "error" for each in found)
    return done.returncode, {each["check"]: each for each in found}


def assert_error(found: Mapping[str, dict[str, str]], name: str, said: str, remedy: str, state: str = "error") -> None:
    assert found[name]["state"] == state
    assert said in found[name]["found"]
    assert remedy in found[name]["remedy"]


# --- a good set-up -----------------------------------------------------------------------------------------------


@pytest.mark.fuse
def test_a_good_set_up_says_what_will_be_used(url: str, redis: RedisServer, tmp_path: Path) -> None:
    """On a good one it says what will be used: the versions, levers, caches, the way to the store; exit status 0."""
    (tmp_path / "mnt").mkdir()
    (tmp_path / "cache").mkdir(mode=0o700)
    env = {"DESFS_CACHE_DIR": str(tmp_path / "cache"), "DESFS_CACHE_SIZE": "1M", "DESFS_REDIS": redis.url}
    status, found = doctor("--write", url, tmp_path / "mnt", env=env)
    assert status == 0
    assert {name: each for name, each in found.items() if each["state"] != "ok"} == {}
    said = {name: each["found"] for name, each in found.items()}
    version = subprocess.run(["fusermount3", "--version"], capture_output=True, text=True, check=True).stdout.split()[
        -1
    ]
    assert said["libfuse"].startswith(version)
    assert "pyfuse3" in said["libfuse"]
    assert said["levers"].startswith("loaded and bound")
    assert said["trial mount"] == "mounted and unmounted"
    assert f"{tmp_path / 'cache'}: up to 1.0 MiB" in said["cache_dir"]
    assert said["redis"].endswith("answers")
    assert "AWS_ACCESS_KEY_ID" in said["credentials"]
    assert said["layout"].startswith("256 shards a day, placed by directory")
    assert said["days"] == f"1 day, {DAY} to {DAY}"
    assert "honoured" in said["get"]
    assert "honoured" in said["If-Match"]
    assert "honoured" in said["If-None-Match"]
    assert "root alone" in said["users"]
    assert os.listdir(tmp_path / "cache") == []
    assert os.listdir(tmp_path / "mnt") == []


def test_nothing_is_left_in_the_store_and_no_secret_is_shown(aws: S3Server, bucket: str) -> None:
    """An empty bucket is tried with the object that --write makes."""
    found = check(f"s3://{bucket}", write=True)
    assert states(found, "put", "If-None-Match", "get", "If-Match", "delete") == {State.OK}
    assert found["days"].state is State.WARNING
    assert "Contents" not in aws.client().list_objects_v2(Bucket=bucket)
    assert not any(aws.secret_key in finding.found for finding in found.values())


def test_without_write_nothing_is_written(aws: S3Server, url: str) -> None:
    with fronted(aws) as front:
        found = check(url, endpoint_url=front.url)
        assert states(found) == {State.OK}
        assert {request.method for request in front.requests} == {"GET"}
        assert "put" not in found


def test_a_store_in_a_directory(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    for write in (False, True):
        found = list(check_directory_store(str(folder), StoreSettings(), Budget(EACH_S, 60.0), write=write))
        names = ["store", "list", "layout", "days", *(("put", "If-None-Match") if write else ()), "get"]
        assert [finding.check for finding in found] == [*names, *(("delete",) if write else ())]
        assert {finding.state for finding in found} == {State.OK}
    assert sorted(folder.rglob("*")) == before


def test_what_makes_no_sense_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    for options, write in (({}, True), ({"addressing_style": "x"}, False), ({"deadline": "0"}, False)):
        assert run(None, None, options, write=write, json=False) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("desfs: --")


# --- a broken machine --------------------------------------------------------------------------------------------

# Nothing in /dev but what every program needs.
EMPTY_DEV = (
    "mount -t tmpfs dev /dev; for each in null:3 zero:5 urandom:9; do mknod -m 666 /dev/${each%:*} c 1 ${each#*:}; done"
)
OPEN_DEVICE = "mknod -m 666 {0}/fuse c 10 229; mount --bind {0}/fuse /dev/fuse"


@pytest.mark.fuse
def test_root_in_a_container_that_may_not_mount() -> None:
    drop = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", "--"]
    _, found = doctor(prefix=drop)
    assert_error(found, "trial mount", "not permitted", "--cap-add SYS_ADMIN")


@pytest.mark.fuse
@pytest.mark.parametrize("wanted", ["false", "true"])
def test_a_user_without_a_line_in_fuse_conf(tmp_path: Path, wanted: str) -> None:
    """A warning; an error for somebody whose settings have allow_other, and then the trial says what libfuse says."""
    (tmp_path / "fuse.conf").write_text("#user_allow_other\nmount_max = 100\n")
    before = f"{OPEN_DEVICE.format(tmp_path)}; mount --bind {tmp_path}/fuse.conf /etc/fuse.conf"
    env = {"DESFS_ALLOW_OTHER": wanted, "HOME": str(tmp_path)}
    _, found = doctor(before=before, prefix=AS_NOBODY, env=env)
    state = "error" if wanted == "true" else "warning"
    remedy = "echo user_allow_other >> /etc/fuse.conf"
    assert_error(found, "fuse.conf", "no line user_allow_other", remedy, state)
    assert found["fuse device"]["state"] == "ok"
    if wanted == "true":
        assert_error(found, "trial mount", "user_allow_other", remedy)
    else:
        assert found["trial mount"]["found"] == "mounted and unmounted by fusermount3"


@pytest.mark.fuse
def test_a_user_with_all_that_is_needed(tmp_path: Path) -> None:
    (tmp_path / "fuse.conf").write_text("user_allow_other\n")
    before = f"{OPEN_DEVICE.format(tmp_path)}; mount --bind {tmp_path}/fuse.conf /etc/fuse.conf"
    env = {"DESFS_ALLOW_OTHER": "true", "HOME": str(tmp_path)}
    status, found = doctor(before=before, prefix=AS_NOBODY, env=env)
    assert status == 0
    for name in ("fuse device", "fusermount3", "fuse.conf", "trial mount", "levers"):
        assert found[name]["state"] == "ok", found[name]


@pytest.mark.fuse
def test_a_user_who_may_not_open_the_device_and_has_no_helper(tmp_path: Path) -> None:
    """Each cause has its own line."""
    (tmp_path / "fusermount3").write_bytes(Path("/usr/bin/fusermount3").read_bytes())
    (tmp_path / "fusermount3").chmod(0o755)
    before = (
        f"mknod -m 600 {tmp_path}/fuse c 10 229; mount --bind {tmp_path}/fuse /dev/fuse; "
        f"mount --bind {tmp_path}/fusermount3 /usr/bin/fusermount3"
    )
    _, found = doctor(before=before, prefix=AS_NOBODY, env={"HOME": str(tmp_path)})
    assert_error(found, "fuse device", "may not be opened by uid 65534", "chmod 666 /dev/fuse")
    assert_error(found, "fusermount3", "not set-uid root", "chmod 4755")


def test_settings_that_cannot_be_read_are_a_finding(tmp_path: Path) -> None:
    """The machine is looked at all the same, and what needs the settings is skipped; people read lines."""
    done = desfs("doctor", "s3://bucket", tmp_path, env={"DESFS_MEMORY": "much"})
    assert (done.returncode, done.stderr) == (1, "")
    first, remedy, *lines, last = done.stdout.splitlines()
    assert first.startswith("error    settings        DESFS_MEMORY in the environment: ")
    assert remedy.strip() == "-> correct it, or unset it"
    assert any(line.startswith("ok       fuse device ") for line in lines)
    for name in ("store", "mount point"):
        assert any(line.startswith(f"skipped  {name:14}") for line in lines), name
    assert last == "1 error, 0 warnings, 2 skipped"


# --- a wrong endpoint --------------------------------------------------------------------------------------------


def test_a_name_that_does_not_resolve(aws: S3Server) -> None:
    found = check("s3://bucket", endpoint_url="http://no-such-host.invalid")
    assert found["endpoint"].state is State.ERROR
    assert "no-such-host.invalid" in found["endpoint"].found
    assert "getent hosts" in found["endpoint"].remedy
    assert "accepted" not in found["credentials"].found
    assert states(found, "connection", "S3", "clock", "bucket", "list", "get") == {State.SKIPPED}


def test_a_port_that_nobody_listens_on(aws: S3Server) -> None:
    with socket.create_server((servers.HOST, 0)) as probe:
        port = probe.getsockname()[1]
    found = check("s3://bucket", endpoint_url=f"http://{servers.HOST}:{port}", write=True)
    assert found["connection"].state is State.ERROR
    assert "refused" in found["connection"].found
    assert str(port) in found["connection"].found
    assert "put" in found


def test_a_server_that_never_answers(aws: S3Server) -> None:
    with socket.create_server((servers.HOST, 0), backlog=64) as silent:
        endpoint = f"http://{servers.HOST}:{silent.getsockname()[1]}"
        found = check("s3://bucket", endpoint_url=endpoint, each_s=1.0)
    assert found["connection"].state is State.OK
    assert found["S3"].state is State.ERROR
    assert "no answer" in found["S3"].found


PAGE = Reply(200, {"content-type": "text/html"}, b"<html><title>Console</title></html>")


@pytest.mark.parametrize("page", [PAGE, Reply(404, {"content-type": "text/plain"}, b"404 page not found")])
def test_something_else_than_s3(aws: S3Server, page: Reply) -> None:
    with fronted(aws, answering(page)) as front:
        found = check("s3://bucket", endpoint_url=front.url)
    assert found["S3"].state is State.ERROR
    assert f"no S3 server: it answers with status {page.status}" in found["S3"].found
    assert "endpoint" in found["S3"].remedy


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that signed itself, with its key."""
    path = tmp_path_factory.mktemp("tls")
    words = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=x "
        "-addext subjectAltName=IP:127.0.0.1 -keyout key -out cert"
    )
    subprocess.run(words.split(), cwd=path, check=True, timeout=PATIENCE_S, stderr=subprocess.DEVNULL)
    (path / "both").write_bytes((path / "key").read_bytes() + (path / "cert").read_bytes())
    return path


def test_a_certificate_that_is_not_trusted(aws: S3Server, url: str, certificate: Path) -> None:
    with fronted(aws, certificate=certificate / "both") as front:
        found = check(url, endpoint_url=front.url)
        assert found["S3"].state is State.ERROR
        assert "self-signed certificate" in found["S3"].found
        assert "ca_bundle" in found["S3"].remedy
        found = check(url, endpoint_url=front.url, ca_bundle=str(certificate / "cert"))
        assert states(found) == {State.OK}


def test_http_to_a_server_that_speaks_tls_and_the_other_way_round(aws: S3Server, certificate: Path) -> None:
    with fronted(aws, certificate=certificate / "both") as front:
        found = check("s3://bucket", endpoint_url=front.url.replace("https", "http"))
        assert found["S3"].state is State.ERROR
        assert "https://" in found["S3"].remedy
    found = check("s3://bucket", endpoint_url=aws.endpoint_url.replace("http", "https"))
    assert found["S3"].state is State.ERROR
    assert "does not speak TLS" in found["S3"].found
    assert "http://" in found["S3"].remedy


def test_settings_of_s3_that_make_no_sense(aws: S3Server) -> None:
    wrong: list[dict[str, Any]] = [{"endpoint_url": "no url"}, {"ca_bundle": "/nothing/here"}, {"profile": "nobody"}]
    for settings in wrong:
        assert check("s3://bucket", **settings)["store"].state is State.ERROR
    assert "credentials" in check("s3://key:secret@bucket")["store"].found
    assert "secret" not in check("s3://key:secret@bucket")["store"].found


# --- a server that refuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 400])
def test_a_wrong_region_that_the_server_names(aws: S3Server, url: str, status: int) -> None:
    """The bucket is somewhere else: it works by a redirect, and the right region is said."""
    with fronted(aws, in_region("eu-central-1", status=status)) as front:
        found = check(url, endpoint_url=front.url)
        assert found["region"].state is State.WARNING
        assert "us-east-1" in found["region"].found
        assert "eu-central-1" in found["region"].found
        assert "region=eu-central-1" in found["region"].remedy
        assert states(found, "bucket", "list", "get", "If-Match") == {State.OK}
        assert states(check(url, endpoint_url=front.url, region="eu-central-1")) == {State.OK}


@pytest.mark.parametrize("status", [301, 400])
def test_a_wrong_region_that_the_server_does_not_name(aws: S3Server, url: str, status: int) -> None:
    with fronted(aws, in_region("eu-central-1", status=status, names_it=False)) as front:
        found = check(url, endpoint_url=front.url)
    assert found["region"].state is State.ERROR
    assert "us-east-1" in found["region"].found
    assert "region=" in found["region"].remedy
    assert states(found, "list", "get") == {State.SKIPPED}


def test_a_clock_that_is_an_hour_off(aws: S3Server, url: str) -> None:
    """Whether the server says so by its Date alone, or refuses what is signed."""
    with fronted(aws, clock_ahead(-HOUR_S)) as front:
        found = check(url, endpoint_url=front.url)
    assert found["clock"].state is State.ERROR
    assert "60 minutes ahead of the server's" in found["clock"].found
    assert "chrony" in found["clock"].remedy
    with fronted(aws, too_skewed(HOUR_S)) as front:
        found = check(url, endpoint_url=front.url)
    assert found["clock"].state is State.ERROR
    assert "60 minutes behind the server's" in found["clock"].found
    assert "refused" in found["clock"].found
    assert found["list"] == Finding("list", State.SKIPPED, "see clock")


def test_no_permission_to_list(aws: S3Server, shelf: str, url: str) -> None:
    """What does not need it is tried all the same, and what was answered says that the rest is well."""
    with fronted(aws, without_permission("list")) as front:
        found = check(url, endpoint_url=front.url, write=True)
    assert found["list"].state is State.ERROR
    assert f"s3:ListBucket on arn:aws:s3:::{shelf}" in found["list"].remedy
    assert "accepted" in found["credentials"].found
    well = ("S3", "clock", "credentials", "region", "bucket", "get", "If-Match", "put", "If-None-Match", "delete")
    assert states(found, *well) == {State.OK}
    with fronted(aws, without_permission("list", "get")) as front:
        found = check(url, endpoint_url=front.url)
    assert states(found, "list", "get") == {State.ERROR}
    assert "or it does not exist" in found["get"].found


def test_no_permission_to_get(aws: S3Server, url: str) -> None:
    with fronted(aws, without_permission("get")) as front:
        found = check(url, endpoint_url=front.url)
    assert found["list"].state is State.OK
    assert states(found, "get", "layout") == {State.ERROR}
    assert "s3:GetObject" in found["get"].remedy


def test_no_permission_to_put_or_delete(aws: S3Server, bucket: str) -> None:
    with fronted(aws, without_permission("put")) as front:
        found = check(f"s3://{bucket}/p", endpoint_url=front.url, write=True)
        assert "delete" not in {request.operation for request in front.requests}
    assert found["put"].state is State.ERROR
    assert "s3:PutObject" in found["put"].remedy
    assert states(found, "If-None-Match", "delete") == {State.SKIPPED}
    with fronted(aws, without_permission("delete")) as front:
        found = check(f"s3://{bucket}/p", endpoint_url=front.url, write=True)
    assert found["delete"].state is State.WARNING
    (left,) = aws.client().list_objects_v2(Bucket=bucket, Prefix="p/.desfs-doctor-")["Contents"]
    assert left["Key"].rpartition("/")[2] in found["delete"].remedy


def test_no_conditional_put(aws: S3Server, url: str) -> None:
    """Said with what it means for packers, whether it is ignored or refused; the object goes all the same."""
    with fronted(aws, without_conditional_put()) as front:
        found = check(url, endpoint_url=front.url, write=True)
    assert found["If-None-Match"].state is State.ERROR
    assert "overwrite" in found["If-None-Match"].found
    assert "one packer" in found["If-None-Match"].remedy
    with fronted(aws, without_conditional_put(status=501)) as front:
        found = check(url, endpoint_url=front.url, write=True)
    assert found["If-None-Match"].state is State.ERROR
    assert "lacks conditional writes" in found["If-None-Match"].found


def test_an_object_goes_whose_answer_was_lost(aws: S3Server, url: str) -> None:
    with fronted(aws, losing_puts) as front:
        found = check(url, endpoint_url=front.url, write=True)
        assert [request.operation for request in front.requests if request.method != "GET"] == ["put", "delete"]
    assert (found["put"].state, found["delete"].state) == (State.ERROR, State.OK)


def test_gets_that_are_not_what_was_asked_for(aws: S3Server, url: str) -> None:
    with fronted(aws, without_if_match) as front:
        found = check(url, endpoint_url=front.url)
    assert found["If-Match"].state is State.WARNING
    with fronted(aws, without_ranges) as front:
        found = check(url, endpoint_url=front.url)
    assert found["get"].state is State.ERROR
    assert "Range" in found["get"].remedy


def test_credentials_that_are_missing_or_wrong(
    aws: S3Server, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    found = check(url)
    assert found["credentials"].state is State.ERROR
    assert "AWS_SECRET_ACCESS_KEY" in found["credentials"].remedy
    assert not any("hunter2" in finding.found for finding in found.values())
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    assert check(url)["credentials"].state is State.ERROR
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "partial" in check(url)["credentials"].found.lower()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    found = check(url)
    assert found["credentials"].state is State.ERROR
    assert "--no-sign-request" in found["credentials"].remedy
    assert states(found, "S3", "clock") == {State.OK}
    (tmp_path / "credentials").write_text(
        f"[mine]\naws_access_key_id = {aws.access_key}\naws_secret_access_key = {aws.secret_key}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    found = check(url, profile="mine")
    assert "credentials file" in found["credentials"].found
    assert states(found) == {State.OK}


def test_a_bucket_that_does_not_exist(aws: S3Server) -> None:
    found = check("s3://no-such-bucket-here/p")
    assert found["bucket"].state is State.ERROR
    assert "no-such-bucket-here" in found["bucket"].found
    assert "aws s3 mb" in found["bucket"].remedy
    assert found["list"] == Finding("list", State.SKIPPED, "see bucket")


def test_a_layout_that_is_not_understood(aws: S3Server, bucket: str, tmp_path: Path) -> None:
    for text in (b"{", b'{"shard_bits": 4, "placement": "by colour"}'):
        put_layout(tmp_path, text)
        put_container(tmp_path / DAY / "0.des", {"f": b"x"})
        upload(aws, bucket, tmp_path)
        found = check(f"s3://{bucket}")
        assert found["layout"].state is State.WARNING
        assert states(found, "days", "get") == {State.OK}


# --- where it is mounted, and what it keeps ----------------------------------------------------------------------


def test_redis_that_is_well_or_not(redis: RedisServer) -> None:
    budget = Budget(EACH_S, 60.0)
    assert check_redis(redis.url, budget).state is State.OK
    with socket.create_server((servers.HOST, 0)) as probe:
        port = probe.getsockname()[1]
    found = check_redis(f"redis://somebody:hunter2@{servers.HOST}:{port}/0", budget)
    assert found.state is State.WARNING
    assert "refused" in found.found
    assert "hunter2" not in found.found
    with redis.client() as client:
        client.config_set("requirepass", "secret")
        try:
            assert check_redis(redis.url, budget).state is State.WARNING
            assert check_redis(redis.url.replace("//", "//:wrong@"), budget).found == "refuses the password"
            assert check_redis(redis.url.replace("//", "//:secret@"), budget).state is State.OK
        finally:
            client.auth("secret")
            client.config_set("requirepass", "")


@pytest.mark.fuse
def test_a_mount_point_that_is_busy_hung_or_dead(folder: Path, mount_dir: MountPoint) -> None:
    """A daemon that does not answer keeps nobody waiting, and one that has ended is said to have."""
    mount(folder, mount_dir.path)
    daemon = daemon_of(mount_dir.path)

    def mount_point(each_s: float = EACH_S) -> Finding:
        return next(check_directory(str(mount_dir.path), None, MountSettings(), Budget(each_s, 60.0)))

    busy = mount_point()
    assert (busy.state, str(folder) in busy.found) == (State.ERROR, True)
    assert busy.remedy.startswith(f"desfs umount {mount_dir.path}")
    os.kill(daemon, signal.SIGSTOP)
    try:
        hung = mount_point(1.0)
        assert (hung.state, "does not answer" in hung.found) == (State.ERROR, True)
    finally:
        os.kill(daemon, signal.SIGCONT)
    os.kill(daemon, signal.SIGKILL)
    wait_until(lambda: not servers.is_running(daemon), "the end of the daemon")
    dead = mount_point()
    assert (dead.state, "dead mount" in dead.found) == (State.WARNING, True)
    assert "desfs umount --lazy" in dead.remedy


@pytest.mark.fuse
def test_everything_is_wrong_at_once_and_each_thing_is_said(aws: S3Server, bucket: str, tmp_path: Path) -> None:
    """No /dev/fuse, no levers, a clock that is off, no permission to list, no conditional PUT, caches and a mount point
    that cannot be used: no check hides another one."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['desfs._levers'] = None")
    rules = (clock_ahead(HOUR_S), without_permission("list"), without_conditional_put())
    with fronted(aws, *rules) as front:
        env = {
            "AWS_ENDPOINT_URL": front.url,
            "DESFS_CACHE_DIR": str(tmp_path / "cache"),
            "DESFS_REDIS": NOBODY,
            "DESFS_MEMROY": "1G",
            "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
        }
        status, found = doctor("--write", f"s3://{bucket}", tmp_path / "missing", before=EMPTY_DEV, env=env)
    assert status == 1
    assert_error(found, "fuse device", "there is no /dev/fuse", "modprobe fuse")
    assert_error(found, "clock", "60 minutes behind", "chrony")
    assert_error(found, "list", "not permitted", "s3:ListBucket")
    assert_error(found, "If-None-Match", "ignored", "one packer")
    assert_error(found, "cache_dir", "by everybody", "chmod o-w")
    assert_error(found, "mount point", "does not exist", "mkdir -p")
    assert_error(found, "levers", "not installed", "libfuse3-dev", "warning")
    assert_error(found, "variables", "DESFS_MEMROY in the environment is no setting", "correct its name", "warning")
    assert_error(found, "redis", "does not answer", "start it", "warning")
    assert found["trial mount"]["state"] == "skipped"
    assert found["libfuse"]["state"] == found["put"]["state"] == found["get"]["state"] == "ok"
