"""What most tasks have in common: all losses count, nothing more is known of samples, and no model is cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn
from torch.optim import Optimizer

from patterning_dist.config import TrainingConfig
from patterning_dist.errors import PatterningError
from patterning_dist.models.components import Component
from patterning_dist.sampling.samples import Samples
from patterning_dist.sampling.target import Layered
from patterning_dist.tasks.optimizers import plain_optimizer
from patterning_dist.tasks.task import OwnSamples, Task, Terms, joined_weights


class PlainTask:
    """Defaults of the methods of ``Task``; see there for what they are for."""

    key = "sample_id"

    def open_samples(self, path: Path) -> Samples:
        """Refused: a probe of the user's own is a table of tokens."""
        raise PatterningError(
            f"sampling.probe: {path} is a table of tokens, and the samples here are not; remove the key"
        )

    def layered(self, model: nn.Module, component: Component) -> Layered | None:
        """Not known: every pass is a whole one."""
        return None

    def counted(self, samples: OwnSamples, ids: np.ndarray) -> np.ndarray | None:
        """All losses count."""
        return None

    def entries(self, samples: OwnSamples, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Nothing is known of single losses."""
        return {}

    def split(self, name: str, samples: OwnSamples, ids: np.ndarray) -> Terms | None:
        """None of its own."""
        return None

    def own_split(self, name: str, seed: int) -> tuple[Samples, np.ndarray] | None:
        """None."""
        return None

    def read_weights(self: Task, path: Path, strength: float) -> np.ndarray:
        """A table of ``SampleWeights``."""
        return joined_weights(self, path, strength)

    def optimizer(self, model: nn.Module, settings: TrainingConfig) -> Optimizer:
        """AdamW."""
        return plain_optimizer(model, settings)

    def describe(self, folder: Path) -> None:
        """Nothing: code or the experiment file has it."""
