"""Actors between the driver and its workers. A process of theirs imports Ray and nothing else, so it is soon there."""

from __future__ import annotations

import time
import uuid
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from patterning_dist.runtime.actor import Actor, ActorHandle

_NOTE_EVERY = 0.5  # seconds


class _Board(Actor):
    def __init__(self) -> None:
        self._notes: dict[str, dict[str, Any]] = {}
        self._beats: dict[str, dict[str, tuple[int, str]]] = {}

    def note(self, key: str, **fields: Any) -> None:
        """Replace the note of ``key``: done, total, loss, healthy."""
        self._notes[key] = fields

    def beat(self, name: str, process: str, beats: int, where: str) -> None:
        """A process of what goes by a name has made progress, see ``runtime/watch.py``."""
        self._beats.setdefault(name, {})[process] = (beats, where)

    def read(self, names: list[str]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, tuple[int, str]]]]:
        """All notes, and the beats of those who go by these names, by process; those of others are forgotten."""
        self._beats = {name: self._beats[name] for name in names if name in self._beats}
        return self._notes, self._beats


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


class Notes:
    """Notes of one task to the board: at most two a second, and the one of its end."""

    def __init__(self, board: ActorHandle, key: str, total: int) -> None:
        self.board, self.key, self.total, self.last = board, key, total, 0.0

    def __call__(self, done: int, loss: float | None = None, *, healthy: bool = True) -> bool:
        """Note what is done, of the total, if it is time to; whether it was."""
        if done < self.total and healthy and time.monotonic() - self.last <= _NOTE_EVERY:
            return False
        self.last = time.monotonic()
        self.board.note.remote(self.key, done=done, total=self.total, loss=loss, healthy=healthy)
        return True
