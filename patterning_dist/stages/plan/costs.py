"""What a probe would measure, from arithmetic instead: no weights, no Ray, no GPU.

Passes are counted on the model's own code (``sampling.footprint``), memory follows from sizes (``memory``), and times
from FLOPs at a rate that was given or measured (``machine``). What comes out has the shape of the probe's results.
"""

from __future__ import annotations

import math
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patterning_dist.config import Config, SplitLossConfig
from patterning_dist.config.deepspeed import deepspeed_config
from patterning_dist.measure.subjects import Subjects
from patterning_dist.models.components import Component, select_component
from patterning_dist.models.passes import logits_in_float32
from patterning_dist.response.cost import NOTHING
from patterning_dist.runtime.pool import PREPARED
from patterning_dist.runtime.probe.chains import ChainProbe, ChainTimes, SolveTimes, WindowTimes
from patterning_dist.runtime.probe.training import JobTimes, StepTimes
from patterning_dist.runtime.resources import sampling_resources
from patterning_dist.sampling.footprint import Footprint, Weightless
from patterning_dist.sampling.samples import Batch
from patterning_dist.sampling.shard import checkpoint_layers
from patterning_dist.stages.plan.machine import DISK_BANDWIDTH, LAUNCH, MEMORY_BANDWIDTH, STARTING, Machine, seconds
from patterning_dist.stages.plan.memory import Sizes, cache_memory, chain_memory, training_memory
from patterning_dist.stages.plan.training import Trial
from patterning_dist.stages.windows import trained_component
from patterning_dist.tasks import language_metrics, sequences
from patterning_dist.tasks.language import LanguageTask
from patterning_dist.tasks.sequences import SequenceTask
from patterning_dist.training.job import TrainingJob

_FLOAT = 4  # bytes
# Bytes that a step of a sampler, its noise and its temperatures read and write of a free coordinate, and kernels a
# piece; of the optimizer.
_STEP_BYTES, _STEP_KERNELS, _OPTIMIZER_BYTES = 160, 40, 64


