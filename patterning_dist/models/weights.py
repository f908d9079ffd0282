"""From the tensors of a checkpoint to the parameters of a model.

Names and shapes are matched by the rules that ``transformers`` has for files of older versions, so that experts of one
tensor each are stacked while their rows are read.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patterning_dist.errors import PatterningError, first_line
from patterning_dist.models.checkpoint import Files, Stored, some

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedModel

Shapes = Mapping[str, tuple[int, ...]]  # of the parameters and persistent buffers of a model, all names of tied ones
Rows = Mapping[str, tuple[int, int | None]]  # [start, stop) along axis 0
_ROWS_AT_ONCE = 4096  # of a large embedding 100 MB
_SAVE_WHOLE = "load the model whole and write it with save_pretrained(folder, save_original_format=False)"


@dataclass(frozen=True)
class Source:
    """What one parameter is made of, or several that are one tensor in the file.

    Attributes:
        target: name of the parameter, of several the first.
        stored: tensors with the pattern of their names that ``converter`` knows them by, in the order of their numbers.
        converter: a ``WeightConverter`` of ``transformers``; None: the tensor is the parameter.
        names: of all parameters that come of it.
    """

    target: str
    stored: tuple[tuple[str, Stored], ...]
    converter: Any
    names: tuple[str, ...]

    @property
    def row_is_expert(self) -> bool:
        """Whether row n is made of the n-th tensor of every pattern, and of nothing else."""
        if self.converter is None:
            return False
        first, *others = self.converter.operations
        kinds = {"Concatenate": ("dim",), "Transpose": ("dim0", "dim1")}
        return (type(first).__name__, getattr(first, "dim", None)) == ("MergeModulelist", 0) and all(
            type(one).__name__ in kinds and all(getattr(one, axis) > 0 for axis in kinds[type(one).__name__])
            for one in others
        )

    def read(self, files: Files, shapes: Shapes, rows: Rows, config: Any) -> dict[str, Tensor]:
        """The rows asked for, in the file's number format."""
        if self.converter is None:
            return {self.target: self.stored[0][1].read(files, *rows[self.target])}
        start, stop = rows[self.target] if self.row_is_expert else (0, None)
        if start == stop:
            return {self.target: torch.empty(0, *shapes[self.target][1:])}
        grouped: dict[str, list[Stored]] = {}
        for pattern, stored in self.stored:
            grouped.setdefault(pattern, []).append(stored)
        tensors = {pattern: [one.read(files) for one in group[start:stop]] for pattern, group in grouped.items()}
        found = self.convert(tensors, shapes, config)
        return found if self.row_is_expert else {name: w[slice(*rows[name])] for name, w in found.items()}

    def shapes(self, shapes: Shapes, config: Any) -> dict[str, tuple[int, ...]]:
        """Of the parameters that come of it; nothing is read."""
        if self.converter is None:
            return {self.target: self.stored[0][1].shape}
        tensors: dict[str, list[Tensor]] = {}
        for pattern, stored in self.stored:
            tensors.setdefault(pattern, []).append(torch.empty(stored.shape, device="meta"))
        return {name: tuple(tensor.shape) for name, tensor in self.convert(tensors, shapes, config).items()}

    def convert(self, tensors: dict[str, list[Tensor]], shapes: Shapes, config: Any) -> dict[str, Tensor]:
        """What ``transformers`` makes of tensors, by pattern."""
        converter = copy.deepcopy(self.converter)
        converter.collected_tensors.update(tensors)
        found = converter.convert(self.target, model=_Parameters(shapes), config=config)
        return {name: w[0] if isinstance(w, list) else w for name, w in found.items()}


