"""desfs without its metrics, to measure what they cost: `python -m tests.bench.uninstrumented mount …`."""

from __future__ import annotations

import prometheus_client

from desfs.cli import main


def _nothing(*_: object, **__: object) -> None: ...


if __name__ == "__main__":
    for _metric, _names in (
        (prometheus_client.Counter, ("inc",)),
        (prometheus_client.Gauge, ("set", "set_function")),
        (prometheus_client.Histogram, ("observe",)),
    ):
        for _name in _names:
            setattr(_metric, _name, _nothing)
    main()
