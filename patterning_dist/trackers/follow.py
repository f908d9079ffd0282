"""`patterning track`: follow the files of a run, here or at a URL, and send what is new to an experiment tracker.

It reads only what `patterning status` and `open_run` read, and no driver knows of it: a tracker that is down or slow is
no matter of the run. What was sent is kept beside the run, so that the command goes on where it was.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import yaml

from patterning_dist.errors import PatterningError, first_line
from patterning_dist.status import Status
from patterning_dist.storage.mirror import Location
from patterning_dist.storage.store import Storage
from patterning_dist.trackers.reading import (
    live_points,
    read_events,
    seconds_of,
    subject_points,
    training_files,
    training_points,
)
from patterning_dist.trackers.tracker import Point, Target, Tracker, TrackerName

_EVERY = 10.0  # between two looks at the files [s]


def track(directory: Path | str, to: TrackerName, project: str) -> None:
    """Send what a run has to a tracker, and where a driver is at work what it gets, until that has ended.

    A driver that says nothing is waited for: it may be at a long step, or be started again where it was stopped.

    Args:
        directory: run directory, a path or a URL.
        to: the tracker.
        project: see ``Target``.

    Raises:
        PatterningError: there is no run, the tracker is not installed, or refuses.
    """
    location, status, number = Location.at(directory), Status.read(directory), 0
    is_followed = status.at_work
    while True:
        target = _target(location, project)
        sent = _Sent(location.storage, to, target)
        tables: set[str] = set()  # that were read: a training writes its own once
        with ExitStack() as stack:
            tracker: Tracker | None = None
            while _target(location, project) == target:
                if new := sent.missing(_points(location, status, tables)):
                    if tracker is None:
                        tracker = stack.enter_context(_opened(to, target))
                        print(f"{target.name}: {tracker.where}", flush=True)
                    with _explained(to):
                        tracker.send(new)
                    sent.add(new)
                    number += len(new)
                if not is_followed or status.live is None or status.live.ended is not None:
                    print(f"{target.name}: {number} new points", flush=True)
                    return
                time.sleep(_EVERY)
                status = Status.read(directory)


class _Sent:
    """The last step of every series that a tracker has, in ``tracked/`` of the run."""

    def __init__(self, storage: Storage, to: TrackerName, target: Target) -> None:
        self.storage, self.file, self.key = storage, f"tracked/{to}.json", f"{target.project}/{target.name}"
        try:
            self.all: dict[str, dict[str, int]] = json.loads(storage.read(self.file))
            self.last = self.all.setdefault(self.key, {})
        except FileNotFoundError:
            self.last = {}
            self.all = {self.key: self.last}
        except (OSError, ValueError, AttributeError) as error:
            raise PatterningError(
                f"{self.file}: cannot be read ({first_line(error)}); delete it to send everything again"
            ) from None

    def missing(self, points: Iterable[Point]) -> list[Point]:
        """Those that the tracker does not have."""
        return [point for point in points if point.step > self.last.get(point.series, -1)]

    def add(self, points: Iterable[Point]) -> None:
        """The tracker has them now."""
        self.last |= {point.series: point.step for point in points}
        self.storage.write(self.file, json.dumps(self.all, indent=1).encode())


def _points(location: Location, status: Status, tables: set[str]) -> Iterator[Point]:
    events = read_events(location)
    began = {event["stage"]: seconds_of(event) for event in reversed(events) if event["kind"] == "started"}
    first = seconds_of(events[0])
    yield from subject_points(events)
    if status.live is not None and status.time is not None:
        yield from live_points(status.live, events, status.time.timestamp())
    for name in training_files(location):
        if name not in tables:
            stage = "train" if name.startswith("baseline/") else "retrain"
            with suppress(FileNotFoundError):  # it is being made again
                yield from training_points(name, location.storage.read(name), began.get(stage, first))
                tables.add(name)


def _target(location: Location, project: str) -> Target:
    try:
        content, events = location.storage.read("config.yaml"), read_events(location)
    except FileNotFoundError:
        events = []
    if not events:
        raise PatterningError(f"{location}: nothing has been run there yet; start the run first")
    try:
        config = yaml.safe_load(content)
        name = config["name"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise PatterningError(f"{location}/config.yaml: is no experiment ({first_line(error)}); mend it") from None
    identity = hashlib.sha256(events[0]["time"].encode() + content).hexdigest()[:8]
    return Target(project, f"{name}-{identity}", config)


@contextmanager
def _opened(to: TrackerName, target: Target) -> Iterator[Tracker]:
    try:
        module = importlib.import_module(f"patterning_dist.trackers.{to}")
    except ImportError as error:
        raise PatterningError(
            f"{to} cannot be imported ({first_line(error)}); pip install 'patterning-dist[trackers]'"
        ) from None
    with _explained(to):
        tracker: Tracker = module.Tracker(target)
    try:
        yield tracker
    finally:
        with _explained(to):
            tracker.close()


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Whatever a tracker raises is its user's to put right: an address, a key, a network."""
    try:
        yield
    except PatterningError:
        raise
    except Exception as error:
        raise PatterningError(
            f"{what}: the tracker refuses ({type(error).__name__}: {first_line(error)}); put that right and run the "
            "same command again: it goes on where it was"
        ) from error
