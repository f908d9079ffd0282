"""MLflow; MLFLOW_TRACKING_URI and the like are its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlflow
from mlflow.entities import Metric, Param

from patterning_dist.trackers.tracker import Point, Target

_REFUSED = re.compile(r"[^\w\-. :/]")  # in the names of series
_MOST_METRICS, _MOST_PARAMS, _LONGEST = 1000, 100, 500  # in one request; characters of a value


class Tracker:
    """A run with the experiment as its parameters."""

    def __init__(self, target: Target) -> None:
        self._client = mlflow.MlflowClient()
        experiment = mlflow.set_experiment(target.project).experiment_id
        found = self._client.search_runs([experiment], f"attributes.run_name = '{target.name}'")
        run = found[0] if found else self._client.create_run(experiment, run_name=target.name)
        self._id, self.where = run.info.run_id, f"{mlflow.get_tracking_uri()}, experiment {target.project}"
        parameters = [] if found else [Param(key, value[:_LONGEST]) for key, value in _flat(target.config)]
        for first in range(0, len(parameters), _MOST_PARAMS):
            self._client.log_batch(self._id, params=parameters[first : first + _MOST_PARAMS])

    def send(self, points: Sequence[Point]) -> None:
        metrics = [Metric(_REFUSED.sub("_", p.series), p.value, round(p.time * 1000), p.step) for p in points]
        for first in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[first : first + _MOST_METRICS])

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
