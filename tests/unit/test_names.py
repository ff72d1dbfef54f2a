"""docs/format.md, Names and External files."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from des_format import InvalidEntryName
from des_format.names import check_writable, external_key, external_keys, name_problem

UNSHOWABLE = {
    b"": "empty",
    b"\0": "NUL at byte 0",
    b"ab\0c": "NUL at byte 2",
    b"\xff": "not UTF-8 at byte 0",
    b"ok\xe2\x82": "not UTF-8 at byte 2",
    b"\xed\xa0\x80": "not UTF-8 at byte 0",
    b"\xc0\xaf": "not UTF-8 at byte 0",
    b"/": "absolute",
    b"/etc/passwd": "absolute",
    b"a//b": "empty component",
    b"a/": "empty component",
    b".": "component '.'",
    b"..": "component '..'",
    b"./a": "component '.'",
    b"a/../b": "component '..'",
    b"a/.": "component '.'",
    b"n" * 256: "256 bytes, more than 255",
    b"d/" + b"n" * 256 + b"/e": "256 bytes, more than 255",
    b"/".join([b"d" * 200] * 21): "more than the 4095 bytes of a path",
    b"a/" * 32_767 + b"b": "more than the 4095 bytes of a path",
}
SHOWABLE = (b"a", b"...", b"..a", b".hidden", b"a/.b/c..", b"n" * 255, b'\\:*?"<>|', b"a\nb", b"\x7f", "żółć".encode())


@pytest.mark.parametrize("name", UNSHOWABLE, ids=lambda name: ascii(name[:20]))
def test_what_is_never_shown_is_never_written_either(name: bytes) -> None:
    """Names: Never written, and never shown when read: empty names, absolute paths, components that are empty, `.` or
    `..`, and names with NUL."""
    problem = name_problem(name)
    assert problem is not None
    assert UNSHOWABLE[name] in problem
    with pytest.raises(InvalidEntryName) as refused:
        check_writable(name.decode("utf-8", "surrogateescape"))
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("name", SHOWABLE, ids=ascii)
def test_every_other_name_is_written_and_shown(name: bytes) -> None:
    """Names: this project also writes relative POSIX paths, which every v1 reader can list and read."""
    assert name_problem(name) is None
    assert check_writable(name.decode()) == name


def test_a_path_of_the_greatest_length_is_written() -> None:
    longest = "/".join(["d" * 255] * 15 + ["e" * 255])
    assert len(longest) == 4095
    assert check_writable(longest) == longest.encode()
    with pytest.raises(InvalidEntryName, match="more than the 4095 bytes of a path"):
        check_writable("x/" + "/".join(["d" * 255] * 15 + ["e" * 254]))


def test_a_name_longer_than_the_format_can_say_is_refused() -> None:
    """Names: UTF-8, 1 to 65,535 bytes."""
    with pytest.raises(InvalidEntryName, match="65536 bytes, more than 65535"):
        check_writable("ż" * 32_768)


@pytest.mark.parametrize("character", '/\\:*?"<>|')
def test_strict_names_refuse_what_the_first_writers_refuse(character: str) -> None:
    """Names: The first writers of the format refuse `/ \\ : * ? " < > |`."""
    name = f"a{character}b"
    assert check_writable(name) == name.encode()
    with pytest.raises(InvalidEntryName) as refused:
        check_writable(name, strict=True)
    assert "character 1" in str(refused.value)
    assert repr(character) in str(refused.value)


def test_a_name_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidEntryName, match="not UTF-8 at character 1"):
        check_writable("a\ud800")


@given(st.text())
def test_a_name_is_either_written_as_it_is_or_refused(name: str) -> None:
    try:
        raw = check_writable(name)
    except InvalidEntryName:
        return
    assert raw.decode() == name
    assert name_problem(raw) is None


@pytest.mark.parametrize(
    ("container", "key"),
    [
        ("2025-01-10/0.des", "2025-01-10/_bigFiles/dir/v.bin"),
        ("store/2025-01-10/0.des", "store/2025-01-10/_bigFiles/dir/v.bin"),
        ("0.des", "_bigFiles/dir/v.bin"),
    ],
)
def test_where_an_external_payload_is_kept(container: str, key: str) -> None:
    """External files: `{directory of the container's key}/_bigFiles/{entry name}`."""
    assert external_key(container, "dir/v.bin") == key


BY_RULE = "s/day/_bigFiles/v"


@pytest.mark.parametrize(
    "recorded",
    [
        None,
        7,
        ["s/x/_bigFiles/v"],
        "",
        "v",
        "s/day/v",
        "s/day/_bigFiles",
        "s/day/_bigFiles/",
        "s/day/_bigFiles/other",
        "s/day/_bigFiles/prefix-v",
        "s/day/_bigFiles/v/",
        "s/day/_bigFiles/v/more",
        "s/_bigFilesX/v",
        "/s/x/_bigFiles/v",
        "../s/x/_bigFiles/v",
        "s/x/../_bigFiles/v",
        "s/./_bigFiles/v",
        "s//_bigFiles/v",
        "s/x\0/_bigFiles/v",
        "s/\ud800/_bigFiles/v",
        "s/" + "x" * 1024 + "/_bigFiles/v",
        BY_RULE,
    ],
    ids=lambda recorded: ascii(recorded)[:40],
)
def test_a_recorded_key_that_is_not_trusted_leaves_the_rule(recorded: object) -> None:
    """Damaged containers: `external_key` is used only if it lies in a `_bigFiles/` folder of the store and ends in the
    entry's name; else the rule."""
    assert external_keys("s/day/f.des", "v", recorded, root="s/") == [BY_RULE]


@pytest.mark.parametrize(
    ("recorded", "first"),
    [
        ("s/other/_bigFiles/v", "s/other/_bigFiles/v"),
        ("other/_bigFiles/v", "s/other/_bigFiles/v"),  # relative to the store's root
        ("_bigFiles/v", "s/_bigFiles/v"),
        ("t/x/_bigFiles/v", "s/t/x/_bigFiles/v"),  # never in another store of the bucket
    ],
)
def test_a_recorded_key_within_the_store_comes_before_the_rule(recorded: str, first: str) -> None:
    """External files: a recorded `external_key` is honoured only inside the store's own prefix."""
    assert external_keys("s/day/f.des", "v", recorded, root="s/") == [first, BY_RULE]


def test_a_version_of_its_own_is_looked_for_nowhere_else() -> None:
    """External files: where a name has several versions, what lies at the rule's place is another one."""
    assert external_keys("s/day/f.des", "v", "day/_bigFiles/ID/v", root="s/") == ["s/day/_bigFiles/ID/v"]


@given(st.text(), st.sampled_from(["", "s/"]))
def test_whatever_is_recorded_the_keys_stay_in_the_stores_big_files(recorded: str, root: str) -> None:
    container = f"{root}day/f.des"
    for text in (recorded, f"{recorded}/_bigFiles/v", f"_bigFiles/{recorded}/v"):
        for key in external_keys(container, "v", text, root=root):
            assert key.startswith(root)
            assert "_bigFiles" in key.split("/")
            assert key.endswith("/v")
            assert ".." not in key.split("/")
            key.encode("utf-8")
