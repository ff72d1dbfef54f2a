"""S3 with the GETs of ranges by obstore, which no other module knows; everything else is boto3's. Any thread may call.

boto3 costs 1.6 ms of CPU a GET, all of it under the GIL; obstore a sixth, in threads of its own, which start with the
first GET: nothing before may be in the way of a fork. What boto3 decides, holds here too: credentials and their
renewal, endpoint, style of addresses, region, certificates (`S3Store.route`, `S3Store.keys`). Each call is tried once.

Answers are held against what was asked for as `des_format.s3` does it. obstore keeps status and headers to itself, but
compares: a range that was not answered with 206 and exactly its Content-Range is an error of its own (object_store's
get.rs); a body that breaks off is one, too. ETag, size and length are compared here.
"""

from __future__ import annotations

import html
import logging
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError

from des_format.s3 import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, one_line, quoted, unquoted
from desfs.errors import BadAnswer, ObjectReplaced, StoreError, StoreUnavailable
from desfs.metrics import FIRST_BYTE, STORE_BYTES, STORE_REQUESTS
from desfs.store.base import Answer, S3Options
from desfs.store.s3 import CONNECTIONS, Keys, Route, S3Store

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult
    from obstore.store import ClientConfig, S3Config, S3Credential

__all__ = ["ObstoreS3Store"]

# Longer than any answer takes on a line that is of use; ends those that come byte by byte, which no silence does.
TOTAL_TIMEOUT_S = 600.0
# S3 closes an idle connection after about 20 s and nginx after 75 s, SeaweedFS never: whoever closes first costs a
# new connection at the next GET, and no error, as nothing was sent on it.
IDLE_TIMEOUT_S = 90.0
# Twice as many as there are GETs in flight: a connection is idle a moment after its answer was read, and who asks
# within that moment opens another. Those are kept, so that it does not happen for ever.
IDLE_CONNECTIONS = 2 * CONNECTIONS
# Shorter bodies can be slices of the connection's read buffer, up to 400 KiB (hyper 1, proto/h1/io.rs), which a view
# would keep alive: they are copied, at 0.1 ms at most. Longer ones come in several pieces, and obstore joins them.
VIEW_FROM = 1 << 20

