"""Rules on weights and what is made of them: sections solve, check, predict and retrain; see ``checks``."""

from __future__ import annotations

from collections.abc import Iterator

from patterning_dist.config.checkpoints import INITIALISATION
from patterning_dist.config.control_checks import without_key
from patterning_dist.config.data import LabelledConfig, PairsConfig, TextConfig, TokensConfig
from patterning_dist.config.deepspeed import deepspeed_faults
from patterning_dist.config.faults import divides, listed, repeated
from patterning_dist.config.response import Level, SolveConfig
from patterning_dist.config.schema import Config
from patterning_dist.config.training import SOLVED, Arm
from patterning_dist.config.window import without_window

_LEVELS: dict[type, tuple[Level, ...]] = {PairsConfig: ("pair",), LabelledConfig: ("sequence",)}


def _solve(config: Config) -> Iterator[str]:
    solve, names = config.solve, config.sampling.observable_names
    if solve is None:
        return
    quantities = config.sampling.posterior_quantities
    energies = [quantity.name for quantity in quantities if quantity.kind == "free_energy"]
    if solve.scores == "plain":
        names = [*names, *(quantity.name for quantity in quantities)]
    if solve.scores == "first_moment":
        names = energies
        if len(solve.targets) != 1:
            yield "solve.targets: scores first_moment are of one observable of kind free_energy; name it alone"
    if len(config.checkpoints) > 1 and solve.checkpoint is None:
        yield f"solve.checkpoint: several checkpoints are sampled; name one of {listed(config.checkpoints)}"
    elif solve.checkpoint not in (None, *config.checkpoints):
        yield f"solve.checkpoint: '{solve.checkpoint}' is not sampled; expected one of {listed(config.checkpoints)}"
    for name in solve.targets:
        if name not in names:
            kind = " of kind free_energy" if solve.scores == "first_moment" else ""
            there = listed(names) or "none"
            yield f"solve.targets.{name}: no such observable{kind}; sampling.observables has {there}"
    splits = [o.name for o in config.sampling.observables if o.kind == "split_loss"]
    if solve.scores == "response_direction":
        for name in solve.targets:
            if name in names and name not in splits:
                yield (
                    f"solve.targets.{name}: the response direction needs an observable with a gradient, a split_loss "
                    f"({listed(splits)}); choose one, or solve.scores: regression"
                )
    if solve.method != "mode" and not any(solve.targets.values()):
        yield "solve.targets: no change is asked for; give an observable a number other than 0"
    for method, key in (("ridge", "ridge"), ("truncated", "rank"), ("mode", "mode")):
        if (solve.method == method) != (getattr(solve, key) is not None):
            verb = "needs" if solve.method == method else "takes no"
            yield f"solve.{key}: method {solve.method} {verb} {key}; set one or the other right"
    if solve.mode is not None and solve.mode >= config.response.num_modes:
        num_modes = config.response.num_modes
        yield f"solve.mode: expected less than response.num_modes = {num_modes}, got {solve.mode}"
    if (solve.strength is None) == (solve.effective_sample_share is None):
        yield "solve.strength: expected exactly one of strength and effective_sample_share"
    direction = config.response.direction
    if solve.scores == "response_direction" and direction is None:
        yield "response.direction: is missing, and solve.scores response_direction needs it; add {component: ...}"
    elif direction is not None and solve.scores == "response_direction" and solve.component != direction.component:
        yield (
            f"solve.component: scores response_direction are those of response.direction.component = "
            f"'{direction.component}'; name the same component in both"
        )
    if solve.scores == "regression" and not isinstance(config.data, TextConfig | TokensConfig):
        yield "solve.scores: regression is on features of tokens, and this experiment has none; choose another"
    if solve.keep_mass is not None:
        yield from without_key(config.data, "solve.keep_mass", solve.keep_mass)
    yield from _level(config, solve)


def _level(config: Config, solve: SolveConfig) -> Iterator[str]:
    """Units that the samples do not have, or that what is kept within tokens would cut through."""
    levels = _LEVELS.get(type(config.data), ("token", "sequence", "document"))
    if solve.level is not None and solve.level not in levels:
        yield f"solve.level: samples here have no '{solve.level}'; expected one of {listed(levels)}"
    if solve.level in (None, "token") or "token" not in levels:
        return
    if solve.keep_mass == "token":
        yield f"solve.keep_mass: a {solve.level} has one weight, so that no token keeps its mass; choose domain"
    for control in solve.controls:
        if control.kind == "permuted" and control.within == "token":
            yield f"solve.controls: {control.name} is within each token, and a {solve.level} has one weight; remove it"


def _cost(config: Config) -> Iterator[str]:
    """What a cost that is to be held by the prediction of a window lacks."""
    solve, retrain = config.solve, config.retrain
    if solve is None or solve.max_cost is None:
        return
    if config.predict is None or retrain is None or config.training is None:
        yield "solve.max_cost: is held by what is predicted of the retrainings; add predict and retrain, or remove it"
        return
    if not any(o.kind == "split_loss" and o.split == "overall" for o in config.sampling.observables):
        yield (
            "solve.max_cost: is in nats of the overall loss; add {kind: split_loss, name: overall, split: overall} to "
            "sampling.observables"
        )
    solved = [arm for arm in retrain.arm_list if isinstance(arm.weights, str)]
    for arm in solved:
        if (reason := without_window(config, arm)) is not None:
            yield f"solve.max_cost: arm {arm.name} has no window, for {reason}; remove the key or change the arm"
    if len({(arm.start, repr(arm.window)) for arm in solved}) != 1:
        yield "solve.max_cost: expected arms with solved weights of one start and one window; give them the same"


