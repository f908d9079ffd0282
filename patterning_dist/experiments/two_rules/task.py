"""The task of two rules: bracket classifiers of a run, its strings, and the losses of both."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor

from patterning_dist.experiments.two_rules.classifier import BracketClassifier, build_classifier, string_losses
from patterning_dist.experiments.two_rules.config import ParenthesesConfig
from patterning_dist.experiments.two_rules.strings import SPLITS, BracketStrings, read_split
from patterning_dist.storage.mirror import Place


class BracketTask:
    """A ``Task``; see there. Its checkpoints are ``<folder>:<number>``, a network of <folder>/networks.safetensors.

    Args:
        config: of the run.
        directory: of the run.
        device: torch device.
    """

    def __init__(self, config: ParenthesesConfig, directory: Path, device: str) -> None:
        self.config, self.directory, self.device = config, Path(directory), device
        read = partial(read_split, self.directory / "data", longest=config.task.max_length)
        self.train: BracketStrings = read(SPLITS[0])
        self.held_out = {name: read(name) for name in SPLITS[1:]}

    def build(self, seed: int) -> BracketClassifier:
        """See ``build_classifier``."""
        return build_classifier(self.config.model, self.config.task.max_length, seed).to(self.device)

    def losses(self, model: BracketClassifier, batch: tuple[Tensor, ...]) -> Tensor:
        """-log p(label | string) [sample], nats."""
        return string_losses(model, *batch)


def open_task(config: ParenthesesConfig, place: Place, device: str) -> BracketTask:
    """The task in a worker, wherever the run is kept."""
    return BracketTask(config, place.fetch("data"), device)
