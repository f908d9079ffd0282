"""How attention modules store their heads. A new way to store them is one entry of ``LAYOUTS``.

Features that make the attention are counted in blocks of d_head: a layout says which blocks of which projection are a
head's query, and which a group's keys and values. Sizes follow from that, and are checked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

Blocks = list[tuple[str, int]]  # (projection, number of a block of d_head of its output features)

# Parameters of an attention module that do not mix heads, besides the projections. Any other makes its heads unknown.
SHARED_NAMES = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm", "sinks")


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
    """

    description: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    query: Callable[[int, int, int], Blocks]
    key_value: Callable[[int, int, int], Blocks]
    module: str = "Linear"
    model_types: tuple[str, ...] = ()

    def suits(self, attention: nn.Module, config: Any) -> bool:
        """Whether the inputs are of the right class, in a model of the right type."""
        right = all(self.module in class_names(getattr(attention, name)) for name in self.inputs)
        return right and (not self.model_types or config.model_type in self.model_types)

    def sizes(self, num_heads: int, num_groups: int, d_head: int) -> dict[str, int]:
        """Output features that each input must have, up to the last block that is in use."""
        blocks = [block for head in range(num_heads) for block in self.query(head, num_heads, num_groups)]
        blocks += [block for group in range(num_groups) for block in self.key_value(group, num_heads, num_groups)]
        return {name: (max(n for other, n in blocks if other == name) + 1) * d_head for name in self.inputs}


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


LAYOUTS = (
    Layout(
        "q_proj, k_proj, v_proj (Llama, Mistral, Qwen, Gemma, OLMo, OPT, Phi)",
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj", "out_proj", "dense"),
        lambda head, num_heads, num_groups: [("q_proj", head)],
        lambda group, num_heads, num_groups: [("k_proj", group), ("v_proj", group)],
    ),
    Layout(
        "query_key_value with rows [head, 3, d_head] (GPT-NeoX, Pythia, BLOOM)",
        ("query_key_value",),
        ("dense",),
        lambda head, num_heads, num_groups: [("query_key_value", 3 * head)],
        lambda group, num_heads, num_groups: [("query_key_value", 3 * group + i) for i in (1, 2)],
    ),
    _stacked("c_attn with columns q|k|v (GPT-2)", "c_attn", "c_proj", module="Conv1D"),
    _stacked("qkv_proj with rows q|k|v (Phi-3)", "qkv_proj", "o_proj", model_types=("phi3",)),
    _stacked("Wqkv with rows q|k|v (MPT)", "Wqkv", "out_proj", model_types=("mpt",)),
)
