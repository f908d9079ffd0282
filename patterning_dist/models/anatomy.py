"""The parts of a language model or classifier of ``transformers``, found by the structure of its modules.

    everything, attention, mlp, embedding, position_embedding, unembedding, head,
    layer.N, layer.N.attention, layer.N.mlp, layer.N.head.M, layer.N.kv.G

A head is its rows of the query, key and value projections, with their biases, and its columns of the output projection.
With grouped queries (Ainslie et al. 2305.13245) several heads read the same keys and values: those are then a component
of their own, ``layer.N.kv.G``, and in no head. Norms belong to ``layer.N``; norms of queries and keys, and the output
bias, to ``layer.N.attention``. The heads and groups of a layer never overlap. ``head`` makes scores or
classes of the last layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from patterning_dist.models.attention_heads import Heads, Ranges, find_heads
from patterning_dist.models.attention_layouts import LAYOUTS
from patterning_dist.models.components import Component, Piece

ATTENTION_NAMES = ("self_attn", "self_attention", "attn", "attention")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "shared_mlp", "fc1", "fc2")
POSITION_NAMES = ("wpe", "embed_positions", "position_embeddings", "positions_embed")

_HEAD = re.compile(r"layer\.(\d+)\.(?:head|kv)\.\d+$")


@dataclass(frozen=True)
class Layer:
    """One block of the model; ``heads`` is a sentence about why they are not known where they are not."""

    block: nn.Module
    attention: nn.Module | None
    mlp: tuple[nn.Module, ...]
    heads: Heads | str


def language_model_components(model: nn.Module) -> dict[str, Component]:
    """Every component of a language model or classifier that has a name, see the module docstring.

    Args:
        model: a ``transformers.PreTrainedModel``; its weights are not looked at and may be on the ``meta`` device.
    """
    pieces = _Pieces(model)
    layers = find_layers(model)
    components = [Component("everything", pieces.of(model.parameters()))]
    if attention := pieces.of(p for layer in layers if layer.attention for p in layer.attention.parameters()):
        components.append(Component("attention", attention))
    if mlp := pieces.of(p for layer in layers for module in layer.mlp for p in module.parameters()):
        components.append(Component("mlp", mlp))
    embedding, unembedding = _parameters(model.get_input_embeddings()), _parameters(model.get_output_embeddings())
    tied = {id(p) for p in embedding} & {id(p) for p in unembedding}
    components.append(Component("embedding", pieces.of(embedding), note="tied to the unembedding" if tied else ""))
    if positions := pieces.of(_position_parameters(model)):
        components.append(Component("position_embedding", positions))
    for number, layer in enumerate(layers):
        components += _layer_components(f"layer.{number}", layer, pieces)
    if unembedding:
        note = "tied: the same parameter as the embedding" if tied else ""
        components.append(Component("unembedding", pieces.of(unembedding), note=note))
    else:  # scores or classes are made of the last layer instead
        inner = {id(p) for p in model.base_model.parameters()}
        components.append(Component("head", pieces.of(p for p in model.parameters() if id(p) not in inner)))
    return {component.name: component for component in components if component.pieces}


def missing_head(model: nn.Module, name: str) -> str | None:
    """Why ``layer.N.head.M`` or ``layer.N.kv.G`` does not exist though layer N does, and what to write instead."""
    match, layers = _HEAD.match(name), find_layers(model)
    if not match or int(match[1]) >= len(layers):
        return None
    layer = layers[int(match[1])]
    if isinstance(layer.heads, Heads):
        if ".kv." in name and layer.heads.num_groups == layer.heads.num_heads:
            return "every head of this layer has keys and values of its own: they are in the head"
        return f"this layer has heads 0 to {layer.heads.num_heads - 1} and {layer.heads.num_groups} key/value groups"
    parameters = {id(p): parameter for parameter, p in model.named_parameters()}
    example = next(parameters[id(p)] for p in (layer.attention or layer.block).parameters())
    known = "; ".join(layout.description for layout in LAYOUTS)
    return (
        f"{layer.heads} (known are {known}); name the rows of the head by a pattern of parameter names, "
        f"like {example}[0:64]"
    )


def find_layers(model: nn.Module) -> list[Layer]:
    """The blocks of the model, from the bottom; empty if no list of modules is as long as the config says."""
    config = model.config.get_text_config(decoder=True)
    num_layers = getattr(config, "num_hidden_layers", None)
    # Some name their output projection "decoder", which get_decoder then returns.
    modules = (module for root in (model.get_decoder(), model) for module in root.modules())
    blocks = next((m for m in modules if isinstance(m, nn.ModuleList) and len(m) == num_layers), ())
    configs = getattr(config, "per_layer_config", None)  # one a layer, where layers may differ
    layers = []
    for number, block in enumerate(blocks):
        children = dict(block.named_children())
        attention = next((children[name] for name in ATTENTION_NAMES if name in children), None)
        mlp = tuple(children[name] for name in MLP_NAMES if name in children)
        heads = find_heads(attention, configs[number] if configs else config) if attention else "it has no attention"
        layers.append(Layer(block, attention, mlp, heads))
    return layers


def _layer_components(name: str, layer: Layer, pieces: _Pieces) -> Iterator[Component]:
    yield Component(name, pieces.of(layer.block.parameters()))
    if layer.attention is not None:
        heads = layer.heads
        note = heads if isinstance(heads, str) else heads.unowned(layer.attention)
        yield Component(f"{name}.attention", pieces.of(layer.attention.parameters()), note=note)
    yield Component(f"{name}.mlp", pieces.of(p for module in layer.mlp for p in module.parameters()))
    if isinstance(layer.heads, str):
        return
    mixing = ", ".join(heads.mixing_norms)
    note = f"norm over all heads ({mixing}): moving one head rescales the others" if mixing else ""
    for head in range(heads.num_heads):
        shared = f"reads {name}.kv.{head // heads.heads_per_group}" if heads.num_groups < heads.num_heads else ""
        yield Component(
            f"{name}.head.{head}", pieces.ranges(heads.head(head)), note="; ".join(filter(None, (shared, note)))
        )
    if heads.num_groups < heads.num_heads:
        for group in range(heads.num_groups):
            first = group * heads.heads_per_group
            readers = f"keys and values of heads {first} to {first + heads.heads_per_group - 1}"
            yield Component(
                f"{name}.kv.{group}",
                pieces.ranges(heads.key_value(group)),
                note="; ".join(filter(None, (readers, note))),
            )


class _Pieces:
    """From parameters to pieces, in the order of the model; a parameter with two names goes by its first."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(p): (order, name) for order, (name, p) in enumerate(model.named_parameters())}

    def of(self, parameters: Iterable[Tensor]) -> tuple[Piece, ...]:
        unique = {id(p): p for p in parameters}
        ordered = sorted((*self._names[key], p) for key, p in unique.items())
        return tuple(Piece.whole(name, p.shape) for _, name, p in ordered)

    def ranges(self, ranges: Ranges) -> tuple[Piece, ...]:
        """Ranges that meet become one piece."""
        ordered = sorted((*self._names[id(p)], axis, start, stop, p.shape) for p, axis, start, stop in ranges)
        merged = [ordered[0]]
        for order, name, axis, start, stop, shape in ordered[1:]:
            if merged[-1][1] == name and merged[-1][4] == start:
                merged[-1] = (*merged[-1][:4], stop, shape)
            else:
                merged.append((order, name, axis, start, stop, shape))
        return tuple(Piece.along(name, shape, axis, start, stop) for _, name, axis, start, stop, shape in merged)


def _parameters(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())


def _position_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, m in model.get_decoder().named_modules() if name in POSITION_NAMES for p in m.parameters()]
