"""Tokens of the service: bearer tokens (RFC 6750), and where people look the passwords of HTTP Basic (RFC 7617)."""

from __future__ import annotations

import base64
import hmac
import os
from pathlib import Path

import structlog

from assignment.errors import InvalidRequest

log = structlog.get_logger(__name__)


class Tokens:
    """The valid tokens: those between white space in `text`, and the lines of `file`, which is read again when it
    changes. Without both, everybody is let in. Tokens show up in no message and no repr."""

    def __init__(self, text: str | None, file: Path | None) -> None:
        """Raises InvalidRequest for a file that cannot be read, and for a source that has no token."""
        self._given = _parse(text or "")
        self._file = file
        self._from_file: tuple[bytes, ...] = ()
        self._version: tuple[int, ...] = ()
        self._has_failed = False
        self.are_wanted = text is not None or file is not None
        if text is not None and not self._given:
            raise InvalidRequest("the token is empty")
        if file is not None:
            try:
                self._read(file)
            except OSError as error:
                raise InvalidRequest(f"token file {file}: {error.strerror}") from error
            if not self._from_file:
                raise InvalidRequest(f"token file {file}: has no token")

    def accepts(self, authorization: bytes | None, *, as_password: bool = False) -> bool:
        """Whether a request with this Authorization header is let in; None: it has none, or several. `as_password`: the
        token may also be the password of HTTP Basic, whose user may be any."""
        if not self.are_wanted:
            return True
        scheme, _, token = (authorization or b"").strip().partition(b" ")
        if as_password and scheme.lower() == b"basic":
            token = _password(token)
        elif scheme.lower() != b"bearer":
            return False
        if self._file is not None:
            self._refresh(self._file)
        # Each is compared, in constant time: how long it takes tells nobody how near a guess was, or to which.
        matches = [hmac.compare_digest(token.strip(), each) for each in (*self._given, *self._from_file)]
        return any(matches)

    def _refresh(self, file: Path) -> None:
        try:
            self._read(file)
        except OSError as error:  # the tokens that were read last stay valid: a file that is being replaced comes back
            if not self._has_failed:
                log.warning("the token file cannot be read", file=str(file), error=error.strerror)
            self._has_failed = True
        else:
            self._has_failed = False

    def _read(self, file: Path) -> None:
        status = os.stat(file)
        version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if version != self._version:
            self._from_file = _parse(file.read_bytes().decode("utf-8", "surrogateescape"))
            self._version = version
            log.info("tokens were read", file=str(file), tokens=len(self._from_file))


def _parse(text: str) -> tuple[bytes, ...]:
    return tuple(each.encode("utf-8", "surrogateescape") for each in text.split())


def _password(credentials: bytes) -> bytes:
    """The password of HTTP Basic credentials; empty, which no token is, when they are none."""
    try:
        return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
    except ValueError:
        return b""
