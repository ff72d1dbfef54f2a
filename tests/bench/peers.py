"""The other programs that show objects as files, each with the settings that its documentation advises for reading.

All read the same tree of files from the same S3 server through the same proxy. What they keep on the disk is removed
with each mount; what they need beforehand (metadata, an index) is made once, and is not measured.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests import servers
from tests.bench.corpus import Corpus
from tests.bench.machine import clean_environ, program_version
from tests.bench.systems import START_S, Mounted
from tests.bench.world import World

_LOAD_S = 900.0
_AGES = "86400"  # seconds that anything may be remembered: nothing changes


class PeerFailed(RuntimeError):
    """Another program did not do what it was asked."""


def find_program(name: str) -> str | None:
    """The path of an installed program: beside this Python, or on PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def _run(command: Sequence[str | Path], env: Mapping[str, str]) -> None:
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=_LOAD_S, check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        raise PeerFailed(f"{Path(command[0]).name} ended with {done.returncode}: {(done.stderr + done.stdout)[-1500:]}")


@contextlib.contextmanager
def _serving(command: Sequence[str | Path], where: Path, env: Mapping[str, str], log: Path) -> Iterator[Mounted]:
    """A program that serves a mount in the foreground, once its root answers."""
    began = time.monotonic()
    with servers.mount_point(where), servers.child_process(command, log=log, env=env) as process:
        while not servers.is_mounted(where):
            if process.poll() is not None:
                raise PeerFailed(
                    f"{Path(command[0]).name} ended at its start: {log.read_text(errors='replace')[-1500:]}"
                )
            if time.monotonic() - began > START_S:
                raise PeerFailed(f"{Path(command[0]).name} has not mounted in {START_S:.0f} s")
            time.sleep(0.002)
        os.stat(where)
        yield Mounted(where, time.monotonic() - began, [process.pid])


@contextlib.contextmanager
def _fresh_folder(path: Path) -> Iterator[Path]:
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def rclone_env(world: World, endpoint_url: str) -> dict[str, str]:
    """A remote called `bench` for rclone, and no configuration file."""
    return clean_environ() | {
        "RCLONE_CONFIG": "/dev/null",
        "RCLONE_CONFIG_BENCH_TYPE": "s3",
        "RCLONE_CONFIG_BENCH_PROVIDER": "Other",
        "RCLONE_CONFIG_BENCH_ENDPOINT": endpoint_url,
        "RCLONE_CONFIG_BENCH_ACCESS_KEY_ID": world.server.access_key,
        "RCLONE_CONFIG_BENCH_SECRET_ACCESS_KEY": world.server.secret_key,
        "RCLONE_CONFIG_BENCH_REGION": servers.REGION,
        "RCLONE_CONFIG_BENCH_FORCE_PATH_STYLE": "true",
        "RCLONE_CONFIG_BENCH_NO_CHECK_BUCKET": "true",
        "RCLONE_LOG_LEVEL": "ERROR",
    }


def rclone_mount(*options: str) -> list[str | Path]:
    """rclone mounting `bench:`, reading only, remembering what it may."""
    program = find_program("rclone")
    assert program is not None
    return [
        *(program, "mount", "--read-only", "--vfs-cache-mode", "full", "--vfs-fast-fingerprint"),
        *("--use-server-modtime", "--no-checksum", "--poll-interval", "0", "--dir-cache-time", "24h"),
        *("--attr-timeout", "24h", "--vfs-cache-max-age", "24h", "--s3-no-head-object", *options),
    ]


def load_objects(world: World, corpus: Corpus, bucket: str) -> None:
    """One object a file, below `tree/`, and a marker for each directory, without which s3fs asks more often."""
    client = world.server.client()
    folders = sorted({str(parent) for name in corpus.names for parent in Path("tree", name).parents} - {"."})

    def put(name: str) -> None:
        client.put_object(Bucket=bucket, Key=f"tree/{name}", Body=(corpus.root / name).read_bytes())

    with ThreadPoolExecutor(16) as threads:
        for folder in folders:
            client.put_object(Bucket=bucket, Key=f"{folder}/", ContentType="application/x-directory")
        for _ in threads.map(put, corpus.names):
            pass


