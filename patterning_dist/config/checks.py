"""What one section of the experiment file asks of another: rules that yield `key: what is wrong; remedy`."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from patterning_dist.config.data import FunctionDataConfig, LabelledConfig, PairsConfig, TextConfig, TokensConfig
from patterning_dist.config.model import AttentionOnlyConfig, HuggingFaceConfig, ModuleConfig, TaskConfig
from patterning_dist.config.sampling import SamplingConfig
from patterning_dist.config.schema import Config
from patterning_dist.config.training import SOLVED, Arm
from patterning_dist.config.window import WINDOW, without_localization, without_window

# Columns of the trace table that no observable may take the name of.
RESERVED_OBSERVABLES = ("chain", "draw", "loss")
# Data that a kind of model takes.
_DATA = {
    AttentionOnlyConfig: (TextConfig,),
    HuggingFaceConfig: (TextConfig, TokensConfig, PairsConfig, LabelledConfig),
    ModuleConfig: (FunctionDataConfig,),
}
_SPLITS = ("induction", "rest", "induction_minus_rest")  # of the losses of text
# Data whose losses have a token, a domain or a label.
_KNOWN: dict[str, tuple[type, ...]] = {
    "token": (TextConfig, TokensConfig),
    "domain": (TextConfig, TokensConfig, PairsConfig, LabelledConfig),
    "label": (LabelledConfig,),
}


def check(config: Config) -> list[str]:
    """Every broken rule, one line each; an empty list if the experiment can be run."""
    rules = (
        _model,
        _components,
        _observables,
        _training,
        _sampling,
        _calibration,
        _solve,
        _cost,
        _check,
        _predict,
        _retrain,
    )
    # A value that several components inherit is one fault.
    return list(dict.fromkeys(line for rule in rules for line in rule(config)))


def _model(config: Config) -> Iterator[str]:
    model, data = config.model, config.data
    if isinstance(model, TaskConfig):
        if data is not None:
            yield "data: model.kind 'task' brings its own; remove the section"
    elif data is None:
        yield "data: is missing; add it"
    elif not isinstance(data, _DATA[type(model)]):
        kinds = ", ".join(str(get_args(kind.model_fields["kind"].annotation)[0]) for kind in _DATA[type(model)])
        yield f"data.kind: '{data.kind}' is not for model.kind '{model.kind}'; expected one of {kinds}"
    if isinstance(model, HuggingFaceConfig) and (model.path is None) == (model.architecture is None):
        yield "model.path: expected exactly one of path (a model that exists) and architecture (one to be trained here)"
    if isinstance(model, ModuleConfig) and model.build is None and model.initialise is None:
        yield "model.build: expected build (checkpoints that exist) or initialise (a model to be trained here)"
    names = model.given_checkpoints
    for name in _repeated(names):
        yield f"model.checkpoints: '{name}' is listed twice; remove one"


def _repeated(values: Sequence[object]) -> list[object]:
    return sorted({value for value in values if values.count(value) > 1}, key=str)


def _components(config: Config) -> Iterator[str]:
    names = [component.name for component in config.sampling.components]
    for name in _repeated(names):
        yield f"sampling.components: '{name}' is listed twice; remove one"
    direction, solve = config.response.direction, config.solve
    for key, wanted in (
        ("response.direction.component", None if direction is None else direction.component),
        ("solve.component", None if solve is None else solve.component),
    ):
        patterned = solve is not None and solve.scores == "first_moment" and key == "solve.component"
        if patterned and any(fnmatch.fnmatchcase(name, str(wanted)) for name in names):
            continue
        if wanted is not None and wanted not in names and not any(map(_is_pattern, names)):
            yield f"{key}: '{wanted}' is not sampled; add it to sampling.components or use {_list(names)}"
    if config.response.baseline == "full" and "everything" not in names:
        yield "response.baseline: full needs a component 'everything'; add it to sampling.components"


def _is_pattern(name: str) -> bool:
    return any(character in name for character in "*?[")


def _list(names: Sequence[object]) -> str:
    return ", ".join(map(str, names))


def observable_names(sampling: SamplingConfig) -> Iterator[str]:
    """Names of observables that clash with each other or with a column."""
    names = [*sampling.observable_names, *(quantity.name for quantity in sampling.posterior_quantities)]
    for name in _repeated(names):
        yield f"sampling.observables: '{name}' is named twice; rename one"
    for name in RESERVED_OBSERVABLES:
        if name in names:
            yield f"sampling.observables: '{name}' is the name of a column of the traces; rename it"


def _observables(config: Config) -> Iterator[str]:
    sampling = config.sampling
    yield from observable_names(sampling)
    if sampling.posterior_quantities and not any(o.kind == "component_loss" for o in sampling.observables):
        for quantity in sampling.posterior_quantities:
            yield (
                f"sampling.observables: '{quantity.name}' of kind {quantity.kind} follows from the loss on the probe; "
                "add {kind: component_loss, name: component}"
            )
    splits = {o.name: o.split for o in sampling.observables if o.kind == "split_loss"}
    if "overall" in sampling.observable_names and splits.get("overall") != "overall":
        yield (
            "sampling.observables: 'overall' is what the mean loss of all held-out samples is called; rename it, or "
            "give it the split overall"
        )
    domains = _domains(config)
    for index, observable in enumerate(sampling.observables):
        split = observable.split if observable.kind == "split_loss" else ""
        key = f"sampling.observables.{index}.split"
        if split and domains is not None and not domains:
            yield f"{key}: there is no held-out data; add data.held_out"
        elif split.startswith("domain:") and domains and split.removeprefix("domain:") not in domains:
            yield f"{key}: no held-out data has the domain of '{split}'; the domains are {_list(sorted(domains))}"


def _domains(config: Config) -> set[str] | None:
    """Domains of the held-out data; None where they are known only once files are read."""
    if isinstance(config.data, TextConfig):
        domains = {source.domain for source in config.data.sources}
        return None if None in domains else {domain for domain in domains if domain is not None}
    if config.data is None or isinstance(config.data, FunctionDataConfig):
        return None
    return set(config.data.held_out)


def _training(config: Config) -> Iterator[str]:
    training, model = config.training, config.model
    if isinstance(model, AttentionOnlyConfig):
        for layer in model.relative_position_bias:
            if layer not in range(model.num_layers):
                yield f"model.relative_position_bias: no layer {layer}; expected 0 to {model.num_layers - 1}"
    if training is None:
        if not model.given_checkpoints:
            yield "training: is missing, and there is no checkpoint to sample around; add it, or give the model's path"
        if config.retrain is not None:
            yield "training: is missing, and retrain takes its optimizer and batch size from it; add it"
        return
    if not model.given_checkpoints and training.num_steps < 1:
        yield "training.num_steps: expected at least 1, since no checkpoint is given"
    for key in ("batch_size", "anneal_batch_size"):
        yield from _divides(f"training.{key}", getattr(training, key), "training.num_workers", training.num_workers)
    yield from _zero_stage("training.deepspeed", training.deepspeed, training.optimizer)
    if training.optimizer == "muon" and not isinstance(model, AttentionOnlyConfig):
        yield (
            "training.optimizer: muon steps on one matrix a head, which the attention-only transformer alone has; "
            "set it to adamw or sgd"
        )


def _divides(batch_key: str, batch: int, workers_key: str, workers: int) -> Iterator[str]:
    if batch % workers:
        yield f"{workers_key}: {workers} ranks do not divide {batch_key} = {batch}; change one of the two"


def _zero_stage(key: str, path: Path | None, optimizer: str) -> Iterator[str]:
    if path is None:
        return
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        stage = int(settings.get("zero_optimization", {}).get("stage", 0))
    except OSError as error:
        yield f"{key}: cannot read {path} ({error.strerror}); give the path of a DeepSpeed JSON file"
    except (ValueError, AttributeError, TypeError) as error:
        yield f"{key}: {path} is not a DeepSpeed JSON file ({error})"
    else:
        if optimizer == "muon" and stage >= 1:
            yield (
                f"{key}: {path} asks for ZeRO stage {stage}, which splits the matrices that muon needs; "
                "set training.optimizer to adamw or zero_optimization.stage to 0"
            )


def chains(sampling: SamplingConfig) -> Iterator[str]:
    """Chains that are too few or too short for their statistics, or sure to diverge."""
    for index, component in enumerate(sampling.components):
        settings = sampling.resolve(component.name)

        def key(name: str, index: int = index, own: frozenset[str] = frozenset(component.model_fields_set)) -> str:
            return f"sampling.components.{index}.{name}" if name in own else f"sampling.{name}"

        if settings.num_chains < sampling.min_chains:
            yield (
                f"{key('num_chains')}: {settings.num_chains} is below sampling.min_chains = "
                f"{sampling.min_chains}; run more chains"
            )
        if settings.num_draws < 2 * sampling.num_batches:
            yield (
                f"{key('num_draws')}: {settings.num_draws} draws are too few for sampling.num_batches = "
                f"{sampling.num_batches}; expected at least {2 * sampling.num_batches}"
            )
        # The pull alone multiplies w - w* by 1 - eps gamma / 2 a step of SGLD.
        if sampling.sampler.kind == "sgld" and settings.step_size * settings.localization >= 4:
            yield (
                f"{key('step_size')}: {settings.step_size:g} diverges with localization "
                f"{settings.localization:g}; expected less than 4 / localization"
            )


def _calibration(config: Config) -> Iterator[str]:
    components = [component.name for component in config.sampling.components]
    if config.calibration.component not in (None, *components):
        yield f"calibration.component: '{config.calibration.component}' is not sampled; there are {_list(components)}"
    if config.calibration.checkpoint not in (None, *config.checkpoints):
        there = _list(config.checkpoints)
        yield f"calibration.checkpoint: '{config.calibration.checkpoint}' is not there; the checkpoints are {there}"


def _sampling(config: Config) -> Iterator[str]:
    sampling, data = config.sampling, config.data
    if faults := list(_localization(config)):
        yield from faults
        return
    yield from chains(sampling)
    if isinstance(config.model, AttentionOnlyConfig) and sampling.ranks_per_chain > 1:
        yield "sampling.ranks_per_chain: the attention-only transformer is small and takes one process; remove the key"
    if sampling.probe is not None and not isinstance(data, TextConfig | TokensConfig):
        yield "sampling.probe: a table of tokens is for data of kind text or tokens; remove it"
    if isinstance(data, TextConfig):
        yield from _token_table(sampling.probe, data.context_length)
        limit = data.max_train_sequences
        if limit is not None and sampling.probe is None and sampling.probe_sequences > limit:
            yield (
                f"sampling.probe_sequences: {sampling.probe_sequences} is more than data.max_train_sequences = "
                f"{limit}; lower it"
            )


def _localization(config: Config) -> Iterator[str]:
    """What is left of `window` once numbers are in its place has a reason."""
    named = {f"sampling.components.{i}": c.localization for i, c in enumerate(config.sampling.components)}
    for key, localization in ({"sampling": config.sampling.localization} | named).items():
        if localization == WINDOW:
            yield f"{key}.localization: {without_localization(config)}"


def _token_table(probe: Path | None, context_length: int) -> Iterator[str]:
    if probe is None:
        return
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_schema(probe).metadata or {}
        length = int(json.loads(metadata[b"patterning"])["context_length"])
    except OSError as error:
        yield f"sampling.probe: cannot read {probe} ({error.strerror or error}); give a token table"
    except (KeyError, ValueError, TypeError, pyarrow.ArrowException):
        yield f"sampling.probe: {probe} is not a token table; make it with `patterning prepare`"
    else:
        if length > context_length:
            yield (
                f"sampling.probe: {probe} has sequences of {length} tokens, longer than data.context_length = "
                f"{context_length}; cut them or train with a longer context"
            )


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
        yield f"solve.checkpoint: several checkpoints are sampled; name one of {_list(config.checkpoints)}"
    elif solve.checkpoint not in (None, *config.checkpoints):
        yield f"solve.checkpoint: '{solve.checkpoint}' is not sampled; expected one of {_list(config.checkpoints)}"
    for name in solve.targets:
        if name not in names:
            kind = " of kind free_energy" if solve.scores == "first_moment" else ""
            there = _list(names) or "none"
            yield f"solve.targets.{name}: no such observable{kind}; sampling.observables has {there}"
    splits = [o.name for o in config.sampling.observables if o.kind == "split_loss"]
    if solve.scores == "response_direction":
        for name in solve.targets:
            if name in names and name not in splits:
                yield (
                    f"solve.targets.{name}: the response direction needs an observable with a gradient, a split_loss "
                    f"({_list(splits)}); choose one, or solve.scores: regression"
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
    controls = [control.name for control in solve.controls]
    for repeated in _repeated([*SOLVED, *controls]):
        yield f"solve.controls: '{repeated}' is the name of other weights too; rename it"
    for split in (control.split for control in solve.controls if control.kind == "split"):
        if isinstance(config.data, TextConfig) and split not in _SPLITS and not split.startswith("domain:"):
            yield f"solve.controls: there is no split '{split}'; expected domain:NAME or one of {_list(_SPLITS)}"
    if solve.scores != "first_moment" and any(control.kind == "ablation" for control in solve.controls):
        yield "solve.controls: an ablation is compared with solve.scores: first_moment; choose them, or remove it"
    if solve.keep_mass is not None and config.data is not None and not isinstance(config.data, _KNOWN[solve.keep_mass]):
        keys = [key for key, kinds in _KNOWN.items() if isinstance(config.data, kinds)]
        remedy = f"expected {' or '.join(keys)}" if keys else "remove the key"
        yield f"solve.keep_mass: data.kind '{config.data.kind}' has no {solve.keep_mass}; {remedy}"


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
    if len({arm.start for arm in solved}) != 1:
        yield "solve.max_cost: expected arms with solved weights that all start from one checkpoint; give them one"


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
    if 0 in config.check.strengths or _repeated(config.check.strengths):
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
    for name in _repeated([arm.name for arm in arms]):
        yield f"retrain.arms: {name} is listed twice; remove one"
    starts = ["initialisation", *config.checkpoints]
    for arm in arms:
        if isinstance(arm.weights, str):
            yield from _arm_weights(config, arm)
        if arm.start not in starts:
            yield f"retrain.start: '{arm.start}' of arm {arm.name} is no checkpoint; expected one of {_list(starts)}"
        if arm.rounds > 1:
            yield from (f"retrain.arms: {arm.name} has {arm.rounds} rounds{fault}" for fault in _rounds(config, arm))
        for seed in _repeated(arm.seeds):
            yield f"retrain.seeds: {seed} is listed twice; remove one"
        if any(seed < 0 for seed in arm.seeds):
            yield f"retrain.seeds: expected numbers from 0 up, got {min(arm.seeds)}"
    if config.training is not None:
        batch = config.training.batch_size
        yield from _divides("training.batch_size", batch, "retrain.num_workers", retrain.num_workers)
        yield from _zero_stage("retrain.deepspeed", retrain.deepspeed, config.training.optimizer)


def _arm_weights(config: Config, arm: Arm) -> Iterator[str]:
    """Whether stage solve writes the weights that an arm names."""
    if config.solve is None:
        yield f"retrain.arms: {arm.name} takes the weights of stage solve, and there is no section solve; add it"
        return
    names = [*SOLVED, *(control.name for control in config.solve.controls)]
    if arm.weights not in names:
        yield (
            f"retrain.arms: stage solve writes no weights '{arm.weights}' for {arm.name}; expected one of "
            f"{_list(names)}, or the path of a table, with a dot or a slash in it"
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
    if solve.scores != "response_direction":
        yield (
            f", and between rounds the response direction is solved for, not scores of kind {solve.scores}; "
            "set solve.scores to response_direction"
        )
    if arm.strength * (1 - solve.weight_min) > 1:
        yield (
            f", and strength {arm.strength:g} takes weights below 0 where they may be as small as solve.weight_min = "
            f"{solve.weight_min:g}; expected at most {1 / (1 - solve.weight_min):.3g}"
        )
