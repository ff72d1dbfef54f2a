"""Many writers on one store, and what happens to them: a cluster of real processes, and a script with a seed.

    python -m tests.service.cluster --seed 1 --files 20000 --minutes 10

Four packers on two spools, two replicas of the assignment service, Postgres, Redis, S3 behind a proxy. Programs write
files with contents of their own while the script kills (-9) and pauses processes past their leases, restarts the
servers, and makes S3 answer 503, reset connections and stall. Afterwards everything is calm, and `Cluster.check` holds:
a mount shows each file once with its bytes, the spools are empty, catalog and bucket agree.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from random import Random

from assignment.errors import AssignmentError
from assignment.opening import migrate, open_catalog
from tests import servers
from tests.crash import spool_files, unfinished
from tests.fakes.s3_front import Reply, Request, S3Front, refusal
from tests.mount.mounting import mounted

PROGRAM = Path(sys.executable).with_name("desfs")
LEASE_TTL_S = 3.0
CALM_S = 180.0  # for everything to be packed when all is calm again: claims of the dead wait for their leases
_WRITERS = 3


@dataclass(slots=True)
class Weather:
    """What S3 does: in `rough` weather one request of `one_in` is refused, reset or held up."""

    dice: Random
    rough: bool = False
    one_in: int = 6
    done: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, request: Request, forward: Callable[[], Reply]) -> Reply:
        """A rule of `S3Front`."""
        with self._lock:
            strikes = self.rough and self.dice.randrange(self.one_in) == 0
            word = self.dice.choice(["503", "reset before", "reset behind", "stall"]) if strikes else ""
            if word:
                self.done[word] += 1
        if word == "503":
            return refusal(503, "SlowDown")
        if word == "reset before":
            raise ConnectionResetError
        if word == "stall":
            time.sleep(1.0)  # a stall is what is tested here; longer than the client waits only costs time
        reply = forward()
        if word == "reset behind":
            raise ConnectionResetError
        return reply


class Daemon:
    """A process that is started again and again on the same log."""

    def __init__(self, name: str, command: list[str], env: dict[str, str], log: Path) -> None:
        self.name = name
        self._command = command
        self._env = env
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *self._command],
                env=os.environ | self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """End it at once, whatever state it is in."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def end(self, timeout_s: float) -> int:
        """SIGTERM; its exit status. Raises: subprocess.TimeoutExpired."""
        assert self._process is not None
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)
        return self._process.wait(timeout_s)


