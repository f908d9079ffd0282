"""Components: named sets of parameters whose coordinates a restricted posterior is free to move.

Grammar (names joined by ``+`` form their union):

    everything | attention | embedding | unembedding | layer.N | layer.N.attention | layer.N.head.M

A head is the slice ``[M]`` along axis 0 of every parameter of its layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patterning_dist.errors import PatterningError

_LAYER = re.compile(r"layer\.(\d+)(?:\.attention|\.head\.(\d+))?$")


@dataclass(frozen=True)
class Component:
    """A component of a model: for every parameter it touches, the free rows along axis 0 (None: all of them).

    Attributes:
        name: as written in the configuration.
        rows: parameter name -> sorted row numbers, or None for the whole parameter.
        first_layer: the lowest layer whose output depends on the component; everything below it is frozen.
            0 for the embedding, the number of layers for the unembedding.
    """

    name: str
    rows: Mapping[str, tuple[int, ...] | None]
    first_layer: int

    def free(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The free coordinates of ``parameters`` (views where a whole parameter is free, else copies)."""
        return {
            name: parameters[name] if rows is None else parameters[name][list(rows)] for name, rows in self.rows.items()
        }

    def assign(self, parameters: Mapping[str, Tensor], free: Mapping[str, Tensor]) -> None:
        """Write free coordinates into ``parameters``, in place."""
        with torch.no_grad():
            for name, rows in self.rows.items():
                target = parameters[name]
                target.copy_(free[name]) if rows is None else target.__setitem__(list(rows), free[name])

    def num_coordinates(self, parameters: Mapping[str, Tensor]) -> int:
        """Number of free coordinates, d."""
        return sum(tensor.numel() for tensor in self.free(parameters).values())


def component_names(num_layers: int, num_heads: int) -> list[str]:
    """Every name that the grammar knows for a model of this size (without unions)."""
    heads = [f"layer.{layer}.head.{head}" for layer in range(num_layers) for head in range(num_heads)]
    return ["everything", "attention", "embedding", *[f"layer.{i}" for i in range(num_layers)], *heads, "unembedding"]


def select_component(model: nn.Module, name: str) -> Component:
    """Find the parameters that a component name stands for.

    Args:
        model: an ``AttentionOnlyTransformer``.
        name: see the grammar in the module docstring.

    Raises:
        PatterningError: no such component; the names that exist are listed.
    """
    parameters = dict(model.named_parameters())
    num_layers, num_heads = len(model.layers), model.layers[0].query.shape[0]
    merged: dict[str, tuple[int, ...] | None] = {}
    first_layers = []
    for part in name.split("+"):
        rows, first_layer = _select_one(part, parameters, num_layers, num_heads)
        first_layers.append(first_layer)
        for parameter, new in rows.items():
            old = merged.get(parameter, ())
            merged[parameter] = None if new is None or old is None else tuple(sorted({*old, *new}))
    ordered = {parameter: merged[parameter] for parameter in parameters if parameter in merged}
    return Component(name, ordered, min(first_layers))


def _select_one(
    part: str, parameters: Mapping[str, Tensor], num_layers: int, num_heads: int
) -> tuple[dict[str, tuple[int, ...] | None], int]:
    if part == "everything":
        return dict.fromkeys(parameters), 0
    if part == "attention":
        return {p: None for p in parameters if p.startswith("layers.")}, 0
    if part == "embedding":
        return {"embedding": None}, 0
    if part == "unembedding":
        return {"unembedding": None}, num_layers
    match = _LAYER.match(part)
    if match and int(match[1]) < num_layers and (match[2] is None or int(match[2]) < num_heads):
        layer = int(match[1])
        rows = None if match[2] is None else (int(match[2]),)
        return {p: rows for p in parameters if p.startswith(f"layers.{layer}.")}, layer
    raise PatterningError(
        f"component {part!r} does not exist in this model; there are: "
        f"{', '.join(component_names(num_layers, num_heads))} (join several with '+')"
    )
