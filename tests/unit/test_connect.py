"""From URLs to a client."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from assignment.connect import open_client, read_token
from assignment.errors import InvalidRequest
from assignment.opening import open_catalog
from des_format.assigned_names import parse_name


def test_without_a_service_each_client_leases_a_node_id(tmp_path: Path) -> None:
    """It assigns as soon as it is entered, and gives the node id back at the end."""
    url = str(tmp_path / "catalog.sqlite")

    async def main() -> None:
        for _ in range(2):
            async with (
                await open_client(url, shard_bits=4, holder="one") as one,
                await open_client(url, shard_bits=4, holder="two") as two,
            ):
                found = [*await one.assign(["a", "b"]), *await two.assign(["c"])]
            assert [each.path for each in found] == ["a", "b", "c"]
            assert len({each.id for each in found}) == 3
            here = [parse_name(each.id).node_id for each in found]
            assert here[0] == here[1] != here[2]
        catalog = await open_catalog(url)
        assert None not in [await catalog.lease_node_id("another", 60) for _ in range(256)]
        await catalog.close()

    asyncio.run(main())


def test_with_a_service_url_that_makes_no_sense_the_catalog_is_closed(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(InvalidRequest, match="no URL of an assignment service"):
            await open_client(str(tmp_path / "c.sqlite"), shard_bits=4, holder="one", service_url="here")

    asyncio.run(main())


def test_a_token_is_the_first_line_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    assert read_token(None) is None
    file.write_text(" one \ntwo\n")
    assert read_token(str(file)) == "one"
    for content in (b"", b"\ntwo\n", b"\xff\n"):
        file.write_bytes(content)
        with pytest.raises(InvalidRequest, match="token file"):
            read_token(str(file))
    with pytest.raises(InvalidRequest, match="token file"):
        read_token(str(tmp_path / "missing"))
