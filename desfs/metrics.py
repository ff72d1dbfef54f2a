"""Every metric of the program, in one table, and what shows them. Any thread may use them.

No label has values that grow with days, shards, files or stores: docs/metrics.md, made from this module, lists all.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)

from desfs.errors import DesfsError

# When a series began is of no use to anybody who scrapes it, and as many lines again.
disable_created_metrics()  # type: ignore[no-untyped-call]

# Registries of our own: what else a process has imported does not show up in its statistics. A daemon shows what all
# have, and its own; `snapshot` leaves out what is not ours to count.
PROCESS = CollectorRegistry()
STORE = CollectorRegistry()
MOUNT = CollectorRegistry()
PACKER = CollectorRegistry()

# From a disk next door to a region on the other side of the world, and what lies beyond a time-out.
RTT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
# From an answer out of memory to the deadline of a store that is silent.
REQUEST_BUCKETS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
FILES_BUCKETS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
# From an announced container to one that a mount learns of when somebody looks.
DELAY_BUCKETS = (0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)
PUBLISH_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0)
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)

# --- every daemon ----------------------------------------------------------------------------------------------------

ProcessCollector(registry=PROCESS)
BUILD = Info("desfs_build", "What runs: versions, and whether the mount's C extension is in force", registry=STORE)
STORE_REQUESTS = Counter(
    "desfs_store_requests_total",
    "Requests to the object store, each try counted; status is HTTP's, or the error's name without one",
    ["operation", "status"],
    registry=STORE,
)
STORE_BYTES = Counter(
    "desfs_store_bytes_total", "Payload bytes to and from the object store", ["direction"], registry=STORE
)
STORE_RETRIES = Counter(
    "desfs_store_retries_total", "Calls that were tried again after a temporary error", ["operation"], registry=STORE
)
FIRST_BYTE = Histogram(
    "desfs_store_first_byte_seconds", "GET sent to headers of the answer", buckets=RTT_BUCKETS, registry=STORE
)
LOOP_LAG = Histogram(
    "desfs_event_loop_lag_seconds",
    "How much later than it asked for a task was run, once a second",
    buckets=LAG_BUCKETS,
    registry=STORE,
)
LOOP_SILENCE = Gauge(
    "desfs_event_loop_silence_seconds", "Since the event loop last turned: what hangs shows here", registry=STORE
)

# --- mount -----------------------------------------------------------------------------------------------------------

REQUESTS = Counter(
    "desfs_fuse_requests_total",
    "Requests of the kernel by operation and outcome",
    ["operation", "errno"],
    registry=MOUNT,
)
REQUEST_SECONDS = Histogram(
    "desfs_fuse_request_seconds",
    "Request received to answer sent",
    ["operation"],
    buckets=REQUEST_BUCKETS,
    registry=MOUNT,
)
OPEN_REQUESTS = Gauge("desfs_fuse_open_requests", "Requests that are being answered", registry=MOUNT)
OLDEST_REQUEST = Gauge(
    "desfs_fuse_oldest_request_seconds",
    "Age of the oldest request that is being answered, 0 without any",
    registry=MOUNT,
)
READ_BYTES = Counter(
    "desfs_read_bytes_total",
    "Bytes of files given to the kernel, by way: read (it asked), pushed (before it asked)",
    ["way"],
    registry=MOUNT,
)
FILES_PER_GET = Histogram(
    "desfs_store_files_per_get", "Files whose contents one GET brought", buckets=FILES_BUCKETS, registry=MOUNT
)
CHECKSUM_FAILURES = Counter(
    "desfs_checksum_failures_total", "Payloads that did not match the checksum in their metadata", registry=MOUNT
)
PROBLEMS = Counter("desfs_problems_total", "Defects found in the store: /.desfs/problems names them", registry=MOUNT)
CACHE_REQUESTS = Counter(
    "desfs_cache_requests_total",
    "What was looked for in a cache: level memory, disk or redis; kind block, index or tail; outcome hit or miss",
    ["level", "kind", "outcome"],
    registry=MOUNT,
)
CACHE_BYTES = Gauge("desfs_cache_bytes", "Bytes that a cache holds, by level", ["level"], registry=MOUNT)
CACHE_LIMIT = Gauge(
    "desfs_cache_limit_bytes",
    "Bytes that a cache may hold, by level; memory: fetches and all else with it",
    ["level"],
    registry=MOUNT,
)
CACHE_EVICTED = Counter(
    "desfs_cache_evicted_bytes_total", "Bytes that made room in a cache, by level", ["level"], registry=MOUNT
)
FETCH_BYTES = Gauge("desfs_fetch_bytes", "Memory that fetches under way may take", registry=MOUNT)
DISK_CACHE_BYTES = Counter(
    "desfs_disk_cache_bytes_total",
    "Bytes of blocks and compiled indexes read and written",
    ["kind", "direction"],
    registry=MOUNT,
)
DISK_CACHE_ERRORS = Counter(
    "desfs_disk_cache_errors_total",
    "What went wrong: read, write (the disk refused), full (too little is free), damaged (a wrong checksum)",
    ["what"],
    registry=MOUNT,
)
PAGES_PUSHED = Counter(
    "desfs_pages_pushed_total",
    "Files put into the kernel's page cache, by result: stored, unknown (to the kernel), dropped (queue full), failed",
    ["result"],
    registry=MOUNT,
)
PREFETCH_BOUGHT = Counter(
    "desfs_prefetch_bought_total",
    "Containers of which the rest was fetched because misses had cost as much",
    registry=MOUNT,
)
INDEX_LOADS = Counter(
    "desfs_index_loads_total",
    "Containers whose index was read, by source: disk, redis, store",
    ["source"],
    registry=MOUNT,
)
OPEN_CONTAINERS = Gauge("desfs_open_containers", "Containers whose index is in memory", registry=MOUNT)
SEEN_SECONDS = Histogram(
    "desfs_container_seen_seconds",
    "LastModified of a new container of a day that is being read, to when the mount shows it",
    buckets=DELAY_BUCKETS,
    registry=MOUNT,
)

# --- packer ----------------------------------------------------------------------------------------------------------

SPOOL_FILES = Gauge("desfs_spool_files", "Files that are not durable yet: waiting or claimed", registry=PACKER)
SPOOL_BYTES = Gauge("desfs_spool_bytes", "Bytes of the files that are not durable yet", registry=PACKER)
SPOOL_OLDEST = Gauge(
    "desfs_spool_oldest_file_seconds",
    "Age of the oldest file that is not durable yet, 0 without any: since it was touched last, once claimed since then",
    registry=PACKER,
)
PACKED_FILES = Counter("desfs_packed_files_total", "Spool files that are durable and committed", registry=PACKER)
PACKED_BYTES = Counter(
    "desfs_packed_bytes_total", "Bytes of the spool files that are durable and committed", registry=PACKER
)
PACKED_CONTAINERS = Counter("desfs_packed_containers_total", "Containers that were committed", registry=PACKER)
REJECTED_FILES = Counter("desfs_rejected_files_total", "Spool files that were put aside for good", registry=PACKER)
MERGED_CONTAINERS = Counter("desfs_merged_containers_total", "Containers that were merged into others", registry=PACKER)
PUBLISH_SECONDS = Histogram(
    "desfs_publish_seconds", "A batch claimed to all of it committed", buckets=PUBLISH_BUCKETS, registry=PACKER
)
PUBLISH_FAILURES = Counter(
    "desfs_publish_failures_total",
    "Tries to publish that failed, by reason: store, catalog, lease, spool, damage, other",
    ["reason"],
    registry=PACKER,
)
LAST_PUBLISH = Gauge(
    "desfs_last_publish_timestamp_seconds", "When the last batch was published, 0 before the first", registry=PACKER
)
LEASES = Counter(
    "desfs_shard_leases_total",
    "Leases of shards: acquired, refused (others work on it), lost",
    ["outcome"],
    registry=PACKER,
)
SHARDS_OWNED = Gauge("desfs_shards_owned", "Shards that this packer keeps in order", registry=PACKER)


# What is known beforehand is there from the start, as 0: a rate over what appears with its first event misses that.
for _metric, _labels in (
    (STORE_BYTES, ("received", "sent")),
    (STORE_RETRIES, ("list", "get", "put", "copy", "delete")),
    (READ_BYTES, ("read", "pushed")),
    (CACHE_EVICTED, ("memory", "disk")),
    (DISK_CACHE_ERRORS, ("read", "write", "full", "damaged")),
    (PAGES_PUSHED, ("stored", "unknown", "dropped", "failed")),
    (INDEX_LOADS, ("disk", "redis", "store")),
    (PUBLISH_FAILURES, ("store", "catalog", "lease", "spool", "damage", "other")),
    (LEASES, ("acquired", "refused", "lost")),
):
    for _label in _labels:
        _metric.labels(_label)


class MetricsRefused(DesfsError):
    """The address for /metrics cannot be listened on."""


def serve(address: str, *registries: CollectorRegistry) -> None:
    """Answer /metrics at HOST:PORT with what the registries have, in a thread of its own, until the process ends.

    Raises: MetricsRefused.
    """
    host, port = split_address(address)
    shown = CollectorRegistry()
    for registry in registries:
        shown.register(registry)
    try:
        start_http_server(port, host, shown)
    except OSError as error:
        raise MetricsRefused(f"cannot listen on {address} for metrics: {error.strerror}") from error


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT` or `[IPv6]:PORT`. Raises: ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is no address: want HOST:PORT, such as 127.0.0.1:9101")
    return host.removeprefix("[").removesuffix("]"), int(port)


def snapshot(registries: Iterable[CollectorRegistry] = (STORE, MOUNT, PACKER)) -> dict[str, float]:
    """All metrics under flat names: the metric's, then its labels' values, with dots between them.

    Of a histogram there are `_sum` and `_count`, not the buckets.
    """
    values: dict[str, float] = {}
    for registry in registries:
        for metric in registry.collect():
            for sample in metric.samples:
                if not sample.name.endswith("_bucket"):
                    values[".".join((sample.name, *sample.labels.values()))] = sample.value
    return values


def puts() -> int:
    """Requests that stored something, each try counted."""
    kinds = ("put", "put_part")
    return int(
        sum(
            value
            for name, value in snapshot([STORE]).items()
            if name.startswith("desfs_store_requests_total.") and name.split(".")[1] in kinds
        )
    )
