"""A few heads of an attention module, run by its own code: rotations, masks, caps and norms are as they are there.

The module is copied without its weights: its projections become those rows of theirs that belong to the heads, read off
the parameters at every pass, so that gradients go where they belong. What counts heads is set to how many are left.
Whether the code of an architecture stands that is for the caller to try.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from patterning_dist.models.attention_heads import Heads, output_axis

_COUNTS = ("num_heads", "num_attention_heads", "n_head", "n_heads")
_GROUPS = ("num_key_value_heads", "num_kv_heads", "kv_heads")
_WIDTHS = ("split_size", "embed_dim")

Rows = list[tuple[int, int]]  # (start, stop) along the output features of a projection


class NarrowAttention:
    """Outputs of some heads of an attention module.

    Args:
        attention: of one layer.
        heads: its heads.
        which: numbers of those that are computed; they read one group of keys and values, or one each.
    """

    def __init__(self, attention: nn.Module, heads: Heads, which: Sequence[int]) -> None:
        self._heads, self._which = heads, list(which)
        self._copy, self._inner = _copied(attention, heads.module)
        number, num_groups = len(which), 1 if heads.num_groups < heads.num_heads else len(which)
        for name, rows in _rows(heads, which, num_groups).items():
            self._inner._modules[name] = _Projection(getattr(heads.module, name), rows)
        [output] = [name for name, module in heads.module.named_children() if module is heads.output]
        self._inner._modules[output] = nn.Identity()
        for name in heads.per_head:
            del self._inner._parameters[name]
        counts = dict.fromkeys(_COUNTS, number) | dict.fromkeys(_GROUPS, num_groups)
        counts |= dict.fromkeys(_WIDTHS, number * heads.d_head) | {"num_key_value_groups": number // num_groups}
        for module in (self._copy, self._inner):
            if "config" in vars(module):
                module.config = copy.copy(module.config)
                _set(module.config, counts)
            _set(module, counts)

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        """[..., position, head * d_head], before the output projection; arguments are those of the attention."""
        for name in self._heads.per_head:
            setattr(self._inner, name, self._heads.module.get_parameter(name)[self._which])
        found = self._copy(*arguments, **options)
        return found[0] if isinstance(found, tuple) else found

    def output(self) -> Tensor:
        """[head * d_head, d_model], what the output projection makes of them."""
        weight = self._heads.output.get_parameter("weight")
        size = self._heads.d_head
        rows = _merged([(head * size, (head + 1) * size) for head in self._which])
        return _taken(weight if output_axis(self._heads.output) else weight.T, rows)


class _Projection(nn.Module):
    """Some of the output features of a linear map."""

    def __init__(self, whole: nn.Module, rows: Rows) -> None:
        super().__init__()
        self.whole, self.rows, self.transposed = whole, rows, bool(output_axis(whole))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.whole.get_parameter("weight")
        bias = self.whole._parameters.get("bias")
        taken = _taken(weight.T if self.transposed else weight, self.rows)
        return nn.functional.linear(x, taken, None if bias is None else _taken(bias, self.rows))


def _copied(attention: nn.Module, inside: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A copy of a module that shares its tensors, and the copy in it of the one that holds the projections."""
    copied = copy.copy(attention)
    copied._modules, copied._parameters = dict(attention._modules), dict(attention._parameters)
    if attention is inside:
        return copied, copied
    for name, child in attention._modules.items():
        if child is not None and inside in child.modules():
            copied._modules[name], found = _copied(child, inside)
            return copied, found
    raise ValueError("the projections are not in the attention")


def _rows(heads: Heads, which: Sequence[int], num_groups: int) -> dict[str, Rows]:
    """What the projections keep, in the order that their layout has for so few heads."""
    layout, whole, few = heads.layout, (heads.num_heads, heads.num_groups), (len(which), num_groups)
    groups = sorted({head // heads.heads_per_group for head in which})
    kept: dict[str, dict[int, int]] = {name: {} for name in layout.inputs}
    for blocks, chosen in ((layout.query, which), (layout.key_value, groups)):
        for new, old in enumerate(chosen):
            for (name, ours), (_, theirs) in zip(blocks(new, *few), blocks(old, *whole), strict=True):
                kept[name][ours] = theirs
    counts, found = layout.counts(*whole), {}
    for name, numbers in kept.items():
        projection = getattr(heads.module, name)
        width = projection.weight.shape[output_axis(projection)] // counts[name]
        found[name] = _merged([(old * width, (old + 1) * width) for _, old in sorted(numbers.items())])
    return found


def _merged(rows: Rows) -> Rows:
    """Ranges that meet become one."""
    merged = [rows[0]]
    for start, stop in rows[1:]:
        if merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def _taken(tensor: Tensor, rows: Rows) -> Tensor:
    """Rows of a tensor, a view where they are one range."""
    parts = [tensor[start:stop] for start, stop in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _set(owner: Any, values: Mapping[str, int]) -> None:
    """Numbers that an object has under these names; not those that follow from others."""
    vars(owner).update({name: value for name, value in values.items() if isinstance(vars(owner).get(name), int)})
