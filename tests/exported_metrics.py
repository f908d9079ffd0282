"""How Ray names the metrics of a run where Prometheus reads them."""

from __future__ import annotations

from patterning_dist.runtime.metrics import METRICS

SUFFIXES = {"gauge": [""], "counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}


def exported_names() -> dict[str, tuple[str, ...]]:
    """Name of every exported series -> its tags; held against a real scrape in ``tests/ray/test_metrics.py``."""
    return {
        f"ray_{name}{suffix}": definition.tags
        for name, definition in METRICS.items()
        for suffix in SUFFIXES[definition.kind]
    }
