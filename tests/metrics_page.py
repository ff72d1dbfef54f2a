"""docs/metrics.md, made from the tables of metrics.

python -m tests.metrics_page
"""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry

from assignment import metrics as service
from desfs import metrics

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
_HEAD = """# Metrics

What the daemons answer at `/metrics`, for Prometheus. A mount does with `metrics=HOST:PORT`, a packer with
`--metrics HOST:PORT`, the assignment service on its own port, with a token unless `--open-metrics`. Nobody is asked for
a password at the first two: let them listen on loopback, or where only the scraper comes.

Seconds, bytes and counts are plain ones, without prefixes. A counter ends in `_total`. No label has values that grow
with days, shards, files or stores. This page is made from the programs: `python -m tests.metrics_page`.
"""


def page() -> str:
    """The page's text."""
    return "\n".join(
        [
            _HEAD,
            _table("Mount and packer", metrics.PROCESS, metrics.STORE),
            _table("Mount", metrics.MOUNT),
            _table("Packer", metrics.PACKER),
            _table("Assignment service", service.REGISTRY),
        ]
    )


def _table(title: str, *registries: CollectorRegistry) -> str:
    rows = ["| metric | type | labels | what |", "|---|---|---|---|"]
    families = [(family, registry) for registry in registries for family in registry.collect()]
    for family, registry in sorted(families, key=lambda each: each[0].name):
        name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels = ", ".join(f"`{label}`" for label in _labels(registry, family.name))
        rows.append(f"| `{name}` | {family.type} | {labels} | {family.documentation.rstrip('.')} |")
    return f"## {title}\n\n" + "\n".join(rows) + "\n"


def _labels(registry: CollectorRegistry, name: str) -> tuple[str, ...]:
    collector = registry._names_to_collectors.get(name)
    return tuple(getattr(collector, "_labelnames", ()))


if __name__ == "__main__":
    PAGE.write_text(page())