class _Parameters:
    """A model as far as converters ask for it."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(self._shapes[name], device="meta")


def state_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """See ``Shapes``; of parameters in pieces the whole shape."""
    persistent = model.state_dict().keys()
    buffers = {name: tuple(buffer.shape) for name, buffer in model.named_buffers() if name in persistent}
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters} | buffers


def match(model: PreTrainedModel, tensors: Mapping[str, Stored], folder: Path | str) -> list[Source]:
    """Where every tensor of a checkpoint belongs in a model; nothing is read. Before the model is cut over ranks.

    Args:
        model: its weights are not looked at.
        tensors: see ``read_checkpoint``.
        folder: for messages.

    Raises:
        PatterningError: a parameter that is in no file, one of another shape, a layout that cannot be converted.
    """
    shapes, sources, left = state_shapes(model), list[Source](), set[str]()
    targets: dict[str, list[tuple[str, Stored]]] = {}
    converters: dict[str, Any] = {}
    for target, pattern, stored, converter in _renamed(model, tensors, shapes):
        if target in shapes:
            targets.setdefault(target, []).append((pattern, stored))
            converters[target] = converter
        else:
            left.add(stored.key)
    first = {key.partition(".")[0] for key in tensors}
    if (
        not targets and len(first) == 1 and all("." in key for key in tensors)
    ):  # Lightning and others keep the model as a part of theirs
        return match(model, {key.partition(".")[2]: stored for key, stored in tensors.items()}, folder)
    for target, found in targets.items():
        converter = converters[target]
        patterns = converter.target_patterns if converter is not None else [""]
        names = tuple(target.replace(patterns[0], other) for other in patterns) if converter is not None else (target,)
        sources.append(Source(target, tuple(found), converter, names))
    _check(model, sources, shapes, folder)
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    if left := {name for name in left if not any(pattern.search(name) for pattern in ignored)}:
        warnings.warn(
            f"{folder}: weights that a {type(model).__name__} has no place for are left out: {some(left)}", stacklevel=2
        )
    return sources


def same_where_tied(model: PreTrainedModel, sources: list[Source]) -> bool:
    """Whether the files hold each tied parameter once, or the same numbers twice."""
    by_name = {name: source for source in sources for name in source.names}
    files = Files()
    for names in _aliases(model):
        first, *others = [by_name[name].stored[0][1] for name in names if name in by_name]
        if any(other != first and not _equal(first, other, files) for other in others):
            return False
    return True


def _equal(one: Stored, other: Stored, files: Files) -> bool:
    if one.shape != other.shape:
        return False
    starts = range(0, one.shape[0], _ROWS_AT_ONCE)
    return all(
        torch.equal(*(stored.read(files, start, start + _ROWS_AT_ONCE) for stored in (one, other))) for start in starts
    )


def _renamed(model: PreTrainedModel, tensors: Mapping[str, Stored], shapes: Shapes) -> Any:
    """(name in the model, pattern, tensor, converter or None) of every tensor, in the order of their numbers."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping, prefix = get_model_conversion_mapping(model), model.base_model_prefix
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, dict(shapes))
        if name not in shapes and (kept := rename_source_key(key, [], [], prefix, dict(shapes))[0]) in shapes:
            name, pattern = kept, None
        yield name, pattern or "", tensors[key], by_pattern[pattern] if pattern is not None else None


def _check(model: PreTrainedModel, sources: list[Source], shapes: Shapes, folder: Path | str) -> None:
    found = {name for source in sources for name in source.names}
    lacking = [names[0] for names in _aliases(model) if not found & set(names)]
    if lacking:
        raise PatterningError(f"{folder}: {_why_lacking(model, lacking, sources)}")
    for source in sources:
        first = source.stored[0][1]
        try:
            there = source.shapes(shapes, model.config)
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            raise PatterningError(
                f"{first.path}: {source.target} cannot be made of {first.key} and {len(source.stored) - 1} more "
                f"({first_line(error)}); copy the folder again, or {_SAVE_WHOLE}"
            ) from None
        for name, shape in there.items():
            if name in shapes and shape != shapes[name]:
                made = "" if source.converter is None else f", which makes {name} {list(shape)}"
                raise PatterningError(
                    f"{first.path}: {first.key} has shape {list(first.shape)}{made}, the model of config.json "
                    f"{list(shapes[name])}; copy the folder again, or mend config.json"
                )


def _why_lacking(model: PreTrainedModel, lacking: list[str], sources: list[Source]) -> str:
    """Which weights are missing, for which of the usual reasons, and what to do."""
    kind, prefix = type(model).__name__, f"{model.base_model_prefix}."
    if any(name.startswith(prefix) for name in lacking):
        return f"the weights lack {some(lacking)}; copy the folder again, or {_SAVE_WHOLE}"
    embeddings = model.get_output_embeddings()
    unembedding = next((f"{name}.weight" for name, module in model.named_modules() if module is embeddings), None)
    # A base model saved by itself writes names without the prefix.
    if lacking == [unembedding] and any(stored.key.startswith(prefix) for one in sources for _, stored in one.stored):
        return (
            f"the weights lack {unembedding}, and config.json says that it is not the embedding; if it is, as where "
            'the flag was lost, write "tie_word_embeddings": true into config.json, else copy the folder again'
        )
    what = "causal language model" if embeddings is not None else "sequence classifier"
    return f"the weights lack {some(lacking)}: the model was not saved as a {what}; save the {kind} it belongs to"


def _aliases(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())