def put_file(world: World, bucket: str, key: str, path: Path) -> None:
    world.server.client().upload_file(str(path), bucket, key)


# --- s3fs --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class S3fs:
    """s3fs over objects that `load_objects` has put."""

    world: World
    bucket: str
    tree: str = "tree"
    name: str = "s3fs"
    one_object: bool = True

    @contextlib.contextmanager
    def mount(self, where: Path) -> Iterator[Mounted]:
        program = find_program("s3fs")
        assert program is not None
        with _fresh_folder(self.world.work / "s3fs-cache") as cache:
            options = {
                "url": self.world.proxy.url,
                "use_cache": str(cache),
                "max_stat_cache_size": "1000000",
                "stat_cache_expire": _AGES,
                "multireq_max": "64",
                "parallel_count": "32",
                "multipart_size": "16",
                "connect_timeout": "20",
                "mime": "/dev/null",
            }
            flags = ("use_path_request_style", "ro", "kernel_cache", "enable_noobj_cache", "notsup_compat_dir")
            words = [*flags, *(f"{key}={value}" for key, value in options.items())]
            words += [f"{name}_timeout={_AGES}" for name in ("attr", "entry")]
            env = clean_environ() | {
                "AWSACCESSKEYID": self.world.server.access_key,
                "AWSSECRETACCESSKEY": self.world.server.secret_key,
            }
            command: list[str | Path] = [program, self.bucket, where, "-f", "-o", ",".join(words)]
            with _serving(command, where, env, self.world.work / "s3fs.log") as mounted:
                mounted.tree = where / self.tree
                yield mounted


# --- rclone ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Rclone:
    """rclone mount over objects that `load_objects` has put."""

    world: World
    bucket: str
    tree: str = "tree"
    options: Sequence[str] = ("--buffer-size", "0")
    name: str = "rclone"
    one_object: bool = True

    @contextlib.contextmanager
    def mount(self, where: Path) -> Iterator[Mounted]:
        with _fresh_folder(self.world.work / "rclone-cache") as cache:
            command = [*rclone_mount("--cache-dir", str(cache), *self.options), f"bench:{self.bucket}", where]
            env = rclone_env(self.world, self.world.proxy.url)
            with _serving(command, where, env, self.world.work / "rclone.log") as mounted:
                mounted.tree = where / self.tree
                yield mounted


# --- JuiceFS -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class JuiceFS:
    """JuiceFS with its metadata in a Redis on this machine, which is the fastest that it offers."""

    world: World
    bucket: str
    redis: servers.RedisServer
    tree: str = "tree"
    name: str = "JuiceFS"
    one_object: bool = True

    def load(self, root: Path, name: str) -> None:
        """Copy a local directory into the volume, which is made with the first."""
        program = self._program()
        direct = f"{self.world.server.endpoint_url}/{self.bucket}"
        keys = {"ACCESS_KEY": self.world.server.access_key, "SECRET_KEY": self.world.server.secret_key}
        env = clean_environ() | keys | {"HOME": str(self.world.work)}
        if not self.redis_has_volume():
            storage = ["--storage", "s3", "--bucket", direct, "--trash-days", "0"]
            _run([program, "format", *storage, self.redis.url, "bench"], env)
        _run(
            [program, "sync", "--threads", "16", "--dirs", f"{root}/", f"jfs://VOLUME/{name}/"],
            env | {"VOLUME": self.redis.url},
        )

    def redis_has_volume(self) -> bool:
        with contextlib.closing(self.redis.client()) as client:
            return bool(client.exists("setting"))

    def _program(self) -> str:
        program = find_program("juicefs")
        assert program is not None
        return program

    @contextlib.contextmanager
    def mount(self, where: Path) -> Iterator[Mounted]:
        (port,) = servers.free_ports(1)
        with _fresh_folder(self.world.work / "juicefs-cache") as cache:
            command: list[str | Path] = [
                *(self._program(), "mount", "--read-only", "--no-usage-report", "--no-syslog", "--no-bgjob"),
                *("--backup-meta", "0", "--bucket", f"{self.world.proxy.url}/{self.bucket}"),
                *("--cache-dir", cache, "--free-space-ratio", "0.01", "--buffer-size", "1024", "--prefetch", "4"),
                *("--attr-cache", _AGES, "--entry-cache", _AGES, "--dir-entry-cache", _AGES, "--open-cache", _AGES),
                *("--readdir-cache", "--max-fuse-io", "1M", "--metrics", f"127.0.0.1:{port}", self.redis.url, where),
            ]
            env = clean_environ() | {"HOME": str(self.world.work)}
            with _serving(command, where, env, self.world.work / "juicefs.log") as mounted:
                mounted.tree = where / self.tree
                yield mounted


