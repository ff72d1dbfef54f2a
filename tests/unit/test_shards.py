"""docs/format.md, Shards and days."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from des_format import placement_shard, shard_hex, shard_of
from des_format.shards import ContainerKey, guess_root, hex_group, is_day, parse_container_name, part_name


@given(st.text(), st.integers(1, 32))
def test_a_shard_is_the_first_bits_of_the_names_sha256(name: str, bits: int) -> None:
    """shard = first shard_bits bits of SHA-256(name as UTF-8), written as ceil(shard_bits / 4) lower-case digits."""
    binary = "".join(f"{byte:08b}" for byte in sha256(name.encode()).digest())
    shard = shard_of(name, bits)
    assert shard == int(binary[:bits], 2)
    digits = shard_hex(shard, bits)
    assert len(digits) == -(-bits // 4)
    assert int(digits, 16) == shard
    assert digits == digits.lower()


def test_known_shards() -> None:
    assert shard_hex(shard_of("log.txt")) == sha256(b"log.txt").hexdigest()[:2]
    assert [shard_hex(5, bits) for bits in (3, 4, 5, 8, 9, 32)] == ["5", "5", "05", "05", "005", "00000005"]


@pytest.mark.parametrize("bits", [0, -1, 33])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match="want 1 to 32"):
        shard_of("a", bits)
    with pytest.raises(ValueError, match="want 1 to 32"):
        shard_hex(0, bits)


@pytest.mark.parametrize("shard", [-1, 16])
def test_a_shard_out_of_range(shard: int) -> None:
    with pytest.raises(ValueError, match="not below"):
        shard_hex(shard, 4)


def test_placement_goes_by_the_directory() -> None:
    """This project places names with a `/` by the hash of their directory part."""
    assert placement_shard("a/b/c.txt", 8) == placement_shard("a/b/d.txt", 8) == shard_of("a/b", 8)
    assert placement_shard("flat.txt", 8) == shard_of("flat.txt", 8)


@pytest.mark.parametrize(
    ("file_name", "key"),
    [
        ("3f.des", ContainerKey("x3f", -1, -1)),
        ("0.des", ContainerKey("x0", -1, -1)),
        ("3f-000001.des", ContainerKey("x3f", 1, 1)),
        ("3f-9.des", ContainerKey("x3f", 9, 9)),
        ("3f-1000000.des", ContainerKey("x3f", 1_000_000, 1_000_000)),
        ("3f-000001-000004.des", ContainerKey("x3f", 1, 4)),
        ("3f-000004-000001.des", ContainerKey("3f-000004-000001", -1, -1)),
        ("shard_10.des", ContainerKey("d10", -1, -1)),
        ("shard_00.des", ContainerKey("d0", -1, -1)),
        ("shard_0x10.des", ContainerKey("shard_0x10", -1, -1)),
        ("10.des", ContainerKey("x10", -1, -1)),
        ("3F.des", ContainerKey("3F", -1, -1)),
        ("report.des", ContainerKey("report", -1, -1)),
        ("٣.des", ContainerKey("٣", -1, -1)),
        (".des", None),
        ("3f.des.tmp", None),
        ("3f.DES", None),
        ("notes.txt", None),
        ("", None),
    ],
)
def test_what_a_containers_file_name_says(file_name: str, key: ContainerKey | None) -> None:
    """`shard_10.des` is shard 10, not 0x10. Parts: `{shard}-{generation}.des`, merged `{shard}-{first}-{last}.des`."""
    assert parse_container_name(file_name) == key


def test_generations_sort_as_numbers_whatever_their_width() -> None:
    """Generations sort as numbers, whatever their width; the sealed container is older than every part."""
    names = ["3f-10.des", "3f-9.des", "3f-000011.des", "3f-1-10.des", "3f.des", "3f-000002.des"]
    keys = {name: parse_container_name(name) for name in names}
    ordered = sorted(names, key=lambda name: key.order if (key := keys[name]) else (0, 0))
    assert ordered == ["3f.des", "3f-000002.des", "3f-9.des", "3f-10.des", "3f-1-10.des", "3f-000011.des"]


@given(st.integers(0, 255), st.integers(0, 10**9))
def test_a_parts_name_reads_back(shard: int, generation: int) -> None:
    digits = shard_hex(shard)
    assert parse_container_name(part_name(digits, generation)) == ContainerKey(
        hex_group(digits), generation, generation
    )


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("2025-01-31", True),
        ("2024-02-29", True),
        ("2025-02-29", False),
        ("2025-1-31", False),
        ("20250131", False),
        ("2025-01-31\n", False),
        ("٢٠٢٥-01-31", False),
        ("2025-W01-1", False),
        ("", False),
    ],
)
def test_what_is_a_day(text: str, day: bool) -> None:
    assert is_day(text) is day


@pytest.mark.parametrize(
    ("key", "root"),
    [
        ("0.des", ""),
        ("2025-01-01.des", ""),
        ("2025-01-01/0.des", ""),
        ("store/2025-01-01/0.des", "store/"),
        ("a/b/2025-01-01.des", "a/b/"),
        ("a/b/0.des", "a/b/"),
        ("/srv/2025-01-01/0.des", "/srv/"),
    ],
)
def test_the_stores_root_as_a_key_tells_it(key: str, root: str) -> None:
    assert guess_root(key) == root
