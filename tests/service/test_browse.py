"""`desfs ls`, `cat`, `stat` and `extract`: a store without a mount, over a directory and over real S3."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from des_format import DesWriter
from tests.mount.mounting import PROGRAM, Source, desfs, source_of
from tests.mount.stores import meta_of, pack_tree, put_container, source_tree
from tests.servers import S3Server

DAY = "2026-11-20"
LARGE = bytes(range(256)) * 20_000  # 5 MB: more than a batch


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source_tree(tmp_path_factory.mktemp("tree"), files=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tree: Path) -> Path:
    """A store: a day of a tree, a container in the root, one with a damaged file, and one with an external file."""
    folder = tmp_path_factory.mktemp("store")
    pack_tree(tree, folder, DAY)
    put_container(folder / "old.des", {"a/b": b"in the root", "c": b""}, mtime=1_700_000_000, mode=0o640)
    damaged = put_container(folder / "2026-11-21" / "0.des", {"good": b"good bytes", "wrong": b"wrong bytes"})
    raw = damaged.read_bytes()
    damaged.write_bytes(raw.replace(b"wrong bytes", b"wrong-bytes"))
    (folder / "2026-11-22" / "_bigFiles").mkdir(parents=True)
    (folder / "2026-11-22" / "_bigFiles" / "big").write_bytes(LARGE)
    with DesWriter(folder / "2026-11-22" / "0.des", external_prefix="2026-11-22/") as writer:
        writer.add_external("big", len(LARGE), meta_of(LARGE))
    return folder


@pytest.fixture(scope="module", params=["file", "s3"])
def source(request: pytest.FixtureRequest, folder: Path) -> Iterator[Source]:
    with source_of(request.param, folder, request) as made:
        yield made


def ok(source: Source, command: str, *arguments: object) -> str:
    done = desfs(command, source.url, *arguments, env=source.env)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def records(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_ls_shows_days_directories_and_files(source: Source, tree: Path) -> None:
    """docs/operations.md: `desfs ls` lists what a mount would show, by name."""
    assert ok(source, "ls").splitlines() == [DAY, "2026-11-21", "2026-11-22", "old"]
    names = {path.name for path in (tree / "photos").iterdir()}
    assert {record["path"] for record in records(ok(source, "ls", f"{DAY}/photos", "--json"))} == {
        f"{DAY}/photos/{name}" for name in names
    }
    for flag in ("-d", "--directory"):
        assert ok(source, "ls", flag, f"/{DAY}/photos/") == f"{DAY}/photos\n"
    assert ok(source, "ls", "old", "old/a/b").splitlines() == ["a", "c", "old/a/b"]


def test_ls_l_shows_mode_size_and_time(source: Source) -> None:
    first, second = ok(source, "ls", "--long", "old").splitlines()
    assert re.fullmatch(r"drwxr-xr-x +0 \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d a", first)
    assert second == "-rw-r-----            0 2023-11-14T22:13:20 c"


def test_ls_json_is_as_documented(source: Source) -> None:
    """docs/operations.md: the keys of `desfs ls --json`."""
    file, *rest = (each for each in records(ok(source, "ls", "-lR", "--json", "old")) if each["type"] == "file")
    assert file == {
        "path": "old/a/b",
        "type": "file",
        "size": 11,
        "mode": "0640",
        "mtime": "2023-11-14T22:13:20.000000000Z",
        "container": "old.des",
    }
    assert [each["path"] for each in rest] == ["old/c"]
    (directory,) = (each for each in records(ok(source, "ls", "--json", "old")) if each["type"] == "directory")
    assert directory.keys() == {"path", "type", "size", "mode", "mtime"}


def test_ls_r_shows_all_of_a_tree_with_times_to_the_nanosecond(source: Source, tree: Path) -> None:
    found = {
        str(each["path"]): each for each in records(ok(source, "ls", "-R", "--json", DAY)) if each["type"] == "file"
    }
    wanted = {f"{DAY}/{path.relative_to(tree)}": path for path in tree.rglob("*") if path.is_file()}
    assert found.keys() == wanted.keys()
    for name, path in wanted.items():
        status = path.stat()
        assert (found[name]["size"], found[name]["mode"]) == (status.st_size, f"{stat.S_IMODE(status.st_mode):04o}")
        assert str(found[name]["mtime"]).endswith(f".{status.st_mtime_ns % 10**9:09d}Z")


def test_names_with_control_characters_stay_in_their_line(source: Source, tree: Path) -> None:
    assert any("\n" in path.name for path in tree.rglob("*"))
    count = sum(1 for path in tree.rglob("*"))
    assert len(ok(source, "ls", "-R", DAY).splitlines()) == count


def test_one_container_by_itself(source: Source) -> None:
    """docs/operations.md: NAME.des is shown alone, without what else is in its day."""
    alone = Source(f"{source.url}/old.des", source.env)
    assert ok(alone, "ls", "-R").splitlines() == ["a", "a/b", "c"]
    assert ok(alone, "cat", "a/b") == "in the root"
    big = Source(f"{source.url}/2026-11-22/0.des", source.env)
    assert records(ok(big, "stat", "big", "--json"))[0]["size"] == len(LARGE)
    missing = desfs("ls", f"{source.url}/none.des", env=source.env)
    assert missing.returncode == 1
    assert "none.des: no such container" in missing.stderr


def test_cat_writes_bytes(source: Source, tree: Path) -> None:
    names = [path for path in tree.rglob("*") if path.is_file()][:5]
    done = subprocess.run(
        [PROGRAM, "cat", source.url, *(f"{DAY}/{path.relative_to(tree)}" for path in names), "2026-11-22/big"],
        env=os.environ | dict(source.env),
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == b"".join(path.read_bytes() for path in names) + LARGE


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("old/none", "old/none: no such file or directory"),
        ("old/a/b/c", "old/a/b/c: a part of it is no directory"),
        ("old/a", "old/a: is a directory"),
        ("2026-11-21/wrong", "'wrong': payload at byte"),
        ("2027-01-01/f", "2027-01-01/f: no such file or directory"),
    ],
)
def test_what_cannot_be_read_is_named(source: Source, path: str, message: str) -> None:
    """Exit status 1, and the files that can be read are written all the same."""
    done = desfs("cat", source.url, path, "old/a/b", env=source.env)
    assert (done.returncode, done.stdout) == (1, "in the root")
    (line,) = done.stderr.splitlines()
    assert line.startswith("desfs: ")
    assert message in line


def test_stat_shows_the_metadata(source: Source, tree: Path) -> None:
    path = next(path for path in tree.rglob("*") if path.is_file() and path.stat().st_size > 600)
    (record,) = records(ok(source, "stat", "--json", f"{DAY}/{path.relative_to(tree)}"))
    assert record["size"] == path.stat().st_size
    assert record["meta"]["sha256"] == record["sha256"]  # type: ignore[index]
    assert str(record["id"]).startswith("id-")
    text = ok(source, "stat", "old/a/b", "old")
    assert "container: old.des" in text
    assert "mode: 0640" in text


def test_a_store_that_is_none_is_named(tmp_path: Path) -> None:
    done = desfs("ls", tmp_path / "none")
    assert done.returncode == 1
    assert str(tmp_path / "none") in done.stderr
    (tmp_path / "desfs.toml").write_text("regoin = 1\n")
    done = desfs("ls", tmp_path, "--config", tmp_path / "desfs.toml")
    assert done.returncode == 2
    assert "desfs.toml: regoin is no setting; did you mean region?" in done.stderr
    done = desfs("ls", tmp_path, "--deadline", "soon")
    assert done.returncode == 2
    assert "--deadline" in done.stderr


def test_a_reader_that_has_had_enough(source: Source) -> None:
    """`desfs cat … | head -c 1` ends without a traceback."""
    with subprocess.Popen(
        [PROGRAM, "cat", source.url, "2026-11-22/big"],
        env=os.environ | dict(source.env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == LARGE[:1]
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


# --- extract -------------------------------------------------------------------------------------------------------


def test_extract_gives_a_tree_back(source: Source, tree: Path, tmp_path: Path) -> None:
    """docs/operations.md: `desfs extract` writes contents, times and permission bits."""
    text = ok(source, "extract", DAY, "2026-11-22/big", "--to", tmp_path / "out")
    found = {path.relative_to(tmp_path / "out" / DAY): path for path in (tmp_path / "out" / DAY).rglob("*")}
    wanted = {path.relative_to(tree): path for path in tree.rglob("*")}
    assert found.keys() == wanted.keys()
    for name, path in wanted.items():
        if path.is_file():
            one, two = found[name].stat(), path.stat()
            assert found[name].read_bytes() == path.read_bytes()
            assert (one.st_mtime_ns, one.st_mode) == (two.st_mtime_ns, two.st_mode)
    assert (tmp_path / "out" / "2026-11-22" / "big").read_bytes() == LARGE
    files = sum(path.is_file() for path in wanted.values()) + 1
    assert text.startswith(f"extracted {files} files (")


def test_extract_does_not_replace_unless_told_to(source: Source, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "c").write_text("mine")
    done = desfs("extract", source.url, "old", "-C", tmp_path, env=source.env)
    assert done.returncode == 1
    assert done.stderr == f"desfs: {tmp_path}/old/c: File exists\n"
    assert (tmp_path / "old" / "c").read_text() == "mine"
    assert (tmp_path / "old" / "a" / "b").read_text() == "in the root"
    ok(source, "extract", "old", "-C", tmp_path, "--overwrite")
    assert (tmp_path / "old" / "c").read_text() == ""


def test_extract_with_overwrite_keeps_what_it_cannot_replace(source: Source, tmp_path: Path) -> None:
    """A file has its name when it is whole; until then what had the name has it."""
    (tmp_path / "2026-11-21").mkdir()
    (tmp_path / "2026-11-21" / "wrong").write_text("mine")
    done = desfs("extract", source.url, "2026-11-21", "--to", tmp_path, "--overwrite", env=source.env)
    assert done.returncode == 1
    assert (tmp_path / "2026-11-21" / "wrong").read_text() == "mine"
    assert sorted(os.listdir(tmp_path / "2026-11-21")) == ["good", "wrong"]


def test_extract_follows_no_links_out_of_its_directory(source: Source, tmp_path: Path) -> None:
    target, outside = tmp_path / "target", tmp_path / "outside"
    outside.mkdir()
    (target / "old").mkdir(parents=True)
    (target / "old" / "a").symlink_to(outside)
    (target / "old" / "c").symlink_to(outside / "c")
    done = desfs("extract", source.url, "old", "--to", target, "--overwrite", env=source.env)
    assert done.returncode == 1
    assert "old/a: is there and no directory" in done.stderr
    assert os.listdir(outside) == []
    assert not (target / "old" / "c").is_symlink()


def test_extract_leaves_out_what_is_damaged_and_says_so(source: Source, tmp_path: Path) -> None:
    done = desfs("extract", source.url, "2026-11-21", "--to", tmp_path, env=source.env)
    assert done.returncode == 1
    assert "'wrong'" in done.stderr
    assert os.listdir(tmp_path / "2026-11-21") == ["good"]


def test_a_container_that_is_none_is_said_and_the_rest_goes_on(tmp_path: Path) -> None:
    """Exit status 1: not all is shown. With a strict setting its day cannot be listed, and the others are."""
    for day in ("2026-11-20", "2026-11-21", "2026-11-22"):
        put_container(tmp_path / "store" / day / "0.des", {"f": b"x"})
    (tmp_path / "store" / "2026-11-21" / "1.des").write_bytes(b"no container")
    done = desfs("ls", "-R", tmp_path / "store")
    assert (done.returncode, len(done.stdout.splitlines())) == (1, 6)
    assert "2026-11-21/1.des" in done.stderr
    strict = {"DESFS_STRICT": "true"}
    done = desfs("ls", "-R", tmp_path / "store", env=strict)
    assert (done.returncode, len(done.stdout.splitlines())) == (1, 5)
    done = desfs("extract", tmp_path / "store", "--to", tmp_path / "out", env=strict)
    assert done.returncode == 1
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("f")) == [
        "2026-11-20/f",
        "2026-11-22/f",
    ]


@pytest.mark.parametrize("command", ["ls", "cat", "stat"])
def test_a_full_standard_output_is_an_error(source: Source, command: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [PROGRAM, command, source.url, "old/a/b"],
            env=os.environ | dict(source.env),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (1, "desfs: standard output: No space left on device\n")


def test_an_interrupted_command_says_nothing(s3: S3Server, tmp_path: Path) -> None:
    """Exit status 130, as a shell has it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with subprocess.Popen(
            # A shell lets what it starts in the background ignore SIGINT.
            ["env", "--default-signal=INT", PROGRAM, "ls", "s3://bucket/p"],
            env=os.environ | s3.environ(endpoint_url=endpoint),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            silent.accept()[0].close()
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60) == (b"", b"")
            assert process.returncode == 130


def test_extract_drops_set_user_id_bits(tmp_path: Path) -> None:
    """docs/operations.md: set-user-ID, set-group-ID and sticky bits are not extracted."""
    put_container(tmp_path / "store" / DAY / "0.des", {"f": b"x"}, mode=0o6755)
    assert desfs("extract", tmp_path / "store", "--to", tmp_path / "out").returncode == 0
    assert stat.S_IMODE((tmp_path / "out" / DAY / "f").stat().st_mode) == 0o755
