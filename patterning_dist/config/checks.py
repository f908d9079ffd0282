"""What one section of the experiment file asks of another: rules that yield `key: what is wrong; remedy`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from patterning_dist.config.calibration import CalibrationConfig
from patterning_dist.config.sampling import SamplingConfig
from patterning_dist.config.schema import Config, ModelConfig

# Columns of the trace table that no observable may take the name of.
RESERVED_OBSERVABLES = ("chain", "draw", "loss")
# The attention-only transformer of a run is small: one process in float32 has a faster way to sample it.
_STUDY_ONLY = ("micro_batch_size", "compute_dtype", "ranks_per_chain")


def check(config: Config) -> list[str]:
    """Every broken rule, one line each; an empty list if the experiment can be run."""
    rules = (_components, _observables, _training, _sampling, _calibration, _solve, _retrain)
    # A value that several components inherit is one fault.
    return list(dict.fromkeys(line for rule in rules for line in rule(config)))


def _component_fault(name: str, model: ModelConfig) -> str | None:
    layers, heads = range(model.num_layers), range(model.num_heads)
    for part in name.split("+"):
        match = re.fullmatch(r"layer\.(\d+)(?:\.head\.(\d+)|\.attention)?", part)
        if match is None:
            if part not in ("everything", "attention", "embedding", "unembedding"):
                return (
                    f"'{part}' is no component; expected everything, attention, embedding, unembedding, "
                    "layer.N, layer.N.attention or layer.N.head.M, joined by +"
                )
        elif int(match[1]) not in layers:
            return f"'{part}' is not in the model, whose layers are {_span('layer', model.num_layers)}"
        elif match[2] is not None and int(match[2]) not in heads:
            heads_there = _span(f"layer.{match[1]}.head", model.num_heads)
            return f"'{part}' is not in the model, whose heads there are {heads_there}"
    return None


def _span(prefix: str, count: int) -> str:
    return f"{prefix}.0" + (f" to {prefix}.{count - 1}" if count > 1 else "")


def _repeated(values: Sequence[object]) -> list[object]:
    return sorted({value for value in values if values.count(value) > 1}, key=str)


def _components(config: Config) -> Iterator[str]:
    names = [component.name for component in config.sampling.components]
    for index, name in enumerate(names):
        if fault := _component_fault(name, config.model):
            yield f"sampling.components.{index}.name: {fault}"
    yield from repeated_components(config.sampling)
    for key, name in (
        ("response.direction.component", config.response.direction.component),
        ("solve.component", config.solve.component),
    ):
        if name not in names:
            yield f"{key}: '{name}' is not sampled; add it to sampling.components or use {_list(names)}"
    if config.response.baseline == "full" and "everything" not in names:
        yield "response.baseline: full needs a component 'everything'; add it to sampling.components"


def repeated_components(sampling: SamplingConfig) -> Iterator[str]:
    """Components that are listed twice."""
    for name in _repeated([component.name for component in sampling.components]):
        yield f"sampling.components: '{name}' is listed twice; remove one"


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
    yield from observable_names(config.sampling)
    for quantity in config.sampling.posterior_quantities:
        yield f"sampling.observables: '{quantity.name}' of kind {quantity.kind} is for `patterning study`; remove it"
    # A source without a domain takes it from its path: known only once the files are read.
    domains = [source.domain for source in config.data.sources]
    for index, observable in enumerate(config.sampling.observables):
        split = observable.split if observable.kind == "split_loss" else ""
        if split.startswith("domain:") and not {split.removeprefix("domain:"), None} & set(domains):
            yield (
                f"sampling.observables.{index}.split: no source has the domain of '{split}'; "
                f"the domains are {_list(sorted(set(domains)))}"
            )


def _training(config: Config) -> Iterator[str]:
    training, model = config.training, config.model
    for layer in model.relative_position_bias:
        if layer not in range(model.num_layers):
            yield f"model.relative_position_bias: no layer {layer}; expected 0 to {model.num_layers - 1}"
    for key in ("batch_size", "anneal_batch_size"):
        yield from _divides(f"training.{key}", getattr(training, key), "training.num_workers", training.num_workers)
    yield from _zero_stage("training.deepspeed", training.deepspeed, training.optimizer)


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


def calibrated_component(calibration: CalibrationConfig, sampling: SamplingConfig) -> Iterator[str]:
    """A component that is tried, but not sampled."""
    components = [component.name for component in sampling.components]
    if calibration.component not in (None, *components):
        yield f"calibration.component: '{calibration.component}' is not sampled; there are {_list(components)}"


def _calibration(config: Config) -> Iterator[str]:
    yield from calibrated_component(config.calibration, config.sampling)
    if config.calibration.checkpoint is not None:
        yield "calibration.checkpoint: a run has its baseline alone; remove the key"


def _sampling(config: Config) -> Iterator[str]:
    sampling = config.sampling
    yield from chains(sampling)
    for key in _STUDY_ONLY:
        value, default = getattr(sampling, key), SamplingConfig.model_fields[key].default
        if value != default:
            yield f"sampling.{key}: {value} is for `patterning study`; expected {default}, remove the key"
    limit = config.data.max_train_sequences
    if limit is not None and sampling.probe is None and sampling.probe_sequences > limit:
        yield (
            f"sampling.probe_sequences: {sampling.probe_sequences} is more than data.max_train_sequences = "
            f"{limit}; lower it"
        )
    if sampling.probe is not None:
        yield from _probe(sampling.probe, config.data.context_length)


def _probe(path: Path, context_length: int) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
        length = int(json.loads(metadata[b"patterning"])["context_length"])
    except OSError as error:
        yield f"sampling.probe: cannot read {path} ({error.strerror or error}); give a token table"
    except (KeyError, ValueError, TypeError, pyarrow.ArrowException):
        yield f"sampling.probe: {path} is not a token table; make it with `patterning prepare`"
    else:
        if length > context_length:
            yield (
                f"sampling.probe: {path} has sequences of {length} tokens, longer than data.context_length = "
                f"{context_length}; cut them or train with a longer context"
            )


def _solve(config: Config) -> Iterator[str]:
    solve, names = config.solve, config.sampling.observable_names
    for name in solve.targets:
        if name not in names:
            yield f"solve.targets.{name}: no such observable; sampling.observables has {_list(names)}"
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
    if solve.scores == "response_direction" and solve.component != config.response.direction.component:
        yield (
            f"solve.component: scores response_direction are those of response.direction.component = "
            f"'{config.response.direction.component}'; name the same component in both"
        )


def _retrain(config: Config) -> Iterator[str]:
    retrain = config.retrain
    for key, values in (("arms", retrain.arms), ("seeds", retrain.seeds)):
        for value in _repeated(values):
            yield f"retrain.{key}: {value} is listed twice; remove one"
    if any(seed < 0 for seed in retrain.seeds):
        yield f"retrain.seeds: expected numbers from 0 up, got {min(retrain.seeds)}"
    yield from _divides("training.batch_size", config.training.batch_size, "retrain.num_workers", retrain.num_workers)
    yield from _zero_stage("retrain.deepspeed", retrain.deepspeed, config.training.optimizer)
