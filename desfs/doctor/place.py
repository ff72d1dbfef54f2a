"""Where a store is to be mounted, and what a mount keeps: the directory, the folder of the disk cache, Redis; and a
store that is a directory."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

from desfs.amounts import format_size
from desfs.cache_folder import FREE_FRACTION
from desfs.cache_folder import LAYOUT as CACHE_LAYOUT
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
from desfs.doctor.finding import Budget, Finding, TooLate, error, in_time, ok, skipped, warning
from desfs.errors import AccessDenied, NoSuchStore, StoreError, UsageError
from desfs.hanging import Call, Outcome, look
from desfs.mountpoint import FS_TYPE, Mounted, mounted_at
from desfs.settings import MountSettings, StoreSettings
from desfs.store import open_store

_DEAD = (errno.ENOTCONN, errno.ECONNABORTED)  # the daemon has ended, or is just ending
_REDIS_LIMIT_S = 2.0


# --- the mount point ---------------------------------------------------------------------------------------------


def check_directory(path: str, source: str | None, settings: MountSettings, budget: Budget) -> Iterator[Finding]:
    """Whether it can be mounted there, and for whom that is."""
    absolute = os.path.abspath(path)
    folder, name = os.path.split(absolute)
    real, whole, inside, writable = look(
        [Call("stat", folder), Call("statvfs", absolute), Call("list", absolute), Call("writable", absolute)],
        limit_s=budget.left_s,
    )
    if real.answered:
        # The last component may be a dead mount, which nothing can look at.
        absolute = os.path.join(os.path.realpath(folder), name)
    yield judge_directory(path, mounted_at(absolute), whole, inside, writable, source=source, is_root=os.geteuid() == 0)
    yield judge_users(settings)


def judge_directory(
    path: str,
    mounted: Mounted | None,
    whole: Outcome,
    inside: Outcome,
    writable: Outcome,
    *,
    source: str | None = None,
    is_root: bool,
) -> Finding:
    """Whether a directory can be mounted on, by what is mounted there and what came of looking at it."""
    if mounted is not None and mounted.fs_type.startswith("fuse"):
        what = f"{mounted.source} ({mounted.fs_type})"
        if whole.errno in _DEAD and mounted.fs_type == FS_TYPE:
            return warning(
                "mount point",
                f"{path} has a dead mount of {mounted.source}: its daemon has ended",
                f"desfs mount clears it, or: desfs umount --lazy {path}",
            )
        if whole.errno in _DEAD:
            return error("mount point", f"{path} has a dead mount: {what}", f"fusermount3 -uz {path}")
        if not whole.answered:
            return error(
                "mount point", f"{path} is a mount that does not answer: {what}", f"desfs umount --lazy {path}"
            )
        if mounted.fs_type == FS_TYPE and source is not None and mounted.source in (source, os.path.abspath(source)):
            return ok("mount point", f"{path}: {mounted.source} is mounted there, and answers")
        return error("mount point", f"{path} is busy: {what} is mounted there", f"desfs umount {path}, or another one")
    if whole.errno == errno.ENOENT:
        return error("mount point", f"{path} does not exist", f"mkdir -p {path}")
    if whole.value is None:
        return error("mount point", f"{path}: {whole.reason}", f"stat {path}")
    if inside.errno == errno.ENOTDIR:
        return error("mount point", f"{path} is no directory", f"mv {path} elsewhere, or use another one")
    if not is_root and writable.value is False:
        return error(
            "mount point",
            f"{path} may not be written to by uid {os.geteuid()}: fusermount3 refuses to mount there",
            f"as root: chown {os.geteuid()} {path}",
        )
    if inside.value:
        many = f"{inside.value:,}{' or more' * (inside.value >= 1000)}"
        return warning("mount point", f"{path} is not empty: a mount hides what is in it ({many})", "use an empty one")
    return ok("mount point", f"{path} is there, empty and free")


def judge_users(settings: MountSettings) -> Finding:
    """Who may use the mount."""
    shown = f"files belong to {settings.uid}:{settings.gid}"
    if settings.allow_other:
        return ok("users", f"everybody, as the permissions of the files say (allow_other); {shown}")
    who = "root" if os.geteuid() == 0 else f"uid {os.geteuid()}"
    return ok("users", f"{who} alone: for others, mount with -o allow_other; {shown}")


# --- caches ------------------------------------------------------------------------------------------------------


def check_caches(settings: MountSettings, budget: Budget) -> Iterator[Finding]:
    """The caches outside of memory, as the settings say."""
    if settings.cache_dir is None:
        memory = format_size(settings.memory)
        yield ok("cache_dir", f"none: memory alone, {memory}; -o cache_dir=DIR keeps data over restarts")
    else:
        folder = os.path.abspath(settings.cache_dir)
        above = os.path.dirname(folder)
        itself, inner, whole, writable, parent = look(
            [
                Call("stat", folder),
                Call("stat", os.path.join(folder, CACHE_LAYOUT)),
                Call("statvfs", folder),
                Call("writable", folder),
                Call("writable", above),
            ],
            limit_s=budget.left_s,
        )
        if itself.errno == errno.ENOENT:
            yield judge_new_cache(folder, parent)
        else:
            yield judge_cache(folder, [itself, inner], whole, writable, settings.cache_size)
    if settings.redis is None:
        yield ok("redis", "none: every host reads indexes from the store itself")
    else:
        yield check_redis(settings.redis.get_secret_value(), budget)


def judge_new_cache(folder: str, parent: Outcome) -> Finding:
    """Whether a cache folder that is missing could be made."""
    if parent.value:
        return ok("cache_dir", f"{folder} will be made by the first mount")
    above = os.path.dirname(folder)
    if parent.errno == errno.ENOENT:
        return ok("cache_dir", f"{folder} will be made by the first mount, and {above} with it")
    return error(
        "cache_dir",
        f"{folder} does not exist, and uid {os.geteuid()} may not make it",
        f"as root: install -d -m 700 -o {os.geteuid()} {folder}",
    )


def judge_cache(folder: str, folders: list[Outcome], whole: Outcome, writable: Outcome, limit: int) -> Finding:
    """Whether a cache folder can be used, and has room. `folders`: what is known of it, and of the one inside."""
    for found in folders:
        if found.errno == errno.ENOENT:
            continue
        if found.value is None:
            return error("cache_dir", f"{folder}: {found.reason}", f"ls -ld {folder}")
        mode, uid = found.value[:2]
        if not stat.S_ISDIR(mode):
            return error("cache_dir", f"{folder} is no directory", "use another one: -o cache_dir=…")
        if uid != os.geteuid():
            return error(
                "cache_dir",
                f"{folder} belongs to uid {uid}, and a mount by uid {os.geteuid()} refuses it",
                "use another one: -o cache_dir=…",
            )
        if mode & stat.S_IWOTH:
            return error(
                "cache_dir", f"{folder} may be written to by everybody, so a mount refuses it", f"chmod o-w {folder}"
            )
    if not writable.value:
        return error("cache_dir", f"{folder} may not be written to", f"chmod u+rwx {folder}")
    if whole.value is None:
        return error("cache_dir", f"{folder}: {whole.reason}", f"df {folder}")
    free, size = whole.value
    room = free - int(size * FREE_FRACTION)
    if room <= 0:
        return warning(
            "cache_dir",
            f"{folder}: {format_size(free)} of the disk's {format_size(size)} are free, and a cache keeps off the last "
            f"{FREE_FRACTION:.0%}",
            "make room, or use another disk: -o cache_dir=…",
        )
    if room < limit:
        return warning(
            "cache_dir",
            f"{folder}: room for {format_size(room)}, less than cache_size={format_size(limit)} (what it holds already "
            "not counted)",
            f"make room, or -o cache_size={max(1, room >> 20)}M",
        )
    return ok("cache_dir", f"{folder}: up to {format_size(limit)}; {format_size(free)} are free")


def check_redis(url: str, budget: Budget) -> Finding:
    """Whether Redis answers. No part of the URL but host and port is shown."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    limit_s = min(_REDIS_LIMIT_S, budget.each_s)

    def ping() -> str:
        client = redis.Redis.from_url(
            url,
            socket_timeout=limit_s,
            socket_connect_timeout=limit_s,
            retry=Retry(NoBackoff(), 0),
            retry_on_error=[],
        )
        try:
            client.ping()
            return str(client.info("server").get("redis_version", "of a version that it does not tell"))
        finally:
            client.close()

    remedy = "start it, or correct redis= (DESFS_REDIS); mounts work without, slower"
    try:
        version = in_time(ping, budget)
    except redis.AuthenticationError:
        return warning("redis", "refuses the password", "correct it in DESFS_REDIS; mounts work without, slower")
    except redis.ResponseError as failure:
        # Another user's: what a mount needs, GET and SET, may be permitted all the same.
        return (
            ok("redis", f"answers ({failure})") if "NOPERM" in str(failure) else warning("redis", str(failure), remedy)
        )
    except (redis.RedisError, OSError, TooLate) as failure:
        return warning("redis", f"does not answer: {failure}", remedy)
    return ok("redis", f"Redis {version} answers")


