"""desfs/imports: what sources hold, and what they do with links, damage and lies."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import random
import socket
import stat
import struct
import subprocess
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from desfs.imports.opening import open_source
from desfs.imports.source import Report, Skipped, SourceChanged, SourceDamaged, SourceFile

MIB = 1024 * 1024
BLOCK = 512
# 2026-03-04 05:06:08 UTC, and a bit.
SECONDS = 1_772_600_768
NS = SECONDS * 10**9 + 123_456_789


@dataclass
class Found:
    """What a source holds: contents, times and modes by name, and the report on the rest."""

    contents: dict[str, bytes]
    mtimes: dict[str, int | None]
    modes: dict[str, int | None]
    report: Report

    @property
    def refused(self) -> str:
        return "\n".join(self.report.failures)


def read(file: SourceFile, chunk: int = 100_000) -> bytes:
    with file.open() as payload:
        pieces = []
        while piece := payload.read(chunk):
            pieces.append(piece)
        payload.check()
    return b"".join(pieces)


@contextlib.contextmanager
def files_of(path: Path) -> Iterator[tuple[dict[str, SourceFile], Report]]:
    report = Report()
    source = open_source(str(path))
    try:
        files = list(source.files(report))
        assert len({file.name for file in files}) == len(files)
        yield {file.name: file for file in files}, report
    finally:
        source.close()


def find(path: Path) -> Found:
    with files_of(path) as (files, report):
        contents = {name: read(file) for name, file in files.items()}
        assert all(len(contents[name]) == file.size for name, file in files.items())
        mtimes = {name: file.mtime_ns for name, file in files.items()}
        return Found(contents, mtimes, {name: file.mode for name, file in files.items()}, report)


# --- directories -----------------------------------------------------------------------------------------------------


def test_a_directory_gives_its_contents(tmp_path: Path) -> None:
    """`desfs import DIR`: names are relative to the path; links, sockets and the like are counted, never followed."""
    root = tmp_path / "root"
    (root / "a/b").mkdir(parents=True)
    (root / "empty/inside").mkdir(parents=True)
    (root / "a/b/deep").write_bytes(b"deep")
    (root / "flat").write_bytes(b"")
    os.utime(root / "flat", ns=(0, NS))
    (root / "flat").chmod(0o4751)
    os.link(root / "flat", root / "hard")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_bytes(b"secret")
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "a/link").symlink_to(tmp_path / "outside/secret")
    os.mkfifo(root / "fifo")
    (root / os.fsdecode(b"latin\xe9")).write_bytes(b"?")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(root / "socket"))
        found = find(root)
    assert found.contents == {"a/b/deep": b"deep", "flat": b"", "hard": b""}
    assert (found.mtimes["flat"], found.modes["flat"]) == (NS, 0o4751)
    assert found.report.skipped == {
        Skipped.SYMBOLIC_LINK: 2,
        Skipped.FIFO: 1,
        Skipped.SOCKET: 1,
        Skipped.EMPTY_DIRECTORY: 1,
    }
    assert "not UTF-8" in found.refused


def test_a_path_that_was_given_may_be_a_link(tmp_path: Path) -> None:
    """Whoever writes a link on the command line means what it leads to."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root/file").write_bytes(b"content")
    (tmp_path / "to-root").symlink_to("root")
    (tmp_path / "to-file").symlink_to("root/file")
    assert find(tmp_path / "to-root").contents == {"file": b"content"}
    assert find(tmp_path / "to-file").contents == {"to-file": b"content"}


