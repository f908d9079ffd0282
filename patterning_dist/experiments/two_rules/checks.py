"""What one section of the parentheses experiment asks of another; see checks.py."""

from __future__ import annotations

from collections.abc import Iterator

from patterning_dist.config.checks import chains, observable_names
from patterning_dist.config.sampling import SamplingConfig
from patterning_dist.experiments.two_rules.config import ParenthesesConfig

# What the experiment needs of every set of chains: all weights free, and the loss with what follows from it.
_COMPONENTS = ["everything"]
_OBSERVABLES = ["component_loss", "llc", "free_energy"]
_FIXED = {
    "ranks_per_chain": "a bracket classifier takes one process",
    "compute_dtype": "a bracket classifier is sampled in float32",
    "probe_sequences": "the losses of all training strings are recorded",
    "evaluation_sequences": "there are no split losses here",
    "extrapolate": "its stages read the chains of one step size",
}


def check_parentheses(config: ParenthesesConfig) -> list[str]:
    """Every broken rule, one line each; an empty list if the experiment can be run."""
    rules = (_task, _model, _training, _references, _sampling, _online, _arms, _check)
    return [line for rule in rules for line in rule(config)]


def _task(config: ParenthesesConfig) -> Iterator[str]:
    if config.task.unequal == "stratified" and config.task.min_length < 4:
        yield "task.min_length: stratified strings need at least 4 brackets to break nesting late; raise it"


def _model(config: ParenthesesConfig) -> Iterator[str]:
    if config.model.width % config.model.num_heads:
        yield f"model.num_heads: {config.model.num_heads} heads do not divide the width {config.model.width}"


def _training(config: ParenthesesConfig) -> Iterator[str]:
    if config.training.warmup_steps >= config.training.num_steps:
        yield f"training.warmup_steps: must be below training.num_steps = {config.training.num_steps}"


def _references(config: ParenthesesConfig) -> Iterator[str]:
    references, further = config.references, config.check.per_rule
    if 2 * (references.per_rule + further) > references.num_seeds:
        yield (
            f"references.per_rule: {references.per_rule} networks of each rule, and check.per_rule = {further} further "
            f"ones, out of {references.num_seeds}; raise references.num_seeds"
        )
    if references.equal_count_below >= references.nested_above:
        yield "references.equal_count_below: must be below references.nested_above"


def _sampling(config: ParenthesesConfig) -> Iterator[str]:
    sampling = config.sampling
    if [component.name for component in sampling.components] != _COMPONENTS:
        yield "sampling.components: the experiment samples all weights; expected [{name: everything}]"
    if [observable.kind for observable in sampling.observables] != _OBSERVABLES:
        yield f"sampling.observables: expected one each of the kinds {', '.join(_OBSERVABLES)}, in this order"
    for key, why in _FIXED.items():
        if getattr(sampling, key) != SamplingConfig.model_fields[key].default:
            yield f"sampling.{key}: {why}; remove it"
    if sampling.probe is not None:
        yield "sampling.probe: the losses of all training strings are recorded; remove it"
    yield from observable_names(sampling)
    yield from chains(sampling)


def _online(config: ParenthesesConfig) -> Iterator[str]:
    if 2 * config.online.per_rule > config.online.num_seeds:
        yield (
            f"online.per_rule: {config.online.per_rule} networks at either end of {config.online.num_seeds}; "
            "raise online.num_seeds"
        )


def _arms(config: ParenthesesConfig) -> Iterator[str]:
    if config.arms.num_control_seeds > config.arms.num_seeds:
        yield f"arms.num_control_seeds: at most arms.num_seeds = {config.arms.num_seeds}: arms share their seeds"


def _check(config: ParenthesesConfig) -> Iterator[str]:
    if 0 in config.check.strengths or len(set(config.check.strengths)) != len(config.check.strengths):
        yield "check.strengths: expected different numbers, none of them 0: that one is measured anyway"
    if max(map(abs, config.check.strengths)) > 1:
        yield "check.strengths: expected numbers from -1 to 1: beyond the full weights some may fall below 0"
