"""Which layouts of chains and trainings fit GPUs of a size: how many ranks, which ZeRO stage."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patterning_dist.config import Config
from patterning_dist.stages.plan.costs import Costs
from patterning_dist.stages.plan.machine import Machine
from patterning_dist.stages.plan.table import size
from patterning_dist.stages.plan.training import Trial

_STAGES = range(4)


@dataclass(frozen=True)
class Option:
    """A layout, and the memory of its largest rank, by what it is for [B]."""

    num_ranks: int
    parts: dict[str, int]
    stage: int | None = None

    @property
    def num_bytes(self) -> int:
        """All together."""
        return sum(self.parts.values())

    @property
    def words(self) -> str:
        """4 ranks, ZeRO 2."""
        ranks = f"{self.num_ranks} rank{'s' * (self.num_ranks > 1)}"
        return ranks if self.stage is None else f"{ranks}, ZeRO {self.stage}"


@dataclass(frozen=True)
class Choice:
    """What was tried of one section of the experiment file.

    Attributes:
        section: sampling, training or retrain.
        what: it is of, in words.
        options: that of the file first, then as they are preferred.
        chosen: the first that fits; None: none does.
    """

    section: str
    what: str
    options: list[Option] = field(default_factory=list)
    chosen: Option | None = None

    @property
    def is_kept(self) -> bool:
        """Whether the file's own layout fits."""
        return self.chosen is self.options[0]

    @property
    def changes(self) -> list[str]:
        """What to set, as ``--set`` takes it; nothing where the file's layout fits."""
        if self.chosen is None or self.is_kept:
            return []
        if self.section == "sampling":
            return [f"sampling.ranks_per_chain={self.chosen.num_ranks}"]
        changed = [f"{self.section}.num_workers={self.chosen.num_ranks}"]
        changed = [] if self.chosen.num_ranks == self.options[0].num_ranks else changed
        if self.chosen.stage != self.options[0].stage:
            changed.append(f"{self.section}.deepspeed=configs/deepspeed/zero{self.chosen.stage}.json")
        return changed

    def as_json(self) -> dict[str, Any]:
        """All that was tried."""
        tried = [
            {"num_ranks": o.num_ranks, "zero_stage": o.stage, "bytes": o.num_bytes, "parts": o.parts}
            for o in self.options
        ]
        chosen = None if self.chosen is None else self.options.index(self.chosen)
        return {"section": self.section, "what": self.what, "tried": tried, "chosen": chosen, "set": self.changes}


def choose_chains(costs: Costs, components: Sequence[str]) -> Choice:
    """Ranks of a chain: those of the file, else the fewest that fit for every component."""
    configured = costs.config.sampling.ranks_per_chain

    def option(number: int) -> Option:
        of_each = [costs.chain_memory(component, number) for component in components]
        return Option(number, max(of_each, key=lambda parts: sum(parts.values())))

    numbers = dict.fromkeys([configured, *_numbers(costs.machine)])
    return _choose("sampling", "a chain", (option(number) for number in numbers), costs.machine)


def choose_training(costs: Costs, section: str, trial: Trial, *, is_fixed: bool = False) -> Choice:
    """Ranks and ZeRO stage of a training: those of the file, else the lowest stage at the fewest ranks that fits.

    ``is_fixed``: the section has no keys for them.
    """
    job = trial.jobs[0]
    own, training = costs.settings(job), job.training(costs.config)
    highest, accumulated = 0 if training.optimizer == "muon" else max(_STAGES), own["gradient_accumulation_steps"]
    layouts = {(job.num_workers, int(own["zero_optimization"].get("stage", 0))): None}
    for number in () if is_fixed or job.stack is not None else _numbers(costs.machine):
        if number >= job.num_workers and training.batch_size % (number * accumulated) == 0:
            layouts |= dict.fromkeys((number, s) for s in _STAGES if s <= highest and (number > 1 or s == 0))
    tried = (Option(n, costs.training_memory(trial, n, with_stage(own, s)), s) for n, s in layouts)
    return _choose(section, f"a training of section {section}", tried, costs.machine)


def _choose(section: str, what: str, options: Iterable[Option], machine: Machine) -> Choice:
    """The first that fits; the others are not looked at, for counting passes takes seconds."""
    tried: list[Option] = []
    for option in options:
        tried.append(option)
        if option.num_bytes <= machine.usable_bytes:
            return Choice(section, what, tried, option)
    return Choice(section, what, tried)


def with_stage(settings: dict[str, Any], stage: int) -> dict[str, Any]:
    """DeepSpeed settings at another ZeRO stage."""
    return {**settings, "zero_optimization": {**settings.get("zero_optimization", {}), "stage": stage}}


def fitted(config: Config, choices: list[Choice], folder: Path) -> Config:
    """The experiment in the chosen layouts; DeepSpeed files for them are written to ``folder``."""
    for choice in choices:
        if choice.chosen is None or choice.is_kept:
            continue
        if choice.section == "sampling":
            update: dict[str, Any] = {"ranks_per_chain": choice.chosen.num_ranks}
        else:
            path = getattr(config, choice.section).deepspeed
            own = {} if path is None else json.loads(path.read_text())
            file = folder / f"zero-{choice.section}.json"
            file.write_text(json.dumps(with_stage(own, choice.chosen.stage or 0)))
            update = {"num_workers": choice.chosen.num_ranks, "deepspeed": file}
        config = config.model_copy(update={choice.section: getattr(config, choice.section).model_copy(update=update)})
    return config


def lines(choices: list[Choice], machine: Machine) -> Iterator[str]:
    """What was tried and what is proposed, in words."""
    for choice in choices:
        tried = []
        for option in choice.options:
            fits = "" if option.num_bytes <= machine.usable_bytes else ", too much"
            tried.append(f"{option.words}: {size(option.num_bytes)}{fits}")
        yield f"memory of a rank of {choice.what}: {'; '.join(tried)}"
        shown = choice.chosen or choice.options[-1]
        parts = ", ".join(f"{name} {size(amount)}" for name, amount in shown.parts.items() if amount)
        yield f"  {shown.words}: {parts}"
    changes = [change for choice in choices for change in choice.changes]
    if any(choice.chosen is None for choice in choices):
        yield (
            "does not fit: "
            + " and ".join(choice.what for choice in choices if choice.chosen is None)
            + "; lower sampling.micro_batch_size, training.batch_size or data.context_length, or take larger GPUs"
        )
    elif changes:
        yield f"proposed: {' '.join(f'--set {change}' for change in changes)}"
    else:
        yield "fits as it is"


def _numbers(machine: Machine) -> list[int]:
    """Ranks that are tried: divisors of a node's GPUs, and whole nodes."""
    whole = [machine.gpus_per_node * n for n in range(2, machine.num_nodes + 1) if machine.num_nodes % n == 0]
    return [n for n in range(1, machine.gpus_per_node + 1) if machine.gpus_per_node % n == 0] + whole