def test_a_directory_deeper_than_any_path_is_walked(tmp_path: Path) -> None:
    """Folders below the longest path that can be shown are refused by name; the walk needs no path of its own."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        for depth in range(17):
            os.mkdir("d" * 255, dir_fd=descriptor)
            below = os.open("d" * 255, os.O_RDONLY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
            if depth == 14:
                os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=descriptor))
    finally:
        os.close(descriptor)
    found = find(tmp_path)
    assert found.contents == {"/".join(["d" * 255] * 15 + ["file"]): b""}
    assert "more than the 4095 bytes" in found.refused
    subprocess.run(["rm", "-r", tmp_path / ("d" * 255)], check=True)


@pytest.mark.parametrize("change", ["written", "longer", "other file", "gone", "link", "folder is a link"])
def test_a_file_that_changed_since_it_was_found(tmp_path: Path, change: str) -> None:
    """A file that is not the one any more that was found is not read, and a link that has taken the place of a folder
    leads nowhere."""
    root = tmp_path / "root"
    (root / "d").mkdir(parents=True)
    path = root / "d/file"
    path.write_bytes(b"before")
    os.utime(path, ns=(0, NS))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_bytes(b"secret")
    os.utime(tmp_path / "outside/file", ns=(0, NS))
    with files_of(root) as (files, _):
        match change:
            case "written":
                path.write_bytes(b"beFore")
            case "longer":
                path.write_bytes(b"before and after")
                os.utime(path, ns=(0, NS))
            case "other file":
                path.rename(root / "old")
                path.write_bytes(b"BEFORE")
                os.utime(path, ns=(0, NS))
            case "gone":
                path.unlink()
            case "link":
                path.unlink()
                path.symlink_to(tmp_path / "outside/file")
            case "folder is a link":
                (root / "d").rename(root / "e")
                (root / "d").symlink_to(tmp_path / "outside")
        with pytest.raises((SourceChanged, OSError)):
            read(files["d/file"])


@pytest.mark.parametrize("kind", ["directory", "tar", "zip"])
def test_a_source_that_changes_while_it_is_read(tmp_path: Path, kind: str) -> None:
    """The check after the last byte notices a writer, whatever the file stands in."""
    path = tmp_path / "root"
    if kind == "directory":
        path.mkdir()
        (path / "file").write_bytes(b"x" * 1000)
    elif kind == "tar":
        path.write_bytes(tar_of({"file": b"x" * 1000}))
    else:
        path.write_bytes(zip_of({"file": b"x" * 1000}))
    with files_of(path) as (files, _), files["file"].open() as payload:
        payload.read(10)
        with open(path / "file" if kind == "directory" else path, "ab") as writer:
            writer.write(b"more")
        payload.read(5000)
        with pytest.raises(SourceChanged, match="changed while it was read"):
            payload.check()


# --- tar -------------------------------------------------------------------------------------------------------------


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.mtime = SECONDS
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def tar_with(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return buffer.getvalue()


def tar_of(contents: Mapping[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    return tar_with(*(member(name, content) for name, content in contents.items()), format=format)


def raw_header(name: bytes, size: bytes, type: bytes = b"0") -> bytes:
    """A ustar header with any bytes as its size."""
    block = bytearray(BLOCK)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124 : 124 + len(size)] = size
    block[136:148] = b"00000000000\0"
    block[156:157] = type
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax_header(records: Mapping[str, str]) -> bytes:
    body = b""
    for key, value in records.items():
        rest = f" {key}={value}\n".encode()
        length = len(rest) + 1
        while length != len(rest) + len(str(length)):
            length = len(rest) + len(str(length))
        body += str(length).encode() + rest
    return raw_header(b"pax", b"%011o\0" % len(body), b"x") + body + bytes(-len(body) % BLOCK)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "tar": bytes,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
}
LONG = "/".join(["a folder with a long name"] * 20)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_tar_is_known_by_its_content(tmp_path: Path, compression: str) -> None:
    """Whatever its name: the members come out with contents, times and modes, and `./` in front is left out."""
    path = tmp_path / "backup"
    contents = {"./a/b.txt": b"b" * 3000, "./empty": b"", f"./{LONG}": b"long", "./ä": b"umlaut"}
    path.write_bytes(COMPRESSIONS[compression](tar_of({".": b""} | contents)))
    found = find(path)
    # The member "." is a regular file here, which no entry can be.
    assert "'.'" in found.refused
    assert found.contents == {name.removeprefix("./"): content for name, content in contents.items()}
    assert set(found.mtimes.values()) == {SECONDS * 10**9}
    assert set(found.modes.values()) == {0o644}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_formats(tmp_path: Path, format: int) -> None:
    """All that Python writes is read; ustar has shorter names."""
    path = tmp_path / "x.tar"
    contents = {"a/b": b"1" * 513, "c": b"2" * 512, "d": b""} | ({} if format == tarfile.USTAR_FORMAT else {LONG: b"l"})
    path.write_bytes(tar_of(contents, format))
    assert find(path).contents == contents


@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_what_gnu_tar_writes(tmp_path: Path, format: str) -> None:
    """Hard links are files with the content, time and mode of their targets; of extended headers (posix) times are
    exact; directories, links and FIFOs are counted."""
    root = tmp_path / "root"
    (root / "d/empty").mkdir(parents=True)
    (root / "d/file").write_bytes(b"content")
    (root / "d/file").chmod(0o640)
    os.utime(root / "d/file", ns=(0, NS))
    os.link(root / "d/file", root / "d/hard")
    (root / "link").symlink_to("d/file")
    if format != "v7":
        os.mkfifo(root / "fifo")
    subprocess.run(["tar", "-cf", tmp_path / "x.tar", f"--format={format}", "-C", root, "."], check=True)
    found = find(tmp_path / "x.tar")
    assert found.contents == {"d/file": b"content", "d/hard": b"content"}
    assert set(found.mtimes.values()) == {NS if format == "posix" else SECONDS * 10**9}
    assert set(found.modes.values()) == {0o640}
    assert found.report.skipped == {
        Skipped.SYMBOLIC_LINK: 1,
        Skipped.EMPTY_DIRECTORY: 1,
        **({} if format == "v7" else {Skipped.FIFO: 1}),
    }
    assert found.report.failures == []


@pytest.mark.parametrize("version", ["gnu", "0.0", "0.1", "1.0"])
def test_sparse_files(tmp_path: Path, version: str) -> None:
    """What a sparse file does not hold is zeros, in each of the four ways to write one."""
    path = tmp_path / "sparse"
    expected = bytearray(3 * MIB + 5)
    with open(path, "wb") as file:
        for at, piece in ((0, b"start"), (MIB, b"x" * 70_000), (2 * MIB + 3, b"there"), (3 * MIB, b"end!!")):
            file.seek(at)
            file.write(piece)
            expected[at : at + len(piece)] = piece
    holes = tmp_path / "holes"
    with open(holes, "wb") as file:
        file.truncate(MIB)
    how = ["--format=gnu"] if version == "gnu" else ["--format=posix", f"--sparse-version={version}"]
    command = ["tar", "-cf", f"{tmp_path}/x.tar", "--sparse", *how, "-C", f"{tmp_path}", "sparse", "holes"]
    subprocess.run(command, check=True)
    assert (tmp_path / "x.tar").stat().st_size < MIB
    assert find(tmp_path / "x.tar").contents == {"sparse": bytes(expected), "holes": bytes(MIB)}


def test_hostile_names_and_members(tmp_path: Path) -> None:
    """Names that no entry can have are refused, each by name, and the others imported: a file "through" a symbolic
    link is a file of that name, and nothing outside is touched."""
    path = tmp_path / "x.tar"
    path.write_bytes(
        tar_with(
            member("good", b"good"),
            member("/etc/passwd", b"absolute"),
            member("../up", b"above"),
            member("a/../../up", b"above"),
            member("a//b", b"empty component"),
            member("n" * 256, b"too long"),
            member("out", type=tarfile.SYMTYPE, linkname="/etc"),
            member("out/hostname", b"through the link"),
            member("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
            member("disk", type=tarfile.BLKTYPE),
            member("pipe", type=tarfile.FIFOTYPE),
            member("hard to nowhere", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
            member("hard to a later one", type=tarfile.LNKTYPE, linkname="late"),
            member("hard to a link", type=tarfile.LNKTYPE, linkname="out"),
            member("late", b"late"),
            member("odd", b"odd", type=b"Z"),
            member("label", type=b"V"),
        )
    )
    found = find(path)
    assert found.contents == {"good": b"good", "out/hostname": b"through the link", "late": b"late"}
    assert found.report.skipped == {
        Skipped.SYMBOLIC_LINK: 2,
        Skipped.CHARACTER_DEVICE: 1,
        Skipped.BLOCK_DEVICE: 1,
        Skipped.FIFO: 1,
    }
    assert found.report.refused == len(found.report.failures) == 8
    for part in ("'/etc/passwd': the name is an absolute path", "'../up'", "'a/../../up'", "'a//b'", "256 bytes"):
        assert part in found.refused
    for part in ("'hard to nowhere': a hard link to '/etc/passwd'", "'hard to a later one'", "'odd': a member of an"):
        assert part in found.refused


def test_the_last_of_a_name_counts(tmp_path: Path) -> None:
    """As when the archive is unpacked: a later file replaces an earlier one, and so does a link; it is said."""
    path = tmp_path / "x.tar"
    path.write_bytes(
        tar_with(
            member("a", b"first"),
            member("hard", type=tarfile.LNKTYPE, linkname="./a"),
            member("./a", b"second"),
            member("b", b"was a file"),
            member("b", type=tarfile.SYMTYPE, linkname="a"),
            member("a/", type=tarfile.DIRTYPE),
        )
    )
    found = find(path)
    assert found.contents == {"a": b"second", "hard": b"first"}
    assert found.report.replaced == 2
    assert "'a' is in it more than once" in found.report.notes[0]


def test_times_of_a_tar(tmp_path: Path) -> None:
    """Decimal times are cut to nanoseconds, those before 1970 too; what is no time is none."""
    path = tmp_path / "x.tar"
    times = {
        "1772600768.1234567899": NS,
        "-1.5": -1_500_000_000,
        "0": 0,
        "nan": None,
        "1e30": None,
        "9223372036.9": None,
        "soon": None,
        "9" * 100: None,
    }
    path.write_bytes(tar_with(*(member(f"{n}", pax_headers={"mtime": text}) for n, text in enumerate(times))))
    assert list(find(path).mtimes.values()) == list(times.values())


TRUNCATED = tar_with(
    member("first", b"1" * 700),
    member(LONG, b"2" * 10),
    member("directory", type=tarfile.DIRTYPE),
    member("exact", b"3" * 512, pax_headers={"mtime": "1.5"}),
)


def test_a_tar_that_was_cut_off_anywhere(tmp_path: Path) -> None:
    """Wherever it was cut: an error that names the byte, never a part of it in silence; behind the first block of
    zeros all is there."""
    end = -(-len(TRUNCATED.rstrip(b"\0")) // BLOCK) * BLOCK
    assert end < len(TRUNCATED) - 2 * BLOCK
    path = tmp_path / "x.tar"
    for cut in {*range(1, end, 37), *range(BLOCK, end + 1, BLOCK), *range(BLOCK + 1, end, BLOCK)}:
        path.write_bytes(TRUNCATED[:cut])
        with pytest.raises(SourceDamaged, match=r"damaged at byte \d+: "):
            find(path)
    for cut in (end + 1, end + BLOCK, end + 2 * BLOCK, len(TRUNCATED)):
        path.write_bytes(TRUNCATED[:cut])
        assert len(find(path).contents) == 3


def test_a_damaged_header_is_never_the_end(tmp_path: Path) -> None:
    """tarfile takes a header that it does not understand for the end of the archive."""
    path = tmp_path / "x.tar"
    raw = bytearray(tar_of({"a": b"1", "b": b"2", "c": b"3"}, tarfile.USTAR_FORMAT))
    raw[2 * BLOCK + 5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(SourceDamaged, match="damaged at byte 1024: no header: bad checksum"):
        find(path)


def test_flipped_bits_in_a_tar(tmp_path: Path) -> None:
    """Any flipped byte of a header is an error, or a file that is refused: never another exception, never a file
    less without a word."""
    path = tmp_path / "x.tar"
    chosen = random.Random(1)
    names = set(find_all(path, TRUNCATED))
    for _ in range(400):
        raw = bytearray(TRUNCATED)
        at = chosen.randrange(len(TRUNCATED.rstrip(b"\0")))
        raw[at] ^= 1 << chosen.randrange(8)
        path.write_bytes(raw)
        try:
            found = find(path)
        except SourceDamaged:
            continue
        # In the text of an extended header a flip gives another name or time; in a payload other bytes.
        assert len(found.contents) + found.report.refused == len(names), at


def find_all(path: Path, raw: bytes) -> dict[str, bytes]:
    path.write_bytes(raw)
    return find(path).contents


MINUS = b"\xff" * 10 + b"\xfb\xff"  # -1025, two blocks


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        # Python before 3.11.14 goes round in circles: the header that follows is one that came before.
        (raw_header(b"a", b"%011o\0" % 0) + pax_header({"size": "-1536"}) + raw_header(b"b", b""), "negative size"),
        (pax_header({"size": "-512"}) + raw_header(b"b", b"%011o\0" % 0), "negative size"),
        (raw_header(b"a", MINUS), "negative size"),
        (raw_header(b"a", MINUS, b"x") + bytes(BLOCK), "found -1024 bytes"),
        # Half a terabyte of header.
        (raw_header(b"a", b"\x80" + bytes(5) + b"\x80" + bytes(5), b"x"), "want at most 8388096"),
        (raw_header(b"a", b"\x80" + bytes(5) + b"\x80" + bytes(5), b"L"), "want at most 8388096"),
        (raw_header(b"a", b"\x80" + bytes(5) + b"\x80" + bytes(5)), "goes on to byte"),
        (pax_header({"comment": "x"}) * 3000 + raw_header(b"b", b""), "recursion"),
        (pax_header({"GNU.sparse.map": "1,2,x"}) + raw_header(b"b", b""), "invalid literal"),
        (pax_header({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}) + raw_header(b"b", b""), "no header"),
        (raw_header(b"a", b"%011o\0" % 0, b"S")[:BLOCK], "damaged"),
    ],
    ids=range(11),
)
def test_lies_about_sizes(tmp_path: Path, raw: bytes, message: str) -> None:
    """Headers that would make a reader go back, take all memory or nest without end are damage."""
    path = tmp_path / "x.tar"
    path.write_bytes(raw)
    with pytest.raises(SourceDamaged, match=message):
        find(path)


@pytest.mark.parametrize(
    ("size", "map", "message"),
    [
        (100, "0,50,40,10", "after 50"),
        (100, "50,51", "with 51 bytes at 50"),
        (100, "0,-5,0,5", "-5 bytes"),
        (10**6, "0,1000000", "more data than the 512 bytes"),
        (-3, "0,0", "a size of -3"),
    ],
)
def test_lies_about_sparse_files(tmp_path: Path, size: int, map: str, message: str) -> None:
    """A map of a sparse file that makes no sense is that file's fault alone."""
    path = tmp_path / "x.tar"
    lying = pax_header({"GNU.sparse.size": f"{size}", "GNU.sparse.map": map, "GNU.sparse.name": "lying"})
    data = raw_header(b"lying", b"%011o\0" % 512) + bytes(BLOCK)
    path.write_bytes(lying + data + tar_of({"good": b"good"}))
    found = find(path)
    assert found.contents == {"good": b"good"}
    assert "'lying': " in found.refused
    assert message in found.refused


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz", "lzma"])
def test_a_compressed_tar_that_is_damaged(tmp_path: Path, compression: str) -> None:
    """Cut off anywhere, or with bits flipped: an error that says how far it went. (Plain LZMA has no checksum.)"""
    content = random.Random(2).randbytes(30_000)
    whole = COMPRESSIONS[compression](tar_of({"a": content}))
    path = tmp_path / f"x.tar.{compression}"
    assert find_all(path, whole) == {"a": content}
    for cut in (20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(SourceDamaged, match=r"after \d+ bytes of what it holds"):
            find(path)
    if compression != "lzma":
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(SourceDamaged, match=r"after \d+ bytes of what it holds"):
            find(path)


def test_damage_inside_of_a_compressed_tar(tmp_path: Path) -> None:
    """Positions count in what was decompressed, and the message says so."""
    path = tmp_path / "x.tgz"
    path.write_bytes(gzip.compress(TRUNCATED[: BLOCK * 3], mtime=0))
    with pytest.raises(SourceDamaged, match=f"byte {BLOCK * 3} of what it holds decompressed"):
        find(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tar", b"no archive", "damaged at byte 0: found b'no archi', want the header of a tar"),
        ("x.TAR", b"", "the file is empty"),
        ("x.tar.gz", b"no archive", "want the header of a tar archive, or gzip, bzip2 or xz"),
        ("x.tgz", gzip.compress(b"no archive" * 100, mtime=0), "damaged at byte 0 of what it holds"),
        ("x.tar.zst", b"\x28\xb5\x2f\xfd....", "want the header of a tar archive, or gzip, bzip2 or xz"),
        ("x.zip", b"no archive", "directory, before byte 10"),
        ("x.zip", b"", "directory, before byte 0"),
    ],
)
def test_what_is_called_an_archive_and_is_none(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """It is an error, and not imported as a file."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceDamaged, match=message):
        find(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.gz", gzip.compress(b"notes", mtime=0)),
        ("notes.xz", lzma.compress(b"notes" * 1000)),
        ("empty", b""),
        ("zeros", bytes(4096)),
        ("looks like", b"PK\x03\x04 and no more"),
        ("table.tarot", b"cards"),
        ("]", b"]\x00\x00 is how plain LZMA begins"),
        ("broken", b"\x1f\x8b and no more"),
    ],
)
def test_what_is_no_archive_is_a_file(tmp_path: Path, name: str, content: bytes) -> None:
    """A file that is no archive is imported as it is, by its base name."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_bytes(content)
    assert find(tmp_path / "folder" / name).contents == {name: content}


def test_an_archive_without_members(tmp_path: Path) -> None:
    """Nothing to import is no error; of zeros only the name tells."""
    (tmp_path / "x.tar").write_bytes(bytes(10_240))
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(bytes(10_240)))
    (tmp_path / "zip").write_bytes(zip_of({}))
    for name in ("x.tar", "x.tar.gz", "zip"):
        found = find(tmp_path / name)
        assert (found.contents, found.refused) == ({}, "")