# Keys that object_store refuses as paths (path/parts.rs).
_NO_PATH = re.compile(r"[\x00-\x1f\x7f]")
_STATUS = re.compile(r"Server returned non-2xx status code: (\d{3})[^:\n]*(?:: (.*))?", re.DOTALL)
_DEBUG = "\n\nDebug source:\n"
_CODE = re.compile(r"<Code>([^<]*)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_KIND = re.compile(r"HttpError \{\s*kind: (\w+)")
_REASON = re.compile(r'(?:message|error): "([^"]+)"')
_BAD_CERTIFICATE = re.compile(r"error: InvalidCertificate\(\s*(\w+)")
_CERTIFICATE = "Certificate"
# What S3 says when a request went to, or was signed for, another region than the bucket's.
_REDIRECTS = {"301", "302", "307"}
_ELSEWHERE = {
    "PermanentRedirect",
    "TemporaryRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Connected:
    """A client of obstore's with its connections, and what it was made for; None: its GETs are boto3's."""

    keys: Keys | None
    store: obstore.store.S3Store | None


class ObstoreS3Store(S3Store):
    """As S3Store. New credentials make a new client, and its connections with it: once an hour at most."""

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
        super().__init__(
            bucket,
            prefix,
            options,
            connect_timeout_s=connect_timeout_s,
            read_timeout_s=read_timeout_s,
            part_deadline_s=part_deadline_s,
        )
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._lock = threading.Lock()
        self._connected: _Connected | None = None

    def get_range(self, key: str, start: int, stop: int, *, if_match: str | None = None) -> Answer:
        if not 0 <= start < stop:
            raise ValueError(f"range [{start}, {stop}) is empty or negative")
        options: GetOptions = {"range": (start, stop)}
        if if_match is not None:
            options["if_match"] = quoted(if_match)
        what = f"{self.url}{key}: asked for bytes={start}-{stop - 1}"
        result = self._get(key, options, what)
        if result is None:
            return super().get_range(key, start, stop, if_match=if_match)
        etag = _etag_of(result, what)
        if if_match is not None and etag != if_match:
            raise ObjectReplaced(f"{what} of version {if_match}, got version {etag}")
        first, end = result.range
        size = result.meta["size"]
        if first == start and end == size < stop:
            outside = BadAnswer(f"{what}, but the object has {size} bytes")
            outside.temporary = False  # asking again would not help
            raise outside
        if (first, end) != (start, stop) or size < stop:
            raise BadAnswer(f"{what}, got bytes {first}-{end - 1} of {size}")
        return self._answer(result, etag, stop - start, what)

    def get_tail(self, key: str, length: int) -> Answer:
        if length <= 0:
            raise ValueError(f"a tail of {length} bytes is none")
        what = f"{self.url}{key}: asked for bytes=-{length}"
        try:
            result = self._get(key, {"range": {"suffix": length}}, what)
            if result is not None:
                size = result.meta["size"]
                if result.range != (max(0, size - length), size):
                    raise BadAnswer(f"{what}, got bytes {result.range[0]}-{result.range[1] - 1} of {size}")
        except _WholeObject:
            # Status 416: an empty object has no range at all (RFC 9110, 14.1.2). Status 200: legal when the whole
            # object is no longer than what was asked for, but obstore does not give it. Ask again without a range.
            result = self._get(key, {}, what)
            if result is not None and result.meta["size"] > length:
                raise BadAnswer(f"{what}, got all of {result.meta['size']} bytes") from None
        if result is None:
            return super().get_tail(key, length)
        return self._answer(result, _etag_of(result, what), min(result.meta["size"], length), what)

    def close(self) -> None:
        """As `S3Store.close`; obstore closes its connections when the last GET under way has ended."""
        with self._lock:
            self._connected = None
        super().close()

    # --- requests ------------------------------------------------------------------------------------------------

    def _get(self, key: str, options: GetOptions, what: str) -> GetResult | None:
        """One request, up to its headers; None if it is for boto3 to make. Raises _WholeObject when another one
        without a range may help."""
        name = self._name(key)
        store = None if _NO_PATH.search(name) else self._client_now()
        if store is None:
            return None
        ranged = "range" in options
        sent = time.monotonic()
        try:
            result = obstore.get(store, name, options=options)
        except (BaseError, OSError, ValueError) as error:
            failure = _understood(error)
            STORE_REQUESTS.labels("get", failure.status).inc()
            if failure.status.isdecimal():
                FIRST_BYTE.observe(time.monotonic() - sent)
            if failure.status in ("200", "416") and ranged and not isinstance(options["range"], tuple):
                raise _WholeObject from error
            if failure.status in _REDIRECTS or failure.code in _ELSEWHERE:
                # boto3 finds out where the bucket is, with its own GET, and the next route goes there.
                self._replace(store, None)
                return None
            if failure.status == _CERTIFICATE:
                # OpenSSL takes some that rustls does not, a server's own that signed itself say: boto3 decides.
                _log.info("%s: %s for obstore: boto3 makes the GETs", self.url, failure.reason)
                self._replace(store, _Connected(self.keys(), None))
                return None
            raise self._translated_failure(failure, key, what) from error
        FIRST_BYTE.observe(time.monotonic() - sent)
        STORE_REQUESTS.labels("get", "206" if ranged else "200").inc()
        return result

    def _answer(self, result: GetResult, etag: str, length: int, what: str) -> Answer:
        """Exactly `length` bytes of body. Waits without the GIL."""
        headers_at = time.monotonic()
        try:
            data = result.bytes()
        except (BaseError, OSError, ValueError) as error:
            if _understood(error).status == "Timeout":
                raise StoreUnavailable(f"cannot reach {self.endpoint_url}: no answer in time") from error
            raise BadAnswer(f"{what}: the connection ended in the middle of the answer") from error
        if len(data) != length:
            raise BadAnswer(f"{what}, got a body of {len(data)} bytes instead of {length}")
        STORE_BYTES.labels("received").inc(length)
        body_s = time.monotonic() - headers_at
        data_or_view = memoryview(data) if length >= VIEW_FROM else data.to_bytes()
        return Answer(data_or_view, etag, result.meta["size"], body_s)

    def _client_now(self) -> obstore.store.S3Store | None:
        connected = self._connected
        if connected is not None and connected.keys == self.keys():
            return connected.store
        with self._lock:
            connected = self._connected
            if connected is None or connected.keys != self.keys():
                # The route first: where there are no credentials it says so, and nobody looks for them once more.
                route = self.route()
                keys = self.keys()
                connected = self._connected = _Connected(keys, self._connect(route, keys))
        return connected.store

    def _connect(self, route: Route | None, keys: Keys | None) -> obstore.store.S3Store | None:
        if route is None:
            _log.info("%s: requests are signed in a way that obstore lacks: boto3 makes the GETs", self.url)
            return None
        client: ClientConfig = {
            "allow_http": route.bucket_url.startswith("http:"),
            "allow_invalid_certificates": False,
            "connect_timeout": f"{round(self._connect_timeout_s * 1000)}ms",
            "read_timeout": f"{round(self._read_timeout_s * 1000)}ms",
            "timeout": f"{round(TOTAL_TIMEOUT_S * 1000)}ms",
            "pool_idle_timeout": f"{round(IDLE_TIMEOUT_S * 1000)}ms",
            "pool_max_idle_per_host": str(IDLE_CONNECTIONS),
        }
        # The bucket is in the URL, whichever style that is of. What is not said here is taken from AWS_… variables,
        # by other rules than boto3's.
        config: S3Config = {
            "aws_endpoint_url_s3": route.bucket_url,
            "virtual_hosted_style_request": True,
            "region": route.region,
            "skip_signature": keys is None,
            "unsigned_payload": False,
            "request_payer": False,
            "s3_express": False,
        }

        def credentials() -> S3Credential:
            assert keys is not None
            return {
                "access_key_id": keys.access_key,
                "secret_access_key": keys.secret_key,
                "token": keys.token,
                "expires_at": None,  # other keys make another client
            }

        try:
            if not client["allow_http"]:
                client["root_certificate"] = Path(route.ca_file).read_bytes()
            return obstore.store.S3Store(
                self._bucket,
                config=config,
                client_options=client,
                retry_config={"max_retries": 0},
                credential_provider=None if keys is None else credentials,
            )
        except (BaseError, OSError, ValueError) as error:
            raise StoreError(f"S3 settings: {one_line(str(error).partition(_DEBUG)[0])}") from error

    def _replace(self, store: obstore.store.S3Store, by: _Connected | None) -> None:
        with self._lock:
            if self._connected is not None and self._connected.store is store:
                self._connected = by

    def _translated_failure(self, failure: _Failure, key: str, what: str) -> StoreError:
        if failure.refused:
            return self.refusal(int(failure.status), failure.code, failure.reason, key)
        if failure.status.isdecimal():
            return BadAnswer(f"{what}: {failure.reason}")
        return StoreUnavailable(f"cannot reach {self.endpoint_url}: {failure.reason}")


@dataclass(frozen=True, slots=True)
class _Failure:
    """What an error of obstore's says: the status, or the kind of a failure to get one, and the reason in one line.

    `refused`: S3 has answered with an error, `code` is its.
    """

    status: str
    reason: str
    code: str = ""
    refused: bool = False


def _understood(error: Exception) -> _Failure:
    """An error of obstore's has no fields; its text, made by object_store's client/retry.rs, has everything."""
    text, _, debug = str(error).partition(_DEBUG)
    refused = _STATUS.search(text)
    if refused is not None:
        body = refused[2] or ""
        code, message = (
            html.unescape(found[1]) if found else "" for found in (_CODE.search(body), _MESSAGE.search(body))
        )
        return _Failure(refused[1], message, code, refused=True)
    if "Received redirect without LOCATION" in text:
        return _Failure("301", "the bucket is in another region")
    if "source: NotPartial" in debug:
        return _Failure("200", "got status 200")
    kind = _KIND.search(debug)
    if kind is None:
        return _Failure("206", one_line(text))
    certificate = _BAD_CERTIFICATE.search(debug)
    if certificate is not None:
        return _Failure(_CERTIFICATE, f"{certificate[1]} certificate")
    if kind[1] == "Timeout":
        return _Failure(kind[1], "no connection in time" if "Connect" in debug else "no answer in time")
    reasons = _REASON.findall(debug)
    return _Failure(kind[1], one_line(reasons[-1]) if reasons else "the connection was closed before an answer came")


class _WholeObject(Exception):
    """The server has no such range of it, or sends the whole object whatever is asked."""


def _etag_of(result: GetResult, what: str) -> str:
    etag = unquoted(result.meta["e_tag"] or "")
    if not etag:
        raise BadAnswer(f"{what}, got an answer without an ETag")
    return etag
