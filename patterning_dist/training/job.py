"""One training run: the baseline, or one arm of the retraining with one seed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from patterning_dist.config import Config
from patterning_dist.data.sampler import epoch_batch
from patterning_dist.data.tokens import TokenDataset
from patterning_dist.data.weights import JoinedWeights, SampleWeights
from patterning_dist.storage.files import file_sha256

SECONDS_BETWEEN_CHECKPOINTS = 20.0


@dataclass(frozen=True)
class TrainingJob:
    """What to train, from where, on which weights, for how long.

    Attributes:
        name: shown in the progress display, e.g. ``plus seed 1``.
        pool: token table that it trains on.
        folder: receives metrics.parquet, evaluation.json and model.safetensors.
        seed: initialisation and data order; arms that share it differ in nothing but the weights.
        num_steps: optimizer steps at the full learning rate (after the warm-up).
        anneal_steps: further steps in which the rate falls to zero.
        evaluate_every: optimizer steps between two rows of metrics.
        weights: table of sample weights; None: every sample has weight 1.
        start: safetensors to start from; None: a fresh initialisation from ``seed``.
        deepspeed: DeepSpeed JSON; None: ZeRO stage 0.
        num_workers: data-parallel ranks.
        checkpoint_seconds: shortest time between two training checkpoints, on which the result does not depend.
    """

    name: str
    pool: Path
    folder: Path
    seed: int
    num_steps: int
    anneal_steps: int
    evaluate_every: int
    weights: Path | None
    start: Path | None
    deepspeed: Path | None
    num_workers: int
    checkpoint_seconds: float = SECONDS_BETWEEN_CHECKPOINTS

    def fingerprint(self, config: Config) -> str:
        """Hash of everything that the result depends on, file contents included."""
        keys = ("pool", "weights", "start", "deepspeed")
        files = {key: file_sha256(path) for key in keys if (path := getattr(self, key))}
        spec = {k: v for k, v in asdict(self).items() if k not in ("folder", "checkpoint_seconds", *files)}
        dumped = {name: getattr(config, name).model_dump(mode="json") for name in ("model", "training")}
        sections = dumped | {"training": {k: v for k, v in dumped["training"].items() if k != "deepspeed"}}
        inputs = json.dumps([spec, files, sections, config.seed], sort_keys=True, default=str)
        return hashlib.sha256(inputs.encode()).hexdigest()

    def inputs(self, directory: Path) -> list[str]:
        """What it reads of the run directory, as names in there, its own folder included: nodes may have a copy."""
        paths = [path for path in (self.weights, self.start, self.folder) if path and path.is_relative_to(directory)]
        return ["data", *(path.relative_to(directory).as_posix() for path in paths)]

    def is_finished(self, config: Config) -> bool:
        """Whether the folder holds the result of this very job."""
        report = self.folder / "evaluation.json"
        return report.exists() and json.loads(report.read_text()).get("fingerprint") == self.fingerprint(config)


class WeightedBatches:
    """The global batches of a job: token ids with the weights of their predicted tokens.

    Batches are passes without replacement in an order that depends on the seed alone, so all arms see the same data in
    the same order. During annealing the batches are ``anneal_batch_size`` large.

    Args:
        job: names seed and weights.
        config: batch sizes.
        dataset: the training pool.
    """

    def __init__(self, job: TrainingJob, config: Config, dataset: TokenDataset) -> None:
        self.job, self.training, self.dataset = job, config.training, dataset
        self.joined = JoinedWeights(np.ones((0, 0), np.float32), 0, 0)
        if job.weights is not None:
            self.joined = SampleWeights.load(job.weights).join(dataset.num_sequences, dataset.context_length)

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [sequence, position] and weights [sequence, position - 1] of the global batch of a step."""
        annealing = step - self.job.num_steps
        if annealing < 0:
            ids = epoch_batch(self.job.seed, step, self.training.batch_size, self.dataset.num_sequences)
        else:
            # Another key than the main order: seeds are below 2^63, so no other seed has it.
            seed = self.job.seed + 2**63
            ids = epoch_batch(seed, annealing, self.training.anneal_batch_size, self.dataset.num_sequences)
        tokens = self.dataset.tokens(ids)
        if self.job.weights is None:
            return tokens, np.ones((len(ids), tokens.shape[1] - 1), np.float32)
        return tokens, self.joined.weights[ids]
