"""What the service is told."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from datetime import UTC, tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo

from assignment.errors import InvalidRequest
from des_format.assigned_names import SnowflakeNameConfig
from des_format.errors import InvalidAssignedName
from des_format.shards import MAX_SHARD_BITS

# A batch of 10,000 paths has 1 MB; with paths as long as Linux allows it would have 40, and is to be split.
DEFAULT_MAX_BODY = 8 << 20
# Each may hold a body: 512 MiB at most. More clients than that wait their turn by Retry-After.
DEFAULT_MAX_REQUESTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSettings:
    """Settings of the service; times in seconds, `max_body` in bytes.

    `shard_bits` is that of the store's layout. `holder` names this process for people. `tokens` are valid bearer tokens
    between white space, `token_file` has one a line and is read again when it changes; without both everybody may ask.
    Raises InvalidRequest for values out of their range and an unknown time zone.
    """

    shard_bits: int
    holder: str
    timezone: str = "UTC"
    prefix: str = "DES"
    node_ttl_s: float = 30.0
    tokens: str | None = field(default=None, repr=False)
    token_file: Path | None = None
    metrics_need_token: bool = True
    max_body: int = DEFAULT_MAX_BODY
    max_requests: int = DEFAULT_MAX_REQUESTS
    request_timeout_s: float = 30.0
    retry_after_s: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.shard_bits <= MAX_SHARD_BITS:
            raise InvalidRequest(f"shard_bits: found {self.shard_bits}, want 1 to {MAX_SHARD_BITS}")
        for name in ("node_ttl_s", "max_body", "max_requests", "request_timeout_s"):
            if not getattr(self, name) > 0:
                raise InvalidRequest(f"{name}: found {getattr(self, name)}, want more than 0")
        try:
            SnowflakeNameConfig(prefix=self.prefix)
        except InvalidAssignedName as error:
            raise InvalidRequest(str(error)) from error
        self.zone()

    def zone(self) -> tzinfo:
        """Where the day ends."""
        if self.timezone == "UTC":  # needs no time zone database, which a container image may lack
            return UTC
        try:
            return ZoneInfo(self.timezone)
        except (LookupError, ValueError, OSError) as error:
            raise InvalidRequest(f"timezone: found {self.timezone!r}, want a name of the time zone database") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Where the service listens, port 0 for any that is free; with a certificate it speaks TLS. `tls_key` may be in the
    certificate's file."""

    host: str
    port: int
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def check_open_to_all(self) -> None:
        """Whoever reaches the address may ask: raises InvalidRequest unless that is this machine alone."""
        try:
            is_loopback = self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            is_loopback = False
        if not is_loopback:
            raise InvalidRequest(
                f"listening on {self.host!r} takes a token, so that not everybody may ask: "
                "set a token file, or listen on 127.0.0.1"
            )
