"""The parts of a language model or classifier of ``transformers``, found by the structure of its modules.

    everything, attention, mlp, mixer, experts, router, embedding, position_embedding, unembedding, head, adapter,
    layer.N, layer.N.attention, layer.N.mlp, layer.N.mixer, layer.N.head.M, layer.N.kv.G,
    layer.N.expert.M, layer.N.router, layer.N.shared_expert

A head is its rows of the query, key and value projections, with their biases, and its columns of the output projection.
With grouped queries (Ainslie et al. 2305.13245) several heads read the same keys and values: those are then a component
of their own, ``layer.N.kv.G``, and in no head. Norms belong to ``layer.N``; norms of queries and keys, and the output
bias, to ``layer.N.attention``. The heads and groups of a layer never overlap. ``head`` makes scores or
classes of the last layer. ``mixer`` is what mixes positions without attention: a state-space model, a recurrence, a
convolution. Of a mixture of experts, which is the ``mlp`` of its layer, ``expert.M`` is the slice of one expert in
every stacked parameter, ``router`` chooses, and ``shared_expert`` is for every token. ``adapter`` is what a low-rank
adapter brings; it belongs to layers and attention too, and to no head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from patterning_dist.models.adapter import adapter_parameters
from patterning_dist.models.attention_heads import Heads, Ranges, find_heads
from patterning_dist.models.attention_layouts import LAYOUTS, class_names
from patterning_dist.models.components import Component, Piece

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedModel

ATTENTION_NAMES = ("self_attn", "self_attention", "attn", "attention", "multi_head_attention")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "shared_mlp", "mlp_block", "fc1", "fc2")
MIXER_NAMES = ("mixer", "mamba", "linear_attn", "temporal_block", "conv")  # the class says which of the three it is
ROUTER_NAMES = ("gate", "router")
SHARED_EXPERT_NAMES = ("shared_expert", "shared_experts", "shared_expert_gate", "shared_mlp")
POSITION_NAMES = ("wpe", "embed_positions", "position_embeddings", "positions_embed")

_HEAD = re.compile(r"layer\.(\d+)\.(?:head|kv|expert)\.\d+$")


@dataclass(frozen=True)
class Layer:
    """One block of the model; ``heads`` is a sentence about why they are not known where they are not."""

    block: nn.Module
    attention: nn.Module | None
    mlp: tuple[nn.Module, ...]
    mixer: tuple[nn.Module, ...]
    heads: Heads | str

    def named(self, names: tuple[str, ...]) -> list[nn.Parameter]:
        """Parameters of the modules of the mlp, at any depth, that have one of these names."""
        return [
            p
            for part in self.mlp
            for name, module in part.named_modules()
            if name.rpartition(".")[2] in names
            for p in module.parameters()
        ]

    @property
    def experts(self) -> list[Ranges]:
        """What each expert has of the parameters that hold them all, along axis 0, or modules of its own."""
        found: list[Ranges] = []
        if not self.named(ROUTER_NAMES):
            return found
        for module in (module for part in self.mlp for module in part.modules()):
            own = [p for _, p in module.named_parameters(recurse=False) if p.dim() > 1]
            if any(p.dim() == 3 for p in own) and len({p.shape[0] for p in own}) == 1:
                parts: list[Ranges] = [[(p, 0, i, i + 1) for p in own] for i in range(own[0].shape[0])]
            elif isinstance(module, nn.ModuleList) and len(module) > 1:
                parts = [[(p, 0, 0, p.shape[0]) for p in expert.parameters()] for expert in module]
            else:
                continue
            found = [a + b for a, b in zip(found or [[] for _ in parts], parts, strict=False)]
        return found


def language_model_components(model: PreTrainedModel) -> dict[str, Component]:
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
    for name, found in (
        ("mixer", [p for layer in layers for module in layer.mixer for p in module.parameters()]),
        ("experts", [p for layer in layers for expert in layer.experts for p, *_ in expert]),
        ("router", [p for layer in layers if layer.experts for p in layer.named(ROUTER_NAMES)]),
    ):
        components.append(Component(name, pieces.of(found)))
    embedding, unembedding = _parameters(model.get_input_embeddings()), _parameters(model.get_output_embeddings())
    tied = {id(p) for p in embedding} & {id(p) for p in unembedding}
    components.append(Component("embedding", pieces.of(embedding), note="tied to the unembedding" if tied else ""))
    if positions := pieces.of(_position_parameters(model)):
        components.append(Component("position_embedding", positions))
    for number, layer in enumerate(layers):
        components += _layer_components(f"layer.{number}", layer, pieces)
    if unembedding:
        note = "tied: the same parameter as the embedding" if tied else ""
        if getattr(model, "untied_by_file", False):
            note = "config.json says that it is tied to the embedding, and the file holds another matrix: it is not"
        components.append(Component("unembedding", pieces.of(unembedding), note=note))
    else:  # scores or classes are made of the last layer instead
        inner = {id(p) for p in model.base_model.parameters()}
        components.append(Component("head", pieces.of(p for p in model.parameters() if id(p) not in inner)))
    if mine := adapter_parameters(model):
        components.append(Component("adapter", pieces.of(map(model.get_parameter, mine))))
    return {component.name: component for component in components if component.pieces}


def missing_head(model: PreTrainedModel, name: str) -> str | None:
    """Why a head, a group or an expert does not exist though its layer does, and what to write instead."""
    match, layers = _HEAD.match(name), find_layers(model)
    if not match or int(match[1]) >= len(layers):
        return None
    layer = layers[int(match[1])]
    if ".expert." in name:
        return f"this layer has experts 0 to {len(layer.experts) - 1}" if layer.experts else "this layer has no experts"
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


def find_layers(model: PreTrainedModel) -> list[Layer]:
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
        mixers = [children[name] for name in MIXER_NAMES if name in children]
        attention = attention or next((module for module in mixers if _is_a(module, "Attention")), None)
        mlp += tuple(module for module in mixers if _is_a(module, "MLP", "Mlp", "MoE", "Moe"))
        mixer = tuple(module for module in mixers if module is not attention and module not in mlp)
        heads = find_heads(attention, configs[number] if configs else config) if attention else "it has no attention"
        layers.append(Layer(block, attention, mlp, mixer, heads))
    return layers


def moving_heads(model: PreTrainedModel, component: Component, heads: Heads) -> list[int] | None:
    """Heads of a layer whose outputs a component moves; None where it has more than parts of heads and groups."""
    pieces, size = _Pieces(model), heads.heads_per_group
    owned = [(heads.head(head), [head]) for head in range(heads.num_heads)]
    if heads.num_groups < heads.num_heads:
        readers = [list(range(group * size, (group + 1) * size)) for group in range(heads.num_groups)]
        owned += [(heads.key_value(group), mine) for group, mine in enumerate(readers)]
    every = pieces.ranges([part for parts, _ in owned for part in parts])
    if not all(any(whole.covers(piece) for whole in every) for piece in component.pieces):
        return None
    found = {
        head
        for parts, movers in owned
        if any(part.overlaps(piece) for part in pieces.ranges(parts) for piece in component.pieces)
        for head in movers
    }
    return sorted(found)


def _layer_components(name: str, layer: Layer, pieces: _Pieces) -> Iterator[Component]:
    yield Component(name, pieces.of(layer.block.parameters()))
    if layer.attention is not None:
        note = layer.heads if isinstance(layer.heads, str) else layer.heads.unowned(layer.attention)
        yield Component(f"{name}.attention", pieces.of(layer.attention.parameters()), note=note)
    yield Component(f"{name}.mlp", pieces.of(p for module in layer.mlp for p in module.parameters()))
    yield Component(f"{name}.mixer", pieces.of(p for module in layer.mixer for p in module.parameters()))
    if experts := layer.experts:
        yield Component(f"{name}.router", pieces.of(layer.named(ROUTER_NAMES)))
        yield Component(f"{name}.shared_expert", pieces.of(layer.named(SHARED_EXPERT_NAMES)))
        for number, expert in enumerate(experts):
            yield Component(f"{name}.expert.{number}", pieces.ranges(expert))
    if isinstance(layer.heads, str):
        return
    heads = layer.heads
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


def _is_a(module: nn.Module, *endings: str) -> bool:
    """By the class; sharding a module gives it one of its own."""
    return any(name.endswith(endings) for name in class_names(module))


def _parameters(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())


def _position_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    return [p for name, m in model.get_decoder().named_modules() if name in POSITION_NAMES for p in m.parameters()]
