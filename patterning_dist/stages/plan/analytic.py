"""A plan by arithmetic: for GPUs that need not be there, from config.json and the experiment file alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from patterning_dist.config import Config
from patterning_dist.runtime.environment import resolve_device
from patterning_dist.stages.plan.costs import Costs, chain_probe
from patterning_dist.stages.plan.draws import Needed, needed_draws
from patterning_dist.stages.plan.layout import Choice, choose_chains, choose_training, fitted, lines
from patterning_dist.stages.plan.machine import Machine, measure_flops
from patterning_dist.stages.plan.measured import Timed, solved_direction, walked
from patterning_dist.stages.plan.sampling import Chains, subject_counts
from patterning_dist.stages.plan.table import Plan, StagePlan, duration, in_order
from patterning_dist.stages.plan.training import Trainings, Trial, baseline_trial, retrain_trial
from patterning_dist.stages.plan.validate import validate_trial
from patterning_dist.stages.sample import open_subjects
from patterning_dist.stages.windows import trained_component
from patterning_dist.storage.run import RunDirectory


class Analytic:
    """In place of probes; see ``measured.Measured``.

    Args:
        config: of the run.
        workspace: a run directory to be written to.
        machine: that is planned for.
        directory: of the run, where earlier results may say how many draws are needed.
        pending: stages that are planned.

    Attributes:
        config: of the run, in a layout that fits, where there is one.
    """

    def __init__(
        self, config: Config, workspace: RunDirectory, machine: Machine, directory: Path, pending: set[str]
    ) -> None:
        self._workspace, self._directory = workspace, directory
        self._timed = Timed.of(config, open_subjects(config, workspace.location, "cpu"))
        task = self._timed.subjects.task
        if machine.flops is None and resolve_device(config.device) == "cuda":
            rate = measure_flops(task, config.sampling.micro_batch_size, "cuda", config.seed)
            machine = replace(machine, flops=rate, measured=True)
        self.machine = machine
        self._costs = Costs(config, self._timed.subjects, machine)
        self.choices = list(self._choose(config, pending))
        self.config = self._costs.config = fitted(config, self.choices, workspace.path)
        self._wanted: tuple[Needed, StagePlan, int] | None = None

    def _choose(self, config: Config, pending: set[str]) -> Iterator[Choice]:
        timed, costs, directory = self._timed, self._costs, self._workspace.path
        by_name = timed.subjects.by_name
        if wanted := timed.wanted(pending):
            walked = [trained_component(config)] if "predict" in pending else []
            components = [*(by_name[name].component for name in wanted), *walked]
            yield choose_chains(costs, list(dict.fromkeys(components)))
        if "train" in pending:
            yield choose_training(costs, "training", baseline_trial(config, directory))
        if "retrain" in pending:
            yield choose_training(costs, "retrain", retrain_trial(config, directory))
        if "validate" in pending and (trial := validate_trial(config, directory, timed.subjects.task)):
            yield choose_training(costs, "validation", trial, is_fixed=True)

    @property
    def has_times(self) -> bool:
        """Whether the rate is known."""
        return self.machine.flops is not None

    @property
    def unfit(self) -> frozenset[str]:
        """Stages that fit in no layout."""
        return frozenset(s for choice in self.choices if choice.chosen is None for s in _STAGES[choice.section])

    def trainings(self, trial: Trial) -> Trainings:
        """What trainings like a trial's take."""
        steps, job = self._costs.training_times(trial)
        return Trainings(self.config, steps, job)

    def chains(self, pending: set[str]) -> Chains:
        """What the sets of chains take; also those that reach the wanted standard error."""
        timed, config = self._timed, self.config
        window = walked(config) if pending & {"solve", "predict"} else None
        solved = timed.solved if solved_direction(config) is not None and "solve" in pending else None
        batch = None if window is None else window[1].training.batch_size
        probe = chain_probe(self._costs, timed.wanted(pending), timed.num_chains, solved, batch)
        found = Chains(config, timed.subjects, timed.counts, timed.standing_for, probe)
        if "sample" in pending:
            needed = needed_draws(config.calibration.standard_error, self._directory, timed.counts)
            self._wanted = needed, self._reaching(found, needed), len(timed.counts)
        return found

    def _reaching(self, chains: Chains, needed: Needed) -> StagePlan:
        """Stage sample with as many draws a component."""
        counts = {}
        for name, subject in chains.counts.items():
            draws = math.ceil(needed.num_draws / subject.num_chains)
            counts[name] = subject_counts(chains.subjects, name, num_draws=draws)
        return replace(chains, counts=counts).plan_sample()

    def plan(self, stages: list[str], found: dict[str, StagePlan], statistics: int, seconds: float) -> Plan:
        """All of it, with layouts and assumptions."""
        machine, sampling = self.machine, self.config.sampling
        notes = list(lines(self.choices, machine))
        analysis: dict[str, Any] = {"layouts": [choice.as_json() for choice in self.choices]}
        cluster = {"CPU": 0.0, "GPU": float(machine.num_gpus), "nodes": float(machine.num_nodes)}
        if machine.flops is None:
            notes.append(
                "no times: give --flops, what a GPU reaches in passes of the model [1/s]; it is measured where one is"
            )
        if self._wanted is not None:
            needed, plan, number = self._wanted
            hours = plan.seconds.value * plan.processes / 3600
            error = self.config.calibration.standard_error
            notes.append(
                f"chi to {error:g} of its spread (calibration.standard_error): {needed.num_draws:,.0f} draws for each "
                f"of {number:,} subjects, {hours:,.3g} GPU-hours, {duration(plan.seconds.value)} to "
                f"{duration(plan.seconds.high)} on {plan.processes} GPUs; {needed.source}"
            )
            analysis["wanted"] = {
                "standard_error": error, "num_draws": needed.num_draws, "source": needed.source, "num_subjects": number,
                "seconds": plan.seconds.value, "gpu_hours": hours,
            }  # fmt: skip
        analysis["assumptions"] = [*machine.assumptions, *_ASSUMPTIONS]
        notes += [f"assumed: {line}" for line in analysis["assumptions"]]
        plans = in_order(stages, found) if self.has_times else []
        return Plan(
            self.config.name, "cuda", plans, statistics, sampling.aggregator_shards, cluster, seconds, notes, analysis
        )


# Stages that hang on the layout of a section.
_STAGES = {
    "sampling": ("sample", "solve", "check", "predict", "validate"),
    "training": ("train",),
    "retrain": ("retrain",),
    "validation": ("validate",),
}
_ASSUMPTIONS = [
    "activations, logits and temporaries are those of the model's own code on samples of full length; what kernels of "
    "a GPU need besides is in the reserve",
    "DeepSpeed's buckets have their full size, and nothing is moved to the CPU; functions of your own take nothing",
    "conjugate gradients take all iterations that they may; chains do not fail; the solver is timed on this machine",
]
