"""Writing containers: the golden ones, round trips, refusals, and what a crash leaves."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from des_format import DesReader, DesWriter, InvalidEntryName, InvalidMeta, SizeMismatch, WriterClosed
from des_format.errors import DesFormatError
from des_format.layout import BIG_FILE_THRESHOLD
from des_format.meta import MetaColumns
from des_format.names import name_problem
from tests import fixtures


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "f.des"


def left(folder: Path) -> list[str]:
    """All files below a folder, by name."""
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file())


# --- bytes -------------------------------------------------------------------------------------------------------


GOLDEN = [
    pytest.param(case, id=f"{folder.parent.name}: {case['name']}")
    for folder in fixtures.FOLDERS
    for case in fixtures.golden(folder)
]


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_containers_byte_for_byte(case: dict[str, Any], path: Path) -> None:
    """Writers encode in one way, so that equal inputs give equal bytes."""
    with DesWriter(path) as writer:
        for row in case["files"]:
            writer.add_file(row["name"], bytes.fromhex(row["hex"]), row.get("meta"))
    raw = path.read_bytes()
    assert (len(raw), sha256(raw).hexdigest()) == (case["size"], case["sha256"])


def test_a_stream_gives_the_same_bytes_as_memory(tmp_path: Path) -> None:
    payloads = {"a": b"x" * 3_000_000, "b": b"", "c": b"z"}
    with DesWriter(tmp_path / "memory.des") as memory, DesWriter(tmp_path / "stream.des") as stream:
        for name, payload in payloads.items():
            memory.add_file(name, payload, {"k": name})
            stream.add_stream(name, io.BytesIO(payload), len(payload), {"k": name})
    assert (tmp_path / "memory.des").read_bytes() == (tmp_path / "stream.des").read_bytes()


@pytest.mark.parametrize("data", [bytearray(b"12345678"), memoryview(b"12345678"), memoryview(array("I", [1, 2]))])
def test_any_buffer_is_stored_with_all_its_bytes(data: bytearray | memoryview, path: Path) -> None:
    with DesWriter(path) as writer:
        writer.add_file("a", data)
        writer.add_file("big", data, force_external=True)
        writer.add_file("b", b"after")
    with DesReader(path) as reader:
        wanted = {"a": bytes(data), "big": bytes(data), "b": b"after"}
        assert reader.get_files_batch(wanted) == wanted


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda name: name_problem(name.encode()) is None
)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | FLOATS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
METAS = st.none() | st.dictionaries(
    st.text().filter(lambda key: key not in ("is_external", "external_key", "crc32c", "sha256")), VALUES, max_size=3
)
ENTRIES = st.lists(
    st.tuples(NAMES, st.binary(max_size=3000), METAS, st.sampled_from(["memory", "stream", "external", "big stream"])),
    max_size=8,
)


@settings(max_examples=150)
@given(ENTRIES)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, entries: list[Any]) -> None:
    """Every file written must be readable; if a name stands twice in one container, the last entry wins."""
    folder = tmp_path_factory.mktemp("round")
    model: dict[str, tuple[bytes, dict[str, Any]]] = {}
    with DesWriter(folder / "f.des") as writer:
        for name, data, meta, how in entries:
            try:
                if "stream" in how:
                    writer.add_stream(name, io.BytesIO(data), len(data), meta, force_external="big" in how)
                else:
                    writer.add_file(name, data, meta, force_external=how == "external")
            except OSError:  # one name is a directory of the other: as external files both cannot be
                assert "external" in how or "big" in how
                continue
            extra = (
                {"is_external": True, "external_key": f"_bigFiles/{name}"} if how in ("external", "big stream") else {}
            )
            model[name] = data, (meta or {}) | {"size": len(data)} | extra
        assert not (folder / "f.des").exists()
    with DesReader(folder / "f.des") as reader:
        assert sorted(reader.list_files()) == sorted(model)
        assert reader.get_files_batch(model) == {name: data for name, (data, _) in model.items()}
        for name, (data, meta) in model.items():
            assert reader.get_file(name) == data
            assert reader.get_meta(name) == meta


def test_times_are_written_with_all_their_digits(path: Path) -> None:
    """Metadata: `mtime`, seconds since the epoch, as a decimal number with up to 9 fractional digits."""
    times = [0, 1, 999_999_999, 1_763_000_000_123_456_789, 1_763_000_000_000_000_001, -1, 4_102_444_800_999_999_999]
    with DesWriter(path) as writer:
        for number, mtime_ns in enumerate(times):
            writer.add_file(f"{number}", b"x", {"mtime": Decimal(mtime_ns).scaleb(-9), "mode": 0o640})
    with DesReader(path) as reader:
        index = reader.get_index()
        columns = MetaColumns(index.rows)
        footer = index.footer
        columns.fill(index, path.read_bytes()[footer.meta_start :][: footer.meta_length], footer.meta_start)
        assert columns.mtime_ns.tolist() == times
        assert set(columns.mode.tolist()) == {0o640}
        assert not columns.damaged.any()


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "empty"),
        ("/a", "absolute"),
        ("a//b", "empty component"),
        ("a/", "empty component"),
        ("a/../b", "'..'"),
        (".", "'.'"),
        ("a\0", "NUL"),
        ("\ud800", "not UTF-8"),
        ("n" * 256, "256 bytes"),
        ("n" * 70_000, "70000 bytes"),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_a_name_that_cannot_be_written_is_refused_with_the_reason_and_the_rest_goes_on(
    name: str, reason: str, path: Path
) -> None:
    with DesWriter(path) as writer:
        writer.add_file("before", b"1")
        calls: list[Callable[[], None]] = [
            lambda: writer.add_file(name, b"x"),
            lambda: writer.add_file(name, b"x", force_external=True),
            lambda: writer.add_stream(name, io.BytesIO(b"x"), 1),
            lambda: writer.add_external(name, 1),
        ]
        for refused in calls:
            with pytest.raises(InvalidEntryName) as error:
                refused()
            assert reason in str(error.value)
        writer.add_file("after", b"2")
    with DesReader(path) as reader:
        assert reader.get_files_batch(reader.list_files()) == {"before": b"1", "after": b"2"}
    assert left(path.parent) == ["f.des"]


def test_strict_names(path: Path) -> None:
    """`strict_names=True` also refuses `/ \\ : * ? " < > |`."""
    with DesWriter(path, strict_names=True) as writer:
        for character in '/\\:*?"<>|':
            with pytest.raises(InvalidEntryName, match="strict_names"):
                writer.add_file(f"a{character}b", b"")
        writer.add_file("plain.txt", b"1")
    with DesWriter(path) as writer:
        for character in '/\\:*?"<>|':
            writer.add_file(f"a{character}b", b"")
        assert writer.file_count == 9


@pytest.mark.parametrize(
    "meta", [{"k": float("nan")}, {"k": object()}, {1: 2}, {"k": "x" * 2**24}, {"k": Decimal("inf")}]
)
def test_metadata_that_cannot_be_written_is_refused_and_the_rest_goes_on(meta: dict[Any, Any], path: Path) -> None:
    with DesWriter(path) as writer:
        writer.add_file("before", b"1")
        for external in (False, True):
            with pytest.raises(InvalidMeta):
                writer.add_file("x", b"lost", meta, force_external=external)
            with pytest.raises(InvalidMeta):
                writer.add_stream("x", io.BytesIO(b"lost"), 4, lambda: meta, force_external=external)
        writer.add_file("after", b"2")
        assert writer.data_length == 2
    with DesReader(path) as reader:
        assert reader.get_files_batch(reader.list_files()) == {"before": b"1", "after": b"2"}
        assert reader.get_stats().dead_bytes == 0
    assert left(path.parent) == ["f.des"]


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize(("held", "announced"), [(5, 6), (6, 5), (0, 1), (1, 0), (3_000_000, 3_000_001)])
def test_a_stream_of_another_size_is_refused_and_the_rest_goes_on(
    held: int, announced: int, external: bool, path: Path
) -> None:
    with DesWriter(path) as writer:
        writer.add_file("before", b"1")
        with pytest.raises(SizeMismatch, match=r"'x': the source (ended|goes on)"):
            writer.add_stream("x", io.BytesIO(b"#" * held), announced, force_external=external)
        writer.add_file("after", b"2")
    with DesReader(path) as reader:
        assert reader.get_files_batch(reader.list_files()) == {"before": b"1", "after": b"2"}
    assert left(path.parent) == ["f.des"]


class FailingStream:
    """A source that breaks after some bytes."""

    def __init__(self, good: int) -> None:
        self._good = good

    def read(self, size: int, /) -> bytes:
        if not self._good:
            raise OSError(errno.EIO, "broken")
        piece = min(size, self._good)
        self._good -= piece
        return b"#" * piece


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("good", [0, 10, 3_000_000])
def test_a_failing_stream_leaves_nothing_of_its_entry(good: int, external: bool, path: Path) -> None:
    with pytest.raises(OSError, match="broken"), DesWriter(path) as writer:  # noqa: PT012
        writer.add_file("before", b"1")
        writer.add_stream("x", FailingStream(good), 4_000_000, force_external=external)
    assert left(path.parent) == []


@pytest.mark.parametrize(
    "arguments", [{"big_file_threshold": 0}, {"external_prefix": "no-slash"}], ids=lambda value: next(iter(value))
)
def test_senseless_arguments(arguments: dict[str, Any], path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        DesWriter(path, **arguments)
    assert left(path.parent) == []


# --- external files ---------------------------------------------------------------------------------------------------


class Store:
    """An external store that keeps what it is given."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def put(self, key: str, source: bytes | Path) -> None:
        self.objects[key] = source if isinstance(source, bytes) else source.read_bytes()


