"""Checked range reads from S3, the client to make them with, and what S3's errors mean.

boto3 and botocore are imported when they are first needed, so that the rest of the library works without them.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

from des_format.errors import BadAnswer, NoSuchObject, ObjectReplaced, SourceError, SourceUnavailable

if TYPE_CHECKING:
    from boto3.session import Session
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef

# Linux tries a SYN again after 1 and 3 s: 5 s forgives two lost ones.
CONNECT_TIMEOUT_S = 5.0
# The longest silence within an answer. S3 itself gives up on an idle connection after about 20 s.
READ_TIMEOUT_S = 20.0
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)\Z")


@dataclass(frozen=True, slots=True)
class RangeAnswer:
    """Bytes of one version of an object: `data`, its ETag without quotes, the whole object's `size`."""

    data: bytes
    etag: str
    size: int
    last_modified: datetime | None


def build_session(*, region: str | None = None, profile: str | None = None) -> Session:
    """Whose settings and credentials a client has. What is None comes from the AWS environment."""
    import boto3

    return boto3.session.Session(profile_name=profile, region_name=region)


def build_client(
    session: Session | None = None,
    *,
    endpoint_url: str | None = None,
    addressing_style: Literal["auto", "virtual", "path"] | None = None,
    no_sign_request: bool = False,
    ca_bundle: str | None = None,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
    read_timeout_s: float = READ_TIMEOUT_S,
    tries: int = 1,
    connections: int = 32,
) -> S3Client:
    """A boto3 client. What is None comes from the session and the AWS environment, the endpoint included.

    A custom endpoint implies path style. `tries` counts every try of a request, the first included; it does not cover
    the reading of a body.
    """
    import botocore
    from botocore.config import Config

    # "auto" is path style with a custom endpoint, from the environment too: botocore/args.py, force_path_style.
    # Checksums: older S3-compatible servers refuse requests that carry the SDK's own.
    config = Config(
        connect_timeout=connect_timeout_s,
        read_timeout=read_timeout_s,
        max_pool_connections=connections,
        retries={"mode": "standard", "total_max_attempts": tries},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    if addressing_style is not None:
        config = config.merge(Config(s3={"addressing_style": addressing_style}))
    if no_sign_request:
        config = config.merge(Config(signature_version=botocore.UNSIGNED))
    session = session or build_session()
    return session.client("s3", endpoint_url=endpoint_url, verify=ca_bundle, config=config)


def default_client() -> S3Client:
    """A client with the settings of the AWS environment, which tries each request up to four times."""
    return build_client(tries=4)


def get_range(
    client: S3Client, bucket: str, key: str, start: int, stop: int, *, if_match: str | None = None
) -> RangeAnswer:
    """The bytes [start, stop) of an object, 0 <= start < stop, in one request whose answer is checked.

    Raises BadAnswer when the answer is not that range (`temporary` is False if the range does not lie in the object),
    ObjectReplaced when it is of another version than `if_match`; botocore's errors pass through.
    """
    if not 0 <= start < stop:
        raise ValueError(f"range [{start}, {stop}) is empty or negative")  # HTTP cannot ask for it
    asked = f"bytes={start}-{stop - 1}"
    conditions: dict[str, Any] = {} if if_match is None else {"IfMatch": quoted(if_match)}
    answer = client.get_object(Bucket=bucket, Key=key, Range=asked, **conditions)
    with _body_of(answer) as body:
        what = f"s3://{bucket}/{key}: asked for {asked}"
        etag = _etag_of(answer, what)
        if if_match is not None and etag != if_match:
            raise ObjectReplaced(f"{what} of version {if_match}, got version {etag}")
        first, last, size = _content_range(answer, what)
        if first == start and last == size - 1 < stop - 1:
            raise outside(f"{what}, but the object has {size} bytes")
        if (first, last) != (start, stop - 1) or size < stop:
            raise BadAnswer(f"{what}, got bytes {first}-{last} of {size}")
        data = _read(body, answer, stop - start, what)
    return RangeAnswer(data, etag, size, answer.get("LastModified"))


def get_tail(client: S3Client, bucket: str, key: str, length: int) -> RangeAnswer:
    """The last `length` bytes (> 0) of an object, or all of a shorter one: one request, two for an empty object.

    Raises BadAnswer when the answer is anything else; botocore's errors pass through.
    """
    from botocore.exceptions import ClientError

    if length <= 0:
        raise ValueError(f"a tail of {length} bytes is none")
    asked = f"bytes=-{length}"
    what = f"s3://{bucket}/{key}: asked for {asked}"
    try:
        answer = client.get_object(Bucket=bucket, Key=key, Range=asked)
    except ClientError as error:
        if _status_of(error) != 416:
            raise
        # An empty object has no range at all (RFC 9110, 14.1.2; SeaweedFS says `Content-Range: bytes */0`). The answer
        # has no ETag: ask again without a range. If the object is not empty by now, what does not fit is not read.
        answer = client.get_object(Bucket=bucket, Key=key)
    with _body_of(answer) as body:
        etag = _etag_of(answer, what)
        if answer["ResponseMetadata"]["HTTPStatusCode"] == 200:
            # Legal when the whole object is no longer than what was asked for.
            size = answer.get("ContentLength", -1)
            if not 0 <= size <= length:
                raise BadAnswer(f"{what}, got status 200 with {size} bytes")
        else:
            first, last, size = _content_range(answer, what)
            if (first, last) != (max(0, size - length), size - 1):
                raise BadAnswer(f"{what}, got bytes {first}-{last} of {size}")
        data = _read(body, answer, min(size, length), what)
    return RangeAnswer(data, etag, size, answer.get("LastModified"))


def outside(message: str) -> BadAnswer:
    """The error for a range that does not lie in its object: asking again would not help."""
    error = BadAnswer(message)
    error.temporary = False
    return error


def quoted(etag: str) -> str:
    """An ETag as it stands in a header."""
    return etag if etag.startswith("W/") else f'"{etag}"'


def unquoted(etag: str) -> str:
    """An ETag as this project keeps it. S3's ETags are strong, and in quotes."""
    return etag if etag.startswith("W/") else etag.strip('"')


def _body_of(answer: GetObjectOutputTypeDef) -> contextlib.closing[StreamingBody]:
    """Closes the connection if the body was not read to its end, and gives it back to the pool if it was."""
    return contextlib.closing(answer["Body"])


def _etag_of(answer: GetObjectOutputTypeDef, what: str) -> str:
    etag = unquoted(answer.get("ETag", ""))
    if not etag:
        raise BadAnswer(f"{what}, got an answer without an ETag")
    return etag


def _content_range(answer: GetObjectOutputTypeDef, what: str) -> tuple[int, int, int]:
    """First byte, last byte and whole size, as the answer claims them."""
    status = answer["ResponseMetadata"]["HTTPStatusCode"]
    if status != 206:
        raise BadAnswer(f"{what}, got status {status} with {answer.get('ContentLength', 'unknown')} bytes")
    claimed = answer.get("ContentRange", "")
    found = _CONTENT_RANGE.match(claimed)
    if found is None:
        raise BadAnswer(f"{what}, got Content-Range {claimed!r}")
    first, last, size = map(int, found.groups())
    return first, last, size


def _read(body: StreamingBody, answer: GetObjectOutputTypeDef, length: int, what: str) -> bytes:
    """Exactly `length` bytes of body; never more than one byte above that is read."""
    claimed = answer.get("ContentLength")
    if claimed is not None and claimed != length:
        raise BadAnswer(f"{what}, got a body of {claimed} bytes instead of {length}")
    data = body.read(length + 1)
    if len(data) != length:
        raise BadAnswer(f"{what}, got a body of {len(data)} bytes instead of {length}")
    return data


# --- errors ------------------------------------------------------------------------------------------------------


class Trouble(Enum):
    """What an error of botocore means to whoever made the request."""

    NO_OBJECT = "no such object"
    NO_BUCKET = "no such bucket"
    DENIED = "access denied"
    PRECONDITION = "precondition failed"
    CONFLICT = "conflict with another request"
    RANGE = "range outside of the object"
    UNSUPPORTED = "not implemented by the server"
    THROTTLED = "slow down"
    UNAVAILABLE = "no answer, or a server error"
    GARBLED = "an answer that makes no sense"
    OTHER = "refused"


_CODES = {
    "NoSuchKey": Trouble.NO_OBJECT,
    "NoSuchVersion": Trouble.NO_OBJECT,
    "NoSuchBucket": Trouble.NO_BUCKET,
    # The name cannot be a bucket's, so there is none.
    "InvalidBucketName": Trouble.NO_BUCKET,
    "PreconditionFailed": Trouble.PRECONDITION,
    "ConditionalRequestConflict": Trouble.CONFLICT,
    "OperationAborted": Trouble.CONFLICT,
    "InvalidRange": Trouble.RANGE,
    "NotImplemented": Trouble.UNSUPPORTED,
    "SlowDown": Trouble.THROTTLED,
    "TooManyRequests": Trouble.THROTTLED,
    "ThrottlingException": Trouble.THROTTLED,
    "RequestLimitExceeded": Trouble.THROTTLED,
    # 400s of S3 that say "send it again": the body came too slowly, or not whole; a token just ran out.
    "RequestTimeout": Trouble.UNAVAILABLE,
    "IncompleteBody": Trouble.UNAVAILABLE,
    "InternalError": Trouble.UNAVAILABLE,
    # Somebody has ended the upload: the whole of it can be made again.
    "NoSuchUpload": Trouble.UNAVAILABLE,
    "ExpiredToken": Trouble.DENIED,
    "InvalidToken": Trouble.DENIED,
    "AuthorizationHeaderMalformed": Trouble.DENIED,
}
_STATUSES = {
    401: Trouble.DENIED,
    403: Trouble.DENIED,
    404: Trouble.NO_OBJECT,
    408: Trouble.UNAVAILABLE,
    409: Trouble.CONFLICT,
    412: Trouble.PRECONDITION,
    416: Trouble.RANGE,
    429: Trouble.THROTTLED,
    501: Trouble.UNSUPPORTED,
    503: Trouble.THROTTLED,
}


def foreign_errors() -> tuple[type[Exception], ...]:
    """All that a call of a boto3 client, or the reading of its answer, raises when the world is not as it should be."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    # The reading of a body lets some of urllib3's errors and the socket's own through: botocore/response.py.
    return BotoCoreError, ClientError, ResponseParserError, HTTPError, OSError


def diagnose(error: Exception) -> tuple[Trouble, str]:
    """What kind of error of botocore it is, and the reason in a few words, on one line."""
    import botocore.exceptions as boto
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    if isinstance(error, boto.ClientError):
        status = _status_of(error)
        code = str(error.response.get("Error", {}).get("Code", ""))
        message = str(error.response.get("Error", {}).get("Message", ""))
        trouble = _CODES.get(code) or _STATUSES.get(status)
        if trouble is None:
            trouble = Trouble.UNAVAILABLE if status >= 500 else Trouble.OTHER
        # A code that is the status, "404" say: the answer had no body.
        named = f"{code}, status {status}" if code and code != str(status) else f"status {status}"
        return trouble, one_line(f"{message.rstrip('.')} ({named})" if message else named)
    if isinstance(error, boto.NoCredentialsError):
        return Trouble.DENIED, (
            "no S3 credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or no_sign_request"
        )
    if isinstance(error, boto.PartialCredentialsError | boto.CredentialRetrievalError | boto.ProfileNotFound):
        return Trouble.DENIED, one_line(str(error))
    if isinstance(error, boto.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return Trouble.OTHER, one_line(str(error))
    if isinstance(error, ResponseParserError):
        return Trouble.GARBLED, "the answer is no XML of S3"
    if isinstance(error, boto.IncompleteReadError | boto.ResponseStreamingError):
        return Trouble.GARBLED, "the connection ended in the middle of the answer"
    if isinstance(error, boto.ReadTimeoutError):
        return Trouble.UNAVAILABLE, "no answer in time"
    if isinstance(error, boto.ConnectTimeoutError):
        return Trouble.UNAVAILABLE, "no connection in time"
    if isinstance(error, boto.ConnectionClosedError):
        return Trouble.UNAVAILABLE, "the connection was closed before an answer came"
    if isinstance(error, boto.HTTPClientError | boto.ConnectionError | HTTPError | OSError):
        return Trouble.UNAVAILABLE, _innermost(error)
    return Trouble.OTHER, one_line(str(error))


def translate(error: Exception, what: str) -> SourceError:
    """The error of this library for one of botocore's (or one that is the library's own already); `what` names the
    object and stands before the reason."""
    if isinstance(error, SourceError):
        return error
    trouble, reason = diagnose(error)
    message = f"{what}: {reason}"
    match trouble:
        case Trouble.NO_OBJECT:
            return NoSuchObject(message)
        case Trouble.PRECONDITION:
            return ObjectReplaced(message)
        case Trouble.RANGE:
            return outside(message)
        case Trouble.GARBLED:
            return BadAnswer(message)
        case Trouble.THROTTLED | Trouble.UNAVAILABLE | Trouble.CONFLICT:
            return SourceUnavailable(message)
    return SourceError(message)


def one_line(text: str) -> str:
    """The text with every run of white space, line ends included, as one space."""
    return " ".join(text.split())


def _status_of(error: Exception) -> int:
    response: dict[str, Any] = getattr(error, "response", {})
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _innermost(error: BaseException) -> str:
    """The reason at the bottom: botocore wraps urllib3's error, which wraps the socket's."""
    below = error
    while True:
        kwargs = getattr(below, "kwargs", None)
        inner = kwargs.get("error") if isinstance(kwargs, dict) else None
        inner = inner or getattr(below, "reason", None) or below.__cause__ or below.__context__
        if not isinstance(inner, BaseException):
            break
        below = inner
    return one_line(getattr(below, "strerror", None) or str(below) or type(below).__name__)
