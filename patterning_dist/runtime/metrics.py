"""The metrics of a run, exported by Ray to Prometheus: one table, and the few calls that actors make.

Ray serves what the processes of a node report on that node's metrics port, every name with the prefix ``ray_`` and
counters with the suffix ``_total``; ``cluster/grafana-dashboard.json`` draws them. They are for watching: nothing reads
them back. What must be exact is in the files of the run.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

from ray.util.metrics import Counter, Gauge, Histogram


class Definition(NamedTuple):
    """A metric: what it measures (with the unit), and the tags that tell its series apart."""

    kind: Literal["gauge", "counter", "histogram"]
    description: str
    tags: tuple[str, ...]


METRICS = {
    "patterning_draws": Definition("counter", "draws taken by a chain", ("run", "unit", "chain")),
    "patterning_chain_loss_nats": Definition(
        "gauge", "mean loss of the last draw of a chain [nats]", ("run", "unit", "chain")
    ),
    "patterning_rhat": Definition("gauge", "R-hat of the loss over the chains of a unit", ("run", "unit")),
    "patterning_pushes": Definition("counter", "pushes answered by the aggregator, by verdict", ("run", "verdict")),
    "patterning_push_seconds": Definition("histogram", "time from sending a push to its answer [s]", ("run", "shard")),
    "patterning_push_bytes": Definition("counter", "bytes pushed to a shard", ("run", "shard")),
    "patterning_unacknowledged_pushes": Definition(
        "gauge", "pushes of a chain that wait for an answer", ("run", "unit", "chain")
    ),
    "patterning_checkpoint_seconds": Definition("histogram", "time to write a chain checkpoint [s]", ("run", "unit")),
    "patterning_snapshot_seconds": Definition("histogram", "time to write a snapshot of a shard [s]", ("run", "shard")),
    "patterning_snapshot_bytes": Definition("gauge", "size of the last snapshot of a shard [bytes]", ("run", "shard")),
    "patterning_chain_restarts": Definition("counter", "restarts of a chain", ("run", "unit", "chain")),
    "patterning_chains_excluded": Definition("gauge", "chains given up and left out", ("run", "unit")),
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


def _add(name: str, amount: float, tags: Tags) -> None:
    if amount > 0:  # Ray refuses to add nothing
        _metric(name).inc(float(amount), tags=tags)


def _set(name: str, value: float, tags: Tags) -> None:
    _metric(name).set(float(value), tags=tags)


_held: dict[tuple[str, ...], tuple[str, float, Tags]] = {}


def _hold(name: str, value: float, tags: Tags) -> None:
    """Set a gauge now, and again and again while this process lives."""
    _held[name, *tags.values()] = (name, value, tags)
    _set(name, value, tags)
    _repeater()


@cache
def _repeater() -> threading.Thread:
    def repeat() -> None:
        while True:
            time.sleep(SECONDS_BETWEEN_REPEATS)
            for held in list(_held.values()):
                _set(*held)

    thread = threading.Thread(target=repeat, name="patterning-metrics", daemon=True)
    thread.start()
    return thread


def _observe(name: str, seconds: float, tags: Tags) -> None:
    _metric(name).observe(float(seconds), tags=tags)


@dataclass(frozen=True)
class ChainMetrics:
    """What one chain reports, with the tags of its run, its unit and itself."""

    run: Tags
    unit: Tags
    chain: Tags

    def draws(self, num_draws: int) -> None:
        """So many draws more."""
        _add("patterning_draws", num_draws, self.chain)

    def loss(self, value: float) -> None:
        """Mean loss of the last draw, nats."""
        _set("patterning_chain_loss_nats", value, self.chain)

    def push(self, shard: int, seconds: float, num_bytes: int, verdict: str) -> None:
        """A push that was answered: by which shard, after how long, its size, and the answer."""
        to_shard = {**self.run, "shard": str(shard)}
        _observe("patterning_push_seconds", seconds, to_shard)
        _add("patterning_push_bytes", num_bytes, to_shard)
        _add("patterning_pushes", 1, {**self.run, "verdict": verdict})

    def unacknowledged(self, num_pushes: int) -> None:
        """Pushes that are under way."""
        _set("patterning_unacknowledged_pushes", num_pushes, self.chain)

    def checkpoint(self, seconds: float) -> None:
        """A checkpoint was written."""
        _observe("patterning_checkpoint_seconds", seconds, self.unit)


@dataclass(frozen=True)
class ShardMetrics:
    """What one aggregator shard reports."""

    shard: Tags

    def snapshot(self, seconds: float, num_bytes: int) -> None:
        """A snapshot was written."""
        _observe("patterning_snapshot_seconds", seconds, self.shard)
        _set("patterning_snapshot_bytes", num_bytes, self.shard)


class RunMetrics:
    """What the driver reports."""

    def __init__(self, run: Tags) -> None:
        self._run = run
        self._stage: str | None = None

    def rhat(self, unit: str, value: float) -> None:
        """R-hat of the loss over the chains of a unit."""
        _hold("patterning_rhat", value, {**self._run, "unit": unit})

    def excluded(self, unit: str, num_chains: int) -> None:
        """Chains of a unit that were given up."""
        _hold("patterning_chains_excluded", num_chains, {**self._run, "unit": unit})

    def restart(self, unit: str, chain: int) -> None:
        """A chain was started again."""
        _add("patterning_chain_restarts", 1, {**self._run, "unit": unit, "chain": str(chain)})

    def stage(self, name: str) -> None:
        """The stage that begins."""
        if self._stage is not None:
            _hold("patterning_stage", 0, {**self._run, "stage": self._stage})
        self._stage = name
        _hold("patterning_stage", 1, {**self._run, "stage": name})


@dataclass(frozen=True)
class TrainingMetrics:
    """What the training of one arm reports."""

    arm: Tags

    def step(self, num_steps: int) -> None:
        """So many optimizer steps more."""
        _add("patterning_training_steps", num_steps, self.arm)

    def loss(self, value: float) -> None:
        """Training loss, nats."""
        _set("patterning_training_loss_nats", value, self.arm)


def chain_metrics(run: str, unit: str, chain: int) -> ChainMetrics:
    """The metrics of a chain, for the process that moves it."""
    unit_tags = {"run": run, "unit": unit}
    return ChainMetrics({"run": run}, unit_tags, {**unit_tags, "chain": str(chain)})


def shard_metrics(run: str, shard: int) -> ShardMetrics:
    """The metrics of an aggregator shard."""
    return ShardMetrics({"run": run, "shard": str(shard)})


def run_metrics(run: str) -> RunMetrics:
    """The metrics of a run as a whole, for its driver."""
    return RunMetrics({"run": run})


def training_metrics(run: str, arm: str) -> TrainingMetrics:
    """The metrics of the training of an arm, for its first rank."""
    return TrainingMetrics({"run": run, "arm": arm})
