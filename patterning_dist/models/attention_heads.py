"""The heads of an attention module: which ranges of which parameters are theirs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from patterning_dist.models.attention_layouts import (
    LATENT_NAMES,
    LAYOUTS,
    PER_HEAD_NAMES,
    SHARED_NAMES,
    Blocks,
    Layout,
    class_names,
)

Ranges = list[tuple[nn.Parameter, int, int, int]]  # (parameter, axis, start, stop)


@dataclass(frozen=True)
class Heads:
    """The heads of one attention module.

    Attributes:
        module: holds the projections that ``layout`` names.
        output: the projection after the heads; head M fills features M * d_head to (M + 1) * d_head of its input.
        num_groups: groups of heads that share keys and values; ``num_heads`` where none do.
    """

    module: nn.Module
    layout: Layout
    output: nn.Module
    num_heads: int
    num_groups: int
    d_head: int

    @property
    def heads_per_group(self) -> int:
        return self.num_heads // self.num_groups

    @cached_property
    def mixing_norms(self) -> list[str]:
        """Norms that run over all heads at once."""
        norms = [(name, getattr(getattr(self.module, name, None), "weight", None)) for name in SHARED_NAMES]
        return [
            name for name, weight in norms if weight is not None and weight.dim() == 1 and len(weight) > self.d_head
        ]

    def head(self, head: int) -> Ranges:
        """What head M owns alone."""
        blocks = self.layout.query(head, self.num_heads, self.num_groups)
        if self.num_groups == self.num_heads:
            blocks = blocks + self.layout.key_value(head, self.num_heads, self.num_groups)
        start = head * self.d_head
        return [
            *self._features(blocks),
            (self.output.get_parameter("weight"), 1 - output_axis(self.output), start, start + self.d_head),
            *((self.module.get_parameter(name), 0, head, head + 1) for name in self.per_head),
        ]

    @property
    def per_head(self) -> list[str]:
        """Parameters of one number a head."""
        return [name for name in PER_HEAD_NAMES if name in dict(self.module.named_parameters(recurse=False))]

    def key_value(self, group: int) -> Ranges:
        """The keys and values of a group."""
        return self._features(self.layout.key_value(group, self.num_heads, self.num_groups))

    def _features(self, blocks: Blocks) -> Ranges:
        found: Ranges = []
        counts = self.layout.counts(self.num_heads, self.num_groups)
        for name, number in blocks:
            projection = getattr(self.module, name)
            width = projection.weight.shape[output_axis(projection)] // counts[name]
            start, stop = number * width, (number + 1) * width
            found.append((projection.weight, output_axis(projection), start, stop))
            if projection.bias is not None:
                found.append((projection.bias, 0, start, stop))
        return found

    def unowned(self, attention: nn.Module) -> str:
        """What of the attention is in no head and no group."""
        projections = {id(getattr(self.module, name)) for name in self.layout.inputs}
        names = []
        for prefix, module in attention.named_modules():
            for parameter, _ in module.named_parameters(recurse=False):
                owned = (module is self.output and parameter == "weight") or parameter in self.per_head
                if id(module) not in projections and not owned:
                    names.append(f"{prefix}.{parameter}".lstrip("."))
        return f"with {', '.join(names)}, of no head" if names else ""


def find_heads(attention: nn.Module, config: Any) -> Heads | str:
    """The heads of an attention module, or a sentence about why they are not known.

    Args:
        attention: of one layer.
        config: of the text model, or of that layer where layers differ.
    """
    reasons = []
    for module in attention.modules():
        children = dict(module.named_children())
        for layout in LAYOUTS:
            output = next((children[name] for name in layout.outputs if name in children), None)
            if output is not None and all(name in children for name in layout.inputs) and layout.suits(module, config):
                found = _fit(attention, module, layout, output, config)
                if isinstance(found, Heads):
                    return found
                reasons.append(found)
    names = ", ".join(name for name, _ in attention.named_children()) or type(attention).__name__
    return reasons[0] if reasons else f"heads are not known in an attention of {names}"


def _fit(attention: nn.Module, module: nn.Module, layout: Layout, output: nn.Module, config: Any) -> Heads | str:
    """The heads, if every shape is what the layout says and no other parameter takes part."""
    num_heads = config.num_attention_heads
    d_head = output.get_parameter("weight").shape[1 - output_axis(output)] // num_heads
    projections = {name: getattr(module, name) for name in layout.inputs}
    sizes = {name: child.weight.shape[output_axis(child)] for name, child in projections.items()}
    num_groups = _num_groups(layout, sizes, num_heads, d_head)
    stated = next(
        (n for n in (getattr(module, a, None) for a in ("head_dim", "head_size")) if isinstance(n, int)), d_head
    )
    if num_groups is None or (layout.factors is not None and stated != d_head):
        return (
            f"heads are not known where {', '.join(f'{n} makes {s} features' for n, s in sizes.items())} "
            f"for {num_heads} heads of {d_head}"
        )
    ours = {id(p) for child in (*projections.values(), output) for p in child.parameters()}
    shared = {*SHARED_NAMES, *PER_HEAD_NAMES, *(LATENT_NAMES if layout.factors is None else ())}
    others = [n for n, p in attention.named_parameters() if id(p) not in ours and not shared & set(n.split("."))]
    if others:
        return f"heads are not known in an attention that also has {', '.join(others)}, which may mix them"
    return Heads(module, layout, output, num_heads, num_groups, d_head)


def _num_groups(layout: Layout, sizes: dict[str, int], num_heads: int, d_head: int) -> int | None:
    """Groups with which the projections have the sizes that they have; None: there are no such."""
    if layout.factors is None:
        return num_heads if all(size % num_heads == 0 for size in sizes.values()) else None
    divisors = (n for n in range(1, num_heads + 1) if num_heads % n == 0)
    return next((n for n in divisors if layout.sizes(num_heads, n, d_head) == sizes), None)


def output_axis(projection: nn.Module) -> int:
    """The axis of the weight along its output features; ``Conv1D`` of GPT-2 keeps the transpose of ``Linear``."""
    return 1 if "Conv1D" in class_names(projection) else 0
