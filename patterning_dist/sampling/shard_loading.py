"""A causal language model of ``transformers`` whose weights go from the files to the ranks that hold them.

No rank ever holds the whole: the module is built with parameters that have a shape and no memory, cut over the ranks,
and every rank reads its own rows. Under DeepSpeed's ZeRO stage 3 parameters are made in pieces, and filled likewise.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from patterning_dist.errors import PatterningError, first_line
from patterning_dist.models.huggingface import (
    Head,
    check_causal,
    from_config,
    load_language_model,
    logits_in_float32,
    partitioned,
    quiet,
    read_config,
)
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.shard import shard_model

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedModel

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
Sources = dict[str, tuple[str, Path]]  # key as the model spells it -> (key in the file, file)


def load_sharded_language_model(
    path: str,
    revision: str | None,
    ranks: Ranks,
    device: torch.device | str,
    *,
    compute_dtype: torch.dtype | None = None,
    head: Head = "tokens",
) -> PreTrainedModel:
    """The numbers of ``load_language_model``, cut over the ranks of a chain group by ``shard_model``.

    Args:
        path: folder written by ``save_pretrained``, or a name on the hub (``owner/name``).
        revision: branch, tag or commit on the hub.
        ranks: the chain group; all of its ranks call this together and see the same files.
        device: where this rank computes.
        compute_dtype: see ``shard_model``.
        head: what the model predicts.

    Raises:
        PatterningError: what ``load_language_model`` refuses; a parameter that is in no file, or one of another shape.
    """
    in_pieces = partitioned()
    if ranks.size == 1 and not in_pieces:
        return load_language_model(path, revision, device, head)
    config = read_config(path, revision, head)
    folder = _folder(path, revision)
    with quiet(), contextlib.nullcontext() if in_pieces else parameters_without_memory():
        model = from_config(config, head)
    logits_in_float32(model)
    sources = _sources(model, folder)  # looks at the names of classes, which fully_shard changes
    if not in_pieces:
        shard_model(model, ranks, device, compute_dtype=compute_dtype)
    elif any(source is None for _, _, source in _located(model, sources)):
        return load_language_model(path, revision, device, head)  # which puts together what is stored in parts
    _fill(model, sources, folder)
    model.eval()
    if head == "tokens" and not in_pieces:  # whose passes take the engine
        check_causal(model, path)
    return model


@contextlib.contextmanager
def parameters_without_memory() -> Iterator[None]:
    """While it is entered, modules are built with parameters on the meta device; buffers are real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied parameter stays the same object
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    # Every module is built by this method, and goes back to it at the end.
    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _folder(path: str, revision: str | None) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=["*.json", "model*.safetensors"]))
    except (OSError, ValueError) as error:
        raise PatterningError(
            f"{path}: the weights cannot be fetched ({first_line(error)}); fetch them into a folder and give that"
        ) from None


def _sources(model: PreTrainedModel, folder: Path) -> Sources:
    """Where everything in the files belongs, renamed as ``transformers`` does for files of older versions."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    if (folder / _INDEX).is_file():
        files = json.loads((folder / _INDEX).read_text())["weight_map"]
    elif (folder / _SINGLE).is_file():
        with safe_open(folder / _SINGLE, framework="pt") as file:
            files = dict.fromkeys(file.keys(), _SINGLE)
    else:
        raise PatterningError(
            f"{folder}: no weights in safetensors (neither {_SINGLE} nor {_INDEX}); other formats are not read, since "
            "they are unpickled: load the model where you trust it and write it with save_pretrained"
        )
    renamings = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    sources = {}
    for stored in sorted(files):
        key = stored
        for renaming in renamings:
            key, _ = renaming.rename_source_key(key)
        sources[key] = sources[stored] = (stored, folder / files[stored])
    return sources


def _located(model: PreTrainedModel, sources: Sources) -> list[tuple[nn.Parameter, list[str], tuple[str, Path] | None]]:
    """Every parameter with its names, and where it is in the files. Of tied parameters any name will do."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [(parameter, aliases, _find(model, aliases, sources)) for parameter, aliases in names.items()]


def _find(model: PreTrainedModel, names: list[str], sources: Sources) -> tuple[str, Path] | None:
    """Where something is in the files.

    A key may lack the prefix of the model without its head (``transformer.`` of GPT-2), or have one that the model has
    not.
    """
    prefix = f"{model.base_model_prefix}."
    spellings = (key for name in names for key in (name, name.removeprefix(prefix), prefix + name))
    return next((sources[key] for key in spellings if key in sources), None)


def _fill(model: PreTrainedModel, sources: Sources, folder: Path) -> None:
    """Read this rank's part of every parameter, and the persistent buffers that are there."""
    state: dict[str, Tensor] = {}
    for parameter, aliases, source in _located(model, sources):
        if source is None:
            raise PatterningError(
                f"{folder}: the weights lack {aliases[0]}, or hold it in another layout, as {min(sources)} may be; "
                "load the model whole and write it with save_pretrained(folder, save_original_format=False)"
            )
        if hasattr(parameter, "ds_tensor"):
            _read_piece(parameter, *source)
            continue
        filled = nn.Parameter(_read(parameter, *source), requires_grad=parameter.requires_grad)
        state |= dict.fromkeys(aliases, filled)
    persistent = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in persistent and (source := _find(model, [name], sources)) is not None:
            with safe_open(source[1], framework="pt") as file:
                state[name] = file.get_tensor(source[0]).to(buffer)
    # Assigned, not copied: the parameters of the module have no memory yet. fully_shard pads uneven parts in a hook.
    model.load_state_dict(state, strict=False, assign=True)


def _read(parameter: nn.Parameter, key: str, path: Path) -> Tensor:
    """This rank's rows of a tensor in a file, in float32, laid out like ``parameter``."""
    with safe_open(path, framework="pt") as file:
        stored = file.get_slice(key)
        _check_shape(stored, parameter.shape, key, path)
        if not isinstance(parameter, DTensor):
            return stored[:].to(torch.float32)
        mesh, placements = parameter.device_mesh, parameter.placements
        shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
        rows = stored[offset[0] : offset[0] + shape[0]].to(mesh.device_type, torch.float32, copy=True)
        return DTensor.from_local(
            rows, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )


def _read_piece(parameter: Any, key: str, path: Path) -> None:
    """Fill this rank's piece of a parameter under ZeRO stage 3: a stretch of the flattened tensor, padded."""
    piece, shape = parameter.ds_tensor, parameter.ds_shape
    start = torch.distributed.get_rank() * len(piece)
    stop = min(start + len(piece), parameter.ds_numel)
    with safe_open(path, framework="pt") as file:
        stored = file.get_slice(key)
        _check_shape(stored, shape, key, path)
        if start >= stop:
            return
        width = prod(shape[1:])
        first = start // width
        rows = (stored[first : -(-stop // width)] if shape else stored[:]).reshape(-1)
        with torch.no_grad():
            piece[: stop - start].copy_(rows[start - first * width : stop - first * width])


def _check_shape(stored: Any, shape: Sequence[int], key: str, path: Path) -> None:
    if tuple(stored.get_shape()) != tuple(shape):
        raise PatterningError(
            f"{path}: {key} has shape {stored.get_shape()}, the model of config.json {list(shape)}; "
            "copy the folder again, or mend config.json"
        )
