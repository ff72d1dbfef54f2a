"""Every metric of the program, in one table, and what the statistics page shows of them. Any thread may use them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

# A registry of our own: what else a process has imported does not show up in its statistics.
REGISTRY = CollectorRegistry()

# From a disk next door to a region on the other side of the world, and what lies beyond a time-out.
RTT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

STORE_REQUESTS = Counter(
    "desfs_store_requests_total",
    "Requests to the object store, each try counted; status is HTTP's, or the error's name without one",
    ["operation", "status"],
    registry=REGISTRY,
)
STORE_BYTES = Counter(
    "desfs_store_bytes_total", "Payload bytes to and from the object store", ["direction"], registry=REGISTRY
)
STORE_RETRIES = Counter(
    "desfs_store_retries_total", "Calls that were tried again after a temporary error", ["operation"], registry=REGISTRY
)
FIRST_BYTE = Histogram(
    "desfs_store_first_byte_seconds",
    "GET sent to headers of the answer",
    buckets=RTT_BUCKETS,
    registry=REGISTRY,
)

REQUESTS = Counter(
    "desfs_fuse_requests_total",
    "Requests of the kernel by operation and outcome",
    ["operation", "errno"],
    registry=REGISTRY,
)
CHECKSUM_FAILURES = Counter(
    "desfs_checksum_failures_total", "Payloads that did not match the checksum in their metadata", registry=REGISTRY
)
PROBLEMS = Counter("desfs_problems_total", "Defects found in the store: /.desfs/problems names them", registry=REGISTRY)
CONTAINERS_OPENED = Counter("desfs_containers_opened_total", "Containers whose index was read", registry=REGISTRY)

CACHE_HITS = Counter(
    "desfs_cache_hits_total", "Reads that found their bytes in a cache, by level", ["level"], registry=REGISTRY
)
CACHE_MISSES = Counter(
    "desfs_cache_misses_total", "Reads that did not find their bytes in a cache, by level", ["level"], registry=REGISTRY
)
PAGES_PUSHED = Counter(
    "desfs_pages_pushed_total",
    "Files put into the kernel's page cache, by result: stored, unknown (to the kernel), dropped (queue full), failed",
    ["result"],
    registry=REGISTRY,
)
PREFETCH_BOUGHT = Counter(
    "desfs_prefetch_bought_total",
    "Containers of which the rest was fetched because misses had cost as much",
    registry=REGISTRY,
)

DISK_CACHE_REQUESTS = Counter(
    "desfs_disk_cache_requests_total",
    "Blocks and compiled indexes looked for in the disk cache, by outcome: hit or miss",
    ["kind", "outcome"],
    registry=REGISTRY,
)
DISK_CACHE_BYTES = Counter(
    "desfs_disk_cache_bytes_total",
    "Bytes of blocks and compiled indexes read and written",
    ["kind", "direction"],
    registry=REGISTRY,
)
DISK_CACHE_ERRORS = Counter(
    "desfs_disk_cache_errors_total",
    "What went wrong: read, write (the disk refused), damaged (a checksum did not match: a miss)",
    ["what"],
    registry=REGISTRY,
)
DISK_CACHE_EVICTED = Counter(
    "desfs_disk_cache_evicted_bytes_total", "Bytes that made room in the disk cache", registry=REGISTRY
)
REDIS_REQUESTS = Counter(
    "desfs_redis_requests_total",
    "Raw tails looked for in Redis, by outcome: hit or miss",
    ["outcome"],
    registry=REGISTRY,
)

PACKED_FILES = Counter("desfs_packed_files_total", "Spool files that are durable and committed", registry=REGISTRY)
PACKED_BYTES = Counter("desfs_packed_bytes_total", "Their bytes", registry=REGISTRY)


def snapshot() -> dict[str, float]:
    """All metrics under flat names: the metric's, then its labels' values, with dots between them.

    Of a histogram there are `_sum` and `_count`, not the buckets.
    """
    values: dict[str, float] = {}
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            if not sample.name.endswith(("_created", "_bucket")):
                values[".".join((sample.name, *sample.labels.values()))] = sample.value
    return values


def puts() -> int:
    """Requests that stored something, each try counted."""
    kinds = ("put", "put_part")
    return int(
        sum(
            value
            for name, value in snapshot().items()
            if name.startswith("desfs_store_requests_total.") and name.split(".")[1] in kinds
        )
    )
