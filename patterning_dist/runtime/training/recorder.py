"""What a training writes down: rows of metrics, weights, and the report that says that it is finished."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from ray.actor import ActorHandle
from safetensors.torch import save_file

from patterning_dist.runtime.metrics import TrainingMetrics
from patterning_dist.runtime.training.engine import copy_weights, whole_parameters
from patterning_dist.storage.files import atomic_path, write_json, write_parquet
from patterning_dist.storage.mirror import Place
from patterning_dist.training.job import TrainingJob, WeightedBatches
from patterning_dist.training.metrics import EvaluationSet, evaluate

_NOTE_EVERY = 0.5


class Recorder:
    """Rank 0's files and notes; every rank calls it, so that gathering weights stays collective.

    Metrics are taken of a plain copy of the model: under ZeRO stage 3 the engine's own forward pass is collective, and
    rank 0 alone would wait for ever.
    """

    def __init__(
        self,
        job: TrainingJob,
        place: Place,
        board: ActorHandle,
        metrics: TrainingMetrics,
        evaluation: EvaluationSet,
        rank: int,
        plain: torch.nn.Module,
    ) -> None:
        self.job, self.place, self.board, self.metrics = job, place, board, metrics
        self.evaluation, self.rank, self.noted_step = evaluation, rank, 0
        self.plain = plain
        self.started, self.noted = time.monotonic(), 0.0
        self.rows: list[dict[str, float]] = []
        self.average: dict[str, torch.Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """What goes into a training checkpoint: rows of metrics, sum of the annealed weights, seconds so far."""
        return {"rows": self.rows, "average": self.average, "seconds": time.monotonic() - self.started}

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Take up a state of ``state_dict`` at a step; its seconds count on."""
        self.noted_step = step
        self.rows, self.average = state["rows"], state["average"]
        self.started = time.monotonic() - state["seconds"]

    def note(self, done: int, total: int, loss: float) -> None:
        """Tell the progress display, at most twice a second."""
        if self.rank == 0 and (time.monotonic() - self.noted > _NOTE_EVERY or done == total):
            self.noted = time.monotonic()
            self.metrics.step(done - self.noted_step)
            self.metrics.loss(loss)
            self.noted_step = done
            self.board.note.remote(self.job.name, done=done, total=total, loss=loss, healthy=bool(np.isfinite(loss)))

    def evaluate(self, engine: Any, step: int, loss: float) -> None:
        """Add a row of metrics; loss: of the training batch, nats."""
        with whole_parameters(engine) as module:
            weights = copy_weights(module)
        if self.rank == 0:
            self.plain.load_state_dict(weights)
            row = evaluate(self.plain, self.evaluation)
            seconds = time.monotonic() - self.started
            self.rows.append({"step": step, "train_loss": loss, **row, "seconds": seconds})

    def save(self, weights: dict[str, torch.Tensor], name: str) -> None:
        """Write weights to ``<name>.safetensors``."""
        if self.rank == 0:
            with atomic_path(self.job.folder / f"{name}.safetensors") as path:
                save_file(weights, path)
            self.place.publish(self.job.folder / f"{name}.safetensors")

    def add_to_average(self, weights: dict[str, torch.Tensor]) -> None:
        """Count the weights in the mean that the annealed checkpoint is."""
        if self.rank == 0:
            self.average = {n: self.average[n] + w if n in self.average else w for n, w in weights.items()}

    def finish(self, weights: dict[str, torch.Tensor], fingerprint: str, batches: WeightedBatches) -> None:
        """Write the result; evaluation.json comes last, with the fingerprint that says that the job is finished."""
        if self.rank != 0:
            return
        if self.average:
            num_averaged = self.job.anneal_steps - self.job.anneal_steps // 2
            weights = {name: w / num_averaged for name, w in self.average.items()}
        self.save(weights, "model")
        write_parquet(self.job.folder / "metrics.parquet", pa.Table.from_pylist(self.rows))
        self.plain.load_state_dict(weights)
        report = {
            **evaluate(self.plain, self.evaluation),
            "num_missing_weights": batches.joined.num_missing,
            "num_joined_weights": batches.joined.num_joined,
            "seconds": time.monotonic() - self.started,
            "fingerprint": fingerprint,
        }
        self.place.publish(self.job.folder / "metrics.parquet")
        write_json(self.job.folder / "evaluation.json", report)
        self.place.publish(self.job.folder / "evaluation.json")
