"""The subjects of an experiment in one process: their models, targets, samples and chains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor, nn

from patterning_dist.aggregation.files import CONTROLLED, GRADIENTS, POSITIONS
from patterning_dist.config.checkpoints import INITIALISATION
from patterning_dist.config.sampling import (
    ComponentLossConfig,
    FunctionConfig,
    SamplingConfig,
    SplitLossConfig,
)
from patterning_dist.data.sampler import permutation
from patterning_dist.functions import load_function
from patterning_dist.heartbeat import inside
from patterning_dist.measure.subject import Subject
from patterning_dist.measure.weighted import Plain, Weighted, WeightedLayers, weighted_losses
from patterning_dist.models.components import select_component
from patterning_dist.sampling.chain import Chain, ChainSettings
from patterning_dist.sampling.controlled import Control, Controlled
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.samplers import Sampler
from patterning_dist.sampling.samples import Part, PerSampleLoss, Samples
from patterning_dist.sampling.shard import checkpoint_layers, shard_model
from patterning_dist.sampling.statistics import PositionMeans, Positions, Statistic
from patterning_dist.sampling.target import Target
from patterning_dist.sampling.traces import TraceRecorder, trace_store
from patterning_dist.tasks.held_out import HeldOut, HeldOutPart, held_out_ids, held_out_splits
from patterning_dist.tasks.task import Task

# Streams of the counter-based sampler, apart from those of chains (small numbers).
_PROBE_STREAM, _HESSIAN_STREAM = 0x70726F6265, 0x68657373


@dataclass(frozen=True)
class Probe:
    """The samples whose losses are recorded.

    Attributes:
        source: that they are a part of.
        ids: their numbers there, ascending.
    """

    source: Samples
    ids: np.ndarray

    @property
    def samples(self) -> Part:
        """The part itself."""
        return Part(self.source, self.ids)


class Subjects:
    """Any chain of an experiment, in whatever process.

    Args:
        task: what is learnt.
        sampling: section of the experiment.
        seed: of the run.
        directory: of the run: weights are read there, and traces written.
        by_name: the subjects.
        gradients_of: subjects whose chains also average positions and gradients of the split losses.
        positions_of: subject -> draws of each of its chains whose positions are kept.
        thin: every ``thin``-th draw of the probe losses is kept; None: none is.
        part: of the held-out samples, on which split losses are taken.
        device: torch device of models and batches.
        ranks: the chain group that this process is one of.
    """

    def __init__(
        self,
        task: Task,
        sampling: SamplingConfig,
        seed: int,
        directory: Path,
        by_name: Mapping[str, Subject],
        *,
        gradients_of: frozenset[str] = frozenset(),
        positions_of: Mapping[str, int] = MappingProxyType({}),
        thin: int | None = None,
        part: HeldOutPart = "observed",
        device: str = "cpu",
        ranks: Ranks | None = None,
    ) -> None:
        self.task, self.sampling, self.seed, self.directory = task, sampling, seed, Path(directory)
        self.by_name, self.gradients_of, self.thin, self.part = dict(by_name), gradients_of, thin, part
        self.positions_of = positions_of
        self.device, self.ranks = device, ranks or Ranks()
        self._checkpoint: tuple[str, nn.Module] | None = None
        self._target: Target | None = None

    @cached_property
    def probe(self) -> Probe:
        """A random part of the training samples, or all of a table of the user's own."""
        if self.sampling.probe is not None:
            source = self.task.open_samples(self.sampling.probe)
            return Probe(source, np.arange(len(source)))
        order = permutation(self.seed, _PROBE_STREAM, len(self.task.train))
        return Probe(self.task.train, np.sort(order[: self.sampling.probe_sequences]))

    @cached_property
    def counted(self) -> np.ndarray | None:
        """Probe entries that count [sample, position]; None: all."""
        return self.task.counted(self.probe.source, self.probe.ids)

    @cached_property
    def held_out(self) -> HeldOut | None:
        """The split losses of the section; None where it has none."""
        return self._splits({o.name: o.split for o in self.sampling.observables if isinstance(o, SplitLossConfig)})

    def split_loss(self, split: str) -> HeldOut:
        """One split loss, an observable of the section or not.

        Raises:
            PatterningError: there is no such split, or no held-out data.
        """
        found = self._splits({split: split})
        assert found is not None
        return found

    def _splits(self, splits: Mapping[str, str]) -> HeldOut | None:
        ids = held_out_ids(self.task, self.seed, self.sampling.evaluation_sequences, self.part)
        return held_out_splits(self.task, ids, splits, self.part)

    @property
    def observable_names(self) -> list[str]:
        """Names in the order in which a chain reports them: component losses, splits, functions."""
        losses, functions = (
            [name for o in self.sampling.observables if isinstance(o, kind) for name in o.observable_names]
            for kind in (ComponentLossConfig, FunctionConfig)
        )
        return [*losses, *(self.held_out.names if self.held_out else ()), *functions]

    @property
    def num_training_losses(self) -> int:
        """n: losses of the training samples that count, each of which has a weight."""
        mean = self.task.mean_counted
        return round(len(self.task.train) * (self.task.num_positions or 1 if mean is None else mean))

    def source(self, name: str, which: str) -> Samples:
        """Samples as the target of a subject takes them.

        ``pool``: the training samples, each of which weighs 1; ``probe``: those whose losses are recorded.
        """
        subject = self.by_name[name]
        if subject.weights is None:
            return self.task.train if which == "pool" else self.probe.samples
        return self._plain(self.task.train) if which == "pool" else self._recorded(subject)

    def entries_of(self, which: str, ids: np.ndarray, losses: np.ndarray) -> np.ndarray:
        """Losses [row, sample(, position)] of pool or probe samples -> those of the entries that count [row, entry]."""
        if which == "pool":
            counted = self.task.counted(self.task.train, ids)
        else:
            counted = self.task.counted(self.probe.source, self.probe.ids[ids])
        return losses.reshape(len(losses), -1) if counted is None else losses[:, counted]

    def hessian_ids(self, num_samples: int) -> np.ndarray:
        """Training samples that Hessian products are taken on."""
        return permutation(self.seed, _HESSIAN_STREAM, len(self.task.train))[:num_samples]

    def model(self, checkpoint: str) -> nn.Module:
        """The model at a checkpoint or at initialisation, on this rank; the same object as long as that stays."""
        if self._checkpoint is None or self._checkpoint[0] != checkpoint:
            self._target = self._checkpoint = None  # the old model goes before the new one comes
            fresh = checkpoint == INITIALISATION
            model = self._fresh() if fresh else self.task.load(checkpoint, self.ranks)
            if self.sampling.gradient_checkpointing:
                checkpoint_layers(model)
            self._checkpoint = (checkpoint, model)
        return self._checkpoint[1]

    def _fresh(self) -> nn.Module:
        """The weights that the baseline of this run began from."""
        built, dtype = self.task.build(self.seed), self.task.compute_dtype
        return shard_model(built, self.ranks, self.device, compute_dtype=dtype).eval()

    def target(self, name: str) -> Target:
        """What the chains of a subject walk on, at w*; the one before is given up."""
        subject = self.by_name[name]
        model = self.model(subject.checkpoint)
        if self._target is not None:  # an earlier chain has moved it
            self._target.move_to(self._target.center)
        component = select_component(model, subject.component)
        losses: PerSampleLoss = self.task.losses
        layered, data = self.task.layered(model, component), self.task.train
        probe: Samples = self.probe.samples
        held_out: Samples | None = None if self.held_out is None else self.held_out.samples
        loss_weights: np.ndarray | None = None
        if subject.weights is not None:
            data, probe, loss_weights = self._weighted(subject), self._recorded(subject), self.loss_weights(name)
            held_out = held_out and self._plain(held_out)
            losses, layered = weighted_losses(losses), layered and WeightedLayers(layered)
        self._target = Target(
            model,
            replace(component, name=subject.stream),
            losses,
            data,
            probe,
            held_out=held_out,
            coefficients=None if self.held_out is None else self.held_out.coefficients,
            functions=tuple(_observable(o) for o in self.sampling.observables if isinstance(o, FunctionConfig)),
            num_component_losses=sum(isinstance(o, ComponentLossConfig) for o in self.sampling.observables),
            layered=layered,
            cache_bytes=self.sampling.cache_bytes,
            counted=self.counted,
            loss_weights=loss_weights,
            mean_counted=self.task.mean_counted,
            weight_decay=self.sampling.weight_decay,
            micro_batch_size=self.sampling.micro_batch_size,
            compute_dtype=self.task.compute_dtype,
            ranks=self.ranks,
        )
        return self._target

    def loss_weights(self, name: str) -> np.ndarray | None:
        """rho at the subject's strength over rho at strength 0, of the probe entries [sample(, position)].

        Scaled so that L_rho = sum rho_i l_i / sum rho_i on the probe is the mean of recorded losses times these. None
        where a table of the user's own is the probe, which has no weights.

        Raises:
            PatterningError: a weight falls below 0.
        """
        if self.probe.source is not self.task.train:
            return None
        subject = self.by_name[name]
        file = self.directory / str(subject.weights)
        rho, plain = (self.task.read_weights(file, s)[self.probe.ids].astype(float) for s in (subject.strength, 0.0))
        return np.divide(rho, plain, out=np.zeros_like(rho), where=plain > 0) * (plain.sum() / rho.sum())

    def _weighted(self, subject: Subject) -> Weighted:
        """The training samples with the weights of a subject."""
        assert subject.weights is not None
        train, table = self.task.train, self.directory / subject.weights
        rho = self.task.read_weights(table, subject.strength)
        samples = self.task.weighted_samples(table, subject.strength)
        return Weighted(samples, rho, self.task.counted(train, np.arange(len(train))))

    def _recorded(self, subject: Subject) -> Samples:
        """The probe as it is without h, so that chains of all strengths record the same losses."""
        if self.probe.source is not self.task.train:
            return self._plain(self.probe.samples)
        return Part(self._weighted(replace(subject, strength=0.0)), self.probe.ids)

    def _plain(self, samples: Samples) -> Plain:
        """Samples beside weighted ones."""
        return Plain(samples, self.task.num_positions is not None)

    def settings(self, name: str) -> ChainSettings:
        """How the chains of a subject walk."""
        subject, sampling = self.by_name[name], self.sampling
        resolved = sampling.resolve(subject.component, half_step=subject.half_step)
        return ChainSettings(
            posterior=self.posterior(name),
            step_size=resolved.step_size,
            batch_size=sampling.batch_size,
            burn_in=resolved.burn_in,
            num_draws=resolved.num_draws,
            steps_between_draws=resolved.steps_between_draws,
            seed=self.seed if subject.seed is None else subject.seed,
            sampler=Sampler(sampling.sampler.kind, sampling.sampler.model_dump(exclude={"kind"})),
            gradient=sampling.gradient,
            lanczos_steps=sampling.lanczos_steps,
        )

    def posterior(self, name: str) -> Posterior:
        """n_beta and gamma of a subject's chains."""
        resolved = self.sampling.resolve(self.by_name[name].component)
        return Posterior(resolved.inverse_temperature, resolved.localization)

    def chain(self, name: str, number: int, **changes: Any) -> Chain:
        """Chain ``number`` of a subject, at its first step; ``changes`` replace fields of its settings."""
        if changes:  # of a trial
            changes = {"lanczos_steps": 0} | changes
        settings, target, population = replace(self.settings(name), **changes), self.target(name), len(self.task.train)
        statistics: dict[str, Statistic] = {}
        if name in self.gradients_of and not changes:
            statistics[GRADIENTS] = PositionMeans(target)
        if name in self.positions_of and not changes:
            statistics[POSITIONS] = Positions(target, settings.num_draws, self.positions_of[name])
        if self.sampling.controlled and not changes:
            names, num_batches = self.observable_names, self.sampling.num_batches
            controls: list[tuple[int, Control]] = [(names.index(c.of), c.control) for c in self.sampling.controlled]
            statistics[CONTROLLED] = Controlled(
                target, settings, number, population=population, controls=controls, num_batches=num_batches
            )
        if self.thin is not None and self.ranks.rank == 0 and not changes:
            store = trace_store(self.directory, name)
            statistics["traces"] = TraceRecorder(store, number, self.thin, settings.num_draws)
        if not changes:
            statistics |= {s.name: load_function(s.path, "statistic")(target) for s in self.sampling.statistics}
        return Chain(target, settings, number, population=population, statistics=statistics)


def _observable(config: FunctionConfig) -> Callable[[nn.Module], Tensor]:
    """A function of the user's that says by its name where it hangs or raises."""
    function = load_function(config.path)

    def observable(model: nn.Module) -> Tensor:
        with inside(f"observable {', '.join(config.names)} ({config.path})"):
            return function(model)

    return observable