class Auditor:
    """Looks at the leases all along: tokens only grow, and a shard changes hands under a new token alone."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._watch()), name="auditor")
        self.looks = 0
        self.hands = 0
        self.failures: list[str] = []

    def __enter__(self) -> Auditor:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    async def _watch(self) -> None:
        known: dict[tuple[object, str], tuple[int, str]] = {}
        catalog = await open_catalog(self._url)
        try:
            while not self._stop.is_set():
                try:
                    holders = await catalog.list_holders()
                except AssignmentError:
                    await asyncio.sleep(0.2)  # it is being restarted
                    continue
                self.looks += 1
                places = Counter((each.day, each.shard) for each in holders if each.holds)
                self.failures += [f"{place}: {count} holders" for place, count in places.items() if count > 1]
                for each in holders:
                    token, holder = known.get((each.day, each.shard), (0, each.holder))
                    if each.token < token or (each.token == token and each.holder != holder):
                        self.failures.append(f"{each.day}/{each.shard}: token {token} of {holder}, then {each}")
                    self.hands += each.holder != holder
                    known[each.day, each.shard] = each.token, each.holder
                await asyncio.sleep(0.1)
        finally:
            await catalog.close()


class Cluster:
    """The processes of a run. `files` has the digest of each file that was written, by its path."""

    def __init__(self, folder: Path, catalog: str, redis: str, store: str, env: dict[str, str]) -> None:
        self.folder = folder
        self.store = store
        self.env = env
        self.catalog = catalog
        self.files: dict[str, str] = {}
        self._lock = threading.Lock()
        token = secrets.token_urlsafe(24)
        token_file = folder / "token"
        token_file.touch(0o600)
        token_file.write_text(token + "\n")
        self.spools = [folder / "spool-a", folder / "spool-b"]
        for spool in self.spools:
            spool.mkdir()
        common = env | {"DESFS_CATALOG": catalog, "DESFS_LOG_LEVEL": "info"}
        ports = servers.free_ports(2)
        self.services = [
            Daemon(
                f"service-{number}",
                [
                    str(PROGRAM), "assignment", "--listen", f"{servers.HOST}:{port}", "--token-file", str(token_file),
                ],
                common,
                folder / f"service-{number}.log",
            )
            for number, port in enumerate(ports)
        ]  # fmt: skip
        self.packers = [
            Daemon(
                f"packer-{number}",
                [
                    str(PROGRAM), "packer", "--spool", str(self.spools[number % 2]), "--store", store,
                    "--assignment", f"http://{servers.HOST}:{ports[number // 2]}",
                    "--assignment-token-file", str(token_file),
                    "--settle", "0.5", "--max-age", "1", "--scan-interval", "0.3", "--rescan-interval", "1",
                    "--lease-ttl", str(LEASE_TTL_S), "--deadline", "4",
                    "--redis", redis, "--max-parts", "4", "--delete-grace", "2",
                ],
                common,
                folder / f"packer-{number}.log",
            )
            for number in range(4)
        ]  # fmt: skip

    @property
    def daemons(self) -> list[Daemon]:
        return [*self.services, *self.packers]

    def write(self, writer: int, number: int, dice: Random) -> None:
        """One file with a content of its own, in the way that programs write: in place, or by a rename."""
        name = f"w{writer}/d{number % 37}/{number:06d}.bin"
        data = f"{name} {dice.random()} ".encode() * dice.randrange(1, 200)
        spool = self.spools[dice.randrange(2)]
        target = spool / name
        while True:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                if dice.random() < 0.5:
                    target.write_bytes(data)
                else:
                    temporary = target.with_name(f".{target.name}.part")
                    temporary.write_bytes(data)
                    temporary.rename(target)
                break
            except FileNotFoundError:
                continue  # the folder was empty and quiet, and was removed that very moment
        with self._lock:
            self.files[name] = sha256(data).hexdigest()

    def write_all(self, writer: int, count: int, seconds: float, seed: int) -> None:
        """So many files, spread over the time."""
        dice = Random(seed * 1000 + writer)
        began = time.monotonic()
        for number in range(count):
            self.write(writer, number, dice)
            ahead_s = began + seconds * (number + 1) / count - time.monotonic()
            if ahead_s > 0.02:
                time.sleep(ahead_s)

    def wait_packed(self) -> None:
        """Wait until the spools are empty. AssertionError when they do not get so."""
        deadline = time.monotonic() + CALM_S
        while left := [name for spool in self.spools for name in (*spool_files(spool), *unfinished(spool))]:
            assert time.monotonic() < deadline, f"still in the spools: {left[:20]}"
            time.sleep(0.2)

    def check(self) -> None:
        """Everything that was written is shown once, with its bytes; catalog and bucket agree."""
        with mounted(self.store, self.folder / "mnt", env=self.env) as mount:
            shown: dict[str, str] = {}
            for day in mount.iterdir():
                for folder, _, names in os.walk(day):
                    for name in names:
                        path = Path(folder, name)
                        key = str(path.relative_to(day))
                        assert key not in shown, f"{key} is shown on two days"
                        shown[key] = sha256(path.read_bytes()).hexdigest()
        missing, foreign = self.files.keys() - shown.keys(), shown.keys() - self.files.keys()
        assert not missing, f"missing {sorted(missing)[:9]}"
        assert not foreign, f"foreign {sorted(foreign)[:9]}"
        wrong = [name for name, digest in self.files.items() if shown[name] != digest]
        assert not wrong, f"other bytes: {wrong[:9]}"
        compare = ("--catalog", self.catalog.replace(f":{servers.POSTGRES_PASSWORD}@", "@"))
        for options in (compare, (*compare, "--repair"), compare):
            done = subprocess.run(
                [str(PROGRAM), "verify", self.store, *options],
                env=os.environ | self.env | {"PGPASSWORD": servers.POSTGRES_PASSWORD},
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            assert "not in the catalog" not in done.stdout, done.stdout[-3000:]
            assert done.returncode == 0, f"{options}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    def tracebacks(self) -> dict[str, str]:
        """What a daemon says when something is wrong with it."""
        found = {}
        for daemon in self.daemons:
            text = daemon.log.read_text(errors="replace")
            if "Traceback" in text:
                found[daemon.name] = text[text.index("Traceback") :][:3000]
        return found


class RestartedRedis:
    """A Redis that is stopped and started on one port."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self.port: int | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://{servers.HOST}:{self.port}/0"

    def start(self) -> None:
        server = self._stack.enter_context(servers.redis_server(self._folder, port=self.port))
        self.port = server.port

    def stop(self) -> None:
        self._stack.close()