class Costs:
    """Passes and sizes of a model, each counted once.

    Args:
        config: of the run.
        subjects: opened here; the model's weights are not read.
        machine: that is planned for.
    """

    def __init__(self, config: Config, subjects: Subjects, machine: Machine) -> None:
        self.config, self.subjects, self.machine, self.task = config, subjects, machine, subjects.task

    @cached_property
    def sizes(self) -> Sizes:
        """Of the model."""
        return Sizes.of(self._skeleton)

    @cached_property
    def _skeleton(self) -> nn.Module:
        return self.task.skeleton()

    @cache  # noqa: B019
    def component(self, name: str) -> Component:
        """A component by its name."""
        return select_component(self._skeleton, name)

    @cache  # noqa: B019 - lives as long as the plan
    def _model(self, again: bool, narrow: bool) -> Weightless:
        """Without memory; layers computed ``again`` in the backward pass; all in 16 bits if ``narrow``."""
        model: Any = self.task.skeleton()
        if hasattr(model, "get_output_embeddings"):  # as its loader has it
            logits_in_float32(model)
        if again:
            checkpoint_layers(model)
        if narrow:
            model.to(torch.bfloat16)
        return Weightless(model, self.task.losses, None if narrow else self.task.compute_dtype)

    def _batch(self, num_samples: int) -> Batch:
        return self.task.train[torch.from_numpy(np.arange(num_samples) % len(self.task.train))]

    def _at_once(self, num_ranks: int) -> int:
        """Samples of one pass of a chain on a rank."""
        sampling = self.config.sampling
        return min(sampling.micro_batch_size, -(-sampling.batch_size // num_ranks))

    def _again(self, num_ranks: int) -> bool:
        sharded = num_ranks > 1 and self.task.compute_dtype not in (None, torch.float32)
        return sharded or self.config.sampling.gradient_checkpointing

    @cache  # noqa: B019
    def _gradient(self, component: str, num_samples: int, again: bool) -> Footprint:
        moving = set(self.component(component).parameters)
        return self._model(again, False).gradient(self._batch(num_samples), moving)

    def gradient(self, component: str, num_ranks: int) -> Footprint:
        """Of one micro-batch of a chain, towards a component."""
        return self._gradient(component, self._at_once(num_ranks), self._again(num_ranks))

    @cache  # noqa: B019
    def product(self, component: str) -> Footprint:
        """Of a Hessian on one micro-batch, on one rank."""
        moving = set(self.component(component).parameters)
        return self._model(False, False).hessian_product(self._batch(self._at_once(1)), moving)

    @cache  # noqa: B019
    def forward(self, num_ranks: int) -> Footprint:
        """Of one micro-batch, without gradients."""
        return self._model(False, False).forward(self._batch(self._at_once(num_ranks)))

    def chain_memory(self, component: str, num_ranks: int) -> dict[str, int]:
        """Of a rank, by what it is for; with curvature where the experiment takes any of this component.

        The cache of what does not move with it is the most that it may take.
        """
        passes, product = self.gradient(component, num_ranks), None
        if self._is_curved(component):
            product = self.product(component) if num_ranks == 1 else passes
        found = chain_memory(self.sizes, self.component(component), self.config.sampling, num_ranks, passes, product)
        task, limit = self.task, self.config.sampling.cache_bytes
        if num_ranks > 1 or not isinstance(task, LanguageTask) or task.compute_dtype not in (None, torch.float32):
            return found
        held_out = 0 if self.subjects.held_out is None else len(self.subjects.held_out.samples)
        number = len(self.subjects.probe.ids) + held_out + PREPARED
        return found | {"cache": cache_memory(self.sizes, task.vocabulary_size, task.num_positions, number, limit)}

    def _is_curved(self, component: str) -> bool:
        """Whether Hessian products of a component are taken."""
        config, names = self.config, set[str]()
        if config.solve is not None and config.response.direction is not None:
            names.add(config.response.direction.component)
        if config.validation is not None:
            names.add(config.validation.component)
        if config.predict is not None:
            names.add(trained_component(config))
        return config.sampling.lanczos_steps > 0 or component in names

    def training_memory(self, trial: Trial, num_workers: int, settings: dict[str, Any]) -> dict[str, int]:
        """Of a rank of a training, by what it is for; a stack of networks has all of it as often."""
        job = trial.jobs[0]
        optimizer = job.training(self.config).optimizer
        passes = self.training_passes(job, num_workers, settings)
        evaluation = self._evaluation(num_workers, _is_narrow(settings))
        peak = Footprint(max(passes.peak_bytes, evaluation.peak_bytes), passes.flops, passes.num_operations)
        found = training_memory(self.sizes.num_parameters, settings, num_workers, optimizer != "sgd", peak)
        return {name: len(trial.jobs) * amount for name, amount in found.items()}

    def training_passes(self, job: TrainingJob, num_workers: int, settings: dict[str, Any]) -> Footprint:
        """Forward and backward of one micro-batch of a training."""
        size = max(
            1, -(-job.training(self.config).batch_size // num_workers) // settings["gradient_accumulation_steps"]
        )
        again = job.training(self.config).gradient_checkpointing
        return self._training_passes(size, again, _is_narrow(settings))

    @cache  # noqa: B019
    def _training_passes(self, num_samples: int, again: bool, narrow: bool) -> Footprint:
        return self._model(again, narrow).gradient(self._batch(num_samples), set(self.sizes.shapes))

    @cache  # noqa: B019
    def _evaluation(self, num_workers: int, narrow: bool) -> Footprint:
        """Of one pass of the metrics of a training, attention patterns of language models included."""
        task, model, batch = self.task, self._model(False, narrow), self._batch(self._evaluated_at_once(num_workers))
        if not isinstance(task, LanguageTask):
            return model.forward(batch)
        patterns = model.counted(batch, lambda module, samples: _patterns(task, module, samples))
        return max(model.forward(batch), patterns, key=lambda cost: cost.peak_bytes)

    def _evaluated_at_once(self, num_workers: int) -> int:
        """Samples of one pass of the metrics on a rank."""
        size = self.config.sampling.micro_batch_size
        if isinstance(self.task, LanguageTask):
            size = language_metrics.EVALUATION_BATCH
        elif isinstance(self.task, SequenceTask):
            size = sequences.EVALUATION_BATCH
        return max(1, min(size, -(-self._num_evaluated // num_workers)))

    @property
    def _num_evaluated(self) -> int:
        training = self.config.training
        each = training.evaluation_sequences if training is not None else self.config.sampling.evaluation_sequences
        return sum(min(each, len(samples)) for samples in self.task.held_out.values())

    def settings(self, job: TrainingJob) -> dict[str, Any]:
        """DeepSpeed's, as a training resolves them."""
        return deepspeed_config(job.deepspeed, job.training(self.config).batch_size, job.num_workers)

    # Times

    def _passes(self, cost: Footprint, num_samples: int, num_ranks: int, exchanged: int) -> float:
        """Seconds of passes over samples that ranks share; parameters are put together ``exchanged`` times a pass."""
        passes = math.ceil(math.ceil(num_samples / num_ranks) / self._at_once(num_ranks))
        moved = self.machine.exchange(_FLOAT * self.sizes.num_parameters, num_ranks) * exchanged
        return passes * (self.machine.passes(cost) + moved)

    def chain_times(self, component: str, takes_gradients: bool) -> ChainTimes:
        """Of the chains of a component, with ``sampling.ranks_per_chain`` ranks each."""
        sampling, subjects, number = self.config.sampling, self.subjects, self.config.sampling.ranks_per_chain
        found, memory = self.component(component), self.chain_memory(component, number)
        gradient, forward = self.gradient(component, number), self.forward(number)
        held_out = 0 if subjects.held_out is None else len(subjects.held_out.samples)
        step = self._passes(gradient, sampling.batch_size, number, 3) * (
            2 if sampling.gradient == "control_variate" else 1
        )
        everything = self._passes(gradient, len(self.task.train), number, 3)
        step = everything if sampling.gradient == "full" else step
        free = found.num_coordinates / number
        step += free * _STEP_BYTES / MEMORY_BANDWIDTH + _STEP_KERNELS * len(found.pieces) * LAUNCH
        draw = self._passes(forward, len(subjects.probe.ids), number, 1) + self._passes(forward, held_out, number, 1)
        opening = self._opening + draw
        opening += everything if sampling.gradient == "control_variate" else 0.0
        if sampling.lanczos_steps:
            opening += sampling.lanczos_steps * self._product_seconds(component, 64)
        splits = sum(isinstance(o, SplitLossConfig) for o in sampling.observables)
        gradients = splits * self._passes(gradient, held_out, number, 3) if takes_gradients else 0.0
        return ChainTimes(
            seconds(opening), seconds(step), seconds(draw), seconds(gradients), found.num_coordinates,
            memory["weights"], memory["gradient"], memory["sampler"], memory["passes"],
        )  # fmt: skip

    @property
    def _opening(self) -> float:
        """Seconds of reading the weights, in full by every rank: files may lie behind one link."""
        return _FLOAT * self.sizes.num_parameters / DISK_BANDWIDTH

    def _product_seconds(self, component: str, num_samples: int) -> float:
        number = self.config.sampling.ranks_per_chain
        if number == 1:
            return self._passes(self.product(component), num_samples, 1, 0)
        return 2 * self._passes(self.gradient(component, number), num_samples, number, 3)

    def solve_times(self, component: str) -> SolveTimes:
        """Of the response-direction estimator; conjugate gradients take all that they may."""
        settings, number = self.config.response.direction, self.config.sampling.ranks_per_chain
        assert settings is not None
        along = 2 * self._passes(self.forward(number), 256, number, 1) / 256
        return SolveTimes(
            seconds(self._opening),
            seconds(self._product_seconds(component, settings.hessian_sequences)),
            max(settings.conjugate_gradient_iterations, 1),
            NOTHING,
            seconds(along),
        )

    def window_times(self, batch_size: int) -> WindowTimes:
        """Of walks of windows, in which all that is trained moves."""
        config, number, moved = self.config, self.config.sampling.ranks_per_chain, trained_component(self.config)
        assert config.predict is not None
        gradient = self._passes(self.gradient(moved, number), batch_size, number, 3)
        held_out = 0 if self.subjects.held_out is None else len(self.subjects.held_out.samples)
        evaluated = self._passes(self.forward(number), held_out + self._num_evaluated, number, 1)
        product = self._product_seconds(moved, config.predict.curvature_sequences)
        return WindowTimes(seconds(self._opening), seconds(gradient), seconds(product), seconds(evaluated))

    def training_times(self, trial: Trial) -> tuple[StepTimes, JobTimes]:
        """Of trainings like a trial's, as many side by side as fit."""
        job, networks = trial.jobs[0], len(trial.jobs)
        training, workers, settings = job.training(self.config), job.num_workers, self.settings(job)
        stage, machine = int(settings["zero_optimization"].get("stage", 0)), self.machine
        weights = _FLOAT * self.sizes.num_parameters
        memory, passes = self.training_memory(trial, workers, settings), self.training_passes(job, workers, settings)
        optimizer = _OPTIMIZER_BYTES / _FLOAT * weights / (workers if stage else 1) / MEMORY_BANDWIDTH
        accumulated = settings["gradient_accumulation_steps"]

        def step(batch_size: int) -> float:
            scale = batch_size / training.batch_size
            moved = machine.exchange(weights, workers) * (3 * accumulated if stage == 3 else 2 if stage == 0 else 3)
            return networks * (machine.passes(passes, accumulated * scale) + moved + optimizer)

        evaluation = self._evaluation(workers, _is_narrow(settings))
        each = machine.passes(evaluation) + machine.exchange(weights, workers) * (stage == 3)
        num_evaluated = self._num_evaluated
        if isinstance(self.task, LanguageTask):  # repeated tokens, their attention, and without some heads
            num_evaluated += (2 + 1 + language_metrics.NUM_OTHERS) * language_metrics.NUM_REPEATED
        row = networks * each * -(-num_evaluated // (workers * self._evaluated_at_once(workers)))
        num_held_out = self.config.sampling.evaluation_sequences * len(self.task.held_out)
        held_out = networks * self._passes(self.forward(1), num_held_out, 1, 0)
        writing = networks * 2 * weights / DISK_BANDWIDTH
        times = JobTimes(
            starting=seconds(STARTING),
            opening=seconds(self._opening + row),
            step=seconds(step(training.batch_size)),
            anneal_step=seconds(step(training.anneal_batch_size)),
            closing=seconds(row + held_out + writing),
            stopping=NOTHING,
        )
        queues = min(trial.number, trial.concurrent or trial.number, max(1, machine.num_gpus // workers))
        activations = memory["passes"] + memory["buffers"]
        steps = StepTimes(
            queues, times.step, seconds(row), memory["weights"], memory["optimizer"], activations, sum(memory.values())
        )
        return steps, times


def chain_probe(
    costs: Costs, subjects: dict[str, bool], num_tasks: int, solved: str | None, walked_batch: int | None
) -> ChainProbe:
    """What ``runtime.probe.chains.probe_chains`` would measure.

    Args:
        costs: of the model.
        subjects: sets of chains, and whether gradients are taken at every draw of them.
        num_tasks: chains of the whole run.
        solved: subject whose response directions are solved for; None: none are.
        walked_batch: samples of a gradient of the windows that are walked; None: none is.

    Raises:
        PatterningError: the nodes cannot hold one chain.
    """
    sampling, machine, by_name = costs.config.sampling, costs.machine, costs.subjects.by_name
    need = sampling_resources(sampling, "cuda", sampling.ranks_per_chain)
    number = need.at_once(num_tasks, sampling.workers, machine.nodes).number
    found = {name: costs.chain_times(by_name[name].component, gradients) for name, gradients in subjects.items()}
    memory = [sum(costs.chain_memory(by_name[name].component, sampling.ranks_per_chain).values()) for name in subjects]
    return ChainProbe(
        number,
        seconds(STARTING),
        found,
        None if solved is None else costs.solve_times(by_name[solved].component),
        None if walked_batch is None else costs.window_times(walked_batch),
        max(memory, default=0),
    )


def _is_narrow(settings: dict[str, Any]) -> bool:
    return any(settings.get(kind, {}).get("enabled") for kind in ("bf16", "fp16"))


def _patterns(task: LanguageTask, model: nn.Module, batch: Any) -> list[Tensor]:
    tokens = batch if isinstance(batch, Tensor) else batch["tokens"]
    return task.model.patterns(model, tokens[:, :-1])
