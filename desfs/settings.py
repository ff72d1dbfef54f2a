"""Settings of the daemons and commands, parsed once: from the command line, then `DESFS_*` variables, then a TOML file
(`config`), then the defaults here."""

from __future__ import annotations

import importlib.util
import os
import re
import stat
import tomllib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from des_format.layout import BIG_FILE_THRESHOLD
from des_format.plan import DEFAULT_MAX_GAP
from desfs.errors import UsageError
from desfs.options import did_you_mean
from desfs.store.base import S3Options

_NO_ID = 2**32 - 1  # -1 as the kernel's 32-bit ids have it: nobody's
_DIGITS = 20  # of a size: more than any has
_UNITS = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}


def parse_size(value: Any) -> Any:
    """Bytes from a number or a text like `512M` or `1.5GiB` (powers of 1024)."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", value.lower())
    if match is None:
        raise ValueError(f"{value!r} is no size: write bytes, or a number with K, M, G or T")
    if len(match[1]) > _DIGITS:
        raise ValueError(f"{value[:_DIGITS]}… is no size: it is too large")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_octal(value: Any) -> Any:
    """A mask such as `022`."""
    if not isinstance(value, str):
        return value
    if not re.fullmatch(r"(0o)?[0-7]{1,4}", value):
        raise ValueError(f"{value!r} is no octal mask")
    return int(value, 8)


def parse_days(value: Any) -> Any:
    """Days from a text like `90d` or `12w`."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d{1,6})\s*([dw])\s*", value.lower())
    if match is None:
        raise ValueError(f"{value!r} is no age: write a number of days or weeks, like 90d or 12w")
    return int(match[1]) * (7 if match[2] == "w" else 1)


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


def check_catalog(url: SecretStr) -> SecretStr:
    """A catalog's URL, or the path of a SQLite file; it may hold a password: no message repeats any of it."""
    text = url.get_secret_value()
    try:
        scheme = urlsplit(text).scheme if "://" in text else "sqlite"
    except ValueError:
        scheme = ""
    if not text or scheme not in ("sqlite", "sqlite+aiosqlite", "postgresql", "postgresql+asyncpg"):
        raise ValueError("no catalog: want postgresql+asyncpg://user@host/database, or the path of a SQLite file")
    return url


def has_password(url: str) -> bool:
    """Whether a URL holds a password, which does not belong on a command line: `ps` shows that to everybody."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return "://" in url and (parts.password is not None or "password" in parse_qs(parts.query))


def check_timezone(name: str) -> str:
    """A name of the time zone database; UTC needs none, which a container image may lack."""
    if name == "UTC":
        return name
    from zoneinfo import ZoneInfo  # not for mounts, which have to start fast

    try:
        return ZoneInfo(name).key
    except (LookupError, ValueError, OSError) as error:
        raise ValueError(f"{name!r} is no name of the time zone database") from error


def check_address(address: str) -> str:
    """HOST:PORT to listen on."""
    from desfs.metrics import split_address  # not for mounts without it, which have to start fast

    split_address(address)
    return address


_PREFIX = "DESFS_"

Size = Annotated[int, BeforeValidator(parse_size), Field(ge=0)]
Timezone = Annotated[str, AfterValidator(check_timezone)]
Redis = Annotated[SecretStr, AfterValidator(check_redis)]
Days = Annotated[int, BeforeValidator(parse_days), Field(ge=0)]
CatalogUrl = Annotated[SecretStr, AfterValidator(check_catalog)]
Address = Annotated[str, AfterValidator(check_address)]
Octal = Annotated[int, BeforeValidator(parse_octal), Field(ge=0, le=0o7777)]


class ProgramSettings(BaseSettings):
    """What every program has: its settings file and its log."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, extra="forbid", frozen=True, hide_input_in_errors=True)

    config: str | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    log_file: str | None = None