@pytest.mark.parametrize(("length", "external"), [(9, False), (10, True), (11, True)])
def test_a_payload_of_at_least_the_threshold_is_external(length: int, external: bool, path: Path) -> None:
    """External files: a payload of at least the big-file threshold (default 100 MiB = 104,857,600 bytes)."""
    assert BIG_FILE_THRESHOLD == 104_857_600
    with DesWriter(path, big_file_threshold=10) as writer:
        writer.add_file("m", b"x" * length)
        writer.add_stream("s", io.BytesIO(b"y" * length), length)
    with DesReader(path) as reader:
        assert reader.get_stats().external_files == 2 * external
        assert reader.get_files_batch(["m", "s"]) == {"m": b"x" * length, "s": b"y" * length}
    assert left(path.parent) == (["_bigFiles/m", "_bigFiles/s"] if external else []) + ["f.des"]


def test_external_files_go_to_the_store_under_the_rules_key(path: Path) -> None:
    """`external_key` in META records the key that was used."""
    store = Store()
    with DesWriter(path, external_store=store, external_prefix="day/", big_file_threshold=5) as writer:
        writer.add_file("d/m", b"12345")
        writer.add_stream("s", io.BytesIO(b"123456"), 6)
        writer.add_external("already", 7, {"k": 1})
        writer.add_external("moved", 8, key="other/_bigFiles/moved")
    assert store.objects == {"day/_bigFiles/d/m": b"12345", "day/_bigFiles/s": b"123456"}
    with DesReader(path) as reader:
        keys = {name: reader.get_meta(name)["external_key"] for name in reader.list_files()}
        assert keys == {
            "d/m": "day/_bigFiles/d/m",
            "s": "day/_bigFiles/s",
            "already": "day/_bigFiles/already",
            "moved": "other/_bigFiles/moved",
        }
        assert list(reader.get_meta("already").items())[:2] == [("k", 1), ("size", 7)]
        assert [reader.get_index().entry(row).data_length for row in range(4)] == [5, 6, 7, 8]
    assert left(path.parent) == ["f.des"]


