"""Settings of the daemons, parsed once: from the command line, then `DESFS_*` variables, then the defaults here."""

from __future__ import annotations

import importlib.util
import os
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from des_format.layout import BIG_FILE_THRESHOLD
from des_format.plan import DEFAULT_MAX_GAP
from desfs.store.base import S3Options

_NO_ID = 2**32 - 1  # -1 as the kernel's 32-bit ids have it: nobody's
_UNITS = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}


def parse_size(value: Any) -> Any:
    """Bytes from a number or a text like `512M` or `1.5GiB` (powers of 1024)."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", value.lower())
    if match is None:
        raise ValueError(f"{value!r} is no size: write bytes, or a number with K, M, G or T")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_octal(value: Any) -> Any:
    """A mask such as `022`."""
    if not isinstance(value, str):
        return value
    if not re.fullmatch(r"(0o)?[0-7]{1,4}", value):
        raise ValueError(f"{value!r} is no octal mask")
    return int(value, 8)


def check_redis(url: SecretStr) -> SecretStr:
    """A URL of Redis, which may hold a password: no message repeats any of it."""
    try:
        parts = urlsplit(url.get_secret_value())
        known = parts.scheme == "unix" or (
            parts.scheme in ("redis", "rediss")
            and bool(parts.hostname)
            and parts.port != 0
            and re.fullmatch(r"(/\d*)?", parts.path) is not None
        )
    except ValueError:
        known = False
    if not known:
        raise ValueError("no URL of Redis: want redis://[[user]:password@]host[:port][/database]")
    missing = [name for name in ("redis", "zstandard") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the package {missing[0]} is missing: pip install 'desfs[redis]'")
    return url


Size = Annotated[int, BeforeValidator(parse_size), Field(ge=0)]
Redis = Annotated[SecretStr, AfterValidator(check_redis)]
Octal = Annotated[int, BeforeValidator(parse_octal), Field(ge=0, le=0o7777)]


class StoreSettings(BaseSettings):
    """How to reach a store. S3 credentials come from the usual AWS environment and profiles alone."""

    model_config = SettingsConfigDict(env_prefix="DESFS_", extra="forbid", frozen=True, hide_input_in_errors=True)

    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    addressing_style: Literal["auto", "virtual", "path"] | None = None
    no_sign_request: bool = False
    ca_bundle: str | None = None
    deadline: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    log_file: str | None = None

    def s3_options(self) -> S3Options:
        """The part that concerns S3."""
        return S3Options(
            endpoint_url=self.endpoint_url,
            region=self.region,
            profile=self.profile,
            addressing_style=self.addressing_style,
            no_sign_request=self.no_sign_request,
            ca_bundle=self.ca_bundle,
        )


class MountSettings(StoreSettings):
    """Options of a mount. Sizes are bytes, times seconds."""

    allow_other: bool = False
    noexec: bool = False
    uid: int = Field(default_factory=os.getuid, ge=0, lt=_NO_ID)
    gid: int = Field(default_factory=os.getgid, ge=0, lt=_NO_ID)
    umask: Octal = 0
    memory: Size = 256 * 1024 * 1024
    cache_dir: str | None = None
    cache_size: Size = 10 * 1024**3
    redis: Redis | None = None
    max_gap: Size = DEFAULT_MAX_GAP
    max_prefetch: Size = 64 * 1024 * 1024
    refresh: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    strict: bool = False
    fsname: str | None = None
    levers: Literal["auto", "off"] = "auto"


class PackerSettings(StoreSettings):
    """Options of a packer. Sizes are bytes, times seconds."""

    settle: float = Field(default=2.0, ge=0)
    scan_interval: float = Field(default=1.0, gt=0)
    max_age: float = Field(default=30.0, ge=0)
    max_container_bytes: Size = 256 * 1024 * 1024
    max_container_files: int = Field(default=65_536, ge=1)
    max_batch_files: int = Field(default=50_000, ge=1)
    max_file_size: Size = 5 * 1024**4  # S3 holds no larger object
    temporary: str = "*.tmp,*.part"
    big_file_threshold: Annotated[Size, Field(ge=1)] = BIG_FILE_THRESHOLD
    shard_bits: int | None = Field(default=None, ge=1, le=32)
    naming: Literal["path", "assigned"] | None = None
    timezone: str = "UTC"
    node_id: int = Field(default=0, ge=0, le=255)
    holder: str = ""
