"""What one section of a study asks of another; see checks.py."""

from __future__ import annotations

from collections.abc import Iterator

from patterning_dist.config.checks import calibrated_component, chains, observable_names, repeated_components
from patterning_dist.config.sampling import ComponentLossConfig, SplitLossConfig
from patterning_dist.config.study import StudyConfig, TokensConfig


def check_study(config: StudyConfig) -> list[str]:
    """Every broken rule, one line each; an empty list if the study can be run."""
    rules = (_sampling, _splits, _posterior_quantities, _checkpoints, _calibration)
    return list(dict.fromkeys(line for rule in rules for line in rule(config)))


def _sampling(config: StudyConfig) -> Iterator[str]:
    yield from repeated_components(config.sampling)
    yield from observable_names(config.sampling)
    yield from chains(config.sampling)
    if config.sampling.probe is not None and not isinstance(config.data, TokensConfig):
        yield "sampling.probe: a table of tokens is for data of kind tokens; remove it"


def _splits(config: StudyConfig) -> Iterator[str]:
    for index, observable in enumerate(config.sampling.observables):
        if not isinstance(observable, SplitLossConfig):
            continue
        key, split = f"sampling.observables.{index}.split", observable.split
        if split != "overall" and not split.startswith("domain:"):
            yield f"{key}: '{split}' is for `patterning run`; a study has overall and domain:<name of a held-out set>"
        elif isinstance(config.data, TokensConfig):  # samples of the user's own name their domains once loaded
            there = config.data.held_out
            if not there:
                yield f"{key}: there is no held-out data; add data.held_out"
            elif split != "overall" and split.removeprefix("domain:") not in there:
                yield f"{key}: data.held_out has no '{split.removeprefix('domain:')}'; there are {', '.join(there)}"


def _posterior_quantities(config: StudyConfig) -> Iterator[str]:
    if not any(isinstance(o, ComponentLossConfig) for o in config.sampling.observables):
        for quantity in config.sampling.posterior_quantities:
            yield (
                f"sampling.observables: '{quantity.name}' of kind {quantity.kind} follows from the loss on the probe; "
                "add {kind: component_loss, name: component}"
            )


def _checkpoints(config: StudyConfig) -> Iterator[str]:
    names = config.model.checkpoints
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"model.checkpoints: '{name}' is listed twice; remove one"


def _calibration(config: StudyConfig) -> Iterator[str]:
    calibration = config.calibration
    yield from calibrated_component(calibration, config.sampling)
    if calibration.checkpoint not in (None, *config.model.checkpoints):
        there = ", ".join(config.model.checkpoints)
        yield f"calibration.checkpoint: '{calibration.checkpoint}' is not in model.checkpoints; there are {there}"
