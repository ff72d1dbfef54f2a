"""`desfs verify` as a user runs it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from random import Random

import pytest

from des_format import DesWriter
from des_format.layout import FOOTER, HEADER
from desfs.amounts import format_size
from tests import fixtures
from tests.fakes.http_faults import FaultyS3
from tests.mount.mounting import KINDS, PATIENCE_S, PROGRAM, Source, desfs, source_of
from tests.mount.stores import meta_of, put_container
from tests.unit.containers import footer_of, patched

DAY = "2026-11-20"
KEY = f"{DAY}/0.des"
FILES = {f"d/f{n}": Random(n).randbytes(1000 + n) for n in range(20)}
BIG = Random(99).randbytes(9 << 20)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with an external object, and the checksums of a packer."""
    root = tmp_path_factory.mktemp("verify")
    (root / DAY).mkdir()
    with DesWriter(root / KEY, external_prefix=f"{DAY}/") as writer:
        for name, data in FILES.items():
            writer.add_file(name, data, meta_of(data, sha256=sha256(data).hexdigest()))
        writer.add_file("big", BIG, meta_of(BIG), force_external=True)
    put_container(root / DAY / "1.des", {"g": b"good"})
    return root


@pytest.fixture(scope="module", params=KINDS)
def source(request: pytest.FixtureRequest, store: Path) -> Iterator[Source]:
    with source_of(request.param, store, request) as found:
        yield found


def verify(*arguments: object, env: Mapping[str, str] | None = None) -> tuple[int, list[str], str]:
    """Exit status, lines of standard output, standard error."""
    done = desfs("verify", *arguments, env=env)
    return done.returncode, done.stdout.splitlines(), done.stderr


def records(lines: list[str]) -> tuple[list[dict[str, object]], dict[str, object]]:
    """The findings, and the summary behind them."""
    *findings, summary = map(json.loads, lines)
    assert summary.pop("kind") == "summary"
    return findings, summary


def test_a_sound_store(source: Source, store: Path) -> None:
    """Exit status 0, one line, and nothing on standard error, which is no terminal."""
    size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    wanted = [f"verified 2 containers, 22 files, {format_size(size)}: no damage"]
    assert verify(source.url, env=source.env) == (0, wanted, "")
    status, lines, errors = verify(f"{source.url}/{KEY}", "--json", env=source.env)
    assert (status, errors) == (0, "")
    findings, summary = records(lines)
    assert findings == []
    assert summary == {
        "containers": 1,
        "files": 21,
        "bytes": (store / KEY).stat().st_size + len(BIG),
        "damaged_containers": 0,
        "damaged_entries": 0,
        "containers_with_damaged_entries": 0,
        "damaged_layout": False,
        "without_checksum": 0,
        "warnings": 0,
        "unverified": 0,
    }