# --- ratarmount --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Ratarmount:
    """ratarmount on a tar in the store, which an rclone mount with a cache and a long readahead brings near. Its index
    is made beforehand; the tar is not compressed."""

    world: World
    bucket: str
    archive: str
    tree: str
    # Tried: 1 MiB to 1 GiB. A longer one downloads half the archive, or all of it, while the archive is being mounted,
    # before anybody has asked for a file: nothing would be cold.
    readahead: Sequence[str] = ("--vfs-read-ahead", "8M", "--vfs-read-chunk-size", "128M", "--buffer-size", "0")
    name: str = "ratarmount"
    one_object: bool = False

    def load(self, corpus: Corpus) -> None:
        """Put the corpus as one tar, and make its index."""
        local = self.world.work / self.archive
        _run(
            [
                "tar",
                "cf",
                local,
                "--transform",
                f"s,^{corpus.root.name},{self.tree},",
                "-C",
                corpus.root.parent,
                corpus.root.name,
            ],
            clean_environ(),
        )
        put_file(self.world, self.bucket, self.archive, local)
        program = find_program("ratarmount")
        assert program is not None
        command: list[str | Path] = [program, "--index-file", self._index, "--no-mount", "--no-verify-mtime", local]
        _run(command, clean_environ())
        local.unlink()

    @property
    def _index(self) -> Path:
        return self.world.work / f"{self.archive}.index.sqlite"

    @contextlib.contextmanager
    def mount(self, where: Path) -> Iterator[Mounted]:
        program = find_program("ratarmount")
        assert program is not None
        below = where.with_name("archive")
        with contextlib.ExitStack() as stack:
            cache = stack.enter_context(_fresh_folder(self.world.work / "archive-cache"))
            command = [*rclone_mount("--cache-dir", str(cache), *self.readahead), f"bench:{self.bucket}", below]
            env = rclone_env(self.world, self.world.proxy.url)
            under = stack.enter_context(_serving(command, below, env, self.world.work / "archive.log"))
            options = f"ro,kernel_cache,attr_timeout={_AGES},entry_timeout={_AGES}"
            above = stack.enter_context(
                _serving(
                    [
                        program,
                        "-f",
                        "--index-file",
                        self._index,
                        "--no-verify-mtime",
                        "-o",
                        options,
                        below / self.archive,
                        where,
                    ],
                    where,
                    clean_environ(),
                    self.world.work / "ratarmount.log",
                )
            )
            above.tree = where / self.tree
            above.ready_s += under.ready_s
            above.pids += under.pids
            yield above


NAMES = ("ratarmount", "JuiceFS", "rclone", "s3fs")
RCLONE_STREAMING = ("--buffer-size", "64M", "--vfs-read-ahead", "256M", "--vfs-read-chunk-size", "128M")
_NEEDED = {"ratarmount": ("ratarmount", "rclone"), "JuiceFS": ("juicefs",), "rclone": ("rclone",), "s3fs": ("s3fs",)}


def is_installed(name: str) -> bool:
    return all(map(find_program, _NEEDED[name]))


VERSIONS = {
    "s3fs": ("--version",),
    "rclone": ("version",),
    "juicefs": ("version",),
    "ratarmount": ("--version",),
    "weed": ("version",),
}


def versions() -> str:
    """The versions of all that takes part, for the results."""
    found = []
    for name, arguments in VERSIONS.items():
        program = find_program(name)
        found.append(f"{name} {program_version(program, *arguments) if program else 'is not installed'}")
    return ", ".join(found)