# --- a store that is a directory ---------------------------------------------------------------------------------


def check_directory_store(url: str, settings: StoreSettings, budget: Budget, *, write: bool) -> Iterator[Finding]:
    """All that can be seen of a store in a directory."""
    rest = ("list", *CONTENTS_CHECKS, *(WRITE_CHECKS if write else ()))
    try:
        store = in_time(lambda: open_store(url, settings.s3_options(), deadline_s=budget.each_s), budget)
    except (UsageError, StoreError, TooLate) as failure:
        remedy = (
            f"mkdir -p {url}; a packer makes it by itself" if isinstance(failure, NoSuchStore) else "correct SOURCE"
        )
        yield error("store", str(failure), remedy)
        yield from (skipped(name, "there is no store") for name in rest)
        return
    yield ok("store", store.url)
    try:
        listing = in_time(lambda: store.list("", delimiter=True), budget)
    except (StoreError, TooLate) as failure:
        remedy = f"chmod u+rx {url}" if isinstance(failure, AccessDenied) else f"ls -l {url}"
        yield error("list", str(failure), remedy)
        yield from (skipped(name, "the store cannot be listed") for name in rest[1:])
        return
    yield ok("list", "permitted")
    contents = Contents(
        tuple(Sample(each.key, each.size) for each in listing.objects),
        tuple(prefix.rstrip("/") for prefix in listing.prefixes),
    )
    yield check_layout(store, contents, budget)
    yield judge_days(contents)

    def look_at(sample: Sample) -> Iterator[Finding]:
        yield check_get(store, sample, budget)

    if write:
        yield from check_writing(store, budget, look_at)
        return
    sample = contents.sample()
    folder = next(reversed(contents.days), None) or next(iter(contents.folders), None)
    if sample is None and folder is not None:
        try:
            below = in_time(lambda: store.list(f"{folder}/", delimiter=True), budget).objects
        except (StoreError, TooLate) as failure:
            yield error("get", f"{folder}/ cannot be listed: {failure}", "let the mount list the whole store")
            return
        sample = next((Sample(each.key, each.size) for each in below if each.size), None)
    yield check_get(store, sample, budget)
