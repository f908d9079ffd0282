"""Actors between the driver and its workers. A process of theirs imports Ray and nothing else, so it is soon there."""

from __future__ import annotations

import uuid
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from patterning_dist.runtime.actor import Actor, ActorHandle


class _Board(Actor):
    def __init__(self) -> None:
        self._notes: dict[str, dict[str, Any]] = {}

    def note(self, key: str, **fields: Any) -> None:
        """Replace the note of ``key``: done, total, loss, healthy."""
        self._notes[key] = fields

    def read(self) -> dict[str, dict[str, Any]]:
        """All notes."""
        return self._notes


# One that dies is made again, and fills with the notes to come.
@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class ProgressBoard(_Board):
    """The last word of every chain or arm, for whoever draws the progress display."""


# One that dies is made again, without what it knew: trainings ask it again, and lines not yet said are lost.
@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class JobControl(_Board):
    """The board of trainings, with what the driver wants of them, and what they have for the driver to say."""

    def __init__(self) -> None:
        super().__init__()
        self._stop = False
        self._messages: dict[str, tuple[str, str, dict[str, Any]]] = {}

    def stop(self) -> None:
        """Let every training save its state and stop."""
        self._stop = True

    def stopping(self) -> bool:
        """Whether trainings are to stop."""
        return self._stop

    def tell(self, kind: str, text: str, **fields: Any) -> None:
        """Leave an event, and a line for the user."""
        self._messages[uuid.uuid4().hex] = (kind, text, fields)

    def messages(self, heard: set[str]) -> dict[str, tuple[str, str, dict[str, Any]]]:
        """Kind, line and fields of the events that were left, by a name for each; those heard are forgotten."""
        self._messages = {name: message for name, message in self._messages.items() if name not in heard}
        return self._messages


def progress_board() -> ActorHandle:
    """A board on the driver's node: it goes when the driver goes, and no sooner."""
    return _here(ProgressBoard)


def job_control() -> ActorHandle:
    """The board of trainings, likewise."""
    return _here(JobControl)


def _here(actor: type[Actor]) -> ActorHandle:
    node = ray.get_runtime_context().get_node_id()
    return actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
