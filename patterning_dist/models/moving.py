"""What moves in one layer of a decoder: a summand of the output of its attention or of its MLP."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from patterning_dist.models.anatomy import Layer, moving_heads
from patterning_dist.models.attention_heads import Heads
from patterning_dist.models.components import Component
from patterning_dist.models.narrow import NarrowAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Part(Protocol):
    """What moves in a layer, a summand z O of the output of one of its modules."""

    module: nn.Module

    def silenced(self) -> contextlib.AbstractContextManager[Any]:
        """While it is entered, the module's output is without the part."""
        ...

    def directions(self, *arguments: Any, **options: Any) -> Tensor:
        """z, of the arguments of the module."""
        ...

    def output(self) -> Tensor | None:
        """O; None: 1."""
        ...


class HeadsPart:
    """Some heads of an attention module."""

    def __init__(self, attention: nn.Module, heads: Heads, which: list[int]) -> None:
        self.module, self._heads, self._which = attention, heads, which
        self._narrow = NarrowAttention(attention, heads, which)

    def silenced(self) -> contextlib.AbstractContextManager[Any]:
        def silence(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            found = arguments[0].clone()
            found.unflatten(-1, (self._heads.num_heads, -1))[..., self._which, :] = 0
            return (found, *arguments[1:])

        return self._heads.output.register_forward_pre_hook(silence)

    def directions(self, *arguments: Any, **options: Any) -> Tensor:
        return self._narrow(*arguments, **options)

    def output(self) -> Tensor:
        return self._narrow.output()


class ModulePart:
    """All that a module of the layer gives."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def silenced(self) -> contextlib.AbstractContextManager[Any]:
        return self.module.register_forward_hook(lambda _, __, output: like(output, torch.zeros_like(first(output))))

    def directions(self, *arguments: Any, **options: Any) -> Tensor:
        return first(self.module(*arguments, **options))

    def output(self) -> None:
        return None


def moving_part(model: PreTrainedModel, component: Component, layer: Layer, moving: set[int]) -> Part | None:
    """What of a layer moves, where that is heads or a module that can be told from the rest."""
    if layer.attention is not None and isinstance(layer.heads, Heads):
        heads, which = layer.heads, moving_heads(model, component, layer.heads)
        shared = heads.num_groups < heads.num_heads
        if which and (not shared or len({head // heads.heads_per_group for head in which}) == 1):
            return HeadsPart(layer.attention, heads, which)
    for module in (layer.attention, *(layer.mlp if len(layer.mlp) == 1 else ())):
        if module is not None and moving <= {id(p) for p in module.parameters()}:
            return ModulePart(module)
    return None


def first(output: Any) -> Tensor:
    """What a module gives: a tensor, or a tuple that begins with it."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def like(output: Any, x: Tensor) -> Any:
    """``x`` where a module gave ``output``."""
    return (x, *(None for _ in output[1:])) if isinstance(output, tuple) else x
