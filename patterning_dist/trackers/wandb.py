"""Weights & Biases; WANDB_MODE, WANDB_ENTITY and the like are its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wandb import Settings, init  # by name: a folder wandb/ of its runs is a package too, and has none

from patterning_dist.trackers.tracker import Point, Target, by_step


class Tracker:
    """A run, whose series have steps of their own: ``seconds``, ``training_step``."""

    def __init__(self, target: Target) -> None:
        # Statistics and output of the machine that follows are none of the run's.
        self._run = init(
            project=target.project, id=target.name, name=target.name, config=dict(target.config), resume="allow",
            settings=Settings(console="off", x_disable_stats=True),
        )  # fmt: skip
        self.where = self._run.url or f"wandb sync {Path(self._run.dir).parent}"
        self._defined: set[str] = set()

    def send(self, points: Sequence[Point]) -> None:
        for point in points:
            if point.series not in self._defined:
                self._run.define_metric(point.series, step_metric=point.axis)
                self._defined.add(point.series)
        for (axis, step), values in by_step(points).items():
            self._run.log({axis: step, **values})

    def close(self) -> None:
        self._run.finish()
