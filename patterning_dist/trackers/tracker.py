"""The seam to experiment trackers: what is sent, where to, and what an adapter has to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]
SECONDS, TRAINING_STEP = "seconds", "training_step"


@dataclass(frozen=True)
class Point:
    """One value of a series.

    Attributes:
        name: of what is measured: ``llc``, ``validation_loss``.
        of: whose it is, a subject, a training or a stage: ``layer.1.head.0``, ``plus/seed-0``.
        axis: what its steps are: seconds since the run began, or optimizer steps of a training.
        step: on that axis.
        value: finite.
        time: when it was measured [s since 1970].
    """

    name: str
    of: str
    axis: str
    step: int
    value: float
    time: float

    @property
    def series(self) -> str:
        """What trackers call it whose runs are flat; charts of one quantity stand together."""
        return f"{self.name}/{self.of}"


@dataclass(frozen=True)
class Target:
    """The run of a tracker that points go to; another experiment file makes another one, as trackers expect it.

    Attributes:
        project: of the tracker: a project, an experiment, or the folder of the event files.
        name: of the run in there, the same whenever and from wherever it is followed.
        config: the experiment.
    """

    project: str
    name: str
    config: Mapping[str, Any]


class Tracker(Protocol):
    """One run in an experiment tracker: made, or gone on with, when it is opened.

    Attributes:
        where: words for the user on where to look.
    """

    where: str

    def __init__(self, target: Target) -> None: ...

    def send(self, points: Sequence[Point]) -> None:
        """Points that it does not have, steps of a series in their order."""
        ...

    def close(self) -> None:
        """Once all that was sent is stored."""
        ...


def by_step(points: Iterable[Point]) -> dict[tuple[str, int], dict[str, float]]:
    """(axis, step) -> series -> value."""
    rows: dict[tuple[str, int], dict[str, float]] = {}
    for point in points:
        rows.setdefault((point.axis, point.step), {})[point.series] = point.value
    return rows
