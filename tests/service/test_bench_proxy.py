"""The benchmarks' proxy and raw client: nothing that they measure with may change a byte or lose a request."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from botocore.exceptions import ClientError

from tests.bench.proxy import DelayProxy, delay_proxy
from tests.bench.raw import RawClient
from tests.servers import S3Server

DELAY_S = 0.02


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[DelayProxy]:
    with delay_proxy(s3.host, s3.port, DELAY_S) as running:
        yield running


def test_what_goes_through_is_what_was_sent(s3: S3Server, bucket: str, proxy: DelayProxy) -> None:
    client = s3.client(endpoint_url=proxy.url)
    content = os.urandom(3_000_000)
    client.put_object(Bucket=bucket, Key="folder/a", Body=content)
    assert s3.client().get_object(Bucket=bucket, Key="folder/a")["Body"].read() == content
    assert client.get_object(Bucket=bucket, Key="folder/a")["Body"].read() == content
    part = client.get_object(Bucket=bucket, Key="folder/a", Range="bytes=1000-2000999")
    assert part["Body"].read() == content[1000:2_001_000]
    assert client.head_object(Bucket=bucket, Key="folder/a")["ContentLength"] == len(content)
    with pytest.raises(ClientError):
        client.get_object(Bucket=bucket, Key="folder/b")


def test_a_long_listing_goes_through(s3: S3Server, bucket: str, proxy: DelayProxy) -> None:
    """Its answer is chunked."""
    names = [f"folder/{number:04d}-{'x' * 100}" for number in range(300)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: s3.client().put_object(Bucket=bucket, Key=name, Body=b"1"), names))
    listing = s3.client(endpoint_url=proxy.url).list_objects_v2(Bucket=bucket, Prefix="folder/")
    assert [each["Key"] for each in listing["Contents"]] == names


def test_requests_are_counted_once(s3: S3Server, bucket: str, proxy: DelayProxy) -> None:
    client = s3.client(endpoint_url=proxy.url)
    client.put_object(Bucket=bucket, Key="a b", Body=b"12345")
    client.get_object(Bucket=bucket, Key="a b")["Body"].read()
    client.list_objects_v2(Bucket=bucket)
    client.head_object(Bucket=bucket, Key="a b")
    traffic = proxy.take()
    assert [(each.kind, each.path, each.status) for each in traffic.requests] == [
        ("PUT", f"/{bucket}/a b", 200),
        ("GET", f"/{bucket}/a b", 200),
        ("LIST", f"/{bucket}", 200),
        ("HEAD", f"/{bucket}/a b", 200),
    ]
    assert traffic.requests[1].length == 5
    assert traffic.received > 5  # the listing's
    assert proxy.take().requests == []


def test_of_an_answer_that_its_client_leaves_only_what_went_through_counts(
    s3: S3Server, bucket: str, proxy: DelayProxy
) -> None:
    s3.client().put_object(Bucket=bucket, Key="a", Body=bytes(64 * 1024 * 1024))
    body = s3.client(endpoint_url=proxy.url).get_object(Bucket=bucket, Key="a")["Body"]
    assert len(body.read(1000)) == 1000
    first = proxy.take()
    body.close()
    assert first.count("GET") == 1
    assert 1000 <= first.received < 64 * 1024 * 1024
    assert proxy.take().requests == []


def test_each_response_is_delayed_and_none_waits_for_another(s3: S3Server, bucket: str, proxy: DelayProxy) -> None:
    s3.client().put_object(Bucket=bucket, Key="a", Body=b"1")
    client = s3.client(endpoint_url=proxy.url)

    def get(number: int) -> float:
        began = time.monotonic()
        client.get_object(Bucket=bucket, Key="a")["Body"].read()
        return time.monotonic() - began

    with ThreadPoolExecutor(16) as threads:
        assert all(seconds >= DELAY_S for seconds in threads.map(get, range(64)))
    assert proxy.take().count("GET") == 64


def test_a_connection_ends_with_the_servers(s3: S3Server, proxy: DelayProxy) -> None:
    """A client that holds an idle connection sees that the server has closed it, and sends no request there."""
    with socket.create_connection(("127.0.0.1", proxy.port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        with client.makefile("rb") as stream:
            assert stream.read().startswith(b"HTTP/1.1 403")


def test_the_raw_client_gets_every_byte(s3: S3Server, bucket: str, proxy: DelayProxy) -> None:
    for number in range(5):
        s3.client().put_object(Bucket=bucket, Key=f"folder/{number}", Body=os.urandom(1_000_000 + number))
    raw = RawClient(proxy.port)
    objects = raw.signed(s3, bucket, "folder/")
    proxy.take()
    raw.download(objects, 300_000, connections=3)
    traffic = proxy.take()
    assert (traffic.count("GET"), traffic.received) == (20, 5_000_010)
    raw.round_trip(objects[0], 100, runs=3)
    assert proxy.take().received == 300
