"""What a mount and a packer need of an S3 server: that it is there, that it is one, and that it lets us.

All that is asked first is taken down; what it means is decided by functions without I/O, so that one answer can say
something of the clock, the credentials, the region, the bucket and the permission to list.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from des_format.s3 import Trouble, build_client, build_session, diagnose, foreign_errors, one_line
from des_format.shards import CONTAINER_SUFFIX
from desfs.doctor.answers import (
    FIND_CREDENTIALS,
    SET_ENDPOINT,
    Asked,
    Found,
    HttpAnswer,
    cause_of,
    judge_answer,
    judge_bucket,
    judge_clock,
    judge_credentials,
    judge_list,
    judge_region,
)
from desfs.doctor.contents import (
    CONTENTS_CHECKS,
    WRITE_CHECKS,
    Contents,
    Sample,
    check_get,
    check_layout,
    check_writing,
    judge_days,
)
from desfs.doctor.finding import Budget, Finding, State, TooLate, error, in_time, ok, skipped, warning
from desfs.errors import UsageError
from desfs.layout import LAYOUT_KEY
from desfs.settings import StoreSettings
from desfs.store import S3Options, open_store
from desfs.store.s3 import S3Store

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_SET_UP_S = 5.0  # for boto3 to find credentials, and to read its own descriptions of S3, which takes 0.3 s
_LISTED = 1000  # names of the root: one answer
_NO_ETAG = "0" * 32  # no object has it
# botocore/credentials.py: METHOD of each provider.
_SOURCES = {
    "env": "the environment (AWS_ACCESS_KEY_ID)",
    "shared-credentials-file": "the credentials file (~/.aws/credentials)",
    "config-file": "the AWS configuration (~/.aws/config)",
    "assume-role": "an assumed role",
    "assume-role-with-web-identity": "a role assumed with a token (AWS_WEB_IDENTITY_TOKEN_FILE)",
    "sso": "single sign-on (aws sso login)",
    "login": "aws login",
    "custom-process": "a program (credential_process)",
    "container-role": "the role of this container",
    "iam-role": "the role of this EC2 instance",
    "boto2-config-file": "boto's old configuration file",
}
_ASKED_CHECKS = ("region", "bucket", "list", *CONTENTS_CHECKS, "If-Match")


class Witness:
    """A client whose answers are written down. Any thread."""

    def __init__(self, session: Any, options: S3Options, limit_s: float) -> None:
        """`session` is one of boto3's. Raises: what botocore raises for settings that make no sense."""
        self.client = build_client(
            session,
            endpoint_url=options.endpoint_url,
            addressing_style=options.addressing_style,
            no_sign_request=options.no_sign_request,
            ca_bundle=options.ca_bundle,
            connect_timeout_s=limit_s,
            read_timeout_s=limit_s,
            connections=2,
        )
        # Of the request that a thread makes: one that was given up must not write into the next one's.
        self._request = threading.local()
        self.client.meta.events.register("before-send.s3", self._sent)
        self.client.meta.events.register("before-parse.s3", self._received)

    def ask(self, call: Callable[[S3Client], Any], budget: Budget) -> Asked:
        """Make a request."""
        answers: list[HttpAnswer] = []

        def request() -> Any:
            self._request.answers = answers
            return call(self.client)

        try:
            return Asked(value=in_time(request, budget), answers=tuple(answers))
        except TooLate as late:
            return Asked(trouble=Trouble.UNAVAILABLE, reason=str(late), answers=tuple(answers))
        except foreign_errors() as failure:
            trouble, reason = diagnose(failure)
            return Asked(trouble=trouble, reason=reason, answers=tuple(answers))
        except RecursionError:
            # botocore/utils.py, get_bucket_region: asks where the bucket is, and does so again for each redirect.
            reason = "redirected without a word where to"
            return Asked(trouble=Trouble.OTHER, reason=reason, answers=tuple(answers[:1]))

    def _sent(self, **_: Any) -> None:
        self._request.sent_s = time.monotonic()

    def _received(self, response_dict: dict[str, Any], **_: Any) -> None:
        body = response_dict["body"]
        self._request.answers.append(
            HttpAnswer(
                response_dict["status_code"],
                {name.lower(): value for name, value in response_dict["headers"].items()},
                body if isinstance(body, bytes) else b"",  # of a GET's content, nothing
                time.time(),
                time.monotonic() - self._request.sent_s,
            )
        )