@pytest.fixture(scope="module", params=KINDS)
def damaged(request: pytest.FixtureRequest, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    """A byte is wrong in a payload, in metadata, in an external object, and in the footer of another container."""
    root = tmp_path_factory.mktemp("damaged")
    for path in (path for path in store.rglob("*") if path.is_file()):
        raw = path.read_bytes()
        (root / path.relative_to(store)).parent.mkdir(parents=True, exist_ok=True)
        if path == store / KEY:
            raw = patched(raw, HEADER.size + 1500, bytes([raw[HEADER.size + 1500] ^ 1]))
            raw = patched(raw, footer_of(raw).meta_start, b"[")
        elif path.suffix == ".des":
            raw = patched(raw, -FOOTER.size, b"x")
        else:
            raw = patched(raw, 5 << 20, bytes([raw[5 << 20] ^ 1]))
        (root / path.relative_to(store)).write_bytes(raw)
    (root / "stray.txt").write_bytes(b"")
    (root / DAY / "_bigFiles/orphan").write_bytes(b"1")
    with source_of(request.param, root, request) as found:
        yield found


def test_damage_is_named(damaged: Source, store: Path) -> None:
    """Exit status 3; container, entry and position of each, as text and as JSON."""
    meta_start = footer_of((store / KEY).read_bytes()).meta_start
    status, lines, errors = verify(damaged.url, env=damaged.env)
    assert (status, errors) == (3, "")
    *findings, summary = sorted(lines[:-1]) + lines[-1:]
    starts = [
        f"{DAY}/0.des: entry 'big': external object '{DAY}/_bigFiles/big': block 1 at byte 4194304: found a crc32c of ",
        f"{DAY}/0.des: entry 'd/f0': metadata at byte {meta_start}: META is no JSON: ",
        f"{DAY}/0.des: entry 'd/f1': payload at byte 1016: found a crc32c of ",
        f"{DAY}/1.des: footer at byte ",
        f"{DAY}/_bigFiles/orphan: warning: is named by no container that could be read",
        "stray.txt: warning: is no container",
    ]
    assert len(findings) == len(starts)
    assert all(line.startswith(start) for line, start in zip(findings, starts, strict=True)), findings
    assert summary.endswith(" MiB: 1 damaged container, 3 damaged entries in 1 container; 2 warnings")

    status, lines, errors = verify(damaged.url, "--json", env=damaged.env)
    assert (status, errors) == (3, "")
    found, totals = records(lines)
    assert {(each["kind"], each["container"], each["entry"], each["offset"]) for each in found} == {
        ("damage", KEY, "big", 4 << 20),
        ("damage", KEY, "d/f0", meta_start),
        ("damage", KEY, "d/f1", 1016),
        ("damage", f"{DAY}/1.des", None, (store / DAY / "1.des").stat().st_size - FOOTER.size),
        ("warning", f"{DAY}/_bigFiles/orphan", None, None),
        ("warning", "stray.txt", None, None),
    }
    assert (totals["damaged_containers"], totals["damaged_entries"], totals["warnings"]) == (1, 3, 2)


def test_every_damaged_container_of_the_examples(tmp_path: Path) -> None:
    """Every container that is refused, or has an entry that is, is named; the good ones beside them are not."""
    cases = fixtures.hostile(fixtures.OWN)
    for case in cases:
        path = tmp_path / case.key
        path.parent.mkdir(parents=True)
        path.write_bytes(case.raw)
        (path.parent / "e.des").write_bytes((fixtures.OWN / "valid/2025-01-02.des").read_bytes())
    status, lines, errors = verify(tmp_path, "--json")
    assert (status, errors) == (3, "")
    findings, _ = records(lines)
    assert {each["container"] for each in findings if each["kind"] == "damage"} == {
        case.key for case in cases if case.outcome != "safe"
    }


@pytest.fixture
def faulty(store: Path) -> Iterator[FaultyS3]:
    """A server of one container. The program asks for its size, for the layout, and for its bytes, all at once."""
    with FaultyS3((store / DAY / "1.des").read_bytes()) as server:
        yield server


def over(server: FaultyS3, *options: str) -> tuple[int, list[str], str]:
    env = {
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    return verify(f"s3://bucket/{DAY}/1.des", "--endpoint-url", server.url, "--region", "us-east-1", *options, env=env)


@pytest.mark.parametrize(("script", "cause"), [("ok 404 403", "AccessDenied"), ("ok 404 503", "SlowDown")])
def test_a_store_that_refuses_or_does_not_answer(script: str, cause: str, faulty: FaultyS3) -> None:
    """Exit status 1, with the cause and what was not verified: nobody knows whether there is damage."""
    faulty.script = script
    status, lines, errors = over(faulty, "--deadline", "0.2")
    assert status == 1
    (finding, summary) = lines
    assert finding.startswith(f"{DAY}/1.des: not verified: the index could not be read: ")
    assert cause in finding
    assert summary.endswith("no damage; not all could be verified")
    assert errors.startswith("desfs: not all could be verified: ")
    assert errors.count("\n") == 1


def test_faults_that_pass_are_nothing(faulty: FaultyS3) -> None:
    """What S3 throttles or cuts short is tried again."""
    faulty.script = "503 ok 404 cut ok"
    assert over(faulty)[0] == 0


def test_a_container_that_is_not_there(faulty: FaultyS3, tmp_path: Path) -> None:
    faulty.script = "404"
    status, lines, errors = over(faulty)
    assert (status, lines, errors.count("\n")) == (1, [], 1)
    assert errors.startswith("desfs: ")
    status, lines, errors = verify(tmp_path / DAY / "1.des")
    assert (status, lines, errors.count("\n")) == (1, [], 1)
    assert str(tmp_path) in errors


def test_damage_wins_over_what_could_not_be_read(store: Path) -> None:
    """Exit status 3 when both are there."""
    raw = (store / KEY).read_bytes()
    with FaultyS3(patched(raw, HEADER.size, bytes([raw[HEADER.size] ^ 1]))) as server:
        # Size, layout, all bytes, those of the payload that is wrong once more, and the external object.
        server.script = "ok 404 ok ok 403"
        status, lines, errors = over(server)
        assert [request.word for request in server.requests] == ["ok", "404", "ok", "ok", "403"]
    assert status == 3
    assert sorted(line.partition(": ")[2][:15] for line in lines[:-1]) == ["entry 'big': no", "entry 'd/f0': p"]
    assert errors.startswith(f"desfs: not all could be verified: {DAY}/1.des: entry 'big': not verified: ")


@pytest.mark.parametrize("arguments", [("ftp://host/x",), ("--deadline", "soon", "/tmp")])
def test_usage(arguments: tuple[str, ...]) -> None:
    """Exit status 2 for what makes no sense."""
    status, lines, errors = verify(*arguments)
    assert (status, lines) == (2, [])
    assert errors


def test_a_bar_on_a_terminal(store: Path) -> None:
    """Standard error that is a terminal gets a bar; standard output has the same as ever."""
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [PROGRAM, "verify", store],
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=follower,
    ) as process:
        os.close(follower)
        shown = b""
        try:
            while piece := os.read(leader, 65536):
                shown += piece
        except OSError:  # EIO: the other side was closed
            pass
        os.close(leader)
        assert process.stdout is not None
        printed = process.stdout.read().decode()
        assert process.wait(PATIENCE_S) == 0
    assert "verifying" in shown.decode()
    assert "━" in shown.decode()
    assert printed.startswith("verified 2 containers")
    assert printed.count("\n") == 1


def test_a_reader_that_has_had_enough(tmp_path: Path) -> None:
    """`desfs verify … | head` is no success, and leaves no traceback."""
    for number in range(300):
        (tmp_path / f"stray {number:0200}").touch()
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [PROGRAM, "verify", tmp_path],
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_hundred_thousand_files(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """All of a large store, by one command; the time is reported, not judged."""
    for shard in range(16):
        path = tmp_path / DAY / f"{shard:x}.des"
        path.parent.mkdir(exist_ok=True)
        with DesWriter(path) as writer:
            for number in range(6250):
                data = b"%06d" % (shard * 6250 + number) * 8
                writer.add_file(f"{number % 50}/{number}", data, meta_of(data, sha256=sha256(data).hexdigest()))
    began = time.perf_counter()
    status, (line,), errors = verify(tmp_path)
    record_property("verify_s", round(time.perf_counter() - began, 2))
    assert (status, errors) == (0, "")
    assert line.startswith("verified 16 containers, 100,000 files, ")