def _check(config: Config) -> Iterator[str]:
    if config.check is None:
        return
    if config.solve is None:
        yield "check: there are no weights to check; add solve, or remove check"
    else:
        lowest, largest = min(config.check.strengths), config.solve.weight_max
        if lowest * (largest - 1) < -1:
            yield (
                f"check.strengths: {lowest:g} takes weights below 0 where they may be as large as solve.weight_max = "
                f"{largest:g}; expected at least {-1 / (largest - 1):.3g}, with {1 / (largest - 1):.3g} beside it for "
                "the slope at 0"
            )
        highest, smallest = max(config.check.strengths), config.solve.weight_min
        if highest * (1 - smallest) > 1:
            yield (
                f"check.strengths: {highest:g} takes weights below 0 where they may be as small as solve.weight_min = "
                f"{smallest:g}; expected at most {1 / (1 - smallest):.3g}"
            )
    if config.sampling.probe is not None:
        yield "check: weights are of training samples, and sampling.probe is another table; remove one of the two"
    if 0 in config.check.strengths or repeated(config.check.strengths):
        yield "check.strengths: expected different numbers, none of them 0: that one is measured anyway"


def _predict(config: Config) -> Iterator[str]:
    if config.predict is None:
        return
    if config.retrain is None:
        yield "predict: there are no trainings to predict; add retrain, or remove predict"
    if not any(observable.kind == "split_loss" for observable in config.sampling.observables):
        yield "predict: is about split losses, and sampling.observables has none; add one, or remove predict"


def _retrain(config: Config) -> Iterator[str]:
    retrain = config.retrain
    if retrain is None:
        return
    arms = retrain.arm_list
    for name in repeated([arm.name for arm in arms]):
        yield f"retrain.arms: {name} is listed twice; remove one"
    starts = [INITIALISATION, *config.checkpoints]
    for arm in arms:
        if isinstance(arm.weights, str):
            yield from _arm_weights(config, arm)
        if arm.start not in starts:
            yield f"retrain.start: '{arm.start}' of arm {arm.name} is no checkpoint; expected one of {listed(starts)}"
        if arm.window is not None:
            yield from (f"retrain.arms: {arm.name} has a window{fault}" for fault in _window(arm))
        if arm.rounds > 1:
            yield from (f"retrain.arms: {arm.name} has {arm.rounds} rounds{fault}" for fault in _rounds(config, arm))
        for seed in repeated(arm.seeds):
            yield f"retrain.seeds: {seed} is listed twice; remove one"
        if any(seed < 0 for seed in arm.seeds):
            yield f"retrain.seeds: expected numbers from 0 up, got {min(arm.seeds)}"
    if config.training is not None:
        batch = config.training.batch_size
        yield from divides("training.batch_size", batch, "retrain.num_workers", retrain.num_workers)
        retraining = config.training.model_copy(update={"anneal_steps": 0})
        yield from deepspeed_faults("retrain.deepspeed", retrain.deepspeed, retraining, retrain.num_workers)
    if retrain.engine == "stacked" and (retrain.num_workers > 1 or retrain.deepspeed is not None):
        key = "num_workers" if retrain.num_workers > 1 else "deepspeed"
        yield (
            f"retrain.{key}: a stack of networks is trained in one process, without ZeRO; remove it, or set "
            "retrain.engine to deepspeed"
        )


def _window(arm: Arm) -> Iterator[str]:
    """What is wrong with an arm that goes on from a checkpoint by an optimizer of its own."""
    if arm.start == INITIALISATION:
        yield " and no checkpoint to go on from; set its start to one (baseline)"
    if arm.rounds > 1:
        yield " and rounds, which share out retrain.num_steps; remove one of the two"


def _arm_weights(config: Config, arm: Arm) -> Iterator[str]:
    """Whether stage solve writes the weights that an arm names."""
    if config.solve is None:
        yield f"retrain.arms: {arm.name} takes the weights of stage solve, and there is no section solve; add it"
        return
    names = [*SOLVED, *(control.name for control in config.solve.controls)]
    if arm.weights not in names:
        yield (
            f"retrain.arms: stage solve writes no weights '{arm.weights}' for {arm.name}; expected one of "
            f"{listed(names)}, or the path of a table, with a dot or a slash in it"
        )


def _rounds(config: Config, arm: Arm) -> Iterator[str]:
    """What is wrong with an arm whose weights are solved for again on the way."""
    retrain, solve = config.retrain, config.solve
    assert retrain is not None
    if arm.rounds > retrain.num_steps:
        yield f", more than retrain.num_steps = {retrain.num_steps}; lower its rounds"
    if arm.weights not in ("plus", "minus"):
        yield ", and it is the weights of plus or minus that are solved for again; set its weights to one of them"
    if arm.weighted_share != 1:
        yield ", and chains are run on the weighted loss that every round ends on; remove its weighted_share"
    if solve is None:
        return
    if solve.scores not in ("response_direction", "first_moment"):
        yield (
            f", and between rounds response directions or first moments are solved for, not scores of kind "
            f"{solve.scores}; set solve.scores to response_direction or first_moment"
        )
    if solve.scores == "first_moment" and solve.draws != "antithetic":
        yield ", and no chains are run between rounds for first moments; set solve.draws to antithetic"
    if solve.scores == "first_moment" and config.training is not None and not config.training.anneal_steps:
        yield (", and first moments are read off a copy that was annealed on plain weights; set training.anneal_steps")
    if arm.strength * (1 - solve.weight_min) > 1:
        yield (
            f", and strength {arm.strength:g} takes weights below 0 where they may be as small as solve.weight_min = "
            f"{solve.weight_min:g}; expected at most {1 / (1 - solve.weight_min):.3g}"
        )


RULES = (_solve, _cost, _check, _predict, _retrain)
