"""What an S3 server's answers mean, for somebody who cannot mount or pack. Pure: what was asked is in desfs.doctor.s3.

One answer can say something of the clock, the credentials, the region, the bucket and the permission to list.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from des_format.s3 import Trouble
from desfs.doctor.finding import Finding, error, ok, skipped, warning

# S3 refuses what is signed more than 15 minutes off (RequestTimeTooSkewed); a clock that nobody sets gets there.
_SKEW_REFUSED_S = 15 * 60.0
_SKEW_S = 5 * 60.0
_NO_REGION = "us-east-1"  # what boto3 signs for when nobody has said: botocore's pseudo region aws-global
_REDIRECTS = (301, 302, 307)
_WRONG_TIME = {"RequestTimeTooSkewed", "RequestExpired"}
_WRONG_REGION = {
    "PermanentRedirect",
    "TemporaryRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
}
_WRONG_CREDENTIALS = {
    "InvalidAccessKeyId": "the server does not know the key: is it of another account, or of another server?",
    "SignatureDoesNotMatch": "correct AWS_SECRET_ACCESS_KEY; or a proxy before the server changes what was signed",
    "ExpiredToken": "get new credentials: aws sso login, or where they came from",
    "InvalidToken": "set AWS_SESSION_TOKEN to what belongs to the key, or unset it",
    "TokenRefreshRequired": "get new credentials: aws sso login, or where they came from",
}
FIND_CREDENTIALS = (
    "export AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=…, or aws configure, or --profile NAME; "
    "for a public bucket --no-sign-request"
)
SET_ENDPOINT = "--endpoint-url, -o endpoint_url=, AWS_ENDPOINT_URL"


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """One answer of the server. Header names are in lower case; `at_s` is when it came, since the epoch, and `took_s`
    how long after the request."""

    status: int
    headers: dict[str, str]
    body: bytes
    at_s: float
    took_s: float

    @property
    def code(self) -> str:
        """S3's name of the error, or ""."""
        return self._element("Code")

    @property
    def region(self) -> str:
        """The region that the answer names as the bucket's, or ""."""
        expected = re.search(r"expecting '([^']+)'", self._element("Message"))
        return (
            self.headers.get("x-amz-bucket-region")
            or self._element("Region")
            or (expected[1] if expected is not None else "")
        )

    @property
    def is_s3(self) -> bool:
        """Whether only S3 answers so."""
        return any(name.startswith("x-amz-") for name in self.headers) or (
            re.search(rb"<(Error|ListBucketResult)[\s>]", self.body) is not None
        )

    def _element(self, name: str) -> str:
        found = re.search(rf"<{name}>([^<]*)</{name}>".encode(), self.body)
        return found[1].decode("utf-8", "replace") if found else ""


@dataclass(frozen=True, slots=True)
class Asked:
    """What came of a request: its `value`, or the `trouble` and the `reason`; and the answers, of which a redirected
    request has several."""

    value: Any = None
    trouble: Trouble | None = None
    reason: str = ""
    answers: tuple[HttpAnswer, ...] = ()

    @property
    def code(self) -> str:
        """S3's name of the error, or ""."""
        return self.answers[-1].code if self.answers and self.trouble is not None else ""


@dataclass(frozen=True, slots=True)
class Found:
    """Where credentials were found, or why there are none."""

    source: str = ""
    failure: str = ""


def judge_answer(greeted: Asked, endpoint: str) -> Finding:
    """Whether what answers there is an S3 server, by its answer to a request without a signature."""
    if not greeted.answers:
        reason = greeted.reason
        if "CERTIFICATE_VERIFY_FAILED" in reason:
            why = re.sub(r".*certificate verify failed: | \(_ssl.*", "", reason)
            remedy = "--ca-bundle FILE, or -o ca_bundle=FILE: the certificate of the authority that signed the server's"
            if "expired" in why:
                remedy = "renew the server's certificate; or set this machine's clock"
            elif "mismatch" in why:
                remedy = "use the name that is in the certificate; for a bucket with dots: -o addressing_style=path"
            return error("S3", f"the certificate of {endpoint} is not trusted: {why}", remedy)
        if re.search(r"WRONG_VERSION_NUMBER|UNKNOWN_PROTOCOL|RECORD_LAYER|record layer", reason):
            return error("S3", f"{endpoint} does not speak TLS", f"write http:// in the endpoint ({SET_ENDPOINT})")
        return error(
            "S3",
            f"{endpoint} takes the connection, but does not answer as S3: {reason}",
            f"is that the port of the S3 API? curl -v {endpoint}; or correct the endpoint ({SET_ENDPOINT})",
        )
    answer = greeted.answers[-1]
    if not any(each.is_s3 for each in greeted.answers):
        kind = answer.headers.get("content-type", "no content type").partition(";")[0]
        return error(
            "S3",
            f"{endpoint} is no S3 server: it answers with status {answer.status} and {kind}",
            f"write the address of the S3 API, not of a console or a web site, into the endpoint ({SET_ENDPOINT})",
        )
    server = answer.headers.get("server", "the server")
    took = f"{answer.took_s * 1000:.0f} ms"
    if greeted.trouble in (Trouble.UNAVAILABLE, Trouble.THROTTLED):
        return warning("S3", f"{server} answers: {greeted.reason}", "try again; then look at the server's own log")
    return ok("S3", f"{server} answers as S3, after {took}")


