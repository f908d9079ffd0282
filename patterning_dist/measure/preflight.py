"""What can be known before hours of work: that model, data and the user's functions are there and fit together."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from patterning_dist.config import (
    AttentionOnlyConfig,
    Config,
    FunctionConfig,
    FunctionDataConfig,
    HuggingFaceConfig,
    LabelledConfig,
    PairsConfig,
    SamplingConfig,
    TableConfig,
    TextConfig,
    TokensConfig,
)
from patterning_dist.config.checks import domain_faults
from patterning_dist.config.controls import (
    ControlConfig,
    HeldOutControlConfig,
    MinimumNormControlConfig,
    PermutedControlConfig,
    ScoresControlConfig,
    SplitControlConfig,
)
from patterning_dist.data.corpus import Source, domains_of, read_documents
from patterning_dist.data.sequences import SequenceTable
from patterning_dist.data.tokenizer import text_tokenizer
from patterning_dist.data.tokens import TokenDataset
from patterning_dist.errors import PatterningError
from patterning_dist.functions import find_own_code, load_function
from patterning_dist.measure.subject import Subject, expand_components
from patterning_dist.measure.subjects import Subjects
from patterning_dist.models.components import select_component
from patterning_dist.models.huggingface import model_location, open_saved_model
from patterning_dist.models.passes import check_length
from patterning_dist.models.pretrained_config import Head
from patterning_dist.response.contrast import OVERALL
from patterning_dist.runtime.environment import resolve_device
from patterning_dist.runtime.training.deepspeed_check import check_deepspeed
from patterning_dist.runtime.training.stacked_trainer import stackable_optimizer
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.shard import check_layers
from patterning_dist.tasks.language import LanguageTask
from patterning_dist.tasks.open import open_skeleton, open_task
from patterning_dist.tasks.sequences import SequenceTask
from patterning_dist.tasks.splits import split_terms
from patterning_dist.tasks.task import Task


def preflight(config: Config, directory: Path) -> list[str]:
    """Look at model and data without reading the weights of a language model; a module of the user's own is built.

    Data that stage prepare has not written yet is looked at by the stages that read it.

    Args:
        config: of the run.
        directory: of the run.

    Returns:
        What is left out of the data, and what becomes of the DeepSpeed JSON, a line each.

    Raises:
        PatterningError: no GPU, an observable that cannot be imported, a checkpoint or component that is not there, a
            split without samples, tokens that are not in the model's vocabulary, or a DeepSpeed JSON that DeepSpeed
            refuses.
    """
    find_own_code()
    resolve_device(config.device)
    remarks = check_deepspeed(config)
    for observable in config.sampling.observables:
        if isinstance(observable, FunctionConfig):
            load_function(observable.path)
    for split in config.sampling.split_functions:
        load_function(split, "split")
    if isinstance(config.model, HuggingFaceConfig):
        _check_checkpoints(
            config.model, "classes" if isinstance(config.data, PairsConfig | LabelledConfig) else "tokens"
        )
    if isinstance(config.data, TextConfig):
        for index, source in enumerate(config.data.sources):
            if not source.path.exists():
                raise PatterningError(f"data.sources.{index}.path: {source.path} is not there; correct it")
            next(read_documents([Source(source.path, source.domain, source.text_column)]))  # that it can be read
        refuse_domains(config, domains_of(Source(source.path, source.domain) for source in config.data.sources))
        skeleton = open_skeleton(config)
        if isinstance(config.model, AttentionOnlyConfig):
            _check_memory(skeleton)
        expand_components(config.sampling, skeleton)
        _check_checkpointing(config, skeleton)
        return remarks + _own_tokenizer(config.data, skeleton)
    task = open_task(config, directory, "cpu")
    skeleton = task.skeleton()
    _check_checkpointing(config, skeleton)
    if isinstance(config.model, HuggingFaceConfig):
        assert config.data is not None and not isinstance(config.data, FunctionDataConfig)  # checked with the file
        last = isinstance(config.data, TokensConfig)  # is predicted and not read
        check_length(skeleton, config.data.context_length - last, last=last)
    sampling = expand_components(config.sampling, skeleton)
    subject = Subject(config.checkpoints[0], sampling.components[0].name, stream="")
    subjects = Subjects(task, sampling, config.seed, directory, {"": subject})
    remarks += _frozen_parts(skeleton, sampling)
    for samples in dict.fromkeys((task.train, subjects.probe.source, *task.held_out.values())):
        if isinstance(samples, TokenDataset | SequenceTable):
            if isinstance(task, LanguageTask | SequenceTask):
                samples.check_vocabulary(task.vocabulary_size)
            remarks += samples.remarks
    if isinstance(config.data, TableConfig) and not getattr(task.train, "vocabulary_size", None):
        given = config.model.path if isinstance(config.model, HuggingFaceConfig) else None
        if config.data.tokenizer not in (None, given):
            remarks.append("data.tokenizer: has no effect, since the tables hold token ids")
    _ = subjects.held_out
    if config.retrain is not None and config.retrain.engine == "stacked":
        assert config.training is not None
        start = config.retrain.arm_list[0].start
        model = task.load(start, Ranks()) if start in config.model.given_checkpoints else task.build(config.seed)
        stackable_optimizer(task, model, config.training)
    by_document = config.solve is not None and config.solve.level == "document"
    if by_document and "document" not in task.index(task.train, np.arange(1)):
        raise PatterningError("solve.level: nothing is known of a document of these samples; choose sequence")
    for control in config.solve.controls if config.solve is not None else []:
        _check_control(task, control)
    return remarks


def refuse_domains(config: Config, domains: Collection[str] | None) -> None:
    """Raises PatterningError for splits of domains that the text does not have; None: they are not known yet."""
    if faults := list(domain_faults(config, domains)):
        raise PatterningError("\n".join(faults))


def _check_memory(skeleton: nn.Module) -> None:
    """A model that is always whole in one process, with its masks, has room on this machine."""
    size = sum(tensor.nbytes for tensor in (*skeleton.parameters(), *skeleton.buffers()))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise PatterningError(
            f"model: its weights and masks take {size / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f} GB of "
            "memory; lower d_model, d_head, num_heads, num_layers or data.context_length"
        )


def _frozen_parts(skeleton: Any, sampling: SamplingConfig) -> list[str]:
    """Which components have parameters that stay."""
    found = [select_component(skeleton, component.name) for component in sampling.components]
    return [
        f"sampling.components: {component.name}: {component.num_frozen} of "
        f"{component.num_frozen + component.num_coordinates} coordinates have requires_grad False, and stay"
        for component in found
        if component.num_frozen
    ]


def _own_tokenizer(data: TextConfig, skeleton: Any) -> list[str]:
    """What there is to say of text that is encoded with a given tokenizer."""
    if data.tokenizer is None:
        return []
    size = text_tokenizer(data.tokenizer)[0].get_vocab_size()
    there = getattr(skeleton, "vocabulary_size", None) or skeleton.config.get_text_config().vocab_size
    if size > there:
        raise PatterningError(
            f"data.tokenizer: {data.tokenizer} has {size} tokens, and the vocabulary of the model {there}; give the "
            "model's own"
        )
    unused = "; data.vocabulary_size has no effect" if "vocabulary_size" in data.model_fields_set else ""
    return [f"data: text is encoded with the tokenizer of {data.tokenizer}, {size} tokens{unused}"]


def _check_checkpoints(model: HuggingFaceConfig, head: Head) -> None:
    """That the files of every checkpoint are there, as far as their headers say, and are of one architecture."""
    shapes: dict[str, Any] = {}
    for checkpoint in model.given_checkpoints:
        saved = open_saved_model(*model_location(model, checkpoint), head, fetch=False)
        own = {name: tuple(p.shape) for name, p in saved.skeleton.named_parameters()}
        if other := set(own.items()) ^ set((shapes := shapes or own).items()):
            raise PatterningError(
                f"model.checkpoints: {checkpoint} and {model.given_checkpoints[0]} have other parameters, like "
                f"{min(other)[0]}; sample them in experiments of their own"
            )


def _check_checkpointing(config: Config, skeleton: nn.Module) -> None:
    for section in (config.sampling, config.training):
        if section is not None and section.gradient_checkpointing:
            check_layers(skeleton)


def _check_control(task: Task, control: ControlConfig) -> None:
    """That there is the split, token, domain, label or file which a control names, and labels where it swaps them."""
    one = np.arange(1)
    if isinstance(control, ScoresControlConfig) and not control.path.exists():
        raise PatterningError(f"solve.controls: {control.path}, the scores of {control.name}, is not there; correct it")
    if isinstance(control, MinimumNormControlConfig):
        task.swap(f"solve.controls: {control.name}", np.zeros(len(task.train), bool))
    if isinstance(control, SplitControlConfig):
        if not control.split.startswith("domain:") and split_terms(task, control.split, task.train, one) is None:
            raise PatterningError(f"solve.controls: this task has no split {control.split!r}; choose another")
    elif isinstance(control, HeldOutControlConfig):
        if not task.held_out:
            raise PatterningError(
                f"solve.controls: {control.name} is the gradient of a held-out loss, and this task has no held-out "
                "samples; remove it"
            )
        known = control.split == OVERALL or control.split.startswith("domain:")
        terms = (split_terms(task, control.split, samples, one) for samples in task.held_out.values())
        if not known and task.own_split(control.split, 0) is None and any(found is None for found in terms):
            raise PatterningError(f"solve.controls: this task has no split {control.split!r}; choose another")
    elif isinstance(control, PermutedControlConfig):
        there = [*task.index(task.train, one), *task.entries(task.train, one)]
        if control.within not in there:
            raise PatterningError(
                f"solve.controls: {control.name} is within each {control.within}, and of the samples of this task "
                f"there is {', '.join(there)}; choose another, or remove it"
            )
