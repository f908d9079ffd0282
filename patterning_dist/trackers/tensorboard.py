"""TensorBoard: a folder of event files a subject or training; a chart a quantity, in which all of them are lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tensorboard.summary import Writer

from patterning_dist.trackers.tracker import Point, Target


class Tracker:
    """Event files below ``<project>/<run>/``."""

    def __init__(self, target: Target) -> None:
        self.where = f"tensorboard --logdir {target.project}"
        self._folder = Path(target.project) / target.name
        self._writers: dict[str, Writer] = {}

    def send(self, points: Sequence[Point]) -> None:
        for point in points:
            if point.of not in self._writers:
                self._writers[point.of] = Writer(str(self._folder / point.of))
            self._writers[point.of].add_scalar(point.name, point.value, point.step, wall_time=point.time)
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
