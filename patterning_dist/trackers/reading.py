"""What the files of a run hold for an experiment tracker: points of series, steps of a series in their order."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from patterning_dist.errors import PatterningError, first_line
from patterning_dist.live import Line, Live
from patterning_dist.storage.mirror import Location
from patterning_dist.storage.store import open_url
from patterning_dist.trackers.tracker import SECONDS, TRAINING_STEP, Point

_MEASURED = ("llc", "llc_error", "rhat", "ess", "reliability")
_CHAIN = re.compile(r"(?P<subject>.+) chain \d+")
_METRICS = "metrics.parquet"


def read_events(location: Location) -> list[dict[str, Any]]:
    """Lines of events.jsonl, but for those that a driver was killed in."""
    events = []
    for line in location.storage.read("events.jsonl").splitlines():
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events


def seconds_of(event: Mapping[str, Any]) -> float:
    """When it was [s since 1970]."""
    return datetime.fromisoformat(event["time"]).timestamp()


def subject_points(events: Sequence[Mapping[str, Any]]) -> Iterator[Point]:
    """What the chains of every subject came to, when they were done."""
    for event in events:
        if event["kind"] == "subject_finished":
            time = seconds_of(event)
            step = round(time - seconds_of(events[0]))
            for name in _MEASURED:
                yield from _finite(name, event["subject"], SECONDS, step, event.get(name), time)


def live_points(live: Live, events: Sequence[Mapping[str, Any]], time: float) -> Iterator[Point]:
    """What is under way: shares of stages, subjects and trainings that are done, losses, R-hat of the losses so far.

    Args:
        live: state of the run.
        events: of the run, which say how many chains a subject has: those that wait are not in the state.
        time: of the state [s since 1970].
    """
    step = round(time - seconds_of(events[0]))
    chains = {event["subject"]: event["chains"] for event in events if event["kind"] == "subject_started"}
    if live.total and live.stage:
        yield Point("progress", live.stage, SECONDS, step, live.done / live.total, time)
    units: dict[str, list[Line]] = {}
    for key, line in live.lines.items():
        chain = _CHAIN.fullmatch(key)
        if chain is None and line.loss is not None:
            yield from _finite("loss", key, TRAINING_STEP, line.done, line.loss, time)
        if line.loss is not None:  # else it is a task, of which there may be thousands, or has not begun
            units.setdefault(chain["subject"] if chain else key, []).append(line)
    for unit, lines in units.items():
        total = lines[0].total * chains.get(unit, len(lines))
        yield Point("progress", unit, SECONDS, step, sum(line.done for line in lines) / max(total, 1), time)
    for subject, values in live.measured.items():
        if "llc" not in values:  # the worst of all observables, once it is finished, is in its event
            yield from _finite("rhat_of_loss", subject, SECONDS, step, values.get("rhat"), time)


def training_files(location: Location) -> list[str]:
    """Names of the tables of metrics of the baseline and of all arms; none is copied."""
    folders = ("baseline", "retrain")
    if location.url is not None:
        names: Iterable[str] = open_url(location.url).sizes(*folders)
    else:
        found = (path for folder in folders for path in (location.path / folder).rglob(_METRICS))
        names = (path.relative_to(location.path).as_posix() for path in found)
    return sorted(name for name in names if name.endswith(f"/{_METRICS}"))


def training_points(name: str, content: bytes, began: float) -> Iterator[Point]:
    """Losses and metrics of one training at every step that it was evaluated at.

    Args:
        name: of its table in the run directory.
        content: of the table.
        began: its stage [s since 1970].

    Raises:
        PatterningError: it is damaged.
    """
    import pyarrow
    import pyarrow.parquet as pq

    training = name.removeprefix("retrain/").removesuffix(f"/{_METRICS}")
    try:
        rows = pq.read_table(io.BytesIO(content)).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise PatterningError(f"{name}: cannot be read ({first_line(error)}); run the run's command again") from None
    for row in rows:
        step, time = int(row.pop("step")), began + row.pop("seconds", 0.0)
        for metric, value in row.items():
            yield from _finite(metric, training, TRAINING_STEP, step, value, time)


def _finite(name: str, of: str, axis: str, step: int, value: float | None, time: float) -> Iterator[Point]:
    """None where there is no value: trackers draw nothing there."""
    if value is not None and math.isfinite(value):
        yield Point(name, of, axis, step, float(value), time)
