"""What one section of the experiment file asks of another: rules that yield `key: what is wrong; remedy`."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import get_args

from patterning_dist.config import control_checks, weight_checks
from patterning_dist.config.checkpoints import is_glob
from patterning_dist.config.data import (
    FunctionDataConfig,
    LabelledConfig,
    PairsConfig,
    TextConfig,
    TokensConfig,
    held_out_domains,
)
from patterning_dist.config.deepspeed import deepspeed_faults
from patterning_dist.config.faults import divides, listed, repeated
from patterning_dist.config.model import AttentionOnlyConfig, HuggingFaceConfig, ModuleConfig, TaskConfig
from patterning_dist.config.sampling import SamplingConfig
from patterning_dist.config.schema import Config
from patterning_dist.config.validation_checks import check_validation
from patterning_dist.config.window import WINDOW, without_localization

# Columns of the trace table that no observable may take the name of.
RESERVED_OBSERVABLES = ("chain", "draw", "loss")
# Data that a kind of model takes.
_DATA = {
    AttentionOnlyConfig: (TextConfig,),
    HuggingFaceConfig: (TextConfig, TokensConfig, PairsConfig, LabelledConfig),
    ModuleConfig: (FunctionDataConfig,),
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
        *weight_checks.RULES,
        control_checks.check,
        check_validation,
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
    for glob in filter(is_glob, names if isinstance(model, ModuleConfig | TaskConfig) else ()):
        yield f"model.checkpoints: '{glob}' is a glob, and only your own functions know which there are; list them"
    for name in repeated(names):
        yield f"model.checkpoints: '{name}' is listed twice; remove one"


def _components(config: Config) -> Iterator[str]:
    names = [component.name for component in config.sampling.components]
    for name in repeated(names):
        yield f"sampling.components: '{name}' is listed twice; remove one"
    direction, solve = config.response.direction, config.solve
    for key, wanted in (
        ("response.direction.component", None if direction is None else direction.component),
        ("solve.component", None if solve is None else solve.component),
    ):
        patterned = solve is not None and solve.scores == "first_moment" and key == "solve.component"
        if patterned and any(fnmatch.fnmatchcase(name, str(wanted)) for name in names):
            continue
        if wanted is not None and wanted not in names and not any(map(is_glob, names)):
            yield f"{key}: '{wanted}' is not sampled; add it to sampling.components or use {listed(names)}"
    if config.response.baseline == "full" and "everything" not in names:
        yield "response.baseline: full needs a component 'everything'; add it to sampling.components"
    if config.response.baseline == "full" and config.sampling.extrapolate:
        yield "sampling.extrapolate: takes response.baseline: restricted; remove the key or set it so"


def observable_names(sampling: SamplingConfig) -> Iterator[str]:
    """Names of observables that clash with each other or with a column."""
    names = [*sampling.observable_names, *(quantity.name for quantity in sampling.posterior_quantities)]
    for name in repeated(names):
        yield f"sampling.observables: '{name}' is named twice; rename one"
    for name in RESERVED_OBSERVABLES:
        if name in names:
            yield f"sampling.observables: '{name}' is the name of a column of the traces; rename it"


def _observables(config: Config) -> Iterator[str]:
    sampling = config.sampling
    yield from observable_names(sampling)
    if not any(o.kind == "component_loss" for o in sampling.observables):
        for quantity in (q for q in sampling.posterior_quantities if q.kind != "controlled"):
            yield (
                f"sampling.observables: '{quantity.name}' of kind {quantity.kind} follows from the loss on the probe; "
                "add {kind: component_loss, name: component}"
            )
    splits = {o.name: o.split for o in sampling.observables if o.kind == "split_loss"}
    for controlled in sampling.controlled:
        if controlled.of not in splits:
            yield (
                f"sampling.observables: '{controlled.name}' needs an observable with a gradient, and '{controlled.of}' "
                f"is no split_loss; set its `of` to one of {listed(list(splits))}"
            )
    if "overall" in sampling.observable_names and splits.get("overall") != "overall":
        yield (
            "sampling.observables: 'overall' is what the mean loss of all held-out samples is called; rename it, or "
            "give it the split overall"
        )
    domains = held_out_domains(config.data)
    if domains is not None and not domains:
        for index, observable in enumerate(sampling.observables):
            if observable.kind == "split_loss":
                yield f"sampling.observables.{index}.split: there is no held-out data; add data.held_out"
    yield from domain_faults(config, domains)


def domain_faults(config: Config, domains: Collection[str] | None) -> Iterator[str]:
    """Splits of domains that are not among these; None or empty: they are not known."""
    for index, observable in enumerate(config.sampling.observables):
        split = observable.split if observable.kind == "split_loss" else ""
        if split.startswith("domain:") and domains and split.removeprefix("domain:") not in domains:
            yield (
                f"sampling.observables.{index}.split: no held-out data has the domain of '{split}'; the domains are "
                f"{listed(sorted(domains))}"
            )


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
        yield from divides(f"training.{key}", getattr(training, key), "training.num_workers", training.num_workers)
    yield from deepspeed_faults("training.deepspeed", training.deepspeed, training, training.num_workers)
    if training.optimizer == "muon" and not isinstance(model, AttentionOnlyConfig):
        yield (
            "training.optimizer: muon steps on one matrix a head, which the attention-only transformer alone has; "
            "set it to adamw or sgd"
        )


def chains(sampling: SamplingConfig) -> Iterator[str]:
    """Chains that are too few or too short for their statistics, or sure to diverge."""
    if sampling.extrapolate and sampling.sampler.kind == "rmsprop_sgld":
        yield (
            "sampling.extrapolate: the bias of rmsprop_sgld is not linear in the step size; remove the key or take "
            "sampling.sampler: {kind: sgld}"
        )
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
        yield f"calibration.component: '{config.calibration.component}' is not sampled; there are {listed(components)}"
    if config.calibration.checkpoint not in (None, *config.checkpoints):
        there = listed(config.checkpoints)
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
