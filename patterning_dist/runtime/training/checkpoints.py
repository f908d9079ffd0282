"""Training checkpoints: a training that is killed, or preempted, resumes from its last one with the same bits."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import ray
import torch

from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.training.engine import engine_state, load_engine_state
from patterning_dist.runtime.training.weights import add_to_share
from patterning_dist.storage.snapshots import Snapshots
from patterning_dist.storage.store import Storage
from patterning_dist.training.job import TrainingJob
from patterning_dist.training.state import decode, encode

# A checkpoint may take this share of the time at most.
_SHARE = 1 / 20
_ASK_EVERY = 0.5
# What a rank wants at the end of a step; all do what the most urgent of them wants.
_GO_ON, _SAVE, _STOP, _PREEMPTED = range(4)

State = tuple[
    list[dict[str, Any]], list[dict[str, Any]]
]  # of every member: what all ranks have alike, and what is this rank's alone

_preempted = threading.Event()


class Preempted(Exception):
    """This process, or that of another rank, got SIGTERM; the state of the training is saved."""


@contextlib.contextmanager
def sigterm_saves() -> Iterator[None]:
    """Let the step under way end and be saved on the first SIGTERM; a second one ends the process as before."""
    before = signal.getsignal(signal.SIGTERM)

    def leave(signum: int, frame: FrameType | None) -> None:
        _preempted.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def checkpoint_part(
    storage: Storage, directory: Path, job: TrainingJob, fingerprint: str, part: str, **changes: Any
) -> Snapshots:
    """A part of a job's training checkpoints, see ``_own``, or ``shared``. Other fingerprints have other file names."""
    return Snapshots(storage, _folder(directory, job), f"{fingerprint[:16]}-{part}", **changes)


def newest_step(storage: Storage, directory: Path, job: TrainingJob, fingerprint: str) -> int:
    """The step of the newest training checkpoint of a job; 0 if there is none."""
    return max(checkpoint_part(storage, directory, job, fingerprint, "shared").numbers(), default=0)


def delete_checkpoints(
    storage: Storage, directory: Path, job: TrainingJob, *, above: int = -1, not_of: str | None = None
) -> None:
    """Delete a job's training checkpoints above a step, and all that are not of a fingerprint."""
    folder = _folder(directory, job)
    for file in storage.names(folder):
        name, step, _ = file.split(".")
        if int(step) > above or not (not_of and name.startswith(not_of[:16])):
            storage.delete(f"{folder}/{file}")
    with contextlib.suppress(OSError):  # not there, or not empty
        (directory / folder).rmdir()


def _folder(directory: Path, job: TrainingJob) -> str:
    return f"{job.folder.relative_to(directory)}/.checkpoint"


def _own(rank: int, num_ranks: int) -> str:
    return f"rank-{rank}-of-{num_ranks}"