@dataclass(frozen=True, slots=True)
class _There:
    """Where the store is. `prefix` is "" or ends in `/`."""

    bucket: str
    prefix: str
    endpoint: str


def check_s3(url: str, settings: StoreSettings, budget: Budget, *, write: bool) -> Iterator[Finding]:
    """All that can be seen of a store `s3://bucket/prefix`."""
    options = settings.s3_options()
    rest = (*_ASKED_CHECKS, *(WRITE_CHECKS if write else ()))
    senseless: tuple[type[Exception], ...] = (UsageError, TooLate, *foreign_errors())
    try:
        # Credentials are looked for, and may have to come from somewhere.
        clients = in_time(lambda: _Clients(url, options, budget.each_s), Budget(_SET_UP_S, _SET_UP_S))
    except senseless as failure:
        if isinstance(failure, TooLate) or "partial credentials" in str(failure).lower():
            yield error("credentials", one_line(str(failure)), FIND_CREDENTIALS)
            yield from (skipped(name, "see credentials") for name in ("endpoint", "connection", "S3", "clock", *rest))
        else:
            remedy = "desfs doctor s3://bucket/prefix, with settings as for desfs mount"
            yield error("store", one_line(str(failure)), remedy)
        return
    with contextlib.closing(clients):
        there, address = clients.there, clients.address
        yield ok("store", f"{clients.store.url} at {there.endpoint}")
        reached = yield from _reach(address.scheme, address.hostname or "", address.port, budget)
        greeted = Asked()
        if reached:
            greeted = _list(clients.anonymous, there, budget)
            answer = judge_answer(greeted, there.endpoint)
            if answer.state is State.ERROR and address.scheme == "http":
                answer = _hint_tls(answer, address.hostname or "", address.port or 80, budget)
            yield answer
            reached = answer.state is not State.ERROR
        else:
            yield skipped("S3", "there is no connection")
        found = find_credentials(clients.session, options, budget)
        listed = _list(clients.signed, there, budget) if reached and not found.failure else Asked()
        yield judge_clock([*greeted.answers, *listed.answers]) if reached else skipped("clock", "S3 cannot be asked")
        yield judge_credentials(found, listed)
        if not reached or found.failure:
            reason = "without credentials nothing can be asked for" if reached else "S3 cannot be asked"
            yield from (skipped(name, reason) for name in rest)
            return
        yield judge_region(listed, clients.signed.client.meta.region_name)
        yield judge_bucket(there.bucket, there.endpoint, listed, greeted)
        yield judge_list(there.bucket, listed)
        yield from _check_contents(clients, listed, budget, write=write)


class _Clients:
    """All that requests are made with: the store as a mount has it, but nothing is tried again; and two clients, of
    which one signs as the settings say, the other not at all. `address` is where requests go: the bucket may stand in
    the name of the host."""

    def __init__(self, url: str, options: S3Options, each_s: float) -> None:
        """Raises: UsageError, or what botocore raises, for settings that make no sense."""
        store = open_store(url, options).inner
        assert isinstance(store, S3Store)
        self.store = store
        bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
        self.there = _There(bucket, prefix, re.sub(r"//[^/@]*@", "//…@", store.endpoint_url))
        limit_s = each_s * 0.8  # the client's own limit comes first: it knows what it waited for
        self.session = build_session(region=options.region, profile=options.profile)
        self.anonymous = Witness(self.session, replace(options, no_sign_request=True), limit_s)
        self.signed = Witness(self.session, options, limit_s)
        where = {"Bucket": bucket}
        self.address = urlsplit(self.anonymous.client.generate_presigned_url("list_objects_v2", Params=where))

    def close(self) -> None:
        """Release connections."""
        for each in (self.store, self.anonymous.client, self.signed.client):
            each.close()


