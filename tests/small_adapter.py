"""A LoRA folder as peft writes it beside its base, and the model with it merged in by hand: W + (alpha / r) B A."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

RANK, ALPHA = 2, 6
LLAMA = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 12, "vocab_size": 31}
TARGETS = {"llama": ("q_proj", "v_proj", "down_proj"), "gpt2": ("c_attn", "c_fc")}


def make(
    folder: Path, model_type: str = "llama", sizes: Mapping[str, int] = MappingProxyType({}), **settings: object
) -> tuple[Path, nn.Module]:
    """An adapter beside its base, and the merged model."""
    torch.manual_seed(3)
    config = transformers.CONFIG_MAPPING[model_type](**(LLAMA if model_type == "llama" else GPT2) | sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder / "base")
    tensors: dict[str, Tensor] = {}
    scaling = ALPHA / (math.sqrt(RANK) if settings.get("use_rslora") else RANK)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS[model_type]:
            shape = module.weight.shape if isinstance(module, nn.Linear) else module.weight.T.shape
            a, b = torch.randn(RANK, shape[1]), torch.randn(shape[0], RANK)
            tensors |= {f"base_model.model.{name}.lora_{part}.weight": w for part, w in (("A", a), ("B", b))}
            own = 3 * scaling if name.endswith("1.mlp.down_proj") and "alpha_pattern" in settings else scaling
            module.weight.data += own * (b @ a if isinstance(module, nn.Linear) else (b @ a).T)
    write(folder / "adapter", tensors, **settings)
    return folder / "adapter", model


def write(folder: Path, tensors: dict[str, Tensor], **settings: object) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    known = {"peft_type": "LORA", "base_model_name_or_path": "../base", "r": RANK, "lora_alpha": ALPHA}
    (folder / "adapter_config.json").write_text(json.dumps(known | {"task_type": "CAUSAL_LM"} | settings))
