"""Retrainings that attribution is measured on: on everything, on random subsets, and without what scores single out.

Each goes on from the checkpoint for a tail window of ``validation.num_steps``; what is left out has weight 0. Folders
are laid out as a bank of bergson's, one for every seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patterning_dist.config import Config
from patterning_dist.data.bergson import write_subsets
from patterning_dist.data.sampler import permutation
from patterning_dist.data.weights import write_sample_weights
from patterning_dist.progress import Progress
from patterning_dist.stages.train import run_unfinished
from patterning_dist.storage.run import RunDirectory
from patterning_dist.tasks.open import open_task
from patterning_dist.tasks.task import Task
from patterning_dist.training.job import TrainingJob

FOLDER = "validate"
BASE = "base"  # the retraining on everything
_SUBSET_STREAM = 0x76616C69  # of the counter-based sampler, apart from those of chains (small numbers)
STACK = 16  # networks that are trained at once
Position = np.ndarray | None


@dataclass(frozen=True)
class Removal:
    """A retraining without some losses.

    Attributes:
        name: of its folders and of its table, unique.
        sample_id: whose losses are left out, all of them, or [entry] where positions are given.
        position: of the losses, from 1 [entry]; None: those of whole samples.
    """

    name: str
    sample_id: np.ndarray
    position: Position = None


def draw_subsets(seed: int, num_samples: int, number: int, share: float) -> list[np.ndarray]:
    """Samples that each of some random subsets leaves out, ascending; all keep as many.

    Args:
        seed: of the run.
        num_samples: training samples.
        number: of subsets.
        share: of the samples, that a subset keeps; one at least is kept, and one left out.
    """
    kept = min(max(round(share * num_samples), 1), num_samples - 1)
    return [np.sort(permutation(seed, _SUBSET_STREAM + k, num_samples)[kept:]) for k in range(number)]


def subset_name(number: int) -> str:
    """Of the retraining on a subset, within ``retrained/``."""
    return f"subset_{number}"


class Bank:
    """The retrainings of stage validate.

    Args:
        config: of the run.
        run: its directory.
        start: checkpoint that all go on from.
        progress: shows the trainings.
    """

    def __init__(self, config: Config, run: RunDirectory, start: str, progress: Progress) -> None:
        assert config.validation is not None
        self.config, self.run, self.start, self.progress = config, run, start, progress
        self.settings = config.validation
        self.task: Task = open_task(config, run.path, "cpu")

    def folder(self, seed: int, name: str) -> str:
        """Of a retraining, relative to the run directory; what it is also called as a checkpoint."""
        return f"{FOLDER}/bank/seed-{seed}/retrained/{name}"

    def write_subsets(self, removed: list[np.ndarray]) -> list[Path]:
        """Say of every bank what its subsets leave out; returns the files."""
        return [
            write_subsets(self.run.path / FOLDER / "bank" / f"seed-{seed}", removed) for seed in self.settings.seeds
        ]

    def train(self, label: str, removals: Sequence[Removal | None]) -> tuple[list[Path], dict[str, str]]:
        """Train without each of some losses, None for nothing, with every seed; kept where it is done.

        Returns:
            The files written, and name -> hash of every checkpoint: retrainings in their order, seed by seed.
        """
        inputs = self.task.fingerprint(self.start)
        parts = [(seed, part, self._table(part)) for part in removals for seed in self.settings.seeds]
        jobs = [
            self._job(seed, part, table, inputs, number // STACK) for number, (seed, part, table) in enumerate(parts)
        ]
        files = run_unfinished(self.config, self.run, self.progress, label, jobs, None)
        tables = [table for _, _, table in parts if table is not None]
        names = [job.folder.relative_to(self.run.path).as_posix() for job in jobs]
        return [*files, *dict.fromkeys(tables)], {
            name: job.fingerprint(self.config) for name, job in zip(names, jobs, strict=True)
        }

    def _table(self, part: Removal | None) -> Path | None:
        """The weights of a retraining: 0 for what is left out."""
        if part is None:
            return None
        table = self.run.path / FOLDER / "weights" / f"{part.name}.parquet"
        write_sample_weights(table, part.sample_id, part.position, np.zeros(len(part.sample_id)), {}, self.task.key)
        self.run.publish(table)
        return table

    def _job(self, seed: int, part: Removal | None, table: Path | None, inputs: object, stack: int) -> TrainingJob:
        settings = self.settings
        assert settings.num_steps is not None  # checked with the file
        name = BASE if part is None else part.name
        return TrainingJob(
            name=f"{name} seed {seed}",
            folder=self.run.path / self.folder(seed, name),
            inputs=inputs,
            seed=seed,
            num_steps=settings.num_steps,
            rate_factor=settings.rate_factor,
            evaluate_every=settings.num_steps,
            start=self.start,
            weights=table,
            stack=f"validate-{stack}" if settings.engine == "stacked" else None,
        )
