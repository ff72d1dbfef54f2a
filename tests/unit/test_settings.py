"""Settings of the caches: what is refused, and that a password shows up nowhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from pydantic import ValidationError

from desfs.options import OPTION_HELP
from desfs.settings import MountSettings, check_redis

SECRET = "s3cret-word"


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}@host:6379/0",
        f"redis://user:{SECRET}@host",
        f"rediss://:{SECRET}@[::1]:1/",
        f"unix://user:{SECRET}@/run/redis.sock?db=1",
    ],
)
def test_urls_of_redis_keep_their_password(url: str) -> None:
    """docs/operations.md: The password in a redis URL is never shown."""
    settings = MountSettings.model_validate({"redis": url})
    assert settings.redis is not None
    assert settings.redis.get_secret_value() == url
    for text in (repr(settings), str(settings), str(settings.model_dump()), settings.model_dump_json()):
        assert SECRET not in text
        assert "***" in text


@pytest.mark.parametrize(
    "url",
    [
        f"http://:{SECRET}@host",
        f"redis://:{SECRET}/x@host",
        f"redis://:{SECRET}@host:port",
        f"redis://:{SECRET}@host:99999",
        f"redis://:{SECRET}@",
        f"redis://:{SECRET}@host/name",
        f"redis://[:{SECRET}@host",
        SECRET,
        "",
    ],
)
def test_what_is_no_url_of_redis(url: str) -> None:
    with pytest.raises(ValidationError) as caught:
        MountSettings.model_validate({"redis": url})
    message = caught.value.errors()[0]["msg"]
    assert "no URL of Redis: want redis://" in message
    assert SECRET not in message
    assert SECRET not in str(caught.value)


def test_redis_needs_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "zstandard" else object())
    with pytest.raises(ValidationError, match=r"the package zstandard is missing: pip install 'desfs\[redis\]'"):
        MountSettings.model_validate({"redis": "redis://host"})


def test_caches_are_off_unless_asked_for() -> None:
    """docs/operations.md, Mount: the defaults."""
    settings = MountSettings()
    assert (settings.cache_dir, settings.redis, settings.cache_size) == (None, None, 10 * 2**30)
    assert {"cache_dir", "cache_size", "redis"} <= OPTION_HELP.keys()
    assert check_redis.__doc__


def test_caches_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DESFS_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("DESFS_CACHE_SIZE", "1.5G")
    monkeypatch.setenv("DESFS_REDIS", f"redis://:{SECRET}@host")
    settings = MountSettings()
    assert (settings.cache_dir, settings.cache_size) == (str(tmp_path), 3 * 2**29)
    assert SECRET not in repr(settings)
