"""Worker processes between two stages: the next stage takes them over, for a process takes seconds to import torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import ray

from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.resources import Resources


class Spares:
    """Workers that no workforce has at the moment. They hold what they need of the cluster: whoever needs room has
    those that do not suit go first.

    Outside of ``open`` none is kept.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._kept: list[tuple[Resources, ActorHandle]] = []

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Keep workers while this is entered; the last to leave ends them."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.dismiss()

    def keep(self, need: Resources, worker: ActorHandle) -> None:
        """Take in a worker that is idle, started with these resources."""
        if self._depth:
            self._kept.append((need, worker))
        else:
            ray.kill(worker)

    def take(self, need: Resources, number: int) -> list[ActorHandle]:
        """Up to so many workers with these resources; all others end."""
        suited = [entry for entry in self._kept if entry[0].options == need.options][:number]
        self._kept = [entry for entry in self._kept if entry not in suited]
        self.dismiss()
        return [worker for _, worker in suited]

    def dismiss(self) -> None:
        """End all that are here."""
        while self._kept:
            _, worker = self._kept.pop()
            with contextlib.suppress(ray.exceptions.RayError):  # no Ray any more
                ray.kill(worker)


SPARES = Spares()  # of this process, which is one driver
