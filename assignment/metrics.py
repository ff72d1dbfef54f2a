"""Every metric of the assignment service, in one table."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# A registry of our own: what else a process has imported does not show up beside it.
REGISTRY = CollectorRegistry()

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
