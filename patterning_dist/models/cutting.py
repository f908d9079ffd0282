"""How a decoder can be cut around a component: found by trying.

Nothing is assumed of an architecture. The ways of ``models.around`` are tried in turn on a few tokens, with the
component displaced, and the first that gives the losses of the whole pass is taken; if none does, every pass is a whole
one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patterning_dist.models.anatomy import find_layers
from patterning_dist.models.around import AroundComponent
from patterning_dist.models.components import Component
from patterning_dist.models.moving import Part, first, moving_part
from patterning_dist.models.passes import ends_in_its_head, next_token_losses
from patterning_dist.models.readout import Readout, readout_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLES, _POSITIONS = 2, 12  # of the trial
_TOLERANCE = 1e-4  # of the root mean square of what the losses rise by
# What the code of an architecture may object to when it runs with fewer heads.
_OBJECTIONS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError)


def cut_around(model: PreTrainedModel, component: Component) -> AroundComponent | None:
    """A causal language model at w*, cut around a component; None where no way of cutting it gives the same losses."""
    layers, parameters = find_layers(model), dict(model.named_parameters())
    layer_of = {id(p): number for number, layer in enumerate(layers) for p in layer.block.parameters()}
    moving = [parameters[name] for name in component.parameters]
    numbers = {layer_of.get(id(p)) for p in moving}
    at = min((number for number in numbers if number is not None), default=len(layers))
    part = moving_part(model, component, layers[at], {id(p) for p in moving}) if numbers == {at} else None
    if not layers or (part is None and at == 0):
        return None
    trial = _Trial(model, component, [layer.block for layer in layers], part)
    forms: list[tuple[Part | None, bool]] = [(None, False)] if at > 0 else []
    if part is not None:
        if part.output() is not None and "forward" not in vars(layers[at].block):  # not computed again on the way back
            forms.insert(0, (part, False))
        forms.insert(0, (part, True))
    readouts = [trial.readout(), None] if None not in numbers else [None]
    ways = (
        AroundComponent(model, trial.blocks, trial.outputs, at, *form, readout)
        for form in forms
        for readout in dict.fromkeys(readouts)
    )
    return next((way for way in ways if trial.passes(way)), None)


class _Trial:
    """A few tokens, on which ways of cutting a model are held against whole passes; the component ends where it was."""

    def __init__(
        self, model: PreTrainedModel, component: Component, blocks: list[nn.Module], part: Part | None
    ) -> None:
        self.model, self.blocks, self._component = model, blocks, component
        config: Any = model.config
        length = min(_POSITIONS, getattr(config, "max_position_embeddings", None) or _POSITIONS) + 1
        shape, generator = (_SAMPLES, length), torch.Generator().manual_seed(0)
        tokens = torch.randint(config.get_text_config().vocab_size, shape, generator=generator)
        self._tokens = tokens.to(next(model.parameters()).device)
        self._calls: list[tuple[nn.Module, Any, Any]] = []
        with torch.no_grad(), contextlib.ExitStack() as hooks:
            for module in model.modules():
                hooks.enter_context(module.register_forward_hook(lambda *call: self._calls.append(call)))
            self._losses = next_token_losses(model, self._tokens)
        kept = [*blocks, *([part.module] if part is not None else [])]
        self.outputs = {module: output for module, _, output in self._calls if any(module is one for one in kept)}
        with self._displaced(), torch.no_grad():
            self._rises = next_token_losses(model, self._tokens) - self._losses

    def readout(self) -> Readout | None:
        """The final norm is what reads the last layer; the unembedding reads that, and the model ends there."""
        head: Any = self.model.get_output_embeddings()
        if not ends_in_its_head(self.model, head):
            return None
        last = first(self.outputs[self.blocks[-1]])
        read = [inputs[0] for module, inputs, _ in self._calls if module is head]
        norms = [
            module
            for module, inputs, output in self._calls
            if inputs and _same(inputs[0], last) and any(_same(entered, output) for entered in read)
        ]
        return readout_of(norms[0], head) if norms else None

    def passes(self, way: AroundComponent) -> bool:
        """Whether the losses with the component displaced are those of the whole model, from what lies around w*."""
        try:
            with torch.no_grad():
                state = way.below(self._tokens, 1 << 40)
                with self._displaced():
                    found = way.above(state, self._tokens) - self._losses
            with self._displaced():
                again = way.above(state, self._tokens).detach() - self._losses  # with gradients, without a table
        except _OBJECTIONS:
            return False
        rounding = 8 * torch.finfo(self._losses.dtype).eps * self._losses.abs().max()
        allowed = _TOLERANCE * self._rises.square().mean().sqrt() + rounding
        return all(bool((rises - self._rises).square().mean().sqrt() <= allowed) for rises in (found, again))

    @contextlib.contextmanager
    def _displaced(self) -> Iterator[None]:
        """Every weight of the component off by as much as its piece's root mean square, or by 0.1 where that is 0."""
        live = self._component.free({name: p.data for name, p in self.model.named_parameters()})
        kept = {name: w.clone() for name, w in live.items()}
        generator = torch.Generator().manual_seed(1)
        for w in live.values():
            size = w.square().mean().sqrt().item() or 0.1
            w += size * torch.randn(w.shape, generator=generator, dtype=w.dtype).to(w.device)
        try:
            yield
        finally:
            for name, w in live.items():
                w.copy_(kept[name])


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.data_ptr() == b.data_ptr() and a.shape == b.shape