class StoreSettings(ProgramSettings):
    """How to reach a store. S3 credentials come from the usual AWS environment and profiles alone."""

    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    addressing_style: Literal["auto", "virtual", "path"] | None = None
    no_sign_request: bool = False
    ca_bundle: str | None = None
    deadline: float = Field(default=60.0, gt=0, allow_inf_nan=False)

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
    auto_unmount: bool = False
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
    metrics: Address | None = None
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
    timezone: Timezone = "UTC"
    node_id: int = Field(default=0, ge=0, le=255)
    catalog: CatalogUrl | None = None
    assignment: str | None = None
    assignment_token_file: str | None = None
    lease_ttl: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    rescan_interval: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    redis: Redis | None = None
    metrics: Address | None = None
    max_parts: int = Field(default=16, ge=2)
    delete_grace: float = Field(default=30.0, ge=0, allow_inf_nan=False)


class ImportSettings(StoreSettings):
    """Options of an import. Sizes are bytes."""

    max_container_bytes: Size = 256 * 1024 * 1024
    max_container_files: int = Field(default=65_536, ge=1)
    max_file_size: Size = 5 * 1024**4  # S3 holds no larger object
    big_file_threshold: Annotated[Size, Field(ge=1)] = BIG_FILE_THRESHOLD
    shard_bits: int | None = Field(default=None, ge=1, le=32)
    timezone: Timezone = "UTC"


class CatalogSettings(StoreSettings):
    """Options of what works on a store and its catalog beside the packers. Times are seconds."""

    catalog: CatalogUrl | None = None
    lease_ttl: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    wait: float = Field(default=60.0, ge=0, allow_inf_nan=False)  # longer than the lease of one that was killed


class RemovalSettings(CatalogSettings):
    """Options of `desfs rm`."""


class ExpireSettings(CatalogSettings):
    """Options of `desfs expire`. `older_than` in days."""

    older_than: Days
    timezone: Timezone = "UTC"


class SealSettings(CatalogSettings):
    """Options of `desfs seal`. Sizes are bytes, times seconds: from a day's end to when it is sealed, from when a
    container was merged to when its object goes, and how old an object of its own is that no container names any more
    before it goes."""

    wait: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # what others work on is the next run's
    timezone: Timezone = "UTC"
    seal_grace: float = Field(default=3600.0, ge=0, allow_inf_nan=False)
    delete_grace: float = Field(default=300.0, ge=0, allow_inf_nan=False)
    orphan_grace: float = Field(default=86_400.0, ge=0, allow_inf_nan=False)
    max_sealed_bytes: Annotated[Size, Field(ge=1)] = 64 * 1024**3
    max_sealed_files: int = Field(default=1_000_000, ge=1)  # some 500 MB of memory while they are merged (measured)


class VerifySettings(CatalogSettings):
    """Options of `desfs verify`. Times are seconds: how old an upload that nobody can commit any more, or a container
    that was merged, has to be, and an object of its own that no container names, before it is taken for left over."""

    grace: float = Field(default=3600.0, ge=0, allow_inf_nan=False)
    external_grace: float = Field(default=86_400.0, ge=0, allow_inf_nan=False)


class AssignmentSettings(ProgramSettings):
    """Options of the assignment service, and of what works on its catalog alone. Sizes are bytes, times seconds."""

    catalog: CatalogUrl | None = None
    listen: str = "127.0.0.1:8000"
    tokens: SecretStr | None = None
    token_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    timezone: Timezone = "UTC"
    shard_bits: int = Field(default=4, ge=1, le=32)
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9]{1,32}$")] = "DES"
    holder: str = ""
    node_ttl: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    max_body: Annotated[Size, Field(ge=1)] = 8 * 1024 * 1024
    max_requests: int = Field(default=64, ge=1)
    request_timeout: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    open_metrics: bool = False


