"""How attention modules store their heads. A new way to store them is one entry of ``LAYOUTS``.

Features that make the attention are counted in blocks of d_head: a layout says which blocks of which projection are a
head's query, and which a group's keys and values. Sizes follow from that, and are checked. In latent attention a block
of a projection is as wide as it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Blocks = list[tuple[str, int]]  # (projection, number of a block of d_head of its output features)

# Parameters of an attention module that do not mix heads, besides the projections. Any other makes its heads unknown.
SHARED_NAMES = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm")
PER_HEAD_NAMES = ("sinks",)  # vectors of one number a head, which is its own: attention sinks of GPT-OSS
# Of latent attention (DeepSeek-V2, 2405.04434): what all heads' queries, keys and values are made of.
LATENT_NAMES = ("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm")


@dataclass(frozen=True)
class Layout:
    """One way to store heads.

    Attributes:
        description: for the message about a layout that is not known.
        inputs: modules that make queries, keys and values.
        outputs: names that the module after the heads may have; head M fills block M of its input.
        query: (head, num_heads, num_groups) -> blocks of its query.
        key_value: (group, num_heads, num_groups) -> blocks of its keys and values.
        module: class name of the inputs.
        model_types: ``config.model_type`` is one of these, where the same names are also used for another order.
        factors: of projections whose blocks are a multiple of d_head wide; None: blocks are as wide as they are, and
            heads share no keys and values.
    """

    description: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    query: Callable[[int, int, int], Blocks]
    key_value: Callable[[int, int, int], Blocks]
    module: str = "Linear"
    model_types: tuple[str, ...] = ()
    factors: Mapping[str, int] | None = field(default_factory=dict)

    def suits(self, attention: nn.Module, config: Any) -> bool:
        """Whether the inputs are of the right class, in a model of the right type."""
        right = all(self.module in class_names(getattr(attention, name)) for name in self.inputs)
        return right and (not self.model_types or config.model_type in self.model_types)

    def sizes(self, num_heads: int, num_groups: int, d_head: int) -> dict[str, int]:
        """Output features that each input must have, where blocks are of d_head or multiples of it."""
        factors, counts = self.factors or {}, self.counts(num_heads, num_groups)
        return {name: count * d_head * factors.get(name, 1) for name, count in counts.items()}

    def counts(self, num_heads: int, num_groups: int) -> dict[str, int]:
        """Blocks of each input, up to the last that is in use."""
        blocks = [block for head in range(num_heads) for block in self.query(head, num_heads, num_groups)]
        blocks += [block for group in range(num_groups) for block in self.key_value(group, num_heads, num_groups)]
        return {name: max(n for other, n in blocks if other == name) + 1 for name in self.inputs}


def class_names(module: nn.Module) -> set[str]:
    """Names of a module's class and those it derives from: sharding a module gives it a class of its own."""
    return {base.__name__ for base in type(module).__mro__}


def _stacked(
    description: str, projection: str, output: str, module: str = "Linear", model_types: tuple[str, ...] = ()
) -> Layout:
    """All queries, then all keys, then all values, in one matrix."""
    return Layout(
        description,
        (projection,),
        (output,),
        lambda head, num_heads, num_groups: [(projection, head)],
        lambda group, num_heads, num_groups: [(projection, num_heads + i * num_groups + group) for i in (0, 1)],
        module,
        model_types,
    )


def _by_group(description: str, projection: str, output: str, model_types: tuple[str, ...] = ()) -> Layout:
    """The queries of a group, its key, its value, then those of the next; one head a group where none share."""

    def query(head: int, num_heads: int, num_groups: int) -> Blocks:
        size = num_heads // num_groups
        return [(projection, head // size * (size + 2) + head % size)]

    def key_value(group: int, num_heads: int, num_groups: int) -> Blocks:
        size = num_heads // num_groups
        return [(projection, group * (size + 2) + size + i) for i in (0, 1)]

    return Layout(description, (projection,), (output,), query, key_value, model_types=model_types)


def _separate(
    description: str, names: tuple[str, str, str], outputs: tuple[str, ...], *, gates: tuple[str, ...] = (), **keys: Any
) -> Layout:
    """A matrix each for queries, keys and values, and for gates of heads where there are some."""
    query, *rest = names
    return Layout(
        description,
        (*names, *gates),
        outputs,
        lambda head, num_heads, num_groups: [(name, head) for name in (query, *gates)],
        lambda group, num_heads, num_groups: [(name, group) for name in rest],
        **keys,
    )


def _latent(query: str) -> Layout:
    return Layout(
        f"{query}, kv_b_proj (latent attention: DeepSeek, MiniCPM3, GLM-4.7-Flash)",
        (query, "kv_b_proj"),
        ("o_proj",),
        lambda head, num_heads, num_groups: [(query, head)],
        lambda group, num_heads, num_groups: [("kv_b_proj", group)],
        factors=None,
    )


def _codegen(part: int, head: int, num_heads: int) -> int:
    """CodeGen's matrix is cut in 4, as for the 4 TPU cores it was trained on: queries, values, keys of a quarter."""
    quarter = num_heads // 4 or 1  # fewer heads cannot be run
    return head // quarter * 3 * quarter + part * quarter + head % quarter


_QKV = ("q_proj", "k_proj", "v_proj")
LAYOUTS = (
    _separate(
        "q_proj, k_proj, v_proj (Llama, Mistral, Qwen, Gemma, OLMo, OPT, Phi)", _QKV, ("o_proj", "out_proj", "dense")
    ),
    _separate(
        "q_proj with a gate after each query (Qwen3-Next)", _QKV, ("o_proj",), factors={"q_proj": 2},
        model_types=("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
    ),
    _separate("gate_proj beside q_proj (AFMoE)", _QKV, ("o_proj",), gates=("gate_proj",), model_types=("afmoe",)),
    _separate("Wq, Wk, Wv (CTRL)", ("Wq", "Wk", "Wv"), ("dense",)),
    _latent("q_b_proj"),
    _latent("q_proj"),
    _by_group(
        "query_key_value with rows [group, queries and key and value, d_head] (GPT-NeoX, Pythia, BLOOM, Falcon)",
        "query_key_value", "dense",
    ),
    _by_group("c_attn with rows of one group after another (GPTBigCode)", "c_attn", "c_proj", ("gpt_bigcode",)),
    _stacked("c_attn with columns q|k|v (GPT-2)", "c_attn", "c_proj", module="Conv1D"),
    _stacked("qkv_proj with rows q|k|v (Phi-3)", "qkv_proj", "o_proj", model_types=("phi3",)),
    _stacked("Wqkv with rows q|k|v (MPT)", "Wqkv", "out_proj", model_types=("mpt",)),
    Layout(
        "qkv_proj with rows [quarter, q|v|k] (CodeGen)",
        ("qkv_proj",),
        ("out_proj",),
        lambda head, num_heads, num_groups: [("qkv_proj", _codegen(0, head, num_heads))],
        lambda group, num_heads, num_groups: [("qkv_proj", _codegen(part, group, num_heads)) for part in (2, 1)],
        model_types=("codegen",),
    ),
)  # fmt: skip
