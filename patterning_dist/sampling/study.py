"""A study: from the files of a run to any of its chains, in whatever process sees the run directory."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from patterning_dist.config import Config
from patterning_dist.config.sampling import ComponentLossConfig, FunctionConfig, SamplingConfig, SplitLossConfig
from patterning_dist.data.sampler import permutation
from patterning_dist.data.tokens import TokenDataset
from patterning_dist.errors import PatterningError
from patterning_dist.models.attention import AttentionOnlyTransformer, build_model
from patterning_dist.models.components import select_component
from patterning_dist.sampling.chain import Chain, ChainSettings
from patterning_dist.sampling.layered import LayeredTarget
from patterning_dist.sampling.observables import SplitLosses, load_function, split_losses
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.restricted import RestrictedModel
from patterning_dist.sampling.samplers import Sampler
from patterning_dist.storage.mirror import Place

# Streams of the counter-based sampler, apart from those of chains (small numbers) and epochs.
_PROBE_STREAM, _HELD_OUT_STREAM, _HESSIAN_STREAM = 0x70726F6265, 0x68656C64, 0x68657373


class Study:
    """The checkpoint, the probe, the held-out splits and the training pool of a run.

    Args:
        config: of the run.
        directory: of the run; reads data/*.parquet and baseline/model.safetensors.
        device: torch device of models and tokens.
    """

    def __init__(self, config: Config, directory: Path, device: str) -> None:
        self.config, self.directory, self.device = config, Path(directory), device
        self.pool = TokenDataset(self.directory / "data" / "train.parquet")
        self.validation = TokenDataset(self.directory / "data" / "validation.parquet")

    @property
    def num_pool_tokens(self) -> int:
        """n: the samples whose weights are wanted, one a predicted token of the pool."""
        return self.pool.num_sequences * (self.pool.context_length - 1)

    @cached_property
    def probe_ids(self) -> np.ndarray:
        """Sequence ids of the probe, ascending: a random part of the pool, or all of the user's own table."""
        wanted = self.config.sampling.probe_sequences
        if self.config.sampling.probe is not None:
            return np.arange(self.probe_source.num_sequences)
        return np.sort(permutation(self.config.seed, _PROBE_STREAM, self.pool.num_sequences)[:wanted])

    @cached_property
    def probe_source(self) -> TokenDataset:
        """Where the probe's tokens come from.

        Raises:
            PatterningError: the user's probe is longer than the model's context or has other token ids.
        """
        path = self.config.sampling.probe
        if path is None:
            return self.pool
        probe = TokenDataset(path)
        if probe.context_length > self.pool.context_length:
            raise PatterningError(
                f"sampling.probe: {path} has sequences of {probe.context_length} tokens, but the model's context is "
                f"{self.pool.context_length} (data.context_length); cut the probe or train with a longer context"
            )
        if probe.metadata["tokenizer_sha256"] != self.pool.metadata["tokenizer_sha256"]:
            raise PatterningError(
                f"sampling.probe: {path} was made with another tokenizer than data/train.parquet of this run"
            )
        return probe

    @cached_property
    def probe_tokens(self) -> np.ndarray:
        """Token ids of the probe [sequence, position]."""
        return self.probe_source.tokens(self.probe_ids)

    @cached_property
    def splits(self) -> SplitLosses:
        """The split losses of the configuration over held-out sequences."""
        config = self.config.sampling
        num_held_out = min(config.evaluation_sequences, self.validation.num_sequences)
        ids = permutation(self.config.seed, _HELD_OUT_STREAM, self.validation.num_sequences)[:num_held_out]
        wanted = {o.name: o.split for o in config.observables if isinstance(o, SplitLossConfig)}
        return split_losses(
            wanted, self.validation.tokens(ids), self.validation.domains[ids], self.pool.vocabulary_size
        )

    @property
    def observable_names(self) -> list[str]:
        """Names in the order in which a chain reports them: component losses, splits, functions."""
        observables = self.config.sampling.observables
        return [
            name
            for kind in (ComponentLossConfig, SplitLossConfig, FunctionConfig)
            for observable in observables
            if isinstance(observable, kind)
            for name in observable.observable_names
        ]

    def hessian_tokens(self) -> torch.Tensor:
        """Training sequences on which Hessian-vector products are taken [sequence, position]."""
        wanted = self.config.response.direction.hessian_sequences
        ids = permutation(self.config.seed, _HESSIAN_STREAM, self.pool.num_sequences)[:wanted]
        return torch.from_numpy(self.pool.tokens(ids)).to(self.device)

    def checkpoint(self) -> AttentionOnlyTransformer:
        """A fresh copy of the annealed baseline w*."""
        model = build_model(self.config.model, self.pool.vocabulary_size, self.pool.context_length)
        model.load_state_dict(load_file(self.directory / "baseline" / "model.safetensors"))
        return model.to(self.device)

    def posterior(self, component: str) -> Posterior:
        """n_beta and gamma of a component's chains."""
        return chain_settings(self.config.sampling, component, self.config.seed).posterior

    def restricted(self, component: str) -> RestrictedModel:
        """The checkpoint with one component free."""
        model = self.checkpoint()
        return RestrictedModel(model, select_component(model, component))

    def target(self, component: str) -> LayeredTarget:
        """What a chain on ``component`` walks on."""
        observables = self.config.sampling.observables
        return LayeredTarget(
            self.restricted(component),
            training_tokens=self.pool.tokens,
            probe=torch.from_numpy(self.probe_tokens).to(self.device),
            splits=self.splits,
            num_component_losses=sum(isinstance(o, ComponentLossConfig) for o in observables),
            functions=tuple(load_function(o.path) for o in observables if isinstance(o, FunctionConfig)),
        )

    def chain(self, component: str, number: int, **changes: Any) -> Chain:
        """Chain ``number`` on ``component``, at its first step; ``changes`` replace fields of its settings."""
        return Chain(
            self.target(component),
            replace(chain_settings(self.config.sampling, component, self.config.seed), **changes),
            number,
            population=self.pool.num_sequences,
            accumulate_gradients=component == self.config.response.direction.component and not changes,
        )


def open_study(config: Config, place: Place, device: str, ranks: Ranks) -> Study:
    """The study of a run in a worker, wherever the run is kept.

    Raises:
        PatterningError: several ranks; the models of a run are small, and each chain takes one process.
    """
    if ranks.size > 1:
        raise PatterningError(
            f"sampling.ranks_per_chain: {ranks.size} ranks for the attention-only transformer, expected 1; "
            "remove the key, or study a large model with `patterning study`"
        )
    return Study(config, place.fetch("data", "baseline"), device)


def chain_settings(sampling: SamplingConfig, component: str, seed: int) -> ChainSettings:
    """How the chains of one component walk, from the section of an experiment."""
    resolved = sampling.resolve(component)
    return ChainSettings(
        posterior=Posterior(resolved.inverse_temperature, resolved.localization),
        step_size=resolved.step_size,
        batch_size=sampling.batch_size,
        burn_in=resolved.burn_in,
        num_draws=resolved.num_draws,
        steps_between_draws=resolved.steps_between_draws,
        seed=seed,
        sampler=Sampler(sampling.sampler.kind, sampling.sampler.model_dump(exclude={"kind"})),
    )