# The tables that a settings file may have: what stands in one is for that program alone.
SECTIONS: dict[str, type[ProgramSettings]] = {
    "mount": MountSettings,
    "packer": PackerSettings,
    "import": ImportSettings,
    "assignment": AssignmentSettings,
    "rm": RemovalSettings,
    "expire": ExpireSettings,
    "seal": SealSettings,
    "verify": VerifySettings,
}

S = TypeVar("S", bound=ProgramSettings)


def load_settings(kind: type[S], given: Mapping[str, Any], name_of: Callable[[str], str]) -> S:
    """The settings of one program: those `given` on its command line, then the environment's, then those of the file
    that `config` names, which may stand in any of the first two. `name_of` a setting is what its option is called.

    Raises: UsageError naming the option, the variable or the file's key that makes no sense.
    """
    for name in ("catalog", "redis", "assignment"):
        if has_password(str(given.get(name, ""))):
            raise UsageError(
                f"{name_of(name)}: everybody sees a password on a command line: set {_PREFIX}{name.upper()}, or write "
                "it into the settings file"
            )
    path = config_path(given)
    from_file = read_config(path, kind) if path else {}
    merged = {name: value for name, value in from_file.items() if f"{_PREFIX}{name.upper()}" not in os.environ}
    merged |= given
    try:
        return kind(**merged)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        origin = (
            name_of(name)
            if name in given
            else f"{path}: {name}"
            if name in merged
            else f"{_PREFIX}{name.upper()} in the environment"
        )
        raise UsageError(f"{origin}: {first['msg'].removeprefix('Value error, ')}") from None


def config_path(given: Mapping[str, Any]) -> str | None:
    """The settings file that the command line names, or else the environment."""
    return given.get("config") or os.environ.get(f"{_PREFIX}CONFIG") or None


def read_config(path: str, kind: type[ProgramSettings]) -> dict[str, Any]:
    """The settings for a program in a TOML file: those outside of tables, which hold for every program that has them,
    and those in its own table, which win.

    Raises: UsageError naming the file, and the line of what is no TOML or the key that nobody knows.
    """
    try:
        # Not blocked by a FIFO: a mount that reads its settings again would stand still.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UsageError(f"settings file {path} is no regular file")
            document = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"settings file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        raise UsageError(f"settings file {path}: {error}") from error
    tables = {name: document.pop(name) for name in SECTIONS if name in document}
    everybody = {name for each in SECTIONS.values() for name in each.model_fields} - {"config"}
    _check_keys(path, "", document, everybody | SECTIONS.keys())
    for name, table in tables.items():
        if not isinstance(table, dict):
            # The packer's URL of the service has the name of the service's own table.
            homes = ", ".join(f"[{home}]" for home, each in SECTIONS.items() if name in each.model_fields)
            hint = f"; the setting {name} belongs into {homes}" if homes else ""
            raise UsageError(f"settings file {path}: {name} is a table: [{name}]{hint}")
        _check_keys(path, f"[{name}] ", table, SECTIONS[name].model_fields.keys() - {"config"})
    found = {name: value for name, value in document.items() if name in kind.model_fields}
    for name, each in SECTIONS.items():
        if issubclass(kind, each):
            found |= tables.get(name, {})
    return found


def unknown_variables() -> list[str]:
    """What is wrong with the `DESFS_*` variables that no program of this package reads, each with the nearest that one
    does. They are no errors: whoever starts a program may set such variables for reasons of its own (Kubernetes does,
    for every service)."""
    known = {name.upper() for each in SECTIONS.values() for name in each.model_fields}
    found = sorted(name.removeprefix(_PREFIX) for name in os.environ if name.startswith(_PREFIX))
    return [
        f"{_PREFIX}{name} in the environment is no setting{did_you_mean(name.upper(), known, _PREFIX)}"
        for name in found
        if name.upper() not in known
    ]


def _check_keys(path: str, table: str, found: Mapping[str, Any], known: set[str]) -> None:
    for name in found:
        if name not in known:
            raise UsageError(f"settings file {path}: {table}{name} is no setting{did_you_mean(name, known)}")