class TrainingCheckpoints:
    """Saves the state of a training now and then, and when it is to stop; every rank has one and calls it at once.

    A checkpoint is a shared part, written by rank 0, and a part of every rank, for what ZeRO shares out. It counts when
    all are there and undamaged, and another number of ranks can take it up. Two are kept. A rank of an earlier attempt
    that still runs writes the same state: it does no harm.

    Args:
        job: which is trained.
        fingerprint: of the job; checkpoints of another are deleted.
        directory: of the run.
        storage: of the run.
        control: is asked whether to stop, and hears what the user should know.
        device: of the ranks.
    """

    def __init__(
        self, job: TrainingJob, fingerprint: str, directory: Path, storage: Storage, control: ActorHandle, device: str
    ) -> None:
        self.job, self.control, self.device = job, control, device
        self.fingerprint = fingerprint
        self._delete = partial(delete_checkpoints, storage, directory, job)
        self.rank, self.num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._part = partial(checkpoint_part, storage, directory, job, fingerprint, damaged=self._say_damaged)
        self.shared, self.own = self._part("shared"), self._part(_own(self.rank, self.num_ranks))
        self.last_step, self.last_time, self.pause = 0, time.monotonic(), job.checkpoint_seconds
        self.asked_at, self.answer = time.monotonic(), control.stopping.remote()

    def restore(self, engine: Any) -> dict[str, Any] | None:
        """Put the engine where the newest whole checkpoint has it; returns the recorders' states and the step.

        None: there is none, the training begins at step 0.
        """
        candidates = [list(reversed(self.shared.numbers()))]
        torch.distributed.broadcast_object_list(candidates, src=0)  # listings of a network file system may differ
        for step in candidates[0]:
            content = self.shared.read(step)
            shared = None if content is None else decode(content)
            # The own part of a rank that has none is empty, but is there. Read one by one: together they are the model.
            parts = [self.own] if shared is None else self._parts(shared["num_ranks"])
            whole = shared is not None and all(part.read(step) is not None for part in parts)
            if self._agree(_GO_ON if whole else _SAVE) == _GO_ON:
                assert shared is not None
                recorders: list[dict[str, Any]] = []
                owns = self._take_up(engine, step, parts, recorders)
                load_engine_state(engine, shared["engine"], owns)
                list(owns)  # the rest, which the engine had no use for
                self.last_step = step
                if self.rank == 0:
                    self._delete(above=step, not_of=self.fingerprint)  # what is damaged or not complete
                    text = f"{self.job.name}: goes on from step {step}"
                    self.control.tell.remote("job_resumed", text, job=self.job.name, step=step)
                return {"step": step, "recorders": list(zip(shared["recorders"], recorders, strict=True))}
        if self.rank == 0:
            self._delete()
        torch.distributed.barrier()
        return None

    def _parts(self, num_ranks: int) -> list[Snapshots]:
        """What this rank reads of a checkpoint of so many."""
        if num_ranks == self.num_ranks:
            return [self.own]
        return [self._part(_own(rank, num_ranks)) for rank in range(num_ranks)]

    def _take_up(
        self, engine: Any, step: int, parts: list[Snapshots], recorders: list[dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """The engine's state in one part after another; those of the recorders are collected on the way."""
        for rank, part in enumerate(parts):
            own = decode(part.read(step) or b"")
            if parts == [self.own]:
                recorders[:] = own["recorders"]
            else:
                recorders[:] = recorders or [{"average": {}} for _ in own["recorders"]]
                for mine, other in zip(recorders, own["recorders"], strict=True):
                    add_to_share(engine, mine["average"], other["average"], rank)
            yield own["engine"]

    def after_step(self, engine: Any, step: int, recorder_states: Callable[[], State]) -> bool:
        """Save if it is time; returns whether the training is to stop here.

        Args:
            engine: of DeepSpeed.
            step: optimizer steps done.
            recorder_states: gives, of every member, what all ranks have alike, and what is this rank's alone.

        Raises:
            Preempted: a rank got SIGTERM.
        """
        wish = self._agree(self._wish())
        if wish == _GO_ON:
            return False
        self._save(engine, step, recorder_states())
        if wish == _SAVE:
            return False
        if self.rank == 0:
            text = f"{self.job.name}: saved at step {step}, and stopped"
            # Waited for: this process may be gone in a moment.
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self.control.tell.remote("job_stopped", text, job=self.job.name, step=step), timeout=5)
        if wish == _PREEMPTED:
            torch.distributed.barrier()  # the first rank to go takes the others with it
            raise Preempted(f"{self.job.name}: SIGTERM; saved at step {step}")
        return True

    def finished(self) -> None:
        """Delete the checkpoints of a training that is through."""
        if self.rank == 0:
            self._delete()

    def _should_stop(self) -> bool:
        """Whether the driver has asked all trainings to stop; asks again at most twice a second, and never waits."""
        if time.monotonic() - self.asked_at < _ASK_EVERY or not ray.wait([self.answer], timeout=0)[0]:
            return False
        stop = ray.get(self.answer)
        self.asked_at, self.answer = time.monotonic(), self.control.stopping.remote()
        return stop

    def _wish(self) -> int:
        if _preempted.is_set():
            return _PREEMPTED
        if self.rank != 0:
            return _GO_ON
        if self._should_stop():
            return _STOP
        return _SAVE if time.monotonic() - self.last_time > self.pause else _GO_ON

    def _agree(self, wish: int) -> int:
        if self.num_ranks == 1:
            return wish
        wishes = torch.tensor([wish], device=self.device)
        torch.distributed.all_reduce(wishes, op=torch.distributed.ReduceOp.MAX)
        return int(wishes.item())

    def _save(self, engine: Any, step: int, recorders: State) -> None:
        started = time.monotonic()
        # All ranks have agreed on a step after the last checkpoint was written: it is whole.
        self.own.delete(below=self.last_step)
        shared, own = engine_state(engine)
        self.own.write(step, encode({"engine": own, "recorders": recorders[1]}))
        if self.rank == 0:
            self.shared.delete(below=self.last_step)
            content = {"engine": shared, "recorders": recorders[0], "num_ranks": self.num_ranks}
            self.shared.write(step, encode(content))
        self.last_step, self.last_time = step, time.monotonic()
        self.pause = max(self.job.checkpoint_seconds, (self.last_time - started) / _SHARE)

    def _say_damaged(self, message: str) -> None:
        text = f"{self.job.name}: {message}; an earlier checkpoint or the beginning is taken instead"
        self.control.tell.remote("checkpoint_damaged", text, job=self.job.name)
