"""Low-rank adapters as PEFT writes them (LoRA, Hu et al. 2106.09685): W x + (alpha / r) B A x.

A model with an adapter has the parameters of its base and, beside those of every layer that is adapted,
``lora_A.weight`` [r, in] and ``lora_B.weight`` [out, r], under the names that they have in the adapter's file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from patterning_dist.errors import PatterningError
from patterning_dist.models.checkpoint import SINGLE, Stored, read_json, some, stored_in
from patterning_dist.storage.files import atomic_path, write_json

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight$")
_MERGE = "merge it (merge_and_unload of peft) and write the model with save_pretrained"


@dataclass(frozen=True)
class Adapter:
    """An adapter folder.

    Attributes:
        folder: of the adapter.
        base: folder of the model that it belongs to, or its name on the hub.
        revision: of the base on the hub.
        settings: of adapter_config.json.
        tensors: by the name of the parameter, see the module docstring.
    """

    folder: Path
    base: str
    revision: str | None
    settings: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    def scaling(self, module: str, rank: int) -> float:
        """alpha / r of one layer; of rank-stabilised adapters alpha / sqrt(r) (2312.03732)."""
        alpha: float = self.settings.get("lora_alpha", 8)
        for pattern, own in (self.settings.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = own
                break
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)


def read_adapter(path: str) -> Adapter | None:
    """The adapter in a folder; None if there is none.

    Raises:
        PatterningError: it is of another kind than LoRA, its base is not there, or its weights are not in safetensors.
    """
    folder = Path(path)
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    settings = read_json(folder / ADAPTER_CONFIG)
    kind = settings.get("peft_type", "LORA")
    special = [key for key in ("use_dora", "lora_bias", "alora_invocation_tokens") if settings.get(key)]
    if kind != "LORA" or special:
        raise PatterningError(f"{path}: an adapter of kind {special[0] if special else kind}, not plain LoRA; {_MERGE}")
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise PatterningError(f"{path}/{ADAPTER_CONFIG}: base_model_name_or_path is not there; write the base's folder")
    beside = folder / base
    files = [folder / name for name in (_WEIGHTS, SINGLE) if (folder / name).is_file()]
    if not files:
        raise PatterningError(f"{path}: no {_WEIGHTS} in this folder; write the adapter with save_pretrained")
    tensors = {stored.key.removeprefix(_PREFIX): stored for stored in stored_in(files[0])}
    return Adapter(
        folder, str(beside.resolve()) if beside.is_dir() else base, settings.get("revision"), settings, tensors
    )


def attach_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Give a model the layers of an adapter, not yet filled; ``adapter_parameters`` are the names of what it brings.

    Raises:
        PatterningError: weights that a layer of this model has no place for.
    """
    known = {name for name, _ in model.named_parameters()}
    modules = dict(model.named_modules())
    ranks: dict[str, dict[str, int]] = {}
    foreign = []
    for name, stored in adapter.tensors.items():
        found = _LOW_RANK.match(name)
        if found and hasattr(modules.get(found["module"]), "weight") and len(stored.shape) == 2:
            ranks.setdefault(found["module"], {})[found["part"]] = stored.shape[found["part"] == "B"]
        elif name not in known:
            foreign.append(name)
    foreign += [name for name, parts in ranks.items() if len(parts) < 2 or len(set(parts.values())) > 1]
    if foreign:
        raise PatterningError(
            f"{adapter.folder}: {some(foreign)} of the adapter cannot be placed in a {type(model).__name__} of "
            f"{adapter.base}; give the base it was trained on, or {_MERGE}"
        )
    for name, parts in ranks.items():
        _attach(modules[name], parts["A"], adapter.scaling(name, parts["A"]))
    model.adapter_parameters = tuple(adapter.tensors)  # type: ignore[assignment]  # names, no tensor


def adapter_parameters(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that an adapter brought; none of a model without."""
    return getattr(model, "adapter_parameters", ())


def initialise_adapter(model: nn.Module, seed: int) -> None:
    """Begin as PEFT does: A Kaiming-uniform as ``nn.Linear``, B zero, so that the model is its base.

    Weights saved beside (``modules_to_save``), as of the head of a reward model, stay what they are.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_A.weight"):
                fresh = torch.empty(parameter.shape)  # on the CPU: the same on any device
                nn.init.kaiming_uniform_(fresh, a=math.sqrt(5))
                parameter.copy_(fresh)
            elif name.endswith("lora_B.weight"):
                parameter.zero_()


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """adapter_config.json, and what was trained under the names that ``peft`` has, if its weights are there already."""
    base = str(Path(adapter.base).resolve()) if Path(adapter.base).is_dir() else adapter.base
    write_json(folder / ADAPTER_CONFIG, {**adapter.settings, "base_model_name_or_path": base})
    if (folder / SINGLE).is_file():
        with atomic_path(folder / _WEIGHTS) as temporary:
            save_file({_PREFIX + key: w for key, w in load_file(folder / SINGLE).items()}, temporary, {"format": "pt"})


def freeze_base(model: nn.Module) -> None:
    """Of a model with an adapter let only that be trained."""
    if mine := set(adapter_parameters(model)):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in mine)


def _attach(module: nn.Module, rank: int, scaling: float) -> None:
    weight: Any = module.weight
    out, into = getattr(weight, "ds_shape", weight.shape)
    if type(module).__name__ == "Conv1D":  # of GPT-2, which keeps the transpose
        out, into = into, out
    module.lora_A, module.lora_B = nn.Linear(into, rank, bias=False), nn.Linear(rank, out, bias=False)
    module.lora_scaling = scaling  # type: ignore[assignment]  # a number, no tensor
    module.register_forward_hook(_add)


def _add(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + module.lora_scaling * module.lora_B(module.lora_A(inputs[0]))
