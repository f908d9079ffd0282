"""Chains around trained bracket classifiers, on plain or on weighted strings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from patterning_dist.errors import PatterningError
from patterning_dist.experiments.two_rules.classifier import BracketClassifier, string_losses
from patterning_dist.experiments.two_rules.config import ParenthesesConfig
from patterning_dist.experiments.two_rules.strings import BracketStrings, read_split
from patterning_dist.models.components import select_component
from patterning_dist.sampling.chain import Chain
from patterning_dist.sampling.module_target import ModuleTarget
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.study import chain_settings
from patterning_dist.storage.files import read_parquet
from patterning_dist.storage.mirror import Place

COMPONENT = "everything"


@dataclass(frozen=True)
class Subject:
    """A network to sample around.

    Attributes:
        number: of the subject; its chains are independent of those of other numbers.
        networks: file of stacked networks, relative to the run directory.
        index: of the network in that file.
        weights: table of rho, relative to the run directory; None: plain, both labels alike.
    """

    number: int
    networks: str
    index: int
    weights: str | None = None


class WeightedStrings:
    """Training strings with their weights: what chains draw minibatches from, and what they measure."""

    def __init__(self, strings: BracketStrings, weights: np.ndarray) -> None:
        self.strings, self.weights = strings, torch.from_numpy(weights / weights.mean()).float()

    def __len__(self) -> int:
        return len(self.strings)

    def __getitem__(self, ids: Tensor) -> tuple[Tensor, ...]:
        return (*self.strings[ids], self.weights[ids])


def weighted_losses(model: BracketClassifier, batch: tuple[Tensor, ...]) -> Tensor:
    """rho_i l_i [sample], nats; their mean over all strings is L_rho."""
    tokens, lengths, labels, weights = batch
    return weights * string_losses(model, tokens, lengths, labels)


class BracketStudy:
    """The networks, the strings and the settings of a run; a ``ChainStudy`` whose units are subjects.

    Args:
        config: of the run.
        directory: of the run.
        device: torch device.
        subjects: unit name -> network.
    """

    def __init__(
        self, config: ParenthesesConfig, directory: Path, device: str, subjects: Mapping[str, Subject]
    ) -> None:
        self.config, self.directory, self.device, self.subjects = config, Path(directory), device, subjects

    @cached_property
    def strings(self) -> BracketStrings:
        """Training strings."""
        return read_split(self.directory / "data", "train", self.config.task.max_length)

    def model(self, unit: str) -> BracketClassifier:
        """A fresh copy of a subject's network."""
        subject = self.subjects[unit]
        stacked = load_file(self.directory / subject.networks)
        model = BracketClassifier(self.config.model, self.config.task.max_length)
        model.load_state_dict({name: tensor[subject.index] for name, tensor in stacked.items()})
        return model.to(self.device)

    def target(self, unit: str) -> ModuleTarget:
        """What the chains of a unit walk on: all weights; the observable is L_rho itself."""
        subject, model = self.subjects[unit], self.model(unit)
        weights = self.strings.class_weights
        if subject.weights is not None:
            weights = read_parquet(self.directory / subject.weights, ("weight",))[0]["weight"].to_numpy()
        samples = WeightedStrings(self.strings, weights)
        return ModuleTarget(
            model,
            select_component(model, COMPONENT),
            weighted_losses,
            data=samples,
            probe=samples,
            num_component_losses=1,
            micro_batch_size=self.config.sampling.micro_batch_size,
        )

    def chain(self, unit: str, number: int, **changes: Any) -> Chain:
        """Chain ``number`` of a unit, at its first step; ``changes`` replace fields of its settings."""
        settings = chain_settings(self.config.sampling, COMPONENT, self.config.seed)
        # Chains of different subjects, too, must not share noise or minibatches.
        mixed = np.random.SeedSequence([self.config.seed, self.subjects[unit].number]).generate_state(1, np.uint64)[0]
        settings = replace(settings, seed=int(mixed >> np.uint64(1)), **changes)
        return Chain(self.target(unit), settings, number, population=len(self.strings))


def open_bracket_study(
    config: ParenthesesConfig, place: Place, subjects: Mapping[str, Subject], device: str, ranks: Ranks
) -> BracketStudy:
    """The study of a run in a worker, wherever the run is kept.

    Raises:
        PatterningError: several ranks; a bracket classifier takes one process.
    """
    if ranks.size > 1:
        raise PatterningError(
            f"sampling.ranks_per_chain: {ranks.size} ranks for a bracket classifier, expected 1; remove the key"
        )
    files = {file for subject in subjects.values() for file in (subject.networks, subject.weights) if file}
    return BracketStudy(config, place.fetch("data", *sorted(files)), device, subjects)
