"""The attention-only transformer as a chain's target: everything below the component is computed once and kept."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from patterning_dist.models.components import Vector
from patterning_dist.sampling.observables import SplitLosses
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.restricted import RestrictedModel
from patterning_dist.sampling.target import Measurement, columns


class LayeredTarget:
    """A ``Target`` on one rank; see there.

    Args:
        model: restricted to the component, at w*.
        training_tokens: sequence ids -> token ids [sequence, position].
        probe: token ids of the samples whose losses are recorded [sequence, position].
        splits: split losses.
        num_component_losses: how many observables are the probe's mean loss itself; they come first.
        functions: the user's observables; they come last.
    """

    def __init__(
        self,
        model: RestrictedModel,
        *,
        training_tokens: Callable[[np.ndarray], np.ndarray],
        probe: Tensor,
        splits: SplitLosses,
        num_component_losses: int = 0,
        functions: tuple[Callable[[torch.nn.Module], Tensor], ...] = (),
    ) -> None:
        self.model, self.training_tokens, self.splits = model, training_tokens, splits
        self.num_component_losses, self.functions = num_component_losses, functions
        self.name, self.center, self.device, self.ranks = model.component.name, model.center, probe.device, Ranks()
        self.totals = {name: w.numel() for name, w in model.center.items()}
        self.extents = {name: (0, total) for name, total in self.totals.items()}
        self.probe = model.freeze(probe)
        self.held_out = model.freeze(splits.tokens.to(self.device)) if len(splits.names) else None
        self.coefficients = splits.coefficients.to(self.device)

    def live(self) -> Vector:
        """Views into the model's parameters."""
        return {name: w.detach() for name, w in self.model.component.free(self.model.parameters).items()}

    def gradient(self, ids: np.ndarray) -> tuple[float, Vector]:
        """Mean loss of the sequences ``ids`` in nats, and its gradient."""
        return self.model.mean_loss_gradient(torch.from_numpy(self.training_tokens(ids)).to(self.device))

    def measure(self) -> Measurement:
        """Observables and probe losses at the present position."""
        probe = self.model.losses(self.probe).double().cpu()
        observables = [probe.mean().expand(self.num_component_losses)]
        if self.held_out is not None:
            held_out = self.model.losses(self.held_out).double().cpu()
            observables.append((self.splits.coefficients.double().cpu() * held_out).sum(dim=(1, 2)))
        with torch.no_grad():
            observables += [f(self.model.model).double().cpu().reshape(-1) for f in self.functions]
        return Measurement(torch.cat(observables), columns(probe), probe.mean().item())

    def split_gradients(self) -> list[Vector]:
        """Gradients of the split losses with respect to the free coordinates, for the response direction."""
        return self.model.gradients(self.held_out, self.coefficients)
