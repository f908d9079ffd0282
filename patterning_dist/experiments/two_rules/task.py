"""The task of two rules: bracket classifiers of a run, its strings, and the losses of both."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from patterning_dist.experiments.two_rules.behaviour import behaviour
from patterning_dist.experiments.two_rules.classifier import BracketClassifier, build_classifier
from patterning_dist.experiments.two_rules.config import ParenthesesConfig
from patterning_dist.experiments.two_rules.strings import SPLITS, BracketStrings, read_split
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.samples import Batch, Samples
from patterning_dist.storage.files import file_sha256, read_parquet
from patterning_dist.tasks.base import PlainTask
from patterning_dist.tasks.task import FileHash, Metric

COMPONENT = "everything"


class BracketTask(PlainTask):
    """A ``Task``; see there. Its checkpoints are ``<folder>:<number>``, a network of <folder>/networks.safetensors.

    Args:
        config: of the run.
        directory: of the run.
        device: torch device.
    """

    num_positions: int | None = None
    mean_counted: float | None = None
    compute_dtype: torch.dtype | None = None
    metrics: Mapping[str, Metric] = {
        "train": Metric("training strings", "share", "training strings that are classified rightly"),
        "test": Metric("test strings", "share", "test strings that are classified rightly"),
        "rejected": Metric("rejected", "share", "out-of-distribution strings called not balanced: 1 NESTED"),
        "rejected_open": Metric("rejected, ( first", "share", 'the same of those that begin with "("'),
        "rejected_close": Metric("rejected, ) first", "share", 'the same of those that begin with ")"'),
    }

    def __init__(self, config: ParenthesesConfig, directory: Path, device: str) -> None:
        self.config, self.directory, self.device = config, Path(directory), device
        read = partial(read_split, self.directory / "data", longest=config.task.max_length)
        self.train: BracketStrings = read(SPLITS[0])
        self.held_out: dict[str, BracketStrings] = {name: read(name) for name in SPLITS[1:]}

    def build(self, seed: int) -> BracketClassifier:
        """See ``build_classifier``."""
        return build_classifier(self.config.model, self.config.task.max_length, seed).to(self.device)

    def load(self, checkpoint: str, ranks: Ranks) -> BracketClassifier:
        """A network out of a stack; on every rank the whole of it."""
        folder, _, number = checkpoint.partition(":")
        stacked, model = load_file(self.directory / folder / "networks.safetensors"), self.skeleton()
        model.load_state_dict({name: tensor[int(number)] for name, tensor in stacked.items()})
        return model.to(self.device).eval()

    def skeleton(self) -> BracketClassifier:
        """Shapes; the weights are as they come."""
        return BracketClassifier(self.config.model, self.config.task.max_length)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """-log p(label | string) [sample], nats."""
        tokens, lengths, labels = batch
        return binary_cross_entropy_with_logits(model(tokens, lengths), labels, reduction="none")

    def read_weights(self, path: Path, strength: float) -> np.ndarray:
        """rho [sample] of a table as ``write_weights`` makes it; at another strength, of the line from plain to it."""
        rho, plain = read_parquet(path, ("weight",))[0]["weight"].to_numpy(), self.train.class_weights
        return rho if strength == 1 else plain + strength * (rho - plain)

    def index(self, samples: Samples, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The number of a string."""
        return {self.key: np.asarray(ids, np.int32)}

    def evaluate(self, model: nn.Module, ranks: Ranks) -> dict[str, float]:
        """See ``behaviour``; every rank does all of it."""
        networks = {name: parameter.detach()[None] for name, parameter in model.named_parameters()}
        return {name: float(column[0]) for name, column in behaviour(self, model, networks).items()}

    def fingerprint(self, checkpoint: str | None = None, sha256: FileHash = file_sha256) -> Any:
        """Strings, sizes, and the network."""
        weights = None if checkpoint is None else self.directory / checkpoint.partition(":")[0] / "networks.safetensors"
        return [
            sha256(self.directory / "data" / f"{SPLITS[0]}.parquet"),
            self.config.model.model_dump(mode="json"),
            checkpoint,
            None if weights is None else sha256(weights),
        ]
