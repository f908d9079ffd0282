"""A layered language model of which only one component may move.

Layers below the component are frozen, so their output is computed once for every batch that is evaluated again and
again (the probe, the held-out splits), and no gradient is taken through them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from patterning_dist.models.attention import AttentionOnlyTransformer
from patterning_dist.models.components import Component, Vector
from patterning_dist.models.losses import token_losses


class FrozenBatch:
    """Tokens [sequence, position] and, per chunk, the residual stream that enters the component's first layer."""

    def __init__(self, tokens: Tensor, streams: list[Tensor]) -> None:
        self.tokens = tokens
        self.streams = streams

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(residual stream, tokens) of one chunk of sequences after another."""
        return zip(self.streams, self.tokens.split(self.streams[0].shape[0]), strict=True)


class RestrictedModel:
    """Losses and gradients of a model as functions of the free coordinates of one component.

    Args:
        model: its parameters become this object's working copy; dropout off, the checkpoint w* loaded.
        component: what may move.
    """

    def __init__(self, model: AttentionOnlyTransformer, component: Component) -> None:
        self.model = model.eval().requires_grad_(False)
        self.component = component
        self.parameters = dict(model.named_parameters())
        self.center = {name: w.clone() for name, w in component.free(self.parameters).items()}
        self._embedding_moves = "embedding" in component.parameters
        for name in component.parameters:
            self.parameters[name].requires_grad_(True)

    def place(self, position: Mapping[str, Tensor]) -> None:
        """Move the component to ``position`` (piece name -> free coordinates)."""
        self.component.assign(self.parameters, position)

    def freeze(self, tokens: Tensor, chunk_size: int = 16) -> FrozenBatch:
        """Run the frozen layers on ``tokens`` once, ``chunk_size`` sequences at a time."""
        tokens = tokens.to(next(iter(self.parameters.values())).device)
        return FrozenBatch(tokens, [self._below(chunk[:, :-1]) for chunk in tokens.split(chunk_size)])

    def losses(self, batch: FrozenBatch) -> Tensor:
        """Per-token losses [sequence, position] in nats at the present position, without gradients."""
        with torch.no_grad():
            return torch.cat([self._chunk_losses(stream, tokens) for stream, tokens in batch.chunks()])

    def gradients(self, batch: FrozenBatch, coefficients: Tensor) -> list[Vector]:
        """Gradients of phi_k = sum_{s,p} coefficients[k, s, p] l_{s,p} with respect to the free coordinates.

        Args:
            batch: S sequences.
            coefficients: [observable, sequence, position].
        """
        totals: list[Vector] = [{} for _ in coefficients]
        start = 0
        for stream, tokens in batch.chunks():
            part = coefficients[:, start : start + len(tokens)]
            start += len(tokens)
            wanted = [k for k in range(len(part)) if part[k].any()]
            if not wanted:
                continue
            losses = self._chunk_losses(stream, tokens)
            for k in wanted:
                gradient = self._free_gradient((part[k] * losses).sum(), retain_graph=k != wanted[-1])
                totals[k] = {n: totals[k][n] + g if n in totals[k] else g for n, g in gradient.items()}
        zeros = {name: torch.zeros_like(w) for name, w in self.center.items()}
        return [total or zeros for total in totals]

    def mean_loss_gradient(self, tokens: Tensor) -> tuple[float, Vector]:
        """Mean loss of a minibatch in nats, and its gradient with respect to the free coordinates."""
        batch = self.freeze(tokens, chunk_size=len(tokens))
        loss = self._chunk_losses(batch.streams[0], batch.tokens).mean()
        return loss.item(), self._free_gradient(loss)

    def hessian_product(self, batch: FrozenBatch, vector: Mapping[str, Tensor]) -> Vector:
        """H v of the mean loss over ``batch``, H over the free coordinates (Pearlmutter, 1994: d/dw (g . v))."""
        total = {name: torch.zeros_like(w) for name, w in self.center.items()}
        for stream, tokens in batch.chunks():
            loss = self._chunk_losses(stream, tokens).sum() / batch.tokens[:, 1:].numel()
            gradient = self._free_gradient(loss, create_graph=True)
            directional = sum((g * vector[name]).sum() for name, g in gradient.items())
            for name, product in self._free_gradient(directional).items():
                total[name] += product
        return total

    def _free_gradient(self, value: Tensor, **options: bool) -> Vector:
        names = self.component.parameters
        full = torch.autograd.grad(value, [self.parameters[n] for n in names], **options)
        return self.component.free(dict(zip(names, full, strict=True)))

    def _below(self, inputs: Tensor) -> Tensor:
        """The residual stream that enters the component's first layer; token ids where the embedding moves."""
        if self._embedding_moves:
            return inputs
        with torch.no_grad():
            return self._through(self.model.embed(inputs), self.model.layers[: self.component.first_layer])

    def _chunk_losses(self, stream: Tensor, tokens: Tensor) -> Tensor:
        x = self.model.embed(stream) if self._embedding_moves else stream
        x = self._through(x, self.model.layers[self.component.first_layer :])
        return token_losses(self.model.unembed(x), tokens)

    @staticmethod
    def _through(x: Tensor, layers: list[Callable[[Tensor], Tensor]]) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x