def test_an_external_file_that_cannot_be_written_is_not_published(path: Path) -> None:
    (path.parent / "_bigFiles").mkdir()
    (path.parent / "_bigFiles" / "taken").write_bytes(b"a file where a folder is wanted")
    with DesWriter(path) as writer:
        with pytest.raises(OSError, match="taken"):
            writer.add_file("taken/x", b"1", force_external=True)
        writer.add_file("a", b"2")
    assert left(path.parent) == ["_bigFiles/taken", "f.des"]


# --- crashes ---------------------------------------------------------------------------------------------------------


def _raise_in_the_block(writer: DesWriter) -> None:
    raise RuntimeError("in the block")


def _interrupt(writer: DesWriter) -> None:
    raise KeyboardInterrupt


def _break_metadata(writer: DesWriter) -> None:
    def meta() -> dict[str, Any]:
        raise RuntimeError("no metadata")

    writer.add_stream("x", io.BytesIO(b"x"), 1, meta)


@pytest.mark.parametrize("fail", [_raise_in_the_block, _interrupt, _break_metadata])
@pytest.mark.parametrize("there", [False, True])
def test_an_exception_leaves_nothing_under_the_final_name(
    fail: Callable[[DesWriter], None], there: bool, path: Path
) -> None:
    """A crash or an exception never leaves a file under the final name; one that was there stays as it was."""
    if there:
        path.write_bytes(b"the container of before")
    with pytest.raises((RuntimeError, KeyboardInterrupt)), DesWriter(path) as writer:  # noqa: PT012
        writer.add_file("a", b"1" * 3_000_000)
        writer.add_file("big", b"2", force_external=True)
        fail(writer)
    assert left(path.parent) == (["f.des"] if there else [])
    assert not there or path.read_bytes() == b"the container of before"
    with pytest.raises(WriterClosed):
        writer.add_file("more", b"")