def judge_clock(answers: list[HttpAnswer]) -> Finding:
    """Whether this machine's clock agrees with the server's, which refuses signatures that are minutes off."""
    remedy = "set the clock: apt-get install chrony, or timedatectl set-ntp true"
    refused = any(answer.code in _WRONG_TIME for answer in answers)
    for answer in answers:
        try:
            server_s = parsedate_to_datetime(answer.headers.get("date", "")).timestamp()
        except ValueError:
            continue  # no date, or none that can be read
        off_s = answer.at_s - server_s
        if refused or abs(off_s) > _SKEW_S:
            side = "ahead of" if off_s > 0 else "behind"
            theirs = datetime.fromtimestamp(server_s, UTC).isoformat(sep=" ", timespec="seconds")
            found = f"this machine's clock is {_duration(abs(off_s))} {side} the server's ({theirs})"
            if refused:
                return error("clock", f"{found}: requests are refused", remedy)
            if abs(off_s) > _SKEW_REFUSED_S:
                return error("clock", f"{found}: S3 refuses what is signed more than 15 minutes off", remedy)
            return warning("clock", f"{found}: S3 refuses from 15 minutes on", remedy)
        return ok("clock", f"within {max(1, round(abs(off_s)))} s of the server's")
    if refused:
        return error("clock", "the server refuses requests: its clock and this machine's are too far apart", remedy)
    return skipped("clock", "the server does not say what time it is")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} minutes"
    return f"{minutes / 60:.1f} hours" if minutes < 48 * 60 else f"{minutes / 1440:.0f} days"


def judge_credentials(found: Found, listed: Asked) -> Finding:
    """Whether there are credentials, from where, and whether the server takes them."""
    if found.failure:
        return error("credentials", found.failure, FIND_CREDENTIALS)
    if listed.code in _WRONG_CREDENTIALS:
        return error("credentials", f"{found.source}; refused: {listed.reason}", _WRONG_CREDENTIALS[listed.code])
    if listed.value is not None or cause_of(listed) in ("permission", "bucket"):
        return ok("credentials", found.source if "not needed" in found.source else f"{found.source}; accepted")
    return ok("credentials", f"{found.source}; not tried")


def judge_region(listed: Asked, region: str | None) -> Finding:
    """Whether requests are signed for, and sent to, the region that the bucket is in."""
    ours = region if region and not region.startswith("aws-") else _NO_REGION
    wrong = [answer for answer in listed.answers if answer.status in _REDIRECTS or answer.code in _WRONG_REGION]
    if wrong:
        named = next((answer.region for answer in wrong if answer.region), "")
        said = f"the bucket is in {named}" if named else f"the bucket is in another region ({listed.reason})"
        found = f"requests go to {ours}, and {said}"
        where = named or "…"
        remedy = f"-o region={where}, --region {where} or AWS_REGION={where}"
        if listed.value is not None:
            return warning("region", f"{found}: each start costs a redirect", remedy)
        return error("region", found, remedy)
    if cause_of(listed) in ("", "permission", "bucket"):
        return ok("region", f"{ours} is right, or of no matter to the server")
    return skipped("region", f"no answer that would tell: {listed.reason or 'not asked'}")


def cause_of(listed: Asked) -> str:
    """Which check has to do with it that nothing was listed; "" when something was."""
    if listed.value is not None:
        return ""
    if listed.code in _WRONG_TIME:
        return "clock"
    if listed.code in _WRONG_CREDENTIALS:
        return "credentials"
    if listed.code in _WRONG_REGION or (listed.answers and listed.answers[-1].status in _REDIRECTS):
        return "region"
    if listed.trouble in (Trouble.NO_BUCKET, Trouble.NO_OBJECT):
        return "bucket"
    return "permission" if listed.trouble is Trouble.DENIED else "other"


def judge_bucket(bucket: str, endpoint: str, listed: Asked, greeted: Asked) -> Finding:
    """Whether the bucket exists."""
    cause = cause_of(listed)
    if not cause:
        return ok("bucket", f"{bucket!r} exists")
    if cause == "bucket" or greeted.code == "NoSuchBucket":
        return error(
            "bucket",
            f"{bucket!r} does not exist at {endpoint}",
            f"correct the URL of the store, or make it: aws s3 mb s3://{bucket} --endpoint-url {endpoint}",
        )
    if cause == "permission":
        return ok("bucket", f"{bucket!r} exists, it seems: requests are refused, not unknown")
    return skipped("bucket", f"no answer that would tell: {listed.reason}")


def judge_list(bucket: str, listed: Asked) -> Finding:
    """Whether the store may be listed."""
    match cause_of(listed):
        case "":
            return ok("list", f"permitted, {listed.answers[-1].took_s * 1000:.0f} ms")
        case "permission":
            return error(
                "list",
                f"not permitted: {listed.reason}",
                f"allow s3:ListBucket on arn:aws:s3:::{bucket} in the policy of the user, the role or the bucket",
            )
        case "other":
            return error("list", f"failed: {listed.reason}", "try again; then look at the server's own log")
        case cause:
            return skipped("list", f"see {cause}")
