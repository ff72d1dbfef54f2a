"""A store below a prefix of an S3 bucket, by boto3, which no other module of `desfs` knows. Any thread may call.

Each call is tried once, but for the parts of a large upload, which are retried one by one: `desfs.store.retrying` does
the rest.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import botocore.session
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from botocore.httpsession import get_cert_path
from s3transfer.utils import ReadFileChunk

import des_format.errors as fmt
from des_format.s3 import (
    CONNECT_TIMEOUT_S,
    READ_TIMEOUT_S,
    RangeAnswer,
    Trouble,
    build_client,
    build_session,
    diagnose,
    foreign_errors,
    get_range,
    get_tail,
    one_line,
    quoted,
    unquoted,
)
from desfs.errors import (
    AccessDenied,
    BadAnswer,
    NoSuchObject,
    NoSuchStore,
    ObjectExists,
    ObjectReplaced,
    StoreError,
    StoreFull,
    StoreUnavailable,
    Throttled,
    UsageError,
)
from desfs.metrics import FIRST_BYTE, STORE_BYTES, STORE_REQUESTS
from desfs.store.base import Answer, CopyRange, Listing, ObjectInfo, S3Options, can_begin_keys, check_key
from desfs.store.multipart import MIN_PART, MULTIPART_THRESHOLD, length_of, part_size, plan_parts
from desfs.store.retrying import call_with_retries

if TYPE_CHECKING:
    from botocore.awsrequest import AWSPreparedRequest
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

__all__ = ["S3Options", "S3Store"]

# As many as the GETs that a mount has in flight.
CONNECTIONS = 32
# Parts of one upload under way at once: enough to fill a 1 Gbit/s line at 100 ms, and 64 MiB where they are in memory.
PARALLEL_PARTS = 4
# From this size on a body goes only after the server has said that it wants it (Expect: 100-continue, which botocore
# sends with file-like bodies): one that answers 412 and hangs up would else look like a broken connection.
EXPECT_FROM = 1 << 20
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FULL_CODES = {"XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded", "InsufficientStorage"}
# What the metrics call S3's operations; one that is not here keeps its own name.
_OPERATIONS = {
    "ListObjectsV2": "list",
    "GetObject": "get",
    "PutObject": "put",
    "DeleteObject": "delete",
    "CreateMultipartUpload": "create_upload",
    "UploadPart": "put_part",
    "UploadPartCopy": "copy",
    "CompleteMultipartUpload": "complete_upload",
    "AbortMultipartUpload": "abort_upload",
}
# Requests of `S3Store.route` ask for this key, and are never sent.
_PROBE = "probe"
_SIGV4_SCOPE = re.compile(r"AWS4-HMAC-SHA256 Credential=[^,]*/\d{8}/([^/,]+)/s3/aws4_request")
# One part of an upload: sends part number n of upload u, and returns its ETag.
_SendPart = Callable[[str, int], str]


@dataclass(frozen=True, slots=True)
class Route:
    """Where the client's requests go, for another client that shall make the same: the bucket's URL without a `/` at
    its end, the region of signatures, and the file of trusted certificates beside the system's own."""

    bucket_url: str
    region: str
    ca_file: str


@dataclass(frozen=True, slots=True)
class Keys:
    """What requests are signed with at the moment."""

    access_key: str
    secret_key: str = field(repr=False)
    token: str | None = field(repr=False)


