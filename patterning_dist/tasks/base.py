"""What most tasks have in common; and what those have whose model is an architecture with checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from patterning_dist.config import TrainingConfig
from patterning_dist.data.weights import SampleWeights, swaps_labels
from patterning_dist.errors import PatterningError
from patterning_dist.models.components import Component
from patterning_dist.sampling.layered import Layered
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.samples import Batch, Samples
from patterning_dist.storage.files import file_sha256
from patterning_dist.tasks.optimizers import plain_optimizer
from patterning_dist.tasks.task import FileHash, OwnSamples, Task, Terms


class PlainTask:
    """Defaults of the methods of ``Task``; see there for what they are for."""

    key = "sample_id"

    def open_samples(self, path: Path) -> Samples:
        """Refused: a probe of the user's own is a table of tokens."""
        raise PatterningError(
            f"sampling.probe: {path} is a table of tokens, and the samples here are not; remove the key"
        )

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """Refused: what stands for a sample is not known."""
        raise PatterningError("this task has no features of its samples; give it a method `features` (tasks/task.py)")

    def layered(self, model: nn.Module, component: Component) -> Layered | None:
        """Not known: every pass is a whole one."""
        return None

    def counted(self, samples: OwnSamples, ids: np.ndarray) -> np.ndarray | None:
        """All losses count."""
        return None

    def entries(self, samples: OwnSamples, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Nothing is known of single losses."""
        return {}

    def token_texts(self) -> np.ndarray | None:
        """There are no tokens."""
        return None

    def split(self, name: str, samples: OwnSamples, ids: np.ndarray) -> Terms | None:
        """None of its own."""
        return None

    def own_split(self, name: str, seed: int) -> tuple[Samples, np.ndarray] | None:
        """None."""
        return None

    def read_weights(self: Task, path: Path, strength: float) -> np.ndarray:
        """A table of ``SampleWeights``; losses that do not count weigh 0."""
        counted = self.counted(self.train, np.arange(len(self.train)))
        table = SampleWeights.load(path, self.key).scaled(strength)
        return table.join(len(self.train), self.num_positions, counted).weights

    def weighted_samples(self: Task, path: Path, strength: float) -> Samples:
        """The training samples, with the labels swapped that a table of ``SampleWeights`` swaps."""
        if not swaps_labels(path):
            return self.train
        swapped = SampleWeights.load(path, self.key).scaled(strength).join(len(self.train), self.num_positions).swapped
        return self.train if swapped is None else self.swap(str(path), swapped)

    def swap(self, where: str, swapped: np.ndarray) -> Samples:
        """Refused: there are no two labels."""
        raise PatterningError(
            f"{where} swaps labels, and samples here have no two to be swapped, as chosen and rejected of a pair are; "
            "remove what swaps them"
        )

    def outcomes(self, model: nn.Module, ids: Mapping[str, np.ndarray], ranks: Ranks) -> dict[str, np.ndarray]:
        """Nothing is known of single samples but their losses."""
        return {}

    def optimizer(self, model: nn.Module, settings: TrainingConfig) -> Optimizer:
        """AdamW."""
        return plain_optimizer(model, settings)

    def describe(self, folder: Path) -> None:
        """Nothing: code or the experiment file has it."""


class CheckpointTask(PlainTask):
    """A ``Task``, see there, less its losses: of a model with checkpoints, some of which may be there before the run.

    Args:
        model: the architecture, see ``tasks.language.LanguageModel``.
        train, held_out: samples that know their ``domains`` and ``sha256``.
        folder: of the run's own checkpoints, ``<folder>/<checkpoint>/model.safetensors``.
        given: names of checkpoints that were there before the run.
        evaluation: seed and number of the samples of a held-out set that metrics are taken on.
        device: torch device.
        compute_dtype: of forward passes under autocast, where it is not float32.
    """

    def __init__(
        self,
        model: Any,
        train: Any,
        held_out: Mapping[str, Any],
        *,
        folder: Path,
        given: tuple[str, ...],
        evaluation: tuple[int, int],
        device: str,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.train, self.held_out = model, train, held_out
        self.folder, self.given, self.device = folder, given, device
        self._evaluation, self.compute_dtype = evaluation, compute_dtype

    def build(self, seed: int) -> nn.Module:
        """Fresh weights."""
        return self.model.build(seed)

    def load(self, checkpoint: str, ranks: Ranks) -> nn.Module:
        """A given checkpoint, or one that this run trained."""
        if checkpoint in self.given:
            return self.model.load_given(checkpoint, ranks)
        return self.model.load(self.folder / checkpoint, ranks)

    def skeleton(self) -> nn.Module:
        """Names and shapes."""
        return self.model.skeleton()

    def layered(self, model: nn.Module, component: Component) -> Layered | None:
        """Where the architecture can be cut."""
        return self.model.layered(model, component)

    def index(self, samples: OwnSamples, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The number of a sample, and its domain."""
        return {self.key: np.asarray(ids), "domain": samples.domains[ids]}

    def optimizer(self, model: nn.Module, settings: TrainingConfig) -> Optimizer:
        """Of the architecture."""
        return self.model.optimizer(model, settings)

    def describe(self, folder: Path) -> None:
        """Of the architecture."""
        self.model.describe(folder)

    def fingerprint(self, checkpoint: str | None = None, sha256: FileHash = file_sha256) -> Any:
        """Hashes of the samples, the settings of the model, and hashes of a checkpoint's files."""
        weights: Any = None
        if checkpoint in self.given:
            weights = self.model.files_fingerprint(checkpoint, sha256)
        elif checkpoint is not None:
            weights = sha256(self.folder / checkpoint / "model.safetensors")
        held_out = {name: samples.sha256 for name, samples in self.held_out.items()}
        return [self.train.sha256, held_out, self.model.config.model_dump(mode="json"), weights]
