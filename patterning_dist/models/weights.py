"""From the tensors of a checkpoint to the parameters of a model, whole or in pieces.

Names and shapes are matched by the rules that ``transformers`` has for files of older versions, so that experts of one
tensor each are stacked while they are read. A rank reads the rows that it holds: of a model cut by FSDP2, of one in the
pieces of ZeRO stage 3, or of a whole one.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
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


def fill(model: PreTrainedModel, sources: list[Source], device: torch.device | str) -> None:
    """Read this rank's part of every parameter, in float32, and the persistent buffers that the files have.

    Args:
        model: with parameters that have no memory yet, cut by ``fully_shard`` or not, or in the pieces of ZeRO stage 3.
            All ranks that hold pieces call this together.
        sources: see ``match``.
        device: where whole parameters go.

    Raises:
        PatterningError: weights that are NaN or infinite, on all ranks alike.
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    parameters, buffers = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_buffers())
    shapes, files, done = state_shapes(model), Files(), set[int]()
    rows = {name: _rows(parameters[name]) if name in parameters else (0, None) for name in shapes}
    state: dict[str, Tensor] = {}
    problem = None
    for source in sources:
        for name, tensor in source.read(files, shapes, rows, model.config).items():
            if name in buffers:
                buffers[name].copy_(tensor)
            elif name in parameters and id(parameter := parameters[name]) not in done:
                done.add(id(parameter))
                stored = source.stored[0][1]
                if not tensor.is_floating_point():
                    problem = problem or f"{stored.path}: {stored.key} holds {tensor.dtype}, codes of a quantised model"
                elif not torch.isfinite(tensor := tensor.float()).all():
                    problem = problem or f"{stored.path}: {stored.key} holds NaN or infinite weights"
                if hasattr(parameter, "ds_tensor"):
                    _fill_piece(parameter, tensor)
                else:
                    filled = nn.Parameter(_laid_out(parameter, tensor, device), requires_grad=parameter.requires_grad)
                    state |= dict.fromkeys(aliases[id(parameter)], filled)
    if any(map(_in_pieces, parameters.values())):
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        problem = next(filter(None, problems), None)
    if problem is not None:
        raise PatterningError(f"{problem}, of which no loss can be computed; take another checkpoint")
    # Assigned, not copied: the parameters of the module have no memory yet. fully_shard pads uneven parts in a hook.
    model.load_state_dict(state, strict=False, assign=True)


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


def _in_pieces(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_tensor") or hasattr(parameter, "device_mesh")


def _rows(parameter: Any) -> tuple[int, int | None]:
    """Rows along axis 0 that this rank needs."""
    if hasattr(parameter, "ds_tensor"):
        start, stop = _flat_range(parameter)
        width = math.prod(parameter.ds_shape[1:])
        return start // width, -(-stop // width)
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        return offset[0], offset[0] + shape[0]
    return 0, None


def _flat_range(parameter: Any) -> tuple[int, int]:
    """Elements of a parameter, row by row, that are this rank's piece under ZeRO stage 3."""
    size, whole = parameter.ds_tensor.numel(), parameter.ds_numel
    start = min(dist.get_rank(parameter.ds_process_group) * size, whole)
    return start, min(start + size, whole)


def _fill_piece(parameter: Any, rows: Tensor) -> None:
    start, stop = _flat_range(parameter)
    skipped = start - _rows(parameter)[0] * math.prod(parameter.ds_shape[1:])
    parameter.ds_tensor.view(-1)[: stop - start].copy_(rows.reshape(-1)[skipped : skipped + stop - start])


def _laid_out(parameter: Any, rows: Tensor, device: torch.device | str) -> Tensor:
    """Like ``parameter``, in float32."""
    if not hasattr(parameter, "device_mesh"):
        return rows.to(device, torch.float32, copy=True)
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    local = rows.to(mesh.device_type, torch.float32, copy=True)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