class S3Store:
    """The store `s3://bucket/prefix`. Nothing is sent before the first call.

    Raises UsageError for settings that make no sense.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        options: S3Options | None = None,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        read_timeout_s: float = READ_TIMEOUT_S,
        part_deadline_s: float = 60.0,
    ) -> None:
        options = options or S3Options()
        if options.ca_bundle is not None and not os.path.exists(options.ca_bundle):
            raise UsageError(f"ca_bundle: {options.ca_bundle!r} does not exist")
        try:
            session = build_session(region=options.region, profile=options.profile)
            self._client: S3Client = build_client(
                session,
                endpoint_url=options.endpoint_url,
                addressing_style=options.addressing_style,
                no_sign_request=options.no_sign_request,
                ca_bundle=options.ca_bundle,
                connect_timeout_s=connect_timeout_s,
                read_timeout_s=read_timeout_s,
                connections=CONNECTIONS,
            )
        except (BotoCoreError, ValueError) as error:  # ValueError: "Invalid endpoint: …"
            raise UsageError(f"S3 settings: {one_line(str(error))}") from error
        self._bucket = bucket
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self._part_deadline_s = part_deadline_s
        self._foreign = foreign_errors()
        self._session = session
        self._options = options
        self._probing = _catch_probes(self._client)
        _count_requests(self._client)

    @property
    def url(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}"

    @property
    def endpoint_url(self) -> str:
        """The server that requests go to."""
        return self._client.meta.endpoint_url

    def list(self, prefix: str = "", *, delimiter: bool = False) -> Listing:
        objects: list[ObjectInfo] = []
        prefixes: list[str] = []
        drop = len(self._prefix)
        folding: dict[str, Any] = {"Delimiter": "/"} if delimiter else {}
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix, **folding
        )
        with self._translating(None):
            for page in pages:
                # What is no listing at all, a proxy's page say, or breaks off, would seem to be one with less in it.
                if "IsTruncated" not in page or (page["IsTruncated"] and not page.get("NextContinuationToken")):
                    raise BadAnswer(f"{self.url} at {self.endpoint_url}: the answer is no listing, or not a whole one")
                prefixes += [found["Prefix"][drop:] for found in page.get("CommonPrefixes", ())]
                objects += [
                    ObjectInfo(
                        found["Key"][drop:],
                        found["Size"],
                        unquoted(found["ETag"]),
                        (found["LastModified"] - _EPOCH) // timedelta(microseconds=1) * 1000,
                    )
                    for found in page.get("Contents", ())
                    if not found["Key"].endswith("/")
                ]
        if not can_begin_keys(prefix):  # SeaweedFS 4.48 takes `dir//` for `dir/`
            return Listing((), ())
        # SeaweedFS 4.48 lists folder by folder, `a/b` before `a b`; S3 by the keys' bytes, as is promised here.
        objects.sort(key=lambda found: found.key.encode())
        prefixes.sort(key=str.encode)
        return Listing(tuple(objects), tuple(prefixes))

    def get_range(self, key: str, start: int, stop: int, *, if_match: str | None = None) -> Answer:
        name = self._name(key)
        with self._translating(key):
            return _received(get_range(self._client, self._bucket, name, start, stop, if_match=if_match))

    def get_tail(self, key: str, length: int) -> Answer:
        name = self._name(key)
        with self._translating(key):
            return _received(get_tail(self._client, self._bucket, name, length))

    def put(self, key: str, source: bytes | Path, *, if_absent: bool = True) -> str:
        """As `Store.put`. More than 64 MiB go in parts, several at once; an upload that fails is aborted."""
        self._name(key)
        if isinstance(source, bytes):
            if len(source) <= MULTIPART_THRESHOLD:
                return self._put_whole(key, source, if_absent)
            size = len(source)
        else:
            try:
                with source.open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    if size <= MULTIPART_THRESHOLD:
                        return self._put_whole(key, file, if_absent)
            except OSError as error:
                raise StoreError(f"cannot read {str(source)!r}: {error.strerror}") from error
        length = part_size(size)
        parts = [self._section(key, source, at, min(at + length, size)) for at in range(0, size, length)]
        return self._put_parts(key, parts, if_absent)

    def delete(self, key: str) -> None:
        name = self._name(key)
        with contextlib.suppress(NoSuchObject), self._translating(key):
            self._client.delete_object(Bucket=self._bucket, Key=name)

    def copy_ranges(self, key: str, pieces: Sequence[bytes | CopyRange], *, if_absent: bool = True) -> str:
        """As `Store.copy_ranges`. S3 copies ranges of 5 MiB and more by itself; what is smaller, and as much of its
        neighbour as makes a part of 5 MiB, passes through memory, at most 64 MiB at a time. A result that fits in one
        part of 16 MiB and copies nothing is put in one request."""
        self._name(key)
        for piece in pieces:
            if isinstance(piece, CopyRange):
                self._name(piece.key)
        plan = plan_parts(pieces)
        if not plan or (len(plan) == 1 and not _is_copy(plan[0])):
            return self._put_whole(key, self._gather(plan[0] if plan else []), if_absent)
        return self._put_parts(key, [self._sender(key, part) for part in plan], if_absent)

    def close(self) -> None:
        self._client.close()

    # --- for another client --------------------------------------------------------------------------------------

    def route(self) -> Route | None:
        """Where a GET would go now, found without sending one: the endpoint, the style of addresses and the region by
        boto3's own rules, after a redirect to another region too. None when requests are signed in another way than
        by SigV4 for S3. Raises as `get_range`."""
        self._probing.active = True
        try:
            with self._translating(None):
                self._client.get_object(Bucket=self._bucket, Key=_PROBE)
        except _NotSent as caught:
            url = caught.url.partition("?")[0].removesuffix(f"/{_PROBE}")
            if caught.authorization is None:
                return Route(url, self._client.meta.region_name, self._ca_file())
            scope = _SIGV4_SCOPE.match(caught.authorization)
            return None if scope is None else Route(url, scope[1], self._ca_file())
        finally:
            self._probing.active = False
        raise AssertionError("a probe is not sent")

    def keys(self) -> Keys | None:
        """The credentials, renewed if it is time; None for requests that are not signed. Raises as `get_range`."""
        if self._options.no_sign_request:
            return None
        with self._translating(None):
            credentials = self._session.get_credentials()
            if credentials is None:
                raise NoCredentialsError
            now = credentials.get_frozen_credentials()
            return Keys(now.access_key or "", now.secret_key or "", now.token)

    def refusal(self, status: int, code: str, message: str, key: str) -> StoreError:
        """The error for a GET that S3 has answered so."""
        error = ClientError(
            {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}},  # type: ignore[typeddict-item]
            "GetObject",
        )
        return self._translated(error, key, storing=False)

    def _ca_file(self) -> str:
        """The certificates that boto3 trusts: the setting's, the environment's, or those that come with botocore."""
        configured = botocore.session.Session(profile=self._options.profile).get_config_variable("ca_bundle")
        return str(self._options.ca_bundle or configured or get_cert_path(True))

    # --- writing -------------------------------------------------------------------------------------------------

    def _put_whole(self, key: str, data: bytes | IO[bytes], if_absent: bool) -> str:
        """One PUT. A file is read from where it stands to its end."""
        size = len(data) if isinstance(data, bytes) else os.fstat(data.fileno()).st_size
        body = io.BytesIO(data) if isinstance(data, bytes) and size >= EXPECT_FROM else data
        with self._translating(key, storing=True):
            answer = self._client.put_object(
                Bucket=self._bucket, Key=self._name(key), Body=body, **_only_if_absent(if_absent)
            )
        STORE_BYTES.labels("sent").inc(size)
        return unquoted(answer["ETag"])

    def _put_parts(self, key: str, parts: Sequence[_SendPart], if_absent: bool) -> str:
        """A multipart upload: nothing is visible before its last request. If anything fails, it is aborted; where that
        fails as well, or the process dies, the parts stay until the bucket's own rule removes them."""
        # Not s3transfer's upload: 0.19 has no way to send If-None-Match with CompleteMultipartUpload.
        there: dict[str, Any] = {"Bucket": self._bucket, "Key": self._name(key)}
        with self._translating(key, storing=True):
            upload = self._client.create_multipart_upload(**there)["UploadId"]
        try:
            etags = self._send_parts(parts, upload)
            listed: list[CompletedPartTypeDef] = [
                {"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)
            ]
            with self._translating(key, storing=True):
                answer = self._client.complete_multipart_upload(
                    **there, UploadId=upload, MultipartUpload={"Parts": listed}, **_only_if_absent(if_absent)
                )
        except BaseException:
            with contextlib.suppress(*self._foreign):
                self._client.abort_multipart_upload(**there, UploadId=upload)
            raise
        return unquoted(answer["ETag"])

    def _send_parts(self, parts: Sequence[_SendPart], upload: str) -> Sequence[str]:
        """The parts' ETags. When one fails, those under way are waited for: an abort would miss them."""

        def send(part: _SendPart, number: int) -> str:
            return call_with_retries("put_part", lambda: part(upload, number), deadline_s=self._part_deadline_s)

        pool = ThreadPoolExecutor(PARALLEL_PARTS, thread_name_prefix="upload")
        try:
            sent = [pool.submit(send, part, number) for number, part in enumerate(parts, 1)]
            return [each.result() for each in sent]
        finally:
            pool.shutdown(cancel_futures=True)

    def _section(self, key: str, source: bytes | Path, start: int, stop: int) -> _SendPart:
        """Sends the bytes [start, stop) of the source; a file's are read while they are sent."""

        def send(upload: str, number: int) -> str:
            if isinstance(source, bytes):
                return self._send(key, source[start:stop], stop - start, upload, number)
            try:
                chunk = ReadFileChunk.from_filename(str(source), start, stop - start)
            except OSError as error:
                raise StoreError(f"cannot read {str(source)!r}: {error.strerror}") from error
            with chunk:
                if len(chunk) != stop - start:
                    raise StoreError(f"{str(source)!r} became shorter while it was stored")
                return self._send(key, chunk, stop - start, upload, number)

        return send

    def _sender(self, key: str, part: Sequence[bytes | CopyRange]) -> _SendPart:
        """Has the server copy the part, or gets its pieces together and sends them."""
        if _is_copy(part):
            return lambda upload, number: self._copy(key, cast(CopyRange, part[0]), upload, number)

        def send(upload: str, number: int) -> str:
            data = self._gather(part)
            return self._send(key, data, len(data), upload, number)

        return send

    def _gather(self, pieces: Sequence[bytes | CopyRange]) -> bytes:
        return b"".join(
            piece
            if isinstance(piece, bytes)
            else self.get_range(piece.key, piece.start, piece.stop, if_match=piece.etag).data
            for piece in pieces
        )

    def _send(self, key: str, data: bytes | ReadFileChunk, size: int, upload: str, number: int) -> str:
        with self._translating(key, storing=True):
            answer = self._client.upload_part(
                Bucket=self._bucket,
                Key=self._name(key),
                UploadId=upload,
                PartNumber=number,
                Body=cast(bytes, data),
                ContentLength=size,
            )
        STORE_BYTES.labels("sent").inc(size)
        return answer["ETag"]

    def _copy(self, key: str, piece: CopyRange, upload: str, number: int) -> str:
        with self._translating(piece.key):  # what can be wrong here is the source
            answer = self._client.upload_part_copy(
                Bucket=self._bucket,
                Key=self._name(key),
                UploadId=upload,
                PartNumber=number,
                CopySource={"Bucket": self._bucket, "Key": self._name(piece.key)},
                CopySourceRange=f"bytes={piece.start}-{piece.stop - 1}",
                CopySourceIfMatch=quoted(piece.etag),
            )
        return answer["CopyPartResult"].get("ETag", "")

    # --- names and errors ----------------------------------------------------------------------------------------

    def _name(self, key: str) -> str:
        """The key within the bucket."""
        check_key(key)
        return self._prefix + key

    @contextlib.contextmanager
    def _translating(self, key: str | None, *, storing: bool = False) -> Iterator[None]:
        """The door: no error of botocore, urllib3 or a socket leaves it as such."""
        try:
            yield
        except fmt.BadAnswer as error:
            bad = BadAnswer(str(error))
            bad.temporary = error.temporary
            raise bad from error
        except fmt.ObjectReplaced as error:
            raise ObjectReplaced(str(error)) from error
        except self._foreign as error:
            raise self._translated(error, key, storing) from error
        except RecursionError as error:
            # botocore/utils.py, get_bucket_region: asks where the bucket is, and does so again for each redirect.
            raise StoreError(f"{self.url} at {self.endpoint_url}: redirected, without a word where to") from error
        except RuntimeError as error:
            # botocore/credentials.py: "Credentials were refreshed, but the refreshed credentials are still expired."
            if "credentials" not in str(error):
                raise
            raise AccessDenied(f"{one_line(str(error))} (for {self.url} at {self.endpoint_url})") from error

    def _translated(self, error: Exception, key: str | None, storing: bool) -> StoreError:
        trouble, reason = diagnose(error)
        endpoint = self.endpoint_url
        what = f"{self.url if key is None else f's3://{self._bucket}/{self._prefix}{key}'} at {endpoint}"
        answered = isinstance(error, ClientError)
        if isinstance(error, ClientError) and (
            error.response["ResponseMetadata"].get("HTTPStatusCode") == 507
            or error.response.get("Error", {}).get("Code") in _FULL_CODES
        ):
            return StoreFull(f"{what}: {reason}")
        match trouble:
            case Trouble.NO_BUCKET:
                return NoSuchStore(f"bucket {self._bucket!r} does not exist at {endpoint}")
            case Trouble.NO_OBJECT if key is None:
                return NoSuchStore(f"no bucket {self._bucket!r} at {endpoint}: {reason}")
            case Trouble.NO_OBJECT:
                return NoSuchObject(f"{what} does not exist")
            case Trouble.DENIED:
                return AccessDenied(f"{what}: {reason}" if answered else f"{reason} (for {what})")
            case Trouble.PRECONDITION if storing:
                return ObjectExists(f"{what} exists already")
            case Trouble.PRECONDITION:
                return ObjectReplaced(f"{what} is not the version that was asked for")
            case Trouble.UNSUPPORTED if storing:
                return StoreError(f"{what}: the server lacks conditional writes (If-None-Match): {reason}")
            case Trouble.RANGE:
                bad = BadAnswer(f"{what}: {reason}")
                bad.temporary = False  # asking again would not help
                return bad
            case Trouble.GARBLED:
                return BadAnswer(f"{what}: {reason}")
            case Trouble.THROTTLED:
                return Throttled(f"{what}: {reason}")
            case Trouble.CONFLICT:
                return StoreUnavailable(f"{what}: {reason}")
            case Trouble.UNAVAILABLE:
                return StoreUnavailable(f"{what}: {reason}" if answered else f"cannot reach {endpoint}: {reason}")
        return StoreError(f"{what}: {reason}")


def _only_if_absent(if_absent: bool) -> dict[str, Any]:
    return {"IfNoneMatch": "*"} if if_absent else {}


def _is_copy(part: Sequence[bytes | CopyRange]) -> bool:
    return len(part) == 1 and isinstance(part[0], CopyRange) and length_of(part[0]) >= MIN_PART


def _received(answer: RangeAnswer) -> Answer:
    STORE_BYTES.labels("received").inc(len(answer.data))
    return Answer(answer.data, answer.etag, answer.size)


class _NotSent(Exception):
    """A request of `S3Store.route`, caught before it was sent."""

    def __init__(self, request: AWSPreparedRequest) -> None:
        self.url = str(request.url)
        found = request.headers.get("Authorization")
        self.authorization = found.decode("latin-1") if isinstance(found, bytes) else found


def _catch_probes(client: S3Client) -> threading.local:
    """Whoever sets `active` on what this returns gets _NotSent for the next request of this thread."""
    probing = threading.local()

    def before_send(request: AWSPreparedRequest, **_: Any) -> None:
        if getattr(probing, "active", False):
            raise _NotSent(request)

    client.meta.events.register("before-send.s3", before_send)
    return probing


def _count_requests(client: S3Client) -> None:
    """Count every HTTP request that the client makes, redirects and pages of listings included."""
    sent = threading.local()  # both events of a request come in the thread that makes it

    def before_send(**_: Any) -> None:
        sent.at = time.monotonic()

    def received(event_name: str, response_dict: dict[str, Any] | None, exception: Any, **_: Any) -> None:
        if isinstance(exception, _NotSent):
            return
        name = event_name.rpartition(".")[2]
        operation = _OPERATIONS.get(name, name)
        status = type(exception).__name__ if response_dict is None else str(response_dict["status_code"])
        STORE_REQUESTS.labels(operation, status).inc()
        if response_dict is not None and operation == "get":
            FIRST_BYTE.observe(time.monotonic() - sent.at)

    client.meta.events.register("before-send.s3", before_send)
    client.meta.events.register("response-received.s3", received)
