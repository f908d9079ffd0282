"""A study of a model that exists already: from its configuration to any of its chains, in whatever process."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patterning_dist.config import HuggingFaceModelConfig, StudyConfig, TokensConfig
from patterning_dist.config.sampling import ComponentLossConfig, FunctionConfig, SplitLossConfig
from patterning_dist.config.study import FINAL
from patterning_dist.data.sampler import permutation
from patterning_dist.data.tokenised import TokenBlocks, load_tokens
from patterning_dist.errors import PatterningError
from patterning_dist.models.components import Component, select_component
from patterning_dist.models.huggingface import language_model_skeleton, load_language_model, next_token_losses
from patterning_dist.sampling.chain import Chain
from patterning_dist.sampling.module_target import ModuleTarget, PerSampleLoss, Samples, to_device
from patterning_dist.sampling.observables import load_function
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.samples import Joined, Part
from patterning_dist.sampling.shard import shard_model
from patterning_dist.sampling.study import chain_settings
from patterning_dist.sampling.traces import TraceRecorder, trace_store

# Streams of the counter-based sampler, apart from those of chains (small numbers).
_PROBE_STREAM, _HELD_OUT_STREAM = 0x70726F6265, 0x68656C64
_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


class ModelStudy:
    """The checkpoints, the probe, the held-out splits and the training data of a study.

    Args:
        config: of the study.
        directory: of the run; traces, if they are wanted, are written there.
        device: torch device of models and batches.
        ranks: the chain group that this process is one of.
    """

    def __init__(self, config: StudyConfig, directory: Path, device: str, ranks: Ranks | None = None) -> None:
        self.config, self.directory, self.device, self.ranks = config, Path(directory), device, ranks or Ranks()
        self._checkpoint: tuple[str, nn.Module] | None = None
        self._target: ModuleTarget | None = None

    @cached_property
    def _samples(self) -> tuple[Samples, dict[str, Samples]]:
        """Training samples, and held-out samples by domain."""
        data = self.config.data
        if isinstance(data, TokensConfig):
            return self._tokens(data.train), {domain: self._tokens(path) for domain, path in data.held_out.items()}
        train, held_out = load_function(data.load, "data.load")()
        return train, dict(held_out)

    def _tokens(self, path: str) -> TokenBlocks:
        return load_tokens(path, self.config.data.context_length, self.config.data.column)

    @property
    def held_out_sets(self) -> dict[str, Samples]:
        """Held-out samples by domain."""
        return self._samples[1]

    @property
    def _compute_dtype(self) -> torch.dtype | None:
        return _DTYPES[self.config.sampling.compute_dtype]

    @property
    def train(self) -> Samples:
        """The training samples: minibatches are drawn from them, and their weights are what chi is about."""
        return self._samples[0]

    @cached_property
    def probe_source(self) -> Samples:
        """What the probe is a part of: the training samples, or the user's own table."""
        path = self.config.sampling.probe
        return self.train if path is None else self._tokens(str(path))

    @cached_property
    def probe_ids(self) -> np.ndarray:
        """Numbers of the probe's samples, ascending: a random part of the training samples, or all of a table."""
        if self.config.sampling.probe is not None:
            return np.arange(len(self.probe_source))
        order = permutation(self.config.seed, _PROBE_STREAM, len(self.train))
        return np.sort(order[: self.config.sampling.probe_sequences])

    @cached_property
    def probe(self) -> Part:
        """The samples whose losses are recorded."""
        return Part(self.probe_source, self.probe_ids)

    @cached_property
    def held_out(self) -> tuple[Joined, Tensor] | None:
        """Held-out samples, at most ``evaluation_sequences`` a domain, and the split losses as means over them.

        Coefficients are [observable, sample] or, where a sample has several losses, [observable, sample, 1].

        Raises:
            PatterningError: a split of a domain that the data has not.
        """
        config = self.config.sampling
        splits = [o for o in config.observables if isinstance(o, SplitLossConfig)]
        if not splits:
            return None
        parts, domains = [], []
        for domain, samples in self.held_out_sets.items():
            ids = permutation(self.config.seed, _HELD_OUT_STREAM, len(samples))[: config.evaluation_sequences]
            parts.append(Part(samples, np.sort(ids)))
            domains += [domain] * len(ids)
        rows = []
        for observable in splits:
            mask = np.array([observable.split in ("overall", f"domain:{domain}") for domain in domains], float)
            if not mask.any():
                raise PatterningError(
                    f"observable {observable.name}: the held-out data has no samples of '{observable.split}'; "
                    f"its domains are {', '.join(self.held_out_sets) or 'none'}"
                )
            rows.append(mask / mask.sum() / (self.num_positions or 1))
        coefficients = torch.from_numpy(np.stack(rows))
        return Joined(parts), coefficients if self.num_positions is None else coefficients[:, :, None]

    @cached_property
    def num_positions(self) -> int | None:
        """Losses of one sample; None where it has a single one."""
        first = self.train[torch.tensor([0])]
        if isinstance(self.config.model, HuggingFaceModelConfig):
            return first.shape[1] - 1
        with torch.no_grad():
            losses = self.per_sample_loss(self.model(self.config.model.checkpoints[0]), to_device(first, self.device))
        return losses.shape[1] if losses.dim() == 2 else None

    @property
    def num_columns(self) -> int:
        """Probe columns: one a loss, and where a sample has several, one more for its mean."""
        return len(self.probe) * (1 if self.num_positions is None else self.num_positions + 1)

    @property
    def observable_names(self) -> list[str]:
        """Names in the order in which a chain reports them: component losses, splits, functions."""
        return [
            name
            for kind in (ComponentLossConfig, SplitLossConfig, FunctionConfig)
            for observable in self.config.sampling.observables
            if isinstance(observable, kind)
            for name in observable.observable_names
        ]

    @cached_property
    def per_sample_loss(self) -> PerSampleLoss:
        """(model, batch) -> losses [sample] or [sample, position], nats."""
        if isinstance(self.config.model, HuggingFaceModelConfig):
            return next_token_losses
        return load_function(self.config.model.per_sample_loss, "model.per_sample_loss")

    @cached_property
    def components(self) -> dict[str, Component]:
        """The components of the study by their names; needs no weights of a language model.

        Raises:
            PatterningError: a name that is no component of the model, or tokens that are not in its vocabulary.
        """
        config = self.config.model
        if isinstance(config, HuggingFaceModelConfig):
            model: nn.Module = language_model_skeleton(*model_location(config, config.checkpoints[0]))
            for samples in (self.train, self.probe_source, *self.held_out_sets.values()):
                if isinstance(samples, TokenBlocks):
                    samples.check_vocabulary(model.config.vocab_size)
        else:
            model = self.model(config.checkpoints[0])
        return {c.name: select_component(model, c.name) for c in self.config.sampling.components}

    def check(self) -> None:
        """Find out now what would otherwise fail in the workers.

        Raises:
            PatterningError: see ``components`` and ``held_out``; a checkpoint that is not there, or an observable that
                cannot be imported.
        """
        config = self.config.model
        for checkpoint in config.checkpoints if isinstance(config, HuggingFaceModelConfig) else ():
            model_location(config, checkpoint)
        for observable in self.config.sampling.observables:
            if isinstance(observable, FunctionConfig):
                load_function(observable.path)
        _ = self.components, self.held_out

    def model(self, checkpoint: str) -> nn.Module:
        """The model at a checkpoint, on this rank; the same object as long as the checkpoint does not change."""
        if self._checkpoint is None or self._checkpoint[0] != checkpoint:
            self._target = self._checkpoint = None  # the old model goes before the new one comes
            self._checkpoint = (checkpoint, self._load(checkpoint))
        return self._checkpoint[1]

    def target(self, unit: str) -> ModuleTarget:
        """What the chains of a unit, "<checkpoint>/<component>", walk on; the one before is given up."""
        checkpoint, _, name = unit.partition("/")
        model = self.model(checkpoint)
        if self._target is not None:  # an earlier chain has moved it
            with torch.no_grad():
                for piece, w in self._target.live().items():
                    w.copy_(self._target.center[piece])
        observables, config = self.config.sampling.observables, self.config.sampling
        held_out, coefficients = self.held_out or (None, None)
        # By the name of the unit, so that chains at different checkpoints share no noise and no minibatches.
        component = replace(select_component(model, name), name=unit)
        self._target = ModuleTarget(
            model,
            component,
            self.per_sample_loss,
            self.train,
            self.probe,
            held_out=held_out,
            coefficients=coefficients,
            functions=tuple(load_function(o.path) for o in observables if isinstance(o, FunctionConfig)),
            num_component_losses=sum(isinstance(o, ComponentLossConfig) for o in observables),
            micro_batch_size=config.micro_batch_size,
            compute_dtype=self._compute_dtype,
            ranks=self.ranks,
        )
        return self._target

    def chain(self, unit: str, number: int, **changes: Any) -> Chain:
        """Chain ``number`` of a unit, at its first step; ``changes`` replace fields of its settings."""
        component = unit.partition("/")[2]
        settings = replace(chain_settings(self.config.sampling, component, self.config.seed), **changes)
        recorder = None
        if self.config.traces is not None and self.ranks.rank == 0 and not changes:
            store = trace_store(self.directory, unit)
            recorder = TraceRecorder(store, number, self.config.traces.thin, settings.num_draws)
        return Chain(self.target(unit), settings, number, population=len(self.train), recorder=recorder)

    def _load(self, checkpoint: str) -> nn.Module:
        config = self.config.model
        if not isinstance(config, HuggingFaceModelConfig):
            built = load_function(config.build, "model.build")(checkpoint)
            return shard_model(built, self.ranks, self.device, compute_dtype=self._compute_dtype)
        path, revision = model_location(config, checkpoint)
        if self.ranks.size == 1:
            return load_language_model(path, revision, self.device)
        from patterning_dist.sampling.shard_loading import load_sharded_language_model

        return load_sharded_language_model(path, revision, self.ranks, self.device, compute_dtype=self._compute_dtype)


def model_location(config: HuggingFaceModelConfig, checkpoint: str) -> tuple[str, str | None]:
    """Folder of a checkpoint and None, or a name on the hub and the revision there.

    Raises:
        PatterningError: the model's folder is not there, or has no such sub-folder.
    """
    folder = Path(config.path)
    if not folder.is_dir():
        if folder.is_absolute() or config.path.startswith("."):  # no name on the hub looks like that
            raise PatterningError(
                f"model.path: there is no folder {folder}; give that of a model, or a name on the hub"
            )
        return config.path, None if checkpoint == FINAL else checkpoint
    if (folder / checkpoint).is_dir():
        return str(folder / checkpoint), None
    if checkpoint == FINAL:
        return config.path, None
    there = sorted(entry.name for entry in folder.iterdir() if (entry / "config.json").is_file())
    raise PatterningError(
        f"model.checkpoints: {folder} has no folder {checkpoint!r}; there are {', '.join(there) or 'none'}, and "
        f"{FINAL} for the model itself"
    )
