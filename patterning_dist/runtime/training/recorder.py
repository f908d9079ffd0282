"""What a training writes down: rows of metrics, weights, and the report that says that it is finished."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.boards import Notes
from patterning_dist.runtime.metrics import Metrics
from patterning_dist.runtime.training.trainer import Member
from patterning_dist.runtime.training.weights import load_shares, own_share, save_weights
from patterning_dist.storage.files import digests_of, write_json, write_parquet
from patterning_dist.storage.mirror import Location
from patterning_dist.training.job import HELD_OUT_TABLE, REPORT, job_files


class Recorder:
    """Files and notes of rank 0; every rank calls it, since measuring and gathering weights take all of them."""

    def __init__(self, trainer: Member, location: Location, board: ActorHandle, metrics: Metrics) -> None:
        self.trainer, self.job, self.writes = trainer, trainer.job, trainer.ranks.rank == 0
        self.location, self.metrics = location, metrics
        self.notes = Notes(board, self.job.name, self.job.total_steps)
        self.reported_step, self.started = 0, time.monotonic()
        self.rows: list[dict[str, float]] = []
        self.average: dict[str, Tensor] = {}  # this rank's share of a sum over steps

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What goes into a training checkpoint: what all ranks have alike, and what is this rank's alone."""
        return {"rows": self.rows, "seconds": time.monotonic() - self.started}, {"average": self.average}

    def load_state_dict(self, shared: dict[str, Any], own: dict[str, Any], step: int) -> None:
        """Take up both parts of a state at a step; its seconds count on."""
        self.reported_step = step
        self.rows, self.average = shared["rows"], own["average"]
        self.started = time.monotonic() - shared["seconds"]

    def note(self, done: int, loss: float) -> None:
        """Tell the progress display, at most twice a second."""
        if self.writes and self.notes(done, loss, healthy=bool(np.isfinite(loss))):
            self.metrics.add("patterning_training_steps", done - self.reported_step)
            self.metrics.set("patterning_training_loss_nats", loss)
            self.reported_step = done

    def evaluate(self, step: int, loss: float) -> None:
        """Add a row of metrics; loss: of the training batch, nats."""
        row = self.trainer.evaluate()
        seconds = time.monotonic() - self.started
        self.rows.append({"step": step, "train_loss": loss, **row, "seconds": seconds})

    def save(self, name: str) -> None:
        """Write the weights to ``<name>.safetensors``."""
        self.location.confirm()
        file = self.job.folder / f"{name}.safetensors"
        save_weights(self.trainer.engine, file if self.writes else None)
        if self.writes:
            self.location.publish(file)

    def add_to_average(self) -> None:
        """Count the weights in the mean that the annealed checkpoint is."""
        share = own_share(self.trainer.engine)
        self.average = {n: self.average[n] + w if n in self.average else w for n, w in share.items()}

    def finish(self, fingerprint: str) -> None:
        """Write the result; evaluation.json comes last, with the fingerprint that says that the job is finished."""
        trainer, job = self.trainer, self.job
        if job.anneal_steps:  # a rank's share may be nothing
            num_averaged = job.anneal_steps - job.anneal_steps // 2
            load_shares(trainer.engine, {name: w / num_averaged for name, w in self.average.items()})
        self.save("model")
        observables, influences = trainer.observables()
        report = {
            **trainer.evaluate(),
            "observables": observables,
            "num_missing_weights": trainer.batches.num_missing,
            "num_joined_weights": trainer.batches.num_joined,
            "seconds": time.monotonic() - self.started,
            "fingerprint": fingerprint,
        }
        if self.writes:
            write_parquet(job.folder / "metrics.parquet", pa.Table.from_pylist(self.rows))
            write_parquet(job.folder / HELD_OUT_TABLE, pa.table(influences))
            trainer.task.describe(job.folder)
            self.location.publish(job.folder)
            names = [file.name for file in job_files(job.folder) if file.name != REPORT]
            write_json(job.folder / REPORT, report | {"sha256": digests_of(job.folder, names)})
            self.location.publish(job.folder / REPORT)