def test_what_is_neither_a_file_nor_a_directory(tmp_path: Path) -> None:
    """A FIFO is not waited for."""
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SourceDamaged, match="found a FIFO"):
        find(tmp_path / "fifo")
    with pytest.raises(FileNotFoundError):
        find(tmp_path / "nothing")


# --- zip -------------------------------------------------------------------------------------------------------------


def zip_info(name: str, **fields: object) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, (2026, 3, 4, 5, 6, 8))
    info.external_attr = (stat.S_IFREG | 0o640) << 16
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def zip_with(*members: tuple[zipfile.ZipInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for info, content in members:
            zipped.writestr(info, content)
    return buffer.getvalue()


def zip_of(contents: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    return zip_with(*((zip_info(name, compress_type=method), content) for name, content in contents.items()))


METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]


@pytest.mark.parametrize("method", METHODS)
def test_a_zip_is_known_by_its_content(tmp_path: Path, method: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its name, and however it is compressed; its times are local ones."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        path = tmp_path / "backup"
        mixed = random.Random(3).randbytes(300_000) + bytes(700_000)
        contents = {"a/b.txt": b"text " * 1000, "empty": b"", "ä": mixed, "./dotted": b"."}
        path.write_bytes(zip_of(contents, method))
        found = find(path)
        assert found.contents == {name.removeprefix("./"): content for name, content in contents.items()}
        local = SECONDS - 9 * 3600
        assert set(found.mtimes.values()) == {local * 10**9}
        assert set(found.modes.values()) == {0o640}
    finally:
        monkeypatch.undo()
        time.tzset()


def test_times_modes_and_names_of_extra_fields(tmp_path: Path) -> None:
    """Times of Unix (0x5455) and NTFS are better than local ones; where there is no mode, none is made up; a name in
    UTF-8 (0x7075) counts if its checksum is that of the name it belongs to."""
    unix = struct.pack("<HHBl", 0x5455, 5, 1, SECONDS)
    before = struct.pack("<HHBl", 0x5455, 5, 1, -5)
    access = struct.pack("<HHBl", 0x5455, 5, 2, 7)  # only an access time
    ticks = SECONDS * 10**7 + 1_234_567 + 116_444_736_000_000_000
    ntfs = struct.pack("<HHLHHQQQ", 0x000A, 32, 0, 1, 24, ticks, 0, 0)
    name = struct.pack("<HHBL", 0x7075, 5 + 3, 1, zlib.crc32(b"caf?")) + "é!".encode()
    stale = struct.pack("<HHBL", 0x7075, 5 + 3, 1, 0) + "é!".encode()
    path = tmp_path / "x.zip"
    path.write_bytes(
        zip_with(
            (zip_info("unix", extra=unix), b""),
            (zip_info("before", extra=before), b""),
            (zip_info("access", extra=access), b""),
            (zip_info("ntfs", extra=unix + ntfs), b""),
            (zip_info("caf?", extra=name), b""),
            (zip_info("stale", extra=stale), b""),
            (zip_info("dos", create_system=0, external_attr=0x20), b""),
            (zip_info("no day", date_time=(1980, 0, 0, 0, 0, 0)), b""),
        )
    )
    found = find(path)
    assert found.mtimes["unix"] == SECONDS * 10**9
    assert found.mtimes["before"] == -5 * 10**9
    assert found.mtimes["access"] == found.mtimes["dos"]
    assert found.mtimes["ntfs"] == SECONDS * 10**9 + 123_456_700
    assert found.mtimes["no day"] is None
    assert {"é!", "stale"} <= found.contents.keys()
    assert (found.modes["dos"], found.modes["unix"]) == (None, 0o640)


def test_hostile_members_of_a_zip(tmp_path: Path) -> None:
    """As of a tar: refused by name, and the others imported; links are counted, never made."""
    link = (stat.S_IFLNK | 0o777) << 16
    path = tmp_path / "x.zip"
    raw = zip_with(
        (zip_info("good"), b"good"),
        (zip_info("/etc/passwd"), b"absolute"),
        (zip_info("../up"), b"above"),
        (zip_info("out", external_attr=link), b"/etc"),
        (zip_info("out/hostname"), b"through the link"),
        (zip_info("d/", external_attr=(stat.S_IFDIR | 0o755) << 16), b""),
        (zip_info("e/f/"), b""),
        (zip_info("e/"), b""),
        (zip_info("nul.txt@.exe"), b"nul"),
        (zip_info("secret"), b"encrypted"),
        (zip_info("odd"), b"odd"),
    ).replace(b"nul.txt@", b"nul.txt\0")
    raw = with_field(raw, b"secret", flags=1)
    raw = with_field(raw, b"odd", method=9)
    path.write_bytes(raw)
    found = find(path)
    assert found.contents == {"good": b"good", "out/hostname": b"through the link"}
    assert found.report.skipped == {Skipped.SYMBOLIC_LINK: 1, Skipped.EMPTY_DIRECTORY: 2}
    assert found.report.refused == 5
    for part in (
        "'/etc/passwd': the name is an absolute path",
        "'../up'",
        "NUL at byte 7",
        "'secret': is encrypted",
        "'odd': is compressed by a method that is not supported, 9",
    ):
        assert part in found.refused


def with_field(raw: bytes, name: bytes, **fields: int) -> bytes:
    """A zip whose central directory says something else of a member."""
    places = {"flags": (8, "<H"), "method": (10, "<H"), "crc32": (16, "<L"), "stored": (20, "<L"), "size": (24, "<L")}
    places["header_at"] = (42, "<L")
    changed = bytearray(raw)
    at = raw.rindex(name) - 46
    assert raw[at : at + 4] == b"PK\x01\x02"
    for field, value in fields.items():
        offset, form = places[field]
        struct.pack_into(form, changed, at + offset, value)
    return bytes(changed)


def test_the_last_of_a_name_counts_in_a_zip(tmp_path: Path) -> None:
    """As in a tar, and it is said."""
    path = tmp_path / "x.zip"
    with pytest.warns(UserWarning, match="Duplicate"):
        path.write_bytes(zip_with((zip_info("a"), b"first"), (zip_info("a"), b"second")))
    found = find(path)
    assert (found.contents, found.report.replaced) == ({"a": b"second"}, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crc32": 5}, "want 00000005"),
        ({"size": 2999}, "goes on after its 2999 bytes"),
        ({"size": 3001}, "ends after 3000 of 3001 bytes"),
        ({"size": 2**31}, "ends after 3000 of"),
        ({"stored": 10}, "ends after"),
        ({"stored": 2**31}, "the archive ends at byte"),
        ({"header_at": 3}, "local header at byte 3"),
        ({"header_at": 2**31}, "local header at byte 2147483648: found b''"),
        ({"method": 0}, "ends after|goes on after|checksum"),
        ({"method": 14}, "its data at byte|ends after"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_lies_about_a_member_of_a_zip(tmp_path: Path, method: int, fields: dict[str, int], message: str) -> None:
    """Its bytes are never imported, and the other members are."""
    if fields.get("method") == method:
        message = "never"
    if method == zipfile.ZIP_LZMA and fields.get("size") == 2999:
        message = "found a checksum"
    path = tmp_path / "x.zip"
    content = random.Random(4).randbytes(1000) * 3
    path.write_bytes(with_field(zip_of({"lying": content, "good": b"good"}, method), b"lying", **fields))
    with files_of(path) as (files, _):
        assert read(files["good"]) == b"good"
        if message == "never":
            assert read(files["lying"]) == content
        else:
            with pytest.raises(SourceDamaged, match=message):
                read(files["lying"])


def test_a_zip_that_was_cut_off(tmp_path: Path) -> None:
    """Its directory is at its end: without it nothing is known."""
    whole = zip_of({"a": b"1" * 1000, "b": b"2"})
    path = tmp_path / "x.zip"
    for cut in range(1, len(whole), 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(SourceDamaged, match=f"directory, before byte {cut}"):
            find(path)


@pytest.mark.parametrize("method", METHODS)
def test_flipped_bits_in_a_zip(tmp_path: Path, method: int) -> None:
    """Whatever is flipped: the archive or the member is refused, or is what it was (its name and time are anybody's);
    never another exception, never other bytes."""
    contents = {"first": b"1" * 700, "second": random.Random(5).randbytes(300)}
    whole = zip_of(contents, method)
    path = tmp_path / "x.zip"
    chosen = random.Random(6)
    for _ in range(250):
        raw = bytearray(whole)
        raw[chosen.randrange(len(raw))] ^= 1 << chosen.randrange(8)
        path.write_bytes(raw)
        try:
            with files_of(path) as (files, _):
                for file in files.values():
                    with contextlib.suppress(SourceDamaged):
                        assert read(file) in (*contents.values(), b"")
        except SourceDamaged:
            continue


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_bomb_never_is_in_memory(tmp_path: Path, method: int) -> None:
    """64 MiB of zeros in a few KiB are read in pieces of the size asked for, whatever the compression can do."""
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", method) as zipped, zipped.open("zeros", "w") as writer:
        for _ in range(64):
            writer.write(bytes(MIB))
    assert path.stat().st_size < 100_000
    with files_of(path) as (files, _), files["zeros"].open() as payload:
        tracemalloc.start()
        try:
            size = 0
            while piece := payload.read(MIB):
                assert len(piece) == MIB
                size += len(piece)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert size == 64 * MIB
    assert peak < 16 * MIB  # LZMA's dictionary has 8


def test_a_zip_behind_something_else_is_read_if_its_name_says_so(tmp_path: Path) -> None:
    """A self-extracting archive begins with a program: it is a file of its own, unless it is called a zip."""
    raw = b"#!/bin/sh\nexit 1\n" + zip_of({"a": b"1"})
    (tmp_path / "setup.exe").write_bytes(raw)
    (tmp_path / "setup.zip").write_bytes(raw)
    assert find(tmp_path / "setup.exe").contents == {"setup.exe": raw}
    assert find(tmp_path / "setup.zip").contents == {"a": b"1"}


def test_many_failures_are_counted_and_not_all_kept(tmp_path: Path) -> None:
    """A hostile archive cannot fill memory or a terminal with messages."""
    path = tmp_path / "x.tar"
    path.write_bytes(tar_with(*(member(f"/{n}") for n in range(1000))))
    found = find(path)
    assert (found.report.refused, len(found.report.failures)) == (1000, 100)