# --- the way there -----------------------------------------------------------------------------------------------


def _reach(scheme: str, host: str, port: int | None, budget: Budget) -> Generator[Finding, None, bool]:
    """Resolve and connect; returns whether that went well."""
    port = port or (443 if scheme == "https" else 80)
    what = f"{host}:{port}"
    proxy = urllib.request.getproxies().get(scheme)
    if proxy is not None and not urllib.request.proxy_bypass(host):
        behind = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        host, port = behind.hostname or "", behind.port or 80
        what = f"{what} through the proxy {host}:{port} ({scheme}_proxy)"
    try:
        addresses = in_time(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), budget)
    except (socket.gaierror, UnicodeError, TooLate) as failure:
        reason = failure.strerror if isinstance(failure, socket.gaierror) else str(failure)
        yield error(
            "endpoint",
            f"the name {host} cannot be resolved: {reason}",
            f"correct the endpoint ({SET_ENDPOINT}); if it is right, the name service: getent hosts {host}",
        )
        yield skipped("connection", "the name cannot be resolved")
        return False
    numbers = sorted({str(each[4][0]) for each in addresses})
    yield ok("endpoint", what if numbers == [host] else f"{what} is {', '.join(numbers[:4])}")
    began = time.monotonic()
    try:
        in_time(lambda: socket.create_connection((host, port), timeout=budget.each_s * 0.8).close(), budget)
    except ConnectionRefusedError:
        yield error(
            "connection",
            f"refused: nothing listens at {host}:{port}",
            f"start the server, or correct host and port of the endpoint ({SET_ENDPOINT})",
        )
        return False
    except (TimeoutError, TooLate):
        yield error(
            "connection",
            f"no answer from {host}:{port}",
            f"look for a firewall on the way: nc -vz {host} {port}; or correct the endpoint ({SET_ENDPOINT})",
        )
        return False
    except OSError as failure:
        yield error("connection", f"{host}:{port}: {failure.strerror or failure}", f"ip route get {numbers[0]}")
        return False
    yield ok("connection", f"{host}:{port} in {(time.monotonic() - began) * 1000:.1f} ms")
    return True


def _hint_tls(answer: Finding, host: str, port: int, budget: Budget) -> Finding:
    """The finding, with a better remedy where the server speaks TLS."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # only whether it speaks TLS at all is asked; nothing is sent

    def shake_hands() -> None:
        with socket.create_connection((host, port), timeout=budget.left_s) as plain:
            context.wrap_socket(plain, server_hostname=host).close()

    try:
        in_time(shake_hands, budget)
    except (OSError, TooLate):  # it does not
        return answer
    return replace(answer, remedy=f"it speaks TLS: write https:// in the endpoint ({SET_ENDPOINT})")


def _list(witness: Witness, there: _There, budget: Budget) -> Asked:
    return witness.ask(
        lambda client: client.list_objects_v2(Bucket=there.bucket, Prefix=there.prefix, Delimiter="/", MaxKeys=_LISTED),
        budget,
    )


def find_credentials(session: Any, options: S3Options, budget: Budget) -> Found:
    """Where a session of boto3's finds credentials. None of them is shown."""
    if options.no_sign_request:
        return Found("not needed: requests are not signed (no_sign_request)")

    def find() -> Found:
        credentials = session.get_credentials()
        if credentials is None:
            return Found(failure="none found: not in the environment, nor in ~/.aws, and this machine has no role")
        credentials.get_frozen_credentials()  # renews them if it is time
        return Found(f"from {_SOURCES.get(credentials.method, credentials.method)}")

    try:
        return in_time(find, budget)
    except TooLate as late:
        return Found(failure=f"where they should come from there is {late}")
    except foreign_errors() as failure:
        return Found(failure=diagnose(failure)[1])
    except RuntimeError as failure:  # botocore/credentials.py: "… the refreshed credentials are still expired."
        return Found(failure=one_line(str(failure)))


