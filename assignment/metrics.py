"""Every metric of the assignment service, in one table."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics

# A registry of our own: what else a process has imported does not show up beside it.
REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
# When a series began is of no use to anybody who scrapes it, and as many lines again.
disable_created_metrics()  # type: ignore[no-untyped-call]

# From an answer out of memory to a request that waits for a database until it is given up.
LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

REQUESTS = Counter(
    "desfs_assignment_requests_total",
    "Requests by path (other: no path of the service) and status",
    ["path", "status"],
    registry=REGISTRY,
)
REQUEST_SECONDS = Histogram(
    "desfs_assignment_request_seconds",
    "Headers received to answer sent",
    ["path"],
    buckets=LATENCY_BUCKETS,
    registry=REGISTRY,
)
OPEN_REQUESTS = Gauge("desfs_assignment_open_requests", "Requests that are being answered", registry=REGISTRY)
IDS = Counter("desfs_assignment_ids_total", "Ids that were reserved in the catalog", registry=REGISTRY)
TRANSACTIONS = Counter(
    "desfs_assignment_transactions_total",
    "Transactions that reserve ids, by outcome: ok, failed; each is for all requests that came during the one before",
    ["outcome"],
    registry=REGISTRY,
)
NODE_ID = Gauge("desfs_assignment_node_id", "The node id that is held, -1 while there is none", registry=REGISTRY)
NODE_ID_RENEWALS = Counter(
    "desfs_assignment_node_id_renewals_total",
    "Leases and renewals of a node id, by outcome: leased, renewed, lost, none_free, failed (the catalog)",
    ["outcome"],
    registry=REGISTRY,
)
CATALOG_CONNECTIONS = Gauge(
    "desfs_assignment_catalog_connections",
    "Connections to the catalog's database by state: open, used",
    ["state"],
    registry=REGISTRY,
)
SHARD_LEASES = Gauge(
    "desfs_assignment_shard_leases", "Leases of today's shards that hold, as the catalog has them", registry=REGISTRY
)
ASSIGNMENTS = Counter(
    "desfs_assignment_assignments_total",
    "Answered assignments by kind: path (a day, a shard and an id), id (an id alone)",
    ["kind"],
    registry=REGISTRY,
)

for _metric, _labels in (
    (TRANSACTIONS, ("ok", "failed")),
    (NODE_ID_RENEWALS, ("leased", "renewed", "lost", "none_free", "failed")),
    (CATALOG_CONNECTIONS, ("open", "used")),
    (ASSIGNMENTS, ("path", "id")),
):
    for _label in _labels:
        _metric.labels(_label)
