"""The metrics of a run, exported by Ray to Prometheus: one table, and the few calls that actors make.

Ray serves what the processes of a node report on that node's metrics port, every name with the prefix ``ray_`` and
counters with the suffix ``_total``; ``cluster/grafana-dashboard.json`` draws them. They are for watching: nothing reads
them back. What must be exact is in the files of the run.
"""

from __future__ import annotations

import threading
import time
from functools import cache
from typing import Any, Literal, NamedTuple

from ray.util.metrics import Counter, Gauge, Histogram


class Definition(NamedTuple):
    """A metric: what it measures (with the unit), and the tags that tell its series apart."""

    kind: Literal["gauge", "counter", "histogram"]
    description: str
    tags: tuple[str, ...]


METRICS = {
    "patterning_draws": Definition("counter", "draws taken by a chain", ("run", "subject", "chain")),
    "patterning_chain_loss_nats": Definition(
        "gauge", "mean loss of the last draw of a chain [nats]", ("run", "subject", "chain")
    ),
    "patterning_rhat": Definition("gauge", "R-hat of the loss over the chains of a subject", ("run", "subject")),
    "patterning_pushes": Definition("counter", "pushes answered by the aggregator, by verdict", ("run", "verdict")),
    "patterning_push_seconds": Definition("histogram", "time from sending a push to its answer [s]", ("run", "shard")),
    "patterning_push_bytes": Definition("counter", "bytes pushed to a shard", ("run", "shard")),
    "patterning_unacknowledged_pushes": Definition(
        "gauge", "pushes of a chain that wait for an answer", ("run", "subject", "chain")
    ),
    "patterning_checkpoint_seconds": Definition(
        "histogram", "time to write a chain checkpoint [s]", ("run", "subject")
    ),
    "patterning_snapshot_seconds": Definition("histogram", "time to write a snapshot of a shard [s]", ("run", "shard")),
    "patterning_snapshot_bytes": Definition("gauge", "size of the last snapshot of a shard [bytes]", ("run", "shard")),
    "patterning_chain_restarts": Definition("counter", "restarts of a chain", ("run", "subject", "chain")),
    "patterning_chains_excluded": Definition("gauge", "chains given up and left out", ("run", "subject")),
    "patterning_training_steps": Definition("counter", "optimizer steps taken", ("run", "arm")),
    "patterning_training_loss_nats": Definition("gauge", "training loss of the last report [nats]", ("run", "arm")),
    "patterning_stage": Definition("gauge", "1 for the stage that the run is in, 0 for others", ("run", "stage")),
}

# From a push between processes of one machine (a millisecond) to one that waits for a shard that is restarted.
SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]

SECONDS_BETWEEN_REPEATS = 5.0

Tags = dict[str, str]


@cache  # one object a process: Ray registers a name once, and actors call these functions as often as they like
def _metric(name: str) -> Any:
    kind, description, tags = METRICS[name]
    if kind == "histogram":
        return Histogram(name, description, boundaries=SECONDS, tag_keys=tags)
    return (Gauge if kind == "gauge" else Counter)(name, description, tag_keys=tags)


_held: dict[tuple[str, ...], tuple[str, float, Tags]] = {}


@cache
def _repeater() -> threading.Thread:
    def repeat() -> None:
        while True:
            time.sleep(SECONDS_BETWEEN_REPEATS)
            for name, value, tags in list(_held.values()):
                _metric(name).set(value, tags=tags)

    thread = threading.Thread(target=repeat, name="patterning-metrics", daemon=True)
    thread.start()
    return thread


class Metrics:
    """What a process reports of a run; every metric takes the tags that it has in ``METRICS``.

    Args:
        tags: that all reports have: run, and subject, chain, shard or arm. Methods take those that the others lack.
    """

    def __init__(self, **tags: object) -> None:
        self._own = tags

    def add(self, name: str, amount: float, **tags: object) -> None:
        """So much more of a counter."""
        if amount > 0:  # Ray refuses to add nothing
            _metric(name).inc(float(amount), tags=self._tags(name, tags))

    def set(self, name: str, value: float, **tags: object) -> None:
        """The value of a gauge now."""
        _metric(name).set(float(value), tags=self._tags(name, tags))

    def observe(self, name: str, seconds: float, **tags: object) -> None:
        """A time, for a histogram."""
        _metric(name).observe(float(seconds), tags=self._tags(name, tags))

    def hold(self, name: str, value: float, **tags: object) -> None:
        """Set a gauge now, and again and again while this process lives."""
        own = self._tags(name, tags)
        _held[name, *own.values()] = (name, float(value), own)
        self.set(name, value, **tags)
        _repeater()

    def enter(self, stage: str) -> None:
        """The stage that begins: 1, and 0 for those that this process was in before."""
        for name, _, tags in list(_held.values()):
            if name == "patterning_stage" and tags["run"] == self._own["run"]:
                self.hold(name, 0, stage=tags["stage"])
        self.hold("patterning_stage", 1, stage=stage)

    def _tags(self, name: str, more: dict[str, object]) -> Tags:
        every = self._own | more
        return {tag: str(every[tag]) for tag in METRICS[name].tags}