class Script:
    """What happens to a cluster, from a seed."""

    def __init__(
        self, cluster: Cluster, postgres: servers.PostgresServer, redis: RestartedRedis, weather: Weather, seed: int
    ) -> None:
        self._cluster = cluster
        self._postgres = postgres
        self._redis = redis
        self._weather = weather
        self._dice = Random(seed)
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._events: dict[str, Callable[[], None]] = {
            "a packer is killed": self._kill,
            "a packer is paused": self._pause,
            "a service ends": self._end_service,
            "Postgres restarts": self._restart_postgres,
            "Redis restarts": self._restart_redis,
            "the store changes its ways": self._change_weather,
        }
        self.done: Counter[str] = Counter()

    def step(self, pause_s: float) -> None:
        """What earlier events have set for now, one more event, and some time."""
        now = time.monotonic()
        due = [action for at, action in self._later if at <= now]
        self._later = [(at, action) for at, action in self._later if at > now]
        for action in due:
            action()
        self._revive()
        # Each in turn, then as it comes.
        names = list(self._events)
        total = self.done.total()
        name = names[total] if total < len(names) else self._dice.choice([*names, *names[:2], *names[:2]])
        self.done[name] += 1
        self._events[name]()
        time.sleep(pause_s * self._dice.uniform(0.5, 1.5))

    def calm(self) -> None:
        """End all that is wrong."""
        self._weather.rough = False
        for _, action in self._later:
            action()
        self._later = []
        self._revive()
        for daemon in self._cluster.daemons:
            daemon.send(signal.SIGCONT)

    def _revive(self) -> None:
        """Start what has ended, as its service manager would."""
        for daemon in self._cluster.daemons:
            if not daemon.is_alive:
                daemon.start()

    def _kill(self) -> None:
        self._dice.choice(self._cluster.packers).kill()

    def _pause(self) -> None:
        victim = self._dice.choice(self._cluster.packers)
        victim.send(signal.SIGSTOP)
        until = time.monotonic() + LEASE_TTL_S * self._dice.uniform(0.5, 2.5)
        self._later.append((until, lambda: victim.send(signal.SIGCONT)))

    def _end_service(self) -> None:
        victim = self._dice.choice(self._cluster.services)
        if self._dice.random() < 0.5:
            victim.kill()
        else:
            victim.send(signal.SIGTERM)

    def _restart_postgres(self) -> None:
        if self._dice.random() < 0.5:
            self._postgres.kill()
        else:
            self._postgres.stop()
        time.sleep(self._dice.uniform(0.0, 2.0))
        self._postgres.start()

    def _restart_redis(self) -> None:
        self._redis.stop()
        time.sleep(self._dice.uniform(0.0, 1.0))
        self._redis.start()

    def _change_weather(self) -> None:
        self._weather.rough = not self._weather.rough