def test_closing_twice_and_after_discarding(path: Path) -> None:
    writer = DesWriter(path)
    writer.add_file("a", b"1")
    writer.close()
    writer.close()
    writer.discard()
    assert left(path.parent) == ["f.des"]
    other = DesWriter(path)
    other.discard()
    other.discard()
    other.close()
    with DesReader(path) as reader:
        assert reader.get_file("a") == b"1"


KILLED = """
import os, signal, sys
from des_format import DesWriter

writer = DesWriter(sys.argv[1])
for number in range(3):
    writer.add_file(f"{number}", b"x" * 1_000_000)
writer.add_file("big", b"x", force_external=True)
if sys.argv[2] == "fsync":  # the last effect before the rename
    os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
    writer.close()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("where", ["adding", "fsync"])
def test_a_killed_writer_leaves_nothing_under_the_final_name(where: str, path: Path) -> None:
    """The final name is the commit: a crash leaves the temporary file, under a name that no reader takes for a
    container."""
    path.write_bytes(b"the container of before")
    died = subprocess.run([sys.executable, "-c", KILLED, path, where], check=False, cwd=Path(__file__).parents[2])
    assert died.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"the container of before"
    others = [name for name in left(path.parent) if name != "f.des"]
    assert others
    assert all(name.rpartition("/")[2].startswith(".") and name.endswith(".tmp") for name in others)
    with DesWriter(path) as writer:
        writer.add_file("a", b"1")
    with DesReader(path) as reader:
        assert reader.list_files() == ["a"]


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes, unmounted afterwards whatever happens."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True, timeout=30)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True, timeout=30)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")


@needs_root
@pytest.mark.parametrize("payload", [100, 400_000, 5_000_000])
@pytest.mark.parametrize("how", ["memory", "stream", "external", "external stream"])
def test_a_full_disk_leaves_nothing(payload: int, how: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1_000_000) as disk:
        path = disk / "f.des"
        with pytest.raises(OSError, match="No space left"), DesWriter(path) as writer:  # noqa: PT012
            for number in range(20_000):
                name = f"{number}" + "n" * 200
                if "stream" in how:
                    writer.add_stream(name, io.BytesIO(b"x" * payload), payload, force_external="external" in how)
                else:
                    writer.add_file(name, b"x" * payload, force_external="external" in how)
        assert left(disk) == []


@needs_root
def test_a_container_that_was_discarded_is_not_closed_in_silence(tmp_path: Path) -> None:
    """close() raises WriterClosed when an earlier error had the container discarded."""
    with small_disk(tmp_path / "disk", 1_000_000) as disk:
        writer = DesWriter(disk / "f.des")
        writer.add_file("a", b"1")
        with pytest.raises(OSError, match="No space left"):
            writer.add_file("b", b"x" * 5_000_000)
        with pytest.raises(WriterClosed):
            writer.add_file("c", b"1")
        with pytest.raises(WriterClosed, match="discarded"):
            writer.close()
        assert left(disk) == []


# --- a name that is taken --------------------------------------------------------------------------------------------


def test_without_overwrite_a_name_is_taken_once(path: Path) -> None:
    """With `overwrite` false, the container's name is reserved from now on."""
    with DesWriter(path, overwrite=False) as writer:
        writer.add_file("a", b"1")
        with pytest.raises(FileExistsError):
            DesWriter(path, overwrite=False)
    with pytest.raises(FileExistsError):
        DesWriter(path, overwrite=False)
    assert left(path.parent) == ["f.des"]
    with DesReader(path) as reader:
        assert reader.get_file("a") == b"1"


def test_a_name_that_somebody_took_meanwhile_is_not_overwritten(path: Path) -> None:
    writer = DesWriter(path, overwrite=False)
    writer.add_file("a", b"1")
    path.write_bytes(b"somebody else's")
    with pytest.raises(FileExistsError):
        writer.close()
    assert path.read_bytes() == b"somebody else's"
    assert left(path.parent) == ["f.des"]


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        DesWriter(tmp_path / "missing" / "f.des")


def test_every_error_has_the_base() -> None:
    assert all(
        issubclass(error, DesFormatError) for error in (SizeMismatch, InvalidMeta, InvalidEntryName, WriterClosed)
    )
