"""trackio; TRACKIO_SPACE_ID and the like are its own."""

from __future__ import annotations

from collections.abc import Sequence

from trackio import init

from patterning_dist.trackers.tracker import Point, Target, by_step


class Tracker:
    """A run, in which a step is a second or a training step."""

    def __init__(self, target: Target) -> None:
        self._run = init(
            project=target.project, name=target.name, config=dict(target.config), resume="allow", embed=False,
            auto_log_gpu=False, auto_log_cpu=False,  # of the machine that follows
        )  # fmt: skip
        self.where = f"trackio show --project {target.project}"

    def send(self, points: Sequence[Point]) -> None:
        for (_, step), values in by_step(points).items():
            self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()