@dataclass(slots=True)
class Report:
    """What a run did, for its reader."""

    files: int
    events: Counter[str]
    faults: Counter[str]
    looks: int
    hands: int
    seconds: float
    calm_seconds: float

    def __str__(self) -> str:
        events = ", ".join(f"{name} {count}x" for name, count in sorted(self.events.items()))
        faults = ", ".join(f"{name} {count}x" for name, count in sorted(self.faults.items()))
        return (
            f"{self.files} files in {self.seconds:.0f} s, packed {self.calm_seconds:.0f} s after the last; {events}; "
            f"S3: {faults}; {self.looks} looks at the leases, which changed hands {self.hands} times"
        )


def run(folder: Path, s3: servers.S3Server, seed: int, *, files: int, seconds: float, pause_s: float) -> Report:
    """One run in an empty folder. Raises: AssertionError for anything that must not be."""
    began = time.monotonic()
    weather = Weather(Random(seed))
    bucket = s3.new_bucket("writers")
    with (
        servers.postgres_server(sync=True) as postgres,
        S3Front(s3.host, s3.port, weather) as front,
        contextlib.ExitStack() as stack,
    ):
        catalog = postgres.url(postgres.new_database())
        asyncio.run(migrate(catalog))
        redis = RestartedRedis(folder)
        stack.callback(redis.stop)
        env = s3.environ(endpoint_url=front.url)
        cluster = Cluster(folder, catalog, redis.url, f"s3://{bucket}", env)
        for daemon in cluster.daemons:
            stack.callback(daemon.kill)
            daemon.start()
        auditor = stack.enter_context(Auditor(catalog))
        script = Script(cluster, postgres, redis, weather, seed)
        writers = [
            threading.Thread(target=cluster.write_all, args=(number, files // _WRITERS, seconds, seed))
            for number in range(_WRITERS)
        ]
        for writer in writers:
            writer.start()
        while any(writer.is_alive() for writer in writers):
            script.step(pause_s)
        for writer in writers:
            writer.join()
        script.calm()
        calm_at = time.monotonic()
        cluster.wait_packed()
        packed_at = time.monotonic()
        for daemon in [*cluster.packers, *cluster.services]:
            status = daemon.end(60.0)
            assert status == 0, f"{daemon.name} ended with status {status}: {daemon.log.read_text()[-3000:]}"
        assert len(cluster.files) == files // _WRITERS * _WRITERS
        cluster.check()
        assert not auditor.failures, auditor.failures[:5]
        assert not cluster.tracebacks(), cluster.tracebacks()
    return Report(
        len(cluster.files),
        script.done,
        weather.done,
        auditor.looks,
        auditor.hands,
        calm_at - began,
        packed_at - calm_at,
    )


def main() -> None:
    """Runs, one for each seed; what each did is printed."""
    parser = argparse.ArgumentParser(prog="python -m tests.service.cluster", description=__doc__)
    parser.add_argument("--seed", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between two events")
    parser.add_argument("--keep", action="store_true", help="leave the folder of a run that fails")
    arguments = parser.parse_args()
    for seed in arguments.seed:
        folder = Path(tempfile.mkdtemp(prefix="writers-"))
        with servers.s3_server(folder) as s3:
            try:
                report = run(
                    folder, s3, seed, files=arguments.files, seconds=arguments.minutes * 60, pause_s=arguments.pause
                )
                print(f"seed {seed}: {report}", flush=True)
            except BaseException:
                print(f"seed {seed}: failed; {folder}", flush=True)
                if not arguments.keep:
                    shutil.rmtree(folder, ignore_errors=True)
                raise
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
