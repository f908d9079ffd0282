"""One training run: the baseline, or one arm of the retraining with one seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from patterning_dist.config import Config, TrainingConfig
from patterning_dist.config.sampling import is_function
from patterning_dist.config.training import WindowConfig
from patterning_dist.functions import code_fingerprint
from patterning_dist.storage.files import changed_files, file_sha256, read_object

SECONDS_BETWEEN_CHECKPOINTS = 20.0
HELD_OUT_TABLE = "held_out.parquet"  # what every held-out sample adds to the errors of the observables
REPORT = "evaluation.json"  # written last
RAW_WEIGHTS = "raw.safetensors"  # before the annealing
JOB_FILES = ("initial.safetensors", "model.safetensors", "metrics.parquet", HELD_OUT_TABLE, REPORT)
# Of ``training.batches.weighted_loss``: arms that an earlier version trained by another rule are not finished.
WEIGHTED_LOSS = "sum_i rho_i l_i / (rho_mean m), rho_mean of the whole table"
# Where files lie, who shares the work, and how often the state is saved: at most rounding depends on it. A window is in
# the settings.
_NO_INPUTS = ("folder", "weights", "deepspeed", "window", "checkpoint_seconds", "num_workers")
_LAYOUT = {"deepspeed", "gradient_checkpointing", "num_workers", "threads_per_worker"}  # of the section training


def job_files(folder: Path) -> list[Path]:
    """Of a job that is done, and what makes it a checkpoint for others (config.json)."""
    described = [file for file in sorted(folder.glob("*.json")) if file.name not in JOB_FILES]
    raw = folder / RAW_WEIGHTS
    return [*(folder / name for name in JOB_FILES), *described, *([raw] if raw.exists() else [])]


def checkpoint_files(name: str) -> list[str]:
    """What loads a checkpoint of the run, relative to the run directory; some tasks need no config.json."""
    return [f"{name}/{file}" for file in ("model.safetensors", "config.json")]


@dataclass(frozen=True)
class TrainingJob:
    """What to train, from where, on which weights, for how long.

    Attributes:
        name: shown in the progress display, e.g. ``plus seed 1``.
        folder: receives ``JOB_FILES`` and what makes it a checkpoint.
        inputs: JSON of hashes of data, code and start, ``Task.fingerprint(start)``.
        seed: initialisation and data order; arms that share it differ in nothing but the weights.
        num_steps: optimizer steps at the full learning rate (after the warm-up).
        rate_factor: learning rates over those of the experiment's section.
        anneal_steps: further steps in which the rate falls to zero.
        evaluate_every: optimizer steps between two rows of metrics.
        start: name of the checkpoint to start from; None: a fresh initialisation from ``seed``.
        weights: table of sample weights rho = 1 + h; None: every sample has weight 1.
        strength: factor of h.
        weighting: ``loss``, weights multiply losses; ``draw``, samples are drawn, with replacement, in proportion to
            them.
        weighted_share: first part of ``num_steps`` that is weighted; what follows is plain. 1: all steps are weighted.
        splits: name and split of the held-out losses that evaluation.json reports as observables.
        deepspeed: DeepSpeed JSON; None: ZeRO stage 0.
        num_workers: data-parallel ranks.
        window: optimizer, rate and steps of its own; None: those of the experiment's sections.
        stack: jobs of the same name are trained at once, as a stack of networks; None: alone, by DeepSpeed.
        checkpoint_seconds: shortest time between two training checkpoints.
    """

    name: str
    folder: Path
    inputs: Any
    seed: int
    num_steps: int
    anneal_steps: int = 0
    rate_factor: float = 1.0
    evaluate_every: int = 100
    start: str | None = None
    weights: Path | None = None
    strength: float = 1.0
    weighting: Literal["loss", "draw"] = "loss"
    weighted_share: float = 1.0
    splits: tuple[tuple[str, str], ...] = ()
    deepspeed: Path | None = None
    num_workers: int = 1
    stack: str | None = None
    window: WindowConfig | None = None
    checkpoint_seconds: float = SECONDS_BETWEEN_CHECKPOINTS

    def training(self, config: Config) -> TrainingConfig:
        """The section training, as this job is trained by it."""
        assert config.training is not None
        return config.training if self.window is None else self.window.training(config.training)

    @property
    def total_steps(self) -> int:
        """Of the optimizer."""
        return self.num_steps + self.anneal_steps

    @property
    def weighted_steps(self) -> int:
        """Steps from the first that are weighted, if there are weights."""
        return self.total_steps if self.weighted_share == 1 else max(1, round(self.weighted_share * self.num_steps))

    def fingerprint(self, config: Config) -> str:
        """Hash of everything that the result depends on, file contents included, wherever the files lie."""
        spec = {key: value for key, value in asdict(self).items() if key not in _NO_INPUTS}
        if self.weights is not None and self.weighting == "loss":
            spec["weighted_loss"] = WEIGHTED_LOSS
        model = {k: v for k, v in config.model.model_dump(mode="json").items() if k != "path"}
        training = self.training(config).model_dump(mode="json", exclude=_LAYOUT)
        splits = config.sampling.evaluation_sequences if self.splits else None
        functions = [code_fingerprint(split) for _, split in self.splits if is_function(split)]
        inputs = json.dumps([spec, self._files, model, training, splits, config.seed, *functions], sort_keys=True)
        return hashlib.sha256(inputs.encode()).hexdigest()

    @cached_property
    def _files(self) -> dict[str, str]:
        return {key: file_sha256(path) for key in ("weights", "deepspeed") if (path := getattr(self, key))}

    def needs(self, directory: Path) -> list[str]:
        """What it reads of the run directory, as names in there, its own folder included: nodes may have a copy."""
        mine = [path for path in (self.weights, self.folder) if path and path.is_relative_to(directory)]
        start = [] if self.start is None else checkpoint_files(self.start)
        return ["data", *(path.relative_to(directory).as_posix() for path in mine), *start]

    def is_finished(self, config: Config) -> bool:
        """Whether the folder holds the result of this very job, every file as it was written."""
        return self.reports_its_end(config) and not self.changed_files()

    def reports_its_end(self, config: Config) -> bool:
        """Whether evaluation.json says that this very job was trained to its end."""
        return read_object(self.folder / REPORT).get("fingerprint") == self.fingerprint(config)

    def changed_files(self) -> list[str]:
        """Names of files of a finished job that are gone or damaged; earlier versions kept no digests."""
        missing = [name for name in JOB_FILES if not (self.folder / name).exists()]
        digests = read_object(self.folder / REPORT).get("sha256", {})
        return missing or changed_files(self.folder, digests if isinstance(digests, dict) else {})


@dataclass(frozen=True)
class JobGroup:
    """Jobs that are trained at once: those of a stack, or a single one."""

    jobs: tuple[TrainingJob, ...]

    @property
    def lead(self) -> TrainingJob:
        """The first one, in whose folder the checkpoints of all lie, under a name for all."""
        first, *others = self.jobs
        return replace(first, name=f"{first.name} and {len(others)} more of its stack") if others else first

    def fingerprint(self, config: Config) -> str:
        """Hash of all that the checkpoints follow from."""
        found = [job.fingerprint(config) for job in self.jobs]
        return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()

    def needs(self, directory: Path) -> list[str]:
        """See ``TrainingJob.needs``."""
        return [name for job in self.jobs for name in job.needs(directory)]

    def is_finished(self, config: Config) -> bool:
        """Whether all are."""
        return all(job.is_finished(config) for job in self.jobs)


def grouped(jobs: Sequence[TrainingJob]) -> list[JobGroup]:
    """Jobs with what they are trained at once with, in the order of the first ones."""
    found: dict[str, list[TrainingJob]] = {}
    for job in jobs:
        found.setdefault(f"alone {job.folder}" if job.stack is None else f"stack {job.stack}", []).append(job)
    return [JobGroup(tuple(group)) for group in found.values()]
