"""A torch module of the user's own: what it is, how it is built and what its losses are come as functions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model
from torch import Tensor, nn

from patterning_dist.config import FunctionDataConfig, ModuleConfig
from patterning_dist.errors import PatterningError
from patterning_dist.functions import code_fingerprint, load_function
from patterning_dist.models.passes import input_of
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.samples import Batch, Part, Samples, all_losses, to_device
from patterning_dist.sampling.shard import shard_model
from patterning_dist.storage.files import file_sha256
from patterning_dist.tasks.base import PlainTask
from patterning_dist.tasks.held_out import held_out_ids
from patterning_dist.tasks.own_samples import own_samples
from patterning_dist.tasks.task import FileHash, Metric

_EVALUATED, _EVALUATED_AT_ONCE = 10**6, 256  # samples of a held-out set at most, and in one batch


class ModuleTask(PlainTask):
    """A ``Task``; see there.

    Args:
        model: names of the user's functions.
        data: likewise.
        folder: of the run's own checkpoints, ``<folder>/<checkpoint>/model.safetensors``.
        device: torch device.
        seed: of the run; it decides which held-out samples metrics are taken on.
        compute_dtype: of forward passes on several ranks, if not float32.
    """

    mean_counted: float | None = None

    def __init__(
        self,
        model: ModuleConfig,
        data: FunctionDataConfig,
        *,
        folder: Path,
        device: str,
        seed: int,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.data, self.folder, self.device = model, data, folder, device
        self.seed, self.compute_dtype = seed, compute_dtype
        train, held_out = load_function(data.load, "data.load")()
        self.train = own_samples(train)
        self.held_out: Mapping[str, Samples] = {name: own_samples(samples) for name, samples in held_out.items()}
        self._losses = load_function(model.per_sample_loss, "model.per_sample_loss")

    @cached_property
    def num_positions(self) -> int | None:
        """As the losses of one sample come out."""
        # Built outside no_grad: a user's build may train.
        model = self.skeleton()
        with torch.no_grad():
            losses = self.losses(model, to_device(self.train[torch.tensor([0])], self.device))
        return losses.shape[1] if losses.dim() == 2 else None

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The mean loss of every held-out set; numbers of the user's ``evaluate`` bear their own names."""
        return {
            f"{name}_loss": Metric(f"loss on {name}", "nats", f"mean loss of the held-out set {name}")
            for name in self.held_out
        }

    def build(self, seed: int) -> nn.Module:
        """Fresh weights.

        Raises:
            PatterningError: there is no ``model.initialise``.
        """
        if self.model.initialise is None:
            raise PatterningError(
                "model.initialise: is missing, and a training from initialisation asks for fresh weights; "
                "name a function seed -> module, or start from a checkpoint (retrain.start)"
            )
        return load_function(self.model.initialise, "model.initialise")(seed).to(self.device)

    def load(self, checkpoint: str, ranks: Ranks) -> nn.Module:
        """What ``model.build`` gives for a name of its own, else what this run trained."""
        if self.model.build is not None and checkpoint in self.model.checkpoints:
            built = load_function(self.model.build, "model.build")(checkpoint)
        else:
            built = self.skeleton()
            load_model(built, self.folder / checkpoint / "model.safetensors")
        return shard_model(built, ranks, self.device, compute_dtype=self.compute_dtype).eval()

    def skeleton(self) -> nn.Module:
        """The module itself, with weights: building it is the only way to know its shapes."""
        if self.model.build is not None:
            return load_function(self.model.build, "model.build")(self.model.checkpoints[0]).to(self.device)
        return self.build(0)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the user's function says."""
        return self._losses(model, batch)

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """What goes into the last linear map [sample, feature].

        Raises:
            PatterningError: the module has none that is used.
        """
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise PatterningError("model: it has no nn.Linear, whose input would stand for a sample")
        return input_of(linear[-1], lambda: self.losses(model, batch)).flatten(1)

    def index(self, samples: Samples, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The number of a sample."""
        return {self.key: np.asarray(ids)}

    def evaluate(self, model: nn.Module, ranks: Ranks) -> dict[str, float]:
        """Mean losses of the held-out sets, and what the user's ``evaluate`` returns."""
        found = {}
        for name, ids in held_out_ids(self, self.seed, _EVALUATED, "realised").items():
            samples = Part(self.held_out[name], ids)
            losses = all_losses(partial(self.losses, model), samples, ranks, _EVALUATED_AT_ONCE, self.device)
            found[f"{name}_loss"] = losses.mean().item()
        if self.model.evaluate is not None:
            with torch.no_grad():
                found |= load_function(self.model.evaluate, "model.evaluate")(model)
        return found

    def fingerprint(self, checkpoint: str | None = None, sha256: FileHash = file_sha256) -> Any:
        """Code of the user's own counts by the file that it is in."""
        model, weights = self.model, None
        if checkpoint is not None and (self.model.build is None or checkpoint not in model.checkpoints):
            weights = sha256(self.folder / checkpoint / "model.safetensors")
        paths = [self.data.load, model.per_sample_loss, model.build, model.initialise, model.evaluate]
        return [checkpoint, weights, *(code_fingerprint(path) for path in paths if path is not None)]