# --- what is in the store ----------------------------------------------------------------------------------------


def _check_contents(clients: _Clients, listed: Asked, budget: Budget, *, write: bool) -> Iterator[Finding]:
    store, signed, there = clients.store, clients.signed, clients.there
    cause = cause_of(listed)
    if cause not in ("", "permission"):
        why = f"see {'list' if cause == 'other' else cause}"
        yield from (skipped(name, why) for name in (*CONTENTS_CHECKS, "If-Match", *(WRITE_CHECKS if write else ())))
        return
    sample: Sample | None
    if cause:
        yield skipped("layout", "the store may not be listed")
        yield skipped("days", "the store may not be listed")
        sample = Sample(LAYOUT_KEY, 2)  # if there is one
    else:
        contents = contents_of(listed.value, there.prefix)
        yield check_layout(store, contents, budget)
        yield judge_days(contents)
        sample = contents.sample() or _sample_below(signed, there, contents, budget)

    def look(sample: Sample | None) -> Iterator[Finding]:
        found = check_get(store, sample, budget)
        if cause and found.state is State.ERROR:
            # S3 hides it behind the same status 403 from those who may not list.
            found = replace(
                found, found=f"{found.found}; or it does not exist, which those who may not list are not told"
            )
        yield found
        yield check_if_match(signed, there, sample, budget)

    yield from check_writing(store, budget, look) if write else look(sample)


def contents_of(listing: dict[str, Any], prefix: str) -> Contents:
    """What a page of a listing says."""
    drop = len(prefix)
    return Contents(
        tuple(Sample(each["Key"][drop:], each["Size"]) for each in listing.get("Contents", ())),
        tuple(each["Prefix"][drop:].rstrip("/") for each in listing.get("CommonPrefixes", ())),
        not listing.get("IsTruncated"),
    )


def _sample_below(witness: Witness, there: _There, contents: Contents, budget: Budget) -> Sample | None:
    """A container of the newest day, or of another folder."""
    folder = next(reversed(contents.days), None) or next(iter(contents.folders), None)
    if folder is None:
        return None
    below = f"{there.prefix}{folder}/"
    listed = witness.ask(lambda client: client.list_objects_v2(Bucket=there.bucket, Prefix=below, MaxKeys=10), budget)
    found = contents_of(listed.value or {}, there.prefix).objects
    return next((each for each in found if each.size and each.key.endswith(CONTAINER_SUFFIX)), None)


def check_if_match(witness: Witness, there: _There, sample: Sample | None, budget: Budget) -> Finding:
    """Whether the server refuses to send another version of an object than the one that is asked for."""
    if sample is None:
        return skipped("If-Match", "the store has no object to try it on; --write makes one")
    asked = witness.ask(
        lambda client: client.get_object(
            Bucket=there.bucket, Key=there.prefix + sample.key, Range="bytes=0-0", IfMatch=f'"{_NO_ETAG}"'
        )["Body"].close(),
        budget,
    )
    status = asked.answers[-1].status if asked.answers else 0
    if asked.trouble is Trouble.PRECONDITION:
        return ok("If-Match", "honoured: bytes of a replaced container are never sent")
    if status in (200, 206):
        return warning(
            "If-Match",
            "ignored: a mount compares versions itself, after the bytes have come",
            "nothing has to be done; a replaced container costs the bytes that were on their way",
        )
    return skipped("If-Match", f"no answer that would tell: {asked.reason}")
